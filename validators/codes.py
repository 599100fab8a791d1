"""Is every code the nearest one to the source, given the scales that are stored?

Encoders end by rounding to the nearest code, whatever chose the scales: in a tensor where nearly all codes are the nearest,
the others are damage (a flipped bit, a foreign scale, a shifted block). Methods that compensate errors (GPTQ) do not leave
nearest codes; such tensors are not judged.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lconvert.ir import Grid, QTensor, Tensor
from lconvert.kernels.qtensor import values

#: A neighbouring code counts as nearer when it is by more than this share: scales are rounded after codes are chosen. The
#: furthest value in good files lies .545 steps from its code (Q8_0; IQ4_XS .525, the K types .500), where it is .166.
_SLACK = 0.2
#: From this share of nearest codes on, all are meant to be.
NEARLY_ALL = 0.99

_SLAB = 1 << 20


#: Types whose encoders round to the stored scales last, with or without importances (ggml-quants.c, quantize_row_q?_K_impl
#: and quantize_row_iq4_nl_impl); the others fit the scale once more after the codes.
TYPES = ("Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "IQ4_XS")


def not_nearest(data: QTensor, original: Tensor) -> tuple[int, int]:
    """(codes for which a neighbour is nearer to the source's value, codes in all)."""
    low, high = _range(data.grid)
    step = max(1, _SLAB // max(1, int(np.prod(data.shape[1:]))))
    far = 0
    for start in range(0, data.rows, step):
        stop = min(start + step, data.rows)
        x = values(original, start, stop).astype(np.float64)
        own = np.abs(values(data, start, stop) - x)
        for by in (-1, 1):
            other = np.abs(values(_moved(data, by, low, high), start, stop) - x)
            own = np.where(other < own * (1 - _SLACK), np.inf, own)
        far += int(np.isinf(own).sum())
    return far, data.size


def _range(grid: Grid) -> tuple[int, int]:
    if grid.kind == "codebook":
        return 0, len(grid.values) - 1
    return (-(1 << grid.bits - 1), (1 << grid.bits - 1) - 1) if grid.signed else (0, (1 << grid.bits) - 1)


def _moved(data: QTensor, by: int, low: int, high: int) -> QTensor:
    """The same tensor with every code moved to its neighbour."""
    read: Callable[[int, int], NDArray[Any]] = data.codes.read

    def neighbour(start: int, stop: int) -> NDArray[Any]:
        codes = read(start, stop)
        return np.clip(codes.astype(np.int16) + by, low, high).astype(codes.dtype)

    return replace(data, codes=replace(data.codes, read=neighbour))
