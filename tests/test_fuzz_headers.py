"""Damaged and hostile files: every reader either reads one or says so in one LconvertError, soon and in little memory.

A seeded mutator damages valid files at the places that matter (lengths, counts, offsets, JSON tokens). What is
still read must be sound: its tensors load, and writing its header again gives a file that reads the same.
"""

from __future__ import annotations

import json
import random
import re
import struct
import time
import tracemalloc
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors

from lconvert.errors import LconvertError, UnsupportedError
from lconvert.formats import gguf
from lconvert.formats import safetensors as sf
from lconvert.kernels.blocks import BLOCKS

SECONDS = 1.0  # of CPU for one file; a read takes well under a millisecond
MEMORY = 1 << 20

NUMBERS = [
    0,
    1,
    2,
    3,
    7,
    8,
    9,
    31,
    32,
    33,
    255,
    256,
    2**16,
    2**31,
    2**32 - 1,
    2**32,
    2**62,
    2**63 - 1,
    2**63,
    2**64 - 1,
]

Mutation = Callable[[random.Random, bytearray], bytearray]


def flip(r: random.Random, b: bytearray) -> bytearray:
    for _ in range(r.choice([1, 1, 2, 8])):
        if b:
            b[r.randrange(len(b))] ^= 1 << r.randrange(8)
    return b


def overwrite(r: random.Random, b: bytearray) -> bytearray:
    """A number of 1 to 8 bytes where one may stand."""
    if b:
        at, fmt = r.randrange(len(b)), r.choice("BHIQ")
        raw = struct.pack("<" + fmt, r.choice(NUMBERS) % (1 << 8 * struct.calcsize(fmt)))
        b[at : at + len(raw)] = raw
    return b


def truncate(r: random.Random, b: bytearray) -> bytearray:
    return b[: r.randrange(len(b) + 1)]


def extend(r: random.Random, b: bytearray) -> bytearray:
    return b + bytes(r.choice([1, 7, 32, 4096]))


def insert(r: random.Random, b: bytearray) -> bytearray:
    at = r.randrange(len(b) + 1)
    return b[:at] + r.randbytes(r.choice([1, 4, 8, 32])) + b[at:]


def remove(r: random.Random, b: bytearray) -> bytearray:
    at = r.randrange(len(b) + 1)
    return b[:at] + b[at + r.choice([1, 4, 8, 32]) :]


def repeat(r: random.Random, b: bytearray) -> bytearray:
    """A stretch twice: keys and names become duplicates."""
    at = r.randrange(len(b) + 1)
    part = b[at : at + r.randrange(1, 80)]
    return b[:at] + part + b[at:]


COMMON: list[Mutation] = [flip, overwrite, overwrite, overwrite, truncate, extend, insert, remove, repeat]


def put(path: Path, content: bytes) -> None:
    """Path.write_bytes without cutting the file to nothing first, which takes a millisecond on some disks."""
    with open(path, "r+b" if path.exists() else "xb") as f:
        f.write(content)
        f.truncate()


def observe(read: Callable[[], Any]) -> tuple[Any, LconvertError | None]:
    """The result or the error; anything else, a slow read or a large one fails the test."""
    tracemalloc.reset_peak()
    before = tracemalloc.get_traced_memory()[0]
    start = time.process_time()
    result, error = None, None
    try:
        result = read()
    except LconvertError as e:
        error = e
    took, peak = time.process_time() - start, tracemalloc.get_traced_memory()[1] - before
    assert took < SECONDS and peak < MEMORY, (took, peak, error)
    if error is not None:
        assert str(error).isprintable() and len(str(error)) < 700, str(error)
    return result, error


@pytest.fixture(autouse=True)
def _trace() -> Any:
    tracemalloc.start()
    yield
    tracemalloc.stop()


# --- safetensors -----------------------------------------------------------------------------------------

TABLE = {
    "__metadata__": {"format": "pt"},
    "a.weight": {"dtype": "BF16", "shape": [2, 3], "data_offsets": [0, 12]},
    "b": {"dtype": "F32", "shape": [], "data_offsets": [12, 16]},
    "c": {"dtype": "BOOL", "shape": [4], "data_offsets": [16, 20]},
    "d": {"dtype": "F8_E4M3", "shape": [1, 4], "data_offsets": [20, 24]},
    "e": {"dtype": "I64", "shape": [0, 5], "data_offsets": [24, 24]},
}
DATA = bytes(range(16)) + b"\0\1\1\0" + b"wxyz"
TOKENS = [
    *map(str, NUMBERS), "-1", "1.0", "1e400", "true", "null", "NaN", '"x"', "[]", "{}", "[[[]]]", '"\\ud800"', '"U8"', '"F4"', '"F64"',
    '"shape"', '"a.weight"', '"__metadata__"', "9" * 5000, "[" * 5000,
]  # fmt: skip


_TOKEN = re.compile(r'"[^"]*"|-?[0-9]+|[\[\]{},:]')


def _tokens(r: random.Random, text: str) -> str:
    """One JSON token in place of another."""
    spans = [m.span() for m in _TOKEN.finditer(text)]
    a, b = r.choice(spans)
    return text[:a] + r.choice(TOKENS) + text[b:]


def _safetensors_case(r: random.Random) -> bytes:
    text = json.dumps(TABLE, separators=(",", ":"))
    for _ in range(r.choice([0, 1, 1, 2])):
        text = _tokens(r, text)
    head = text.encode("utf-8", "surrogatepass")
    content = bytearray(len(head).to_bytes(8, "little") + head + DATA)
    if r.random() < 0.6:
        content = r.choice(COMMON)(r, content)
    return bytes(content)


def _load(f: sf.SafetensorsFile, name: str) -> Any:
    return sf.tensor(f, name).load()


def test_safetensors(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    r = random.Random(20260101)
    read = refused = 0
    for _ in range(1500):
        content = _safetensors_case(r)
        put(path, content)
        f, error = observe(lambda: sf.read_header(path))
        if f is None:
            refused += 1
            continue
        read += 1
        theirs = dict(safetensors.deserialize(content))  # the package reads whatever we read
        assert {n: (t["dtype"], t["shape"]) for n, t in theirs.items()} == {
            t.name: (t.dtype, list(t.shape)) for t in f.tensors.values()
        }
        for t in f.tensors.values():
            assert bytes(theirs[t.name]["data"]) == content[t.start : t.stop]
            array, error = observe(partial(_load, f, t.name))
            if error is None:
                assert array.shape == t.shape and array.tobytes() == content[t.start : t.stop]
            else:
                assert isinstance(error, UnsupportedError) or "BOOL is 0 or 1" in str(error)
        head, offsets = sf.header_bytes([(t.name, t.dtype, t.shape) for t in f.tensors.values()], f.metadata)
        total = len(content) - min((t.start for t in f.tensors.values()), default=len(content))
        put(path, head + bytes(total))
        again = sf.read_header(path)
        assert again.metadata == f.metadata
        assert {t.name: (t.dtype, t.shape, t.start) for t in again.tensors.values()} == {
            t.name: (t.dtype, t.shape, at) for t, at in zip(f.tensors.values(), offsets, strict=True)
        }
    assert read > 100 and refused > 700  # the mutator stays near the edge


# --- GGUF ------------------------------------------------------------------------------------------------

METADATA = {
    "general.architecture": gguf.string("llama"),
    "general.alignment": gguf.u32(32),
    "u8": gguf.u8(1),
    "i64": gguf.i64(-5),
    "f64": gguf.f64(0.25),
    "ok": gguf.boolean(True),
    "tokens": gguf.array("str", ["<s>", "é", "", "\udcff"]),
    "scores": gguf.array("f32", [0.5, -1]),
    "flags": gguf.array("bool", [True, False]),
}
TENSORS = [("blk.0.w", "Q4_0", (2, 64)), ("norm", "F32", (3,)), ("e", "Q6_K", (1, 2, 256)), ("s", "F16", ())]


def _gguf_file(metadata: dict[str, gguf.Value], tensors: list[tuple[str, str, tuple[int, ...]]]) -> bytes:
    head, _, size = gguf.header(metadata, tensors)
    return head + bytes(size - len(head))


def _check_gguf(f: gguf.GGUFFile, scratch: Path) -> None:
    for t in f.tensors.values():
        raw = gguf.raw(f, t.name)
        got = raw.load()
        assert got.nbytes == t.nbytes and raw.shape[0] * raw.shape[1] == t.nbytes
        assert t.nbytes == int(np.prod(t.shape, dtype=object)) // BLOCKS[t.type].elems * BLOCKS[t.type].nbytes
    for v in f.metadata.values():
        if v.item is not None:
            assert len(list(v.data)) == len(v.data)  # type: ignore[arg-type]
    tensors = [(t.name, t.type, t.shape) for t in f.tensors.values()]
    if all(len(n.encode()) <= gguf.NAME_LIMIT for n in f.tensors):  # what we read may have longer names
        head, _, size = gguf.header(f.metadata, tensors, f.alignment)
        put(scratch, head + bytes(size - len(head)))
        again = gguf.read(scratch)
        assert again.metadata == f.metadata
        assert [(t.name, t.type, t.shape) for t in again.tensors.values()] == tensors


def test_gguf(tmp_path: Path) -> None:
    whole = _gguf_file(METADATA, TENSORS)
    path = tmp_path / "m.gguf"
    r = random.Random(20260102)
    read = refused = 0
    for _ in range(1500):
        content = bytearray(whole)
        for _ in range(r.choice([1, 1, 2, 3])):
            content = r.choice(COMMON)(r, content)
        put(path, content)
        f, _ = observe(lambda: gguf.read(path))
        if f is None:
            refused += 1
        else:
            read += 1
            if "split.count" not in f.metadata:
                _check_gguf(f, tmp_path / "again.gguf")
    assert read > 200 and refused > 500


def test_gguf_words(tmp_path: Path) -> None:
    """Every aligned and unaligned 4 and 8 byte field of the header, each with each nasty number."""
    head, _, size = gguf.header({k: METADATA[k] for k in ("u8", "tokens", "flags")}, TENSORS[:2])
    path = tmp_path / "m.gguf"
    read = refused = 0
    for at in range(4, len(head) - 8):
        for number in (0, 33, 2**31, 2**63, 2**64 - 1):
            content = bytearray(head) + bytes(size - len(head))
            content[at : at + 8] = struct.pack("<Q", number)
            put(path, content)
            f, _ = observe(lambda: gguf.read(path))
            refused, read = refused + (f is None), read + (f is not None)
    assert read and refused > read


def test_gguf_cut_anywhere(tmp_path: Path) -> None:
    whole = _gguf_file(METADATA, TENSORS)
    last = gguf.header(METADATA, TENSORS)[1][-1] + 2  # after it there is only padding
    path = tmp_path / "m.gguf"
    for n in range(len(whole) + 1):
        put(path, whole[:n])
        f, error = observe(lambda: gguf.read(path))
        assert (f is None) == (n < last), (n, error)


def test_split_gguf(tmp_path: Path) -> None:
    paths = [tmp_path / f"m-0000{i + 1}-of-00002.gguf" for i in range(2)]
    parts = [
        _gguf_file(
            {
                **(METADATA if i == 0 else {}),
                "split.no": gguf.u16(i),
                "split.count": gguf.u16(2),
                "split.tensors.count": gguf.i32(4),
            },
            TENSORS[2 * i : 2 * i + 2],
        )
        for i in range(2)
    ]
    r = random.Random(20260103)
    read = refused = 0
    for _ in range(400):
        which = r.randrange(2)
        contents = [bytearray(p) for p in parts]
        contents[which] = r.choice(COMMON)(r, contents[which])
        for p, content in zip(paths, contents, strict=True):
            put(p, content)
        f, _ = observe(lambda: gguf.read(paths[r.randrange(2)]))
        refused, read = refused + (f is None), read + (f is not None)
        if f is not None and len(f.paths) == 2:
            assert len(f.tensors) == 4
            for name in f.tensors:
                gguf.raw(f, name).load()
    assert read > 50 and refused > 100


@pytest.mark.parametrize("read", [sf.read_header, gguf.read])
def test_noise(read: Callable[[Path], Any], tmp_path: Path) -> None:
    r = random.Random(20260104)
    path = tmp_path / "noise"
    for _ in range(500):
        start = r.choice([b"", b"GGUF\3\0\0\0", b"\x20\0\0\0\0\0\0\0{"])
        put(path, start + r.randbytes(r.randrange(200)))
        result, _ = observe(lambda: read(path))
        assert result is None
