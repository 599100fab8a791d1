"""Quantized models as ONNX graphs: the integers that arrive, what ONNX Runtime makes of them, and the logits.

Oracles: the onnx package reads the weights back (tests/onnx_back.py), transformers runs the dequantized model with inputs rounded by
NumPy and torch (tests/rounded_inputs.py), compressed-tensors judges the rounding of inputs, ONNX Runtime's own optimized graph shows
what it packed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import lconvert
from lconvert.ir import E2M1, E4M3, ActSpec, Entry, Grid, Model, QTensor, dense, int_grid

for package in ("onnx", "onnxruntime", "torch", "transformers"):
    pytest.importorskip(package, reason=f"{package} is not installed")
import onnx as onnx_package
import onnxruntime
import torch
from onnx import helper

from lconvert.converters import onnx, onnx_activations, onnx_weights
from lconvert.converters.kinds import KINDS, matrices, plain, rounded
from lconvert.converters.onnx_decoder import Builder
from lconvert.executor import execute
from lconvert.forward import Forward
from lconvert.kernels.qtensor import effective
from lconvert.passes import activations, rtn
from tests import case_models, onnx_back, rounded_inputs
from tests.conftest import ROOT
from tests.exact_values import values64
from tests.quantized_models import SOURCES
from tests.test_onnx_archs import Session, tokens

PEERS = ROOT / "tests" / "fixtures" / "peers"
FIXTURES = sorted(p.name for p in PEERS.iterdir() if p.is_dir())
EVERYTHING = (*FIXTURES, *SOURCES)
#: fp32 of another order. Logits of these models are below 8.
CLOSE = 1e-5
#: Of random models with logits up to 25, as in tests/test_onnx_archs.py.
CLOSE_TO_RANDOM = 2e-4


@cache
def model_of(name: str) -> Model:
    return lconvert.read(PEERS / name) if name in FIXTURES else SOURCES[name]()


def quantized(model: Model) -> dict[str, Entry]:
    return {n: e for n, e in model.entries.items() if isinstance(e.data, QTensor) and n != "embed"}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Path]:
    root, made = tmp_path_factory.mktemp("onnx"), {}
    for n, name in enumerate(EVERYTHING):
        made[name] = root / str(n)
        execute(onnx.plan(model_of(name)), made[name])
    return made


def verdicts(model: Model, **options: Any) -> dict[str, tuple[str, str, str]]:
    """Role -> kind, what it is held as, reason."""
    plan = onnx.plan(model, onnx.Options(**options))
    own = {i.name: (i.verdict.kind, i.held, i.verdict.reason) for i in plan.items()}
    return {n: own[n] for n in quantized(model)}


# --- the file ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", EVERYTHING)
def test_the_numbers_in_the_file_are_those_of_the_source(name: str, folders: Mapping[str, Path]) -> None:
    """exact: codes and scales one by one. widened: the same real numbers, exactly, or fp32 values where the plan says values."""
    model = model_of(name)
    onnx_package.checker.check_model(str(folders[name] / "model.onnx"), full_check=True)
    reader, said = onnx_back.Reader(folders[name]), verdicts(model)
    for role, entry in quantized(model).items():
        kind, held, _ = said[role]
        back, q = reader.matrix(role), entry.data
        assert isinstance(q, QTensor) and kind in ("exact", "widened")
        if held == "plain":
            bare = entry if back.input_scale is None else replace(entry, transform=None)
            assert back.type == "FLOAT" and np.array_equal(back.raw, effective(bare)), role
            continue
        assert held.startswith(back.type + ",") and back.type != "FLOAT"
        assert np.array_equal(back.values(), values64(q)), role
        if entry.transform is not None:
            assert entry.transform.param is not None and back.input_scale is not None
            assert np.array_equal(back.input_scale, rounded_inputs.number(entry.transform.param)), role
        if kind == "exact":
            check_codes(back, q, role)


def check_codes(back: onnx_back.Back, q: QTensor, role: str) -> None:
    codes, (rows, columns) = q.codes.load(), q.shape
    if q.grid.kind == "float":
        assert np.array_equal(back.raw.view(np.uint8), codes.view(np.uint8)), role
    else:
        at = np.arange(columns) // (columns if q.block[1] == -1 else q.block[1])
        if q.g_idx is not None:
            at = q.g_idx.load()
        height = rows if q.block[0] == -1 else q.block[0]
        zero = 0 if q.zero is None else q.zero.load().astype(np.int64)[np.arange(rows) // height][:, at]
        assert np.array_equal(back.steps, codes.astype(np.int64) - zero), role
    assert back.minimum is None and back.factor is None


def test_embeddings_are_looked_up_in_their_codes(folders: Mapping[str, Path]) -> None:
    name = "llmcompressor-w4a16-embedding"
    q = model_of(name).entries["embed"].data
    assert isinstance(q, QTensor) and isinstance(q.scale, lconvert.ir.Tensor)
    reader = onnx_back.Reader(folders[name])
    assert np.array_equal(reader.array("embed.table"), q.codes.load())
    assert np.array_equal(reader.array("embed.table.scale"), rounded_inputs.number(q.scale).reshape(-1, 1))


# --- the runtime -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", EVERYTHING)
def test_logits(name: str, folders: Mapping[str, Path]) -> None:
    """ONNX Runtime at accuracy level 1 against transformers, a prompt in two pieces and single steps.

    An input that lies between two codes may fall to either side: then a few positions differ by one step, the others by nothing.
    """
    agree(model_of(name), folders[name] / "model.onnx", CLOSE)


def agree(model: Model, path: Path, close: float, prompts: int = 1, length: int = 20) -> None:
    session, rounding = Session(path), rounded_inputs.RoundedForward(model)
    off, effect = [], []
    for seed in range(1, prompts + 1):
        ids = tokens(model, min(length, model.arch.context), seed)
        got = session.logits(ids, [len(ids) * 4 // 9, len(ids) * 2 // 5])
        want = rounding.logits(ids)
        off.append(np.abs(got - want))
        effect.append(np.abs(Forward(model).logits(ids) - want))
    o, e = np.concatenate(off), np.concatenate(effect)
    if not any(x.activation is not None for x in quantized(model).values()) and model.kv is None:
        assert o.max() < close
        return
    assert np.median(o) < close / 5 and np.median(e) > 100 * np.median(o), "rounding must be seen"
    assert o.max() < close or ((o.max(-1) < close).mean() > 0.5 and o.max() < 2 * e.max())


@pytest.mark.parametrize("name", ["mixtral-experts", "gpt2-tied", "gemma2-alternating", "qwen3_moe-experts"])
@pytest.mark.parametrize("kind", ["minima", "int8", "fp8", "fp8 groups"])
def test_other_architectures(name: str, kind: str, tmp_path: Path) -> None:
    """Experts, of which some get no token at all; heads that are the embedding; soft caps and windows."""
    model = lconvert.read(case_models.folder(name))
    if kind == "minima":
        model = rtn.run(model, rtn.Options(grid="Q4_1", group=32))
    else:
        grid, _, groups = kind.partition(" ")
        model = rtn.run(model, rtn.Options(grid=grid, group=-1))
        model = activations.run(model, activations.Options(grid, group=32 if groups else 0))
    path = tmp_path / "m" / "model.onnx"
    execute(onnx.plan(model), path.parent)
    agree(model, path, CLOSE_TO_RANDOM, prompts=6, length=4)


def optimized(path: Path) -> Any:
    """What ONNX Runtime makes of a graph, dumped beside it, where the weights are."""
    out = path.with_name("optimized.onnx")
    options = onnxruntime.SessionOptions()
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
    options.optimized_model_filepath = str(out)
    options.log_severity_level = 4
    onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return onnx_package.load(str(out)).graph


@pytest.mark.parametrize("name", [n for n in EVERYTHING if n not in ("base", "plain bf16")])
def test_onnx_runtime_packs_the_same_integers(name: str, folders: Mapping[str, Path]) -> None:
    """Every dequantized product became one MatMulNBits, whose codes, scales and zero points are those of the graph."""
    graph = optimized(folders[name] / "model.onnx")
    tensors = {t.name: onnx_package.numpy_helper.to_array(t) for t in graph.initializer}
    reader, model = onnx_back.Reader(folders[name]), model_of(name)
    packed = [n for n in graph.node if n.op_type == "MatMulNBits"]
    held = {r for r, (_, text, _) in verdicts(model).items() if text.split(",")[0] in _PACKED}
    held -= {r for r in held if fused_as_integers(model.entries[r].activation, verdicts(model)[r][1])}
    assert len(packed) == len(held)
    found = [unpacked(n, tensors) for n in packed]
    for role in held:
        back = reader.matrix(role)
        order = np.arange(back.steps.shape[1])
        if role + ".order" in reader.types:
            order = reader.array(role + ".order")
        steps, scale = back.steps[:, order], (back.scale[:, order] if back.scale is not None else None)
        same = [
            s.shape == steps.shape and np.array_equal(s, steps) and np.array_equal(c, scale) for s, c in found
        ]
        assert sum(same) >= 1, role


#: Types that are packed; FP8 is none.
_PACKED = ("INT4", "UINT4", "UINT2", "INT8", "UINT8")


def fused_as_integers(a: ActSpec | None, text: str) -> bool:
    """Products whose inputs are 8-bit integers too, with scales that can come after."""
    return a is not None and a.grid.kind == "int" and text == "INT8, per row"


def unpacked(node: Any, tensors: Mapping[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Codes minus zero points and scales, (out, in), of a MatMulNBits (onnxruntime/docs/ContribOperators.md)."""
    a = {x.name: helper.get_attribute_value(x) for x in node.attribute}
    n, k, bits, size = a["N"], a["K"], a.get("bits", 4), a["block_size"]
    blocks, per = -(-k // size), 8 // bits

    def codes(packed: np.ndarray, count: int) -> np.ndarray:
        wide = packed.reshape(n, -1).view(np.uint8)
        parts = [(wide >> np.uint8(bits * i)) & np.uint8((1 << bits) - 1) for i in range(per)]
        return np.stack(parts, -1).reshape(n, -1)[:, :count].astype(np.float64)

    steps = codes(tensors[node.input[1]], blocks * size)[:, :k]
    scale = tensors[node.input[2]].reshape(n, blocks).astype(np.float64)
    if len(node.input) > 3 and node.input[3]:
        zero = codes(tensors[node.input[3]], blocks)
    else:
        zero = np.full((n, blocks), 1 << (bits - 1), np.float64)
    spread = np.arange(k) // size
    return steps - zero[:, spread], scale[:, spread]


def test_int8_inputs_meet_int8_weights_in_integers(folders: Mapping[str, Path]) -> None:
    kinds = [n.op_type for n in onnx_back.Reader(folders["W8A8"]).graph.node]
    assert kinds.count("MatMulInteger") == 7 and "DequantizeLinear" not in kinds


def test_static_int8_is_fused(folders: Mapping[str, Path]) -> None:
    """QuantizeLinear and DequantizeLinear around the product become MatMulIntegerToFloat."""
    for name in ("modelopt-int8-sq", "llmcompressor-w8a8-static-asym"):
        graph = optimized(folders[name] / "model.onnx")
        assert [n.op_type for n in graph.node].count("MatMulIntegerToFloat") == 7


# --- rounding of inputs, node by node ----------------------------------------------------------------------


def graph_of(a: ActSpec, width: int, powers: bool = False, dtype: str = "F32") -> Any:
    """A session that only rounds its input (batch, sequence, width)."""
    b = Builder(plain(), onnx_weights.DIALECTS["ort"], dtype)
    type_ = {"F32": 1, "F16": 10}[dtype]
    assert onnx_activations.reason(a, b, powers) == ""
    b.graph.op("Identity", onnx_activations.quantized(b, "x", a, powers), output="y")
    name = {"F32": "FLOAT", "F16": "FLOAT16"}[dtype]
    b.graph.input("x", name, ("b", "s", width))
    b.graph.output("y", name, ("b", "s", width))
    del type_
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
    model = model_of("FP8 and FP8 cache")
    plan = onnx.plan(model, onnx.Options(rounding=False))
    assert sum("asked for" in n for n in plan.notes) == 9
    execute(plan, tmp_path / "m")
    ids = tokens(model, 12)
    assert (
        np.abs(Session(tmp_path / "m" / "model.onnx").logits(ids, [12]) - Forward(model).logits(ids)).max()
        < CLOSE
    )


def test_tensorrt_gets_no_scales_found_at_run_time() -> None:
    plan = onnx.plan(model_of("W8A8"), onnx.Options("trt"))
    assert any("TensorRT takes static symmetric scales" in n for n in plan.notes)


def test_the_cache_is_rounded_and_said_so() -> None:
    notes = onnx.plan(model_of("FP8 and FP8 cache")).notes
    assert any(n.startswith("keys are rounded to FP8, static per tensor") for n in notes)


# --- verdicts ----------------------------------------------------------------------------------------------


def test_verdicts_by_dtype() -> None:
    """Scales that the graph's dtype does not hold make the values rounded, never the scales."""
    full = {"F32": "exact", "F16": "exact", "BF16": "rounded"}
    for dtype, kind in full.items():
        assert {v[0] for v in verdicts(model_of("int4 g128 (GPTQ)"), dtype=dtype).values()} == {kind}, dtype
        assert {v[0] for v in verdicts(model_of("int4 g128, short scales"), dtype=dtype).values()} == {
            "exact"
        }
    for dtype in ("F16", "BF16"):
        found = verdicts(model_of("int4 g128, f32 scales (ModelOpt)"), dtype=dtype)
        assert {(k, r) for k, _, r in found.values()} == {
            ("rounded", f"as {dtype} values: scales that {dtype} does not hold")
        }
        assert {v[0] for v in verdicts(model_of("NVFP4 (ModelOpt)"), dtype=dtype).values()} == {"rounded"}
    assert {v[1] for v in verdicts(model_of("NVFP4 (ModelOpt)")).values()} == {
        "INT8, blocks of 16, global scale"
    }


@pytest.mark.parametrize(
    ("name", "held"),
    [
        ("int2 g32", "UINT2, blocks of 32, zero points"),
        ("int8 per row", "INT8, per row"),
        ("FP8 per tensor, weights", "FLOAT8E4M3FN, per tensor"),
        ("transformers-bitnet", "UINT2, per row, zero points, global scale"),
        ("float zero points (HQQ)", "UINT4, blocks of 64, minima"),
        ("Q4_1", "UINT4, blocks of 32, minima"),
    ],
)
def test_what_matrices_are_held_as(name: str, held: str) -> None:
    assert {text for _, text, _ in verdicts(model_of(name)).values()} == {held}


def test_blocks_that_do_not_divide(tmp_path: Path) -> None:
    """A short last block becomes narrower blocks of equal width, of weights and of inputs."""
    model = model_of("llmcompressor-fp8-block")
    widths = {
        role: (e.shape[1], held)
        for role, e in quantized(model).items()
        for held in [verdicts(model)[role][1]]
    }
    short = {r: w for r, w in widths.items() if w[0] % 128}
    assert short and all(text == f"FLOAT8E4M3FN, blocks of {np.gcd(k, 128)}" for k, text in short.values())


def test_a_minimum_that_fp32_would_round_is_no_minimum() -> None:
    """Offset minus scale times the middle is not always a number of fp32: then signed codes are not called equal."""
    model = rtn.run(plain(), rtn.Options(grid="Q4_1", group=32))
    e = model.entries["layers.0.attn.q"]
    q = e.data
    assert isinstance(q, QTensor) and q.offset is not None
    far = dense(np.full(q.offset.shape, 1 + 2.0**-20, np.float32))
    odd = replace(e, data=replace(q, offset=far, scale=dense(np.full(far.shape, 2.0**-29, np.float32))))
    assert onnx_weights.held(odd, onnx_weights.DIALECTS["ort"], "F32").form is not None, (
        "unsigned codes keep the offset itself"
    )
    signed = replace(onnx_weights.DIALECTS["ort"], asymmetric={})
    assert onnx_weights.held(odd, signed, "F32").form is None


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


def test_the_adapter_leaves_integer_weights_packed(folders: Mapping[str, Path]) -> None:
    from lconvert.validators.runtimes import onnx_session

    mixed = folders["llmcompressor-mixed-int4-fp8"] / "model.onnx"
    assert onnx_session.settings(mixed, "parity") == {}
    assert onnx_session.settings(folders["FP8 per row, dynamic"] / "model.onnx", "speed") == {
        onnx_session.UNFUSED: "1"
    }
    assert onnx_session.settings(folders["W8A8"] / "model.onnx", "parity") == {onnx_session.PRECISE: "1"}
    assert onnx_session.settings(folders["W8A8"] / "model.onnx", "speed") == {}
    assert onnx_session.settings(Path("nowhere.onnx"), "speed") == {}


def test_the_plan_says_what_to_set() -> None:
    said = {
        n: " ".join(onnx.plan(model_of(n)).notes) for n in ("FP8 per row, dynamic", "W8A8", "int4 g32 (GPTQ)")
    }
    assert "session.disable_quant_qdq is 1" in said["FP8 per row, dynamic"]
    assert "session.x64quantprecision" in said["W8A8"]
    assert "session." not in said["int4 g32 (GPTQ)"]
