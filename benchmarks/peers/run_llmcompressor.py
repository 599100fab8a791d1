"""llm-compressor's methods: RTN, GPTQ, AWQ, SmoothQuant, FP8, FP4, SparseGPT and Wanda. See driver.py.

Its AWQ pins memory for a GPU whether there is one or not, so on a machine without one that step is left out.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from datasets import Dataset
from driver import Case, Task, main
from llmcompressor import oneshot
from llmcompressor.modifiers.gptq import GPTQModifier
from llmcompressor.modifiers.pruning import SparseGPTModifier, WandaPruningModifier
from llmcompressor.modifiers.quantization import QuantizationModifier
from llmcompressor.modifiers.transform.awq import AWQModifier
from llmcompressor.modifiers.transform.smoothquant import SmoothQuantModifier
from llmcompressor.pipelines.cache import IntermediatesCache

if not torch.accelerator.is_available():
    IntermediatesCache.pin_memory = lambda self, *_, **__: None

BATCH = 8


def integer(bits: int, group: int, *, symmetric: bool = True, observer: str | None = None) -> dict[str, Any]:
    """A weight-only integer scheme of every linear layer but the head."""
    weights = {
        "num_bits": bits,
        "type": "int",
        "strategy": "group",
        "group_size": group,
        "symmetric": symmetric,
    }
    if observer:
        weights["observer"] = observer
    return {"config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}}, "ignore": ["lm_head"]}


def preset(name: str) -> dict[str, Any]:
    return {"scheme": name, "targets": "Linear", "ignore": ["lm_head"]}


def pruned(structure: str) -> dict[str, Any]:
    """Half of every linear layer but the head."""
    return {"sparsity": 0.5, "mask_structure": structure, "targets": ["Linear"], "ignore": ["re:.*lm_head"]}


def case(*stages: tuple[Callable[..., Any], dict[str, Any]]) -> Case:
    def run(task: Task) -> None:
        ids = task.ids
        rows = Dataset.from_dict({"input_ids": ids.tolist(), "attention_mask": torch.ones_like(ids).tolist()})
        loaded = task.load()
        with task.clock.running():
            oneshot(
                model=loaded,
                dataset=rows,
                recipe=[modifier(**arguments) for modifier, arguments in stages],
                num_calibration_samples=len(ids),
                max_seq_length=ids.shape[1],
                batch_size=BATCH,
            )
        loaded.save_pretrained(task.folder, save_compressed=True)

    return Case(run, {**{modifier.__name__: arguments for modifier, arguments in stages}, "batch": BATCH})


SMOOTH = (SmoothQuantModifier, {"smoothing_strength": 0.8})
CASES = {
    "rtn-w4g128": case((QuantizationModifier, integer(4, 128))),
    "rtn-w4g32": case((QuantizationModifier, integer(4, 32))),
    "rtn-w3g128": case((QuantizationModifier, integer(3, 128))),
    **{
        f"{method}-{code}-mse": case((modifier, integer(bits, group, observer="memoryless_mse")))
        for method, modifier in (("rtn", QuantizationModifier), ("gptq", GPTQModifier))
        for code, bits, group in (("w4g128", 4, 128), ("w4g32", 4, 32), ("w3g128", 3, 128))
    },
    "gptq-w4g128": case((GPTQModifier, integer(4, 128))),
    "gptq-w4g128-plain": case((GPTQModifier, {**integer(4, 128), "actorder": None})),
    "gptq-w4g128-actorder": case((GPTQModifier, {**integer(4, 128), "actorder": "weight"})),
    "gptq-w4g128-asym": case((GPTQModifier, integer(4, 128, symmetric=False))),
    "gptq-w4g32": case((GPTQModifier, integer(4, 32))),
    "gptq-w3g128": case((GPTQModifier, integer(3, 128))),
    "gptq-w8a8": case((GPTQModifier, preset("W8A8"))),
    "awq-w4g128": case((AWQModifier, {}), (QuantizationModifier, integer(4, 128))),
    "awq-w4g128-asym": case((AWQModifier, {}), (QuantizationModifier, preset("W4A16_ASYM"))),
    "w8a8": case((QuantizationModifier, preset("W8A8"))),
    "smoothquant-w8a8": case(SMOOTH, (QuantizationModifier, preset("W8A8"))),
    "smoothquant-gptq-w8a8": case(SMOOTH, (GPTQModifier, preset("W8A8"))),
    "fp8-dynamic": case((QuantizationModifier, preset("FP8_DYNAMIC"))),
    "fp8-static": case((QuantizationModifier, preset("FP8"))),
    "nvfp4a16": case((QuantizationModifier, preset("NVFP4A16"))),
    "nvfp4a16-gptq": case((GPTQModifier, preset("NVFP4A16"))),
    "nvfp4": case((QuantizationModifier, preset("NVFP4"))),
    "mxfp4a16": case((QuantizationModifier, preset("MXFP4A16"))),
    "mxfp4a16-gptq": case((GPTQModifier, preset("MXFP4A16"))),
    "mxfp4": case((QuantizationModifier, preset("MXFP4"))),
    "sparsegpt-50": case((SparseGPTModifier, pruned("0:0"))),
    "sparsegpt-2of4": case((SparseGPTModifier, pruned("2:4"))),
    "wanda-50": case((WandaPruningModifier, pruned("0:0"))),
    "wanda-2of4": case((WandaPruningModifier, pruned("2:4"))),
    "sparsegpt-2of4-gptq-w4g128": case((SparseGPTModifier, pruned("2:4")), (GPTQModifier, integer(4, 128))),
}

if __name__ == "__main__":
    main("llm-compressor", ("llmcompressor", "compressed-tensors"), CASES)
