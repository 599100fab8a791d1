"""SmolLM3: every fourth layer without rope; llama.cpp knows no other step."""

from . import Case
from .llama import SMALL

_SMOL = SMALL | {"num_hidden_layers": 4, "pad_token_id": 0}
_YARN = {"rope_type": "yarn", "rope_theta": 2e6, "factor": 4.0, "original_max_position_embeddings": 64}

CASES = [
    Case("step", "smollm3", _SMOL, dtype="bfloat16"),
    Case("yarn", "smollm3", _SMOL | {"head_dim": 32, "tie_word_embeddings": False, "rope_parameters": _YARN}),
    Case(
        "other-step",
        "smollm3",
        _SMOL | {"no_rope_layers": [1, 0, 1, 1]},
        losses=("no_rope_layers",),
        refused=True,
        exact=1,
        wrong=1e-3,
    ),
    Case(
        "window",
        "smollm3",
        _SMOL | {"use_sliding_window": True, "sliding_window": 96},
        losses=("sliding_window",),
        exact=96,
        wrong=2e-4,
    ),
]
