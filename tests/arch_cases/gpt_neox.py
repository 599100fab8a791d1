"""GPT-NeoX: qkv woven per head, rope on a part of each head, parallel or sequential residual, exact GELU."""

from . import Case

SMALL = {
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 384,
    "layer_norm_eps": 1e-3,
    "max_position_embeddings": 512,
}
_ROPE = {"rope_type": "linear", "rope_theta": 2e4, "factor": 4.0, "partial_rotary_factor": 0.5}
_TANH = SMALL | {"hidden_act": "gelu_pytorch_tanh"}

CASES = [
    Case("parallel", "gpt_neox", SMALL, losses=("gelu_erf",), floor=1e-6, dtype="bfloat16"),
    Case("sequential", "gpt_neox", _TANH | {"use_parallel_residual": False}, floor=1e-6),
    Case("linear", "gpt_neox", _TANH | {"rope_parameters": _ROPE}, floor=1e-6),
    Case(
        "no-bias",
        "gpt_neox",
        SMALL | {"attention_bias": False},
        losses=("gelu_erf", "biases"),
        refused=True,
        loads=False,
    ),
    Case(
        "tied",
        "gpt_neox",
        SMALL | {"tie_word_embeddings": True},
        losses=("gelu_erf", "head"),
        refused=True,
        loads=False,
    ),
]
