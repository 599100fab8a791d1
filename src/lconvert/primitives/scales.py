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
from lconvert.primitives import trials
from lconvert.primitives.levels import Levels

#: Rounds scales to what a format stores.
Store = Callable[[Any], Any]

#: Shares of the covering scale that are tried first, and how often codes and scale alternate then.
SHARES = (1.0, 0.96, 0.92, 0.88, 0.84, 0.8, 0.75, 0.7, 0.64, 0.57, 0.5, 0.42)
ROUNDS = 3
#: Shares for who has nothing but scales to choose: rounding to nearest.
FINE = tuple(round(1.1 - 0.01 * i, 2) for i in range(61))


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
    tried = store(starts.unsqueeze(1).mul(x.new_tensor(shares).reshape(1, -1, 1)).flatten(0, 1))
    best, scale = best_of(trials.errors(x, h, levels, tried), tried)
    for _ in range(ROUNDS):
        bottom, _, top = trials.sums(x, h, levels, scale)
        ideal = torch.where(bottom > 0, top / bottom.clamp(min=1e-38), scale)
        if not signed:
            ideal = torch.where(ideal > 0, ideal, scale)
        s = store(ideal)
        e = trials.errors(x, h, levels, s.unsqueeze(0))[0]
        better = e < best
        best, scale = torch.where(better, e, best), torch.where(better, s, scale)
    return scale


def best_of(errors: Any, *candidates: Any) -> tuple[Any, ...]:
    """The least error (n,) of every group, and the candidates (of (k, n) each) that it belongs to, the first of equals."""
    torch, _ = packages()
    errors = errors.nan_to_num(nan=float("inf"))
    best = errors.amin(0)
    places = torch.arange(len(errors), device=errors.device).unsqueeze(-1)
    first = torch.where(errors == best, places, len(errors)).amin(0, keepdim=True)
    return best, *(c.gather(0, first).squeeze(0) for c in candidates)


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
    part = x.new_tensor(shares).unsqueeze(-1)
    even = (high - low) * (part / span)
    up, down = (high - low * part) / span, (high * part - low) / span
    scales, offsets = store(
        torch.cat([even, up, down]),
        torch.cat(
            [
                even * (span / 2 + levels.low) - (high + low) / 2,
                -low * part + levels.low * up,
                -low + levels.low * down,
            ]
        ),
    )
    best, scale, offset = best_of(trials.errors(x, h, levels, scales, offsets), scales, offsets)
    total, first = h.sum(-1), (h * x).sum(-1)
    for _ in range(ROUNDS):
        a, b, c = trials.sums(x, h, levels, scale, offset)
        # x ~ s q - m:  [a -b; -b total] (s, m) = (c, -first)
        det = a * total - b * b
        good = det > 1e-20
        safe = torch.where(good, det, torch.ones_like(det))
        s, m = (c * total - b * first) / safe, (b * c - a * first) / safe
        s, m = store(torch.where(good & (s > 0), s, scale), torch.where(good & (s > 0), m, offset))
        e = trials.errors(x, h, levels, s.unsqueeze(0), m.unsqueeze(0))[0]
        better = e < best
        best = torch.where(better, e, best)
        scale, offset = torch.where(better, s, scale), torch.where(better, m, offset)
    return scale, offset
