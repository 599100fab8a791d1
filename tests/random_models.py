"""Small random transformers models whose every tensor matters: no zero bias, no norm of ones, sharp attention."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from tests.arch_cases import Case

transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()

#: Queries and keys get this gain, so that attention scores have a spread of about its square.
_SHARP = 1.5
_ATTENTION = ("q_proj", "k_proj", "q_b_proj", "kv_b_proj", "qkv", "query_key_value", "c_attn")


def build(case: Case, folder: Path) -> Path:
    """Save the case's model under `folder` in its dtype."""
    config = transformers.CONFIG_MAPPING[case.model_type](**case.config)
    torch.manual_seed(len(case.name))
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            loud = bool(config.tie_word_embeddings) and "post_" in name
            randomise(name, parameter, loud=loud, clamped=case.model_type == "gpt_oss")
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.copy_(0.2 * torch.randn_like(buffer))  # as much as scores differ
    model.to(getattr(torch, case.dtype)).save_pretrained(folder)
    return folder


def randomise(name: str, parameter: Any, *, loud: bool, clamped: bool = False) -> None:
    """Vectors (and per-head norms) move by 0.3 from where they start; matrices keep the size of what they multiply.

    `loud` norms let a layer drown the embedding, or a tied head just repeats the token with certainty.
    `clamped` experts get gates that go beyond their limit.
    """
    noise = torch.randn_like(parameter)
    if name.endswith(".sinks"):
        parameter.copy_(3.0 + noise)  # as much as a few of the scores
        return
    if parameter.dim() == 1 or "norm" in name or name.endswith("_proj_bias"):
        parameter.add_(0.3 * noise + (2.0 if loud else 0.0))
        if "q_norm" in name or "k_norm" in name:
            parameter.add_(0.5)
        return
    if any(part in name for part in ("embed", "wte", "wpe")) and "embed_out" not in name:
        parameter.copy_(0.12 * noise)
        return
    conv1d = "c_attn" in name or "c_proj" in name or "c_fc" in name
    fan_in = parameter.shape[0] if conv1d and "transformer.h." in name else parameter.shape[-1]
    if clamped and ".experts." in name:  # stored (expert, in, out)
        gain = 3.0 if "gate_up" in name else 0.2
        parameter.copy_(gain * parameter.shape[1] ** -0.5 * noise)
        return
    sharp = 1.1 if clamped else _SHARP  # YaRN by 32 nearly doubles the scores
    gain = sharp if any(part in name for part in _ATTENTION) else 2.0 if "lm_head" in name else 1.0
    parameter.copy_(gain * fan_in**-0.5 * noise)


def prompt(case: Case) -> list[int]:
    rng = np.random.default_rng(7)
    return [int(i) for i in rng.integers(0, case.config["vocab_size"], case.tokens)]


def reference(folder: Path) -> Any:
    """The saved model in fp32 with eager attention."""
    return transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", local_files_only=True
    ).eval()


def logits(model: Any, ids: list[int]) -> np.ndarray:
    with torch.no_grad():
        out: np.ndarray = model(torch.tensor([ids]), use_cache=False).logits[0].float().numpy()
    return np.ascontiguousarray(out)


# --- ggml's GELU -----------------------------------------------------------------------------------------


def _table() -> torch.Tensor:
    """GELU (tanh) of every fp16 number, rounded to fp16 (ggml-cpu/vec.h, ggml_table_gelu_f16)."""
    x = torch.arange(65536, dtype=torch.int32).to(torch.int16).view(torch.float16).float()
    y = 0.5 * x * (1 + torch.tanh(0.79788456080286535588 * x * (1 + 0.044715 * x * x)))
    return y.half().float()


class GgmlGelu(torch.nn.Module):
    """What ggml computes for GELU on a CPU: a table lookup with fp16 input and output, linear beyond 10."""

    def __init__(self) -> None:
        super().__init__()
        self.table = _table()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.table[x.half().view(torch.int16).int() & 0xFFFF]
        return torch.where(x <= -10, torch.zeros_like(x), torch.where(x >= 10, x, y))


def with_ggml_gelu(model: Any) -> int:
    """Put ggml's GELU in the place of every GELU of `model`; returns how many there were."""
    found = [
        (parent, leaf)
        for parent in model.modules()
        for leaf, child in parent.named_children()
        if "GELU" in type(child).__name__
    ]
    for parent, leaf in found:
        setattr(parent, leaf, GgmlGelu())
    return len(found)
