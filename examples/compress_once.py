"""Compress once, keep the result in lconvert's own format, and carry the same integers into GGUF without rounding again.

python examples/compress_once.py [MODEL] [OUT]
"""

from __future__ import annotations

import sys
from pathlib import Path

import lconvert
from lconvert import recipe
from lconvert.converters import lcir
from lconvert.executor import execute

HERE = Path(__file__).parent


def compress(model: Path, out: Path) -> dict[str, int]:
    """Number of tensors by verdict in the GGUF file."""
    compressed = recipe.load(HERE / "int4.yaml").apply(lconvert.read(model))
    folder = out / "model.lcir"
    execute(lcir.plan(compressed, {"recipe": "int4"}), folder, force=True)
    result = lconvert.convert(folder, out / "model.gguf", force=True)
    verdicts: dict[str, int] = {}
    for item in result.plan.items():
        verdicts[item.verdict.kind] = verdicts.get(item.verdict.kind, 0) + 1
    print(f"{folder} -> {result.paths[0]}: {verdicts}")
    return verdicts


if __name__ == "__main__":
    if {"-h", "--help"} & {*sys.argv}:
        sys.exit(__doc__)
    arguments = [Path(a) for a in sys.argv[1:3]]
    compress(*(arguments + [HERE / "demo_model", Path("compress-out")][len(arguments) :]))
