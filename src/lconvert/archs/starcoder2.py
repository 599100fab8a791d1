"""StarCoder2 (transformers `Starcoder2ForCausalLM`): grouped-query attention, layer norms, biases everywhere."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from lconvert.ir import Decoder, Layer, Mlp

from .common import Arch, Gguf, Keys, activation, name
from .llama import NAMES as LLAMA_NAMES
from .llama import attention, base_config
from .llamacpp import graph, restored


def _traits(keys: Keys) -> Decoder:
    keys.inert("activation_function")  # hidden_act is what transformers reads
    keys.must("mlp_type", "default")
    keys.must("norm_type", "layer_norm")
    bias = keys.flag("use_bias", True)
    act = activation(keys, "hidden_act") if keys.has("hidden_act") else "gelu_tanh"
    window = keys.window("sliding_window", absent=None)
    return Decoder(
        family="starcoder2",
        hidden=keys.size("hidden_size"),
        layers=keys.size("num_hidden_layers"),
        vocab=keys.size("vocab_size"),
        context=keys.size("max_position_embeddings"),
        norm="layer",
        norm_eps=keys.float("norm_epsilon", 1e-5),
        default=Layer(
            replace(attention(keys, qkv_bias=bias, o_bias=bias), window=window),
            Mlp("plain", act, keys.size("intermediate_size"), bias),
        ),
        norm_bias=True,
        tied=keys.flag("tie_word_embeddings", True),
    )


def _config(d: Decoder) -> dict[str, Any]:
    out = base_config(d, ARCH.hf_class)
    del out["rms_norm_eps"]
    a = d.default.attention
    return out | {"norm_epsilon": d.norm_eps, "sliding_window": a.window, "use_bias": a.qkv_bias}


ARCH = Arch(
    model_type="starcoder2",
    hf_class="Starcoder2ForCausalLM",
    traits=_traits,
    config=_config,
    names=(
        *(n for n in LLAMA_NAMES if ".mlp." not in n.hf),
        name("model.layers.{i}.mlp.c_fc.weight", "layers.{i}.mlp.up"),
        name("model.layers.{i}.mlp.c_proj.weight", "layers.{i}.mlp.down"),
    ),
    gguf=Gguf(
        "starcoder2",
        losses=graph(
            "starcoder2.cpp",
            activation="gelu_tanh",
            qkv_bias="optional",
            o_bias="required",
            mlp_bias="required",
            partial_rope=False,
            square=True,
        ),
        restore=restored("gelu_tanh"),
    ),
)
