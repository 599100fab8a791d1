"""The meaning of a QTensor in fp32: the canonical evaluation of `(grid(codes) - zero) * scale - offset`.

This is the reference that every lowering is compared with. Order of operations: see lconvert.ir.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lconvert.errors import UnsupportedError
from lconvert.ir import Entry, Grid, QTensor, Tensor, as_f32
from lconvert.kernels import rounding

_F32 = np.float32


@cache
def float_values(exponent: int, mantissa: int, signed: bool, bits: int) -> NDArray[np.float32]:
    """Value of every code of a small float with IEEE bias 2^(e-1) - 1 and subnormals; NaN codes give NaN.

    E2M1 and E4M3 follow OCP's formats: E2M1 has no NaN, E4M3 one per sign (all ones), E8M0 is 2^(code - 127)
    with 255 = NaN.
    """
    codes = np.arange(1 << bits, dtype=np.int64)
    if mantissa == 0 and not signed:
        out = np.exp2(codes.astype(np.float64) - 127)
        out[-1] = np.nan
        return out.astype(_F32)
    bias = (1 << (exponent - 1)) - 1
    m = codes & ((1 << mantissa) - 1)
    e = (codes >> mantissa) & ((1 << exponent) - 1)
    sign = np.where((codes >> (mantissa + exponent)) & 1, -1.0, 1.0) if signed else 1.0
    normal = (1 + m / (1 << mantissa)) * np.exp2(e.astype(np.float64) - bias)
    subnormal = m / (1 << mantissa) * 2.0 ** (1 - bias)
    out = sign * np.where(e == 0, subnormal, normal)
    if (exponent, mantissa) == (4, 3):
        out[(codes & 0x7F) == 0x7F] = np.nan
    return out.astype(_F32)


def grid_values(grid: Grid, codes: NDArray[Any]) -> NDArray[np.float32]:
    """Codes to the numbers they stand for, in fp32."""
    if grid.kind == "int":
        return codes.astype(_F32)
    if grid.kind == "codebook":
        table = np.asarray(grid.values, _F32)
    else:
        table = float_values(grid.exponent, grid.mantissa, grid.signed, grid.bits)
    out: NDArray[np.float32] = table[codes]
    return out


def _side(value: Tensor | QTensor, start: int, stop: int) -> NDArray[np.float32]:
    """Rows of a scale, zero or offset in fp32."""
    if isinstance(value, QTensor):
        return dequantize(value, start, stop)
    return as_f32(value.read(start, stop), value.dtype)


def _spread(q: QTensor, value: Tensor | QTensor, start: int, stop: int) -> NDArray[np.float32]:
    """One value per block, repeated over the elements of rows start..stop."""
    height = q.block[0] if q.block[0] != -1 else q.shape[0]
    first = start // height
    side = _side(value, first, -(-stop // height))
    rows = np.arange(start, stop) // height - first
    out = side[rows] if height > 1 else side
    for axis in range(1, len(q.shape)):
        width = q.block[axis]
        if width == -1:
            continue  # one value for the whole axis broadcasts
        if axis == len(q.shape) - 1 and q.g_idx is not None:
            out = np.take(out, q.g_idx.load(), axis=axis)
        else:
            out = np.take(out, np.arange(q.shape[axis]) // width, axis=axis)
    return out


def _group(q: QTensor) -> int | None:
    """The width of groups that lie in rows and hold bytes with a scale and perhaps a zero point, nothing else."""
    plain = q.grid.kind == "int" and q.codes.dtype in ("I8", "U8") and len(q.shape) == 2
    if not plain or q.divisor or q.offset is not None or q.g_idx is not None or q.block[0] != 1:
        return None
    width = q.shape[1] if q.block[1] == -1 else q.block[1]
    return width if width and q.shape[1] % width == 0 else None


def dequantize(q: QTensor, start: int = 0, stop: int | None = None) -> NDArray[np.float32]:
    """Rows start..stop of a QTensor in fp32, each operation one rounding."""
    if q.outliers or q.low_rank or q.mask is not None:
        raise UnsupportedError(
            f"{q.origin}: masks, outliers and low-rank corrections cannot be dequantized so far"
        )
    stop = q.rows if stop is None else stop
    if (width := _group(q)) is not None:
        zero = None if q.zero is None else _side(q.zero, start, stop)
        return rounding.group_values(q.codes.read(start, stop), width, _side(q.scale, start, stop), zero)
    w = grid_values(q.grid, q.codes.read(start, stop))
    if q.zero is not None:
        w = w - _spread(q, q.zero, start, stop)
    scale = _spread(q, q.scale, start, stop)
    w = w / scale if q.divisor else w * scale
    if q.offset is not None:
        w = w - _spread(q, q.offset, start, stop)
    return w


def effective(entry: Entry, start: int = 0, stop: int | None = None) -> NDArray[np.float32]:
    """Rows of the matrix that an entry applies, in fp32: its values times an unfolded scale of its input."""
    w = values(entry.data, start, stop)
    t = entry.transform
    if t is None or t.param is None or t.folded:
        return w
    if (t.kind, t.where) != ("scale", "input"):
        raise UnsupportedError(
            f"{entry.name}: an unfolded transform {t.kind} of its {t.where} cannot be applied"
        )
    return w * as_f32(t.param.load(), t.param.dtype)


def values(data: Tensor | QTensor, start: int = 0, stop: int | None = None) -> NDArray[np.float32]:
    """Rows of any entry in fp32."""
    stop = data.rows if stop is None else stop
    if isinstance(data, QTensor):
        return dequantize(data, start, stop)
    return as_f32(data.read(start, stop), data.dtype)
