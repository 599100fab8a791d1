"""The table of TensorRT's rules against TensorRT-RTX itself: what it calls illegal fails there, and legal twins build."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

for package in ("onnx", "tensorrt_rtx"):
    pytest.importorskip(package, reason=f"{package} is not installed")
import onnx
import tensorrt_rtx as trt

from lconvert.converters import trt_rules
from lconvert.errors import InputError, LconvertError, UnsupportedError
from lconvert.formats import onnx_reader
from lconvert.formats.onnx_reader import OnnxFile
from tests.trt_graphs import PAIRS, Pair, Small, product


class Quiet(trt.ILogger):  # type: ignore[misc]
    def __init__(self) -> None:
        trt.ILogger.__init__(self)

    def log(self, severity: Any, message: str) -> None:
        pass


def builds(model: Any, sm: int) -> bool:
    """Whether the parser and the builder take a graph without dynamic shapes."""
    logger = Quiet()
    builder = trt.Builder(logger)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger)
    if not parser.parse(model.SerializeToString()):
        return False
    config = builder.create_builder_config()
    config.num_compute_capabilities = 1
    config.set_compute_capability(getattr(trt.ComputeCapability, f"SM{sm}"), 0)
    return builder.build_serialized_network(network, config) is not None


def unwritten(proto: Any) -> OnnxFile:
    return onnx_reader.opened(Path("small.onnx"), proto)


def ids(pair: Pair) -> str:
    return pair.rule


@pytest.mark.parametrize("pair", PAIRS, ids=ids)
def test_rules_agree_with_the_builder(pair: Pair) -> None:
    g = Small()
    bad = g.model(pair.bad(g))
    found = trt_rules.check(unwritten(bad), [pair.sm])
    assert {f.rule for f in found} == {pair.rule} and not builds(bad, pair.sm)
    rule = next(r for r in trt_rules.RULES if r.name == pair.rule)
    names = {*(n.name for n in bad.graph.node), *(t.name for t in bad.graph.initializer)}
    for f in found:
        assert f.node in names and f.found and f.remedy == rule.remedy and rule.why in str(f)
    g = Small()
    good = g.model(pair.good(g))
    assert trt_rules.check(unwritten(good), [pair.good_sm]) == [] and builds(good, pair.good_sm)


def test_every_rule_has_a_pair() -> None:
    """But those of dynamic caches, whose graphs are decoders': test_tensorrt.py builds them."""
    assert {r.name for r in trt_rules.RULES} - {p.rule for p in PAIRS} == {
        "interleaved-rotary",
        "static-cache",
    }


@pytest.mark.parametrize("kind", trt_rules.NO_OPERATORS)
def test_the_parser_has_none_of_the_operators_that_the_table_lists(kind: str) -> None:
    parser = trt.OnnxParser(trt.Builder(q := Quiet()).create_network(), q)
    assert kind in ("NonZero", "Unique") or not parser.supports_operator(kind)


def test_errors_name_node_rule_and_remedy() -> None:
    g = Small()
    bad = unwritten(g.model(product("INT8", zero=3)(g)))
    with pytest.raises(UnsupportedError) as e:
        trt_rules.require(bad)
    assert "DequantizeLinear.0" in str(e.value) and "zero-point" in str(e.value) and "trt dialect" in str(e.value)  # fmt: skip


# --- files -------------------------------------------------------------------------------------------------


def external(folder: Path, location: str, *, length: int | None = None, offset: int = 0) -> Path:
    g = Small()
    model = g.model(product("INT8")(g))
    codes = model.graph.initializer[0]
    data = bytes(codes.raw_data)
    codes.ClearField("raw_data")
    codes.data_location = onnx.TensorProto.EXTERNAL
    where = {"location": location, "offset": offset, "length": len(data) if length is None else length}
    for key, value in where.items():
        codes.external_data.add(key=key, value=str(value))
    (folder / "model.onnx").write_bytes(model.SerializeToString())
    (folder / "model.data").write_bytes(data)
    return folder / "model.onnx"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda d: external(d, "../model.data"), "must be a file beside the model"),
        (lambda d: external(d, "/etc/hostname"), "must be a file beside the model"),
        (lambda d: external(d, ""), "must be a file beside the model"),
        (lambda d: external(d, "gone.data"), "gone.data, which is missing"),
        (lambda d: external(d, "model.data", offset=8), "which has 4096"),
        (lambda d: external(d, "model.data", offset=-1), "expected a number of bytes"),
        (lambda d: external(d, "model.data", length=12), "12 bytes long"),
        (lambda d: external(d, "model.data", length=1 << 70), "expected a number of bytes"),
        (lambda d: _write(d, b"GGUF" + bytes(100)), "is not an ONNX file"),
        (lambda d: _write(d, b""), "is not an ONNX file"),
        (lambda d: _write(d, np.random.default_rng(1).bytes(5000)), "is not an ONNX file"),
        (lambda d: d / "absent.onnx", "no such file"),
        (lambda d: d, "is a folder"),
    ],
)
def test_files_that_are_refused(tmp_path: Path, make: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        onnx_reader.read(make(tmp_path))


def _write(folder: Path, data: bytes) -> Path:
    (folder / "model.onnx").write_bytes(data)
    return folder / "model.onnx"


def test_a_link_out_of_the_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "secret").write_bytes(bytes(4096))
    path = external(tmp_path / "in", "link.data")
    (tmp_path / "in" / "link.data").symlink_to(tmp_path / "secret")
    with pytest.raises(InputError, match="leads out of the folder"):
        onnx_reader.read(path)


def test_external_numbers_are_read(tmp_path: Path) -> None:
    model = onnx_reader.read(external(tmp_path, "model.data"))
    assert (model.tensors["t0"].numbers() == 0x11).all()
    assert trt_rules.check(model) == []
    before = model.digest()
    (tmp_path / "model.data").write_bytes(bytes(4096))
    assert model.digest() != before


def test_damaged_graphs_end_in_errors(tmp_path: Path) -> None:
    """Bytes flipped anywhere: findings or an intended error."""
    data = bytearray(external(tmp_path, "model.data").read_bytes())
    rng = np.random.default_rng(7)
    for _ in range(150):
        broken = bytearray(data)
        broken[rng.integers(len(data))] ^= 1 << rng.integers(8)
        try:
            trt_rules.check(onnx_reader.read(_write(tmp_path, bytes(broken))), [89])
        except LconvertError:
            continue
