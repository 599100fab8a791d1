"""NumPy specification of the one-level types Q4_0, Q4_1, Q5_0, Q5_1 and Q8_0: 32 values share a float16 scale.

Stored values: Q4_0 and Q5_0 d*(q - 8) and d*(q - 16), Q4_1 and Q5_1 d*q + m, Q8_0 d*q. Byte-identical to
`ggml_quantize_chunk` on x86-64 for finite input (`ggml-quants.c` quantize_row_q4_0_ref and its siblings;
with an importance matrix quantize_row_q4_0_impl). ggml truncates without a range check; a scale below 2**-128,
whose reciprocal overflows, makes that undefined in C. Here such codes become 0, as x86-64 builds give.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from lconvert.kernels.reference.fields import F16, U8, half_bytes, half_values, pack_nibbles, unpack_nibbles
from lconvert.kernels.reference.search import (
    F32,
    I32,
    first_extreme,
    row_mean_square,
    search_offset,
    search_symmetric,
)


class _Layout(NamedTuple):
    """Block of 32: float16 d, float16 m if `offset`, 4 bytes of fifth bits if `bits` is 5, 16 bytes of nibbles."""

    bits: int
    offset: bool

    @property
    def zero(self) -> int:
        """The code that stands for 0 in the types without an offset."""
        return 0 if self.offset else 1 << (self.bits - 1)

    @property
    def header(self) -> int:
        return 4 if self.offset else 2


_LAYOUTS = {
    "Q4_0": _Layout(4, False),
    "Q4_1": _Layout(4, True),
    "Q5_0": _Layout(5, False),
    "Q5_1": _Layout(5, True),
}


def _truncate(x: F32) -> I32:
    """Toward zero; infinities and NaN become 0."""
    return np.where(np.isfinite(x), x, np.float32(0)).astype(np.int32)


def _reciprocal(d: F32) -> F32:
    return np.where(d != 0, np.float32(1) / d, np.float32(0))


def _round_symmetric(x: F32, zero: int) -> tuple[F32, I32]:
    """The value of largest magnitude maps to code 0, i.e. to -zero. x (32, n)."""
    d = first_extreme(x) / np.float32(-zero)
    codes = _truncate(x * _reciprocal(d) + np.float32(zero + 0.5))
    return d, np.minimum(codes, 2 * zero - 1)


def _round_offset(x: F32, nmax: int) -> tuple[F32, F32, I32]:
    """Minimum and maximum map to codes 0 and nmax. x (32, n)."""
    minimum, maximum = x[0], x[0]
    for row in x[1:]:  # not np.minimum: of +0 and -0 the first one must stay
        minimum = np.where(row < minimum, row, minimum)
        maximum = np.where(row > maximum, row, maximum)
    d = (maximum - minimum) / np.float32(nmax)
    codes = _truncate((x - minimum) * _reciprocal(d) + np.float32(0.5))
    return d, minimum, np.minimum(codes, nmax)


def _importance(x: F32, weights: F32) -> F32:
    """Weight of each element, (rows, cols): the imatrix entry times sqrt(row mean square + x^2)."""
    return weights * np.sqrt(row_mean_square(x)[:, None] + np.square(x))


def _pack_codes(codes: U8, bits: int) -> list[U8]:
    """Codes (n, 32) -> the byte columns that follow d and m: for 5 bits the fifth bits first."""
    nibbles = pack_nibbles(codes & np.uint8(15))
    return [nibbles] if bits == 4 else [np.packbits(codes >> np.uint8(4), axis=1, bitorder="little"), nibbles]


def _unpack_codes(body: U8, bits: int) -> U8:
    codes = unpack_nibbles(body[:, -16:])
    if bits == 4:
        return codes
    return codes | (np.unpackbits(body[:, :4], axis=1, bitorder="little") << np.uint8(4))


@np.errstate(all="ignore")
def _quantize(name: str, x: F32, weights: F32 | None) -> U8:
    layout = _LAYOUTS[name]
    nmax = (1 << layout.bits) - 1
    xt = np.ascontiguousarray(x.reshape(-1, 32).T)
    if weights is not None:
        wt = np.ascontiguousarray(_importance(x, weights).reshape(-1, 32).T)
    if layout.offset:
        if weights is None:
            d, m, codes = _round_offset(xt, nmax)
        else:
            d, m, codes = search_offset(xt, wt, nmax, -0.9, 0.05, 36)
        header = [half_bytes(d), half_bytes(m)]
    else:
        if weights is None:
            d, codes = _round_symmetric(xt, layout.zero)
        else:
            d, codes = search_symmetric(xt, wt, layout.zero)
        header = [half_bytes(d)]
    blocks = np.concatenate([*header, *_pack_codes(codes.T.astype(np.uint8), layout.bits)], axis=1)
    return blocks.reshape(len(x), -1)


def _split(name: str, blocks: U8) -> tuple[F16, F16 | None, U8]:
    """d (n,), m (n,) or None, and codes (n, 32)."""
    layout = _LAYOUTS[name]
    flat = blocks.reshape(-1, layout.header + 4 * (layout.bits == 5) + 16)
    m = half_values(flat[:, 2:4]) if layout.offset else None
    return half_values(flat[:, :2]), m, _unpack_codes(flat[:, layout.header :], layout.bits)


def _negated(values: F16) -> F16:
    """Sign bit inverted, of NaN and zero too."""
    return (values.view(np.uint16) ^ np.uint16(0x8000)).view(np.float16)


@np.errstate(invalid="ignore")
def _dequantize(name: str, blocks: U8, cols: int) -> F32:
    d, m, codes = _split(name, blocks)
    level = codes.astype(np.float32) - np.float32(_LAYOUTS[name].zero)
    y = level * d.astype(np.float32)[:, None]
    if m is not None:
        y = y + m.astype(np.float32)[:, None]
    return y.reshape(len(blocks), cols)


def _unpack(name: str, blocks: U8) -> dict[str, NDArray[np.generic]]:
    d, m, codes = _split(name, blocks)
    rows = len(blocks)
    if m is None:
        signed = codes.astype(np.int8) - np.int8(_LAYOUTS[name].zero)
        return {"codes": signed.reshape(rows, -1), "scale": d.reshape(rows, -1)}
    return {
        "codes": codes.reshape(rows, -1),
        "scale": d.reshape(rows, -1),
        "offset": _negated(m).reshape(rows, -1),
    }


def _pack(name: str, parts: Mapping[str, NDArray[np.generic]]) -> U8:
    layout = _LAYOUTS[name]
    codes = (parts["codes"].astype(np.int16) + layout.zero).astype(np.uint8).reshape(-1, 32)
    header = [half_bytes(parts["scale"])]
    if layout.offset:
        header.append(half_bytes(_negated(np.ascontiguousarray(parts["offset"], np.float16))))
    blocks = np.concatenate([*header, *_pack_codes(codes, layout.bits)], axis=1)
    return blocks.reshape(len(parts["codes"]), -1)


def _round_half_away(x: F32) -> F32:
    whole = np.trunc(x)
    return whole + np.where(
        np.abs(x - whole) >= np.float32(0.5), np.copysign(np.float32(1), x), np.float32(0)
    )


@np.errstate(all="ignore")
def quantize_q8_0(x: F32, weights: F32 | None = None) -> U8:
    """Largest magnitude over 127, codes rounded half away from zero; the importance matrix is not used."""
    xb = x.reshape(-1, 32)
    d = np.max(np.abs(xb), axis=1) / np.float32(127)
    codes = _truncate(_round_half_away(xb * _reciprocal(d)[:, None])).astype(np.int8)
    return np.concatenate([half_bytes(d), codes.view(np.uint8)], axis=1).reshape(len(x), -1)


def unpack_q8_0(blocks: U8) -> dict[str, NDArray[np.generic]]:
    flat, rows = blocks.reshape(-1, 34), len(blocks)
    codes = flat[:, 2:].astype(np.int8)
    return {"codes": codes.reshape(rows, -1), "scale": half_values(flat[:, :2]).reshape(rows, -1)}


def pack_q8_0(parts: Mapping[str, NDArray[np.generic]]) -> U8:
    codes = parts["codes"].astype(np.int8).reshape(-1, 32).view(np.uint8)
    return np.concatenate([half_bytes(parts["scale"]), codes], axis=1).reshape(len(parts["codes"]), -1)


@np.errstate(invalid="ignore")
def dequantize_q8_0(blocks: U8, cols: int) -> F32:
    parts = unpack_q8_0(blocks)
    codes = parts["codes"].astype(np.float32).reshape(-1, 32)
    y: F32 = codes * parts["scale"].astype(np.float32).reshape(-1, 1)
    return y.reshape(len(blocks), cols)


QUANTIZE = {name: partial(_quantize, name) for name in _LAYOUTS} | {"Q8_0": quantize_q8_0}
DEQUANTIZE = {name: partial(_dequantize, name) for name in _LAYOUTS} | {"Q8_0": dequantize_q8_0}
UNPACK = {name: partial(_unpack, name) for name in _LAYOUTS} | {"Q8_0": unpack_q8_0}
PACK = {name: partial(_pack, name) for name in _LAYOUTS} | {"Q8_0": pack_q8_0}
