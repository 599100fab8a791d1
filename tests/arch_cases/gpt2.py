"""GPT-2: learned positions, every bias; ggml's GELU table sets the floor."""

from . import Case

SMALL = {
    "n_embd": 256,
    "n_head": 4,
    "n_layer": 2,
    "vocab_size": 384,
    "n_positions": 256,
    "layer_norm_epsilon": 1e-3,
}

CASES = [
    Case("tied", "gpt2", SMALL, floor=1e-6, dtype="bfloat16"),
    Case("untied", "gpt2", SMALL | {"tie_word_embeddings": False, "n_inner": 512}, floor=1e-6),
    Case(
        "erf",
        "gpt2",
        SMALL | {"n_inner": 512, "activation_function": "gelu"},
        losses=("gelu_erf",),
        floor=1e-6,
    ),
    Case(
        "relu",
        "gpt2",
        SMALL | {"n_inner": 512, "activation_function": "relu"},
        losses=("activation",),
        refused=True,
        exact=0,
        wrong=1e-3,
    ),
]
