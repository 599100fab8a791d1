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

GPTAQ's objective (Y. Li et al., arXiv 2504.02692): the inputs of the compressed model are x, those of the original are x + d, and Q x should be
W (x + d). With C = sum d x^T that is the same as rounding W + W C H^-1 under H, which sweep, refinement and comparison then all aim at;
`alpha` is the share of that shift. (The paper's sweep adds each column's part of it to the columns to come alone.) Mean KLD of two trained
Llamas, int4 g128: .00246 and .0122 without, .00222 and .0107 with alpha .5; int3 g128 .0101 and .0218, .0091 and .0187; alpha 1 as .5 within 2%.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

from lconvert.errors import OptionError
from lconvert.forward import packages
from lconvert.primitives import sparsegpt, sweep
from lconvert.primitives.factor import Factor, factor
from lconvert.primitives.grids import DeploymentGrid
from lconvert.primitives.masks import Pattern
from lconvert.primitives.sides import Sides, joined, picked
from lconvert.primitives.statistics import importance, unfed

#: Columns whose errors are gathered before the rest of the matrix hears of them (lazy batches of the paper's 3.3).
BLOCK = 128
#: Columns per scale from which on the order of columns gains more than fresh scales.
_WIDE = 64


@dataclass(frozen=True)
class Settings:
    """damping: share of the mean diagonal that is added to it; ten times as much after every failure. alpha: share of GPTAQ's
    correction. refine: rounds of fitting scales to the codes and codes to the scales under the whole Hessian, each of which lowers the
    objective."""

    damping: float = 0.01
    order: Literal["auto", "weight", "group", "none"] = "auto"
    alpha: float = 0.5
    refine: int = 3


@dataclass(frozen=True)
class Inputs:
    """What a sweep needs to know of the inputs of matrices that share them. h (cols, cols) fp32: sum x x^T, dead inputs with the mean diagonal;
    importance (cols,): its diagonal; order: of the columns, None as they lie; upper: U in that order; shift: GPTAQ's alpha C H^-1, or None; damping: the share it took;
    notes: what had to give, after "NAME: "."""

    h: Any
    importance: Any
    order: Any
    upper: Any
    shift: Any
    damping: float
    notes: tuple[str, ...]


@dataclass(frozen=True)
class Rounded:
    """positions and sides on the grid; order: of the columns where groups follow it (g_idx), else None. loss: the objective over that of
    zero weights, tr(E H E^T) / tr(W H W^T), W shifted where GPTAQ shifts it; nearest: the same of rounding to nearest on the same grid."""

    position: Any
    sides: Sides
    order: Any
    loss: float
    nearest: float


def path(settings: Settings, g: DeploymentGrid) -> str:
    """The order that the settings mean for a grid; OptionError where the grid has no groups for it."""
    if settings.order == "group" and g.span != g.group:
        raise OptionError(
            f"gptq: order group needs groups that stand for themselves, {g.placed} has super-blocks"
        )
    if g.family.whole and settings.order not in ("auto", "weight"):
        raise OptionError(
            f"gptq: order {settings.order}: the scales of {g.placed} come of the whole matrix, so they are fixed beforehand; choose "
            "auto or weight"
        )
    if g.family.whole:
        return "weight"
    if settings.order != "auto":
        return settings.order
    return "none" if g.span != g.group or g.group < _WIDE else "weight"


def inputs(h: Any, order: str, settings: Settings, what: str, cross: Any = None) -> Inputs:
    """From h = sum x x^T (cols, cols) fp32, and for GPTAQ cross = sum (x_original - x) x^T. InputError for a Hessian that is no number, or
    singular whatever is added."""
    torch, _ = packages()
    along = torch.argsort(h.diagonal(), descending=True, stable=True) if order != "none" else None
    f = factor(h if along is None else h[along.unsqueeze(1), along], settings.damping, what)
    notes: list[str] = []
    weights = importance(h.diagonal())
    dead = h.diagonal() <= 0
    if bool(dead.any()):
        notes.append(unfed(h.diagonal()))
        h = h.clone()
        h.diagonal()[dead] = h.diagonal()[~dead].mean() if not bool(dead.all()) else 1.0
    if f.damping != settings.damping:
        notes.append(f"its Hessian is singular at a damping of {settings.damping:g}; took {f.damping:g}")
    shift = None
    if cross is not None:
        back = slice(None) if along is None else torch.argsort(along)
        inverse = (f.upper.T @ f.upper)[back][:, back]
        shift = (settings.alpha * cross.double() @ inverse).float()
    return Inputs(h, weights, along, f.upper.float(), shift, f.damping, tuple(notes))


def objective(w: Any, q: Any, h: Any) -> Any:
    """(w - q) H (w - q)^T per row, (rows,), fp64 sums."""
    e = w - q
    return ((e @ h) * e).sum(-1, dtype=packages()[0].float64)


def gptq(
    w: Any, seen: Inputs, g: DeploymentGrid, settings: Settings, *, kept: Any = None, threads: int = 1
) -> Rounded:
    """w (rows, cols) fp32 on the grid g. kept (rows, cols) bool: where False, the value becomes zero, which is made up for like any rounding.

    Rows that rounding to nearest serves better keep that: the objective is never worse.
    """
    torch, _ = packages()
    moving = path(settings, g) == "group"
    h, weights, columns, mask = (
        seen.h,
        seen.importance,
        w.float(),
        None if kept is None else kept.to(torch.uint8),
    )
    if seen.shift is not None:
        columns = columns + columns @ seen.shift
    if moving:
        h, weights, columns = h[seen.order][:, seen.order], weights[seen.order], columns[:, seen.order]
        mask = None if mask is None else mask[:, seen.order]
    order = None if moving else seen.order
    near_sides = g.fit(_where(columns, mask), weights)
    if seen.order is None:
        position, sides = _in_order(columns, weights, seen, g, mask, threads)
    else:
        sides = near_sides
        position = _sweep(columns, order, seen, g, sides, mask, threads)
    if settings.refine:
        damped = h.clone()
        damped.diagonal().add_(seen.damping * h.diagonal().mean())
        for _ in range(settings.refine):
            sides = g.rescaled(columns, position, sides, damped)
            position = _descend(columns, position, sides, damped, g, mask, threads)
    near = g.round(_where(columns, mask), near_sides)
    mine = objective(columns, g.values(position, sides), h)
    theirs = objective(columns, g.values(near, near_sides), h)
    position, sides = picked(theirs < mine, (near, near_sides), (position, sides))
    mine = torch.minimum(mine, theirs)
    whole = max(float(objective(columns, torch.zeros_like(columns), h).sum()), 1e-300)
    loss, nearest = float(mine.sum()) / whole, float(theirs.sum()) / whole
    if moving:
        position = position[:, torch.argsort(seen.order)]
    return Rounded(position, sides, seen.order if moving else None, loss, nearest)


def pruned(w: Any, h: Any, f: Factor, g: DeploymentGrid, pattern: Pattern, sparsity: float, what: str) -> Any:
    """Which weights SparseGPT keeps (rows, cols) where survivors are rounded to the grid in the same sweep: for `kept` of `gptq`, which sweeps
    the weights as they came again, in its own order (arXiv 2301.00774, 3.5). h: sum x x^T (cols, cols), f its factor."""
    sides = g.fit(w, importance(h.diagonal()))
    one = replace(g, group=1, span=1)

    def rounded(x: Any, column: int) -> Any:
        k = column // g.group
        own = sides.columns(k, k + 1)
        return one.values(one.round(x.unsqueeze(1), own), own).squeeze(1)

    return sparsegpt.sweep(w, f, pattern, sparsity, rounded=rounded, name=what)[1]


def _where(w: Any, mask: Any, first: int = 0, last: int | None = None) -> Any:
    """Columns of w, with zeros where the mask (rows, cols) uint8 has them."""
    part = w[:, first:last]
    return part.contiguous() if mask is None else part * mask[:, first:last]


def _sweep(w: Any, order: Any, seen: Inputs, g: DeploymentGrid, sides: Sides, mask: Any, threads: int) -> Any:
    """Positions (rows, cols) for scales that stay; order: of the columns, None: as they lie."""
    torch, _ = packages()
    cols = w.shape[1]
    along = torch.arange(cols, device=w.device) if order is None else order
    work = w[:, along].contiguous()
    position = torch.empty(w.shape, dtype=torch.uint8, device=w.device)
    for a in range(0, cols, BLOCK):
        b = min(a + BLOCK, cols)
        here = along[a:b]
        kept = None if mask is None else mask[:, here]
        done = _stretch(work, a, b, cols, seen, g, sides, here // g.group, kept, threads)
        position[:, here] = done
    return position


def _stretch(
    work: Any, a: int, b: int, stop: int, seen: Inputs, g: DeploymentGrid, sides: Sides, group: Any, kept: Any, threads: int
) -> Any:  # fmt: skip
    """Positions of the columns a..b of `work`, whose errors the columns up to `stop` hear of."""
    upper = seen.upper
    done = sweep.columns(
        work[:, a:b].contiguous(),
        upper[a:b, a:b].contiguous(),
        g.levels,
        sides,
        group,
        threads=threads,
        kept=kept,
    )
    if b < stop:
        work[:, b:stop] -= done.error @ upper[a:b, b:stop]
    return done.position


def _in_order(w: Any, h: Any, seen: Inputs, g: DeploymentGrid, mask: Any, threads: int) -> tuple[Any, Sides]:
    """Positions and sides where every span is fitted when the sweep gets there, and every group of it again."""
    torch, _ = packages()
    cols = w.shape[1]
    work = w.clone()
    position = torch.empty(w.shape, dtype=torch.uint8, device=w.device)
    found: list[Sides] = []
    for first in range(0, cols, g.span):
        sides = g.fit(_where(work, mask, first, first + g.span), h[first : first + g.span])
        for k in range(g.span // g.group):
            start = first + k * g.group
            if k:
                g.refit(sides, k, _where(work, mask, start, start + g.group), h[start : start + g.group])
            own = sides.columns(k, k + 1)
            for a in range(start, start + g.group, BLOCK):
                b = min(a + BLOCK, start + g.group)
                one = torch.zeros(b - a, dtype=torch.long, device=w.device)
                kept = None if mask is None else mask[:, a:b]
                position[:, a:b] = _stretch(work, a, b, cols, seen, g, own, one, kept, threads)
        found.append(sides)
    return position, joined(found)


def _descend(w: Any, position: Any, sides: Sides, h: Any, g: DeploymentGrid, mask: Any, threads: int) -> Any:
    """Every code in turn to the level that serves the objective best while all others stay: it never gets worse."""
    torch, _ = packages()
    values = g.values(position, sides)
    error = w - values
    out = position.clone()
    group = torch.arange(w.shape[1], device=w.device) // g.group
    for a in range(0, w.shape[1], BLOCK):
        b = min(a + BLOCK, w.shape[1])
        kept = None if mask is None else mask[:, a:b]
        along, old = error @ h[:, a:b], values[:, a:b].contiguous()
        own = h[a:b, a:b].contiguous()
        done = sweep.columns(along, own, g.levels, sides, group[a:b], threads=threads, old=old, kept=kept)
        out[:, a:b] = done.position
        error[:, a:b] -= done.error
    return out
