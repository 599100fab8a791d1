"""Channels in another order: the same numbers elsewhere, the same logits for every architecture, in every target."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import lconvert
from lconvert.converters import lcir
from lconvert.errors import OptionError, UnsupportedError
from lconvert.executor import execute
from lconvert.forward import Forward
from lconvert.ir import Model, Transform, dense
from lconvert.kernels.qtensor import effective
from lconvert.passes import permute, rtn
from lconvert.primitives import importance
from lconvert.primitives.job import Calibration, Job
from lconvert.primitives.sites import mlps
from lconvert.recipe import Recipe, step
from tests import arch_cases, case_models, random_models
from tests.conftest import DEMO, ROOT
from tests.test_folding import distance

CASES = {case.name: case for case in arch_cases.load()}
JOB = Job(Calibration(str(ROOT / "validators" / "text" / "excerpt.txt"), windows=8, context=128))


def shuffled(model: Model, seed: int = 3) -> Model:
    """Every order at random."""
    rng, d = np.random.default_rng(seed), model.decoder
    orders = {permute.RESIDUAL: rng.permutation(d.hidden)}
    for part in mlps(d):
        orders[part] = rng.permutation(model.entries[f"{part}.down"].shape[1])
    return permute.ordered(model, orders)


@pytest.mark.parametrize("name", arch_cases.some(2))
def test_every_architecture_keeps_its_logits(name: str) -> None:
    model, ids = lconvert.read(case_models.folder(name)), random_models.prompt(CASES[name])[:24]
    moved = shuffled(model)
    want, got = Forward(model).logits(ids), Forward(moved).logits(ids)
    assert float(np.linalg.norm(want - got) / np.linalg.norm(want)) <= 1e-5 and distance(want, got) <= 2e-5
    for role in ("embed", "layers.1.attn.o", next(f"{p}.down" for p in mlps(model.decoder))):
        before, after = effective(model.entries[role]), effective(moved.entries[role])
        assert not np.array_equal(before, after)
        assert np.array_equal(np.sort(before, None), np.sort(after, None))  # not one value is another


@pytest.mark.parametrize(
    ("name", "forgotten"),
    [
        ("llama-gqa", "head"),
        ("llama-gqa", "norm"),
        ("llama-biases", "layers.0.attn.o.bias"),
        ("llama-biases", "layers.1.mlp.up.bias"),
        ("mixtral-experts", "layers.1.moe.router"),
        ("mixtral-experts", "layers.0.moe.experts.2.gate"),
        ("gpt_oss-experts", "layers.0.moe.experts.1.down.bias"),
        ("deepseek_v2-queries", "layers.1.attn.kv_a"),
    ],
)
def test_a_forgotten_tensor_would_be_seen(name: str, forgotten: str) -> None:
    model, ids = lconvert.read(case_models.folder(name)), random_models.prompt(CASES[name])[:24]
    broken = shuffled(model).with_entries({forgotten: model.entries[forgotten]})
    assert distance(Forward(model).logits(ids), Forward(broken).logits(ids)) > 1e-4


def test_strong_inputs_come_first(tmp_path: Path) -> None:
    model = lconvert.read(DEMO)
    moved = permute.run(model, permute.Options(), JOB)
    seen = importance.measure(moved, JOB).moments
    for i in range(moved.decoder.layers):
        squares = seen[f"layers.{i}.mlp.down"].squares.numpy()
        assert (np.diff(squares) <= 1e-6 * squares[0]).all()
    assert [t.where for t in moved.transforms] == ["residual", *mlps(model.decoder)]
    assert {t.kind for t in moved.transforms} == {"permute"}
    assert moved.report[-1] == "permute: the residual stream and hidden units by their mean squares"
    execute(lcir.plan(moved, {}), tmp_path / "m.lcir")
    again = lconvert.read(tmp_path / "m.lcir")
    (first, *_) = again.transforms
    assert first.param is not None
    order = first.param.load().astype(int)
    assert np.array_equal(effective(model.entries["embed"])[:, order], effective(again.entries["embed"]))


def test_a_recipe_orders_and_rounds() -> None:
    steps = (step("permute", {}), step("gptq", {"grid": "int4", "group": 32}))
    made = Recipe("ordered", steps).apply(lconvert.read(DEMO), JOB)
    assert any(line.startswith("gptq: ") for line in made.report) and made.transforms
    ids = list(range(5, 40))
    want, got = Forward(lconvert.read(DEMO)).logits(ids), Forward(made).logits(ids)
    assert distance(want, got) < 0.3


def test_what_cannot_move() -> None:
    model = lconvert.read(DEMO)
    with pytest.raises(OptionError, match="neither residual nor mlp"):
        permute.Options(residual=False, mlp=False)
    rounded = rtn.run(model, rtn.Options("int8", 32, targets=r"layers\.0\.mlp\.down"))
    with pytest.raises(UnsupportedError, match=r"layers\.0\.mlp\.down: is quantized already"):
        shuffled(rounded)
    role = "layers.0.attn.q"
    entry = model.entries[role]
    scale = Transform("scale", "input", dense(np.full(entry.shape[1], 2.0, np.float32)), folded=False)
    with pytest.raises(UnsupportedError, match=f"{role}: its input is scaled channel by channel"):
        shuffled(model.with_entries({role: replace(entry, transform=scale)}))
