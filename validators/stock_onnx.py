"""The stock encoder of ONNX graphs: ONNX Runtime's own quantizer on the same matrices, what integer weights must not be worse than.

Blocks are those of its MatMulNBits tools (onnxruntime/core/mlas/lib/q4_dq.cpp): the value of the largest magnitude gets the least
code. Rows are those of its QDQ tools (quantization/quant_utils.py quantize_data). The numbers run in transformers, in fp32, so that
only rounding is compared.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lconvert.ir import Model, QTensor, Tensor, as_f32

#: Widths that it quantizes to, and the blocks and rows that it has.
_BITS, _BLOCKS, _ROWS = (2, 4, 8), (16, 32, 64, 128, 256), (4, 8)


def rival(source: Model, artifact: Model) -> Model | str:
    """The source with every matrix that the artifact has in integers rounded by ONNX Runtime in the same blocks, or why there is none."""
    new = {}
    for name, entry in artifact.entries.items():
        q = entry.data
        if not isinstance(q, QTensor):
            continue
        before = source.entries[name].data
        if not isinstance(before, Tensor):
            return "the source is quantized itself"
        if entry.activation is not None:
            return "its inputs are rounded too"
        bits, width = q.grid.bits, q.block[-1]
        known = (bits in _ROWS and q.zero is None) if width == -1 else (bits in _BITS and width in _BLOCKS)
        if q.grid.kind != "int" or len(q.shape) != 2 or q.block[0] != 1 or not known:
            return "ONNX Runtime's quantizer has no such grid"
        new[name] = replace(
            source.entries[name], data=quantized(before, q.grid.bits, q.block[1], q.zero is None)
        )
    return source.with_entries(new, "ONNX Runtime's quantizer") if new else "no weight is quantized"


def quantized(t: Tensor, bits: int, group: int, symmetric: bool = True) -> Tensor:
    """A matrix (rows, columns) as ONNX Runtime rounds it in blocks of `group` columns (-1: a row), in fp32, lazily."""

    def read(start: int, stop: int) -> NDArray[Any]:
        return _values(as_f32(t.read(start, stop), t.dtype), bits, group, symmetric)

    return replace(t, dtype="F32", read=read)


def _values(x: NDArray[np.float32], bits: int, group: int, symmetric: bool) -> NDArray[np.float32]:
    from onnxruntime.capi import _pybind_state as native

    if group == -1:
        return _rows(x, bits)
    n, k = x.shape
    count, per = -(-k // group), 8 // bits
    packed = np.zeros((n, count, group // per), np.uint8)
    scale = np.zeros(n * count, np.float32)
    zero = np.zeros((n, -(-count // per)), np.uint8)
    quantize = getattr(native, f"quantize_matmul_{bits}bits")
    quantize(packed, np.ascontiguousarray(x.T), scale, zero.reshape(-1), group, n, k, symmetric)
    codes = _fields(packed.reshape(n, -1), bits).reshape(n, count, group).astype(np.float32)
    middle = np.float32(1 << (bits - 1))
    codes -= middle if symmetric else _fields(zero, bits)[:, :count, None].astype(np.float32)
    return (codes * scale.reshape(n, count, 1)).reshape(n, -1)[:, :k]


def _rows(x: NDArray[np.float32], bits: int) -> NDArray[np.float32]:
    import onnx
    from onnxruntime.quantization.quant_utils import quantize_data

    out = np.empty_like(x)
    for row, target in zip(x, out, strict=True):
        _, scale, codes = quantize_data(row, getattr(onnx.TensorProto, f"INT{bits}"), True)
        target[:] = codes.astype(np.float32) * scale
    return out


def _fields(packed: NDArray[np.uint8], bits: int) -> NDArray[np.uint8]:
    """Codes of `bits` in bytes, the first in the low bits, along the last axis."""
    mask = np.uint8((1 << bits) - 1)
    return np.stack([(packed >> np.uint8(s)) & mask for s in range(0, 8, bits)], -1).reshape(
        packed.shape[0], -1
    )
