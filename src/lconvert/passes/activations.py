"""How the inputs of quantized matrices are quantized at run time: int8, FP8, NVFP4 or MXFP4, dynamic or static.

Dynamic scales are found by the runtime, for every token (SmoothQuant's O1) or for all tokens of a run (O2). Static ones (O3), and the global scale of NVFP4's inputs, are the largest
magnitude that a calibration text shows, over the grid's largest value; a global scale is a power of two, so that both of the
conventions in use (multiplier and divisor) hold it. MXFP4's inputs have exponents alone as scales, one per 32 features (OCP Microscaling Formats 1.0). A static scale may leave the largest magnitudes out, by the observers that static int8 has
(observers.py), from a histogram of all magnitudes that is filled in the same run.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from lconvert.errors import OptionError, few
from lconvert.forward import packages
from lconvert.ir import E2M1, E4M3, E8M0, ActSpec, Entry, Grid, Model, QTensor, as_f32, dense, int_grid
from lconvert.primitives import importance, text
from lconvert.primitives.job import Job
from lconvert.primitives.statistics import Magnitudes, Moments

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from lconvert.passes.observers import Range

_GRIDS: dict[str, tuple[Grid, float]] = {
    "int8": (int_grid(8, True), 127.0),
    "fp8": (E4M3, 448.0),
    "fp4": (E2M1, 6.0 * 448.0),
    "mxfp4": (E2M1, 6.0),
}
#: Groups that belong to a grid.
_GROUPS: dict[str, int] = {"fp4": 16, "mxfp4": 32}


@dataclass(frozen=True)
class Options:
    """grid: int8, fp8, fp4 (NVFP4: groups of 16, scales found at run time below a static global one) or mxfp4 (groups of 32,
    exponents found at run time, beside MXFP4 weights). dynamic: a scale per
    token (or per `group` features of one, or with per: tensor one for all tokens of a run), found at run time; otherwise one per
    tensor from `text`. observer: minmax, percentile, entropy (int8 alone) or mse, what a static scale of int8 or fp8 covers. windows,
    context: how much of it is run; without a text of its own the pass takes the run's, and as much of it as that says. targets, ignore:
    regular expressions on canonical names, of quantized matrices."""

    grid: str = "int8"
    dynamic: bool = True
    group: int = 0
    per: Literal["", "token", "tensor"] = ""
    observer: str = "minmax"
    text: str = ""
    windows: int = 32
    context: int = 512
    targets: str = r".*"
    ignore: str = ""

    def __post_init__(self) -> None:
        if self.grid not in _GRIDS:
            raise OptionError(f"activations: grid {self.grid!r}; choose {', '.join(_GRIDS)}")
        if self.group < 0 or (self.group and not self.dynamic):
            raise OptionError(f"activations: group {self.group}; groups are dynamic and have a positive size")
        if self.per not in ("", "token", "tensor"):
            raise OptionError(f"activations: per {self.per!r}; choose token or tensor")
        if self.group and self.group != _GROUPS.get(self.grid, self.group):
            raise OptionError(
                f"activations: group {self.group} with {self.grid}, whose groups are of {_GROUPS[self.grid]}"
            )
        if self.grid == "mxfp4" and not self.dynamic:
            raise OptionError("activations: mxfp4 without dynamic; the runtime finds its exponents")
        if self.per and (self.group or self.grid in _GROUPS):
            raise OptionError(f"activations: per {self.per} with groups; leave one of them out")
        if self.per == "token" and not self.dynamic:
            raise OptionError("activations: per token without dynamic; a static scale is one per tensor")
        self._check_observer()

    def _check_observer(self) -> None:
        from lconvert.passes.observers import OBSERVERS

        if self.observer not in OBSERVERS:
            raise OptionError(f"activations: observer {self.observer!r}; choose {', '.join(OBSERVERS)}")
        if self.observer == "minmax":
            return
        said = f"activations: observer {self.observer}"
        if self.grid in _GROUPS:
            raise OptionError(
                f"{said} with {self.grid}; its groups cover their largest magnitudes, choose minmax"
            )
        if self.dynamic:
            raise OptionError(f"{said} with dynamic; the runtime finds such scales, set dynamic: false")
        if self.grid == "fp8" and self.observer == "entropy":
            raise OptionError(
                f"{said} with fp8; it compares codes of equal steps, which FP8 does not have, choose percentile or mse"
            )


def run(model: Model, options: Options, job: Job = Job()) -> Model:  # noqa: B008 - immutable
    """The model with an ActSpec on every matching quantized matrix."""
    import numpy as np

    grid, top = _GRIDS[options.grid]
    static = calibrated(options)
    tops, lines = _tops(model, options, job) if static else ({}, ())
    size = _GROUPS.get(options.grid, options.group) or None
    per: Literal["token", "group", "tensor"] = "tensor" if not options.dynamic else options.per or "token"
    per = "group" if size else per
    new: dict[str, Entry] = {}
    dead: list[str] = []
    for name, entry in model.entries.items():
        if not _wanted(entry, options):
            continue
        scale = None
        if static:
            if name not in tops:
                raise OptionError(
                    f"activations: no input of {name} was seen; static scales are not to be had for it"
                )
            if not tops[name]:
                dead.append(name)
            scale = dense(np.array([_chosen(tops[name] / top, options.grid)], np.float32))
        if options.grid == "mxfp4" and not _mxfp4(entry.data):
            raise OptionError(
                f"activations: mxfp4, and {name} is no MXFP4 matrix; no runtime has such inputs beside others"
            )
        spec = ActSpec(grid, per, options.grid == "fp4" or options.dynamic, size, scale)
        note = f"inputs {options.grid}, {'dynamic' if options.dynamic else 'static'}{' per tensor' if options.per == 'tensor' else ''}"
        note += f", {options.observer}" if options.observer != "minmax" else ""
        new[name] = replace(entry, activation=spec, provenance=(*entry.provenance, note))
    if not new:
        raise OptionError(f"activations: no quantized matrix matches targets {options.targets!r}")
    if dead:
        lines = (
            *lines,
            f"activations: {few(dead)}: inputs are always zero on the calibration text; their scale is 1",
        )
    told = replace(model, report=(*model.report, *lines))
    return told.with_entries(new, f"activations: inputs of {len(new)} matrices to {options.grid}")


def _wanted(entry: Entry, options: Options) -> bool:
    if options.ignore and re.fullmatch(options.ignore, entry.name):
        return False
    quantized = isinstance(entry.data, QTensor) and entry.data.grid.bits <= 8
    return quantized and re.fullmatch(options.targets, entry.name) is not None


def _mxfp4(data: Any) -> bool:
    """Whether codes are E2M1 under one exponent for 32 columns."""
    scaled = isinstance(data, QTensor) and isinstance(data.scale, QTensor) and data.scale.grid == E8M0
    return scaled and data.grid == E2M1 and data.block == (1, 32)


def calibrated(options: Options) -> bool:
    """Scales that the runtime finds need no text."""
    return options.grid == "fp4" or not options.dynamic


def _tops(model: Model, options: Options, job: Job) -> tuple[dict[str, float], tuple[str, ...]]:
    """The magnitude of every matrix's input that the largest code stands for, by role, and lines for the report. An expert that no token
    chose gets the largest of the others in its layer."""
    if options.text:
        own = replace(job.calibration, text=options.text, windows=options.windows, context=options.context)
        job = replace(job, calibration=own)
    job.text("activations")
    accumulator: Callable[[], Moments | Magnitudes] = Moments
    if options.observer != "minmax":
        _refuse_factors(model, options)
        accumulator = Magnitudes
    found, _, _, notes = importance.watched(model, job, accumulator)
    observed = functools.cache(functools.partial(_observed, options=options))  # matrices share inputs
    tops = {
        role: observed(m)
        if isinstance(m, Magnitudes)
        else float((m.peak.cpu() * _factor(model.entries[role])).max())
        for role, m in found.items()
        if m.count
    }
    unseen = [role for role, m in found.items() if not m.count and role in model.entries]
    for role in unseen:
        kind = re.sub(r"experts\.\d+", r"experts.\\d+", role)
        if others := [x for r, x in tops.items() if re.fullmatch(kind, r)]:
            tops[role] = max(others)
    lines = [*text.unsaid(notes, model)]
    if unseen:
        lines.append(
            f"activations: no token of the text chose {few(unseen)}; "
            "their inputs get the largest scale of their layer's experts"
        )
    return tops, tuple(lines)


def _refuse_factors(model: Model, options: Options) -> None:
    """A histogram of all columns cannot be scaled column by column afterwards."""
    at_run_time = [
        name
        for name, e in model.entries.items()
        if _wanted(e, options) and e.transform is not None and not e.transform.folded
    ]
    if at_run_time:
        raise OptionError(
            f"activations: observer {options.observer}: the inputs of {few(at_run_time)} are scaled by channel at run time; choose minmax"
        )


def _observed(m: Magnitudes, options: Options) -> float:
    """The range that an observer chooses, never above the largest magnitude; that itself where it is 0, or no number."""
    from lconvert.passes.observers import OBSERVERS, Histogram, least_squares

    width = m.top / len(m.counts)
    if not width <= m.peak < math.inf:
        return m.peak
    used = int(m.peak / width) + 1  # bins above hold nothing
    seen = Histogram(m.counts[:used].cpu().numpy(), 0.0, used * width)
    if options.grid == "fp8" and options.observer == "mse":
        _, top = least_squares(seen, _in_fp8)
    else:
        _, top = OBSERVERS[options.observer](seen, True)
    return min(top, m.peak)


def _in_fp8(found: Range, x: NDArray[np.float64]) -> NDArray[np.float64]:
    """x as E4M3 says it under the scale of a range."""
    import numpy as np

    from lconvert.kernels.qtensor import grid_values
    from lconvert.passes.rtn_float import nearest

    grid, top = _GRIDS["fp8"]
    scale = _chosen(found[1] / top, "fp8")
    return grid_values(grid, nearest(grid, (x / scale).astype(np.float32))).astype(np.float64) * scale


def _factor(entry: Entry) -> Any:
    """What an unfolded scale multiplies the input's magnitudes by (in,), or 1: the weights that run hold it themselves."""
    torch, _ = packages()
    t = entry.transform
    if t is None or t.folded or t.param is None:
        return torch.ones(())
    return torch.from_numpy(as_f32(t.param.load(), t.param.dtype).reshape(-1).copy()).abs()


def _chosen(scale: float, grid: str) -> float:
    """A power of two for a global scale; 8 significant bits for the others, which all runtimes hold."""
    import numpy as np

    from lconvert.kernels.reference.rounding import short_scale
    from lconvert.primitives.levels import power_of_two_above

    if grid == "fp4":
        return power_of_two_above(scale)
    return float(short_scale(np.array([scale], np.float32), 8)[0]) or 1.0
