"""GPT-NeoX and Pythia (transformers `GPTNeoXForCausalLM`): parallel residual, partial rope, qkv woven per head."""

from __future__ import annotations

from typing import Any

from lconvert.ir import Attention, Decoder, Layer, Mlp

from .common import Arch, Gguf, Keys, activation, hf_activation, hf_rope, name, parse_rope, rope_parameters
from .llamacpp import graph, restored

_LAYER = "gpt_neox.layers.{i}."


def _traits(keys: Keys) -> Decoder:
    hidden, heads = keys.size("hidden_size"), keys.size("num_attention_heads")
    head_dim, context = keys.head_dim(hidden, heads), keys.size("max_position_embeddings", 2048)
    rope = rope_parameters(keys)
    nested = keys.table("rope_parameters")
    for key, old, default in (
        ("rope_theta", "rotary_emb_base", 10000.0),
        ("partial_rotary_factor", "rotary_pct", 0.25),
    ):
        value = keys.float(old, None)
        if key not in nested and value is not None:
            rope[key] = value
        rope.setdefault(key, default)
    bias = keys.flag("attention_bias", True)
    attention = Attention(
        heads=heads,
        kv_heads=heads,
        head_dim=head_dim,
        scale=head_dim**-0.5,
        rope=parse_rope(keys, rope, head_dim, context=context, allowed=("default", "linear", "yarn")),
        qkv_bias=bias,
        o_bias=bias,
    )
    mlp = Mlp("plain", activation(keys, "hidden_act"), keys.size("intermediate_size"), bias=True)
    return Decoder(
        family="gpt_neox",
        hidden=hidden,
        layers=keys.size("num_hidden_layers"),
        vocab=keys.size("vocab_size"),
        context=context,
        norm="layer",
        norm_eps=keys.float("layer_norm_eps", 1e-5),
        default=Layer(attention, mlp, "parallel" if keys.flag("use_parallel_residual", True) else "pre"),
        norm_bias=True,
        tied=keys.flag("tie_word_embeddings", False),
    )


def _config(d: Decoder) -> dict[str, Any]:
    a, m = d.default.attention, d.default.mlp
    assert a.rope is not None
    rope = {"partial_rotary_factor": 1.0} | hf_rope(a.rope, a.head_dim, d.context)
    return {
        "architectures": [ARCH.hf_class],
        "model_type": "gpt_neox",
        "hidden_size": d.hidden,
        "num_attention_heads": a.heads,
        "num_hidden_layers": d.layers,
        "intermediate_size": m.hidden,
        "max_position_embeddings": d.context,
        "vocab_size": d.vocab,
        "hidden_act": hf_activation(m.activation),
        "layer_norm_eps": d.norm_eps,
        "attention_bias": a.qkv_bias,
        "use_parallel_residual": d.default.block == "parallel",
        "tie_word_embeddings": d.tied,
        "rope_parameters": rope,
    }


ARCH = Arch(
    model_type="gpt_neox",
    hf_class="GPTNeoXForCausalLM",
    traits=_traits,
    config=_config,
    names=(
        name("gpt_neox.embed_in.weight", "embed"),
        name(_LAYER + "input_layernorm.weight", "layers.{i}.attn_norm"),
        name(
            _LAYER + "attention.query_key_value.weight",
            *("layers.{i}.attn." + side for side in "qkv"),
            layout="grouped",
        ),
        name(_LAYER + "attention.dense.weight", "layers.{i}.attn.o"),
        name(_LAYER + "post_attention_layernorm.weight", "layers.{i}.mlp_norm"),
        name(_LAYER + "mlp.dense_h_to_4h.weight", "layers.{i}.mlp.up"),
        name(_LAYER + "mlp.dense_4h_to_h.weight", "layers.{i}.mlp.down"),
        name("gpt_neox.final_layer_norm.weight", "norm"),
        name("embed_out.weight", "head", other="lm_head.weight"),
    ),
    gguf=Gguf(
        "gptneox",
        fused={"attn_qkv": ("attn.q", "attn.k", "attn.v")},
        keys=lambda d: {"use_parallel_residual": ("bool", d.default.block == "parallel")},
        losses=graph(
            "gptneox.cpp",
            activation="gelu_tanh",
            blocks=("pre", "parallel"),
            qkv_bias="required",
            o_bias="required",
            mlp_bias="required",
            square=True,
            head="own",
        ),
        restore=restored("gelu_tanh"),
    ),
    inert_tensors=(r"gpt_neox\.layers\.\d+\.attention\.(bias|masked_bias|rotary_emb\.inv_freq)",),
)
