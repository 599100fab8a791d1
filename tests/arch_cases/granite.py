"""Granite: four multipliers that are all different from one, biases everywhere."""

from . import Case
from .llama import SMALL

_GRANITE = SMALL | {
    "attention_multiplier": 0.09,
    "embedding_multiplier": 6.0,
    "residual_multiplier": 0.22,
    "logits_scaling": 0.49,
}
_LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip

CASES = [
    Case("multipliers", "granite", _GRANITE, dtype="bfloat16"),
    Case(
        "head-dim", "granite", _GRANITE | {"head_dim": 32, "tie_word_embeddings": True, "logits_scaling": 1.5}
    ),
    Case("biases", "granite", _GRANITE | {"attention_bias": True, "mlp_bias": True}),
    Case("llama3", "granite", _GRANITE | {"rope_parameters": _LLAMA3}),
]
