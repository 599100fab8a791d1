"""What all passes of one run share: the calibration text, the device, and where finished layers are kept.

A pass takes a `Job` beside its own options. What is in the recipe (calibration) changes the result; everything else here (device,
memory, folder, progress) changes how it is computed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from lconvert.errors import OptionError

#: what, done, total: called from the pass's own thread.
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Calibration:
    """text: a UTF-8 file, whose first `windows` windows of `context` tokens are run (a window is never longer than the model's
    context). GPTQ's paper takes 128 windows of 2048 tokens (arXiv 2210.17323, 4); `seed` orders what is random."""

    text: str = ""
    windows: int = 128
    context: int = 512
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("windows", "context"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise OptionError(f"calibration: {name} {value!r}; expected a whole number from 1 on")
        if isinstance(self.seed, bool) or not isinstance(self.seed, int) or self.seed < 0:
            raise OptionError(f"calibration: seed {self.seed!r}; expected a whole number from 0 on")


@dataclass(frozen=True)
class Job:
    """device: cpu or cuda[:N], where layers run and matrices are compressed. activations: how they are kept between layers.
    memory: bytes that calibration may take, None: what it needs; activations beyond it go to a file. work: folder for finished
    layers, which a later run with `resume` takes over; None: a temporary one. report: lines for the report, in order."""

    calibration: Calibration = Calibration()
    device: str = "cpu"
    activations: Literal["f32", "bf16"] = "f32"
    memory: int | None = None
    work: Path | None = None
    resume: bool = False
    threads: int | None = None
    progress: Progress | None = None
    interpreters: dict[str, Path] = field(default_factory=dict)

    def tell(self, what: str, done: int, total: int) -> None:
        if self.progress is not None:
            self.progress(what, done, total)

    def text(self, who: str, own: str = "") -> str:
        """The calibration text, `own` before the run's; OptionError where there is none."""
        found = own or self.calibration.text
        if not found:
            raise OptionError(f"{who}: needs a calibration text; name one (--calibrate TEXT)")
        return found


def identity(*parts: Any) -> str:
    """A digest of what decides a result: equal for equal parts, whatever their order in memory."""
    import hashlib
    import json

    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=repr).encode()).hexdigest()[:16]
