"""What the compiled rounding kernels compute, in NumPy: their specification and what runs where they are missing."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

F32 = NDArray[np.float32]


def group_extent(x: F32, group: int) -> tuple[F32, F32]:
    """Least and greatest value of every group of a row."""
    cut = x.reshape(x.shape[0], -1, group)
    return cut.min(-1), cut.max(-1)


def round_groups(x: F32, group: int, scale: F32, zero: F32 | None, least: int, most: int) -> NDArray[Any]:
    """clamp(rint(x / scale) + zero, least, most); a scale of 0 makes every quotient 0."""
    cut, s = x.reshape(x.shape[0], -1, group), scale[..., None]
    codes = np.rint(np.divide(cut, s, out=np.zeros_like(cut), where=s != 0))
    if zero is not None:
        codes = codes + zero[..., None]
    return np.clip(codes, least, most).astype(np.int16).astype(np.int8).reshape(x.shape)


def short_scale(s: F32, bits: int) -> F32:
    """Scales rounded to so many significant bits, to nearest, ties to even; 0 stays 0."""
    mantissa, exponent = np.frexp(s)
    out: F32 = np.ldexp(np.rint(np.ldexp(mantissa, bits)), exponent - bits).astype(np.float32)
    return out


def storable(s: F32) -> F32:
    """Scales below fp16's smallest normal number on multiples of 2^-24, which subnormal fp16 holds, and bf16 with their few bits."""
    unit, normal = np.float32(2.0**-24), np.float32(2.0**-14)
    return np.where(np.abs(s) < normal, np.rint(np.clip(s, -normal, normal) / unit) * unit, s)


def widest_scale(low: F32, high: F32, bits: int, signed: bool, signed_max: bool = False) -> F32:
    """The scale that covers a group from low to high, before it is shortened.

    signed_max: the one at which the value of the largest magnitude has the least code, -2^(bits - 1); below zero where it is positive.
    """
    if signed and signed_max:
        farthest = np.where(np.abs(low) < np.abs(high), high, low)
        mirrored: NDArray[Any] = farthest / np.float32(-(1 << (bits - 1)))
        return mirrored
    if signed:
        top = np.float32((1 << (bits - 1)) - 1)
        symmetric: NDArray[Any] = np.maximum(np.abs(low), np.abs(high)) / top
        return symmetric
    low, high = np.minimum(low, np.float32(0)), np.maximum(high, np.float32(0))
    asymmetric: NDArray[Any] = (high - low) / np.float32((1 << bits) - 1)
    return asymmetric


def zero_points(low: F32, scale: F32, bits: int) -> F32:
    """The code of 0 where the least value has code 0: clamp(rint(-min(low, 0) / scale), 0, 2^bits - 1)."""
    low = np.minimum(low, np.float32(0))
    quotient = np.divide(-low, scale, out=np.zeros_like(scale), where=scale > 0)
    return np.clip(np.rint(quotient), 0, (1 << bits) - 1)


def nearest_groups(
    x: F32, group: int, bits: int, signed: bool, signed_max: bool = False
) -> tuple[NDArray[Any], F32, F32 | None]:
    """Codes, scales and zero points by the extent of every group; scales have 8 significant bits, 7 beside zero points."""
    low, high = group_extent(x, group)
    scale = storable(short_scale(widest_scale(low, high, bits, signed, signed_max), 8 if signed else 7))
    if signed:
        scale = scale + np.float32(0)  # of a group of zeros: no -0
        top = (1 << (bits - 1)) - 1
        return round_groups(x, group, scale, None, -top - 1, top), scale, None
    zero = zero_points(low, scale, bits)
    return round_groups(x, group, scale, zero, 0, (1 << bits) - 1), scale, zero


def group_values(codes: NDArray[Any], group: int, scale: F32, zero: F32 | None) -> F32:
    """(codes - zero) * scale."""
    cut = codes.reshape(codes.shape[0], -1, group).astype(np.float32)
    if zero is not None:
        cut = cut - zero[..., None]
    return (cut * scale[..., None]).reshape(codes.shape)


def squares(x: F32, y: F32) -> tuple[float, float]:
    """Sums of (x - y)^2 and of x^2 in double precision."""
    wide = x.astype(np.float64)
    return float(np.square(wide - y).sum()), float(np.square(wide).sum())
