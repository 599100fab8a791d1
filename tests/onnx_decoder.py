"""Small ONNX decoders for tests: a Llama folder as a graph of standard operators, and one block-quantized
product.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

import lconvert
from lconvert.kernels.qtensor import values


class Graph:
    """Nodes and constants in the order in which they are added; a node's only output is named after it."""

    def __init__(self) -> None:
        self.nodes: list[Any] = []
        self.constants: list[Any] = []

    def constant(self, array: Any, dtype: Any = np.float32) -> str:
        name = f"c{len(self.constants)}"
        self.constants.append(numpy_helper.from_array(np.asarray(array, dtype), name))
        return name

    def __call__(self, op: str, *inputs: str, out: str = "", **attributes: Any) -> str:
        out = out or f"n{len(self.nodes)}"
        self.nodes.append(helper.make_node(op, list(inputs), [out], **attributes))
        return out

    def save(self, path: Path, inputs: list[Any], outputs: list[Any]) -> Path:
        graph = helper.make_graph(self.nodes, "decoder", inputs, outputs, self.constants)
        onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10), path)
        return path


def _value(name: str, type_: int, *shape: int | str) -> Any:
    return helper.make_tensor_value_info(name, type_, shape)


def llama(folder: Path, path: Path, *, cache: bool = True, mask: bool = True) -> Path:
    """The Llama model of `folder` in fp32, with past inputs (or, without `cache`, of ids alone)."""
    config = json.loads((folder / "config.json").read_text())
    model = lconvert.read(folder)
    heads, groups, width = (config[k] for k in ("num_attention_heads", "num_key_value_heads", "head_dim"))
    eps, theta = config["rms_norm_eps"], config["rope_parameters"]["rope_theta"]
    g = Graph()
    w = {name: values(entry.data) for name, entry in model.entries.items()}
    inputs = [_value("input_ids", TensorProto.INT64, 1, "S")]
    outputs = [_value("logits", TensorProto.FLOAT, 1, "S", config["vocab_size"])]
    one, axis0, axis1 = g.constant(1, np.int64), g.constant([0], np.int64), g.constant([1], np.int64)
    new = g("Squeeze", g("Shape", "input_ids", start=1, end=2))
    zero = g.constant(0, np.int64)
    if cache:
        inputs.append(_value("position_ids", TensorProto.INT64, 1, "S"))
        positions = g("Squeeze", "position_ids", axis0)
    else:
        positions = g("Range", zero, new, one)
    if cache and mask:
        inputs.append(_value("attention_mask", TensorProto.INT64, 1, "T"))
        total = g("Squeeze", g("Shape", "attention_mask", start=1, end=2))
    else:
        last = g("ReduceMax", positions, keepdims=0)
        total = g("Add", last, one)
    keys = g("Unsqueeze", g("Range", zero, total, one), axis0)
    future = g("Greater", keys, g("Unsqueeze", positions, axis1))
    hidden = g("Where", future, g.constant(-1e30), g.constant(0.0))
    frequencies = g.constant(theta ** (-np.arange(0, width, 2) / width))
    angle = g("Mul", g("Unsqueeze", g("Cast", positions, to=TensorProto.FLOAT), axis1), frequencies)
    cos, sin = (g("Concat", x, x, axis=1) for x in (g("Cos", angle), g("Sin", angle)))

    def norm(x: str, weight: np.ndarray) -> str:
        mean = g("ReduceMean", g("Mul", x, x), g.constant([-1], np.int64))
        return g("Mul", g("Div", x, g("Sqrt", g("Add", mean, g.constant(eps)))), g.constant(weight))

    def linear(x: str, weight: np.ndarray, out: str = "") -> str:
        return g("MatMul", x, g.constant(weight.T), out=out)

    def by_head(x: str, n: int) -> str:
        return g("Transpose", g("Reshape", x, g.constant([0, -1, n, width], np.int64)), perm=[0, 2, 1, 3])

    def rotated(x: str) -> str:
        halves = [
            g("Slice", x, g.constant([a], np.int64), g.constant([b], np.int64), g.constant([3], np.int64))
            for a, b in ((0, width // 2), (width // 2, width))
        ]
        turned = g("Concat", g("Neg", halves[1]), halves[0], axis=3)
        return g("Add", g("Mul", x, cos), g("Mul", turned, sin))

    x = g("Gather", g.constant(w["embed"]), "input_ids")
    for n in range(config["num_hidden_layers"]):
        p = f"layers.{n}."
        h = norm(x, w[p + "attn_norm"])
        q = rotated(by_head(linear(h, w[p + "attn.q"]), heads))
        k = rotated(by_head(linear(h, w[p + "attn.k"]), groups))
        v = by_head(linear(h, w[p + "attn.v"]), groups)
        if cache:
            for kind in ("key", "value"):
                inputs.append(_value(f"past_key_values.{n}.{kind}", TensorProto.FLOAT, 1, groups, "P", width))
                outputs.append(_value(f"present.{n}.{kind}", TensorProto.FLOAT, 1, groups, "T", width))
            k = g("Concat", f"past_key_values.{n}.key", k, axis=2, out=f"present.{n}.key")
            v = g("Concat", f"past_key_values.{n}.value", v, axis=2, out=f"present.{n}.value")
        # query heads of one group side by side: (1, groups, queries of a group x tokens, width)
        queries = g("Reshape", q, g.constant([1, groups, heads // groups, -1, width], np.int64))
        scores = g(
            "MatMul",
            queries,
            g("Transpose", g("Unsqueeze", k, g.constant([2], np.int64)), perm=[0, 1, 2, 4, 3]),
        )
        weights = g("Softmax", g("Add", g("Mul", scores, g.constant(width**-0.5)), hidden), axis=-1)
        mixed = g("MatMul", weights, g("Unsqueeze", v, g.constant([2], np.int64)))
        mixed = g("Reshape", mixed, g.constant([1, heads, -1, width], np.int64))
        mixed = g(
            "Reshape", g("Transpose", mixed, perm=[0, 2, 1, 3]), g.constant([1, -1, heads * width], np.int64)
        )
        x = g("Add", x, linear(mixed, w[p + "attn.o"]))
        h = norm(x, w[p + "mlp_norm"])
        gate = linear(h, w[p + "mlp.gate"])
        x = g(
            "Add",
            x,
            linear(
                g("Mul", g("Mul", gate, g("Sigmoid", gate)), linear(h, w[p + "mlp.up"])), w[p + "mlp.down"]
            ),
        )
    linear(norm(x, w["norm"]), w.get("head", w["embed"]), out="logits")
    return g.save(path, inputs, outputs)


def quantized_head(
    path: Path, *, vocab: int = 96, hidden: int = 256, block: int = 32
) -> tuple[Path, np.ndarray]:
    """ids -> logits by an embedding and one int4 product; and the exact logits of every id, (vocab,
    vocab).
    """
    rng = np.random.default_rng(1)
    embed = rng.standard_normal((vocab, hidden)).astype(np.float32)
    codes = rng.integers(-8, 8, (hidden, vocab)).astype(np.int8)
    scales = rng.uniform(0.01, 0.05, (hidden // block, vocab)).astype(np.float32)
    g = Graph()
    packed = (codes.reshape(-1)[::2] & 15) | ((codes.reshape(-1)[1::2] & 15) << 4)
    g.constants.append(
        helper.make_tensor(
            "codes", TensorProto.INT4, codes.shape, packed.astype(np.uint8).tobytes(), raw=True
        )
    )
    weight = g("DequantizeLinear", "codes", g.constant(scales), axis=0, block_size=block)
    g("MatMul", g("Gather", g.constant(embed), "input_ids"), weight, out="logits")
    g.save(
        path,
        [_value("input_ids", TensorProto.INT64, 1, "S")],
        [_value("logits", TensorProto.FLOAT, 1, "S", vocab)],
    )
    return path, embed.astype(np.float64) @ (codes * np.repeat(scales.astype(np.float64), block, axis=0))
