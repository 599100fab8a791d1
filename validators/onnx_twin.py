"""A decoder's graph restated in F32, for a runtime that lacks its types: the same nodes between the same values, so that wiring, masks,
positions and caches of BF16 and FP4 graphs are run as well.

BF16 and F16 become F32, which holds all of their numbers; FP4 weights become the matrices that onnx's reference evaluator makes of them,
and TRT_FP4DynamicQuantize the plain operators that mean it. What half precision rounds on the way is then not part of the proof.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lconvert.converters import onnx_activations, onnx_pairs
from lconvert.converters.onnx_source import Found
from lconvert.formats import onnx_reader
from lconvert.formats.onnx_graph import Graph, package
from lconvert.formats.onnx_reader import OnnxFile

#: Weights in F32 that are written at most.
LIMIT = 1 << 30
_HALVES = (10, 16)  # TensorProto.FLOAT16, BFLOAT16
_FLOAT, _FP4 = 1, 23  # TensorProto.FLOAT, FLOAT4E2M1


@dataclass
class _Site:
    """Where plain operators are made."""

    graph: Graph
    dtype: str
    rank: int


def size(found: Found) -> int:
    """Bytes of its weights in F32."""
    return 4 * sum(e.data.size for e in found.model.entries.values())


def write(found: Found, folder: Path) -> Path:
    """The twin as model.onnx in a folder, with its weights beside it."""
    onnx = package()
    model = onnx_reader.read(found.file.path)
    graph = model.proto.graph
    tensors = {t.name: t for t in graph.initializer}
    ranks, floats = _inferred(model)
    nodes: list[Any] = []
    same: dict[str, str] = {}  # casts from a float to a float are what they take
    made: dict[str, Any] = {}
    for node in graph.node:
        if node.op_type == "Cast" and node.input[0] in floats and node.output[0] in floats:
            same[node.output[0]] = same.get(node.input[0], node.input[0])
        elif node.op_type == "DequantizeLinear" and tensors.get(node.input[0], _NONE).data_type == _FP4:
            made[node.output[0]] = onnx.numpy_helper.from_array(_matrix(found, model, node), node.output[0])
        elif node.op_type == "DequantizeLinear" and _quantizer(found, node) is not None:
            nodes += _rounding(found, node, ranks, made)
        elif node.op_type != onnx_pairs.FP4_QUANTIZE:
            nodes.append(_with_zeros(_widened(node), tensors, made))
    for node in nodes:
        node.input[:] = [same.get(name, name) for name in node.input]
    nodes = _needed(nodes, [o.name for o in graph.output])
    wanted = {name for n in nodes for name in n.input}
    held = [_float(model, t) for t in graph.initializer if t.name in wanted]
    held += [t for name, t in made.items() if name in wanted]
    twin = onnx.ModelProto()
    twin.CopyFrom(model.proto)
    del twin.graph.node[:], twin.graph.initializer[:], twin.graph.value_info[:]
    twin.graph.node.extend(nodes)
    twin.graph.initializer.extend(held)
    for port in (*twin.graph.input, *twin.graph.output):
        if port.type.tensor_type.elem_type in _HALVES:
            port.type.tensor_type.elem_type = _FLOAT
    path = folder / "model.onnx"
    onnx.save(twin, str(path), save_as_external_data=True, location="model.onnx.data", size_threshold=1024)
    return path


class _None:
    """What is no initializer."""

    data_type = 0
    dims = ()


_NONE = _None()


def _quantizer(found: Found, node: Any) -> Any:
    """TRT_FP4DynamicQuantize, where this node is the last of what it makes."""
    before = found.file.producers.get(node.input[0])
    if before is None or before.op_type != onnx_pairs.FP4_QUANTIZE or node.input[0] != before.output[0]:
        return None
    return before


def _rounding(found: Found, node: Any, ranks: dict[str, int], made: dict[str, Any]) -> Iterator[Any]:
    """Plain operators instead of TensorRT's, from the same value to the same value."""
    onnx = package()
    seen = onnx_pairs.found(found.file, node.name, node.output[0])
    assert seen is not None
    site = _Site(Graph(), "F32", ranks.get(seen.source, 3))
    last = onnx_activations.arithmetic(site, "x", seen.spec)
    names = {"x": seen.source, last: node.output[0], "": ""}

    def named(name: str) -> str:
        return str(names.get(name, f"{node.name}.twin.{name}"))

    for t in site.graph.constants:
        copy = onnx.TensorProto()
        copy.CopyFrom(t)
        copy.name = named(t.name)
        made[copy.name] = copy
    for n in site.graph.nodes:
        copy = onnx.NodeProto()
        copy.CopyFrom(n)
        copy.name = f"{node.name}.twin.{n.name}"
        copy.input[:] = map(named, n.input)
        copy.output[:] = map(named, n.output)
        yield copy


def _matrix(found: Found, model: OnnxFile, node: Any) -> Any:
    """FP4 weights as onnx's reference evaluator dequantizes them, in F32."""
    from onnx.reference import ReferenceEvaluator

    onnx = package()
    inner = found.file.producers.get(node.input[1])
    nodes = [n for n in (inner, node) if n is not None]
    names = {name for n in nodes for name in n.input}
    held = []
    for t in model.proto.graph.initializer:
        if t.name in names:
            held.append(onnx.numpy_helper.from_array(model.tensors[t.name].array(), t.name))
    out = onnx.helper.make_tensor_value_info(node.output[0], _FLOAT, None)
    graph = onnx.helper.make_graph(nodes, "matrix", [], [out], held)
    alone = onnx.helper.make_model(
        graph, opset_imports=list(model.proto.opset_import), ir_version=model.proto.ir_version
    )
    return np.asarray(ReferenceEvaluator(alone).run(None, {})[0]).astype(np.float32)


def _widened(node: Any) -> Any:
    """A Cast to half precision is one to F32."""
    onnx = package()
    copy = onnx.NodeProto()
    copy.CopyFrom(node)
    for a in copy.attribute:
        if node.op_type == "Cast" and a.name == "to" and a.i in _HALVES:
            a.i = _FLOAT
    return copy


def _with_zeros(node: Any, tensors: Mapping[str, Any], made: dict[str, Any]) -> Any:
    """Rows of INT8 with zero points of 0, without which ONNX Runtime 1.31 fails (Builder._with_zeros)."""
    onnx = package()
    codes, scale = (tensors.get(name, _NONE) for name in (*node.input, "", "")[:2])
    rows = node.op_type == "DequantizeLinear" and len(node.input) == 2 and len(scale.dims) == 1
    if rows and codes.data_type == onnx.TensorProto.INT8:
        name = node.output[0] + ".twin.zero"
        made[name] = onnx.numpy_helper.from_array(np.zeros(tuple(scale.dims), np.int8), name)
        node.input.append(name)
    return node


def _float(model: OnnxFile, t: Any) -> Any:
    onnx = package()
    x = model.tensors[t.name].array()
    return onnx.numpy_helper.from_array(x.astype(np.float32) if t.data_type in _HALVES else x, t.name)


def _needed(nodes: list[Any], outputs: list[str]) -> list[Any]:
    """Nodes that outputs come from: scales of FP4 codes are no longer taken."""
    wanted, out = set(outputs), []
    for node in reversed(nodes):
        if wanted.intersection(node.output):
            wanted.update(node.input)
            out.append(node)
    return out[::-1]


def _inferred(model: OnnxFile) -> tuple[dict[str, int], set[str]]:
    """Dimensions of values, and which are floats of 16 or 32 bits, as far as that is inferred."""
    inferred = package().shape_inference.infer_shapes(model.proto).graph
    values = {v.name: v.type.tensor_type for v in (*inferred.input, *inferred.value_info)}
    ranks = {name: len(t.shape.dim) for name, t in values.items() if t.HasField("shape")}
    return ranks, {name for name, t in values.items() if t.elem_type in (_FLOAT, *_HALVES)}
