"""Checkpoints written by GPTQModel (GPTQ v1 and v2, AWQ), with its own dequantization.

    python peer_gptqmodel.py --model DIR --out DIR [--text FILE] [--only NAME ...]

GPTQModel keeps a pool of threads and refuses machines of two cores, so it is told of eight before it is imported. Its
AWQ gemv layouts need a GPU.
"""

from __future__ import annotations

import os

os.cpu_count = lambda: 8  # type: ignore[assignment]

from functools import partial
from pathlib import Path
from typing import Any

import torch
from gptqmodel import BACKEND, GPTQModel, QuantizeConfig
from gptqmodel.nn_modules.qlinear import PackableQuantLinear
from gptqmodel.quantization import FORMAT, METHOD
from gptqmodel.quantization.awq.utils.packing_utils import dequantize_gemm
from peer_io import main, read_tensors


def gptq_values(folder: Path) -> dict[str, torch.Tensor]:
    """(N, K) per layer, by GPTQModel's uncached dequantization with the stored scales widened to fp32.

    Loading casts the fp16 scales to the model's bf16, so they are taken from the file again.
    """
    tensors = read_tensors(folder)
    loaded = GPTQModel.load(str(folder), device="cpu", backend=BACKEND.GPTQ_TORCH)
    values = {}
    for name, module in loaded.model.named_modules():
        if hasattr(module, "dequantize_weight"):
            module.scales = tensors[f"{name}.scales"].to(torch.float32)
            values[name] = PackableQuantLinear.dequantize_weight(module).T
    return values


def awq_values(group: int, folder: Path) -> dict[str, torch.Tensor]:
    """(N, K) per layer, by GPTQModel's dequantize_gemm with the scales widened to fp32."""
    tensors = read_tensors(folder)
    values = {}
    for name in (key.removesuffix(".qweight") for key in tensors if key.endswith(".qweight")):
        qweight, qzeros, scales = (tensors[f"{name}.{part}"] for part in ("qweight", "qzeros", "scales"))
        values[name] = dequantize_gemm(qweight, qzeros, scales.to(torch.float32), 4, group).T
    return values


def write(arguments: dict[str, Any], model: Path, folder: Path, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    config = QuantizeConfig(device="cpu", offload_to_disk=False, **arguments)
    loaded = GPTQModel.load(str(model), config)
    loaded.quantize(
        [{"input_ids": row, "attention_mask": [1] * len(row)} for row in ids.tolist()], batch_size=8
    )
    loaded.save(str(folder))
    if arguments.get("method") == METHOD.AWQ:
        return awq_values(arguments["group_size"], folder)
    return gptq_values(folder)


GPTQ = {"bits": 4, "group_size": 32, "desc_act": False, "act_group_aware": False, "format": FORMAT.GPTQ}
AWQ = {"bits": 4, "group_size": 32, "method": METHOD.AWQ}
# The clipping search of AWQ asks for rows in multiples of 64, which these layers of the tiny model have not.
PARTIAL = {"dynamic": {"-:.*(gate|up|down|v)_proj.*": {}}}
CONFIGS = {
    "gptq-4-g32": GPTQ,
    "gptq-4-g32-desc": {**GPTQ, "desc_act": True},
    "gptq-4-channel": {**GPTQ, "group_size": -1},
    "gptq-8-g32": {**GPTQ, "bits": 8},
    "gptq-3-g32": {**GPTQ, "bits": 3},
    "gptq-2-g32": {**GPTQ, "bits": 2},
    "gptq-4-g32-asym": {**GPTQ, "sym": False},
    "gptq2-4-g32": {**GPTQ, "format": FORMAT.GPTQ_V2},
    "gptq2-4-g32-asym": {**GPTQ, "format": FORMAT.GPTQ_V2, "sym": False},
    "gptq2-3-g32-asym": {**GPTQ, "format": FORMAT.GPTQ_V2, "sym": False, "bits": 3},
    "gptqp-5-g32": {**GPTQ, "format": FORMAT.GPTQ_P, "bits": 5},
    "gptq-mixed": {**GPTQ, "dynamic": {"+:.*mlp.*": {"bits": 8}, "-:.*o_proj.*": {}}},
    "awq-gemm-g32": {**AWQ, "format": FORMAT.GEMM},
    "awq-gemm-g32-partial": {**AWQ, "format": FORMAT.GEMM, **PARTIAL},
}

if __name__ == "__main__":
    main(
        "gptqmodel",
        {name: partial(write, arguments) for name, arguments in CONFIGS.items()},
        "gptqmodel PackableQuantLinear.dequantize_weight, or dequantize_gemm for AWQ, with the scales widened to fp32",
    )
