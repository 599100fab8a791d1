"""Blocks of a flattened matrix (N, K): so many weights one after another, row by row, wherever rows end.

The IR's blocks lie within rows. `spread` reads one value per flat block as one per row and part of a row, `collected` is the
way back, for which `repeats` tells whether there is one.
"""

from __future__ import annotations

from math import gcd
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lconvert.formats.scheme import view
from lconvert.ir import Tensor

_ROWS = 64  # that are compared at a time


def spread(side: Tensor, n: int, k: int, block: int) -> Tensor:
    """One value per `block` of the flattened (n, k) weight as one per row and gcd(k, block) inputs."""
    width = gcd(k, block)
    columns = np.arange(k // width, dtype=np.int64) * width

    def read(start: int, stop: int) -> NDArray[Any]:
        at = (np.arange(start, stop, dtype=np.int64)[:, None] * k + columns) // block
        if not at.size:
            return np.empty(at.shape, side.read(0, 0).dtype)
        first = int(at[0, 0])
        found: NDArray[Any] = side.read(first, int(at[-1, -1]) + 1)[at - first]
        return found

    return view(side, (n, k // width), side.dtype, read)


def repeats(side: Tensor, k: int, block: int) -> bool:
    """Whether values (n, groups) are equal, bit for bit, within every `block` of the flattened weight."""
    groups = side.shape[1]
    times, last = block // (k // groups), None
    if times == 1:
        return True
    # Mostly over after the first rows, which need not be whole blocks.
    for start in range(0, side.rows, _ROWS):
        found = side.read(start, min(start + _ROWS, side.rows)).reshape(-1)
        bits = found.view(f"u{found.itemsize}")
        before = np.concatenate((bits[:1] if last is None else last, bits[:-1]))
        inside = np.arange(start * groups, start * groups + bits.size) % times != 0
        if bool((bits != before)[inside].any()):
            return False
        last = bits[-1:]
    return True


def span(t: Tensor, first: int, last: int) -> NDArray[Any]:
    """Values first..last of the flattened matrix."""
    k = t.shape[1]
    row = first // k
    found: NDArray[Any] = t.read(row, max(row, -(-last // k))).reshape(-1)
    return found[first - row * k : last - row * k]


def collected(side: Tensor, k: int, block: int, start: int, stop: int) -> NDArray[Any]:
    """Values start..stop of those per `block` of the flattened weight."""
    times = block // (k // side.shape[1])
    return np.ascontiguousarray(span(side, start * times, min(stop * times, side.size))[::times])
