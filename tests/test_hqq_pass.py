"""The pass `hqq`: the paper's formulas again in NumPy, what is stored, what is refused, and every architecture."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

import lconvert
from lconvert import recipe
from lconvert.converters import onnx, targets
from lconvert.errors import InputError, OptionError
from lconvert.ir import QTensor, Tensor, as_f32, dense
from lconvert.kernels.qtensor import dequantize, effective
from lconvert.passes import hqq, rtn
from lconvert.primitives import hqq as method
from lconvert.primitives.job import Job
from tests import arch_cases, case_models
from tests.conftest import DEMO
from tests.test_cli import inside

Floats = NDArray[np.float32]


def weights(seed: int, n: int = 64, size: int = 64) -> Floats:
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((n, size)) * 0.02
    return np.where(rng.random(x.shape) < 0.02, x * 5, x).astype(np.float32)


def lp(x: Any, y: Any, p: float = 0.7) -> Any:
    return (np.abs(np.asarray(x, np.float64) - np.asarray(y, np.float64)) ** p).sum(-1)


def half_quadratic(x: Floats, top: int, unit: NDArray[np.float64] | float) -> NDArray[np.float64]:
    """The paper's alternation, group by group: the least sum |x - y|^0.7 among its iterates. unit: what errors are measured in."""
    out = []
    for row, u in zip(x.astype(np.float64), np.broadcast_to(unit, len(x)), strict=True):
        s = (row.max() - row.min()) / top
        z, beta, best = -row.min() / s, 10.0, np.inf
        for _ in range(20):
            q = np.clip(np.rint(row / s + z), 0, top)
            left = (row - s * (q - z)) / u
            size = np.maximum(np.abs(left), 1e-12)
            e = np.sign(left) * np.maximum(size - size ** (0.7 - 1) / beta, 0) * u
            z = np.mean(q - (row - e) / s)
            beta *= 1.01
            y = s * (np.clip(np.rint(row / s + z), 0, top) - z)
            best = min(best, float(lp(row, y)))
        out.append(best)
    return np.array(out)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_the_descent_is_the_papers(bits: int) -> None:
    """With scales kept it ends where the formulas do, for errors in units of the weights and of the scale, whichever is better."""
    x, top = weights(bits), (1 << bits) - 1
    settings = method.Settings(scale=False)
    s, z = method.fit(torch.from_numpy(x), top, lambda s, z: (s, z), settings)
    q = method.coded(torch.from_numpy(x), s, z, top)
    mine = lp(x, ((q - z.unsqueeze(-1)) * s.unsqueeze(-1)).numpy())
    scale = (x.max(-1).astype(np.float64) - x.min(-1)) / top
    paper = np.minimum(half_quadratic(x, top, 1.0), half_quadratic(x, top, scale))
    wide = (np.maximum(x.max(-1), 0) - np.minimum(x.min(-1), 0)) / top  # the candidate both start from
    zero = -np.minimum(x.min(-1), 0) / wide
    nearest = wide[:, None] * (np.clip(np.rint(x / wide[:, None] + zero[:, None]), 0, top) - zero[:, None])
    expected = np.minimum(paper, lp(x, nearest))
    # a group whose descent pauses for three rounds ends early: it may miss a later iterate, never beat one that is not there
    assert np.median(np.abs(mine / expected - 1)) < 1e-6 and (mine >= expected * (1 - 1e-5)).all()
    assert mine.sum() <= expected.sum() * 1.005


def test_the_objective_never_rises() -> None:
    x = torch.from_numpy(weights(7))

    def left(n: int) -> Any:
        store = hqq._store(hqq.Options(), 15)
        s, z = method.fit(x, 15, store, method.Settings(iterations=n))
        return method.error(x, (method.coded(x, s, z, 15) - z.unsqueeze(-1)) * s.unsqueeze(-1), 0.7)

    errors = [left(n) for n in (1, 2, 3, 5, 8, 20)]
    assert all(bool((b <= a).all()) for a, b in pairwise(errors))
    assert float(errors[-1].sum()) < float(errors[0].sum())


@pytest.mark.parametrize(("grid", "group"), [("uint4", 64), ("uint3", 32), ("uint8", -1)])
def test_less_error_than_nearest_on_the_same_grid(grid: str, group: int) -> None:
    model = lconvert.read(DEMO)
    ours = hqq.run(model, hqq.Options(grid, group))
    nearest = rtn.run(model, rtn.Options(grid, group))
    total = [0.0, 0.0]
    for name, entry in model.entries.items():
        q, r = ours.entries[name].data, nearest.entries[name].data
        assert isinstance(q, QTensor) == isinstance(r, QTensor), name
        if not (isinstance(q, QTensor) and isinstance(r, QTensor)):
            continue
        assert (q.grid, q.block, q.shape) == (r.grid, r.block, r.shape)
        assert isinstance(q.scale, Tensor) and isinstance(q.zero, Tensor) and q.zero.dtype == "U8"
        scale = as_f32(q.scale.read(0, q.scale.rows), "F16")
        mantissa = np.frexp(scale)[0] * 128
        assert (mantissa == np.rint(mantissa)).all(), (
            "7 significant bits: the products with zero points are exact in Q4_1"
        )
        assert int(q.zero.read(0, q.zero.rows).max()) < 1 << q.grid.bits
        w = effective(entry)
        shape = (-1, q.block[1] if q.block[1] > 0 else w.shape[1])
        a, b = (lp(w.reshape(shape), dequantize(t).reshape(shape)) for t in (q, r))
        total = [total[0] + a.sum(), total[1] + b.sum()]
    assert total[0] < total[1]


def test_float_zeros() -> None:
    model = lconvert.read(DEMO)
    made = {z: hqq.run(model, hqq.Options(zeros=z)) for z in ("integer", "float")}  # type: ignore[arg-type]
    errors = {
        z: sum(float(lp(effective(e), effective(m.entries[n])).sum()) for n, e in model.entries.items())
        for z, m in made.items()
    }
    assert errors["float"] < errors["integer"]
    q = made["float"].entries["layers.0.attn.q"].data
    assert isinstance(q, QTensor) and isinstance(q.zero, Tensor) and q.zero.dtype == "F16"
    for name in ("vllm", "awq", "gptq"):
        plan = targets.plan(made["float"], name, "x", original=model)
        assert "refused" in {i.verdict.kind for i in plan.items()}, name
    held = {i.held for i in onnx.plan(made["float"], onnx.Options(), model).items()}
    assert "UINT4, blocks of 64, minima" in held


def test_a_slab_is_as_good_as_the_matrix(monkeypatch: pytest.MonkeyPatch) -> None:
    model = lconvert.read(DEMO)
    one = hqq.run(model, hqq.Options(iterations=3))
    monkeypatch.setattr(hqq, "SLAB", 1)
    two = hqq.run(model, hqq.Options(iterations=3))
    for name in one.entries:
        np.testing.assert_array_equal(effective(one.entries[name]), effective(two.entries[name]))


CASES = list({c.model_type: c for c in reversed(arch_cases.load()) if not c.refused and c.loads}.values())


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.model_type)
def test_every_architecture(case: Any) -> None:
    pytest.importorskip("transformers", reason="transformers is not installed")
    model = lconvert.read(case_models.folder(case.name))
    out = hqq.run(model, hqq.Options("uint4", 16, iterations=2))
    made = [
        e for e in out.entries.values() if isinstance(e.data, QTensor) and e.provenance[-1].startswith("hqq")
    ]
    wanted = [e for e, _ in hqq.Options("uint4", 16).chosen(model)]
    assert {e.name for e in made} == {e.name for e in wanted} and made
    for e in made[:4]:
        assert np.isfinite(effective(e)).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"grid": "int4"}, "hqq: layers.0.attn.q: grid int4; it fits zero points, so choose uint2 .. uint8, or none"),
        ({"grid": "Q4_K"}, "grid Q4_K"),
        ({"group": 20}, "rows of 256 values do not divide into groups of 20"),
        ({"targets": "nothing"}, "hqq: no dense matrix matches targets 'nothing'"),
        ({"zeros": "none"}, "hqq: zeros 'none'; choose integer or float"),
        ({"p": 2.0}, "hqq: p 2.0"),
        ({"iterations": 0}, "hqq: iterations 0"),
    ],
)  # fmt: skip
def test_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError) as e:
        hqq.run(lconvert.read(DEMO), hqq.Options(**options))
    assert message in str(e.value)


def test_weights_that_are_no_numbers() -> None:
    model = lconvert.read(DEMO)
    entry = model.entries["layers.1.mlp.up"]
    x = effective(entry).copy()
    x[3, 5] = np.nan
    bad = replace(entry, data=replace(dense(x), origin="up"))
    with pytest.raises(InputError, match=r"up: holds NaN or infinite values in rows 0\.\."):
        hqq.run(model.with_entries({entry.name: bad}, "spoilt"), hqq.Options())


def test_dead_groups() -> None:
    model = lconvert.read(DEMO)
    entry = model.entries["layers.1.mlp.up"]
    x = effective(entry).copy()
    x[3] = 0
    bad = replace(entry, data=dense(x))
    out = hqq.run(model.with_entries({entry.name: bad}, "dead"), hqq.Options())
    assert (effective(out.entries[entry.name])[3] == 0).all()


def test_as_a_method_and_a_recipe(tmp_path: Any) -> None:
    assert [s.name for s in recipe.load("hqq-w4g64").steps] == ["hqq"]
    for verb, out in (("hf-to-vllm", "v"), ("compress", "m.lcir")):
        proof = [] if verb == "compress" else ["--no-validate"]
        code, _, err = inside([verb, str(DEMO), "--method", "hqq", "-o", str(tmp_path / out), *proof])
        assert code == 0, err
    q = lconvert.read(tmp_path / "v").entries["layers.0.attn.q"].data
    assert isinstance(q, QTensor) and q.zero is not None and q.grid.bits == 4
    code, _, err = inside(["hf-to-trtllm", str(DEMO), "--method", "hqq", "-o", str(tmp_path / "t")])
    assert code == 2 and "--method hqq: no flag of this verb has zero points; use a recipe" in err


def test_as_many_threads_as_the_run_has(monkeypatch: pytest.MonkeyPatch) -> None:
    """A busy machine gets one thread if one is asked for, and the process has its own number again afterwards."""
    seen: list[int] = []
    fit, before = method.fit, torch.get_num_threads()
    monkeypatch.setattr(method, "fit", lambda *a: (seen.append(torch.get_num_threads()), fit(*a))[1])
    for count in (1, 3):
        hqq.run(lconvert.read(DEMO), hqq.Options(group=32), Job(threads=count))
    assert set(seen) == {1, 3} and torch.get_num_threads() == before
