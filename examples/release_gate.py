"""Convert a checkpoint to two GGUF types and let only proven files through: what a release job does.

python examples/release_gate.py [MODEL] [OUT]
"""

from __future__ import annotations

import sys
from pathlib import Path

import lconvert

HERE = Path(__file__).parent


def release(model: Path, out: Path) -> list[Path]:
    """The artifacts that passed; stops at the first one that did not."""
    source = lconvert.read(model)
    passed = []
    for ftype in ("Q8_0", "Q4_K_M"):
        result = lconvert.convert(source, out / f"{source.name}-{ftype}.gguf", ftype=ftype, force=True)
        report = lconvert.validate(model, result.paths[0], max_windows=2)
        kld = report.stats("cost")["kld"]["mean"]
        print(
            f"{result.paths[0].name}: {result.plan.size / 1e6:.1f} MB, mean KLD {kld:.2e}, passed: {report.passed}"
        )
        if not report.passed:
            raise SystemExit(report.exit_code)
        passed.append(result.paths[0])
    return passed


if __name__ == "__main__":
    if {"-h", "--help"} & {*sys.argv}:
        sys.exit(__doc__)
    arguments = [Path(a) for a in sys.argv[1:3]]
    release(*(arguments + [HERE / "demo_model", Path("release-out")][len(arguments) :]))
