"""Round to nearest on small floats: FP8, NVFP4, MXFP4 and NF4.

    fp8   E4M3 (OCP), largest value 448: s = max|x| / 448 per row, tensor or block of 128 x 128, on 8 significant bits.
    fp4   NVFP4: E2M1 in groups of 16; group scale max|x| / 6 / g in E4M3; g = 2^ceil(log2(max|X| / (6 * 448))), a power of two, so
          that its reciprocal, which compressed-tensors stores, is exact. NVIDIA's own recipe takes max|X| / (6 * 448) itself; a power
          of two costs at most one binade of E4M3's seventeen. Search "mse" tries the codes around and keeps the least squared error of
          each group ("four over six" looks at the one for max|x| / 4 besides).
    MXFP4 with search "mse": E2M1 in groups of 32, the power of two with the least squared error out of the least one that cuts off no more than
          rounding would (max|x| <= 7 of it, halfway to the 8 that there is not) and its double. The OCP rule, which is ggml's, is
          2^(floor(log2 max|x|) - 2), up to 8 of it; least squares alone choose it too often, as what is cut off leans towards zero
          (mean KLD of four small trained models with this bound .00543 .00150 .00191 .00511, without .00565 .00160 .00198 .00513).
    nf4   the 16 quantiles of QLoRA (arXiv 2305.14314, appendix E), group scale max|x| in fp32, as bitsandbytes stores it.
    nf4dq the same with these scales in 8 bits (primitives/doubled.py), QLoRA's double quantization; codes are those of nf4, as in bitsandbytes.

A code is the nearest value of the grid, ties to the even code; what exceeds the largest value saturates.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cache
from typing import TYPE_CHECKING, Any

from lconvert.errors import InputError
from lconvert.ir import E2M1, E4M3, E8M0, Grid, Model, QTensor, Tensor, as_f32, parts
from lconvert.primitives import doubled
from lconvert.primitives.levels import NF4, power_of_two_above
from lconvert.primitives.placement import undivided

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

GRIDS = ("fp8", "fp4", "nf4", "nf4dq")
_FP8_MAX, _FP4_MAX = 448.0, 6.0
_SLAB = 1 << 22  # values that are looked at together


class Peak:
    """The largest magnitude in some matrices, found when it is first asked for."""

    def __init__(self, tensors: tuple[Tensor, ...]) -> None:
        self._tensors, self._lock = tensors, threading.Lock()
        self._value: float | None = None

    def value(self) -> float:
        import numpy as np

        with self._lock:
            if self._value is None:
                found = 0.0
                for t in self._tensors:
                    step = max(1, _SLAB // max(1, t.shape[1]))
                    for start in range(0, t.rows, step):
                        x = as_f32(t.read(start, min(start + step, t.rows)), t.dtype)
                        top = float(np.abs(x).max(initial=0))
                        if not np.isfinite(top):
                            raise InputError(f"{t.origin}: holds NaN or infinite values in rows from {start}")
                        found = max(found, top)
                self._value = found
            return self._value


def peaks(model: Model) -> Mapping[str, Peak]:
    """One Peak for every group of matrices that runtimes fuse: role -> the Peak it shares."""
    from lconvert.passes.fused import groups

    out: dict[str, Peak] = {}
    for group in groups(model.decoder):
        members = [model.entries[r].data for r in group if r in model.entries]
        shared = Peak(tuple(m for m in members if isinstance(m, Tensor)))
        out |= dict.fromkeys(group, shared)
    return out


@cache
def _midpoints(grid: Grid) -> tuple[NDArray[np.float32], NDArray[np.uint8], NDArray[np.bool_]]:
    """Ascending values' midpoints, the codes in that order, and whether a tie goes to the upper neighbour (its code is even)."""
    import numpy as np

    from lconvert.kernels.qtensor import grid_values

    codes = np.arange(1 << grid.bits, dtype=np.uint8)
    values = grid_values(grid, codes)
    negative_zero = np.signbit(values) & (values == 0)
    keep = np.isfinite(values) & ~negative_zero
    codes, values = codes[keep], values[keep]
    order = np.argsort(values, kind="stable")
    codes, values = codes[order], values[order].astype(np.float64)
    middle = ((values[:-1] + values[1:]) / 2).astype(np.float32)
    return middle, codes, (codes[1:] & 1) == 0


def nearest(grid: Grid, x: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Codes of the values nearest to x; ties go to the even code, what is too large saturates."""
    import numpy as np

    middle, codes, up = _midpoints(grid)
    at = np.searchsorted(middle, x, side="left")  # middle[at - 1] < x <= middle[at]
    tie = (at < len(middle)) & (x == middle[np.minimum(at, len(middle) - 1)])
    at = at + (tie & up[np.minimum(at, len(up) - 1)])
    out: NDArray[np.uint8] = codes[at]
    return out


def _finite(t: Tensor, start: int, stop: int) -> NDArray[np.float32]:
    import numpy as np

    x = as_f32(t.read(start, stop), t.dtype)
    if not np.isfinite(x).all():
        raise InputError(f"{t.origin}: holds NaN or infinite values in rows {start}..{stop}")
    return x


def _over(x: NDArray[np.float32], scale: NDArray[np.float32]) -> NDArray[np.float32]:
    import numpy as np

    return np.divide(x, scale, out=np.zeros_like(x), where=scale > 0)


def quantized(t: Tensor, grid: str, group: int | str, peak: Peak, search: str = "minmax") -> QTensor:
    """A dense (out, in) matrix on one of GRIDS, or on MXFP4 by search, lazily."""
    if grid == "fp8":
        return {-1: _fp8_rows, "tensor": _fp8_tensor, "block": _fp8_blocks}[group](t, peak)
    if grid == "fp4":
        return _fp4(t, peak, search)
    if grid == "MXFP4":
        return _mxfp4(t)
    plain = _nf4(t, int(group))
    return plain if grid == "nf4" else _doubled(plain)


def _short(scale: NDArray[np.float32]) -> NDArray[np.float32]:
    from lconvert.kernels.reference.rounding import short_scale

    return short_scale(scale, 8)


def _fp8_rows(t: Tensor, peak: Peak) -> QTensor:
    import numpy as np

    def compute(start: int, stop: int) -> dict[str, NDArray[Any]]:
        x = _finite(t, start, stop)
        scale = _short(np.abs(x).max(1, keepdims=True) / np.float32(_FP8_MAX))
        return {"codes": nearest(E4M3, _over(x, scale)), "scale": scale}

    reader = parts(compute, t.shape[1])
    codes = Tensor(t.shape, "U8", reader("codes"), t.origin, t.files)
    scale = Tensor((t.rows, 1), "F32", reader("scale"), t.origin, t.files, exact_in=("BF16",))
    return QTensor(t.shape, codes, E4M3, (1, -1), scale)


def _fp8_tensor(t: Tensor, peak: Peak) -> QTensor:
    import numpy as np

    def scale() -> NDArray[np.float32]:
        return _short(np.full((1, 1), peak.value() / _FP8_MAX, np.float32))

    def codes(start: int, stop: int) -> NDArray[Any]:
        return nearest(E4M3, _over(_finite(t, start, stop), scale()))

    side = Tensor((1, 1), "F32", lambda a, b: scale()[a:b], t.origin, t.files, exact_in=("BF16",))
    return QTensor(t.shape, Tensor(t.shape, "U8", codes, t.origin, t.files), E4M3, (-1, -1), side)


_TILE = 128


def _fp8_blocks(t: Tensor, peak: Peak) -> QTensor:
    import numpy as np

    rows, cols = t.shape
    wide = -(-cols // _TILE)

    held: dict[int, NDArray[np.float32]] = {}  # few numbers, which every row of a block asks for

    def of_block_row(i: int) -> NDArray[np.float32]:
        if i not in held:
            x = np.abs(_finite(t, i * _TILE, min((i + 1) * _TILE, rows))).max(0)
            top = np.zeros(wide * _TILE, np.float32)
            top[:cols] = x
            held[i] = _short(top.reshape(wide, _TILE).max(1) / np.float32(_FP8_MAX))
        return held[i]

    def scales(start: int, stop: int) -> NDArray[np.float32]:
        """Of block rows start..stop."""
        found = [of_block_row(i) for i in range(start, stop)]
        return np.stack(found) if found else np.empty((0, wide), np.float32)

    def codes(start: int, stop: int) -> NDArray[Any]:
        first = start // _TILE
        tall = np.repeat(scales(first, -(-stop // _TILE)), _TILE, axis=0)[start - first * _TILE :][
            : stop - start
        ]
        return nearest(E4M3, _over(_finite(t, start, stop), np.repeat(tall, _TILE, axis=1)[:, :cols]))

    side = Tensor((-(-rows // _TILE), wide), "F32", scales, t.origin, t.files, exact_in=("BF16",))
    return QTensor(t.shape, Tensor(t.shape, "U8", codes, t.origin, t.files), E4M3, (_TILE, _TILE), side)


def _fp4(t: Tensor, peak: Peak, search: str) -> QTensor:
    import numpy as np

    def outer() -> np.float32:
        return np.float32(power_of_two_above(peak.value() / (_FP4_MAX * _FP8_MAX)))

    def covering(top: NDArray[np.float32]) -> NDArray[np.int16]:
        return nearest(E4M3, top / np.float32(_FP4_MAX) / outer()).astype(np.int16)

    return _micro(t, 16, E4M3, 0x7E, outer, covering, range(-2, 6) if search == "mse" else range(1))


def _mxfp4(t: Tensor) -> QTensor:
    import numpy as np

    def covering(top: NDArray[np.float32]) -> NDArray[np.int16]:
        mantissa, exponent = np.frexp(top)  # in [1/2, 1): 7/8 is 7 of the scale 2^(exponent - 3)
        return np.where(top > 0, exponent - 3 + (mantissa > 7 / 8) + 127, 0).astype(np.int16)

    return _micro(t, 32, E8M0, 0xFE, lambda: np.float32(1), covering, range(2))


def _micro(
    t: Tensor,
    group: int,
    side: Grid,
    most: int,
    outer: Callable[[], np.float32],
    covering: Callable[[NDArray[np.float32]], NDArray[np.int16]],
    steps: range,
) -> QTensor:
    """E2M1 under scales of `side`, codes 0 .. most, times `outer`. covering: largest magnitudes of groups -> codes; steps: what is added to those
    to find the least squared error."""
    import numpy as np

    if t.shape[1] % group:
        raise undivided(t.origin, t.shape[1], group, "MXFP4" if side is E8M0 else "fp4")
    groups = t.shape[1] // group

    def compute(start: int, stop: int) -> dict[str, NDArray[Any]]:
        from lconvert.kernels.qtensor import grid_values

        x = _finite(t, start, stop).reshape(stop - start, groups, group)
        first = covering(np.abs(x).max(-1))
        least = np.full(first.shape, np.inf)
        codes, local = np.zeros(x.shape, np.uint8), np.zeros(first.shape, np.uint8)
        for step in steps:
            now = np.clip(first + step, 0, most).astype(np.uint8)
            scale = (grid_values(side, now) * outer())[..., None]
            found = nearest(E2M1, _over(x, np.broadcast_to(scale, x.shape)))
            if len(steps) == 1:
                codes, local = found, now
                break
            error = ((grid_values(E2M1, found) * scale - x).astype(np.float64) ** 2).sum(-1)
            better = error < least
            least, local = np.where(better, error, least), np.where(better, now, local)
            codes = np.where(better[..., None], found, codes)
        return {"codes": codes.reshape(stop - start, -1), "local": local}

    reader = parts(compute, t.shape[1])
    codes = Tensor(t.shape, "U8", reader("codes"), t.origin, t.files)
    local = Tensor((t.rows, groups), "U8", reader("local"), t.origin, t.files)
    one = Tensor((1, 1), "F32", lambda a, b: np.full((1, 1), outer())[a:b], t.origin, t.files)
    return QTensor(t.shape, codes, E2M1, (1, group), QTensor(local.shape, local, side, (-1, -1), one))


def _nf4(t: Tensor, group: int) -> QTensor:
    import numpy as np

    if group < 1 or t.shape[1] % group:
        raise undivided(t.origin, t.shape[1], group, "nf4")
    count = t.shape[1] // group

    def compute(start: int, stop: int) -> dict[str, NDArray[Any]]:
        x = _finite(t, start, stop).reshape(stop - start, count, group)
        scale = np.abs(x).max(-1)
        codes = nearest(NF4, _over(x, np.broadcast_to(scale[..., None], x.shape)))
        return {"codes": codes.reshape(stop - start, -1), "scale": scale}

    reader = parts(compute, t.shape[1])
    codes = Tensor(t.shape, "U8", reader("codes"), t.origin, t.files)
    scale = Tensor((t.rows, count), "F32", reader("scale"), t.origin, t.files)
    return QTensor(t.shape, codes, NF4, (1, group), scale)


def _doubled(q: QTensor) -> QTensor:
    """The same codes under scales that are quantized in their turn, once they are all known."""
    import numpy as np

    first = q.scale
    assert isinstance(first, Tensor)
    rows, count = first.shape
    lock, held = threading.Lock(), dict[str, Any]()

    def found() -> tuple[NDArray[np.float32], NDArray[np.float32], np.float32]:
        with lock:
            if not held:
                absmax = first.read(0, rows)
                held["all"] = (absmax, *doubled.statistics(absmax))
            out: tuple[NDArray[np.float32], NDArray[np.float32], np.float32] = held["all"]
            return out

    def codes(start: int, stop: int) -> NDArray[Any]:
        absmax, outer, offset = found()
        return doubled.codes(absmax[start:stop], outer[start:stop], offset)

    run = doubled.together(count)
    shape = (rows, count // run)
    outer = Tensor(shape, "F32", lambda a, b: found()[1][a:b, ::run], first.origin, first.files)
    minus = Tensor(
        shape, "F32", lambda a, b: np.full((b - a, shape[1]), -found()[2]), first.origin, first.files
    )
    coded = Tensor(first.shape, "U8", codes, first.origin, first.files)
    scale = QTensor(first.shape, coded, doubled.dynamic_map(), (1, run), outer, offset=minus)
    return replace(q, scale=scale)
