"""A decoder as an ONNX graph, from its traits: one topology of standard operators for every architecture and every consumer.

RMSNormalization, RotaryEmbedding and Attention are operators of opset 23. Inputs and outputs are named as the exporters of Hugging
Face name them. The parts: onnx_builder.py (weights, products, norms), onnx_attention.py, onnx_experts.py.
"""

from __future__ import annotations

from collections.abc import Callable

from lconvert.converters import onnx_arrays as arrays
from lconvert.converters import onnx_experts, onnx_static, onnx_trt
from lconvert.converters import onnx_weights as weights
from lconvert.converters.onnx_attention import attention
from lconvert.converters.onnx_builder import Builder, Shape
from lconvert.converters.onnx_weights import Dialect
from lconvert.ir import Entry, Layer, Mlp, Model, QTensor, Tensor


def feed_forward(b: Builder, x: str, i: int, layer: Layer) -> str:
    if isinstance(layer.mlp, Mlp):
        return b.mlp(x, f"layers.{i}.mlp.", layer.mlp.kind, layer.mlp.activation)
    return onnx_experts.routed(b, x, f"layers.{i}.moe.", layer.mlp)


def block(b: Builder, x: str, i: int, layer: Layer) -> str:
    """One decoder layer: attention and MLP with norms where the block has them."""
    g, d, p = b.graph, b.model.decoder, f"layers.{i}."

    def branch(kind: str, y: str, normed: bool, post: str = "") -> str:
        with g.scope(kind):
            y = b.norm(y, p + f"{kind}_norm") if normed else y
            y = attention(b, y, i, layer.attention) if kind == "attn" else feed_forward(b, y, i, layer)
            y = b.norm(y, p + post) if post else y
            return y if d.residual_scale == 1 else str(g.op("Mul", y, b.number(d.residual_scale)))

    with g.scope(f"layers.{i}"):
        if layer.block in ("parallel", "parallel_shared"):
            shared = layer.block == "parallel_shared"
            y = b.norm(x, p + "attn_norm") if shared else x
            both = g.op("Add", branch("attn", y, not shared), branch("mlp", y, not shared))
            return str(g.op("Add", x, both, name="out"))
        pre = layer.block in ("pre", "sandwich")
        post = layer.block in ("post", "sandwich")
        x = g.op("Add", x, branch("attn", x, pre, "attn_post_norm" if post else ""), name="attn.out")
        return str(g.op("Add", x, branch("mlp", x, pre, "mlp_post_norm" if post else ""), name="mlp.out"))


def embedded(b: Builder) -> str:
    """Rows of the embedding table, and of learned positions."""
    g, d = b.graph, b.model.decoder
    with g.scope("embed"):
        x = weights_rows(b, "embed", "input_ids")
        if d.embed_scale != 1:
            x = g.op("Mul", x, b.number(d.embed_scale))
        if d.learned_positions:
            x = g.op("Add", x, weights_rows(b, "pos_embed", "position_ids"))
    return x


def weights_rows(b: Builder, role: str, ids: str) -> str:
    """Rows of a table, whose codes are gathered before they are dequantized."""
    g, entry = b.graph, b.model.entries[role]
    found = weights.table_form(entry, b.dialect, b.dtype)
    if found.form is None:
        made = arrays.rows(role, entry, b.dtype)
        return str(g.op("Gather", b._add(made, role, found.verdict), ids))
    if b.dialect.tensorrt:
        return onnx_trt.quantized_rows(b, role, found, ids)
    q = found.form.codes
    parts = [
        g.op(
            "Gather",
            b._add(
                arrays.as_they_lie(role + ".table", q.codes, found.form.type),
                role,
                found.verdict,
                weights.describe(found.form),
            ),
            ids,
        )
    ]
    assert isinstance(q.scale, Tensor)
    sides = [(role + ".table.scale", q.scale, b.number_type)]
    sides += [] if q.zero is None else [(role + ".table.zero", q.zero, found.form.type)]
    for name, side, type_ in sides:
        parts.append(
            g.op("Gather", b._add(arrays.as_they_lie(name, side, type_), role, found.verdict, side=True), ids)
        )
    return str(g.op("DequantizeLinear", *parts, axis=2, block_size=q.block[1]))


def logits(b: Builder, x: str) -> None:
    """The head: hidden states to logits, the graph's first output."""
    g, d = b.graph, b.model.decoder
    x = b.norm(x, "norm")
    if b.shape.last_logit:
        x = b.last(x)
    steps: list[Callable[[str, str], str]] = []
    if d.logit_scale != 1:
        steps.append(lambda y, out: str(g.op("Mul", y, b.number(d.logit_scale), output=out)))
    if d.final_softcap is not None:
        limit = d.final_softcap
        steps.append(
            lambda y, out: str(
                g.op("Mul", g.op("Tanh", g.op("Div", y, b.number(limit))), b.number(limit), output=out)
            )
        )
    name = "" if steps else "logits"
    x = head(b, x, name)
    for k, step in enumerate(steps):
        x = step(x, "logits" if k == len(steps) - 1 else "")


def head(b: Builder, x: str, output: str) -> str:
    d, g = b.model.decoder, b.graph
    if not d.tied:
        return b.linear(x, "head", output)
    entry = b.model.entries["embed"]
    with g.scope("head"):
        if isinstance(entry.data, QTensor):
            y = b._product(
                x,
                Entry("head", entry.data, entry.activation, entry.transform),
                "head",
                "" if d.head_bias else output,
            )
        else:
            turned = g.op(
                "Transpose",
                b._add(
                    arrays.rows("embed", entry, b.dtype), "embed", weights.plain(entry.data.dtype, b.dtype)
                ),
                perm=[1, 0],
            )
            y = g.op("MatMul", x, turned, output="" if d.head_bias else output)
        return str(g.op("Add", y, b.vector("head.bias"), output=output)) if d.head_bias else str(y)


#: Keys and values, logits of every position, as many positions as the model has.
_WHOLE = Shape()


def build(model: Model, dialect: Dialect, dtype: str, shape: Shape = _WHOLE) -> Builder:
    """The whole graph of a decoder. Raises UnsupportedError naming a trait that has no graph."""
    b = Builder(model, dialect, dtype, shape)
    g, d = b.graph, model.decoder
    seen = onnx_static.capacity(b) if shape.static else "total"
    for name, dim in (("input_ids", "sequence"), ("attention_mask", seen), ("position_ids", "sequence")):
        g.input(name, "INT64", ("batch", dim))
    if shape.static:
        g.input(onnx_static.POSITION, "INT64", ("batch",))
    g.output("logits", b.number_type, ("batch", 1 if shape.last_logit else "sequence", d.vocab))
    x = embedded(b)
    for i, layer in d.each():
        x = block(b, x, i, layer)
    logits(b, x)
    return b
