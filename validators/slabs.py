"""Tensors that need not fit into memory, compared slab by slab."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

_VALUES = 1 << 22


def slabs(shape: tuple[int, ...], values: int = _VALUES) -> Iterator[tuple[int, int]]:
    """(start, stop) of rows that cover a tensor, each slab of about `values` values and one row at least."""
    step = max(1, values // max(1, prod(shape[1:])))
    rows = shape[0] if shape else 1
    for start in range(0, rows, step):
        yield start, min(start + step, rows)


def largest_difference(
    shape: tuple[int, ...],
    ours: Callable[[int, int], NDArray[Any]],
    theirs: Callable[[int, int], NDArray[Any]],
) -> float:
    """max |ours - theirs| over the rows of a tensor; NaN counts as infinite."""
    return max((_largest(ours(*rows), theirs(*rows)) for rows in slabs(shape)), default=0.0)


def _largest(a: NDArray[Any], b: NDArray[Any]) -> float:
    with np.errstate(invalid="ignore"):  # infinities: counted where values are
        difference = np.abs(a.astype(np.float64) - b)
    return float(np.nan_to_num(difference, nan=np.inf).max(initial=0.0))
