"""What rounding cost the weights of a graph: verdicts of matrices that passes quantized on the way, measured against the model before."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from lconvert.ir import Entry, Model, QTensor, Tensor
from lconvert.kernels.qtensor import values
from lconvert.kernels.rounding import squares
from lconvert.plan import SIDE, Item, Slab, Verdict

#: Values at a time: what a second-level cache holds.
_VALUES = 1 << 18


def measured(item: Item, model: Model, original: Model | None) -> Item:
    """The item with the verdict "quantized", and the error of its matrix with the first rows that are made of it."""
    if original is None or len(item.sources) != 1 or item.held == SIDE:
        return item
    role = "embed" if item.sources[0] == "head" and "head" not in model.entries else item.sources[0]
    entry, before = model.entries.get(role), original.entries.get(role)
    if (
        entry is None
        or before is None
        or not isinstance(entry.data, QTensor)
        or not isinstance(before.data, Tensor)
    ):
        return item
    plain = before.data
    return replace(item, verdict=Verdict("quantized"), produce=_with_error(item, entry, plain))


def _with_error(item: Item, entry: Entry, plain: Tensor) -> Callable[[int, int], Slab]:
    def produce(start: int, stop: int) -> Slab:
        slab = item.produce(start, stop)
        if start:
            return slab
        error = norm = 0.0
        step = max(1, _VALUES // max(1, plain.shape[-1]))
        for a in range(0, plain.rows, step):
            b = min(a + step, plain.rows)
            e, n = squares(plain.read(a, b).reshape(b - a, -1), values(entry.data, a, b).reshape(b - a, -1))
            error, norm = error + e, norm + n
        return Slab(slab.data, error, norm)

    return produce
