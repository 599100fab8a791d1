"""Qwen3-MoE: routed experts, and what llama.cpp's graph takes for granted about them."""

from . import Case
from .llama import SMALL

_MOE = SMALL | {
    "head_dim": 32,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 256,
    "norm_topk_prob": True,
}
_YARN = {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0, "original_max_position_embeddings": 64}

CASES = [
    Case("experts", "qwen3_moe", _MOE, dtype="bfloat16"),
    Case("tied-yarn", "qwen3_moe", _MOE | {"tie_word_embeddings": True, "rope_parameters": _YARN}),
    Case(
        "window",
        "qwen3_moe",
        _MOE | {"use_sliding_window": True, "sliding_window": 96},
        losses=("sliding_window",),
        exact=96,
        wrong=1e-3,
    ),
    Case(
        "unnormalized",
        "qwen3_moe",
        _MOE | {"norm_topk_prob": False},
        losses=("expert_weights",),
        refused=True,
        exact=0,
        wrong=1e-3,
    ),
    Case(
        "dense",
        "qwen3_moe",
        _MOE | {"mlp_only_layers": [1]},
        losses=("dense_layers",),
        refused=True,
        loads=False,
    ),
]
