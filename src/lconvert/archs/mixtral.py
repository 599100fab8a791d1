"""Mixtral (transformers `MixtralForCausalLM`): Mistral with routed experts, softmax over the chosen ones."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from lconvert.ir import Decoder, Layer, Moe

from .common import Arch, Gguf, Keys, activation, name
from .llama import GRAPH, NAMES, attention, base_config, decoder

_MOE = "model.layers.{i}.block_sparse_moe"


def _traits(keys: Keys) -> Decoder:
    moe = Moe(
        experts=keys.size("num_local_experts"),
        top_k=keys.size("num_experts_per_tok"),
        hidden=keys.size("intermediate_size"),
        activation=activation(keys, "hidden_act"),
    )
    window = keys.window("sliding_window", absent=None)
    return decoder(keys, Layer(replace(attention(keys, theta=1e6), window=window), moe), eps=1e-5)


def _config(d: Decoder) -> dict[str, Any]:
    moe = d.default.mlp
    assert isinstance(moe, Moe)
    own = {"num_local_experts": moe.experts, "num_experts_per_tok": moe.top_k}
    return base_config(d, ARCH.hf_class) | own | {"sliding_window": d.default.attention.window}


ARCH = Arch(
    model_type="mixtral",
    hf_class="MixtralForCausalLM",
    traits=_traits,
    config=_config,
    names=(
        *(n for n in NAMES if ".mlp." not in n.hf),
        name(_MOE + ".gate.weight", "layers.{i}.moe.router"),
        name(_MOE + ".experts.{e}.w1.weight", "layers.{i}.moe.experts.{e}.gate"),
        name(_MOE + ".experts.{e}.w2.weight", "layers.{i}.moe.experts.{e}.down"),
        name(_MOE + ".experts.{e}.w3.weight", "layers.{i}.moe.experts.{e}.up"),
    ),
    gguf=Gguf("llama", permute=True, losses=GRAPH, moe=True),
)
