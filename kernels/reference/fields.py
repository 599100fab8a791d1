"""Byte fields that several block layouts share: float16 scales and pairs of 4-bit codes."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

U8 = NDArray[np.uint8]
F16 = NDArray[np.float16]

_FOUR = np.uint8(4)
_LOW = np.uint8(15)


def pack_nibbles(codes: U8) -> U8:
    """Codes 0..15 (n, 2h) -> bytes (n, h): code j in the low half of byte j, code j + h in the high half."""
    half = codes.shape[1] // 2
    return codes[:, :half] | (codes[:, half:] << _FOUR)


def unpack_nibbles(packed: U8) -> U8:
    """Bytes (n, h) -> codes (n, 2h), the inverse of `pack_nibbles`."""
    return np.concatenate([packed & _LOW, packed >> _FOUR], axis=1)


def half_bytes(values: NDArray[Any]) -> U8:
    """Any number of floats -> float16 bytes (n, 2); float16 input keeps its bits, float32 rounds to nearest even."""
    return np.ascontiguousarray(values, dtype=np.float16).reshape(-1, 1).view(np.uint8)


def half_values(field: U8) -> F16:
    """Bytes (n, 2) -> float16 (n,), bits kept."""
    return np.ascontiguousarray(field).view(np.float16)[:, 0]
