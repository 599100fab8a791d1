"""A decoder as an ONNX graph, from its traits: one topology of standard operators for every architecture and every consumer.

RMSNormalization, RotaryEmbedding and Attention are operators of opset 23. Keys and values are concatenated outside of Attention,
which then has one output: TensorRT's parser takes no other (NVIDIA/TensorRT issue 4738), and ONNX Runtime runs it as fast. Inputs and
outputs are named as the exporters of Hugging Face name them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from lconvert.converters import onnx_activations as activations
from lconvert.converters import onnx_experts, onnx_static, onnx_trt, regrid, rotary
from lconvert.converters import onnx_weights as weights
from lconvert.converters.onnx_weights import FLOATS, Dialect, Form, Held
from lconvert.errors import UnsupportedError
from lconvert.formats.onnx_graph import Graph, Initializer
from lconvert.ir import ActSpec, Attention, Entry, Layer, Mla, Mlp, Model, QTensor, Rope, Tensor, dense
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
    """A graph of a model under construction. dtype: of the graph, F32, F16 or BF16. rank: of the inputs of matrices."""

    model: Model
    dialect: Dialect
    dtype: str
    shape: Shape = Shape()
    graph: Graph = field(default_factory=Graph)
    weights: list[Weight] = field(default_factory=list)
    notes: dict[str, None] = field(default_factory=dict)
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
        made = weights.rows(role, entry, self.dtype, offset)
        own = entry.data.dtype if isinstance(entry.data, Tensor) else "F32"
        return self._add(made, role, weights.plain(own, self.dtype))

    def table(self, name: str, x: Any) -> str:
        """An array that the traits imply, in the graph's dtype."""
        made = weights.array(name, weights.stored(x, self.dtype), self.number_type)
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
            x = g.op("Mul", x, self._side(weights.rows(scaled.name, scaled, self.dtype), role, t.param))
            entry = replace(entry, transform=None)
        if form is not None and form.whole and activations.whole(entry.activation, self):
            return self._integer_product(x, entry, form, role, found, output)
        x = self._quantized(x, entry)
        if form is None:  # where inputs are not rounded, their scale is in these values
            made = weights.values(role, entry, self.dtype)
            w = self._add(made, role, found.verdict, "" if not isinstance(entry.data, QTensor) else "plain")
            return str(g.op("MatMul", x, w, output=output))
        if form.order is not None:
            order = self._add(
                weights.array(role + ".order", form.order, "INT64"), role, Verdict("exact"), side=True
            )
            x = g.op("Gather", x, order, axis=-1)
        w = self._dequantized(form, role, found)
        last = output if form.minimum is None and form.factor is None else ""
        product = str(g.op("MatMul", x, w, output=last))
        if form.minimum is not None:
            less = self._minima(x, form, form.minimum, role)
            product = str(g.op("Sub", product, less, output=output if form.factor is None else ""))
        if form.factor is not None:
            factor = self.number(float(weights.numbers(form.factor).reshape(-1)[0]))
            product = str(
                g.op("Div" if form.divisor else "Mul", product, factor, name="factor", output=output)
            )
        return product

    def _integer_product(self, x: str, entry: Entry, form: Form, role: str, found: Held, output: str) -> str:
        """int8 x int8 in integers, then both scales."""
        g, q = self.graph, form.codes
        assert entry.activation is not None and isinstance(q.scale, Tensor)
        codes, scales = activations.codes(self, x, entry.activation)
        w = self._add(weights.codes(role, q.codes, form.type), role, found.verdict, weights.describe(form))
        product = g.op(
            "Cast", g.op("MatMulInteger", codes, w, g.constant(128, "UINT8")), to=activations.FLOAT
        )
        made = weights.flat(weights.transposed(role + ".scale", q.scale, "F32"))
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
            made = weights.transposed(role + ".minimum", minimum, "F32")
            wide = g.op(
                "MatMul", g.op("Cast", found, to=1), self._add(made, role, Verdict("exact"), side=True)
            )
            return onnx_trt.cast(self, wide)
        made = weights.transposed(role + ".minimum", minimum, self.dtype)
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
        w = self._add(weights.codes(role, q.codes, form.type), role, found.verdict, text)
        inputs = [w]
        if isinstance(q.scale, QTensor):  # FP8 scales above a global one
            assert isinstance(q.scale.scale, Tensor)
            fine = self._add(
                weights.codes(role + ".scale", q.scale.codes, "FLOAT8E4M3FN"), role, found.verdict, side=True
            )
            coarse = g.constant(float(weights.numbers(q.scale.scale).reshape(-1)[0]), number)
            inputs.append(g.op("DequantizeLinear", fine, coarse, name="scales"))
        elif q.block == (-1, -1):
            inputs.append(g.constant(float(weights.numbers(q.scale).reshape(-1)[0]), number))
        else:
            made = weights.transposed(role + ".scale", q.scale, dtype)
            inputs.append(
                self._add(weights.flat(made) if q.block[1] == -1 else made, role, found.verdict, side=True)
            )
        if q.zero is not None:
            zero = weights.codes(role + ".zero", q.zero, form.type)
            inputs.append(
                self._add(weights.flat(zero) if q.block[1] == -1 else zero, role, found.verdict, side=True)
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
            self.notes[
                f"{what} stay in {self.dtype}, not rounded to {activations.text(a, powers)}: {why}"
            ] = None
            return x
        return self.graph.once(
            ("rounded", x, _key(a), powers), lambda: activations.quantized(self, x, a, powers)
        )

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

    # --- positions and masks -------------------------------------------------------------------------------

    def lengths(self) -> tuple[str, str]:
        """Scalars: positions before these tokens, and all of them."""
        g = self.graph

        def past() -> str:
            total = g.op("Squeeze", g.op("Shape", "attention_mask", start=1, end=2))
            now = g.op("Squeeze", g.op("Shape", "input_ids", start=1, end=2))
            return str(g.op("Sub", total, now, name="past"))

        def total() -> str:
            return str(g.op("Squeeze", g.op("Shape", "attention_mask", start=1, end=2), name="total"))

        return g.once("past", past), g.once("total", total)

    def mask(self, window: int | None) -> str:
        """What each token sees, as booleans (batch, 1, sequence, total): what came before, in the window, and is no padding.

        A token always sees itself: rows of padding stay finite.
        """
        g = self.graph

        def places() -> tuple[str, str]:
            past, total = self.lengths()
            one = g.constant(1)
            columns = g.op("Unsqueeze", g.op("Range", g.constant(0), total, one), g.constant([0]))
            return g.op("Unsqueeze", g.op("Range", past, total, one), g.constant([1])), columns

        def made() -> str:
            rows, columns = onnx_static.rows_and_columns(self) if self.shape.static else places()
            seen = g.op("LessOrEqual", columns, rows)
            if window is not None:
                near = g.op("Less", g.op("Sub", rows, columns), g.constant(window))
                seen = g.op("And", seen, near)
            real = g.op("Unsqueeze", g.op("Cast", "attention_mask", to=9), g.constant([1, 2]))
            itself = g.op("Equal", columns, rows)
            return str(
                g.op(
                    "Or", g.op("And", seen, real), itself, name="mask" if window is None else f"mask.{window}"
                )
            )

        return g.once(("mask", window), made)

    def rotary(self, rope: Rope) -> tuple[str, str]:
        """cos and sin of the tokens' positions, (batch, sequence, dim / 2)."""
        g = self.graph
        positions = self.shape.positions or self.model.decoder.context

        def of(which: int, long: bool) -> str:
            name = f"rotary.{('cos', 'sin')[which]}{'.long' if long else ''}"
            return str(
                g.op(
                    "Gather",
                    self.table(name + _suffix(self, rope), _tables(rope, positions, long)[which]),
                    "position_ids",
                )
            )

        def made(which: int) -> str:
            if rope.scaling != "longrope":
                return of(which, False)

            def longer() -> str:
                last = g.op("ReduceMax", "position_ids", keepdims=0)
                return str(g.op("GreaterOrEqual", last, g.constant(rope.original_context), name="long"))

            return str(
                g.op(
                    "Where",
                    g.once(("long", rope.original_context), longer),
                    of(which, True),
                    of(which, False),
                )
            )

        return g.once(("cos", rope), lambda: made(0)), g.once(("sin", rope), lambda: made(1))

    def turned(self, x: str, rope: Rope | None, width: int) -> str:
        """x (batch, heads, sequence, width) with its first rope.dim dimensions turned."""
        if rope is None:
            return x
        if self.dialect.tensorrt and rope.layout == "interleaved":
            x, turning = onnx_trt.halves(self, x, rope, width)
        else:
            turning = rope
        cos, sin = self.rotary(rope)
        return str(
            self.graph.op(
                "RotaryEmbedding",
                x,
                cos,
                sin,
                interleaved=int(turning.layout == "interleaved"),
                rotary_embedding_dim=rope.dim if rope.dim != width else None,
            )
        )


def _key(a: ActSpec) -> Any:
    scale = None if a.scale is None else tuple(weights.numbers(a.scale).reshape(-1).tolist())
    zero = None if a.zero is None else tuple(weights.numbers(a.zero).reshape(-1).tolist())
    return a.grid, a.per, a.dynamic, a.group, scale, zero, a.divisor


def _suffix(b: Builder, rope: Rope) -> str:
    """Tables of a second rope get a number."""
    ropes = list(
        dict.fromkeys(layer.attention.rope for _, layer in b.model.decoder.each() if layer.attention.rope)
    )
    return f".{ropes.index(rope)}" if len(ropes) > 1 else ""


def _tables(rope: Rope, positions: int, long: bool) -> Any:
    return rotary.tables(rope, positions, long=long)


# --- the decoder -------------------------------------------------------------------------------------------


def attention(b: Builder, x: str, i: int, a: Attention) -> str:
    """Attention of one layer; x is (batch, sequence, hidden)."""
    g, prefix = b.graph, f"layers.{i}.attn."
    if a.mla is not None:
        q, k, v = latent(b, x, prefix, a, a.mla)
    else:
        q, k, v = heads(b, x, prefix, a)
    k, v = cached(b, k, v, i, a)
    if a.sinks:
        out = with_sinks(b, q, k, v, a, b.vector(prefix + "sinks"))
    else:
        out = attend(b, q, k, v, a)
    width = a.heads * (a.head_dim if a.mla is None else a.mla.v_dim)
    out = g.op("Reshape", g.op("Transpose", out, perm=[0, 2, 1, 3]), g.constant([0, 0, width]))
    return b.linear(out, prefix + "o")


def heads(b: Builder, x: str, prefix: str, a: Attention) -> tuple[str, str, str]:
    """Queries, keys and values (batch, heads, sequence, width), turned."""
    g = b.graph
    parts = {}
    for side, heads in (("q", a.heads), ("k", a.kv_heads), ("v", a.kv_heads)):
        y = b.linear(x, prefix + side)
        if a.clip_qkv is not None:
            y = g.op("Clip", y, b.number(-a.clip_qkv), b.number(a.clip_qkv))
        normed = a.qk_norm != "none" and side != "v"
        if normed and a.qk_norm == "full":
            y = b.head_norm(y, f"{prefix}{side}_norm", a)
        y = g.op("Reshape", y, g.constant([0, 0, heads, a.head_dim]), name=f"{side}.heads")
        if normed and a.qk_norm != "full":
            y = b.head_norm(y, f"{prefix}{side}_norm", a)
        y = g.op("Transpose", y, perm=[0, 2, 1, 3], name=f"{side}.transpose")
        parts[side] = y if side == "v" else b.turned(y, a.rope, a.head_dim)
    return parts["q"], parts["k"], parts["v"]


def latent(b: Builder, x: str, prefix: str, a: Attention, m: Mla) -> tuple[str, str, str]:
    """Latent attention with keys and values written out for every head: the same numbers, and a cache that any Attention takes."""
    g = b.graph
    assert a.rope is not None
    turning, still = a.rope.dim, a.head_dim - a.rope.dim

    def split(y: str, count: int, width: int) -> str:
        y = g.op("Reshape", y, g.constant([0, 0, count, width]))
        return str(g.op("Transpose", y, perm=[0, 2, 1, 3]))

    def normed(y: str, role: str) -> str:
        with g.scope(role.rpartition(".")[2]):
            return b.normed(y, role, m.norm_eps, "rms")

    if m.q_rank is None:
        q = b.linear(x, prefix + "q")
    else:
        q = b.linear(normed(b.linear(x, prefix + "q_a"), prefix + "q_a_norm"), prefix + "q_b")
    q_still, q_turning = g.op(
        "Split", split(q, a.heads, a.head_dim), g.constant([still, turning]), axis=3, outputs=2
    )
    q = g.op("Concat", q_still, b.turned(q_turning, a.rope, turning), axis=3, name="q.heads")
    both, key = g.op(
        "Split", b.linear(x, prefix + "kv_a"), g.constant([m.kv_rank, turning]), axis=2, outputs=2
    )
    inner = normed(both, prefix + "kv_a_norm")
    k_still = split(b.linear(inner, prefix + "k_b"), a.heads, still)
    shared = b.turned(split(key, 1, turning), a.rope, turning)
    shared = g.op("Expand", shared, g.constant([1, a.heads, 1, 1]))
    k = g.op("Concat", k_still, shared, axis=3, name="k.heads")
    return str(q), str(k), split(b.linear(inner, prefix + "v_b"), a.heads, m.v_dim)


def cached(b: Builder, k: str, v: str, i: int, a: Attention) -> tuple[str, str]:
    """Keys and values with those of the past before them, rounded where the model's cache is: what is kept is what attention sees."""
    k, v = rounded_cache(b, k, v, i, a)
    if not b.shape.cache:
        return k, v
    out = []
    for side, new in (("key", k), ("value", v)):
        width = a.mla.v_dim if a.mla is not None and side == "value" else a.head_dim
        before, after = (onnx_static.CAPACITY,) * 2 if b.shape.static else ("past", "total")
        past = b.graph.input(
            f"past_key_values.{i}.{side}", b.number_type, ("batch", a.kv_heads, before, width)
        )
        name = f"present.{i}.{side}"
        if b.shape.static:
            out.append(onnx_static.written(b, past, new, name))
        else:
            out.append(b.graph.op("Concat", past, new, axis=2, name=side, output=name))
        b.graph.output(name, b.number_type, ("batch", a.kv_heads, after, width))
    return out[0], out[1]


def rounded_cache(b: Builder, k: str, v: str, i: int, a: Attention) -> tuple[str, str]:
    """Keys and values as a quantized cache holds them; in the graph's dtype, so that nothing but their values changes."""
    spec = b.model.kv
    if spec is None:
        return k, v
    whole = not (spec.residual_window or spec.sinks or spec.pre_rope or a.mla is not None)
    if not whole:
        b.notes["the cache is not rounded: its latents, windows or order of rounding have no graph"] = None
        return k, v
    out = []
    for x, spec_of, name in ((k, spec.k, "keys"), (v, spec.v, "values")):
        side = of_layer(spec_of, i, b.model.decoder.layers)
        why = onnx_trt.cache_reason(side) if b.dialect.tensorrt and b.shape.rounding else ""
        if why:
            b.notes[f"{name} stay in {b.dtype}, not rounded to {activations.text(side)}: {why}"] = None
            out.append(x)
            continue
        with b.ranked(4):
            made = b.rounded(x, side, name)
        if made != x:
            b.notes[f"{name} are rounded to {activations.text(side)} and held in {b.dtype}"] = None
        out.append(made)
    return out[0], out[1]


def of_layer(a: ActSpec, i: int, layers: int) -> ActSpec:
    """A spec whose scales are one per layer, for layer i."""
    if a.scale is None or a.scale.size != layers:
        return a
    return replace(a, scale=dense(weights.numbers(a.scale).reshape(-1)[i : i + 1]))


def attend(b: Builder, q: str, k: str, v: str, a: Attention) -> str:
    """softmax(q k^T scale + mask) v, heads of keys shared by groups of queries."""
    mask = b.mask(a.window)
    if a.softcap is None and (not b.dialect.tensorrt or onnx_trt.fused(a)):
        return str(b.graph.op("Attention", q, k, v, mask, scale=a.scale))
    return str(b.graph.op("MatMul", b.graph.op("Softmax", _scores(b, q, k, a), axis=-1), repeated(b, v, a)))


def with_sinks(b: Builder, q: str, k: str, v: str, a: Attention, sinks: str) -> str:
    """Attention with a logit per head that takes its share of the softmax and attends to nothing."""
    g = b.graph
    scores = _scores(b, q, k, a)
    column = g.op("Reshape", sinks, g.constant([1, a.heads, 1, 1]))
    shape = g.op("Concat", g.op("Shape", scores, end=3), g.constant([1]), axis=0)
    shares = g.op("Softmax", g.op("Concat", scores, g.op("Expand", column, shape), axis=-1), axis=-1)
    real = g.op("Slice", shares, g.constant([0]), g.constant([-1]), g.constant([-1]))
    return str(g.op("MatMul", real, repeated(b, v, a)))


_LEAST = {"F32": -3.4028234663852886e38, "F16": -65504.0, "BF16": -3.3895313892515355e38}


def _scores(b: Builder, q: str, k: str, a: Attention) -> str:
    """Masked scores out of plain operators, the cap before the mask: Attention-23 caps after it, which would let masked positions
    through at -cap."""
    g = b.graph
    scores = g.op("MatMul", q, g.op("Transpose", repeated(b, k, a), perm=[0, 1, 3, 2]))
    scores = g.op("Mul", scores, b.number(a.scale))
    if a.softcap is not None:
        scores = cap(b, scores, a.softcap)
    return str(g.op("Where", b.mask(a.window), scores, b.number(_LEAST[b.dtype])))


def repeated(b: Builder, t: str, a: Attention) -> str:
    """Every head of keys or values as often as queries share it."""
    times = a.heads // a.kv_heads
    if times == 1:
        return t
    g = b.graph
    wide = g.op("Unsqueeze", t, g.constant([2]))
    wide = g.op("Expand", wide, g.constant([1, 1, times, 1, 1]))
    return str(g.op("Reshape", wide, g.constant([0, a.heads, -1, a.head_dim])))


def cap(b: Builder, x: str, limit: float) -> str:
    """limit * tanh(x / limit)."""
    g = b.graph
    return str(g.op("Mul", g.op("Tanh", g.op("Div", x, b.number(limit))), b.number(limit)))


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
        made = weights.rows(role, entry, b.dtype)
        return str(g.op("Gather", b._add(made, role, found.verdict), ids))
    if b.dialect.tensorrt:
        return onnx_trt.quantized_rows(b, role, found, ids)
    q = found.form.codes
    parts = [
        g.op(
            "Gather",
            b._add(
                weights.as_they_lie(role + ".table", q.codes, found.form.type),
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
            g.op(
                "Gather", b._add(weights.as_they_lie(name, side, type_), role, found.verdict, side=True), ids
            )
        )
    return str(g.op("DequantizeLinear", *parts, axis=2, block_size=q.block[1]))


def logits(b: Builder, x: str) -> None:
    """The head: hidden states to logits, the graph's first output."""
    g, d = b.graph, b.model.decoder
    x = b.norm(x, "norm")
    if b.shape.last_logit:
        x = g.op("Gather", x, g.constant([-1]), axis=1, name="last")
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
                    weights.rows("embed", entry, b.dtype), "embed", weights.plain(entry.data.dtype, b.dtype)
                ),
                perm=[1, 0],
            )
            y = g.op("MatMul", x, turned, output="" if d.head_bias else output)
        return str(g.op("Add", y, b.vector("head.bias"), output=output)) if d.head_bias else str(y)


def build(model: Model, dialect: Dialect, dtype: str, shape: Shape = Shape()) -> Builder:
    """The whole graph of a decoder. Raises UnsupportedError naming a trait that has no graph."""
    b = Builder(model, dialect, dtype, shape)
    g, d = b.graph, model.decoder
    seen = onnx_static.CAPACITY if shape.static else "total"
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
