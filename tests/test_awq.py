"""AWQ's searches against brute force over the tokens themselves; the pass on whole models: the function kept, outliers that no longer
hurt, resumed runs, bad input."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import lconvert
from lconvert import recipe
from lconvert.converters import methods
from lconvert.errors import InputError, OptionError
from lconvert.forward import Forward
from lconvert.ir import QTensor, dense
from lconvert.kernels.qtensor import dequantize, values
from lconvert.passes import awq as pass_
from lconvert.passes import rtn
from lconvert.primitives import awq, folding, grids, text
from lconvert.primitives.placement import Placed
from lconvert.primitives.sites import sites
from lconvert.primitives.statistics import importance
from tests import arch_cases, case_models, random_models
from tests.conftest import DEMO
from tests.test_folding import distance
from tests.test_gptq import calibration, cost, problem
from tests.test_grids import found

FAST = {"ratios": 4, "scaling": "inputs", "clip": "none"}
CASES = {case.name: case for case in arch_cases.load()}


def tokens(cols: int, count: int = 300) -> Any:
    """Inputs whose channels differ in strength by two orders."""
    g = torch.Generator().manual_seed(7)
    strength = torch.logspace(0, -2, cols)[torch.randperm(cols, generator=g)]
    return torch.randn(count, cols, generator=g) * strength


def outputs_differ(x: Any, w: Any, q: Any) -> float:
    """Squared error of the outputs, token by token, fp64."""
    return float(((w - q).double() @ x.double().T).square().sum())


# --- the searches -----------------------------------------------------------------------------------------


def test_what_is_tried() -> None:
    inputs, weights = np.array([4.0, 1.0, 0.25, 0.0, 2.0]), np.array([0.5, 0.25, 0.5, 0.5, 0.0])
    found = awq.tries(inputs, weights, 2, (False, True))
    assert [str(t) for t in found] == ["1", "x^0.5", "x^1", "x^0/w^1", "x^0.5/w^0.5", "x^1/w^0"]
    assert found[0].factors.tolist() == [1] * 5
    for one in found[1:]:
        live = inputs[:3] ** one.ratio / (weights[:3] ** (1 - one.ratio) if one.duo else 1)
        assert np.allclose(one.factors[:3], live / np.sqrt(live.max() * live.min()))
        assert one.factors[3:].tolist() == [1, 1], "channels without inputs or weights"
    assert [str(t) for t in awq.tries(np.zeros(3), np.ones(3), 5, (True,))] == ["1"]


def test_shares_are_means_within_groups() -> None:
    w = torch.tensor([[2.0, -1.0, 0.0, 0.0], [1.0, 4.0, -3.0, 6.0]])
    assert awq.shares(w, 2).tolist() == [(1 + 0.25) / 2, (0.5 + 1) / 2, 0.25, 0.5]


@pytest.mark.parametrize("placed", [Placed("uint4", 64), Placed("int3", 32), Placed("Q4_K", -1), Placed("fp4", -1), Placed("MXFP4", -1)], ids=str)  # fmt: skip
def test_the_choice_is_that_of_brute_force_over_the_tokens(placed: Placed) -> None:
    """Two readers of one input: what counts is the error of their outputs, which here is taken of every token."""
    x = tokens(256)
    (a, _), (b, _) = problem(24, 256, seed=1), problem(40, 256, seed=2)
    tries = awq.tries(
        x.abs().mean(0).double().numpy(), awq.shares(torch.cat([a, b]), 32).numpy(), 8, (False, True)
    )
    columns = [torch.from_numpy(t.factors) for t in tries]
    h = x.T @ x
    mine = awq.losses({"a": a, "b": b}, h, columns, {"a": placed, "b": placed})
    exact = []
    for t in tries:
        s = torch.from_numpy(t.factors).float()
        peak = float((torch.cat([a, b]) * s).abs().max())
        g = grids.find(placed, 256, peak=peak)
        rounded = [g.values(*g.nearest(w * s, h.diagonal() / s**2)) / s for w in (a, b)]
        exact.append(sum(outputs_differ(x, w, q) for w, q in zip((a, b), rounded, strict=True)))
    assert mine.numpy() == pytest.approx(np.array(exact), rel=1e-3)
    best = int(np.argmin(exact))
    assert int(mine.argmin()) == best and exact[best] < exact[0], "never worse than without, here better"


def test_some_rows_stand_for_all() -> None:
    x = tokens(128)
    w, _ = problem(1000, 128)
    tries = awq.tries(x.abs().mean(0).double().numpy(), awq.shares(w, 64).numpy(), 5, (False,))
    columns = [torch.from_numpy(t.factors) for t in tries]
    given = {"w": w}, x.T @ x, columns, {"w": Placed("uint4", 64)}
    some, everything = awq.losses(*given, rows=100), awq.losses(*given, rows=1000)
    assert some.numpy() == pytest.approx(everything.numpy(), rel=0.1)
    assert int(some.argmin()) == int(everything.argmin())


@pytest.mark.parametrize("placed", [Placed("int3", 32), Placed("uint4", 64), Placed("Q3_K", -1)], ids=str)
def test_clipping_never_costs_a_group_and_helps_where_one_weight_stands_out(placed: Placed) -> None:
    x = tokens(256)
    h = x.T @ x
    w, _ = problem(16, 256)
    weak = h.diagonal().argsort()[:8]
    w[:, weak] *= 12  # what hardly any input meets claims the range of its group
    g = found(placed, w)
    target = awq.clipped(w, h, g, 10)
    d = importance(h.diagonal())

    def costs(target: Any) -> Any:
        e = w - g.values(*g.nearest(target, d))
        spans = [slice(a, a + g.span) for a in range(0, 256, g.span)]
        return torch.stack([(x[:, s] @ e[:, s].T).square().sum(0) for s in spans])

    before, after = costs(w), costs(target)
    assert (after <= before * (1 + 1e-4)).all() and after.sum() < 0.999 * before.sum()
    assert (target.abs() <= w.abs()).all() and (target.sign() == w.sign()).all()


def test_inputs_that_are_always_zero_still_have_a_scale() -> None:
    x = tokens(64)
    x[:, :32] = 0
    w, _ = problem(8, 64)
    h = x.T @ x
    d = importance(h.diagonal())
    assert (d > 0).all() and torch.equal(d[32:], h.diagonal()[32:])
    g = grids.find(Placed("int4", 32), 64)
    y = g.values(*g.nearest(awq.clipped(w, h, g, 5), d))
    assert (y - w).abs().max() < 0.2 * w.abs().max()


# --- the pass ---------------------------------------------------------------------------------------------


def uneven(model: Any, seed: int = 5) -> Any:
    """The same function with channels of very different strength."""
    rng = np.random.default_rng(seed)
    return folding.scaled(
        model, {s.name: np.exp2(rng.normal(0, 2, s.channels)) for s in sites(model.decoder)}
    )


@pytest.mark.parametrize("name", arch_cases.some(1))
def test_the_function_stays_for_every_architecture(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = tuple(random_models.prompt(CASES[name])[:48])
    monkeypatch.setattr(text, "windows", lambda model, calibration: text.Windows((ids[:24], ids[24:])))
    model = lconvert.read(case_models.folder(name))
    options = pass_.Options("uint3", -1, rounder="none", ratios=6)
    done = pass_.run(model, options, calibration())
    assert distance(Forward(model).logits(list(ids)), Forward(done).logits(list(ids))) <= 1e-5
    scaled = {n for n, e in done.entries.items() if "awq: scaled" in e.provenance}
    assert scaled or not sites(model.decoder)
    for n in scaled:
        if n.endswith("norm"):  # exact in 16 bits, up to offsets that the stored weight lacks
            w = torch.from_numpy(values(done.entries[n].data))
            assert float((w == w.bfloat16().float()).float().mean()) > 0.95


@pytest.fixture(scope="module")
def outliers() -> Any:
    return uneven(lconvert.read(DEMO))


@pytest.mark.parametrize("rounder", ["nearest", "gptq"])
@pytest.mark.parametrize("placed", [Placed("uint4", 64), Placed("fp4", -1)], ids=str)
def test_strong_channels_no_longer_hurt(rounder: Any, placed: Placed, outliers: Any) -> None:
    options = pass_.Options(placed.grid, placed.group, rounder=rounder, **{**FAST, "scaling": "duo"})  # type: ignore[arg-type]
    done = pass_.run(outliers, options, calibration())
    plain = rtn.run(outliers, rtn.Options(placed.grid, placed.group))
    assert cost(done, outliers) < 0.5 * cost(plain, outliers)
    rounded = {n for n, e in done.entries.items() if isinstance(e.data, QTensor)}
    assert rounded == {n for n, e in plain.entries.items() if isinstance(e.data, QTensor)}
    assert any("4 of 4 inputs scaled" in line for line in done.report)
    note = done.entries["layers.0.mlp.down"].provenance[-1]
    assert note.startswith(f"{'awq' if rounder == 'nearest' else 'gptq'} {placed}, ") and "loss" in note


@pytest.mark.parametrize("placed", [Placed("uint4", 64), Placed("int3", 32), Placed("NVFP4", -1)], ids=str)
def test_codes_get_the_scales_that_serve_the_outputs(
    placed: Placed, outliers: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = pass_.Options(placed.grid, placed.group, **FAST)  # type: ignore[arg-type]
    with_them = pass_.run(outliers, options, calibration())
    monkeypatch.setattr(grids.DeploymentGrid, "rescaled", lambda self, w, position, sides, h: sides)
    without = pass_.run(outliers, options, calibration())

    def loss(model: Any, name: str) -> float:
        return float(model.entries[name].provenance[-1].rpartition(" ")[2])

    first = [f"layers.0.{role}" for role in ("attn.q", "attn.k", "attn.v")]  # both saw the same inputs here
    assert all(loss(with_them, n) < 0.99 * loss(without, n) for n in first)
    assert cost(with_them, outliers) < cost(without, outliers)


def test_resumed_runs_give_the_same_bytes(tmp_path: Path) -> None:
    model, options = lconvert.read(DEMO), pass_.Options("uint4", 64, **FAST)  # type: ignore[arg-type]
    whole = pass_.run(model, options, replace(calibration(), work=tmp_path / "a"))

    def stop(what: str, done: int, total: int) -> None:
        if done == 2:
            raise KeyboardInterrupt

    broken = replace(calibration(), work=tmp_path / "b", progress=stop)
    with pytest.raises(KeyboardInterrupt):
        pass_.run(model, options, broken)
    told: list[int] = []
    resumed = replace(broken, resume=True, progress=lambda what, done, total: told.append(done))
    again = pass_.run(model, options, resumed)
    assert again.report == whole.report
    for name, entry in whole.entries.items():
        other = again.entries[name]
        assert np.array_equal(values(entry.data), values(other.data)) and entry.provenance == other.provenance


def test_experts_that_no_token_chose_and_the_router(monkeypatch: pytest.MonkeyPatch) -> None:
    one = text.Windows(((5, 6),))
    monkeypatch.setattr(text, "windows", lambda model, calibration: one)
    model = lconvert.read(case_models.folder("mixtral-experts"))
    done = pass_.run(model, pass_.Options("int4", 32, **FAST), calibration())  # type: ignore[arg-type]
    unseen = {
        line.split(": ")[1] for line in done.report if "came here; rounded by its own squared error" in line
    }
    assert unseen == {n for n, e in done.entries.items() if "no input seen" in e.provenance[-1]}
    for name in unseen:
        if name.endswith(".down"):
            up = name.replace(".down", ".up")
            assert f"awq: {up}: no token of the calibration text came here; not scaled" in done.report
            w = values(model.entries[name].data)
            assert np.abs(dequantize(done.entries[name].data) - w).max() < 0.2 * np.abs(w).max()  # type: ignore[arg-type]
    router = done.entries["layers.0.moe.router"]
    norm = done.entries["layers.0.mlp_norm"]
    assert not isinstance(router.data, QTensor)
    assert ("awq: scaled" in router.provenance) == ("awq: scaled" in norm.provenance)


def test_what_takes_no_factor_is_named_and_rounded(monkeypatch: pytest.MonkeyPatch) -> None:
    ids = tuple(random_models.prompt(CASES["gpt2-tied"])[:32])
    monkeypatch.setattr(text, "windows", lambda model, calibration: text.Windows((ids,)))
    model = lconvert.read(case_models.folder("gpt2-tied"))
    done = pass_.run(model, pass_.Options("int4", -1, **{**FAST, "clip": "most"}), calibration())  # type: ignore[arg-type]
    down = done.entries["layers.0.mlp.down"]
    assert isinstance(down.data, QTensor) and "factors 1, " in down.provenance[-1]
    assert any(
        line.startswith("awq: layers.0.mlp.down") and line.endswith("gelu_tanh comes between up and down")
        for line in done.report
    )


def test_bad_input(tmp_path: Path) -> None:
    model = lconvert.read(DEMO)
    norm = model.entries["layers.1.mlp_norm"]
    bad = values(norm.data).copy()
    bad[4] = np.inf
    damaged = model.with_entries({norm.name: replace(norm, data=dense(bad))})
    with pytest.raises(
        InputError,
        match=r"layers\.1\.mlp_norm holds NaN or infinite values, first in row 4; the weights are damaged",
    ):
        pass_.run(damaged, pass_.Options("uint4", 64, **FAST), calibration())  # type: ignore[arg-type]
    for wrong in ({"rounder": "up"}, {"ratios": 0}, {"scaling": "weights"}, {"clip": True}, {"sites": "("}):
        with pytest.raises(OptionError, match="awq: "):
            pass_.Options("int4", 64, **wrong)  # type: ignore[arg-type]


def test_where_it_stands_in_recipes() -> None:
    head = "schema: lconvert.recipe/1\npasses:\n"
    alone = recipe.parse("r", head + "  - awq: {rounder: none}\n  - gptq: {grid: int4}\n", Path())
    assert [s.name for s in methods.outline(alone).steps] == ["rtn"]
    both = recipe.parse("r", head + "  - awq: {grid: uint4, group: 64}\n", Path())
    (outlined,) = methods.outline(both).steps
    assert (outlined.name, outlined.options.grid, outlined.options.group) == ("rtn", "uint4", 64)
    with pytest.raises(OptionError, match="gptq rounds"):
        recipe.parse("r", head + "  - awq\n  - gptq\n", Path())
    with pytest.raises(
        OptionError, match="awq changes dense weights, but rtn in front of it has rounded them"
    ):
        recipe.parse("r", head + "  - rtn\n  - awq: {rounder: none}\n", Path())
