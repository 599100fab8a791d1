"""GPT-2 (transformers `GPT2LMHeadModel`): learned positions, layer norms with bias, weights stored as (in, out)."""

from __future__ import annotations

from typing import Any

from lconvert.ir import Attention, Decoder, Layer, Mlp

from .common import Arch, Gguf, Keys, Name, activation, hf_activation, name
from .llamacpp import graph, restored

_LAYER = "h.{i}."


def _name(hf: str, *canonical: str, transpose: bool = False) -> Name:
    """The released checkpoints were saved without the class's prefix."""
    return name("transformer." + hf, *canonical, transpose=transpose, other=hf)


def _traits(keys: Keys) -> Decoder:
    keys.inert("reorder_and_upcast_attn", "n_ctx")  # an fp32 softmax, and n_positions under its old name
    keys.must("add_cross_attention", False)
    keys.must("scale_attn_weights", True)
    keys.must("scale_attn_by_inverse_layer_idx", False)
    hidden, heads = keys.size("n_embd"), keys.size("n_head")
    positions = keys.size("n_positions", 1024)
    head_dim = keys.head_dim(hidden, heads)
    attention = Attention(heads, heads, head_dim, head_dim**-0.5, None, qkv_bias=True, o_bias=True)
    act = activation(keys, "activation_function") if keys.has("activation_function") else "gelu_tanh"
    mlp = Mlp("plain", act, keys.size("n_inner", None) or 4 * hidden, bias=True)
    return Decoder(
        family="gpt2",
        hidden=hidden,
        layers=keys.size("n_layer"),
        vocab=keys.size("vocab_size"),
        context=positions,
        norm="layer",
        norm_eps=keys.float("layer_norm_epsilon", 1e-5),
        default=Layer(attention, mlp),
        norm_bias=True,
        tied=keys.flag("tie_word_embeddings", True),
        learned_positions=positions,
    )


def _config(d: Decoder) -> dict[str, Any]:
    a, m = d.default.attention, d.default.mlp
    return {
        "architectures": [ARCH.hf_class],
        "model_type": "gpt2",
        "n_embd": d.hidden,
        "n_head": a.heads,
        "n_layer": d.layers,
        "n_inner": m.hidden,
        "n_positions": d.learned_positions,
        "vocab_size": d.vocab,
        "activation_function": {"gelu_tanh": "gelu_new"}.get(m.activation, hf_activation(m.activation)),
        "layer_norm_epsilon": d.norm_eps,
        "tie_word_embeddings": d.tied,
    }


ARCH = Arch(
    model_type="gpt2",
    hf_class="GPT2LMHeadModel",
    traits=_traits,
    config=_config,
    names=(
        _name("wte.weight", "embed"),
        _name("wpe.weight", "pos_embed"),
        _name(_LAYER + "ln_1.weight", "layers.{i}.attn_norm"),
        _name(_LAYER + "attn.c_attn.weight", *("layers.{i}.attn." + side for side in "qkv"), transpose=True),
        _name(_LAYER + "attn.c_proj.weight", "layers.{i}.attn.o", transpose=True),
        _name(_LAYER + "ln_2.weight", "layers.{i}.mlp_norm"),
        _name(_LAYER + "mlp.c_fc.weight", "layers.{i}.mlp.up", transpose=True),
        _name(_LAYER + "mlp.c_proj.weight", "layers.{i}.mlp.down", transpose=True),
        _name("ln_f.weight", "norm"),
        name("lm_head.weight", "head"),
    ),
    gguf=Gguf(
        "gpt2",
        fused={"attn_qkv": ("attn.q", "attn.k", "attn.v")},
        losses=graph(
            "gpt2.cpp",
            activation="gelu_tanh",
            qkv_bias="required",
            o_bias="required",
            mlp_bias="required",
            square=True,
        ),
        restore=restored("gelu_tanh"),
    ),
    inert_tensors=(r"(transformer\.)?h\.\d+\.attn\.(bias|masked_bias)",),
)
