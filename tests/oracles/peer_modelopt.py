"""Checkpoints written by ModelOpt's unified export, with ModelOpt's own dequantization.

    python peer_modelopt.py --model DIR --out DIR [--text FILE] [--only NAME ...]

NVFP4_AWQ_*, NVFP4_SVDQUANT and auto_quantize over NVFP4 run NVFP4 while they search, which ModelOpt does on a GPU only.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import modelopt.torch.quantization as mtq
import torch
from modelopt.torch.export import export_hf_checkpoint, unified_export_hf
from modelopt.torch.quantization.qtensor import FP8QTensor, MXFP4QTensor, MXFP8QTensor, NVFP4QTensor
from peer_io import load_model, main, read_tensors

INTEGERS = {"int4_awq": 4, "w4a8_awq": 4, "int8_sq": 8, "int8_wo": 8}


@contextmanager
def watched_packing() -> Iterator[list[tuple[torch.Tensor, torch.Tensor]]]:
    """Collects (stored tensor, its values in fp32) of each weight that the export rounds to integers.

    ModelOpt has no function that reads its int4 and int8 exports back, so the values are taken where it packs them.
    """
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []
    original = unified_export_hf.to_quantized_weight

    def watch(weight: torch.Tensor, scale: torch.Tensor, form: str, *rest: Any) -> torch.Tensor:
        packed = original(weight, scale, form, *rest)
        if form in INTEGERS:
            bound = 1 << INTEGERS[form] - 1
            blocks = scale.reshape(len(weight), -1)
            wide = blocks.repeat_interleave(weight.shape[1] // blocks.shape[1], 1)
            codes = (weight / wide).round().clamp(-bound, bound - 1)
            seen.append((packed.clone(), codes.to(torch.float32) * wide.to(torch.float32)))
        return packed

    unified_export_hf.to_quantized_weight = watch
    try:
        yield seen
    finally:
        unified_export_hf.to_quantized_weight = original


def floats(state: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """The fp32 values of a floating point `weight` of one layer, by ModelOpt's tensor classes."""
    weight, scale = state["weight"], state["weight_scale"]
    packed = weight.dtype == torch.uint8
    shape = torch.Size([weight.shape[0], weight.shape[1] * (2 if packed else 1)])
    if packed and "weight_scale_2" in state and scale.dtype == torch.float8_e4m3fn:
        tensor = NVFP4QTensor(shape, torch.float32, weight)
        return tensor.dequantize(
            torch.float32,
            scale=scale,
            double_scale=state["weight_scale_2"],
            block_sizes={-1: shape[1] // scale.shape[1]},
        )
    if packed:
        tensor = MXFP4QTensor(shape, torch.float32, weight)
        return tensor.dequantize(torch.float32, scale=scale, block_sizes={-1: 32})
    if scale.dtype == torch.uint8:
        return MXFP8QTensor(shape, torch.float32, weight).dequantize(torch.float32, scale=scale)
    if scale.ndim == 4:
        scale = scale[:, 0, :, 0]
    sizes = {-1: 128, -2: 128} if scale.ndim == 2 else None
    if scale.ndim == 1:
        scale = scale[:, None]
    return FP8QTensor(shape, torch.float32, weight).dequantize(torch.float32, scale=scale, block_sizes=sizes)


def dequantized(folder: Path, integers: list[tuple[torch.Tensor, torch.Tensor]]) -> dict[str, torch.Tensor]:
    tensors = read_tensors(folder)
    values = {}
    for name in (key.removesuffix(".weight_scale") for key in tensors if key.endswith(".weight_scale")):
        stored = tensors[f"{name}.weight"]
        known = [v for packed, v in integers if packed.shape == stored.shape and torch.equal(packed, stored)]
        state = {
            key.removeprefix(f"{name}."): t for key, t in tensors.items() if key.rpartition(".")[0] == name
        }
        values[name] = known[0] if known else floats(state)
    return values


def write(
    prepare: Callable[..., Any], model: Path, folder: Path, ids: torch.Tensor
) -> dict[str, torch.Tensor]:
    loaded = load_model(model)
    prepare(loaded, ids)
    with watched_packing() as integers, torch.inference_mode():
        export_hf_checkpoint(loaded, export_dir=folder)
    return dequantized(folder, integers)


def quantize(
    config: Mapping[str, Any], loaded: Any, ids: torch.Tensor, kv: Mapping[str, Any] | None = None
) -> None:
    """mtq.quantize with one configuration, and a second one for the KV cache, calibrated on `ids`."""
    chosen = copy.deepcopy(dict(config))
    if kv is not None:
        chosen["quant_cfg"] = [*chosen["quant_cfg"], *copy.deepcopy(kv["quant_cfg"])]
    mtq.quantize(loaded, chosen, lambda net: [net(row[None]) for row in ids])


def groups_of_32(config: Mapping[str, Any]) -> dict[str, Any]:
    """The preset with weight groups of 32 for its 128: the int4 exports refuse widths that are no multiple."""
    chosen = copy.deepcopy(dict(config))
    for entry in chosen["quant_cfg"]:
        settings = entry.get("cfg", [])
        for quantizer in settings if isinstance(settings, list) else [settings]:
            if (quantizer.get("block_sizes") or {}).get(-1) == 128:
                quantizer["block_sizes"][-1] = 32
    return chosen


def mixed() -> dict[str, Any]:
    """NVFP4 for the feed forward layers, FP8 for attention, the output projection of attention left alone."""
    chosen = copy.deepcopy(mtq.NVFP4_DEFAULT_CFG)
    fp8 = {"num_bits": (4, 3), "axis": None}
    attention = [
        {"quantizer_name": f"*self_attn.{name}_proj.{side}_quantizer", "cfg": fp8}
        for name in "qkv"
        for side in ("weight", "input")
    ]
    chosen["quant_cfg"] = [
        *chosen["quant_cfg"],
        *attention,
        {"quantizer_name": "*self_attn.o_proj*", "enable": False},
    ]
    return chosen


PRESETS = {
    "fp8": mtq.FP8_DEFAULT_CFG,
    "fp8-pc-pt": mtq.FP8_PER_CHANNEL_PER_TOKEN_CFG,
    "fp8-block": mtq.FP8_2D_BLOCKWISE_WEIGHT_ONLY_CFG,
    "int4-awq": groups_of_32(mtq.INT4_AWQ_CFG),
    "w4a8-awq": groups_of_32(mtq.W4A8_AWQ_BETA_CFG),
    "int8-sq": mtq.INT8_SMOOTHQUANT_CFG,
    "int8-wo": mtq.INT8_WEIGHT_ONLY_CFG,
    "nvfp4": mtq.NVFP4_DEFAULT_CFG,
    "nvfp4a16": mtq.W4A16_NVFP4_CFG,
    "nvfp4-fp8": mtq.W4A8_NVFP4_FP8_CFG,
    "mxfp4": mtq.MXFP4_DEFAULT_CFG,
    "mxfp4-fp8": mtq.W4A8_MXFP4_FP8_CFG,
    "mxfp8": mtq.MXFP8_DEFAULT_CFG,
}
CASES = {name: partial(write, partial(quantize, config)) for name, config in PRESETS.items()} | {
    "fp8-kv": partial(write, partial(quantize, mtq.FP8_DEFAULT_CFG, kv=mtq.FP8_KV_CFG)),
    "nvfp4-kv-fp8": partial(write, partial(quantize, mtq.NVFP4_DEFAULT_CFG, kv=mtq.FP8_KV_CFG)),
    "nvfp4-kv-nvfp4": partial(write, partial(quantize, mtq.NVFP4_DEFAULT_CFG, kv=mtq.NVFP4_KV_CFG)),
    "mixed": partial(write, partial(quantize, mixed())),
}

if __name__ == "__main__":
    main(
        "modelopt",
        CASES,
        "modelopt.torch.quantization.qtensor NVFP4QTensor, MXFP4QTensor, MXFP8QTensor or FP8QTensor.dequantize in "
        "fp32; int4 and int8: the rounded integers and scales passing through to_quantized_weight, multiplied in "
        "fp32. pre_quant_scale is not part of the values",
    )
