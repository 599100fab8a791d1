"""Every architecture through `lconvert validate`: F32, Q8_0 and Q4_K_M in llama.cpp, F32, int8 and int4 in ONNX Runtime. Prints the
README's table.

    python -P benchmarks/architectures.py [--models DIR] [--json OUT]

A folder DIR/wiki-<name> with a trained model of an architecture is used where there is one; otherwise the random model
of tests/arch_cases, which is far harder to quantize. The gates are the default ones.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import lconvert

sys.path.append(str(Path(__file__).resolve().parents[1]))  # appended, so that no folder here hides a package
from tests import arch_cases, random_models

from lconvert.archs import find, names
from lconvert.converters import onnx, onnx_presets
from lconvert.executor import execute
from lconvert.validators import parity

TRAINED = {
    "llama": "wiki-llama-12m", "mistral": "wiki-mistral", "mixtral": "wiki-mixtral", "gemma3_text": "wiki-gemma3",
    "phi3": "wiki-phi3", "gpt2": "wiki-gpt2",
}  # fmt: skip
FTYPES = ("F32", "Q8_0", "Q4_K_M")
GRAPHS = {"ONNX F32": None, "ONNX int8": "int8", "ONNX int4": "int4"}


def measure(model_type: str, models: Path | None, work: Path) -> dict[str, Any]:
    trained = models / TRAINED[model_type] if models and model_type in TRAINED else None
    row: dict[str, Any] = {"model_type": model_type, "gguf": find(model_type).gguf.arch}
    if trained and trained.is_dir():
        folder, row["model"] = trained, "trained"
    else:
        case = next(c for c in arch_cases.load() if c.model_type == model_type)
        folder, row["model"] = random_models.build(case, work / case.name), "random"
    # every further token adds to what random models amplify
    options = {"max_windows": 4, "context": 200 if row["model"] == "random" else 512}
    for ftype in FTYPES:
        path = work / f"{model_type}-{ftype}.gguf"
        lconvert.convert(folder, path, ftype=ftype)
        row[ftype] = proven(folder, path, options)
        path.unlink()
    for name, preset in GRAPHS.items():
        original = lconvert.read(folder)
        model = onnx_presets.recipe(preset, "ort").apply(original) if preset else original
        execute(onnx.plan(model, onnx.Options(), original), graph := work / f"{model_type}-{preset}")
        row[name] = proven(folder, graph, options)
    return row


def proven(folder: Path, artifact: Path, options: dict[str, Any]) -> dict[str, Any]:
    """Mean KL divergences by measure, and the verdict."""
    report = parity.validate(folder, artifact, **options)
    details = {r["measure"]: r["stats"]["kld"]["mean"] for r in report.details["logits"]}
    failed = [f"{c.tier}: {c.name} {c.value}" for c in report.checks if c.passed is False]
    return details | {"passed": report.passed, "failed": failed}


def main() -> None:
    arguments = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    arguments.add_argument("--models", type=Path, help="folder with trained models")
    arguments.add_argument("--json", type=Path)
    arguments.add_argument("--only", help="one model_type")
    options = arguments.parse_args()
    rows = []
    print(
        "| model_type | llama.cpp | weights | F32 | Q8_0 | Q4_K_M | Q4_K_M as F32 | ONNX F32 | int8 | int4 | |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|---|")
    decoders = [n for n in names() if find(n).gguf.arch]
    for model_type in [options.only] if options.only else decoders:
        with tempfile.TemporaryDirectory() as work:
            row = measure(model_type, options.models, Path(work))
        rows.append(row)
        klds = [f"{row['F32']['cost']:.1e}", f"{row['Q8_0']['cost']:.1e}", f"{row['Q4_K_M']['cost']:.1e}"]
        passed = all(row[f]["passed"] for f in (*FTYPES, *GRAPHS))
        klds.append(f"{row['Q4_K_M']['graph']:.1e}")
        klds += [
            f"{row['ONNX F32']['cost']:.1e}",
            *(f"{row[f]['fidelity']:.1e}" for f in ("ONNX int8", "ONNX int4")),
        ]
        cells = [model_type, row["gguf"], row["model"], *klds, "pass" if passed else "FAIL"]
        print("| " + " | ".join(cells) + " |", flush=True)
        for f in (*FTYPES, *GRAPHS):
            for line in row[f]["failed"]:
                print(f"    {f}: {line}")
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
