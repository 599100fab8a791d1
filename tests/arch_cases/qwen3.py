"""Qwen3: normed query and key heads of a size that is not hidden / heads."""

from . import Case
from .llama import SMALL

_QWEN3 = SMALL | {"head_dim": 32}
_LINEAR = {"rope_type": "linear", "rope_theta": 1e6, "factor": 4.0}
_KINDS = ["sliding_attention", "full_attention"]

CASES = [
    Case("gqa", "qwen3", _QWEN3, dtype="bfloat16"),
    Case("tied-linear", "qwen3", _QWEN3 | {"tie_word_embeddings": True, "rope_parameters": _LINEAR}),
    Case(
        "window",
        "qwen3",
        _QWEN3 | {"use_sliding_window": True, "sliding_window": 96, "layer_types": _KINDS},
        losses=("sliding_window",),
        exact=96,
        wrong=1e-3,
    ),
    Case("bias", "qwen3", _QWEN3 | {"attention_bias": True}, losses=("biases",), refused=True, loads=False),
]
