"""Is every code the nearest one to the source, given the scales that are stored, and how far are values in steps of their grid?

Encoders end by rounding to the nearest code, whatever chose the scales: in a tensor where nearly all codes are the nearest,
the others are damage (a flipped bit, a foreign scale, a shifted block). Methods that compensate errors (GPTQ) do not leave
nearest codes; there the distance in steps still tells a block whose zero point or scale is another's.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lconvert.ir import Grid, QTensor, Tensor
from lconvert.kernels.qtensor import grid_values, values
from lconvert.validators.slabs import slabs

#: A neighbouring code counts as nearer when it is by more than this share: scales are rounded after codes are chosen. The
#: furthest value in good files lies .545 steps from its code (Q8_0; IQ4_XS .525, the K types .500), where it is .166.
_SLACK = 0.2
#: Steps from the source: a scale rounded to BF16 after the codes were chosen moves the largest of 8 bits by a quarter of a step.
_MISFIT = 0.8
#: A block with a scale of zero has lost values larger than this share of the tensor's largest; smaller ones underflow rightly.
_LOST = 2.0**-12
#: From this share of nearest codes on, all are meant to be.
NEARLY_ALL = 0.99

_SLAB = 1 << 20  # values: several copies of a slab are alive at a time


#: Types whose encoders round to the stored scales last, with or without importances (ggml-quants.c, quantize_row_q?_K_impl
#: and quantize_row_iq4_nl_impl); the others fit the scale once more after the codes.
TYPES = ("Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "IQ4_XS")


@dataclass(frozen=True)
class Fit:
    """far: codes for which a neighbour is nearer to the source's value, of `total`; wild: those of them that are more than
    `_MISFIT` steps away. steps: in the worst block, the root mean square of the distances in steps between neighbouring codes; bias: in
    the worst block, the mean distance. Values beyond the ends of the grid do not count for these two."""

    far: int
    total: int
    wild: int
    steps: float
    bias: float


def fit(data: QTensor, original: Tensor | QTensor) -> Fit:
    """Codes against the source's values, block by block (blocks higher than a row: row by row)."""
    lower, upper = _neighbours(data.grid)
    width = data.shape[1] if data.block[0] != 1 or data.block[1] == -1 else data.block[1]
    far, wild, steps, bias = 0, 0, 0.0, 0.0
    flat: list[NDArray[np.float64]] = []  # magnitudes in blocks whose scale is zero
    top = 0.0
    for start, stop in slabs(data.shape, _SLAB):
        x = values(original, start, stop).astype(np.float64)
        a = values(data, start, stop).astype(np.float64)
        down, up = (values(_moved(data, by), start, stop).astype(np.float64) for by in (lower, upper))
        delta = a - x
        own = np.abs(delta)
        step = np.maximum(np.abs(up - a), np.abs(down - a))
        nearer = (np.abs(down - x) < own * (1 - _SLACK)) | (np.abs(up - x) < own * (1 - _SLACK))
        far += int(nearer.sum())
        wild += int((nearer & (own > _MISFIT * step)).sum())
        top = max(top, float(np.abs(x).max(initial=0)))
        flat.append(np.abs(x[step == 0]))
        clipped = ((up == a) & ((x - a) * (a - down) > 0)) | ((down == a) & ((a - x) * (up - a) > 0))
        inside = (step > 0) & ~clipped
        share = np.divide(delta, step, out=np.zeros_like(delta), where=inside).reshape(-1, width)
        count = inside.reshape(-1, width).sum(axis=1).clip(1)
        steps = max(steps, float((np.square(share).sum(axis=1) / count).max(initial=0)) ** 0.5)
        bias = max(bias, float((np.abs(share.sum(axis=1)) / count)[count * 2 > width].max(initial=0)))
    lost = int(sum((x > top * _LOST).sum() for x in flat))
    return Fit(far + lost, data.size, wild + lost, steps, bias)


@cache
def _neighbours(grid: Grid) -> tuple[NDArray[Any], NDArray[Any]]:
    """Tables from a code, as an index of unsigned width, to those of the next lower and higher value; at the ends to itself."""
    codes = np.arange(1 << grid.bits)
    if grid.kind == "int":
        low, high = (-(1 << grid.bits - 1), (1 << grid.bits - 1) - 1) if grid.signed else (0, codes[-1])
        own = np.where(codes > high, codes - (1 << grid.bits), codes)
        return np.maximum(own - 1, low), np.minimum(own + 1, high)
    codes = codes[: len(grid.values)] if grid.kind == "codebook" else codes
    known = grid_values(grid, codes).astype(np.float64)
    order = np.unique(known[np.isfinite(known)])
    first = {v: int(np.nonzero(known == v)[0][0]) for v in order}
    at = np.searchsorted(order, np.where(np.isfinite(known), known, order[-1]))
    tables = (np.array([first[v] for v in order[np.clip(at + by, 0, len(order) - 1)]]) for by in (-1, 1))
    down, up = tables
    return down, up


def _moved(data: QTensor, table: NDArray[Any]) -> QTensor:
    """The same tensor with every code moved to its neighbour."""
    read: Callable[[int, int], NDArray[Any]] = data.codes.read

    def neighbour(start: int, stop: int) -> NDArray[Any]:
        codes = read(start, stop)
        moved: NDArray[Any] = table[codes].astype(codes.dtype)  # a negative code counts from the table's end
        return moved

    return replace(data, codes=replace(data.codes, read=neighbour))
