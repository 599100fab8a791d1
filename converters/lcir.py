"""lconvert's own format as a target: a Plan for the folder that `lconvert.formats.ir` reads."""

from __future__ import annotations

import json
from typing import Any

import numpy as np

from lconvert.converters import replaced
from lconvert.formats import ir, safetensors
from lconvert.formats.scheme import Stored
from lconvert.ir import Model
from lconvert.plan import FilePlan, Item, Plan, Slab, Verdict, sources


def plan(model: Model, options: dict[str, Any]) -> Plan:
    """Every array of the model at its offset in tensors.safetensors, and lcir.json. Execute it into the folder."""
    meta, stored = ir.describe(model)
    head, offsets = safetensors.header_bytes(list(ir.names(stored)), {"format": ir.SCHEMA})
    items = []
    end = len(head)
    for (name, s), at in zip(stored.items(), offsets, strict=True):
        rows, row_bytes = ir.stored_rows(s)

        def produce(start: int, stop: int, s: Stored = s) -> Slab:
            return Slab(np.ascontiguousarray(s.read(start, stop)))

        items.append(
            Item(name, s.dtype, s.shape, at, rows, row_bytes, row_bytes, (name,), Verdict("exact"), produce)
        )
        end = max(end, at + rows * row_bytes)
    items.sort(key=lambda i: i.offset)
    text = json.dumps(meta, ensure_ascii=False, separators=(",", ":")).encode()
    files = (FilePlan(ir.META, text, (), len(text)), FilePlan(ir.DATA, head, tuple(items), end))
    return Plan("lcir", files, sources(model), options, notes=model.report, values=replaced.values(model))
