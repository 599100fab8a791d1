"""StableLM: layer norms with bias, a part of each head turns, every head may have a norm of its own."""

from . import Case
from .llama import SMALL as LLAMA

SMALL = {k: v for k, v in LLAMA.items() if k != "rms_norm_eps"} | {"layer_norm_eps": 1e-3}
_LINEAR = {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0, "partial_rotary_factor": 0.5}

CASES = [
    Case("gqa", "stablelm", SMALL, dtype="bfloat16"),
    Case("biases-linear", "stablelm", SMALL | {"use_qkv_bias": True, "rope_parameters": _LINEAR}),
    Case("12b", "stablelm", SMALL | {"qk_layernorm": True, "use_parallel_residual": True}),
    Case(
        "tied", "stablelm", SMALL | {"tie_word_embeddings": True}, losses=("head",), refused=True, loads=False
    ),
]
