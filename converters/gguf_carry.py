"""Carrying QTensors into GGUF block types without rounding, or saying why not.

`exact_type` names the block type that holds a QTensor's codes and scales; `lower` makes the producer and the
verdict for a chosen type. Codes and side values are compared before they are multiplied. Repacking commutes with
row order, so rotary permutation and fusion act on packed rows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lconvert.converters import regrid
from lconvert.converters.gguf_names import Stored, interleave, transposed, transposed_codes
from lconvert.formats.gguf_blocks import native_type, packer
from lconvert.ir import E4M3, UE4M3, QTensor, Tensor, as_f32, concat_rows, int_grid, row_blocks
from lconvert.ir import dense as array
from lconvert.kernels.blocks import BLOCKS
from lconvert.kernels.qtensor import values
from lconvert.plan import Verdict


@dataclass(frozen=True)
class Carried:
    """A QTensor in the structure of block type `type`; `global_scale` is stored beside it (NVFP4)."""

    type: str
    tensor: QTensor
    verdict: Verdict
    global_scale: float = 1.0


def _f16_exact(x: NDArray[np.float32]) -> bool:
    with np.errstate(over="ignore"):
        return bool(np.array_equal(x.astype(np.float16).astype(np.float32), x))


def _side(t: Tensor) -> NDArray[np.float32]:
    x = t.load()
    return x.astype(np.float32) if t.dtype[0] in "IU" else as_f32(x, t.dtype)


Rows = Callable[[int, int], NDArray[np.float32]]


def _rows(side: Tensor) -> Rows:
    """Rows of a side tensor in fp32, read when they are asked for: a plan must not keep them."""

    def read(start: int, stop: int) -> NDArray[np.float32]:
        x = side.read(start, stop)
        return x.astype(np.float32) if side.dtype[0] in "IU" else as_f32(x, side.dtype)

    return read


def _repeated(rows: Rows, times: int, like: QTensor) -> Tensor:
    """Values per group, which F16 holds, as one per 32 columns."""

    def read(start: int, stop: int) -> NDArray[Any]:
        return np.repeat(rows(start, stop).astype(np.float16), times, axis=1)

    return Tensor((like.shape[0], like.shape[1] // 32), "F16", read, like.origin, like.files)


def _recoded(q: QTensor) -> Tensor:
    """The codes minus their zero points; q has blocks of one row."""
    group = q.block[1] if q.block[1] != -1 else q.shape[1]
    zero = None if q.zero is None else _rows(q.zero)

    def read(start: int, stop: int) -> NDArray[Any]:
        codes = q.codes.read(start, stop).astype(np.int16)
        if zero is not None:
            codes = codes - np.repeat(zero(start, stop), group, axis=1)[:, : q.shape[1]].astype(np.int16)
        return codes.astype(np.int8)

    return Tensor(q.shape, "I8", read, q.codes.origin, q.codes.files)


#: Symmetric block types of 32, narrowest first: (type, smallest code, largest code, bits).
_SYMMETRIC = (("Q4_0", -8, 7, 4), ("Q5_0", -16, 15, 5), ("Q8_0", -128, 127, 8))


def _portable(q: QTensor, wanted: str = "") -> Carried | None:
    """Integer codes with one plain scale per group along the input dimension, in the narrowest type or the one `wanted`."""
    g = q.grid
    plain = q.g_idx is None and q.mask is None and not q.outliers and q.low_rank is None and q.offset is None
    if g.kind != "int" or g.bits > 8 or not plain or len(q.shape) != 2 or not isinstance(q.scale, Tensor):
        return None
    cols = q.shape[1]
    group = cols if q.block[1] == -1 else q.block[1]
    if q.block[0] not in (1, -1) or group % 32 or cols % group:
        return None
    scale = _side(q.scale)
    if not _f16_exact(scale):
        return None
    zero = None if q.zero is None else _side(q.zero)
    if zero is not None and not np.array_equal(zero, np.rint(zero)):
        return None
    low, high = (-(1 << (g.bits - 1)), (1 << (g.bits - 1)) - 1) if g.signed else (0, (1 << g.bits) - 1)
    least = low - (0 if zero is None else int(zero.max()))
    most = high - (0 if zero is None else int(zero.min()))
    times = group // 32
    flat = row_blocks(q)
    assert isinstance(flat.scale, Tensor)
    scales = _rows(flat.scale)

    def carried(type_: str, bits: int, codes: Tensor, offset: Tensor | None, signed: bool) -> Carried:
        same = bits == g.bits and times == 1
        grid = int_grid(bits, signed)
        tensor = QTensor(q.shape, codes, grid, (1, 32), _repeated(scales, times, q), offset=offset)
        return Carried(type_, tensor, Verdict("exact" if same else "widened"))

    if least >= -8 and most <= 7 and wanted in ("", "Q4_0"):
        return carried("Q4_0", 4, _recoded(flat), None, True)
    if zero is not None and not g.signed and g.bits <= 4 and wanted in ("", "Q4_1"):
        minimum = (scale * zero).astype(np.float32)  # a product of two short numbers: exact in fp32
        if _f16_exact(minimum):
            assert flat.zero is not None
            zeros = _rows(flat.zero)
            return carried(
                "Q4_1", 4, q.codes, _repeated(lambda a, b: scales(a, b) * zeros(a, b), times, q), False
            )
    for type_, lowest, highest, bits in _SYMMETRIC:
        if least >= lowest and most <= highest and wanted in ("", type_):
            return carried(type_, bits, _recoded(flat), None, True)
    return None


def carry_as(q: QTensor, type_: str) -> Carried | None:
    """The codes of `q` in the block type that was asked for: exactly, or with scales rounded to F16; None where they do not fit."""
    if (found := carry(q)) is not None and found.type == type_:
        return found
    whole = regrid.integers(q)
    if whole is None or not isinstance(whole.scale, Tensor):
        return None
    if (wider := _portable(whole, type_)) is not None:
        return Carried(type_, wider.tensor, Verdict("widened"))
    value = regrid.numbers(whole.scale)
    half = regrid.nearest(value, "F16")
    if not np.isfinite(half).all():
        return None
    found = _portable(replace(whole, scale=array(half)), type_)
    if found is None:
        return None
    change = half.astype(np.float64) - value
    error = float(np.sqrt(np.square(change).sum() / max(np.square(value, dtype=np.float64).sum(), 1e-300)))
    return Carried(type_, found.tensor, Verdict("rounded", f"scales from {whole.scale.dtype} to F16", error))


def _nvfp4(q: QTensor) -> Carried | None:
    """NVFP4 with a global scale: the scale goes into a tensor of its own beside the blocks, as a multiplier."""
    verdict, s = Verdict("exact"), q.scale
    if isinstance(s, QTensor) and s.divisor and isinstance(s.scale, Tensor):
        divisor = _side(s.scale)
        with np.errstate(all="ignore"):
            inverse = np.float32(1) / divisor
            error = np.abs(inverse.astype(np.float64) * divisor - 1)
        if not np.isfinite(inverse).all():
            return None
        if error.any():
            reason = "the reciprocal of a global scale, which fp32 rounds"
            verdict = Verdict("rounded", reason, float(error.max()))
        q = replace(q, scale=(s := replace(s, scale=array(inverse), divisor=False)))
    if not isinstance(s, QTensor) or s.block != (-1, -1) or s.grid not in (E4M3, UE4M3):
        return None
    if not isinstance(s.scale, Tensor) or q.block != (1, 16) or q.zero is not None or q.offset is not None:
        return None
    codes = s.codes.load()
    if (codes & 0x80).any():
        return None  # GGUF's sub-scales have no sign
    unsigned = replace(q, scale=replace(s, grid=UE4M3))
    if native_type(unsigned) != "NVFP4":
        return None
    return Carried("NVFP4", unsigned, verdict, float(_side(s.scale).reshape(-1)[0]))


def carry(q: QTensor) -> Carried | None:
    """How GGUF holds these numbers, or None: exactly, but for the reciprocal of NVFP4's global scale."""
    if (found := _nvfp4(q)) is not None:
        return found
    multiplied = regrid.multiplied(q)  # block types have no divisors
    if multiplied is None:
        return None
    if (type_ := native_type(multiplied)) is not None and _scales_fit(multiplied):
        return Carried(type_, multiplied, Verdict("exact"))
    return _portable(multiplied)


def _scales_fit(q: QTensor) -> bool:
    """Plain scales that are not F16 in the source must be representable in it; one for the whole tensor has no place."""

    def fits(side: Tensor | QTensor | None) -> bool:
        if isinstance(side, QTensor):
            if side.block == (-1, -1):
                return isinstance(side.scale, Tensor) and bool((_side(side.scale) == 1).all())
            return fits(side.scale)
        return side is None or side.dtype == "F16" or _f16_exact(_side(side))

    return all(fits(s) for s in (q.scale, q.zero, q.offset))


def exact_type(q: QTensor) -> str | None:
    found = carry(q)
    return found.type if found else None


def oriented(stored: Stored, data: Sequence[Tensor | QTensor]) -> list[Tensor | QTensor]:
    """The parts of a stored tensor, transposed where the file has them so; none where blocks forbid it.

    Groups along the input dimension lie across the rows of the transposed matrix, where no block type has them.
    """
    if not stored.turned:
        return list(data)
    found = [
        transposed(x, stored.turned) if isinstance(x, Tensor) else transposed_codes(x, stored.turned)
        for x in data
    ]
    return [x for x in found if x is not None]


def dense(parts: Sequence[Tensor | QTensor]) -> tuple[Tensor, ...]:
    """Entries as dense rows of one dtype: their own if they share it, else fp32."""
    if len({p.dtype if isinstance(p, Tensor) else "" for p in parts}) == 1 and isinstance(parts[0], Tensor):
        return tuple(p for p in parts if isinstance(p, Tensor))
    return tuple(
        Tensor(p.shape, "F32", partial(values, p), p.origin, p.files)
        if isinstance(p, QTensor) or p.dtype != "F32"
        else p
        for p in parts
    )


def lower(
    stored: Stored, data: Sequence[Tensor | QTensor], type_: str
) -> tuple[Verdict, Tensor, tuple[float, ...]] | None:
    """Packed rows of a stored tensor whose parts' codes `type_` holds (`carry_as`), or None.

    Returns the verdict, the packed rows as a U8 Tensor, and the global scale of every part.
    """
    parts, verdicts, scales = [], [], []
    if not data:
        return None
    for q in data:
        found = carry_as(q, type_) if isinstance(q, QTensor) else None
        if found is None:
            return None
        pack = packer(type_, found.tensor)
        row_bytes = BLOCKS[type_].row_bytes(q.shape[1])
        packed = Tensor((q.shape[0], row_bytes), "U8", pack, q.origin, q.files)
        parts.append(interleave(packed, stored.head_dim) if stored.head_dim else packed)
        verdicts.append(found.verdict)
        scales.append(found.global_scale)
    worst = max(verdicts, key=lambda v: ("exact", "widened", "rounded").index(v.kind))
    return worst, concat_rows(tuple(parts)), tuple(scales)
