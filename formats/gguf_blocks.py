"""GGUF block types as QTensors: raising stored blocks to codes and scales, and packing them back.

`SCHEMES` says for each block type which grid its codes are on and how its scales are stored. Raising and packing
are lossless: the packed bytes of an unchanged QTensor are the bytes it came from.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lconvert import kernels
from lconvert.ir import E2M1, E8M0, UE4M3, Grid, QTensor, Tensor, as_f32, int_grid, parts
from lconvert.kernels.blocks import BLOCKS
from lconvert.kernels.reference.iq import SCALE_VALUES, SUB, VALUES
from lconvert.kernels.reference.iq4 import VALUES as IQ4_LEVELS

Rows = NDArray[Any]


@dataclass(frozen=True)
class Scheme:
    """Codes on `grid`, one scale per `sub` elements. `scale` and `offset` are grids of stored sub-scales (with
    one F16 super-scale per `super` elements), or None for a plain F16 value per sub-block. A zero is a plain F16
    value per sub-block (IQ1: its shift)."""

    grid: Grid
    sub: int
    super: int = 0
    scale: Grid | None = None
    offset: Grid | None = None
    has_offset: bool = False
    has_zero: bool = False


def _scheme_table() -> dict[str, Scheme]:
    u4, u6 = int_grid(4, False), int_grid(6, False)
    levels = tuple(map(float, IQ4_LEVELS))
    table = {
        "Q4_0": Scheme(int_grid(4, True), 32),
        "Q4_1": Scheme(u4, 32, has_offset=True),
        "Q5_0": Scheme(int_grid(5, True), 32),
        "Q5_1": Scheme(int_grid(5, False), 32, has_offset=True),
        "Q8_0": Scheme(int_grid(8, True), 32),
        "Q2_K": Scheme(int_grid(2, False), 16, 256, u4, u4, has_offset=True),
        "Q3_K": Scheme(int_grid(3, True), 16, 256, int_grid(6, True)),
        "Q4_K": Scheme(u4, 32, 256, u6, u6, has_offset=True),
        "Q5_K": Scheme(int_grid(5, False), 32, 256, u6, u6, has_offset=True),
        "Q6_K": Scheme(int_grid(6, True), 16, 256, int_grid(8, True)),
        "IQ4_NL": Scheme(Grid("codebook", 4, values=levels), 32),
        "IQ4_XS": Scheme(Grid("codebook", 4, values=levels), 32, 256, int_grid(6, True)),
        "TQ1_0": Scheme(Grid("codebook", 2, values=(-1.0, 0.0, 1.0)), 256),
        "TQ2_0": Scheme(Grid("codebook", 2, values=(-1.0, 0.0, 1.0, 2.0)), 256),
        "MXFP4": Scheme(E2M1, 32, scale=E8M0),
        "NVFP4": Scheme(E2M1, 16, scale=UE4M3),
    }
    return table | {type_: _lattice_scheme(type_) for type_ in VALUES}


def _lattice_scheme(type_: str) -> Scheme:
    values, scales = VALUES[type_], SCALE_VALUES[type_]
    grid = Grid("codebook", (len(values) - 1).bit_length(), values=values, lattice=type_)
    scale = Grid("codebook", (len(scales) - 1).bit_length(), values=scales)
    return Scheme(grid, SUB[type_], 256, scale, has_zero=type_.startswith("IQ1"))


SCHEMES: dict[str, Scheme] = _scheme_table()


def raised(type_: str, raw: Tensor) -> QTensor:
    """The QTensor of stored blocks; `raw` holds uint8 rows (rows, row_bytes)."""
    scheme = SCHEMES[type_]
    block = BLOCKS[type_]
    rows = raw.shape[0]
    cols = raw.shape[1] // block.nbytes * block.elems
    reader = parts(lambda start, stop: kernels.unpack(type_, raw.read(start, stop)))

    def part(name: str, width: int, dtype: str) -> Tensor:
        return Tensor((rows, width), dtype, reader(name), raw.origin, raw.files)  # type: ignore[arg-type]

    def side(name: str, grid: Grid | None) -> Tensor | QTensor:
        n = cols // scheme.sub
        if grid is None:
            return part(name, n, "F16")
        codes = part(name, n, "I8" if grid.signed else "U8")
        if scheme.super:
            outer: Tensor = part("super_" + name, cols // scheme.super, "F16")
            return QTensor((rows, n), codes, grid, (1, scheme.super // scheme.sub), outer)
        return QTensor((rows, n), codes, grid, (-1, -1), one(raw))

    codes = part("codes", cols, "I8" if scheme.grid.signed and scheme.grid.kind == "int" else "U8")
    offset = side("offset", scheme.offset) if scheme.has_offset else None
    zero = part("zero", cols // scheme.sub, "F16") if scheme.has_zero else None
    return QTensor(
        (rows, cols), codes, scheme.grid, (1, scheme.sub), side("scale", scheme.scale), zero, offset
    )


def one(like: Tensor) -> Tensor:
    """The global scale 1.0 of a format that has none."""
    return Tensor((1, 1), "F32", lambda a, b: np.ones((1, 1), np.float32)[a:b], like.origin, like.files)


def _same_scheme(q: QTensor, s: Scheme) -> bool:
    """Structure only: grid, block and the levels of scales."""

    def side(value: Tensor | QTensor | None, grid: Grid | None) -> bool:
        if grid is None or value is None:
            return isinstance(value, Tensor)
        if not isinstance(value, QTensor) or value.grid != grid or not isinstance(value.scale, Tensor):
            return False
        return value.block == ((1, s.super // s.sub) if s.super else (-1, -1))

    return (
        q.grid == s.grid
        and q.block == (1, s.sub)
        and q.g_idx is None
        and side(q.scale, s.scale)
        and ((q.offset is None) if not s.has_offset else side(q.offset, s.offset))
        and (q.zero is not None) == s.has_zero
        and q.mask is None
        and not q.outliers
        and q.low_rank is None
    )


def native_type(q: QTensor) -> str | None:
    """The block type whose structure this QTensor has, if any; values of its scales are not looked at."""
    found = [t for t, s in SCHEMES.items() if _same_scheme(q, s) and q.shape[-1] % BLOCKS[t].elems == 0]
    return found[0] if found else None


def _f16(value: Tensor, start: int, stop: int, origin: str) -> Rows:
    x = value.read(start, stop)
    if value.dtype == "F16":
        return x
    wide = as_f32(x, value.dtype)
    half = wide.astype(np.float16)
    if not np.array_equal(half.astype(np.float32), wide):
        raise AssertionError(f"{origin}: the plan promised scales that fit F16")
    return half


def packer(type_: str, q: QTensor) -> Callable[[int, int], Rows]:
    """Rows start..stop of a QTensor of this type's structure as stored blocks (rows, row_bytes)."""
    s = SCHEMES[type_]

    def pack(start: int, stop: int) -> Rows:
        found: dict[str, Rows] = {"codes": q.codes.read(start, stop)}

        def side(name: str, value: Tensor | QTensor | None) -> None:
            if isinstance(value, QTensor):
                found[name] = value.codes.read(start, stop)
                if s.super and isinstance(value.scale, Tensor):
                    found["super_" + name] = _f16(value.scale, start, stop, q.origin)
            elif value is not None:
                found[name] = _f16(value, start, stop, q.origin)

        side("scale", q.scale)
        side("offset", q.offset)
        side("zero", q.zero)
        return kernels.pack(type_, found)

    return pack
