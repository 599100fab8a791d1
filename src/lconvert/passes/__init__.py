"""Passes: functions Model -> Model, one file each, with a frozen options dataclass that is also the recipe's schema.

`PASSES` names the module of every pass; it holds `Options` and `run(model, options, job) -> Model`. `STAGES` says what a pass does to
a model, from which follows where in a recipe it may stand.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any, Literal

from lconvert.errors import OptionError

PASSES: Mapping[str, str] = {
    "rtn": "Round to nearest on any grid, weights only, no calibration.",
    "gptq": "GPTQ on any deployment grid, calibrated on a text; GPTAQ by option.",
    "hqq": "HQQ: scales and zero points for the least |error|^p of the weights, no calibration.",
    "awq": "AWQ: strong inputs make their weights large before rounding, on any deployment grid; calibrated on a text.",
    "autoround": "AutoRound on any deployment grid: rounding by signed gradients of each block's error, calibrated on a text.",
    "rotate": "Rotations of the residual stream and of values, folded into the weights: outliers are spread.",
    "permute": "Channels in the order of their inputs' mean squares, folded into the weights: act-order for every format.",
    "smooth": "SmoothQuant: factors between norms and the matrices after them, from a calibration text.",
    "sparse": "Pruning by magnitude, Wanda or SparseGPT: unstructured or N of every M weights.",
    "allocate": "A type per matrix under a budget of size or KL divergence, and importance-weighted rounding to it.",
    "activations": "Quantized inputs of matrices: int8, FP8 or NVFP4, dynamic or calibrated on a text.",
    "static": "Static int8 weights and inputs of encoders and convolutional networks, calibrated on examples.",
    "kv": "The KV cache in FP8, calibrated on a text or with scale 1.",
}

#: transforms: other weights, the same function. masks: weights that become zero. rounds: dense weights onto a grid. inputs: how what
#: enters quantized weights is quantized. cache: the KV cache.
Stage = Literal["transforms", "masks", "rounds", "inputs", "cache"]

STAGES: Mapping[str, tuple[Stage, ...]] = {
    "rtn": ("rounds",),
    "gptq": ("rounds",),
    "hqq": ("rounds",),
    "awq": ("transforms", "rounds"),
    "autoround": ("rounds",),
    "rotate": ("transforms",),
    "permute": ("transforms",),
    "smooth": ("transforms",),
    "sparse": ("masks",),
    "allocate": ("rounds",),
    "activations": ("inputs",),
    "static": ("rounds", "inputs"),
    "kv": ("cache",),
}


def find(name: str) -> Any:
    """The module of a pass."""
    if name not in PASSES:
        raise OptionError(f"unknown pass {name!r}; passes: {', '.join(PASSES)}")
    return importlib.import_module(f"{__name__}.{name}")


def calibrates(name: str, options: Any) -> bool:
    """Whether a calibration text decides what a pass does; a pass that not always looks at one says so in its `calibrated(options)`."""
    says = getattr(find(name), "calibrated", None)
    return says is None or bool(says(options))


def stages(name: str, options: Any) -> tuple[Stage, ...]:
    """What a pass with these options does; one whose options decide that says so in its `stages(options)`."""
    says = getattr(find(name), "stages", None)
    return STAGES[name] if says is None else says(options)
