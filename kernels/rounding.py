"""Rounding to integers in groups: the parts of round-to-nearest that touch every weight.

The compiled module does the work, `lconvert.kernels.reference.rounding` where it is missing or LCONVERT_ISA is "reference";
both give the same codes. The compiled functions release the GIL.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from lconvert.errors import InputError
from lconvert.kernels import native_module
from lconvert.kernels.reference import rounding as reference

F32 = NDArray[np.float32]


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
        finite = native.group_extent(x, group, low, high)
    if not finite:
        raise InputError("holds NaN or infinite values")
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
    native.round_groups(x, group, np.ascontiguousarray(scale, np.float32), zero, least, most, codes)
    return codes
