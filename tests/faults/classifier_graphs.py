"""Faults of graphs that classify, planted like those of decoders (graphs.py), with onnx and NumPy alone."""

from __future__ import annotations

from typing import Any

import numpy as np
from onnx import helper, numpy_helper

from tests.faults.graphs import Change, GraphFault, Opened, attribute


def mask_ignored(o: Opened) -> None:
    node = o.of("Or", "mask")
    padding = o.before(node, "Not", [node.input[0]])
    node.input[1] = o.before(node, "Or", [node.input[1], padding])


def mask_inverted(o: Opened) -> None:
    node = o.of("Or", "mask")
    node.input[0] = o.before(node, "Not", [node.input[0]])


def positions_one_later(o: Opened) -> None:
    node = next(n for n in o.graph.node if n.op_type == "Slice" and n.input[0] == "pos_embed")
    table = o.before(node, "Concat", ["pos_embed", "pos_embed"], axis=0)
    end = o.before(node, "Add", [node.input[2], o.number([1])])
    node.input[0], node.input[1], node.input[2] = table, o.number([1]), end


def types_ignored(o: Opened) -> None:
    node = next(n for n in o.graph.node if n.op_type == "Gather" and n.input[0] == "type_embed")
    node.input[1] = o.before(node, "Sub", ["token_type_ids", "token_type_ids"])


def last_token(o: Opened) -> None:
    o.of("Gather", "first_token").input[1] = o.number([-1])


def swapped(kind: str, a: int, b: int, part: str = "") -> Change:
    def change(o: Opened) -> None:
        node = o.of(kind, part)
        node.input[a], node.input[b] = node.input[b], node.input[a]

    return change


def without_residual(o: Opened) -> None:
    """The sum after the second layer's feed-forward is the feed-forward's output alone."""
    norm = next(
        n
        for n in o.graph.node
        if n.op_type == "LayerNormalization" and n.input[1] == "layers.1.mlp_post_norm"
    )
    add = next(n for n in o.graph.node if n.output[0] == norm.input[0])
    norm.input[0] = add.input[1]


def other_operator(kind: str, new: str) -> Change:
    def change(o: Opened) -> None:
        node = o.of(kind)
        node.op_type = new
        del node.attribute[:]

    return change


def bit(name: str, dtype: Any, mask: int, at: int = 5) -> Change:
    """One bit of one number."""

    def change(o: Opened) -> None:
        def flip(x: Any) -> Any:
            x.view({1: np.uint8, 4: np.uint32}[x.itemsize])[at] ^= mask
            return x

        o.change(name, dtype, flip)

    return change


def larger(name: str, factor: float, at: int = 3) -> Change:
    def change(o: Opened) -> None:
        def scale(x: Any) -> Any:
            x[at] *= factor
            return x

        o.change(name, "<f4", scale)

    return change


def _pair(o: Opened, role: str) -> tuple[Any, Any]:
    """QuantizeLinear and DequantizeLinear of the input of a product or a convolution."""
    weight = next(n for n in o.graph.node if n.op_type == "DequantizeLinear" and n.input[0] == role)
    product = next(n for n in o.graph.node if weight.output[0] in n.input)
    back = next(n for n in o.graph.node if n.output[0] == product.input[0])
    return next(n for n in o.graph.node if n.output[0] == back.input[0]), back


def _constant(o: Opened, name: str) -> Any:
    return numpy_helper.to_array(o.weight(name))


def input_scale(role: str, factor: float) -> Change:
    """The range of an input is another one."""

    def change(o: Opened) -> None:
        there, back = _pair(o, role)
        name = o.number(_constant(o, there.input[1]) * np.float32(factor), np.float32)
        there.input[1] = back.input[1] = name

    return change


def input_zero(role: str, zero: int, both: bool) -> Change:
    """The zero point of an input is this one, on the way back as well or not."""

    def change(o: Opened) -> None:
        there, back = _pair(o, role)
        assert _constant(o, there.input[2]) != zero
        name = o.number(zero, np.uint8)
        there.input[2] = name
        if both:
            back.input[2] = name

    return change


def fixed_batch(o: Opened) -> None:
    for port in o.graph.input:
        port.type.tensor_type.shape.dim[0].dim_value = 8


def config(key: str, value: Any) -> Change:
    def change(o: Opened) -> None:
        o.json["config.json"][key] = value

    return change


def steps(change: Any) -> Change:
    def changed(o: Opened) -> None:
        change(o.json["config.json"]["steps"])

    return changed


def moved_pads(o: Opened) -> None:
    node = o.of("Conv")
    kept = [a for a in node.attribute if a.name != "pads"]
    del node.attribute[:]
    node.attribute.extend([*kept, helper.make_attribute("pads", [2, 0, 0, 2])])


def _all(model: str, type_: str, tier: str, *faults: tuple[str, Change, str]) -> list[GraphFault]:
    return [GraphFault(name, model, type_, tier, change, says) for name, change, says in faults]


FAULTS: tuple[GraphFault, ...] = (
    *_all("bert", "fp32", "structure",
          ("a fixed batch", fixed_batch, "inputs and outputs"),
          ("the configuration has another epsilon", config("layer_norm_eps", 1e-3), "traits")),
    *_all("bert", "fp32", "tensors",
          ("lowest bit of a weight", bit("layers.1.attn.v", "<f4", 1), "equal to the source"),
          ("lowest bit of a norm's bias", bit("embed_norm.bias", "<f4", 1), "equal to the source"),
          ("lowest bit of a position", bit("pos_embed", "<f4", 1), "equal to the source")),
    *_all("bert", "fp32", "logits",
          ("the mask is ignored", mask_ignored, "graph"),
          ("the mask is inverted", mask_inverted, "graph"),
          ("positions begin with 1", positions_one_later, "graph"),
          ("all tokens have the first type", types_ignored, "graph"),
          ("the last token is classified", last_token, "graph"),
          ("queries and keys are exchanged", swapped("Attention", 0, 1), "graph"),
          ("keys and values are exchanged", swapped("Attention", 1, 2), "graph"),
          ("scores of another scale", attribute("Attention", "scale", 0.25), "graph"),
          ("another epsilon", attribute("LayerNormalization", "epsilon", 1e-4), "graph"),
          ("GELU by its approximation", attribute("Gelu", "approximate", "tanh"), "graph"),
          ("a sum without what came before", without_residual, "graph"),
          ("the pooler without tanh", other_operator("Tanh", "Identity"), "graph")),
    *_all("bert", "w8a8", "structure",
          ("a zero point that is not taken back", input_zero("layers.0.attn.o", 3, False), "dequantized with another scale")),
    *_all("bert", "w8a8", "tensors",
          ("highest bit of a code", bit("layers.0.mlp.up", "i1", 0x80), "nearest codes"),
          ("lowest bit of a code", bit("head", "i1", 1), "nearest codes"),
          ("scale of a row", larger("layers.1.mlp.down.scale", 1.5), "nearest codes")),
    *_all("bert", "w8a8", "logits",
          ("the mask is ignored", mask_ignored, "graph"),
          ("positions begin with 1", positions_one_later, "graph"),
          ("an eighth of the range of an input", input_scale("layers.0.mlp.up", 0.125), "inputs beyond"),
          ("a range 64 times as large", input_scale("layers.1.mlp.up", 64), "cost"),
          ("a zero point of none", input_zero("layers.1.attn.q", 0, True), "inputs beyond")),
    *_all("cnn", "fp32", "structure",
          ("the configuration has another step", steps(lambda s: s.__setitem__(1, {"tanh": True})), "traits")),
    *_all("cnn", "fp32", "tensors",
          ("lowest bit of a kernel", bit("steps.0", "<f4", 1), "equal to the source"),
          ("lowest bit of a bias", bit("steps.3.bias", "<f4", 1, 1), "equal to the source")),
    *_all("cnn", "fp32", "logits",
          ("the image is moved", moved_pads, "graph"),
          ("ReLU is left out", other_operator("Relu", "Identity"), "graph"),
          ("another activation", other_operator("Relu", "LeakyRelu"), "graph")),
    *_all("cnn", "w8a8", "tensors",
          ("a code of a kernel", bit("steps.3", "i1", 0x40), "nearest codes"),
          ("a code of a bias", bit("steps.0.bias", "<i4", 4, 1), "nearest codes"),
          ("scale of a channel", larger("steps.3.scale", 1.5), "nearest codes")),
    *_all("cnn", "w8a8", "logits",
          ("the image is moved", moved_pads, "graph"),
          ("a quarter of the range of an input", input_scale("steps.3", 0.25), "inputs beyond")),
)  # fmt: skip
