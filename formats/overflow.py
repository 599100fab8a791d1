"""Weights that fp32 cannot hold: a damaged scale may be a finite number and its product with a code none."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lconvert.errors import InputError
from lconvert.formats.scheme import view
from lconvert.ir import QTensor, Tensor, as_f32
from lconvert.kernels.qtensor import dequantize, float_values

_MOST = float(np.finfo(np.float32).max)
_TILE = 1 << 20


def finite_weights(q: QTensor, factor: Tensor | None = None) -> QTensor:
    """`q`, of which no scale can be read that makes a weight of its rows infinite, times `factor` (K,) if there is one.

    Weights are computed only where a scale is so large that the largest code would overflow; InputError names the row.
    """
    outer = q.scale.codes if isinstance(q.scale, QTensor) else q.scale

    def read(start: int, stop: int) -> NDArray[Any]:
        found = outer.read(start, stop)
        if found.size and not _product(q, found, start, stop, factor) <= _MOST:
            _check(q, start, stop, factor)
        return found

    seen = replace(outer, read=read)
    return replace(q, scale=replace(q.scale, codes=seen) if isinstance(q.scale, QTensor) else seen)


def _product(q: QTensor, found: NDArray[Any], start: int, stop: int, factor: Tensor | None) -> float:
    """A bound on the weights of the blocks in rows start..stop, whose scales, as stored, are `found`."""
    with np.errstate(all="ignore"):
        if isinstance(q.scale, QTensor):
            kept = view(
                q.scale.codes, q.scale.shape, q.scale.codes.dtype, lambda a, b: found[a - start : b - start]
            )
            scales = np.abs(dequantize(replace(q.scale, codes=kept), start, stop))
        else:
            scales = np.abs(as_f32(found, q.scale.dtype))
        scale = float(1 / scales.min()) if q.divisor else float(scales.max())
    offset = 0.0
    if q.zero is not None and q.zero.dtype in ("F32", "F16", "BF16"):
        offset = float(np.abs(as_f32(q.zero.read(start, stop), q.zero.dtype)).max())
    scaled = 1.0 if factor is None else float(np.abs(as_f32(factor.load(), factor.dtype)).max())
    return scale * (_reach(q) + offset) * max(scaled, 1.0)


def _reach(q: QTensor) -> float:
    """The largest magnitude of a code, less a whole zero point."""
    grid = q.grid
    if grid.kind == "int":
        return float(1 << grid.bits)
    if grid.kind == "codebook":
        return max(map(abs, grid.values))
    return float(np.nanmax(np.abs(float_values(grid.exponent, grid.mantissa, grid.signed, grid.bits))))


def _check(q: QTensor, start: int, stop: int, factor: Tensor | None) -> None:
    """InputError if a weight of the blocks in rows start..stop is not finite."""
    height = q.rows if q.block[0] == -1 else q.block[0]
    step = max(1, _TILE // max(1, q.shape[1]))
    last = min(stop * height, q.rows)
    for first in range(start * height, last, step):
        with np.errstate(all="ignore"):
            w = dequantize(q, first, min(first + step, last))
            if factor is not None:
                w = w * as_f32(factor.load(), factor.dtype)
        bad = ~np.isfinite(w)
        if bad.any():
            row, column = (int(i) for i in np.argwhere(bad)[0])
            raise InputError(
                f"{q.origin}: the weight in row {first + row}, column {column} is too large for fp32, so that its scale must be "
                "damaged; download the file again"
            )
