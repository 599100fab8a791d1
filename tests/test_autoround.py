"""AutoRound: its derivatives against autograd's through the same steps, its result against all roundings of small problems and against rounding to
nearest, its values against the IR's; the pass on whole models."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import lconvert
from lconvert.converters import targets
from lconvert.errors import InputError, OptionError
from lconvert.ir import QTensor, dense
from lconvert.kernels.qtensor import dequantize
from lconvert.passes import autoround as pass_
from lconvert.passes import rtn
from lconvert.primitives import grids, signround, text
from lconvert.primitives.job import Calibration, Job
from lconvert.primitives.placement import Placed
from lconvert.primitives.sequential import Batch
from lconvert.primitives.signround import Rounding, Settings, latent, tune
from tests import arch_cases, case_models
from tests.conftest import DEMO, ROOT
from tests.test_gptq import cost
from tests.test_grids import ALL, found, weights

TEXT = ROOT / "validators" / "text" / "excerpt.txt"
QUICK: dict[str, Any] = {"iterations": 12, "batch": 4, "precision": "f32"}


class Linear:
    """A block that is one matrix, as `tune` uses blocks: x (windows, tokens, in) in, x w^T out."""

    def __init__(self, w: Any, x: Any) -> None:
        self.module = torch.nn.Linear(w.shape[1], w.shape[0], bias=False)
        self.module.weight.requires_grad_(False)
        self.set("w", w)
        self.x, self.index, self.device, self.windows = x, 0, torch.device("cpu"), (len(x), x.shape[1])
        self.y = x @ w.T

    def set(self, role: str, w: Any) -> None:
        self.module.weight.data.copy_(w)

    def some(self, windows: Any) -> Batch:
        return Batch(self.x[list(windows)], {}, self.y[list(windows)])

    def target(self, batch: Batch) -> Any:
        return batch.reference

    def slopes(self, roles: Any) -> Any:
        block = self

        class Inside:
            def __enter__(self) -> Any:
                block.module.weight.requires_grad_(True)
                return lambda loss: {"w": torch.autograd.grad(loss, block.module.weight)[0]}

            def __exit__(self, *args: object) -> None:
                block.module.weight.requires_grad_(False)

        return Inside()


def problem(rows: int, cols: int, seed: int = 0) -> tuple[Any, Any]:
    """Weights, and 16 windows of correlated inputs."""
    g = torch.Generator().manual_seed(seed)
    mix = torch.randn(cols, cols, generator=g) + 0.5 * torch.randn(1, cols, generator=g)
    return torch.randn(rows, cols, generator=g) * 0.02, torch.randn(16, 12, cols, generator=g) @ mix


def error(w: Any, q: Any, x: Any) -> float:
    return float(((x @ (w - q).T) ** 2).mean())


def tuned(w: Any, x: Any, g: grids.DeploymentGrid, settings: Settings, start: Any = None) -> Any:
    near = g.nearest(w)
    rounding = Rounding(w, g, near[1]) if start is None else start
    return tune(Linear(w, x), {"w": rounding}, {"w": near}, settings, 7)  # type: ignore[arg-type]


STEPS = Settings(iterations=200, batch=16, half=False)


@pytest.mark.parametrize("name", ["int3", "uint3", "nf4"])
def test_small_problems_go_towards_the_best_rounding(name: str) -> None:
    """Against all roundings to either neighbour. Signed steps are a heuristic: on 8 weights they end in the optimum,
    or in a local one: measured 30% of the way (uint3) to all of it."""
    here, most = 0.0, 0.0
    for seed in range(5):
        w, x = problem(1, 8, seed)
        g = grids.find(Placed(name, -1), 8)
        near, sides = g.nearest(w)
        place = g.levels.place(signround._units(w.reshape(1, 1, 8), sides)).reshape(8)
        low = place.floor().clamp(0, len(g.levels.values) - 2)
        best = min(
            error(w, g.values((low + torch.tensor(c)).to(torch.uint8).reshape(1, 8), sides), x)
            for c in itertools.product((0.0, 1.0), repeat=8)
        )
        done = tuned(w, x, g, replace(STEPS, range_rate=0.0, batch=4))
        mine, nearest = error(w, g.values(*done.held["w"]), x), error(w, g.values(near, sides), x)
        assert best * (1 - 1e-4) <= mine <= nearest * (1 + 1e-6)
        assert math.isclose(mine, done.loss, rel_tol=1e-4)
        assert math.isclose(nearest, done.nearest, rel_tol=1e-4)
        here, most = here + (nearest - mine) / best, most + (nearest - best) / best
    assert here >= 0.25 * most


def through(rounding: Rounding, v: Any, low: Any, high: Any) -> Any:
    """Values by autograd with everything that jumps passed straight through, in the order of the docstring's formulas. Float scales stay as they are."""

    def straight(x: Any, y: Any) -> Any:
        return x + (y - x).detach()

    g, base = rounding.grid, rounding.base
    top = len(g.levels.values) - 1
    if low is None:
        s, m = base.scale * high, torch.zeros_like(base.scale)
    else:
        offset = signround._offset(base)
        m = offset * low
        s = ((base.scale * g.levels.high - offset) * high + m) / g.levels.high
    now = rounding.sides
    s, m = straight(s, now.scale), straight(m, torch.zeros_like(m) if low is None else signround._offset(now))
    u = (rounding.x + m.unsqueeze(-1)) / s.unsqueeze(-1)
    at = g.levels.place(u.detach()).floor().clamp(0, top - 1).long()
    gap = torch.from_numpy(g.levels.gaps if not g.levels.uniform else np.ones(top, np.float32))[at]
    level = torch.from_numpy(g.levels.values)
    exact = g.levels.place(u.detach()) + v.detach()
    code = exact.round()
    moving = u + v * gap  # rint and levels passed straight through: a level is where it is
    held = level[code.clamp(0, top).long()]
    inside = (code >= 0) & (code <= top)
    q = torch.where(inside, straight(moving, held), held)
    return q * s.unsqueeze(-1) - m.unsqueeze(-1)


@pytest.mark.parametrize("placed", [Placed("int4", 32), Placed("uint4", 32), Placed("nf4", 32), Placed("Q4_1", -1), Placed("Q4_K", -1),
                                    Placed("IQ4_NL", -1), Placed("Q3_K", -1)], ids=str)  # fmt: skip
def test_derivatives_are_those_of_the_straight_through_steps(placed: Placed) -> None:
    w = weights(3, 6)
    w[3], w[4] = w[2], w[5]  # no constant groups
    g = found(placed, w)
    rounding = Rounding(w, g, g.fit(w))
    generator = torch.Generator().manual_seed(1)
    rounding.v.copy_(torch.rand(rounding.v.shape, generator=generator) - 0.5)
    rounding.high.copy_(torch.rand(rounding.high.shape, generator=generator) * 0.4 + 0.7)
    rounding._settle()
    v, high = rounding.v.clone().requires_grad_(), rounding.high.clone().requires_grad_()
    low = None if rounding.low is None else rounding.low.clone().requires_grad_()
    y = through(rounding, v, low, high)
    assert torch.allclose(y.reshape(w.shape), rounding.values(), atol=1e-6)
    assert float((~rounding._free).float().mean()) > 0.001
    gradient = torch.randn(w.shape, generator=generator)
    y.backward(gradient.reshape(y.shape))
    mine = rounding.slopes(gradient)
    assert torch.equal(mine[0].sign(), v.grad.sign())
    for got, want in ((mine[1], low), (mine[2], high)):
        if want is not None:
            clear = want.grad.abs() > 1e-4 * want.grad.abs().max()
            assert torch.equal(got.sign()[clear], want.grad.sign()[clear])


@pytest.mark.parametrize("placed", ALL, ids=str)
def test_values_are_the_ir_s_on_every_grid_and_no_worse_than_nearest(placed: Placed) -> None:
    w, x = problem(6, 512)
    g = found(placed, w)
    near = g.nearest(w)
    assert torch.equal(Rounding(w, g, near[1]).values(), g.values(*near))
    done = tuned(w, x, g, Settings(iterations=20, rate=1 / 20, half=False))
    values = g.values(*done.held["w"])
    assert np.array_equal(dequantize(g.qtensor(*done.held["w"], dense(w.numpy()))), values.numpy())
    assert error(w, values, x) <= error(w, g.values(*near), x) * (1 + 1e-5)
    if len(g.levels.values) <= 16:
        assert done.loss < 0.8 * done.nearest


@pytest.mark.parametrize("placed", ALL, ids=str)
def test_a_start_from_other_codes_is_exact(placed: Placed) -> None:
    w = weights()
    g = found(placed, w)
    sides = g.fit(w)
    near = g.round(w, sides)
    step = torch.randint(-2, 3, near.shape, generator=torch.Generator().manual_seed(2))
    codes = (near.int() + step).clamp(0, len(g.levels.values) - 1).to(torch.uint8)
    moved = Rounding(latent(w, g, codes, sides), g, sides)
    assert torch.equal(moved.values(), g.values(codes, sides))
    same = codes == near
    assert torch.equal(latent(w, g, codes, sides)[same], w[same])


def test_pruned_weights_stay_zero() -> None:
    w, x = problem(8, 64)
    kept = torch.rand(w.shape, generator=torch.Generator().manual_seed(4)) < 0.5
    w = w * kept
    for name in ("int4", "uint4", "nf4", "fp4"):
        g = found(Placed(name, 32), w)
        near = g.nearest(w)
        done = tuned(w, x, g, STEPS, Rounding(w, g, near[1], kept))
        y = g.values(*done.held["w"])
        assert not y[~kept].any() and done.loss < done.nearest


def test_steps_are_the_same_in_parts_and_again() -> None:
    w, x = problem(4, 64)
    g = found(Placed("int4", 32), w)
    settings = Settings(iterations=30, half=False)
    one, again, parts = (tuned(w, x, g, s) for s in (settings, settings, replace(settings, at_once=3)))
    assert torch.equal(one.held["w"][0], again.held["w"][0]) and one.loss == again.loss
    assert math.isclose(one.loss, parts.loss, rel_tol=0.05)


def test_outputs_that_are_no_numbers() -> None:
    w, x = problem(4, 64)
    x[3] = math.nan
    with pytest.raises(InputError, match="outputs of layer 0 are no numbers"):
        tuned(w, x, found(Placed("int4", 32), w), STEPS)


# --- the pass ---------------------------------------------------------------------------------------------


def calibration(**more: Any) -> Job:
    return Job(Calibration(str(TEXT), windows=24, context=128), **more)


@pytest.mark.parametrize(("grid", "target"), [("int4", "vllm"), ("Q4_K", "gguf"), ("fp4", "vllm")])
def test_a_model_costs_less_than_rounded_to_nearest(grid: str, target: str) -> None:
    model = lconvert.read(DEMO)
    done = pass_.run(model, pass_.Options(grid, 64, iterations=20, batch=4), calibration())
    near = rtn.run(model, rtn.Options(grid, 64))
    assert cost(done, model) < cost(near, model)
    rounded = {n for n, e in done.entries.items() if isinstance(e.data, QTensor)}
    assert rounded == {n for n, e in near.entries.items() if isinstance(e.data, QTensor)}
    for name in rounded:
        assert "layer loss" in done.entries[name].provenance[-1]
    plan = targets.plan(done, target, "out")
    verdicts = {i.verdict.kind for i in plan.items() if i.held or any(n in rounded for n in i.name.split())}
    assert verdicts <= {"exact", "widened"}


@pytest.mark.parametrize("case", arch_cases.some(2))
def test_every_architecture(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    shown = text.Windows((tuple(range(3, 19)), tuple(range(20, 36))))
    monkeypatch.setattr(text, "windows", lambda model, calibration: shown)
    model = lconvert.read(case_models.folder(case))
    narrow = min(e.shape[1] for e, _ in pass_.Options("int4", 8).chosen(model))
    group = next(g for g in (32, 16, 8, 4) if narrow % g == 0)
    job = Job(Calibration(str(TEXT), windows=2, context=16))
    done = pass_.run(model, pass_.Options("int4", group, **{**QUICK, "iterations": 2, "batch": 2}), job)
    for entry, _ in pass_.Options("int4", group).chosen(model):
        assert isinstance(done.entries[entry.name].data, QTensor)


def test_a_resumed_run_writes_the_same(tmp_path: Path) -> None:
    model = lconvert.read(DEMO)
    options = pass_.Options("int4", 64, **QUICK)

    def codes(m: Any) -> list[Any]:
        out = []
        for e in m.entries.values():
            if isinstance(e.data, QTensor):
                out += [e.data.codes.load(), e.data.scale.load()]
        return out

    whole = codes(pass_.run(model, options, calibration()))

    def stop(what: str, done: int, total: int) -> None:
        if what == "autoround" and done == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pass_.run(model, options, calibration(work=tmp_path / "work", progress=stop))
    resumed = codes(pass_.run(model, options, calibration(work=tmp_path / "work", resume=True)))
    assert len(whole) == len(resumed) > 0
    assert all(np.array_equal(a, b) for a, b in zip(whole, resumed, strict=True))
    other = codes(
        pass_.run(
            model, options, replace(calibration(), calibration=replace(calibration().calibration, seed=5))
        )
    )
    assert not all(np.array_equal(a, b) for a, b in zip(whole, other, strict=True))


def test_options_that_cannot_be() -> None:
    for wrong in (
        {"iterations": 0},
        {"batch": 0},
        {"rate": 2.0},
        {"range_rate": -1.0},
        {"start": "x"},
        {"precision": "f16"},
    ):
        with pytest.raises(OptionError, match="autoround: "):
            pass_.Options("int4", 32, **wrong)  # type: ignore[arg-type]
