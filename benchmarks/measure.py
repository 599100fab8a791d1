"""How far a compressed artifact is from its source (validators/yardstick.py), and how many bytes it takes.

Runtimes stack q, k, v and gate, up. FP8 weights with one scale for each matrix get one for all of them when they are loaded, the largest
(vLLM's requantize_with_max_scale, in layers/quantization/utils/w8a8_utils.py), and are measured that way, too: `served` is the mean KLD.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

import lconvert
from lconvert.ir import E4M3, Entry, Model, QTensor, Tensor, as_f32, dense
from lconvert.kernels.qtensor import effective
from lconvert.passes.fused import groups
from lconvert.passes.rtn_float import nearest
from lconvert.validators import stored, yardstick


class Yardstick:
    """The source's logits on `windows` windows of a text."""

    def __init__(self, source: Path, text: Path, windows: int) -> None:
        model = lconvert.read(str(source))
        self._measure = yardstick.Yardstick(model, yardstick.text_windows(model, text, windows))

    def __call__(self, candidate: Path) -> dict[str, Any]:
        model = lconvert.read(str(candidate))
        fused = {name: e for roles in groups(model.decoder) for name, e in _together(model, roles)}
        served = {"served": self._measure(model.with_entries(fused))["kld_mean"]} if fused else {}
        return {**self._measure(model), **served, "bytes": stored.stored(candidate)[0]}


def _together(model: Model, roles: Iterable[str]) -> Iterator[tuple[str, Entry]]:
    """FP8 matrices that are stacked, in codes of their largest scale where scales differ."""
    scales: dict[str, float] = {}
    for role in roles:
        q = model.entries[role].data if role in model.entries else None
        if (
            isinstance(q, QTensor)
            and q.grid == E4M3
            and q.block == (-1, -1)
            and isinstance(q.scale, Tensor)
            and not q.divisor
        ):
            scales[role] = float(np.ravel(as_f32(q.scale.load(), q.scale.dtype))[0])
    if len(set(scales.values())) < 2:
        return
    one = np.float32(max(scales.values()))
    for role in scales:
        entry = model.entries[role]
        assert isinstance(entry.data, QTensor)
        codes = dense(nearest(E4M3, effective(entry) / one))
        yield role, replace(entry, data=replace(entry.data, codes=codes, scale=dense(one.reshape(1, 1))))
