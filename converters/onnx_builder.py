"""What every ONNX graph of ours is built with: weights with their verdicts, products, norms, activations.

A matrix becomes MatMul with its values, or with a DequantizeLinear of its codes, and what its scales, minima, order of columns and
rounded inputs ask for around it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from lconvert.converters import onnx_activations as activations
from lconvert.converters import onnx_arrays as arrays
from lconvert.converters import onnx_trt, regrid
from lconvert.converters import onnx_weights as weights
from lconvert.converters.onnx_arrays import FLOATS
from lconvert.converters.onnx_weights import Dialect, Form, Held
from lconvert.errors import UnsupportedError
from lconvert.formats.onnx_graph import Graph, Initializer
from lconvert.ir import ActSpec, Attention, Entry, Model, QTensor, Tensor, dense
from lconvert.plan import Verdict


@dataclass(frozen=True)
class Weight:
    """Where a weight of the graph came from and what became of it. side: it belongs to another one's codes."""

    made: Initializer
    roles: tuple[str, ...]
    verdict: Verdict
    held: str = ""
    side: bool = False


@dataclass(frozen=True)
class Shape:
    """What kind of graph: with keys and values (`cache`) that grow or lie in a cache of fixed length (`static`), logits of the last
    position alone, positions that tables hold, inputs and keys and values rounded as the model says (`rounding`)."""

    cache: bool = True
    static: bool = False
    last_logit: bool = False
    positions: int | None = None
    rounding: bool = True


@dataclass
class Builder:
    """A graph of a model under construction. dtype: of the graph, F32, F16 or BF16. unrounded: what the model rounds and the graph does
    not, and why. rank: of the inputs of matrices."""

    model: Model
    dialect: Dialect
    dtype: str
    shape: Shape = Shape()
    graph: Graph = field(default_factory=Graph)
    weights: list[Weight] = field(default_factory=list)
    notes: dict[str, None] = field(default_factory=dict)
    unrounded: dict[str, str] = field(default_factory=dict)
    rank: int = 3

    @contextmanager
    def ranked(self, rank: int) -> Iterator[None]:
        """Inside, what is rounded or multiplied with matrices has this many dimensions."""
        before, self.rank = self.rank, rank
        yield
        self.rank = before

    @property
    def number_type(self) -> str:
        return FLOATS[self.dtype]

    # --- weights -------------------------------------------------------------------------------------------

    def _add(self, made: Initializer, role: str, verdict: Verdict, held: str = "", side: bool = False) -> str:
        if made.name not in self.graph.weights:
            self.weights.append(Weight(made, (role,), verdict, held, side))
        return self.graph.weight(made)

    def vector(self, role: str, offset: float = 0.0) -> str:
        """A norm, a bias or another small tensor."""
        entry = self.model.entries[role]
        made = arrays.rows(role, entry, self.dtype, offset)
        own = entry.data.dtype if isinstance(entry.data, Tensor) else "F32"
        return self._add(made, role, weights.plain(own, self.dtype))

    def table(self, name: str, x: Any) -> str:
        """An array that the traits imply, in the graph's dtype."""
        made = arrays.array(name, arrays.stored(x, self.dtype), self.number_type)
        return self._add(made, "traits", Verdict("exact"))

    def number(self, x: float) -> str:
        return self.graph.constant(x, self.number_type)

    def linear(self, x: str, role: str, output: str = "") -> str:
        """x W^T + b, with what quantizes the input and scales it."""
        entry, g = self.model.entries[role], self.graph
        biased = role + ".bias" in self.model.entries
        name = role.rpartition(".")[2]
        with g.scope(name):
            y = self._product(x, entry, role, "" if biased else output)
            if biased:
                y = g.op("Add", y, self.vector(role + ".bias"), name="add", output=output)
        return str(y)

    def _product(self, x: str, entry: Entry, role: str, output: str) -> str:
        g, found = self.graph, weights.held(entry, self.dialect, self.dtype)
        form = found.form
        rounds = entry.activation is not None and isinstance(entry.data, QTensor)
        t = entry.transform
        if t is not None and not t.folded and (form is not None or rounds):
            assert t.param is not None
            scaled = Entry(role + ".input_scale", t.param)
            x = g.op("Mul", x, self._side(arrays.rows(scaled.name, scaled, self.dtype), role, t.param))
            entry = replace(entry, transform=None)
        if form is not None and form.whole and activations.whole(entry.activation, self):
            return self._integer_product(x, entry, form, role, found, output)
        x = self._quantized(x, entry)
        if form is None:  # where inputs are not rounded, their scale is in these values
            made = arrays.values(role, entry, self.dtype)
            w = self._add(made, role, found.verdict, "" if not isinstance(entry.data, QTensor) else "plain")
            return str(g.op("MatMul", x, w, output=output))
        x = self._ordered(x, form, role)
        w = self._dequantized(self._with_zeros(form) if rounds else form, role, found)
        last = output if form.minimum is None and form.factor is None else ""
        product = str(g.op("MatMul", x, w, output=last))
        if form.minimum is not None:
            less = self._minima(x, form, form.minimum, role)
            product = str(g.op("Sub", product, less, output=output if form.factor is None else ""))
        return self._times_factor(product, form, output)

    def _with_zeros(self, form: Form) -> Form:
        """Zero points of 0 for rows of INT8 that meet rounded inputs: with session.x64quantprecision ONNX Runtime 1.31 gives a
        DequantizeLinear without them one of a wrong shape, and fails."""
        q = form.codes
        if self.dialect.tensorrt or form.type != "INT8" or q.block != (1, -1) or q.zero is not None:
            return form
        return replace(form, codes=replace(q, zero=dense(np.zeros((q.shape[0], 1), np.int8))))

    def _ordered(self, x: str, form: Form, role: str) -> str:
        """x with its features in the order of the form's columns."""
        if form.order is None:
            return x
        made = arrays.array(role + ".order", form.order, "INT64")
        return str(self.graph.op("Gather", x, self._add(made, role, Verdict("exact"), side=True), axis=-1))

    def _times_factor(self, product: str, form: Form, output: str) -> str:
        """A product, as `output`, with the outer of two scales where there is one."""
        if form.factor is None:
            return product
        factor = self.number(float(regrid.numbers(form.factor).reshape(-1)[0]))
        kind = "Div" if form.divisor else "Mul"
        return str(self.graph.op(kind, product, factor, name="factor", output=output))

    def _integer_product(self, x: str, entry: Entry, form: Form, role: str, found: Held, output: str) -> str:
        """int8 x int8 in integers, then both scales."""
        g, q = self.graph, form.codes
        assert entry.activation is not None and isinstance(q.scale, Tensor)
        codes, scales = activations.codes(self, x, entry.activation)
        w = self._add(arrays.codes(role, q.codes, form.type), role, found.verdict, weights.describe(form))
        product = g.op(
            "Cast", g.op("MatMulInteger", codes, w, g.constant(128, "UINT8")), to=activations.FLOAT
        )
        made = arrays.flat(arrays.transposed(role + ".scale", q.scale, "F32"))
        own = self._add(made, role, found.verdict, side=True)
        product = g.op("Mul", product, scales)
        if self.dtype == "F32":
            return str(g.op("Mul", product, own, output=output))
        return str(g.op("CastLike", g.op("Mul", product, own), x, output=output))

    def _minima(self, x: str, form: Form, minimum: Tensor, role: str) -> str:
        """What the product must be lessened by: sums of x over blocks times their minima."""
        g, groups, width = self.graph, minimum.shape[1], form.codes.block[1]

        def sums() -> str:
            if groups == 1:
                return str(g.op("ReduceSum", x, g.constant([self.rank - 1]), keepdims=1))
            shape = g.op("Concat", g.op("Shape", x, end=-1), g.constant([groups, width]), axis=0)
            return str(g.op("ReduceSum", g.op("Reshape", x, shape), g.constant([self.rank]), keepdims=0))

        found = g.once(("sums", x, groups), sums)
        if self.dialect.tensorrt and not regrid.holds(minimum, self.dtype):
            made = arrays.transposed(role + ".minimum", minimum, "F32")
            wide = g.op(
                "MatMul", g.op("Cast", found, to=1), self._add(made, role, Verdict("exact"), side=True)
            )
            return onnx_trt.cast(self, wide)
        made = arrays.transposed(role + ".minimum", minimum, self.dtype)
        return str(g.op("MatMul", found, self._side(made, role, minimum)))

    def _side(self, made: Initializer, role: str, t: Tensor) -> str:
        """A side tensor in the graph's dtype, with what that does to it."""
        verdict = Verdict("exact") if regrid.holds(t, self.dtype) else weights.plain(t.dtype, self.dtype)
        return self._add(made, role, verdict, side=True)

    def _dequantized(self, form: Form, role: str, found: Held) -> str:
        """The matrix (input, output) behind a DequantizeLinear."""
        g, q = self.graph, form.codes
        text = weights.describe(form)
        number, dtype = ("FLOAT", "F32") if form.wide else (self.number_type, self.dtype)
        along = tuple(s for s in (q.scale,) if isinstance(s, Tensor) and s.shape[0] == q.shape[0])
        w = self._add(arrays.codes(role, q.codes, form.type, along), role, found.verdict, text)
        inputs = [w]
        if isinstance(q.scale, QTensor):  # FP8 scales above a global one
            assert isinstance(q.scale.scale, Tensor)
            fine = self._add(
                arrays.codes(role + ".scale", q.scale.codes, "FLOAT8E4M3FN"), role, found.verdict, side=True
            )
            coarse = g.constant(float(regrid.numbers(q.scale.scale).reshape(-1)[0]), number)
            inputs.append(g.op("DequantizeLinear", fine, coarse, name="scales"))
        elif q.block == (-1, -1):
            inputs.append(g.constant(float(regrid.numbers(q.scale).reshape(-1)[0]), number))
        else:
            made = arrays.transposed(role + ".scale", q.scale, dtype)
            inputs.append(
                self._add(arrays.flat(made) if q.block[1] == -1 else made, role, found.verdict, side=True)
            )
        if q.zero is not None:
            zero = arrays.codes(role + ".zero", q.zero, form.type)
            inputs.append(
                self._add(arrays.flat(zero) if q.block[1] == -1 else zero, role, found.verdict, side=True)
            )
        where: dict[str, Any] = {"axis": 0, "block_size": q.block[1]}
        if q.block[1] == -1:
            where = {} if q.block == (-1, -1) else {"axis": 1}
        matrix = str(g.op("DequantizeLinear", *inputs, **where))
        return onnx_trt.cast(self, matrix) if form.wide else matrix

    def _quantized(self, x: str, entry: Entry) -> str:
        """The input after rounding, where the entry's activations are quantized."""
        a = entry.activation
        if a is None or not isinstance(entry.data, QTensor):
            return x
        return self.rounded(x, a, f"inputs of {weights.kind_of(entry.name)}", activations.exponents(entry))

    def rounded(self, x: str, a: ActSpec, what: str, powers: bool = False) -> str:
        """x as `a` rounds it; where the graph leaves that out, a note says so."""
        if self.dialect.tensorrt and self.shape.rounding:
            return self.graph.once(("rounded", x, _key(a)), lambda: onnx_trt.quantized_input(self, x, a))
        why = activations.reason(a, self, powers) if self.shape.rounding else "asked for"
        if why:
            self.leave(what, f"stay in {self.dtype}, not rounded to {activations.text(a, powers)}: {why}")
            return x
        return self.graph.once(
            ("rounded", x, _key(a), powers), lambda: activations.quantized(self, x, a, powers)
        )

    def last(self, x: str) -> str:
        """The hidden states of every sequence's last token, (batch, 1, hidden): padding is on the left."""
        return str(self.graph.op("Gather", x, self.graph.constant([-1]), axis=1, name="last"))

    def leave(self, what: str, how: str) -> None:
        """Say that something is not rounded, to people and in the graph's metadata."""
        self.notes[f"{what} {how}"] = None
        self.unrounded[what] = how

    # --- parts of a layer ----------------------------------------------------------------------------------

    def norm(self, x: str, role: str) -> str:
        d = self.model.decoder
        with self.graph.scope(role.rpartition(".")[2]):
            return self.normed(x, role, d.norm_eps, d.norm)

    def normed(self, x: str, role: str, eps: float, kind: str) -> str:
        g, d = self.graph, self.model.decoder
        w = self.vector(role, d.norm_offset)
        if kind == "rms":
            return str(g.op("RMSNormalization", x, w, axis=-1, epsilon=eps))
        bias = [self.vector(role + ".bias")] if role + ".bias" in self.model.entries else []
        return str(g.op("LayerNormalization", x, w, *bias, axis=-1, epsilon=eps))

    def head_norm(self, x: str, role: str, a: Attention) -> str:
        """qk_norm of (batch, sequence, heads, width); `full` acts on all heads together, before they are cut."""
        g, d = self.graph, self.model.decoder
        if a.qk_norm != "per_head":
            return self.normed(x, role, d.norm_eps, d.norm)
        kind = "RMSNormalization" if d.norm == "rms" else "LayerNormalization"
        width = g.once(
            ("ones", a.head_dim), lambda: self.table(f"ones.{a.head_dim}", np.ones(a.head_dim, np.float32))
        )
        y = g.op(kind, x, width, axis=-1, epsilon=d.norm_eps)
        return str(g.op("Mul", y, self.vector(role, d.norm_offset)))

    def activation(self, x: str, kind: str) -> str:
        g = self.graph
        match kind:
            case "silu":
                return str(g.op("Mul", x, g.op("Sigmoid", x)))
            case "gelu":
                return str(g.op("Gelu", x, approximate="none"))
            case "gelu_tanh":
                return str(g.op("Gelu", x, approximate="tanh"))
            case "relu":
                return str(g.op("Relu", x))
            case "relu2":
                y = g.op("Relu", x)
                return str(g.op("Mul", y, y))
        raise UnsupportedError(f"the activation {kind} has no ONNX graph yet")

    def mlp(self, x: str, prefix: str, kind: str, activation: str) -> str:
        """act(gate x) * up x, or act(up x), then down."""
        if kind == "gated":
            inner = self.graph.op(
                "Mul",
                self.activation(self.linear(x, prefix + "gate"), activation),
                self.linear(x, prefix + "up"),
            )
        else:
            inner = self.activation(self.linear(x, prefix + "up"), activation)
        return self.linear(inner, prefix + "down")


def _key(a: ActSpec) -> Any:
    scale = None if a.scale is None else tuple(regrid.numbers(a.scale).reshape(-1).tolist())
    zero = None if a.zero is None else tuple(regrid.numbers(a.zero).reshape(-1).tolist())
    return a.grid, a.per, a.dynamic, a.group, scale, zero, a.divisor
