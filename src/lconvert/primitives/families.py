"""How deployment grids choose and store the scales of their groups: one class per kind of format.

    Single     one number per group: portable integers, legacy blocks, NF4, FP8 rows
    ZeroPoint  a number and an integer zero point
    Minimum    an F16 scale and an F16 minimum: Q4_1, Q5_1
    Super      coded scales, and for some coded minima, under F16 numbers of a super-block: k-quants
    Doubled    a code per group under one number per 256 groups of the matrix, and one offset: NF4 with double quantization
    Coded      a small float per group under one number for the matrix: MXFP4, NVFP4

Shapes: w (rows, cols) fp32 whose columns are a whole number of spans, h (1, cols) importances; sides are (rows, groups).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from lconvert.forward import packages
from lconvert.ir import Grid, QTensor, Tensor, dense
from lconvert.primitives import doubled, trials
from lconvert.primitives import levels as of_levels
from lconvert.primitives.scales import SHARES, best_of, one_scale, scale_and_offset
from lconvert.primitives.sides import Sides

if TYPE_CHECKING:
    from lconvert.primitives.grids import DeploymentGrid

#: Values that a search looks at together: what fits a core's cache.
SLAB = 1 << 18


def _groups(g: DeploymentGrid, w: Any, h: Any) -> tuple[Any, Any]:
    """w and h with a group per row: (rows * groups, group)."""
    x = w.reshape(-1, g.group)
    spread = h.reshape(1, -1, g.group).expand(w.shape[0], -1, -1).reshape(-1, g.group)
    return x, spread


def half(s: Any) -> Any:
    """To F16 and back, within its finite range."""
    torch, _ = packages()
    return s.clamp(-65504.0, 65504.0).to(torch.float16).float()


def short(s: Any, bits: int) -> Any:
    """`bits` significant bits, ties to even, within F16's range; on multiples of 2^-24 where F16 is subnormal."""
    torch, _ = packages()
    mantissa, exponent = torch.frexp(s)
    s = torch.ldexp((mantissa * (1 << bits)).round(), exponent - bits)
    tiny = s.abs() < 2.0**-14
    s = torch.where(tiny, (s * 2.0**24).round() * 2.0**-24, s)
    limit = 65280.0 if bits == 8 else 65024.0
    return s.clamp(-limit, limit)


class Family:
    """How the scales of a kind of grids are chosen and stored."""

    minimum = False
    #: Whether scales depend on the whole matrix, so that it is fitted at once, before anything is rounded.
    whole = False

    def fit(self, g: DeploymentGrid, w: Any, h: Any) -> Sides:
        raise NotImplementedError

    def refit(self, g: DeploymentGrid, sides: Sides, group: int, x: Any, h: Any) -> None:
        raise AssertionError("a span of one group is fitted whole")

    def rescaled(self, g: DeploymentGrid, w: Any, position: Any, sides: Sides, h: Any) -> Sides:
        return sides

    def ranged(self, g: DeploymentGrid, sides: Sides, low: Any, high: Any) -> Sides:
        raise NotImplementedError

    def qtensor(self, g: DeploymentGrid, codes: Any, stored: dict[str, Any]) -> QTensor:
        raise NotImplementedError


def _moved(g: DeploymentGrid, scale: Any, offset: Any, low: Any, high: Any) -> tuple[Any, Any]:
    """Scales and offsets of groups x ~ s q - m, q from 0 on, whose least value -m and greatest one s top - m go to these multiples of them."""
    m = offset * low
    return ((scale * g.levels.high - offset) * high + m) / g.levels.high, m


def _descend_scales(
    g: DeploymentGrid, w: Any, position: Any, sides: Sides, h: Any, stored: Callable[[int, Any], Any]
) -> Any:
    """New scales (rows, groups), one group after another at its least-squares optimum, where `stored(group, scale)` of it lowers the objective."""
    torch, _ = packages()
    error = w - g.values(position, sides)
    level = g.levels.at(position).reshape(w.shape[0], -1, g.group)
    if sides.zero is not None:
        level = level - sides.zero.unsqueeze(-1)
    scale = sides.scale.clone()
    for k in range(scale.shape[1]):
        a, b = k * g.group, (k + 1) * g.group
        v = level[:, k]
        along = ((error @ h[:, a:b]) * v).sum(-1)
        curve = ((v @ h[a:b, a:b]) * v).sum(-1)
        ideal = scale[:, k] + along / curve.where(curve > 0, curve.new_ones(()))
        change = stored(k, ideal) - scale[:, k]
        change = torch.where(
            (change * (2 * along - change * curve) > 0) & (curve > 0), change, torch.zeros_like(change)
        )
        error[:, a:b] -= change.unsqueeze(-1) * v
        scale[:, k] += change
    return scale


def _f16(x: Any) -> Tensor:
    return dense(x.numpy().astype(np.float16))


@dataclass(frozen=True)
class Single(Family):
    """One stored number per group. store: what rounds it; signed: whether it may be negative; dtype of the side tensor; shares: of
    the covering scale, which are tried; none: it is taken as it is."""

    store: Callable[[Any], Any]
    signed: bool = False
    dtype: str = "F16"
    shares: tuple[float, ...] = SHARES

    def fit(self, g: DeploymentGrid, w: Any, h: Any) -> Sides:
        x, hh = _groups(g, w, h)
        if self.shares:
            s = one_scale(x, hh, g.levels, self.store, signed=self.signed, shares=self.shares)
        else:
            s = self.store(x.abs().amax(-1) / max(g.levels.high, -g.levels.low))
        s = s.reshape(w.shape[0], -1)
        return Sides(s, stored={"scale": s})

    def rescaled(self, g: DeploymentGrid, w: Any, position: Any, sides: Sides, h: Any) -> Sides:
        def store(group: int, s: Any) -> Any:
            return self.store(s if self.signed else s.clamp(min=0))

        s = _descend_scales(g, w, position, sides, h, store)
        return Sides(s, stored={"scale": s})

    def ranged(self, g: DeploymentGrid, sides: Sides, low: Any, high: Any) -> Sides:
        s = self.store(sides.scale * high)
        return Sides(s, stored={"scale": s})

    def qtensor(self, g: DeploymentGrid, codes: Any, stored: dict[str, Any]) -> QTensor:
        s = stored["scale"].numpy()
        if self.dtype == "F16":
            scale = replace(dense(s.astype(np.float16)), exact_in=("BF16",) if not self.signed else ())
        else:
            scale = dense(s.astype(np.float32))
        block = (1, -1) if g.placed.group == -1 and g.group == g.cols else (1, g.group)
        return QTensor(codes.shape, dense(codes), g.grid, block, scale)


@dataclass(frozen=True)
class ZeroPoint(Family):
    """A scale of 7 significant bits and an integer zero point per group."""

    def fit(self, g: DeploymentGrid, w: Any, h: Any) -> Sides:
        x, hh = _groups(g, w, h)
        top = g.levels.high

        def store(s: Any, m: Any) -> tuple[Any, Any]:
            s = short(s.clamp(min=0), 7)
            one = s.where(s > 0, s.new_ones(()))
            return s, (m / one).round().clamp(0, top) * s

        s, m = scale_and_offset(x, hh, g.levels, store)
        zero = (m / s.where(s > 0, s.new_ones(()))).round().clamp(0, top)
        s, zero = s.reshape(w.shape[0], -1), zero.reshape(w.shape[0], -1)
        return Sides(s, zero, stored={"scale": s, "zero": zero})

    def rescaled(self, g: DeploymentGrid, w: Any, position: Any, sides: Sides, h: Any) -> Sides:
        s = _descend_scales(g, w, position, sides, h, lambda k, s: short(s.clamp(min=0), 7))
        return Sides(s, sides.zero, stored=sides.stored | {"scale": s})

    def ranged(self, g: DeploymentGrid, sides: Sides, low: Any, high: Any) -> Sides:
        s, m = _moved(g, sides.scale, sides.zero * sides.scale, low, high)
        s = short(s.clamp(min=0), 7)
        zero = trials.ratio(m, s).round().clamp(0, g.levels.high)
        return Sides(s, zero, stored={"scale": s, "zero": zero})

    def qtensor(self, g: DeploymentGrid, codes: Any, stored: dict[str, Any]) -> QTensor:
        scale = replace(_f16(stored["scale"]), exact_in=("BF16",))
        zero = dense(stored["zero"].numpy().astype(np.uint8))
        block = (1, -1) if g.placed.group == -1 and g.group == g.cols else (1, g.group)
        return QTensor(codes.shape, dense(codes), g.grid, block, scale, zero)


@dataclass(frozen=True)
class Minimum(Family):
    """An F16 scale and an F16 minimum per group: Q4_1, Q5_1."""

    minimum = True

    def fit(self, g: DeploymentGrid, w: Any, h: Any) -> Sides:
        x, hh = _groups(g, w, h)
        s, m = scale_and_offset(x, hh, g.levels, lambda s, m: (half(s), half(m)))
        s, m = s.reshape(w.shape[0], -1), m.reshape(w.shape[0], -1)
        return Sides(s, offset=m, stored={"scale": s, "offset": m})

    def rescaled(self, g: DeploymentGrid, w: Any, position: Any, sides: Sides, h: Any) -> Sides:
        s = _descend_scales(g, w, position, sides, h, lambda k, s: half(s))
        return Sides(s, offset=sides.offset, stored=sides.stored | {"scale": s})

    def ranged(self, g: DeploymentGrid, sides: Sides, low: Any, high: Any) -> Sides:
        s, m = _moved(g, sides.scale, sides.offset, low, high)
        s, m = half(s), half(m)
        return Sides(s, offset=m, stored={"scale": s, "offset": m})

    def qtensor(self, g: DeploymentGrid, codes: Any, stored: dict[str, Any]) -> QTensor:
        scale, offset = _f16(stored["scale"]), _f16(stored["offset"])
        return QTensor(codes.shape, dense(codes), g.grid, (1, g.group), scale, offset=offset)


@dataclass(frozen=True)
class Super(Family):
    """Coded scales under one F16 per super-block; with minima, coded too under another F16. codes: the grid of both."""

    codes: Grid
    minimum: bool = False

    @property
    def most(self) -> int:
        return (1 << self.codes.bits) - 1 if not self.codes.signed else (1 << (self.codes.bits - 1)) - 1

    @property
    def least(self) -> int:
        return 0 if not self.codes.signed else -(1 << (self.codes.bits - 1))

    def _coded(self, s: Any, d: Any) -> Any:
        return trials.ratio(s, d).round().clamp(self.least, self.most) * (d != 0)

    def _search(self, g: DeploymentGrid, x: Any, h: Any, d: Any, dmin: Any) -> tuple[Any, Any]:
        """Codes of scales and minima (n,) for groups x (n, group) below d and dmin (n,)."""
        if not self.minimum:
            s = one_scale(x, h, g.levels, lambda s: self._coded(s, d) * d, signed=True)
            return self._coded(s, d), None
        s, m = scale_and_offset(
            x, h, g.levels, lambda s, m: (self._coded(s, d) * d, self._coded(m, dmin) * dmin)
        )
        return self._coded(s, d), self._coded(m, dmin)

    def _error(self, g: DeploymentGrid, x: Any, h: Any, sides: Sides, rows: int) -> Any:
        """Weighted squared error per super-block (rows, spans)."""
        flat = x.reshape(rows, -1)
        d = (g.values(g.round(flat, sides), sides) - flat).reshape(x.shape)
        return (d * d * h).sum(-1).reshape(rows, -1, g.span // g.group).sum(-1)

    def _sides(self, c: Any, cm: Any, d: Any, dmin: Any, count: int) -> Sides:
        """From codes (rows, groups) and super-scales (rows, spans) of `count` groups each."""
        scale = c * d.repeat_interleave(count, 1)
        stored = {"scale": c, "super_scale": d}
        if cm is None:
            return Sides(scale, stored=stored)
        offset = cm * dmin.repeat_interleave(count, 1)
        return Sides(scale, offset=offset, stored=stored | {"offset": cm, "super_offset": dmin})

    def fit(self, g: DeploymentGrid, w: Any, h: Any) -> Sides:
        torch, _ = packages()
        rows, count = w.shape[0], g.span // g.group
        x, hh = _groups(g, w, h)
        none = x.new_zeros(())

        def spread(v: Any) -> Any:
            return v.repeat_interleave(count, 1).reshape(-1)

        # what scales and minima would be without codes; then codes for them, super-scales for the codes, codes again
        if self.minimum:
            s, m = scale_and_offset(x, hh, g.levels, lambda s, m: (s, m.clamp(min=0)))
            m = m.reshape(rows, -1, count)
        else:
            s, m = one_scale(x, hh, g.levels, lambda s: s, signed=True), None
        s = s.reshape(rows, -1, count)
        if self.codes.signed:
            far = s.gather(-1, s.abs().argmax(-1, keepdim=True)).squeeze(-1)
            d = half(far / self.least)
        else:
            d = half(s.amax(-1) / self.most)
        dmin = half(m.amax(-1) / self.most) if m is not None else none
        best: Any = None
        kept: Any = None
        for _ in range(3):
            c, cm = self._search(g, x, hh, spread(d), spread(dmin) if m is not None else none)
            c = c.reshape(rows, -1)
            cm = None if cm is None else cm.reshape(rows, -1)
            found = self._sides(c, cm, d, dmin, count)
            e = self._error(g, x, hh, found, rows)
            if best is None:
                best, kept = e, (c, cm, d, dmin)
            else:
                better = e < best
                wide = better.repeat_interleave(count, 1)
                best = torch.where(better, e, best)
                kept = (
                    torch.where(wide, c, kept[0]),
                    None if cm is None else torch.where(wide, cm, kept[1]),
                    torch.where(better, d, kept[2]),
                    dmin if cm is None else torch.where(better, dmin, kept[3]),
                )
            d, dmin = self._supers(g, w, h, found, c, cm, d, dmin, count)
        return self._sides(kept[0], kept[1], kept[2], kept[3], count)

    def _supers(
        self, g: DeploymentGrid, w: Any, h: Any, sides: Sides, c: Any, cm: Any, d: Any, dmin: Any, count: int
    ) -> tuple[Any, Any]:
        """Least-squares super-scales for codes that are given: x ~ d (c q) - dmin cm."""
        torch, _ = packages()
        rows = w.shape[0]
        q = g.levels.at(g.round(w, sides)).reshape(rows, -1, g.group)
        a = (q * c.unsqueeze(-1)).reshape(rows, -1, g.span)
        x, hh = w.reshape(rows, -1, g.span), h.reshape(1, -1, g.span)
        aa, ax = (hh * a * a).sum(-1), (hh * a * x).sum(-1)
        if cm is None:
            return half(torch.where(aa > 0, ax / aa.clamp(min=1e-30), d)), dmin
        b = cm.unsqueeze(-1).expand(-1, -1, g.group).reshape(rows, -1, g.span)
        ab, bb, bx = (hh * a * b).sum(-1), (hh * b * b).sum(-1), (hh * b * x).sum(-1)
        det = aa * bb - ab * ab
        good = det > 1e-20
        safe = torch.where(good, det, torch.ones_like(det))
        new_d, new_m = (ax * bb - ab * bx) / safe, (ab * ax - aa * bx) / safe
        good = good & (new_d > 0) & (new_m >= 0)
        return half(torch.where(good, new_d, d)), half(torch.where(good, new_m, dmin))

    def refit(self, g: DeploymentGrid, sides: Sides, group: int, x: Any, h: Any) -> None:
        d = sides.stored["super_scale"][:, 0]
        dmin = sides.stored["super_offset"][:, 0] if self.minimum else d.new_zeros(())
        c, cm = self._search(g, x, h.expand_as(x), d, dmin)
        sides.stored["scale"][:, group] = c
        sides.scale[:, group] = c * d
        if cm is not None:
            sides.stored["offset"][:, group] = cm
            sides.offset[:, group] = cm * dmin

    def rescaled(self, g: DeploymentGrid, w: Any, position: Any, sides: Sides, h: Any) -> Sides:
        torch, _ = packages()
        d = sides.stored["super_scale"].repeat_interleave(g.span // g.group, 1)
        s = _descend_scales(g, w, position, sides, h, lambda k, s: self._coded(s, d[:, k]) * d[:, k])
        return replace(
            sides, scale=s, stored=sides.stored | {"scale": torch.where(d != 0, self._coded(s, d), d)}
        )

    def ranged(self, g: DeploymentGrid, sides: Sides, low: Any, high: Any) -> Sides:
        count = g.span // g.group

        def coded(name: str, x: Any) -> Any:
            d = sides.stored["super_" + name].repeat_interleave(count, 1)
            c = self._coded(x, d)
            return c, c * d

        if not self.minimum:
            c, s = coded("scale", sides.scale * high)
            return Sides(s, stored=sides.stored | {"scale": c})
        s, m = _moved(g, sides.scale, sides.offset, low, high)
        (c, s), (cm, m) = coded("scale", s), coded("offset", m)
        return Sides(s, offset=m, stored=sides.stored | {"scale": c, "offset": cm})

    def qtensor(self, g: DeploymentGrid, codes: Any, stored: dict[str, Any]) -> QTensor:
        kind = np.int8 if self.codes.signed else np.uint8

        def side(name: str) -> QTensor:
            held = dense(stored[name].numpy().astype(kind))
            return QTensor(
                held.shape, held, self.codes, (1, g.span // g.group), _f16(stored["super_" + name])
            )

        offset = side("offset") if self.minimum else None
        return QTensor(codes.shape, dense(codes), g.grid, (1, g.group), side("scale"), offset=offset)


@dataclass(frozen=True)
class Coded(Family):
    """A small float as the scale of each group, under one number for the whole matrix: microscaling."""

    scale: Grid
    reach: int  # codes to either side of the covering one that are tried

    def fit(self, g: DeploymentGrid, w: Any, h: Any) -> Sides:
        torch, _ = packages()
        x, hh = _groups(g, w, h)
        table = of_levels.of(self.scale)
        first = int(np.searchsorted(table.values, 0.0, side="right"))  # positive scales alone
        last = len(table.values) - 1
        worth = torch.from_numpy(table.values.copy()).to(w.device)
        top = x.new_tensor(g.top)
        ideal = x.abs().amax(-1) / g.levels.high / top
        start = torch.searchsorted(worth, ideal).clamp(first, last)
        steps = torch.arange(-self.reach, self.reach + 1, device=w.device)
        at = (start + steps.unsqueeze(-1)).clamp(first, last)
        _, chosen = best_of(trials.errors(x, hh, g.levels, worth[at] * top), at)
        return self._sides(g, chosen.reshape(w.shape[0], -1), worth)

    def rescaled(self, g: DeploymentGrid, w: Any, position: Any, sides: Sides, h: Any) -> Sides:
        return self._near(g, _descend_scales(g, w, position, sides, h, lambda k, s: self._near(g, s).scale))

    def ranged(self, g: DeploymentGrid, sides: Sides, low: Any, high: Any) -> Sides:
        return self._near(g, sides.scale * high)

    def _near(self, g: DeploymentGrid, s: Any) -> Sides:
        """The sides nearest to these scales."""
        torch, _ = packages()
        table = of_levels.of(self.scale)
        first = int(np.searchsorted(table.values, 0.0, side="right"))
        chosen = table.position(s / g.top).to(torch.int64).clamp(min=first)
        return self._sides(g, chosen, torch.from_numpy(table.values.copy()).to(chosen.device))

    def _sides(self, g: DeploymentGrid, chosen: Any, worth: Any) -> Sides:
        torch, _ = packages()
        return Sides(worth[chosen] * worth.new_tensor(g.top), stored={"scale": chosen.to(torch.int32)})

    def qtensor(self, g: DeploymentGrid, codes: Any, stored: dict[str, Any]) -> QTensor:
        local = dense(of_levels.of(self.scale).stored[stored["scale"].numpy()])
        outer = dense(np.full((1, 1), g.top, np.float32))
        scale = QTensor(local.shape, local, self.scale, (-1, -1), outer)
        return QTensor(codes.shape, dense(codes), g.grid, (1, g.group), scale)


@dataclass(frozen=True)
class Doubled(Family):
    """Scales of groups in 8 bits, as QLoRA's double quantization stores them (primitives/doubled.py). What is above the codes comes of the
    scales with the least error and stays; rounders move the codes."""

    whole = True

    def fit(self, g: DeploymentGrid, w: Any, h: Any) -> Sides:
        torch, _ = packages()
        step = max(1, SLAB // w.shape[1])
        found = [
            one_scale(*_groups(g, w[a : a + step], h), g.levels, lambda s: s)
            for a in range(0, w.shape[0], step)
        ]
        scale = torch.cat(found).reshape(w.shape[0], -1).cpu().numpy()
        outer, offset = doubled.statistics(scale)
        stored = {"outer": torch.from_numpy(outer), "offset": torch.full(outer.shape, float(offset))}
        code = torch.from_numpy(doubled.codes(scale, outer, offset))
        return self._sides({"scale": code, **stored}, w.device)

    def _sides(self, stored: dict[str, Any], device: Any) -> Sides:
        table = np.array(doubled.dynamic_map().values, np.float32)
        worth = packages()[0].from_numpy(table)[stored["scale"].long()]
        return Sides((worth * stored["outer"] + stored["offset"]).to(device), stored=stored)

    def rescaled(self, g: DeploymentGrid, w: Any, position: Any, sides: Sides, h: Any) -> Sides:
        torch, _ = packages()
        outer, offset = (sides.stored[k].numpy() for k in ("outer", "offset"))
        coded = sides.stored["scale"].clone()
        low = np.float32(offset.reshape(-1)[0])

        def store(group: int, s: Any) -> Any:
            at = doubled.codes(s.cpu().numpy(), outer[:, group], low)
            return torch.from_numpy(doubled.values(at, outer[:, group], low)).to(s.device)

        wanted = _descend_scales(g, w, position, sides, h, store).cpu().numpy()
        moved = torch.from_numpy(doubled.codes(wanted, outer, low))
        same = torch.from_numpy(wanted == sides.scale.cpu().numpy())
        stored = {**sides.stored, "scale": torch.where(same, coded, moved)}
        return self._sides(stored, w.device)

    def qtensor(self, g: DeploymentGrid, codes: Any, stored: dict[str, Any]) -> QTensor:
        code, outer, offset = (stored[k].numpy() for k in ("scale", "outer", "offset"))
        run = doubled.together(code.shape[1])
        above, minus = dense(outer[:, ::run]), dense(-offset[:, ::run])
        scale = QTensor(code.shape, dense(code), doubled.dynamic_map(), (1, run), above, offset=minus)
        return QTensor(codes.shape, dense(codes), g.grid, (1, g.group), scale)
