"""Llama: every rope scaling, biases, tied heads, a head size that is not hidden / heads."""

from . import Case

SMALL = {
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 384,
    "rms_norm_eps": 1e-3,
    "max_position_embeddings": 512,
}
_LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip
_YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 1024}
_LONG = SMALL | {"max_position_embeddings": 4096}

CASES = [
    Case("gqa", "llama", SMALL, dtype="bfloat16"),
    Case("head-dim", "llama", SMALL | {"head_dim": 32, "tie_word_embeddings": True}),
    Case("biases", "llama", SMALL | {"attention_bias": True, "mlp_bias": True}),
    Case(
        "linear",
        "llama",
        SMALL | {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}},
    ),
    Case("llama3", "llama", SMALL | {"rope_parameters": _LLAMA3}),
    Case("yarn", "llama", _LONG | {"rope_parameters": _YARN}),
    Case("yarn-factor", "llama", _LONG | {"rope_parameters": _YARN | {"attention_factor": 0.8}}),
    Case(
        "yarn-betas",
        "llama",
        _LONG | {"rope_parameters": _YARN | {"beta_fast": 16.0, "beta_slow": 2.0}},
        losses=("yarn_betas",),
        refused=True,
        exact=1,
        wrong=1e-3,
    ),
    Case(
        "relu",
        "llama",
        SMALL | {"hidden_act": "relu"},
        losses=("activation",),
        refused=True,
        exact=0,
        wrong=1e-3,
    ),
]
