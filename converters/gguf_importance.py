"""Measured importances under the names that llama.cpp's quantizer looks for, in the layout of its tensors."""

from __future__ import annotations

import numpy as np

from lconvert.archs import find
from lconvert.converters.gguf_names import layout
from lconvert.formats.imatrix import Sums
from lconvert.ir import Model
from lconvert.primitives.importance import Importance

#: llama.cpp multiplies these with queries, and with sums of latents, which the model itself never computes.
_ABSORBED = ("attn.k_b", "attn.v_b")


def sums(model: Model, measured: Importance, *, output: bool = True) -> tuple[dict[str, Sums], list[str]]:
    """Sums and counts by GGUF name, and notes on what has none. output: also of output.weight, which llama-imatrix leaves out unless
    --process-output says so."""
    out: dict[str, Sums] = {}
    notes = list(measured.notes)
    for t in layout(find(model.arch.family), model.decoder):
        if t.roles[0].endswith(_ABSORBED):
            notes.append(
                f"{t.name} has no importances: llama.cpp multiplies it with what the model never computes"
            )
            continue
        if t.roles[0] not in measured.moments or (t.name == "output.weight" and not output):
            continue
        experts = t.roles if ".moe.experts." in t.roles[0] else t.roles[:1]
        found = [measured.moments[role] for role in experts]
        empty = np.zeros(t.cols)
        squares = np.stack([empty if m.squares is None else m.squares.cpu().numpy() for m in found])
        counts = np.array([m.count for m in found], np.int64)
        if unseen := [i for i, n in enumerate(counts) if n == 0]:
            listed = ", ".join(map(str, unseen[:8])) + (" ..." if len(unseen) > 8 else "")
            notes.append(
                f"{t.name}: no token of the text chose expert {listed}; all their columns count the same"
            )
        out[t.name] = Sums(squares, counts)
    return out, notes
