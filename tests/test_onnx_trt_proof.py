"""Graphs for TensorRT are proven without a GPU: read back whole, their products in onnx's reference evaluator, TensorRT-RTX's parser and
builder; and the report says what was not run. Planted faults fail the check that is about them."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

for package in ("torch", "transformers", "onnx", "onnxruntime", "tensorrt_rtx"):
    pytest.importorskip(package, reason=f"{package} is not installed")
import tensorrt_rtx
from click.testing import CliRunner

import lconvert
from lconvert.cli import cli
from lconvert.converters import kinds, onnx, onnx_pairs, onnx_source, tensorrt
from lconvert.errors import InputError, MissingPackageError
from lconvert.executor import execute
from lconvert.formats import onnx_reader
from lconvert.ir import Entry, QTensor, dense
from lconvert.kernels.qtensor import values
from lconvert.validators import carried, onnx_layers, onnx_twin
from lconvert.validators.report import Report
from lconvert.validators.runtimes import cuda
from tests import rounded_inputs
from tests.conftest import DEMO, ROOT
from tests.faults.graphs import Change, GraphFault, Opened, plant
from tests.test_onnx_activations import samples
from tests.trt_graphs import without_backends

PEERS = ROOT / "tests" / "fixtures" / "peers"
WEIGHTS, PRODUCTS = "weights in onnx's reference evaluator", "products in onnx's reference evaluator"
SETTINGS = "activations and KV cache"
no_gpu = pytest.mark.skipif(cuda.count() > 0, reason="a GPU is here: what is said without one cannot be seen")


class Graphs:
    """Graphs of checkpoints, made once."""

    def __init__(self, root: Path) -> None:
        self.get = cache(self._made)
        self.root = root

    def _made(self, name: str, **options: Any) -> Path:
        folder = self.root / "-".join([name, *map(str, options.values())])
        execute(onnx.plan(lconvert.read(source(name)), onnx.Options("trt", **options)), folder)
        return folder


@pytest.fixture(scope="module")
def graphs(tmp_path_factory: pytest.TempPathFactory) -> Graphs:
    return Graphs(tmp_path_factory.mktemp("graphs"))


def source(name: str) -> Path:
    return DEMO if name == "demo" else PEERS / name


def judged(name: str, folder: Path, *tiers: str) -> Report:
    tiers = tiers or ("structure", "tensors")
    return lconvert.validate(
        source(name), folder, tiers=tiers, cache=False, context=64, max_windows=1, greedy=(1, 4)
    )


def check(report: Report, name: str) -> Any:
    return next(c for c in report.checks if c.name == name)


def failed(report: Report) -> list[str]:
    return [c.name for c in report.checks if c.passed is False]


def found(folder: Path) -> onnx_source.Found:
    return onnx_source.read(onnx_reader.read(folder / "model.onnx"))


# --- read back ---------------------------------------------------------------------------------------------

#: What their graphs have of their own: rounded inputs and caches of FP8, INT8 and NVFP4, zero points, orders, tables, FP4.
READ = ("modelopt-fp8-kv", "modelopt-int8-sq", "modelopt-mixed", "modelopt-nvfp4-kv-nvfp4", "modelopt-nvfp4a16", "modelopt-w4a8-awq", "gptqmodel-gptq-4-g32-desc", "gptqmodel-gptq-4-g32-asym", "llmcompressor-w4a16-embedding", "tao-hqq-4")  # fmt: skip


@pytest.mark.parametrize("dtype", ["F16", "BF16"])
@pytest.mark.parametrize("name", READ)
def test_graphs_of_checkpoints_are_read_back_and_their_products_are_evaluated(
    name: str, dtype: str, graphs: Graphs
) -> None:
    folder = graphs.get(name, dtype=dtype)
    report = judged(name, folder)
    assert not failed(report) and report.exit_code == 0
    quantized = [n for n, e in found(folder).model.entries.items() if isinstance(e.data, QTensor)]
    products = [n for n in quantized if n not in ("embed", "pos_embed")]
    assert check(report, WEIGHTS).value == f"{len(products)} of {len(products)} products, bit for bit"
    assert 0 < check(report, PRODUCTS).measured < check(report, PRODUCTS).limit / 2
    assert report.details["artifact"]["bits_per_weight"] > 0


@pytest.mark.parametrize(
    "name", ["modelopt-fp8-kv", "modelopt-int8-sq", "modelopt-mixed", "modelopt-nvfp4-fp8"]
)
def test_rounding_of_inputs_and_caches_is_read_out_of_the_nodes(name: str, graphs: Graphs) -> None:
    model, own = lconvert.read(source(name)), found(graphs.get(name)).model
    assert list(carried.settings(carried.expected(model, own, "onnx"), own)) == []
    assert any(e.activation for e in own.entries.values())
    assert (own.kv is None) == (model.kv is None)


def other(node: Callable[[Opened], Any], change: Callable[[Opened, Any], None]) -> Change:
    return lambda o: change(o, node(o))


def quantizer(o: Opened, kind: str = "QuantizeLinear") -> Any:
    return o.of(kind)


def another_constant(place: int) -> Callable[[Opened, Any], None]:
    def change(o: Opened, node: Any) -> None:
        node.input[place] = o.number(0.25, np.float32)

    return change


def unsaturated(o: Opened, node: Any) -> None:
    import onnx as package

    node.attribute.append(package.helper.make_attribute("saturate", 0))


def not_widened(o: Opened, node: Any) -> None:
    node.input[0] = next(n for n in o.graph.node if n.output[0] == node.input[0]).input[0]


def other_blocks(o: Opened, node: Any) -> None:
    next(a for a in node.attribute if a.name == "block_size").i = 32


FP4 = onnx_pairs.FP4_QUANTIZE
REFUSED: dict[str, tuple[str, Change, str]] = {
    "another scale back": ("modelopt-fp8-kv", other(quantizer, another_constant(1)), "another scale than it is quantized"),
    "no saturation": ("modelopt-fp8-kv", other(quantizer, unsaturated), "not saturated"),
    "no cast before": ("modelopt-int8-sq", other(quantizer, not_widened), "another type than the one"),
    "another scale of FP4": ("modelopt-mixed", other(lambda o: quantizer(o, FP4), another_constant(1)), "another scale than"),
    "blocks of 32": ("modelopt-mixed", other(lambda o: quantizer(o, FP4), other_blocks), "block_size"),
}  # fmt: skip


def planted(graphs: Graphs, name: str, change: Change, bad: Path, **options: Any) -> Path:
    return plant(GraphFault("", name, "", "", change), graphs.get(name, **options), bad)


@pytest.mark.parametrize("fault", REFUSED)
def test_pairs_that_no_scheme_has_are_refused(fault: str, graphs: Graphs, tmp_path: Path) -> None:
    name, change, message = REFUSED[fault]
    with pytest.raises(InputError, match=message):
        found(planted(graphs, name, change, tmp_path / "bad"))


# --- what is left out --------------------------------------------------------------------------------------


def test_what_a_graph_leaves_unrounded_is_not_proven_with_the_reason(graphs: Graphs) -> None:
    report = judged("modelopt-fp8-kv", graphs.get("modelopt-fp8-kv", rounding=False))
    assert not failed(report) and report.exit_code == 0
    (said,) = [t for t in report.not_proven if "not rounded" in t]
    assert (
        said
        == "tensors: inputs of attn.q, attn.k, attn.v, attn.o, mlp.gate, mlp.up, mlp.down, keys, values stay in F16, not rounded to FP8, static per tensor: asked for"
    )
    assert "but for what is not proven" in check(report, SETTINGS).value
    four = judged("modelopt-nvfp4-kv-nvfp4", graphs.get("modelopt-nvfp4-kv-nvfp4"))
    assert any(
        "keys, values stay in F16, not rounded to FP4" in t and "two or three dimensions" in t
        for t in four.not_proven
    )
    assert not any("inputs of" in t for t in four.not_proven)


def without_pair(o: Opened) -> None:
    """The inputs of one product as they come."""
    made = {n.output[0]: n for n in o.graph.node}
    product = next(
        n for n in o.graph.node if n.op_type == "MatMul" and n.name.startswith("layers.0.mlp.down")
    )
    name = product.input[0]
    while made[name].op_type in ("Cast", "QuantizeLinear", "DequantizeLinear"):
        name = made[name].input[0]
    product.input[0] = name


def saying(what: dict[str, str]) -> Change:
    def change(o: Opened) -> None:
        without_pair(o)
        o.proto.metadata_props.add(key="unrounded", value=json.dumps(what))

    return change


@pytest.mark.parametrize(
    "change", [without_pair, saying({"inputs of attn.q": "stay"}), saying({"keys": "stay"})]
)
def test_a_rounding_that_is_missing_without_a_word_fails(
    change: Change, graphs: Graphs, tmp_path: Path
) -> None:
    report = judged("modelopt-int8-sq", planted(graphs, "modelopt-int8-sq", change, tmp_path / "bad"))
    assert SETTINGS in failed(report) and any("mlp.down" in n for n in report.notes)


def test_damaged_words_about_it_say_nothing(graphs: Graphs, tmp_path: Path) -> None:
    for i, text in enumerate(("[", "[1]", '{"inputs of mlp.down": 3}')):

        def change(o: Opened, text: str = text) -> None:
            o.proto.metadata_props.add(key="unrounded", value=text)

        assert found(planted(graphs, "modelopt-int8-sq", change, tmp_path / str(i))).unrounded == {}


# --- products ----------------------------------------------------------------------------------------------


def one_byte(name: str, change: Callable[[int], int], at: int = 100) -> Change:
    def changed(x: Any) -> Any:
        x[at] = change(int(x[at]))
        return x

    return lambda o: o.change(name, np.uint8, changed)


def swapped(x: Any) -> Any:
    """Two codes of the first byte where they differ."""
    at = int(np.argmax((x >> 4) != (x & 15)))
    x[at] = x[at] >> 4 | (x[at] & 15) << 4
    return x


def global_scale(o: Opened) -> None:
    node = next(
        n for n in o.graph.node if n.op_type == "DequantizeLinear" and n.input[0] == "layers.0.mlp.up.scale"
    )
    node.input[1] = o.number(0.001, np.float32)


FAULTS: dict[str, tuple[str, Change]] = {
    "NVFP4: a byte of a scale": ("modelopt-nvfp4a16", one_byte("layers.0.attn.v.scale", lambda b: b ^ 1)),
    "NVFP4: codes of a byte swapped": ("modelopt-nvfp4a16", lambda o: o.change("layers.0.mlp.down", np.uint8, swapped)),
    "NVFP4: another global scale": ("modelopt-nvfp4a16", global_scale),
    "NVFP4 with inputs: one code": ("modelopt-mixed", one_byte("layers.0.mlp.gate", lambda b: b ^ 1)),
    "FP8: one code": ("modelopt-fp8-kv", one_byte("layers.0.attn.o", lambda b: b ^ 1)),
    "INT8: one code": ("modelopt-int8-sq", one_byte("layers.0.attn.o", lambda b: b ^ 1)),
    "INT4: codes of a byte swapped": ("gptqmodel-gptq-4-g32-desc", lambda o: o.change("layers.0.mlp.down", np.uint8, swapped)),
    "INT4: a minimum": ("gptqmodel-gptq-4-g32-asym", lambda o: o.change("layers.0.attn.q.minimum", np.float16, lambda x: x * 1.01)),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_one_wrong_number_fails_the_evaluated_weights(fault: str, graphs: Graphs, tmp_path: Path) -> None:
    name, change = FAULTS[fault]
    report = judged(name, planted(graphs, name, change, tmp_path / "bad"), "tensors")
    assert WEIGHTS in failed(report), failed(report)
    assert any(n.startswith(WEIGHTS) and "weights differ" in n for n in report.notes)


def test_products_show_what_is_done_to_their_inputs(graphs: Graphs) -> None:
    """Against inputs that are not rounded, or not scaled, a product that rounds or scales them is far off."""
    limit = 4 * 2.0**-11
    for name, role in (("modelopt-mixed", "layers.0.mlp.up"), ("modelopt-w4a8-awq", "layers.0.attn.q")):
        graph = found(graphs.get(name))
        entry = graph.model.entries[role]
        assert onnx_layers.compare(graph, role, entry)[1] < limit / 2
        bare = Entry(role, entry.data, None, entry.transform)
        assert onnx_layers.compare(graph, role, bare)[1] > 2 * limit, name
        if entry.transform is not None:
            unscaled = Entry(role, entry.data, entry.activation)
            assert onnx_layers.compare(graph, role, unscaled)[1] > 2 * limit


def test_inputs_of_fp4_are_evaluated_as_the_formulas_say(graphs: Graphs) -> None:
    """Bit for bit, with blocks of zeros, outliers and values between two codes."""
    folder = graphs.get("modelopt-mixed")
    graph = found(folder)
    role = "layers.0.mlp.up"
    entry = graph.model.entries[role]
    assert entry.activation is not None and entry.activation.scale is not None
    spec = replace(entry.activation, scale=dense(entry.activation.scale.load()))
    cut = onnx_layers.cut_out(graph.file, role)
    rounded = next(n.input[0] for n in cut.nodes if n.op_type == "MatMul")
    alone = replace(cut, y=rounded)
    x = np.clip(samples(entry.data.shape[1]), -60000, 60000).astype(np.float16)[:1]
    _, got = onnx_layers.evaluate(graph.file, alone, x, "F16")
    want = rounded_inputs.rounded(x.astype(np.float32), spec)
    assert np.array_equal(got, np.clip(want, -65504, 65504).astype(np.float16))


def test_a_product_that_depends_on_more_than_its_input_is_refused(graphs: Graphs, tmp_path: Path) -> None:
    def change(o: Opened) -> None:
        node = next(n for n in o.graph.node if n.op_type == "Sub" and n.name.startswith("layers.0.attn.q"))
        node.input[1] = o.before(node, "Cast", ["position_ids"], to=10)

    bad = planted(graphs, "gptqmodel-gptq-4-g32-asym", change, tmp_path / "bad")
    with pytest.raises(InputError, match="not subtracted"):
        found(bad)
    graph = replace(found(graphs.get("gptqmodel-gptq-4-g32-asym")), file=onnx_reader.read(bad / "model.onnx"))
    with pytest.raises(InputError, match="depends on 'position_ids' besides its input"):
        onnx_layers.cut_out(graph.file, "layers.0.attn.q")


def test_large_models_are_sampled_from_both_ends() -> None:
    roles = [f"layers.{i}.{k}" for i in range(40) for k in ("attn.q", "mlp.up")] + ["head"]
    sizes = dict.fromkeys(roles, 10)
    assert onnx_layers.sample(roles, sizes, 10_000) == roles
    some = onnx_layers.sample(roles, sizes, 70)
    wanted = [f"layers.{i}.{k}" for i in (0, 20, 39) for k in ("attn.q", "mlp.up")] + ["head"]
    assert some == wanted
    assert len(onnx_layers.sample(roles, sizes, 0)) == 3 and onnx_layers.sample([], {}, 10) == []


def test_the_report_says_how_many_were_evaluated(graphs: Graphs, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnx_layers, "LIMIT", 0)
    report = judged("modelopt-nvfp4a16", graphs.get("modelopt-nvfp4a16"), "tensors")
    assert "7 of 7" in check(report, WEIGHTS).value  # one of every kind
    assert not any("evaluator ran" in n for n in report.notes)


def test_global_scales_that_half_precision_holds_stay_wide(tmp_path: Path) -> None:
    """Scales of two levels have more digits than F16, whatever the outer one is."""
    model = kinds.KINDS["NVFP4, power-of-2 global"]()
    execute(onnx.plan(model, onnx.Options("trt")), tmp_path)
    proto = onnx_reader.read(tmp_path / "model.onnx").proto
    inner = [n for n in proto.graph.node if n.op_type == "DequantizeLinear" and n.input[0].endswith(".scale")]
    constants = {t.name: t.data_type for t in proto.graph.initializer}
    assert inner and {constants[n.input[1]] for n in inner} == {1}


# --- TensorRT, and runtimes ----------------------------------------------------------------------------------


@no_gpu
def test_the_report_says_what_was_built_and_that_nothing_ran(graphs: Graphs) -> None:
    report = judged("modelopt-nvfp4a16", graphs.get("modelopt-nvfp4a16"), "structure", "logits")
    built = check(report, "tensorrt_rtx takes it")
    label = f"TensorRT-RTX {tensorrt_rtx.__version__}, ahead of time, not run"
    assert built.passed and f"({label}; for SM120)" in built.value and built.gate == "parses and builds"
    assert check(report, "TensorRT's rules").passed
    assert report.details["engine"]["label"] == label
    assert any(n.startswith(label) and "no validation of TensorRT 11" in n for n in report.notes)
    assert any(t.startswith("logits in TensorRT: no NVIDIA GPU is here") for t in report.not_proven)
    (kernel,) = [t for t in report.not_proven if t.startswith("logits in onnxruntime")]
    assert "NOT_IMPLEMENTED" in kernel and "DequantizeLinear" in kernel


@no_gpu
@pytest.mark.parametrize(
    ("name", "dtype", "why"),
    [
        ("modelopt-nvfp4-kv-nvfp4", "F16", "TRT_FP4DynamicQuantize"),
        ("gptqmodel-gptq-4-g32", "BF16", "NOT_IMPLEMENTED"),
        ("modelopt-fp8-kv", "F16", ""),
        ("modelopt-int8-sq", "F16", ""),
        ("gptqmodel-gptq-4-g32-asym", "F16", ""),
    ],
)
def test_onnx_runtime_runs_what_it_can(name: str, dtype: str, why: str, graphs: Graphs) -> None:
    report = judged(name, graphs.get(name, dtype=dtype), "tensors", "logits")
    assert not failed(report)
    left = [t for t in report.not_proven if t.startswith("logits in onnxruntime")]
    assert bool(left) == bool(why) and all(why in t for t in left)
    named = {c.name for c in report.checks}
    assert ("fidelity: KL divergence" in named) == (not why)
    assert ("fidelity: KL divergence (restated in F32)" in named) == bool(why)
    if why:
        restated = check(report, "fidelity: KL divergence (restated in F32)")
        assert 0 <= restated.measured < (1e-2 if "4-kv" in name else 1e-5)
        assert any("the graph restated in F32" in n for n in report.notes)
        assert check(report, "step by step: KL divergence from the whole prompt").passed


def later_mask(o: Opened) -> None:
    """Every token sees one more."""
    node = o.of("LessOrEqual")
    node.input[1] = o.before(node, "Add", [node.input[1], o.number(1)])


def other_values(o: Opened) -> None:
    """Keys and values of the past behind the new ones."""
    node = next(n for n in o.graph.node if n.output[0] == "present.0.value")
    node.input[0], node.input[1] = node.input[1], node.input[0]


@no_gpu
@pytest.mark.parametrize("change", [later_mask, other_values])
@pytest.mark.parametrize(("name", "dtype"), [("modelopt-nvfp4a16", "F16"), ("gptqmodel-gptq-4-g32", "BF16")])
def test_faults_of_graphs_that_no_runtime_here_runs_are_caught(
    name: str, dtype: str, change: Change, graphs: Graphs, tmp_path: Path
) -> None:
    """By the twin in F32: in the logits of a prompt, or step by step."""
    report = judged(name, planted(graphs, name, change, tmp_path / "bad", dtype=dtype), "logits")
    assert any("KL divergence" in n for n in failed(report)), [(c.name, c.value) for c in report.checks]


def test_twins_hold_the_graphs_numbers_in_f32(graphs: Graphs, tmp_path: Path) -> None:
    """And none of TensorRT's operators, FP4 codes or halves."""
    graph = found(graphs.get("modelopt-mixed"))
    model = onnx_reader.read(onnx_twin.write(graph, tmp_path))
    nodes, tensors = model.proto.graph.node, model.proto.graph.initializer
    assert not {t.data_type for t in tensors} & {10, 16, 23} and "trt" not in {n.domain for n in nodes}
    role = "layers.0.mlp.gate"
    product = next(n for n in nodes if n.op_type == "MatMul" and n.name.startswith(role))
    matrix = model.tensors[product.input[1]].array()
    entry = graph.model.entries[role].data
    assert isinstance(entry, QTensor) and np.array_equal(matrix.T, values(entry))


def test_rows_of_int8_with_rounded_inputs_run_in_onnx_runtime(tmp_path: Path) -> None:
    """Several products of one input, whose DequantizeLinear ONNX Runtime does not fuse: it needs zero points there."""
    model = lconvert.read(source("modelopt-int8-sq"))
    execute(onnx.plan(model, onnx.Options("ort")), tmp_path)
    report = judged("modelopt-int8-sq", tmp_path, "structure", "tensors", "logits")
    assert not failed(report) and check(report, "carried").value.startswith("7 exact")
    proto = onnx_reader.read(tmp_path / "model.onnx").proto
    rows = [
        n for n in proto.graph.node if n.op_type == "DequantizeLinear" and n.input[0].startswith("layers.")
    ]
    assert len(rows) == 7 and all(n.input[2] == n.input[0] + ".zero" for n in rows)


def negative(o: Opened) -> None:
    o.change("layers.0.attn.o.scale", np.float32, lambda x: -x)


def test_a_broken_rule_fails_before_the_builder_is_asked(graphs: Graphs, tmp_path: Path) -> None:
    report = judged(
        "modelopt-int8-sq", planted(graphs, "modelopt-int8-sq", negative, tmp_path / "bad"), "structure"
    )
    assert failed(report) == ["TensorRT's rules"]
    assert any("positive-scale" in n and "layers.0.attn.o" in n for n in report.notes)


def test_without_the_package_the_parser_is_not_proven(
    graphs: Graphs, monkeypatch: pytest.MonkeyPatch
) -> None:
    without_backends(monkeypatch)
    report = judged("modelopt-nvfp4a16", graphs.get("modelopt-nvfp4a16"), "structure")
    assert check(report, "TensorRT's rules").passed and report.exit_code == 0
    assert any(t.startswith("TensorRT's parser and builder: tensorrt") and "lconvert[tensorrt]" in t for t in report.not_proven)  # fmt: skip


def test_graphs_that_take_long_are_parsed_alone(graphs: Graphs, monkeypatch: pytest.MonkeyPatch) -> None:
    from lconvert.validators import onnx_engine

    monkeypatch.setattr(onnx_engine, "_NODES", 10)
    report = judged("modelopt-nvfp4a16", graphs.get("modelopt-nvfp4a16"), "structure")
    parsed = check(report, "tensorrt_rtx takes it")
    assert parsed.passed and parsed.gate == "parses" and parsed.value.endswith(" layers")
    assert any("would take long to build" in t for t in report.not_proven)


def test_ort_graphs_are_not_asked_about_tensorrt(tmp_path: Path) -> None:
    name = "gptqmodel-gptq-4-g32"
    execute(onnx.plan(lconvert.read(source(name)), onnx.Options()), tmp_path)
    report = judged(name, tmp_path)
    assert not any("TensorRT" in t for t in (*report.not_proven, *(c.name for c in report.checks)))


@no_gpu
def test_engines_run_nowhere_without_a_gpu(graphs: Graphs) -> None:
    from lconvert.validators.runtimes import open_runtime

    folder = graphs.get("modelopt-nvfp4a16")
    with pytest.raises(MissingPackageError, match="no NVIDIA GPU"):
        open_runtime("tensorrt", folder / "model.onnx")
    options: dict[str, Any] = {"tiers": ("logits",), "runtimes": ("tensorrt",), "cache": False}
    report = lconvert.validate(source("modelopt-nvfp4a16"), folder, require=("tensorrt",), **options)
    assert report.exit_code == 3
    assert [t for t in report.not_proven if "engine" in t] == ["logits in tensorrt: no NVIDIA GPU is here, so no engine was run"]  # fmt: skip


@no_gpu
def test_build_engine_says_that_it_did_not_run(graphs: Graphs, tmp_path: Path) -> None:
    """FP8 is built for what has it, if nothing is said."""
    graph = graphs.get("modelopt-fp8-kv") / "model.onnx"
    assert tensorrt.targets(onnx_reader.read(graph)) == (89, 120)
    result = CliRunner().invoke(cli, ["build-engine", str(graph), "-o", str(tmp_path / "m.plan")])
    assert result.exit_code == 0, result.output
    assert "for SM89, SM120" in result.output and "not run: no NVIDIA GPU is here" in result.output
    manifest = json.loads((tmp_path / "m.plan.manifest.json").read_text())
    assert manifest["run"].startswith("not run: no NVIDIA GPU")
