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
    codes = np.rint(np.divide(cut, s, out=np.zeros_like(cut), where=s > 0))
    if zero is not None:
        codes = codes + zero[..., None]
    return np.clip(codes, least, most).astype(np.int16).astype(np.int8).reshape(x.shape)
