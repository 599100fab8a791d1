"""Carrying QTensors into GGUF block types without rounding, or saying why not.

`exact_type` names the block type that holds a QTensor's codes and scales; `lower` makes the producer and the
verdict for a chosen type. Codes and side values are compared before they are multiplied. Repacking commutes with
row order, so rotary permutation and fusion act on packed rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lconvert.converters import regrid
from lconvert.converters.gguf_names import GgufTensor, interleave, transposed, transposed_codes
from lconvert.formats.gguf_blocks import native_type, packer
from lconvert.ir import E4M3, UE4M3, QTensor, Tensor, as_f32, concat_rows, int_grid
from lconvert.ir import dense as array
from lconvert.kernels.blocks import BLOCKS
from lconvert.kernels.qtensor import values
from lconvert.plan import Verdict, worst


@dataclass(frozen=True)
class Carried:
    """A QTensor in the structure of block type `type`; `global_scale` is stored beside it (NVFP4)."""

    type: str
    tensor: QTensor
    verdict: Verdict
    global_scale: float = 1.0


#: Block types of 32 with signed codes, narrowest first, and their widths.
_SYMMETRIC = {"Q4_0": 4, "Q5_0": 5, "Q8_0": 8}


def _portable(q: QTensor, wanted: str = "") -> Carried | None:
    """Integer codes with one plain scale per group along the input dimension, in the narrowest type or the one `wanted`."""
    if (
        q.grid.kind != "int"
        or q.block[0] not in (1, -1)
        or q.offset is not None
        or not isinstance(q.scale, Tensor)
    ):
        return None
    whole = regrid.integers(q)
    fine = None if whole is None else regrid.regrouped(whole, 32)
    if fine is None or not regrid.holds(q.scale, "F16"):
        return None
    group, span = q.shape[1] if q.block[1] == -1 else q.block[1], regrid.span(fine)

    def held(type_: str, form: QTensor) -> Carried:
        same = form.grid.bits == q.grid.bits and group == 32
        return Carried(type_, form, Verdict("exact" if same else "widened"))

    for type_, bits in _SYMMETRIC.items():
        if wanted in ("", type_) and regrid.in_bits(span, bits):
            return held(type_, regrid.signed(fine, bits))
        if type_ == "Q4_0" and wanted in ("", "Q4_1") and (shifted := _with_minimum(fine)) is not None:
            return held("Q4_1", shifted)
    return None


def _with_minimum(q: QTensor) -> QTensor | None:
    """Four bits with zero points as codes and a minimum, zero * scale, where F16 holds them all."""
    if q.zero is None or q.grid.signed or q.grid.bits > 4 or not isinstance(q.scale, Tensor):
        return None
    scale, zero = q.scale, q.zero

    def minimum(start: int, stop: int) -> NDArray[Any]:
        rows = as_f32(scale.read(start, stop), scale.dtype), as_f32(zero.read(start, stop), zero.dtype)
        return rows[0] * rows[1]  # a product of two short numbers: exact in fp32

    offset = Tensor(scale.shape, "F32", minimum, scale.origin, scale.files)
    return (
        replace(q, grid=int_grid(4, False), zero=None, offset=offset) if regrid.holds(offset, "F16") else None
    )


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
        divisor = regrid.numbers(s.scale)
        turned = regrid.inverse(divisor)
        if turned is None:
            return None
        if not turned.exact:
            error = np.abs(turned.values.astype(np.float64) * divisor - 1)
            reason = "the reciprocal of a global scale, which fp32 rounds"
            verdict = Verdict("rounded", reason, float(error.max()))
        q = replace(q, scale=(s := replace(s, scale=array(turned.values), divisor=False)))
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
    return Carried("NVFP4", unsigned, verdict, float(regrid.numbers(s.scale).reshape(-1)[0]))


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
                return isinstance(side.scale, Tensor) and bool((regrid.numbers(side.scale) == 1).all())
            return fits(side.scale)
        return side is None or regrid.holds(side, "F16")

    return all(fits(s) for s in (q.scale, q.zero, q.offset))


def exact_type(q: QTensor) -> str | None:
    found = carry(q)
    return found.type if found else None


def oriented(stored: GgufTensor, data: Sequence[Tensor | QTensor]) -> list[Tensor | QTensor]:
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
    stored: GgufTensor, data: Sequence[Tensor | QTensor], type_: str
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
    return worst(verdicts), concat_rows(tuple(parts)), tuple(scales)
