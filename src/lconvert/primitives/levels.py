"""What a code of a deployment grid is worth before scaling, as tensors: nearest levels, codes and back.

Codes here are positions in the ascending list of levels; what a grid stores for each is a table. Ties of integers go to the even one, as
rint does; of other grids to the upper one.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lconvert.forward import packages
from lconvert.ir import Grid

#: NF4 of QLoRA: quantiles of the normal distribution, asymmetric around an exact zero (bitsandbytes, functional.py get_4bit_type).
NF4_VALUES = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
NF4 = Grid("codebook", 4, values=NF4_VALUES)


def power_of_two_above(x: float) -> float:
    """The smallest power of two that is at least x and whose reciprocal fp32 holds as well; 1 for 0."""
    import math

    if x <= 0:
        return 1.0
    mantissa, exponent = math.frexp(x)
    return 2.0 ** max(exponent - (mantissa == 0.5), -126)


@dataclass(frozen=True)
class Levels:
    """`values` ascending fp32; `stored` the code that the grid has for each. uniform: consecutive integers."""

    values: NDArray[np.float32]
    stored: NDArray[Any]
    uniform: bool

    @property
    def low(self) -> float:
        return float(self.values[0])

    @property
    def high(self) -> float:
        return float(self.values[-1])

    @property
    def midpoints(self) -> NDArray[np.float32]:
        """Between neighbours: level i is nearest for midpoints[i - 1] <= x < midpoints[i]."""
        wide = self.values.astype(np.float64)
        out: NDArray[np.float32] = ((wide[1:] + wide[:-1]) / 2).astype(np.float32)
        return out

    def position(self, x: Any) -> Any:
        """Positions (uint8) of the levels nearest to x, a torch tensor."""
        torch, _ = packages()
        if self.uniform:
            return (x.round().clamp(self.low, self.high) - self.low).to(torch.uint8)
        return torch.bucketize(x, _on(self, "midpoints", x.device), right=True).to(torch.uint8)

    def nearest(self, x: Any) -> Any:
        """The levels nearest to x, fp32."""
        if self.uniform:
            return x.round().clamp(self.low, self.high)
        return _on(self, "values", x.device)[self.position(x).long()]

    def place(self, x: Any) -> Any:
        """Where x lies among the levels, in positions: i + f a share f of the way from level i to the next; beyond the ends as between the last two."""
        torch, _ = packages()
        if self.uniform:
            return x - self.low
        values, gaps = _on(self, "values", x.device), _on(self, "gaps", x.device)
        at = (torch.bucketize(x, values, right=True, out_int32=True) - 1).clamp_(0, len(values) - 2)
        return (x - values[at]) / gaps[at] + at

    def between(self, place: Any) -> Any:
        """What lies at these places, the inverse of `place`."""
        if self.uniform:
            return place + self.low
        values, gaps = _on(self, "values", place.device), _on(self, "gaps", place.device)
        at = place.floor().clamp(0, len(values) - 2).long()
        return values[at] + gaps[at] * (place - at)

    @property
    def gaps(self) -> NDArray[np.float32]:
        """Between a level and the next."""
        out: NDArray[np.float32] = np.diff(self.values)
        return out

    def nearest_from(self, x: Any, zero: Any) -> Any:
        """Positions of integers nearest to x + zero, the sum taken after rounding, as codes with zero points are."""
        return (x.round() + zero).clamp(self.low, self.high).to(packages()[0].uint8)

    def at(self, position: Any) -> Any:
        """The levels at these positions, fp32."""
        if self.uniform:
            return position.float() + self.low
        return _on(self, "values", position.device)[position.long()]


_KEPT: dict[tuple[int, str, str], tuple[Levels, Any]] = {}


def _on(levels: Levels, name: str, device: Any) -> Any:
    """One of the arrays as a tensor on a device, made once."""
    key = (id(levels), name, str(device))
    if key not in _KEPT:
        _KEPT[key] = (levels, packages()[0].from_numpy(getattr(levels, name).copy()).to(device))
    return _KEPT[key][1]


@cache
def of(grid: Grid) -> Levels:
    """The levels of a grid: finite, ascending, -0 left out."""
    from lconvert.kernels.qtensor import grid_values

    if grid.kind == "int":
        low = -(1 << (grid.bits - 1)) if grid.signed else 0
        codes = np.arange(low, low + (1 << grid.bits))
        stored = codes.astype(np.int8 if grid.signed else np.uint8)
        return Levels(codes.astype(np.float32), stored, True)
    count = len(grid.values) if grid.kind == "codebook" else 1 << grid.bits
    codes = np.arange(count, dtype=np.uint8)
    values = grid_values(grid, codes)
    keep = np.isfinite(values) & ~(np.signbit(values) & (values == 0))
    order = np.argsort(values[keep], kind="stable")
    return Levels(values[keep][order], codes[keep][order], False)
