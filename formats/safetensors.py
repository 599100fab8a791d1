"""The safetensors container.

    u64 n | n bytes of JSON, padded with spaces | tensor data

The JSON maps a tensor's name to {"dtype", "shape", "data_offsets": [start, stop]}, offsets counted from the end
of the JSON, and "__metadata__" to a table of strings. Tensors are row-major and little-endian and cover the data
without holes or overlaps. n is at most 100 MB. (Format: huggingface/safetensors README; limits and checks:
safetensors/src/tensor.rs.)

`read_header` trusts nothing and reads only the JSON, `tensor` and `transposed` make lazy tensors, `header_bytes`
writes the very bytes that the safetensors package would.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from math import prod
from os import PathLike
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from lconvert.errors import InputError, OutputError, UnsupportedError
from lconvert.formats.files import Stamp, fill, foreign, read_at, reading, short_read, show, unchanged
from lconvert.formats.kept import Kept
from lconvert.ir import NUMPY_DTYPE, Dtype, Tensor

HEADER_LIMIT = 100_000_000
SPARE_BRACKETS = 1 << 20  # those in names and metadata, beyond the three of every tensor
MAX_RANK = 64  # NumPy's limit
_MAX_BYTES = 2**63 - 1

#: Bits per element, in the order in which the safetensors package lays the data out (widest first, so that every
#: tensor of whole bytes is naturally aligned).
DTYPE_BITS: Mapping[str, int] = {
    "U64": 64, "I64": 64, "F64": 64, "C64": 64, "F32": 32, "U32": 32, "I32": 32,
    "BF16": 16, "F16": 16, "U16": 16, "I16": 16,
    "F8_E5M2FNUZ": 8, "F8_E4M3FNUZ": 8, "F8_E8M0": 8, "F8_E4M3": 8, "F8_E5M2": 8, "I8": 8, "U8": 8,
    "F6_E3M2": 6, "F6_E2M3": 6, "F4": 4, "BOOL": 8,
}  # fmt: skip


@dataclass(frozen=True)
class TensorInfo:
    """One tensor of a file: its safetensors dtype and where it lies, as absolute file offsets."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


@dataclass(frozen=True)
class SafetensorsFile:
    """A checked header. `tensors` is in the order of the data, `size` is the file's in bytes."""

    path: Path
    tensors: Mapping[str, TensorInfo]
    metadata: Mapping[str, str]
    size: int
    stamp: Stamp


# --- reading ---------------------------------------------------------------------------------------------


def read_header(path: str | PathLike[str]) -> SafetensorsFile:
    """Reads and checks the header; raises InputError for anything that the format does not allow.

    At most HEADER_LIMIT bytes are read, and never more than the file has.
    """
    path = Path(path)
    with reading(path) as (f, stamp):
        head = bytearray(min(32, stamp.size))
        fill(f, 0, head)
        n = _header_length(path, bytes(head), stamp.size)
        raw = bytearray(n)
        if (got := fill(f, 8, raw)) != n:
            raise short_read(f"{path}: the header", n, got)
    table = _parse(path, raw)
    metadata = table.pop("__metadata__", None)
    if metadata is None:  # the safetensors package reads null as absent
        metadata = {}
    if not isinstance(metadata, dict) or not all(_is_text(s) for item in metadata.items() for s in item):
        raise InputError(
            f"{path}: '__metadata__' must be a table of strings, found {show(metadata)}; save the model again"
        )
    infos = sorted((_info(path, *item, 8 + n) for item in table.items()), key=lambda t: (t.start, t.stop))
    _check_cover(path, infos, 8 + n, stamp.size)
    return SafetensorsFile(path, {t.name: t for t in infos}, metadata, stamp.size, stamp)


def _header_length(path: Path, head: bytes, size: int) -> int:
    if size < 8:
        raise InputError(
            f"{path}: {size} bytes are too few for a safetensors file; the download was interrupted, repeat it"
        )
    n = int.from_bytes(head[:8], "little")
    if n > HEADER_LIMIT:
        raise InputError(
            f"{path}: not a safetensors file: the header would have {n} bytes and {HEADER_LIMIT} is the most; "
            + foreign(head, "check the path or download it again")
        )
    if n > size - 8:
        raise InputError(
            f"{path}: the header would have {n} bytes but only {size - 8} follow its length; "
            + foreign(head, "the file is cut short, download it again")
        )
    return n


def _parse(path: Path, raw: bytearray) -> dict[str, Any]:
    def table(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            twice = Counter(k for k, _ in pairs).most_common(1)[0][0]
            raise InputError(
                f"{path}: {show(twice)} is listed twice in the header; the file is ambiguous, save the model again"
            )
        return found

    tensors = raw.count(b'"data_offsets"')
    if raw.count(b"[") + raw.count(b"{") > 3 * tensors + SPARE_BRACKETS:  # else 100 MB of [] become gigabytes
        raise InputError(
            f"{path}: the header holds too many lists and tables for {tensors} tensors; it is damaged"
        )
    try:
        top = json.loads(raw.decode("utf-8"), object_pairs_hook=table)
    except RecursionError:
        raise InputError(
            f"{path}: the header nests too deeply for a safetensors file; it is damaged"
        ) from None
    except UnicodeDecodeError as e:
        raise InputError(
            f"{path}: the header is not UTF-8 (byte {8 + e.start}: 0x{raw[e.start]:02x}); the file is damaged, "
            "download it again"
        ) from None
    except ValueError as e:  # JSONDecodeError, or a number of thousands of digits
        raise InputError(
            f"{path}: the header is not valid JSON ({e}); the file is damaged, download it again"
        ) from None
    if not isinstance(top, dict):
        raise InputError(f"{path}: the header must be a JSON object, found {show(top)}; the file is damaged")
    return top


def _info(path: Path, name: str, entry: Any, base: int) -> TensorInfo:
    where = f"{path}: tensor {show(name)}"
    if not _is_text(name):
        raise InputError(f"{where}: the name holds half a surrogate pair; save the model again")
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise InputError(
            f"{where}: needs exactly dtype, shape and data_offsets, found {show(entry)}; save the model again"
        )
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
        raise InputError(f"{where}: unknown dtype {show(dtype)}; known are {', '.join(DTYPE_BITS)}")
    if not _counts(shape) or len(shape) > MAX_RANK:
        raise InputError(
            f"{where}: shape must be at most {MAX_RANK} whole numbers of 0 or more, found {show(shape)}; "
            "the file is damaged"
        )
    if not _counts(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise InputError(
            f"{where}: data_offsets must be a start and a stop not before it, found {show(offsets)}; "
            "the file is damaged"
        )
    if prod(d for d in shape if d) * DTYPE_BITS[dtype] > 8 * _MAX_BYTES:
        raise InputError(f"{where}: shape {show(shape)} overflows 63 bits; the file is damaged")
    bits = prod(shape) * DTYPE_BITS[dtype]
    start, stop = offsets
    if bits != 8 * (stop - start):
        size = f"{bits // 8} bytes" if bits % 8 == 0 else f"{bits} bits"
        raise InputError(
            f"{where}: {dtype} of shape {show(shape)} takes {size}, but data_offsets span {stop - start} bytes; "
            "the file is damaged"
        )
    return TensorInfo(name, dtype, tuple(shape), base + start, base + stop)


def _is_text(value: Any) -> bool:
    """A string that UTF-8 can hold: JSON's escapes can spell half a surrogate pair."""
    return isinstance(value, str) and not any("\ud800" <= c <= "\udfff" for c in value)


def _counts(values: Any) -> bool:
    """A list of plain non-negative 63-bit integers; JSON's true and 1.0 are not."""
    return isinstance(values, list) and all(type(v) is int and 0 <= v <= _MAX_BYTES for v in values)


def _check_cover(path: Path, infos: list[TensorInfo], base: int, size: int) -> None:
    """Tensors in order of their offsets must tile the data exactly."""
    at, last = base, "the header"
    for t in infos:
        if t.stop > size:
            raise InputError(
                f"{path}: tensor {show(t.name)} ends at byte {t.stop} but the file has {size}; it is cut short, "
                "download it again"
            )
        if t.start < at:
            raise InputError(
                f"{path}: tensor {show(t.name)} starts at byte {t.start}, inside {last}, which ends at {at}; "
                "tensors may not overlap, save the model again"
            )
        if t.start > at:
            raise InputError(
                f"{path}: {t.start - at} unaccounted bytes lie between {last} and tensor {show(t.name)}; the format "
                "allows no holes, save the model again"
            )
        at, last = t.stop, f"tensor {show(t.name)}"
    if at != size:
        raise InputError(
            f"{path}: {size - at} unaccounted bytes follow {last}; the file was added to or its header is wrong, "
            "download it again"
        )


# --- tensors ---------------------------------------------------------------------------------------------


def tensor(file: SafetensorsFile, name: str) -> Tensor:
    """The named tensor, lazily. UnsupportedError for dtypes that the IR does not hold (F8_E4M3, U64 ...)."""
    info, dtype = _known(file, name)
    origin = f"{file.path}: {name}"
    return Tensor(
        info.shape,
        dtype,
        partial(_read_rows, file.path, file.stamp, info, dtype, origin),
        origin,
        _files(file),
    )


def raw(file: SafetensorsFile, name: str) -> Tensor:
    """The named tensor of an 8-bit type (F8_E4M3, F8_E8M0, U8 ...) as its bytes, lazily."""
    info = file.tensors[name]
    if DTYPE_BITS[info.dtype] != 8:
        raise UnsupportedError(
            f"{file.path}: tensor {show(name)} has dtype {info.dtype}, expected one of 8 bits"
        )
    origin = f"{file.path}: {name}"
    read = partial(_read_rows, file.path, file.stamp, info, "U8", origin)
    return Tensor(info.shape, "U8", read, origin, _files(file))


def columns(file: SafetensorsFile, name: str) -> Callable[[int, int], NDArray[Any]]:
    """A reader of columns start..stop of the named matrix as a (rows, stop - start) array, in its storage type.

    A matrix of moderate size is read once and kept while its slabs are asked for one after another: a slab of columns is as
    many reads as the matrix has rows.
    """
    info, dtype = _known(file, name)
    origin = f"{file.path}: {name}"
    if info.stop - info.start > _KEPT_BYTES or len(info.shape) != 2:
        return partial(_column_block, file.path, file.stamp, info, dtype, origin)
    return partial(_kept_columns, file.path, file.stamp, info, dtype, origin)


def transposed(file: SafetensorsFile, name: str) -> Tensor:
    """The transpose of the named matrix, lazily: row slabs of it are read as column slabs of the file.

    A slab of k rows costs one read of k elements per row of the stored matrix and holds the slab twice (GPT-2's
    Conv1D weights are stored (in, out)).
    """
    info, dtype = _known(file, name)
    if len(info.shape) != 2:
        raise InputError(f"{file.path}: tensor {show(name)} of shape {info.shape} is no matrix to transpose")
    origin = f"{file.path}: {name}, transposed"
    read = partial(_read_columns, file.path, file.stamp, info, dtype, origin)
    return Tensor(info.shape[::-1], dtype, read, origin, _files(file))


def stacked(file: SafetensorsFile, name: str, *, transpose: bool = False) -> Tensor:
    """The rows of a stack of matrices (n, rows, ...), or of vectors (n, rows), one stack after another, lazily.

    transpose: the stored matrices are (cols, rows), and are read as `transposed` reads one.
    """
    info, dtype = _known(file, name)
    if len(info.shape) < (3 if transpose else 2):
        raise InputError(f"{file.path}: tensor {show(name)} of shape {info.shape} is no stack")
    origin = f"{file.path}: {name}"
    if not transpose:
        flat = replace(info, shape=(info.shape[0] * info.shape[1], *info.shape[2:]))
        read = partial(_read_rows, file.path, file.stamp, flat, dtype, origin)
        return Tensor(flat.shape, dtype, read, origin, _files(file))
    n, cols, rows = info.shape
    size = (info.stop - info.start) // (n or 1)

    def read_columns(start: int, stop: int) -> NDArray[Any]:
        _check_range(origin, start, stop, n * rows)
        out = [np.empty((0, cols), NUMPY_DTYPE[dtype])]
        for i in range(start // rows, -(-stop // rows)) if start < stop else ():
            at = info.start + i * size
            one = replace(info, shape=(cols, rows), start=at, stop=at + size)
            low, high = max(start - i * rows, 0), min(stop - i * rows, rows)
            out.append(_read_columns(file.path, file.stamp, one, dtype, origin, low, high))
        return out[1] if len(out) == 2 else np.concatenate(out)

    return Tensor((n * rows, cols), dtype, read_columns, f"{origin}, transposed", _files(file))


def _files(file: SafetensorsFile) -> tuple[tuple[str, Stamp], ...]:
    return ((str(file.path), file.stamp),)


def _known(file: SafetensorsFile, name: str) -> tuple[TensorInfo, Dtype]:
    info = file.tensors.get(name)
    if info is None:
        raise InputError(f"{file.path}: there is no tensor {show(name)} among its {len(file.tensors)}")
    if info.dtype not in NUMPY_DTYPE:
        raise UnsupportedError(
            f"{file.path}: tensor {show(name)} has dtype {info.dtype}; supported are {', '.join(NUMPY_DTYPE)}"
        )
    return info, cast(Dtype, info.dtype)


def _read_rows(
    path: Path, stamp: Stamp, info: TensorInfo, dtype: Dtype, origin: str, start: int, stop: int
) -> NDArray[Any]:
    shape = info.shape or (1,)
    _check_range(origin, start, stop, shape[0])
    row = (info.stop - info.start) // (shape[0] or 1)
    raw = read_at(path, stamp, info.start + start * row, (stop - start) * row, origin)
    return _typed(raw, dtype, origin).reshape(stop - start, *shape[1:])


def _read_columns(
    path: Path, stamp: Stamp, info: TensorInfo, dtype: Dtype, origin: str, start: int, stop: int
) -> NDArray[Any]:
    return np.ascontiguousarray(_column_block(path, stamp, info, dtype, origin, start, stop).T)


def _column_block(
    path: Path, stamp: Stamp, info: TensorInfo, dtype: Dtype, origin: str, start: int, stop: int
) -> NDArray[Any]:
    rows, cols = info.shape
    _check_range(origin, start, stop, cols)
    item = DTYPE_BITS[dtype] // 8
    width = (stop - start) * item
    raw = np.empty((rows, width), np.uint8)
    with unchanged(path, stamp, origin) as f:
        for i in range(rows if width else 0):
            if (got := fill(f, info.start + (i * cols + start) * item, raw[i])) != width:
                raise short_read(origin, width, got)
    return _typed(raw.reshape(-1), dtype, origin).reshape(rows, stop - start)


#: A matrix that is packed along its columns is kept whole up to this size, the last one or two of them.
_KEPT_BYTES = 256 << 20
_KEPT = Kept(2)


def _kept_columns(
    path: Path, stamp: Stamp, info: TensorInfo, dtype: Dtype, origin: str, start: int, stop: int
) -> NDArray[Any]:
    _check_range(origin, start, stop, info.shape[1])
    read = partial(_read_rows, path, stamp, info, dtype, origin, 0, info.shape[0])
    return _KEPT.get((str(path), stamp, info.name), read)[:, start:stop]


def _check_range(origin: str, start: int, stop: int, rows: int) -> None:
    if not 0 <= start <= stop <= rows:
        raise IndexError(f"{origin}: rows {start}..{stop} of {rows}")


def _typed(raw: NDArray[np.uint8], dtype: Dtype, origin: str) -> NDArray[Any]:
    if dtype == "BOOL" and raw.size and (worst := int(raw.max())) > 1:
        raise InputError(f"{origin}: a BOOL is 0 or 1, found {worst}; the file is damaged")
    return raw.view(NUMPY_DTYPE[dtype])


# --- writing ---------------------------------------------------------------------------------------------


def header_bytes(
    entries: Sequence[tuple[str, str, Sequence[int]]], metadata: Mapping[str, str] | None = None
) -> tuple[bytes, tuple[int, ...]]:
    """The header for `entries` (name, dtype, shape), and each entry's absolute file offset, in the given order.

    The data are laid out by DTYPE_BITS' order, then by name, and metadata by key, so the same content gives the
    same bytes whatever the order given, and tensors of whole bytes are aligned to their element size. The file's
    size is the largest offset plus that tensor's bytes; the header's own is a multiple of 8.
    """
    rank = {d: i for i, d in enumerate(DTYPE_BITS)}
    for name, dtype, shape in entries:
        if dtype not in rank:
            raise OutputError(f"tensor {show(name)}: safetensors has no dtype {show(dtype)}")
        if name == "__metadata__" or prod(shape) * DTYPE_BITS[dtype] % 8:
            why = "the name is reserved" if name == "__metadata__" else "it does not fill whole bytes"
            raise OutputError(
                f"tensor {show(name)}: {dtype} of shape {tuple(shape)} cannot be written: {why}"
            )
    order = sorted(range(len(entries)), key=lambda i: (rank[entries[i][1]], entries[i][0]))
    table: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))} if metadata is not None else {}
    starts = [0] * len(entries)
    at = 0
    for i in order:
        name, dtype, shape = entries[i]
        if name in table:
            raise OutputError(f"tensor {show(name)} is to be written twice; names must differ")
        starts[i] = at
        at += prod(shape) * DTYPE_BITS[dtype] // 8
        table[name] = {"dtype": dtype, "shape": [int(d) for d in shape], "data_offsets": [starts[i], at]}
    try:
        text = json.dumps(table, ensure_ascii=False, separators=(",", ":")).encode()
    except UnicodeEncodeError as e:
        raise OutputError(
            f"a name or metadata value is not Unicode text: {show(e.object[e.start : e.end])}"
        ) from None
    text += b" " * (-len(text) % 8)
    if len(text) > HEADER_LIMIT:
        raise OutputError(
            f"the header would have {len(text)} bytes and {HEADER_LIMIT} is the most; split the model over files"
        )
    return len(text).to_bytes(8, "little") + text, tuple(8 + len(text) + s for s in starts)
