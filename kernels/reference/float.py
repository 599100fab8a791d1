"""F32, F16 and BF16: casts, round to nearest even.

`lconvert.kernels` refuses NaN, infinities and values that would round to infinity before it calls these, so the
casts see representable values only. The bytes are ggml's ggml_fp32_to_fp16_row and ggml_fp32_to_bf16_row_ref.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import numpy as np
from numpy.typing import NDArray

F32 = NDArray[np.float32]
U8 = NDArray[np.uint8]


def _quantize_f32(x: F32, weights: F32 | None = None) -> U8:
    return np.ascontiguousarray(x).view(np.uint8)


def _quantize_f16(x: F32, weights: F32 | None = None) -> U8:
    return x.astype(np.float16).view(np.uint8)


def _quantize_bf16(x: F32, weights: F32 | None = None) -> U8:
    bits = np.ascontiguousarray(x).view(np.uint32)
    half = np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))
    return ((bits + half) >> np.uint32(16)).astype(np.uint16).view(np.uint8)


def _dequantize_f32(blocks: U8, cols: int) -> F32:
    return blocks.view(np.float32).reshape(len(blocks), cols)


def _dequantize_f16(blocks: U8, cols: int) -> F32:
    return blocks.view(np.float16).astype(np.float32).reshape(len(blocks), cols)


def _dequantize_bf16(blocks: U8, cols: int) -> F32:
    bits = blocks.view(np.uint16).astype(np.uint32) << np.uint32(16)
    return bits.view(np.float32).reshape(len(blocks), cols)


_STORED: dict[str, type[np.generic]] = {"F32": np.float32, "F16": np.float16, "BF16": np.uint16}


def _unpack(name: str, blocks: U8) -> dict[str, NDArray[np.generic]]:
    """The stored values are their own codes; BF16 as uint16 bits."""
    return {"codes": np.ascontiguousarray(blocks).view(_STORED[name])}


def _pack(name: str, parts: Mapping[str, NDArray[np.generic]]) -> U8:
    return np.ascontiguousarray(parts["codes"], _STORED[name]).view(np.uint8)


QUANTIZE = {"F32": _quantize_f32, "F16": _quantize_f16, "BF16": _quantize_bf16}
DEQUANTIZE = {"F32": _dequantize_f32, "F16": _dequantize_f16, "BF16": _dequantize_bf16}
UNPACK = {name: partial(_unpack, name) for name in _STORED}
PACK = {name: partial(_pack, name) for name in _STORED}
