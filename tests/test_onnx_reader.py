"""ONNX files that are damaged, lie or want to reach out of their folder: one clear error each; and what is read back of good ones."""

from __future__ import annotations

import random
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

onnx = pytest.importorskip("onnx", reason="onnx is not installed")

import lconvert
from lconvert.cli import one_line
from lconvert.converters import onnx as exporter
from lconvert.converters import onnx_presets, onnx_source
from lconvert.errors import InputError, LconvertError, UnsupportedError
from lconvert.executor import execute
from lconvert.formats import onnx_reader
from lconvert.ir import QTensor
from lconvert.kernels.qtensor import effective, values
from lconvert.plan import refusals
from tests.conftest import DEMO
from tests.quantized_models import SOURCES


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("good") / "int4"
    model = onnx_presets.recipe("int4", "ort").apply(lconvert.read(DEMO))
    execute(exporter.plan(model), folder)
    return folder


@pytest.fixture()
def folder(good: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(good, tmp_path / "m"))


def read(folder: Path) -> onnx_source.Found:
    return onnx_source.read(onnx_reader.read(folder / "model.onnx"))


# --- good ones ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dialect", ["ort", "trt"])
@pytest.mark.parametrize("kind", SOURCES)
def test_every_kind_is_read_back(kind: str, dialect: str, tmp_path: Path) -> None:
    """What a graph in F32 holds is the source to the bit, and so are codes and scales of one in F16."""
    model = SOURCES[kind]()
    try:
        plan = exporter.plan(model, exporter.Options(dialect))
    except UnsupportedError:
        return  # activations that have no graph: test_onnx_quantized
    if refusals(plan):
        return
    execute(plan, tmp_path / "m")
    found = read(tmp_path / "m")
    assert found.dtype == ("F32" if dialect == "ort" else "F16")
    for role, entry in found.model.entries.items():
        source = model.entries[role]
        wanted = values(source.data) if entry.transform is not None else effective(source)
        got = values(entry.data)
        if dialect == "ort" or isinstance(entry.data, QTensor):
            assert np.array_equal(got, wanted), role
        else:
            assert np.abs(got - wanted).max() <= 2.0**-10 * np.abs(wanted).max(), role
        assert (entry.transform is None) == (
            source.transform is None or not isinstance(entry.data, QTensor)
        ), role


def test_parts_of_a_matrix(good: Path) -> None:
    """Rows of a transposed, packed matrix are those of the whole, wherever they begin."""
    entry = read(good).model.entries["layers.1.attn.q"].data
    assert isinstance(entry, QTensor)
    whole = entry.codes.load()
    for start, stop in ((0, 1), (1, 2), (3, 8), (7, 32), (31, 256)):
        assert np.array_equal(entry.codes.read(start, stop), whole[start:stop])


def test_the_onnx_package_unpacks_the_same(good: Path) -> None:
    pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    from lconvert.validators import onnx_tier

    assert onnx_tier.independent(read(good)) == ([], 0.0)


# --- bad ones ----------------------------------------------------------------------------------------------

Change = Callable[[Any, Path], None]


def external(key: str, value: str | None) -> Change:
    """Another value of a key of one weight's external data."""

    def change(proto: Any, folder: Path) -> None:
        t = next(t for t in proto.graph.initializer if t.name == "layers.0.attn.q")
        kept = [(e.key, e.value) for e in t.external_data if e.key != key]
        del t.external_data[:]
        for k, v in [*kept, *([(key, value)] if value is not None else [])]:
            t.external_data.add(key=k, value=v)

    return change


def linked(proto: Any, folder: Path) -> None:
    outside = folder.parent / "outside"
    outside.write_bytes((folder / "model.onnx.data").read_bytes())
    (folder / "model.onnx.data").unlink()
    (folder / "model.onnx.data").symlink_to(outside)


def cut(proto: Any, folder: Path) -> None:
    data = (folder / "model.onnx.data").read_bytes()
    (folder / "model.onnx.data").write_bytes(data[: len(data) // 2])


def gone(proto: Any, folder: Path) -> None:
    (folder / "model.onnx.data").unlink()


def dims(*shape: int) -> Change:
    def change(proto: Any, folder: Path) -> None:
        t = next(t for t in proto.graph.initializer if t.name == "layers.0.attn.q")
        del t.dims[:]
        t.dims.extend(shape)

    return change


def twice(proto: Any, folder: Path) -> None:
    proto.graph.initializer.append(proto.graph.initializer[0])


def typed(number: int) -> Change:
    def change(proto: Any, folder: Path) -> None:
        next(t for t in proto.graph.initializer if t.name == "layers.0.attn.q").data_type = number

    return change


def empty(proto: Any, folder: Path) -> None:
    proto.ClearField("graph")


def without(name: str) -> Change:
    def change(proto: Any, folder: Path) -> None:
        proto.graph.initializer.remove(next(t for t in proto.graph.initializer if t.name == name))

    return change


def untyped(proto: Any, folder: Path) -> None:
    node = next(n for n in proto.graph.node if n.op_type == "DequantizeLinear")
    node.attribute[0].ClearField("type")


def without_inputs(proto: Any, folder: Path) -> None:
    node = next(n for n in proto.graph.node if n.op_type == "MatMul")
    del node.input[1:]


def no_logits(proto: Any, folder: Path) -> None:
    for port in proto.graph.output:
        port.name = port.name.replace("logits", "scores")


WORDS = {
    "../../etc/passwd": (external("location", "../../etc/passwd"), "must be a file beside the model"),
    "/etc/passwd": (external("location", "/etc/passwd"), "must be a file beside the model"),
    "no place": (external("location", None), "must be a file beside the model"),
    "a folder above": (external("location", ".."), "must be a file beside the model"),
    "a NUL": (external("location", "model.onnx.data\0"), "must be a file beside the model"),
    "a link outside": (linked, "a link that leads out of the folder"),
    "offset beyond": (external("offset", "99999999999"), "it is cut off"),
    "offset below": (external("offset", "-8"), "expected a number"),
    "offset of words": (external("offset", "0x10"), "expected a number"),
    "offset of many digits": (external("offset", "9" * 30), "expected a number"),
    "length of another": (external("length", "12"), "bytes long"),
    "cut data": (cut, "it is cut off"),
    "no data": (gone, "which is missing"),
    "negative shape": (dims(-1, 256), "impossible shape"),
    "huge shape": (dims(1 << 40, 1 << 40), "impossible shape"),
    "another shape": (dims(256, 255), "bytes long"),
    "two of a name": (twice, "two initializers"),
    "type 99": (typed(99), "which lconvert does not read"),
    "strings": (typed(8), "which lconvert does not read"),
    "no graph": (empty, "holds no graph"),
    "no weight": (without("layers.1.attn.q"), "takes 'layers.1.attn.q', which nothing before it makes"),
    "no scale": (without("layers.1.attn.q.scale"), "which nothing before it makes"),
    "an attribute of no type": (untyped, "lconvert writes no such graph"),
    "a product of one thing": (without_inputs, "has 1 inputs"),
    "no logits": (no_logits, "no output logits"),
}


@pytest.mark.parametrize("what", WORDS)
def test_what_is_wrong_has_a_name(what: str, folder: Path) -> None:
    change, words = WORDS[what]
    proto = onnx.load(folder / "model.onnx", load_external_data=False)
    change(proto, folder)
    (folder / "model.onnx").write_bytes(proto.SerializeToString())
    with pytest.raises(LconvertError, match=words) as caught:
        read(folder)
    assert "model.onnx" in str(caught.value) or "node" in str(caught.value)
    assert one_line(str(caught.value)).isprintable() and len(str(caught.value)) < 1000
    with pytest.raises(LconvertError):
        lconvert.validate(DEMO, folder, tiers=["structure"])


@pytest.mark.parametrize("content", [b"", b"no graph", b"\x08\x0a" * 40, b"\xff" * 1000])
def test_files_that_are_something_else(content: bytes, folder: Path) -> None:
    (folder / "model.onnx").write_bytes(content)
    with pytest.raises(InputError, match=r"is not an ONNX file|holds no graph"):
        read(folder)


def test_damaged_bytes(folder: Path) -> None:
    """Flipped, cut and repeated bytes of the graph: it is read, or refused in one sentence, soon."""
    data = (folder / "model.onnx").read_bytes()
    rng = random.Random(5)
    refused = 0
    for _ in range(150):
        bad = bytearray(data)
        for _ in range(rng.choice([1, 1, 3, 20])):
            at = rng.randrange(len(bad))
            match rng.randrange(3):
                case 0:
                    bad[at] ^= 1 << rng.randrange(8)
                case 1:
                    del bad[at : at + rng.randrange(1, 60)]
                case _:
                    bad[at:at] = bytes(rng.randrange(256) for _ in range(rng.randrange(1, 8)))
        (folder / "model.onnx").write_bytes(bad)
        start = time.process_time()
        try:
            read(folder)
        except LconvertError as e:
            refused += 1
            assert len(str(e)) < 2000 and one_line(str(e)).isprintable()
        assert time.process_time() - start < 3
    assert refused > 50
