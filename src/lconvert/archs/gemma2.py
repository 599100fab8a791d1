"""Gemma 2 (transformers `Gemma2ForCausalLM`): norms around both halves of a layer, soft caps, every other layer local.

The layer kind is data: `default` is the layer that sees everything, `overrides` are the local ones. Gemma's norms
multiply by 1 + weight and its embedding is scaled by the square root of the width.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from lconvert.errors import InputError
from lconvert.ir import Attention, Decoder, Layer, Mlp, Rope

from .common import Arch, Gguf, Keys, activation, hf_activation, name, parse_rope, rope_parameters, show
from .llama import NAMES as LLAMA_NAMES
from .llama import base_config
from .llamacpp import graph, map_layers

_LAYER = "model.layers.{i}."

NAMES = (
    *(n for n in LLAMA_NAMES if "post_attention" not in n.hf),
    name(_LAYER + "post_attention_layernorm.weight", "layers.{i}.attn_post_norm"),
    name(_LAYER + "pre_feedforward_layernorm.weight", "layers.{i}.mlp_norm"),
    name(_LAYER + "post_feedforward_layernorm.weight", "layers.{i}.mlp_post_norm"),
)

#: llama.cpp always caps in this graph (it divides by the key's value). A power of two so large that tanh is the
#: identity on every score changes no bit.
NO_CAP = 2.0**40


def _cap(value: float | None) -> float | None:
    """A soft cap as read from a file, where a key holds the shortest decimal of an fp32 number."""
    return None if value is not None and value > 1e12 else value


def layer_types(keys: Keys, pattern: int) -> list[bool]:
    """Which layers are local: `layer_types`, or all but every `pattern`-th."""
    n = keys.size("num_hidden_layers")
    kinds = keys.items("layer_types", str)
    if kinds is None:
        return [bool((i + 1) % pattern) for i in range(n)]
    known = {"sliding_attention": True, "full_attention": False}
    if len(kinds) != n or not all(k in known for k in kinds):
        raise InputError(f"{keys.where}: layer_types must be {n} of {', '.join(known)}, found {show(kinds)}")
    return [known[k] for k in kinds]


def decoder(keys: Keys, full: Rope, local: Rope, *, pattern: int, qk_norm: bool, softcaps: bool) -> Decoder:
    """What Gemma 2 and 3 configs have in common."""
    keys.inert("hidden_act", "cache_implementation", "sliding_window_size", "_sliding_window_pattern")
    keys.must("use_bidirectional_attention", False)
    bias = keys.flag("attention_bias", False)
    on = layer_types(keys, pattern)
    window = keys.window("sliding_window", absent=4096)
    if window is None and any(on):
        raise InputError(f"{keys.where}: {sum(on)} layers are sliding_attention, but sliding_window is null")
    attention = Attention(
        heads=keys.size("num_attention_heads"),
        kv_heads=keys.size("num_key_value_heads", 4),
        head_dim=keys.size("head_dim", 256),
        scale=keys.size("query_pre_attn_scalar", 256) ** -0.5,
        rope=full,
        softcap=keys.nullable("attn_logit_softcapping", absent=50.0 if softcaps else None),
        qk_norm="head" if qk_norm else "none",
        qkv_bias=bias,
        o_bias=bias,
    )
    act = activation(keys, "hidden_activation") if keys.has("hidden_activation") else "gelu_tanh"
    layer = Layer(attention, Mlp("gated", act, keys.size("intermediate_size")), "sandwich")
    sliding = replace(layer, attention=replace(attention, window=window, rope=local))
    hidden = keys.size("hidden_size")
    return Decoder(
        family=keys.get("model_type"),
        hidden=hidden,
        layers=keys.size("num_hidden_layers"),
        vocab=keys.size("vocab_size"),
        context=keys.size("max_position_embeddings", 8192 if softcaps else 131072),
        norm="rms",
        norm_eps=keys.float("rms_norm_eps", 1e-6),
        default=layer,
        overrides={i: sliding for i, local_layer in enumerate(on) if local_layer},
        norm_offset=1.0,
        tied=keys.flag("tie_word_embeddings", True),
        embed_scale=math.sqrt(hidden),
        final_softcap=keys.nullable("final_logit_softcapping", absent=30.0 if softcaps else None),
    )


def config(d: Decoder, hf_class: str) -> dict[str, Any]:
    """The inverse of `decoder`, without rope."""
    a = d.default.attention
    out = base_config(d, hf_class)
    out["hidden_activation"] = hf_activation(d.default.mlp.activation)
    del out["hidden_act"]
    windows = {layer.attention.window for layer in d.overrides.values()}
    return out | {
        "attention_bias": a.qkv_bias,
        "attn_logit_softcapping": a.softcap,
        "final_logit_softcapping": d.final_softcap,
        "layer_types": [
            "sliding_attention" if i in d.overrides else "full_attention" for i in range(d.layers)
        ],
        "query_pre_attn_scalar": round(a.scale**-2),
        "sliding_window": next(iter(windows), 4096),
    }


def period(d: Decoder) -> int | None:
    """p where every p-th layer is global and all others are local; 0 where all are local; None for any other order."""
    local = [i in d.overrides for i in range(d.layers)]
    found = (p for p in range(1, d.layers + 1) if local == [i % p < p - 1 for i in range(d.layers)])
    return 0 if all(local) else next(found, None)


def window_keys(d: Decoder) -> dict[str, tuple[str, Any]]:
    """The window, and which layers have it. Upstream writes no pattern and relies on the graph's own.

    A number is what llama.cpp has read here since 2025; it ignored a list in these two graphs until September 2026
    (load_swa_pattern), so only an irregular order is written as one.
    """
    p = period(d)
    out: dict[str, tuple[str, Any]] = {"attention.sliding_window_pattern": ("u32", p)}
    if p is None:
        out = {"attention.sliding_window_pattern": ("bools", [i in d.overrides for i in range(d.layers)])}
    if d.overrides:
        out["attention.sliding_window"] = ("u32", next(iter(d.overrides.values())).attention.window)
    return out


def scale(largest: int) -> Callable[[Decoder, Layer], float]:
    """llama.cpp takes a model with `largest` layers for the 27B one, whose scale comes from the width."""

    def of(d: Decoder, layer: Layer) -> float:
        a = layer.attention
        out: float = (d.hidden // a.heads if d.layers == largest else a.head_dim) ** -0.5
        return out

    return of


def pattern_keys(d: Decoder) -> dict[str, tuple[str, Any]]:
    """`window_keys`; without any local layer llama.cpp stops at an assertion: then all are local, with a window as long as
    the context."""
    if d.overrides:
        return window_keys(d)
    return {"attention.sliding_window": ("u32", d.context), "attention.sliding_window_pattern": ("u32", 0)}


def without_windows(d: Decoder) -> Decoder:
    """The decoder without windows that `pattern_keys` wrote for one that has none."""
    windows = {layer.attention.window or 0 for layer in d.overrides.values()}
    whole = len(d.overrides) == d.layers and min(windows) >= d.context
    return replace(d, overrides={}) if whole else d


def split(d: Decoder, pattern: int) -> Decoder:
    """Every `pattern`-th layer global, the others local, where a file has a window and says nothing about layers."""
    if d.default.attention.window is None:
        return d
    sliding, full = d.default, replace(d.default, attention=replace(d.default.attention, window=None))
    return replace(d, default=full, overrides={i: sliding for i in range(d.layers) if (i + 1) % pattern})


def restore(largest: int, pattern: int) -> Callable[[Decoder], Decoder]:
    """What both graphs hard-code: activation, scales, and the pattern of local layers where the file has none."""

    def of(d: Decoder) -> Decoder:
        d = split(d, pattern)

        def change(layer: Layer) -> Layer:
            a = layer.attention
            rope = a.rope or Rope(theta=10000.0, dim=a.head_dim)
            a = replace(a, scale=scale(largest)(d, layer), softcap=_cap(a.softcap), rope=rope)
            return replace(layer, attention=a, mlp=replace(layer.mlp, activation="gelu_tanh"))

        d = map_layers(d, change)
        return replace(d, embed_scale=math.sqrt(d.hidden), final_softcap=_cap(d.final_softcap))

    return of


def _traits(keys: Keys) -> Decoder:
    context = keys.size("max_position_embeddings", 8192)
    rope = parse_rope(
        keys,
        rope_parameters(keys),
        keys.size("head_dim", 256),
        context=context,
        allowed=("default", "linear", "yarn"),
    )
    return decoder(keys, rope, rope, pattern=2, qk_norm=False, softcaps=True)


def _keys(d: Decoder) -> dict[str, tuple[str, Any]]:
    return pattern_keys(d) | {
        "attn_logit_softcapping": ("f32", d.default.attention.softcap or NO_CAP),
        "final_logit_softcapping": ("f32", d.final_softcap or NO_CAP),
    }


def _restore(d: Decoder) -> Decoder:
    return restore(46, 2)(without_windows(d))


_GRAPH = graph(
    "gemma2.cpp",
    activation="gelu_tanh",
    blocks=("sandwich",),
    qkv_bias="optional",
    window=True,
    scale=scale(46),
    embed_scale=lambda d: math.sqrt(d.hidden),
    softcap=True,
    head="tied",
)

ARCH = Arch(
    model_type="gemma2",
    hf_class="Gemma2ForCausalLM",
    traits=_traits,
    config=lambda d: config(d, "Gemma2ForCausalLM"),
    names=NAMES,
    gguf=Gguf("gemma2", keys=_keys, losses=_GRAPH, restore=_restore),
    traits_offset=1.0,
)
