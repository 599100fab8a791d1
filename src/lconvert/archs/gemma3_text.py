"""Gemma 3, text only (transformers `Gemma3ForCausalLM`): Gemma 2 with q/k norms and a rope of its own per layer kind."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

from lconvert.errors import UnsupportedError
from lconvert.ir import Decoder, Layer, Rope

from . import gemma2
from .common import Arch, Gguf, Keys, hf_rope, name, parse_rope, rope_parameters, show
from .llamacpp import graph


def _traits(keys: Keys) -> Decoder:
    context = keys.size("max_position_embeddings", 131072)
    head_dim = keys.size("head_dim", 256)
    local_theta = keys.float("rope_local_base_freq", 10000.0)
    pattern = keys.size("sliding_window_pattern", 6)
    nested = keys.table("rope_parameters")
    if nested and "full_attention" not in nested:
        raise UnsupportedError(
            f"{keys.where}: rope_parameters names no full_attention: {show(sorted(nested))}"
        )
    full = rope_parameters(keys, "full_attention")
    sliding = Keys(nested, f"{keys.where}: rope_parameters").table("sliding_attention") or {
        "rope_type": "default"
    }
    ropes = (
        parse_rope(keys, full, head_dim, context=context, theta=1e6),
        parse_rope(keys, sliding, head_dim, context=context, theta=local_theta, allowed=("default",)),
    )
    return gemma2.decoder(keys, *ropes, pattern=pattern, qk_norm=True, softcaps=False)


def _local_rope(d: Decoder) -> Rope | None:
    layer = next(iter(d.overrides.values()), None)
    return Rope(10000.0, d.default.attention.head_dim) if layer is None else layer.attention.rope


def _config(d: Decoder) -> dict[str, Any]:
    a, local = d.default.attention, _local_rope(d)
    assert a.rope is not None and local is not None
    ropes = {"full_attention": a.rope, "sliding_attention": local}
    out = gemma2.config(d, ARCH.hf_class)
    return out | {"rope_parameters": {k: hf_rope(r, a.head_dim, d.context) for k, r in ropes.items()}}


def _keys(d: Decoder) -> dict[str, tuple[str, Any]]:
    out = gemma2.window_keys(d)
    local = _local_rope(d)
    if d.overrides and local is not None:
        out["rope.freq_base_swa"] = ("f32", local.theta)
    if d.final_softcap is not None:
        out["final_logit_softcapping"] = ("f32", d.final_softcap)
    return out


def _restore(d: Decoder) -> Decoder:
    """Local layers never scale their rope; without a key of their own their base is 10000."""
    has_base = bool(d.overrides)
    d = gemma2.restore(62, 6)(d)

    def local(layer: Layer) -> Layer:
        a = layer.attention
        assert a.rope is not None
        theta = a.rope.theta if has_base else 10000.0
        return replace(layer, attention=replace(a, rope=Rope(theta, a.rope.dim)))

    return replace(d, overrides={i: local(layer) for i, layer in d.overrides.items()})


_GRAPH = graph(
    "gemma3.cpp",
    activation="gelu_tanh",
    blocks=("sandwich",),
    qkv_bias="optional",
    window=True,
    scale=gemma2.scale(62),
    embed_scale=lambda d: math.sqrt(d.hidden),
    ropes=("none", "linear"),
)

ARCH = Arch(
    model_type="gemma3_text",
    hf_class="Gemma3ForCausalLM",
    traits=_traits,
    config=_config,
    names=(
        *gemma2.NAMES,
        name("model.layers.{i}.self_attn.q_norm.weight", "layers.{i}.attn.q_norm"),
        name("model.layers.{i}.self_attn.k_norm.weight", "layers.{i}.attn.k_norm"),
    ),
    gguf=Gguf("gemma3", keys=_keys, losses=_GRAPH, restore=_restore),
    traits_offset=1.0,
)
