"""Llama 2, 3, 3.1+ (transformers `LlamaForCausalLM`): pre-norm RMS, gated MLP, grouped-query attention, RoPE."""

from __future__ import annotations

from typing import Any, Literal

from lconvert.ir import Attention, Decoder, Layer, Mlp

from .common import Arch, Gguf, Keys, activation, hf_activation, hf_rope, name, parse_rope, rope_parameters
from .llamacpp import graph

NAMES = (
    name("model.embed_tokens.weight", "embed"),
    name("model.layers.{i}.input_layernorm.weight", "layers.{i}.attn_norm"),
    name("model.layers.{i}.self_attn.q_proj.weight", "layers.{i}.attn.q"),
    name("model.layers.{i}.self_attn.k_proj.weight", "layers.{i}.attn.k"),
    name("model.layers.{i}.self_attn.v_proj.weight", "layers.{i}.attn.v"),
    name("model.layers.{i}.self_attn.o_proj.weight", "layers.{i}.attn.o"),
    name("model.layers.{i}.post_attention_layernorm.weight", "layers.{i}.mlp_norm"),
    name("model.layers.{i}.mlp.gate_proj.weight", "layers.{i}.mlp.gate"),
    name("model.layers.{i}.mlp.up_proj.weight", "layers.{i}.mlp.up"),
    name("model.layers.{i}.mlp.down_proj.weight", "layers.{i}.mlp.down"),
    name("model.norm.weight", "norm"),
    name("lm_head.weight", "head"),
)


def attention(
    keys: Keys,
    *,
    qkv_bias: bool = False,
    o_bias: bool = False,
    theta: float = 10000.0,
    head_dim: int | None = None,
    layout: Literal["half", "interleaved"] = "half",
) -> Attention:
    """The grouped-query attention with RoPE that the Llama family shares. `head_dim`: where the config has none."""
    heads = keys.size("num_attention_heads")
    head_dim = keys.size("head_dim", head_dim) or keys.head_dim(keys.size("hidden_size"), heads)
    context = keys.size("max_position_embeddings")
    rope = parse_rope(keys, rope_parameters(keys), head_dim, context=context, theta=theta, layout=layout)
    return Attention(
        heads=heads,
        kv_heads=keys.size("num_key_value_heads", heads),
        head_dim=head_dim,
        scale=head_dim**-0.5,
        rope=rope,
        qkv_bias=qkv_bias,
        o_bias=o_bias,
    )


def decoder(keys: Keys, layer: Layer, *, tied: bool = False, eps: float = 1e-6) -> Decoder:
    """The traits that every Llama-shaped config spells the same way."""
    return Decoder(
        family=keys.get("model_type"),
        hidden=keys.size("hidden_size"),
        layers=keys.size("num_hidden_layers"),
        vocab=keys.size("vocab_size"),
        context=keys.size("max_position_embeddings"),
        norm="rms",
        norm_eps=keys.float("rms_norm_eps", eps),
        default=layer,
        tied=keys.flag("tie_word_embeddings", tied),
    )


def base_config(d: Decoder, hf_class: str) -> dict[str, Any]:
    """The config.json keys that `decoder` and `attention` read."""
    a, m = d.default.attention, d.default.mlp
    out: dict[str, Any] = {
        "architectures": [hf_class],
        "model_type": d.family,
        "hidden_size": d.hidden,
        "num_hidden_layers": d.layers,
        "vocab_size": d.vocab,
        "max_position_embeddings": d.context,
        "rms_norm_eps": d.norm_eps,
        "tie_word_embeddings": d.tied,
        "num_attention_heads": a.heads,
        "num_key_value_heads": a.kv_heads,
        "head_dim": a.head_dim,
        "intermediate_size": m.hidden,
        "hidden_act": hf_activation(m.activation),
    }
    if a.rope is not None:
        out["rope_parameters"] = hf_rope(a.rope, a.head_dim, d.context)
    return out


def _traits(keys: Keys) -> Decoder:
    keys.inert("pretraining_tp")
    bias = keys.flag("attention_bias", False)
    mlp = Mlp(
        "gated", activation(keys, "hidden_act"), keys.size("intermediate_size"), keys.flag("mlp_bias", False)
    )
    return decoder(keys, Layer(attention(keys, qkv_bias=bias, o_bias=bias), mlp))


def _config(d: Decoder) -> dict[str, Any]:
    assert isinstance(d.default.mlp, Mlp)
    own = {"attention_bias": d.default.attention.qkv_bias, "mlp_bias": d.default.mlp.bias}
    return base_config(d, ARCH.hf_class) | own


#: llama.cpp's graph for Llama, Mistral and Mixtral.
GRAPH = graph(
    "llama.cpp",
    qkv_bias="optional",
    o_bias="optional",
    mlp_bias="optional",
    partial_rope=False,
    ropes=("none", "linear", "yarn", "llama3"),
    normalizes=True,
)

ARCH = Arch(
    model_type="llama",
    hf_class="LlamaForCausalLM",
    traits=_traits,
    config=_config,
    names=NAMES,
    gguf=Gguf("llama", permute=True, losses=GRAPH),
    inert_tensors=(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq",),
)
