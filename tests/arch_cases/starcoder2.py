"""StarCoder2: biases everywhere; llama.cpp knows no window for it."""

from . import Case
from .llama import SMALL as LLAMA

SMALL = {k: v for k, v in LLAMA.items() if k != "rms_norm_eps"} | {"norm_epsilon": 1e-3}
_YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 64}

CASES = [
    Case("plain", "starcoder2", SMALL, floor=1e-6, dtype="bfloat16"),
    Case(
        "window",
        "starcoder2",
        SMALL | {"sliding_window": 96},
        losses=("sliding_window",),
        exact=96,
        wrong=1e-3,
        floor=1e-6,
    ),
    Case("yarn", "starcoder2", SMALL | {"rope_parameters": _YARN, "tie_word_embeddings": False}, floor=1e-6),
    Case("no-bias", "starcoder2", SMALL | {"use_bias": False}, losses=("biases",), refused=True, loads=False),
]
