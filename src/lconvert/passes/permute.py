"""Channels in the order of what their inputs amount to, folded into the weights: GPTQ's act-order for formats that have no g_idx.

    residual   the stream h -> h[p]: everything that reads it takes its columns in that order, everything that adds to it its rows; so do norms,
               embedding and positions. One order for all layers
    mlp        the hidden units of an MLP, or of an expert: rows of gate and up, columns of down

Channels come in falling order of their mean square (of the residual stream: relative to the mean of each reader's, summed over readers), so that a
group of columns holds inputs alike, and a sweep in the order of columns starts with those that count. Nothing is computed anew, so the weights are
the same numbers elsewhere. What heads attend to keeps its order: rotary embeddings pair its channels.
(Orders that follow the Hessian's diagonal: E. Frantar's GPTQ code, `act_order`; of groups, before anything is rounded: MR-GPTQ, arXiv 2509.23202.)
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from lconvert.errors import OptionError, UnsupportedError
from lconvert.ir import Decoder, Entry, Model, Transform, dense
from lconvert.primitives import importance, masks
from lconvert.primitives.folding import Change, changed, noted, plain
from lconvert.primitives.job import Job
from lconvert.primitives.sites import adding, attention_inputs, mlp_inputs, mlps
from lconvert.spec import NORMS, check

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from lconvert.primitives.folding import Linear

    Order = NDArray[np.int64]

#: The residual stream, among the names of MLPs.
RESIDUAL = "residual"


@dataclass(frozen=True)
class Options:
    """residual: order the residual stream; mlp: order the hidden units of each MLP."""

    residual: bool = True
    mlp: bool = True

    def __post_init__(self) -> None:
        if not (self.residual or self.mlp):
            raise OptionError("permute: neither residual nor mlp is asked for")


def run(model: Model, options: Options, job: Job = Job()) -> Model:  # noqa: B008 - immutable
    """The same function with its channels in another order."""
    import numpy as np

    if re.search(r"\d:\d", line := masks.said(model)):
        raise UnsupportedError(
            f"permute: leaves nothing of the model's pattern ({line}); permute first, prune then"
        )
    seen = importance.measure(model, job)
    squares = {role: m.squares.cpu().numpy() for role, m in seen.moments.items() if m.count}
    orders: dict[str, Order] = {}
    if options.residual:
        readers = [squares[r] for r in _readers(model.decoder) if r in squares]
        total = np.sum([s / max(float(s.mean()), 1e-30) for s in readers], axis=0)
        orders[RESIDUAL] = np.argsort(-total, kind="stable")
    if options.mlp:
        for part in mlps(model.decoder):
            if f"{part}.down" in squares:
                orders[part] = np.argsort(-squares[f"{part}.down"], kind="stable")
    out = ordered(model, orders)
    what = [n for n, on in (("the residual stream", options.residual), ("hidden units", options.mlp)) if on]
    report = (*out.report, *seen.notes, f"permute: {' and '.join(what)} by their mean squares")
    return check(replace(out, report=report))


def ordered(model: Model, orders: Mapping[str, Order]) -> Model:
    """The same function with the channels of the residual stream (RESIDUAL), or of MLPs by name (layers.0.mlp, layers.0.moe.experts.3), in the
    orders given: channel i is what channel order[i] was. UnsupportedError where codes or measured scales stand in the way."""
    columns: dict[str, list[Order]] = {}
    rows: dict[str, Order] = {}
    for where, order in orders.items():
        if where == RESIDUAL:
            reading = (
                *_readers(model.decoder),
                "embed",
                *(("pos_embed",) if "pos_embed" in model.entries else ()),
            )
            writing = (*adding(model.decoder), *_norms(model.decoder))
        else:
            reading, writing = (f"{where}.down",), (f"{where}.gate", f"{where}.up")
        for name in reading:
            columns.setdefault(name, []).append(order)
        for name in (*writing, *(f"{a}.bias" for a in writing)):
            if name in model.entries:
                rows[name] = order
    new = {
        name: _moved(model, name, columns.get(name, []), rows.get(name))
        for name in dict.fromkeys((*columns, *rows))
    }
    transforms = [Transform("permute", where, dense(_indices(order))) for where, order in orders.items()]
    return replace(model.with_entries(new), transforms=(*model.transforms, *transforms))


def _readers(d: Decoder) -> list[str]:
    """Matrices that read the residual stream, through a norm or not."""
    out = [
        f"layers.{i}.{role}"
        for i, layer in d.each()
        for role in (*attention_inputs(layer.attention), *mlp_inputs(layer))
    ]
    return out if d.tied else [*out, "head"]


def _norms(d: Decoder) -> list[str]:
    """Norms of the residual stream, and of what is added to it."""
    return [*(f"layers.{i}.{norm}" for i, layer in d.each() for norm in NORMS[layer.block]), "norm"]


def _moved(model: Model, name: str, columns: list[Order], rows: Order | None) -> Entry:
    entry = model.entries[name]
    if entry.transform is not None:
        raise UnsupportedError(
            f"{name}: its input is scaled channel by channel at run time; fold the scale before channels move"
        )
    data = plain(model, name, "put in another order")
    change = Change(
        tuple(map(_taken, columns)),
        None,
        None if rows is None else _taken(rows),
        1 if rows is None else len(rows),
    )
    return noted(entry, changed(data, change), "permute")


def _taken(order: Order) -> Linear:
    return lambda x: x[..., order]


def _indices(order: Order) -> Any:
    import numpy as np

    return order.astype(np.float32)  # exact up to 2^24 channels
