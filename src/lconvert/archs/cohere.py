"""Cohere Command R and Aya 23 (transformers `CohereForCausalLM`): attention and MLP after one norm, neighbours turn.

Its norms subtract the mean but have no bias; the logits are scaled; heads have norms of their own in Command R+.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from lconvert.ir import Attention, Decoder, Layer, Mlp, Rope

from .common import Arch, Gguf, Keys, Loss, activation, name
from .llama import NAMES as LLAMA_NAMES
from .llama import attention, base_config
from .llamacpp import graph, map_layers

_ATTENTION = "model.layers.{i}.self_attn."
_LINK = "https://github.com/ggml-org/llama.cpp/blob/master/src/models/command-r.cpp"
_GRAPH = graph("command-r.cpp", blocks=("parallel_shared",), qkv_bias="optional", square=True, head="tied")

#: llama.cpp expects norms on the heads in models with this many layers, and in no others.
_NORMED = 64


def _attention(keys: Keys) -> Attention:
    bias = keys.flag("attention_bias", False)
    out = attention(keys, qkv_bias=bias, o_bias=bias, theta=500000.0, layout="interleaved")
    return replace(out, qk_norm="per_head" if keys.flag("use_qk_norm", False) else "none")


def _traits(keys: Keys) -> Decoder:
    # Command R was trained on more than its max_position_embeddings, which bound nothing in transformers.
    context = keys.size("max_position_embeddings")
    mlp = Mlp("gated", activation(keys, "hidden_act"), keys.size("intermediate_size"))
    return Decoder(
        family="cohere",
        hidden=keys.size("hidden_size"),
        layers=keys.size("num_hidden_layers"),
        vocab=keys.size("vocab_size"),
        context=keys.size("model_max_length", context),
        norm="layer",
        norm_eps=keys.float("layer_norm_eps", 1e-5),
        default=Layer(_attention(keys), mlp, "parallel_shared"),
        tied=keys.flag("tie_word_embeddings", True),
        logit_scale=keys.float("logit_scale", 0.0625),
    )


def _config(d: Decoder) -> dict[str, Any]:
    a = d.default.attention
    out = base_config(d, ARCH.hf_class)
    del out["rms_norm_eps"]
    return out | {
        "attention_bias": a.o_bias,
        "layer_norm_eps": d.norm_eps,
        "logit_scale": d.logit_scale,
        "use_qk_norm": a.qk_norm != "none",
    }


def _losses(d: Decoder) -> tuple[Loss, ...]:
    found = _GRAPH(d)
    has = d.default.attention.qk_norm != "none"
    if has == (d.layers >= _NORMED):
        return found
    reason = (
        f"llama.cpp's graph has norms on query and key heads from {_NORMED} layers on; the model has {d.layers} layers "
        f"and {'has them' if has else 'has none'}"
    )
    return (*found, Loss("qk_norm", reason, link=_LINK))


def _restore(d: Decoder) -> Decoder:
    def change(layer: Layer) -> Layer:
        a = layer.attention
        rope = a.rope or Rope(theta=10000.0, dim=a.head_dim)
        return replace(layer, attention=replace(a, rope=replace(rope, layout="interleaved")))

    return map_layers(d, change)


ARCH = Arch(
    model_type="cohere",
    hf_class="CohereForCausalLM",
    traits=_traits,
    config=_config,
    names=(
        *(n for n in LLAMA_NAMES if "post_attention" not in n.hf),
        name(_ATTENTION + "q_norm.weight", "layers.{i}.attn.q_norm"),
        name(_ATTENTION + "k_norm.weight", "layers.{i}.attn.k_norm"),
    ),
    gguf=Gguf(
        "command-r",
        keys=lambda d: {"logit_scale": ("f32", d.logit_scale)},
        losses=_losses,
        restore=_restore,
    ),
)
