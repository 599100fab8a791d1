"""NumPy specification of the 4-bit float types MXFP4 and NVFP4: E2M1 codes under a shared E8M0 or UE4M3 scale.

ggml keeps the E2M1 values doubled (integers) and halves the scale. A code is the nearest value by rounded float32
distance, the lower code winning ties, so the code of -0 is never written. MXFP4: 32 values, scale byte
floor(log2(amax)) + 125; amax below 2**-125 would make it negative, which is undefined in ggml: here the
byte is 0 (the smallest scale) and the codes are those of that scale. NVFP4: 64 values, one UE4M3 byte per 16, nearest to
amax/6 with no scale for the whole tensor; amax/6 >= 256 saturates at 448 (`ggml-quants.c` quantize_row_mxfp4_ref,
quantize_row_nvfp4_ref; `ggml-impl.h` ggml_fp32_to_ue4m3). The importance matrix is not used.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from lconvert.kernels.reference.fields import U8, pack_nibbles, unpack_nibbles

F32 = NDArray[np.float32]
I32 = NDArray[np.int32]

# Twice the E2M1 values of codes 0..15 (`ggml-common.h` kvalues_fp4; OCP Microscaling Formats v1.0, table 5).
DOUBLED_E2M1 = np.array([0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12], np.float32)


def floor_log2(x: F32) -> I32:
    """floor of the float32-rounded log2 of a positive x, i.e. of glibc's log2f.

    Just below 2**k the float32 nearest to log2(x) is k itself. The spacing of floats on that side of k is 2**(m-23),
    where 2**m is the largest power of two up to k - 1 (k > 0) or -k (k < 0), so the last floor(ln(2) * 2**m) floats
    before 2**k count as 2**k. Equal to glibc's log2f on every float32 from 2**-126.
    """
    bits = x.view(np.int32)
    below = (bits >> 23) - 127
    k = below + 1
    distance = 0x800000 - (bits & 0x7FFFFF)  # floats to 2**k
    neighbour = np.maximum(np.where(k > 0, k - 1, -k), 0)
    spacing = np.where(neighbour > 0, np.exp2(np.floor(np.log2(np.maximum(neighbour, 1)))), 0.0)
    return np.where(distance <= np.floor(np.log(2.0) * spacing), k, below).astype(np.int32)


def e8m0_half(e: U8) -> F32:
    """Half the power of two that an E8M0 byte stands for, as ggml reads it: 2**(e-128), 255 not a NaN."""
    bits = np.where(e < 2, np.int32(0x200000) << (e & 1), (e.astype(np.int32) - 1) << 23)
    return bits.astype(np.int32).view(np.float32)


def ue4m3_half(u: U8) -> F32:
    """Half the value of a UE4M3 byte; 0x7F reads as 0, the top bit is ignored otherwise."""
    exponent, mantissa = (u.astype(np.int32) >> 3) & 15, (u & 7).astype(np.float32)
    normal = np.ldexp(np.float32(1) + mantissa / np.float32(8), exponent - 7)
    value = np.where(exponent == 0, np.ldexp(mantissa, -9), normal) * np.float32(0.5)
    return np.where((u == 0) | (u == 0x7F), np.float32(0), value).astype(np.float32)


def to_ue4m3(x: F32) -> U8:
    """Nearest UE4M3 byte (halves up) of x >= 0. From 256 on the answer is 448; below 2**-10 it is 0."""
    bits = np.minimum(x, np.float32(448)).view(np.int32)
    rounded = (bits + 0x80000) >> 20  # exponent and three mantissa bits; the carry moves to the next exponent
    normal = np.minimum(rounded - (120 << 3), 0x7E)
    normal = np.where(normal >= 15 << 3, 0x7E, normal)
    tiny = np.minimum((np.minimum(x, np.float32(1)) * np.float32(512) + np.float32(0.5)).astype(np.int32), 7)
    return np.where(x < np.float32(2.0**-6), tiny, normal).astype(np.uint8)


def _nearest_codes(x: F32, d: F32) -> U8:
    """Code of each x (n, k) under halved scales d (n,)."""
    magnitude, scale = np.abs(x), d[:, None]
    best, code = magnitude, np.zeros(x.shape, np.uint8)
    for candidate in range(1, 8):
        error = np.abs(DOUBLED_E2M1[candidate] * scale - magnitude)
        nearer = error < best
        best, code = np.where(nearer, error, best), np.where(nearer, np.uint8(candidate), code)
    return np.where((x < 0) & (code > 0), code | 8, code).astype(np.uint8)


def quantize_mxfp4(x: F32, weights: F32 | None = None) -> U8:
    xb = x.reshape(-1, 32)
    amax = np.max(np.abs(xb), axis=1)
    e = np.where(amax > 0, np.maximum(floor_log2(amax) + 125, 0), 0).astype(np.uint8)
    codes = _nearest_codes(xb, e8m0_half(e))
    return np.concatenate([e[:, None], pack_nibbles(codes)], axis=1).reshape(len(x), -1)


def quantize_nvfp4(x: F32, weights: F32 | None = None) -> U8:
    xb = x.reshape(-1, 16)
    scale = to_ue4m3(np.max(np.abs(xb), axis=1) / np.float32(6))
    codes = pack_nibbles(_nearest_codes(xb, ue4m3_half(scale)))
    return np.concatenate([scale.reshape(-1, 4), codes.reshape(-1, 32)], axis=1).reshape(len(x), -1)


def unpack_mxfp4(blocks: U8) -> dict[str, NDArray[np.generic]]:
    flat = blocks.reshape(-1, 17)
    rows = len(blocks)
    return {"codes": unpack_nibbles(flat[:, 1:]).reshape(rows, -1), "scale": flat[:, 0].reshape(rows, -1)}


def unpack_nvfp4(blocks: U8) -> dict[str, NDArray[np.generic]]:
    flat = blocks.reshape(-1, 36)
    rows = len(blocks)
    codes = unpack_nibbles(flat[:, 4:].reshape(-1, 8))
    return {"codes": codes.reshape(rows, -1), "scale": flat[:, :4].reshape(rows, -1)}


def pack_mxfp4(parts: Mapping[str, NDArray[np.generic]]) -> U8:
    codes = pack_nibbles(parts["codes"].astype(np.uint8).reshape(-1, 32))
    scale = parts["scale"].astype(np.uint8).reshape(-1, 1)
    return np.concatenate([scale, codes], axis=1).reshape(len(parts["codes"]), -1)


def pack_nvfp4(parts: Mapping[str, NDArray[np.generic]]) -> U8:
    codes = pack_nibbles(parts["codes"].astype(np.uint8).reshape(-1, 16)).reshape(-1, 32)
    scale = parts["scale"].astype(np.uint8).reshape(-1, 4)
    return np.concatenate([scale, codes], axis=1).reshape(len(parts["codes"]), -1)


def _scaled(codes: NDArray[np.generic], d: F32, cols: int) -> F32:
    values = DOUBLED_E2M1[codes.astype(np.intp)]
    y: F32 = values.reshape(d.size, -1) * d.reshape(-1, 1)
    return y.reshape(-1, cols)


@np.errstate(over="ignore")
def dequantize_mxfp4(blocks: U8, cols: int) -> F32:
    parts = unpack_mxfp4(blocks)
    return _scaled(parts["codes"], e8m0_half(parts["scale"].astype(np.uint8)), cols)


def dequantize_nvfp4(blocks: U8, cols: int) -> F32:
    parts = unpack_nvfp4(blocks)
    return _scaled(parts["codes"], ue4m3_half(parts["scale"].astype(np.uint8)), cols)


QUANTIZE = {"MXFP4": quantize_mxfp4, "NVFP4": quantize_nvfp4}
DEQUANTIZE = {"MXFP4": dequantize_mxfp4, "NVFP4": dequantize_nvfp4}
UNPACK = {"MXFP4": unpack_mxfp4, "NVFP4": unpack_nvfp4}
PACK = {"MXFP4": pack_mxfp4, "NVFP4": pack_nvfp4}
