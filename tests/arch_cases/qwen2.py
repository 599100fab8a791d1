"""Qwen2: biases on queries, keys and values; windows from a layer on, which llama.cpp does not know."""

from . import Case
from .llama import SMALL

_YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 64}
_WINDOW = {"use_sliding_window": True, "sliding_window": 96, "max_window_layers": 1}

CASES = [
    Case("gqa", "qwen2", SMALL, dtype="bfloat16"),
    Case("tied-yarn", "qwen2", SMALL | {"tie_word_embeddings": True, "rope_parameters": _YARN}),
    Case("window", "qwen2", SMALL | _WINDOW, losses=("sliding_window",), exact=96, wrong=1e-3),
    Case("head-dim", "qwen2", SMALL | {"head_dim": 32}, losses=("head_dim",), refused=True, loads=False),
]
