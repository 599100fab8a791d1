"""gpt-oss (transformers `GptOssForCausalLM`): routed experts with biases and a clamped SwiGLU, attention sinks, every other
layer local, YaRN whose correction range is not rounded. Experts are stored as one tensor per layer, gate and up rows in turn.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from lconvert.errors import InputError
from lconvert.ir import Attention, Decoder, Layer, Moe

from . import gemma2
from .common import Arch, Gguf, Keys, Loss, name, parse_rope, rope_parameters
from .llama import NAMES as LLAMA_NAMES
from .llama import base_config, decoder
from .llamacpp import graph, map_layers

_LAYER = "model.layers.{i}."
_EXPERT = "layers.{i}.moe.experts.{e}."
_LINK = "https://github.com/ggml-org/llama.cpp/blob/master/src/models/openai-moe.cpp"

#: Of transformers' GptOssConfig, and constants in llama.cpp's build_moe_ffn (LLM_FFN_SWIGLU_OAI_MOE).
ALPHA, LIMIT = 1.702, 7.0
_THETA = 150000.0
#: What GptOssConfig takes where a config says nothing about rope.
_ROPE = {"rope_type": "yarn", "factor": 32.0, "truncate": False, "original_max_position_embeddings": 4096}


def _attention(keys: Keys) -> Attention:
    heads, head_dim = keys.size("num_attention_heads", 64), keys.size("head_dim", 64)
    context = keys.size("max_position_embeddings", 131072)
    rope = rope_parameters(keys)
    if not keys.has("rope_parameters") and not keys.has("rope_scaling"):
        rope |= _ROPE
    bias = keys.flag("attention_bias", True)
    return Attention(
        heads=heads,
        kv_heads=keys.size("num_key_value_heads", 8),
        head_dim=head_dim,
        scale=head_dim**-0.5,
        rope=parse_rope(keys, rope, head_dim, context=context, theta=_THETA),
        qkv_bias=bias,
        o_bias=bias,
        sinks=True,
    )


def _traits(keys: Keys) -> Decoder:
    keys.inert("hidden_act", "experts_per_token", "initial_context_length")
    keys.must("swiglu_alpha", ALPHA)
    local = gemma2.layer_types(keys, 2)
    window = keys.window("sliding_window", absent=128)
    if window is None and any(local):
        raise InputError(
            f"{keys.where}: {sum(local)} layers are sliding_attention, but sliding_window is null"
        )
    moe = Moe(
        experts=keys.size("num_local_experts", 128),
        top_k=keys.size("num_experts_per_tok", 4),
        hidden=keys.size("intermediate_size", 2880),
        activation="swiglu_oai",
        bias=True,
        limit=keys.positive("swiglu_limit", LIMIT),
    )
    full = Layer(_attention(keys), moe)
    sliding = replace(full, attention=replace(full.attention, window=window))
    overrides = {i: sliding for i, on in enumerate(local) if on}
    return replace(decoder(keys, full, eps=1e-5), overrides=overrides)


def _config(d: Decoder) -> dict[str, Any]:
    a, moe = d.default.attention, d.default.mlp
    assert isinstance(moe, Moe)
    windows = {layer.attention.window for layer in d.overrides.values()}
    return base_config(d, ARCH.hf_class) | {
        "attention_bias": a.qkv_bias,
        "hidden_act": "silu",
        "layer_types": [
            "sliding_attention" if i in d.overrides else "full_attention" for i in range(d.layers)
        ],
        "num_experts_per_tok": moe.top_k,
        "num_local_experts": moe.experts,
        "sliding_window": next(iter(windows), 128),
        "swiglu_limit": moe.limit,
    }


def _keys(d: Decoder) -> dict[str, tuple[str, Any]]:
    return gemma2.pattern_keys(d) | {"expert_feed_forward_length": ("u32", d.default.mlp.hidden)}


def _restore(d: Decoder) -> Decoder:
    """The graph's own: activation, order of norms, and which layers are local where the file has no pattern."""
    d = gemma2.split(gemma2.without_windows(d), 2)

    def change(layer: Layer) -> Layer:
        assert isinstance(layer.mlp, Moe)
        moe = replace(layer.mlp, activation="swiglu_oai", limit=LIMIT)
        return replace(layer, mlp=moe, block="pre")

    return map_layers(d, change)


_GRAPH = graph(
    "openai-moe.cpp",
    activation="swiglu_oai",
    qkv_bias="optional",
    o_bias="required",
    window=True,
    partial_rope=False,
    normalizes=True,
    head="own",
)


def _losses(d: Decoder) -> tuple[Loss, ...]:
    limit = getattr(d.default.mlp, "limit", None)
    if limit == LIMIT:
        return _GRAPH(d)
    reason = f"llama.cpp's graph clamps the experts' gates at {LIMIT:g}, the model at {limit}"
    return (*_GRAPH(d), Loss("swiglu_limit", reason, link=_LINK))


ARCH = Arch(
    model_type="gpt_oss",
    hf_class="GptOssForCausalLM",
    traits=_traits,
    config=_config,
    names=(
        *(n for n in LLAMA_NAMES if ".mlp." not in n.hf),
        name(_LAYER + "self_attn.sinks", "layers.{i}.attn.sinks"),
        name(_LAYER + "mlp.router.weight", "layers.{i}.moe.router"),
        name(
            _LAYER + "mlp.experts.gate_up_proj",
            _EXPERT + "gate",
            _EXPERT + "up",
            layout="alternating",
            transpose=True,
            bias="_bias",
        ),
        name(_LAYER + "mlp.experts.down_proj", _EXPERT + "down", transpose=True, bias="_bias"),
    ),
    gguf=Gguf(
        "gpt-oss",
        names={"mlp_norm": "post_attention_norm"},
        keys=_keys,
        losses=_losses,
        restore=_restore,
        moe=True,
    ),
)
