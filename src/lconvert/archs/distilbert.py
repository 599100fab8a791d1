"""DistilBERT as a classifier of sequences (transformers `DistilBertForSequenceClassification`): BERT without token types."""

from __future__ import annotations

from typing import Any

from lconvert.ir import Encoder

from .bert import label_config, labels, layer
from .common import NO_GGUF, Arch, Keys, activation, hf_activation, name

_LAYER = "distilbert.transformer.layer.{i}."
#: Every layer norm's, a constant of the class (transformers modeling_distilbert.py).
_EPS = 1e-12


def _traits(keys: Keys) -> Encoder:
    # Sinusoids only fill the position embeddings of a new model; the stored ones are what runs.
    keys.inert("sinusoidal_pos_embds", "qa_dropout", "seq_classif_dropout", "tie_word_embeddings")
    hidden, heads = keys.size("dim", 768), keys.size("n_heads", 12)
    act = activation(keys, "activation") if keys.has("activation") else "gelu"
    return Encoder(
        family="distilbert",
        hidden=hidden,
        layers=keys.size("n_layers", 6),
        vocab=keys.size("vocab_size", 30522),
        context=keys.size("max_position_embeddings", 512),
        labels=labels(keys),
        norm_eps=_EPS,
        default=layer(hidden, heads, keys.head_dim(hidden, heads), act, keys.size("hidden_dim", 3072)),
        pooler="relu",
    )


def _config(e: Encoder) -> dict[str, Any]:
    return {
        "architectures": [ARCH.hf_class],
        "model_type": "distilbert",
        "dim": e.hidden,
        "n_heads": e.default.attention.heads,
        "n_layers": e.layers,
        "hidden_dim": e.default.mlp.hidden,
        "activation": hf_activation(e.default.mlp.activation),
        "vocab_size": e.vocab,
        "max_position_embeddings": e.context,
        **label_config(e),
    }


ARCH = Arch(
    model_type="distilbert",
    hf_class="DistilBertForSequenceClassification",
    traits=_traits,
    config=_config,
    names=(
        name("distilbert.embeddings.word_embeddings.weight", "embed"),
        name("distilbert.embeddings.position_embeddings.weight", "pos_embed"),
        name("distilbert.embeddings.LayerNorm.weight", "embed_norm"),
        name(_LAYER + "attention.q_lin.weight", "layers.{i}.attn.q"),
        name(_LAYER + "attention.k_lin.weight", "layers.{i}.attn.k"),
        name(_LAYER + "attention.v_lin.weight", "layers.{i}.attn.v"),
        name(_LAYER + "attention.out_lin.weight", "layers.{i}.attn.o"),
        name(_LAYER + "sa_layer_norm.weight", "layers.{i}.attn_post_norm"),
        name(_LAYER + "ffn.lin1.weight", "layers.{i}.mlp.up"),
        name(_LAYER + "ffn.lin2.weight", "layers.{i}.mlp.down"),
        name(_LAYER + "output_layer_norm.weight", "layers.{i}.mlp_post_norm"),
        name("pre_classifier.weight", "pooler"),
        name("classifier.weight", "head"),
    ),
    gguf=NO_GGUF,
    inert_tensors=(r"distilbert\.embeddings\.position_ids",),
)
