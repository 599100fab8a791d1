"""Restating a QTensor in the structure that a target stores, with equal real numbers, or not at all.

Every function takes a QTensor and gives one of equal value in another form, or None where there is none: codes of
a small float or codebook as integers, a float minimum as an integer zero point, coarse groups as finer ones. Only
side tensors are looked at; codes change lazily, row by row. Nothing is ever rounded here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lconvert import kernels
from lconvert.formats.scheme import view
from lconvert.ir import Grid, QTensor, Tensor, as_f32, dense, int_grid, row_blocks
from lconvert.kernels.qtensor import float_values

#: Largest magnitude of an integer code, 8 bits signed.
_CODE_RANGE = (-128, 127)


def is_plain(q: QTensor) -> bool:
    """No act-order, mask, outliers or low-rank part, and two dimensions."""
    extra = q.g_idx is not None or q.mask is not None or q.outliers or q.low_rank is not None
    return not extra and len(q.shape) == 2


def numbers(side: Tensor) -> NDArray[np.float32]:
    """A side tensor in fp32 (integers and all float types but F64 exactly)."""
    return as_f32(side.load(), side.dtype)


# --- scales ----------------------------------------------------------------------------------------------


def plain_scale(q: QTensor) -> QTensor | None:
    """The scale as one stored number per block that multiplies: two levels multiplied, where every product is exact in fp32.

    A plain scale stays as it is, in its own dtype.
    """
    if isinstance(q.scale, Tensor):
        return multiplied(q)
    if q.divisor:
        return None
    product = exact_product(q.scale)
    return None if product is None else replace(q, scale=dense(product, origin=q.origin))


def multiplied(q: QTensor) -> QTensor | None:
    """The same numbers with scales that multiply on every level: divisors must be powers of two, or fp32 rounds 1 / divisor."""
    scale = multiplied(q.scale) if isinstance(q.scale, QTensor) else q.scale
    if scale is None:
        return None
    if not q.divisor:
        return q if scale is q.scale else replace(q, scale=scale)
    if not isinstance(scale, Tensor):
        return None
    turned = inverse(numbers(scale))
    if turned is None or not turned.exact:
        return None
    return replace(q, scale=dense(turned.values, origin=scale.origin), divisor=False)


@dataclass(frozen=True)
class Inverse:
    """1 / x in fp32: `exact` where every x is a power of two."""

    values: NDArray[np.float32]
    exact: bool


def inverse(x: NDArray[np.float32]) -> Inverse | None:
    """1 / x; None where that is beyond fp32."""
    with np.errstate(divide="ignore", over="ignore"):
        values = np.float32(1) / x
    powers = bool((np.frexp(np.abs(x))[0] == 0.5).all())
    return Inverse(values, powers) if bool(np.isfinite(values).all()) else None


def _grid_table(grid: Grid) -> NDArray[np.float32]:
    if grid.kind == "codebook":
        return np.asarray(grid.values, np.float32)
    return float_values(grid.exponent, grid.mantissa, grid.signed, grid.bits)


def exact_product(s: QTensor) -> NDArray[np.float32] | None:
    """The values of a quantized scale in fp32 if none is rounded; in fp64 a product of two fp32 numbers is exact."""
    if not isinstance(s.scale, Tensor) or s.zero is not None or s.offset is not None:
        return None
    codes = s.codes.load()
    inner = (
        codes.astype(np.float64) if s.grid.kind == "int" else _grid_table(s.grid)[codes].astype(np.float64)
    )
    outer = numbers(s.scale).astype(np.float64)
    for axis, width in enumerate(s.block):
        n = s.shape[axis]
        outer = np.take(outer, np.zeros(n, int) if width == -1 else np.arange(n) // width, axis=axis)
    with np.errstate(all="ignore"):
        wide = inner / outer if s.divisor else inner * outer
        narrow = wide.astype(np.float32)
        exact = narrow.astype(np.float64) == wide
        if s.divisor:  # a quotient in fp64 may itself be rounded
            exact &= narrow.astype(np.float64) * outer == inner
    return narrow if bool(exact.all()) else None


def fits(scale: NDArray[np.float32], dtype: str) -> bool:
    """Whether every number is representable in F16, BF16 or F32."""
    with np.errstate(over="ignore"):
        if dtype == "F16":
            return bool(np.array_equal(scale.astype(np.float16).astype(np.float32), scale))
        if dtype == "BF16":
            return not bool((np.ascontiguousarray(scale).view(np.uint32) & np.uint32(0xFFFF)).any())
    return True


def nearest(scale: NDArray[np.float32], dtype: str) -> NDArray[Any]:
    """Numbers in a storage type, F16 and BF16 to nearest, ties to even; infinite where F16 ends."""
    if dtype == "BF16":
        return kernels.quantize("BF16", scale.reshape(1, -1)).view(np.uint16).reshape(scale.shape)
    with np.errstate(over="ignore"):
        return scale.astype(np.float16) if dtype == "F16" else scale


def holds(scale: Tensor, dtype: str) -> bool:
    """Whether `dtype` represents every number of a scale: by its type, by its maker's promise, or by looking."""
    return dtype in (scale.dtype, "F32", *scale.exact_in) or fits(numbers(scale), dtype)


def recast(scale: Tensor, dtype: str) -> Tensor:
    """Numbers that `dtype` holds in that storage type, lazily. A negative zero, damage to some consumers, becomes zero."""

    def read(start: int, stop: int) -> NDArray[Any]:
        return nearest(as_f32(scale.read(start, stop), scale.dtype) + np.float32(0), dtype)

    return replace(view(scale, scale.shape, dtype, read), exact_in=scale.exact_in)


def with_scale_dtype(q: QTensor, dtypes: Iterable[str]) -> QTensor | None:
    """Plain scales in their own dtype if it is one of `dtypes`, else in the first that represents them all."""
    if not isinstance(q.scale, Tensor):
        return None
    order = [q.scale.dtype, *dtypes] if q.scale.dtype in dtypes else list(dtypes)
    dtype = next((d for d in order if holds(q.scale, d)), None)
    return None if dtype is None else replace(q, scale=recast(q.scale, dtype))


# --- codes -----------------------------------------------------------------------------------------------


def _mapped(q: QTensor, table: NDArray[np.int8]) -> Tensor:
    """Codes through a table."""
    return view(q.codes, q.shape, "I8", lambda a, b: table[q.codes.read(a, b)])


def integers(q: QTensor) -> QTensor | None:
    """The same numbers as integer codes of at most 8 bits, with a plain scale and an integer zero point or none.

    Small floats and codebooks whose values are integers times a power of two take a finer scale (E2M1's are halves,
    IQ4_NL's are integers); a float minimum becomes a zero point where it is a whole number of steps. Symmetric codes are
    signed and have no zero point.
    """
    if not is_plain(q):
        return None
    flat = plain_scale(q)
    if flat is None:
        return None
    q = flat
    if q.grid.kind != "int":
        whole = _as_integer_codes(q)
        if whole is None:
            return None
        q = whole
    if q.grid.bits > 8 or (q.zero is not None and q.offset is not None):
        return None
    if q.offset is not None:
        return _whole_minimum(q)
    if q.zero is None:
        return q if q.grid.signed else _zero_of(q, 0)
    zero = numbers(q.zero)
    if not np.array_equal(zero, np.rint(zero)):
        return None
    if not q.grid.signed and bool((zero == 1 << (q.grid.bits - 1)).all()):
        return _shifted(q)
    return q


def _as_integer_codes(q: QTensor) -> QTensor | None:
    if q.grid.lattice or q.zero is not None or q.offset is not None or q.grid.bits > 8:
        return None
    table = _grid_table(q.grid)
    if not np.isfinite(table).all():
        return None
    finest = max((Fraction(float(v)).denominator for v in table), default=1)
    whole = table.astype(np.float64) * finest
    if whole.min() < _CODE_RANGE[0] or whole.max() > _CODE_RANGE[1] or not isinstance(q.scale, Tensor):
        return None
    scale = numbers(q.scale)
    finer = (scale / np.float32(finest)).astype(np.float32)
    if not np.array_equal(finer * np.float32(finest), scale):
        return None  # subnormal: the division by a power of two lost bits
    bits = max(int(max(-whole.min(), whole.max() + 1) - 1).bit_length() + 1, 2)
    keep = q.scale.dtype if fits(finer, q.scale.dtype) else "F32"
    side = q.scale if finest == 1 else dense(nearest(finer, keep), keep, q.scale.origin)
    return replace(q, codes=_mapped(q, whole.astype(np.int8)), grid=int_grid(bits, True), scale=side)


def _zero_of(q: QTensor, value: int) -> QTensor:
    assert isinstance(q.scale, Tensor)
    return replace(q, zero=dense(np.full(q.scale.shape, value, np.uint8)))


def _shifted(q: QTensor) -> QTensor:
    """Unsigned codes around the middle of their range as signed ones without a zero point."""
    middle = 1 << (q.grid.bits - 1)

    def read(start: int, stop: int) -> NDArray[Any]:
        return (q.codes.read(start, stop).astype(np.int16) - middle).astype(np.int8)

    return replace(q, codes=view(q.codes, q.shape, "I8", read), grid=int_grid(q.grid.bits, True), zero=None)


def _whole_minimum(q: QTensor) -> QTensor | None:
    """(code * scale - offset) as (code - zero) * scale where every offset is zero * scale for a whole zero."""
    if q.grid.signed or not isinstance(q.offset, Tensor) or not isinstance(q.scale, Tensor):
        return None
    scale, offset = numbers(q.scale).astype(np.float64), numbers(q.offset).astype(np.float64)
    with np.errstate(all="ignore"):
        zero = np.where(offset == 0, 0.0, np.rint(offset / scale))
        exact = (zero * scale == offset) & (zero >= 0) & (zero < 1 << q.grid.bits)
    if not bool(exact.all()):
        return None
    return replace(q, zero=dense(zero.astype(np.uint8)), offset=None)


def asymmetric(q: QTensor, bits: int) -> QTensor | None:
    """Integer codes as unsigned ones of `bits` with a zero point in range: symmetric codes get the middle."""
    if q.zero is None:
        if q.grid.bits > bits:
            return None
        middle = 1 << (bits - 1)

        def read(start: int, stop: int) -> NDArray[Any]:
            return (q.codes.read(start, stop).astype(np.int16) + middle).astype(np.uint8)

        unsigned = replace(q, codes=view(q.codes, q.shape, "U8", read), grid=int_grid(bits, False))
        return _zero_of(unsigned, middle)
    zero = numbers(q.zero)
    if q.grid.signed or q.grid.bits > bits or zero.min() < 0 or zero.max() >= 1 << bits:
        return None
    stored = q.zero if q.zero.dtype == "U8" else dense(zero.astype(np.uint8))
    return replace(q, grid=int_grid(bits, False), zero=stored)


def span(q: QTensor) -> tuple[int, int]:
    """The least and the greatest code minus zero point that integer codes of this grid can have."""
    half, zero = 1 << (q.grid.bits - 1), None if q.zero is None else numbers(q.zero)
    low, high = (-half, half - 1) if q.grid.signed else (0, 2 * half - 1)
    return (low, high) if zero is None else (int(low - zero.max()), int(high - zero.min()))


def in_bits(span: tuple[int, int], bits: int) -> bool:
    """Whether signed integers of `bits` hold what lies between."""
    return span[0] >= -(1 << (bits - 1)) and span[1] < 1 << (bits - 1)


def symmetric(q: QTensor, bits: int) -> QTensor | None:
    """Integer codes as signed ones of `bits` without a zero point: codes minus zero points must be in range."""
    return signed(q, bits) if in_bits(span(q), bits) else None


def signed(q: QTensor, bits: int) -> QTensor:
    """`symmetric` for codes that are known to be in range."""
    if q.zero is None:
        return replace(q, grid=int_grid(bits, True))
    group = q.shape[1] if q.block[1] == -1 else q.block[1]
    side = row_blocks(q).zero
    assert side is not None

    def read(start: int, stop: int) -> NDArray[Any]:
        shift = np.repeat(side.read(start, stop).astype(np.int16), group, axis=1)[:, : q.shape[1]]
        out: NDArray[Any] = (q.codes.read(start, stop).astype(np.int16) - shift).astype(np.int8)
        return out

    return replace(q, codes=view(q.codes, q.shape, "I8", read), grid=int_grid(bits, True), zero=None)


# --- groups ----------------------------------------------------------------------------------------------


def regrouped(q: QTensor, size: int) -> QTensor | None:
    """Scales and zero points per `size` columns (-1: the row) of one row: repeated; None where groups are finer already."""
    q = row_blocks(q)
    cols = q.shape[1]
    now = cols if q.block[1] == -1 else q.block[1]
    want = cols if size == -1 else size
    if now == want:
        return replace(q, block=(1, size))
    if now % want or cols % now:
        return None
    times = now // want

    def finer(side: Any) -> Any:
        if isinstance(side, QTensor):
            if side.block != (-1, -1):
                return None
            codes = finer(side.codes)
            return replace(side, shape=codes.shape, codes=codes)
        read: Callable[[int, int], Any] = lambda a, b: np.repeat(side.read(a, b), times, axis=1)
        return replace(side, shape=(side.shape[0], side.shape[1] * times), read=read)

    sides = {k: finer(v) for k in ("scale", "zero", "offset") if (v := getattr(q, k)) is not None}
    return None if any(v is None for v in sides.values()) else replace(q, block=(1, size), **sides)
