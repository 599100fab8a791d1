"""Configs of released models mean to lconvert what they mean to transformers, in their old and their new spelling."""

from __future__ import annotations

import json
from typing import Any

import pytest

from lconvert.archs import find
from lconvert.archs.common import Keys
from lconvert.errors import InputError, UnsupportedError
from lconvert.ir import Decoder
from tests.published_configs import CONFIGS

transformers = pytest.importorskip("transformers", reason="transformers is not installed")
every = pytest.mark.parametrize("name", CONFIGS)


def traits(config: dict[str, Any]) -> Decoder:
    keys = Keys(config)
    d = find(config["model_type"]).traits(keys)
    keys.finish()
    return d


def normalised(config: dict[str, Any]) -> dict[str, Any]:
    """The config as transformers would save it."""
    made = transformers.CONFIG_MAPPING[config["model_type"]].from_dict(config)
    return dict(json.loads(made.to_json_string()))


@every
def test_old_and_new_spelling_agree(name: str) -> None:
    assert traits(normalised(CONFIGS[name])) == traits(CONFIGS[name])


@every
def test_traits_to_config_and_back(name: str) -> None:
    d = traits(CONFIGS[name])
    config = find(d.family).config(d)
    assert traits(config) == d
    assert traits(normalised(config)) == d


def _latent(a: Any) -> tuple[Any, ...]:
    return a.mla.q_rank, a.mla.kv_rank, a.head_dim, a.mla.v_dim


def _routing(m: Any) -> tuple[Any, ...]:
    return m.scoring, m.groups, m.top_groups, m.group_score


FACTS = {
    "gpt2": lambda d: (d.learned_positions, d.tied, d.default.mlp.hidden, d.default.mlp.activation),
    "pythia-1b": lambda d: (d.default.attention.rope.dim, d.default.block, d.default.mlp.activation),
    "falcon-7b": lambda d: (d.default.attention.kv_heads, d.default.block, d.default.mlp.hidden),
    "falcon-40b": lambda d: (d.default.attention.kv_heads, d.default.block, d.default.mlp.hidden),
    "gemma-2-27b": lambda d: (round(d.default.attention.scale, 6), sorted(d.overrides)[:3], d.final_softcap),
    "gemma-3-1b": lambda d: (
        [i for i in range(d.layers) if i not in d.overrides],
        d.layer(0).attention.window,
        d.layer(0).attention.rope.theta,
        d.default.attention.rope.theta,
    ),
    "phi-3-mini-4k": lambda d: (d.default.attention.window, d.default.attention.rope.scaling),
    "phi-3-mini-128k": lambda d: (d.default.attention.rope.original_context, d.default.attention.rope.factor),
    "phi-4-mini": lambda d: (d.default.attention.rope.dim, d.tied),
    "starcoder2-3b": lambda d: (d.default.attention.window, d.default.mlp.activation, d.tied),
    "llama-3.2-1b": lambda d: (d.default.attention.rope.scaling, d.default.attention.rope.factor),
    "mixtral-8x7b": lambda d: (d.default.mlp.experts, d.default.mlp.top_k, d.default.attention.window),
    "deepseek-v2-lite": lambda d: (
        *_latent(d.default.attention),
        round(d.default.attention.scale, 6),
        len(d.overrides),
        d.default.mlp.shared,
    ),
    "deepseek-v2": lambda d: (
        *_latent(d.default.attention),
        *_routing(d.default.mlp),
        d.default.mlp.normalize,
        d.default.mlp.scale,
    ),
    "deepseek-v3": lambda d: (
        *_latent(d.default.attention),
        round(d.default.attention.scale, 6),
        *_routing(d.default.mlp),
        d.default.mlp.scale,
    ),
    "deepseek-r1": lambda d: (
        len(d.overrides),
        d.layer(0).mlp.hidden,
        d.default.mlp.shared,
        d.default.mlp.correction,
    ),
    "moonlight-16b": lambda d: (*_latent(d.default.attention), *_routing(d.default.mlp)),
    "gpt-oss-20b": lambda d: (
        [i for i in range(d.layers) if i in d.overrides][:3],
        d.layer(0).attention.window,
        d.default.attention.sinks,
        d.default.attention.rope.truncate,
        d.default.mlp.limit,
    ),
    "gpt-oss-120b": lambda d: (d.layers, d.default.mlp.experts, d.default.mlp.top_k, d.default.mlp.bias),
}
EXPECTED: dict[str, tuple[Any, ...]] = {
    "gpt2": (1024, True, 3072, "gelu_tanh"),
    "pythia-1b": (64, "parallel", "gelu"),
    "falcon-7b": (1, "parallel_shared", 18176),
    "falcon-40b": (8, "parallel", 32768),
    "gemma-2-27b": (0.083333, [0, 2, 4], 30.0),
    "gemma-3-1b": ([5, 11, 17, 23], 512, 10000.0, 1e6),
    "phi-3-mini-4k": (2047, "none"),
    "phi-3-mini-128k": (4096, 32.0),
    "phi-4-mini": (96, True),
    "starcoder2-3b": (4096, "gelu_tanh", True),
    "llama-3.2-1b": ("llama3", 32.0),
    "mixtral-8x7b": (8, 2, None),
    # 192 ** -0.5 * (0.0707 ln 40 + 1) ** 2, as DeepSeek's own modeling file computes softmax_scale.
    "deepseek-v2-lite": (None, 512, 192, 128, 0.114721, 1, 2816),
    "deepseek-v2": (1536, 512, 192, 128, "softmax", 8, 3, "max", False, 16.0),
    # 192 ** -0.5 * (0.1 ln 40 + 1) ** 2
    "deepseek-v3": (1536, 512, 192, 128, 0.135234, "sigmoid", 8, 4, "top2", 2.5),
    "deepseek-r1": (3, 18432, 2048, True),
    "moonlight-16b": (None, 512, 192, 128, "sigmoid", 1, 1, "top2"),
    "gpt-oss-20b": ([0, 2, 4], 128, True, False, 7.0),
    "gpt-oss-120b": (36, 128, 4, True),
}


@pytest.mark.parametrize("name", FACTS)
def test_facts(name: str) -> None:
    assert FACTS[name](traits(CONFIGS[name])) == EXPECTED[name]


#: Their YaRN range is not rounded, llama.cpp's is: converting them takes --allow-trait-loss yarn_truncate.
UNROUNDED = ("gpt-oss-20b", "gpt-oss-120b")
#: llama.cpp ranks groups of experts otherwise; it norms latents with the model's epsilon, which is not 1e-6 here.
LOST = {"deepseek-v2": ["expert_groups"], "moonlight-16b": ["latent_eps"]}


@pytest.mark.parametrize("name", [n for n in CONFIGS if n not in ("gemma-2-27b", *UNROUNDED, *LOST)])
def test_released_models_are_not_refused(name: str) -> None:
    """What llama.cpp cannot do for them has a limit or a cost; the 27B Gemma's scale is llama.cpp's own."""
    d = traits(CONFIGS[name])
    assert all(x.limit is not None or x.cost is not None for x in find(d.family).gguf.losses(d))


@pytest.mark.parametrize("name", UNROUNDED)
def test_only_the_rounding_of_yarn_is_lost(name: str) -> None:
    d = traits(CONFIGS[name])
    assert [x.name for x in find(d.family).gguf.losses(d)] == ["yarn_truncate"]


@pytest.mark.parametrize("name", LOST)
def test_what_is_lost_has_a_name(name: str) -> None:
    d = traits(CONFIGS[name])
    assert [x.name for x in find(d.family).gguf.losses(d)] == LOST[name]


def test_27b_scale_is_the_graphs() -> None:
    d = traits(CONFIGS["gemma-2-27b"])
    assert find("gemma2").gguf.losses(d) == ()


REFUSED = [
    ("falcon-7b", {"alibi": True}, UnsupportedError, "alibi = True is not supported"),
    (
        "falcon-7b",
        {"num_ln_in_parallel_attn": 2},
        UnsupportedError,
        "is not a Falcon that transformers can run",
    ),
    ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, UnsupportedError, "scale_attn_by_inverse_layer_idx"),
    ("gpt2", {"add_cross_attention": True}, UnsupportedError, "add_cross_attention"),
    ("gemma-2-2b", {"use_bidirectional_attention": True}, UnsupportedError, "use_bidirectional_attention"),
    (
        "gemma-2-2b",
        {"sliding_window": None},
        InputError,
        "13 layers are sliding_attention, but sliding_window",
    ),
    ("gemma-3-1b", {"layer_types": ["full_attention"]}, InputError, "layer_types must be 26 of"),
    ("gemma-3-1b", {"rope_parameters": {"rope_theta": 1e4}}, UnsupportedError, "names no full_attention"),
    ("phi-3-mini-4k", {"rope_scaling": {"type": "dynamic"}}, UnsupportedError, "rope_type 'dynamic'"),
    ("phi-3-mini-128k", {"num_attention_heads": 16}, InputError, "short_factor must be a list of 96"),
    ("phi-4-mini", {"lm_head_bias": True}, UnsupportedError, "lm_head_bias"),
    ("starcoder2-3b", {"norm_type": "rms"}, UnsupportedError, "norm_type"),
    ("gpt-oss-20b", {"swiglu_alpha": 1.5}, UnsupportedError, "swiglu_alpha = 1.5 is not supported"),
    ("gpt-oss-20b", {"swiglu_limit": 0}, InputError, "swiglu_limit is 0.0, expected a positive number"),
    (
        "gpt-oss-20b",
        {"sliding_window": None},
        InputError,
        "12 layers are sliding_attention, but sliding_window",
    ),
    ("gpt-oss-20b", {"layer_types": ["full_attention"]}, InputError, "layer_types must be 24 of"),
    (
        "deepseek-v2-lite",
        {"norm_topk_prob": True},
        UnsupportedError,
        "norm_topk_prob = True is not supported",
    ),
    ("deepseek-v2-lite", {"scoring_func": "sigmoid"}, UnsupportedError, "scoring_func = 'sigmoid'"),
    ("deepseek-v2-lite", {"topk_method": "noaux_tc"}, UnsupportedError, "topk_method = 'noaux_tc'"),
    ("deepseek-v2-lite", {"mlp_bias": True}, UnsupportedError, "mlp_bias = True"),
    ("deepseek-v3", {"num_key_value_heads": 8}, UnsupportedError, "is 8, but each of the 128 heads has keys"),
    ("deepseek-v3", {"first_k_dense_replace": 61}, UnsupportedError, "which leaves none with experts"),
    ("deepseek-v3", {"moe_layer_freq": 2}, UnsupportedError, "moe_layer_freq = 2 is not supported"),
    ("deepseek-v3", {"head_dim": 128}, UnsupportedError, "head_dim = 128 is not supported, only 64"),
    ("deepseek-v3", {"partial_rotary_factor": 0.5}, UnsupportedError, "turns 32 of 64 dimensions"),
    ("deepseek-v3", {"rope_scaling": {"type": "dynamic"}}, UnsupportedError, "rope_type 'dynamic'"),
    ("llama-2-7b", {"a_new_key": 1}, UnsupportedError, "unknown key 'a_new_key'"),
    (
        "llama-2-7b",
        {"rope_parameters": {"rope_theta": 1e4}, "rope_scaling": {"type": "linear", "factor": 2.0}},
        InputError,
        "rope_parameters and rope_scaling are both given and differ",
    ),
]


@pytest.mark.parametrize(("name", "change", "error", "message"), REFUSED, ids=lambda x: str(x)[:30])
def test_refused(name: str, change: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        traits(CONFIGS[name] | change)
