"""Gemma 2: local and global layers, soft caps, norms around both halves; ggml's GELU table sets the floor."""

from . import Case
from .llama import SMALL

GEMMA = {k: v for k, v in SMALL.items() if k != "num_hidden_layers"} | {
    "num_hidden_layers": 3,
    "head_dim": 32,
    "query_pre_attn_scalar": 32,
    "sliding_window": 64,
}
_KINDS = ["full_attention", "sliding_attention", "sliding_attention"]

CASES = [
    Case("alternating", "gemma2", GEMMA, floor=1e-6, dtype="bfloat16"),
    Case(
        "layer-types",
        "gemma2",
        GEMMA | {"layer_types": _KINDS, "attn_logit_softcapping": 20.0, "final_logit_softcapping": 10.0},
        floor=1e-6,
    ),
    Case("all-local", "gemma2", GEMMA | {"layer_types": ["sliding_attention"] * 3}, floor=1e-6),
    Case("all-global", "gemma2", GEMMA | {"layer_types": ["full_attention"] * 3}, floor=1e-6),
    Case(
        "no-caps",
        "gemma2",
        GEMMA | {"attn_logit_softcapping": None, "final_logit_softcapping": None},
        floor=1e-6,
    ),
    Case(
        "scale",
        "gemma2",
        GEMMA | {"query_pre_attn_scalar": 64},
        losses=("attention_scale",),
        refused=True,
        exact=1,
        wrong=1e-3,
        floor=1e-6,
    ),
]
