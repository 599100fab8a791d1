"""Byte layouts of the K-quants: where codes, sub-scales and super-scales of a 256-value block lie.

From `ggml-common.h` block_q2_K .. block_q6_K and the readers in `ggml-quants.c` dequantize_row_q*_K.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from lconvert.kernels.reference.fields import U8

I32 = NDArray[np.int32]


class Plane(NamedTuple):
    """Bits `low`.. of every code: `bits` of them, `count` codes per byte, `width` bytes side by side.

    Byte l of a run of `width` bytes holds the codes l, l + width, l + 2*width... of its stretch of the super-block.
    """

    at: int
    nbytes: int
    width: int
    bits: int
    low: int

    def unpack(self, block: U8) -> U8:
        """Blocks (n, nbytes of the type) -> that part of the codes, (n, 256)."""
        runs = block[:, self.at : self.at + self.nbytes].reshape(len(block), -1, 1, self.width)
        parts = (runs >> self._shifts()) & np.uint8((1 << self.bits) - 1)
        return parts.reshape(len(block), 256) << np.uint8(self.low)

    def pack(self, codes: U8, block: U8) -> None:
        """Writes that part of codes (n, 256) into blocks (n, nbytes of the type)."""
        parts = (codes >> np.uint8(self.low)) & np.uint8((1 << self.bits) - 1)
        runs = parts.reshape(len(block), -1, 8 // self.bits, self.width) << self._shifts()
        block[:, self.at : self.at + self.nbytes] = np.bitwise_or.reduce(runs, axis=2).reshape(len(block), -1)

    def _shifts(self) -> U8:
        return np.arange(0, 8, self.bits, dtype=np.uint8)[:, None]


class Layout(NamedTuple):
    """Where the fields of a super-block lie. `zero` is the stored code of the value 0 in the symmetric types."""

    nbytes: int
    sub: int
    planes: tuple[Plane, ...]
    scales: slice
    d: int
    dmin: int | None
    zero: int = 0

    @property
    def nsub(self) -> int:
        return 256 // self.sub


LAYOUTS = {
    "Q2_K": Layout(84, 16, (Plane(16, 64, 32, 2, 0),), slice(0, 16), 80, 82),
    "Q3_K": Layout(110, 16, (Plane(32, 64, 32, 2, 0), Plane(0, 32, 32, 1, 2)), slice(96, 108), 108, None, 4),
    "Q4_K": Layout(144, 32, (Plane(16, 128, 32, 4, 0),), slice(4, 16), 0, 2),
    "Q5_K": Layout(176, 32, (Plane(48, 128, 32, 4, 0), Plane(16, 32, 32, 1, 4)), slice(4, 16), 0, 2),
    "Q6_K": Layout(
        210, 16, (Plane(0, 128, 64, 4, 0), Plane(128, 64, 32, 2, 4)), slice(192, 208), 208, None, 32
    ),
}


# ---- the packed scale fields: (n, bytes) <-> levels (n, nsub), and minima where the type has them ----


def pack_pairs(scale: I32, minimum: I32) -> U8:
    """Q2_K: scale in the low, minimum in the high half of a byte; an oversized scale spills over."""
    return ((scale | (minimum << 4)) & 255).astype(np.uint8)


def unpack_pairs(packed: U8) -> tuple[U8, U8]:
    return packed & np.uint8(15), packed >> np.uint8(4)


def pack_six_bits(scale: I32, minimum: I32) -> U8:
    """Q4_K, Q5_K: 8 scales and 8 minima of 6 bits in 12 bytes (`ggml-quants.c` get_scale_min_k4)."""
    top = np.concatenate(
        [scale[:, :4] | scale[:, 4:] >> 4 << 6, minimum[:, :4] | minimum[:, 4:] >> 4 << 6], axis=1
    )
    low = (scale[:, 4:] & 15) | (minimum[:, 4:] & 15) << 4
    return (np.concatenate([top, low], axis=1) & 255).astype(np.uint8)


def unpack_six_bits(packed: U8) -> tuple[U8, U8]:
    first, second, low = packed[:, :4], packed[:, 4:8], packed[:, 8:]
    mask, four, six = np.uint8(63), np.uint8(4), np.uint8(6)
    scale = np.concatenate([first & mask, (low & np.uint8(15)) | (first >> six) << four], axis=1)
    return scale, np.concatenate([second & mask, low >> four | (second >> six) << four], axis=1)


def pack_signed_six_bits(scale: I32) -> U8:
    """Q3_K: 16 levels 0..63 (value plus 32), low halves in 8 bytes, then the top pairs of bits in 4."""
    low = (scale[:, :8] & 15) | (scale[:, 8:] & 15) << 4
    top = np.bitwise_or.reduce((scale >> 4).reshape(-1, 4, 4) << np.arange(0, 8, 2)[:, None], axis=1)
    return np.concatenate([low, top], axis=1).astype(np.uint8)


def unpack_signed_six_bits(packed: U8) -> NDArray[np.int8]:
    low = np.concatenate([packed[:, :8] & np.uint8(15), packed[:, :8] >> np.uint8(4)], axis=1)
    top = (packed[:, None, 8:] >> np.arange(0, 8, 2, dtype=np.uint8)[:, None]) & np.uint8(3)
    level: NDArray[np.int8] = (low | top.reshape(-1, 16) << np.uint8(4)).astype(np.int8)
    return level - np.int8(32)


# ---- writing ----


def put_half(block: U8, at: int, bits: NDArray[np.uint16]) -> None:
    block[:, at : at + 2] = bits.astype("<u2")[:, None].view(np.uint8)


def put_codes(layout: Layout, block: U8, codes: NDArray[np.integer]) -> None:
    stored = (codes + layout.zero).astype(np.uint8).reshape(-1, 256)
    for plane in layout.planes:
        plane.pack(stored, block)
