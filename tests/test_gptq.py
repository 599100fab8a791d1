"""GPTQ against the exact sweep it approximates nothing of, and against rounding to nearest, which it never loses to; the compiled sweep against
its specification; the pass on whole models."""

from __future__ import annotations

import json
import os
import signal
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer

import lconvert
from lconvert import kernels
from lconvert.converters import targets
from lconvert.errors import InputError, OptionError
from lconvert.forward import Forward
from lconvert.ir import QTensor, dense
from lconvert.kernels.qtensor import dequantize
from lconvert.passes import gptq as pass_
from lconvert.passes import rtn
from lconvert.primitives import gptq, grids, masks, sparsegpt, sweep
from lconvert.primitives.factor import factor
from lconvert.primitives.gptq import Settings
from lconvert.primitives.job import Calibration, Job
from lconvert.primitives.placement import Placed
from tests.conftest import DEMO, ROOT
from tests.test_grids import ALL, found

TEXT = ROOT / "validators" / "text" / "excerpt.txt"
PLAIN = Settings(refine=0, damping=1e-9)


def problem(rows: int, cols: int, seed: int = 0, tokens: int = 600) -> tuple[Any, Any]:
    """Weights and the Hessian of correlated inputs of different strength, fp32."""
    g = torch.Generator().manual_seed(seed)
    w = torch.randn(rows, cols, generator=g) * 0.02
    mix = (
        torch.randn(cols, cols, generator=g)
        * torch.logspace(0, -1.5, cols)[torch.randperm(cols, generator=g)]
    )
    x = torch.randn(tokens, cols, generator=g) @ mix
    return w, x.T @ x


def solved(w: Any, h: Any, g: grids.DeploymentGrid, sides: Any, order: Any) -> Any:
    """Optimal brain quantization in this order: the columns that are left solved again, exactly, after every column that was rounded."""
    w, h = w.double(), h.double()
    q = torch.zeros_like(w)
    for n, j in enumerate(order.tolist()):
        done, left = order[:n], order[n:]
        now = w[:, left] + torch.linalg.solve(h[left][:, left], ((w - q)[:, done] @ h[done][:, left]).T).T
        column = w.float().clone()
        column[:, j] = now[:, 0].float()
        q[:, j] = g.values(g.round(column, sides), sides)[:, j].double()
    return q.float()


@pytest.mark.parametrize("name", ["int4", "int2", "uint3"])
@pytest.mark.parametrize("order", ["none", "weight"])
def test_it_is_the_exact_sweep(name: str, order: str) -> None:
    w, h = problem(5, 16)
    g = grids.find(Placed(name, -1), 16)
    settings = replace(PLAIN, order=order)
    seen = gptq.inputs(h, order, settings, "w")
    done = gptq.gptq(w, seen, g, settings)
    path = torch.arange(16) if seen.order is None else seen.order
    sides = g.fit(w, seen.importance)
    exact = solved(w, h, g, sides, path)
    mine = g.values(gptq._sweep(w, seen.order, seen, g, sides, None, 1), sides)
    assert torch.equal(mine, exact)
    assert done.loss <= done.nearest


@pytest.mark.parametrize("placed", ALL, ids=str)
def test_no_row_is_worse_than_rounded_to_nearest(placed: Placed) -> None:
    w, h = problem(16, 512, tokens=900)
    g = found(placed, w)
    losses = []
    for refine in (0, 3):
        settings = Settings(refine=refine)
        seen = gptq.inputs(h, gptq.path(settings, g), settings, "w")
        done = gptq.gptq(w, seen, g, settings)
        near, sides = g.nearest(w, seen.importance)
        mine = gptq.objective(w, g.values(done.position, done.sides), h)
        assert (mine <= gptq.objective(w, g.values(near, sides), h) * (1 + 1e-5)).all()
        assert np.array_equal(
            dequantize(g.qtensor(done.position, done.sides, dense(w.numpy()))),
            g.values(done.position, done.sides).numpy(),
        )
        losses.append(done.loss)
    assert losses[1] <= losses[0] * 1.001 < done.nearest


def test_refining_never_raises_the_objective() -> None:
    w, h = problem(12, 256)
    for placed in (
        Placed("int3", 64),
        Placed("Q3_K", -1),
        Placed("fp4", -1),
        Placed("MXFP4", -1),
        Placed("uint2", 64),
    ):
        g = found(placed, w)
        settings = Settings(order="weight", refine=0)
        seen = gptq.inputs(h, "weight", settings, "w")
        sides = g.fit(w, seen.importance)
        position = gptq._sweep(w, seen.order, seen, g, sides, None, 1)
        before = gptq.objective(w, g.values(position, sides), h)
        for _ in range(3):
            sides = g.rescaled(w, position, sides, h)
            middle = gptq.objective(w, g.values(position, sides), h)
            position = gptq._descend(w, position, sides, h, g, None, 1)
            after = gptq.objective(w, g.values(position, sides), h)
            assert (middle <= before * (1 + 1e-5)).all() and (after <= middle * (1 + 1e-5)).all()
            before = after


@pytest.mark.parametrize("placed", ALL, ids=str)
def test_the_compiled_sweep_is_its_specification(placed: Placed, monkeypatch: pytest.MonkeyPatch) -> None:
    w, h = problem(37, 512)
    g = found(placed, w)
    sides = g.fit(w)
    seen = gptq.inputs(h, "none", Settings(), "w")
    part, upper = w[:, :96].contiguous(), seen.upper[:96, :96].contiguous()
    group = torch.arange(96) // g.group
    old = g.values(g.round(w, sides), sides)[:, :96].contiguous()
    kept = (torch.rand(37, 96, generator=torch.Generator().manual_seed(2)) > 0.5).to(torch.uint8)
    cases: list[dict[str, Any]] = [{}, {"kept": kept}, {"old": old}]
    for case in cases:
        matrix = h[:96, :96].contiguous() if "old" in case else upper
        spec = sweep.in_torch(part, matrix, g.levels, sides, group, **case)
        for isa in kernels.isas()[:-1]:
            monkeypatch.setenv("LCONVERT_ISA", isa)
            for threads in (1, 3):
                done = sweep.columns(part, matrix, g.levels, sides, group, threads=threads, **case)
                assert torch.equal(done.position, spec.position) and torch.equal(done.error, spec.error), (
                    isa,
                    list(case),
                )


def test_groups_that_follow_the_order_say_so() -> None:
    w, h = problem(8, 256)
    g = grids.find(Placed("int4", 64), 256)
    settings = Settings(order="group")
    seen = gptq.inputs(h, "group", settings, "w")
    done = gptq.gptq(w, seen, g, settings)
    q = pass_._in_groups(g.qtensor(done.position, done.sides, dense(w.numpy())), done.order, 64)
    y = torch.from_numpy(dequantize(q))
    assert float(gptq.objective(w, y, h).sum()) == pytest.approx(
        done.loss * float(gptq.objective(w, w * 0, h).sum()), rel=1e-3
    )
    assert sorted(q.g_idx.load().tolist()) == sorted(list(range(4)) * 64)  # type: ignore[union-attr]
    with pytest.raises(OptionError, match="super-blocks"):
        gptq.path(settings, grids.find(Placed("Q4_K", -1), 256))


def test_gptaq_comes_closer_to_the_uncompressed_outputs() -> None:
    g = torch.Generator().manual_seed(3)
    w, h = problem(24, 128, tokens=2000)
    x = torch.linalg.cholesky(h.double() + 1e-3 * torch.eye(128)).T.float()  # inputs with this Hessian
    original = x + 0.3 * torch.randn(x.shape, generator=g) * x.std() + 0.2 * x.roll(1, 1)
    cross = (original - x).T @ x
    grid = grids.find(Placed("int3", 64), 128)
    wanted = original @ w.T

    def distance(cross: Any, refine: int = 0) -> float:
        settings = Settings(alpha=1.0, refine=refine, order="none")
        done = gptq.gptq(w, gptq.inputs(h, "none", settings, "w", cross), grid, settings)
        return float((x @ grid.values(done.position, done.sides).T - wanted).square().sum())

    assert distance(cross) < 0.9 * distance(None)
    assert distance(cross, refine=3) < distance(cross)
    fine, settings = grids.find(Placed("int8", 32), 128), Settings(damping=1e-6, alpha=1.0)
    done = gptq.gptq(w, gptq.inputs(h, "none", settings, "w", cross), fine, settings)
    left = (
        x @ fine.values(done.position, done.sides).T - wanted
    )  # as many inputs as columns: but for rounding, none of it need be left
    assert (
        float(left.square().sum() / wanted.square().sum())
        < 0.003
        < float((x @ w.T - wanted).square().sum() / wanted.square().sum())
    )


def test_dead_inputs_are_rounded_to_nearest_and_named() -> None:
    w, h = problem(6, 64)
    dead = torch.tensor([3, 40])
    h[dead] = 0
    h[:, dead] = 0
    g = grids.find(Placed("int4", 32), 64)
    seen = gptq.inputs(h, "weight", Settings(), "w")
    assert seen.notes == ("2 of 64 inputs are always zero; their weights are rounded to nearest",)
    done = gptq.gptq(w, seen, g, Settings(refine=0))
    position, _ = g.round(w, done.sides), None
    assert torch.equal(done.position[:, dead], position[:, dead])


def test_hessians_that_are_singular_or_no_numbers() -> None:
    _, h = problem(2, 32)
    x = torch.randn(1, 32, generator=torch.Generator().manual_seed(1))
    seen = gptq.inputs(x.T @ x, "none", Settings(damping=1e-18), "w")
    assert "singular at a damping of 1e-18; took" in seen.notes[0] and torch.isfinite(seen.upper).all()
    h[1, 1] = float("nan")
    with pytest.raises(
        InputError, match=r"layers\.0\.attn\.q: the Hessian of its inputs holds NaN or infinity"
    ):
        gptq.inputs(h, "none", Settings(), "layers.0.attn.q")
    with pytest.raises(InputError, match="not positive definite even at 10 of its mean diagonal"):
        gptq.inputs(torch.eye(8) + 1e6 * (1 - torch.eye(8)), "none", Settings(), "w")


def test_pruned_weights_stay_zero() -> None:
    w, h = problem(16, 256)
    kept = torch.rand(16, 256, generator=torch.Generator().manual_seed(5)) > 0.5
    w = w * kept
    for name in ("int4", "uint4", "Q6_K", "fp4"):
        g = found(Placed(name, 64), w)
        settings = Settings()
        seen = gptq.inputs(h, gptq.path(settings, g), settings, "w")
        done = gptq.gptq(w, seen, g, settings, kept=kept)
        y = g.values(done.position, done.sides)
        assert not y[~kept].any() and done.loss < done.nearest


def test_gptaq_does_not_wake_pruned_weights() -> None:
    """Its shift moves zeros too; rows that rounding to nearest serves better have to keep them all the same."""
    w, h = problem(16, 256)
    kept = torch.rand(16, 256, generator=torch.Generator().manual_seed(5)) > 0.5
    w = w * kept
    cross = 40.0 * torch.randn(256, 256, generator=torch.Generator().manual_seed(6))
    g = found(Placed("int4", 64), w)
    seen = gptq.inputs(h, "weight", Settings(), "w", cross)
    done = gptq.gptq(w, seen, g, Settings(), kept=kept)
    assert bool((w + w @ seen.shift)[~kept].any())
    assert not g.values(done.position, done.sides)[~kept].any()


@pytest.mark.parametrize("how", ["2:4", "4:8", 0.5])
@pytest.mark.parametrize("grid", ["int4", "uint4", "fp4", "Q6_K"])
def test_pruning_in_the_sweep_beats_pruning_before_it(how: str | float, grid: str) -> None:
    """Exact counts of zeros, and outputs nearer to those of the weights as they came than after SparseGPT alone and GPTQ of what it left."""
    w, h = problem(32, 256)
    g, settings = found(Placed(grid, 64), w), Settings()
    seen = gptq.inputs(h, gptq.path(settings, g), settings, "w")
    pattern, share = masks.asked(how)
    f = factor(h, settings.damping, "w")
    kept = gptq.pruned(w, h, f, g, pattern, share, "w")
    if pattern.of:
        assert bool((kept.reshape(32, -1, pattern.of).sum(-1) == pattern.keep).all())
    assert int(kept.sum()) == kept.numel() // 2
    joint = gptq.gptq(w, seen, g, settings, kept=kept)
    after, mask = sparsegpt.sweep(w, f, pattern, share)
    two = gptq.gptq(after, seen, g, settings, kept=mask)
    y, z = g.values(joint.position, joint.sides), g.values(two.position, two.sides)
    assert not y[~kept].any() and not z[~mask].any()
    assert gptq.objective(w, y, h).sum() < gptq.objective(w, z, h).sum()


# --- the pass ---------------------------------------------------------------------------------------------


def calibration() -> Job:
    return Job(Calibration(str(TEXT), windows=24, context=128))


def cost(model: Any, original: Any) -> float:
    """Mean KL divergence on tokens that were not calibrated on."""
    ids = Tokenizer.from_str(json.dumps(original.tokenizer.json)).encode(TEXT.read_text()[-4000:]).ids[:256]
    p = torch.log_softmax(torch.from_numpy(Forward(original).logits(ids)), -1)
    q = torch.log_softmax(torch.from_numpy(Forward(model).logits(ids)), -1)
    return float((p.exp() * (p - q)).sum(-1).mean())


@pytest.mark.parametrize(
    ("grid", "target"), [("int4", "vllm"), ("Q4_K", "gguf"), ("Q3_K", "gguf"), ("fp4", "vllm")]
)
def test_a_model_costs_less_than_rounded_to_nearest(grid: str, target: str) -> None:
    model = lconvert.read(DEMO)
    done = pass_.run(model, pass_.Options(grid, 64), calibration())
    near = rtn.run(model, rtn.Options(grid, 64))
    assert cost(done, model) < cost(near, model)
    rounded = {n for n, e in done.entries.items() if isinstance(e.data, QTensor)}
    assert rounded == {n for n, e in near.entries.items() if isinstance(e.data, QTensor)}
    for name in rounded:
        assert "gptq" in done.entries[name].provenance[-1]
    plan = targets.plan(done, target, "out")
    verdicts = {i.verdict.kind for i in plan.items() if i.held or any(n in rounded for n in i.name.split())}
    assert verdicts <= {"exact", "widened"}


def test_options_that_cannot_be() -> None:
    for wrong in (
        {"order": "random"},
        {"damping": 0},
        {"refine": -1},
        {"alpha": 2},
        {"prune": "4:2"},
        {"prune": 1.5},
    ):
        with pytest.raises(OptionError, match="gptq: "):
            pass_.Options("int4", 32, **wrong)  # type: ignore[arg-type]


def test_every_stretch_runs_once_and_errors_come_out() -> None:
    done: list[int] = []
    sweep.run_all(done.append, range(0, 50, 7), 3)
    assert sorted(done) == list(range(0, 50, 7))

    def fails(item: int) -> None:
        done.append(item)
        if item == 2:
            raise ValueError("2")

    done.clear()
    with pytest.raises(ValueError, match="2"):
        sweep.run_all(fails, range(4), 2)
    assert sorted(done) == [0, 1, 2, 3], "nobody writes into arrays that were given up"


def test_ctrl_c_waits_for_the_stretch_and_leaves_the_threads_usable() -> None:
    done: list[int] = []

    def interrupted(item: int) -> None:
        if item == 0:
            os.kill(os.getpid(), signal.SIGINT)
        done.append(item)

    with pytest.raises(KeyboardInterrupt):
        sweep.run_all(interrupted, range(4), 2)
    assert sorted(done) == [0, 1, 2, 3]
    sweep.run_all(done.append, range(4), 2)
    assert len(done) == 8


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_process_has_threads_of_its_own() -> None:
    sweep.run_all(lambda item: None, range(4), 2)  # the parent has its pool
    child = os.fork()
    if not child:
        done: list[int] = []
        signal.alarm(20)  # waiting for threads that are not there would last for ever
        sweep.run_all(done.append, range(4), 2)
        os._exit(len(done))
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 4
