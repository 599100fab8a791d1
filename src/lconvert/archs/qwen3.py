"""Qwen3 (transformers `Qwen3ForCausalLM`): Qwen2 without biases, a norm on every query and key head."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from lconvert.ir import Attention, Decoder, Layer, Mlp

from .common import Arch, Gguf, Keys, activation, name
from .llama import NAMES as LLAMA_NAMES
from .llama import attention as llama_attention
from .llama import base_config, decoder
from .llamacpp import graph
from .qwen2 import window_config, with_windows

NAMES = (
    *LLAMA_NAMES,
    name("model.layers.{i}.self_attn.q_norm.weight", "layers.{i}.attn.q_norm"),
    name("model.layers.{i}.self_attn.k_norm.weight", "layers.{i}.attn.k_norm"),
)


def attention(keys: Keys, head_dim: int | None) -> Attention:
    """Attention with normed heads; `head_dim` is the config class's default."""
    bias = keys.flag("attention_bias", False)
    return replace(llama_attention(keys, qkv_bias=bias, o_bias=bias, head_dim=head_dim), qk_norm="head")


def _traits(keys: Keys) -> Decoder:
    mlp = Mlp("gated", activation(keys, "hidden_act"), keys.size("intermediate_size"))
    return with_windows(keys, decoder(keys, Layer(attention(keys, 128), mlp)))


def _config(d: Decoder) -> dict[str, Any]:
    own = {"attention_bias": d.default.attention.o_bias}
    return base_config(d, ARCH.hf_class) | window_config(d) | own


ARCH = Arch(
    model_type="qwen3",
    hf_class="Qwen3ForCausalLM",
    traits=_traits,
    config=_config,
    names=NAMES,
    gguf=Gguf("qwen3", losses=graph("qwen3.cpp", qkv_bias="optional", partial_rope=False)),
)
