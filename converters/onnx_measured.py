"""What rounding cost the weights of a graph: verdicts of matrices that passes quantized on the way, measured against the model before.

Codes that a pass computes are measured as they are read, slab by slab: the pass keeps its last slab, so scales cost nothing more.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from math import prod
from typing import Any

from lconvert.converters.onnx_arrays import slabs
from lconvert.ir import Entry, Model, QTensor, Tensor
from lconvert.kernels.qtensor import values
from lconvert.kernels.rounding import squares
from lconvert.plan import SIDE, Item, Slab, Verdict, worst


class Errors:
    """Squared errors and norms of a rounded matrix by ranges of rows, noted when its codes are read."""

    def __init__(self, data: QTensor, plain: Tensor) -> None:
        self.data, self.plain = data, plain
        self._sums: dict[tuple[int, int], tuple[float, float]] = {}
        sides = (data.scale, data.zero, data.offset)
        self._sliced = data.block[0] == 1 and not any(isinstance(s, QTensor) for s in sides)

    def codes(self, start: int, stop: int) -> Any:
        """Rows of the codes; their errors are noted."""
        found = self.data.codes.read(start, stop)
        if self._sliced and any(key not in self._sums for key in self._pieces(start, stop)):
            held = _held(self.data, found, start, stop)
            for a, b in self._pieces(start, stop):
                self._sums[a, b] = self._measured(held, a, b)
        return found

    def of(self, start: int, stop: int) -> tuple[float, float]:
        """Sums of (x - y)^2 and x^2 over rows; read again where they were read in other pieces."""
        error = norm = 0.0
        for a, b in self._pieces(start, stop):
            e, n = self._sums.get((a, b)) or self._measured(self.data, a, b)
            error, norm = error + e, norm + n
        return error, norm

    def _pieces(self, start: int, stop: int) -> Iterator[tuple[int, int]]:
        return slabs(start, stop, prod(self.data.shape[1:]))

    def _measured(self, data: QTensor, start: int, stop: int) -> tuple[float, float]:
        rows = stop - start
        x = self.plain.read(start, stop).reshape(rows, -1)
        return squares(x, values(data, start, stop).reshape(rows, -1))


def _held(q: QTensor, codes: Any, start: int, stop: int) -> QTensor:
    """The rows start..stop of q in memory, under their own numbers."""

    def side(t: Any) -> Any:
        if t is None:
            return None
        array = t.read(start, stop)
        return replace(t, read=lambda a, b: array[a - start : b - start])

    read: Callable[[int, int], Any] = lambda a, b: codes[a - start : b - start]
    return replace(
        q,
        codes=replace(q.codes, read=read),
        scale=side(q.scale),
        zero=side(q.zero),
        offset=side(q.offset),
    )


def watched(model: Model, original: Model | None) -> tuple[Model, Mapping[str, Errors]]:
    """The model with every matrix that a pass has quantized noting its errors, and these."""
    errors: dict[str, Errors] = {}
    new: dict[str, Entry] = {}
    for role, entry in model.entries.items():
        before = None if original is None else original.entries.get(role)
        if before is None or not isinstance(entry.data, QTensor) or not isinstance(before.data, Tensor):
            continue
        made = errors[role] = Errors(entry.data, before.data)
        codes = replace(entry.data.codes, read=made.codes)
        new[role] = replace(entry, data=replace(entry.data, codes=codes))
    return replace(model, entries={**model.entries, **new}), errors


def measured(item: Item, errors: Mapping[str, Errors], whole: bool) -> Item:
    """The item with the verdict "quantized", and the errors of its matrix with the rows that are made of it; whole: with the first."""
    if len(item.sources) != 1 or item.held == SIDE:
        return item
    role = item.sources[0]
    found = errors.get("embed" if role == "head" and "head" not in errors else role)
    if found is None:
        return item
    rows = found.data.shape[0]
    along = not whole and item.rows == rows

    def produce(start: int, stop: int) -> Slab:
        slab = item.produce(start, stop)
        if start and not along:
            return slab
        return Slab(slab.data, *found.of(*((start, stop) if along else (0, rows))))

    return replace(item, verdict=worst((item.verdict, Verdict("quantized"))), produce=produce)
