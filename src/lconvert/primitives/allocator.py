"""One choice per item under a budget, exactly: the integer program behind mixed precision.

    min  sum_i loss[i, c_i]   subject to  sum_i size[i, c_i] <= budget          `within`
    min  sum_i size[i, c_i]   subject to  sum_i loss[i, c_i] <= bound           `cheapest`

HAWQ-V3 states it for bit widths (arXiv 2011.10680, 3.4); here a choice is whatever a target stores. Items are independent: what must
agree (tensors that a runtime fuses, experts in one tensor) is one item. Solved by HiGHS through scipy.optimize.milp to a gap of 0.
Sizes are whole numbers (bytes), so that a budget is kept to the byte; losses are finite, and may be negative where they are measured.
"""

from __future__ import annotations

import ctypes
import math
import os
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from lconvert.errors import MissingPackageError, OptionError

#: HiGHS stops at an absolute gap of 1e-6, which scipy does not let us change: losses are scaled so that their range is this.
_RANGE = 1e5
_RETRIES = 8


@dataclass(frozen=True)
class Option:
    """name: what is stored. size: bytes. loss: what it costs, in any unit that adds up over items."""

    name: str
    size: int
    loss: float


@dataclass(frozen=True)
class Item:
    """What gets one option. members: the names that share it."""

    name: str
    members: tuple[str, ...]
    options: tuple[Option, ...]


@dataclass(frozen=True)
class Allocation:
    """The option of every item by its name."""

    chosen: Mapping[str, Option]

    @property
    def size(self) -> int:
        return sum(o.size for o in self.chosen.values())

    @property
    def loss(self) -> float:
        return math.fsum(o.loss for o in self.chosen.values())

    def names(self) -> dict[str, str]:
        return {item: o.name for item, o in self.chosen.items()}


def useful(options: Iterable[Option]) -> tuple[Option, ...]:
    """Options by size, without those that another one beats in size and loss: an optimum exists among them."""
    kept: list[Option] = []
    for o in sorted(options, key=lambda o: (o.size, o.loss)):
        if not kept or o.loss < kept[-1].loss:
            kept.append(o)
    return tuple(kept)


def within(items: Sequence[Item], budget: int) -> Allocation:
    """The smallest loss of at most `budget` bytes; OptionError where even the smallest options are larger."""
    kept = _checked(items)
    smallest = sum(options[0].size for options in kept)
    if smallest > budget:
        raise OptionError(
            f"a budget of {budget} bytes is too small: the smallest options take {smallest}; raise it, or allow smaller types"
        )
    sizes, losses = _columns(kept)
    unit = math.gcd(*map(int, sizes)) or 1
    room = (budget - smallest) // unit
    at = _solve(
        kept, losses, [s / unit for s in sizes], room + 0.5
    )  # half a unit: no rounding of the solver reaches it
    return _allocation(items, kept, at)


def cheapest(items: Sequence[Item], bound: float) -> Allocation:
    """The fewest bytes with a loss of at most `bound`; OptionError where no allocation is that good."""
    kept = _checked(items)
    least = math.fsum(options[-1].loss for options in kept)
    if least > bound:
        raise OptionError(
            f"a loss of {bound:.4g} is out of reach: the best options lose {least:.4g}; allow a larger one, or wider types"
        )
    sizes, losses = _columns(kept)
    room = bound - least
    for _ in range(_RETRIES):
        at = _solve(kept, sizes, losses, room)
        total = math.fsum(options[i].loss for options, i in zip(kept, at, strict=True))
        if total <= bound:
            return _allocation(items, kept, at)
        room = max(0.0, room - 2 * (total - bound))  # what the solver's tolerance let through
    return _allocation(items, kept, [len(options) - 1 for options in kept])


def front(items: Sequence[Item], points: int = 24) -> list[Allocation]:
    """Optima at budgets between the smallest and the best allocation, evenly spaced: ascending in size, descending in loss."""
    kept = _checked(items)
    low, high = (sum(options[end].size for options in kept) for end in (0, -1))
    steps = max(1, points - 1)
    found: list[Allocation] = []
    for n in range(points):
        best = within(items, low + (high - low) * n // steps)
        if not found or best.loss < found[-1].loss:
            found.append(best)
    return found


def _checked(items: Sequence[Item]) -> list[tuple[Option, ...]]:
    for item in items:
        if not item.options:
            raise OptionError(f"{item.name}: none of the allowed types can hold it")
        for o in item.options:
            if not math.isfinite(o.loss):
                raise OptionError(f"{item.name}: the loss of {o.name} is {o.loss}, not a number to add up")
    if not items:
        raise OptionError("nothing to allocate: no matrix has a choice")
    return [useful(item.options) for item in items]


def _columns(kept: Sequence[tuple[Option, ...]]) -> tuple[list[float], list[float]]:
    """Sizes and losses of all options, each item's counted from its smallest."""
    sizes = [float(o.size - options[0].size) for options in kept for o in options]
    losses = [o.loss - options[-1].loss for options in kept for o in options]
    return sizes, losses


def _allocation(items: Sequence[Item], kept: Sequence[tuple[Option, ...]], at: Sequence[int]) -> Allocation:
    return Allocation({item.name: o[i] for item, o, i in zip(items, kept, at, strict=True)})


def _solve(
    kept: Sequence[tuple[Option, ...]], cost: Sequence[float], weight: Sequence[float], room: float
) -> list[int]:
    """The option of every item that makes the sum of costs least, with weights of at most `room`; both count from each item's least."""
    try:
        from scipy.optimize import Bounds, LinearConstraint, milp
        from scipy.sparse import csr_array
    except ImportError:
        raise MissingPackageError("scipy is not installed: pip install 'lconvert[allocate]'") from None
    import numpy as np

    counts = [len(options) for options in kept]
    ends = np.cumsum(counts)
    columns = int(ends[-1])
    one = csr_array((np.ones(columns), (np.repeat(np.arange(len(kept)), counts), np.arange(columns))))
    costs, weights = np.asarray(cost), np.asarray(weight)
    unit = weights.max() or 1.0
    with _silent():
        found = milp(
            costs * (_RANGE / (costs.max() or 1.0)),
            integrality=np.ones(columns),
            bounds=Bounds(0, 1),
            constraints=[
                LinearConstraint(one, 1, 1),
                LinearConstraint(weights[None] / unit, -np.inf, room / unit),
            ],
            options={"mip_rel_gap": 0.0},
        )
    if found.x is None:
        raise OptionError(f"the allocation was not solved: {found.message}")
    return [int(found.x[end - n : end].argmax()) for end, n in zip(ends, counts, strict=True)]


@contextmanager
def _silent() -> Iterator[None]:
    """HiGHS 1.12 (scipy 1.17) prints a line for debugging to stdout from C, whatever `disp` says: what it buffers goes nowhere."""
    if os.name != "posix":
        yield
        return
    sys.stdout.flush()
    c = ctypes.CDLL(None)
    c.fflush(None)
    kept, nowhere = os.dup(1), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    try:
        yield
    finally:
        c.fflush(None)
        os.dup2(kept, 1)
        os.close(kept)
        os.close(nowhere)
