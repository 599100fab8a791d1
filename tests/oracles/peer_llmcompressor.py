"""Checkpoints written by llm-compressor (format compressed-tensors), with compressed-tensors' own dequantization.

python peer_llmcompressor.py --model DIR --out DIR [--text FILE] [--only NAME ...]
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.compressors.mx_utils import decompress_mx_scale
from compressed_tensors.compressors.nvfp4.helpers import unpack_fp4_from_uint8
from compressed_tensors.quantization import QuantizationConfig, apply_quantization_config
from compressed_tensors.quantization.lifecycle.forward import dequantize
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.gptq import GPTQModifier
from llmcompressor.modifiers.quantization import QuantizationModifier
from peer_io import load_model, main, read_tensors
from transformers import AutoConfig, AutoModelForCausalLM

FP8_KV = {"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": False, "symmetric": True}


def weights(
    bits: int, strategy: str = "group", symmetric: bool = True, group: int | None = 32
) -> dict[str, Any]:
    """QuantizationArgs of an integer weight."""
    size = group if strategy == "group" else None
    return {
        "num_bits": bits,
        "type": "int",
        "strategy": strategy,
        "group_size": size,
        "symmetric": symmetric,
        "dynamic": False,
    }


def integer(bits: int, **args: Any) -> dict[str, Any]:
    """A weight-only integer scheme of every linear layer but the output head."""
    return {
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights(bits, **args)}},
        "ignore": ["lm_head"],
    }


def preset(name: str, **more: Any) -> dict[str, Any]:
    return {"scheme": name, "targets": "Linear", "ignore": ["lm_head"], **more}


INT8_STATIC = {"num_bits": 8, "type": "int", "strategy": "tensor", "dynamic": False, "symmetric": True}
FP8_CHANNEL = {"num_bits": 8, "type": "float", "strategy": "channel", "dynamic": False, "symmetric": True}
FP8_TOKEN = {"num_bits": 8, "type": "float", "strategy": "token", "dynamic": True, "symmetric": True}
ATTENTION = "re:.*self_attn\\.(q|k|v|o)_proj$"
MLP = "re:.*mlp\\.(gate|up|down)_proj$"

# name -> (modifier, its arguments)
RECIPES: Mapping[str, tuple[type, dict[str, Any]]] = {
    "w4a16-sym-g32-gptq": (GPTQModifier, integer(4)),
    "w4a16-asym-g32": (QuantizationModifier, integer(4, symmetric=False)),
    "w4a16-asym-channel": (QuantizationModifier, integer(4, strategy="channel", symmetric=False)),
    "w8a16-channel": (QuantizationModifier, integer(8, strategy="channel")),
    "w2a16-g32": (QuantizationModifier, integer(2)),
    "w3a16-g32": (QuantizationModifier, integer(3)),
    "w3a16-asym-g32": (QuantizationModifier, integer(3, symmetric=False)),
    "w5a16-g32": (QuantizationModifier, integer(5)),
    "w6a16-g32": (QuantizationModifier, integer(6)),
    "w7a16-g32": (QuantizationModifier, integer(7)),
    "w8a8-dynamic": (QuantizationModifier, preset("W8A8")),
    "w8a8-static": (
        QuantizationModifier,
        {
            "config_groups": {
                "group_0": {
                    "targets": ["Linear"],
                    "weights": weights(8, strategy="channel"),
                    "input_activations": INT8_STATIC,
                }
            },
            "ignore": ["lm_head"],
        },
    ),
    "w8a8-static-asym": (
        QuantizationModifier,
        {
            "config_groups": {
                "group_0": {
                    "targets": ["Linear"],
                    "weights": weights(8, strategy="tensor"),
                    "input_activations": {**INT8_STATIC, "symmetric": False},
                }
            },
            "ignore": ["lm_head"],
        },
    ),
    "fp8-static": (QuantizationModifier, preset("FP8")),
    "fp8-dynamic": (QuantizationModifier, preset("FP8_DYNAMIC")),
    "fp8-block": (QuantizationModifier, preset("FP8_BLOCK")),
    "fp8-dynamic-kv": (QuantizationModifier, preset("FP8_DYNAMIC", kv_cache_scheme=FP8_KV)),
    "kv-only": (QuantizationModifier, {"kv_cache_scheme": FP8_KV}),
    "nvfp4": (QuantizationModifier, preset("NVFP4")),
    "nvfp4a16": (QuantizationModifier, preset("NVFP4A16")),
    "mxfp4": (QuantizationModifier, preset("MXFP4")),
    "mxfp4a16": (QuantizationModifier, preset("MXFP4A16")),
    "mxfp8": (QuantizationModifier, preset("MXFP8")),
    "mxfp8a16": (QuantizationModifier, preset("MXFP8A16")),
    "w4afp8-g32": (
        QuantizationModifier,
        {
            "config_groups": {
                "group_0": {"targets": ["Linear"], "weights": weights(4), "input_activations": FP8_TOKEN}
            },
            "ignore": ["lm_head"],
        },
    ),
    "mixed-int4-fp8": (
        QuantizationModifier,
        {
            "config_groups": {
                "group_0": {"targets": [MLP], "weights": weights(4, symmetric=False)},
                "group_1": {"targets": [ATTENTION], "weights": FP8_CHANNEL, "input_activations": FP8_TOKEN},
            },
            "ignore": ["lm_head", "re:.*layers\\.0\\.self_attn\\.o_proj$"],
        },
    ),
    "w4a16-embedding": (
        QuantizationModifier,
        {
            "config_groups": {
                "group_0": {"targets": ["Linear"], "weights": weights(4)},
                "group_1": {"targets": ["Embedding"], "weights": weights(8, strategy="channel")},
            },
            "ignore": ["lm_head"],
        },
    ),
}


def dequantized(folder: Path) -> dict[str, torch.Tensor]:
    """Each quantized weight of a saved checkpoint, computed by compressed-tensors in fp32.

    Its `decompress` computes in the dtype of the stored scale, so the scales are widened first; for FP4 it computes
    in bf16 whatever the scales are, so there its own pieces are called with fp32 instead.
    """
    config = AutoConfig.from_pretrained(folder)
    quantization = json.loads((folder / "config.json").read_text())["quantization_config"]
    del config.quantization_config
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    apply_quantization_config(model, QuantizationConfig(**quantization))
    tensors = read_tensors(folder)
    values = {}
    for name, module in model.named_modules():
        scheme = getattr(module, "quantization_scheme", None)
        state = {k.removeprefix(f"{name}."): t for k, t in tensors.items() if k.rpartition(".")[0] == name}
        if scheme is None or scheme.weights is None or "weight_scale" not in state:
            continue
        form = scheme.format or quantization["format"]
        form = getattr(form, "value", form)
        if form in ("nvfp4-pack-quantized", "mxfp4-pack-quantized"):
            packed, scale = state["weight_packed"], state["weight_scale"]
            scale = decompress_mx_scale(scale) if scale.dtype == torch.uint8 else scale
            values[name] = dequantize(
                unpack_fp4_from_uint8(packed, packed.shape[0], packed.shape[1] * 2, dtype=torch.float32),
                scale.to(torch.float32),
                args=scheme.weights,
                global_scale=state.get("weight_global_scale"),
                dtype=torch.float32,
            )
            continue
        if state["weight_scale"].dtype in (torch.bfloat16, torch.float16):
            state["weight_scale"] = state["weight_scale"].to(torch.float32)
        compressor = BaseCompressor.get_value_from_registry(form)
        values[name] = compressor.decompress(state, scheme)["weight"]
    return values


def write(recipe: str, model: Path, folder: Path, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    modifier, arguments = RECIPES[recipe]
    rows = Dataset.from_dict({"input_ids": ids.tolist(), "attention_mask": torch.ones_like(ids).tolist()})
    loaded = load_model(model)
    oneshot(
        model=loaded,
        dataset=rows,
        recipe=modifier(**arguments),
        num_calibration_samples=len(ids),
        max_seq_length=ids.shape[1],
    )
    loaded.save_pretrained(folder, save_compressed=True)
    return dequantized(folder)


if __name__ == "__main__":
    main(
        "llmcompressor",
        {name: partial(write, name) for name in RECIPES},
        "compressed_tensors BaseCompressor.decompress with scales widened to fp32; for FP4 "
        "unpack_fp4_from_uint8 and dequantize in fp32",
    )
