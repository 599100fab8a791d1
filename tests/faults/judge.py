"""What `lconvert validate` with its default gates says of an artifact: which tiers failed, and in which words."""

from __future__ import annotations

import math
import re
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np

import lconvert
from lconvert.errors import InputError, UnsupportedError
from lconvert.validators import quantized_tier
from lconvert.validators.report import TIERS
from lconvert.validators.runtimes.llamacpp import LlamaCpp

from .faults import Fault
from .models import Models

#: Two windows of 128 tokens: enough for every fault, and tensors and tokens are compared whole anyway.
CONTEXT, WINDOWS = 128, 2


@dataclass(frozen=True)
class Outcome:
    """failed: (tier, check, measured, gate) of failed checks. A refused artifact fails the structure with the message."""

    failed: tuple[tuple[str, str, str, str], ...]
    refused: str = ""
    seconds: float = 0.0

    @property
    def tiers(self) -> tuple[str, ...]:
        found = {tier for tier, *_ in self.failed} | ({"structure"} if self.refused else set())
        return tuple(t for t in TIERS if t in found)

    @property
    def tier(self) -> str:
        """The first tier that failed, "" if none did."""
        return next(iter(self.tiers), "")

    @property
    def words(self) -> str:
        """What that tier says."""
        first = [f"{name}: {value} (gate {gate})" for t, name, value, gate in self.failed if t == self.tier]
        return re.sub(r"\S*/", "", self.refused) or (first[0] if first else "")

    def says(self, part: str) -> bool:
        return part in self.refused or any(part in name for _, name, *_ in self.failed)


def judge(
    models: Models, model: str, candidate: Path, tiers: Sequence[str] = TIERS, **options: Any
) -> Outcome:
    """The default gates on `candidate`, against the good folder of `model`; `options` are validate's.

    Decompression by the package compressed-tensors is left out: it starts a process of several seconds for every folder, to
    compare two readings of one file, and a planted fault is the same for both.
    """
    start = time.perf_counter()
    try:
        with patch.object(quantized_tier, "package_python", return_value=None):
            report = lconvert.validate(
                models.folder(model),
                candidate,
                tiers=tiers,
                context=CONTEXT,
                max_windows=WINDOWS,
                threads=1,
                cache=models.root / "logits",
                **options,
            )
    except (InputError, UnsupportedError) as e:
        return Outcome((), str(e), time.perf_counter() - start)
    failed = tuple((c.tier, c.name, c.value, c.gate) for c in report.checks if c.passed is False)
    assert report.exit_code == (1 if failed else 0)
    return Outcome(failed, "", time.perf_counter() - start)


def largest_difference(good: Path, bad: Path) -> float:
    """max |delta logit| of two files in llama.cpp on the same ids; infinite where already the ids differ."""
    ids, logits = [], []
    for path in (good, bad):
        runtime = LlamaCpp(path, context=256, threads=1)
        try:
            ids.append(
                runtime.tokenize("It was the best of times, it was the worst of times.", special=False)
            )
            logits.append(runtime.logits(ids[0]))
        finally:
            runtime.close()
    return float(np.abs(logits[0] - logits[1]).max()) if ids[0] == ids[1] else math.inf


def plant(models: Models, fault: Fault, folder: Path) -> Path:
    """The bad artifact below `folder`."""
    good = models.artifact(fault.model, fault.type)
    bad = folder / good.name
    fault.plant(good, bad, models.artifact(*fault.donor) if fault.donor else None)
    if fault.manifest:
        beside = models.manifest(models.artifact(*fault.manifest))
        name = "config.json.manifest.json" if bad.is_dir() else bad.name + ".manifest.json"
        shutil.copyfile(beside, (bad if bad.is_dir() else bad.parent) / name)
    return bad
