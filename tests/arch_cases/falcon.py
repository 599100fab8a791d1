"""Falcon: multi-query with one norm (7B), groups with two norms (40B) or one (11B), one key head per head (RW)."""

from . import Case

SMALL = {
    "hidden_size": 256,
    "ffn_hidden_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 384,
    "layer_norm_epsilon": 1e-3,
    "max_position_embeddings": 512,
}
_ERF = {"losses": ("gelu_erf",), "floor": 1e-6}
_NEW = {"new_decoder_architecture": True, "num_kv_heads": 2}

CASES = [
    Case("7b", "falcon", SMALL, dtype="bfloat16", **_ERF),
    Case("40b", "falcon", SMALL | _NEW | {"activation": "gelu_pytorch_tanh"}, floor=1e-6),
    Case(
        "11b", "falcon", SMALL | _NEW | {"num_ln_in_parallel_attn": 1, "tie_word_embeddings": False}, **_ERF
    ),
    Case("rw", "falcon", SMALL | {"multi_query": False, "activation": "gelu_pytorch_tanh"}, floor=1e-6),
    Case(
        "sequential",
        "falcon",
        SMALL | {"parallel_attn": False},
        losses=("gelu_erf", "block"),
        refused=True,
        loads=False,
    ),
    Case(
        "biases", "falcon", SMALL | {"bias": True}, losses=("gelu_erf", "biases"), refused=True, loads=False
    ),
]
