"""The GGUF container, versions 2 and 3, little-endian.

    "GGUF" | u32 version | u64 tensors | u64 keys
    keys times:    string key | u32 kind | value
    tensors times: string name | u32 n_dims | u64 dims[n_dims] | u32 type | u64 offset
    zeros up to a multiple of the alignment
    data: every tensor at its offset, padded with zeros to a multiple of the alignment

A string is a u64 length and that many bytes. Kinds: u8 0, i8 1, u16 2, i16 3, u32 4, i32 5, f32 6, bool 7 (one
byte, 0 or 1), string 8, array 9, u64 10, i64 11, f64 12. An array is u32 kind of its items | u64 length | items.
Dims start with the contiguous one, the reverse of NumPy's order. Types are lconvert.kernels.blocks; a row is a
whole number of blocks. Offsets count from the data and are multiples of the alignment, which is the u32 key
general.alignment, or 32: a power of two.

A model in N files has names that end in -00001-of-0000N.gguf; each file holds the u16 keys split.no and
split.count, the i32 key split.tensors.count (of all files), and its part of the tensors; the first holds all
other keys. (llama.cpp: ggml/include/gguf.h, src/llama-model-loader.cpp.)

`read` trusts nothing: every count and length is checked against the bytes that remain before anything is
allocated for it. Keys and tensor names are UTF-8, string values any bytes (gguf_values). Tensors without elements
are refused.
"""

from __future__ import annotations

import os
import re
import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from math import prod
from os import PathLike
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from lconvert.errors import InputError, LconvertError, OutputError, UnsupportedError
from lconvert.formats.files import Stamp, foreign, read_at, reading, show
from lconvert.formats.gguf_values import (
    COUNT_LIMIT,
    HEADER_LIMIT,
    KEY_LIMIT,
    U32,
    U64,
    Cursor,
    Strings,
    Value,
    array,
    boolean,
    counted,
    encode,
    f32,
    f64,
    i8,
    i16,
    i32,
    i64,
    read_value,
    string,
    u8,
    u16,
    u32,
    u64,
)
from lconvert.ir import Tensor
from lconvert.kernels.blocks import BLOCKS, BY_ID

__all__ = [
    "ALIGNMENT", "ALIGNMENT_KEY", "COUNT_LIMIT", "HEADER_LIMIT", "NAME_LIMIT", "GGUFFile", "Strings", "TensorInfo",
    "Value", "array", "boolean", "f32", "f64", "header", "i8", "i16", "i32", "i64", "raw", "read", "string", "u8",
    "u16", "u32", "u64",
]  # fmt: skip

VERSION = 3
ALIGNMENT = 32
ALIGNMENT_KEY = "general.alignment"
NAME_LIMIT = 63  # bytes of a tensor name that llama.cpp loads (GGML_MAX_NAME with its terminator)
MAX_DIMS = 4
ALIGNMENT_LIMIT = 1 << 20

#: Magics of the formats before GGUF, as they stand in a file.
_ANCIENT = {b"lmgg": "GGML", b"fmgg": "GGMF", b"tjgg": "GGJT", b"algg": "GGLA"}
_SHARD = re.compile(r"(.*)-([0-9]{5})-of-([0-9]{5})\.gguf", re.DOTALL)


# --- reading ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TensorInfo:
    """One tensor: `type` names a block type, `shape` is in NumPy order, `offset` is absolute in file `shard`."""

    name: str
    type: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int
    shard: int = 0


@dataclass(frozen=True)
class GGUFFile:
    """A checked header; of a split model, all of them as one.

    metadata: in file order, without the split.* keys of a split model. data_offset: of the first file.
    size: bytes of all files.
    """

    paths: tuple[Path, ...]
    version: int
    alignment: int
    metadata: Mapping[str, Value]
    tensors: Mapping[str, TensorInfo]
    data_offset: int
    size: int
    stamps: tuple[Stamp, ...]

    @property
    def path(self) -> Path:
        return self.paths[0]


def read(path: str | PathLike[str]) -> GGUFFile:
    """Reads and checks the header of a model, of all its files if it is split (any one may be named).

    InputError for what the format does not allow, UnsupportedError for versions, byte orders and types that
    lconvert does not read. Reads no tensor data and at most HEADER_LIMIT bytes per file.
    """
    one = _read_one(Path(path))
    if "split.count" not in one.metadata or _split_number(one, "split.count") in (0, 1):
        return one
    return _read_split(one)


def _read_one(path: Path) -> GGUFFile:
    with reading(path) as (f, stamp):
        c = Cursor(f, path, stamp.size)
        version = _read_version(c)
        n_tensors = c.count("tensors", 25)
        n_keys = c.count("keys", 14)
        metadata: dict[str, Value] = {}
        for i in range(n_keys):
            c.where = f"key {i + 1} of {n_keys}"
            key = c.name("key")
            if key in metadata:
                raise c.error(f"{show(key)} is there already")
            c.where = f"key {show(key)}"
            metadata[key] = read_value(c)
        c.where = f"key {ALIGNMENT_KEY!r}"
        alignment = _checked_alignment(metadata, c.error)
        found: dict[str, TensorInfo] = {}
        for i in range(n_tensors):
            c.where = f"tensor {i + 1} of {n_tensors}"
            info = _read_info(c)
            if info.name in found:
                raise c.error(f"the name {show(info.name)} is there already")
            found[info.name] = info
    base = min(_pad(c.pos, alignment), stamp.size)
    tensors = {n: replace(t, offset=base + t.offset) for n, t in found.items()}
    _check_layout(path, tensors, base, alignment, stamp.size)
    return GGUFFile((path,), version, alignment, metadata, tensors, base, stamp.size, (stamp,))


def _read_version(c: Cursor) -> int:
    head = b""
    if c.size:
        c.need(min(c.size, 32))
        head = bytes(c.data[:32])
    if head[:4] != b"GGUF":
        if head[:4] in _ANCIENT:
            raise UnsupportedError(
                f"{c.path}: this is a {_ANCIENT[head[:4]]} file, from before GGUF; convert the original model again"
            )
        advice = foreign(head, "check the path or download it again")
        raise InputError(f"{c.path}: not a GGUF file, it begins with {show(head[:4])}; {advice}")
    c.pos, c.where = 4, "the file's first 24 bytes"
    version: int = c.number(U32)
    if version == 0:
        raise c.error("there is no version 0")
    if version & 0xFFFF == 0:
        raise UnsupportedError(
            f"{c.path}: this GGUF file is big-endian; lconvert reads little-endian files, convert it with "
            "gguf_convert_endian.py"
        )
    if version not in (2, 3):
        advice = "convert the original model again" if version == 1 else "a newer lconvert may read it"
        raise UnsupportedError(f"{c.path}: GGUF version {version} is not supported, only 2 and 3; {advice}")
    return version


def _checked_alignment(metadata: Mapping[str, Value], error: Callable[[str], LconvertError]) -> int:
    value = metadata.get(ALIGNMENT_KEY)
    if value is None:
        return ALIGNMENT
    if value.kind != "u32":
        raise error(f"must be a u32, found {value.kind}")
    a = value.data
    assert isinstance(a, int)
    if a == 0 or a & (a - 1) or a > ALIGNMENT_LIMIT:
        raise error(f"must be a power of two of at most {ALIGNMENT_LIMIT}, found {a}")
    return a


def _read_info(c: Cursor) -> TensorInfo:
    """A tensor's entry, its offset still relative."""
    name = c.name("tensor name")
    c.where = f"tensor {show(name)}"
    n_dims = c.number(U32)
    if n_dims > MAX_DIMS:
        raise c.error(f"{n_dims} dimensions, {MAX_DIMS} is the most")
    dims = [c.number(U64) for _ in range(n_dims)]
    if not all(0 < d < 2**63 for d in dims) or prod(dims) >= 2**63:
        raise c.error(f"dimensions {dims} are not positive numbers whose product fits 63 bits")
    type_id = c.number(U32)
    block = BY_ID.get(type_id)
    if block is None:
        raise c.error(
            f"ggml type {type_id} is none that lconvert reads ({', '.join(BLOCKS)}); convert the original model",
            UnsupportedError,
        )
    cols = dims[0] if dims else 1
    if cols % block.elems:
        raise c.error(f"rows of {cols} elements are no multiple of {block.name}'s {block.elems}")
    nbytes = prod(dims) // block.elems * block.nbytes
    return TensorInfo(name, block.name, tuple(reversed(dims)), c.number(U64), nbytes)


def _check_layout(
    path: Path, tensors: Mapping[str, TensorInfo], base: int, alignment: int, size: int
) -> None:
    """Every tensor aligned, inside the file, and clear of the others."""
    end, last = base, ""
    for t in sorted(tensors.values(), key=lambda t: t.offset):
        where = f"{path}: tensor {show(t.name)}"
        if (t.offset - base) % alignment:
            raise InputError(
                f"{where}: its offset {t.offset - base} is no multiple of the alignment {alignment}; the file is "
                "damaged, download it again"
            )
        if t.offset + t.nbytes > size:
            raise InputError(
                f"{where}: its {t.nbytes} bytes from byte {t.offset} reach beyond the file's {size}; it is cut "
                "short, download it again"
            )
        if t.offset < end:
            raise InputError(
                f"{where}: it overlaps {last}, which ends at byte {end}; the file is damaged, download it again"
            )
        end, last = t.offset + t.nbytes, show(t.name)


def _pad(n: int, alignment: int) -> int:
    return -(-n // alignment) * alignment


# --- split models ----------------------------------------------------------------------------------------


def _read_split(one: GGUFFile) -> GGUFFile:
    count = _split_number(one, "split.count")
    match = _SHARD.fullmatch(one.path.name)
    if match is None or int(match[3]) != count:
        raise InputError(
            f"{one.path}: this is one of {count} files of a split model, but its name does not end in "
            f"-NNNNN-of-{count:05d}.gguf; give all of them back their names"
        )
    paths = [one.path.with_name(f"{match[1]}-{i + 1:05d}-of-{count:05d}.gguf") for i in range(count)]
    missing = [p.name for p in paths if not os.path.exists(p)]
    if missing:
        more = f" and {len(missing) - 4} more" if len(missing) > 4 else ""
        raise InputError(
            f"{one.path}: of the {count} files of this split model {', '.join(missing[:4])}{more} "
            f"{'is' if len(missing) == 1 else 'are'} missing; download every file into one folder"
        )
    files = [one if p == one.path else _read_one(p) for p in paths]
    total = _split_number(files[0], "split.tensors.count")
    tensors: dict[str, TensorInfo] = {}
    for i, f in enumerate(files):
        for key, expected in (("split.no", i), ("split.count", count)):
            if (got := _split_number(f, key)) != expected:
                raise InputError(
                    f"{f.path}: {key} is {got}, expected {expected}; files of different models are mixed or renamed"
                )
        for key, value in f.metadata.items() if i else ():
            if not key.startswith("split.") and files[0].metadata.get(key) != value:
                raise InputError(
                    f"{f.path}: key {show(key)} is not the same in {files[0].path.name}; files of different models "
                    "are mixed"
                )
        for name, t in f.tensors.items():
            if name in tensors:
                raise InputError(
                    f"{f.path}: tensor {show(name)} is also in {paths[tensors[name].shard].name}; files of "
                    "different models are mixed"
                )
            tensors[name] = replace(t, shard=i)
    if len(tensors) != total:
        raise InputError(
            f"{files[0].path}: split.tensors.count is {total} but the {count} files hold {len(tensors)} tensors; "
            "files of different models are mixed"
        )
    return replace(
        files[0],
        paths=tuple(paths),
        metadata={k: v for k, v in files[0].metadata.items() if not k.startswith("split.")},
        tensors=tensors,
        size=sum(f.size for f in files),
        stamps=tuple(s for f in files for s in f.stamps),
    )


def _split_number(f: GGUFFile, key: str) -> int:
    value = f.metadata.get(key)
    if value is None or not isinstance(value.data, int) or value.kind == "bool":
        found = f"found {value.kind}" if value else "but it is missing"
        raise InputError(f"{f.path}: key {key!r} of a split model must be a whole number, {found}")
    return value.data


# --- tensor data -----------------------------------------------------------------------------------------


def raw(file: GGUFFile, name: str) -> Tensor:
    """The named tensor's blocks, lazily, as U8 of shape (rows, bytes per row); leading axes are flattened."""
    info = file.tensors.get(name)
    if info is None:
        raise InputError(f"{file.path}: there is no tensor {show(name)} among its {len(file.tensors)}")
    row = BLOCKS[info.type].row_bytes(info.shape[-1] if info.shape else 1)
    shape = (info.nbytes // row, row)
    path = file.paths[info.shard]
    origin = f"{path}: {name}"
    read_rows = partial(_read_rows, path, file.stamps[info.shard], info.offset, shape, origin)
    return Tensor(shape, "U8", read_rows, origin, ((str(path), file.stamps[info.shard]),))


def _read_rows(
    path: Path, stamp: Stamp, offset: int, shape: tuple[int, int], origin: str, start: int, stop: int
) -> NDArray[np.uint8]:
    rows, row = shape
    if not 0 <= start <= stop <= rows:
        raise IndexError(f"{origin}: rows {start}..{stop} of {rows}")
    return read_at(path, stamp, offset + start * row, (stop - start) * row, origin).reshape(-1, row)


# --- writing ---------------------------------------------------------------------------------------------


def header(
    metadata: Mapping[str, Value],
    tensors: Sequence[tuple[str, str, Sequence[int]]],
    alignment: int = ALIGNMENT,
) -> tuple[bytes, tuple[int, ...], int]:
    """The header with its padding, each tensor's absolute offset, and the size of the whole file.

    tensors: (name, type, shape in NumPy order), in the order of the data. Between tensors and after the last one
    the file holds zeros up to the alignment. An alignment other than 32 is added to the metadata, last, if it is
    not there. OutputError names the key or tensor that the format cannot hold. Same bytes as gguf.GGUFWriter.
    """
    if ALIGNMENT_KEY not in metadata and alignment != ALIGNMENT:
        metadata = {**metadata, ALIGNMENT_KEY: u32(alignment)}
    said = _checked_alignment(metadata, lambda text: OutputError(f"key {ALIGNMENT_KEY!r}: {text}"))
    if said != alignment:
        raise OutputError(f"key {ALIGNMENT_KEY!r} is {said} but the file is to be aligned to {alignment}")
    if max(len(tensors), len(metadata)) > COUNT_LIMIT:
        raise OutputError(
            f"{len(tensors)} tensors and {len(metadata)} keys: {COUNT_LIMIT} of each is the most"
        )
    out = bytearray(b"GGUF" + U32.pack(VERSION) + U64.pack(len(tensors)) + U64.pack(len(metadata)))
    for key, value in metadata.items():
        try:
            if not 0 < len(key.encode()) <= KEY_LIMIT:
                raise ValueError(f"the key must have 1 to {KEY_LIMIT} bytes")
            out += counted(key) + encode(value)
        except ValueError as e:
            raise OutputError(f"key {show(key)} cannot be written: {e}") from None
    names: set[str] = set()
    starts = []
    at = 0
    for name, type_name, shape in tensors:
        problem = _tensor_problem(name, type_name, shape, names)
        if problem:
            raise OutputError(f"tensor {show(name)} cannot be written: {problem}")
        names.add(name)
        block = BLOCKS[type_name]
        dims = [int(d) for d in reversed(shape)]
        out += counted(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, block.ggml_id, at)
        starts.append(at)
        at += _pad(prod(dims) // block.elems * block.nbytes, alignment)
    out += bytes(-len(out) % alignment)
    if len(out) > HEADER_LIMIT:
        raise OutputError(f"the header would have {len(out)} bytes and {HEADER_LIMIT} is the most")
    return bytes(out), tuple(len(out) + s for s in starts), len(out) + at


def _tensor_problem(name: str, type_name: str, shape: Sequence[int], names: set[str]) -> str:
    block = BLOCKS.get(type_name)
    cols = shape[-1] if len(shape) else 1
    text = name.encode("utf-8", "replace")
    checks = (
        (name in names, "there is one of that name already"),
        (text.decode() != name, "the name is not Unicode text"),
        (not 0 < len(text) <= NAME_LIMIT, f"llama.cpp wants a name of 1 to {NAME_LIMIT} bytes"),
        (block is None, f"GGUF has no type {show(type_name)}"),
        (len(shape) > MAX_DIMS, f"{len(shape)} dimensions, {MAX_DIMS} is the most"),
        (any(d < 1 for d in shape), f"shape {tuple(shape)} has no elements"),
        (prod(shape) >= 2**63, f"shape {tuple(shape)} overflows 63 bits"),
        (block and cols % block.elems, f"rows of {cols} elements are no multiple of {type_name}'s block"),
    )
    return next((problem for wrong, problem in checks if wrong), "")
