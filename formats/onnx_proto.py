"""Whether a ModelProto that somebody else wrote is whole, apart from the numbers of its tensors.

Protobuf takes anything that has the right fields. Here strings are text, versions are known, every node takes what is made before it
(onnx/docs/IR.md), and dimensions are those of arrays; so nobody who follows the graph meets a circle or an absent input.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

from lconvert.errors import InputError, UnsupportedError
from lconvert.formats.onnx_graph import package


def check(path: Path, proto: Any) -> None:
    """InputError for a damaged graph; UnsupportedError for versions that the package onnx does not know. path: named in messages."""
    for name in _names(proto):
        if isinstance(name, bytes):  # what protobuf gives for a string that is no UTF-8
            raise InputError(f"{path}: the name {short(name)} is not UTF-8; the file is damaged")
    opset = _known(path, proto)
    _ports(path, proto.graph)
    _ordered(path, proto.graph, opset)


def short(text: object) -> str:
    """What a file says, in one line that fits into a message."""
    flat = " ".join(str(text).split())
    return flat if len(flat) <= 160 else flat[:160] + "..."


def _known(path: Path, proto: Any) -> int:
    """The opset. UnsupportedError for versions above those of the package, which could mean anything."""
    onnx = package()
    most = onnx.defs.onnx_opset_version()
    opsets = [o.version for o in proto.opset_import if o.domain in ("", "ai.onnx")]
    for what, found, last in (("opset", max(opsets, default=1), most), ("IR version", proto.ir_version, onnx.IR_VERSION)):  # fmt: skip
        if found > last:
            raise UnsupportedError(
                f"{path}: {what} {found}, above {last}, the last that onnx {onnx.__version__} knows; export it with an older one, or upgrade onnx"
            )
    if min(opsets, default=1) < 1:
        raise InputError(f"{path}: opset {min(opsets)}; the file is damaged")
    return int(max(opsets, default=1))


def _ordered(path: Path, graph: Any, opset: int) -> None:
    """InputError unless every node takes what is made before it, once (onnx/docs/IR.md): nothing goes in circles then."""
    known = {"", *(p.name for p in graph.input), *(t.name for t in graph.initializer)}
    known |= {t.values.name for t in graph.sparse_initializer}
    for node in graph.node:
        where = f"{path}: node {short(node.name)!r}, {short(node.op_type)},"
        for name in node.input:
            if name not in known:
                raise InputError(
                    f"{where} takes {short(name)!r}, which nothing before it makes; the graph is damaged"
                )
        least = _least(node.op_type, opset) if node.domain in ("", "ai.onnx") else (0, 1)
        for what, found, few in (
            ("inputs", len(node.input), least[0]),
            ("outputs", len(node.output), least[1]),
        ):
            if found < few:
                raise InputError(f"{where} has {found} {what}, {few} are the least; the graph is damaged")
        for name in node.output:
            if name and name in known:
                raise InputError(
                    f"{where} makes {short(name)!r}, which is there already; the graph is damaged"
                )
            known.add(name)


@cache
def _least(kind: str, opset: int) -> tuple[int, int]:
    """Inputs and outputs that an operator of ONNX has at least; none and one of one that is not known."""
    defs = package().defs
    if not defs.has(kind, opset, ""):
        return 0, 1
    schema = defs.get_schema(kind, opset, "")
    return schema.min_input, schema.min_output


def _ports(path: Path, graph: Any) -> None:
    """InputError for a shape that no array has; -1 is what some exporters write for a dimension that varies."""
    for port in (*graph.input, *graph.output):
        sizes = [d.dim_value for d in port.type.tensor_type.shape.dim]
        if min(sizes, default=0) < -1:
            raise InputError(
                f"{path}: {short(port.name)} has the impossible shape {short(sizes)}; the graph is damaged"
            )


def graphs(proto: Any) -> Iterator[tuple[Any, Any]]:
    """(graph or function, the node that it is in) of the model, subgraphs included."""
    todo: list[tuple[Any, Any]] = [(proto.graph, None), *((f, None) for f in proto.functions)]
    while todo:
        graph, inside = todo.pop()
        yield graph, inside
        for node in graph.node:
            for a in node.attribute:
                todo += [(g, node) for g in ([a.g] if a.HasField("g") else []) + list(a.graphs)]


def inner(proto: Any) -> Iterator[tuple[Any, Any]]:
    """(node, tensor) of what is not an initializer of the graph itself."""
    for graph, inside in graphs(proto):
        sparse = [t for s in getattr(graph, "sparse_initializer", ()) for t in (s.values, s.indices)]
        dense = () if inside is None else graph.initializer
        for t in (*sparse, *dense):
            yield inside or package().NodeProto(), t
        for node in graph.node:
            for a in node.attribute:
                held = [*([a.t] if a.HasField("t") else []), *a.tensors]
                for s in (*([a.sparse_tensor] if a.HasField("sparse_tensor") else []), *a.sparse_tensors):
                    held += [s.values, s.indices]
                for t in held:
                    yield node, t


def _names(proto: Any) -> Iterator[str | bytes]:
    """Every string of the model that means something."""
    for p in (*proto.metadata_props, *proto.opset_import):
        yield from (p.key, p.value) if hasattr(p, "key") else (p.domain,)
    for graph, _ in graphs(proto):
        yield graph.name
        for node in graph.node:
            yield from (node.name, node.op_type, node.domain, *node.input, *node.output)
            yield from (a.name for a in node.attribute)
        if isinstance(graph, package().GraphProto):
            for port in (*graph.input, *graph.output, *graph.value_info):
                yield port.name
                yield from (d.dim_param for d in port.type.tensor_type.shape.dim)
            for t in graph.initializer:
                yield t.name
                yield from (x for e in t.external_data for x in (e.key, e.value))
