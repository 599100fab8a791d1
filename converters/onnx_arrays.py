"""The bytes of an ONNX graph's weights, lazily: matrices transposed, codes packed again, scales beside them, tables as they lie.

MatMul takes (input, output). Slabs of such a matrix touch all rows of the source, so it is made whole, slab by slab of the source, and
kept until the next ones: memory is bounded by the largest tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lconvert import kernels
from lconvert.converters import regrid
from lconvert.formats.kept import Kept
from lconvert.formats.onnx_graph import PAGE, Initializer
from lconvert.ir import Entry, Tensor, as_f32
from lconvert.kernels.qtensor import effective
from lconvert.kernels.transpose import pack_transposed, transpose_rows

#: ONNX's name of a float type of ours.
FLOATS: Mapping[str, str] = {"F32": "FLOAT", "F16": "FLOAT16", "BF16": "BFLOAT16"}
_NUMPY: Mapping[str, np.dtype[Any]] = {
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(np.uint16),
}
_PER_BYTE = {"INT4": 2, "UINT4": 2, "FLOAT4E2M1": 2, "UINT2": 4}
#: The last matrices that were transposed: slabs of columns of the source touch all of it.
_WHOLE = Kept(2)
#: Scales and zero points that were computed with codes, until it is their turn.
_BESIDE = Kept(32)
#: Values of the source that are transposed at a time: what a second-level cache holds.
_SLAB = 1 << 18
_ALIGNED = 64  # rows of a slab, so that packed columns fill bytes and lines


def packed(codes: NDArray[Any], bits: int) -> NDArray[np.uint8]:
    """Codes of 4 or 2 bits, the first in the low bits, along the last axis; codes of 8 bits as they are."""
    if bits == 8:
        return np.ascontiguousarray(codes).view(np.uint8)
    per = 8 // bits
    u = codes.view(np.uint8) & np.uint8((1 << bits) - 1)
    out = u[..., ::per].copy()
    for i in range(1, per):
        out |= u[..., i::per] << np.uint8(i * bits)
    return out


def _aligned(shape: tuple[int, ...], dtype: np.dtype[Any]) -> NDArray[Any]:
    """An array at the start of a page, whose rows are written to disk without being copied (lconvert.written)."""
    size = prod(shape) * dtype.itemsize
    raw = np.empty(size + PAGE, np.uint8)
    skip = -raw.ctypes.data % PAGE
    return raw[skip : skip + size].view(dtype).reshape(shape)


def slabs(start: int, stop: int, k: int) -> Iterator[tuple[int, int]]:
    """Rows start..stop of k values each in pieces, cut at places that do not depend on where they start."""
    step = max(_ALIGNED, _SLAB // max(1, k) // _ALIGNED * _ALIGNED)
    while start < stop:
        end = min(stop, (start // step + 1) * step)
        yield start, end
        start = end


def _by_rows(key: Any, rows: int, make: Callable[[], NDArray[Any]]) -> Callable[[int, int], NDArray[Any]]:
    """Rows of an array that is made as a whole."""

    def read(start: int, stop: int) -> NDArray[Any]:
        return _WHOLE.get(key, lambda: make().reshape(rows, -1))[start:stop]

    return read


def codes(name: str, t: Tensor, type_: str, along: tuple[Tensor, ...] = ()) -> Initializer:
    """The codes of a matrix, transposed: (columns, rows). along: what is computed with them row by row, and kept for its turn."""
    n, k = t.shape
    per = _PER_BYTE.get(type_, 1)

    def make() -> NDArray[Any]:
        if n % per:  # rows of the result do not fill whole bytes
            flat = np.ascontiguousarray(t.read(0, n).T).reshape(-1)
            return packed(np.concatenate([flat, np.zeros(-flat.size % per, flat.dtype)]), 8 // per)
        out = _aligned((k, n // per), np.dtype(np.uint8))
        beside: list[list[NDArray[Any]]] = [[] for _ in along]
        for start, stop in slabs(0, n, k):
            pack_transposed(t.read(start, stop), 8 // per, out, start)
            for side, found in zip(along, beside, strict=True):
                found.append(side.read(start, stop))
        for side, found in zip(along, beside, strict=True):
            _BESIDE.put((side.read, side.shape), np.concatenate(found))
        return out

    rows = k if n % per == 0 else 1
    return Initializer(name, type_, (k, n), rows, _by_rows((t.read, t.shape, type_), rows, make), True)


def transposed(name: str, t: Tensor, dtype: str) -> Initializer:
    """Numbers that `dtype` holds, transposed: scales, zero points, minima."""
    n, k = t.shape

    def make() -> NDArray[Any]:
        kept = _BESIDE.take((t.read, t.shape))
        x = t.read(0, n) if kept is None else kept
        cast: NDArray[Any] = x if t.dtype == dtype else regrid.nearest(as_f32(x, t.dtype), dtype)
        return np.ascontiguousarray(cast.T)

    return Initializer(name, FLOATS[dtype], (k, n), k, _by_rows((t.read, t.shape, dtype), k, make), True)


def values(name: str, entry: Entry, dtype: str) -> Initializer:
    """The values of a matrix in the graph's dtype, transposed."""
    n, k = entry.shape
    data = entry.data
    source = data.read if isinstance(data, Tensor) else data.codes.read

    def make() -> NDArray[Any]:
        out = _aligned((k, n), _NUMPY[dtype])
        widened = (
            isinstance(data, Tensor) and entry.transform is None and (data.dtype, dtype) == ("BF16", "F32")
        )
        for start, stop in slabs(0, n, k):
            slab = data.read(start, stop) if widened else stored(effective(entry, start, stop), dtype)  # type: ignore[union-attr]
            transpose_rows(slab, out, start)
        return out

    return Initializer(name, FLOATS[dtype], (k, n), k, _by_rows((source, entry.shape, dtype), k, make), True)


def stored(x: NDArray[np.float32], dtype: str) -> NDArray[Any]:
    """Rows in the graph's dtype; NaN and what is beyond it are refused."""
    if dtype == "F32":
        return x
    rows = x.reshape(x.shape[0], -1)
    out: NDArray[Any] = kernels.quantize(dtype, rows).view(_NUMPY[dtype]).reshape(x.shape)
    return out


def rows(name: str, entry: Entry, dtype: str, offset: float = 0.0) -> Initializer:
    """A tensor as it lies, in the graph's dtype, plus `offset`: norms, biases, embeddings."""
    shape = entry.shape

    def read(start: int, stop: int) -> NDArray[Any]:
        x = effective(entry, start, stop)
        return stored(x + np.float32(offset) if offset else x, dtype)

    return Initializer(name, FLOATS[dtype], shape, shape[0], read)


def array(name: str, x: NDArray[Any], type_: str = "FLOAT") -> Initializer:
    """An array that is in memory."""
    fixed = np.ascontiguousarray(x)
    return Initializer(name, type_, fixed.shape, max(1, fixed.shape[0]), lambda a, b: fixed[a:b])


def flat(made: Initializer) -> Initializer:
    """A side tensor with one value per column of the product, as a vector."""
    n = made.shape[1]
    return Initializer(made.name, made.type, (n,), 1, lambda a, b: made.read(0, made.rows))


def as_they_lie(name: str, t: Tensor, type_: str) -> Initializer:
    """A table whose rows are looked up: codes of 8 bits, or numbers in a float type of ONNX."""

    def read(start: int, stop: int) -> NDArray[Any]:
        x = t.read(start, stop)
        ours = {v: k for k, v in FLOATS.items()}.get(type_)
        if ours is None:
            return np.ascontiguousarray(x).view(np.uint8)
        return x if t.dtype == ours else regrid.nearest(as_f32(x, t.dtype), ours)

    return Initializer(name, type_, t.shape, t.shape[0], read)
