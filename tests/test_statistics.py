"""Accumulators against sums over all tokens at once."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from lconvert.primitives import statistics
from lconvert.primitives.statistics import Cross, Hessian, Magnitudes, Moments, Together


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


def magnitudes(x: torch.Tensor, sizes: list[int]) -> Magnitudes:
    found = Magnitudes()
    for part in x.split(sizes):
        found.add(part)
    return found


@pytest.mark.parametrize("largest", [1e-25, 0.75, 1.0, 3e38])
def test_a_histogram_does_not_know_order_and_batches(largest: float, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(1)
    x = torch.randn(200, 24) * 10.0 ** torch.randint(-9, 1, (200, 1))
    x = (x * (1.5 * largest / x.abs().max())).clamp(-largest, largest)
    x[:3] = 0
    exponent = math.frexp(largest)[1]
    x[7] = 2.0 ** (torch.arange(-24.0, 0) + exponent)  # edges of bins
    peak, top = float(torch.tensor(largest)), 2.0**exponent
    assert float(x.abs().max()) == peak
    want = np.histogram(x.abs().double().numpy(), 4096, (0, top))[0]
    ascending = x[x.abs().amax(1).argsort()]
    monkeypatch.setattr(statistics, "_SLAB", 24 * 7)
    for order in (x, ascending, ascending.flip(0)):
        for sizes in ([200], [1] * 200, [3, 0, 150, 47]):
            found = magnitudes(order, sizes)
            assert (found.count, found.peak, found.top) == (200, peak, top)
            assert np.array_equal(found.counts.numpy(), want)


def test_a_histogram_of_nothing_of_zeros_and_of_no_numbers() -> None:
    assert Magnitudes().counts is None and (Magnitudes().count, Magnitudes().peak) == (0, 0.0)
    zeros = magnitudes(torch.zeros(5, 8), [2, 3])
    assert (zeros.count, zeros.peak, int(zeros.counts[0])) == (5, 0.0, 40)
    for bad in (math.nan, math.inf, -math.inf):
        found = magnitudes(torch.tensor([[1.0, 2.0], [bad, 1.0], [0.5, 3.0]]), [1, 1, 1])
        assert found.count == 3 and math.isnan(found.peak)
