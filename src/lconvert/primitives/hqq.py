"""Half-quadratic quantization: scales and zeros of an asymmetric integer grid for the least |error|^p, p < 1, without any data.

H. Badri and A. Shaji, https://mobiusml.github.io/hqq_blog. For a group x with codes q = clamp(round(x / s + z), 0, top), y = s (q - z):

    min over z, e of   |e|^p + beta / 2 (e - (x - y))^2         e: what is left aside as outliers
    e <- sign(r) max(|r| - |r|^(p - 1) / beta, 0),  r = x - y   (generalised soft threshold)
    z <- mean(q - (x - e) / s)                                  beta <- kappa beta

with p 0.7, beta 10, kappa 1.01 and 20 iterations. Here r is in units of the weights for one descent, as its authors have it (the threshold then
exceeds every error of weights of usual size, e is 0 and z the plain mean), and in units of the scale for another, so that outliers
count for less whatever the size of the weights. Each of them once with the scale kept (the paper's) and once with the scale
and z fitted together, by the regression of x - e on q. A group keeps the best of all iterates, judged as they are stored.

Shapes: x (n, group) fp32, one group per row; scales and zeros (n,). Nothing but x is needed, so any device and any slab of rows will do.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from lconvert.errors import OptionError

#: (scales, zeros in code units) as a format stores them.
Store = Callable[[Any, Any], tuple[Any, Any]]

#: Iterations in a row without a better group after which a descent ends.
_PATIENCE = 3


@dataclass(frozen=True)
class Settings:
    """p: the norm, above 0 and at most 1. beta, kappa: weight of the quadratic term, and its growth per iteration. scale: fit scales too."""

    p: float = 0.7
    beta: float = 10.0
    kappa: float = 1.01
    iterations: int = 20
    scale: bool = True

    def __post_init__(self) -> None:
        for name, low, high in (("p", 0.0, 1.0), ("beta", 0.0, 1e6), ("kappa", 0.0, 2.0)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not low < value <= high:
                raise OptionError(
                    f"hqq: {name} {value!r}; expected a number above {low:g} and up to {high:g}"
                )
        if isinstance(self.iterations, bool) or not isinstance(self.iterations, int) or self.iterations < 1:
            raise OptionError(f"hqq: iterations {self.iterations!r}; expected a whole number from 1 on")


def shrink(r: Any, beta: float, p: float) -> Any:
    """The e that minimises |e|^p + beta / 2 (e - r)^2, approximately."""
    size = r.abs()
    return r.sign() * (size - size.clamp(min=1e-12) ** (p - 1) / beta).clamp(min=0)


def error(x: Any, y: Any, p: float) -> Any:
    """sum |x - y|^p per group."""
    return ((x - y).abs() ** p).sum(-1)


def coded(x: Any, scale: Any, zero: Any, top: int) -> Any:
    """Codes (n, group) as fp32, nearest to x; groups with scale 0 have the code nearest to their zero."""
    s = scale.where(scale > 0, scale.new_ones(())).unsqueeze(-1)
    return (x * (scale > 0).unsqueeze(-1) / s + zero.unsqueeze(-1)).round().clamp(0, top)


def fit(x: Any, top: int, store: Store, settings: Settings = Settings()) -> tuple[Any, Any]:
    """Stored scales and zeros, both (n,), with the least |error|^p that was found; codes lie in 0 .. top."""
    p = settings.p
    low, high = x.amin(-1), x.amax(-1)
    start = (high - low) / top
    usable = start.clamp(min=1e-30)
    best = start.new_full(start.shape, float("inf"))
    scale, zero = start, start * 0

    def keep(s: Any, z: Any) -> bool:
        """Judge a candidate as it is stored; whether any group takes it."""
        nonlocal best, scale, zero
        s, z = store(s, z)
        found = error(x, (coded(x, s, z, top) - z.unsqueeze(-1)) * s.unsqueeze(-1), p)
        better = found < best
        best, scale, zero = found.where(better, best), s.where(better, scale), z.where(better, zero)
        return bool(better.any())

    # a group that does not reach 0 may need to, where zeros are codes
    wide = (high.clamp(min=0) - low.clamp(max=0)) / top
    keep(wide, -low.clamp(max=0) / wide.clamp(min=1e-30))
    for unit in (None, usable):
        for both in (False, True)[: 1 + settings.scale]:
            s, z, beta, idle = usable, -low / usable, settings.beta, 0
            for _ in range(settings.iterations):
                q = coded(x, s, z, top)
                r = x - (q - z.unsqueeze(-1)) * s.unsqueeze(-1)
                size = 1.0 if unit is None else unit.unsqueeze(-1)
                kept = x - shrink(r / size, beta, p) * size
                if both:
                    centred = q - q.mean(-1, keepdim=True)
                    spread = (centred * centred).sum(-1)
                    slope = (centred * kept).sum(-1) / spread.clamp(min=1e-30)
                    s = slope.where((spread > 0) & (slope > 0), s)
                z = (q - kept / s.unsqueeze(-1)).mean(-1)
                beta *= settings.kappa
                idle = 0 if keep(s, z) else idle + 1
                if idle == _PATIENCE:
                    break
    return scale, zero
