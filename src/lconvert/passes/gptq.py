"""GPTQ on any deployment grid, layer by layer: each matrix meets the inputs that the compressed layers before it put out.

primitives/gptq.py has the method, primitives/grids.py the grids, primitives/sequential.py the run. Within a layer the matrices that share
an input are rounded together, and what follows sees their rounded outputs (true_sequential of the paper's code). An expert that no token
chose has no inputs; its weights are rounded with the least squared error of their own, and the report names it.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from lconvert.errors import OptionError, few
from lconvert.forward import packages
from lconvert.ir import Entry, Model, QTensor, Tensor, dense
from lconvert.passes.rtn_float import Peak, peaks
from lconvert.primitives import gptq as method
from lconvert.primitives import grids, masks, sparsegpt
from lconvert.primitives.factor import Factor, factor
from lconvert.primitives.gptq import Settings
from lconvert.primitives.grids import DeploymentGrid
from lconvert.primitives.job import Job, identity
from lconvert.primitives.placement import Placed, Placement, with_inputs
from lconvert.primitives.sequential import Block, walk
from lconvert.primitives.slots import waves
from lconvert.primitives.statistics import UNSEEN, Accumulator, Cross, Hessian, Together
from lconvert.spec import check

if TYPE_CHECKING:
    from lconvert.passes import Stage

#: Bytes of Hessians that are held together where a run has no memory limit: experts of large layers take turns.
_HELD = 4 << 30
#: Share of zeros from which on a matrix counts as pruned.
_PRUNED = 0.2


@dataclass(frozen=True)
class Options(Placement):
    """damping, order, refine: as in primitives/gptq.py. asymmetric: GPTAQ, which aims at the outputs of the uncompressed model, with `alpha`
    of its correction. signed: integer scales may be negative, which llama.cpp, ONNX Runtime and compressed-tensors take and TensorRT does
    not. keep_zeros: weights that a mask made zero stay zero. prune: zeros are chosen and made up for in the same sweep (SparseGPT's joint
    form), N of every M in quotes or a share of the matrix."""

    damping: float = 0.01
    order: str = "auto"
    refine: int = 3
    asymmetric: bool = False
    alpha: float = 0.5
    signed: bool = False
    keep_zeros: bool = True
    prune: str | float = ""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.order not in ("auto", "weight", "group", "none"):
            raise OptionError(f"gptq: order {self.order!r}; choose auto, weight, group or none")
        if not 0 < self.damping < 10:
            raise OptionError(
                f"gptq: damping {self.damping}; expected a share of the mean diagonal, such as 0.01"
            )
        if self.refine < 0 or not 0 <= self.alpha <= 1:
            raise OptionError(
                f"gptq: refine {self.refine}, alpha {self.alpha}; expected rounds from 0 on and a share"
            )

        if self.prune != "":
            try:
                masks.asked(self.prune)
            except OptionError as e:
                raise OptionError(f"gptq: prune {e}") from None

    def settings(self) -> Settings:
        return Settings(self.damping, self.order, self.alpha, self.refine)  # type: ignore[arg-type]


def stages(options: Options) -> tuple[Stage, ...]:
    """With `prune` it makes a mask, too."""
    return ("rounds",) if options.prune == "" else ("masks", "rounds")


def run(model: Model, options: Options, job: Job = Job()) -> Model:  # noqa: B008 - immutable
    """The model with every matching dense matrix of its layers, and the head, on its grid."""
    wanted = with_inputs("gptq", options, model)
    made = deployed(model, wanted, signed=options.signed)
    for g in made.values():
        method.path(options.settings(), g)
    threads = job.threads or os.cpu_count() or 1
    most = held(job)

    def visit(block: Block) -> Mapping[str, Entry]:
        return rounded(model, block, made, options, threads, most)

    out = walk(
        model,
        job,
        visit,
        what="gptq",
        key=identity("gptq", asdict(options)),
        reference=options.asymmetric,
        statistics=need(model, wanted, options.asymmetric),
        head="head" in wanted,
    )
    if options.prune != "":  # said as the pass for masks says it: a proof of the artifact looks for that line
        out = out.with_entries({}, f"sparse: {len(wanted)} matrices, {options.prune}, in the sweep of gptq")
    return check(out.with_entries({}, f"gptq: {len(wanted)} matrices to {named(wanted)}"))


def rounded(
    model: Model,
    block: Block,
    made: Mapping[str, DeploymentGrid],
    options: Options,
    threads: int,
    most: int,
) -> dict[str, Entry]:
    """The entries of a block that have a grid in `made`, stage after stage. model: whose entries they take the place of. most: bytes of Hessians
    that are held together."""
    new: dict[str, Entry] = {}
    thin: list[str] = []
    for stages in waves(block.stages, made, lambda role: 4 * model.entries[role].shape[1] ** 2, most):
        watch: dict[str, Accumulator] = {}
        hessians: list[tuple[tuple[str, ...], Hessian, Cross | None]] = []
        for roles in stages:
            h, c = Hessian(), Cross() if options.asymmetric else None
            watch |= dict.fromkeys(roles, h if c is None else Together(h, c))
            hessians.append((roles, h, c))
        block.observe(watch, reference=options.asymmetric)
        thin += [roles[0] for roles, h, _ in hessians if 0 < h.count < model.entries[roles[0]].shape[1]]
        for roles, h, c in hessians:
            for entry, lines in _rounded(model, block, roles, h, c, made, options, threads):
                new[entry.name] = entry
                for line in lines:
                    block.say(line)
    if thin:
        block.say(
            f"gptq: {few(thin)}: fewer tokens than inputs, so the Hessian is singular and its damping decides what they leave open; give "
            "more text"
        )
    return new


def held(job: Job) -> int:
    """Bytes of Hessians that a run holds together."""
    return _HELD if job.memory is None else max(1, job.memory // 4)


def named(wanted: Mapping[str, Placed]) -> str:
    """The grids in words."""
    return ", ".join(sorted({str(p) for p in wanted.values()}))


def deployed(
    model: Model, wanted: Mapping[str, Placed], *, signed: bool = False
) -> dict[str, DeploymentGrid]:
    """The deployment grids of these matrices. fp4's global scale covers all that runtimes fuse; signed: as in Options."""
    shared = peaks(model) if any(p.grid == "fp4" for p in wanted.values()) else {}
    return {
        name: _grid(model.entries[name], placed, shared, signed=signed) for name, placed in wanted.items()
    }


def _grid(entry: Entry, placed: Placed, shared: Mapping[str, Peak], signed: bool) -> DeploymentGrid:
    """The deployment grid of an entry; `shared`: peaks of what runtimes fuse, which fp4's global scale has to cover."""
    peak = shared[entry.name].value() if entry.name in shared else None
    if placed.grid == "fp4" and peak is None:
        assert isinstance(entry.data, Tensor)
        peak = Peak((entry.data,)).value()
    return grids.find(placed, entry.shape[1], peak=peak, signed=signed, what=entry.name)


def _rounded(
    model: Model,
    block: Block,
    roles: tuple[str, ...],
    h: Hessian,
    cross: Cross | None,
    made: Mapping[str, DeploymentGrid],
    options: Options,
    threads: int,
) -> Iterator[tuple[Entry, list[str]]]:
    """New entries of matrices that share an input, with lines for the report; the block computes with them from then on."""
    seen: dict[str, method.Inputs] = {}
    settings = options.settings()
    pruning = factor(h.sum, options.damping, roles[0]) if options.prune != "" and h.count else None
    for role in roles:
        entry, g, w, lines = model.entries[role], made[role], block.weight(role), []
        assert isinstance(entry.data, Tensor)
        zeros = "" if options.prune == "" else f", pruned {options.prune}"
        if options.prune != "":
            w, kept, line = _pruned(w, h, pruning, g, options, role)
        else:
            kept, line = mask("gptq", role, w, g) if options.keep_zeros else (None, "")
        lines += [line] if line else []
        if h.sum is None or h.count == 0:
            position, sides = g.nearest(w)
            order, note = None, f"gptq {g.placed}{zeros}, no input seen"
            lines.append(f"gptq: {role}: {UNSEEN}")
        else:
            along = method.path(settings, g)
            if along not in seen:
                seen[along] = method.inputs(
                    h.sum, along, settings, role, None if cross is None else cross.sum
                )
                lines += [f"gptq: {', '.join(roles)}: {n}" for n in seen[along].notes]
            done = method.gptq(w, seen[along], g, settings, kept=kept, threads=threads)
            position, sides, order = done.position, done.sides, done.order
            note = f"gptq {g.placed}{zeros}, loss {done.loss:.3e} of {done.nearest:.3e} to nearest"
        q = g.qtensor(position, sides, entry.data)
        if order is not None:
            q = _in_groups(q, order, g.group)
        block.set(role, g.values(position, sides) if order is None else _moved(g, position, sides, order))
        yield replace(entry, data=q, provenance=(*entry.provenance, note)), lines


def _pruned(
    w: Any, h: Hessian, f: Factor | None, g: DeploymentGrid, options: Options, role: str
) -> tuple[Any, Any, str]:
    """The weights to round, which of them stay, and a line where zeros cannot be: what a grid with zeros gets are the weights as they came,
    since the sweep that rounds makes up for the zeros as well. f: the factor of the Hessian; None where no token came."""
    pattern, share = masks.asked(options.prune)
    if f is None:
        w = w * masks.kept(masks.magnitude(w), pattern, share, role)
    elif g.holds_zero:
        return w, method.pruned(w, h.sum, f, g, pattern, share, role), ""
    else:
        w, _ = sparsegpt.sweep(w, f, pattern, share, name=role)
    return w, *mask("gptq", role, w, g)


def mask(who: str, role: str, w: Any, g: DeploymentGrid) -> tuple[Any, str]:
    """Which weights are kept, of a pruned matrix; and a line where its zeros cannot be."""
    zeros = float((w == 0).float().mean())
    if zeros < _PRUNED:
        return None, ""
    if not g.holds_zero:
        return (
            None,
            f"{who}: {role}: {zeros:.0%} of its weights are zero, which {g.placed} cannot keep exactly",
        )
    return w != 0, ""


def _in_groups(q: QTensor, order: Any, group: int) -> QTensor:
    """Codes whose groups follow an order of the columns: g_idx says which column is in which."""
    import numpy as np

    index = np.empty(len(order), np.int32)
    index[order.cpu().numpy()] = np.arange(len(order)) // group
    return replace(q, g_idx=dense(index))


def _moved(g: DeploymentGrid, position: Any, sides: Any, order: Any) -> Any:
    """Values where the sides' groups follow `order`."""
    torch, _ = packages()
    values = g.values(position[:, order], sides)
    return values[:, torch.argsort(order)]


def need(model: Model, wanted: Mapping[str, Placed], asymmetric: bool = False) -> int:
    """Bytes that a block's Hessians and their factors take at most."""
    widest = max(model.entries[name].shape[1] for name in wanted)
    return widest * widest * (4 + 3 * 8) * (2 if asymmetric else 1)
