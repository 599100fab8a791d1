"""SparseGPT's sweep against least squares solved anew after every column, and against the criteria that it should beat."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lconvert.errors import InputError, OptionError
from lconvert.primitives import masks
from lconvert.primitives.factor import factor
from lconvert.primitives.sparsegpt import loss, sweep

HALF, FREE = 0.5, masks.parse("unstructured", "tensor")


def problem(rows: int, cols: int, seed: int = 0, tokens: int = 400) -> tuple[Any, Any]:
    """A matrix, and the Hessian of inputs with correlated channels of very different strength in no order, fp64."""
    g = torch.Generator().manual_seed(seed)
    w = torch.randn(rows, cols, generator=g, dtype=torch.float64)
    strength = torch.logspace(0, -2, cols, dtype=torch.float64)[torch.randperm(cols, generator=g)]
    mix = torch.randn(cols, cols, generator=g, dtype=torch.float64) * strength
    x = torch.randn(tokens, cols, generator=g, dtype=torch.float64) @ mix
    return w, x.T @ x


def solved(w: Any, h: Any, fixed: Any, start: int) -> Any:
    """The columns from `start` on that minimise the loss while those before it are `fixed`: plain least squares, row by row."""
    delta = (w[:, :start] - fixed[:, :start]) @ h[:start, start:]
    return w[:, start:] + torch.linalg.solve(h[start:, start:], delta.T).T


def by_solving(w: Any, h: Any, mask: Any, rounded: Any = None) -> Any:
    """The sweep as its definition says: everything behind a column solved again, then the next column fixed."""
    v = w.clone()
    for j in range(w.shape[1]):
        v[:, j:] = solved(w, h, v, j)
        value = v[:, j] if rounded is None else rounded(v[:, j], j)
        v[:, j] = torch.where(mask[:, j], value, 0.0)
    return v


@pytest.mark.parametrize("block", [1, 4, 128])
def test_the_sweep_is_the_surgeon_in_column_order(block: int) -> None:
    w, h = problem(6, 24)
    mask = torch.rand(6, 24, generator=torch.Generator().manual_seed(1)) > 0.5
    f = factor(h, 1e-12)
    v, same = sweep(w, f, FREE, HALF, mask=mask, block=block)
    assert torch.equal(same, mask)
    assert torch.allclose(v, by_solving(w, h, mask), rtol=1e-6, atol=1e-6)


def test_with_the_pruned_columns_first_it_is_the_optimum_for_its_mask() -> None:
    w, h = problem(5, 20)
    mask = torch.ones(5, 20, dtype=torch.bool)
    mask[:, :8] = False
    v, _ = sweep(w, factor(h, 1e-12), FREE, HALF, mask=mask)
    best = w.clone()
    best[:, 8:] += torch.linalg.solve(h[8:, 8:], (w[:, :8] @ h[:8, 8:]).T).T
    best[:, :8] = 0
    assert torch.allclose(v, best, rtol=1e-6, atol=1e-6)


def test_survivors_rounded_in_the_same_sweep() -> None:
    w, h = problem(6, 24)
    mask = torch.rand(6, 24, generator=torch.Generator().manual_seed(2)) > 0.3

    def to_quarters(values: Any, j: int) -> Any:
        return torch.round(values * 4) / 4

    v, _ = sweep(w, factor(h, 1e-12), FREE, HALF, mask=mask, rounded=to_quarters, block=8)
    assert torch.allclose(v, by_solving(w, h, mask, to_quarters), rtol=1e-6, atol=1e-6)
    assert torch.equal(v * 4, (v * 4).round()) and not bool(v[~mask].any())
    apart = torch.where(mask, to_quarters(sweep(w, factor(h, 1e-12), FREE, HALF, mask=mask)[0], 0), 0.0)
    assert loss(w, v, h) < loss(w, apart, h)


def test_masks_are_chosen_by_what_pruning_costs() -> None:
    """One block, one row, one weight: exact search over all columns for the cheapest, which w^2 / [H^-1]_jj says for the last block."""
    w, h = problem(1, 8)
    inverse = torch.linalg.inv(h)
    costs = []
    for j in range(8):
        order = [j, *(k for k in range(8) if k != j)]
        mask = torch.tensor([[False] + [True] * 7])
        v, _ = sweep(w[:, order], factor(h[order][:, order], 1e-12), FREE, 0.125, mask=mask)
        costs.append(loss(w[:, order], v, h[order][:, order]))
        assert costs[-1] == pytest.approx(float(w[0, j] ** 2 / inverse[j, j]), rel=1e-5)
    # The column that comes first sees all others behind it: its U_jj^2 is [H^-1]_jj.
    f = factor(h, 1e-12)
    assert float(f.upper[0, 0] ** 2) == pytest.approx(float(inverse[0, 0]), rel=1e-6)


@pytest.mark.parametrize("pattern", ["unstructured", "2:4", "4:8"])
@pytest.mark.parametrize("seed", range(3))
def test_less_error_than_wanda_and_magnitude_and_than_their_masks_alone(pattern: str, seed: int) -> None:
    w, h = problem(48, 256, seed, 1000)
    kind, f = masks.parse(pattern), factor(h)
    v, _ = sweep(w, f, masks.parse(pattern, "tensor"), HALF)
    scores = {"magnitude": masks.magnitude(w), "wanda": masks.wanda(w, h.diagonal().sqrt())}
    errors = {}
    for name, score in scores.items():
        mask = masks.kept(score, kind, HALF)
        errors[name] = loss(w, w * mask, h)
        assert loss(w, sweep(w, f, kind, HALF, mask=mask)[0], h) < errors[name]
    assert loss(w, v, h) < errors["wanda"] < errors["magnitude"]


@pytest.mark.parametrize("per", ["tensor", "row"])
@pytest.mark.parametrize(
    ("rows", "cols", "block", "share"), [(7, 50, 16, 0.37), (3, 129, 128, 0.5), (5, 12, 128, 0.9)]
)
def test_exact_counts(rows: int, cols: int, block: int, share: float, per: Any) -> None:
    w, h = problem(rows, cols)
    v, mask = sweep(w, factor(h), masks.parse("unstructured", per), share, block=block)
    assert torch.equal(v != 0, mask)
    if per == "row":
        assert set((~mask).sum(1).tolist()) == {masks.count(share, cols)}
    assert int((~mask).sum()) == (
        masks.count(share, rows * cols) if per == "tensor" else rows * masks.count(share, cols)
    )


def test_exact_groups_whatever_the_block() -> None:
    w, h = problem(4, 36)
    v, mask = sweep(w, factor(h), masks.parse("4:12"), 8 / 12, block=16)
    assert set((v != 0).reshape(4, 3, 12).sum(-1).flatten().tolist()) == {4} and torch.equal(v != 0, mask)


def test_steps_keep_what_is_pruned_pruned() -> None:
    w, h = problem(16, 64)
    f, v, mask = factor(h), w, None
    for step in range(1, 4):
        v, now = sweep(v, f, FREE, masks.cubic(step, 3, 0.6), within=mask)
        assert mask is None or not bool((now & ~mask).any())
        mask = now
    assert int((v == 0).sum()) == masks.count(0.6, 16 * 64)


def test_a_step_from_the_last_one_is_a_step_from_the_start() -> None:
    """Projections compose: re-fitting what an earlier mask left gives what re-fitting the dense matrix gives."""
    w, h = problem(8, 48)
    f, g = factor(h, 1e-9), torch.Generator().manual_seed(5)
    first = torch.rand(8, 48, generator=g) > 0.3
    second = first & (torch.rand(8, 48, generator=g) > 0.3)
    v, _ = sweep(sweep(w, f, FREE, HALF, mask=first)[0], f, FREE, HALF, mask=second)
    assert torch.allclose(v, sweep(w, f, FREE, HALF, mask=second)[0], rtol=1e-6, atol=1e-6)


def test_channels_without_input_go_first_and_change_nothing() -> None:
    w, h = problem(6, 16)
    h[3], h[:, 3] = 0, 0
    f = factor(h)
    assert f.dead.tolist() == [j == 3 for j in range(16)]
    _, mask = sweep(w, f, FREE, 0.25)
    assert not bool(mask[:, 3].any()) and int((~mask).sum()) == 24
    keep, everything = sweep(w, f, FREE, 0.0)
    assert torch.equal(keep, w) and bool(everything.all())


def test_damping_grows_until_the_hessian_can_be_factored() -> None:
    _, h = problem(2, 12)
    assert factor(h, 0.01).damping == 0.01
    h = torch.eye(12, dtype=h.dtype) + 0.06 * h.new_ones(12, 12).triu(1) - 0.06 * h.new_ones(12, 12).tril(-1)
    h[0, 1] = h[1, 0] = 1.05  # no sum of squares, but what rounded sums can be
    assert -0.1 < float(torch.linalg.eigvalsh(h).min()) < -0.01
    assert factor(h, 0.01).damping == 0.1


def test_hessians_that_are_no_help() -> None:
    with pytest.raises(InputError, match="head: the Hessian of its inputs holds NaN"):
        factor(torch.full((2, 2), float("nan")), name="head")
    bad = torch.tensor([[1.0, -200.0], [-200.0, 1.0]])
    with pytest.raises(InputError, match="not positive definite even at 10 of its mean diagonal"):
        factor(bad, 0.01, "head")
    singular = torch.ones(4, 4)
    assert factor(singular).damping == 0.01
    assert factor(torch.zeros(4, 4)).dead.all()


def test_widths_that_do_not_divide() -> None:
    w, h = problem(2, 10)
    with pytest.raises(OptionError, match=r"mlp\.down: rows of 10 weights do not divide into groups of 4"):
        sweep(w, factor(h), masks.parse("2:4"), 0.5, name="mlp.down")


def test_single_precision_says_the_same() -> None:
    w, h = problem(32, 128)
    f = factor(h)
    wide, mask = sweep(w, f, FREE, HALF)
    narrow, _ = sweep(w.float(), f, FREE, HALF, mask=mask)
    assert float((narrow - wide).norm() / wide.norm()) < 1e-4
