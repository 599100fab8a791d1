"""gpt-oss: sinks, clamped experts with biases in one tensor per layer, local layers, YaRN with a rounded range and without."""

from . import Case

_YARN = {
    "rope_type": "yarn",
    "rope_theta": 150000.0,
    "factor": 32.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "original_max_position_embeddings": 64,
}
_SMALL = {
    "vocab_size": 512,
    "hidden_size": 128,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "sliding_window": 64,
    "max_position_embeddings": 512,
    "rope_parameters": _YARN | {"truncate": True},
}
_KINDS = ["full_attention", "full_attention", "sliding_attention"]

CASES = [
    Case("experts", "gpt_oss", _SMALL, dtype="bfloat16"),
    Case("layer-types", "gpt_oss", _SMALL | {"layer_types": _KINDS, "num_local_experts": 3}),
    Case("all-global", "gpt_oss", _SMALL | {"layer_types": ["full_attention"] * 3}),
    Case("all-local", "gpt_oss", _SMALL | {"layer_types": ["sliding_attention"] * 3}),
    Case(
        "unrounded",
        "gpt_oss",
        _SMALL | {"rope_parameters": _YARN | {"truncate": False}},
        losses=("yarn_truncate",),
        refused=True,
        exact=1,
        wrong=1e-3,
    ),
    Case(
        "limit",
        "gpt_oss",
        _SMALL | {"swiglu_limit": 3.0},
        losses=("swiglu_limit",),
        refused=True,
        exact=0,
        wrong=1e-3,
    ),
    Case(
        "no-biases",
        "gpt_oss",
        _SMALL | {"attention_bias": False},
        losses=("biases",),
        refused=True,
        loads=False,
    ),
]
