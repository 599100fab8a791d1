"""What the weights of a compressed model are, as one digest per entry: by them an artifact is proven against a model that nobody kept.

A method replaces weights, so no source says any more what an artifact must hold. The manifest does: execution puts the digests of
`wanted` there, taken from the model and not from what was written, and whoever reads the artifact back compares
(`validators/compressed.py`). They are of values and not of codes, so that they are the same for every target, however it packs.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from .ir import QTensor, Tensor
    from .plan import Item, Plan

#: Values that are decoded at a time.
_SLAB = 1 << 20
#: Stored types whose rounding to nearest is one function, by the names that formats have for them.
_SHORT = {"F16": "F16", "FLOAT16": "F16", "BF16": "BF16", "BFLOAT16": "BF16"}
#: How the files have an entry: with these values, or rounded in a way that only the source's values and the target's encoder tell.
Kind = Literal["held", "rounded"]


@dataclass(frozen=True)
class Values:
    """The numbers of one entry. shift: added to them, so that norms stored with different offsets are the same. short: F16 or BF16, to
    which they are rounded."""

    data: Tensor | QTensor
    shift: float = 0.0
    short: str = ""

    def digest(self) -> str:
        """sha256 of the values in fp32, row after row, little-endian; zeros have no sign."""
        import numpy as np

        from .kernels.qtensor import values

        rows = self.data.rows
        step = max(1, _SLAB * max(1, rows) // max(1, self.data.size))
        made = hashlib.sha256()
        for start in range(0, rows, step):
            found = _rounded(values(self.data, start, min(start + step, rows)), self.short)
            made.update(np.ascontiguousarray(found + np.float32(self.shift), "<f4").data)  # -0.0 + 0.0 is 0.0
        return made.hexdigest()


def _rounded(x: Any, short: str) -> Any:
    """fp32 values to nearest in a short type, ties to even."""
    import numpy as np

    if short == "F16":
        return x.astype(np.float16).astype(np.float32)
    if short == "BF16":
        bits = np.ascontiguousarray(x).view(np.uint32)
        return ((bits + 0x7FFF + (bits >> 16 & 1)) & 0xFFFF0000).view(np.float32)
    return x


def wanted(plan: Plan) -> Mapping[Kind, Mapping[str, Values]]:
    """The values whose digests a manifest keeps: of entries that the files hold as they are, or as floats rounded to nearest, and of
    those that the target has put on a grid."""
    items: dict[str, list[Item]] = {}
    for item in plan.items():
        for role in item.sources:
            items.setdefault(role, []).append(item)
    out: dict[Kind, dict[str, Values]] = {"held": {}, "rounded": {}}
    for role, values in plan.values.items():
        kind, found = _held(values, items.get(role, []))
        out[kind][role] = found
    return out


def _held(values: Values, items: list[Item]) -> tuple[Kind, Values]:
    from .ir import QTensor

    kinds = {item.verdict.kind for item in items}
    if isinstance(values.data, QTensor):
        kinds.discard("quantized")  # by a pass, which the verdict of its matrix speaks of
    if kinds <= {"exact", "widened"}:
        return "held", values
    types = {_SHORT.get(item.type) for item in items}
    if kinds <= {"exact", "widened", "rounded"} and len(types) == 1 and not values.shift:
        (short,) = types
        if short is not None and not any(item.held for item in items):
            return "held", replace(values, short=short)
    return "rounded", values
