"""OLMo 2 (transformers `Olmo2ForCausalLM`): norms after attention and MLP, and over all query and key heads at once."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from lconvert.ir import Decoder, Layer, Mlp

from .common import Arch, Gguf, Keys, activation, name
from .llama import NAMES as LLAMA_NAMES
from .llama import attention, base_config, decoder
from .llamacpp import graph, map_layers

_LAYER = "model.layers.{i}."


def _traits(keys: Keys) -> Decoder:
    bias = keys.flag("attention_bias", False)
    att = replace(attention(keys, qkv_bias=bias, o_bias=bias), qk_norm="full")
    mlp = Mlp("gated", activation(keys, "hidden_act"), keys.size("intermediate_size"))
    return decoder(keys, Layer(att, mlp, "post"), eps=1e-5)


def _config(d: Decoder) -> dict[str, Any]:
    return base_config(d, ARCH.hf_class) | {"attention_bias": d.default.attention.o_bias}


def _restore(d: Decoder) -> Decoder:
    """With one head only, the file does not tell a norm over heads from a norm in each."""
    return map_layers(d, lambda layer: replace(layer, attention=replace(layer.attention, qk_norm="full")))


ARCH = Arch(
    model_type="olmo2",
    hf_class="Olmo2ForCausalLM",
    traits=_traits,
    config=_config,
    names=(
        *(n for n in LLAMA_NAMES if "layernorm" not in n.hf),
        name(_LAYER + "self_attn.q_norm.weight", "layers.{i}.attn.q_norm"),
        name(_LAYER + "self_attn.k_norm.weight", "layers.{i}.attn.k_norm"),
        name(_LAYER + "post_attention_layernorm.weight", "layers.{i}.attn_post_norm"),
        name(_LAYER + "post_feedforward_layernorm.weight", "layers.{i}.mlp_post_norm"),
    ),
    gguf=Gguf(
        "olmo2",
        losses=graph(
            "olmo2.cpp", blocks=("post",), qkv_bias="optional", partial_rope=False, square=True, head="own"
        ),
        restore=_restore,
    ),
)
