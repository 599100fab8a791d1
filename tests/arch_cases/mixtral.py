"""Mixtral: routed experts, in llama.cpp's Llama graph."""

from . import Case
from .llama import SMALL

_MOE = SMALL | {"num_local_experts": 4, "num_experts_per_tok": 2}

CASES = [
    Case("experts", "mixtral", _MOE | {"sliding_window": None}),
    Case(
        "window", "mixtral", _MOE | {"sliding_window": 96}, losses=("sliding_window",), exact=96, wrong=1e-3
    ),
]
