"""Checkpoints in formats that transformers itself defines, written and dequantized by its own conversion operations.

    python peer_transformers.py --model DIR --out DIR [--only NAME ...]

Its quantizers for FP8 and MXFP4 ask for a GPU before they start, so their conversion operations are called directly on
every linear weight; the names, shapes and dtypes are theirs. The MXFP4 and BitNet codes are random, which is all that a
reader needs.
"""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from peer_io import load_model, main
from safetensors.torch import save_file
from transformers import (
    BitNetQuantConfig,
    FineGrainedFP8Config,
    GptOssConfig,
    GptOssForCausalLM,
    LlamaConfig,
    Mxfp4Config,
)
from transformers.integrations.bitnet import pack_weights, unpack_weights
from transformers.integrations.finegrained_fp8 import Fp8Dequantize, Fp8Quantize
from transformers.integrations.mxfp4 import convert_moe_packed_tensors


def save(folder: Path, config: Any, quantization: Any, tensors: dict[str, torch.Tensor]) -> None:
    written = config.to_dict()
    written["quantization_config"] = quantization.to_dict()
    (folder / "config.json").write_text(json.dumps(written, indent=2) + "\n")
    save_file(
        {k: v.detach().contiguous() for k, v in tensors.items()},
        folder / "model.safetensors",
        {"format": "pt"},
    )


def is_quantized(name: str, tensor: torch.Tensor) -> bool:
    return tensor.ndim == 2 and "embed" not in name and "lm_head" not in name


def fp8(
    block: tuple[int, int] | None, form: str, model: Path, folder: Path, _: torch.Tensor
) -> dict[str, torch.Tensor]:
    """DeepSeek's layout, weight_scale_inv per `block` (None: per tensor) stored as `form`."""
    loaded = load_model(model)
    quantization = FineGrainedFP8Config(
        weight_block_size=block, modules_to_not_convert=["lm_head"], scale_fmt=form
    )
    quantizer = SimpleNamespace(quantization_config=quantization)
    tensors, values = {}, {}
    for name, parameter in loaded.state_dict().items():
        if not is_quantized(name, parameter):
            tensors[name] = parameter
            continue
        made = Fp8Quantize(quantizer).convert({name: parameter})
        tensors |= made
        path = name.removesuffix(".weight")
        if f"{path}.weight_scale_inv" in made:
            values[path] = Fp8Dequantize(quantizer)._dequantize_one(
                made[name], made[f"{path}.weight_scale_inv"], output_dtype=torch.float32
            )
    save(folder, loaded.config, quantization, tensors)
    return values


def gpt_oss(_: Path, folder: Path, __: torch.Tensor) -> dict[str, torch.Tensor]:
    """A gpt-oss of one layer and two experts; the values are (experts, K, N), the way its experts hold them."""
    config = GptOssConfig(
        vocab_size=32,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        num_local_experts=2,
        num_experts_per_tok=1,
        layer_types=["sliding_attention"],
        sliding_window=32,
    )
    config.architectures = ["GptOssForCausalLM"]
    generator = torch.Generator().manual_seed(3)
    tensors = GptOssForCausalLM(config).to(torch.bfloat16).state_dict()
    values = {}
    for name in [name for name in tensors if name.endswith(("gate_up_proj", "down_proj"))]:
        experts, width, rows = tensors.pop(name).shape
        blocks = torch.randint(
            0, 256, (experts, rows, width // 32, 16), generator=generator, dtype=torch.uint8
        )
        scales = torch.randint(118, 126, (experts, rows, width // 32), generator=generator, dtype=torch.uint8)
        tensors |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
        values[name] = convert_moe_packed_tensors(blocks, scales, dtype=torch.float32)
    skipped = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]
    save(folder, config, Mxfp4Config(modules_to_not_convert=skipped), tensors)
    return values


def bitnet(layer: str, model: Path, folder: Path, _: torch.Tensor) -> dict[str, torch.Tensor]:
    """Ternary codes of each weight by the BitNet b1.58 rule, packed four rows to a byte, with a scale per tensor.

    BitLinear divides its result by weight_scale and AutoBitLinear multiplies it, so the two store reciprocals.
    """
    config = LlamaConfig.from_pretrained(model)
    tensors, values = {}, {}
    for name, parameter in load_model(model).state_dict().items():
        if not is_quantized(name, parameter):
            tensors[name] = parameter
            continue
        path = name.removesuffix(".weight")
        mean = parameter.float().abs().mean()
        packed = pack_weights((parameter.float() / mean).round().clamp(-1, 1))
        codes = unpack_weights(packed, dtype=torch.float32)
        scale = (mean if layer == "autobitlinear" else 1 / mean).to(torch.bfloat16)
        tensors |= {name: packed, f"{path}.weight_scale": scale[None]}
        values[path] = codes * scale.float() if layer == "autobitlinear" else codes / scale.float()
    save(folder, config, BitNetQuantConfig(modules_to_not_convert=["lm_head"], linear_class=layer), tensors)
    return values


CASES = {
    "fp8-32": partial(fp8, (32, 32), "float"),
    "fp8-32-ue8m0": partial(fp8, (32, 32), "ue8m0"),
    "fp8-128": partial(fp8, (128, 128), "float"),
    "fp8-tensor": partial(fp8, None, "float"),
    "gpt-oss-mxfp4": gpt_oss,
    "bitnet": partial(bitnet, "bitlinear"),
    "bitnet-auto": partial(bitnet, "autobitlinear"),
}

if __name__ == "__main__":
    main(
        "transformers",
        CASES,
        "transformers Fp8Dequantize, convert_moe_packed_tensors or unpack_weights (divided by weight_scale, as BitLinear "
        "does, or multiplied, as AutoBitLinear does), in fp32",
    )
