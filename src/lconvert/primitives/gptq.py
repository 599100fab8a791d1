"""GPTQ: columns rounded one after another, each one's error made up for by those still to come, on any deployment grid.

E. Frantar et al., arXiv 2210.17323. For weights W (rows, cols) whose inputs have H = sum x x^T (cols, cols), the objective is

    tr (W - Q) H (W - Q)^T

With H damped and H^-1 = U^T U, U upper triangular, column i in the order of the sweep gives

    q_i = nearest level of w_i,    e = (w_i - q_i) / U_ii,    w_k -= e U_ik for k > i

Columns that no input reaches (H_ii = 0) are rounded to nearest and influence nothing.

order   "weight": columns by falling H_ii, scales fixed beforehand, so that codes need no g_idx (the paper's act-order with static groups);
        "group": the same order, groups of columns that follow each other in it, which needs a g_idx;
        "none": as they lie, scales of each group from the weights as they are when the sweep gets there;
        "auto": "none" for small groups and super-blocks, whose scales gain more from that than codes from the order, else "weight".

Afterwards scales and codes take turns (`refine`): each group's scale goes to its least-squares optimum under H, as the format stores it, and
each code to the level that is best while all others stay; none of this can raise the objective. Measured on four matrices of a trained Llama
(root of the relative objective on text that was not calibrated on, refine 0 -> 3): int4 g128 .0568 -> .0554, int2 g64 .2356 -> .2239,
Q3_K .0810 -> .0787, Q2_K .1505 -> .1477; order weight against none: int4 g128 .0568 / .0575, Q4_K .0411 / .0400, Q2_K .1613 / .1505.

GPTAQ (Y. Li et al., arXiv 2504.02692): the inputs of the compressed model are x, those of the original are x + d; with C = sum d x^T the sweep
also adds w_i P_ik, P = strict upper part of (C^T U^T) U, to the columns to come, so that Q x approaches W (x + d).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from lconvert.errors import InputError, OptionError
from lconvert.forward import packages
from lconvert.primitives import sweep
from lconvert.primitives.grids import DeploymentGrid
from lconvert.primitives.sides import Sides, joined, picked

#: Columns whose errors are gathered before the rest of the matrix hears of them (lazy batches of the paper's 3.3).
BLOCK = 128
_RETRIES = 6
#: Columns per scale from which on the order of columns gains more than fresh scales.
_WIDE = 64


@dataclass(frozen=True)
class Settings:
    """damping: share of the mean diagonal that is added to it; ten times as much after every failure. alpha: share of GPTAQ's
    correction. refine: rounds of fitting scales to the codes and
    codes to the scales under the whole Hessian, each of which lowers the objective."""

    damping: float = 0.01
    order: Literal["auto", "weight", "group", "none"] = "auto"
    alpha: float = 0.25
    refine: int = 3


@dataclass(frozen=True)
class Rounded:
    """positions and sides on the grid; order: of the columns where groups follow it (g_idx), else None. loss: the objective over that of
    zero weights, tr(E H E^T) / tr(W H W^T); nearest: the same of rounding to nearest on the same grid; notes: what had to give."""

    position: Any
    sides: Sides
    order: Any
    loss: float
    nearest: float
    notes: tuple[str, ...]


def factor(h: Any, damping: float, what: str) -> tuple[Any, float]:
    """U (cols, cols) upper triangular, fp32, with H^-1 = U^T U for the damped H; and the damping that it took.

    Reversing rows and columns turns the one Cholesky factor into the other: H = R R^T with R upper triangular, U = R^-1.
    """
    torch, _ = packages()
    h = h.double()
    mean = float(h.diagonal().mean())
    if not torch.isfinite(h).all():
        raise InputError(f"{what}: the sum of its inputs' squares is not finite; a layer before it overflows")
    used = damping
    for _ in range(_RETRIES):
        damped = h.clone()
        damped.diagonal().add_(max(used * mean, 1e-30))
        lower, failed = torch.linalg.cholesky_ex(damped.flip(0, 1))
        if int(failed) == 0:
            eye = torch.eye(len(h), dtype=h.dtype, device=h.device)
            upper = torch.linalg.solve_triangular(lower.flip(0, 1), eye, upper=True)
            if bool(torch.isfinite(upper).all()):
                return upper.float(), used
        used = max(used, 1e-4) * 10
    raise InputError(
        f"{what}: its Hessian stays singular at a damping of {used:g}; use more calibration text"
    )


def objective(w: Any, q: Any, h: Any) -> Any:
    """(w - q) H (w - q)^T per row, (rows,), fp64 sums."""
    e = w - q
    return ((e @ h.float()) * e).sum(-1, dtype=packages()[0].float64)


def gptq(
    w: Any,
    h: Any,
    g: DeploymentGrid,
    settings: Settings = Settings(),
    *,
    cross: Any = None,
    what: str = "a matrix",
    threads: int = 1,
) -> Rounded:
    """w (rows, cols) fp32 on the grid g; h (cols, cols) sum of x x^T; cross: sum of (x_original - x) x^T for GPTAQ.

    Rows that rounding to nearest serves better keep that. OptionError for groups in an order on a grid that has none of its own.
    """
    torch, _ = packages()
    notes: list[str] = []
    w, h = w.float(), h.float()
    diagonal = h.diagonal().clone()
    dead = diagonal <= 0
    if bool(dead.any()):
        notes.append(
            f"{what}: {int(dead.sum())} of {len(dead)} inputs never differ from zero; rounded to nearest"
        )
    path = settings.order
    if path == "auto":
        path = "none" if g.span != g.group or g.group < _WIDE else "weight"
    importance = torch.where(dead, diagonal.mean() * 1e-3 + 1e-30, diagonal)
    if path == "group" and g.span != g.group:
        raise OptionError(
            f"{what}: order group needs groups that stand for themselves, not {g.placed}'s super-blocks"
        )
    order = None
    if path != "none":
        order = torch.argsort(importance, descending=True, stable=True)
    upper, used = factor(h if order is None else h[order][:, order], settings.damping, what)
    if used != settings.damping:
        notes.append(f"{what}: singular at a damping of {settings.damping:g}; took {used:g}")
    extra = None
    if cross is not None:
        c = cross.double() if order is None else cross.double()[order][:, order]
        extra = settings.alpha * ((c @ upper.double().T).triu(1) @ upper.double()).float()
    moving = path == "group"
    columns = w if not moving else w[:, order]
    weights = importance if not moving else importance[order]
    if path == "none":
        position, sides = _in_order(columns, weights, upper, extra, g, threads)
    else:
        sides = g.fit(columns, weights)
        position = _sweep(columns, None if moving else order, upper, extra, g, sides, threads)
    if moving:
        assert order is not None
        hh = h[order][:, order]
    else:
        hh = h
    if settings.refine:
        damped = hh.clone()
        damped.diagonal().add_(used * hh.diagonal().mean() + 1e-30)
        for _ in range(settings.refine):
            sides = g.rescaled(columns, position, sides, damped)
            position = _descend(columns, position, sides, damped, g, threads)
    near, near_sides = g.nearest(columns, weights)
    if cross is None:
        mine, theirs = (
            objective(columns, g.values(position, sides), hh),
            objective(columns, g.values(near, near_sides), hh),
        )
        position, sides = picked(theirs < mine, (near, near_sides), (position, sides))
        loss = float(torch.minimum(mine, theirs).sum())
        nearest = float(theirs.sum())
    else:
        loss = float(objective(columns, g.values(position, sides), hh).sum())
        nearest = float(objective(columns, g.values(near, near_sides), hh).sum())
    whole = max(float(objective(columns, torch.zeros_like(columns), hh).sum()), 1e-300)
    if moving:
        assert order is not None
        back = torch.argsort(order)
        return Rounded(position[:, back], sides, order, loss / whole, nearest / whole, tuple(notes))
    return Rounded(position, sides, None, loss / whole, nearest / whole, tuple(notes))


def _sweep(w: Any, order: Any, upper: Any, extra: Any, g: DeploymentGrid, sides: Sides, threads: int) -> Any:
    """Positions (rows, cols) for scales that stay; order: of the columns, None: as they lie."""
    torch, _ = packages()
    cols = w.shape[1]
    path = torch.arange(cols, device=w.device) if order is None else order
    work = w[:, path].contiguous()
    group = path // g.group
    position = torch.empty(w.shape, dtype=torch.uint8, device=w.device)
    for start in range(0, cols, BLOCK):
        stop = min(start + BLOCK, cols)
        block, here = work[:, start:stop].contiguous(), path[start:stop]
        part = None if extra is None else extra[start:stop]
        done = sweep.columns(
            block,
            upper[start:stop, start:stop].contiguous(),
            g.levels,
            sides,
            group[start:stop],
            None if part is None else part[:, start:stop].contiguous(),
            threads,
        )
        position[:, here] = done.position
        if stop < cols:
            work[:, stop:] -= done.error @ upper[start:stop, stop:]
            if part is not None:
                work[:, stop:] += done.weight @ part[:, stop:]
    return position


def _descend(w: Any, position: Any, sides: Sides, h: Any, g: DeploymentGrid, threads: int) -> Any:
    """Every code in turn to the level that serves the objective best while all others stay: it never gets worse."""
    torch, _ = packages()
    values = g.values(position, sides)
    error = w - values
    out = position.clone()
    group = torch.arange(w.shape[1], device=w.device) // g.group
    for a in range(0, w.shape[1], BLOCK):
        b = min(a + BLOCK, w.shape[1])
        done = sweep.columns(error @ h[:, a:b], h[a:b, a:b].contiguous(), g.levels, sides, group[a:b], threads=threads,
                             old=values[:, a:b].contiguous())  # fmt: skip
        out[:, a:b] = done.position
        error[:, a:b] -= done.error
    return out


def _in_order(w: Any, h: Any, upper: Any, extra: Any, g: DeploymentGrid, threads: int) -> tuple[Any, Sides]:
    """Positions and sides where every span is fitted when the sweep gets there, and every group of it again."""
    torch, _ = packages()
    cols = w.shape[1]
    work = w.clone()
    position = torch.empty(w.shape, dtype=torch.uint8, device=w.device)
    found: list[Sides] = []
    step = max(g.span, BLOCK // g.span * g.span)
    for start in range(0, cols, step):
        stop = min(start + step, cols)
        errors, weights = [], []
        for first in range(start, stop, g.span):
            sides = g.fit(work[:, first : first + g.span].contiguous(), h[first : first + g.span])
            for k in range(g.span // g.group):
                a, b = first + k * g.group, first + (k + 1) * g.group
                x = work[:, a:b].contiguous()
                if k:
                    g.refit(sides, k, x, h[a:b])
                one = torch.zeros(b - a, dtype=torch.long, device=w.device)
                part = None if extra is None else extra[a:b, a:b].contiguous()
                done = sweep.columns(
                    x, upper[a:b, a:b].contiguous(), g.levels, sides.columns(k, k + 1), one, part, threads
                )
                position[:, a:b] = done.position
                if b < stop:
                    work[:, b:stop] -= done.error @ upper[a:b, b:stop]
                    if extra is not None:
                        work[:, b:stop] += done.weight @ extra[a:b, b:stop]
                errors.append(done.error)
                weights.append(done.weight)
            found.append(sides)
        if stop < cols:
            work[:, stop:] -= torch.cat(errors, 1) @ upper[start:stop, stop:]
            if extra is not None:
                work[:, stop:] += torch.cat(weights, 1) @ extra[start:stop, stop:]
    return position, joined(found)
