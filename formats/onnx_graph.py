"""An ONNX graph under construction: nodes with readable names, small constants inside, weights as external data.

Weights are not in memory: an `Initializer` says its type, shape and how its bytes are made, and `Graph.model` lays them out in one
file beside the model, aligned for memory mapping. Operators and types: onnx/docs/Operators.md, onnx.proto (TensorProto.DataType).
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lconvert.errors import MissingPackageError

#: Bits of an element of the external types that are written.
BITS = {
    "FLOAT": 32,
    "FLOAT16": 16,
    "BFLOAT16": 16,
    "INT64": 64,
    "INT32": 32,
    "INT8": 8,
    "UINT8": 8,
    "FLOAT8E4M3FN": 8,
    "INT4": 4,
    "UINT4": 4,
    "FLOAT4E2M1": 4,
    "UINT2": 2,
    "BOOL": 8,
}
#: Lowest opset whose DequantizeLinear takes a type, where it is above the graph's (onnx/docs/Changelog.md).
_OPSETS = {"UINT2": 25}
#: Opsets in which operators first appear, where they are above the graph's.
_FIRST = {"TensorScatter": 24}
#: External tensors of a page or more start at a page, so that they can be mapped (onnx/docs/ExternalData.md).
PAGE = 4096
_SMALL = 64


def package() -> Any:
    """The onnx module."""
    try:
        import onnx
    except ImportError:
        raise MissingPackageError("onnx is not installed: pip install 'lconvert[onnx]'") from None
    return onnx


@dataclass(frozen=True)
class Initializer:
    """A weight of the graph. `read(start, stop)` gives rows of its bytes; rows: how many there are.

    A row of packed types must fill whole bytes; a tensor whose rows do not has one row. whole: the first rows already take all of
    what it is made of.
    """

    name: str
    type: str
    shape: tuple[int, ...]
    rows: int
    read: Callable[[int, int], NDArray[Any]] = field(repr=False, compare=False)
    whole: bool = False

    @property
    def nbytes(self) -> int:
        return -(-prod(self.shape) * BITS[self.type] // 8)

    @property
    def row_bytes(self) -> int:
        return self.nbytes // max(1, self.rows)


@dataclass(frozen=True)
class Port:
    """An input or output of the graph: numbers and names of dimensions."""

    name: str
    type: str
    shape: tuple[int | str, ...]


class Graph:
    """Nodes in topological order. Names of values are those of their node, under the scopes that are open."""

    def __init__(self, opset: int = 23) -> None:
        self.opset = opset
        self.inputs: list[Port] = []
        self.outputs: list[Port] = []
        self.weights: dict[str, Initializer] = {}
        self._onnx = package()
        self._nodes: list[Any] = []
        self._constants: dict[Hashable, str] = {}
        self._inline: list[Any] = []
        self._made: dict[Hashable, str] = {}
        self._names: dict[str, int] = {}
        self._scope = ""
        self._domains: dict[str, int] = {}

    @contextmanager
    def scope(self, name: str) -> Iterator[None]:
        """Prefix the names of what is made inside: `layers.0.attn`."""
        before = self._scope
        self._scope = f"{before}{name}."
        yield
        self._scope = before

    def _name(self, wanted: str) -> str:
        count = self._names.get(wanted, 0)
        self._names[wanted] = count + 1
        return f"{wanted}_{count}" if count else wanted

    def op(
        self,
        kind: str,
        *inputs: str,
        name: str = "",
        output: str = "",
        outputs: int = 1,
        named: Sequence[str] = (),
        domain: str = "",
        **attributes: Any,
    ) -> Any:
        """A node; the name of its output, or a tuple of names where there are several.

        name: of the node, inside the scope, by default its kind. output: the name of the only output, as it is. named: names of all
        outputs as they are, "" for one of its own; the first is returned.
        """
        own = self._name(self._scope + (name or kind.lower()))
        names = [output] if output else [own if i == 0 else f"{own}.{i}" for i in range(outputs)]
        if named:
            names = [name or own for name in named]
        kept = {k: v for k, v in attributes.items() if v is not None}
        self.opset = max(self.opset, _FIRST.get(kind, 0))
        if domain:
            self._domains.setdefault(domain, 1)
        self._nodes.append(
            self._onnx.helper.make_node(kind, list(inputs), names, name=own, domain=domain, **kept)
        )
        return names[0] if len(names) == 1 or named else tuple(names)

    def once(self, key: Hashable, make: Callable[[], str]) -> str:
        """A value that several places need: made the first time, outside of the scopes that are open."""
        if key not in self._made:
            scope, self._scope = self._scope, ""
            self._made[key] = make()
            self._scope = scope
        return self._made[key]

    def constant(self, value: Any, type: str = "INT64") -> str:
        """A small constant inside the model, one for equal values. value: a number, a list or an array."""
        array = np.asarray(value, np.int64 if type == "INT64" else np.float32)
        key = (type, array.shape, array.tobytes())
        if key not in self._constants:
            name = self._name(f"constant.{len(self._constants)}")
            made = self._onnx.helper.make_tensor(
                name, self._type(type), array.shape, array.reshape(-1).tolist()
            )
            self._inline.append(made)
            self._constants[key] = name
        return self._constants[key]

    def weight(self, made: Initializer) -> str:
        """A weight in the external file; equal names must mean the same weight."""
        self.weights.setdefault(made.name, made)
        return made.name

    @property
    def nodes(self) -> tuple[Any, ...]:
        """NodeProtos, in their order."""
        return tuple(self._nodes)

    @property
    def constants(self) -> tuple[Any, ...]:
        """TensorProtos of the small constants inside the model."""
        return tuple(self._inline)

    def has(self, kind: str) -> bool:
        """Whether there is a node of this kind."""
        return any(n.op_type == kind for n in self._nodes)

    def input(self, name: str, type: str, shape: Sequence[int | str]) -> str:
        self.inputs.append(Port(name, type, tuple(shape)))
        return name

    def output(self, name: str, type: str, shape: Sequence[int | str]) -> None:
        self.outputs.append(Port(name, type, tuple(shape)))

    def _type(self, name: str) -> int:
        return int(getattr(self._onnx.TensorProto, name))

    def layout(self) -> dict[str, int]:
        """Offset of every weight in the external file, and its size under ""."""
        offsets, at = {}, 0
        for w in self.weights.values():
            at = -(-at // (PAGE if w.nbytes >= PAGE else _SMALL)) * (PAGE if w.nbytes >= PAGE else _SMALL)
            offsets[w.name] = at
            at += w.nbytes
        offsets[""] = at
        return offsets

    def model(self, location: str, metadata: dict[str, str], doc: str = "", name: str = "decoder") -> bytes:
        """The serialized ModelProto, whose weights are in the file `location` beside it."""
        helper, offsets = self._onnx.helper, self.layout()
        external = []
        for w in self.weights.values():
            t = self._onnx.TensorProto(name=w.name, data_type=self._type(w.type), dims=w.shape)
            t.data_location = self._onnx.TensorProto.EXTERNAL
            for key, value in (("location", location), ("offset", offsets[w.name]), ("length", w.nbytes)):
                t.external_data.add(key=key, value=str(value))
            external.append(t)
        ports = [
            [helper.make_tensor_value_info(p.name, self._type(p.type), p.shape) for p in side]
            for side in (self.inputs, self.outputs)
        ]
        graph = helper.make_graph(self._nodes, name, ports[0], ports[1], [*self._inline, *external])
        opset = max(self.opset, *(_OPSETS.get(w.type, 0) for w in self.weights.values()), 0)
        imports = [helper.make_opsetid("", opset)]
        imports += [helper.make_opsetid(d, v) for d, v in self._domains.items()]
        standard = [i for i in imports if not i.domain]
        made = helper.make_model(
            graph,
            opset_imports=imports,
            ir_version=helper.find_min_ir_version_for(standard),
            producer_name="lconvert",
            doc_string=doc,
        )
        helper.set_model_props(made, metadata)
        out: bytes = made.SerializeToString(deterministic=True)
        return out
