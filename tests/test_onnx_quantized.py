"""Quantized models as ONNX graphs: the integers that arrive, what ONNX Runtime makes of them, and the logits.

Oracles: the onnx package reads the weights back (tests/onnx_back.py), transformers runs the dequantized model with inputs rounded by
NumPy and torch (tests/rounded_inputs.py), ONNX Runtime's own optimized graph shows
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
from lconvert.ir import ActSpec, Entry, Model, QTensor, dense

for package in ("onnx", "onnxruntime", "torch", "transformers"):
    pytest.importorskip(package, reason=f"{package} is not installed")
import onnx as onnx_package
import onnxruntime
from onnx import helper

from lconvert.converters import onnx, onnx_weights
from lconvert.converters.kinds import plain
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


@pytest.mark.parametrize("name", EVERYTHING)
def test_the_numbers_in_a_half_file_are_those_of_the_source(name: str, tmp_path: Path) -> None:
    """Whatever is not called rounded is equal."""
    model = model_of(name)
    plan = onnx.plan(model, onnx.Options("ort", "F16"))
    execute(plan, tmp_path / "m")
    reader, said = onnx_back.Reader(tmp_path / "m"), {i.name: i.verdict.kind for i in plan.items()}
    for role, entry in quantized(model).items():
        if said[role] == "rounded":
            continue
        back, q = reader.matrix(role), entry.data
        assert isinstance(q, QTensor) and np.array_equal(back.values(), values64(q)), role


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
    fused = {r for r in held if fused_as_integers(model.entries[r].activation, verdicts(model)[r][1])}
    held -= fused
    assert len(packed) == len(held)
    assert sum(n.op_type in ("MatMulInteger", "MatMulIntegerToFloat") for n in graph.node) == len(fused)
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
    return a is not None and a.grid.kind == "int" and text in ("INT8, per row", "INT8, per tensor")


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


@pytest.mark.parametrize("name", EVERYTHING)
def test_every_plan_is_made_in_every_dtype(name: str) -> None:
    """A verdict for everything, an exception for nothing."""
    for dtype in ("F16", "BF16"):
        plan = onnx.plan(model_of(name), onnx.Options("ort", dtype))
        for item in plan.items():
            assert item.verdict.kind in ("exact", "widened", "rounded")
            assert item.verdict.kind != "rounded" or item.verdict.reason, item.name
