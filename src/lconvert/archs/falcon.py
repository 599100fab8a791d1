"""Falcon (transformers `FalconForCausalLM`): attention and MLP side by side, with one norm (7B) or two (40B, 180B).

The fused qkv is woven per key-value group in every variant: one group for multi-query, one per head without it.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from lconvert.errors import UnsupportedError
from lconvert.ir import Attention, Decoder, Layer, Mlp, Rope

from .common import Arch, Gguf, Keys, activation, hf_activation, hf_rope, name, parse_rope, rope_parameters
from .llamacpp import graph, map_layers, restored

_LAYER = "transformer.h.{i}."


def _block(keys: Keys, new: bool) -> Any:
    """Where the norms are, as transformers' decoder layer decides it."""
    parallel = keys.flag("parallel_attn", True)
    norms = keys.int("num_ln_in_parallel_attn", 2 if new else 1)
    if norms not in (1, 2) or (norms == 2 and not new) or (new and not parallel):
        raise UnsupportedError(
            f"{keys.where}: num_ln_in_parallel_attn = {norms} with new_decoder_architecture = {new} and "
            f"parallel_attn = {parallel} is not a Falcon that transformers can run"
        )
    return "pre" if not parallel else "parallel" if norms == 2 else "parallel_shared"


def _traits(keys: Keys) -> Decoder:
    keys.must("alibi", False)
    keys.must("apply_residual_connection_post_layernorm", False)
    hidden = keys.size("n_embed", None) or keys.size("hidden_size")
    keys.inert("hidden_size")
    heads = keys.size("num_attention_heads")
    stated = keys.size("num_kv_heads", heads)
    new, multi_query = keys.flag("new_decoder_architecture", False), keys.flag("multi_query", True)
    kv_heads = stated if new else 1 if multi_query else heads
    head_dim, context = keys.head_dim(hidden, heads), keys.size("max_position_embeddings", 2048)
    rope = parse_rope(
        keys, rope_parameters(keys), head_dim, context=context, allowed=("default", "linear", "yarn")
    )
    bias = keys.flag("bias", False)
    attention = Attention(heads, kv_heads, head_dim, head_dim**-0.5, rope, qkv_bias=bias, o_bias=bias)
    act = activation(keys, "activation") if keys.has("activation") else "gelu"
    mlp = Mlp("plain", act, keys.size("ffn_hidden_size", None) or 4 * hidden, bias)
    return Decoder(
        family="falcon",
        hidden=hidden,
        layers=keys.size("num_hidden_layers"),
        vocab=keys.size("vocab_size"),
        context=context,
        norm="layer",
        norm_eps=keys.float("layer_norm_epsilon", 1e-5),
        default=Layer(attention, mlp, _block(keys, new)),
        norm_bias=True,
        tied=keys.flag("tie_word_embeddings", True),
    )


def _config(d: Decoder) -> dict[str, Any]:
    a, m, block = d.default.attention, d.default.mlp, d.default.block
    assert a.rope is not None and isinstance(m, Mlp)
    new = block == "parallel" or (block == "parallel_shared" and a.kv_heads not in (1, a.heads))
    return {
        "architectures": [ARCH.hf_class],
        "model_type": "falcon",
        "hidden_size": d.hidden,
        "num_attention_heads": a.heads,
        "num_kv_heads": a.kv_heads,
        "num_hidden_layers": d.layers,
        "ffn_hidden_size": m.hidden,
        "max_position_embeddings": d.context,
        "vocab_size": d.vocab,
        "activation": hf_activation(m.activation),
        "layer_norm_epsilon": d.norm_eps,
        "bias": m.bias,
        "alibi": False,
        "new_decoder_architecture": new,
        "num_ln_in_parallel_attn": 2 if block == "parallel" else 1,
        "multi_query": not new and a.kv_heads == 1,
        "parallel_attn": block != "pre",
        "tie_word_embeddings": d.tied,
        "rope_parameters": hf_rope(a.rope, a.head_dim, d.context),
    }


def _restore(d: Decoder) -> Decoder:
    """Upstream's files hold no rope keys: llama.cpp's defaults are Falcon's."""

    def rope(layer: Layer) -> Layer:
        a = layer.attention
        return replace(layer, attention=replace(a, rope=a.rope or Rope(10000.0, a.head_dim)))

    return restored("gelu_tanh")(map_layers(d, rope))


ARCH = Arch(
    model_type="falcon",
    hf_class="FalconForCausalLM",
    traits=_traits,
    config=_config,
    names=(
        name("transformer.word_embeddings.weight", "embed"),
        name(_LAYER + "ln_attn.weight", "layers.{i}.attn_norm", block="parallel"),
        name(_LAYER + "ln_mlp.weight", "layers.{i}.mlp_norm", block="parallel"),
        name(_LAYER + "input_layernorm.weight", "layers.{i}.attn_norm", block="parallel_shared"),
        name(_LAYER + "input_layernorm.weight", "layers.{i}.attn_norm", block="pre"),
        name(_LAYER + "post_attention_layernorm.weight", "layers.{i}.mlp_norm", block="pre"),
        name(
            _LAYER + "self_attention.query_key_value.weight",
            *("layers.{i}.attn." + side for side in "qkv"),
            layout="grouped",
        ),
        name(_LAYER + "self_attention.dense.weight", "layers.{i}.attn.o"),
        name(_LAYER + "mlp.dense_h_to_4h.weight", "layers.{i}.mlp.up"),
        name(_LAYER + "mlp.dense_4h_to_h.weight", "layers.{i}.mlp.down"),
        name("transformer.ln_f.weight", "norm"),
        name("lm_head.weight", "head"),
    ),
    gguf=Gguf(
        "falcon",
        fused={"attn_qkv": ("attn.q", "attn.k", "attn.v")},
        block_names={"parallel": {"attn_norm": "attn_norm_2", "mlp_norm": "attn_norm"}},
        losses=graph(
            "falcon.cpp",
            activation="gelu_tanh",
            blocks=("parallel", "parallel_shared"),
            partial_rope=False,
            square=True,
        ),
        restore=_restore,
    ),
    inert_tensors=(r"transformer\.h\.\d+\.self_attention\.rotary_emb\.inv_freq",),
)
