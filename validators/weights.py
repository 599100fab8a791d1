"""The section of the HTML report on the stored weights: bits and errors by layer and role, by type, and the whole table."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from math import prod
from typing import Any

from lconvert.validators import page, show


def tensors(details: Mapping[str, Any]) -> str:
    """Bits and weight error by layer and role, by type, and the whole table."""
    found = details.get("tensors")
    if not found:
        return ""
    blocks, errors = found.get("block_error", {}), found.get("relative_error", {})
    by_type = [
        (
            type_,
            show.count(found.get("types", {}).get(type_)),
            show.number(errors.get(type_)),
            show.number(blocks[type_][0]) if type_ in blocks else show.MISSING,
            blocks[type_][1] if type_ in blocks else show.MISSING,
        )
        for type_ in sorted({*found.get("types", {}), *errors})
    ]
    table = found.get("table", ())
    bits, error = _by_layer(table, "bits_per_weight"), _by_layer(table, "relative_error")
    rows = [_tensor(t) for t in table]
    wrong = [n for n, t in enumerate(table) if _out_of_line(t)]
    kinds = ("type", "tensors", "relative error", "worst block", "where")
    return page.section(
        "Weights",
        page.table(
            kinds, by_type, right=(1, 2, 3), caption="Relative error: RMS of the error / RMS of the source"
        ),
        page.table(
            _TENSOR,
            [rows[n] for n in wrong],
            right=range(2, 8),
            caption="Tensors out of line",
            failed=range(len(wrong)),
        ),
        page.heat("Bits per weight", "layer", *bits, show.fixed) if bits else "",
        page.heat("Relative error against the source", "layer", *error, lambda v: show.number(v, 2), log=True)
        if error
        else "",
        page.fold(
            f"All {len(rows)} tensors",
            page.table(_TENSOR, rows, right=range(2, 8), tall=len(rows) > 20, failed=wrong),
        ),
    )


_TENSOR = (
    "tensor",
    "type",
    "shape",
    "size",
    "bits/weight",
    "relative error",
    "worst block",
    "damaged",
    "equal to source",
)


def _tensor(t: Mapping[str, Any]) -> tuple[Any, ...]:
    return (
        t["name"],
        t["type"],
        " × ".join(map(str, t["shape"])),
        show.size(t["bytes"]),
        show.fixed(t.get("bits_per_weight")),
        show.number(t.get("relative_error")),
        show.number(t.get("block_error")),
        show.count(t.get("damaged")),
        "yes" if t.get("exact") else "no",
    )


def _out_of_line(t: Mapping[str, Any]) -> bool:
    return bool(t.get("damaged") or t.get("non_finite") or (t.get("promised") and t.get("exact") is False))


def _by_layer(
    table: Sequence[Mapping[str, Any]], key: str
) -> tuple[list[str], list[tuple[Any, list[float | None]]]] | None:
    """Columns and rows of a heat map: the mean over the experts of a role, weighted by their size."""
    sums: dict[tuple[int, str], list[float]] = {}
    for t in table:
        place = re.search(r"(?:^|\.)(\d+)\.(.+)", t["name"])
        if place is None or len(t["shape"]) < 2 or t.get(key) is None:
            continue
        role = re.sub(r"\.weight$", "", re.sub(r"\.\d+(?=\.|$)", "", place[2]))
        weights = prod(t["shape"])
        cell = sums.setdefault((int(place[1]), role), [0.0, 0.0])
        cell[0] += weights * t[key]
        cell[1] += weights
    roles = list(dict.fromkeys(role for _, role in sums))
    numbers = sorted({layer for layer, _ in sums})
    if not numbers or len(roles) > 40:
        return None
    mean = {place: total / weights for place, (total, weights) in sums.items() if weights}
    return roles, [(layer, [mean.get((layer, role)) for role in roles]) for layer in numbers]
