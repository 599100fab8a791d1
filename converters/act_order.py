"""Act-order (GPTQ's desc_act): groups that are not contiguous along the input, told by g_idx.

Few runtimes hold a g_idx any more, and none may ignore it. Where the inputs of a matrix are the outputs of another that
nothing else reads, both can be permuted: the inputs of down_proj are the rows of gate_proj and up_proj. Sorting them by group
makes the groups contiguous and the model computes the same. The inputs of q, k, v, gate and up are the residual
stream, which everything shares, and those of o_proj are tied to heads: there it stays.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lconvert.formats.kept import Kept
from lconvert.formats.scheme import view
from lconvert.ir import Entry, Mlp, Model, QTensor, Tensor, row_blocks


def order(q: QTensor) -> NDArray[np.int64] | None:
    """The order of columns that makes the groups of a QTensor with g_idx contiguous, None if they are not of one size."""
    assert q.g_idx is not None
    g_idx = q.g_idx.load().astype(np.int64)
    size = q.shape[1] if q.block[1] == -1 else q.block[1]
    found = np.argsort(g_idx, kind="stable")
    return found if np.array_equal(g_idx[found], np.arange(q.shape[1]) // size) else None


#: The last tensor that was permuted by rows: its slabs take rows from everywhere.
_WHOLE = Kept(1)


def _rows(t: Tensor, by: NDArray[np.int64]) -> Tensor:
    def read(start: int, stop: int) -> NDArray[Any]:
        return _WHOLE.get((t.read, t.shape), lambda: t.read(0, t.rows))[by[start:stop]]

    return replace(t, read=read)


def permuted_rows(data: Tensor | QTensor, by: NDArray[np.int64]) -> Tensor | QTensor:
    """Rows in the order `by`: row i of the result is row by[i]."""
    if isinstance(data, Tensor):
        return _rows(data, by)
    q = row_blocks(data) if data.block[0] != -1 else data
    if q.block[0] == -1:
        return replace(q, codes=_rows(q.codes, by))

    def move(side: Any) -> Any:
        return permuted_rows(side, by)

    sides = {k: move(v) for k in ("scale", "zero", "offset") if (v := getattr(q, k)) is not None}
    return replace(q, codes=_rows(q.codes, by), **sides)


def contiguous(q: QTensor, by: NDArray[np.int64]) -> QTensor:
    """Columns in the order `by`, in which every group is contiguous."""
    codes = view(
        q.codes, q.shape, q.codes.dtype, lambda a, b: np.ascontiguousarray(q.codes.read(a, b)[:, by])
    )
    return replace(q, codes=codes, g_idx=None)


def absorb(model: Model) -> tuple[Model, list[str]]:
    """The same function with every g_idx absorbed that the graph allows, and what was done."""
    new: dict[str, Entry] = {}
    done = 0
    for i, layer in model.decoder.each():
        if not isinstance(layer.mlp, Mlp):
            prefixes = [f"layers.{i}.moe.experts.{e}" for e in range(layer.mlp.experts)]
            prefixes.append(f"layers.{i}.moe.shared")
        else:
            prefixes = [f"layers.{i}.mlp"]
        for prefix in prefixes:
            down = model.entries.get(prefix + ".down")
            if (
                down is None
                or not isinstance(down.data, QTensor)
                or down.data.g_idx is None
                or down.transform
            ):
                continue
            by = order(down.data)
            if by is None:
                continue
            note = "columns sorted by group (act-order absorbed)"
            new[down.name] = replace(
                down, data=contiguous(down.data, by), provenance=(*down.provenance, note)
            )
            for kind in (".gate", ".up", ".gate.bias", ".up.bias"):
                entry = model.entries.get(prefix + kind)
                if entry is not None:
                    moved = permuted_rows(entry.data, by)
                    new[entry.name] = replace(
                        entry, data=moved, provenance=(*entry.provenance, "rows permuted with down_proj")
                    )
            done += 1
    if not done:
        return model, []
    said = (
        f"act-order of {done} down_proj absorbed: its columns and the rows of gate and up are permuted alike"
    )
    return model.with_entries(new), [said]
