"""Weights of convolutions against the source's: kernels as matrices with a row per output channel, biases that became int32 codes."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from lconvert.converters.onnx_source import Found
from lconvert.ir import QTensor, Tensor, dense
from lconvert.kernels.qtensor import values
from lconvert.validators import tensors
from lconvert.validators.tensors import TensorRow

#: Half a step, and what the product of two scales in fp32 moves it by.
_HALF = 0.5 + 2.0**-6


def compare(role: str, found: Found, data: Tensor | QTensor, original: Tensor | QTensor) -> TensorRow | None:
    """One entry of a network of convolutions; None for what is compared like any other."""
    if role in found.file.tensors and found.file.tensors[role].type == "INT32":
        return _codes(role, found, data, original)
    if len(data.shape) != 4:
        return None
    row = tensors.compare(role, _matrix(data), _matrix(original), block_types=False)
    return replace(row, shape=tuple(data.shape))


def _matrix(x: Tensor | QTensor) -> Tensor | QTensor:
    """(channels out, all else)."""
    shape = (x.shape[0], int(np.prod(x.shape[1:])))
    if isinstance(x, Tensor):
        read = x.read
        return replace(x, shape=shape, read=lambda a, b: read(a, b).reshape(b - a, shape[1]))
    assert isinstance(x.scale, Tensor)
    codes, scale = _matrix(x.codes), dense(x.scale.load().reshape(-1, 1), x.scale.dtype)
    assert isinstance(codes, Tensor)
    return replace(x, shape=shape, codes=codes, block=(x.block[0], -1), scale=scale)


def _codes(role: str, found: Found, data: Tensor | QTensor, original: Tensor | QTensor) -> TensorRow:
    """A bias on the grid of its product: every code must be the nearest one to the source's number."""
    stored = found.file.tensors[role]
    a, b = values(data).astype(np.float64), values(original).astype(np.float64)
    codes = np.maximum(np.abs(stored.load().astype(np.float64)), 1)
    node = found.file.consumers[role][0]
    scale = found.file.tensors[node.input[1]].load().astype(np.float64).reshape(-1)
    wrong = np.abs(a - b) > (_HALF * scale + codes * scale * 2.0**-22)
    norm = float(np.square(b).sum())
    return TensorRow(
        name=role,
        type=f"int32 {'row' if scale.size > 1 else 'tensor'}",
        shape=tuple(data.shape),
        bytes=stored.nbytes,
        bits_per_weight=32.0,
        exact=bool(np.array_equal(a, b)),
        promised=False,
        kept=bool(np.array_equal(a, b)),
        relative_error=tensors.finite((float(np.square(a - b).sum()) / norm) ** 0.5 if norm else 0.0),
        nearest=1 - float(wrong.mean()),
        stray=int(wrong.sum()),
        non_finite=int(a.size - np.isfinite(a).sum()),
    )
