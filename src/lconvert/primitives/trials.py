"""What groups would cost with given scales and offsets: the inner loop of every search for scales.

    y = s Q((x + m) / s) - m,    error = sum h (x - y)^2

`in_torch` is the specification, and what runs on other devices; kernels/trials.h does the same on CPUs, all candidates of a group while its
values are at hand. A whole fit with it against one in torch, ns per weight on one thread: int4 g128 22 / 107, Q4_K 282 / 1048, Q6_K 288 / 807,
IQ4_NL 52 / 1078, NVFP4 40 / 460.
Shapes: x and h (n, group) fp32, one group per row; scales and offsets (candidates, n).
"""

from __future__ import annotations

from typing import Any

from lconvert.forward import packages
from lconvert.primitives.levels import Levels

#: Levels of small floats that the kernel looks through one by one.
_MOST_LEVELS = 32


def over(x: Any, scale: Any) -> Any:
    """x / scale of groups x (..., group), which share a scale (...); 0 where it is 0."""
    return ratio(x, scale.unsqueeze(-1))


def ratio(x: Any, scale: Any) -> Any:
    """x / scale, 0 where the scale is 0."""
    return (x / scale.where(scale != 0, scale.new_ones(()))) * (scale != 0)


def errors(x: Any, h: Any, levels: Levels, scale: Any, offset: Any = None) -> Any:
    """Weighted squared errors (candidates, n) of every group with each of its candidates."""
    if not _compiled(x, levels):
        return in_torch(x, h, levels, scale, offset)[0]
    return _native(x, h, levels, scale, offset)[0]


def sums(x: Any, h: Any, levels: Levels, scale: Any, offset: Any = None) -> tuple[Any, Any, Any]:
    """sum h q q, sum h q and sum h q x (n,) for the levels q that are nearest with a scale (n,) and an offset each."""
    scale, offset = scale.unsqueeze(0), None if offset is None else offset.unsqueeze(0)
    run = _native if _compiled(x, levels) else in_torch
    found = run(x, h, levels, scale, offset, True)[1]
    return found[0], found[1], found[2]


def in_torch(
    x: Any, h: Any, levels: Levels, scale: Any, offset: Any = None, summed: bool = False
) -> tuple[Any, Any]:
    """Errors (candidates, n); with `summed` the three sums (3, n) for a single candidate, else None."""
    torch, _ = packages()
    out, found = [], None
    for k, s in enumerate(scale):
        m = None if offset is None else offset[k].unsqueeze(-1)
        q = levels.nearest(over(x if m is None else x + m, s))
        y = q * s.unsqueeze(-1)
        d = x - (y if m is None else y - m)
        out.append((d * d * h).sum(-1))
        if summed:
            found = torch.stack([(h * q * q).sum(-1), (h * q).sum(-1), (h * q * x).sum(-1)])
    return torch.stack(out), found


def _compiled(x: Any, levels: Levels) -> bool:
    from lconvert.kernels import native_module

    return (
        native_module() is not None
        and x.device.type == "cpu"
        and (levels.uniform or len(levels.values) <= _MOST_LEVELS)
    )


def _native(
    x: Any, h: Any, levels: Levels, scale: Any, offset: Any = None, summed: bool = False
) -> tuple[Any, Any]:
    from lconvert.kernels import isa, native_module

    torch, _ = packages()
    error = torch.empty(scale.shape, dtype=torch.float32)
    found = torch.empty((3, len(x)), dtype=torch.float32) if summed else None
    values, midpoints = (None, None) if levels.uniform else (levels.values, levels.midpoints)
    x, h, scale, offset = (None if a is None else a.contiguous().numpy() for a in (x, h, scale, offset))
    out = error.numpy(), None if found is None else found.numpy()
    native = native_module()
    assert native is not None
    native.try_scales(isa(), x, h, levels.low, len(levels.values), values, midpoints, scale, offset, *out)
    return error, found
