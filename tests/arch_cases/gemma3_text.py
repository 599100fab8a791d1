"""Gemma 3: q/k norms, its own rope base on local layers, linear rope scaling on global ones only."""

from . import Case
from .gemma2 import GEMMA

_LINEAR = {
    "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 5000.0},
}
_KINDS = ["sliding_attention", "full_attention", "sliding_attention"]

CASES = [
    Case("pattern", "gemma3_text", GEMMA | {"layer_types": _KINDS}, floor=1e-6, dtype="bfloat16"),
    Case(
        "linear",
        "gemma3_text",
        GEMMA | {"layer_types": _KINDS, "rope_parameters": _LINEAR, "final_logit_softcapping": 10.0},
        floor=1e-6,
    ),
    Case("all-full", "gemma3_text", GEMMA | {"layer_types": ["full_attention"] * 3}, floor=1e-6),
    Case("untied", "gemma3_text", GEMMA | {"layer_types": _KINDS, "tie_word_embeddings": False}, floor=1e-6),
    Case(
        "scale",
        "gemma3_text",
        GEMMA | {"layer_types": _KINDS, "query_pre_attn_scalar": 64},
        losses=("attention_scale",),
        refused=True,
        exact=1,
        wrong=1e-3,
        floor=1e-6,
    ),
]
