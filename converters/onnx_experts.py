"""Routed experts as ONNX nodes.

Each expert runs on the tokens that chose it: NonZero finds them, Gather takes them, ScatterND adds what came out. An expert that no
token chose multiplies zero rows, so the cost is that of the chosen experts, and every matrix stays a constant of its own, which
ONNX Runtime can fuse with its DequantizeLinear. Consumers without operators whose shapes depend on data run every expert on
every token, weighed by zero where it was not chosen.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from lconvert.errors import UnsupportedError
from lconvert.ir import Moe

if TYPE_CHECKING:
    from lconvert.converters.onnx_builder import Builder

FLOAT = 1  # TensorProto.FLOAT


def routed(b: Builder, x: str, prefix: str, m: Moe) -> str:
    """x (batch, sequence, hidden) through the experts that the router chooses for each token, and the shared one."""
    rows = b.graph.op("Reshape", x, b.graph.constant([-1, b.model.decoder.hidden]), name="tokens")
    with b.ranked(2):
        out = _mixed(b, rows, prefix, m)
    return str(b.graph.op("Reshape", out, b.graph.op("Shape", x), name="out"))


def _mixed(b: Builder, rows: str, prefix: str, m: Moe) -> str:
    """Rows (tokens, hidden) through the experts of each."""
    g = b.graph
    weights = _weights(b, rows, prefix, m)
    branches = b.dialect.branches
    out = g.op("Mul", rows, b.number(0.0), name="none")
    for e in range(m.experts):
        with g.scope(f"experts.{e}"):
            column = g.op("Gather", weights, g.constant([e]), axis=1)
            name = f"{prefix}experts.{e}."
            if not branches:
                out = g.op("Add", out, g.op("Mul", _expert(b, rows, name, m), column))
                continue
            chosen = g.op("NonZero", g.op("Squeeze", column, g.constant([1])))
            index = g.op("Transpose", chosen, perm=[1, 0])
            flat = g.op("Squeeze", chosen, g.constant([0]))
            y = _expert(b, g.op("Gather", rows, flat), name, m)
            y = g.op("Mul", y, g.op("Gather", column, flat))
            out = g.op("ScatterND", out, index, y, reduction="add")
    if m.shared:
        with g.scope("shared"):
            out = g.op("Add", out, b.mlp(rows, prefix + "shared.", "gated", m.activation))
    return str(out)


def _expert(b: Builder, x: str, name: str, m: Moe) -> str:
    if m.activation != "swiglu_oai":
        return b.mlp(x, name, "gated", m.activation)
    g = b.graph
    gate, up = b.linear(x, name + "gate"), b.linear(x, name + "up")
    if m.limit is not None:
        gate = g.op("Min", gate, b.number(m.limit))
        # no Clip: ONNX Runtime 1.31 packs no weight of a product with a bias before one
        up = g.op("Max", g.op("Min", up, b.number(m.limit)), b.number(-m.limit))
    swish = g.op("Mul", gate, g.op("Sigmoid", g.op("Mul", gate, b.number(1.702))))
    return b.linear(g.op("Mul", swish, g.op("Add", up, b.number(1.0))), name + "down")


def _weights(b: Builder, rows: str, prefix: str, m: Moe) -> str:
    """The weight of every expert for every token, (tokens, experts), zero where it was not chosen. In fp32 up to the end."""
    g = b.graph
    logits = b.linear(rows, prefix + "router")
    if b.dtype != "F32":
        logits = g.op("Cast", logits, to=FLOAT)
    if m.scoring == "sigmoid":
        scores = g.op("Sigmoid", logits)
    elif m.scoring == "softmax":
        scores = g.op("Softmax", logits, axis=-1)
    else:
        raise UnsupportedError(f"experts scored by {m.scoring} have no ONNX graph yet")
    choice = scores
    if m.correction:
        bias = b.vector(prefix + "correction.bias")
        choice = g.op("Add", scores, bias if b.dtype == "F32" else g.op("Cast", bias, to=FLOAT))
    if m.groups > 1:
        choice = _best_groups(b, choice, m)
    _, index = g.op("TopK", choice, g.constant([m.top_k]), axis=-1, outputs=2)
    chosen = g.op("GatherElements", scores, index, axis=1)
    if m.normalize:
        chosen = g.op("Div", chosen, g.op("ReduceSum", chosen, g.constant([-1]), keepdims=1))
    if m.scale != 1:
        chosen = g.op("Mul", chosen, g.constant(m.scale, "FLOAT"))
    empty = g.op("Mul", scores, g.constant(0.0, "FLOAT"))
    out = g.op("ScatterElements", empty, index, chosen, axis=1, name="weights")
    return str(out if b.dtype == "F32" else g.op("CastLike", out, rows))


def _best_groups(b: Builder, choice: str, m: Moe) -> str:
    """Scores with those of the other groups at zero."""
    g, size = b.graph, m.experts // m.groups
    grouped = g.op("Reshape", choice, g.constant([-1, m.groups, size]))
    if m.group_score == "max":
        score = g.op("ReduceMax", grouped, g.constant([-1]), keepdims=0)
    else:
        best, _ = g.op("TopK", grouped, g.constant([2]), axis=-1, outputs=2)
        score = g.op("ReduceSum", best, g.constant([-1]), keepdims=0)
    _, index = g.op("TopK", score, g.constant([m.top_groups]), axis=-1, outputs=2)
    ones = g.op(
        "Add", g.op("Mul", g.op("CastLike", index, score), g.constant(0.0, "FLOAT")), g.constant(1.0, "FLOAT")
    )
    mask = g.op("ScatterElements", g.op("Mul", score, g.constant(0.0, "FLOAT")), index, ones, axis=1)
    return str(
        g.op(
            "Reshape",
            g.op("Mul", grouped, g.op("Unsqueeze", mask, g.constant([-1]))),
            g.constant([-1, m.experts]),
        )
    )
