"""DeepSeek-V3: experts chosen by corrected sigmoids in groups, and what llama.cpp's graph takes for granted."""

from . import Case
from .deepseek_v2 import LATENT, LONG, YARN

_SIGMOID = {"n_group": 4, "topk_group": 2, "routed_scaling_factor": 2.5, "n_shared_experts": 1}
_YARN = YARN | {"mscale": 1.0, "mscale_all_dim": 1.0}

CASES = [
    # The models' own factor of 2.5 makes much of a rounding that sends a token to other (random) experts.
    Case("groups", "deepseek_v3", LATENT | _SIGMOID | {"routed_scaling_factor": 1.25}, dtype="bfloat16"),
    Case("yarn", "deepseek_v3", LONG | _SIGMOID | {"rope_parameters": _YARN, "first_k_dense_replace": 2}),
    Case(
        "plain",
        "deepseek_v3",
        LATENT | _SIGMOID | {"n_group": 1, "topk_group": 1, "norm_topk_prob": False, "q_lora_rank": None},
    ),
    Case(
        "halves",
        "deepseek_v3",
        LATENT | _SIGMOID | {"rope_interleave": False},
        losses=("rope_layout",),
        refused=True,
        exact=1,
        wrong=1e-3,
    ),
    Case(
        "lite-layers",
        "deepseek_v3",
        LATENT
        | _SIGMOID
        | {"num_hidden_layers": 26, "hidden_size": 64, "intermediate_size": 64, "vocab_size": 128},
        losses=("lite_layers",),
        refused=True,
        loads=False,
        tokens=40,
    ),
]
