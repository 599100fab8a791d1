"""OLMo 2: norms after attention and MLP and across all heads."""

from . import Case
from .llama import SMALL

_YARN = {"rope_type": "yarn", "rope_theta": 5e5, "factor": 4.0, "original_max_position_embeddings": 64}

CASES = [
    Case("gqa", "olmo2", SMALL, dtype="bfloat16"),
    Case("yarn", "olmo2", SMALL | {"num_key_value_heads": 1, "rope_parameters": _YARN}),
    Case("bias", "olmo2", SMALL | {"attention_bias": True}, losses=("biases",), refused=True, loads=False),
    Case("tied", "olmo2", SMALL | {"tie_word_embeddings": True}, losses=("head",), refused=True, loads=False),
]
