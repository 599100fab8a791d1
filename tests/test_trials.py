"""What candidates of scales cost: the compiled loop against its specification, the same bits on every instruction set."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from lconvert import kernels
from lconvert.ir import E2M1, int_grid
from lconvert.primitives import levels, trials
from lconvert.primitives.levels import NF4

LEVELS = {
    "int4": levels.of(int_grid(4, True)),
    "uint2": levels.of(int_grid(2, False)),
    "int8": levels.of(int_grid(8, True)),
    "E2M1": levels.of(E2M1),
    "NF4": levels.of(NF4),
}


def problem(groups: int, size: int, candidates: int) -> tuple[torch.Tensor, ...]:
    """Values, importances, scales of both signs and some zero, offsets."""
    r = np.random.default_rng(groups * size)
    x = r.normal(size=(groups, size)).astype(np.float32)
    h = r.uniform(0, 2, (groups, size)).astype(np.float32)
    s = r.uniform(-1, 1, (candidates, groups)).astype(np.float32)
    s[0, ::3] = 0
    m = r.normal(size=(candidates, groups)).astype(np.float32)
    return tuple(torch.from_numpy(a) for a in (x, h, s, m))


@pytest.mark.parametrize("name", LEVELS)
@pytest.mark.parametrize("size", [1, 15, 16, 32, 70, 1024])
def test_the_compiled_loop_is_its_specification(
    name: str, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sums in another order, and a value between two levels may go to the other one, which costs the same."""
    x, h, s, m = problem(37, size, 5)
    table = LEVELS[name]
    found = []
    for isa in kernels.isas()[:-1]:
        monkeypatch.setenv("LCONVERT_ISA", isa)
        for offset in (None, m):
            spec, _ = trials.in_torch(x, h, table, s, offset)
            got = trials.errors(x, h, table, s, offset)
            torch.testing.assert_close(got, spec, rtol=2e-5, atol=1e-6)
            one = None if offset is None else offset[1]
            _, wanted = trials.in_torch(x, h, table, s[1:2], None if one is None else one[None], summed=True)
            sums = torch.stack(trials.sums(x, h, table, s[1], one))
            size_of = torch.stack([wanted[0], wanted[0].sqrt() * h.sum(-1).sqrt(), wanted[0].sqrt() * (h * x * x).sum(-1).sqrt()])  # fmt: skip
            assert bool(((sums - wanted).abs() <= 2e-5 * size_of + 1e-6).all())
            found.append((got, sums))
    for got, sums in found[2:]:
        same = found[0 if torch.equal(got, found[0][0]) else 1]
        assert torch.equal(got, same[0]) and torch.equal(sums, same[1])


def test_the_reference_runs_where_it_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    x, h, s, m = problem(5, 32, 3)
    monkeypatch.setenv("LCONVERT_ISA", "reference")
    assert torch.equal(
        trials.errors(x, h, LEVELS["NF4"], s, m), trials.in_torch(x, h, LEVELS["NF4"], s, m)[0]
    )


def test_arrays_that_do_not_fit_are_refused() -> None:
    x, h, s, _ = problem(5, 32, 3)
    with pytest.raises(ValueError, match="arrays differ in shape"):
        trials.errors(x, h[:3], LEVELS["int4"], s)
    with pytest.raises(ValueError, match="arrays differ in shape"):
        trials.errors(x, h, LEVELS["int4"], s[:, :4])
