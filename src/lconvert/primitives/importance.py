"""The importance of the columns of every matrix: mean squares of what meets them in the uncompressed model.

llama.cpp's quantizers, AWQ and Wanda weigh errors by them. The model runs layer by layer (sequential.py).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TypeVar

from lconvert.ir import Entry, Model
from lconvert.primitives import sequential
from lconvert.primitives.job import Job
from lconvert.primitives.statistics import Accumulator, Moments

_A = TypeVar("_A", bound=Accumulator)


@dataclass(frozen=True)
class Importance:
    """moments: by canonical name of a matrix, experts' own tokens only (count 0: never chosen). windows: how many of `length` tokens
    were run. notes: for the report."""

    moments: Mapping[str, Moments]
    windows: int
    length: int
    notes: tuple[str, ...]


def measure(model: Model, job: Job) -> Importance:
    """One run of the model over the calibration text; nothing is kept for a later run, as nothing is computed twice."""
    return Importance(*watched(model, job, Moments))


def watched(
    model: Model, job: Job, accumulator: Callable[[], _A]
) -> tuple[Mapping[str, _A], int, int, tuple[str, ...]]:
    """What `measure` runs, with another accumulator than Moments: its fields, one accumulator for all matrices that share an input."""
    found: dict[str, _A] = {}
    shape = [0, 0]

    def visit(block: sequential.Block) -> Mapping[str, Entry]:
        watch: dict[str, _A] = {}
        for stage in block.stages:
            shared = accumulator()
            watch |= dict.fromkeys(stage, shared)
        block.observe(watch)
        found.update(watch)
        shape[:] = block.windows
        return {}

    job = replace(job, work=None, resume=False)
    out = sequential.walk(model, job, visit, what="importance", key="importance")
    return found, shape[0], shape[1], out.report[len(model.report) :]
