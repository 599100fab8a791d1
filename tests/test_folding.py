"""Factors moved between what makes an activation and what reads it: the same logits for every architecture, or a reason why not."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

import lconvert
from lconvert.errors import OptionError, UnsupportedError
from lconvert.forward import Forward
from lconvert.ir import E4M3, ActSpec, Decoder, KVSpec, Model, dense
from lconvert.kernels.qtensor import values
from lconvert.passes import rtn
from lconvert.primitives import folding
from lconvert.primitives.sites import Site, sites, unfoldable
from lconvert.spec import check, roles
from tests import arch_cases, case_models, random_models
from tests.conftest import DEMO

CASES = {case.name: case for case in arch_cases.load()}
_CLIPPED = "values are clipped before attention sums them"


def factors(model: Model) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(3)
    return {s.name: np.exp2(rng.uniform(-2, 2, s.channels)) for s in sites(model.decoder)}


def distance(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.abs(a - b).max() / np.abs(a).max())


def _model(name: str) -> Model:
    return lconvert.read(case_models.folder(name))


@pytest.mark.parametrize("name", CASES)
def test_factors_leave_the_logits_of_every_architecture(name: str) -> None:
    model, ids = _model(name), random_models.prompt(CASES[name])[:24]
    moved = check(folding.scaled(model, factors(model)))
    want = Forward(model).logits(ids)
    assert distance(want, Forward(moved).logits(ids)) <= 1e-5
    norm = next(s for s in sites(model.decoder) if s.kind == "norm" or s.name.endswith("up")).name
    assert (values(moved.entries[norm].data) != values(model.entries[norm].data)).any()


@pytest.mark.parametrize("name", CASES)
def test_every_matrix_is_read_at_one_place_or_has_a_reason(name: str) -> None:
    d = _model(name).decoder
    shapes = roles(d)
    inside = [
        r for r, shape in shapes.items() if len(shape) == 2 and r.startswith("layers.") and "norm" not in r
    ]
    seen = Counter(c for site in sites(d) for c in site.consumers)
    seen += Counter(c for consumers, reason in unfoldable(d) for c in consumers if reason)
    assert seen == Counter([*inside, *(["head"] if not d.tied else [])])
    for site in sites(d):
        assert shapes[site.name][0] == site.channels
        for consumer in site.consumers:
            assert shapes[consumer][1] == site.channels * site.repeats


@pytest.mark.parametrize(
    ("name", "broken"),
    [
        ("llama-gqa", "layers.0.attn.k"),
        ("mixtral-experts", "layers.1.moe.router"),
        ("mixtral-experts", "layers.1.moe.experts.2.up"),
        ("cohere-gqa", "layers.1.mlp.gate"),
        ("deepseek_v2-queries", "layers.2.moe.shared.gate"),
        ("deepseek_v2-queries", "layers.1.attn.v_b"),
        ("deepseek_v2-queries", "layers.1.attn.kv_a"),
        ("gpt_neox-parallel", "layers.0.attn.v.bias"),
        ("starcoder2-plain", "layers.0.mlp_norm.bias"),
        ("gemma2-alternating", "layers.1.attn_norm"),
        ("gpt2-untied", "head"),
    ],
)
def test_a_forgotten_tensor_would_be_seen(name: str, broken: str) -> None:
    model, ids = _model(name), random_models.prompt(CASES[name])[:24]
    moved = folding.scaled(model, factors(model))
    assert moved.entries[broken] != model.entries[broken]
    forgot = moved.with_entries({broken: model.entries[broken]})
    assert distance(Forward(model).logits(ids), Forward(forgot).logits(ids)) > 1e-3


def _reasons(d: Decoder) -> dict[str, str]:
    return {c: reason for consumers, reason in unfoldable(d) for c in consumers or ("head",)}


@pytest.mark.parametrize(
    ("name", "consumer", "reason"),
    [
        (
            "olmo2-gqa",
            "layers.0.attn.q",
            "norms come after attention and MLP: what enters attention is the residual stream, which every layer reads",
        ),
        (
            "olmo2-gqa",
            "layers.0.mlp.up",
            "norms come after attention and MLP: what enters the MLP is the residual stream, which every layer reads",
        ),
        ("gpt2-tied", "layers.1.mlp.down", "gelu_tanh comes between up and down"),
        ("gpt_oss-experts", "layers.0.moe.experts.1.down", "swiglu_oai clamps up and adds 1 to it"),
        ("gpt2-tied", "head", "the head is the embedding, which takes no factor of the last norm"),
    ],
)
def test_what_has_no_place_says_why(name: str, consumer: str, reason: str) -> None:
    assert _reasons(_model(name).decoder)[consumer] == reason


def test_clipped_values_take_no_factor() -> None:
    d = _model("llama-gqa").decoder
    clipped = replace(d, default=replace(d.default, attention=replace(d.default.attention, clip_qkv=8.0)))
    assert _reasons(clipped) == {f"layers.{i}.attn.o": _CLIPPED for i in range(d.layers)}
    assert {s.name for s in sites(d)} - {s.name for s in sites(clipped)} == {
        f"layers.{i}.attn.v" for i in range(d.layers)
    }


def test_query_heads_of_one_value_head_share_its_factors() -> None:
    site = Site("v", "rows", ("o",), 4, repeats=3, run=2)
    columns = site.columns(np.array([1.0, 2.0, 3.0, 4.0]))
    assert columns.tolist() == [1, 2, 1, 2, 1, 2, 3, 4, 3, 4, 3, 4]
    assert (site.seen(columns) == np.array([[1.0], [2.0], [3.0], [4.0]])).all()


# --- numbers ---------------------------------------------------------------------------------------------


def test_each_tensor_is_rounded_once_and_slabs_are_rows_of_the_whole() -> None:
    model = _model("gemma2-alternating")
    moved = folding.scaled(model, by := factors(model))
    w, s = values(model.entries["layers.1.attn.v"].data).astype(np.float64), by["layers.1.attn_norm"]
    want = (w * s * (1 / by["layers.1.attn.v"])[:, None]).astype(np.float32)
    got = moved.entries["layers.1.attn.v"].data
    assert (values(got) == want).all() and got.dtype == "F32"
    assert (got.read(3, 11) == want[3:11]).all()
    norm = values(model.entries["layers.1.attn_norm"].data).astype(np.float64)
    assert (values(moved.entries["layers.1.attn_norm"].data) == ((norm + 1) / s - 1).astype(np.float32)).all()


def test_slabs_of_a_change_of_all_rows_and_of_runs() -> None:
    rng = np.random.default_rng(0)
    w, turn = rng.normal(size=(12, 5)).astype(np.float32), rng.normal(size=(12, 12))
    small = rng.normal(size=(4, 4))
    for change, want in (
        (folding.Change(rows=lambda x: x @ turn, run=12), turn.T @ w),
        (
            folding.Change((folding.times(np.arange(5.0)),), rows=lambda x: x @ turn, run=12),
            turn.T @ (w * np.arange(5.0)),
        ),
        (folding.Change(rows=lambda x: x @ small, run=4), np.kron(np.eye(3), small.T) @ w),
    ):
        out = folding.changed(dense(w), change)
        assert np.allclose(out.load(), want, atol=1e-5)
        for a, b in ((0, 12), (5, 7), (3, 9), (11, 12), (0, 12), (4, 4)):
            assert np.array_equal(out.read(a, b), out.load()[a:b])
    vector = folding.changed(dense(w[:, 0].copy()), folding.Change(rows=lambda x: x @ turn, run=12))
    assert np.allclose(vector.load(), w[:, 0] @ turn, atol=1e-5)


def test_a_few_rows_of_many_matrices_hold_few_of_them() -> None:
    """Plans measure errors on every 16th row of everything."""
    change = folding.Change(rows=lambda x: x[..., ::-1], run=8)
    w = np.arange(16, dtype=np.float32).reshape(8, 2)
    made = [folding.changed(dense(w), change) for _ in range(20)]
    for t in made:
        assert (t.read(0, 2) == w[[7, 6]]).all()
    assert sum(t.read._held is not None for t in made) <= 4  # type: ignore[attr-defined]
    assert all((t.read(2, 8) == w[5::-1]).all() for t in made)


# --- refusals --------------------------------------------------------------------------------------------


def test_what_is_quantized_is_not_multiplied() -> None:
    model = rtn.run(lconvert.read(DEMO), rtn.Options("int8", -1, targets=r".*attn\.k"))
    one = {"layers.0.attn_norm": np.ones(model.decoder.hidden)}
    with pytest.raises(
        UnsupportedError, match=r"layers\.0\.attn\.k: is quantized already, .* before it is quantized"
    ):
        folding.scaled(model, one)


def test_what_was_measured_stays_as_it_was() -> None:
    model = lconvert.read(DEMO)
    side = ActSpec(E4M3, "tensor", False, scale=dense(np.ones(model.decoder.layers, np.float32)))
    v = next(s for s in sites(model.decoder) if s.name == "layers.0.attn.v")
    with pytest.raises(UnsupportedError, match=r"layers\.0\.attn\.v: the cache of values has a scale"):
        folding.scaled(replace(model, kv=KVSpec(side, side)), {v.name: np.ones(v.channels)})
    o = replace(model.entries["layers.0.attn.o"], activation=replace(side, scale=dense(np.float32([1]))))
    with pytest.raises(UnsupportedError, match="set activations after transforms"):
        folding.scaled(model.with_entries({o.name: o}), {v.name: np.ones(v.channels)})


def test_factors_must_be_positive_and_fit_and_have_a_place() -> None:
    model = lconvert.read(DEMO)
    hidden = model.decoder.hidden
    for bad, said in (
        (np.ones(3), f"{hidden} factors, found shape \\(3,\\)"),
        (np.zeros(hidden), "positive factors, found 0"),
        (np.full(hidden, np.nan), "positive factors, found nan"),
        (-np.ones(hidden), "positive factors, found -1"),
    ):
        with pytest.raises(OptionError, match=rf"layers\.0\.mlp_norm: expected {said}"):
            folding.scaled(model, {"layers.0.mlp_norm": bad})
    with pytest.raises(OptionError, match=r"layers\.0\.attn\.q: no factor can move through it in llama"):
        folding.scaled(model, {"layers.0.attn.q": np.ones(hidden)})
