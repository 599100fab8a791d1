"""Inputs rounded by ONNX nodes: bit for bit what the formulas say and what compressed-tensors does, what has no graph, and what ONNX
Runtime must be told.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lconvert.ir import E2M1, E4M3, ActSpec, Grid, Model, dense, int_grid

for package in ("onnx", "onnxruntime", "torch", "transformers"):
    pytest.importorskip(package, reason=f"{package} is not installed")
import onnxruntime
import torch

import lconvert
from lconvert.converters import onnx, onnx_activations, onnx_rounding, onnx_weights
from lconvert.converters.kinds import KINDS, matrices, plain, rounded
from lconvert.converters.onnx_builder import Builder
from lconvert.executor import execute
from lconvert.formats import onnx_reader
from lconvert.forward import Forward
from lconvert.validators import carried
from tests import rounded_inputs
from tests.conftest import ROOT
from tests.test_onnx_archs import Session, tokens

#: fp32 of another order.
CLOSE = 1e-5


# --- rounding of inputs, node by node ----------------------------------------------------------------------


def graph_of(a: ActSpec, width: int, powers: bool = False, dtype: str = "F32") -> Any:
    """A session that only rounds its input (batch, sequence, width)."""
    b = Builder(plain(), onnx_weights.DIALECTS["ort"], dtype)
    assert onnx_activations.reason(a, b, powers) == ""
    b.graph.op("Identity", onnx_activations.quantized(b, "x", a, powers), output="y")
    name = {"F32": "FLOAT", "F16": "FLOAT16"}[dtype]
    b.graph.input("x", name, ("b", "s", width))
    b.graph.output("y", name, ("b", "s", width))
    return onnxruntime.InferenceSession(b.graph.model("", {}), providers=["CPUExecutionProvider"])


def samples(width: int) -> np.ndarray:
    """Wide and narrow tokens, one of zeros, one tiny, values between two codes, outliers."""
    rng = np.random.default_rng(5)
    x = rng.standard_normal((2, 40, width)).astype(np.float32) * np.exp2(
        rng.integers(-9, 9, (2, 40, 1))
    ).astype(np.float32)
    x[0, 0] = 0
    x[0, 1] *= np.float32(1e-12)
    x[0, 2] = np.resize(np.float32([6, 5, 3.5, 2.5, 1.75, 1.25, 0.75, 0.25, -5, -0.75, 1.5, 0]), width)
    x[0, 3, ::16] = 2.0 ** rng.integers(-6, 7, x[0, 3, ::16].shape)
    x[0, 4] = 448.0
    x[0, 5] = -7.0
    x[1, 0, 3] = 3000
    return x


def scalar(x: float) -> Any:
    return dense(np.float32([x]))


INT8, UINT8, INT4 = int_grid(8, True), int_grid(8, False), int_grid(4, True)
SPECS: Mapping[str, tuple[ActSpec, bool]] = {
    "int8 token": (ActSpec(INT8, "token", True), False),
    "int8 tensor dynamic": (ActSpec(INT8, "tensor", True), False),
    "uint8 token": (ActSpec(UINT8, "token", True), False),
    "int4 token": (ActSpec(INT4, "token", True), False),
    "int8 group": (ActSpec(INT8, "group", True, 32), False),
    "fp8 token": (ActSpec(E4M3, "token", True), False),
    "fp8 tensor dynamic": (ActSpec(E4M3, "tensor", True), False),
    "fp8 bounded": (ActSpec(E4M3, "token", True, scale=dense(np.float64([1200 / 448]))), False),
    "fp8 group": (ActSpec(E4M3, "group", True, 128), False),
    "fp8 powers": (ActSpec(E4M3, "group", True, 128), True),
    "mxfp8": (ActSpec(E4M3, "group", True, 32), True),
    "mxfp4": (ActSpec(E2M1, "group", True, 32), True),
    "nvfp4 multiplied": (ActSpec(E2M1, "group", True, 16, scalar(0.0037)), False),
    "nvfp4 divided": (ActSpec(E2M1, "group", True, 16, scalar(271.3), divisor=True), False),
    "int8 static": (ActSpec(INT8, "tensor", False, scale=scalar(0.037)), False),
    "uint8 static": (ActSpec(UINT8, "tensor", False, scale=scalar(0.037), zero=dense(np.uint8([117]))), False),
    "int4 static": (ActSpec(INT4, "tensor", False, scale=scalar(0.37)), False),
    "fp8 static": (ActSpec(E4M3, "tensor", False, scale=scalar(0.013)), False),
}  # fmt: skip


@pytest.mark.parametrize("width", [256, 200])
@pytest.mark.parametrize("name", SPECS)
def test_inputs_are_rounded_bit_for_bit(name: str, width: int) -> None:
    """Also where groups do not divide the features."""
    a, powers = SPECS[name]
    x = samples(width)
    (got,) = graph_of(a, width, powers).run(None, {"x": x})
    want = rounded_inputs.rounded(x, a, powers)
    assert np.array_equal(got, want), np.argwhere(got != want)[:5]
    assert not np.array_equal(got, x)


@pytest.mark.parametrize("name", ["int8 token", "fp8 group", "nvfp4 divided", "mxfp4", "fp8 static"])
def test_half_graphs_round_in_fp32(name: str) -> None:
    a, powers = SPECS[name]
    x = np.clip(samples(128), -60000, 60000).astype(np.float16)
    (got,) = graph_of(a, 128, powers, "F16").run(None, {"x": x})
    want = rounded_inputs.rounded(x.astype(np.float32), a, powers)
    assert np.array_equal(got, np.clip(want, -65504, 65504).astype(np.float16))


@pytest.mark.parametrize("dtype", ["F32", "F16"])
@pytest.mark.parametrize("name", SPECS)
def test_what_rounds_is_read_back(name: str, dtype: str, tmp_path: Path) -> None:
    """Out of the nodes alone; with another constant or operator anywhere in them they round in no way that is known."""
    a, powers = SPECS[name]
    b = Builder(plain(), onnx_weights.DIALECTS["ort"], dtype)
    b.graph.input("x", "FLOAT" if dtype == "F32" else "FLOAT16", ("tokens", 128))
    b.graph.op("Identity", onnx_activations.arithmetic(b, "x", a, powers), output="y")
    (tmp_path / "m.onnx").write_bytes(b.graph.model("", {}))
    file = onnx_reader.read(tmp_path / "m.onnx")
    last = file.producers["y"].input[0]
    seen = onnx_rounding.found(file, last)
    assert seen is not None and (seen.source, seen.powers) == ("x", powers)
    assert carried.differences(a, seen.spec) is None
    for i, node in enumerate(file.proto.graph.node[:-1]):
        other = {"Max": "Min", "Mul": "Div", "Div": "Mul", "Round": "Floor", "Neg": "Abs"}.get(
            node.op_type, "Neg"
        )
        changed = type(file.proto)()
        changed.CopyFrom(file.proto)
        changed.graph.node[i].op_type = other
        again = onnx_rounding.found(onnx_reader.OnnxFile(file.path, changed, file.tensors), last)
        assert again is None or again.source != "x" or carried.differences(a, again.spec), node.name


_CT = {
    "fp8 token": {"num_bits": 8, "type": "float", "strategy": "token"},
    "fp8 group": {"num_bits": 8, "type": "float", "strategy": "group", "group_size": 128},
    "mxfp4": {"num_bits": 4, "type": "float", "strategy": "group", "group_size": 32, "scale_dtype": torch.uint8, "zp_dtype": torch.uint8},
    "nvfp4 divided": {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16, "dynamic": "local", "scale_dtype": torch.float8_e4m3fn, "zp_dtype": torch.float8_e4m3fn},
    "uint8 static": {"num_bits": 8, "type": "int", "strategy": "tensor", "symmetric": False, "dynamic": False},
    "fp8 static": {"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": False},
}  # fmt: skip


@pytest.mark.parametrize("name", _CT)
def test_inputs_are_rounded_as_compressed_tensors_does(name: str) -> None:
    """Its own fake_quantize, where its scales are those of the runtimes (its int8 divides by 127.5, vLLM's kernels by 127)."""
    pytest.importorskip("compressed_tensors", reason="compressed-tensors is not installed")
    from compressed_tensors.quantization import QuantizationArgs
    from compressed_tensors.quantization.lifecycle.forward import fake_quantize
    from compressed_tensors.quantization.utils import compute_dynamic_scales_and_zp

    a, powers = SPECS[name]
    args = QuantizationArgs(**{"dynamic": True, "symmetric": True} | _CT[name])
    x = samples(256)[:, 2:]  # of zeros and tiny tokens it makes other zeros
    t = torch.from_numpy(x)
    whole = (
        torch.tensor([float(rounded_inputs.number(a.scale)[0])])
        if a.scale is not None and a.dynamic
        else None
    )
    with torch.compiler.set_stance("force_eager"):  # compiling its casts takes longer than all else
        if a.dynamic:
            scale, zero = compute_dynamic_scales_and_zp(t, args, torch.nn.Linear(1, 1), global_scale=whole)
        else:
            assert a.scale is not None
            scale = torch.from_numpy(rounded_inputs.number(a.scale).copy())
            zero = torch.tensor([0.0 if a.zero is None else float(a.zero.load()[0]) - 128])
        want = fake_quantize(t, scale, zero, args, global_scale=whole).numpy()
    (got,) = graph_of(a, 256, powers).run(None, {"x": x})
    assert np.array_equal(got, want), np.argwhere(got != want)[:5]


# --- what has no graph -------------------------------------------------------------------------------------


def with_inputs(a: ActSpec) -> Model:
    model = KINDS["int8 per row"]()
    return model.with_entries({n: replace(e, activation=a) for n, e in matrices(model).items()})


@pytest.mark.parametrize(
    ("a", "why"),
    [
        (ActSpec(Grid("float", 8, True, exponent=5, mantissa=2), "token", True), "a grid of 8 bits"),
        (ActSpec(INT8, "head", True), "per head"),
        (ActSpec(INT8, "tensor", False), "not in the checkpoint"),
        (ActSpec(INT8, "tensor", False, scale=dense(np.float32([1, 2]))), "several"),
        (ActSpec(INT8, "group", True), "no size"),
    ],
)
def test_inputs_that_cannot_be_rounded_are_announced(a: ActSpec, why: str) -> None:
    notes = [n for n in onnx.plan(with_inputs(a)).notes if "stay in F32" in n]
    assert len(notes) == 7 and all(why in n for n in notes)


def test_rounding_can_be_left_out_and_is_announced(tmp_path: Path) -> None:
    model = KINDS["FP8 and FP8 cache"]()
    plan = onnx.plan(model, onnx.Options(rounding=False))
    assert sum("asked for" in n for n in plan.notes) == 9
    execute(plan, tmp_path / "m")
    ids = tokens(model, 12)
    assert (
        np.abs(Session(tmp_path / "m" / "model.onnx").logits(ids, [12]) - Forward(model).logits(ids)).max()
        < CLOSE
    )


def test_the_cache_is_rounded_and_said_so() -> None:
    notes = onnx.plan(KINDS["FP8 and FP8 cache"]()).notes
    assert any(n.startswith("keys are rounded to FP8, static per tensor") for n in notes)


# --- the adapter -------------------------------------------------------------------------------------------


def test_the_adapter_loads_fp8_nodes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """QuantizeLinear to FP8 fails in ONNX Runtime as it comes; the adapter turns that fusion off and says so."""
    from lconvert.validators.runtimes import open_runtime

    static = replace(SPECS["fp8 static"][0])
    model = rounded("fp8", "tensor")
    model = model.with_entries({n: replace(e, activation=static) for n, e in matrices(model).items()})
    nodes = replace(onnx_weights.DIALECTS["ort"], nodes=True)
    monkeypatch.setattr(onnx, "DIALECTS", {"ort": nodes})
    execute(onnx.plan(model), tmp_path / "nodes")
    monkeypatch.undo()
    execute(onnx.plan(model), tmp_path / "casts")
    with pytest.raises(Exception, match="float8"):
        Session(tmp_path / "nodes" / "model.onnx")
    ids = tokens(model, 16)
    casts = Session(tmp_path / "casts" / "model.onnx").logits(ids, [16])
    runtime = open_runtime("onnxruntime", tmp_path / "nodes" / "model.onnx", context=64)
    try:
        assert runtime.info()["disable_quant_qdq"] == "1"
        assert np.abs(runtime.logits(ids) - casts).max() < CLOSE
    finally:
        runtime.close()


def test_the_adapter_leaves_integer_weights_packed(tmp_path: Path) -> None:
    from lconvert.validators.runtimes import onnx_session

    peer = lconvert.read(ROOT / "tests" / "fixtures" / "peers" / "llmcompressor-mixed-int4-fp8")
    unfused, precise = {onnx_session.UNFUSED: "1"}, {onnx_session.PRECISE: "1"}
    for at, (model, parity, speed) in enumerate(
        ((peer, {}, {}), (KINDS["FP8 per row, dynamic"](), unfused, unfused), (KINDS["W8A8"](), precise, {}))
    ):
        execute(onnx.plan(model), tmp_path / str(at))
        path = tmp_path / str(at) / "model.onnx"
        assert onnx_session.settings(onnx_session.opened(path), "parity") == parity
        assert onnx_session.settings(onnx_session.opened(path), "speed") == speed
    assert onnx_session.settings(None, "speed") == {}


def test_the_plan_says_what_to_set() -> None:
    said = {
        n: " ".join(onnx.plan(KINDS[n]()).notes) for n in ("FP8 per row, dynamic", "W8A8", "int4 g32 (GPTQ)")
    }
    assert "session.disable_quant_qdq is 1" in said["FP8 per row, dynamic"]
    assert "session.x64quantprecision" in said["W8A8"]
    assert "session." not in said["int4 g32 (GPTQ)"]
