"""DeepSeek-V2: latent attention with and without a latent of queries, shared experts, and YaRN with DeepSeek's scale."""

from . import Case

#: Widths of queries and keys, values, latents and experts that all differ.
LATENT = {
    "hidden_size": 256,
    "intermediate_size": 512,
    "moe_intermediate_size": 64,
    "num_hidden_layers": 3,
    "first_k_dense_replace": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "q_lora_rank": 96,
    "kv_lora_rank": 64,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 16,
    "v_head_dim": 24,
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "n_shared_experts": 2,
    "vocab_size": 384,
    "max_position_embeddings": 512,
}
#: DeepSeek-V2-Lite's scaling of a shorter context.
YARN = {
    "rope_type": "yarn", "rope_theta": 1e4, "factor": 40.0, "beta_fast": 32.0, "beta_slow": 1.0, "mscale": 0.707,
    "mscale_all_dim": 0.707, "original_max_position_embeddings": 48,
}  # fmt: skip
LONG = LATENT | {"max_position_embeddings": 1920}
_GROUPS = {"topk_method": "group_limited_greedy", "n_group": 4, "topk_group": 2}
_UNIT = {k: v for k, v in YARN.items() if "mscale" not in k} | {"attention_factor": 1.0}

CASES = [
    Case(
        "lite", "deepseek_v2", LATENT | {"q_lora_rank": None, "routed_scaling_factor": 1.5}, dtype="bfloat16"
    ),
    Case("queries", "deepseek_v2", LATENT | {"routed_scaling_factor": 16.0, "first_k_dense_replace": 0}),
    Case("yarn", "deepseek_v2", LONG | {"rope_parameters": YARN, "tie_word_embeddings": True}),
    Case("yarn-unit", "deepseek_v2", LONG | {"rope_parameters": _UNIT}),
    Case(
        "yarn-mscale",
        "deepseek_v2",
        LONG | {"rope_parameters": YARN | {"mscale": 1.0}},
        losses=("attention_scale",),
        refused=True,
        exact=0,
        wrong=1e-3,
    ),
    Case(
        "linear",
        "deepseek_v2",
        LATENT | {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}},
        losses=("attention_scale",),
        refused=True,
        exact=0,
        wrong=1e-3,
    ),
    Case(
        "groups",
        "deepseek_v2",
        LATENT | _GROUPS,
        losses=("expert_groups",),
        refused=True,
        exact=0,
        wrong=1e-3,
    ),
    Case(
        "eps",
        "deepseek_v2",
        LATENT | {"rms_norm_eps": 1e-2},
        losses=("latent_eps",),
        refused=True,
        exact=0,
        wrong=1e-3,
    ),
    Case(
        "biases",
        "deepseek_v2",
        LATENT | {"attention_bias": True},
        losses=("biases",),
        refused=True,
        loads=False,
    ),
]
