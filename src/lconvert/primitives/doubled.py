"""Double quantization of QLoRA: the scales of a matrix in 8 bits, under one fp32 scale per 256 of them and one offset for all.

T. Dettmers et al., QLoRA (arXiv 2305.14314, section 3), as bitsandbytes stores it (functional.py quantize_4bit with compress_statistics,
create_dynamic_map; backends/default/ops.py quantize_blockwise):

    offset = mean(absmax);  outer = max |absmax - offset| over 256 absmax, in the order of the flattened matrix
    code   = nearest of the 256 values of the dynamic map to (absmax - offset) / outer;  scale = map[code] outer + offset

A matrix whose rows hold R scales spreads outer over its rows: runs of 256 lie wherever rows end, and gcd(256, R) neighbours in a row
always share one. The mean is torch's own up to 32768 scales, where one thread takes it, and in fp64 beyond, so that it does not depend on the
number of threads. bitsandbytes' library for CPUs looks small differences up in a coarse table and may pass the nearest code by; its
other backends do not.

Shapes: absmax and scales (rows, R).
"""

from __future__ import annotations

from functools import cache
from math import gcd

import numpy as np
from numpy.typing import NDArray

from lconvert.forward import packages
from lconvert.ir import Grid

RUN = 256
_ONE_THREAD = 32768  # numbers that torch sums in one thread


@cache
def dynamic_map() -> Grid:
    """The 256 values, ascending: 7 decades, each halving its share of fractions, their negatives, 0 and 1."""
    values = [0.0, 1.0]
    for i in range(7):
        count = (1 << i) + 1
        step = float(np.float32(np.float32(1 - np.float32(0.1)) / np.float32(count - 1)))
        at = np.arange(count)
        # torch.linspace: from either end to the middle, products and sums rounded to fp32 once
        near, far = float(np.float32(0.1)) + step * at, 1 - step * at[::-1]
        bounds = np.where(at < count // 2, near, far).astype(np.float32)
        means = (bounds[:-1] + bounds[1:]) / np.float32(2) * np.float32(10.0 ** (i - 6))
        values += [float(v) for v in means] + [float(-v) for v in means]
    return Grid("codebook", 8, values=tuple(sorted(values)))


@cache
def _table() -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """The values and the midpoints between them."""
    v = np.array(dynamic_map().values, np.float32)
    return v, (v[:-1] + v[1:]) / np.float32(2)


def codes(scale: NDArray[np.float32], outer: NDArray[np.float32], offset: np.float32) -> NDArray[np.uint8]:
    """Codes of the stored scales nearest to `scale`. outer: of each of them."""
    inverse = np.float32(1) / np.where(outer > 0, outer, np.float32(1))
    at = np.clip((scale - offset) * inverse, -1, 1) * (outer > 0)
    return np.searchsorted(_table()[1], at, side="left").astype(np.uint8)


def values(code: NDArray[np.uint8], outer: NDArray[np.float32], offset: np.float32) -> NDArray[np.float32]:
    """What codes mean, fp32."""
    out: NDArray[np.float32] = _table()[0][code] * outer + offset
    return out


def statistics(absmax: NDArray[np.float32]) -> tuple[NDArray[np.float32], np.float32]:
    """outer of each scale (rows, R), and the offset."""
    flat = np.ascontiguousarray(absmax, np.float32).reshape(-1)
    if flat.size <= _ONE_THREAD:
        offset = np.float32(packages()[0].from_numpy(flat).mean().item())
    else:
        offset = np.float32(flat.mean(dtype=np.float64))
    apart = np.abs(flat - offset)
    outer = np.maximum.reduceat(apart, np.arange(0, apart.size, RUN))
    spread: NDArray[np.float32] = np.repeat(outer, RUN)[: flat.size].reshape(absmax.shape)
    return spread, offset


def together(per_row: int) -> int:
    """Scales of a row that always have one outer scale."""
    return gcd(RUN, per_row)
