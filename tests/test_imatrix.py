"""Importance matrices: values against llama-quantize's own loader, and files that lie."""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from lconvert.errors import InputError, OptionError
from lconvert.formats import imatrix

Array = NDArray[np.float32]
KEYS: dict[str, Any] = {"datasets": ["wiki.txt", "code.txt"], "chunk_count": 7, "chunk_size": 512}
PER_LAYER = "per_layer_token_embd.weight"

# Made by arithmetic, so that the files are the same everywhere: (experts, columns) sums and per-expert counts.
SUMS: dict[str, Array] = {
    f"blk.{i}.{name}.weight": (
        (np.arange(rows * 96).reshape(rows, 96) * 7919 % 1009 / 8 + 0.1 * i).astype(np.float32)
    )
    for i, (name, rows) in enumerate([("attn_q", 1), ("ffn_down_exps", 4), ("ffn_up_exps", 8), ("attn_v", 1)])
}
COUNTS: dict[str, Array] = {
    name: np.array([3, 1000, 0, 2.5, 0.49, 0.5, 12345, 16777217], np.float32)[: len(sums)]
    for name, sums in SUMS.items()
}

# SHA-256 of the names and float32 values that quantize.cpp's load_imatrix yields for these files: printed by that
# function, compiled from llama-cpp-python 0.3.36.
EXPECTED = {
    "gguf": "f92618382e53ecd67c80d87667df23a3149612dfe2fda20a28529bde69327d96",
    "legacy": "2ac5ddab59ef274565c6647536cbee17b95764e0fecac663c8dadb65e0b0fc9c",
}


def write_gguf(path: Path, sums: Mapping[str, Array], counts: Mapping[str, Array], **keys: Any) -> Path:
    writer = gguf.GGUFWriter(path, "none")
    writer.add_type("imatrix")
    for key, value in (KEYS | keys).items():
        if value is None:
            continue
        add = writer.add_uint32 if isinstance(value, int) else writer.add_array
        add(f"imatrix.{key}", value)
    for name, array in sums.items():
        writer.add_tensor(f"{name}.in_sum2", array)
    for name, array in counts.items():
        writer.add_tensor(f"{name}.counts", array.reshape(-1, 1))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def legacy(entries: list[tuple[str, int, Array]], trailer: bytes = b"") -> bytes:
    out = struct.pack("<i", len(entries))
    for name, calls, values in entries:
        raw = name.encode()
        out += struct.pack("<i", len(raw)) + raw + struct.pack("<ii", calls, values.size) + values.tobytes()
    return out + trailer


def legacy_bytes() -> bytes:
    entries = [(name, calls, SUMS[name]) for name, calls in zip(SUMS, (7, 100, 1, 0), strict=True)]
    return legacy(entries, struct.pack("<ii", 7, 8) + b"wiki.txt")


def digest(weights: Mapping[str, Array]) -> str:
    h = hashlib.sha256()
    for name in sorted(weights):
        h.update(name.encode() + b"\0" + weights[name].astype("<f4").tobytes())
    return h.hexdigest()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "imatrix.gguf"


def test_gguf_values(path: Path) -> None:
    m = imatrix.read(write_gguf(path, SUMS, COUNTS))
    assert {n: w.shape for n, w in m.weights.items()} == {n: s.shape for n, s in SUMS.items()}
    assert digest(m.weights) == EXPECTED["gguf"]
    assert (m.datasets, m.chunks) == (("wiki.txt", "code.txt"), 7)
    assert dict(m) == dict(m.weights)
    assert len(m) == 4
    assert "blk.9.attn_q.weight" not in m


def test_legacy_values(path: Path) -> None:
    path.write_bytes(legacy_bytes())
    m = imatrix.read(path)
    assert {n: w.shape for n, w in m.weights.items()} == {n: (1, s.size) for n, s in SUMS.items()}
    assert digest(m.weights) == EXPECTED["legacy"]
    assert (m.datasets, m.chunks) == (("wiki.txt",), 7)


def test_expert_without_activations_weighs_all_columns_alike(path: Path) -> None:
    name = "blk.2.ffn_up_exps.weight"
    weights = imatrix.read(write_gguf(path, SUMS, COUNTS)).weights[name]
    # counts are rounded half away from zero: 0.49 is none, 0.5 one, 2.5 three
    assert (weights[[2, 4]] == 1).all()
    np.testing.assert_array_equal(weights[5], SUMS[name][5])
    np.testing.assert_array_equal(weights[3], SUMS[name][3] / np.float32(3))


def test_both_formats_agree(path: Path, tmp_path: Path) -> None:
    """What llama-imatrix --output-format dat writes for the same statistics, up to its own rounding."""
    whole = {n: np.maximum(np.round(c), 1) for n, c in COUNTS.items()}
    a = imatrix.read(write_gguf(path, SUMS, whole))
    calls = 7
    entries = [(n, calls, (s / whole[n][:, None] * calls).astype(np.float32)) for n, s in SUMS.items()]
    other = tmp_path / "imatrix.dat"
    other.write_bytes(legacy(entries))
    b = imatrix.read(other)
    for name, sums in SUMS.items():
        shape = (*sums.shape[:-1], 5, 96) if len(sums) > 1 else (5, 96)
        got = b.for_tensor(name, shape)
        want = a.for_tensor(name, shape)
        assert got is not None and want is not None
        np.testing.assert_allclose(got, want, rtol=3e-7)


def test_for_tensor(path: Path) -> None:
    path.write_bytes(
        legacy([("a.weight", 1, np.arange(12, dtype=np.float32)), (PER_LAYER, 1, np.ones(3, np.float32))])
    )
    m = imatrix.read(path)
    experts = m.for_tensor("a.weight", (3, 64, 4))
    assert experts is not None
    np.testing.assert_array_equal(experts, np.arange(12, dtype=np.float32).reshape(3, 4))
    assert m.for_tensor("b.weight", (64, 4)) is None
    assert m.for_tensor(PER_LAYER, (64, 4)) is None
    with pytest.raises(InputError, match=r"'a\.weight' has 12 importances, the tensor has 1 x 4 columns"):
        m.for_tensor("a.weight", (64, 4))
    with pytest.raises(ValueError, match="read-only"):
        experts[0, 0] = 1


def test_select(path: Path) -> None:
    m = imatrix.read(write_gguf(path, SUMS, COUNTS))
    assert set(imatrix.select(m, include=["ffn_up", "attn_v"]).weights) == {
        "blk.2.ffn_up_exps.weight",
        "blk.3.attn_v.weight",
    }
    assert set(imatrix.select(m, exclude=["ffn_", "attn_v"]).weights) == {"blk.0.attn_q.weight"}
    with pytest.raises(OptionError, match="cannot be used together"):
        imatrix.select(m, include=["a"], exclude=["b"])


def test_quantize_keys(tmp_path: Path) -> None:
    path = tmp_path / ("x" * 140)
    m = imatrix.read(write_gguf(path, SUMS, COUNTS, chunk_count=9))
    keys = imatrix.quantize_keys(m)
    assert [(k.removeprefix("quantize.imatrix."), v.kind, v.data) for k, v in keys.items()] == [
        ("file", "str", str(path)[:127]),
        ("dataset", "str", "wiki.txt"),
        ("entries_count", "u32", 4),
        ("chunks_count", "u32", 9),
    ]
    path.write_bytes(legacy([("a", 1, np.ones(1, np.float32))]))
    assert [k.removeprefix("quantize.imatrix.") for k in imatrix.quantize_keys(imatrix.read(path))] == [
        "file",
        "entries_count",
    ]


def test_legacy_details(path: Path) -> None:
    """A later entry replaces an earlier one, names end at a zero byte, and a damaged trailer is no matter."""
    one, two = np.ones(2, np.float32), np.full(2, 2, np.float32)
    for trailer in (
        b"",
        b"\1",
        struct.pack("<i", 7),
        struct.pack("<ii", 7, 1 << 30),
        struct.pack("<ii", 7, -1),
    ):
        path.write_bytes(legacy([("a\0b", 1, one), ("a", 2, two)], trailer))
        m = imatrix.read(path)
        assert list(m.weights) == ["a"]
        np.testing.assert_array_equal(m.weights["a"], [one])
        assert (m.datasets, m.chunks) == ((), 7 if len(trailer) > 1 else 0)


V = np.ones(4, np.float32)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "the number of entries of 4 bytes where 0 are left"),
        (struct.pack("<i", 0), "0 entries"),
        (struct.pack("<i", -5), "-5 entries"),
        (struct.pack("<i", 1 << 30) + bytes(100), "1073741824 entries in 104 bytes"),
        (struct.pack("<ii", 1, -1) + bytes(20), "the name of -1 bytes"),
        (
            struct.pack("<ii", 1, 1 << 30) + bytes(20),
            "entry 1 of 1: the name of 1073741824 bytes where 20 are left",
        ),
        (struct.pack("<iiii", 1, 0, 1, 0) + bytes(8), "0 values for ''"),
        (struct.pack("<iiii", 1, 0, 1, -1) + bytes(8), "-1 values"),
        (
            struct.pack("<iiii", 1, 0, 1, (1 << 31) - 1) + bytes(8),
            "values of 8589934588 bytes where 8 are left",
        ),
        (legacy([("a", 1, V), ("b", 1, V)])[:-1], "entry 2 of 2: values of 16 bytes where 15 are left"),
        (legacy([("a", 1, V * np.float32(np.nan))]), "'a' has an infinite or NaN importance"),
        (legacy([("a", 1, V * np.float32(np.inf))]), "'a' has an infinite or NaN importance"),
        (legacy([("a", 1, -V)]), "'a' has a negative importance"),
    ],
)
def test_bad_legacy(content: bytes, message: str, path: Path) -> None:
    path.write_bytes(content)
    with pytest.raises(InputError, match=message) as error:
        imatrix.read(path)
    assert str(error.value).startswith(f"{path}: ")


ONE = {"a": np.ones((1, 4), np.float32)}
COUNT = {"a": np.ones(1, np.float32)}


@pytest.mark.parametrize(
    ("sums", "counts", "keys", "message"),
    [
        (
            ONE,
            COUNT,
            {"chunk_size": None},
            r"key imatrix\.chunk_size is missing; this is not an importance matrix",
        ),
        (ONE, COUNT, {"chunk_count": [1]}, r"imatrix\.chunk_count is of kind array, expected u32"),
        ({}, {}, {}, "there are no importances in it"),
        (ONE, {}, {}, "'a' has no tensor 'counts'"),
        ({}, COUNT, {}, "'a' has no tensor 'in_sum2'"),
        ({"a": np.ones((1, 4), np.float16)}, COUNT, {}, r"'a\.in_sum2' is F16, importances are F32"),
        (ONE, {"a": np.ones(3, np.float32)}, {}, "'a' has 4 sums for 3 counts"),
        (ONE, {"a": np.full(1, np.nan, np.float32)}, {}, "'a' has an infinite or NaN count"),
        (ONE, {"a": np.full(1, np.inf, np.float32)}, {}, "'a' has an infinite or NaN count"),
        ({"a": np.full((1, 4), np.nan, np.float32)}, COUNT, {}, "'a' has an infinite or NaN importance"),
        ({"a": -np.ones((1, 4), np.float32)}, COUNT, {}, "'a' has a negative importance"),
    ],
)
def test_bad_gguf(
    sums: dict[str, Array], counts: dict[str, Array], keys: dict[str, Any], message: str, path: Path
) -> None:
    write_gguf(path, sums, counts, **keys)
    with pytest.raises(InputError, match=message) as error:
        imatrix.read(path)
    assert str(error.value).startswith(f"{path}: ")


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_damaged_files_are_refused_or_sane(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Whatever bytes change, the answer is an InputError or finite importances."""
    content = bytearray(legacy_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, min(len(content) - 1, 60)))
        content[at] = data.draw(st.integers(0, 255))
    path = tmp_path_factory.mktemp("damaged") / "m.dat"
    path.write_bytes(content[: data.draw(st.integers(0, len(content)))])
    try:
        m = imatrix.read(path)
    except InputError:
        return
    assert m.weights
    assert all(np.isfinite(w).all() and (w >= 0).all() for w in m.weights.values())
