"""Engines: every dialect of precision through TensorRT-RTX, the graph's numbers in ONNX Runtime, options, files and errors."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

import lconvert
from lconvert.cli import cli
from lconvert.converters import kinds, onnx, onnx_trt, onnx_weights, tensorrt, trt_messages, trt_rules
from lconvert.errors import InputError, LconvertError, MissingPackageError, OptionError, UnsupportedError
from lconvert.executor import execute
from lconvert.formats import onnx_reader
from lconvert.ir import E2M1, E4M3, ActSpec, Model, QTensor, dense, int_grid
from lconvert.kernels.qtensor import values
from lconvert.passes import activations, rtn
from lconvert.plan import manifest_path
from tests import arch_cases, case_models
from tests.conftest import DEMO, ROOT
from tests.small_classifiers import bert
from tests.trt_graphs import without_backends

for package in ("onnx", "onnxruntime", "tensorrt_rtx"):
    pytest.importorskip(package, reason=f"{package} is not installed")
import onnx as onnx_package
import onnxruntime
import tensorrt_rtx

PEERS = ROOT / "tests" / "fixtures" / "peers"
SMALL = tensorrt.Options("tensorrt_rtx", (1, 1, 2), (1, 1, 16), (0, 8, 32), (89,))
LABEL = f"TensorRT-RTX {tensorrt_rtx.__version__}, ahead of time, not run"


def exported(model: Model, folder: Path, **options: Any) -> Path:
    execute(onnx.plan(model, onnx.Options("trt", **options)), folder)
    return folder / "model.onnx"


def built(path: Path, sm: int = 89, **more: Any) -> tensorrt.Report:
    report, _ = tensorrt.build(path, path.with_name("m.plan"), replace(SMALL, sms=(sm,), **more), force=True)
    return report


@cache
def text() -> str:
    return str(ROOT / "README.md")


def rounded(model: Model, grid: str, group: int | str, acts: Mapping[str, Any] | None = None) -> Model:
    model = rtn.run(model, rtn.Options(grid=grid, group=group))
    if acts is None:
        return model
    return activations.run(model, activations.Options(text=text(), windows=1, context=64, **acts))


STATIC: Mapping[str, Any] = {"dynamic": False}
#: precision -> the model, what it is built for, the type of its codes
PRECISIONS: Mapping[str, tuple[Callable[[Model], Model], int, str]] = {
    "plain": (lambda m: m, 89, ""),
    "int4": (lambda m: rounded(m, "int4", 32), 89, "INT4"),
    "int4 with zero points": (lambda m: rounded(m, "uint4", 32), 89, "INT4"),
    "W8A8": (lambda m: rounded(m, "int8", -1, {"grid": "int8", **STATIC}), 89, "INT8"),
    "FP8": (lambda m: rounded(m, "fp8", "tensor", {"grid": "fp8", **STATIC}), 89, "FLOAT8E4M3FN"),
    "NVFP4 weights": (lambda m: rounded(m, "fp4", 128), 120, "FLOAT4E2M1"),
    "NVFP4": (lambda m: rounded(m, "fp4", 128, {"grid": "fp4"}), 120, "FLOAT4E2M1"),
}  # fmt: skip


@pytest.mark.parametrize("precision", PRECISIONS)
def test_engines_of_the_demo_model(precision: str, tmp_path: Path) -> None:
    """All codes arrive in the graph as they are, and the engine holds them packed."""
    change, sm, type_ = PRECISIONS[precision]
    model = change(lconvert.read(DEMO))
    path = exported(model, tmp_path)
    proto = onnx_package.load(path)
    assert trt_rules.check(onnx_reader.read(path), [sm]) == []
    quantized = {n: e for n, e in model.entries.items() if isinstance(e.data, QTensor)}
    names = {v: k for k, v in onnx_package.TensorProto.DataType.items()}
    types = {t.name: names[t.data_type] for t in proto.graph.initializer}
    assert all(types[n] == type_ for n in quantized) and bool(quantized) == bool(type_)
    report = built(path, sm)
    assert report.label == LABEL and "TensorRT 11" not in report.label
    assert report.sizes["plan"] > 1_000_000 and report.seconds["build"] > 0
    assert report.layers["ATTENTION_INPUT HALF"] == 3
    dequantized = sum(v for k, v in report.layers.items() if k.startswith("DEQUANTIZE"))
    assert dequantized >= len(quantized)
    if "FP4" in precision:
        with pytest.raises(UnsupportedError, match=r"fp4-target"):
            built(path, 89)
    if precision == "NVFP4":
        assert sum(n.op_type == "TRT_FP4DynamicQuantize" for n in proto.graph.node) == 12
    elif precision in ("W8A8", "FP8"):
        assert sum(n.op_type == "QuantizeLinear" for n in proto.graph.node) == 12


@pytest.mark.parametrize("precision", ["plain", "int4", "W8A8", "FP8", "NVFP4"])
def test_engines_of_a_llama_with_shared_heads_in_bf16(precision: str, tmp_path: Path) -> None:
    """It has no tokenizer to calibrate with: scales of inputs are made up."""
    grids = {"W8A8": ("int8", -1, int_grid(8, True)), "FP8": ("fp8", "tensor", E4M3), "NVFP4": ("fp4", 128, E2M1)}  # fmt: skip
    plain = lconvert.read(case_models.folder("llama-gqa"))
    _, sm, _ = PRECISIONS[precision]
    if precision not in grids:
        model = PRECISIONS[precision][0](plain)
    else:
        name, group, grid = grids[precision]
        model = rtn.run(plain, rtn.Options(grid=name, group=group))
        four, scale = precision == "NVFP4", dense(np.array([0.0371], np.float32))
        spec = ActSpec(grid, "group" if four else "tensor", four, 16 if four else None, scale)
        wanted = {n: e for n, e in model.entries.items() if isinstance(e.data, QTensor)}
        model = model.with_entries({n: replace(e, activation=spec) for n, e in wanted.items()})
    report = built(exported(model, tmp_path, dtype="BF16"), sm)
    assert report.layers["ATTENTION_INPUT BF16"] > 0


#: One case per kind of graph: norms, biases, windows, soft caps, parallel blocks, experts, latent attention, neighbours that turn.
CASES = ("gemma2-alternating", "gpt2-tied", "cohere-gqa", "deepseek_v2-lite", "gpt_oss-experts", "phi3-long", "qwen3-gqa", "olmo2-gqa", "mixtral-gqa", "starcoder2-no-bias", "mistral-window")  # fmt: skip


@pytest.mark.parametrize("name", [n for n in CASES if n in {c.name for c in arch_cases.load()}])
def test_engines_of_other_architectures(name: str, tmp_path: Path) -> None:
    assert built(exported(lconvert.read(case_models.folder(name)), tmp_path)).sizes["plan"] > 0


def test_interleaved_turning_is_what_the_builder_fails_on(tmp_path: Path) -> None:
    """The rule's graph: the same decoder, turned as neighbours."""
    model = lconvert.read(case_models.folder("cohere-gqa"))
    execute(onnx.plan(model, onnx.Options("ort", "F16")), tmp_path)
    path = tmp_path / "model.onnx"
    assert {f.rule for f in trt_rules.check(onnx_reader.read(path))} == {"interleaved-rotary"}
    with pytest.raises(UnsupportedError, match="interleaved-rotary"):
        tensorrt.build(path, tmp_path / "m.plan", SMALL)
    with pytest.MonkeyPatch.context() as m, pytest.raises(UnsupportedError, match="dynamic shapes"):
        m.setattr(trt_rules, "RULES", ())
        tensorrt.build(path, tmp_path / "m.plan", SMALL)


def test_a_cache_of_fixed_length_has_a_length(tmp_path: Path) -> None:
    """The rule's graph: the same decoder with room that is left open."""
    model = lconvert.read(case_models.folder("llama-gqa"))
    plan = onnx.plan(model, onnx.Options("trt", static_cache=True, positions=64))
    execute(plan, tmp_path / "m")
    path = tmp_path / "m" / "model.onnx"
    assert trt_rules.check(onnx_reader.read(path)) == []
    report = built(path, 89)
    layers = model.decoder.layers
    assert report.layers["KV_CACHE_UPDATE HALF"] == 2 * layers
    assert report.inputs["past_key_values.0.key"]["max"][2] == report.inputs["attention_mask"]["max"][1] == 64
    proto = onnx_reader.read(path).proto
    for port in (*proto.graph.input, *proto.graph.output):
        for d in port.type.tensor_type.shape.dim:
            if d.dim_value == 64 and len(port.type.tensor_type.shape.dim) in (2, 4):
                d.dim_param = "capacity"
    path.write_bytes(proto.SerializeToString())
    assert {f.rule for f in trt_rules.check(onnx_reader.read(path))} == {"static-cache"}
    with pytest.raises(UnsupportedError, match="static-cache"):
        tensorrt.build(path, tmp_path / "m.plan", SMALL)
    with pytest.MonkeyPatch.context() as m, pytest.raises(UnsupportedError, match="static sequence length"):
        m.setattr(trt_rules, "RULES", ())
        tensorrt.build(path, tmp_path / "m.plan", SMALL)


# --- numbers -----------------------------------------------------------------------------------------------


def logits(path: Path, ids: list[int]) -> Any:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    n = len(ids)
    feed: dict[str, Any] = {"input_ids": [ids], "attention_mask": np.ones((1, n)), "position_ids": [range(n)]}
    feed = {k: np.asarray(v, np.int64) for k, v in feed.items()}
    for i in session.get_inputs():
        if i.name.startswith("past"):
            feed[i.name] = np.zeros((1, i.shape[1], 0, i.shape[3]), np.float16)
    return session.run(["logits"], feed)[0][0].astype(np.float32)


@pytest.mark.parametrize(
    "source",
    ["cohere-gqa", "deepseek_v2-lite", "int4 g128, f32 scales (ModelOpt)", "uint4 g32 (AWQ)", "Q4_1", "Q5_0", "Q4_K"],
)  # fmt: skip
def test_the_dialect_means_the_model(source: str, tmp_path: Path) -> None:
    """The graph for TensorRT, run by ONNX Runtime in F16, against the model's own numbers in F32."""
    from lconvert.forward import Forward

    model = kinds.KINDS[source]() if source in kinds.KINDS else lconvert.read(case_models.folder(source))
    ids = [int(i) for i in np.random.default_rng(1).integers(0, model.arch.vocab, 12)]
    want = Forward(model).logits(ids)
    got = logits(exported(model, tmp_path), ids)
    assert np.abs(got - want).max() < 6e-3 * max(1.0, np.abs(want).max())


@pytest.mark.parametrize("kind", ["Q5_0", "Q4_0", "int4 g128, f32 scales (ModelOpt)", "NVFP4 (ModelOpt)", "int4 g32, act-order", "FP8 per tensor, weights"])  # fmt: skip
def test_codes_and_scales_read_back_are_the_models(kind: str, tmp_path: Path) -> None:
    model = kinds.KINDS[kind]()
    file = onnx_reader.read(exported(model, tmp_path))
    tensors = file.tensors
    nodes = {n.input[0]: n for n in file.proto.graph.node if n.op_type == "DequantizeLinear"}
    seen = 0
    for name, entry in model.entries.items():
        if not isinstance(entry.data, QTensor):
            continue
        seen += 1
        codes = tensors[name].numbers().astype(np.float32)
        node = nodes[name]
        width = trt_rules.attribute(node, "block_size", 0)
        if (inner := node.input[1]) in tensors:
            scale = tensors[inner].numbers().astype(np.float32)
        else:
            below = next(n for n in file.proto.graph.node if inner in n.output)
            scale = np.multiply(*(tensors[x].numbers().astype(np.float32) for x in below.input))
        w = codes * (np.repeat(scale, width, axis=0) if width else scale)
        if (order := tensors.get(name + ".order")) is not None:
            back = np.empty_like(w)
            back[order.load()] = w
            w = back
        assert np.array_equal(w.T, values(entry.data)), name
        if not kind.startswith("Q4_0"):
            assert (scale > 0).all()
    assert seen == 7


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("llmcompressor-w8a8-static-asym", "non-zero zero points"),
        ("llmcompressor-fp8-dynamic-kv", "per token while the model runs"),
        ("modelopt-fp8-block", "per group while the model runs"),
    ],
)
def test_inputs_that_tensorrt_lacks_are_refused_with_a_remedy(source: str, message: str) -> None:
    with pytest.raises(UnsupportedError, match=message) as e:
        onnx.plan(lconvert.read(PEERS / source), onnx.Options("trt"))
    assert "--calibrate" in str(e.value) and "ort dialect" in str(e.value)


@pytest.mark.parametrize("source", ["gptqmodel-gptq-4-g32-desc", "gptqmodel-gptq-4-g32-asym", "modelopt-int4-awq", "modelopt-nvfp4-kv-nvfp4", "modelopt-int8-sq", "llmcompressor-w4a16-embedding"])  # fmt: skip
def test_checkpoints_of_other_tools_build_with_their_integers(source: str, tmp_path: Path) -> None:
    """g_idx too: columns are gathered. Zero points are a second product, which is another container."""
    model = lconvert.read(PEERS / source)
    path = exported(model, tmp_path)
    report = built(path, 120)
    found = onnx.plan(model, onnx.Options("trt"))
    held = {i.name: i for i in found.items() if i.held and i.held != "plain"}
    for name, item in held.items():
        relaid = f"{name.removesuffix('.scale')}.minimum" in held
        assert item.verdict.kind == ("widened" if relaid else "exact"), name
    assert any(name.endswith(".minimum") for name in held) == ("asym" in source)
    assert report.sizes["plan"] > 0


# --- options, files, errors --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def demo_graph(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return exported(lconvert.read(DEMO), tmp_path_factory.mktemp("demo"))


def run(*args: Any) -> Any:
    return CliRunner().invoke(cli, [str(a) for a in args], standalone_mode=False)


def test_build_engine_writes_an_engine_and_its_manifest(demo_graph: Path, tmp_path: Path) -> None:
    out = tmp_path / "m.plan"
    result = run("build-engine", demo_graph, "-o", out, "--sm", "89,120", "--batch", "1:1:2", "--json")
    assert result.exit_code == 0, result.output
    told, manifest = json.loads(result.stdout), json.loads(manifest_path(out).read_text())
    assert told == {"engine": str(out), **manifest} | {"engine": manifest["engine"]}
    assert manifest["engine"] == {"name": "m.plan", "size": out.stat().st_size, "sha256": hashlib.sha256(out.read_bytes()).hexdigest()}  # fmt: skip
    assert manifest["onnx"]["sha256"] == onnx_reader.read(demo_graph).digest()
    assert manifest["label"] == LABEL and manifest["built_for"] == ["SM89", "SM120"]
    ids = manifest["report"]["inputs"]["input_ids"]
    assert (ids["min"], ids["opt"], ids["max"]) == ([1, 1], [1, 1], [2, 256])
    assert manifest["report"]["inputs"]["past_key_values.0.key"]["max"] == [2, 4, 256, 32]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m.plan", "m.plan.manifest.json"]
    again = run("build-engine", demo_graph, "-o", out)
    assert isinstance(again.exception, LconvertError) and "--force replaces it" in str(again.exception)


def test_build_engine_of_a_folder_builds_its_graph(tmp_path: Path) -> None:
    """As it was exported, here with a cache of fixed length; `plan` looks at it too."""
    exported(lconvert.read(DEMO), tmp_path / "m", static_cache=True, positions=96)
    result = run("build-engine", tmp_path / "m", "-o", tmp_path / "m.plan", "--sm", "89", "--json")
    assert result.exit_code == 0, result.output
    made = json.loads(result.stdout)["report"]
    assert made["inputs"]["past_key_values.0.value"]["max"][2] == 96
    assert made["layers"]["KV_CACHE_UPDATE HALF"] and "CONCATENATION HALF" not in made["layers"]
    result = run("plan", tmp_path / "m", "--to", "trt", "--json")
    assert result.exit_code == 0 and json.loads(result.stdout)["tensors"] == []


def test_build_engine_of_an_encoder(tmp_path: Path) -> None:
    """Of heads of 32, the least that the attention takes."""
    bert("bert", tmp_path / "source", hidden_size=64, num_attention_heads=2)
    exported(lconvert.read(tmp_path / "source"), tmp_path / "m")
    result = run("build-engine", tmp_path / "m", "-o", tmp_path / "m.plan", "--sm", "89", "--sequence", "1:8:32", "--json")  # fmt: skip
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["report"]["inputs"]["token_type_ids"]["max"] == [1, 32]


def test_build_engine_of_a_checkpoint(tmp_path: Path) -> None:
    out = tmp_path / "m.plan"
    result = run("build-engine", PEERS / "gptqmodel-gptq-4-g32", "-o", out, "--sm", "89", "--keep-onnx", tmp_path / "graph")  # fmt: skip
    assert result.exit_code == 0, result.output
    assert LABEL in result.output and "for SM89" in result.output and "DEQUANTIZE" in result.output
    manifest = json.loads(manifest_path(out).read_text())
    assert manifest["verdicts"]["exact"] > 7 and manifest["source"].endswith("gptq-4-g32")
    assert (tmp_path / "graph" / "model.onnx").is_file()


@pytest.mark.parametrize(
    ("options", "note"),
    [
        ({"version_compatible": True}, ""),
        ({"weight_streaming": True}, ""),
        ({"sparse": True}, ""),
        ({"hardware": "ampere+"}, ""),
        ({"workspace": 1 << 30, "level": 1}, ""),
        ({"timing_cache": "tactics.bin"}, "has no timing cache"),
    ],
)
def test_options_of_the_builder(options: dict[str, Any], note: str, demo_graph: Path) -> None:
    report = built(demo_graph, **options)
    assert any(note in n for n in report.notes) if note else True
    assert not Path("tactics.bin").exists()


@pytest.mark.parametrize(
    "options", [{"strip": True}, {"refit": "identical"}, {"refit": "all"}, {"strip": True, "sms": (80, 89)}]
)
def test_stripped_and_refittable_engines_say_that_they_need_a_driver(
    options: dict[str, Any], demo_graph: Path, tmp_path: Path
) -> None:
    """TensorRT-RTX compiles kernels for them while it builds; where a driver is, this test has to become a refit."""
    chosen = tensorrt.Options(**{**vars(SMALL), **options})
    assert chosen.refit == options.get("refit", "identical")
    with pytest.raises(UnsupportedError, match="driver while they are built"):
        tensorrt.build(demo_graph, tmp_path / "m.plan", chosen)
    assert list(tmp_path.iterdir()) == []


def test_engines_without_a_cache_have_no_past_in_their_profile(tmp_path: Path) -> None:
    report = built(exported(lconvert.read(DEMO), tmp_path, prefill_only=True))
    assert report.inputs["attention_mask"]["max"] == report.inputs["input_ids"]["max"] == [2, 16]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sms": (90,)}, "builds for 75, 80, 86, 89"),
        ({"sequence": (1, 1, 4096)}, "reach 4128 positions, the graph has 512"),
    ],
)
def test_options_that_the_graph_or_the_builder_refuses(
    options: dict[str, Any], message: str, demo_graph: Path, tmp_path: Path
) -> None:
    with pytest.raises(OptionError, match=message):
        tensorrt.build(demo_graph, tmp_path / "m.plan", tensorrt.Options(**{**vars(SMALL), **options}))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("text", ["", "a", "1:2", "1:2:3:4", "-1", "1:-2:3", "9999999999"])
def test_ranges_that_are_none(text: str) -> None:
    with pytest.raises(OptionError, match="min:opt:max"):
        tensorrt.span(text)


@pytest.mark.parametrize("bad", [{"batch": (0, 1, 1)}, {"past": (2, 1, 3)}, {"refit": "x"}, {"hardware": "x"}, {"backend": "x"}])  # fmt: skip
def test_options_that_contradict_themselves(bad: dict[str, Any]) -> None:
    with pytest.raises(OptionError, match=r"choose|ascending"):
        tensorrt.Options(**bad)


@pytest.mark.parametrize(
    ("make", "kind", "message"),
    [
        (lambda d: d / "no.onnx", InputError, "no such file"),
        (lambda d: _written(d / "bad.onnx", b"PK\x03\x04 not onnx"), InputError, "is not an ONNX file"),
        (lambda d: _without_data(d), InputError, "model.onnx.data, which is missing"),
    ],
)
def test_graphs_that_are_none_leave_nothing(make: Any, kind: Any, message: str, tmp_path: Path) -> None:
    source = make(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(kind, match=message):
        tensorrt.build(source, tmp_path / "m.plan", SMALL)
    assert sorted(tmp_path.rglob("*")) == before


def _written(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


def _without_data(folder: Path) -> Path:
    path = exported(kinds.plain(), folder / "m")
    path.with_name("model.onnx.data").unlink()
    return path


def test_a_back_end_that_is_missing_or_broken(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The import failures alone have a stand-in."""
    without_backends(monkeypatch)
    with pytest.raises(MissingPackageError, match=r"tensorrt and tensorrt_rtx: not installed.*lconvert\[tensorrt\]"):  # fmt: skip
        tensorrt.load()
    result = run("build-engine", DEMO, "-o", tmp_path / "m.plan", "--backend", "tensorrt")
    assert isinstance(result.exception, MissingPackageError) and result.exception.exit_code == 3

    def broken(name: str) -> Any:
        raise ImportError("libcudart.so.13: cannot open shared object file", name="tensorrt_libs")

    monkeypatch.setattr(tensorrt.importlib, "import_module", broken)
    with pytest.raises(MissingPackageError, match=r"installed but does not load.*libcudart"):
        tensorrt.load("tensorrt")


def test_ctrl_c_stops_a_build_and_leaves_nothing(tmp_path: Path) -> None:
    graph = exported(lconvert.read(case_models.folder("deepseek_v2-lite")), tmp_path / "graph")
    out = tmp_path / "out"
    out.mkdir()
    call = [sys.executable, "-P", "-m", "lconvert", "build-engine", str(graph), "-o", str(out / "m.plan"), "--sequence", "1:1:16", "--past", "0:8:32"]  # fmt: skip
    code = "import runpy, sys; from lconvert.converters import tensorrt; real = tensorrt._run; tensorrt._run = lambda *a: (print('building', flush=True), real(*a))[1]; sys.argv = sys.argv[1:]; runpy.run_module('lconvert', run_name='__main__')"  # fmt: skip
    process = subprocess.Popen([call[0], "-P", "-c", code, *call[3:]], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ)  # fmt: skip
    assert process.stdout is not None and process.stdout.readline() == "building\n"
    time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130 and "interrupted" in err
    assert list(out.iterdir()) == []


def test_messages_are_explained() -> None:
    said = [trt_messages.Message("error", "catchCudaError: CUDA driver version is insufficient"), trt_messages.Message("error", "Myelin: HW-specific datatypes: fp4_e2m1. In compileGraph at /_src/x.cpp:1")]  # fmt: skip
    assert trt_messages.explain(said, "").startswith("fp4_e2m1 needs newer hardware")
    assert trt_messages.explain([], "the builder gave no reason") == "the builder gave no reason"
    assert "/_src" not in trt_messages.explain(said[1:], "")


def test_plan_shows_verdicts_and_rules(demo_graph: Path) -> None:
    result = run("plan", PEERS / "gptqmodel-gptq-4-g32-asym", "--to", "trt")
    assert result.return_value == 0 and "INT4, blocks of 32, minima" in result.output
    assert f"no rule of {len(trt_rules.RULES)} is broken" in result.output
    result = run("plan", PEERS / "modelopt-nvfp4a16", "--sm", "89", "--json")
    told = json.loads(result.stdout)
    assert result.return_value == 2 and {f["rule"] for f in told["findings"]} == {"fp4-target"}
    assert {t["verdict"] for t in told["tensors"] if t["held"] and t["type"] == "FLOAT4E2M1"} == {"exact"}
    assert run("plan", demo_graph).return_value == 0
    bad = run("plan", DEMO, "--sm", "x")
    assert isinstance(bad.exception, OptionError)


def test_verdicts_of_the_dialect_are_named() -> None:
    dialect = onnx_weights.DIALECTS["trt"]
    kinds_of = {}
    for name in ("Q5_0", "IQ4_NL", "uint4 g32 (AWQ)", "int3 g128"):
        entry = kinds.KINDS[name]().entries["layers.0.attn.q"]
        verdict = onnx_weights.held(entry, dialect, "F16").verdict
        kinds_of[name] = verdict.reason or verdict.kind
    assert kinds_of["uint4 g32 (AWQ)"] == kinds_of["Q5_0"] == kinds_of["int3 g128"] == "widened"
    assert "scales below zero" in kinds_of["IQ4_NL"]


def test_a_cache_that_tensorrt_cannot_round_is_left_and_named() -> None:
    """Where inputs are refused, keys and values keep the graph's dtype: the model lacks nothing without their rounding."""
    stays = (
        "not rounded to FP4, dynamic per group of 16: TRT_FP4DynamicQuantize takes two or three dimensions"
    )
    notes = onnx.plan(lconvert.read(PEERS / "modelopt-nvfp4-kv-nvfp4"), onnx.Options("trt")).notes
    for side in ("keys", "values"):
        assert any(n.startswith(f"{side} stay in F16, {stays}") for n in notes)
        assert not any(n.startswith(f"{side} are rounded") for n in notes)
    held = onnx.plan(lconvert.read(PEERS / "modelopt-fp8-kv"), onnx.Options("trt")).notes
    assert "keys are rounded to FP8, static per tensor and held in F16" in held
    per_token = ActSpec(E4M3, "token", True)
    assert "quantized per token while the model runs" in onnx_trt.cache_reason(per_token)
