"""NumPy specification of IQ1, IQ2 and IQ3: groups of 4 or 8 values snapped to a point of a lattice.

256 values share a float16 scale d; sub-blocks have small integer scales; groups of values store the index of a
lattice point (`iq_tables`) and, apart from it, their signs. w = VALUES[code] * (SCALE_VALUES[scale] * d), for IQ1
w = (VALUES[code] - zero) * (SCALE_VALUES[scale] * d), every product exact in float32.

Parts of `unpack`, for n rows:
  codes        (n, cols) uint8, index into VALUES[type]
  scale        (n, cols / SUB[type]) uint8, index into SCALE_VALUES[type]
  super_scale  (n, cols / 256) float16
  zero         IQ1 only, (n, cols / SUB[type]) float16, +-0.125
An IQ1_M scale covers 16 values, its zero 8; SUB is 8 and the scale comes twice.

`pack(unpack(b)) == b` for every byte string: no encoding is redundant. The other way round not every code is
storable, see `pack`. Layouts: `ggml-common.h` block_iq*; the searches are in `iq_search`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lconvert.errors import InputError
from lconvert.kernels.blocks import BLOCKS
from lconvert.kernels.reference.iq_search import SEARCH
from lconvert.kernels.reference.iq_tables import lattice

F32 = NDArray[np.float32]
U8 = NDArray[np.uint8]
I32 = NDArray[np.int32]


@dataclass(frozen=True)
class Fields:
    """The integers in n blocks, int32 but for d.

    d: float16 (n,). index: lattice point of every group (n, 256 / group size). scale: (n, 256 / its sub-block).
    sign: one byte for 8 values, bit set = negative (n, 32); IQ1: shift downwards (1) or upwards (0), per 32 values
    (IQ1_S) or per 8 (IQ1_M).
    """

    d: NDArray[np.float16]
    index: I32
    sign: I32
    scale: I32


# ---- layouts ----

# Sign bytes with an even number of set bits, by their low seven bits (`ggml-common.h` ksigns_iq2xs).
_EVEN = np.array([s | (s.bit_count() & 1) << 7 for s in range(128)], np.int32)


def _ints(blocks: U8, start: int, stop: int, dtype: str = "u1") -> I32:
    """Bytes start..stop of every block as little-endian integers, (n, count)."""
    return (
        np.ascontiguousarray(blocks[:, start:stop])
        .view(dtype)
        .view(dtype.replace("u4", "i4"))
        .astype(np.int32)
    )


def _bytes(values: I32, dtype: str = "u1") -> U8:
    return np.ascontiguousarray(values.astype(dtype)).view(np.uint8)


def _half(blocks: U8) -> NDArray[np.float16]:
    return np.ascontiguousarray(blocks[:, :2]).view(np.float16)[:, 0]


def _spread(values: I32, width: int, count: int) -> I32:
    """The `count` lowest digits of `width` bits of (n, k) integers: (n, k * count)."""
    digits = (values[:, :, None] >> width * np.arange(count, dtype=np.int32)) & ((1 << width) - 1)
    return digits.reshape(len(values), -1)


def _gather(digits: I32, width: int, count: int) -> I32:
    """Inverse of _spread."""
    shifted = digits.reshape(len(digits), -1, count) << width * np.arange(count, dtype=np.int32)
    combined: I32 = np.bitwise_or.reduce(shifted, axis=2)
    return combined


def _join(d: NDArray[np.float16], *parts: U8) -> U8:
    return np.concatenate([d[:, None].view(np.uint8), *parts], axis=1)


def _split_iq2_xxs(b: U8) -> Fields:
    words = _ints(b, 2, 66, "<u4")
    low, high = words[:, 0::2], words[:, 1::2]
    return Fields(_half(b), _spread(low, 8, 4), _EVEN[_spread(high, 7, 4)], _spread(high >> 28, 4, 1))


def _join_iq2_xxs(f: Fields) -> U8:
    low = _gather(f.index, 8, 4)
    high = _gather(f.sign & 127, 7, 4) | f.scale << 28
    return _join(f.d, _bytes(np.stack([low, high], axis=2).reshape(len(low), -1), "<i4"))


def _split_iq2_xs(b: U8) -> Fields:
    words = _ints(b, 2, 66, "<u2")
    return Fields(_half(b), words & 511, _EVEN[words >> 9], _spread(_ints(b, 66, 74), 4, 2))


def _join_iq2_xs(f: Fields) -> U8:
    return _join(f.d, _bytes(f.index | (f.sign & 127) << 9, "<u2"), _bytes(_gather(f.scale, 4, 2)))


def _split_iq2_s(b: U8) -> Fields:
    index = _ints(b, 2, 34) | _spread(_ints(b, 66, 74), 2, 4) << 8
    return Fields(_half(b), index, _ints(b, 34, 66), _spread(_ints(b, 74, 82), 4, 2))


def _join_iq2_s(f: Fields) -> U8:
    high, scale = _gather(f.index >> 8, 2, 4), _gather(f.scale, 4, 2)
    return _join(f.d, _bytes(f.index & 255), _bytes(f.sign), _bytes(high), _bytes(scale))


def _split_iq3_xxs(b: U8) -> Fields:
    words = _ints(b, 66, 98, "<u4")
    return Fields(_half(b), _ints(b, 2, 66), _EVEN[_spread(words, 7, 4)], _spread(words >> 28, 4, 1))


def _join_iq3_xxs(f: Fields) -> U8:
    words = _gather(f.sign & 127, 7, 4) | f.scale << 28
    return _join(f.d, _bytes(f.index), _bytes(words, "<i4"))


def _split_iq3_s(b: U8) -> Fields:
    index = _ints(b, 2, 66) | _spread(_ints(b, 66, 74), 1, 8) << 8
    return Fields(_half(b), index, _ints(b, 74, 106), _spread(_ints(b, 106, 110), 4, 2))


def _join_iq3_s(f: Fields) -> U8:
    high, scale = _gather(f.index >> 8, 1, 8), _gather(f.scale, 4, 2)
    return _join(f.d, _bytes(f.index & 255), _bytes(high), _bytes(f.sign), _bytes(scale))


def _split_iq1_s(b: U8) -> Fields:
    words = _ints(b, 34, 50, "<u2")
    return Fields(_half(b), _ints(b, 2, 34) | _spread(words, 3, 4) << 8, words >> 15, words >> 12 & 7)


def _join_iq1_s(f: Fields) -> U8:
    words = _gather(f.index >> 8, 3, 4) | f.scale << 12 | f.sign << 15
    return _join(f.d, _bytes(f.index & 255), _bytes(words, "<u2"))


def _split_iq1_m(b: U8) -> Fields:
    """d is spread over the top nibbles of the four words that hold the scales."""
    nibbles, words = _spread(_ints(b, 32, 48), 4, 2), _ints(b, 48, 56, "<u2")
    d = _gather(words >> 12, 4, 4).astype(np.uint16).view(np.float16)[:, 0]
    return Fields(d, _ints(b, 0, 32) | (nibbles & 7) << 8, nibbles >> 3, _spread(words, 3, 4))


def _join_iq1_m(f: Fields) -> U8:
    d = _spread(f.d.view(np.uint16)[:, None].astype(np.int32), 4, 4)
    words = _gather(f.scale, 3, 4) | d << 12
    high = _gather(f.index >> 8 | f.sign << 3, 4, 2)
    return np.concatenate([_bytes(f.index & 255), _bytes(high), _bytes(words, "<u2")], axis=1)


# ---- values ----

_IQ2_MAGNITUDES = (8, 25, 43)  # ggml-common.h iq2*_grid
_IQ3_XXS_MAGNITUDES = (4, 12, 20, 28, 36, 44, 52, 62)  # iq3xxs_grid
_IQ3_S_MAGNITUDES = (1, 3, 5, 7, 9, 11, 13, 15)  # iq3s_grid
_SHIFT = np.float16(0.125)  # IQ1S_DELTA, IQ1M_DELTA


def _signed(magnitudes: tuple[int, ...]) -> tuple[float, ...]:
    """Ascending: the code of level k is half + k, or half - 1 - k if negative."""
    return (*(-float(m) for m in reversed(magnitudes)), *map(float, magnitudes))


VALUES: dict[str, tuple[float, ...]] = {
    "IQ2_XXS": _signed(_IQ2_MAGNITUDES),
    "IQ2_XS": _signed(_IQ2_MAGNITUDES),
    "IQ2_S": _signed(_IQ2_MAGNITUDES),
    "IQ3_XXS": _signed(_IQ3_XXS_MAGNITUDES),
    "IQ3_S": _signed(_IQ3_S_MAGNITUDES),
    "IQ1_S": (-1.0, 0.0, 1.0),
    "IQ1_M": (-1.0, 0.0, 1.0),
}

SCALE_VALUES: dict[str, tuple[float, ...]] = {
    **dict.fromkeys(("IQ2_XXS", "IQ2_XS", "IQ2_S"), tuple((0.5 + k) * 0.25 for k in range(16))),
    "IQ3_XXS": tuple((0.5 + k) * 0.5 for k in range(16)),
    "IQ3_S": tuple(1.0 + 2 * k for k in range(16)),
    **dict.fromkeys(("IQ1_S", "IQ1_M"), tuple(1.0 + 2 * k for k in range(8))),
}

SUB: dict[str, int] = {
    "IQ2_XXS": 32,
    "IQ2_XS": 16,
    "IQ2_S": 16,
    "IQ3_XXS": 32,
    "IQ3_S": 32,
    "IQ1_S": 32,
    "IQ1_M": 8,
}


@dataclass(frozen=True)
class _Layout:
    split: Callable[[U8], Fields]
    join: Callable[[Fields], U8]
    even_signs: bool = False  # the eighth sign of a group is the parity of the others
    shifted: bool = False  # IQ1


_LAYOUTS: dict[str, _Layout] = {
    "IQ2_XXS": _Layout(_split_iq2_xxs, _join_iq2_xxs, even_signs=True),
    "IQ2_XS": _Layout(_split_iq2_xs, _join_iq2_xs, even_signs=True),
    "IQ2_S": _Layout(_split_iq2_s, _join_iq2_s),
    "IQ3_XXS": _Layout(_split_iq3_xxs, _join_iq3_xxs, even_signs=True),
    "IQ3_S": _Layout(_split_iq3_s, _join_iq3_s),
    "IQ1_S": _Layout(_split_iq1_s, _join_iq1_s, shifted=True),
    "IQ1_M": _Layout(_split_iq1_m, _join_iq1_m, shifted=True),
}


def unpack(type: str, blocks: U8) -> dict[str, NDArray[Any]]:
    """The parts of `blocks` (n, row_bytes), see the module docstring."""
    rows, layout, grid = len(blocks), _LAYOUTS[type], lattice(type)
    f = layout.split(np.ascontiguousarray(blocks).reshape(-1, BLOCKS[type].nbytes))
    levels = grid.digits(grid.points[f.index]).reshape(-1, 256)
    per_sub = 256 // SUB[type]
    parts: dict[str, NDArray[Any]] = {}
    if layout.shifted:
        codes = levels
        parts["zero"] = np.where(f.sign, _SHIFT, -_SHIFT).reshape(rows, -1)
    else:
        codes = np.where(_spread(f.sign, 1, 8), grid.levels - 1 - levels, grid.levels + levels)
    scale = np.repeat(f.scale, per_sub // f.scale.shape[1], axis=1)
    return {
        "codes": codes.astype(np.uint8).reshape(rows, -1),
        "scale": scale.astype(np.uint8).reshape(rows, -1),
        "super_scale": f.d.reshape(rows, -1),
        **parts,
    }


def pack(type: str, parts: Mapping[str, NDArray[Any]]) -> U8:
    """Blocks (n, row_bytes) of parts as `unpack` gives them.

    Raises InputError, with row and column, where a group of 8 (IQ3: 4) codes is no lattice point, where 8 values of
    IQ2_XXS, IQ2_XS or IQ3_XXS have an odd number of negative ones, where two neighbouring IQ1_M scales that are
    stored once differ, or where a part is out of range.
    """
    layout, grid = _LAYOUTS[type], lattice(type)
    rows, cols = parts["codes"].shape
    codes = parts["codes"].astype(np.int32).reshape(-1, 256)
    _refuse(type, cols, codes >= len(VALUES[type]), f"is no code below {len(VALUES[type])}")
    if layout.shifted:
        levels = codes
        zero = parts["zero"].reshape(len(codes), -1)
        _refuse(type, cols, np.abs(zero) != _SHIFT, "has a zero that is neither 0.125 nor -0.125")
        sign = (zero > 0).astype(np.int32)
    else:
        negative = codes < grid.levels
        levels = np.where(negative, grid.levels - 1 - codes, codes - grid.levels)
        sign = _gather(negative.astype(np.int32), 1, 8)
        if layout.even_signs:
            _refuse(
                type, cols, sign != _EVEN[sign & 127], "starts 8 values with an odd number of negative ones"
            )
    index = grid.index[grid.codes(levels.reshape(len(codes), -1, grid.size))]
    _refuse(type, cols, index < 0, f"starts {grid.size} codes that are no point of the lattice")
    scale = parts["scale"].astype(np.int32).reshape(len(codes), -1)
    _refuse(type, cols, scale >= len(SCALE_VALUES[type]), f"has a scale not below {len(SCALE_VALUES[type])}")
    if type == "IQ1_M":
        _refuse(type, cols, scale[:, 0::2] != scale[:, 1::2], "starts 16 values with two scales")
        scale = scale[:, 0::2]
    d = np.ascontiguousarray(parts["super_scale"], np.float16).reshape(-1)
    return layout.join(Fields(d, index, sign, scale)).reshape(rows, -1)


def _refuse(type: str, cols: int, bad: NDArray[np.bool_], what: str) -> None:
    """InputError naming the first set element of `bad` (blocks, parts of a block)."""
    if bad.any():
        block, part = divmod(int(bad.argmax()), bad.shape[1])
        row, column = divmod(block * 256 + part * (256 // bad.shape[1]), cols)
        raise InputError(
            f"row {row}, column {column} {what}; {type} cannot store it, quantize the values instead"
        )


@np.errstate(all="ignore")
def dequantize(type: str, blocks: U8, cols: int) -> F32:
    """Values (n, cols) of `blocks` (n, row_bytes)."""
    parts = unpack(type, blocks)
    values = np.array(VALUES[type], np.float32)[parts["codes"]].reshape(-1, SUB[type])
    if "zero" in parts:
        values = values - parts["zero"].astype(np.float32).reshape(-1, 1)
    scales = np.array(SCALE_VALUES[type], np.float32)[parts["scale"]].reshape(-1, 256 // SUB[type])
    step = scales * parts["super_scale"].astype(np.float32).reshape(-1, 1)
    product: F32 = values * step.reshape(-1, 1)
    return product.reshape(len(blocks), cols)


def quantize(type: str, x: F32, weights: F32 | None = None) -> U8:
    """Blocks (n, row_bytes) of x (n, cols); `weights` (cols,) may be missing for IQ1_M, IQ2_S and IQ3."""
    blocks = np.ascontiguousarray(x).reshape(-1, 256)
    importance = None if weights is None else np.tile(weights.reshape(-1, 256), (len(x), 1))
    d, index, sign, scale = SEARCH[type](blocks, importance)
    return _LAYOUTS[type].join(Fields(d, index, sign, scale)).reshape(len(x), -1)


QUANTIZE = {t: partial(quantize, t) for t in _LAYOUTS}
DEQUANTIZE = {t: partial(dequantize, t) for t in _LAYOUTS}
UNPACK = {t: partial(unpack, t) for t in _LAYOUTS}
PACK = {t: partial(pack, t) for t in _LAYOUTS}
