"""Phi-3: fused projections, partial rope, LongRoPE on both sides of the original context."""

from . import Case
from .llama import SMALL

_PHI = SMALL | {"pad_token_id": 0}


def _longrope(pairs: int) -> dict[str, object]:
    return {
        "rope_type": "longrope",
        "rope_theta": 1e4,
        "short_factor": [round(1.0 + 0.05 * i, 4) for i in range(pairs)],
        "long_factor": [round(1.5 + 0.4 * i, 4) for i in range(pairs)],
    }


_LONG = _PHI | {"max_position_embeddings": 1024, "rope_parameters": _longrope(32)}
_PARTIAL = _longrope(24) | {"partial_rotary_factor": 0.75}

CASES = [
    Case("plain", "phi3", _PHI, dtype="bfloat16"),
    Case("window", "phi3", _PHI | {"sliding_window": 96}, losses=("sliding_window",), exact=96, wrong=1e-3),
    Case("long", "phi3", _LONG | {"original_max_position_embeddings": 64}, losses=("longrope_switch",)),
    Case("short", "phi3", _LONG | {"original_max_position_embeddings": 256}, losses=("longrope_switch",)),
    Case(
        "between",
        "phi3",
        _LONG | {"original_max_position_embeddings": 230},
        losses=("longrope_switch",),
        exact=1,
        wrong=1e-3,
    ),
    Case(
        "partial",
        "phi3",
        _PHI
        | {"rope_parameters": _PARTIAL, "original_max_position_embeddings": 512, "tie_word_embeddings": True},
    ),
]
