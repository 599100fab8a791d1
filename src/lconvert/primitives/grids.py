"""Deployment grids: where weights may lie in the format that will be served, scales and all, for whoever rounds.

A rounder (GPTQ, AutoRound, AWQ's search) asks a grid four things of a matrix (rows, cols), in torch, on any device:

    fit(w, h)         scales that the format can store, with the least squared error under importances h
    round(w, sides)   positions of the nearest levels
    values(p, sides)  what these mean, in the IR's own order of operations, bit for bit
    qtensor(p, sides) the QTensor, which packs into the format as it is

`span` columns are fitted together (a k-quant's super-block). Within one, `refit` chooses the scales of one group again while what is above
them stays, for rounders that change weights on the way.

    portable integers    int2 .. int8: F16 scales of 8 significant bits; uint2 .. uint8: 7, and an integer zero point
    legacy blocks        Q4_0 Q5_0 Q8_0 IQ4_NL: F16 scales, negative ones too; Q4_1 Q5_1: F16 scale and minimum
    k-quants             Q3_K Q6_K IQ4_XS: coded scales under an F16; Q2_K Q4_K Q5_K: coded minima as well
    microscaling         MXFP4: powers of two; NVFP4 and fp4: E4M3 under one global scale
    rows                 fp8: E4M3 codes under a scale per row; nf4: QLoRA's quantiles under an F32 maximum, nf4dq: in 8 bits under another
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from lconvert.errors import InputError, OptionError
from lconvert.forward import packages
from lconvert.ir import E2M1, E4M3, E8M0, Grid, QTensor, Tensor, as_f32, int_grid
from lconvert.primitives import levels as of_levels
from lconvert.primitives.families import (
    SLAB,
    Coded,
    Doubled,
    Family,
    Minimum,
    Single,
    Super,
    ZeroPoint,
    half,
    short,
)
from lconvert.primitives.levels import NF4, Levels, power_of_two_above
from lconvert.primitives.placement import Placed, undivided
from lconvert.primitives.sides import Sides
from lconvert.primitives.trials import over

#: The least end of the ranges that scales in F16 are clamped to (families.py): seven significant bits.
_END = 65024.0


@dataclass(frozen=True)
class DeploymentGrid:
    """One grid for matrices of `cols` columns. levels: of the codes; group: columns per scale; span: fitted together."""

    placed: Placed
    grid: Grid
    cols: int
    group: int
    span: int
    levels: Levels
    family: Family
    top: float = 0.0  # the global scale of fp4

    def fit(self, w: Any, h: Any = None) -> Sides:
        """Sides of a matrix whose columns are a whole number of spans. h: importances (cols,), all >= 0; None: ones."""
        if self.family.whole:
            return self.family.fit(self, w, _importance(w, h))
        return _in_slabs(self, w, h, self.family.fit)

    def refit(self, sides: Sides, group: int, x: Any, h: Any = None) -> None:
        """The scale of one group of a single span's sides again, in place, for the columns x (rows, group) as they are now."""
        self.family.refit(self, sides, group, x, _importance(x, h))

    def round(self, w: Any, sides: Sides) -> Any:
        """Positions (rows, cols), uint8, of the nearest levels. w: a whole number of groups, those of `sides`."""
        x = w.reshape(w.shape[0], -1, self.group)
        if sides.offset is not None:
            x = x + sides.offset.unsqueeze(-1)
        x = over(x, sides.scale)
        if sides.zero is not None:
            x = self.levels.nearest_from(x, sides.zero.unsqueeze(-1))
            return x.reshape(w.shape)
        return self.levels.position(x).reshape(w.shape)

    def values(self, position: Any, sides: Sides) -> Any:
        """fp32 (rows, cols)."""
        x = self.levels.at(position).reshape(position.shape[0], -1, self.group)
        if sides.zero is not None:
            x = x - sides.zero.unsqueeze(-1)
        x = x * sides.scale.unsqueeze(-1)
        if sides.offset is not None:
            x = x - sides.offset.unsqueeze(-1)
        return x.reshape(position.shape)

    def rescaled(self, w: Any, position: Any, sides: Sides, h: Any) -> Sides:
        """Scales that serve tr (w - q) H (w - q)^T better for codes that stay, group after group, as the format stores them. h (cols, cols)."""
        return self.family.rescaled(self, w, position, sides, h)

    def ranged(self, sides: Sides, low: Any, high: Any) -> Sides:
        """Sides whose groups end at these multiples (rows, groups) of where they end, as the format stores them; low for the least value of
        groups that have a zero point or a minimum."""
        return self.family.ranged(self, sides, low, high)

    def nearest(self, w: Any, h: Any = None) -> tuple[Any, Sides]:
        """fit and round."""
        sides = self.fit(w, h)
        return self.round(w, sides), sides

    def qtensor(self, position: Any, sides: Sides, like: Tensor) -> QTensor:
        """The QTensor of these positions and sides; `like` is the weight that they stand for. InputError where a side is beyond what stores it."""
        codes = self.levels.stored[position.cpu().numpy()]
        made = self.family.qtensor(self, codes, {k: v.cpu() for k, v in sides.stored.items()})
        if wide := _beyond(made.scale) or _beyond(made.offset):
            raise InputError(
                f"{like.origin or 'a matrix'}: {self.placed} has no scale for it in {wide}; its weights are too large, or damaged"
            )
        return replace(made, codes=replace(made.codes, origin=like.origin))

    @property
    def holds_zero(self) -> bool:
        """Whether an exact 0 is on the grid whatever the scales are."""
        return bool((self.levels.values == 0).any()) and not self.family.minimum


def _beyond(side: Tensor | QTensor | None) -> str:
    """The dtype whose range a side, or the scales of its codes, has left: infinite, or at the end of what families clamp to. "" where none has."""
    import numpy as np

    while isinstance(side, QTensor):
        side = side.scale
    if side is None:
        return ""
    most = float(np.abs(as_f32(side.load(), side.dtype)).max(initial=0))
    return "" if most < (_END if side.dtype == "F16" else math.inf) else side.dtype


def _importance(x: Any, h: Any) -> Any:
    torch, _ = packages()
    return torch.ones_like(x[:1]) if h is None else h.reshape(1, -1)


def _in_slabs(g: DeploymentGrid, w: Any, h: Any, fit: Callable[..., Sides]) -> Sides:
    """fit over slabs of rows; importances one row for all."""
    torch, _ = packages()
    h = _importance(w, h)
    step = max(1, SLAB // w.shape[1])
    found = [fit(g, w[a : a + step], h) for a in range(0, w.shape[0], step)]

    def cat(parts: list[Any]) -> Any:
        return None if parts[0] is None else torch.cat(parts)

    stored = {k: cat([f.stored[k] for f in found]) for k in found[0].stored}
    return Sides(
        cat([f.scale for f in found]), cat([f.zero for f in found]), cat([f.offset for f in found]), stored
    )


def find(
    placed: Placed, cols: int, *, peak: float | None = None, signed: bool = False, what: str = ""
) -> DeploymentGrid:
    """The deployment grid of a matrix with `cols` columns. peak: the largest magnitude that the global scale of fp4 must cover, over all
    matrices that runtimes fuse. signed: negative scales for portable integers too. OptionError where rows do not divide, or nobody rounds on it."""
    name, group = placed.grid, placed.group
    if name.startswith(("int", "uint")):
        size = cols if group == -1 else int(group)
        grid = int_grid(int(name[-1]), name.startswith("int"))
        family: Family = ZeroPoint() if not grid.signed else Single(lambda s: short(s, 8), signed)
        made = DeploymentGrid(placed, grid, cols, size, size, of_levels.of(grid), family)
    elif name == "fp4":
        top = power_of_two_above((peak or 0.0) / (6.0 * 448.0))
        made = DeploymentGrid(placed, E2M1, cols, 16, 16, of_levels.of(E2M1), Coded(E4M3, 6), top)
    elif name == "nf4":
        size = cols if group == -1 else int(group)
        made = DeploymentGrid(
            placed, NF4, cols, size, size, of_levels.of(NF4), Single(lambda s: s, False, "F32")
        )
    elif name == "nf4dq":
        size = cols if group == -1 else int(group)
        made = DeploymentGrid(placed, NF4, cols, size, size, of_levels.of(NF4), Doubled())
    elif name == "fp8" and group == -1:
        made = DeploymentGrid(
            placed,
            E4M3,
            cols,
            cols,
            cols,
            of_levels.of(E4M3),
            Single(lambda s: short(s, 8), False, "F32", ()),
        )
    else:
        made = _block_type(placed, cols, what)
    if cols % made.span:
        raise undivided(what, cols, made.span, placed.grid)
    return made


def _block_type(placed: Placed, cols: int, what: str) -> DeploymentGrid:
    from lconvert.formats.gguf_blocks import SCHEMES

    type_ = placed.grid.upper()
    scheme = SCHEMES.get(type_)
    if scheme is None or scheme.grid.lattice or scheme.sub == 256:
        raise OptionError(
            f"{what}: grid {placed}: nobody but rtn rounds on it; its codes are confined to a lattice, or its scales to a tensor; choose "
            "another grid, or give it to rtn"
        )
    family: Family
    if scheme.scale in (E8M0,):
        family = Coded(E8M0, 1)
    elif scheme.scale is not None and not scheme.super:
        family = Coded(scheme.scale, 6)
    elif scheme.scale is not None:
        family = Super(scheme.scale, scheme.has_offset)
    elif scheme.has_offset:
        family = Minimum()
    else:
        family = Single(half, type_ != "Q8_0")
    span = scheme.super or scheme.sub
    return DeploymentGrid(placed, scheme.grid, cols, scheme.sub, span, of_levels.of(scheme.grid), family, 1.0)
