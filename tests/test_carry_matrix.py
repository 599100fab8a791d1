"""The carry matrix, every source against every target, each verdict against the truth.

The truth is found without the converter. What a plan calls exact or widened is written, read back and compared bit for
bit, as values of canonical fp32. What it refuses is searched for a representation by brute force: the exact rational values of
every group, divided by their greatest common divisor, say whether integers of so many bits and a scale of so few could hold
them at all.
"""

from __future__ import annotations

from fractions import Fraction
from functools import reduce
from math import gcd
from pathlib import Path

import numpy as np
import pytest

import lconvert
from lconvert.converters import act_order, matrix, targets
from lconvert.converters.checkpoint_dtype import model_dtype
from lconvert.converters.checkpoint_modules import Options, linears, lowered
from lconvert.converters.kinds import matrices
from lconvert.executor import execute
from lconvert.ir import Model, QTensor
from lconvert.kernels.qtensor import effective
from lconvert.plan import Plan, refusals
from tests.quantized_models import SOURCES

EXACT = ("exact", "widened")
#: Targets whose stored numbers are read back; ir and dense have tests of their own.
WRITTEN = (
    "gguf",
    "vllm",
    "tensorrt-llm",
    "compressed-tensors",
    "gptq",
    "gptq_v2",
    "awq",
    "fp8",
    "modelopt",
    "bitsandbytes",
    "mxfp4",
)


def _plan(model: Model, target: str) -> Plan:
    return targets.plan(model, target, "m.gguf" if target == "gguf" else "m")


def _ready(model: Model, target: str) -> Model:
    """What the artifact should hold: the model after act-order was absorbed where the target does that."""
    return model if target.startswith("gptq") else act_order.absorb(model)[0]


@pytest.mark.parametrize("target", WRITTEN)
@pytest.mark.parametrize("source", SOURCES)
def test_what_is_called_exact_is_exact_in_the_file(source: str, target: str, tmp_path: Path) -> None:
    model = SOURCES[source]()
    plan = _plan(model, target)
    if refusals(plan):
        return
    out = tmp_path / ("m.gguf" if target == "gguf" else "m")
    execute(plan, tmp_path if target == "gguf" else out)
    back = lconvert.read(out)
    promised = {s for i in plan.items() for s in i.sources if i.verdict.kind not in EXACT}
    want = _ready(model, target)
    checked = 0
    for name, entry in matrices(want).items():
        if name in promised:
            continue
        checked += 1
        assert np.array_equal(effective(entry), effective(back.entries[name])), name
        if isinstance(entry.data, QTensor) and target not in ("gguf",):
            assert isinstance(back.entries[name].data, QTensor), f"{name} was dequantized and called exact"
    assert checked or promised


# --- could a refusal have been exact? --------------------------------------------------------------------


def _fits_16(value: Fraction) -> bool:
    x = float(value)
    if Fraction(x) != value or abs(x) > 65504:
        return False
    half = Fraction(float(np.float16(x))) == value
    brain = (
        not int(np.array([x], np.float32).view(np.uint32)[0]) & 0xFFFF
        and Fraction(float(np.float32(x))) == value
    )
    return half or brain


def _integers_hold(values: np.ndarray, bits: int, zero: bool, wide: bool = False) -> bool:
    """Whether some scale of 16 bits (or, `wide`, any) and codes of `bits` say exactly these numbers of one group (float64, exact)."""
    exact = [Fraction(float(v)) for v in values if v]
    if not exact:
        return True
    bottom = reduce(lambda a, b: a * b // gcd(a, b), (v.denominator for v in exact))
    step = Fraction(reduce(gcd, (int(abs(v) * bottom) for v in exact)), bottom)
    low, high = min(0, *exact) / step, max(0, *exact) / step
    spans = [(low, high), (-high, -low)]  # a scale may be negative
    if zero:
        fits = any(b - a <= (1 << bits) - 1 for a, b in spans)
    else:
        fits = any(a >= -(1 << (bits - 1)) and b <= (1 << (bits - 1)) - 1 for a, b in spans)
    return fits and (wide or _fits_16(step))


#: Target -> (widths, with zero points): every kind of integers that it stores with scales of 16 bits.
_INTEGERS = {
    "compressed-tensors": ((8, True),),
    "gptq": ((8, False),),
    "gptq_v2": ((8, True),),
    "awq": ((4, True),),
}


def _exact_values(q: QTensor) -> np.ndarray:
    """Values in float64: codes of at most 8 bits times scales of at most 24 bits are exact there."""
    from lconvert.kernels.qtensor import _spread, grid_values

    w = grid_values(q.grid, q.codes.load()).astype(np.float64)
    if q.zero is not None:
        w = w - _spread(q, q.zero, 0, q.rows)
    if isinstance(q.scale, QTensor):
        inner = _exact_values(q.scale)
        width = q.shape[1] // inner.shape[1]
        w = w * np.repeat(inner, width, axis=1)
    else:
        scale = _spread(q, q.scale, 0, q.rows).astype(np.float64)
        w = w / scale if q.divisor else w * scale
    return (
        w
        if q.offset is None
        else w
        - (
            np.repeat(_exact_values(q.offset), 32, 1)
            if isinstance(q.offset, QTensor)
            else _spread(q, q.offset, 0, q.rows)
        )
    )


@pytest.mark.parametrize("target", _INTEGERS)
@pytest.mark.parametrize("source", SOURCES)
def test_what_is_refused_could_not_have_been_exact(source: str, target: str) -> None:
    model = SOURCES[source]()
    plan = _plan(model, target)
    refused = {s for i in plan.items() for s in i.sources if i.verdict.kind in ("refused", "requantized")}
    for name in sorted(refused)[:3]:
        entry = matrices(_ready(model, target))[name]
        q = entry.data
        assert isinstance(q, QTensor)
        if q.g_idx is not None:
            continue  # test_act_order_* judge these
        if ".experts." in name:
            continue  # numbers may fit, but what is one tensor for all experts has no layout there
        if entry.activation is not None and target not in ("gptq", "gptq_v2", "awq"):
            continue
        values = _exact_values(q)
        group = 32 if q.block[1] == -1 or q.block[1] % 32 == 0 else q.block[1]
        rows = values[:24].reshape(-1, group)
        for bits, zero in _INTEGERS[target]:
            hold = all(_integers_hold(r, bits, zero) for r in rows)
            assert not hold, f"{name} was refused, but {bits} bits hold every group of its first rows"


@pytest.mark.parametrize("source", SOURCES)
def test_onnx_holds_what_it_says(source: str, tmp_path: Path) -> None:
    """Real numbers of the graph's nodes are those of the source; what is held as values has no 8-bit integers, around whatever
    minimum, with a scale of fp32."""
    pytest.importorskip("onnx", reason="onnx is not installed")
    from tests.exact_values import values64
    from tests.onnx_back import Reader

    model = SOURCES[source]()
    plan = _plan(model, "onnx")
    assert not refusals(plan) and {i.verdict.kind for i in plan.items()} <= set(EXACT)
    execute(plan, tmp_path / "m")
    reader, held = Reader(tmp_path / "m"), {i.name: i.held for i in plan.items()}
    for name, entry in matrices(model).items():
        back, q = reader.matrix(name), entry.data
        if not isinstance(q, QTensor):
            assert np.array_equal(back.raw, effective(entry)), name
            continue
        if held[name] != "plain":
            assert back.type != "FLOAT" and np.array_equal(back.values(), values64(q)), name
            continue
        assert back.type == "FLOAT" and np.array_equal(back.raw, effective(entry)), name
        group = q.shape[1] if q.block[1] == -1 else q.block[1]
        rows = _exact_values(q)[:24].reshape(-1, group)
        assert not all(_integers_hold(r - r.min(), 8, False, wide=True) for r in rows), name


def test_every_exact_pair_goes_back_bit_for_bit(tmp_path: Path) -> None:
    """source -> target -> ir -> target: the same bytes."""
    for source in (
        "int4 g128 (GPTQ)",
        "uint4 g128",
        "int8 per row",
        "FP8 per row, dynamic",
        "NVFP4, power-of-2 global",
        "MXFP4",
        "W8A8",
    ):
        model = SOURCES[source]()
        for target in ("compressed-tensors", "gptq", "awq", "modelopt"):
            plan = _plan(model, target)
            if refusals(plan):
                continue
            first, second = tmp_path / f"{source}-{target}-1", tmp_path / f"{source}-{target}-2"
            execute(plan, first)
            execute(_plan(lconvert.read(first), target), second)
            assert (first / "model.safetensors").read_bytes() == (
                second / "model.safetensors"
            ).read_bytes(), (source, target)


def test_act_order_is_absorbed_in_down_and_refused_elsewhere() -> None:
    found = {v.tensors: v for v in matrix.verdicts(SOURCES["act-order in down"](), "compressed-tensors")}
    assert {v.kind for v in found.values() if v.tensors in ("down", "gate, up", "o", "q, k, v")} == {"exact"}
    found = {v.tensors: v for v in matrix.verdicts(SOURCES["int4 g32, act-order"](), "compressed-tensors")}
    assert found["down"].kind == "exact"
    assert found["q, k, v"].kind == "refused" and "g_idx" in found["q, k, v"].reason
    gptq = {v.tensors: v.kind for v in matrix.verdicts(SOURCES["int4 g32, act-order"](), "gptq")}
    assert gptq["q, k, v"] == "exact", "GPTQ's own container has a g_idx"
    assert matrix.verdicts(SOURCES["int4 g32, act-order"](), "vllm-gptq")[-1].kind == "refused"


def test_absorbing_act_order_keeps_the_function() -> None:
    """The permuted model computes the same logits."""
    from lconvert.forward import Forward

    model = SOURCES["act-order in down"]()
    moved, notes = act_order.absorb(model)
    assert notes and not any(
        isinstance(e.data, QTensor) and e.data.g_idx is not None for e in moved.entries.values()
    )
    a, b = Forward(model).logits([1, 2, 3, 4]), Forward(moved).logits([1, 2, 3, 4])
    assert np.abs(a - b).max() <= 1e-5 * np.abs(a).max()


def test_untied_global_scales_are_never_tied_silently() -> None:
    kinds = {v.tensors: v for v in matrix.verdicts(SOURCES["NVFP4, untied globals"](), "modelopt")}
    assert kinds["q, k, v"].kind == "refused" and "global scales" in kinds["q, k, v"].reason
    assert kinds["o"].kind == "exact" and kinds["down"].kind == "exact"
    assert {v.kind for v in matrix.verdicts(SOURCES["NVFP4, power-of-2 global"](), "modelopt")} == {"exact"}


def test_ratio_of_a_power_of_two_is_absorbed(tmp_path: Path) -> None:
    from dataclasses import replace

    from lconvert.ir import dense

    model = SOURCES["NVFP4, power-of-2 global"]()
    q = model.entries["layers.0.attn.k"].data
    assert isinstance(q, QTensor) and isinstance(q.scale, QTensor)
    codes = q.scale.codes.load()
    if ((codes & 0x78) <= 0x08).any():
        codes = np.maximum(codes, 0x20)  # normal numbers, which halve exactly
    half = replace(q.scale, codes=dense(codes), scale=dense(np.float32([[2.0**-12]])))
    model = model.with_entries(
        {"layers.0.attn.k": replace(model.entries["layers.0.attn.k"], data=replace(q, scale=half))}
    )
    kinds = {v.tensors: v.kind for v in matrix.verdicts(model, "modelopt")}
    assert kinds["q, k, v"] == "widened"
    execute(_plan(model, "modelopt"), tmp_path / "m")
    back = lconvert.read(tmp_path / "m")
    for role in "qkv":
        name = f"layers.0.attn.{role}"
        assert np.array_equal(effective(model.entries[name]), effective(back.entries[name]))


def test_model_dtype_follows_the_scales() -> None:
    """fp16 scales with a full mantissa are served in float16, short ones in the model's bfloat16."""
    for source, dtype in (
        ("int4 g128 (GPTQ)", "F16"),
        ("int4 g128, short scales", "BF16"),
        ("NVFP4, power-of-2 global", "BF16"),
    ):
        options = Options()
        ready = lowered(SOURCES[source](), options)
        assert model_dtype(ready.model, linears(ready, options), options) == dtype


def test_readme_shows_the_computed_matrix() -> None:
    """Every cell of the README's table, by its verdict."""
    from tests.conftest import ROOT

    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("| source | gguf |"))
    columns = [c.strip() for c in lines[start].strip("|").split("|")][1:]
    shown = {}
    for line in lines[start + 2 :]:
        if not line.startswith("|"):
            break
        source, *cells = (c.strip() for c in line.strip("|").split("|"))
        shown[source] = dict(zip(columns, cells, strict=True))
    found = matrix.table(columns)
    assert set(shown) == set(found)
    for source, row in found.items():
        for target, verdict in row.items():
            cell = shown[source][target]
            said = {"–": "refused", "F32 values": "widened"}.get(cell, cell.partition(":")[0])
            assert said == verdict.kind, (source, target, cell, verdict)
