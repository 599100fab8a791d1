"""Transposition of matrices that arrive in slabs of rows: numbers, and codes that are packed on the way.

A slab (n, k) becomes columns start .. start + n of `out` (k, N). The compiled functions work in tiles and release the GIL.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from lconvert.kernels import native_module
from lconvert.kernels.rounding import widened


def transpose_rows(rows: NDArray[Any], out: NDArray[Any], start: int) -> None:
    """out[:, start : start + n] = rows.T. Rows of uint16 to an `out` of float32 are bfloat16."""
    native = native_module()
    wider = rows.dtype == np.uint16 and out.dtype == np.float32
    if native is not None and (wider or rows.dtype.itemsize == out.dtype.itemsize <= 4):
        same = np.ascontiguousarray(rows)
        same = same if wider else same.view(f"u{same.dtype.itemsize}")
        native.transpose_rows(same, out.view(f"u{out.dtype.itemsize}"), start)
        return
    target = out[:, start : start + rows.shape[0]]
    target[...] = (widened(rows) if wider else rows).T


def pack_transposed(codes: NDArray[Any], bits: int, out: NDArray[np.uint8], start: int) -> None:
    """Columns of codes of 2, 4 or 8 bits as rows of `out`, packed, the first in the low bits; start: of codes, whole bytes."""
    per = 8 // bits
    if bits == 8:
        transpose_rows(codes.view(np.uint8), out, start)
        return
    native = native_module()
    if native is not None:
        native.pack_transposed(np.ascontiguousarray(codes).view(np.uint8), bits, out, start // per)
        return
    u = codes.T.view(np.uint8) if codes.dtype.itemsize == 1 else codes.T.astype(np.uint8)
    u = u & np.uint8((1 << bits) - 1)
    target = out[:, start // per : (start + codes.shape[0]) // per]
    target[...] = u[:, ::per]
    for i in range(1, per):
        target |= u[:, i::per] << np.uint8(i * bits)
