"""BERT as a classifier of sequences (transformers `BertForSequenceClassification`)."""

from __future__ import annotations

from typing import Any

from lconvert.errors import InputError
from lconvert.ir import Attention, Encoder, Layer, Mlp

from .common import NO_GGUF, Arch, Keys, activation, hf_activation, name

_LAYER = "bert.encoder.layer.{i}."

#: Keys of released configurations that transformers has never read, or that the classifier does not use.
_UNUSED = (
    "directionality",
    "pooler_fc_size",
    "pooler_num_attention_heads",
    "pooler_num_fc_layers",
    "pooler_size_per_head",
    "pooler_type",
    "output_past",
    "tie_word_embeddings",
)


def labels(keys: Keys) -> int:
    """How many classes there are: transformers counts the names in id2label, and writes num_labels only without them."""
    named = keys.table("id2label")
    count: int = keys.size("num_labels", len(named) or 2)
    if named and len(named) != count:
        raise InputError(f"{keys.where}: num_labels is {count}, but id2label names {len(named)}")
    return count


def label_config(e: Encoder) -> dict[str, Any]:
    """id2label and label2id as transformers writes them for labels without names."""
    names = {str(i): f"LABEL_{i}" for i in range(e.labels)}
    return {"id2label": names, "label2id": {v: int(k) for k, v in names.items()}}


def layer(hidden: int, heads: int, head_dim: int, act: str, inner: int) -> Layer:
    """One layer as all of BERT's kin have it: biases everywhere, norms after the sums."""
    attention = Attention(heads, heads, head_dim, head_dim**-0.5, None, qkv_bias=True, o_bias=True)
    return Layer(attention, Mlp("plain", act, inner, bias=True), "after")


def _traits(keys: Keys) -> Encoder:
    keys.inert(*_UNUSED)
    keys.must("is_decoder", False)
    keys.must("add_cross_attention", False)
    keys.must("position_embedding_type", "absolute")
    hidden, heads = keys.size("hidden_size", 768), keys.size("num_attention_heads", 12)
    act = activation(keys, "hidden_act") if keys.has("hidden_act") else "gelu"
    inner = keys.size("intermediate_size", 3072)
    return Encoder(
        family="bert",
        hidden=hidden,
        layers=keys.size("num_hidden_layers", 12),
        vocab=keys.size("vocab_size", 30522),
        context=keys.size("max_position_embeddings", 512),
        labels=labels(keys),
        norm_eps=keys.float("layer_norm_eps", 1e-12),
        default=layer(hidden, heads, keys.head_dim(hidden, heads), act, inner),
        pooler="tanh",
        token_types=keys.size("type_vocab_size", 2),
    )


def _config(e: Encoder) -> dict[str, Any]:
    return {
        "architectures": [ARCH.hf_class],
        "model_type": "bert",
        "hidden_size": e.hidden,
        "num_attention_heads": e.default.attention.heads,
        "num_hidden_layers": e.layers,
        "intermediate_size": e.default.mlp.hidden,
        "hidden_act": hf_activation(e.default.mlp.activation),
        "vocab_size": e.vocab,
        "max_position_embeddings": e.context,
        "type_vocab_size": e.token_types,
        "layer_norm_eps": e.norm_eps,
        **label_config(e),
    }


ARCH = Arch(
    model_type="bert",
    hf_class="BertForSequenceClassification",
    traits=_traits,
    config=_config,
    names=(
        name("bert.embeddings.word_embeddings.weight", "embed"),
        name("bert.embeddings.position_embeddings.weight", "pos_embed"),
        name("bert.embeddings.token_type_embeddings.weight", "type_embed"),
        name("bert.embeddings.LayerNorm.weight", "embed_norm"),
        name(_LAYER + "attention.self.query.weight", "layers.{i}.attn.q"),
        name(_LAYER + "attention.self.key.weight", "layers.{i}.attn.k"),
        name(_LAYER + "attention.self.value.weight", "layers.{i}.attn.v"),
        name(_LAYER + "attention.output.dense.weight", "layers.{i}.attn.o"),
        name(_LAYER + "attention.output.LayerNorm.weight", "layers.{i}.attn_post_norm"),
        name(_LAYER + "intermediate.dense.weight", "layers.{i}.mlp.up"),
        name(_LAYER + "output.dense.weight", "layers.{i}.mlp.down"),
        name(_LAYER + "output.LayerNorm.weight", "layers.{i}.mlp_post_norm"),
        name("bert.pooler.dense.weight", "pooler"),
        name("classifier.weight", "head"),
    ),
    gguf=NO_GGUF,
    inert_tensors=(r"bert\.embeddings\.(position_ids|token_type_ids)",),
)
