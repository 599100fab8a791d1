"""Inputs, keys and values that a graph rounds by plain operators, read back as the ActSpec that these operators mean.

The nodes suggest a spec: codes say the grid, what is reduced says for how many features a scale is, constants are the stored scales. Then
the operators of that spec (onnx_activations.arithmetic) are made again, and those of the file must be the same, node by node and
constant by constant. So nothing is taken for a rounding that rounds in another way.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from lconvert.converters import onnx_activations
from lconvert.formats.onnx_graph import Graph
from lconvert.formats.onnx_reader import OnnxFile, integers
from lconvert.ir import E2M1, E4M3, ActSpec, Grid, Tensor, dense, int_grid

#: Levels of nodes between a rounded value and the maximum that its scale is found from, and what ends the way.
_DEEP, _ENDS = 24, ("ReduceMax", "ReduceMin", "Shape")


@dataclass(frozen=True)
class Rounding:
    """What is rounded, and how. powers: scales are powers of two."""

    source: str
    spec: ActSpec
    powers: bool = False


def found(file: OnnxFile, name: str) -> Rounding | None:
    """How the value `name` was rounded on the way to it, None where it was not, or not in a way that lconvert writes."""
    node = file.producers.get(name)
    if node is None or not node.name.startswith(onnx_activations.NAME):
        return None
    half = node.op_type == "CastLike"
    last = file.producers.get(node.input[0]) if half else node
    if last is None:
        return None
    for spec, powers, rank in _suggested(file, last):
        site = _Site(Graph(), "F16" if half else "F32", rank)
        made = onnx_activations.arithmetic(site, _X, spec, powers)
        match = _Match(file, site.graph)
        if match.same(made, name) and match.source:
            return Rounding(match.source, spec, powers)
    return None


def codes(file: OnnxFile, name: str) -> Rounding | None:
    """The same of codes of 8 bits that a product takes as they are; name: of the codes."""
    divided = next((n for n in _before(file, name) if n.op_type == "Div"), None)
    if divided is None or len(divided.input) != 2:
        return None
    axes = _axes(file, divided.input[1])
    spec = ActSpec(int_grid(8, True), "token" if axes else "tensor", True)
    for dtype in ("F32", "F16"):
        site = _Site(Graph(), dtype, max(axes, default=-1) + 1)
        made = onnx_activations.codes(site, _X, spec)[0]
        match = _Match(file, site.graph)
        if match.same(made, name) and match.source:
            return Rounding(match.source, spec)
    return None


_X = "x"


@dataclass
class _Site:
    """Where nodes are made again."""

    graph: Graph
    dtype: str
    rank: int


# --- what the nodes suggest --------------------------------------------------------------------------------


def _suggested(file: OnnxFile, last: Any) -> Iterator[tuple[ActSpec, bool, int]]:
    """Specs that the nodes before `last` may be of, with whether scales are powers of two, and the rank of what is rounded."""
    group, product = None, last
    if last.op_type == "Slice":
        group, product = _group(file, last)
    if product is None or product.op_type != "Mul":
        return
    grid, zero = _grid(file, file.producers.get(product.input[0]))
    if grid is None:
        return
    middle = None if not zero else dense(np.array([zero], np.int32))
    scale = product.input[1]
    inverse = file.producers.get(scale)
    if (given := _constant(file, scale)) is not None:
        yield ActSpec(grid, "tensor", False, None, _one(given), middle), False, 0
        return
    if inverse is not None and inverse.op_type == "Div" and _constant(file, inverse.input[0]) == 1:
        given = _constant(file, inverse.input[1])
        if given is not None:
            stored = _one(given)
            yield ActSpec(grid, "tensor", False, None, stored, middle, True), False, 0
            return
    before = list(_before(file, scale))
    kinds = {n.op_type for n in before}
    axes = _axes(file, scale)
    rank = max(axes, default=-1) + (0 if group else 1)
    per: Any = "group" if group else "token" if axes else "tensor"
    if "Pow" in kinds:
        yield ActSpec(grid, per, True, group), True, rank
        return
    yield ActSpec(grid, per, True, group), False, rank
    if inverse is not None and len(inverse.input) == 2:  # a bound, or the scale above those of groups
        above = _constant(file, inverse.input[1])
        if above is not None:
            stored = _one(above)
            yield ActSpec(grid, per, True, group, stored, divisor=inverse.op_type == "Div"), False, rank


def _one(x: float) -> Tensor:
    return dense(np.array([x], np.float32))


def _group(file: OnnxFile, last: Any) -> tuple[int | None, Any]:
    """The size of groups, and the node that makes them out of codes."""
    joined = file.producers.get(last.input[0])
    if joined is None or joined.op_type != "Reshape":
        return None, None
    for n in _before(file, joined.input[1]):
        if n.op_type == "Mul" and (size := _constant(file, n.input[1])) is not None and size >= 1:
            return int(size), file.producers.get(joined.input[0])
    return None, None


def _grid(file: OnnxFile, node: Any) -> tuple[Grid | None, float]:
    """Of the codes that `node` makes, and the stored zero point that it takes off."""
    zero = 0.0
    if node is not None and node.op_type == "Sub":
        zero = _constant(file, node.input[1]) or 0.0
        node = file.producers.get(node.input[0])
    if node is not None and node.op_type == "Cast":
        return E4M3, zero
    if node is None or node.op_type != "Clip" or len(node.input) != 3:
        return None, zero
    low, high = (_constant(file, name) for name in node.input[1:])
    if low is None or high is None:
        return None, zero
    if (low, high) == (-6, 6):
        return E2M1, zero
    bits = int(high - low).bit_length()
    return (int_grid(bits, low < 0), zero) if 2 <= bits <= 8 else (None, zero)


def _axes(file: OnnxFile, scale: str) -> list[int]:
    """Axes along which the maxima are found that a scale comes from."""
    out = []
    for n in _before(file, scale):
        if n.op_type == "ReduceMax" and integers(n).get("keepdims") and len(n.input) > 1:
            axis = _constant(file, n.input[1])
            out += [] if axis is None else [int(axis)]
    return out


def _before(file: OnnxFile, name: str) -> Iterator[Any]:
    """Nodes on the way to a value, as far as what its maximum is taken of."""
    level, seen = [name], set()
    for _ in range(_DEEP):
        nodes = [file.producers[x] for x in dict.fromkeys(level) if x in file.producers]
        nodes = [n for n in nodes if n.output[0] not in seen]
        yield from nodes
        seen |= {n.output[0] for n in nodes}
        level = [x for n in nodes if n.op_type not in _ENDS for x in n.input]


def _constant(file: OnnxFile, name: str) -> float | None:
    """A constant inside the graph that is one number."""
    t = file.tensors.get(name)
    if t is None or t.inline is None or t.type not in ("FLOAT", "INT64") or t.shape not in ((), (1,)):
        return None
    return float(t.load().reshape(()))


# --- whether the nodes are these ---------------------------------------------------------------------------


class _Match:
    """Nodes that were made again beside those of a file; `source`: what the file has for the value that is rounded."""

    def __init__(self, file: OnnxFile, graph: Graph) -> None:
        self.file, self.source = file, ""
        self.made = {name: node for node in graph.nodes for name in node.output}
        self.numbers = {t.name: t for t in graph.constants}
        self.pairs: dict[tuple[str, str], bool] = {}

    def same(self, ours: str, theirs: str) -> bool:
        if (ours, theirs) not in self.pairs:
            self.pairs[ours, theirs] = self._same(ours, theirs)
        return self.pairs[ours, theirs]

    def _same(self, ours: str, theirs: str) -> bool:
        if ours == _X:
            self.source = self.source or theirs
            return self.source == theirs
        if not ours:
            return not theirs
        if ours in self.numbers:
            return self._equal(ours, theirs)
        a, b = self.made[ours], self.file.producers.get(theirs)
        if b is None or (a.op_type, a.domain, len(a.input)) != (b.op_type, b.domain, len(b.input)):
            return False
        return _attributes(a) == _attributes(b) and all(map(self.same, a.input, b.input))

    def _equal(self, ours: str, theirs: str) -> bool:
        mine, t = self.numbers[ours], self.file.tensors.get(theirs)
        if t is None or t.inline is None or tuple(mine.dims) != t.shape:
            return False
        values = mine.int64_data or mine.float_data or mine.int32_data
        return bool(np.array_equal(t.load().reshape(-1), np.array(values, t.load().dtype)))


def _attributes(node: Any) -> list[bytes]:
    return sorted(a.SerializeToString(deterministic=True) for a in node.attribute)
