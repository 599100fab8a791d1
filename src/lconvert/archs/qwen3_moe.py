"""Qwen3-MoE (transformers `Qwen3MoeForCausalLM`): Qwen3 with routed experts; some layers may stay dense."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from lconvert.ir import Decoder, Layer, Mlp, Moe

from .common import Arch, Gguf, Keys, Loss, activation, name
from .llama import base_config, decoder
from .llamacpp import graph
from .qwen3 import NAMES, attention

_MLP = "model.layers.{i}.mlp."
_LINK = "https://github.com/ggml-org/llama.cpp/blob/master/src/models/qwen3moe.cpp"
_GRAPH = graph("qwen3moe.cpp", qkv_bias="optional", partial_rope=False, normalizes=True)


def _dense_layers(keys: Keys) -> list[int]:
    """Layers with a plain MLP, as transformers' decoder layer decides it."""
    n, step = keys.size("num_hidden_layers"), keys.size("decoder_sparse_step", 1)
    listed = set(keys.items("mlp_only_layers", int) or [])
    return [i for i in range(n) if i in listed or (i + 1) % step]


def _traits(keys: Keys) -> Decoder:
    keys.inert("max_window_layers", "intermediate_size")
    act = activation(keys, "hidden_act")
    moe = Moe(
        experts=keys.size("num_experts", None) or keys.size("num_local_experts", 128),
        top_k=keys.size("num_experts_per_tok", 8),
        hidden=keys.size("moe_intermediate_size", 768),
        activation=act,
        normalize=keys.flag("norm_topk_prob", False),
    )
    on, window = keys.flag("use_sliding_window", False), keys.window("sliding_window", absent=4096)
    layer = Layer(replace(attention(keys, None), window=window if on else None), moe)
    d = decoder(keys, layer)
    dense = _dense_layers(keys)
    if not dense:
        return d
    plain = replace(layer, mlp=Mlp("gated", act, keys.size("intermediate_size", 6144)))
    return replace(d, overrides=dict.fromkeys(dense, plain))


def _config(d: Decoder) -> dict[str, Any]:
    a, moe = d.default.attention, d.default.mlp
    assert isinstance(moe, Moe)
    sizes = [layer.mlp.hidden for layer in d.overrides.values()]
    return base_config(d, ARCH.hf_class) | {
        "attention_bias": a.o_bias,
        "decoder_sparse_step": 1,
        "intermediate_size": sizes[0] if sizes else moe.hidden,
        "mlp_only_layers": sorted(d.overrides),
        "moe_intermediate_size": moe.hidden,
        "norm_topk_prob": moe.normalize,
        "num_experts": moe.experts,
        "num_experts_per_tok": moe.top_k,
        "sliding_window": a.window,
        "use_sliding_window": a.window is not None,
    }


def _losses(d: Decoder) -> tuple[Loss, ...]:
    dense = [i for i, layer in d.each() if isinstance(layer.mlp, Mlp)]
    if not dense:
        return _GRAPH(d)
    reason = f"llama.cpp's graph has experts in every layer; in the model layers {dense} have none"
    return (*_GRAPH(d), Loss("dense_layers", reason, link=_LINK))


ARCH = Arch(
    model_type="qwen3_moe",
    hf_class="Qwen3MoeForCausalLM",
    traits=_traits,
    config=_config,
    names=(
        *NAMES,
        name(_MLP + "gate.weight", "layers.{i}.moe.router"),
        name(_MLP + "experts.{e}.gate_proj.weight", "layers.{i}.moe.experts.{e}.gate"),
        name(_MLP + "experts.{e}.up_proj.weight", "layers.{i}.moe.experts.{e}.up"),
        name(_MLP + "experts.{e}.down_proj.weight", "layers.{i}.moe.experts.{e}.down"),
    ),
    gguf=Gguf(
        "qwen3moe",
        keys=lambda d: {"expert_feed_forward_length": ("u32", d.default.mlp.hidden)},
        losses=_losses,
        moe=True,
    ),
)
