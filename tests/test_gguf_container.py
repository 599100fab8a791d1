"""The GGUF container against gguf-py (writer and reader), ggml's own parser, literal bytes, and files that lie."""

from __future__ import annotations

import ctypes
import importlib.util
import os
import re
import struct
import time
import tracemalloc
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import gguf as gp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lconvert.errors import InputError, LconvertError, OutputError, UnsupportedError
from lconvert.formats import gguf
from lconvert.formats.gguf_values import KEY_LIMIT, Cursor, Kind
from lconvert.kernels.blocks import BLOCKS

# --- ggml's parser ---------------------------------------------------------------------------------------


class _InitParams(ctypes.Structure):
    _fields_ = (("no_alloc", ctypes.c_bool), ("ctx", ctypes.c_void_p))


def _load_ggml() -> ctypes.CDLL | None:
    spec = importlib.util.find_spec("llama_cpp")
    if spec is None or not spec.submodule_search_locations:
        return None
    found = sorted((Path(spec.submodule_search_locations[0]) / "lib").glob("libggml-base.*"))
    if not found:
        return None
    lib = ctypes.CDLL(str(found[0]))
    context, index = ctypes.c_void_p, ctypes.c_int64
    for name, result, arguments in (
        ("gguf_init_from_file", context, [ctypes.c_char_p, _InitParams]),
        ("gguf_free", None, [context]),
        ("gguf_get_n_kv", ctypes.c_int64, [context]),
        ("gguf_get_key", ctypes.c_char_p, [context, index]),
        ("gguf_get_n_tensors", ctypes.c_int64, [context]),
        ("gguf_get_tensor_name", ctypes.c_char_p, [context, index]),
        ("gguf_get_tensor_offset", ctypes.c_size_t, [context, index]),
        ("gguf_get_tensor_size", ctypes.c_size_t, [context, index]),
        ("gguf_get_tensor_type", ctypes.c_int, [context, index]),
        ("gguf_get_data_offset", ctypes.c_size_t, [context]),
    ):
        function = getattr(lib, name)
        function.restype, function.argtypes = result, arguments
    return lib


GGML = _load_ggml()
needs_ggml = pytest.mark.skipif(
    GGML is None, reason="llama-cpp-python, whose ggml parses GGUF, is not installed"
)


def ggml_accepts(path: Path) -> bool:
    assert GGML is not None
    ctx = GGML.gguf_init_from_file(os.fsencode(path), _InitParams(True, None))
    if ctx:
        GGML.gguf_free(ctx)
    return bool(ctx)


# --- files -----------------------------------------------------------------------------------------------


def text(s: str | bytes) -> bytes:
    raw = s.encode() if isinstance(s, str) else s
    return struct.pack("<Q", len(raw)) + raw


def key(name: str | bytes, kind: int, value: bytes) -> bytes:
    return text(name) + struct.pack("<I", kind) + value


def info(name: str | bytes = "t", dims: Sequence[int] = (4,), type_id: int = 0, offset: int = 0) -> bytes:
    return text(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, type_id, offset)


def build(
    keys: Sequence[bytes] = (), infos: Sequence[bytes] = (), data: int = 64, version: int = 3, align: int = 32
) -> bytes:
    """A file with true counts, zeros up to `align`, and `data` more."""
    out = b"GGUF" + struct.pack("<IQQ", version, len(infos), len(keys)) + b"".join(keys) + b"".join(infos)
    return out + bytes(-len(out) % align + data)


def put(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def write_model(
    path: Path,
    metadata: Mapping[str, gguf.Value],
    tensors: Mapping[str, tuple[str, tuple[int, ...]]],
    seed: int = 0,
) -> dict[str, bytes]:
    """A whole file by lconvert's header with random data; returns every tensor's bytes."""
    head, offsets, size = gguf.header(metadata, [(n, *t) for n, t in tensors.items()])
    rng = np.random.default_rng(seed)
    blobs = {}
    out = bytearray(head) + bytes(size - len(head))
    for (name, (type_name, shape)), at in zip(tensors.items(), offsets, strict=True):
        block = BLOCKS[type_name]
        blobs[name] = rng.bytes(int(np.prod(shape, dtype=int)) // block.elems * block.nbytes)
        out[at : at + len(blobs[name])] = blobs[name]
    path.write_bytes(out)
    return blobs


def test_literal_bytes(tmp_path: Path) -> None:
    metadata = {
        "general.architecture": gguf.string("llama"),
        "n": gguf.u32(7),
        "e": gguf.f32(0.5),
        "ok": gguf.boolean(True),
        "ids": gguf.array("i32", [1, -2]),
        "words": gguf.array("str", ["a", "é"]),
    }
    head, offsets, size = gguf.header(metadata, [("w", "Q8_0", (2, 32)), ("b", "F32", (3,))])
    expected = (
        b"GGUF" b"\3\0\0\0" b"\2\0\0\0\0\0\0\0" b"\6\0\0\0\0\0\0\0"
        b"\x14\0\0\0\0\0\0\0general.architecture" b"\x08\0\0\0" b"\5\0\0\0\0\0\0\0llama"
        b"\1\0\0\0\0\0\0\0n" b"\4\0\0\0" b"\7\0\0\0"
        b"\1\0\0\0\0\0\0\0e" b"\6\0\0\0" b"\0\0\0\x3f"
        b"\2\0\0\0\0\0\0\0ok" b"\7\0\0\0" b"\1"
        b"\3\0\0\0\0\0\0\0ids" b"\x09\0\0\0" b"\5\0\0\0" b"\2\0\0\0\0\0\0\0" b"\1\0\0\0" b"\xfe\xff\xff\xff"
        b"\5\0\0\0\0\0\0\0words" b"\x09\0\0\0" b"\x08\0\0\0" b"\2\0\0\0\0\0\0\0"
        b"\1\0\0\0\0\0\0\0a" b"\2\0\0\0\0\0\0\0\xc3\xa9"
        b"\1\0\0\0\0\0\0\0w" b"\2\0\0\0" b"\x20\0\0\0\0\0\0\0" b"\2\0\0\0\0\0\0\0" b"\x08\0\0\0" b"\0\0\0\0\0\0\0\0"
        b"\1\0\0\0\0\0\0\0b" b"\1\0\0\0" b"\3\0\0\0\0\0\0\0" b"\0\0\0\0" b"\x60\0\0\0\0\0\0\0"
    )  # fmt: skip
    assert head == expected + bytes(-len(expected) % 32)
    assert offsets == (len(head), len(head) + 96) and size == len(head) + 128  # 68 and 12 bytes, padded
    f = gguf.read(put(tmp_path / "m.gguf", head + bytes(range(68)) + bytes(28) + bytes(32)))
    assert f.metadata == metadata and list(f.metadata) == list(metadata)
    assert f.tensors == {
        "w": gguf.TensorInfo("w", "Q8_0", (2, 32), offsets[0], 68),
        "b": gguf.TensorInfo("b", "F32", (3,), offsets[1], 12),
    }
    assert (f.version, f.alignment, f.data_offset, f.size) == (3, 32, len(head), size)
    assert f.path == tmp_path / "m.gguf" and f.paths == (f.path,) and f.stamps[0].size == size
    t = gguf.raw(f, "w")
    assert t.shape == (2, 34) and t.dtype == "U8" and t.origin == f"{f.path}: w"
    assert t.read(1, 2).tolist() == [list(range(34, 68))]
    assert gguf.raw(f, "b").load().shape == (1, 12)


# --- gguf-py and ggml, both ways -------------------------------------------------------------------------

CODE: Mapping[Kind, gp.GGUFValueType] = {
    "u8": gp.GGUFValueType.UINT8, "i8": gp.GGUFValueType.INT8, "u16": gp.GGUFValueType.UINT16,
    "i16": gp.GGUFValueType.INT16, "u32": gp.GGUFValueType.UINT32, "i32": gp.GGUFValueType.INT32,
    "f32": gp.GGUFValueType.FLOAT32, "bool": gp.GGUFValueType.BOOL, "u64": gp.GGUFValueType.UINT64,
    "i64": gp.GGUFValueType.INT64, "f64": gp.GGUFValueType.FLOAT64, "str": gp.GGUFValueType.STRING,
}  # fmt: skip

words = st.text(st.characters(exclude_categories=("Cs",)), min_size=1, max_size=9)
ITEMS: Mapping[Kind, st.SearchStrategy[Any]] = {
    **{k: st.integers(0, 2**b - 1) for k, b in (("u8", 8), ("u16", 16), ("u32", 32), ("u64", 64))},
    **{k: st.integers(-(2 ** (b - 1)), 2 ** (b - 1) - 1) for k, b in (("i8", 8), ("i16", 16), ("i32", 32), ("i64", 64))},
    "f32": st.floats(width=32, allow_nan=False),
    "f64": st.floats(allow_nan=False),
    "bool": st.booleans(),
    "str": words,
}  # fmt: skip
scalars = st.sampled_from(sorted(ITEMS)).flatmap(lambda k: st.builds(gguf.Value, st.just(k), ITEMS[k]))
arrays = st.sampled_from(sorted(ITEMS)).flatmap(
    lambda k: st.builds(gguf.array, st.just(k), st.lists(ITEMS[k], min_size=1, max_size=5))
)
metadatas = st.dictionaries(
    words.filter(
        lambda k: k not in ("general.architecture", "general.alignment") and not k.startswith("split.")
    ),
    scalars | arrays,
    max_size=5,
)
shapes = st.sampled_from(sorted(BLOCKS)).flatmap(
    lambda t: st.tuples(
        st.just(t),
        st.lists(st.integers(1, 3), min_size=1, max_size=4).map(lambda s: (*s[:-1], s[-1] * BLOCKS[t].elems)),
    )
)
tensor_tables = st.dictionaries(words, shapes, max_size=4)


def gguf_py_writes(
    path: Path,
    metadata: Mapping[str, gguf.Value],
    tensors: Mapping[str, tuple[str, tuple[int, ...]]],
    alignment: int = 32,
    seed: int = 0,
) -> None:
    """The same content through gguf.GGUFWriter."""
    w = gp.GGUFWriter(path, "llama")
    for k, v in metadata.items():
        if v.kind == "array":
            assert v.item is not None
            w.add_key_value(k, list(v.data), gp.GGUFValueType.ARRAY, CODE[v.item])  # type: ignore[arg-type]
        elif k != "general.architecture":
            w.add_key_value(k, v.data, CODE[v.kind])
    if alignment != 32:
        w.add_custom_alignment(alignment)
    rng = np.random.default_rng(seed)
    for name, (type_name, shape) in tensors.items():
        block = BLOCKS[type_name]
        data = np.frombuffer(rng.bytes(int(np.prod(shape)) // block.elems * block.nbytes), np.uint8)
        w.add_tensor(
            name,
            data.reshape(*shape[:-1], -1),
            raw_dtype=gp.GGMLQuantizationType(block.ggml_id),
        )
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(metadatas, tensor_tables, st.sampled_from([32, 1, 8, 64, 4096]))
def test_same_bytes_as_gguf_py(
    tmp_path: Path,
    metadata: dict[str, gguf.Value],
    tensors: dict[str, tuple[str, tuple[int, ...]]],
    alignment: int,
) -> None:
    metadata = {"general.architecture": gguf.string("llama"), **metadata}
    gguf_py_writes(tmp_path / "theirs.gguf", metadata, tensors, alignment)
    theirs = (tmp_path / "theirs.gguf").read_bytes()
    head, offsets, size = gguf.header(metadata, [(n, *t) for n, t in tensors.items()], alignment)
    assert theirs[: len(head)] == head
    assert len(theirs) == size and len(head) % alignment == 0

    f = gguf.read(tmp_path / "theirs.gguf")
    expected = metadata if alignment == 32 else {**metadata, "general.alignment": gguf.u32(alignment)}
    assert dict(f.metadata) == expected and list(f.metadata) == list(expected)
    assert f.alignment == alignment and f.data_offset == len(head)
    assert [(t.name, t.type, t.shape, t.offset) for t in f.tensors.values()] == [
        (n, *t, at) for (n, t), at in zip(tensors.items(), offsets, strict=True)
    ]
    rng = np.random.default_rng(0)
    for name in tensors:
        assert gguf.raw(f, name).load().tobytes() == rng.bytes(f.tensors[name].nbytes)


MODEL: dict[str, tuple[str, tuple[int, ...]]] = {
    "token_embd.weight": ("Q6_K", (10, 256)),
    "blk.0.ffn_gate_exps.weight": ("Q4_K", (3, 4, 512)),
    "blk.0.attn_norm.weight": ("F32", (5,)),
    "four": ("BF16", (2, 1, 3, 7)),
}
METADATA = {
    "general.architecture": gguf.string("llama"),
    "general.alignment": gguf.u32(32),
    "tokenizer.ggml.tokens": gguf.array("str", ["<s>", "é", "", "\udcff\udcfe"]),
    "tokenizer.ggml.scores": gguf.array("f32", [0.5, -1, 2, 3]),
    "flags": gguf.array("bool", [True, False]),
    "empty": gguf.array("str", []),
    "none": gguf.array("u64", []),
    "big": gguf.u64(2**63),
    "tiny": gguf.i64(-(2**63)),
    "deep": gguf.f64(0.1),
    "blank": gguf.string(""),
    "raw": gguf.string("\udc80"),
}


def test_gguf_py_reads_what_we_write(tmp_path: Path) -> None:
    plain = {k: v for k, v in METADATA.items() if k not in ("empty", "none", "tokenizer.ggml.tokens", "raw")}
    blobs = write_model(tmp_path / "m.gguf", plain, MODEL)
    r = gp.GGUFReader(tmp_path / "m.gguf")
    for k, v in plain.items():
        got = r.fields[k].contents()
        want = v.data.tolist() if isinstance(v.data, np.ndarray) else v.data
        assert got == want, k
    f = gguf.read(tmp_path / "m.gguf")
    assert r.data_offset == f.data_offset
    for t in r.tensors:
        assert t.data.tobytes() == blobs[t.name] == gguf.raw(f, t.name).load().tobytes()
        assert (t.data_offset, t.n_bytes) == (f.tensors[t.name].offset, f.tensors[t.name].nbytes)
        assert tuple(reversed(t.shape.tolist())) == f.tensors[t.name].shape
        assert t.tensor_type.name == f.tensors[t.name].type


@needs_ggml
def test_ggml_reads_what_we_write(tmp_path: Path) -> None:
    assert GGML is not None
    write_model(tmp_path / "m.gguf", METADATA, MODEL)
    f = gguf.read(tmp_path / "m.gguf")
    ctx = GGML.gguf_init_from_file(os.fsencode(f.path), _InitParams(True, None))
    assert ctx
    assert [GGML.gguf_get_key(ctx, i).decode() for i in range(GGML.gguf_get_n_kv(ctx))] == list(METADATA)
    assert GGML.gguf_get_data_offset(ctx) == f.data_offset
    assert GGML.gguf_get_n_tensors(ctx) == len(MODEL)
    for i, t in enumerate(f.tensors.values()):
        assert GGML.gguf_get_tensor_name(ctx, i).decode() == t.name
        assert GGML.gguf_get_tensor_type(ctx, i) == BLOCKS[t.type].ggml_id
        assert GGML.gguf_get_tensor_size(ctx, i) == t.nbytes
        assert GGML.gguf_get_tensor_offset(ctx, i) + f.data_offset == t.offset
    GGML.gguf_free(ctx)


def test_llama_cpp_loads_a_vocabulary_that_we_write(tmp_path: Path) -> None:
    llama_cpp = pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256)), "▁h", "é", "▁hé"]
    metadata = {
        "general.architecture": gguf.string("llama"),
        "llama.context_length": gguf.u32(8),
        "llama.embedding_length": gguf.u32(8),
        "llama.block_count": gguf.u32(1),
        "llama.attention.head_count": gguf.u32(1),
        "llama.feed_forward_length": gguf.u32(8),
        "llama.attention.layer_norm_rms_epsilon": gguf.f32(1e-5),
        "tokenizer.ggml.model": gguf.string("llama"),
        "tokenizer.ggml.tokens": gguf.array("str", tokens),
        "tokenizer.ggml.scores": gguf.array("f32", [0.0] * 259 + [-1.0, -2.0, 0.0]),
        "tokenizer.ggml.token_type": gguf.array("i32", [2, 3, 3] + [6] * 256 + [1] * 3),
        "tokenizer.ggml.add_space_prefix": gguf.boolean(True),
    }
    head, _, size = gguf.header(metadata, [])
    assert len(head) == size
    model = llama_cpp.Llama(str(put(tmp_path / "v.gguf", head)), vocab_only=True, verbose=False)
    assert model.n_vocab() == len(tokens)
    assert model.tokenize("hé".encode(), add_bos=True) == [1, 261]
    assert model.detokenize([261]) == " hé".encode()


# --- round trips and values ------------------------------------------------------------------------------


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(metadatas, tensor_tables, st.binary(max_size=20))
def test_round_trip(
    tmp_path: Path,
    metadata: dict[str, gguf.Value],
    tensors: dict[str, tuple[str, tuple[int, ...]]],
    junk: bytes,
) -> None:
    raw_text = junk.decode("utf-8", "surrogateescape")
    metadata = {
        **metadata,
        "junk!": gguf.string(raw_text),
        "junks!": gguf.array("str", [raw_text, "", raw_text]),
    }
    blobs = write_model(tmp_path / "m.gguf", metadata, tensors)
    f = gguf.read(tmp_path / "m.gguf")
    assert dict(f.metadata) == metadata
    assert {n: (t.type, t.shape) for n, t in f.tensors.items()} == tensors
    assert {n: gguf.raw(f, n).load().tobytes() for n in tensors} == blobs
    head, _, _ = gguf.header(f.metadata, [(n, *t) for n, t in tensors.items()])
    assert (tmp_path / "m.gguf").read_bytes()[: len(head)] == head
    assert f.metadata["junk!"].data == raw_text and list(f.metadata["junks!"].data) == [
        raw_text,
        "",
        raw_text,
    ]  # type: ignore[arg-type]


def test_arrays_are_lazy_typed_and_read_only(tmp_path: Path) -> None:
    write_model(tmp_path / "m.gguf", METADATA, {})
    m = gguf.read(tmp_path / "m.gguf").metadata
    scores = m["tokenizer.ggml.scores"].data
    assert isinstance(scores, np.ndarray) and scores.dtype == np.float32 and not scores.flags.writeable
    tokens = m["tokenizer.ggml.tokens"].data
    assert isinstance(tokens, gguf.Strings) and len(tokens) == 4
    assert tokens[1] == "é" and tokens[-1] == "\udcff\udcfe" and tokens[1:3] == ["é", ""] and "<s>" in tokens
    assert (
        list(tokens) == tokens == ("<s>", "é", "", "\udcff\udcfe") and tokens != ["<s>"] and tokens != "<s>é"
    )
    assert repr(tokens) == "Strings(4)"
    with pytest.raises(IndexError):
        tokens[4]
    with pytest.raises(IndexError):
        tokens[-5]
    assert m["flags"].data.tolist() == [True, False]  # type: ignore[union-attr]


def test_values_are_equal_when_their_bytes_are() -> None:
    assert gguf.u32(1) == gguf.u32(1) != gguf.i32(1) != 1
    assert gguf.array("f32", [0.1]) == gguf.array("f32", np.float32([0.1]))
    assert gguf.f32(float("nan")) == gguf.f32(float("nan")) and gguf.f32(0.0) != gguf.f32(-0.0)
    assert len({gguf.string("a"), gguf.string("a"), gguf.array("str", ["a"])}) == 2


def test_rows_of_raw_tensors(tmp_path: Path) -> None:
    blobs = write_model(tmp_path / "m.gguf", {}, {**MODEL, "scalar": ("F32", ())})
    f = gguf.read(tmp_path / "m.gguf")
    t = gguf.raw(f, "blk.0.ffn_gate_exps.weight")
    assert t.shape == (12, 288)
    whole = np.frombuffer(blobs[t.origin.split(": ")[1]], np.uint8).reshape(12, 288)
    for a in range(13):
        for b in range(a, 13):
            assert np.array_equal(t.read(a, b), whole[a:b]) and t.read(a, b).shape == (b - a, 288)
    assert gguf.raw(f, "scalar").load().tobytes() == blobs["scalar"] and gguf.raw(f, "scalar").shape == (1, 4)
    for bad in ((-1, 2), (3, 2), (0, 13)):
        with pytest.raises(IndexError, match=f"rows {bad[0]}..{bad[1]} of 12"):
            t.read(*bad)
    with pytest.raises(InputError, match="there is no tensor 'x' among its 5"):
        gguf.raw(f, "x")
    whole_file = f.path.read_bytes()
    f.path.write_bytes(whole_file[:-1])
    with pytest.raises(InputError, match=r"exps.weight: the file changed while it was being converted"):
        t.load()


def test_version_2_and_missing_last_padding(tmp_path: Path) -> None:
    f = gguf.read(put(tmp_path / "m.gguf", build([], [info(dims=(3,))], data=12, version=2)))
    assert f.version == 2 and f.tensors["t"].nbytes == 12 and f.size == f.data_offset + 12
    no_tensors = build([key("a", 0, b"\1")])
    f = gguf.read(put(tmp_path / "n.gguf", no_tensors[: 24 + 14]))
    assert f.tensors == {} and f.metadata == {"a": gguf.u8(1)} and f.data_offset == f.size == 38


# --- files that lie --------------------------------------------------------------------------------------

COUNTS = b"GGUF" + struct.pack("<I", 3)
FITS = 1 << 18
BAD: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "not a GGUF file, it begins with b''; check the path or download it again"),
    "magic": (b"GGUX" + bytes(40), "not a GGUF file, it begins with b'GGUX'"),
    "magic cut": (b"GGU", "not a GGUF file"),
    "lfs": (b"version https://git-lfs.github.com/spec/v1\n", "run `git lfs pull`"),
    "version cut": (b"GGUF\3\0", "the file ends inside the file's first 24 bytes, which takes 4 bytes from byte 4 of 6"),
    "version 0": (build(version=0), "there is no version 0"),
    "counts cut": (COUNTS + bytes(12), "the file ends inside the file's first 24 bytes"),
    "tensor count": (COUNTS + struct.pack("<QQ", 5, 0) + bytes(100), "5 tensors do not fit into the 108 bytes that follow"),
    "tensor count huge": (COUNTS + struct.pack("<QQ", 2**64 - 1, 0), "18446744073709551615 tensors do not fit"),
    "key count": (COUNTS + struct.pack("<QQ", 0, 8) + bytes(100), "8 keys do not fit into the 100 bytes"),
    "key count huge": (COUNTS + struct.pack("<QQ", 0, 2**63) + bytes(100), "9223372036854775808 keys do not fit"),
    "key length": (build([struct.pack("<Q", 2**40) + bytes(99)]), "key 1 of 1: a name of 1099511627776 bytes, allowed are 1 to 65535"),
    "key empty": (build([key("", 0, b"\0")]), "key 1 of 1: a name of 0 bytes"),
    "key cut": (build([key("a", 0, b"\1"), struct.pack("<Q", 60000)], data=0), "the file ends inside key 2 of 2, which takes 60000 bytes"),
    "key not UTF-8": (build([key(b"a\xff", 0, b"\0")]), r"the key b'a\\xff' is not UTF-8"),
    "key twice": (build([key("a", 0, b"\0"), key("a", 4, bytes(4))]), "key 2 of 2: 'a' is there already"),
    "kind": (build([key("a", 13, bytes(8))]), "key 'a': unknown kind 13 of value"),
    "item kind": (build([key("a", 9, struct.pack("<IQ", 77, 1))]), "key 'a': unknown kind 77 of array items"),
    "bool": (build([key("a", 7, b"\2")]), "key 'a': a bool is 0 or 1, found 2"),
    "bools": (build([key("a", 9, struct.pack("<IQ", 7, 2) + b"\1\xff")]), "key 'a': a bool is 0 or 1, found 255"),
    "value cut": (build([key("abcdefg", 12, bytes(4))], data=0, align=1), "the file ends inside key 'abcdefg', which takes 8 bytes"),
    "string length": (build([key("a", 8, struct.pack("<Q", 2**50))]), "the file ends inside key 'a', which takes 1125899906842624 bytes"),
    "array length": (build([key("a", 9, struct.pack("<IQ", 4, 2**62))]), "inside key 'a', 4611686018427387904 items of u32, which takes 18446744073709551616 bytes"),
    "string count": (build([key("a", 9, struct.pack("<IQ", 8, 2**61))]), "inside key 'a', 2305843009213693952 items of str"),
    "item length": (
        build([key("a", 9, struct.pack("<IQ", 8, 3) + text("x") + struct.pack("<Q", 2**63) + bytes(30))]),
        "inside key 'a', item 2 of 3, which takes 9223372036854775816 bytes",
    ),
    "items cut": (build([key("a", 9, struct.pack("<IQ", 8, 2) + text("x" * 20) + bytes(4))], data=0, align=1), "the file ends inside key 'a', which takes 8 bytes"),
    "alignment kind": (build([key("general.alignment", 10, bytes(8))]), "key 'general.alignment': must be a u32, found u64"),
    "alignment 0": (build([key("general.alignment", 4, bytes(4))]), "must be a power of two of at most 1048576, found 0"),
    "alignment 12": (build([key("general.alignment", 4, struct.pack("<I", 12))]), "found 12"),
    "alignment huge": (build([key("general.alignment", 4, struct.pack("<I", 1 << 31))]), "found 2147483648"),
    "name empty": (build([], [info("")]), "tensor 1 of 1: a name of 0 bytes"),
    "name length": (build([], [struct.pack("<Q", 65536) + bytes(90000)]), "a name of 65536 bytes"),
    "name not UTF-8": (build([], [info(b"\xe9")]), r"the tensor name b'\\xe9' is not UTF-8"),
    "name twice": (build([], [info(), info(offset=32)]), "tensor 't': the name 't' is there already"),
    "dims": (build([], [info(dims=(1,) * 5)]), "tensor 't': 5 dimensions, 4 is the most"),
    "dims huge": (build([], [text("t") + struct.pack("<I", 2**32 - 1) + bytes(40)]), "4294967295 dimensions"),
    "dim zero": (build([], [info(dims=(4, 0))]), r"dimensions \[4, 0\] are not positive numbers"),
    "dim negative": (build([], [info(dims=(2**64 - 1,))]), "are not positive numbers"),
    "dims overflow": (build([], [info(dims=(2**32, 2**31))]), r"dimensions \[4294967296, 2147483648\] are not .* product fits 63 bits"),
    "dims wrap to small": (build([], [info(dims=(2**32, 2**32, 2))]), "product fits 63 bits"),
    "info cut": (build([], [info("a" * 9)[:-9]], data=0, align=1), "the file ends inside tensor 'aaaaaaaaa', which takes 4 bytes"),
    "row": (build([], [info(dims=(40,), type_id=2)]), "rows of 40 elements are no multiple of Q4_0's 32"),
    "offset misaligned": (build([], [info(offset=16)]), "tensor 't': its offset 16 is no multiple of the alignment 32"),
    "offset beyond": (build([], [info(offset=64)]), r"tensor 't': its 16 bytes from byte 128 reach beyond the file's 128"),
    "offset wraps": (build([], [info(offset=2**64 - 32)]), "reach beyond the file's 128"),
    "data cut": (build([], [info()], data=15), "reach beyond"),
    "no data": (build([], [info()], data=0, align=1), "reach beyond"),
    "overlap": (build([], [info("a", (9,)), info("b", offset=32)], 128), "tensor 'b': it overlaps 'a', which ends at byte"),
    "same offset": (build([], [info("a"), info("b")], 128), "it overlaps"),
}  # fmt: skip

UNSUPPORTED: dict[str, tuple[bytes, str]] = {
    "version 1": (build(version=1), "GGUF version 1 is not supported, only 2 and 3; convert the original model again"),
    "version 4": (build(version=4), "GGUF version 4 is not supported, only 2 and 3; a newer lconvert may read it"),
    "big-endian": (build(version=3 << 24), "this GGUF file is big-endian; .* gguf_convert_endian.py"),
    "ggjt": (b"tjgg" + bytes(60), "this is a GGJT file, from before GGUF; convert the original model again"),
    "nested": (build([key("a", 9, struct.pack("<IQ", 9, 1) + bytes(12))]), "key 'a': an array of arrays, which llama.cpp"),
    "type": (build([], [info(type_id=999)]), "tensor 't': ggml type 999 is none that lconvert reads .F32, .*NVFP4.; convert"),
    "removed type": (build([], [info(type_id=4)]), "tensor 't': ggml type 4 is none"),
}  # fmt: skip

#: Read by ggml: the writers of the world pad no last tensor, and ggml is lax where a lie does no harm to it.
GGML_READS = {
    "bool", "bools", "dim zero", "data cut", "key not UTF-8", "name empty", "name not UTF-8",
    "alignment huge",
}  # fmt: skip


@pytest.mark.parametrize("kind", [*BAD, *UNSUPPORTED])
def test_bad_file(kind: str, tmp_path: Path) -> None:
    content, message = (BAD | UNSUPPORTED)[kind]
    error: type[LconvertError] = InputError if kind in BAD else UnsupportedError
    path = put(tmp_path / "bad.gguf", content)
    with pytest.raises(error, match=rf"^{re.escape(str(path))}: .*{message}") as e:
        gguf.read(path)
    said = str(e.value)
    assert len(said) < 500 and said.isprintable()
    if GGML is not None:
        assert ggml_accepts(path) == (kind in GGML_READS)


@needs_ggml
def test_the_builder_of_bad_files_builds_good_ones(tmp_path: Path) -> None:
    keys = [key("a", 7, b"\1"), key("general.alignment", 4, struct.pack("<I", 32))]
    path = put(tmp_path / "good.gguf", build(keys, [info("a", (9,)), info("b", offset=64)], 128))
    assert ggml_accepts(path) and list(gguf.read(path).tensors) == ["a", "b"]


@pytest.mark.parametrize(
    "content",
    [
        COUNTS + struct.pack("<QQ", 2**40, 2**40) + bytes(136),
        build([key("a", 9, struct.pack("<IQ", 8, 2**40))]),
        build([key("a", 9, struct.pack("<IQ", 0, 2**40))]),
        build([key("a", 8, struct.pack("<Q", 2**40))]),
        build([], [info(dims=(2**31, 2**31))]),
        build([], [info(dims=(2**40,), type_id=12)]),
    ],
)
def test_lies_cost_nothing(content: bytes, tmp_path: Path) -> None:
    """Small files that claim terabytes, alone and in front of a terabyte of nothing."""
    path = put(tmp_path / "bad.gguf", content)
    tracemalloc.start()
    with pytest.raises(InputError):
        gguf.read(path)
    small = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert small < 100_000
    os.truncate(path, 1 << 40)
    if b"a" in content:
        with pytest.raises(
            InputError, match="beyond the 134217728 that a header may have; this is no sound model file"
        ):
            gguf.read(path)


def test_counts_are_limited_in_a_big_file(tmp_path: Path) -> None:
    path = put(tmp_path / "bad.gguf", COUNTS + struct.pack("<QQ", FITS + 1, 0))
    os.truncate(path, 1 << 40)
    with pytest.raises(InputError, match=r"262145 tensors do not fit .*\(and 262144 is the most\)"):
        gguf.read(path)


def test_a_file_that_shrinks_meanwhile(tmp_path: Path) -> None:
    with open(put(tmp_path / "f", b"GGUF123"), "rb", buffering=0) as f:
        c = Cursor(f, Path("f"), 1000)
        c.where = "the start"
        with pytest.raises(
            InputError, match="f: the file ends inside the start, which takes 100 bytes from byte 0 of 7"
        ):
            c.bytes(100)


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"none.gguf: there is no such file"):
        gguf.read(tmp_path / "none.gguf")
    with pytest.raises(InputError, match="this is a directory"):
        gguf.read(tmp_path)


def test_a_large_vocabulary_reads_fast_and_small(tmp_path: Path) -> None:
    n = 256_000
    tokens = [f"token number {i}" for i in range(n)]
    metadata = {
        "t": gguf.array("str", tokens),
        "s": gguf.array("f32", np.zeros(n)),
        "i": gguf.array("i32", np.zeros(n, int)),
    }
    path = put(tmp_path / "v.gguf", gguf.header(metadata, [])[0])
    seconds = []
    for _ in range(3):
        start = time.process_time()
        f = gguf.read(path)
        seconds.append(time.process_time() - start)
    assert min(seconds) < 1
    tracemalloc.start()
    f = gguf.read(path)
    held, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert held < 1.5 * f.size and peak < 4 * f.size
    assert f.metadata["t"].data[n - 1] == tokens[-1] and list(f.metadata["t"].data) == tokens  # type: ignore[index, arg-type]


# --- split models ----------------------------------------------------------------------------------------


def split_by_gguf_py(folder: Path, **metadata: gguf.Value) -> list[Path]:
    """Three files of one model, as gguf-py writes them."""
    w = gp.GGUFWriter(folder / "m.gguf", "llama", split_max_tensors=2)
    for k, v in metadata.items():
        w.add_key_value(k, v.data, CODE[v.kind])
    for i in range(5):
        w.add_tensor(f"t{i}", np.full((2, 3), i, np.float32))
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()
    return sorted(folder.glob("*.gguf"))


def test_split_model(tmp_path: Path) -> None:
    paths = split_by_gguf_py(tmp_path, n=gguf.u32(5))
    assert [p.name for p in paths] == [f"m-0000{i}-of-00003.gguf" for i in (1, 2, 3)]
    whole = gguf.read(paths[0])
    for p in paths[1:]:
        assert gguf.read(p) == whole
    assert whole.paths == tuple(paths) and whole.path == paths[0]
    assert dict(whole.metadata) == {"general.architecture": gguf.string("llama"), "n": gguf.u32(5)}
    assert [t.shard for t in whole.tensors.values()] == [0, 0, 1, 1, 2]
    assert whole.size == sum(p.stat().st_size for p in paths) and len(whole.stamps) == 3
    for i in range(5):
        t = gguf.raw(whole, f"t{i}")
        assert t.origin == f"{paths[i // 2]}: t{i}"
        assert np.array_equal(t.load().view("<f4"), np.full((2, 3), i))


def test_split_of_one(tmp_path: Path) -> None:
    content, _, _ = gguf.header({"split.count": gguf.u16(1), "split.no": gguf.u16(0)}, [])
    assert gguf.read(put(tmp_path / "any.gguf", content)).tensors == {}


def _rewrite(
    path: Path, change: Callable[[dict[str, gguf.Value], list[tuple[str, str, tuple[int, ...]]]], None]
) -> None:
    """Changes the metadata or the tensor list of a file; its data become zeros."""
    with_split = gguf._read_one(path)
    metadata = dict(with_split.metadata)
    tensors = [(t.name, t.type, t.shape) for t in with_split.tensors.values()]
    change(metadata, tensors)
    head, _, size = gguf.header(metadata, tensors)
    path.write_bytes(head + bytes(size - len(head)))


BAD_SPLITS: dict[str, tuple[Callable[[list[Path]], Any], str]] = {
    "one missing": (lambda p: p[1].unlink(), "of the 3 files of this split model m-00002-of-00003.gguf is missing; download every file"),
    "two missing": (lambda p: [q.unlink() for q in p[1:]], "m-00002-of-00003.gguf, m-00003-of-00003.gguf are missing"),
    "number": (lambda p: _rewrite(p[1], lambda m, t: m.update({"split.no": gguf.u16(2)})), "00002-of-00003.gguf: split.no is 2, expected 1"),
    "count": (lambda p: _rewrite(p[2], lambda m, t: m.update({"split.count": gguf.u16(4)})), "00003-of-00003.gguf: split.count is 4, expected 3"),
    "count kind": (lambda p: _rewrite(p[0], lambda m, t: m.update({"split.count": gguf.string("3")})), "key 'split.count' of a split model must be a whole number, found str"),
    "count array": (lambda p: _rewrite(p[0], lambda m, t: m.update({"split.count": gguf.array("i32", [1, 2])})), "must be a whole number, found array"),
    "count bool": (lambda p: _rewrite(p[0], lambda m, t: m.update({"split.count": gguf.boolean(True)})), "must be a whole number, found bool"),
    "count negative": (lambda p: _rewrite(p[0], lambda m, t: m.update({"split.count": gguf.i32(-3)})), "this is one of -3 files"),
    "no number": (lambda p: _rewrite(p[1], lambda m, t: m.pop("split.no")), "key 'split.no' of a split model must be a whole number, but it is missing"),
    "no total": (lambda p: _rewrite(p[0], lambda m, t: m.pop("split.tensors.count")), "'split.tensors.count' of a split model must be a whole number, but"),
    "total": (lambda p: _rewrite(p[2], lambda m, t: t.clear()), "split.tensors.count is 5 but the 3 files hold 4 tensors"),
    "twice": (lambda p: _rewrite(p[2], lambda m, t: t.append(("t1", "F32", (1,)))), "00003-of-00003.gguf: tensor 't1' is also in m-00001-of-00003.gguf"),
    "other key": (lambda p: _rewrite(p[1], lambda m, t: m.update({"general.architecture": gguf.string("qwen2")})), "key 'general.architecture' is not the same in m-00001-of"),
    "extra key": (lambda p: _rewrite(p[1], lambda m, t: m.update({"x": gguf.u8(1)})), "key 'x' is not the same in m-00001"),
    "damaged": (lambda p: p[1].write_bytes(b"GGUF"), "00002-of-00003.gguf: the file ends inside"),
}  # fmt: skip


@pytest.mark.parametrize("kind", BAD_SPLITS)
def test_bad_split(kind: str, tmp_path: Path) -> None:
    damage, message = BAD_SPLITS[kind]
    paths = split_by_gguf_py(tmp_path)
    damage(paths)
    with pytest.raises(InputError, match=message):
        gguf.read(paths[0])


@pytest.mark.parametrize(
    "name", ["model.gguf", "m-00001-of-00004.gguf", "m-1-of-3.gguf", "m-٠٠٠٠١-of-٠٠٠٠٣.gguf"]
)
def test_renamed_split(name: str, tmp_path: Path) -> None:
    first = split_by_gguf_py(tmp_path)[0].rename(tmp_path / name)
    with pytest.raises(
        InputError,
        match=r"one of 3 files of a split model, but its name does not end in -NNNNN-of-00003.gguf",
    ):
        gguf.read(first)


def test_many_missing_files_are_summed_up(tmp_path: Path) -> None:
    content, _, _ = gguf.header({"split.count": gguf.u16(65535)}, [])
    with pytest.raises(
        InputError, match=r"m-00002-of-65535.gguf, .*m-00005-of-65535.gguf and 65530 more are missing"
    ):
        gguf.read(put(tmp_path / "m-00001-of-65535.gguf", content))


# --- what cannot be written ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (gguf.u32(2**32), "4294967296 is no u32"),
        (gguf.u8(-1), "-1 is no u8"),
        (gguf.i16(1 << 15), "32768 is no i16"),
        (gguf.u16(1 << 16), "65536 is no u16"),
        (gguf.i8(128), "128 is no i8"),
        (gguf.u32(1.5), "1.5 is no u32"),  # type: ignore[arg-type]
        (gguf.u32(True), "True is no u32"),
        (gguf.boolean(1), "1 is no bool"),  # type: ignore[arg-type]
        (gguf.f32(1e39), r"1e\+39 is no f32"),
        (gguf.f32("x"), "'x' is no f32"),  # type: ignore[arg-type]
        (gguf.string("\ud800"), "surrogates not allowed"),
        (gguf.array("u8", [1, 300]), "item 1, 300, is no u8"),
        (gguf.array("u64", [-1]), "item 0, -1, is no u64"),
        (gguf.array("i64", [2**63]), "item 0, 9223372036854775808, is no i64"),
        (gguf.array("i32", [1.5]), "1.5 is no i32"),
        (gguf.array("u64", [0, 2**64]), "18446744073709551616 is no u64"),
        (gguf.array("i32", np.float32([1])), "1.0 is no i32"),
        (gguf.Value("array", np.float32([1]), "i32"), "float32 items cannot be stored as i32"),
        (gguf.array("i32", ["a"]), "items cannot be stored as i32"),
        (gguf.array("bool", [1]), "int64 items cannot be stored as bool"),
        (gguf.array("f32", [0, 1e39]), r"item 1, 1e\+39, is no f32"),
        (gguf.array("i32", [[1], [2]]), r"an array of shape \(2, 1\) is not one-dimensional"),
        (gguf.array("str", ["\ud800"]), "surrogates not allowed"),
        (gguf.array("array", []), "an array of array cannot be stored"),
        (gguf.Value("array", [1]), "an array of nothing cannot be stored"),  # type: ignore[list-item]
    ],
)
def test_unwritable_value(value: gguf.Value, message: str) -> None:
    with pytest.raises(OutputError, match=f"key 'some.key' cannot be written: .*{message}"):
        gguf.header({"some.key": value}, [])


@pytest.mark.parametrize(
    ("metadata", "tensors", "alignment", "message"),
    [
        ({"": gguf.u8(1)}, [], 32, "key '' cannot be written: the key must have 1 to 65535 bytes"),
        ({"k" * (KEY_LIMIT + 1): gguf.u8(1)}, [], 32, r"key 'k{77}'\.\.\. cannot be written"),
        ({"\ud800": gguf.u8(1)}, [], 32, "surrogates not allowed"),
        ({}, [], 0, "key 'general.alignment': must be a power of two of at most 1048576, found 0"),
        ({"general.alignment": gguf.u64(32)}, [], 32, "'general.alignment': must be a u32, found u64"),
        ({"general.alignment": gguf.u32(64)}, [], 32, "'general.alignment' is 64 but the file is to be aligned to 32"),
        ({}, [("a", "F32", (1,)), ("a", "F32", (1,))], 32, "tensor 'a' cannot be written: there is one of that name"),
        ({}, [("a" * 64, "F32", (1,))], 32, "llama.cpp wants a name of 1 to 63 bytes"),
        ({}, [("", "F32", (1,))], 32, "a name of 1 to 63 bytes"),
        ({}, [("\udc80", "F32", (1,))], 32, "the name is not Unicode text"),
        ({}, [("a", "F8", (1,))], 32, "GGUF has no type 'F8'"),
        ({}, [("a", "F32", (1,) * 5)], 32, "5 dimensions, 4 is the most"),
        ({}, [("a", "F32", (3, 0))], 32, r"shape \(3, 0\) has no elements"),
        ({}, [("a", "F32", (2**32, 2**32))], 32, r"shape \(4294967296, 4294967296\) overflows 63 bits"),
        ({}, [("a", "Q4_K", (2, 128))], 32, "rows of 128 elements are no multiple of Q4_K's block"),
        ({}, [("a", "F32", (1,))] * (FITS + 1), 32, "262145 tensors and 0 keys: 262144 of each is the most"),
        (
            {"a": gguf.array("u8", np.zeros(gguf.HEADER_LIMIT, np.uint8))}, [], 32,
            "the header would have 134217792 bytes and 134217728 is the most",
        ),
    ],
)  # fmt: skip
def test_unwritable_header(metadata: Any, tensors: Any, alignment: int, message: str) -> None:
    with pytest.raises(OutputError, match=message):
        gguf.header(metadata, tensors, alignment)
