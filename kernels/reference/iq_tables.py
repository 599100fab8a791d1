"""The lattices of IQ1, IQ2 and IQ3: which groups of 4 or 8 levels a block can hold, and what to use instead.

A group of values is stored as the index of a lattice point. A point is written as the integer whose digits are
its levels, lowest first ("code"). The points themselves are the numbers in `iq_grids.inc`, shared with the
compiled kernels.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

# Name of the points in iq_grids.inc and the number of distance shells that count as neighbours
# (`ggml-quants.c` iq2xs_init_impl and iq3xs_init_impl, nwant).
_LATTICES = {
    "IQ2_XXS": ("iq2_xxs", 2),
    "IQ2_XS": ("iq2_xs", 2),
    "IQ2_S": ("iq2_s", 1),
    "IQ3_XXS": ("iq3_xxs", 2),
    "IQ3_S": ("iq3_s", 3),
    "IQ1_S": ("iq1", 3),
    "IQ1_M": ("iq1", 3),
}


@dataclass(frozen=True)
class Lattice:
    """`size` coordinates of `bits` bits, of which the levels 0..levels-1 occur.

    points: code of every index. index: index of every code, -1 for a code that is no point.
    """

    size: int
    bits: int
    levels: int
    shells: int
    points: NDArray[np.int32]
    index: NDArray[np.int32]

    def digits(self, codes: NDArray[np.int32]) -> NDArray[np.int32]:
        """Levels of codes (...,): shape (..., size)."""
        return (codes[..., None] >> self.bits * np.arange(self.size, dtype=np.int32)) & ((1 << self.bits) - 1)

    def codes(self, levels: NDArray[np.int32]) -> NDArray[np.int32]:
        """Codes of levels (..., size)."""
        shifted: NDArray[np.int32] = levels << self.bits * np.arange(self.size, dtype=np.int32)
        combined: NDArray[np.int32] = np.bitwise_or.reduce(shifted, axis=-1)
        return combined


@cache
def _grids() -> dict[str, NDArray[np.int32]]:
    text = (Path(__file__).parent.parent / "iq_grids.inc").read_text()
    found = re.findall(r"^GRID\((\w+),([\d,\s]+)\)", text, re.MULTILINE)
    return {name: np.array(numbers.split(","), np.int32) for name, numbers in found}


@cache
def lattice(type: str) -> Lattice:
    """The lattice of a storage type."""
    name, shells = _LATTICES[type]
    size, bits, levels = (4, 3, 8) if name.startswith("iq3") else (8, 2, 3)
    points = _grids()[name]
    index = np.full(1 << size * bits, -1, np.int32)
    index[points] = np.arange(len(points))
    return Lattice(size, bits, levels, shells, points, index)


@dataclass(frozen=True)
class Neighbours:
    """What to try for the codes off a lattice: codes points[first[c] : first[c] + count[c]] for code c."""

    first: NDArray[np.int32]
    count: NDArray[np.int32]
    points: NDArray[np.int32]


@cache
def neighbours(type: str) -> Neighbours:
    """The points in the `shells` smallest distances of every code off the lattice, by distance and then by index.

    ggml sorts with that total order, so no tie is left to the sort. Codes with a level that does not occur have none.
    """
    grid = lattice(type)
    every = np.arange(len(grid.index), dtype=np.int32)
    off = every[(grid.index < 0) & (grid.digits(every).max(axis=1) < grid.levels)]
    levels = grid.digits(off).astype(np.float32)
    points = grid.digits(grid.points).astype(np.float32)
    # Squared distances below 256, exact in float32; a stable sort of the bytes keeps points in index order.
    squares = (levels**2).sum(axis=1)[:, None] + (points**2).sum(axis=1)
    distance = (squares - 2 * levels @ points.T).astype(np.uint8)
    order = np.argsort(distance, axis=1, kind="stable")
    steps = np.diff(np.take_along_axis(distance, order, axis=1), axis=1, prepend=0) > 0
    steps[:, 0] = False
    near = np.cumsum(steps, axis=1) < grid.shells
    count = np.zeros(len(every), np.int32)
    count[off] = near.sum(axis=1)
    return Neighbours(np.cumsum(count, dtype=np.int32) - count, count, grid.points[order[near]])
