"""AutoRound on any deployment grid, layer by layer: the roundings of all matrices of a layer learn together what its outputs need.

primitives/signround.py has the method, primitives/grids.py the grids, primitives/sequential.py the run. A layer gets what the compressed layers before it
put out and aims at the outputs that the uncompressed model has there. Steps start from rounding to nearest with scales that weigh errors by the inputs, or
from GPTQ's codes; the layer's result is never worse than the former. An expert that no token chose has no gradient; its weights are rounded
with the least squared error of their own, and the report names it.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Literal

from lconvert.errors import OptionError
from lconvert.ir import Entry, Model, Tensor
from lconvert.passes.gptq import deployed, held, mask, named
from lconvert.primitives import budget
from lconvert.primitives import gptq as first
from lconvert.primitives.grids import DeploymentGrid
from lconvert.primitives.job import Job, identity
from lconvert.primitives.placement import Placed, Placement, with_inputs
from lconvert.primitives.sequential import Block, walk
from lconvert.primitives.signround import Held, Rounding, Settings, latent, tune
from lconvert.primitives.slots import waves
from lconvert.primitives.statistics import UNSEEN, Hessian, Moments, importance, unfed
from lconvert.spec import check

#: Bytes that a weight's rounding takes: itself, its offset, place and code, its gradient, and codes of three iterates.
_EACH = 32


@dataclass(frozen=True)
class Options(Placement):
    """iterations: steps for each layer, each with `batch` windows. rate: of rounding offsets in the first step, 1 / iterations where
    none is said. range_rate: of range factors, where none is said a tenth of rate, and 0 where scales are codes themselves (k-quants, MXFP4, NVFP4). start: nearest or gptq. precision: of the steps; what is kept is compared in fp32. signed: integer scales may be negative, which
    llama.cpp, ONNX Runtime and compressed-tensors take and TensorRT does not. keep_zeros: weights that a mask made zero stay zero."""

    iterations: int = 200
    batch: int = 8
    rate: float | None = None
    range_rate: float | None = None
    start: Literal["nearest", "gptq"] = "nearest"
    precision: Literal["bf16", "f32"] = "bf16"
    signed: bool = False
    keep_zeros: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("iterations", "batch"):
            if getattr(self, name) < 1:
                raise OptionError(
                    f"autoround: {name} {getattr(self, name)}; expected a whole number from 1 on"
                )
        for name in ("rate", "range_rate"):
            value = getattr(self, name)
            if value is not None and not 0 <= value <= 1:
                raise OptionError(
                    f"autoround: {name} {value}; expected a share of a gap from 0 to 1, such as 0.005"
                )
        if self.start not in ("gptq", "nearest"):
            raise OptionError(f"autoround: start {self.start!r}; choose nearest or gptq")
        if self.precision not in ("bf16", "f32"):
            raise OptionError(f"autoround: precision {self.precision!r}; choose bf16 or f32")

    def settings(self, at_once: int) -> Settings:
        rate = 1 / self.iterations if self.rate is None else self.rate
        return Settings(self.iterations, rate, self.range_rate, self.batch, at_once, self.precision == "bf16")


def run(model: Model, options: Options, job: Job = Job()) -> Model:  # noqa: B008 - immutable
    """The model with every matching dense matrix of its layers, and the head, on its grid."""
    wanted = with_inputs("autoround", options, model)
    made = deployed(model, wanted, signed=options.signed)
    most = held(job)
    threads = job.threads or os.cpu_count() or 1

    def visit(block: Block) -> Mapping[str, Entry]:
        roles = [r for stage in block.stages for r in stage if r in wanted]
        if not roles:
            return {}
        block.aim()
        begun = {s.role: s for s in _starts(block, roles, made, options, most, threads)}
        tuned = {r: s.rounding for r, s in begun.items() if s.rounding is not None}
        length = block.windows[1]
        one = budget.trained(model.decoder, length, head=block.is_head)
        settings = options.settings(max(1, min(options.batch, most // one)))
        seed = int(identity("autoround", job.calibration.seed, block.index), 16) % (1 << 62)
        found = tune(block, tuned, {r: begun[r].nearest for r in tuned}, settings, seed) if tuned else None
        new = {}
        for role in roles:
            entry, g = model.entries[role], made[role]
            assert isinstance(entry.data, Tensor)
            if found is None or role not in found.held:
                now, note = begun[role].nearest, "no input seen"
            else:
                now = found.held[role]
                note = f"layer loss {found.loss:.3e} of {found.nearest:.3e} to nearest"
            data = g.qtensor(*now, entry.data)
            new[role] = replace(
                entry, data=data, provenance=(*entry.provenance, f"autoround {g.placed}, {note}")
            )
        return new

    out = walk(
        model,
        job,
        visit,
        what="autoround",
        key=identity("autoround", asdict(options)),
        reference=True,
        statistics=_need(model, wanted, min(job.calibration.context, model.decoder.context)),
        head="head" in wanted,
    )
    return check(out.with_entries({}, f"autoround: {len(wanted)} matrices to {named(wanted)}"))


@dataclass(frozen=True)
class _Start:
    """rounding: None for weights that no input reaches. nearest: rounded to nearest."""

    role: str
    rounding: Rounding | None
    nearest: Held


def _starts(
    block: Block, roles: list[str], made: Mapping[str, DeploymentGrid], options: Options, most: int, threads: int
) -> Iterator[_Start]:  # fmt: skip
    """Where the matrices of a block start from; the block computes with that."""
    by_codes = options.start == "gptq"
    settings = first.Settings()
    for stages in waves(block.stages, roles, lambda role: 4 * made[role].cols ** 2 if by_codes else 0, most):
        seen: list[Hessian | Moments] = [Hessian() if by_codes else Moments() for _ in stages]
        block.observe({role: s for stage, s in zip(stages, seen, strict=True) for role in stage})
        for stage, s in zip(stages, seen, strict=True):
            if isinstance(s, Moments) and s.count and (said := unfed(s.squares)):
                block.say(f"autoround: {', '.join(stage)}: {said}")
            inputs: dict[str, first.Inputs] = {}
            for role in stage:
                g, w = made[role], block.weight(role)
                kept, line = mask("autoround", role, w, g) if options.keep_zeros else (None, "")
                if line:
                    block.say(line)
                if s.count == 0:
                    near = g.nearest(w)
                    block.set(role, g.values(*near))
                    block.say(f"autoround: {role}: {UNSEEN}")
                    yield _Start(role, None, near)
                    continue
                if isinstance(s, Moments):
                    near = g.nearest(w, importance((s.squares / s.count).float()))
                    rounding = Rounding(w, g, near[1], kept)
                else:
                    along = first.path(settings, g)
                    if along not in inputs:
                        inputs[along] = first.inputs(s.sum, along, settings, role)
                        for note in inputs[along].notes:
                            block.say(f"autoround: {', '.join(stage)}: {note}")
                    done = first.gptq(w, inputs[along], g, settings, kept=kept, threads=threads)
                    near = g.nearest(w, inputs[along].importance)
                    rounding = Rounding(latent(w, g, done.position, done.sides), g, done.sides, kept)
                block.set(role, rounding.values())
                yield _Start(role, rounding, near)


def _need(model: Model, wanted: Mapping[str, Placed], length: int) -> int:
    """Bytes that the roundings of a layer take at most, with what one window of `length` tokens leaves behind for gradients."""
    sizes: dict[str, int] = {}
    for name in wanted:
        layer = ".".join(name.split(".")[:2])
        rows, cols = model.entries[name].shape
        sizes[layer] = sizes.get(layer, 0) + rows * cols
    widest = max(model.entries[name].shape[1] for name in wanted)
    one = budget.trained(model.decoder, length, head="head" in wanted)
    return max(sizes.values()) * _EACH + 28 * widest * widest + one
