"""The safetensors container against the safetensors package, literal bytes, and files that lie."""

from __future__ import annotations

import json
import math
import os
import re
import threading
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors
import safetensors.numpy
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lconvert.errors import InputError, OutputError, UnsupportedError
from lconvert.formats import files
from lconvert.formats import safetensors as sf
from lconvert.ir import DTYPE_SIZE

SHARED = Path(__file__).parent.parent.parent / "shared"


def write(path: Path, header: Any, data: bytes = b"") -> Path:
    """A file of a header (JSON if not bytes) and data, with a true header length."""
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(raw).to_bytes(8, "little") + raw + data)
    return path


def entry(dtype: Any = "U8", shape: Any = (1,), offsets: Any = (0, 1), **more: Any) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets, **more}


# --- literal bytes and the package, both ways ------------------------------------------------------------


def test_literal_bytes(tmp_path: Path) -> None:
    head, offsets = sf.header_bytes([("b", "U8", (3,)), ("a", "F32", (2, 1))], {"format": "pt", "by": "é"})
    text = (
        '{"__metadata__":{"by":"é","format":"pt"},"a":{"dtype":"F32","shape":[2,1],"data_offsets":[0,8]},'
        '"b":{"dtype":"U8","shape":[3],"data_offsets":[8,11]}}  '
    )
    assert head == b"\x98\0\0\0\0\0\0\0" + text.encode()
    assert offsets == (168, 160)
    path = tmp_path / "m.safetensors"
    path.write_bytes(head + np.array([1.5, -2], "<f4").tobytes() + bytes([7, 8, 9]))
    f = sf.read_header(path)
    assert f.tensors == {
        "a": sf.TensorInfo("a", "F32", (2, 1), 160, 168),
        "b": sf.TensorInfo("b", "U8", (3,), 168, 171),
    }
    assert f.metadata == {"format": "pt", "by": "é"}
    assert f.size == 171 and f.stamp.size == 171 and f.path == path
    assert sf.tensor(f, "a").load().tolist() == [[1.5], [-2.0]]
    assert sf.tensor(f, "b").load().tolist() == [7, 8, 9]


#: safetensors dtype: torch dtype, for every one that torch can write.
TORCH = {
    "BOOL": "bool", "U8": "uint8", "I8": "int8", "F8_E5M2": "float8_e5m2", "F8_E4M3": "float8_e4m3fn",
    "F8_E4M3FNUZ": "float8_e4m3fnuz", "F8_E5M2FNUZ": "float8_e5m2fnuz", "F8_E8M0": "float8_e8m0fnu",
    "I16": "int16", "U16": "uint16", "F16": "float16", "BF16": "bfloat16", "I32": "int32", "U32": "uint32",
    "F32": "float32", "C64": "complex64", "F64": "float64", "I64": "int64", "U64": "uint64",
}  # fmt: skip

tensors = st.dictionaries(
    st.text(st.characters(exclude_categories=("Cs",)), max_size=8).filter(lambda s: s != "__metadata__"),
    st.tuples(st.sampled_from(sorted(TORCH)), st.lists(st.integers(0, 4), max_size=3)),
    max_size=6,
)
metadata = st.none() | st.dictionaries(
    st.text(st.characters(exclude_categories=("Cs",)), max_size=5),
    st.text(st.characters(exclude_categories=("Cs",)), max_size=9),
    min_size=1,  # safetensors 0.8 writes broken JSON for an empty table and no tensors
    max_size=1,
)


@settings(max_examples=150, deadline=None)
@given(tensors, metadata)
def test_header_is_the_packages(table: dict[str, tuple[str, list[int]]], meta: dict[str, str] | None) -> None:
    made = {n: torch.zeros(shape, dtype=getattr(torch, TORCH[d])) for n, (d, shape) in table.items()}
    theirs = safetensors.torch.save(made, metadata=meta)
    ours, _ = sf.header_bytes([(n, d, s) for n, (d, s) in table.items()], meta)
    assert theirs[: len(ours)] == ours
    assert len(ours) % 8 == 0


def test_empty_metadata_is_kept() -> None:
    theirs = safetensors.numpy.save({"a": np.zeros(1, np.uint8)}, metadata={})
    assert theirs[:-1] == sf.header_bytes([("a", "U8", (1,))], {})[0]
    assert b"__metadata__" not in sf.header_bytes([("a", "U8", (1,))])[0]


def test_header_does_not_depend_on_the_order_given() -> None:
    entries = [("x", "F16", (3,)), ("y", "F32", (1,)), ("w", "F16", (2,))]
    a, at = sf.header_bytes(entries, {"q": "1", "p": "2"})
    b, bt = sf.header_bytes(entries[::-1], {"p": "2", "q": "1"})
    assert a == b and at == bt[::-1]
    assert at == (len(a) + 8, len(a), len(a) + 4)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(tensors, metadata, st.integers(0, 2**32))
def test_reads_what_the_package_writes(
    tmp_path: Path, table: dict[str, tuple[str, list[int]]], meta: dict[str, str] | None, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    made, want = {}, {}
    for name, (dtype, shape) in table.items():
        n = math.prod(shape) * sf.DTYPE_BITS[dtype] // 8
        bits = rng.integers(0, 2 if dtype == "BOOL" else 256, n, np.uint8)
        want[name] = bits.tobytes()
        made[name] = (
            torch.frombuffer(bytearray(bits), dtype=getattr(torch, TORCH[dtype])).reshape(shape)
            if n
            else (torch.zeros(shape, dtype=getattr(torch, TORCH[dtype])))
        )
    path = tmp_path / "m.safetensors"
    safetensors.torch.save_file(made, path, metadata=meta)
    f = sf.read_header(path)
    assert dict(f.metadata) == (meta or {})
    assert {n: (t.dtype, list(t.shape)) for n, t in f.tensors.items()} == table
    for name, info in f.tensors.items():
        assert path.read_bytes()[info.start : info.stop] == want[name]
        if info.dtype in DTYPE_SIZE:
            t = sf.tensor(f, name)
            assert t.shape == info.shape and t.dtype == info.dtype
            whole = t.load()
            assert whole.shape == info.shape and whole.tobytes() == want[name]
            if t.shape and t.rows > 1:
                assert t.read(1, t.rows).tobytes() == whole[1:].tobytes()


def test_package_reads_what_we_write(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    arrays = {
        "F64": rng.standard_normal((3, 2)),
        "F32": rng.standard_normal((0, 5)).astype("f4"),
        "F16": np.float16([[1, 2]]),
        "I64": np.asarray(-5),
        "U8": np.arange(7, dtype="u1"),
        "BOOL": np.array([True, False]),
    }
    head, offsets = sf.header_bytes([(f"t.{d}", d, a.shape) for d, a in arrays.items()], {"format": "np"})
    out = bytearray(head + bytes(sum(a.nbytes for a in arrays.values())))
    for at, a in zip(offsets, arrays.values(), strict=True):
        out[at : at + a.nbytes] = a.tobytes()
    path = tmp_path / "m.safetensors"
    path.write_bytes(out)
    with safetensors.safe_open(path, "np") as f:
        assert f.metadata() == {"format": "np"}
        for d, a in arrays.items():
            got = f.get_tensor(f"t.{d}")
            assert got.dtype == a.dtype and got.shape == a.shape and np.array_equal(got, a)


@pytest.mark.skipif(not (SHARED / "models").is_dir(), reason="the shared models folder is missing")
@pytest.mark.parametrize("name", ["wiki-gpt2", "stories260K"])
def test_real_checkpoints(name: str) -> None:
    path = SHARED / "models" / name / "model.safetensors"
    f = sf.read_header(path)
    entries = [(t.name, t.dtype, t.shape) for t in f.tensors.values()]
    head, offsets = sf.header_bytes(entries, f.metadata)
    assert path.read_bytes()[: len(head)] == head
    assert list(offsets) == [t.start for t in f.tensors.values()]
    for key, want in safetensors.torch.load_file(path).items():
        assert sf.tensor(f, key).load().tobytes() == want.view(torch.uint8).numpy().tobytes()


# --- lazy tensors ----------------------------------------------------------------------------------------


@pytest.fixture
def matrix(tmp_path: Path) -> tuple[sf.SafetensorsFile, np.ndarray[Any, Any]]:
    m = np.arange(5 * 7, dtype="<f4").reshape(5, 7)
    path = tmp_path / "m.safetensors"
    safetensors.numpy.save_file({"m": m, "s": np.asarray(2.5), "v": m[0].copy(), "e": m[:0].copy()}, path)
    return sf.read_header(path), m


def test_row_slabs(matrix: tuple[sf.SafetensorsFile, np.ndarray[Any, Any]]) -> None:
    f, m = matrix
    t = sf.tensor(f, "m")
    assert t.origin == f"{f.path}: m"
    for a in range(6):
        for b in range(a, 6):
            got = t.read(a, b)
            assert got.shape == (b - a, 7) and got.flags.c_contiguous and np.array_equal(got, m[a:b])
    scalar = sf.tensor(f, "s")
    assert scalar.shape == () and scalar.read(0, 1).tolist() == [2.5] and scalar.load() == 2.5
    assert sf.tensor(f, "e").load().shape == (0, 7)
    assert t.read(0, 1) is not t.read(0, 1)  # fresh each time


def test_column_slabs(matrix: tuple[sf.SafetensorsFile, np.ndarray[Any, Any]]) -> None:
    f, m = matrix
    t = sf.transposed(f, "m")
    assert t.shape == (7, 5) and t.dtype == "F32"
    assert np.array_equal(t.load(), m.T)
    for a in range(8):
        for b in range(a, 8):
            got = t.read(a, b)
            assert got.shape == (b - a, 5) and got.flags.c_contiguous and np.array_equal(got, m.T[a:b])
    empty = sf.transposed(f, "e")
    assert empty.shape == (7, 0) and empty.load().shape == (7, 0)


@pytest.mark.parametrize("make", [sf.tensor, sf.transposed])
@pytest.mark.parametrize("bad", [(-1, 2), (3, 2), (0, 8)])
def test_rows_out_of_range_never_read_a_neighbour(
    matrix: tuple[sf.SafetensorsFile, np.ndarray[Any, Any]], make: Any, bad: tuple[int, int]
) -> None:
    with pytest.raises(IndexError, match=f"rows {bad[0]}..{bad[1]} of "):
        make(matrix[0], "m").read(*bad)


def test_threads_share_a_tensor(tmp_path: Path) -> None:
    m = np.random.default_rng(0).integers(0, 1 << 30, (400, 64), np.int32)
    safetensors.numpy.save_file({"m": m}, tmp_path / "m.safetensors")
    f = sf.read_header(tmp_path / "m.safetensors")
    rows, columns = sf.tensor(f, "m"), sf.transposed(f, "m")
    right: list[bool] = []

    def work(k: int) -> None:
        for i in range(0, 400, 25):
            a = (i * 7 + k * 31) % 390
            right.append(np.array_equal(rows.read(a, a + 10), m[a : a + 10]))
            right.append(np.array_equal(columns.read(a % 60, a % 60 + 4), m.T[a % 60 : a % 60 + 4]))

    threads = [threading.Thread(target=work, args=(k,)) for k in range(8)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert len(right) == 8 * 32 and all(right)


def test_slabs_bound_memory_and_leave_no_descriptor(tmp_path: Path) -> None:
    m = np.zeros((2048, 1024), np.float32)  # 8 MB
    safetensors.numpy.save_file({"m": m}, tmp_path / "m.safetensors")
    f = sf.read_header(tmp_path / "m.safetensors")
    before = len(os.listdir("/dev/fd"))
    tracemalloc.start()
    for i in range(0, 2048, 128):
        sf.tensor(f, "m").read(i, i + 128)
    for i in range(0, 1024, 64):
        sf.transposed(f, "m").read(i, i + 64)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2.2 * 512 * 1024  # a slab is 512 kB, a transposed one is held twice
    assert len(os.listdir("/dev/fd")) == before


def test_a_file_that_changes_is_noticed(matrix: tuple[sf.SafetensorsFile, np.ndarray[Any, Any]]) -> None:
    f, _ = matrix
    whole = f.path.read_bytes()
    lazy = [sf.tensor(f, "m"), sf.transposed(f, "m")]
    f.path.write_bytes(whole[:-100])
    for t in lazy:
        with pytest.raises(
            InputError, match=rf"m.*: the file changed .*{len(whole)} bytes .*{len(whole) - 100} now.*start"
        ):
            t.load()
    f.path.unlink()
    with pytest.raises(InputError, match="no such file"):
        lazy[0].load()


def test_a_short_read_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "f"
    path.write_bytes(b"12345")
    with files.reading(path) as (_, stamp):
        pass
    with pytest.raises(
        InputError, match=r"^here: 9 bytes wanted but the file ended after 3; .* download it again"
    ):
        files.read_at(path, stamp, 2, 9, "here")
    info = sf.TensorInfo("t", "U8", (3, 4), 0, 12)  # a header that lies about a file checked otherwise
    f = sf.SafetensorsFile(path, {"t": info}, {}, 5, stamp)
    with pytest.raises(InputError, match="2 bytes wanted but the file ended after 1"):
        sf.transposed(f, "t").read(0, 2)


def test_bools_are_zero_or_one(tmp_path: Path) -> None:
    f = sf.read_header(write(tmp_path / "f", {"t": entry("BOOL", [2, 2], [0, 4])}, bytes([1, 0, 2, 1])))
    assert sf.tensor(f, "t").read(0, 1).tolist() == [[True, False]]
    with pytest.raises(InputError, match="t: a BOOL is 0 or 1, found 2; the file is damaged"):
        sf.tensor(f, "t").load()


def test_dtypes_that_the_ir_does_not_hold(tmp_path: Path) -> None:
    f = sf.read_header(
        write(tmp_path / "f", {"t": entry("F8_E4M3", [2], [0, 2]), "u": entry("F4", [4], [2, 4])}, b"1234")
    )
    with pytest.raises(UnsupportedError, match="tensor 't' has dtype F8_E4M3; supported are F64, I64"):
        sf.tensor(f, "t")
    with pytest.raises(UnsupportedError, match="tensor 'u' has dtype F4"):
        sf.transposed(f, "u")


def test_unknown_names_and_shapes(matrix: tuple[sf.SafetensorsFile, np.ndarray[Any, Any]]) -> None:
    with pytest.raises(InputError, match="there is no tensor 'w' among its 4"):
        sf.tensor(matrix[0], "w")
    with pytest.raises(InputError, match=r"tensor 'v' of shape \(7,\) is no matrix to transpose"):
        sf.transposed(matrix[0], "v")


# --- files that lie --------------------------------------------------------------------------------------

NO_PACKAGE_CHECK = {
    "duplicate tensor",
    "duplicate key",
    "unknown key",
    "rank",
}  # read by the safetensors package

BAD: dict[str, tuple[Any, bytes, str]] = {
    "not JSON": (b"{nope", b"", "not valid JSON"),
    "not UTF-8": (b'{"\xff":0}', b"", r"not UTF-8 \(byte 10: 0xff\)"),
    "no object": ([1], b"", r"must be a JSON object, found \[1\]"),
    "empty header": (b"", b"", "not valid JSON"),
    "endless digits": (b'{"t":' + b"9" * 5000 + b"}", b"", "not valid JSON"),
    "deep": (b'{"t":' + b"[" * 200_000, b"", "nests too deeply"),
    "NaN": (b'{"t":{"dtype":"U8","shape":[NaN],"data_offsets":[0,1]}}', b"x", "shape must be .* found .nan"),
    "duplicate tensor": (
        b'{"t":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},"t":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}',
        b"x", "'t' is listed twice",
    ),
    "duplicate key": (
        b'{"__metadata__":{"a":"1","a":"2"}}', b"", "'a' is listed twice",
    ),
    "unknown key": ({"t": entry(order="F")}, b"x", "tensor 't': needs exactly dtype, shape and data_offsets"),
    "missing key": ({"t": {"dtype": "U8", "shape": [1]}}, b"x", "needs exactly"),
    "no table": ({"t": 5}, b"", "needs exactly .*, found 5"),
    "metadata numbers": ({"__metadata__": {"a": 1}}, b"", "'__metadata__' must be a table of strings, found .*1"),
    "metadata list": ({"__metadata__": ["a"]}, b"", "must be a table of strings"),
    "half a surrogate": (b'{"\\ud800":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}', b"x", "half a surrogate pair"),
    "metadata surrogate": (b'{"__metadata__":{"a":"\\udc00"}}', b"", "must be a table of strings"),
    "unknown dtype": ({"t": entry("Q4")}, b"x", "unknown dtype 'Q4'; known are U64, .*BOOL"),
    "dtype number": ({"t": entry(8)}, b"x", "unknown dtype 8"),
    "dtype list": ({"t": entry(["U8"])}, b"x", r"unknown dtype \['U8'\]"),
    "negative dim": ({"t": entry(shape=[-1])}, b"x", r"shape must be .* of 0 or more, found \[-1\]"),
    "float dim": ({"t": entry(shape=[1.0])}, b"x", r"found \[1.0\]"),
    "bool dim": ({"t": entry(shape=[True])}, b"x", r"found \[True\]"),
    "string dim": ({"t": entry(shape=["1"])}, b"x", r"found \['1'\]"),
    "huge dim": ({"t": entry(shape=[2**64 + 1])}, b"x", "shape must be"),
    "shape no list": ({"t": entry(shape=1)}, b"x", "shape must be .* found 1;"),
    "rank": ({"t": entry(shape=[1] * 65)}, b"x", "at most 64 whole numbers"),
    "overflow": ({"t": entry(shape=[2**32, 2**32])}, b"x", r"shape \[4294967296, 4294967296\] overflows 63 bits"),
    "overflow to zero": ({"t": entry(shape=[2**33, 2**33, 0], offsets=[0, 0])}, b"", "overflows 63 bits"),
    "offsets reversed": ({"t": entry(offsets=[1, 0])}, b"x", r"a start and a stop not before it, found \[1, 0\]"),
    "offsets negative": ({"t": entry(offsets=[-1, 0])}, b"x", "a start and a stop"),
    "offsets three": ({"t": entry(offsets=[0, 1, 2])}, b"x", "a start and a stop"),
    "offsets float": ({"t": entry(offsets=[0, 1.0])}, b"x", "a start and a stop"),
    "size": (
        {"t": entry("F32", [3], [0, 8])}, bytes(8),
        r"F32 of shape \[3\] takes 12 bytes, but data_offsets span 8 bytes; the file is damaged",
    ),
    "half bytes": ({"t": entry("F4", [3], [0, 2])}, b"xx", "takes 12 bits"),
    "beyond the end": ({"t": entry(shape=[9], offsets=[0, 9])}, b"x", r"ends at byte \d+ but the file has \d+"),
    "far beyond": ({"t": entry(shape=[2**62], offsets=[0, 2**62])}, b"x", "ends at byte 461168601842738"),
    "overlap": (
        {"a": entry(shape=[2], offsets=[0, 2]), "b": entry(shape=[2], offsets=[1, 3])}, b"xxx",
        r"tensor 'b' starts at byte \d+, inside tensor 'a', which ends at \d+; tensors may not overlap",
    ),
    "same place": ({"a": entry(), "b": entry()}, b"x", "tensor '[ab]' starts at byte .* inside tensor"),
    "hole": ({"a": entry(), "b": entry(offsets=[2, 3])}, b"xxx", "1 unaccounted bytes lie between tensor 'a' and tensor 'b'"),
    "hole first": ({"b": entry(offsets=[2, 3])}, b"xxx", "2 unaccounted bytes lie between the header and tensor 'b'"),
    "tail": ({"t": entry()}, b"xyz", "2 unaccounted bytes follow tensor 't'"),
    "tail alone": ({}, b"xyz", "3 unaccounted bytes follow the header"),
}  # fmt: skip


@pytest.mark.parametrize("kind", BAD)
def test_bad_header(kind: str, tmp_path: Path) -> None:
    header, data, message = BAD[kind]
    path = write(tmp_path / "bad.safetensors", header, data)
    with pytest.raises(InputError, match=rf"^{re.escape(str(path))}: .*{message}") as e:
        sf.read_header(path)
    text = str(e.value)
    assert len(text) < 600 and "\n" not in text and text.isprintable()
    if kind in NO_PACKAGE_CHECK:
        safetensors.deserialize(path.read_bytes())
    else:
        with pytest.raises(safetensors.SafetensorError):
            safetensors.deserialize(path.read_bytes())


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "0 bytes are too few .* interrupted, repeat it"),
        (b"\x05\0\0\0\0\0\0", "7 bytes are too few"),
        (b"\x05\0\0\0\0\0\0\0{}", "the header would have 5 bytes but only 2 follow its length; .* cut short"),
        (
            b"\x01\xe1\xf5\x05\0\0\0\0{}",
            "would have 100000001 bytes and 100000000 is the most; check the path",
        ),
        (b"\xff" * 8, "would have 18446744073709551615 bytes"),
        (b"version https://git-lfs.github.com/spec/v1\n", "Git LFS pointer, run `git lfs pull`"),
        (
            b"PK\x03\x04" + bytes(30),
            "zip archive, perhaps a PyTorch checkpoint: save the model as safetensors",
        ),
        (b"\x80\x02\x8a\nl\xfc\x9cF\xf9", "Python pickle, which is never loaded"),
        (b"GGUF\x03\0\0\0" + bytes(16), "it is a GGUF file"),
        (b"<!DOCTYPE html>", "it is a web page"),
        (b"<html><body>", "it is a web page"),
    ],
)
def test_bad_start(content: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "bad"
    path.write_bytes(content)
    with pytest.raises(InputError, match=message):
        sf.read_header(path)


def test_what_is_no_file(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="none: there is no such file; check the path"):
        sf.read_header(tmp_path / "none")
    with pytest.raises(InputError, match="this is a directory; name a model file"):
        sf.read_header(tmp_path)
    os.mkfifo(tmp_path / "pipe")  # opening it would wait for ever
    with pytest.raises(InputError, match="this is not a regular file"):
        sf.read_header(tmp_path / "pipe")
    with pytest.raises(InputError, match="cannot be read: File name too long"):
        sf.read_header(tmp_path / ("x" * 300))
    with pytest.raises(InputError, match=r"'a\\x00b': cannot be read: no path holds a null byte"):
        sf.read_header("a\0b")
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(InputError, match="cannot be read"):
        sf.read_header(tmp_path / "loop")


def test_lies_cost_nothing(tmp_path: Path) -> None:
    """A terabyte of nothing behind a header that claims most of it."""
    path = tmp_path / "sparse"
    path.write_bytes((1 << 39).to_bytes(8, "little") + b"{}")
    os.truncate(path, 1 << 40)
    tracemalloc.start()
    with pytest.raises(InputError, match="549755813888 bytes and 100000000 is the most"):
        sf.read_header(path)
    name, shape = "n" * 1000, [1] * 1000  # a message stays short
    write(path, {name: entry(shape=shape)})
    with pytest.raises(InputError, match=r"tensor 'n{77}'\.\.\.: shape must be .* found \[1, 1.*\.\.\.\];"):
        sf.read_header(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 20


def test_a_file_that_shrinks_while_its_header_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path / "f", {"t": entry()}, b"x")

    def fill(f: Any, offset: int, out: Any) -> int:
        if offset == 8:
            os.truncate(path, 20)
        return files.fill(f, offset, out)

    monkeypatch.setattr(sf, "fill", fill)
    with pytest.raises(
        InputError, match="f: the header: 60 bytes wanted but the file ended after 12; it was cut short"
    ):
        sf.read_header(path)


def test_a_bomb_of_lists_is_not_parsed(tmp_path: Path) -> None:
    path = write(tmp_path / "bomb", b'{"a":[' + b"[]," * 2_000_000 + b"1]}")
    tracemalloc.start()
    with pytest.raises(InputError, match="too many lists and tables for 0 tensors; it is damaged"):
        sf.read_header(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 20 << 20  # the header itself has 6 MB, parsed it would take 130


def test_many_tensors_read_quickly(tmp_path: Path) -> None:
    table = {f"model.layers.{i}.mlp.weight": entry(offsets=[i, i + 1]) for i in range(20_000)}
    f = sf.read_header(write(tmp_path / "f", table, bytes(20_000)))
    assert len(f.tensors) == 20_000 and f.tensors["model.layers.7.mlp.weight"].start == f.size - 20_000 + 7


def test_benign_oddities_are_read(tmp_path: Path) -> None:
    assert sf.read_header(write(tmp_path / "a", {})).tensors == {}
    assert sf.read_header(write(tmp_path / "b", {"__metadata__": None})).metadata == {}
    f = sf.read_header(
        write(
            tmp_path / "c",
            {"b": entry(offsets=[1, 2]), "": entry(), "z": entry(shape=[0], offsets=[1, 1])},
            b"xy",
        )
    )
    assert list(f.tensors) == ["", "z", "b"]
    assert sf.read_header(write(tmp_path / "d", b" {}  ")).tensors == {}


# --- what cannot be written ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("entries", "meta", "message"),
    [
        ([("t", "Q4_0", (1,))], None, "tensor 't': safetensors has no dtype 'Q4_0'"),
        ([("t", "U8", (1,)), ("t", "F32", (1,))], None, "tensor 't' is to be written twice"),
        ([("__metadata__", "U8", (1,))], None, "'__metadata__': .* the name is reserved"),
        (
            [("t", "F4", (3,))],
            None,
            r"'t': F4 of shape \(3,\) cannot be written: it does not fill whole bytes",
        ),
        ([("t\ud800", "U8", (1,))], None, r"not Unicode text: '\\ud800'"),
        ([], {"a": "\udc80"}, r"not Unicode text: '\\udc80'"),
        (
            [],
            {"a": "x" * sf.HEADER_LIMIT},
            "would have 100000032 bytes and 100000000 is the most; split the model",
        ),
    ],
)
def test_unwritable(entries: Any, meta: Any, message: str) -> None:
    with pytest.raises(OutputError, match=message):
        sf.header_bytes(entries, meta)
