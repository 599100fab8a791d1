"""NumPy specification of the K-quants: super-blocks of 256 values whose sub-blocks have quantised scales.

Q2_K, Q4_K and Q5_K store w = d*scale*q - dmin*min, Q3_K and Q6_K w = d*scale*q with centred q; d and dmin are
float16. Byte-identical to `ggml_quantize_chunk` on x86-64 for finite input (`ggml-quants.c` quantize_row_q*_K_ref,
with an importance matrix quantize_row_q*_K_impl; layouts in `ggml-common.h`). What C leaves to the platform is fixed
here, for the compiled kernels too:

- float32 throughout, subnormals kept, each product and sum rounded on its own (no fused multiply-add), sums left to
  right, products associated to the left; of two equal extremes the first counts.
- Rounding goes through `nearest_int`: half to even, and mantissa bits where the argument exceeds 2^22.
- A sub-scale becomes a byte modulo 256 before any bound of 63 is applied, so a negative one becomes the largest.
  Weighted Q2_K and Q4_K have no bound: what does not fit spills into the neighbouring field.
- A scale beyond float16 is stored as infinity and makes the block useless; ggml stores the same bytes.

Arrays inside are laid out (element, block), as in `search`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from lconvert.kernels.reference.fields import U8
from lconvert.kernels.reference.klayout import (
    LAYOUTS,
    pack_pairs,
    pack_signed_six_bits,
    pack_six_bits,
    put_codes,
    put_half,
    unpack_pairs,
    unpack_signed_six_bits,
    unpack_six_bits,
)
from lconvert.kernels.reference.search import (
    F32,
    I32,
    ZERO_BLOCK,
    descend,
    first_extreme,
    nearest_int,
    search_levels,
    search_offset,
    search_symmetric,
    sum_in_order,
)

_ZERO, _ONE = np.float32(0), np.float32(1)


# ---- levels of the sub-scales ----


def _round_levels(values: F32, most: int) -> tuple[F32, I32]:
    """Step (n,) and levels (nsub, n) by plain rounding; the largest value becomes `most`."""
    top = np.maximum(np.maximum.reduce(np.where(values > 0, values, _ZERO)), _ZERO)
    inverse = np.where(top > 0, np.float32(most) / top, _ZERO)
    return top / np.float32(most), nearest_int(inverse * values) & 255


def _search_q3(x: F32) -> tuple[F32, I32]:
    """Scale (n,) and codes 0..7 (16, n) of sub-blocks x ~ scale * (code - 4), weights x^2 (make_q3_quants)."""
    extreme = first_extreme(x)
    weights = x * x
    codes = np.clip(nearest_int(np.float32(-4) / extreme * x), -4, 3)
    level = codes.astype(np.float32)
    sums = sum_in_order(weights * x * level), sum_in_order(weights * level * level)
    scale, codes = descend(
        x, weights, codes, sums, lambda c: np.clip(c, -4, 3), lambda c: c, check_before=False
    )
    dead = np.abs(extreme) < ZERO_BLOCK
    return np.where(dead, _ZERO, scale), np.where(dead, 0, codes + 4)


# ---- quantisation ----


def _half(values: F32) -> tuple[NDArray[np.uint16], F32]:
    """float16 bits and their value; a NaN keeps only its sign, as in ggml_compute_fp32_to_fp16."""
    half = values.astype(np.float16)
    bits = np.where(np.isnan(half), (half.view(np.uint16) & 0x8000) | 0x7E00, half.view(np.uint16))
    return bits, bits.view(np.float16).astype(np.float32)


def _subs(x: F32, sub: int) -> F32:
    """(n, 256) -> (sub, n * nsub): the sub-blocks as columns."""
    return np.ascontiguousarray(x.reshape(-1, sub).T)


def _importance(x: F32, weights: F32, factor: int) -> F32:
    """weight * sqrt(sigma2 + x^2), (n, 256), with sigma2 = factor * mean square of the super-block."""
    sigma2 = np.float32(factor) * sum_in_order(np.square(x).T) / np.float32(256)
    return weights * np.sqrt(sigma2[:, None] + x * x)


def _requantize(x: F32, step: F32, offset: F32 | np.float32, low: int, high: int, kept: I32) -> I32:
    """Codes (n, nsub, sub) low..high of x ~ step * code - offset; `kept` where the stored step is zero."""
    codes = np.clip(nearest_int((x + offset) / step), low, high)
    return np.where(step == 0, kept, codes)


class _Affine(NamedTuple):
    """The searches of a type with minima: plain (rmin, rdelta, steps) and how the levels are bounded."""

    nmax: int
    most: int
    plain: tuple[float, float, int]
    absolute: bool
    factor: int
    bounded: tuple[bool, bool]  # without and with importance
    pack: Callable[[I32, I32], U8]
    unpack: Callable[[U8], tuple[U8, U8]]


_AFFINE = {
    "Q2_K": _Affine(3, 15, (-0.5, 0.1, 15), True, 1, (False, False), pack_pairs, unpack_pairs),
    "Q4_K": _Affine(15, 63, (-1.0, 0.1, 20), False, 2, (True, False), pack_six_bits, unpack_six_bits),
    "Q5_K": _Affine(31, 63, (-0.5, 0.1, 15), False, 2, (True, True), pack_six_bits, unpack_six_bits),
}


def _quantize_affine(name: str, x: F32, weights: F32 | None, block: U8) -> None:
    layout, rule = LAYOUTS[name], _AFFINE[name]
    n, nsub = len(x), layout.nsub
    subs = _subs(x, layout.sub)
    if weights is not None:
        search = _subs(_importance(x, weights, rule.factor), layout.sub)
        scale, minimum, codes = search_offset(subs, search, rule.nmax, -0.9, 0.05, 36)
    else:
        search = np.abs(subs)
        if not rule.absolute:
            search = np.sqrt(sum_in_order(subs * subs) / np.float32(layout.sub)) + search
        scale, minimum, codes = search_offset(subs, search, rule.nmax, *rule.plain, absolute=rule.absolute)

    levels, steps = [], []
    sums = sum_in_order(search).reshape(n, nsub).T
    for values in (scale.reshape(n, nsub).T, -minimum.reshape(n, nsub).T):
        if weights is None:
            step, level = _round_levels(values, rule.most)
        else:
            step, level = search_levels(values, sums, rule.most)
        if rule.bounded[weights is not None]:
            level = np.minimum(level, rule.most)
        levels.append(np.ascontiguousarray(level.T))
        steps.append(step)
    packed = rule.pack(levels[0], levels[1])
    block[:, layout.scales] = packed
    d_bits, d = _half(steps[0])
    dmin_bits, dmin = _half(steps[1])
    put_half(block, layout.d, d_bits)
    put_half(block, layout.dmin or 0, dmin_bits)
    stored_scale, stored_min = rule.unpack(packed)
    step = (d[:, None] * stored_scale.astype(np.float32))[:, :, None]
    offset = (dmin[:, None] * stored_min.astype(np.float32))[:, :, None]
    kept = codes.T.reshape(n, nsub, layout.sub)
    put_codes(layout, block, _requantize(x.reshape(n, nsub, layout.sub), step, offset, 0, rule.nmax, kept))


def _quantize_q3_k(x: F32, weights: F32 | None, block: U8) -> None:
    layout, n = LAYOUTS["Q3_K"], len(x)
    subs = _subs(x, 16)
    if weights is None:
        scale, codes = _search_q3(subs)
        scales = scale.reshape(n, 16).T
        top = first_extreme(scales)
        inverse = np.float32(-32) / top
        level = np.clip((nearest_int(inverse * scales) << 24) >> 24, -32, 31) + 32
        level = np.where(top == 0, 0, level)
        d = np.where(top == 0, _ZERO, _ONE / inverse)
    else:
        search = _subs(_importance(x, weights, 2), 16)
        scale, codes = search_symmetric(subs, search, 4)
        d, level = search_symmetric(scale.reshape(n, 16).T, sum_in_order(search).reshape(n, 16).T, 32)
    block[:, layout.scales] = pack_signed_six_bits(np.ascontiguousarray(level.T))
    bits, d = _half(d)
    put_half(block, layout.d, bits)
    step = (d[:, None] * (level.T - 32).astype(np.float32))[:, :, None]
    kept = codes.T.reshape(n, 16, 16) - 4
    put_codes(layout, block, _requantize(x.reshape(n, 16, 16), step, _ZERO, -4, 3, kept))


def _quantize_q6_k(x: F32, weights: F32 | None, block: U8) -> None:
    layout, n = LAYOUTS["Q6_K"], len(x)
    subs = _subs(x, 16)
    search = subs * subs if weights is None else _subs(np.broadcast_to(weights, x.shape), 16)
    scale, codes = search_symmetric(subs, search, 32)
    scales = scale.reshape(n, 16).T
    top = first_extreme(scales)
    inverse = np.float32(-128) / top
    level = np.minimum(nearest_int(inverse * scales), 127).T.astype(np.int8)
    block[:, layout.scales] = level.view(np.uint8)
    bits, d = _half(_ONE / inverse)
    put_half(block, layout.d, bits)
    step = (d[:, None] * level.astype(np.float32))[:, :, None]
    kept = codes.T.reshape(n, 16, 16) - 32
    put_codes(layout, block, _requantize(x.reshape(n, 16, 16), step, _ZERO, -32, 31, kept))
    block[np.abs(top) < ZERO_BLOCK] = 0


def _quantize(name: str, x: F32, weights: F32 | None = None) -> U8:
    rows = len(x)
    supers = np.ascontiguousarray(x).reshape(-1, 256)
    if weights is not None:
        weights = np.tile(weights, rows).reshape(-1, 256)
    block = np.zeros((len(supers), LAYOUTS[name].nbytes), np.uint8)
    with np.errstate(all="ignore"):
        if name == "Q3_K":
            _quantize_q3_k(supers, weights, block)
        elif name == "Q6_K":
            _quantize_q6_k(supers, weights, block)
        else:
            _quantize_affine(name, supers, weights, block)
    return block.reshape(rows, -1)


# ---- parts and values ----


def _unpack(name: str, blocks: U8) -> dict[str, NDArray[np.generic]]:
    """codes (rows, cols), scale and offset (rows, cols / sub), super_scale and super_offset float16 (rows, cols / 256).

    Q2_K, Q4_K, Q5_K: unsigned, w = super_scale*scale*code - super_offset*offset. Q3_K, Q6_K: int8 and centred,
    w = super_scale*scale*code.
    """
    layout = LAYOUTS[name]
    rows, block = len(blocks), blocks.reshape(-1, layout.nbytes)
    codes = np.bitwise_or.reduce([plane.unpack(block) for plane in layout.planes])
    packed = np.ascontiguousarray(block[:, layout.scales])
    parts: dict[str, NDArray[np.generic]] = {}
    if layout.dmin is not None:
        scale, offset = _AFFINE[name].unpack(packed)
        parts |= {"codes": codes, "scale": scale, "offset": offset}
        parts["super_offset"] = np.ascontiguousarray(block[:, layout.dmin : layout.dmin + 2]).view("<f2")
    else:
        signed = codes.astype(np.int8) - np.int8(layout.zero)
        parts |= {
            "codes": signed,
            "scale": unpack_signed_six_bits(packed) if name == "Q3_K" else packed.view(np.int8),
        }
    parts["super_scale"] = np.ascontiguousarray(block[:, layout.d : layout.d + 2]).view("<f2")
    return {key: part.reshape(rows, -1) for key, part in parts.items()}


def _pack(name: str, parts: Mapping[str, NDArray[np.generic]]) -> U8:
    layout = LAYOUTS[name]
    codes = parts["codes"]
    block = np.zeros((codes.size // 256, layout.nbytes), np.uint8)
    scale = parts["scale"].reshape(-1, layout.nsub).astype(np.int32)
    if layout.dmin is not None:
        offset = parts["offset"].reshape(-1, layout.nsub).astype(np.int32)
        block[:, layout.scales] = _AFFINE[name].pack(scale, offset)
        put_half(block, layout.dmin, _half_bits(parts["super_offset"]))
    elif name == "Q3_K":
        block[:, layout.scales] = pack_signed_six_bits(scale + 32)
    else:
        block[:, layout.scales] = scale.astype(np.int8).view(np.uint8)
    put_half(block, layout.d, _half_bits(parts["super_scale"]))
    put_codes(layout, block, codes.astype(np.int16))
    return block.reshape(len(codes), -1)


def _half_bits(values: NDArray[np.generic]) -> NDArray[np.uint16]:
    return np.ascontiguousarray(values, np.float16).reshape(-1).view(np.uint16)


def _dequantize(name: str, blocks: U8, cols: int) -> F32:
    parts = _unpack(name, blocks)
    layout = LAYOUTS[name]

    def factor(super_part: str, part: str) -> F32:
        d = parts[super_part].astype(np.float32).reshape(-1, 1)
        product: F32 = d * parts[part].astype(np.float32).reshape(-1, layout.nsub)
        return product[:, :, None]

    with np.errstate(all="ignore"):
        values: F32 = factor("super_scale", "scale") * parts["codes"].astype(np.float32).reshape(
            -1, layout.nsub, layout.sub
        )
        if layout.dmin is not None:
            values = values - factor("super_offset", "offset")
    return values.reshape(len(blocks), cols)


QUANTIZE = {name: partial(_quantize, name) for name in LAYOUTS}
DEQUANTIZE = {name: partial(_dequantize, name) for name in LAYOUTS}
UNPACK = {name: partial(_unpack, name) for name in LAYOUTS}
PACK = {name: partial(_pack, name) for name in LAYOUTS}
