"""What calibration remembers of the inputs of a matrix: sums over tokens, one streaming pass, in a fixed order.

An accumulator is fed batches `x` of shape (tokens, in), fp32, on any device, and with a second stream `reference` of the same
shape: the same input in the uncompressed model. Nothing is normalised; who divides by `count` decides what an unseen input (count 0)
means.

    Hessian     sum x x^T            GPTQ's (arXiv 2210.17323, eq. 2) without its factor 2 / tokens
    Moments     sum x^2, sum |x|, max |x|, min, max per column      imatrix, AWQ, SmoothQuant, Wanda, static scales
    Magnitudes  a histogram of |x|, max |x|                         static scales that leave the largest values out
    Cross       sum (reference - x) x^T                             GPTAQ's asymmetric term (arXiv 2504.02692, eq. 9)
    Together    several of them fed at once
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, Protocol

from lconvert.forward import packages

#: Rows of a Hessian that are added up together, at least.
_PANEL = 256
#: Bins of Magnitudes: half of them or more, 2048, reach up to the largest magnitude. The least power of two where they end, so that fp32
#: holds the inverse of a bin's width. Values that are sorted into bins together.
_BINS, _LEAST, _SLAB = 4096, -100, 1 << 22
#: Importance of inputs that are always zero, as a share of the others' mean.
_DEAD = 1e-3


class Accumulator(Protocol):
    """What `Block.observe` feeds."""

    def add(self, x: Any, reference: Any = None) -> None: ...


class Hessian:
    """sum x x^T: `sum` (in, in) fp32 on the inputs' device, symmetric; None before the first token. count: tokens.

    Only panels from the diagonal on are added up, which for wide inputs is little more than half of the products.
    """

    def __init__(self) -> None:
        self._upper: Any = None
        self._whole = False
        self.count = 0

    @property
    def sum(self) -> Any:
        if self._upper is not None and not self._whole:
            for start, stop in self._panels():
                self._upper[stop:, start:stop] = self._upper[start:stop, stop:].T
            self._whole = True
        return self._upper

    def add(self, x: Any, reference: Any = None) -> None:
        torch, _ = packages()
        if self._upper is None:
            self._upper = torch.zeros(x.shape[1], x.shape[1], dtype=torch.float32, device=x.device)
        for start, stop in self._panels():
            self._upper[start:stop, start:].addmm_(x[:, start:stop].T, x[:, start:])
        self._whole = False
        self.count += len(x)

    def _panels(self) -> Iterator[tuple[int, int]]:
        """(first, last) rows of each."""
        n = len(self._upper)
        width = max(_PANEL, -(-n // 8))
        for start in range(0, n, width):
            yield start, min(start + width, n)


class Cross:
    """sum (reference - x) x^T: `sum` (in, in) fp32; None before the first token. count: tokens."""

    def __init__(self) -> None:
        self.sum: Any = None
        self.count = 0

    def add(self, x: Any, reference: Any = None) -> None:
        torch, _ = packages()
        if reference is None:
            raise ValueError("Cross needs both streams: observe(..., reference=True)")
        if self.sum is None:
            self.sum = torch.zeros(x.shape[1], x.shape[1], dtype=torch.float32, device=x.device)
        self.sum.addmm_((reference - x).T, x)
        self.count += len(x)


class Moments:
    """Per column (in,): `squares` sum x^2 and `magnitudes` sum |x| in fp64; `peak` max |x|, `low` min, `high` max in fp32; None before
    the first token. count: tokens."""

    def __init__(self) -> None:
        self.squares: Any = None
        self.magnitudes: Any = None
        self.low: Any = None
        self.high: Any = None
        self.count = 0

    @property
    def peak(self) -> Any:
        torch, _ = packages()
        return None if self.low is None else torch.maximum(self.low.abs(), self.high.abs())

    def add(self, x: Any, reference: Any = None) -> None:
        torch, _ = packages()
        if not len(x):
            return
        low, high = x.amin(0), x.amax(0)
        squares = x.square().sum(0, dtype=torch.float64)
        magnitudes = x.abs().sum(0, dtype=torch.float64)
        if self.count:
            low, high = torch.minimum(self.low, low), torch.maximum(self.high, high)
            squares, magnitudes = self.squares + squares, self.magnitudes + magnitudes
        self.low, self.high, self.squares, self.magnitudes = low, high, squares, magnitudes
        self.count += len(x)


class Magnitudes:
    """A histogram of |x| over all columns: `counts` (4096,) int64 on the inputs' device, None before the first token; bin i counts
    i w <= |x| < (i + 1) w, w = top / 4096, `top` the least power of two above `peak`, the largest magnitude (2^-100 at least). count: tokens.

    Where a larger value comes, top is doubled until it lies below, and neighbouring bins are added up at every doubling. Edges of
    the wide bins are edges of the narrow ones and dividing by a power of two is exact, so counts are those of all values at once, whatever
    their order and batches. Of a batch with values that are NaN or infinite nothing is counted, and `peak` is NaN from then on.
    """

    def __init__(self) -> None:
        self.counts: Any = None
        self.peak = 0.0
        self.count = 0
        self._exponent = _LEAST

    @property
    def top(self) -> float:
        return 2.0**self._exponent

    def add(self, x: Any, reference: Any = None) -> None:
        torch, _ = packages()
        if not len(x):
            return
        if self.counts is None:
            self.counts = torch.zeros(_BINS, dtype=torch.int64, device=x.device)
        self.count += len(x)
        peak = float(x.abs().max())
        if not math.isfinite(peak):
            self.peak = math.nan
            return
        self.peak = max(self.peak, peak)
        if peak >= self.top:
            self._widen(math.frexp(peak)[1])
        for part in x.split(max(1, _SLAB // x.shape[1])):
            at = (part.abs() * (_BINS / self.top)).int().flatten()
            self.counts += torch.bincount(at, minlength=_BINS)

    def _widen(self, exponent: int) -> None:
        """Bins up to 2^exponent, neighbours added up."""
        merged = min(1 << (exponent - self._exponent), _BINS)
        summed = self.counts.reshape(-1, merged).sum(1)
        self.counts.zero_()
        self.counts[: len(summed)] = summed
        self._exponent = exponent


def importance(squares: Any) -> Any:
    """What errors of columns count, from mean or summed squares of their inputs (cols,): of inputs that are always zero a thousandth of the
    others' mean, so that their groups get scales too."""
    alive = squares > 0
    typical = squares[alive].mean() if bool(alive.any()) else squares.new_ones(())
    return squares.where(alive, typical * _DEAD)


#: Of a matrix without inputs, whatever rounds it.
UNSEEN = "no token of the calibration text came here; rounded by its own squared error"


def unfed(squares: Any) -> str:
    """What a report says of inputs (cols,) that are always zero, by their mean or summed squares; "" where none is."""
    dead = int((squares <= 0).sum())
    return (
        f"{dead} of {len(squares)} inputs are always zero; their weights are rounded to nearest"
        if dead
        else ""
    )


class Together:
    """Several accumulators of one input, in one pass: `Together(Hessian(), Cross())`."""

    def __init__(self, *parts: Accumulator) -> None:
        self.parts = parts

    def add(self, x: Any, reference: Any = None) -> None:
        for part in self.parts:
            part.add(x, reference)
