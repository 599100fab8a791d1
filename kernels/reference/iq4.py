"""NumPy specification of IQ4_NL and IQ4_XS: 4-bit codes into a fixed non-linear codebook.

IQ4_NL: 32 values share a float16 scale. IQ4_XS: 256 values, eight 6-bit signed sub-scales under a float16 scale.
Sixteen scales per block of 32 are tried in weighted squared error, weight x^2, or with an importance matrix
weight * sqrt(2 * mean square + x^2) (`ggml-quants.c` quantize_row_iq4_nl_impl with ntry 7: quantize_iq4_nl and
quantize_iq4_xs, which llama-quantize calls; the `_ref` functions search differently).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lconvert.kernels.reference.fields import U8, half_bytes, half_values, pack_nibbles, unpack_nibbles
from lconvert.kernels.reference.search import F32, I32, ZERO_BLOCK, first_extreme, nearest_int, sum_in_order

# The codebook (`ggml-common.h` kvalues_iq4nl).
VALUES = np.array([-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113], np.float32)

# Distances to two neighbours are exact in float32 near their midpoint, so ggml's comparison of the distances
# is a comparison with the midpoint; equality goes to the upper value.
_MIDPOINTS = (VALUES[1:] + VALUES[:-1]) / np.float32(2)

_TRIES = range(-7, 8)
_PAIRS = np.arange(0, 16, 2, dtype=np.uint16)


def nearest_code(x: F32) -> I32:
    """Index of the codebook value nearest to x, the upper one on a tie; NaN gives 15 (ggml's best_index_int8)."""
    return np.searchsorted(_MIDPOINTS, x, side="right").astype(np.int32)


def _search(x: F32, weights: F32) -> F32:
    """Best scale (n,) for x, weights (32, n); 0 where x is negligible."""
    extreme = first_extreme(x)

    def trial(inverse: F32) -> tuple[F32, F32]:
        value = VALUES[nearest_code(inverse * x)]
        wq = weights * value
        return sum_in_order(wq * x), sum_in_order(wq * value)

    sum_qx, sum_qq = trial(np.float32(1) / (-extreme / VALUES[0]))
    scale = np.where(sum_qq > 0, sum_qx / sum_qq, np.float32(0))
    best = scale * sum_qx
    for step in _TRIES:
        sum_qx, sum_qq = trial((np.float32(step) + VALUES[0]) / extreme)
        better = (sum_qq > 0) & (sum_qx * sum_qx > best * sum_qq)
        scale = np.where(better, sum_qx / sum_qq, scale)
        best = np.where(better, scale * sum_qx, best)
    return np.where(np.abs(extreme) < ZERO_BLOCK, np.float32(0), scale)


def _scales(x: F32, weights: F32 | None, block: int) -> tuple[F32, F32]:
    """Blocks of 32 as (32, n) and their best scales; the mean square is taken over `block` values."""
    xt = np.ascontiguousarray(x.reshape(-1, 32).T)
    if weights is None:
        return xt, _search(xt, xt * xt)
    mean = sum_in_order(np.square(x.reshape(-1, block)).T) * np.float32(2.0 / block)
    spread = np.sqrt(np.repeat(mean, block // 32) + xt * xt)
    per_block = np.tile(weights.reshape(-1, 32).T, (1, len(x)))
    return xt, _search(xt, per_block * spread)


def _inverse(d: F32) -> F32:
    inverse: F32 = np.where(d != 0, np.float32(1) / d, np.float32(0))
    return inverse


@np.errstate(all="ignore")
def quantize_iq4_nl(x: F32, weights: F32 | None = None) -> U8:
    """Codes use the float32 scale, before its rounding to float16."""
    xt, scale = _scales(x, weights, 32)
    codes = nearest_code(_inverse(scale) * xt).T.astype(np.uint8)
    # A negligible block is left untouched by ggml's search, then coded with an inverse of 0 like any other.
    return np.concatenate([half_bytes(scale), pack_nibbles(codes)], axis=1).reshape(len(x), -1)


@np.errstate(all="ignore")
def quantize_iq4_xs(x: F32, weights: F32 | None = None) -> U8:
    """The sub-scale of largest magnitude maps to -32; codes use the float32 product of scale and sub-scale."""
    xt, scale = _scales(x, weights, 256)
    sub = scale.reshape(-1, 8)
    d = -first_extreme(np.ascontiguousarray(sub.T)) / np.float32(32)
    levels = np.clip(nearest_int(_inverse(d)[:, None] * sub), -32, 31)
    step: F32 = (d[:, None] * levels.astype(np.float32)).reshape(-1)
    codes = pack_nibbles(nearest_code(_inverse(step) * xt).T.astype(np.uint8)).reshape(-1, 128)
    blocks = np.concatenate([half_bytes(d), _pack_levels(levels), codes], axis=1)
    return blocks.reshape(len(x), -1)


def _pack_levels(levels: NDArray[Any]) -> U8:
    """Signed sub-scales (n, 8) -> (n, 6): 2 bytes of upper bit pairs, 4 bytes of lower nibbles."""
    biased = (levels + 32).astype(np.uint8)
    low = biased & np.uint8(15)
    high = np.bitwise_or.reduce((biased >> np.uint8(4)).astype("<u2") << _PAIRS, axis=1).astype("<u2")
    return np.concatenate(
        [high[:, None].view(np.uint8), low[:, 0::2] | (low[:, 1::2] << np.uint8(4))], axis=1
    )


def _unpack_levels(packed: U8) -> NDArray[np.int8]:
    high = np.ascontiguousarray(packed[:, :2]).view("<u2") >> _PAIRS
    low = np.stack([packed[:, 2:] & np.uint8(15), packed[:, 2:] >> np.uint8(4)], axis=2).reshape(-1, 8)
    return (low.astype(np.int8) | ((high & np.uint16(3)) << np.uint16(4)).astype(np.int8)) - np.int8(32)


def unpack_iq4_nl(blocks: U8) -> dict[str, NDArray[np.generic]]:
    flat = blocks.reshape(-1, 18)
    rows = len(blocks)
    return {
        "codes": unpack_nibbles(flat[:, 2:]).reshape(rows, -1),
        "scale": half_values(flat[:, :2]).reshape(rows, -1),
    }


def unpack_iq4_xs(blocks: U8) -> dict[str, NDArray[np.generic]]:
    flat = blocks.reshape(-1, 136)
    rows = len(blocks)
    return {
        "codes": unpack_nibbles(flat[:, 8:].reshape(-1, 16)).reshape(rows, -1),
        "scale": _unpack_levels(flat[:, 2:8]).reshape(rows, -1),
        "super_scale": half_values(flat[:, :2]).reshape(rows, -1),
    }


def pack_iq4_nl(parts: Mapping[str, NDArray[np.generic]]) -> U8:
    codes = pack_nibbles(parts["codes"].astype(np.uint8).reshape(-1, 32))
    return np.concatenate([half_bytes(parts["scale"]), codes], axis=1).reshape(len(parts["codes"]), -1)


def pack_iq4_xs(parts: Mapping[str, NDArray[np.generic]]) -> U8:
    codes = pack_nibbles(parts["codes"].astype(np.uint8).reshape(-1, 32)).reshape(-1, 128)
    levels = _pack_levels(parts["scale"].reshape(-1, 8))
    blocks = np.concatenate([half_bytes(parts["super_scale"]), levels, codes], axis=1)
    return blocks.reshape(len(parts["codes"]), -1)


@np.errstate(all="ignore")
def dequantize_iq4_nl(blocks: U8, cols: int) -> F32:
    parts = unpack_iq4_nl(blocks)
    values = VALUES[parts["codes"].astype(np.intp)].reshape(-1, 32)
    return (parts["scale"].astype(np.float32).reshape(-1, 1) * values).reshape(len(blocks), cols)


@np.errstate(all="ignore")
def dequantize_iq4_xs(blocks: U8, cols: int) -> F32:
    parts = unpack_iq4_xs(blocks)
    step = parts["super_scale"].astype(np.float32).reshape(-1, 1) * parts["scale"].astype(np.float32).reshape(
        -1, 8
    )
    values = VALUES[parts["codes"].astype(np.intp)].reshape(-1, 8, 32)
    return (step[:, :, None] * values).reshape(len(blocks), cols)


QUANTIZE = {"IQ4_NL": quantize_iq4_nl, "IQ4_XS": quantize_iq4_xs}
DEQUANTIZE = {"IQ4_NL": dequantize_iq4_nl, "IQ4_XS": dequantize_iq4_xs}
UNPACK = {"IQ4_NL": unpack_iq4_nl, "IQ4_XS": unpack_iq4_xs}
PACK = {"IQ4_NL": pack_iq4_nl, "IQ4_XS": pack_iq4_xs}
