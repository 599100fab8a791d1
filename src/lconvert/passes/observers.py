"""How a range is chosen for values that were seen: from the smallest to the largest, or less of it, so that the rest is finer.

    minmax      all of it
    percentile  what 99.99% of the values need (of their magnitudes where codes are symmetric, else half of the rest at either end)
    entropy     the cut whose codes keep most of the distribution: the least KL divergence between the values, cut off, and
                the same after rounding to the codes' number of magnitudes (S. Migacz, 8-bit Inference with TensorRT, GTC 2017)
    mse         the share of the whole range, 100% to 20%, with the least squared error of rounding and cutting

Values are known as a histogram of equal bins; what is in a bin counts as its middle. Of the four, entropy alone needs codes of equal steps.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

#: Bins of a histogram, and how many of them lie between two cuts that entropy tries.
BINS, _STRIDE = 2048, 16
_PERCENT = 99.99


@dataclass(frozen=True)
class Histogram:
    """How many values fell into each of equal bins between `low` and `high`, the smallest and the largest."""

    counts: NDArray[np.int64]
    low: float
    high: float

    @property
    def edges(self) -> NDArray[np.float64]:
        return np.linspace(self.low, self.high, len(self.counts) + 1)

    @property
    def middles(self) -> NDArray[np.float64]:
        edges = self.edges
        out: NDArray[np.float64] = (edges[1:] + edges[:-1]) / 2
        return out


Range = tuple[float, float]


@dataclass(frozen=True)
class Codes:
    """8-bit codes of numbers: code = clamp(rint(x / scale) + zero). Symmetric ones are -127..127 around 0, others 0..255."""

    scale: float
    zero: int
    symmetric: bool

    def rounded(self, x: NDArray[np.float64]) -> NDArray[np.float64]:
        """x as its codes say it."""
        low, high = (-127, 127) if self.symmetric else (0, 255)
        out: NDArray[np.float64] = (
            np.clip(np.rint(x / self.scale) + self.zero, low, high) - self.zero
        ) * self.scale
        return out


def codes(found: Range, symmetric: bool) -> Codes:
    """The codes for a range; it is widened to hold 0, which padding and ReLU are full of. Scales have 8 significant bits."""
    from lconvert.kernels.reference.rounding import short_scale

    low, high = min(found[0], 0.0), max(found[1], 0.0)
    wide = max(-low, high) / 127 if symmetric else (high - low) / 255
    scale = float(short_scale(np.array([wide], np.float32), 8)[0]) or 1.0
    zero = 0 if symmetric else int(np.clip(np.rint(-low / scale), 0, 255))
    return Codes(scale, zero, symmetric)


def minmax(h: Histogram, symmetric: bool) -> Range:
    return h.low, h.high


def percentile(h: Histogram, symmetric: bool) -> Range:
    beyond = 1 - _PERCENT / 100
    if symmetric:
        counts, top = magnitudes(h)
        share = np.concatenate([[0], np.cumsum(counts)]) / counts.sum()
        cut = float(np.interp(1 - beyond, share, np.linspace(0, top, len(counts) + 1)))
        return max(h.low, -cut), min(h.high, cut)
    share = np.concatenate([[0], np.cumsum(h.counts)]) / h.counts.sum()
    low, high = np.interp([beyond / 2, 1 - beyond / 2], share, h.edges)
    return float(low), float(high)


def entropy(h: Histogram, symmetric: bool) -> Range:
    counts, top = magnitudes(h)
    levels = 256 if not symmetric and h.low >= 0 else 128
    counts[0] = counts[
        1
    ]  # zeros cost nothing on any grid, and ReLU makes so many that nothing else would count
    best, cut = np.inf, len(counts)
    for n in range(levels, len(counts) + 1, _STRIDE):
        found = _divergence(counts, n, levels)
        if found < best:
            best, cut = found, n
    threshold = top * cut / len(counts)
    return max(h.low, -threshold), min(h.high, threshold)


def magnitudes(h: Histogram) -> tuple[NDArray[np.float64], float]:
    """The same values without their signs: bins from 0 on, and the largest magnitude; a histogram from 0 on has them already."""
    if h.low == 0:
        return h.counts.astype(np.float64), h.high
    top = max(-h.low, h.high)
    counts, _ = np.histogram(np.abs(h.middles), BINS, (0, top), weights=h.counts.astype(np.float64))
    return counts.astype(np.float64), top


def _divergence(counts: NDArray[np.float64], n: int, levels: int) -> float:
    """KL divergence of the first n bins, the rest in the last of them, from the same rounded to `levels`; infinite where it has none."""
    kept = counts[:n]
    p = kept.copy()
    p[-1] += counts[n:].sum()
    group = np.arange(n) * levels // n
    full = kept > 0
    total = np.bincount(group, kept, levels)
    share = total / np.maximum(np.bincount(group, full, levels), 1)
    q = np.where(full, share[group], 0.0)
    on = p > 0
    if (q[on] == 0).any():
        return float("inf")
    p, q = p / p.sum(), q / q.sum()
    return float((p[on] * np.log(p[on] / q[on])).sum())


def mse(h: Histogram, symmetric: bool) -> Range:
    return least_squares(h, lambda found, x: codes(found, symmetric).rounded(x))


def least_squares(
    h: Histogram, rounded: Callable[[Range, NDArray[np.float64]], NDArray[np.float64]]
) -> Range:
    """mse for any codes; rounded(range, x): x as those of a range say it."""
    x, weight = h.middles, h.counts.astype(np.float64)

    def error(share: float) -> float:
        y = rounded((h.low * share, h.high * share), x)
        return float((weight * (y - x) ** 2).sum())

    best = min((1 - i / 100 for i in range(81)), key=error)
    return h.low * best, h.high * best


OBSERVERS: Mapping[str, Callable[[Histogram, bool], Range]] = {
    "minmax": minmax,
    "percentile": percentile,
    "entropy": entropy,
    "mse": mse,
}
