"""Phi-3, 3.5 and 4 mini (transformers `Phi3ForCausalLM`): Llama with fused projections, LongRoPE, partial rope."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from lconvert.ir import Attention, Decoder, Layer, Mlp

from .common import Arch, Gguf, Keys, activation, name, parse_rope, rope_parameters
from .llama import NAMES as LLAMA_NAMES
from .llama import base_config, decoder
from .llamacpp import graph

_FUSED = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")
_ATTENTION = "model.layers.{i}.self_attn."


def _attention(keys: Keys) -> Attention:
    heads = keys.size("num_attention_heads")
    head_dim = keys.size("head_dim", None) or keys.head_dim(keys.size("hidden_size"), heads)
    context = keys.size("max_position_embeddings", 4096)
    original = keys.size("original_max_position_embeddings", 4096)
    rope = rope_parameters(keys)
    if rope["rope_type"] in ("su", "yarn"):  # what the first releases called it
        rope["rope_type"] = "longrope"
    if rope["rope_type"] == "longrope":
        rope["original_max_position_embeddings"] = original
    return Attention(
        heads=heads,
        kv_heads=keys.size("num_key_value_heads", heads),
        head_dim=head_dim,
        scale=head_dim**-0.5,
        rope=parse_rope(keys, rope, head_dim, context=context, allowed=("default", "longrope")),
        window=keys.window("sliding_window", absent=None),
    )


def _traits(keys: Keys) -> Decoder:
    for key in ("attention_bias", "mlp_bias", "lm_head_bias"):
        keys.must(key, False)
    for key in ("full_attn_mod", "interpolate_factor"):
        keys.must(key, 1)
    mlp = Mlp("gated", activation(keys, "hidden_act"), keys.size("intermediate_size"))
    return decoder(keys, Layer(_attention(keys), mlp), eps=1e-5)


def _config(d: Decoder) -> dict[str, Any]:
    a = d.default.attention
    out = base_config(d, ARCH.hf_class) | {"sliding_window": a.window, "pad_token_id": None}
    if a.rope is not None and a.rope.scaling == "longrope":
        out["original_max_position_embeddings"] = a.rope.original_context
    return out


def _keys(d: Decoder) -> dict[str, tuple[str, Any]]:
    """llama.cpp ignores the window, but readers of the file do not; upstream writes 0 for none."""
    return {"attention.sliding_window": ("u32", d.default.attention.window or 0)}


def _restore(d: Decoder) -> Decoder:
    """One kind of layer, whatever pattern a file claims."""
    return replace(d, overrides={})


ARCH = Arch(
    model_type="phi3",
    hf_class="Phi3ForCausalLM",
    traits=_traits,
    config=_config,
    names=(
        *(n for n in LLAMA_NAMES if not any(part in n.hf for part in _FUSED)),
        name(_ATTENTION + "qkv_proj.weight", *("layers.{i}.attn." + side for side in "qkv")),
        name("model.layers.{i}.mlp.gate_up_proj.weight", "layers.{i}.mlp.gate", "layers.{i}.mlp.up"),
    ),
    gguf=Gguf(
        "phi3",
        fused={"attn_qkv": ("attn.q", "attn.k", "attn.v"), "ffn_up": ("mlp.gate", "mlp.up")},
        keys=_keys,
        losses=graph("phi3.cpp", square=True, ropes=("none", "longrope")),
        restore=_restore,
    ),
)
