"""Mistral (transformers `MistralForCausalLM`): Llama with an optional sliding window on every layer."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from lconvert.ir import Decoder, Layer, Mlp

from .common import Arch, Gguf, Keys, activation
from .llama import GRAPH, NAMES, attention, base_config, decoder


def _traits(keys: Keys) -> Decoder:
    window = keys.window("sliding_window", absent=4096)
    att = replace(attention(keys), window=window)
    return decoder(
        keys, Layer(att, Mlp("gated", activation(keys, "hidden_act"), keys.size("intermediate_size")))
    )


def _config(d: Decoder) -> dict[str, Any]:
    return base_config(d, ARCH.hf_class) | {"sliding_window": d.default.attention.window}


ARCH = Arch(
    model_type="mistral",
    hf_class="MistralForCausalLM",
    traits=_traits,
    config=_config,
    names=NAMES,
    gguf=Gguf("llama", permute=True, losses=GRAPH),
    inert_tensors=(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq",),
)
