"""Checkpoints of bitsandbytes, torchao and HQQ, each with the library's own dequantization.

    python peer_tao.py --model DIR --out DIR [--only NAME ...]

bitsandbytes and torchao are saved by transformers, which drives them; HQQ by hqq itself, because transformers 5 reads no
HQQ model and writes none. torchao's Int4WeightOnlyConfig needs the package mslk and
Float8DynamicActivationFloat8WeightConfig a GPU, so neither is here.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from hqq.core.quantize import BaseQuantizeConfig, HQQLinear, Quantizer
from peer_io import load_model, main
from safetensors.torch import save_file
from torchao.quantization import (
    Float8WeightOnlyConfig,
    Int8DynamicActivationInt8WeightConfig,
    Int8WeightOnlyConfig,
    IntxWeightOnlyConfig,
    MappingType,
    PerGroup,
)
from torchao.quantization.quant_primitives import dequantize_affine
from torchao.quantization.quantize_.workflows import IntxUnpackedToInt8Tensor
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, TorchAoConfig


def bitsandbytes(
    arguments: dict[str, Any], model: Path, folder: Path, _: torch.Tensor
) -> dict[str, torch.Tensor]:
    """Loads quantized, saves, and dequantizes what a fresh load of the saved file holds.

    The blocks of 64 run over the flattened weight, but bitsandbytes 0.50.2's CPU kernel takes the blocks of a row to
    begin with the row, which is wrong where the width is no multiple of 64. It gets rows of one block each.
    """
    from bitsandbytes.functional import dequantize_4bit, int8_vectorwise_dequant
    from bitsandbytes.nn import Linear4bit, Linear8bitLt

    config = BitsAndBytesConfig(**arguments)
    AutoModelForCausalLM.from_pretrained(
        model, quantization_config=config, dtype=torch.bfloat16, device_map="cpu"
    ).save_pretrained(folder)
    values = {}
    for name, module in AutoModelForCausalLM.from_pretrained(folder, device_map="cpu").named_modules():
        if isinstance(module, Linear4bit):
            state = module.weight.quant_state
            shape = state.shape
            state.dtype = torch.float32  # the dtype of the result, which is otherwise the model's
            state.shape = torch.Size([shape.numel() // state.blocksize, state.blocksize])
            values[name] = dequantize_4bit(module.weight.data, state).reshape(shape)
        elif isinstance(module, Linear8bitLt):
            values[name] = int8_vectorwise_dequant(module.weight.data, module.weight.SCB)
    return values


def widened(weight: Any) -> torch.Tensor:
    """`weight` (a tensor subclass of torchao) dequantized in fp32."""
    if not isinstance(weight, IntxUnpackedToInt8Tensor):
        return weight.dequantize(torch.float32)
    low, high = torch.iinfo(torch.int8).min, torch.iinfo(torch.int8).max
    scale, zero = weight.scale.to(torch.float32), weight.zero_point
    return dequantize_affine(
        weight.qdata, weight.block_size, scale, zero, torch.int8, low, high, output_dtype=torch.float32
    )


def torchao(config: Callable[[], Any], model: Path, folder: Path, _: torch.Tensor) -> dict[str, torch.Tensor]:
    loaded = AutoModelForCausalLM.from_pretrained(
        model, quantization_config=TorchAoConfig(config()), dtype=torch.bfloat16, device_map="cpu"
    )
    loaded.save_pretrained(folder)
    values = {}
    for name, module in AutoModelForCausalLM.from_pretrained(folder, device_map="cpu").named_modules():
        weight = getattr(module, "weight", None)
        if isinstance(module, torch.nn.Linear) and hasattr(weight, "dequantize") and hasattr(weight, "scale"):
            values[name] = widened(weight)
    return values


def hqq(arguments: dict[str, Any], model: Path, folder: Path, _: torch.Tensor) -> dict[str, torch.Tensor]:
    """Each linear layer but the head becomes an HQQLinear; its state_dict is what transformers 4 saved."""
    loaded = load_model(model)
    quantization = BaseQuantizeConfig(**arguments)
    tensors, values = {}, {}
    for name, parameter in loaded.named_parameters():
        path = name.removesuffix(".weight")
        module = loaded.get_submodule(path)
        if not isinstance(module, torch.nn.Linear) or path == "lm_head":
            tensors[name] = parameter.detach()
            continue
        layer = HQQLinear(module, quantization, compute_dtype=torch.bfloat16, device="cpu", initialize=True)
        tensors |= {f"{path}.{key}": value.clone() for key, value in layer.state_dict().items()}
        wide = {key: layer.meta[key].to(torch.float32) for key in ("scale", "zero")}
        meta = {**layer.meta, **wide, "compute_dtype": torch.float32}
        values[path] = Quantizer.dequantize(layer.W_q, meta)
    config = loaded.config.to_dict()
    config["quantization_config"] = {
        "quant_config": quantization,
        "quant_method": "hqq",
        "skip_modules": ["lm_head"],
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    save_file({k: v.contiguous() for k, v in tensors.items()}, folder / "model.safetensors", {"format": "pt"})
    return values


NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.bfloat16}
CASES = {
    "bnb-nf4": partial(bitsandbytes, NF4),
    "bnb-nf4-double": partial(bitsandbytes, {**NF4, "bnb_4bit_use_double_quant": True}),
    "bnb-fp4": partial(bitsandbytes, {**NF4, "bnb_4bit_quant_type": "fp4"}),
    "bnb-int8": partial(bitsandbytes, {"load_in_8bit": True}),
    "hqq-8": partial(hqq, {"nbits": 8, "group_size": 64, "axis": 1}),
    "hqq-4": partial(hqq, {"nbits": 4, "group_size": 64, "axis": 1}),
    "hqq-4-axis0": partial(hqq, {"nbits": 4, "group_size": 64, "axis": 0}),
    "hqq-3": partial(hqq, {"nbits": 3, "group_size": 64, "axis": 1}),
    "hqq-2": partial(hqq, {"nbits": 2, "group_size": 16, "axis": 1}),
    "hqq-1": partial(hqq, {"nbits": 1, "group_size": 32, "axis": 1}),
    "torchao-int8": partial(torchao, Int8WeightOnlyConfig),
    "torchao-int8-dynamic": partial(torchao, Int8DynamicActivationInt8WeightConfig),
    "torchao-intx4-g32": partial(
        torchao, partial(IntxWeightOnlyConfig, weight_dtype=torch.int4, granularity=PerGroup(32))
    ),
    "torchao-intx3-g32-asym": partial(
        torchao,
        partial(
            IntxWeightOnlyConfig,
            weight_dtype=torch.int3,
            granularity=PerGroup(32),
            mapping_type=MappingType.ASYMMETRIC,
        ),
    ),
    "torchao-fp8": partial(torchao, Float8WeightOnlyConfig),
}

if __name__ == "__main__":
    main(
        "tao",
        CASES,
        "bitsandbytes.functional.dequantize_4bit (quant_state.dtype fp32) or int8_vectorwise_dequant; torchao "
        "tensor.dequantize(float32); hqq Quantizer.dequantize with scale and zero widened and compute_dtype fp32",
    )
