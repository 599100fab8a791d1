"""Round to nearest: the grids' definitions, scales that every runtime holds, and one path for fused and two-step."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import lconvert
from lconvert import kernels, passes, recipe
from lconvert.converters.gguf_carry import carry
from lconvert.errors import InputError, LconvertError, OptionError
from lconvert.formats.gguf_blocks import SCHEMES, native_type, packer
from lconvert.ir import QTensor, Tensor, dense
from lconvert.kernels.qtensor import dequantize, effective
from lconvert.passes import rtn
from lconvert.primitives import importance
from lconvert.primitives.job import Calibration, Job
from tests.checkpoints import bf16, write_llama
from tests.conftest import DEMO, ROOT

TEXT = ROOT / "validators" / "text" / "excerpt.txt"

RNG = np.random.default_rng(5)


def _weights(dtype: str = "F32", rows: int = 6, cols: int = 512) -> Tensor:
    x = RNG.standard_normal((rows, cols)).astype(np.float32) * np.float32(0.05)
    x[1] = 0
    x[2, :40] = 0.25
    if dtype == "BF16":
        return dense(bf16(x), "BF16")
    return dense(x.astype(np.float16) if dtype == "F16" else x)


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
@pytest.mark.parametrize("type_", sorted(SCHEMES))
def test_fused_and_two_step_paths_write_the_same_bytes(type_: str, dtype: str) -> None:
    """dense -> blocks in one kernel, and dense -> QTensor -> packed blocks."""
    t = _weights(dtype)
    try:
        fused = kernels.quantize(type_, t.load(), t.dtype)
    except LconvertError as e:
        assert "importance" in str(e) or "imatrix" in str(e), e
        return
    q = rtn.quantized(t, rtn.Options(grid=type_))
    assert native_type(q) == type_
    assert np.array_equal(packer(type_, q)(0, t.rows), fused)
    assert np.array_equal(packer(type_, q)(2, 5), fused[2:5])
    assert np.array_equal(dequantize(q), kernels.dequantize(type_, fused, t.shape[1]))


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("search", ["minmax", "signed-max", "mse"])
def test_symmetric_grid_is_its_definition(bits: int, search: str) -> None:
    t = _weights()
    q = rtn.quantized(t, rtn.Options(grid=f"int{bits}", group=64, search=search))  # type: ignore[arg-type]
    x, s = t.load().reshape(6, 8, 64), q.scale.load().astype(np.float32)  # type: ignore[union-attr]
    top = (1 << (bits - 1)) - 1
    with np.errstate(invalid="ignore", divide="ignore"):
        want = np.clip(np.nan_to_num(np.rint(x / s[..., None])), -top - 1, top)
    assert np.array_equal(q.codes.load().reshape(6, 8, 64), want)
    if search == "minmax":
        assert np.allclose(s, np.abs(x).max(-1) / top, rtol=2**-8, atol=2**-14)
    if search == "signed-max":
        farthest = np.take_along_axis(x, np.abs(x).argmax(-1)[..., None], -1)[..., 0]
        assert np.allclose(s, -farthest / (top + 1), rtol=2**-8, atol=2**-14)


@pytest.mark.parametrize("bits", range(2, 9))
def test_asymmetric_grid_keeps_zero_exact(bits: int) -> None:
    t = _weights()
    q = rtn.quantized(t, rtn.Options(grid=f"uint{bits}", group=128, search="mse"))
    assert q.zero is not None and not isinstance(q.scale, QTensor)
    s, z = q.scale.load().astype(np.float32), q.zero.load().astype(np.float32)
    assert (z >= 0).all() and (z < (1 << bits)).all()
    product = s * z
    if bits <= 4:
        assert np.array_equal(product.astype(np.float16).astype(np.float32), product), "z * s must fit fp16"
    w = dequantize(q)
    assert (w[1] == 0).all()


@pytest.mark.parametrize(("grid", "bits"), [("int4", 8), ("int8", 8), ("uint4", 7)])
def test_scales_are_short_so_that_bf16_and_fp16_hold_them(grid: str, bits: int) -> None:
    q = rtn.quantized(_weights(), rtn.Options(grid=grid, group=32))
    assert isinstance(q.scale, Tensor)
    mantissa, _ = np.frexp(q.scale.load().astype(np.float32))
    assert np.array_equal(mantissa * 2**bits, np.rint(mantissa * 2**bits))


@pytest.mark.parametrize(("bits", "group"), [(2, 16), (4, 16), (4, 32), (4, 128), (8, 32), (8, 256), (8, -1)])
def test_signed_max_loses_what_onnx_runtimes_quantizer_loses(bits: int, group: int) -> None:
    """The peer's own code on the same weights; our scales are rounded to 8 bits, which changes its error by less than 2%."""
    pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    from lconvert.validators.stock_onnx import quantized

    w = (np.random.default_rng(5).standard_normal((64, 256)) * 0.05).astype(np.float32)

    def error(y: np.ndarray) -> float:
        return float(((y - w).astype(np.float64) ** 2).sum())

    ours, before = (
        error(dequantize(rtn.quantized(dense(w), rtn.Options(grid=f"int{bits}", group=group, search=search))))  # type: ignore[arg-type]
        for search in ("signed-max", "minmax")
    )
    theirs = error(quantized(dense(w), bits, group).load())
    assert abs(ours / theirs - 1) < 0.02
    assert ours < before * (0.9 if bits < 8 else 1.0)


@pytest.mark.parametrize("grid", ["int3", "int4", "uint4"])
def test_mse_search_is_never_worse(grid: str) -> None:
    t = _weights()

    def error(search: str) -> float:
        q = rtn.quantized(t, rtn.Options(grid=grid, group=32, search=search))  # type: ignore[arg-type]
        return float(((dequantize(q) - t.load()).astype(np.float64) ** 2).sum())

    assert error("mse") < error("minmax") * 0.98


@pytest.mark.parametrize(
    ("grid", "group", "type_", "verdict"),
    [
        ("int4", 32, "Q4_0", "exact"),
        ("int4", 128, "Q4_0", "widened"),
        ("int3", 64, "Q4_0", "widened"),
        ("int5", 32, "Q5_0", "exact"),
        ("int6", 32, "Q8_0", "widened"),
        ("int8", -1, "Q8_0", "widened"),
        ("uint4", 32, "Q4_1", "exact"),
        ("uint2", 64, "Q4_0", "widened"),
    ],
)
def test_portable_grids_arrive_in_gguf_without_rounding(
    grid: str, group: int, type_: str, verdict: str
) -> None:
    q = rtn.quantized(_weights(), rtn.Options(grid=grid, group=group))
    found = carry(q)
    assert found is not None and (found.type, found.verdict.kind) == (type_, verdict)
    stored = packer(type_, found.tensor)(0, 6)
    import gguf  # the independent dequantizer

    theirs = gguf.dequantize(stored, getattr(gguf.GGMLQuantizationType, type_))
    assert np.array_equal(theirs, dequantize(q))


def test_nan_is_refused() -> None:
    x = np.ones((2, 64), np.float32)
    x[1, 3] = np.nan
    q = rtn.quantized(dense(x, origin="file: w"), rtn.Options(grid="int4", group=32))
    with pytest.raises(InputError, match=r"file: w: holds NaN or infinite values"):
        q.codes.load()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"grid": "int9"}, r"grid 'int9'; did you mean int8\? choose int2\.\.int8"),
        ({"group": 0}, "group 0"),
        ({"search": "best"}, "choose minmax, signed-max, mse or importance"),
        ({"search": "mse", "signed": True}, "it is for importance"),
        ({"targets": "("}, "not a regular expression"),
    ],
)
def test_wrong_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        rtn.Options(**options)


def test_wrong_group_for_a_tensor(tmp_path: Path) -> None:
    model = lconvert.read(write_llama(tmp_path / "m"))
    with pytest.raises(OptionError, match="do not divide into groups of 96"):
        rtn.run(model, rtn.Options(group=96))
    with pytest.raises(OptionError, match="no dense matrix matches"):
        rtn.run(model, rtn.Options(targets="nothing"))


# --- recipes ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        n
        for n in recipe.names()
        if not any(passes.calibrates(s.name, s.options) for s in recipe.load(n).steps)
    ],
)
def test_every_preset_runs(name: str) -> None:
    changed = [e for e in recipe.load(name).apply(lconvert.read(DEMO)).entries.values() if e.provenance]
    assert changed


def test_recipe_file(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(
        "schema: lconvert.recipe/1\npasses:\n  - rtn: {grid: int8, group: -1, ignore: '.*down'}\n"
    )
    model = recipe.load(path).apply(lconvert.read(DEMO))
    assert isinstance(model.entries["layers.0.attn.q"].data, QTensor)
    assert isinstance(model.entries["layers.0.mlp.down"].data, Tensor)


@pytest.mark.parametrize("grid", ["int4", "uint4", "Q4_K", "fp4"])
def test_importances_count_the_errors_of_strong_inputs(grid: str) -> None:
    """On what calibration saw, sum h_j (w_j - q_j)^2 is less than with the scales that rtn takes by itself."""
    model = lconvert.read(DEMO)
    job = Job(Calibration(str(TEXT), windows=8, context=128))
    placement: dict[str, Any] = {"grid": grid, "group": 32, "targets": r"layers\.0\.attn\.[qkv]"}
    seen = importance.measure(model, job).moments
    plain = rtn.run(model, rtn.Options(**placement))
    done = rtn.run(model, rtn.Options(**placement, search="importance"), job)
    for role in ("layers.0.attn.q", "layers.0.attn.k", "layers.0.attn.v"):
        w, h = effective(model.entries[role]), seen[role].squares.numpy()
        mine, theirs = (((effective(m.entries[role]) - w) ** 2 @ h).sum() for m in (done, plain))
        assert mine < theirs, role
        assert "importance" in done.entries[role].provenance[-1]


def test_signed_scales_serve_better() -> None:
    model = lconvert.read(DEMO)
    job = Job(Calibration(str(TEXT), windows=8, context=128))
    role, error = "layers.1.mlp.up", []
    for signed in (False, True):
        options = rtn.Options("int4", 32, targets=re.escape(role), search="importance", signed=signed)
        data = rtn.run(model, options, job).entries[role].data
        assert isinstance(data, QTensor)
        error.append(float(((dequantize(data) - effective(model.entries[role])) ** 2).sum()))
        assert bool((data.scale.read(0, 8) < 0).any()) == signed
    assert error[1] < error[0]
