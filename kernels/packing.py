"""Pack integer codes into the words of quantized checkpoints, and unpack them.

The layouts of GPTQ (`unpack_columns`), AWQ (`unpack_awq`), compressed-tensors (`unpack_rows`), ModelOpt
(`unpack_row_pairs`) and of 4-bit floats and bitsandbytes (`unpack_nibbles`), each with its inverse. Words are
little-endian uint32; int32 and uint8 arrays of the same bytes are taken as well. Codes are uint8, or with
`signed=True` int8, stored as code + 2**(bits - 1) (offset binary). Unused bits are ignored and written as 0.

The compiled module does the work, `lconvert.kernels.reference.packing` where it is missing or LCONVERT_ISA is
"reference". The compiled functions release the GIL; threads may call all of them on disjoint rows. Wrong shapes and
codes out of range are InputErrors, wrong arguments OptionErrors.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from lconvert.errors import InputError, OptionError
from lconvert.kernels import native_module
from lconvert.kernels.reference import packing as reference
from lconvert.kernels.reference.packing import words_for

__all__ = [
    "pack_awq",
    "pack_columns",
    "pack_nibbles",
    "pack_row_pairs",
    "pack_rows",
    "unpack_awq",
    "unpack_columns",
    "unpack_nibbles",
    "unpack_row_pairs",
    "unpack_rows",
    "words_for",
]

Words = NDArray[np.uint32] | NDArray[np.int32] | NDArray[np.uint8]
U8 = NDArray[np.uint8]
U32 = NDArray[np.uint32]


def _checked_bits(bits: int) -> None:
    if not 1 <= bits <= 8:
        raise OptionError(f"codes take 1 to 8 bits, not {bits}")


def _word_bytes(words: Words) -> U8:
    """The bytes of a 2-dimensional array of words, contiguous, (rows, 4 * words)."""
    if words.dtype.name not in ("uint32", "int32", "uint8") or words.ndim != 2:
        raise InputError(f"packed words must be uint32 (rows, words), got {words.dtype} {words.shape}")
    packed = np.ascontiguousarray(words).view(np.uint8)
    if packed.shape[1] % 4:
        raise InputError(f"{packed.shape[1]} bytes per row are no whole 32-bit words")
    return packed


def _bytes_of(packed: U8) -> U8:
    if packed.dtype != np.uint8 or packed.ndim != 2:
        raise InputError(f"packed nibbles must be uint8 (rows, bytes), got {packed.dtype} {packed.shape}")
    return np.ascontiguousarray(packed)


def _as_words(packed: U8) -> U32:
    """Words of `_word_bytes`, for the reference: aligned, which the bytes of a mapped file need not be."""
    return np.require(packed.view(np.uint32), requirements=["ALIGNED"])


def _checked_codes(codes: NDArray[Any], signed: bool) -> U8:
    """The codes' bytes, contiguous."""
    wanted = np.dtype(np.int8 if signed else np.uint8)
    if codes.dtype != wanted or codes.ndim != 2:
        raise InputError(f"codes must be {wanted.name} (rows, columns), got {codes.dtype} {codes.shape}")
    return np.ascontiguousarray(codes).view(np.uint8)


def _offset(bits: int, signed: bool) -> int:
    return 1 << (bits - 1) if signed else 0


def _unsigned(codes: U8, bits: int, offset: int) -> U8:
    """Stored values of codes, for the reference. InputError for the first out of range."""
    stored = codes + np.uint8(offset) if offset else codes
    bad = stored >> np.uint8(bits) if bits < 8 else np.zeros(1, np.uint8)
    if bad.any():
        _refuse(codes, int((bad != 0).argmax()), bits, offset)
    return stored


def _refuse(codes: U8, flat: int, bits: int, offset: int) -> None:
    row, col = divmod(flat, codes.shape[1])
    value = int(codes.view(np.int8)[row, col] if offset else codes[row, col])
    raise InputError(
        f"code {value} at row {row}, column {col} does not fit {bits} bits ({-offset} to {(1 << bits) - 1 - offset})"
    )


def _finished(codes: U8, bits: int, offset: int) -> NDArray[Any]:
    """Codes of stored values, for the reference."""
    return (codes - np.uint8(offset)).view(np.int8) if offset else np.ascontiguousarray(codes)


def _like_codes(codes: U8, signed: bool) -> NDArray[Any]:
    return codes.view(np.int8) if signed else codes


def unpack_rows(
    words: Words, bits: int, cols: int, *, signed: bool = False, stream: bool = True
) -> NDArray[Any]:
    """Codes (rows, cols) of words (rows, words_for(cols, bits, stream)): code j of a row is its bits j*b onwards.

    compressed-tensors' weight_packed. `stream=False` puts 32 // bits codes into a word and wastes its rest, as
    0.17 does for 3, 5, 6 and 7 bits (`compressors/pack_quantized/helpers.py` pack_to_int32).
    """
    _checked_bits(bits)
    packed = _word_bytes(words)
    width = words_for(cols, bits, stream)
    if cols < 0 or packed.shape[1] != 4 * width:
        raise InputError(
            f"rows of {cols} codes of {bits} bits take {width} words, got {packed.shape[1] // 4}"
        )
    offset = _offset(bits, signed)
    native = native_module()
    if native is None:
        return _finished(reference.unpack_rows(_as_words(packed), bits, cols, stream), bits, offset)
    codes = np.empty((len(packed), cols), np.uint8)
    native.unpack_rows(packed, bits, stream, offset, codes)
    return _like_codes(codes, signed)


def pack_rows(codes: NDArray[Any], bits: int, *, signed: bool = False, stream: bool = True) -> U32:
    """Words (rows, words_for(cols, bits, stream)) of codes (rows, cols), the inverse of `unpack_rows`."""
    _checked_bits(bits)
    raw = _checked_codes(codes, signed)
    offset = _offset(bits, signed)
    native = native_module()
    if native is None:
        return reference.pack_rows(_unsigned(raw, bits, offset), bits, stream)
    words = np.empty((len(raw), words_for(raw.shape[1], bits, stream)), np.uint32)
    bad = native.pack_rows(raw, bits, stream, offset, words.view(np.uint8))
    if bad >= 0:
        _refuse(raw, bad, bits, offset)
    return words


def unpack_columns(
    words: Words, bits: int, cols: int, *, signed: bool = False, start: int = 0, stop: int | None = None
) -> NDArray[Any]:
    """Codes (stop - start, cols) of words (words_for(cols, bits), n): every column is a dense bit stream.

    GPTQ's qweight, packed along the input dimension, as rows start..stop of the weight (n, cols). GPTQ's 3-bit packing
    of 32 values into 3 words is this stream.
    """
    _checked_bits(bits)
    packed = _word_bytes(words)
    n = packed.shape[1] // 4
    stop = n if stop is None else stop
    if cols < 0 or len(packed) != words_for(cols, bits):
        raise InputError(
            f"columns of {cols} codes of {bits} bits take {words_for(cols, bits)} words, got {len(packed)}"
        )
    _checked_range(start, stop, n)
    offset = _offset(bits, signed)
    native = native_module()
    if native is None:
        codes = reference.unpack_columns(_as_words(packed)[:, start:stop], bits, cols)
        return _finished(codes, bits, offset)
    codes = np.empty((stop - start, cols), np.uint8)
    native.unpack_columns(packed, bits, offset, start, codes)
    return _like_codes(codes, signed)


def _checked_range(start: int, stop: int, n: int, what: str = "rows") -> None:
    if not 0 <= start <= stop <= n:
        raise OptionError(f"{what} {start} to {stop} are not within 0 to {n}")


def pack_columns(
    codes: NDArray[Any], bits: int, *, signed: bool = False, out: U32 | None = None, start: int = 0
) -> U32:
    """Words (words_for(cols), n) of codes (n, cols), the inverse of `unpack_columns`.

    With `out` (words_for(cols), all columns) the codes of a slab go to its columns start..start + n; threads may fill
    the slabs of one `out`.
    """
    _checked_bits(bits)
    raw = _checked_codes(codes, signed)
    offset = _offset(bits, signed)
    n, cols = raw.shape
    words = _checked_out(out, words_for(cols, bits), n, start)
    native = native_module()
    if native is None:
        words[:, start : start + n] = reference.pack_columns(_unsigned(raw, bits, offset), bits)
        return words
    bad = native.pack_columns(raw, bits, offset, start, words.view(np.uint8))
    if bad >= 0:
        _refuse(raw, bad, bits, offset)
    return words


def _checked_out(out: U32 | None, rows: int, n: int, start: int) -> U32:
    """`out`, or a new array, with room for columns start..start + n."""
    if out is None:
        out = np.empty((rows, n), np.uint32)
    if out.dtype != np.uint32 or out.ndim != 2 or len(out) != rows or not out.flags.c_contiguous:
        raise OptionError(
            f"out must be contiguous uint32 with {rows} rows of words, got {out.dtype} {out.shape}"
        )
    _checked_range(start, start + n, out.shape[1], "columns")
    return out


def unpack_awq(words: Words, start: int = 0, stop: int | None = None) -> U8:
    """Codes (stop - start, k) of AWQ's 4-bit words (k, n / 8), packed along the output dimension.

    Nibble j of a word holds column [0, 2, 4, 6, 1, 3, 5, 7][j] of its eight. `start` and `stop` are multiples of 8.
    """
    packed = _word_bytes(words)
    n = packed.shape[1] * 2
    stop = n if stop is None else stop
    _checked_range(start, stop, n)
    if start % 8 or stop % 8:
        raise OptionError(f"AWQ words hold 8 rows each; rows {start} to {stop} cut a word")
    native = native_module()
    if native is None:
        return reference.unpack_awq(_as_words(packed)[:, start // 8 : stop // 8])
    codes = np.empty((stop - start, len(packed)), np.uint8)
    native.unpack_awq(packed, start, codes)
    return codes


def pack_awq(codes: U8, *, out: U32 | None = None, start: int = 0) -> U32:
    """AWQ's words (k, n / 8) of codes (n, k) 0..15, the inverse of `unpack_awq`.

    With `out` (k, all rows / 8) the codes of a slab go to its words of rows start..start + n, multiples of 8.
    """
    raw = _checked_codes(codes, False)
    n, k = raw.shape
    if n % 8 or start % 8:
        raise InputError(f"AWQ words hold 8 rows each; {n} rows from row {start} cut a word")
    first = start // 8
    words = _checked_out(out, k, n // 8, first)
    native = native_module()
    if native is None:
        words[:, first : first + n // 8] = reference.pack_awq(_unsigned(raw, 4, 0))
        return words
    bad = native.pack_awq(raw, start, words.view(np.uint8))
    if bad >= 0:
        _refuse(raw, bad, 4, 0)
    return words


def unpack_row_pairs(packed: U8) -> NDArray[np.int8]:
    """Codes int8 (n, k) of bytes (n / 2, k): row 2i is the low nibble of byte row i, row 2i + 1 the high one.

    ModelOpt's W4A16_AWQ weight: two's complement int4, -8 to 7.
    """
    raw = _bytes_of(packed)
    native = native_module()
    if native is None:
        eight = np.uint8(8)
        return ((reference.unpack_row_pairs(raw) ^ eight) - eight).view(np.int8)
    codes = np.empty((2 * len(raw), raw.shape[1]), np.int8)
    native.unpack_row_pairs(raw, codes.view(np.uint8))
    return codes


def pack_row_pairs(codes: NDArray[np.int8]) -> U8:
    """Bytes (n / 2, k) of codes int8 (n, k) -8..7, the inverse of `unpack_row_pairs`."""
    raw = _checked_codes(codes, True)
    n, k = raw.shape
    if n % 2:
        raise InputError(f"two rows share a byte; {n} rows do not divide evenly")
    native = native_module()
    if native is None:
        return reference.pack_row_pairs(_unsigned(raw, 4, 8) ^ np.uint8(8))
    packed = np.empty((n // 2, k), np.uint8)
    bad = native.pack_row_pairs(raw, packed)
    if bad >= 0:
        _refuse(raw, bad, 4, 8)
    return packed


def unpack_nibbles(packed: U8, cols: int | None = None, *, high_first: bool = False) -> U8:
    """Codes 0..15 (rows, cols) of bytes (rows, ceil(cols / 2)), two neighbours per byte.

    The first of the two is the low nibble (NVFP4 and MXFP4 of compressed-tensors and ModelOpt), or with `high_first`
    the high one (bitsandbytes). Without `cols` every nibble is a code.
    """
    raw = _bytes_of(packed)
    cols = 2 * raw.shape[1] if cols is None else cols
    if cols < 0 or raw.shape[1] != -(-cols // 2):
        raise InputError(f"rows of {cols} nibbles take {-(-cols // 2)} bytes, got {raw.shape[1]}")
    native = native_module()
    if native is None:
        return np.ascontiguousarray(reference.unpack_nibbles(raw, cols, high_first))
    codes = np.empty((len(raw), cols), np.uint8)
    native.unpack_nibbles(raw, high_first, codes)
    return codes


def pack_nibbles(codes: U8, *, high_first: bool = False) -> U8:
    """Bytes (rows, ceil(cols / 2)) of codes 0..15 (rows, cols), the inverse of `unpack_nibbles`."""
    raw = _checked_codes(codes, False)
    native = native_module()
    if native is None:
        return reference.pack_nibbles(_unsigned(raw, 4, 0), high_first)
    packed = np.empty((len(raw), -(-raw.shape[1] // 2)), np.uint8)
    bad = native.pack_nibbles(raw, high_first, packed)
    if bad >= 0:
        _refuse(raw, bad, 4, 0)
    return packed
