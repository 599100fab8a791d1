"""Rounding to integers in groups, and back: the parts of round-to-nearest that touch every weight.

The compiled module does the work, `lconvert.kernels.reference.rounding` where it is missing or LCONVERT_ISA is "reference";
both give the same codes. The compiled functions release the GIL.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from lconvert.errors import InputError
from lconvert.ir import as_f32
from lconvert.kernels import isa, native_module
from lconvert.kernels.reference import rounding as reference

F32 = NDArray[np.float32]
_NOT_FINITE = "holds NaN or infinite values"


def widened(x: NDArray[Any]) -> F32:
    """Values of an array in a storage type: float32, float16, or uint16, which is bfloat16."""
    return as_f32(x, "BF16" if x.dtype == np.uint16 else "F32")


def group_extent(x: F32, group: int) -> tuple[F32, F32]:
    """Least and greatest value of every group: x (rows, cols) to two arrays (rows, cols / group).

    Raises InputError for NaN and infinite values.
    """
    native = native_module()
    if native is None:
        low, high = reference.group_extent(x, group)
        finite = bool(np.isfinite(low).all() and np.isfinite(high).all())
    else:
        x = np.ascontiguousarray(x, np.float32)
        shape = (x.shape[0], x.shape[1] // group)
        low, high = np.empty(shape, np.float32), np.empty(shape, np.float32)
        finite = native.group_extent(isa(), x, group, low, high)
    if not finite:
        raise InputError(_NOT_FINITE)
    return low, high


def round_groups(x: F32, group: int, scale: F32, zero: F32 | None, least: int, most: int) -> NDArray[np.int8]:
    """clamp(rint(x / scale) + zero, least, most) with a scale and a zero point per group; quotients by a scale of 0 are 0.

    Codes above 127 wrap: their bytes are those of uint8.
    """
    native = native_module()
    if native is None:
        out: NDArray[np.int8] = reference.round_groups(x, group, scale, zero, least, most)
        return out
    x = np.ascontiguousarray(x, np.float32)
    codes = np.empty(x.shape, np.int8)
    zero = None if zero is None else np.ascontiguousarray(zero, np.float32)
    native.round_groups(isa(), x, group, np.ascontiguousarray(scale, np.float32), zero, least, most, codes)
    return codes


def nearest_groups(
    x: NDArray[Any], group: int, bits: int, signed: bool, signed_max: bool = False
) -> tuple[NDArray[np.int8], F32, NDArray[np.uint8] | None]:
    """x (rows, cols) in its storage type (uint16: bfloat16) to codes of `bits`, scales and zero points (rows, cols / group).

    signed_max: the value of the largest magnitude gets the least code (`reference.rounding.widest_scale`). Unsigned codes come as the bytes of int8. Raises InputError for NaN and infinities.
    """
    native = native_module()
    if native is None:
        wide = widened(x)
        group_extent(wide, group)
        found, scale, zeros = reference.nearest_groups(wide, group, bits, signed, signed_max)
        return found, scale, None if zeros is None else zeros.astype(np.uint8)
    x = np.ascontiguousarray(x)
    shape = (x.shape[0], x.shape[1] // group)
    codes, scale = np.empty(x.shape, np.int8), np.empty(shape, np.float32)
    zero = None if signed else np.empty(shape, np.uint8)
    if not native.nearest_groups(isa(), x, group, bits, signed_max, codes, scale, zero):
        raise InputError(_NOT_FINITE)
    return codes, scale, zero


def group_values(codes: NDArray[Any], group: int, scale: F32, zero: F32 | None) -> F32:
    """(codes - zero) * scale: codes (rows, cols) of int8 or uint8, a scale and a zero point per group."""
    native = native_module()
    if native is None:
        return reference.group_values(codes, group, scale, zero)
    codes = np.ascontiguousarray(codes)
    out = np.empty(codes.shape, np.float32)
    zero = None if zero is None else np.ascontiguousarray(zero, np.float32)
    signed = codes.dtype == np.int8
    native.group_values(
        isa(), codes.view(np.uint8), signed, group, np.ascontiguousarray(scale, np.float32), zero, out
    )
    return out


def squares(x: NDArray[Any], y: F32) -> tuple[float, float]:
    """Sums of (x - y)^2 and of x^2; x (rows, cols) in its storage type (uint16: bfloat16)."""
    native = native_module()
    if native is None or x.dtype not in (np.uint16, np.float16, np.float32):
        return reference.squares(widened(x), y)
    return native.squares(isa(), np.ascontiguousarray(x), np.ascontiguousarray(y))  # type: ignore[no-any-return]
