"""Pruning: weights set to exactly 0, by magnitude, Wanda or SparseGPT, unstructured or N of every M.

    magnitude   the least |w| of each matrix; no text is needed
    wanda       the least |w_ij| ||x_j|| of each row; survivors keep their values (arXiv 2306.11695)
    sparsegpt   the least w^2 / [H^-1]_jj as the sweep goes, survivors re-fitted to the matrix's outputs (arXiv 2301.00774)

Layers are pruned one after another, each seeing what the pruned ones before it put out; inside a layer every matrix sees what the pruned
matrices before it in the layer put out. `steps` above 1 prunes by the cubic schedule, survivors re-fitted after every step by SparseGPT's
sweep with the mask given, so that the next step's scores are of re-fitted weights; without that a schedule would choose the same weights as
one step does. A matrix's own weights do not change its input, so the statistics hold for all its steps.

The result is dense, in the dtype it had, with exact zeros: that is all a mask is (primitives/zeros.py). Re-fitted weights are rounded to that
dtype inside the sweep, which makes up for this too.
A matrix that is quantized already is pruned on its codes, by magnitude or wanda.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from lconvert.errors import OptionError
from lconvert.ir import Entry, Model, QTensor, Tensor, dense
from lconvert.primitives import masks, zeros
from lconvert.primitives.job import Job, identity
from lconvert.primitives.placement import MATRICES
from lconvert.spec import check

_METHODS = ("magnitude", "wanda", "sparsegpt")
_PER: Mapping[str, Literal["row", "tensor"]] = {"magnitude": "tensor", "wanda": "row", "sparsegpt": "tensor"}


@dataclass(frozen=True)
class Options:
    """method: magnitude, wanda or sparsegpt. sparsity: the share of zeros, 0.5 by default; N:M patterns say theirs. pattern:
    unstructured, or N:M, N of every M neighbours along the input kept (2:4, 4:8). per: row or tensor, what an unstructured share is of;
    row for wanda, else tensor. steps: of the cubic schedule, 1 for one shot; above 1 survivors are re-fitted after every step. damping: share of
    the mean diagonal of a Hessian that is added to it. targets, ignore: regular expressions on canonical names."""

    method: Literal["magnitude", "wanda", "sparsegpt"] = "sparsegpt"
    sparsity: float | None = None
    pattern: str = masks.UNSTRUCTURED
    per: Literal["", "row", "tensor"] = ""
    steps: int = 1
    damping: float = 0.01
    targets: str = MATRICES
    ignore: str = ""

    def __post_init__(self) -> None:
        if self.method not in _METHODS:
            raise OptionError(f"sparse: method {self.method!r}; choose {', '.join(_METHODS)}")
        if self.per not in ("", "row", "tensor"):
            raise OptionError(f"sparse: per {self.per!r}; choose row or tensor")
        pattern = masks.parse(self.pattern)
        if self.sparsity is not None:
            if (
                isinstance(self.sparsity, bool)
                or not isinstance(self.sparsity, int | float)
                or not 0 < self.sparsity < 1
            ):
                raise OptionError(
                    f"sparse: sparsity {self.sparsity!r}; expected a share between 0 and 1, such as 0.5"
                )
            if pattern.sparsity not in (None, self.sparsity):
                raise OptionError(
                    f"sparse: sparsity {self.sparsity:g} with {pattern}, which is {pattern.sparsity:g}; say one of them"
                )
        if pattern.of and self.per:
            raise OptionError(f"sparse: per {self.per} with {pattern}; groups are all alike, so leave it out")
        if isinstance(self.steps, bool) or not isinstance(self.steps, int) or self.steps < 1:
            raise OptionError(f"sparse: steps {self.steps!r}; expected a whole number from 1 on")
        if (
            isinstance(self.damping, bool)
            or not isinstance(self.damping, int | float)
            or not 0 < self.damping <= 1
        ):
            raise OptionError(f"sparse: damping {self.damping!r}; expected a share above 0, such as 0.01")
        for text in (self.targets, self.ignore):
            try:
                re.compile(text)
            except re.error as e:
                raise OptionError(f"sparse: {text!r} is not a regular expression ({e})") from None

    @property
    def kind(self) -> masks.Pattern:
        return masks.parse(self.pattern, self.per or _PER[self.method])

    @property
    def share(self) -> float:
        """The final share of zeros."""
        return self.kind.sparsity or self.sparsity or 0.5

    @property
    def calibrated(self) -> bool:
        return self.method != "magnitude" or self.steps > 1

    @property
    def refits(self) -> bool:
        return self.method == "sparsegpt" or self.steps > 1


def calibrated(options: Options) -> bool:
    """Magnitudes in one shot are looked at alone."""
    return options.calibrated


def run(model: Model, options: Options, job: Job = Job()) -> Model:  # noqa: B008 - immutable
    """The model with every matching matrix pruned. What no calibration token reached is pruned by magnitude, and the report says so."""
    wanted = dict(_chosen(model, options))
    if not options.calibrated:
        new = {name: _by_magnitude(entry, options) for name, entry in wanted.items()}
        return check(model.with_entries(new, _summary(options, len(new))))

    from lconvert.primitives import sequential
    from lconvert.primitives.slots import waves

    def visit(block: Any) -> Mapping[str, Entry]:
        found: dict[str, Entry] = {}
        for wave in waves(block.stages, wanted):
            seen = [_statistics(options) for _ in wave]
            block.observe({role: s for stage, s in zip(wave, seen, strict=True) for role in stage})
            for stage in wave:
                statistics = seen.pop(0)
                fitting = _fitting(stage, statistics, options, block.say)
                for role in stage:
                    entry, weight = _pruned(
                        wanted[role], block.weight(role), statistics, fitting, options, block.say
                    )
                    block.set(role, weight)
                    found[role] = entry
        return found

    made = sequential.walk(
        model,
        job,
        visit,
        what="sparse",
        key=identity("sparse", options),
        statistics=_held(model, wanted, options),
        head="head" in wanted,
    )
    return check(made.with_entries({}, _summary(options, len(wanted))))


def _summary(options: Options, number: int) -> str:
    steps = f", {options.steps} steps" if options.steps > 1 else ""
    return f"sparse: {number} matrices by {options.method}, {options.kind}{steps}, {options.share:.1%} zeros"


def _chosen(model: Model, options: Options) -> Iterator[tuple[str, Entry]]:
    """What is pruned, checked before anything is computed."""
    none = True
    for name, entry in model.entries.items():
        out = options.ignore and re.fullmatch(options.ignore, name)
        if len(entry.shape) != 2 or out or not re.fullmatch(options.targets, name):
            continue
        none = False
        masks.fits(options.kind, entry.shape[1], name)
        if isinstance(entry.data, QTensor):
            if options.refits:
                raise OptionError(
                    f"sparse: {name} is quantized, and re-fitted weights would leave its grid; prune by magnitude or wanda in one step, "
                    "or prune before quantizing"
                )
            zeros.refuse(entry.data, name)
        elif options.refits and entry.transform is not None and not entry.transform.folded:
            raise OptionError(
                f"sparse: {name}: its input has a scale that is not folded; fold it, or prune by magnitude or wanda"
            )
        yield name, entry
    if none:
        raise OptionError(f"sparse: no matrix matches targets {options.targets!r}")


def _held(model: Model, wanted: Mapping[str, Entry], options: Options) -> int:
    """Bytes of statistics and of one factor with its temporaries, for the layer that needs most."""
    from lconvert.primitives.slots import stages, waves

    def bytes_of(wave: list[tuple[str, ...]]) -> int:
        widths = [wanted[stage[0]].shape[1] for stage in wave]
        return (
            sum(4 * n * n for n in widths) + 32 * max(widths) ** 2
            if options.refits
            else sum(40 * n for n in widths)
        )

    layers = range(model.decoder.layers)
    return max(
        (bytes_of(wave) for i in layers for wave in waves(stages(model.decoder, i), wanted)),
        default=0,
    )


def _statistics(options: Options) -> Any:
    from lconvert.primitives.statistics import Hessian, Moments

    return Hessian() if options.refits else Moments()


def _by_magnitude(entry: Entry, options: Options) -> Entry:
    """One tensor at a time is read for its mask, here and when it is written; its values stay where they are."""
    from lconvert.forward import packages
    from lconvert.kernels.qtensor import effective

    torch, _ = packages()

    def mask() -> Any:
        score = masks.magnitude(torch.from_numpy(effective(entry)))
        return masks.kept(score, options.kind, options.share, entry.name)

    rows, cols = entry.shape
    return _zeroed(entry, mask(), options, "magnitude", zeros.Remade((rows, cols), mask))


def _zeroed(
    entry: Entry, mask: Any, options: Options, method: str, kept: zeros.Remade | None = None
) -> Entry:
    """The entry with zeros where the mask says, its survivors as they are. kept: what makes the mask again, so that it is not held."""
    bits = zeros.Bits.of(mask) if kept is None else kept
    data = entry.data
    changed = zeros.pruned(data, bits, entry.name) if isinstance(data, QTensor) else zeros.masked(data, bits)
    note = f"sparse: {method}, {options.kind}, {_share(mask)} pruned"
    return replace(entry, data=changed, provenance=(*entry.provenance, note))


def _fitting(stage: tuple[str, ...], statistics: Any, options: Options, say: Callable[[str], None]) -> Any:
    """The factor that the matrices of a stage share; None where nothing is re-fitted."""
    from lconvert.primitives.factor import factor

    if not statistics.count:
        return None
    names = ", ".join(stage)
    f = factor(statistics.sum, options.damping, names) if options.refits else None
    if f is not None and f.damping != options.damping:
        say(f"sparse: {names}: its Hessian needed a damping of {f.damping:g}")
    dead = statistics.squares <= 0 if f is None else f.dead
    if bool(dead.any()):
        say(
            f"sparse: {names}: {int(dead.sum())} of {len(dead)} inputs are always zero; their weights go first"
        )
    return f


def _pruned(
    entry: Entry, w: Any, statistics: Any, fitting: Any, options: Options, say: Callable[[str], None]
) -> tuple[Entry, Any]:
    """The pruned entry, and what its layer computes with from now on."""
    name, kind, share = entry.name, options.kind, options.share
    if not statistics.count:
        say(f"sparse: {name}: no calibration token reached it; pruned by magnitude")
        mask = masks.kept(masks.magnitude(w), kind, share, name)
        return _zeroed(entry, mask, options, "magnitude"), w * mask
    if fitting is None:
        mask = masks.kept(masks.wanda(w, statistics.squares.sqrt().to(w.dtype)), kind, share, name)
        return _zeroed(entry, mask, options, "wanda"), w * mask
    assert isinstance(entry.data, Tensor)
    v, mask = _in_steps(
        w, statistics.sum.diagonal().sqrt(), fitting, options, _storage(entry.data.dtype), name
    )
    note = f"sparse: {options.method}, {kind}, {_share(mask)} pruned, survivors re-fitted"
    return replace(entry, data=_dense(v, entry.data), provenance=(*entry.provenance, note)), v


def _in_steps(w: Any, norms: Any, fitting: Any, options: Options, stored: Any, name: str) -> tuple[Any, Any]:
    """Values and mask after all steps of the schedule; those of the last one are rounded to the dtype `stored`."""
    from lconvert.primitives import sparsegpt

    kind, v, mask = options.kind, w, None
    for step in range(1, options.steps + 1):
        now, chosen = masks.cubic(step, options.steps, options.share), None
        if options.method != "sparsegpt":
            score = masks.magnitude(v) if options.method == "magnitude" else masks.wanda(v, norms)
            chosen = masks.kept(score if mask is None else score.where(mask, -1.0), kind, now, name)
        last = step == options.steps
        rounded = (lambda x, j: x.to(stored).to(x.dtype)) if last else None
        v, mask = sparsegpt.sweep(v, fitting, kind, now, mask=chosen, within=mask, rounded=rounded, name=name)
    return v, mask


def _share(mask: Any) -> str:
    return f"{1 - float(mask.sum()) / mask.numel():.2%}"


def _storage(dtype: str) -> Any:
    """The torch dtype in which an entry holds its weights; wider ones than fp32 become fp32."""
    from lconvert.forward import packages

    torch, _ = packages()
    return {"BF16": torch.bfloat16, "F16": torch.float16}.get(dtype, torch.float32)


def _dense(v: Any, like: Tensor) -> Tensor:
    """Values that are exact in the dtype of `like` as a tensor of it."""
    import numpy as np

    from lconvert.forward import packages

    torch, _ = packages()
    stored = v.cpu().to(_storage(like.dtype))
    if like.dtype == "BF16":
        return dense(stored.view(torch.int16).numpy().view(np.uint16), "BF16", like.origin)
    return dense(stored.numpy(), None, like.origin)
