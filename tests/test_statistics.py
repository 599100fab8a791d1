"""Accumulators against sums over all tokens at once."""

from __future__ import annotations

import pytest
import torch

from lconvert.primitives.statistics import Cross, Hessian, Moments, Together


def batches() -> list[torch.Tensor]:
    torch.manual_seed(0)
    return [torch.randn(n, 24) * 3 - 0.5 for n in (5, 1, 40)]


def test_a_hessian_is_the_sum_of_outer_products() -> None:
    found = Hessian()
    for x in batches():
        found.add(x)
    x = torch.cat(batches()).double()
    assert found.count == 46 and torch.allclose(found.sum.double(), x.T @ x, rtol=1e-5, atol=1e-4)
    assert torch.equal(found.sum, found.sum.T)


def test_moments_are_those_of_all_tokens() -> None:
    found = Moments()
    for x in batches():
        found.add(x)
        found.add(x[:0])  # an expert that this batch did not choose
    x = torch.cat(batches())
    assert found.count == 46
    assert torch.allclose(found.squares, x.double().square().sum(0)) and found.squares.dtype == torch.float64
    assert torch.allclose(found.magnitudes, x.double().abs().sum(0))
    assert torch.equal(found.peak, x.abs().amax(0))
    assert torch.equal(found.low, x.amin(0)) and torch.equal(found.high, x.amax(0))


def test_cross_is_the_difference_of_two_streams() -> None:
    found, hessian = Cross(), Hessian()
    both = Together(found, hessian)
    for x in batches():
        both.add(x, x * 1.25 + 0.5)
    x = torch.cat(batches()).double()
    assert torch.allclose(found.sum.double(), (0.25 * x + 0.5).T @ x, rtol=1e-4, atol=1e-3)
    assert found.count == hessian.count == 46
    with pytest.raises(ValueError, match="both streams"):
        found.add(x.float())


def test_what_saw_nothing_says_so() -> None:
    assert (Hessian().count, Moments().count, Cross().count) == (0, 0, 0)
    assert Hessian().sum is None and Moments().peak is None
