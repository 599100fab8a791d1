"""Cohere: one norm before attention and MLP, neighbouring dimensions turn; Command R+ norms every head."""

from . import Case
from .llama import SMALL

_COHERE = {k: v for k, v in SMALL.items() if k != "rms_norm_eps"}
_COHERE |= {"layer_norm_eps": 1e-3, "logit_scale": 2.0, "pad_token_id": 0}
#: llama.cpp knows Command R+ by its 64 layers.
_PLUS = _COHERE | {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 64,
    "logit_scale": 1.0,
    "use_qk_norm": True,
}
_LINEAR = {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}

CASES = [
    Case("gqa", "cohere", _COHERE, dtype="bfloat16"),
    Case("linear", "cohere", _COHERE | {"model_max_length": 2048, "rope_parameters": _LINEAR}),
    Case("plus", "cohere", _PLUS),
    Case("norms", "cohere", _COHERE | {"use_qk_norm": True}, losses=("qk_norm",), refused=True, loads=False),
    Case(
        "no-norms", "cohere", _PLUS | {"use_qk_norm": False}, losses=("qk_norm",), refused=True, loads=False
    ),
    Case("bias", "cohere", _COHERE | {"attention_bias": True}, losses=("biases",), refused=True, loads=False),
    Case(
        "untied",
        "cohere",
        _COHERE | {"tie_word_embeddings": False},
        losses=("head",),
        refused=True,
        loads=False,
    ),
]
