"""A type per matrix under a budget: sensitivities, an exact integer program, and rounding to what it chose.

    bpw       bits per weight over all tensors (as llama-quantize counts them)
    size      bytes of all tensors, and `overhead` for what the caller writes besides
    max_kld   the smallest size whose measured KLD on the calibration windows is at most this

The result is a mapping of names to types (`grids`, as every rounding pass takes it) and the model rounded so: to nearest, block types by ggml's
searches weighted with the mean square of each input (what an imatrix holds), integers by least squares. With `grids` given nothing is searched:
that is how a recipe repeats a result, on another text too. The methods of sensitivity and their costs: primitives/sensitivity.py.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from lconvert.errors import InputError, OptionError, few
from lconvert.ir import Entry, Model, QTensor, Tensor
from lconvert.passes import rtn, rtn_float
from lconvert.passes.deployable import Menu, find_target, menu
from lconvert.primitives import allocator, evolve, importance, sensitivity, text
from lconvert.primitives.allocator import Allocation, Item, Option
from lconvert.primitives.job import Job
from lconvert.primitives.placement import NONE, NOTHING, Placement, parse, patterns
from lconvert.primitives.probe import Probe, needed
from lconvert.primitives.shelf import Shelf
from lconvert.spec import check

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

_CACHE = 2 << 30  # bytes of rounded matrices that are kept on disk between measurements
_SLAB = 1 << 22  # values that are rounded at once on the way there
_BISECTIONS = 5


@dataclass(frozen=True)
class Options:
    """target: gguf, vllm, onnx or trt. Of bpw, size and max_kld exactly one, unless `grids` (a regular expression -> type) says all. sensitivity:
    imatrix, fisher, hessian or kld. types: what may be chosen, instead of the target's own list. only: regular expression of matrices
    that get a choice. windows, context: of the text, that sensitivities see. refine: generations of measured refinement by `driver`
    (evolve or optuna). overhead: bytes of the artifact that are no tensors."""

    target: str = "gguf"
    bpw: float | None = None
    size: int | None = None
    max_kld: float | None = None
    sensitivity: str = "imatrix"
    types: Sequence[str] = ()
    only: str = ""
    grids: Mapping[str, str] = field(default_factory=dict)
    windows: int = 16
    context: int = 256
    refine: int = 0
    driver: str = "evolve"
    overhead: int = 0

    def __post_init__(self) -> None:
        find_target(self.target)
        given = [n for n in ("bpw", "size", "max_kld") if getattr(self, n) is not None]
        if self.grids and given:
            raise OptionError(
                f"allocate: grids say every type, so {given[0]} has no effect; give one of them"
            )
        if len(given) > 1:
            raise OptionError(f"allocate: needs one of bpw, size and max_kld, found {' and '.join(given)}")
        for name in given:
            if not 0 < getattr(self, name) < math.inf:
                raise OptionError(f"allocate: {name} {getattr(self, name)!r}; expected a positive number")
        if self.sensitivity not in sensitivity.METHODS:
            raise OptionError(
                f"allocate: sensitivity {self.sensitivity!r}; choose {', '.join(sensitivity.METHODS)}"
            )
        if self.driver not in evolve.DRIVERS:
            raise OptionError(f"allocate: driver {self.driver!r}; choose {', '.join(evolve.DRIVERS)}")
        if self.refine and self.max_kld is not None:
            raise OptionError(
                "allocate: refine lowers the KLD of a size; it goes with bpw or size, not with max_kld"
            )
        if self.windows < 1 or self.context < 2 or self.refine < 0:
            raise OptionError("allocate: windows from 1 on, context from 2, refine from 0")
        try:
            re.compile(self.only)
        except re.error as e:
            raise OptionError(f"allocate: {self.only!r} is not a regular expression ({e})") from None
        Placement(grids=self.grids)  # which refuses unknown types


@dataclass(frozen=True)
class Outcome:
    """What was chosen: the type of every item, sizes in bytes of all tensors, the predicted loss, and the measured KLD of the whole (nats per
    token on the calibration windows)."""

    allocation: Allocation
    size: int
    bpw: float
    measured: float
    grids: Mapping[str, str]
    notes: tuple[str, ...] = ()


def run(model: Model, options: Options, job: Job = Job()) -> Model:  # noqa: B008 - immutable
    """The model with every matrix of the target's list on its type."""
    if options.grids:
        return applied(model, options.grids, options, job)
    search = Search(model, options, job)
    found = search.outcome()
    return search.model_of(found)


def applied(model: Model, grids: Mapping[str, str], options: Options, job: Job) -> Model:
    """The model rounded as `grids` say, weighted by importances of the job's text where it has one."""
    placed = list(Placement(targets=NOTHING, grids=grids).chosen(model))
    if not placed and set(grids.values()) == {NONE}:
        return model.with_entries({}, "allocate: every tensor stays as it is")
    if not placed:
        raise OptionError(
            f"allocate: no dense matrix matches the grids: {few(list(grids))}; they were chosen for another model, or it is quantized already"
        )
    met: Mapping[str, NDArray[np.float32]] = {}
    notes: tuple[str, ...] = ()
    if job.calibration.text:
        met, notes = importances(model, own(job, options))
    round_ = Rounding(model, met)
    entries = {e.name: round_.entry(e.name, str(p)) for e, p in placed}
    told = replace(model, report=(*model.report, *notes))
    return check(told.with_entries(entries, f"allocate: {len(entries)} tensors to types of {options.target}"))


def own(job: Job, options: Options) -> Job:
    """The run with the windows of the options: fewer and shorter than what a rounder takes."""
    return replace(
        job, calibration=replace(job.calibration, windows=options.windows, context=options.context)
    )


def importances(model: Model, job: Job) -> tuple[dict[str, NDArray[np.float32]], tuple[str, ...]]:
    """Mean squares (in,) of what meets the columns of every matrix on the text, by role, and what the report should say: a matrix that no
    token met has none."""
    found = importance.measure(model, job)
    met = {r: (m.squares / m.count).float().cpu().numpy() for r, m in found.moments.items() if m.count}
    return met, found.notes


class Rounding:
    """Matrices on types, with importances by role (in,); what a role has none of is rounded plainly."""

    def __init__(self, model: Model, importance: Mapping[str, NDArray[np.float32]]) -> None:
        self.model, self.importance = model, importance
        self._peaks: Mapping[str, rtn_float.Peak] | None = None

    def tensor(self, role: str, type_: str) -> QTensor:
        t = self.model.entries[role].data
        assert isinstance(t, Tensor)
        placed = parse("allocate", type_, -1)
        if re.fullmatch(r"u?int[2-8]", placed.grid):
            search: Any = "mse" if isinstance(placed.group, int) else "minmax"
            return rtn.quantized(t, rtn.Options(placed.grid, placed.group, search=search))
        if placed.grid in rtn_float.GRIDS:
            if self._peaks is None:
                self._peaks = rtn_float.peaks(self.model)
            return rtn.quantized(t, rtn.Options(placed.grid, placed.group), self._peaks.get(role))
        return weighted_blocks(t, placed.grid.upper(), self.importance.get(role))

    def lazily(self, role: str, type_: str) -> Tensor:
        """(out, in) of a matrix on a type, rounded when it is read."""
        from lconvert import kernels
        from lconvert.kernels.qtensor import values

        data = self.model.entries[role].data
        assert isinstance(data, Tensor)
        if type_ == NONE:
            return data
        if type_ in kernels.BLOCKS:  # ggml's own dequantizer is faster than codes and scales one by one
            blocks = block_rows(data, type_, self.importance.get(role))
            return Tensor(
                data.shape,
                "F32",
                lambda a, b: kernels.dequantize(type_, blocks(a, b), data.shape[1]),
                data.origin,
            )
        q = self.tensor(role, type_)
        return Tensor(data.shape, "F32", lambda a, b: values(q, a, b), data.origin)

    def values(self, role: str, type_: str) -> NDArray[np.float32]:
        """fp32 (out, in) of a matrix on a type."""
        from lconvert.kernels.qtensor import values

        return values(self.lazily(role, type_))

    def entry(self, role: str, type_: str) -> Entry:
        entry = self.model.entries[role]
        note = f"allocate {type_}" + (", importance-weighted" if role in self.importance else "")
        return replace(entry, data=self.tensor(role, type_), provenance=(*entry.provenance, note))


def weighted_blocks(t: Tensor, type_: str, importance: NDArray[np.float32] | None) -> QTensor:
    """A dense matrix in a GGUF block type, lazily; importance (in,) as ggml's imatrix."""
    from lconvert import kernels
    from lconvert.formats.gguf_blocks import raised

    shape = (t.rows, kernels.BLOCKS[type_].row_bytes(t.shape[1]))
    return raised(type_, Tensor(shape, "U8", block_rows(t, type_, importance), t.origin, t.files))


def block_rows(t: Tensor, type_: str, importance: NDArray[np.float32] | None) -> Callable[[int, int], Any]:
    """What reads rows of a matrix as blocks; without importances they are ones where a type needs some."""
    import numpy as np

    from lconvert import kernels
    from lconvert.kernels.reference import NEEDS_WEIGHTS

    if importance is None and type_ in NEEDS_WEIGHTS:
        importance = np.ones(t.shape[1], np.float32)

    def read(start: int, stop: int) -> Any:
        try:
            return kernels.quantize(type_, t.read(start, stop), t.dtype, importance)
        except InputError as e:
            raise InputError(f"{t.origin}: {e} (rows counted from {start})") from None

    return read


class Search:
    """One model, target and text: the losses of all options once, then as many budgets as are asked for."""

    def __init__(self, model: Model, options: Options, job: Job = Job()) -> None:  # noqa: B008 - immutable
        if options.bpw is None and options.size is None and options.max_kld is None:
            raise OptionError("allocate: needs one of bpw, size and max_kld, found none of them")
        self.model, self.options, self.job = model, options, job
        self.menu: Menu = menu(model, options.target, tuple(options.types), options.only)
        job.text("allocate")
        if options.max_kld is None:
            self.budget()  # refused before the long part
        mine = own(job, options)
        found = text.windows(model, mine.calibration)
        least = needed(model)
        if job.memory is not None and least > job.memory:
            raise OptionError(
                f"--memory {job.memory / 1e6:.1f} MB: an allocation holds a layer in fp32, or the head and logits, {least / 1e6:.1f} MB; "
                "allow more memory, or say the types in a recipe"
            )
        self.probe = Probe(model, found.ids, job.device)
        if job.threads:
            self.probe.torch.set_num_threads(job.threads)
        met, self.notes = importances(model, mine)
        self.rounding = Rounding(model, met)
        self._shelf, self._cached, self._bytes = Shelf(), dict[tuple[str, str], Tensor](), 0
        self.cost = sensitivity.costs(
            options.sensitivity, self.probe, met, job.calibration.seed, tell=job.tell
        )
        self.items = [self._item(c, n) for n, c in enumerate(self.menu.choices)]

    # --- losses ----------------------------------------------------------------------------------------------

    def values(self, role: str, type_: str) -> Tensor:
        """(out, in) of a matrix on a type: on disk while there is room, else rounded when it is read."""
        key = role, type_
        if key in self._cached:
            return self._cached[key]
        found = self.rounding.lazily(role, type_)
        if self._bytes + 4 * found.size > _CACHE or type_ == NONE:
            return found
        step = max(1, _SLAB // found.shape[1])
        slabs = (found.read(a, min(a + step, found.rows)) for a in range(0, found.rows, step))
        self._cached[key] = self._shelf.keep(found.shape, slabs)
        self._bytes += 4 * found.size
        return self._cached[key]

    def _item(self, choice: Any, done: int) -> Item:
        original = {r: self.rounding.lazily(r, NONE) for r in choice.roles}
        options = []
        for name, size in choice.sizes.items():
            rounded = {r: self.values(r, name) for r in choice.roles if name != NONE}
            loss = self.cost(original, rounded) if rounded else 0.0
            options.append(Option(name, size, loss))
        self.job.tell("losses of types", done + 1, len(self.menu.choices))
        return Item(choice.name, choice.roles, tuple(options))

    def measure(self, allocation: Allocation) -> float:
        """KLD of the whole allocated model on the calibration windows."""
        roles = {i.name: i.members for i in self.items}
        types = allocation.names()
        return self.probe.kld({r: self.values(r, t) for n, t in types.items() for r in roles[n] if t != NONE})

    def measure_all(self, type_: str) -> float:
        """KLD with every matrix on one type."""
        return self.probe.kld({r: self.values(r, type_) for i in self.items for r in i.members})

    # --- budgets -----------------------------------------------------------------------------------------------

    def budget(self) -> int:
        """Bytes for the items, of what bpw or size allow for all."""
        o = self.options
        total = int(o.bpw * self.menu.weights / 8) if o.bpw is not None else (o.size or 0) - o.overhead
        smallest = self.menu.fixed + sum(min(c.sizes.values()) for c in self.menu.choices)
        if total < smallest:
            what = f"{o.bpw} bits per weight" if o.bpw is not None else f"{o.size} bytes"
            raise OptionError(
                f"allocate: {what} is too small for this model: the smallest possible is {smallest + o.overhead} bytes "
                f"({8 * smallest / self.menu.weights:.3f} bits per weight); raise it, or allow smaller types"
            )
        return total - self.menu.fixed

    def outcome(self, budget: int | None = None) -> Outcome:
        """The best allocation for the options' budget, or for `budget` bytes of items."""
        measured = None
        if budget is None and self.options.max_kld is not None:
            best, measured = self.below(self.options.max_kld)
        else:
            budget = self.budget() if budget is None else budget
            best = allocator.within(self.items, budget)
        if self.options.refine and budget is not None:
            refined = evolve.refine(
                self.items, best, budget, self.measure, generations=self.options.refine, seed=self.job.calibration.seed,
                driver=self.options.driver, tell=self.job.tell,
            )  # fmt: skip
            best, measured = refined.allocation, refined.measured
        found = self._told(best, self.measure(best) if measured is None else measured)
        most = sum(max(c.sizes.values()) for c in self.menu.choices)
        if budget is not None and budget > most:
            note = f"allocate: the budget is more than the widest types take ({most + self.menu.fixed} bytes of tensors); nothing was gained by the rest"
            found = replace(found, notes=(*found.notes, note))
        return found

    def below(self, bound: float) -> tuple[Allocation, float]:
        """The smallest allocation, of optima by predicted loss, that measures at most `bound`: bisection on the budget."""
        points = allocator.front(self.items, 33)
        low, high = 0, len(points) - 1
        least = self.measure(points[high])
        if least > bound:
            raise OptionError(
                f"allocate: a KLD of {bound:g} is out of reach: the widest types measure {least:.4g}; allow wider types (such as none)"
            )
        good, measured = points[high], least
        while low < high:
            middle = (low + high) // 2
            found = self.measure(points[middle])
            if found <= bound:
                high, good, measured = middle, points[middle], found
            else:
                low = middle + 1
        under = points[high - 1].size if high else good.size
        over = good.size
        for _ in range(_BISECTIONS):
            if over - under < 2:
                break
            between = allocator.within(self.items, (under + over) // 2)
            found = measured if between.names() == good.names() else self.measure(between)
            if found <= bound:
                over, good, measured = min(over - 1, between.size), between, found
            else:
                under = (under + over) // 2
        return good, measured

    def _told(self, best: Allocation, measured: float) -> Outcome:
        size = best.size + self.menu.fixed
        types = best.names()
        roles = {r: types[i.name] for i in self.items for r in i.members}
        return Outcome(
            best,
            size,
            8 * size / self.menu.weights,
            measured,
            patterns(roles, self.model.decoder.layers),
            self.notes,
        )

    def model_of(self, outcome: Outcome) -> Model:
        """The model on the types of an outcome."""
        types = outcome.allocation.names()
        entries = {
            r: self.rounding.entry(r, types[i.name])
            for i in self.items
            for r in i.members
            if types[i.name] != NONE
        }
        note = f"allocate: {len(entries)} tensors, {outcome.bpw:.3f} bits per weight, KLD {outcome.measured:.3g} on the calibration text"
        told = replace(self.model, report=(*self.model.report, *outcome.notes))
        return check(told.with_entries(entries, note))
