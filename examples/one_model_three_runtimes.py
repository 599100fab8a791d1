"""One compressed model in three runtimes: GPTQ once, then llama.cpp, vLLM and ONNX Runtime with the same integers and scales.

python examples/one_model_three_runtimes.py [MODEL] [TEXT] [OUT] [--vllm PYTHON]

The model is compressed once (recipe gptq-w4g32, calibrated on TEXT) and carried into a GGUF file, a folder for vLLM and an ONNX graph. Every
compressed tensor must arrive exactly, or in a wider container with the same values; then each runtime says what the model costs: the mean KL
divergence of its predictions from the original's in fp32. They differ by no more than the runtimes' own arithmetic (llama.cpp rounds
activations to 8 bits, vLLM computes in bfloat16), which "fidelity" measures: each runtime against the numbers in its own artifact.
--vllm: an interpreter that has vLLM, where this one has not (`lconvert doctor --install vllm`).
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import lconvert
from lconvert import recipe
from lconvert.converters import lcir, targets
from lconvert.executor import execute
from lconvert.formats.gguf_blocks import SCHEMES
from lconvert.primitives.job import Calibration, Job

HERE = Path(__file__).parent
TEXT = HERE.parent / "validators" / "text" / "excerpt.txt"
#: Target, name of the artifact, the runtime that proves it.
CARRIED = (("gguf", "model.gguf", "llama.cpp"), ("vllm", "vllm", "vllm"), ("onnx", "onnx", "onnxruntime"))


class Carried(NamedTuple):
    """Verdicts of compressed tensors by kind; cost and fidelity: mean KL divergence, None where the runtime is missing."""

    target: str
    verdicts: dict[str, int]
    cost: float | None
    fidelity: float | None
    passed: bool


def compressed(model: Path, text: Path, out: Path, *, windows: int = 64, context: int = 256) -> Path:
    """The model after GPTQ, as an .lcir folder."""
    job = Job(Calibration(str(text), windows, context))
    made = recipe.load("gptq-w4g32").apply(lconvert.read(model), job)
    execute(lcir.plan(made, {"recipe": "gptq-w4g32"}), out, force=True)
    return out


def carry(model: Path, folder: Path, out: Path, python: dict[str, Path], **options: Any) -> list[Carried]:
    """The same .lcir folder in every target, proven against the original model."""
    once = lconvert.read(folder)
    found = []
    for target, name, runtime in CARRIED:
        plan = targets.plan(once, target, name)
        verdicts = Counter(i.verdict.kind for i in plan.items() if i.held or i.type in SCHEMES)
        where = out if target == "gguf" else out / name
        result = execute(plan, where, force=True)
        # embeddings stay as they are, so that the stock type of the same file size is no fair rival
        given = {
            "manifest": result.manifest,
            "runtimes": [runtime],
            "python": python,
            "relative": False,
            **options,
        }
        report = lconvert.validate(model, out / name, **given)
        try:
            cost, own = report.stats()["kld"]["mean"], report.stats("fidelity")["kld"]["mean"]
        except (KeyError, TypeError):
            cost = own = None
        found.append(Carried(target, dict(verdicts), cost, own, report.passed))
        print(
            f"{target:5} {dict(verdicts)}  cost {cost}  fidelity {own}  {'pass' if report.passed else 'FAIL'}",
            flush=True,
        )
    return found


def main() -> None:
    arguments = sys.argv[1:]
    python: dict[str, Path] = {}
    if "--vllm" in arguments:
        at = arguments.index("--vllm")
        python["vllm"] = Path(arguments[at + 1])
        del arguments[at : at + 2]
    given = [Path(a) for a in arguments[:3]]
    model, text, out = given + [HERE / "demo_model", TEXT, Path("three-runtimes")][len(given) :]
    out.mkdir(parents=True, exist_ok=True)
    rows = carry(model, compressed(model, text, out / "model.lcir"), out, python)
    (out / "result.json").write_text(json.dumps([r._asdict() for r in rows], indent=1) + "\n")


if __name__ == "__main__":
    if {"-h", "--help"} & {*sys.argv}:
        sys.exit(__doc__)
    main()
