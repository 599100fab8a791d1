"""A random gpt-oss folder in its released storage: experts in MXFP4, quantized by hand, everything else plain."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

from tests import random_models
from tests.arch_cases import Case

#: What the released folders say beside the method.
KEPT = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]


def packed(w: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows (..., K) as blocks (..., K/32, 16) of E2M1 codes, low half first, and E8M0 scales (..., K/32)."""
    levels = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
    x = w.float().reshape(*w.shape[:-1], -1, 32)
    largest = x.abs().amax(-1).clamp(min=2.0**-100)
    exponent = torch.floor(torch.log2(largest)) - 2
    scaled = x / torch.exp2(exponent)[..., None]
    codes = (scaled.abs()[..., None] - levels).abs().argmin(-1) + 8 * (scaled < 0)
    return (codes[..., ::2] | codes[..., 1::2] << 4).to(torch.uint8), (exponent + 127).to(torch.uint8)


def build(case: Case, folder: Path, **config: Any) -> Path:
    """The case's model under `folder` with its experts in MXFP4; `config` goes over its config.json."""
    random_models.build(case, folder)
    path = folder / "model.safetensors"
    out = {}
    for name, tensor in safetensors.torch.load_file(path).items():
        if name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            blocks, scales = packed(tensor.transpose(1, 2))
            out |= {name + "_blocks": blocks, name + "_scales": scales}
        else:
            out[name] = tensor
    safetensors.torch.save_file(out, path, metadata={"format": "pt"})
    stored = json.loads((folder / "config.json").read_text())
    stored["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": KEPT}
    (folder / "config.json").write_text(json.dumps(stored | config))
    return folder
