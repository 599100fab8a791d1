"""Passes: functions Model -> Model, one file each, with a frozen options dataclass that is also the recipe's schema.

`PASSES` names the module of every pass; it holds `Options` and `run(model, options) -> Model`.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any

from lconvert.errors import OptionError

PASSES: Mapping[str, str] = {
    "rtn": "Round to nearest on any grid, weights only, no calibration.",
    "allocate": "A type per matrix under a budget of size or KL divergence, and importance-weighted rounding to it.",
    "activations": "Quantized inputs of matrices: int8, FP8 or NVFP4, dynamic or calibrated on a text.",
    "static": "Static int8 weights and inputs of encoders and convolutional networks, calibrated on examples.",
    "kv": "The KV cache in FP8, calibrated on a text or with scale 1.",
}


def find(name: str) -> Any:
    """The module of a pass."""
    if name not in PASSES:
        raise OptionError(f"unknown pass {name!r}; passes: {', '.join(PASSES)}")
    return importlib.import_module(f"{__name__}.{name}")
