"""Masks: exact patterns and counts, ties, the schedule, and what is refused; against sorting in plain Python."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lconvert.errors import InputError, OptionError
from lconvert.primitives import masks


def by_sorting(score: np.ndarray, number: int) -> np.ndarray:
    """The mask that loses the `number` least of each row, the first among equals."""
    out = np.ones(score.shape, bool)
    for row, values in enumerate(score):
        order = sorted(range(len(values)), key=lambda i: (values[i], i))
        out[row, order[:number]] = False
    return out


SCORES = st.integers(0, 2**32 - 1).map(
    lambda seed: np.random.default_rng(seed).integers(0, 4, (5, 24)).astype(np.float32)
)


@settings(max_examples=50, deadline=None)
@given(SCORES, st.sampled_from(["1:4", "2:4", "3:4", "4:8", "1:2", "5:12", "7:24"]))
def test_groups_keep_n_of_m(score: np.ndarray, text: str) -> None:
    pattern = masks.parse(text)
    keep, of = map(int, text.split(":"))
    mask = masks.kept(torch.from_numpy(score), pattern, pattern.sparsity or 0).numpy()
    assert (mask.reshape(5, -1, of).sum(-1) == keep).all()
    assert (mask == by_sorting(score.reshape(-1, of), of - keep).reshape(5, 24)).all()


@settings(max_examples=50, deadline=None)
@given(SCORES, st.floats(0, 1))
def test_unstructured_counts_are_exact_per_row_and_per_tensor(score: np.ndarray, share: float) -> None:
    by_row = masks.kept(torch.from_numpy(score), masks.parse("unstructured"), share).numpy()
    number = masks.count(share, 24)
    assert abs(number - share * 24) <= 0.5 + 1e-6
    assert (by_row == by_sorting(score, number)).all()
    whole = masks.kept(torch.from_numpy(score), masks.parse("unstructured", "tensor"), share).numpy()
    assert (whole == by_sorting(score.reshape(1, -1), masks.count(share, 120)).reshape(5, 24)).all()


def test_no_score_survives_below_one_that_goes() -> None:
    w = torch.randn(64, 128, generator=torch.Generator().manual_seed(1))
    norms = torch.rand(128, generator=torch.Generator().manual_seed(2))
    score = masks.wanda(w, norms)
    assert torch.equal(score, (w * norms).abs())
    mask = masks.kept(score, masks.parse("unstructured"), 0.3)
    for row in range(64):
        assert score[row][~mask[row]].max() < score[row][mask[row]].min()


def test_wanda_prefers_what_its_inputs_make_large() -> None:
    """The example of the paper's figure 1: a small weight on a strong channel outlives a large one on a weak channel."""
    w, norms = torch.tensor([[4.0, 0.5, -2.0, 1.0]]), torch.tensor([1.0, 20.0, 1.0, 5.0])
    pattern = masks.parse("2:4")
    assert masks.kept(masks.magnitude(w), pattern, 0.5).tolist() == [[True, False, True, False]]
    assert masks.kept(masks.wanda(w, norms), pattern, 0.5).tolist() == [[False, True, False, True]]


def test_what_is_pruned_stays_pruned_by_magnitude() -> None:
    """Zeros are the least scores, so a later step of a schedule only adds to what an earlier one took."""
    w = torch.randn(16, 64, generator=torch.Generator().manual_seed(3))
    pattern, before = masks.parse("unstructured", "tensor"), torch.ones(16, 64, dtype=torch.bool)
    for step in range(1, 6):
        mask = masks.kept(masks.magnitude(w), pattern, masks.cubic(step, 5, 0.7))
        assert not bool((mask & ~before).any())
        w, before = w * mask, mask
    assert int((~before).sum()) == round(0.7 * 1024)


@pytest.mark.parametrize("steps", [1, 2, 7])
def test_the_schedule_is_cubic_and_ends_where_it_should(steps: int) -> None:
    found = [masks.cubic(t, steps, 0.6) for t in range(1, steps + 1)]
    assert found[-1] == 0.6
    assert found == sorted(found)
    assert found[0] == pytest.approx(0.6 * (1 - (1 - 1 / steps) ** 3))


def test_groups_follow_the_schedule() -> None:
    score = torch.rand(4, 32, generator=torch.Generator().manual_seed(4))
    pattern = masks.parse("4:8")
    zeros = [
        int((~masks.kept(score, pattern, masks.cubic(t, 4, 0.5))).reshape(-1, 8).sum(-1).unique())
        for t in (1, 2, 3, 4)
    ]
    assert zeros == [2, 4, 4, 4]  # 8 times 0.289, 0.4375, 0.492 and 0.5, to nearest


@pytest.mark.parametrize("text", ["", "2:2", "0:4", "4:2", "2/4", "-1:4", "2:4:8", "half", "２:4"])
def test_patterns_that_are_none(text: str) -> None:
    with pytest.raises(OptionError, match="expected unstructured, or N:M"):
        masks.parse(text)


def test_rows_that_do_not_divide() -> None:
    with pytest.raises(
        OptionError, match=r"layers\.0\.attn\.q: rows of 10 weights do not divide into groups of 4"
    ):
        masks.kept(torch.rand(3, 10), masks.parse("2:4"), 0.5, "layers.0.attn.q")


def test_scores_without_an_order() -> None:
    with pytest.raises(InputError, match="head: its weights hold NaN"):
        masks.kept(torch.tensor([[1.0, float("nan")]]), masks.parse("unstructured"), 0.5, "head")
