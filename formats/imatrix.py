"""Importance matrices of llama-imatrix, as llama-quantize feeds them to the quantizers.

An importance is the mean square of the activations that meet a column of a weight. Two formats exist.

GGUF: per weight two F32 tensors, NAME.in_sum2 (experts, columns) of sums of squares and NAME.counts (experts, 1) of
how many activations were summed, with the keys imatrix.datasets, imatrix.chunk_count and imatrix.chunk_size.

Legacy (.dat), little-endian: i32 entries | entries times: i32 length, name, i32 calls, i32 values, f32[values]
(means times calls, experts after one another) | optional: i32 chunks, i32 length, name of the data set.

(llama.cpp: common/imatrix-loader.cpp, tools/quantize/quantize.cpp load_imatrix, tools/imatrix/imatrix.cpp.)
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from io import FileIO
from os import PathLike
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from lconvert.errors import InputError, OptionError, OutputError
from lconvert.formats import gguf
from lconvert.formats.files import fill, reading, show

_I32 = struct.Struct("<i")
_SUMS, _COUNTS = ".in_sum2", ".counts"
_KEYS = ("imatrix.datasets", "imatrix.chunk_count", "imatrix.chunk_size")
_ENTRY_BYTES = 16  # of a legacy entry at least: two lengths, calls and one value
_TEXT_LIMIT = 127  # bytes of a string that llama_model_kv_override holds

#: Weights whose entry is ignored when it has the wrong size: lookups have no activations (llama-quant.cpp:1294).
_EMBEDDINGS = ("token_embd.weight", "per_layer_token_embd.weight")


@dataclass(frozen=True, eq=False)
class Imatrix(Mapping[str, NDArray[np.float32]]):
    """The importances of a file: per GGUF tensor name a float32 array (experts, columns), finite and not negative.

    Legacy files do not say how many experts an entry has: there the array is (1, experts * columns), and
    `for_tensor` splits it. `chunks` is how many pieces of text were seen, 0 if unknown.
    """

    path: Path
    weights: Mapping[str, NDArray[np.float32]]
    datasets: tuple[str, ...] = ()
    chunks: int = 0

    def __getitem__(self, name: str) -> NDArray[np.float32]:
        return self.weights[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.weights)

    def __len__(self) -> int:
        return len(self.weights)

    def sha256(self) -> str:
        """Digest of all names and importances."""
        digest = hashlib.sha256()
        for name in sorted(self.weights):
            digest.update(name.encode() + b"\0" + np.ascontiguousarray(self.weights[name]).tobytes())
        return digest.hexdigest()

    def for_tensor(self, name: str, shape: Sequence[int]) -> NDArray[np.float32] | None:
        """The importances (experts, columns) for a weight of `shape` (NumPy order), None if there are none.

        Raises InputError when the entry was made for another shape (llama-quant.cpp:1276-1299).
        """
        found = self.weights.get(name)
        if found is None:
            return None
        experts, columns = (shape[-3] if len(shape) > 2 else 1), shape[-1]
        if found.size == experts * columns:
            return found.reshape(experts, columns)
        if name in _EMBEDDINGS:
            return None
        raise InputError(
            f"{self.path}: {show(name)} has {found.size} importances, the tensor has {experts} x {columns} columns; "
            "the importance matrix belongs to another model"
        )


def read(path: str | PathLike[str]) -> Imatrix:
    """Read either format. The values are bit for bit those that llama-quantize computes.

    Raises InputError for a damaged file and for importances that are infinite, NaN or negative.
    """
    where = Path(path)
    with reading(where) as (f, stamp):
        magic = bytearray(4)
        fill(f, 0, magic)
        if magic != b"GGUF":
            return _checked(_read_legacy(where, f, stamp.size))
    return _checked(_read_gguf(where))


@dataclass(frozen=True, eq=False)
class Sums:
    """What was measured for one weight: sums of squares (experts, columns) and how many activations were summed, (experts,)."""

    squares: NDArray[np.float64]
    counts: NDArray[np.int64]


def write(
    path: str | PathLike[str], sums: Mapping[str, Sums], *, datasets: Sequence[str], chunks: int, chunk: int
) -> None:
    """A GGUF importance matrix with the keys, order and padding of llama-imatrix. chunk: tokens of one of the `chunks` pieces of text.

    OutputError where the file cannot be written. Experts that saw nothing have a count of 0, which readers know.
    """
    metadata = {
        "general.type": gguf.string("imatrix"),
        _KEYS[0]: gguf.array("str", list(datasets)),
        _KEYS[1]: gguf.u32(chunks),
        _KEYS[2]: gguf.u32(chunk),
    }
    arrays: dict[str, NDArray[np.float32]] = {}
    for name in sorted(sums, key=str.encode):
        arrays[name + _SUMS] = sums[name].squares.astype("<f4")
        arrays[name + _COUNTS] = sums[name].counts.astype("<f4").reshape(-1, 1)
    head, starts, size = gguf.header(metadata, [(name, "F32", x.shape) for name, x in arrays.items()])
    out = bytearray(size)
    out[: len(head)] = head
    for x, start in zip(arrays.values(), starts, strict=True):
        out[start : start + x.nbytes] = x.tobytes()
    where = Path(path)
    part = where.with_name(where.name + ".part")
    try:
        part.write_bytes(out)
        part.replace(where)
    except OSError as e:
        part.unlink(missing_ok=True)
        raise OutputError(f"{where}: cannot be written ({e.strerror or e})") from None


def select(imatrix: Imatrix, include: Sequence[str] = (), exclude: Sequence[str] = ()) -> Imatrix:
    """The entries whose name contains one of `include`, or none of `exclude` (--include-weights,
    --exclude-weights of llama-quantize, which do not go together: OptionError)."""
    if include and exclude:
        raise OptionError("--include-weights and --exclude-weights cannot be used together")

    def wanted(name: str) -> bool:
        return any(s in name for s in include) if include else not any(s in name for s in exclude)

    return replace(imatrix, weights={n: w for n, w in imatrix.weights.items() if wanted(n)})


def quantize_keys(imatrix: Imatrix) -> dict[str, gguf.Value]:
    """The metadata that llama-quantize adds to a file it quantized with this matrix, in its order."""
    out = {"quantize.imatrix.file": gguf.string(_cut(str(imatrix.path)))}
    if imatrix.datasets:
        out["quantize.imatrix.dataset"] = gguf.string(_cut(imatrix.datasets[0]))
    out["quantize.imatrix.entries_count"] = gguf.u32(len(imatrix.weights))
    if imatrix.chunks > 0:
        out["quantize.imatrix.chunks_count"] = gguf.u32(imatrix.chunks)
    return out


def _cut(text: str) -> str:
    return text.encode(errors="surrogateescape")[:_TEXT_LIMIT].decode(errors="surrogateescape")


def _checked(imatrix: Imatrix) -> Imatrix:
    for name, weights in imatrix.weights.items():
        if not np.isfinite(weights).all():
            raise InputError(
                f"{imatrix.path}: {show(name)} has an infinite or NaN importance; compute it again"
            )
        if (weights < 0).any():
            raise InputError(
                f"{imatrix.path}: {show(name)} has a negative importance, which no mean of squares is; "
                "compute it again"
            )
        weights.setflags(write=False)
    return imatrix


# --- GGUF ------------------------------------------------------------------------------------------------


def _read_gguf(path: Path) -> Imatrix:
    file = gguf.read(path)
    missing = [key for key in _KEYS if key not in file.metadata]
    if missing:
        raise InputError(f"{path}: key {missing[0]} is missing; this is not an importance matrix")
    names = dict.fromkeys(
        name.removesuffix(suffix)
        for name in file.tensors
        for suffix in (_SUMS, _COUNTS)
        if name.endswith(suffix)
    )
    if not names:
        raise InputError(f"{path}: there are no importances in it; compute it again")
    datasets, chunks = (file.metadata[key] for key in _KEYS[:2])
    if chunks.kind != "u32" or not isinstance(chunks.data, int):
        raise InputError(f"{path}: {_KEYS[1]} is of kind {chunks.kind}, expected u32")
    listed: tuple[str, ...] = ()
    if datasets.item == "str" and isinstance(datasets.data, Sequence):
        listed = tuple(datasets.data)
    weights = {name: _means(file, name) for name in sorted(names)}
    return Imatrix(path, weights, listed, _wrapped(chunks.data))


def _means(file: gguf.GGUFFile, name: str) -> NDArray[np.float32]:
    """Sums divided by counts; experts that were never chosen get ones (quantize.cpp load_imatrix)."""
    for suffix in (_SUMS, _COUNTS):
        info = file.tensors.get(name + suffix)
        if info is None:
            raise InputError(
                f"{file.path}: {show(name)} has no tensor {suffix[1:]!r}; compute the matrix again"
            )
        if info.type != "F32":
            raise InputError(f"{file.path}: {show(info.name)} is {info.type}, importances are F32")
    sums, counts = (gguf.raw(file, name + s).load().reshape(-1).view("<f4") for s in (_SUMS, _COUNTS))
    if sums.size % counts.size:
        raise InputError(
            f"{file.path}: {show(name)} has {sums.size} sums for {counts.size} counts; compute it again"
        )
    if not np.isfinite(counts).all():
        raise InputError(f"{file.path}: {show(name)} has an infinite or NaN count; compute it again")
    # lround: halves away from zero, in float64 because the sum rounds in float32
    whole = np.trunc(counts.astype(np.float64) + np.copysign(0.5, counts)).astype(np.float32)[:, None]
    out = np.ones((counts.size, sums.size // counts.size), np.float32)
    np.divide(sums.reshape(out.shape), whole, out=out, where=whole > 0)
    return out


def _wrapped(n: int) -> int:
    """An unsigned 32-bit number as the int32 that llama.cpp keeps it in."""
    return n - (1 << 32) if n >> 31 else n


# --- legacy ----------------------------------------------------------------------------------------------


class _Cursor:
    """A position in a legacy file; nothing is allocated that the rest of the file cannot fill."""

    def __init__(self, f: FileIO, path: Path, size: int) -> None:
        self.f, self.path, self.size = f, path, size
        self.at = 0
        self.where = "header"

    def error(self, text: str) -> InputError:
        return InputError(f"{self.path}: {self.where}: {text}; not an importance matrix, or a damaged one")

    def has(self, n: int) -> bool:
        return 0 <= n <= self.size - self.at

    def take(self, n: int, what: str) -> NDArray[np.uint8]:
        if not self.has(n):
            raise self.error(f"{what} of {n} bytes where {self.size - self.at} are left")
        out = np.empty(n, np.uint8)
        if fill(self.f, self.at, out) != n:
            raise self.error("the file became shorter while it was read")
        self.at += n
        return out

    def i32(self, what: str) -> int:
        return int(_I32.unpack(self.take(4, what).tobytes())[0])

    def text(self, n: int, what: str) -> str:
        """`n` bytes up to the first zero, as the consumer's C string."""
        return self.take(n, what).tobytes().split(b"\0")[0].decode(errors="surrogateescape")


def _read_legacy(path: Path, f: FileIO, size: int) -> Imatrix:
    c = _Cursor(f, path, size)
    n_entries = c.i32("the number of entries")
    if not 0 < n_entries <= size // _ENTRY_BYTES:
        raise c.error(f"{n_entries} entries in {size} bytes")
    weights: dict[str, NDArray[np.float32]] = {}
    for i in range(n_entries):
        c.where = f"entry {i + 1} of {n_entries}"
        name = c.text(c.i32("the length of the name"), "the name")
        calls, n_values = c.i32("the calls"), c.i32("the number of values")
        if n_values < 1:
            raise c.error(f"{n_values} values for {show(name)}")
        values = c.take(4 * n_values, "values").view(np.dtype("<f4")).reshape(1, -1)
        with np.errstate(invalid="ignore"):  # NaN is refused by _checked, with the name
            weights[name] = values / np.float32(calls) if calls > 0 else values
    # What follows was added later and is optional, also to the consumer.
    chunks = c.i32("chunks") if c.has(4) else 0
    length = c.i32("length") if c.has(4) else 0
    datasets = (c.text(length, "data set"),) if length > 0 and c.has(length) else ()
    return Imatrix(path, weights, datasets, chunks)
