"""What the weights of a compressed model are, as one digest per entry: by them an artifact is proven against a model that nobody kept.

A method replaces weights, so no source says any more what an artifact must hold. The manifest does: `noted` puts there the digest of
every entry's values, taken from the model and not from what was written, and whoever reads the artifact back compares
(`validators/compressed.py`). It is of values and not of codes, so that it is the same for every target that holds them, however packed.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .ir import QTensor, Tensor
    from .plan import Plan

#: Values that are decoded at a time.
_SLAB = 1 << 20


@dataclass(frozen=True)
class Values:
    """The numbers of one entry. shift: added to them, so that norms that are stored with another offset are the same."""

    data: Tensor | QTensor
    shift: float = 0.0

    def digest(self) -> str:
        """sha256 of the values in fp32, row after row, little-endian; zeros have no sign."""
        import numpy as np

        from .kernels.qtensor import values

        rows = self.data.rows
        step = max(1, _SLAB * max(1, rows) // max(1, self.data.size))
        made = hashlib.sha256()
        for start in range(0, rows, step):
            found = values(self.data, start, min(start + step, rows))
            made.update(np.ascontiguousarray(found + np.float32(self.shift), "<f4"))  # -0.0 + 0.0 is 0.0
        return made.hexdigest()


def held(plan: Plan) -> frozenset[str]:
    """The entries whose values the plan's files hold as they are: those that no verdict says are rounded."""
    rounded = {
        role
        for item in plan.items()
        for role in item.sources
        if item.verdict.kind in ("rounded", "requantized", "refused")
        or (item.verdict.kind == "quantized" and not _by_a_pass(plan, role))
    }
    return frozenset(plan.values.keys() - rounded)


def _by_a_pass(plan: Plan, role: str) -> bool:
    """Whether an entry was rounded before it was planned, so that "quantized" speaks of the model before passes."""
    from .ir import QTensor

    return role in plan.values and isinstance(plan.values[role].data, QTensor)


def noted(plan: Plan, digests: Mapping[str, str]) -> dict[str, dict[str, str]]:
    """For the manifest: digests of what the files hold, and of what the target rounded once more."""
    same = held(plan)
    return {
        "held": {role: d for role, d in digests.items() if role in same},
        "rounded": {role: d for role, d in digests.items() if role not in same},
    }
