"""StableLM 2 (transformers `StableLmForCausalLM`): layer norms, a quarter of each head turns, heads may have their own norms."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from lconvert.ir import Attention, Decoder, Layer, Mlp

from .common import Arch, Gguf, Keys, activation, hf_rope, name, parse_rope, rope_parameters
from .llama import NAMES as LLAMA_NAMES
from .llama import base_config
from .llamacpp import graph, map_layers

_ATTENTION = "model.layers.{i}.self_attn."


def _attention(keys: Keys) -> Attention:
    heads = keys.size("num_attention_heads")
    head_dim = keys.head_dim(keys.size("hidden_size"), heads)
    context = keys.size("max_position_embeddings", 4096)
    rope = {"partial_rotary_factor": 0.25} | rope_parameters(keys)
    return Attention(
        heads=heads,
        kv_heads=keys.size("num_key_value_heads", 32),
        head_dim=head_dim,
        scale=head_dim**-0.5,
        rope=parse_rope(keys, rope, head_dim, context=context),
        qk_norm="per_head" if keys.flag("qk_layernorm", False) else "none",
        qkv_bias=keys.flag("use_qkv_bias", False),
    )


def _traits(keys: Keys) -> Decoder:
    mlp = Mlp("gated", activation(keys, "hidden_act"), keys.size("intermediate_size"))
    parallel = keys.flag("use_parallel_residual", False)
    return Decoder(
        family="stablelm",
        hidden=keys.size("hidden_size"),
        layers=keys.size("num_hidden_layers"),
        vocab=keys.size("vocab_size"),
        context=keys.size("max_position_embeddings", 4096),
        norm="layer",
        norm_eps=keys.float("layer_norm_eps", 1e-5),
        default=Layer(_attention(keys), mlp, "parallel_shared" if parallel else "pre"),
        norm_bias=True,
        tied=keys.flag("tie_word_embeddings", False),
    )


def _config(d: Decoder) -> dict[str, Any]:
    a = d.default.attention
    assert a.rope is not None
    out = base_config(d, ARCH.hf_class)
    del out["rms_norm_eps"], out["head_dim"]
    return out | {
        "layer_norm_eps": d.norm_eps,
        "qk_layernorm": a.qk_norm != "none",
        "rope_parameters": {"partial_rotary_factor": 1.0} | hf_rope(a.rope, a.head_dim, d.context),
        "use_parallel_residual": d.default.block == "parallel_shared",
        "use_qkv_bias": a.qkv_bias,
    }


def _restore(d: Decoder) -> Decoder:
    """The graph goes by the second norm alone; upstream's files may claim a parallel residual beside it."""
    return map_layers(d, lambda layer: replace(layer, block="pre") if layer.block == "parallel" else layer)


ARCH = Arch(
    model_type="stablelm",
    hf_class="StableLmForCausalLM",
    traits=_traits,
    config=_config,
    names=(
        *LLAMA_NAMES,
        name(_ATTENTION + "q_layernorm.norms.{h}.weight", "layers.{i}.attn.q_norm"),
        name(_ATTENTION + "k_layernorm.norms.{h}.weight", "layers.{i}.attn.k_norm"),
    ),
    gguf=Gguf(
        "stablelm",
        keys=lambda d: {"use_parallel_residual": ("bool", d.default.block == "parallel_shared")},
        losses=graph(
            "stablelm.cpp",
            blocks=("pre", "parallel_shared"),
            qkv_bias="optional",
            square=True,
            head="own",
        ),
        restore=_restore,
    ),
    inert_tensors=(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq",),
)
