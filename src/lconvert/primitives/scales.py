"""How scales are searched: the least weighted squared error of a group, over scales that the grid can store.

For a group x with importances h (diagonal of the Hessian, the imatrix; ones without) and levels L:

    one scale       min over s of      sum h (x - s Q(x / s))^2
    and an offset   min over s, m of   sum h (x - (s Q((x + m) / s) - m))^2

Both start from the scale that covers the group, try shares of it, and alternate between nearest codes and the least-squares scale for
these codes (Lloyd's iteration; k-quants' make_qx_quants and make_qkx2_quants in ggml-quants.c, HQQ and DASH-Q are of this kind). A scale
counts only as it is stored: `store` rounds it, and errors are taken after that.

Shapes: x and h are (n, group) fp32 tensors, one group per row; scales and offsets (n,).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lconvert.forward import packages
from lconvert.primitives.levels import Levels

#: Rounds scales to what a format stores.
Store = Callable[[Any], Any]

#: Shares of the covering scale that are tried first, and how often codes and scale alternate then.
SHARES = (1.0, 0.96, 0.92, 0.88, 0.84, 0.8, 0.75, 0.7, 0.64, 0.57, 0.5, 0.42)
ROUNDS = 3


def error(x: Any, y: Any, h: Any) -> Any:
    """sum h (x - y)^2 per group, (n,)."""
    d = x - y
    return (d * d * h).sum(-1)


def ratio(x: Any, scale: Any) -> Any:
    """x / scale, 0 where the scale is 0."""
    return (x / scale.where(scale != 0, scale.new_ones(()))) * (scale != 0)


def over(x: Any, scale: Any) -> Any:
    """The same of groups x (..., group), which share a scale (...)."""
    return ratio(x, scale.unsqueeze(-1))


def cover(x: Any, levels: Levels, signed: bool) -> Any:
    """The scales at which the outermost levels reach the outermost values: (n,), or (2, n), the second negative, where scales may be."""
    torch, _ = packages()
    high, low = x.amax(-1).clamp(min=0), x.amin(-1).clamp(max=0)
    up, down = max(levels.high, 1e-30), max(-levels.low, 1e-30)
    positive = torch.maximum(high / up, -low / down)
    if not signed:
        return positive.unsqueeze(0)
    return torch.stack([positive, -torch.maximum(high / down, -low / up)])


def one_scale(
    x: Any, h: Any, levels: Levels, store: Store, *, signed: bool = False, shares: tuple[float, ...] = SHARES
) -> Any:
    """Stored scales (n,) with the least weighted squared error that was found."""
    torch, _ = packages()
    starts = cover(x, levels, signed)
    best = torch.full_like(starts[0], float("inf"))
    scale = torch.zeros_like(starts[0])

    def keep(s: Any) -> Any:
        nonlocal best, scale
        q = levels.nearest(over(x, s))
        e = error(x, q * s.unsqueeze(-1), h)
        better = e < best
        best, scale = torch.where(better, e, best), torch.where(better, s, scale)
        return q

    for start in starts:
        for share in shares:
            keep(store(start * share))
    for _ in range(ROUNDS):
        q = levels.nearest(over(x, scale))
        top, bottom = (h * x * q).sum(-1), (h * q * q).sum(-1)
        ideal = torch.where(bottom > 0, top / bottom.clamp(min=1e-38), scale)
        if not signed:
            ideal = torch.where(ideal > 0, ideal, scale)
        keep(store(ideal))
    return scale


def scale_and_offset(
    x: Any,
    h: Any,
    levels: Levels,
    store: Callable[[Any, Any], tuple[Any, Any]],
    *,
    shares: tuple[float, ...] = SHARES,
) -> tuple[Any, Any]:
    """Stored scales and offsets (n,) each, x ~ s q - m. store(s, m) rounds both to what the format has."""
    torch, _ = packages()
    high, low = x.amax(-1).clamp(min=0), x.amin(-1).clamp(max=0)
    span = levels.high - levels.low
    best = torch.full_like(high, float("inf"))
    scale, offset = torch.zeros_like(high), torch.zeros_like(high)

    def keep(s: Any, m: Any) -> None:
        nonlocal best, scale, offset
        s, m = store(s, m)
        q = levels.nearest(over(x + m.unsqueeze(-1), s))
        e = error(x, q * s.unsqueeze(-1) - m.unsqueeze(-1), h)
        better = e < best
        best = torch.where(better, e, best)
        scale, offset = torch.where(better, s, scale), torch.where(better, m, offset)

    for share in shares:
        s = (high - low) * (share / span)
        middle = (high + low) / 2
        keep(s, s * (span / 2 + levels.low) - middle)
        keep((high - low * share) / span, -low * share + levels.low * (high - low * share) / span)
        keep((high * share - low) / span, -low + levels.low * (high * share - low) / span)
    total, first = h.sum(-1), (h * x).sum(-1)
    for _ in range(ROUNDS):
        q = levels.nearest(over(x + offset.unsqueeze(-1), scale))
        a, b, c = (h * q * q).sum(-1), (h * q).sum(-1), (h * q * x).sum(-1)
        # x ~ s q - m:  [a -b; -b total] (s, m) = (c, -first)
        det = a * total - b * b
        good = det > 1e-20
        safe = torch.where(good, det, torch.ones_like(det))
        s, m = (c * total - b * first) / safe, (b * c - a * first) / safe
        keep(torch.where(good & (s > 0), s, scale), torch.where(good & (s > 0), m, offset))
    return scale, offset
