"""One compressed model in three runtimes: compressed once, then llama.cpp, vLLM and ONNX Runtime with the same integers and scales.

python examples/one_model_three_runtimes.py [MODEL] [TEXT] [OUT] [--recipe NAME] [--windows N] [--vllm PYTHON]

The model is compressed once (recipe gptq-w4g32 unless --recipe names another, calibrated on N windows of TEXT) and carried into a GGUF file,
a folder for vLLM and an ONNX graph. Every compressed tensor must arrive exactly, or in a wider container with the same values, and the proof
finds every value of the artifact equal to the compressed model's; then each runtime says what the model costs: the mean KL divergence of its
predictions from the original's in fp32. They differ by no more than the runtimes' own arithmetic (llama.cpp rounds activations to 8 bits,
vLLM computes in bfloat16), which "fidelity" measures: each runtime against the numbers in its own artifact.
--vllm: an interpreter that has vLLM, where this one has not (`lconvert doctor --install vllm`).
"""

from __future__ import annotations

import argparse
import json
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
    """Verdicts of compressed tensors by kind; equal: how many tensors have the compressed model's values, and whether that is all that
    should; cost and fidelity: mean KL divergence, None where the runtime is missing; passed: the whole proof."""

    target: str
    verdicts: dict[str, int]
    equal: str
    cost: float | None
    fidelity: float | None
    passed: bool


def compressed(
    model: Path, text: Path, out: Path, *, name: str = "gptq-w4g32", windows: int = 64, context: int = 256
) -> Path:
    """The model after the recipe `name`, as an .lcir folder."""
    job = Job(Calibration(str(text), windows, context))
    chosen = recipe.load(name)
    execute(lcir.plan(chosen.apply(lconvert.read(model), job), {"recipe": chosen.to_json()}), out, force=True)
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
        equal = next(c for c in report.checks if c.name == "equal to the compressed model")
        said = f"{equal.value}: {'pass' if equal.passed else 'FAIL'}"
        found.append(Carried(target, dict(verdicts), said, cost, own, report.passed))
        failed = [f"{c.name}: {c.value}" for c in report.checks if c.passed is False]
        print(f"{target:5} {dict(verdicts)}  equal to the compressed model: {said}")
        print(f"      cost {cost}  fidelity {own}  {'; '.join(failed) or 'pass'}", flush=True)
    return found


def main() -> None:
    ask = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ask.add_argument("model", type=Path, nargs="?", default=HERE / "demo_model")
    ask.add_argument("text", type=Path, nargs="?", default=TEXT)
    ask.add_argument("out", type=Path, nargs="?", default=Path("three-runtimes"))
    ask.add_argument("--recipe", default="gptq-w4g32")
    ask.add_argument("--windows", type=int, default=64)
    ask.add_argument("--vllm", type=Path)
    given = ask.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    once = compressed(
        given.model, given.text, given.out / "model.lcir", name=given.recipe, windows=given.windows
    )
    rows = carry(given.model, once, given.out, {"vllm": given.vllm} if given.vllm else {})
    (given.out / "result.json").write_text(json.dumps([r._asdict() for r in rows], indent=1) + "\n")


if __name__ == "__main__":
    main()
