"""The weighted scale searches that several GGUF types share, vectorised over blocks.

Arrays are laid out (k, n): element within a block first, block second. Every sum runs over the first axis from
left to right in float32, because ggml's bytes depend on the order of the additions
(`ggml-quants.c` make_qx_quants, make_qkx3_quants, nearest_int).
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

F32 = NDArray[np.float32]
I32 = NDArray[np.int32]

# Below this largest magnitude a block counts as all zero (ggml-quants.c GROUP_MAX_EPS).
ZERO_BLOCK = np.float32(1e-15)

_ROUNDING_SHIFT = np.float32(12582912.0)  # 1.5 * 2**23: adding it leaves the rounded value in the mantissa


def nearest_int(x: F32) -> I32:
    """Round to the nearest integer, ties to even, for abs(x) < 2**22.

    Outside that range and for infinities the result is what ggml reads from the mantissa: -2**22 for an
    infinity, 0 for the default NaN.
    """
    bits = (x + _ROUNDING_SHIFT).view(np.int32)
    return (bits & np.int32(0x7FFFFF)) - np.int32(0x400000)


def sum_in_order(terms: F32) -> F32:
    """Sum a (k, n) array over its first axis, strictly left to right, starting from +0."""
    total: F32 = np.add.accumulate(terms, axis=0)[-1] + np.float32(0)
    return total


def first_extreme(x: F32) -> F32:
    """The signed value of largest magnitude in each column of (k, n); the first one wins a tie, +0 if all are zero.

    NaN does not count: a comparison with it is false in C.
    """
    at = np.argmax(np.fmax(np.abs(x), np.float32(0)), axis=0)
    extreme = np.take_along_axis(x, at[None], axis=0)[0]
    return np.where(np.abs(extreme) > 0, extreme, np.float32(0))


def row_mean_square(x: F32) -> F32:
    """Mean of the squares of each row of (rows, cols), summed left to right; shape (rows,)."""
    return sum_in_order(np.square(x).T) / np.float32(x.shape[1])


def search_symmetric(x: F32, weights: F32, nmax: int) -> tuple[F32, I32]:
    """Best scale for w = scale * (code - nmax) with codes 0..2*nmax-1, in weighted squared error.

    x and weights are (k, n); returns scale (n,) and codes (k, n). Nineteen scales around the one that maps
    the largest magnitude to -nmax are tried and the least-squares refit of the winner is returned, while its
    codes stay those of the trial (`ggml-quants.c` make_qx_quants with rmse_type 1).
    """
    extreme = first_extreme(x)
    wx = weights * x

    def trial(inverse: F32) -> tuple[I32, F32, F32]:
        codes = np.clip(nearest_int(inverse * x), -nmax, nmax - 1)
        level = codes.astype(np.float32)
        return codes, sum_in_order(wx * level), sum_in_order(weights * level * level)

    codes, sum_xl, sum_ll = trial(np.float32(-nmax) / extreme)
    scale = np.where(sum_ll != 0, sum_xl / sum_ll, np.float32(0))
    best = scale * sum_xl
    for step in (*range(-9, 0), *range(1, 10)):
        spread = np.float32(nmax) + np.float32(0.1) * np.float32(step)
        tried, sum_xl, sum_ll = trial(-spread / extreme)
        better = (sum_ll > 0) & (sum_xl * sum_xl > best * sum_ll)
        codes = np.where(better, tried, codes)
        scale = np.where(better, sum_xl / sum_ll, scale)
        best = np.where(better, scale * sum_xl, best)
    dead = np.abs(extreme) < ZERO_BLOCK
    return np.where(dead, np.float32(0), scale), np.where(dead, 0, codes + nmax).astype(np.int32)


def search_offset(
    x: F32, weights: F32, nmax: int, rmin: float, rdelta: float, nstep: int, absolute: bool = False
) -> tuple[F32, F32, I32]:
    """Best scale and minimum for w = scale * code + minimum with codes 0..nmax, in weighted squared or absolute error.

    x and weights are (k, n); returns scale (n,), minimum (n,) (never above zero; ggml calls its negative
    `the_min`) and codes (k, n). A winning trial replaces the minimum that the later trials start from
    (`ggml-quants.c` make_qkx2_quants and make_qkx3_quants; `absolute` is their use_mad).
    """
    minimum, maximum = x[0], x[0]
    for row in x[1:]:
        minimum = np.where(row < minimum, row, minimum)
        maximum = np.where(row > maximum, row, maximum)
    sum_w = np.add.accumulate(weights, axis=0)[-1]
    sum_x = np.add.accumulate(weights * x, axis=0)[-1]
    minimum = np.where(minimum > 0, np.float32(0), minimum)
    flat, flat_minimum = maximum <= minimum, minimum

    def assign(inverse: F32) -> tuple[I32, F32]:
        codes = np.clip(nearest_int(inverse * (x - minimum)), 0, nmax)
        return codes, codes.astype(np.float32)

    def error(scale: F32, low: F32, level: F32) -> F32:
        diff = scale * level + low - x
        return sum_in_order(weights * (np.abs(diff) if absolute else diff * diff))

    inverse = np.float32(nmax) / (maximum - minimum)
    scale = np.float32(1) / inverse
    codes, level = assign(inverse)
    best = error(scale, minimum, level)
    for step in range(nstep + 1):
        spread = np.float32(rmin) + np.float32(rdelta) * np.float32(step) + np.float32(nmax)
        tried, level = assign(spread / (maximum - minimum))
        wl = weights * level
        sum_l, sum_ll, sum_xl = sum_in_order(wl), sum_in_order(wl * level), sum_in_order(wl * x)
        det = sum_w * sum_ll - sum_l * sum_l
        new_scale = (sum_w * sum_xl - sum_x * sum_l) / det
        new_minimum = (sum_ll * sum_x - sum_l * sum_xl) / det
        positive = new_minimum > 0
        new_scale = np.where(positive, sum_xl / sum_ll, new_scale)
        new_minimum = np.where(positive, np.float32(0), new_minimum)
        new_error = error(new_scale, new_minimum, level)
        better = (det > 0) & (new_error < best)
        codes = np.where(better, tried, codes)
        best = np.where(better, new_error, best)
        scale = np.where(better, new_scale, scale)
        minimum = np.where(better, new_minimum, minimum)
    scale = np.where(flat, np.float32(0), scale)
    return scale, np.where(flat, flat_minimum, minimum), np.where(flat, 0, codes).astype(np.int32)


def descend(
    x: F32,
    weights: F32,
    codes: I32,
    sums: tuple[F32, F32],
    clip: Callable[[I32], I32],
    store: Callable[[I32], I32],
    check_before: bool,
) -> tuple[F32, I32]:
    """Least-squares scale (n,) after up to five passes that move one code (k, n) at a time while the fit improves.

    `clip` bounds a new code, `store` is what writing it to a byte makes of it (the coordinate descent of
    `ggml-quants.c` make_q3_quants, and of make_qp_quants with `check_before`).
    """
    sum_xl, sum_ll = sums
    codes = codes.copy()
    for _ in range(5):
        changed = False
        for i in range(len(x)):
            w, level = weights[i], codes[i].astype(np.float32)
            xl, ll = sum_xl - w * x[i] * level, sum_ll - w * level * level
            better = (xl > 0) & (ll > 0) if check_before else xl > 0
            new = clip(nearest_int(x[i] * ll / xl))
            better &= new != codes[i]
            level = new.astype(np.float32)
            xl, ll = xl + w * x[i] * level, ll + w * level * level
            if not check_before:
                better &= ll > 0
            better &= xl * xl * sum_ll > sum_xl * sum_xl * ll
            codes[i] = np.where(better, store(new), codes[i])
            sum_xl, sum_ll = np.where(better, xl, sum_xl), np.where(better, ll, sum_ll)
            changed |= bool(better.any())
        if not changed:
            break
    return np.where(sum_ll > 0, sum_xl / sum_ll, np.float32(0)), codes


def search_levels(values: F32, weights: F32, most: int) -> tuple[F32, I32]:
    """Step (n,) and levels (nsub, n) for values ~ step * level, in weighted squared error (make_qp_quants)."""
    top = np.zeros(values.shape[1], np.float32)
    for value in values:
        top = np.where(top > value, top, value)

    def error(scale: F32, level: I32) -> F32:
        diff = values - scale * level.astype(np.float32)
        return sum_in_order(weights * diff * diff)

    inverse = np.float32(most) / top
    best = error(np.float32(1) / inverse, nearest_int(inverse * values) & 255)
    for step in (*range(-4, 0), *range(1, 5)):
        tried = (np.float32(0.1) * np.float32(step) + np.float32(most)) / top
        new = error(np.float32(1) / tried, np.minimum(nearest_int(tried * values), most))
        better = new < best
        best, inverse = np.where(better, new, best), np.where(better, tried, inverse)
    codes = np.minimum(nearest_int(inverse * values), most)
    level = codes.astype(np.float32)
    sums = sum_in_order(weights * values * level), sum_in_order(weights * level * level)
    step_size, levels = descend(
        values,
        weights,
        codes & 255,
        sums,
        lambda c: np.minimum(c, most),
        lambda c: c & 255,
        check_before=True,
    )
    dead = top < ZERO_BLOCK
    return np.where(dead, np.float32(0), step_size), np.where(dead, 0, levels)
