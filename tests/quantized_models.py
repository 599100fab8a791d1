"""Sources of the carry matrix that the general table leaves out, beside those of converters/kinds.py."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from lconvert.converters.kinds import KINDS, rounded, with_act_order, with_full_scales
from lconvert.ir import Model

SOURCES: Mapping[str, Callable[[], Model]] = {
    **KINDS,
    "int4 g16": lambda: with_full_scales(rounded("int4", 16)),
    "int4 per row": lambda: with_full_scales(rounded("int4", -1)),
    "int4 g64, f32 scales": lambda: with_full_scales(rounded("int4", 64), "F32"),
    "int5 g32": lambda: with_full_scales(rounded("int5", 32)),
    "uint4 g128": lambda: with_full_scales(rounded("uint4", 128)),
    "uint2 g64": lambda: with_full_scales(rounded("uint2", 64)),
    "uint8 g128": lambda: with_full_scales(rounded("uint8", 128)),
    "act-order in down": lambda: with_act_order(with_full_scales(rounded("int4", 32)), ".down"),
    "FP8 per row, weights": lambda: rounded("fp8", -1),
}
