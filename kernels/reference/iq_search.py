"""The searches behind IQ1, IQ2 and IQ3: scales and lattice points in weighted squared error.

Every search takes x (n, 256) and the importance of its values (n, 256) or None, and gives d (n,) float16, the
indices of the lattice points, the sign bytes (IQ1: shifts) and the sub-block scales, as `iq.Fields` holds them.
Inside, arrays are (k, m): element of a sub-block or group first, sub-block second, and sums run over the first axis
from left to right in float32, because the bytes depend on that order.

ggml aborts where no neighbour has a finite error (values beyond about 1e18); here the first neighbour is taken.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from lconvert.kernels.reference.iq_tables import lattice, neighbours
from lconvert.kernels.reference.search import nearest_int, search_levels, sum_in_order

F32 = NDArray[np.float32]
I32 = NDArray[np.int32]
Found = tuple[NDArray[np.float16], I32, I32, I32]

_LARGEST = np.float32(np.finfo(np.float32).max)
_ONE, _HALF, _ZERO = np.float32(1), np.float32(0.5), np.float32(0)


def _columns(x: F32, size: int) -> F32:
    """(n, 256) values as (size, m): column j is sub-block j."""
    return np.ascontiguousarray(x.reshape(-1, size).T)


def _settle(type: str, codes: I32, x: F32, weights: F32, scale: F32, values: F32) -> I32:
    """Codes (k, m) of groups with those off the lattice replaced by their best neighbour.

    Best is the smallest sum of weight * (scale * value - x)^2, the first of equals. x, weights: (k * size, m);
    scale: (m,); values: what a level stands for, (levels, k, m).
    """
    grid, near = lattice(type), neighbours(type)
    group, block = np.nonzero(grid.index[codes] < 0)
    if not len(group):
        return codes
    off = codes[group, block]
    count = near.count[off]
    owner = np.repeat(np.arange(len(off)), count)
    start = np.cumsum(count) - count
    candidates = near.points[near.first[off][owner] + np.arange(len(owner)) - start[owner]]
    digits = grid.digits(candidates)
    steps = scale[block] * values[:, group, block]
    error = np.zeros(len(owner), np.float32)
    for i in range(grid.size):
        row = grid.size * group + i
        diff = steps - x[row, block]
        error += (weights[row, block] * diff * diff)[digits[:, i], owner]
    error = np.where(error < _LARGEST, error, _LARGEST)
    best = np.flatnonzero(error == np.minimum.reduceat(error, start)[owner])
    first = best[np.diff(owner[best], prepend=-1) > 0]
    settled = codes.copy()
    settled[group, block] = candidates[first]
    return settled


def _levels(type: str, codes: I32) -> I32:
    """Levels (k * size, m) of codes (k, m)."""
    digits = lattice(type).digits(codes)
    return np.moveaxis(digits, 2, 1).reshape(-1, codes.shape[1])


def _codes(type: str, levels: I32) -> I32:
    """Codes (k, m) of levels (k * size, m)."""
    size = lattice(type).size
    return lattice(type).codes(np.moveaxis(levels.reshape(-1, size, levels.shape[1]), 1, 2))


def _largest(scale: F32) -> F32:
    """Largest of each row of (n, k) as a chain of comparisons finds it, where NaN is the smaller one."""
    top = np.zeros(len(scale), np.float32)
    for column in scale.T:
        top = np.where(top > column, top, column)
    return top


def _scale_codes(scale: F32, d: F32, top: int) -> I32:
    """Codes 0..top of the scales (n, k) as d * (2 * code + 1)."""
    return np.clip(nearest_int(_HALF * (_ONE / d[:, None] * scale - _ONE)), 0, top)


def _weights(
    x: F32, importance: F32 | None, sub: int, energy: int, own: Callable[[F32, F32], F32] = lambda x2, _: x2
) -> F32:
    """Weights (sub, m) of the values: importance * sqrt(energy * mean square + x^2).

    Without importance `own`(x^2, energy * mean square); the caller refuses to go without where that makes no sense.
    """
    mean = np.float32(energy) * sum_in_order(np.square(x).T) / np.float32(256)
    means = np.repeat(mean, 256 // sub)
    squares = np.square(_columns(x, sub))
    if importance is None:
        return own(squares, means)
    weighted: F32 = _columns(importance, sub) * np.sqrt(means + squares)
    return weighted


# ---- IQ2 and IQ3 ----


@dataclass(frozen=True)
class _Scan:
    """Inverse scales (2 * levels - 1 + step * trial) / largest value, trial = -trials..trials, are tried.

    sub: values per sub-block. energy: the mean square of a block counts so often in its weights. negligible:
    sub-blocks whose largest value is below hold only zeros. refit: which groups are rounded again with the winning
    scale: those off the lattice, all if one is off it, or all. fudge: factor of d.
    """

    sub: int
    trials: int
    step: float
    energy: int
    negligible: float
    refit: Literal["off", "all if off", "all"]
    fudge: float = 1.0
    even_signs: bool = False
    own: Callable[[F32, F32], F32] = lambda x2, _: x2  # weights without importance


_SCANS = {
    "IQ2_XXS": _Scan(32, 6, 0.1, 1, 1e-15, "all", even_signs=True),
    "IQ2_XS": _Scan(16, 9, 0.1, 1, 1e-15, "off", even_signs=True),
    "IQ2_S": _Scan(16, 9, 0.1, 2, 1e-8, "off", 0.9875, own=lambda x2, mean: np.float32(0.25) * mean + x2),
    "IQ3_XXS": _Scan(32, 15, 0.2, 2, 1e-8, "off", 1.0125, even_signs=True),
    "IQ3_S": _Scan(32, 9, 0.2, 2, 2.0**-149, "all if off", 1.033),
}


def _even(x: F32, weights: F32, magnitude: F32, negative: NDArray[np.bool_]) -> tuple[F32, NDArray[np.bool_]]:
    """Makes the negative values of every group of 8 even in number by flipping the one that weighs least.

    The flipped value becomes a negative magnitude.
    """
    cost = (weights * x * x).reshape(-1, 8, x.shape[1])
    lightest = np.where(np.isnan(cost[:, :1]), 0, np.fmin(cost, np.inf).argmin(axis=1, keepdims=True))
    odd = negative.reshape(cost.shape).sum(axis=1, keepdims=True) % 2 == 1
    flip = odd & (np.arange(8)[:, None] == lightest)
    flip = flip.reshape(x.shape)
    return np.where(flip, -magnitude, magnitude), negative ^ flip


@np.errstate(all="ignore")
def _scan(type: str, x: F32, importance: F32 | None) -> Found:
    """quantize_row_iq2_xxs_impl, _iq2_xs_impl, _iq2_s_impl, _iq3_xxs_impl and _iq3_s_impl."""
    scan, grid = _SCANS[type], lattice(type)
    weights = _weights(x, importance, scan.sub, scan.energy, scan.own)
    roots = np.sqrt(weights)
    xs = _columns(x, scan.sub)
    a, negative = np.abs(xs), xs < 0
    if scan.even_signs:
        a, negative = _even(xs, weights, a, negative)
    largest = a.max(axis=0)
    dead = largest < np.float32(scan.negligible)
    odd = np.float32(2 * grid.levels - 1)
    if type == "IQ2_XXS":
        scale = search_levels(a, weights, grid.levels + 1)[0]
        largest = scale * np.float32(grid.levels)
        dead |= largest <= 0
    else:
        scale = largest / odd

    groups = (scan.sub // grid.size, xs.shape[1])
    values = np.broadcast_to(
        (2 * np.arange(grid.levels) + 1).astype(np.float32)[:, None, None], (grid.levels, *groups)
    )

    def rounded(inverse: F32) -> I32:
        return _codes(type, np.clip(nearest_int(_HALF * (inverse * a - _ONE)), 0, grid.levels - 1))

    wx = weights * a

    def sums(codes: I32) -> tuple[F32, F32]:
        q = (2 * _levels(type, codes) + 1).astype(np.float32)
        return sum_in_order(wx * q), sum_in_order(weights * q * q)

    best = np.zeros_like(scale)
    codes = np.zeros(groups, np.int32)
    off = np.full(groups, scan.refit != "off")
    for trial in range(-scan.trials, scan.trials + 1):
        inverse = (odd + np.float32(trial) * np.float32(scan.step)) / largest
        nearest = rounded(inverse)
        tried = _settle(type, nearest, a, roots, _ONE / inverse, values)
        sum_qx, sum_qq = sums(tried)
        better = (sum_qq > 0) & (sum_qx * sum_qx > best * sum_qq)
        scale = np.where(better, sum_qx / sum_qq, scale)
        best = np.where(better, scale * sum_qx, best)
        codes = np.where(better, tried, codes)
        off = np.where(better, grid.index[nearest] < 0, off)
    if scan.refit == "all":
        off[:] = True
    elif scan.refit == "all if off":
        off[:] = off.any(axis=0)
    off &= scale > 0
    settled = _settle(type, rounded(_ONE / scale), a, roots, scale, values)
    codes = np.where(off, settled, codes)
    sum_qx, sum_qq = sums(codes)
    scale = np.where(off.any(axis=0) & (sum_qq > 0), sum_qx / sum_qq, scale)

    sign = np.packbits(negative.reshape(-1, 8, xs.shape[1]), axis=1, bitorder="little")[:, 0].astype(np.int32)
    sign = np.where(scale < 0, sign ^ 255, sign)
    scale = np.where(dead, _ZERO, np.abs(scale)).reshape(len(x), -1)
    top = _largest(scale)
    empty = top == 0
    index = np.where(dead, 0, grid.index[codes]).T.reshape(len(x), -1)
    sign = np.where(dead, 0, sign).T.reshape(len(x), -1)
    if scan.even_signs:  # the types without are left as they are in a block whose scales are all zero
        index[empty] = sign[empty] = 0
    if type == "IQ3_S":
        index, sign = _closed_up(index, sign, dead.reshape(len(x), -1))
    d = top / np.float32(31)
    stored = np.where(empty[:, None], 0, _scale_codes(scale, d, 15))
    return (d * np.float32(scan.fudge)).astype(np.float16), index, sign, stored


def _closed_up(index: I32, sign: I32, dead: NDArray[np.bool_]) -> tuple[I32, I32]:
    """What ggml writes for IQ3_S: a sub-block of zeros does not advance its output position.

    The low bytes of the indices and the signs of the sub-blocks behind it move one place up, their ninth bits and
    scales stay: the values behind a sub-block of zeros are wrong up to the end of the block. Kept for equal bytes.
    """
    order = np.argsort(dead, axis=1, kind="stable")[:, :, None]

    def moved(values: I32) -> I32:
        by_sub = values.reshape(*dead.shape, -1)
        return np.take_along_axis(by_sub, order, axis=1).reshape(len(values), -1)

    return moved(index & 255) | (index & 256), moved(sign)


# ---- IQ1 ----

# Levels 0, 1, 2 shifted up or down (x_p and x_m).
_UP = np.array([-0.875, 0.125, 1.125], np.float32)
_DOWN = np.array([-1.125, -0.125, 0.875], np.float32)


@dataclass
class _Split:
    """The best split of the sorted values of m sub-blocks: below `low` level 0, from `high` on level 2.

    shift: index of the winning shift or combination of shifts, -1 where no split was found.
    """

    scale: F32
    gain: F32
    low: I32
    high: I32
    shift: I32

    @staticmethod
    def start(scale: F32) -> _Split:
        none = np.full(len(scale), -1, np.int32)
        return _Split(scale, np.full(len(scale), -_LARGEST), none, none, none)

    def offer(self, low: int, high: int, shift: int, sum_qx: F32, sum_qq: F32) -> None:
        """Takes the split where its weighted error is smaller."""
        better = (sum_qq > 0) & (sum_qx * sum_qx > self.gain * sum_qq)
        if not better.any():
            return
        self.scale = np.where(better, sum_qx / sum_qq, self.scale)
        self.gain = np.where(better, self.scale * sum_qx, self.gain)
        self.low = np.where(better, np.int32(low), self.low)
        self.high = np.where(better, np.int32(high), self.high)
        self.shift = np.where(better, np.int32(shift), self.shift)


def _prefix(terms: F32) -> F32:
    """Sums of the first 0, 1, ... k rows of (k, m)."""
    zero = np.zeros((1, terms.shape[1]), np.float32)
    return np.add.accumulate(np.concatenate([zero, terms]), axis=0)


def _split_one_shift(order: NDArray[np.intp], wx: F32, weights: F32, start: _Split) -> _Split:
    """IQ1_S: one shift for the sub-block; 0 is up, 1 is down."""
    best, size = start, len(wx)
    sum_x = _prefix(np.take_along_axis(wx, order, axis=0))
    sum_w = _prefix(np.take_along_axis(weights, order, axis=0))
    for low in range(size + 1):
        for high in range(low, size + 1):
            x = sum_x[low], sum_x[high] - sum_x[low], sum_x[size] - sum_x[high]
            w = sum_w[low], sum_w[high] - sum_w[low], sum_w[size] - sum_w[high]
            for shift, q in enumerate((_UP, _DOWN)):
                sum_qx = x[0] * q[0] + x[1] * q[1] + x[2] * q[2]
                sum_qq = w[0] * q[0] * q[0] + w[1] * q[1] * q[1] + w[2] * q[2] * q[2]
                best.offer(low, high, shift, sum_qx, sum_qq)
    return best


def _split_two_shifts(order: NDArray[np.intp], wx: F32, weights: F32, start: _Split) -> _Split:
    """IQ1_M: a shift for each half of the sub-block; 2 * first + second."""
    best, size = start, len(wx)
    sums = []
    for half in range(2):
        inside = order // (size // 2) == half
        sums.append(
            [_prefix(np.where(inside, np.take_along_axis(t, order, axis=0), _ZERO)) for t in (wx, weights)]
        )
    for low in range(size + 1):
        for high in range(low, size + 1):
            qx, qq = [], []
            for sum_x, sum_w in sums:
                outer = sum_x[low] + sum_x[high]
                qx.append([sum_x[size] * q[2] - outer for q in (_UP, _DOWN)])
                qq.append(
                    [
                        sum_w[size] * q[2] * q[2]
                        + sum_w[low] * (q[0] * q[0] - q[1] * q[1])
                        + sum_w[high] * (q[1] * q[1] - q[2] * q[2])
                        for q in (_UP, _DOWN)
                    ]
                )
            for shift in range(4):
                first, second = divmod(shift, 2)
                best.offer(low, high, shift, qx[0][first] + qx[1][second], qq[0][first] + qq[1][second])
    return best


@np.errstate(all="ignore")
def _ternary(type: str, x: F32, importance: F32 | None) -> Found:
    """quantize_row_iq1_s_impl and quantize_row_iq1_m_impl.

    The best split of a sub-block's sorted values into levels 0, 1, 2 is found by trying all; equal values keep their
    order (ggml leaves that to qsort, which is stable in glibc at this size). Then groups off the lattice are settled.
    """
    halves = type == "IQ1_M"
    sub, negligible = (16, 1e-7) if halves else (32, 1e-12)
    grid = lattice(type)
    weights = _weights(x, importance, sub, 2)
    xs = _columns(x, sub)
    wx = weights * xs
    largest = np.abs(xs).max(axis=0)
    order = np.argsort(xs, axis=0, kind="stable")
    best = (_split_two_shifts if halves else _split_one_shift)(order, wx, weights, _Split.start(largest))
    dead = (largest < np.float32(negligible)) | (best.shift < 0)

    rank = np.arange(sub)[:, None]
    sorted_levels = (rank >= best.low).astype(np.int32) + (rank >= best.high)
    levels = np.empty_like(sorted_levels)
    np.put_along_axis(levels, order, sorted_levels, axis=0)
    flip = best.scale < 0
    levels = np.where(flip, 2 - levels, levels)
    scale = np.abs(best.scale)
    shift = np.where(flip, (3 if halves else 1) - best.shift, best.shift)
    # Shift of every group, first half first: (groups, m).
    down = np.stack([shift // 2, shift % 2]) if halves else np.tile(shift, (4, 1))
    values = np.where(down, _DOWN[:, None, None], _UP[:, None, None])
    per_value = np.repeat(values, 8, axis=1)

    nearest = _codes(type, levels)
    settled = _settle(type, nearest, xs, weights, scale, values)
    q = np.take_along_axis(per_value, _levels(type, settled)[None], axis=0)[0]
    sum_qx, sum_qq = sum_in_order(weights * q * xs), sum_in_order(weights * q * q)
    moved = (settled != nearest).any(axis=0) & (sum_qx > 0) & (sum_qq > 0)
    scale = np.where(dead, _ZERO, np.where(moved, sum_qx / sum_qq, scale)).reshape(len(x), -1)
    index = np.where(dead, 0, grid.index[settled])
    top = _largest(scale)
    empty = top == 0
    d = top / np.float32(15)
    stored = np.where(empty[:, None], 0, _scale_codes(scale, d, 7))
    down = np.where(dead | np.repeat(empty, 256 // sub), 0, down if halves else down[:1])
    if halves:
        d = _refit(type, x, weights, grid.points[index], down, stored, d) * np.float32(1.1125)
    else:
        d = d * np.float32(1.125)
    d = np.where(empty, _ZERO, d)
    return d.astype(np.float16), index.T.reshape(len(x), -1), down.T.reshape(len(x), -1), stored


def _refit(type: str, x: F32, weights: F32, codes: I32, down: I32, stored: I32, d: F32) -> F32:
    """IQ1_M: least-squares d (n,) for the final levels, shifts and scales of whole blocks."""
    shifts = np.repeat(down, 8, axis=0)
    q = np.where(shifts, _DOWN[_levels(type, codes)], _UP[_levels(type, codes)])
    q = q * (2 * stored.reshape(-1) + 1).astype(np.float32)
    sum_qx, sum_qq = (
        sum_in_order(np.ascontiguousarray(terms.T).reshape(len(x), 256).T)
        for terms in (weights * q * _columns(x, 16), weights * q * q)
    )
    return np.where(sum_qq > 0, sum_qx / sum_qq, d)


SEARCH: dict[str, Callable[[F32, F32 | None], Found]] = {
    **{t: partial(_scan, t) for t in _SCANS},
    **{t: partial(_ternary, t) for t in ("IQ1_S", "IQ1_M")},
}
