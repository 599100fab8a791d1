"""What a QTensor means in exact arithmetic, one Python fraction per weight: the definition without any kernel."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import numpy as np

from lconvert.ir import Grid, QTensor, Tensor, as_f32


def grid_value(grid: Grid, code: int) -> Fraction:
    """The number that a code stands for (OCP's small floats, integers, a table)."""
    if grid.kind == "int":
        return Fraction(code)
    if grid.kind == "codebook":
        return Fraction(grid.values[code])
    if not grid.signed and grid.mantissa == 0:
        assert code != 255, "NaN"
        return Fraction(2) ** (code - 127)
    m, e = code & ((1 << grid.mantissa) - 1), code >> grid.mantissa & ((1 << grid.exponent) - 1)
    assert (grid.exponent, grid.mantissa, e, m) != (4, 3, 15, 7), "NaN"
    bias = (1 << (grid.exponent - 1)) - 1
    size = Fraction(m, 1 << grid.mantissa) + (e > 0)
    return (-1 if grid.signed and code >> (grid.bits - 1) else 1) * size * Fraction(2) ** (max(e, 1) - bias)


def side_value(side: Tensor | QTensor, row: int, col: int) -> Fraction:
    if isinstance(side, QTensor):
        return value(side, row, col)
    x = side.load()
    return Fraction(int(x[row, col]) if side.dtype[0] in "IU" else float(as_f32(x, side.dtype)[row, col]))


def value(q: QTensor, row: int, col: int) -> Fraction:
    """(grid(code) - zero) * scale - offset of one weight."""
    assert q.mask is None and not q.outliers and q.low_rank is None
    r = 0 if q.block[0] == -1 else row // q.block[0]
    if q.g_idx is not None:
        c = int(q.g_idx.load()[col])
    else:
        c = 0 if q.block[1] == -1 else col // q.block[1]
    w = grid_value(q.grid, int(q.codes.load()[row, col]))
    if q.zero is not None:
        w -= side_value(q.zero, r, c)
    scale = side_value(q.scale, r, c)
    w = w / scale if q.divisor else w * scale
    return w if q.offset is None else w - side_value(q.offset, r, c)


def values(q: QTensor) -> list[list[Fraction]]:
    rows, cols = q.shape
    return [[value(q, r, c) for c in range(cols)] for r in range(rows)]


def values64(q: QTensor) -> np.ndarray:
    """All weights in fp64, where no product of codes and scales is rounded; a divisor of any level divides last, rounding once."""

    def spread(outer: QTensor, side: np.ndarray) -> np.ndarray:
        rows, columns = (
            np.arange(n) // (n if b == -1 else b) for n, b in zip(outer.shape, outer.block, strict=True)
        )
        if outer.g_idx is not None:
            columns = outer.g_idx.load()
        return side[rows][:, columns]

    def numbers(t: Tensor) -> np.ndarray:
        x = (
            t.load().astype(np.float64)
            if t.dtype[0] in "IU"
            else as_f32(t.load(), t.dtype).astype(np.float64)
        )
        return x if x.ndim == 2 else x.reshape(1, 1)

    def parts(t: QTensor) -> tuple[np.ndarray, list[np.ndarray]]:
        """Numbers, and what they are to be divided by."""
        table = (
            np.array(
                [
                    float(grid_value(t.grid, c)) if c not in nan(t.grid) else np.nan
                    for c in range(1 << t.grid.bits)
                ]
            )
            if t.grid.kind != "int"
            else None
        )
        w = t.codes.load().astype(np.float64) if table is None else table[t.codes.load()]
        w = w if t.zero is None else w - spread(t, numbers(t.zero))
        by: list[np.ndarray] = []
        if isinstance(t.scale, QTensor):
            s, below = parts(t.scale)
            by = [spread(t, b) for b in below]
        else:
            s = numbers(t.scale)
        s = spread(t, s)
        if t.divisor:
            by.append(s)
        else:
            w = w * s
        if t.offset is not None:
            low, below = parts(t.offset) if isinstance(t.offset, QTensor) else (numbers(t.offset), [])
            assert not by and not below
            w = w - spread(t, low)
        return w, by

    w, by = parts(q)
    for b in by:
        w = w / b
    return w


def nan(grid: Grid) -> tuple[int, ...]:
    """Codes that are no numbers."""
    eight = {(4, 3): (0x7F, 0xFF), (8, 0): (255,)}
    return eight.get((grid.exponent, grid.mantissa), ()) if grid.kind == "float" else ()


def same(a: QTensor, b: QTensor) -> bool:
    return a.shape == b.shape and values(a) == values(b)


def storable(x: Fraction, dtype: str) -> bool:
    """Whether F16, BF16 or F32 has this number: significand and exponent, by the definition of the types."""
    if x == 0:
        return True
    digits, least, top = {"F16": (11, -24, 65504), "BF16": (8, -133, 2**128), "F32": (24, -149, 2**128)}[
        dtype
    ]
    size = abs(x)
    exponent = size.numerator.bit_length() - size.denominator.bit_length()
    exponent -= size < Fraction(2) ** exponent  # 2^exponent <= size < 2^(exponent + 1)
    step = Fraction(2) ** max(exponent - digits + 1, least)
    return (size / step).denominator == 1 and size <= top


def bits(x: Any, dtype: str) -> Any:
    """Numbers as the storage array of a float type; they must fit."""
    x = np.asarray(x, np.float32)
    if dtype == "BF16":
        return (x.view(np.uint32) >> 16).astype(np.uint16)
    return x.astype(np.float16) if dtype == "F16" else x
