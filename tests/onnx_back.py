"""Matrices read back from a graph with the onnx package alone: the codes that are stored, and the numbers that its nodes make of them."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import numpy_helper


@dataclass(frozen=True)
class Back:
    """A matrix (out, in), columns in the source's order. steps: codes minus zero points, or the numbers of a float. scale, minimum:
    spread over it. factor: of the product, inverted by `divisor`. type: of the stored codes, "FLOAT" for values."""

    type: str
    raw: np.ndarray
    steps: np.ndarray
    scale: np.ndarray | None = None
    minimum: np.ndarray | None = None
    factor: np.float64 | None = None
    divisor: bool = False
    input_scale: np.ndarray | None = None

    def values(self) -> np.ndarray:
        """In fp64: what x is multiplied with, before it is scaled (input_scale)."""
        w = self.steps if self.scale is None else self.steps * self.scale
        w = w if self.minimum is None else w - self.minimum
        if self.factor is None:
            return w
        return w / self.factor if self.divisor else w * self.factor


class Reader:
    """A graph whose weights are all in memory."""

    def __init__(self, folder: Path) -> None:
        self.graph = onnx.load(str(folder / "model.onnx")).graph
        self.types = {t.name: onnx.TensorProto.DataType.Name(t.data_type) for t in self.graph.initializer}
        self._tensors = {t.name: t for t in self.graph.initializer}
        self.users: dict[str, list[Any]] = defaultdict(list)
        self.makers: dict[str, Any] = {}
        for node in self.graph.node:
            for name in node.input:
                self.users[name].append(node)
            for name in node.output:
                self.makers[name] = node

    def array(self, name: str) -> np.ndarray:
        return np.asarray(numpy_helper.to_array(self._tensors[name]))

    def numbers(self, name: str) -> np.ndarray:
        return self.array(name).astype(np.float64)

    def matrix(self, role: str) -> Back:
        raw = self.array(role)
        (user,) = self.users[role]
        if user.op_type == "MatMulInteger":
            return self._integers(role, raw, user)
        if user.op_type == "MatMul":
            return Back(
                self.types[role], raw.T, raw.T.astype(np.float64), input_scale=self._input_scale(user)
            )
        assert user.op_type == "DequantizeLinear", user.op_type
        attributes = {a.name: onnx.helper.get_attribute_value(a) for a in user.attribute}
        size, axis = attributes.get("block_size", 0), attributes.get("axis", 1)

        def spread(x: np.ndarray) -> np.ndarray:
            if size:
                assert axis == 0
                return np.repeat(x, size, axis=0)
            return x if x.ndim == 0 else np.broadcast_to(x, raw.shape)

        def side(name: str) -> np.ndarray:
            """A constant, or FP8 scales above a global one."""
            if name in self._tensors:
                return self.numbers(name)
            inner = self.makers[name]
            assert inner.op_type == "DequantizeLinear"
            return self.numbers(inner.input[0]) * self.numbers(inner.input[1])

        steps = raw.astype(np.float64)
        if len(user.input) == 3:
            assert self.types[user.input[2]] == self.types[role]
            steps = steps - spread(self.numbers(user.input[2]))
        scale = np.broadcast_to(spread(side(user.input[1])), raw.shape)
        (product,) = self.users[user.output[0]]
        assert product.op_type == "MatMul" and product.input[1] == user.output[0]
        minimum, factor, divisor = None, None, False
        for then in self._after(product.output[0]):
            if then.op_type == "Sub":
                less = self.numbers(self.makers[then.input[1]].input[1])
                minimum = np.repeat(less, raw.shape[0] // less.shape[0], axis=0)
            else:
                factor, divisor = np.float64(self.numbers(then.input[1])), then.op_type == "Div"
        order = self._order(product.input[0])

        def back(x: np.ndarray | None) -> np.ndarray | None:
            if x is None:
                return None
            out = np.array(x)
            if order is not None:
                out[order] = x
            return np.ascontiguousarray(out.T)

        parts = [back(x) for x in (raw, steps, scale, minimum)]
        assert parts[0] is not None and parts[1] is not None
        return Back(
            self.types[role],
            parts[0],
            parts[1],
            parts[2],
            parts[3],
            factor,
            divisor,
            self._input_scale(product),
        )

    def _after(self, name: str) -> list[Any]:
        """The subtraction and the factor that follow a product, before anything else does."""
        out: list[Any] = []
        while len(users := self.users[name]) == 1:
            (then,) = users
            minimum = then.op_type == "Sub" and then.input[0] == name and not out
            scalar = (
                then.op_type in ("Mul", "Div") and then.input[1] in self._tensors and then.input[0] == name
            )
            if not minimum and not (scalar and self.array(then.input[1]).ndim == 0):
                break
            out.append(then)
            name = then.output[0]
        return out

    def _order(self, name: str) -> np.ndarray | None:
        node = self.makers.get(name)
        if node is None or node.op_type != "Gather" or not node.input[1].endswith(".order"):
            return None
        return self.array(node.input[1])

    def _input_scale(self, product: Any) -> np.ndarray | None:
        name = product.input[0]
        while (node := self.makers.get(name)) is not None:
            found = [i for i in node.input if i.endswith(".input_scale")]
            if found:
                return self.numbers(found[0])
            if node.op_type not in ("Gather", "DequantizeLinear", "QuantizeLinear", "Mul", "Div", "Cast"):
                return None
            name = node.input[0]
        return None

    def _integers(self, role: str, raw: np.ndarray, product: Any) -> Back:
        (cast,) = self.users[product.output[0]]
        (first,) = self.users[cast.output[0]]
        (second,) = self.users[first.output[0]]
        assert [n.op_type for n in (cast, first, second)] == ["Cast", "Mul", "Mul"]
        scale = np.broadcast_to(self.numbers(second.input[1]), raw.shape)
        return Back(self.types[role], raw.T, raw.T.astype(np.float64), np.ascontiguousarray(scale.T))
