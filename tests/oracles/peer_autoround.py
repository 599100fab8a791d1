"""Checkpoints written by AutoRound, with its own dequantization. No optimization steps.

python peer_autoround.py --model DIR --out DIR [--text FILE] [--only NAME ...]
"""

from __future__ import annotations

import json
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import torch
from auto_round import AutoRound
from auto_round.export.export_to_awq.utils import dequantize_gemm
from peer_io import load_model, main, read_tensors
from transformers import AutoModelForCausalLM, AutoRoundConfig, AutoTokenizer


def awq_values(folder: Path) -> dict[str, torch.Tensor]:
    """(N, K) per layer, by AutoRound's dequantize_gemm with the scales widened to fp32."""
    tensors = read_tensors(folder)
    group = json.loads((folder / "config.json").read_text())["quantization_config"]["group_size"]
    values = {}
    for name in (key.removesuffix(".qweight") for key in tensors if key.endswith(".qweight")):
        qweight, qzeros, scales = (tensors[f"{name}.{part}"] for part in ("qweight", "qzeros", "scales"))
        values[name] = dequantize_gemm(qweight, qzeros, scales.to(torch.float32), 4, group).T
    return values


def layer_values(folder: Path) -> dict[str, torch.Tensor]:
    """(N, K) per layer: the loaded layer applied to the identity in fp32, which multiplies each weight by one."""
    loaded = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, device_map="cpu", quantization_config=AutoRoundConfig()
    )
    values = {}
    for name, module in loaded.named_modules():
        if hasattr(module, "qweight"):
            module.scales = module.scales.to(torch.float32)
            values[name] = module(torch.eye(module.infeatures)).T
    return values


def write(
    form: str, arguments: dict[str, Any], model: Path, folder: Path, ids: torch.Tensor
) -> dict[str, torch.Tensor]:
    tokenizer = AutoTokenizer.from_pretrained(model)
    rounding = AutoRound(
        load_model(model),
        tokenizer,
        iters=0,
        dataset=[{"input_ids": row[None], "attention_mask": torch.ones_like(row)[None]} for row in ids],
        seqlen=ids.shape[1],
        nsamples=len(ids),
        device_map="cpu",
        **arguments,
    )
    rounding.quantize_and_save(str(folder), format=form)
    for inner in [path for path in folder.iterdir() if path.is_dir()]:
        shutil.copytree(inner, folder, dirs_exist_ok=True)
        shutil.rmtree(inner)
    settings = json.loads((folder / "config.json").read_text())["quantization_config"]
    packed_as_awq = settings["quant_method"] == "awq" or settings.get("packing_format", "").endswith("awq")
    return awq_values(folder) if packed_as_awq else layer_values(folder)


W4 = {"scheme": "W4A16", "group_size": 32}
CASES = {
    "gptq-4-g32": partial(write, "auto_gptq", W4),
    "awq-4-g32": partial(write, "auto_awq", {**W4, "sym": False}),
    "own-4-g32": partial(write, "auto_round", W4),
    "own-4-g32-asym": partial(write, "auto_round", {**W4, "sym": False}),
    "own-2-g32": partial(write, "auto_round", {"scheme": "W2A16", "group_size": 32}),
    "own-3-g32": partial(write, "auto_round", {"scheme": "W3A16", "group_size": 32}),
    "own-8-g32": partial(write, "auto_round", {"scheme": "W8A16", "group_size": 32}),
}

if __name__ == "__main__":
    main(
        "autoround",
        CASES,
        "auto_round dequantize_gemm with the scales widened to fp32 (auto_awq); else the loaded layer applied to the "
        "identity in fp32",
    )
