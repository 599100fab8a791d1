"""Folding an unfolded scale of inputs (ModelOpt's pre_quant_scale) into what produces those inputs.

A target without such a scale can hold the same function if the scale moves: y = W (x * p) with x = norm(h) * n has
the norm n * p; with x the rows of another matrix (up_proj before down_proj, v_proj before o_proj where every query head of a
group agrees) that matrix takes p. Where that is possible is said in primitives/sites.py; what was cached with a scale measured on it
stays as it is. A product that its new home cannot represent is rounded, and the verdict says so.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
from numpy.typing import NDArray

from lconvert.ir import Entry, Model, Tensor, as_f32, dense, row_blocks
from lconvert.kernels.qtensor import effective, values
from lconvert.primitives.sites import Site, cached, sites


def _param(entry: Entry) -> NDArray[np.float32] | None:
    t = entry.transform
    if t is None or t.folded or t.param is None:
        return None
    return as_f32(t.param.load(), t.param.dtype).reshape(-1)


def _without(entry: Entry, note: str) -> Entry:
    return replace(entry, transform=None, provenance=(*entry.provenance, note))


def _shared(model: Model, site: Site) -> NDArray[np.float32] | None:
    """The scale that every consumer of `site` has, by channel; None where one has none or another, or repeats disagree."""
    params = [_param(model.entries[name]) for name in site.consumers]
    first = params[0]
    if first is None or any(p is None or not np.array_equal(p, first) for p in params):
        return None
    channels = site.seen(first)
    return channels[:, 0] if (channels == channels[:, :1]).all() else None


def _into_norm(model: Model, new: dict[str, Entry], site: Site, p: NDArray[np.float32]) -> None:
    home = model.entries[site.name]
    offset = np.float32(model.decoder.norm_offset)
    product = (values(home.data) + offset) * p
    stored = dense((product - offset).astype(np.float32), "F32", home.data.origin)
    users = ", ".join(name.split(".", 2)[-1] for name in site.consumers[:3])
    more = ", ..." if len(site.consumers) > 3 else ""
    note = f"times the inputs' scale of {users}{more}"
    new[home.name] = replace(home, data=stored, provenance=(*home.provenance, note))
    bias = model.entries.get(f"{site.name}.bias")
    if bias is not None:
        new[bias.name] = replace(bias, data=dense(values(bias.data) * p))
    for name in site.consumers:
        new[name] = _without(
            new.get(name) or model.entries[name], f"scale of its input folded into {site.name}"
        )


def _into_rows(
    model: Model,
    new: dict[str, Entry],
    rounded: list[str],
    producer: str,
    user: str,
    rows: NDArray[np.float32],
) -> None:
    """`rows` multiplies the rows of `producer`: a plain scale takes it where fp32 can hold the products, else values do."""
    home = new.get(producer) or model.entries[producer]
    data = home.data
    if isinstance(data, Tensor):
        wide = data
        scaled: Tensor = replace(
            wide, dtype="F32", read=lambda a, b: as_f32(wide.read(a, b), wide.dtype) * rows[a:b, None]
        )
        new[producer] = replace(home, data=scaled)
    else:
        q = row_blocks(data)
        if not isinstance(q.scale, Tensor) or q.offset is not None or q.divisor:
            return  # scales of two levels have no place for it
        scale = q.scale
        exact = as_f32(scale.load(), scale.dtype).astype(np.float64) * rows[:, None]
        product = exact.astype(np.float32)
        if not np.array_equal(product.astype(np.float64), exact):
            rounded.append(producer)
        new[producer] = replace(home, data=replace(q, scale=dense(product, "F32", scale.origin)))
    bias = model.entries.get(producer + ".bias")
    if bias is not None:
        new[bias.name] = replace(bias, data=dense(values(bias.data) * rows))
    new[user] = _without(new.get(user) or model.entries[user], f"scale of its input folded into {producer}")


@dataclass(frozen=True)
class Folded:
    """The model without unfolded scales, what was done, and the entries whose scales the products rounded (in fp32)."""

    model: Model
    notes: tuple[str, ...] = ()
    rounded: tuple[str, ...] = ()


def materialized(model: Model) -> tuple[Model, list[str]]:
    """Scales that could not be folded multiplied into the dequantized values, in fp32: nothing of the format is left."""
    new = {}
    for name, e in model.entries.items():
        if e.transform is not None and not e.transform.folded:
            read: Callable[[int, int], NDArray[np.float32]] = partial(effective, e)
            data = Tensor(e.data.shape, "F32", read, e.data.origin, e.data.files)
            note = "dequantized, times the scale of its input"
            new[name] = replace(
                e, data=data, transform=None, activation=None, provenance=(*e.provenance, note)
            )
    if not new:
        return model, []
    said = f"{', '.join(sorted(new))}: dequantized, because the scale of its input (pre_quant_scale) has nowhere to go"
    return model.with_entries(new), [said]


def transforms(model: Model, *, norms_only: bool = False) -> Folded:
    """The same function with scales of inputs folded where they have a place; the others stay unfolded.

    norms_only: only into norms, for a format that stores the scales of o_proj and down_proj.
    """
    if not any(e.transform is not None and not e.transform.folded for e in model.entries.values()):
        return Folded(model)
    new: dict[str, Entry] = {}
    rounded: list[str] = []
    for site in sites(model.decoder):
        p = None if cached(model, site) else _shared(model, site)
        if p is None:
            continue
        if site.kind == "norm":
            _into_norm(model, new, site, p)
        elif not norms_only:
            _into_rows(model, new, rounded, site.name, site.consumers[0], p)
    out = model.with_entries(new)
    said = "scales of inputs (pre_quant_scale) folded into the norms and matrices before them"
    return Folded(out, (said,) if new else (), tuple(rounded))
