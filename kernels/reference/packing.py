"""NumPy specification of how integer codes are packed into the words of quantized checkpoints.

Codes are unsigned here, uint8 in range, and shapes fit: `lconvert.kernels.packing` has checked that and adds the
offset of signed codes. Words are little-endian uint32, or their bytes.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

U8 = NDArray[np.uint8]
U32 = NDArray[np.uint32]

#: Column that nibble j of a word holds (AutoAWQ's gemm layout, `utils/packing_utils.py` AWQ_ORDER).
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)

_FOUR = np.uint8(4)
_LOW = np.uint8(15)


def words_for(cols: int, bits: int, stream: bool = True) -> int:
    """uint32 words of `cols` codes: a dense bit stream, or 32 // bits codes per word and the rest of it unused."""
    return -(-cols * bits // 32) if stream else -(-cols // (32 // bits))


def unpack_rows(words: U32, bits: int, cols: int, stream: bool) -> U8:
    """Words (rows, words_for(cols)) -> codes (rows, cols); code j is bits j*b.. of its row, low bit first."""
    if stream:
        fields = np.unpackbits(words.view(np.uint8), axis=1, count=cols * bits, bitorder="little")
        return np.packbits(fields.reshape(len(words), cols, bits), axis=2, bitorder="little")[:, :, 0]
    shifts = np.arange(32 // bits, dtype=np.uint32) * np.uint32(bits)
    codes = (words[:, :, None] >> shifts) & np.uint32((1 << bits) - 1)
    return codes.astype(np.uint8).reshape(len(words), words.shape[1] * len(shifts))[:, :cols]


def pack_rows(codes: U8, bits: int, stream: bool) -> U32:
    """The inverse of `unpack_rows`; unused bits are 0."""
    rows, cols = codes.shape
    width = words_for(cols, bits, stream)
    if stream:
        fields = np.unpackbits(codes[:, :, None], axis=2, count=bits, bitorder="little")
        packed = np.zeros((rows, 4 * width), np.uint8)
        dense = np.packbits(fields.reshape(rows, cols * bits), axis=1, bitorder="little")
        packed[:, : dense.shape[1]] = dense
        return packed.view(np.uint32)
    per_word = 32 // bits
    padded = np.zeros((rows, width * per_word), np.uint32)
    padded[:, :cols] = codes
    shifts = np.arange(per_word, dtype=np.uint32) * np.uint32(bits)
    words: U32 = np.bitwise_or.reduce(padded.reshape(rows, width, per_word) << shifts, axis=2)
    return words


def unpack_columns(words: U32, bits: int, cols: int) -> U8:
    """Words (words_for(cols), n), every column a dense bit stream -> codes (n, cols)."""
    return unpack_rows(np.ascontiguousarray(words.T), bits, cols, True)


def pack_columns(codes: U8, bits: int) -> U32:
    return np.ascontiguousarray(pack_rows(codes, bits, True).T)


def unpack_awq(words: U32) -> U8:
    """Words (k, n / 8) -> codes (n, k); nibble j of a word belongs to column 8*i + AWQ_ORDER[j]."""
    k, width = words.shape
    codes = np.empty((width, 8, k), np.uint8)
    for nibble, column in enumerate(AWQ_ORDER):
        codes[:, column] = ((words >> np.uint32(4 * nibble)) & np.uint32(15)).T
    return codes.reshape(8 * width, k)


def pack_awq(codes: U8) -> U32:
    n, k = codes.shape
    columns = codes.reshape(n // 8, 8, k).astype(np.uint32)
    words = np.zeros((n // 8, k), np.uint32)
    for nibble, column in enumerate(AWQ_ORDER):
        words |= columns[:, column] << np.uint32(4 * nibble)
    return np.ascontiguousarray(words.T)


def unpack_row_pairs(packed: U8) -> U8:
    """Bytes (n / 2, k) -> nibbles (n, k): row 2i in the low half of byte row i, row 2i + 1 in the high half."""
    rows, cols = packed.shape
    return np.stack([packed & _LOW, packed >> _FOUR], axis=1).reshape(2 * rows, cols)


def pack_row_pairs(codes: U8) -> U8:
    return codes[::2] | (codes[1::2] << _FOUR)


def unpack_nibbles(packed: U8, cols: int, high_first: bool) -> U8:
    """Bytes (rows, ceil(cols / 2)) -> codes (rows, cols): neighbours share a byte."""
    halves = [packed >> _FOUR, packed & _LOW] if high_first else [packed & _LOW, packed >> _FOUR]
    return np.stack(halves, axis=2).reshape(len(packed), 2 * packed.shape[1])[:, :cols]


def pack_nibbles(codes: U8, high_first: bool) -> U8:
    rows, cols = codes.shape
    padded = np.zeros((rows, -(-cols // 2) * 2), np.uint8)
    padded[:, :cols] = codes
    even, odd = padded[:, ::2], padded[:, 1::2]
    return (even << _FOUR) | odd if high_first else even | (odd << _FOUR)
