"""An encoder that classifies sequences (BERT, DistilBERT) as an ONNX graph, from its traits.

Inputs and outputs are named as the exporters of Hugging Face name them: input_ids, attention_mask, token_type_ids where there are types,
and logits (batch, labels). Products, norms and activations are those of the decoder's builder; int8 weights whose inputs have static
scales become MatMulIntegerToFloat in ONNX Runtime (core/optimizer/qdq_transformer, MatMulIntegerToFloat).
"""

from __future__ import annotations

from lconvert.converters import onnx_arrays as arrays
from lconvert.converters import onnx_weights as weights
from lconvert.converters.onnx_builder import Builder, Shape
from lconvert.converters.onnx_weights import Dialect
from lconvert.errors import UnsupportedError
from lconvert.ir import Encoder, Layer, Mlp, Model, QTensor
from lconvert.plan import Verdict


def build(model: Model, dialect: Dialect, dtype: str, shape: Shape) -> Builder:
    """The whole graph of an encoder. `shape` says what only decoders have."""
    e = model.arch
    if not isinstance(e, Encoder):
        raise UnsupportedError(f"{model.source}: {e.family} is no encoder")
    b = Builder(model, dialect, dtype, shape)
    g = b.graph
    names = ["input_ids", "attention_mask", *(["token_type_ids"] if e.token_types else [])]
    for name in names:
        g.input(name, "INT64", ("batch", "sequence"))
    g.output("logits", b.number_type, ("batch", e.labels))
    x = _embedded(b, e)
    for i, layer in e.each():
        x = _layer(b, e, x, f"layers.{i}", layer)
    # (batch, 1, hidden): ONNX Runtime fuses a product of matrices and its bias into a Gemm in floats, one of more dimensions not.
    first = g.op("Gather", x, g.constant([0]), axis=1, name="first_token")
    pooled = {"tanh": "Tanh", "relu": "Relu"}[e.pooler]
    head = b.linear(g.op(pooled, b.linear(first, "pooler")), "head")
    g.op("Squeeze", head, g.constant([1]), output="logits")
    return b


def _table(b: Builder, role: str) -> str:
    """Embeddings in the graph's dtype."""
    entry = b.model.entries[role]
    if isinstance(entry.data, QTensor):
        wide = b.dtype == "F32"
        verdict = Verdict("widened" if wide else "rounded", f"as {b.dtype} values: a table of an encoder")
    else:
        verdict = weights.plain(entry.data.dtype, b.dtype)
    return b._add(arrays.rows(role, entry, b.dtype), role, verdict)


def _norm(b: Builder, e: Encoder, x: str, role: str) -> str:
    with b.graph.scope(role.rpartition(".")[2]):
        inputs = (b.vector(role), b.vector(role + ".bias"))
        return str(b.graph.op("LayerNormalization", x, *inputs, axis=-1, epsilon=e.norm_eps))


def _embedded(b: Builder, e: Encoder) -> str:
    g = b.graph
    with g.scope("embed"):
        words = g.op("Gather", _table(b, "embed"), "input_ids")
        length = g.op("Shape", "input_ids", start=1, end=2)
        positions = g.op("Slice", _table(b, "pos_embed"), g.constant([0]), length, g.constant([0]))
        x = g.op("Add", words, positions)
        if e.token_types:
            x = g.op("Add", x, g.op("Gather", _table(b, "type_embed"), "token_type_ids"))
    return _norm(b, e, x, "embed_norm")


def _mask(b: Builder) -> str:
    """What may be looked at, (batch, 1, sequence, sequence): tokens that are no padding, and every token itself, so that no row is empty."""
    g = b.graph

    def made() -> str:
        real = g.op("Unsqueeze", g.op("Cast", "attention_mask", to=9), g.constant([1, 2]))
        count = g.op("Squeeze", g.op("Shape", "input_ids", start=1, end=2))
        places = g.op("Range", g.constant(0), count, g.constant(1))
        columns = g.op("Unsqueeze", places, g.constant([0]))
        itself = g.op("Equal", columns, g.op("Unsqueeze", places, g.constant([1])))
        return str(g.op("Or", real, itself, name="mask"))

    return g.once("mask", made)


def _layer(b: Builder, e: Encoder, x: str, prefix: str, layer: Layer) -> str:
    g, a, m = b.graph, layer.attention, layer.mlp
    assert isinstance(m, Mlp)  # spec.check
    with g.scope(prefix):
        with g.scope("attn"):
            q, k, v = (
                g.op(
                    "Transpose",
                    g.op(
                        "Reshape",
                        b.linear(x, f"{prefix}.attn.{side}"),
                        g.constant([0, 0, a.heads, a.head_dim]),
                    ),
                    perm=[0, 2, 1, 3],
                )
                for side in "qkv"
            )
            seen = g.op("Attention", q, k, v, _mask(b), scale=a.scale)
            flat = g.op("Reshape", g.op("Transpose", seen, perm=[0, 2, 1, 3]), g.constant([0, 0, e.hidden]))
            out = b.linear(flat, f"{prefix}.attn.o")
        x = _norm(b, e, g.op("Add", x, out), f"{prefix}.attn_post_norm")
        with g.scope("mlp"):
            out = b.mlp(x, f"{prefix}.mlp.", m.kind, m.activation)
        return _norm(b, e, g.op("Add", x, out), f"{prefix}.mlp_post_norm")
