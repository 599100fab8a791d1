"""Half-quadratic quantization against rounding to nearest and against the descent as its paper states it."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lconvert.errors import OptionError
from lconvert.primitives import hqq


def groups(seed: int = 0, number: int = 96, size: int = 64) -> Any:
    """Groups with some values far out, as weights have them."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(number, size, generator=g) * 0.02
    return torch.where(torch.rand(x.shape, generator=g) < 0.02, x * 5, x)


def as_they_are(s: Any, z: Any) -> tuple[Any, Any]:
    return s, z


def decoded(x: Any, s: Any, z: Any, top: int) -> Any:
    return (hqq.coded(x, s, z, top) - z.unsqueeze(-1)) * s.unsqueeze(-1)


def as_in_the_paper(x: Any, top: int) -> tuple[Any, Any]:
    """Twenty iterations for the zero, the scale kept, the iterate with the least mean |error| over all groups."""
    low, high = x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)
    s, beta = (high - low) / top, 10.0
    z = -low / s
    best, kept = float("inf"), z
    for _ in range(20):
        q = (x / s + z).round().clamp(0, top)
        r = x - (q - z) * s
        if float(r.abs().mean()) >= best:
            break
        best, kept = float(r.abs().mean()), z
        e = r.sign() * (r.abs() - r.abs().pow(-0.3) / beta).clamp(min=0)
        z = (q - (x - e) / s).mean(-1, keepdim=True)
        beta *= 1.01
    return s.squeeze(-1), kept.squeeze(-1)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_less_error_than_nearest_and_than_the_paper(bits: int) -> None:
    x, top = groups(), (1 << bits) - 1
    low, high = x.amin(-1), x.amax(-1)
    s = (high - low) / top
    nearest, paper = decoded(x, s, -low / s, top), decoded(x, *as_in_the_paper(x, top), top)
    fixed = decoded(x, *hqq.fit(x, top, as_they_are, hqq.Settings(scale=False)), top)
    both = decoded(x, *hqq.fit(x, top, as_they_are), top)

    def total(y: Any) -> float:
        return float(hqq.error(x, y, 0.7).sum())

    assert total(both) <= total(fixed) <= total(paper) < total(nearest)
    assert (hqq.error(x, both, 0.7) <= hqq.error(x, fixed, 0.7)).all()


def test_the_shrinkage_is_the_proximal_point_for_p_1() -> None:
    """For p = 1 it is the soft threshold, the exact minimum of |e| + beta / 2 (e - r)^2."""
    r = torch.linspace(-1, 1, 41)
    found = hqq.shrink(r, 4.0, 1.0)
    tried = torch.linspace(-1, 1, 4001).unsqueeze(1)
    best = tried[(tried.abs() + 2 * (tried - r) ** 2).argmin(0), 0]
    assert torch.allclose(found, best, atol=1e-3)


def test_what_is_judged_is_what_is_stored() -> None:
    """Integer zeros within the codes: the best of its iterates under that rule, never worse than rounding to nearest."""
    x, top = groups(1), 15

    def store(s: Any, z: Any) -> tuple[Any, Any]:
        return s.half().float(), z.round().clamp(0, top)

    s, z = hqq.fit(x, top, store)
    assert (
        torch.equal(z, z.round()) and bool(((z >= 0) & (z <= top)).all()) and torch.equal(s, s.half().float())
    )
    low, high = x.amin(-1).clamp(max=0), x.amax(-1).clamp(min=0)
    t, m = store((high - low) / top, -low / ((high - low) / top))
    mine, theirs = (hqq.error(x, decoded(x, a, b, top), 0.7) for a, b in ((s, z), (t, m)))
    assert bool((mine <= theirs).all()) and float(mine.sum()) < 0.995 * float(theirs.sum())


def test_groups_of_one_value() -> None:
    x = torch.tensor([[0.0] * 8, [0.5] * 8, [-0.25] * 8, [0, 1, 2, 3, 4, 5, 6, 15]])
    s, z = hqq.fit(x, 15, lambda s, z: (s, z.round().clamp(0, 15)))
    assert torch.isfinite(s).all() and torch.isfinite(z).all()
    assert torch.allclose(decoded(x, s, z, 15), x, atol=1e-6)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"p": 0}, "p 0; expected a number above 0 and up to 1"),
        ({"p": 1.5}, "p 1.5"),
        ({"beta": -1}, "beta -1"),
        ({"kappa": True}, "kappa True"),
        ({"iterations": 0}, "iterations 0; expected a whole number"),
    ],
)
def test_bad_settings(given: dict[str, Any], words: str) -> None:
    with pytest.raises(OptionError) as e:
        hqq.Settings(**given)
    assert words in str(e.value)
