"""The gate before an engine: the graph of the same numbers, run by ONNX Runtime, must say what the model says.

    python engine_gate.py SOURCE --report parity.json

Logits of a prompt, at once and in single steps with the cache, against the model's own numbers in fp32. What ONNX Runtime's CPU cannot
run (NVFP4, FP4 inputs) is compared after dequantization, and the report says so. Exit code 1 if the gate fails.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

import lconvert
from lconvert.converters import onnx
from lconvert.executor import execute
from lconvert.forward import Forward
from lconvert.ir import E2M1, Model, QTensor

LIMIT = 2e-3  # largest difference of a logit, relative to the largest logit


def runnable(model: Model) -> tuple[Model, bool]:
    """The model without 4-bit floats, which ONNX Runtime has no kernel for: their values instead."""
    four = {n: e for n, e in model.entries.items() if isinstance(e.data, QTensor) and e.data.grid == E2M1}
    if not four:
        return model, False
    from dataclasses import replace

    from lconvert.ir import dense
    from lconvert.kernels.qtensor import values

    plain = {n: replace(e, data=dense(values(e.data)), activation=None) for n, e in four.items()}
    return model.with_entries(plain), True


def logits(path: Path, ids: list[int], cuts: list[int]) -> Any:
    """Of one sequence, fed in pieces of these lengths with keys and values carried along."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    names = [o.name for o in session.get_outputs()]
    inputs = [i for i in session.get_inputs() if i.name.startswith("past")]
    past = {i.name: np.zeros((1, i.shape[1], 0, i.shape[3]), np.float32) for i in inputs}
    at, rows = 0, []
    for n in cuts:
        feed: dict[str, Any] = {
            "input_ids": [ids[at : at + n]],
            "attention_mask": np.ones((1, at + n)),
            "position_ids": [range(at, at + n)],
        }
        out = session.run(names, {k: np.asarray(v, np.int64) for k, v in feed.items()} | past)
        past = {k.replace("present", "past_key_values"): v for k, v in zip(names[1:], out[1:], strict=True)}
        rows.append(out[0][0])
        at += n
    return np.concatenate(rows)


def gate(source: str, tokens: int = 32) -> dict[str, Any]:
    model, dequantized = runnable(lconvert.read(source))
    ids = [int(i) for i in np.random.default_rng(1).integers(0, model.arch.vocab, tokens)]
    want = Forward(model).logits(ids)
    with tempfile.TemporaryDirectory() as folder:
        execute(onnx.plan(model, onnx.Options("ort")), Path(folder) / "graph")
        path = Path(folder) / "graph" / "model.onnx"
        found = {
            "prompt": logits(path, ids, [tokens]),
            "steps": logits(path, ids, [tokens - 4, 1, 1, 1, 1]),
        }
    scale = float(np.abs(want).max())
    errors = {k: float(np.abs(v - want).max()) / scale for k, v in found.items()}
    return {
        "source": source,
        "runtime": "onnxruntime, CPU, fp32 activations",
        "dequantized_first": dequantized,
        "relative_error": errors,
        "limit": LIMIT,
        "passed": max(errors.values()) <= LIMIT,
        "not_run": "the engine: no GPU here",
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("source")
    parser.add_argument("--report", type=Path, required=True)
    given = parser.parse_args()
    report = gate(given.source)
    given.report.write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report["relative_error"]), "passed" if report["passed"] else "FAILED")
    return 0 if report["passed"] else 1


if __name__ == "__main__":
    sys.exit(main())
