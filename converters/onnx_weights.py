"""What an ONNX graph holds of a QTensor: its integers and scales, the small operators that mean the same, and the verdict.

MatMul takes weights as (input, output), so codes are transposed and packed again, nibble by nibble; nothing is rounded. Quantized
weights are DequantizeLinear nodes with blocks along the input axis: ONNX Runtime fuses them with the MatMul into MatMulNBits
(core/optimizer/qdq_transformer), TensorRT reads them as they are. What a `Dialect` lacks is restated without loss where that
is possible: a zero point or a minimum becomes a second, small product (x @ (q - z) s = x @ (q - m) s - sums(x) @ (z - m) s).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from math import gcd
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lconvert.converters import act_order, onnx_trt, regrid
from lconvert.ir import E2M1, E4M3, UE4M3, Entry, QTensor, Tensor, dense, int_grid, row_blocks
from lconvert.kernels.qtensor import grid_values
from lconvert.plan import Verdict


@dataclass(frozen=True)
class Dialect:
    """What a consumer's graphs may hold.

    symmetric, asymmetric: widths and their ONNX types, narrowest first. small_floats: FP8 and FP4 weights that it runs. minima: whether
    a zero point or minimum that has no type becomes a second product. branches: operators whose shapes depend on data (NonZero) are at
    hand. dynamic_inputs: scales of inputs may be found while the graph runs. nodes: FP8 inputs are QuantizeLinear. tensorrt: rules of its
    parser and builder apply (onnx_trt.py).
    """

    symmetric: Mapping[int, str]
    asymmetric: Mapping[int, str]
    small_floats: tuple[str, ...]
    minima: bool = True
    branches: bool = True
    dynamic_inputs: bool = True
    nodes: bool = False
    tensorrt: bool = False


DIALECTS: Mapping[str, Dialect] = {
    "ort": Dialect({4: "INT4", 8: "INT8"}, {2: "UINT2", 4: "UINT4", 8: "UINT8"}, ("FLOAT8E4M3FN",)),
    "trt": Dialect(
        {4: "INT4", 8: "INT8"},
        {},
        ("FLOAT8E4M3FN", "FLOAT4E2M1"),
        branches=False,
        dynamic_inputs=False,
        nodes=True,
        tensorrt=True,
    ),
}


@dataclass(frozen=True)
class Form:
    """How a matrix is stored. codes: (rows, columns) with blocks of one row, or per row, or per tensor. type: of the codes.

    minimum: subtracted from the product, per block, shape of the scales. order: columns are taken in this order, and so must be
    the input's. factor: a number that the product is multiplied by, or divided where `divisor`: the outer scale of two whose product
    fp32 would round. wide: scales stay in F32, and the matrix is cast to the graph's dtype.
    """

    codes: QTensor
    type: str
    minimum: Tensor | None = None
    order: NDArray[np.int64] | None = None
    wide: bool = False
    factor: Tensor | None = None
    divisor: bool = False

    @property
    def whole(self) -> bool:
        """Whether a product of integers can come before all scales: INT8, a scale per row or one, nothing else."""
        q, extra = self.codes, (self.minimum, self.order, self.factor, self.codes.zero)
        single = q.block[1] == -1 and isinstance(q.scale, Tensor)
        return self.type == "INT8" and single and all(e is None for e in extra)


@dataclass(frozen=True)
class Held:
    """A Form, or None for values in the graph's dtype, and the verdict."""

    form: Form | None
    verdict: Verdict


def held(entry: Entry, dialect: Dialect, dtype: str) -> Held:
    """How the entry is stored in a graph of `dtype` (F32, F16, BF16)."""
    q = entry.data
    if not isinstance(q, QTensor):
        return Held(None, plain(q.dtype, dtype))
    order = None
    if q.g_idx is not None:
        order = act_order.order(q)
        if order is None:
            return Held(None, as_values(dtype, "its groups are of unequal sizes"))
        q = act_order.contiguous(q, order)
    reasons, changed = [], False
    found = list(_forms(q, dialect)) if dialect.tensorrt else _forms(q, dialect)
    if isinstance(found, list) and found:
        found = [f for f in found if f.factor is None]
        reasons.append(
            "TensorRT takes no scales below zero" if found else "fp32 rounds its scale times the global one"
        )
    for form in onnx_trt.legal(found, q) if isinstance(found, list) else found:
        sides = (form.minimum, form.factor)
        if isinstance(found, list):
            changed = not any(form is f for f in found)
            two = isinstance(form.codes.scale, QTensor)  # their product has more digits than either
            form = replace(form, wide=entry.activation is not None or two or not _scales_fit(form, dtype))
        elif not _scales_fit(form, dtype) or not all(s is None or regrid.holds(s, dtype) for s in sides):
            reasons.append(f"scales that {dtype} does not hold")
            continue
        if form.factor is not None and dtype == "F16":
            reasons.append("a product without its global scale is beyond F16")
            continue
        exact = _same(q, form) and not changed
        return Held(replace(form, order=order), Verdict("exact" if exact else "widened"))
    return Held(None, as_values(dtype, reasons[0] if reasons else "no type of ONNX has this grid"))


def _same(q: QTensor, form: Form) -> bool:
    """Whether codes and scales are those of the source, in their blocks; a middle zero point may be said or implied."""
    parts = (form.minimum, form.factor, q.offset)
    if form.codes.grid.bits != q.grid.bits or any(p is not None for p in parts):
        return False
    return form.codes.block in (q.block, row_blocks(q).block)


def plain(own: str, dtype: str) -> Verdict:
    """What happens to a plain tensor in a graph of `dtype`."""
    if own == dtype:
        return Verdict("exact")
    return Verdict("widened") if dtype == "F32" else Verdict("rounded", f"to {dtype}")


def as_values(dtype: str, reason: str) -> Verdict:
    """What happens to codes that a graph of `dtype` holds as the values they stand for."""
    kind, text = ("widened", "as F32 values") if dtype == "F32" else ("rounded", f"as {dtype} values")
    return Verdict(kind, f"{text}: {reason}")  # type: ignore[arg-type]


def _scales_fit(form: Form, dtype: str) -> bool:
    """Whether the graph's dtype holds the scales; those of NVFP4 are FP8, their global one is checked."""
    scale = form.codes.scale
    if isinstance(scale, QTensor):
        scale = scale.scale
    return isinstance(scale, Tensor) and (scale.dtype == dtype or regrid.holds(scale, dtype))


def _forms(q: QTensor, dialect: Dialect) -> Iterator[Form]:
    """Forms of equal value, the most faithful first."""
    if not regrid.is_plain(q):
        return
    yield from _small_floats(q, dialect)
    yield from _one_scale(q, dialect)
    whole = regrid.integers(q)
    if whole is not None:
        whole = _even(row_blocks(whole))
        span = regrid.span(whole)
        for bits, type_ in _widths(dialect):
            if type_.startswith("U"):
                if (unsigned := regrid.asymmetric(whole, bits)) is not None:
                    yield Form(unsigned, type_)
            elif regrid.in_bits(span, bits):
                yield Form(regrid.signed(whole, bits), type_)
    if dialect.minima:
        yield from _with_minima(q, whole, dialect)
    yield from _with_factor(q, dialect)


def _one_scale(q: QTensor, dialect: Dialect) -> Iterator[Form]:
    """int8 with one scale for the whole matrix, as it is."""
    plain = isinstance(q.scale, Tensor) and q.zero is None and q.offset is None and not q.divisor
    int8 = q.grid.kind == "int" and q.grid.signed and q.grid.bits == 8
    if plain and int8 and q.block == (-1, -1) and 8 in dialect.symmetric:
        yield Form(q, dialect.symmetric[8])


def _widths(dialect: Dialect) -> list[tuple[int, str]]:
    """Both kinds of integers, narrow before wide, symmetric before asymmetric of one width."""
    return sorted(
        [*dialect.symmetric.items(), *dialect.asymmetric.items()], key=lambda w: (w[0], w[1][0] == "U")
    )


def _even(q: QTensor) -> QTensor:
    """Blocks that divide the columns: a short last one is not what DequantizeLinear means everywhere."""
    cols, width = q.shape[1], q.block[1]
    if width == -1 or cols % width == 0:
        return q
    return _split(q, gcd(cols, width))


def _split(q: QTensor, width: int) -> QTensor:
    """The same blocks in pieces of `width`, also where the last one is short."""
    cols, now = q.shape[1], q.block[1]
    where = np.arange(cols // width) * width // now

    def finer(side: Any) -> Any:
        if side is None:
            return None
        read: Callable[[int, int], Any] = lambda a, b: side.read(a, b)[:, where]
        return replace(side, shape=(side.shape[0], len(where)), read=read)

    return replace(q, block=(1, width), scale=finer(q.scale), zero=finer(q.zero), offset=finer(q.offset))


#: Blocks of fewer columns would have about as many minima as there are codes.
_NARROWEST = 8


def _with_minima(q: QTensor, whole: QTensor | None, dialect: Dialect) -> Iterator[Form]:
    """Codes without zero points and what must be subtracted: of zero points out of range or between the integers, and of float minima.

    Unsigned codes with the minimum itself where the dialect has them, else signed ones around the middle.
    """
    flat = regrid.plain_scale(q) if whole is None or whole.zero is None else whole
    if flat is None or flat.grid.kind != "int" or (flat.zero is None) == (flat.offset is None):
        return
    if isinstance(flat.offset, QTensor):
        exact = regrid.exact_product(flat.offset)
        if exact is None:
            return
        flat = replace(flat, offset=dense(exact))
    flat = _even(row_blocks(flat))
    if 0 < flat.block[1] < _NARROWEST:
        return
    bits, middle = flat.grid.bits, 0 if flat.grid.signed else 1 << (flat.grid.bits - 1)
    bare = replace(flat, zero=None, offset=None)
    if not flat.grid.signed and (minimum := _minimum(flat, 0)) is not None:
        zero = dense(np.zeros(flat.scale.shape, np.uint8))
        wide = next(((b, t) for b, t in sorted(dialect.asymmetric.items()) if bits <= b), None)
        if wide is not None:
            yield Form(replace(bare, grid=int_grid(wide[0], False), zero=zero), wide[1], minimum)
    if (minimum := _minimum(flat, middle)) is not None:
        for width, type_ in sorted(dialect.symmetric.items()):
            if bits <= width:
                yield Form(replace(_recentred(bare, middle), grid=int_grid(width, True)), type_, minimum)


def _recentred(q: QTensor, middle: int) -> QTensor:
    def read(start: int, stop: int) -> NDArray[Any]:
        return (q.codes.read(start, stop).astype(np.int16) - middle).astype(np.int8)

    return replace(q, codes=replace(q.codes, dtype="I8", read=read))


def _minimum(q: QTensor, middle: int) -> Tensor | None:
    """(zero - middle) * scale, or offset - middle * scale, per block; None where fp32 would round it."""
    assert isinstance(q.scale, Tensor)
    scale = regrid.numbers(q.scale).astype(np.float64)
    if q.zero is not None:
        wide = (regrid.numbers(q.zero).astype(np.float64) - middle) * scale
        exact = True  # of 24 and of at most 24 bits
    else:
        assert isinstance(q.offset, Tensor)
        offset, shift = regrid.numbers(q.offset).astype(np.float64), middle * scale
        wide = offset - shift
        exact = bool((offset - wide == shift).all() and (wide + shift == offset).all())
    narrow = wide.astype(np.float32)
    return dense(narrow) if exact and bool((narrow == wide).all()) else None


def _with_factor(q: QTensor, dialect: Dialect) -> Iterator[Form]:
    """The outer one of two scales, a number, taken out of the product: NVFP4's global scale, and one that divides (BitNet)."""
    s, one = q.scale, np.ones((1,) * len(q.shape), np.float32)
    if isinstance(s, Tensor):
        if not q.divisor or s.size != 1:
            return
        inner, factor, divisor = replace(q, scale=dense(one), divisor=False), s, True
    else:
        if q.divisor or not isinstance(s.scale, Tensor) or s.scale.size != 1 or s.grid.kind != "float":
            return
        outer = s.scale
        codes, grid = s.codes, s.grid
        if s.zero is not None or s.offset is not None:
            return

        def read(start: int, stop: int) -> NDArray[Any]:
            return grid_values(grid, codes.read(start, stop))

        inner = replace(q, scale=Tensor(s.shape, "F32", read, s.origin, codes.files))
        factor, divisor = outer, s.divisor
    for form in _forms(inner, replace(dialect, minima=False)):
        if form.factor is None:
            yield replace(form, factor=factor, divisor=divisor)


def _small_floats(q: QTensor, dialect: Dialect) -> Iterator[Form]:
    if q.zero is not None or q.offset is not None:
        return
    if (
        q.grid == E4M3
        and "FLOAT8E4M3FN" in dialect.small_floats
        and (flat := regrid.plain_scale(q)) is not None
    ):
        if flat.block not in ((-1, -1), (1, -1)):
            flat = _even(row_blocks(flat))
        yield Form(flat, "FLOAT8E4M3FN")
    s = q.scale
    nested = isinstance(s, QTensor) and s.grid in (E4M3, UE4M3) and isinstance(s.scale, Tensor)
    if q.grid == E2M1 and nested and "FLOAT4E2M1" in dialect.small_floats:
        multiplied = regrid.multiplied(q)
        if multiplied is not None and q.block[0] == 1 and s.block == (-1, -1):  # type: ignore[union-attr]
            yield Form(multiplied, "FLOAT4E2M1")


def table_form(entry: Entry, dialect: Dialect, dtype: str) -> Held:
    """A table of quantized rows in codes of 8 bits: Gather takes no narrower ones in ONNX Runtime."""
    q = entry.data
    if not isinstance(q, QTensor):
        return Held(None, plain(q.dtype, dtype))
    wide = replace(
        dialect,
        symmetric={8: "INT8"},
        asymmetric={} if dialect.tensorrt else {8: "UINT8"},
        small_floats=(),
        minima=False,
    )
    found = held(entry, wide, dtype)
    if found.form is None or found.form.order is not None:
        return Held(None, found.verdict)
    fine = (
        regrid.regrouped(found.form.codes, q.shape[1])
        if found.form.codes.block[1] == -1
        else found.form.codes
    )
    if fine is None:
        return Held(None, found.verdict)
    return Held(replace(found.form, codes=fine), found.verdict)


def describe(form: Form) -> str:
    """What a weight is stored as, in a few words: "INT4, blocks of 32"."""
    width = form.codes.block[1]
    where = (
        "per tensor" if form.codes.block == (-1, -1) else "per row" if width == -1 else f"blocks of {width}"
    )
    unsigned = form.codes.zero is not None and form.type.startswith("U")
    more = ", minima" if form.minimum is not None else ", zero points" if unsigned else ""
    more += ", global scale" if form.factor is not None else ""
    return f"{form.type}, {where}{more}{', columns reordered' if form.order is not None else ''}"


def kind_of(name: str) -> str:
    """What a matrix is in every layer: "layers.3.attn.q" is "attn.q"."""
    return ".".join(p for p in name.split(".") if not p.isdigit()).removeprefix("layers.")
