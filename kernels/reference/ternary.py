"""NumPy specification of the ternary types TQ1_0 and TQ2_0: 256 values are -d, 0 or d.

d is the largest magnitude, codes round half away from zero (`ggml-quants.c` quantize_row_tq1_0_ref,
quantize_row_tq2_0_ref; the importance matrix is not used). TQ1_0 packs five base-3 digits into a byte as the
ceiling of 256/243 times their value, so that each digit is read back by a multiplication; only 243 of the 256
byte values are produced that way (81 of them in the last four bytes, which hold four digits). The others decode,
but `pack` writes the canonical byte, so pack(unpack(b)) == b holds for TQ1_0 on canonical blocks only. In TQ2_0
the code 3 decodes to 2*d. Where 1/d overflows (d < 2**-128, undefined in C) codes are 0, as on x86-64.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import numpy as np
from numpy.typing import NDArray

from lconvert.kernels.reference.fields import U8, half_bytes, half_values

F32 = NDArray[np.float32]

# TQ1_0: (first value, number of bytes, digits per byte); digit k of byte j is value first + k*bytes + j.
_TQ1_RUNS = ((0, 32, 5), (160, 16, 5), (240, 4, 4))
_POW3 = np.array([81, 27, 9, 3, 1], np.uint16)
_SHIFTS = np.arange(0, 8, 2, dtype=np.uint8)[:, None]


@np.errstate(all="ignore")
def _round(x: F32) -> tuple[U8, U8]:
    """d as bytes (n, 2) and digits 0, 1, 2 as (n, 256)."""
    xb = x.reshape(-1, 256)
    d = np.max(np.abs(xb), axis=1)
    scaled = xb * np.where(d != 0, np.float32(1) / d, np.float32(0))[:, None]
    scaled = np.where(np.isfinite(scaled), scaled, np.float32(0))  # |scaled| <= 1 + 2**-23
    digits = np.uint8(1) + (scaled >= np.float32(0.5)) - (scaled <= np.float32(-0.5)).view(np.uint8)
    return half_bytes(d), digits.astype(np.uint8)


def _pack_tq1(digits: U8) -> U8:
    columns = []
    for first, nbytes, count in _TQ1_RUNS:
        run = digits[:, first : first + nbytes * count].reshape(-1, count, nbytes)
        value = np.einsum("k,nkj->nj", _POW3[:count], run.astype(np.uint16))
        columns.append(((value * 256 + 242) // 243).astype(np.uint8))
    return np.concatenate(columns, axis=1)


def _unpack_tq1(body: U8) -> U8:
    columns, at = [], 0
    for _, nbytes, count in _TQ1_RUNS:
        packed, at = body[:, at : at + nbytes].astype(np.uint32), at + nbytes
        for k in range(count):
            columns.append((((packed * 3**k & 255) * 3) >> 8).astype(np.uint8))
    return np.concatenate(columns, axis=1)


def _pack_tq2(digits: U8) -> U8:
    """Two runs of 128 values in 32 bytes; value 32*k + j sits in bits 2k of byte j."""
    packed: U8 = np.bitwise_or.reduce(digits.reshape(-1, 2, 4, 32) << _SHIFTS, axis=2)
    return packed.reshape(-1, 64)


def _unpack_tq2(body: U8) -> U8:
    digits: U8 = (body.reshape(-1, 2, 1, 32) >> _SHIFTS) & np.uint8(3)
    return digits.reshape(-1, 256)


_DIGITS = {"TQ1_0": (_pack_tq1, _unpack_tq1, 52), "TQ2_0": (_pack_tq2, _unpack_tq2, 64)}


def _quantize(name: str, x: F32, weights: F32 | None = None) -> U8:
    d, digits = _round(x)
    return np.concatenate([_DIGITS[name][0](digits), d], axis=1).reshape(len(x), -1)


def _unpack(name: str, blocks: U8) -> dict[str, NDArray[np.generic]]:
    _, read, nbytes = _DIGITS[name]
    flat = blocks.reshape(-1, nbytes + 2)
    codes = read(flat[:, :nbytes])
    scale = half_values(flat[:, nbytes:])
    return {"codes": codes.reshape(len(blocks), -1), "scale": scale.reshape(len(blocks), -1)}


def _pack(name: str, parts: Mapping[str, NDArray[np.generic]]) -> U8:
    digits = parts["codes"].astype(np.uint8).reshape(-1, 256)
    return np.concatenate([_DIGITS[name][0](digits), half_bytes(parts["scale"])], axis=1).reshape(
        len(parts["codes"]), -1
    )


@np.errstate(invalid="ignore")
def _dequantize(name: str, blocks: U8, cols: int) -> F32:
    parts = _unpack(name, blocks)
    y = (parts["codes"].astype(np.float32).reshape(-1, 256) - 1) * parts["scale"].astype(np.float32).reshape(
        -1, 1
    )
    return y.reshape(len(blocks), cols)


QUANTIZE = {name: partial(_quantize, name) for name in _DIGITS}
DEQUANTIZE = {name: partial(_dequantize, name) for name in _DIGITS}
UNPACK = {name: partial(_unpack, name) for name in _DIGITS}
PACK = {name: partial(_pack, name) for name in _DIGITS}
