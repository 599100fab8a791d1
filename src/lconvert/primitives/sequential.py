"""Layer-by-layer calibration: every decoder layer sees what the already compressed layers before it put out.

`walk` hands one `Block` after another to a method's `visit`, which looks at inputs (`observe`), tries weights (`set`) and returns new
entries. These are stored, installed as they were stored, and the layer's outputs become the next one's inputs. One layer is in memory at
a time, with hidden states of the calibration windows (activations.py) and whatever the method keeps of one block. Only weights are
as they will be: quantized inputs and caches are not imitated, as in llm-compressor.
(GPTQ, arXiv 2210.17323, 4; the second stream of uncompressed inputs is GPTAQ's, arXiv 2504.02692.)
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from lconvert import __version__
from lconvert.errors import InputError, OptionError
from lconvert.forward import Forward, packages, threads
from lconvert.ir import Entry, Model
from lconvert.kernels.qtensor import effective
from lconvert.primitives import budget, surprise, text
from lconvert.primitives.activations import Activations
from lconvert.primitives.finished import Done, Folder
from lconvert.primitives.freed import give_back
from lconvert.primitives.job import Job, identity
from lconvert.primitives.listening import Enough, down_input, expert_of, listening, modules, rows_of
from lconvert.primitives.replay import Replay
from lconvert.primitives.skeleton import Skeleton, ending, first, moved
from lconvert.primitives.slots import Slot, pieces, slots, stages
from lconvert.primitives.statistics import Accumulator

#: Matrices that end a part of a layer, and what may change without a change of their inputs.
_ENDS = {"attn.o": ("attn.o", "mlp.", "moe."), "mlp.down": ("mlp.down",)}


@dataclass(frozen=True)
class Batch:
    """Some windows. hidden: (b, t, d) fp32 on the device; kwargs: what the layer is called with beside it. reference: the hidden states of
    the uncompressed model, where it runs along. start: number of the first window."""

    hidden: Any
    kwargs: Mapping[str, Any]
    reference: Any = None
    start: int = 0


class Block:
    """One decoder layer, or last the head (final norm and output matrix), and what enters it.

    index: the layer; the number of layers for the head. stages: canonical names of matrices that share one input, in the order in which
    they act; experts have stages of their own. tokens: how many are run, as `windows` (how many, of how many tokens). `original` is the layer with the weights that it came
    with, where the uncompressed model runs along.
    """

    def __init__(self, run: _Run, index: int) -> None:
        self._run, self.index = run, index
        self.is_head = index == run.model.decoder.layers
        self.stages = (("head",),) if self.is_head else stages(run.model.decoder, index)
        self.tokens = run.shown.tokens
        self.windows = (len(run.shown.ids), run.shown.length)
        self.report: list[str] = []
        self._module: Any = None
        self._parts: tuple[Any, ...] = ()
        self._slots: dict[str, Slot] = {}
        self._changed: set[str] = set()
        self.original: Any = None
        self._original_slots: dict[str, Slot] = {}
        self._replays: dict[Any, dict[str, Replay]] = {}

    # --- weights ---

    @property
    def module(self) -> Any:
        """transformers' layer with fp32 weights on the device; the head is loaded when it is first asked for."""
        if self._module is None:
            run = self._run
            parts = ending(run.forward) if self.is_head else (run.forward.layers[self.index],)
            for part in parts:
                run.forward.fill(part)
                part.to(run.device)
            self._module = run.torch.nn.Sequential(*parts).eval() if self.is_head else parts[0]
            self._parts, self._slots = parts, _slots(run, parts)
            if run.reference:
                self.original = copy.deepcopy(self._module)
                self._original_slots = _slots(run, self.original if self.is_head else (self.original,), parts)
            if not self.is_head:
                for module in filter(None, (self._module, self.original)):
                    self._replays[module] = self._replays_of(module)
        return self._module

    @property
    def _heard(self) -> Any:
        """The module as far as inputs of its matrices need it: the head's own is not loaded for it."""
        if not self.is_head or self._module is not None or self._run.reference:
            return self.module
        run = self._run
        norm, head = ending(run.forward)
        run.forward.fill(norm)
        norm.to(run.device)
        return run.torch.nn.Sequential(norm, head).eval()

    def _replays_of(self, module: Any) -> dict[str, Replay]:
        run, of = self._run, "" if module is self._module else "reference-"
        out = {}
        for end in _ENDS:
            owners = modules_of(self, module, {f"layers.{self.index}.{end}"})
            if owners and (end == "attn.o" or run.plan.keep_mlp):
                room = partial(run.room, f"{of}{end}")
                out[end] = Replay(module, next(iter(owners)), len(run.shown.ids), room)
        return out

    def roles(self) -> tuple[str, ...]:
        """Canonical names of everything that the block computes with: matrices, norms, biases."""
        assert self.module is not None
        return tuple(self._slots)

    def weight(self, role: str) -> Any:
        """(out, in) fp32 (a vector: (n,)), as the layer computes with it now: a copy."""
        return self._slot(role).get()

    def set(self, role: str, weight: Any) -> None:
        """Compute with `weight` from now on. The Model is not touched; what `visit` does not return comes back after it."""
        slot, torch = self._slot(role), self._run.torch
        with torch.no_grad():
            slot.set(weight.to(self._run.device, torch.float32))
        self._changed.add(role)
        for end, replay in self._replays.get(self.module, {}).items():
            if not role.startswith(tuple(f"layers.{self.index}.{part}" for part in _ENDS[end])):
                replay.forget()

    def run(self, module: Any, batch: Batch, *, reference: bool = False) -> Any:
        """(b, t, d): what `module`, the layer or its original, makes of a batch."""
        hidden = batch.reference if reference else batch.hidden
        with self._run.torch.no_grad(), ExitStack() as stack:
            for replay in self._replays.get(module, {}).values():
                stack.enter_context(replay.running(batch.start, batch.start + len(hidden)))
            return first(module(hidden, **batch.kwargs))

    def _slot(self, role: str) -> Slot:
        assert self.module is not None
        if role not in self._slots:
            raise ValueError(f"{role} is no weight of block {self.index}")
        return self._slots[role]

    def say(self, line: str) -> None:
        """A line for the Model's report, kept with the layer."""
        self.report.append(line)

    # --- inputs ---

    def batches(self) -> Iterator[Batch]:
        """All calibration windows, some at a time, inputs from the compressed prefix."""
        run = self._run
        kwargs = {} if self.is_head else run.kwargs[self.index]
        for start in range(0, len(run.shown.ids), run.plan.batch):
            stop = min(start + run.plan.batch, len(run.shown.ids))
            reference = None if run.beside is None else run.beside.get(start, stop).to(run.device)
            yield Batch(run.hidden.get(start, stop).to(run.device), kwargs, reference, start)

    def some(self, windows: Sequence[int]) -> Batch:
        """The windows of these numbers."""
        run = self._run

        def of(kept: Activations | None) -> Any:
            if kept is None:
                return None
            return run.torch.cat([kept.get(i, i + 1) for i in windows]).to(run.device)

        kwargs = {} if self.is_head else run.kwargs[self.index]
        return Batch(of(run.hidden), kwargs, of(run.beside))

    def aim(self) -> None:
        """Work out what the uncompressed layer puts out, once for all; it is not held any longer. The head's products are not kept, they are too many."""
        assert self.module is not None
        if not self.is_head:
            self._pass_on()
            self.original, self._original_slots = None, {}

    def target(self, batch: Batch) -> Any:
        """(b, t, d): what the uncompressed layer puts out for its own inputs."""
        if self.original is None:
            return batch.reference
        with self._run.torch.no_grad():
            return first(self.original(batch.reference, **batch.kwargs))

    def passed(self, hidden: Any) -> Any:
        """(w, t, d): what the layer makes of other hidden states than the run's, window by window."""
        kwargs = self._run.kwargs[self.index]
        with self._run.torch.no_grad():
            return self._run.torch.cat([first(self.module(h, **kwargs)) for h in hidden.split(1)])

    @property
    def device(self) -> Any:
        return self._run.device

    def _pass_on(self) -> None:
        """What the uncompressed layer puts out in the place of what enters it, where that is not yet done."""
        run = self._run
        if self.original is None or run.beside is None:
            return
        for batch in self.batches():
            run.beside.put(batch.start, self.run(self.original, batch, reference=True))

    @contextmanager
    def slopes(self, roles: Collection[str]) -> Iterator[Callable[[Any], dict[str, Any]]]:
        """Inside, the matrices of `roles` have gradients: the function given gives those of a loss, (out, in) each."""
        run = self._run
        assert self.module is not None
        held: list[tuple[Any, Any]] = []
        for part in self._parts:
            for full, _, parameter in run.forward.parameters(part):
                bind = run.forward.bind(full, tuple(parameter.shape))
                if any(role in roles for role, _ in bind.parts):
                    held.append((bind, parameter))

        def gradients(loss: Any) -> dict[str, Any]:
            found: dict[str, list[Any]] = {}
            made = run.torch.autograd.grad(loss, [p for _, p in held], allow_unused=True)
            for (bind, parameter), gradient in zip(held, made, strict=True):
                full = run.torch.zeros_like(parameter) if gradient is None else gradient
                for role, view in pieces(bind, full):
                    if role in roles:
                        found.setdefault(role, []).append(view)
            return {role: v[0] if len(v) == 1 else run.torch.cat(v) for role, v in found.items()}

        for _, parameter in held:
            parameter.requires_grad_(True)
        try:
            yield gradients
        finally:
            for _, parameter in held:
                parameter.requires_grad_(False)

    def outputs(self) -> Iterator[Any]:
        """(b, t, d) of every batch, of the layer as it is now; of the head, its products before scales and caps."""
        for batch in self.batches():
            yield self.run(self.module, batch)

    def observe(self, watch: Mapping[str, Accumulator], *, reference: bool = False) -> None:
        """Every calibration batch once through the layer as it is now; accumulators get the (tokens, in) inputs of their roles.

        Roles of one stage may share an accumulator, which is then fed once. reference: with the same tokens' input in the uncompressed
        model; an expert's are the tokens that chose it in the compressed one.
        """
        run = self._run
        feeds = self._feeds(watch)
        if reference and run.beside is None:
            raise ValueError("observe(reference=True) needs walk(reference=True)")
        if not feeds:
            return
        module = self._heard
        owners = modules_of(self, module, set(feeds))
        twins = modules_of(self, self.original, set(feeds)) if reference else {}
        for batch in self.batches():
            theirs: dict[tuple[str, ...], Any] = {}
            if reference:
                self._listen(twins, self.original, batch, _keep(theirs), reference=True)

            def heard(roles: tuple[str, ...], x: Any, rest: Any, theirs: Any = theirs) -> None:
                if not _finite(run.torch, x):
                    raise run.not_finite(roles[0])
                self._deliver(feeds, roles, x, rest, theirs.get(roles))

            self._listen(owners, module, batch, heard)

    def _feeds(self, watch: Mapping[str, Accumulator]) -> dict[str, Accumulator]:
        """The roles of `watch` that are to be heard: of those that share an accumulator in one stage the first."""
        stage = {role: i for i, roles in enumerate(self.stages) for role in roles}
        seen: set[tuple[int, int]] = set()
        out = {}
        for role, accumulator in watch.items():
            if role not in stage:
                raise ValueError(f"{role} is no matrix of block {self.index}")
            key = (stage[role], id(accumulator))
            if key not in seen:
                out[role] = accumulator
            seen.add(key)
        return out

    def _listen(
        self,
        owners: Mapping[Any, tuple[str, ...]],
        module: Any,
        batch: Batch,
        heard: Callable[[tuple[str, ...], Any, Any], None],
        *,
        reference: bool = False,
    ) -> None:
        left = set(owners)

        def hook(owner: Any, x: Any, rest: Any) -> None:
            heard(owners[owner], x, rest)
            left.discard(owner)
            if not left:
                raise Enough

        with listening(owners, hook), suppress(Enough):
            self.run(module, batch, reference=reference)

    def _deliver(
        self, feeds: Mapping[str, Accumulator], roles: tuple[str, ...], x: Any, rest: Any, theirs: Any
    ) -> None:
        d, rows, last = self._run.model.decoder, None, -1
        for role in roles:
            found = expert_of(role)
            if found is None:
                feeds[role].add(x, theirs)
                continue
            expert, kind = found
            if expert != last:
                rows, last = rows_of(rest[0], expert), expert
            if not len(rows):  # type: ignore[arg-type]
                continue
            mine, other = x[rows], None if theirs is None else theirs[rows]
            if kind == "down":
                mine = down_input(mine, self.index, expert, self._slots, d)
                if other is not None:
                    other = down_input(other, self.index, expert, self._original_slots, d)
            feeds[role].add(mine, other)


class _Run:
    """What all blocks of one walk share."""

    def __init__(self, model: Model, job: Job, shown: text.Windows, device: Any, reference: bool) -> None:
        self.torch, _ = packages()
        self.model, self.shown, self.device, self.reference = model, shown, device, reference
        self.forward = Forward(model, lazily=True, fused=True, finite=True)
        self.plan = budget.Plan(1, False)
        self.kwargs: list[Mapping[str, Any]] = []
        self.hidden: Activations
        self.room: Callable[..., Activations]
        self.beside: Activations | None = None

    def start(self, plan: budget.Plan, folder: Folder, kept: Any) -> None:
        """Embed all windows, and find out what layers are called with."""
        self.plan = plan
        skeleton = Skeleton(self.forward, self.model, {i for w in self.shown.ids for i in w})
        count, length, hidden = len(self.shown.ids), self.shown.length, self.model.decoder.hidden

        rooms: dict[tuple[str, int], Activations] = {}

        def room(name: str, width: int, dtype: Any = "f32") -> Activations:
            """The same one for every layer, as fresh memory takes time to get."""
            if (name, width) not in rooms:
                file = folder.spill(name) if plan.spill else None
                rooms[name, width] = Activations(count, length, width, dtype, file)
            return rooms[name, width]

        self.room = room
        self.hidden = room("hidden", hidden, kept)
        self.beside = room("reference", hidden, kept) if self.reference else None
        for at in range(0, count, plan.batch):
            x = skeleton.entering(list(self.shown.ids[at : at + plan.batch]))
            for store in (self.hidden, self.beside):
                if store is not None:
                    store.put(at, x)
        self.kwargs = [moved(k, self.device) for k in skeleton.kwargs(self.shown.ids[0])]
        skeleton.release()

    def doubts(self, hidden: Any) -> tuple[str, ...]:
        """What the report should say of the text, where the uncompressed layers put out `hidden` (w, t, d) for its first windows."""
        norm = ending(self.forward)[0]
        self.forward.fill(norm)
        with self.torch.no_grad():
            normed = norm.to(self.device)(hidden)
        self.forward.drop(norm)
        ids = self.shown.ids
        mine = surprise.by_model(self.model, normed, ids[: len(hidden)])
        return surprise.doubts(self.shown.name, mine, surprise.by_frequency(ids, self.model.decoder.vocab))

    def install(self, block: Block, new: Mapping[str, Entry]) -> None:
        """What the Model says now, wherever the block may differ from it."""
        for role in block._changed | new.keys():
            weight = self.torch.from_numpy(effective(self.model.entries[role])).to(self.device)
            if not self.torch.equal(block.weight(role), weight):  # what is there already keeps its replays
                block.set(role, weight)

    def advance(self, block: Block) -> None:
        """The block's outputs in the place of its inputs."""
        for batch in block.batches():
            out = block.run(block.module, batch)
            if not _finite(self.torch, out):
                raise self.blame(block, batch)
            self.hidden.put(batch.start, out)
        block._pass_on()

    def blame(self, block: Block, batch: Batch) -> InputError:
        """The first matrix of a layer with outputs that are no numbers whose input is none either."""
        roles = {r for stage in block.stages for r in stage}
        bad: list[str] = []

        def heard(owned: tuple[str, ...], x: Any, rest: Any) -> None:
            if not bad and not _finite(self.torch, x):
                bad.append(owned[0])

        owners = modules_of(block, block.module, roles)
        block._listen(owners, block.module, batch, heard)
        return self.not_finite(bad[0] if bad else block.stages[-1][-1], "input" if bad else "output")

    def not_finite(self, role: str, what: str = "input") -> InputError:
        return InputError(
            f"{self.model.source or 'the model'}: the {what} of {role} holds NaN or infinite values on the calibration text; the "
            "weights before it are damaged or overflow in fp32"
        )


def _finite(torch: Any, x: Any) -> bool:
    """Whether all values are numbers; their sum says so mostly, for less than looking at each."""
    return bool(torch.isfinite(x.sum())) or bool(torch.isfinite(x).all())


def _keep(into: dict[tuple[str, ...], Any]) -> Callable[[tuple[str, ...], Any, Any], None]:
    def heard(roles: tuple[str, ...], x: Any, rest: Any) -> None:
        into[roles] = x

    return heard


def modules_of(block: Block, module: Any, roles: set[str]) -> dict[Any, tuple[str, ...]]:
    """The modules of a block, or of its original, that hold `roles`."""
    forward = block._run.forward
    if block.is_head:
        return {module[-1]: ("head",)}
    named = modules(forward, forward.layers[block.index], roles)
    paths = {m: n for n, m in forward.layers[block.index].named_modules()}
    return {module.get_submodule(paths[owner]): held for owner, held in named.items()}


def walk(
    model: Model,
    job: Job,
    visit: Callable[[Block], Mapping[str, Entry]],
    *,
    what: str,
    key: str,
    reference: bool = False,
    statistics: int = 0,
    head: bool = False,
) -> Model:
    """The model with the entries that `visit` returned of each block, read lazily from where finished layers are kept.

    what: the method, for progress and messages. key: a digest of the options that decide the result; the model, the text and
    what the engine itself depends on are added here. reference: the uncompressed model runs along. statistics: bytes that `visit`
    holds of one block at most, for `job.memory`; head: whether it loads the head's matrix. Report lines: those of windows, then those of blocks.
    """
    torch, _ = packages()
    device = _device(torch, job.device)
    path = job.text(what)
    shown = text.windows(model, replace(job.calibration, text=path))
    with threads(job.threads):
        run = _Run(model, job, shown, device, reference)
        plan = budget.plan(
            run.forward, model.decoder, shown, job, reference=reference, statistics=statistics, head=head
        )
        full = identity(
            key,
            __version__,
            job.activations,
            job.calibration.seed,
            shown.digest(),
            reference,
            plan.batch,  # windows that run at once: another number of them adds up in another order
            _of(model, job.work),
        )
        folder = Folder(job.work, full, what, resume=job.resume)
        try:
            return _walk(run, job, visit, plan, folder, what)
        finally:
            folder.clear()


def _walk(
    run: _Run,
    job: Job,
    visit: Callable[[Block], Mapping[str, Entry]],
    plan: budget.Plan,
    folder: Folder,
    what: str,
) -> Model:
    original, d = run.model, run.model.decoder
    run.start(plan, folder, job.activations)
    total = d.layers + (not d.tied)
    lines = [*text.unsaid(run.shown.notes, original), *plan.notes]
    asked = surprise.asked(run.shown)
    untouched = run.hidden.get(0, asked).to(run.device).clone() if asked else None
    for i in range(total):
        block = Block(run, i)
        if untouched is not None and i < d.layers:
            untouched = block.passed(untouched)
        done, why = folder.found(i) if job.resume else (None, "")
        if why:
            lines.append(f"{what}: layer {i} was computed again, as the finished one is damaged ({why})")
        if done is None:
            done = _visited(run, block, visit, folder)
        run.model = run.model.with_entries(done.entries)
        lines += done.report
        if i < total - 1:
            assert block.module is not None
            run.install(block, done.entries)
            run.advance(block)
        if block._module is not None:
            for part in block._module if block.is_head else (block._module,):
                run.forward.drop(part)
        give_back()
        job.tell(what, i + 1, total)
    if untouched is not None:
        lines += text.unsaid(run.doubts(untouched), original)
    folder.finish()
    return replace(run.model, report=(*original.report, *lines))


def _visited(run: _Run, block: Block, visit: Callable[[Block], Mapping[str, Entry]], folder: Folder) -> Done:
    new = visit(block)
    mine = {"head", "head.bias", "norm", "norm.bias"} if block.is_head else None
    for name in new:
        if name not in run.model.entries or not (
            name in mine if mine is not None else name.startswith(f"layers.{block.index}.")
        ):
            raise ValueError(f"{name} is no entry of block {block.index}")
    return folder.save(block.index, new, tuple(block.report))


def _slots(run: _Run, parts: Any, named: tuple[Any, ...] | None = None) -> dict[str, Slot]:
    """Where canonical weights lie in `parts`; `named`: the parts of the model that these are copies of."""
    out: dict[str, Slot] = {}
    for part, own in zip(parts, named or parts, strict=True):
        out |= slots(run.forward, part, run.model, own)
    return out


def _device(torch: Any, name: str) -> Any:
    try:
        device = torch.device(name)
    except RuntimeError:
        raise OptionError(f"--device {name}: no such device; choose cpu or cuda") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise OptionError(
            f"--device {name}: no GPU; torch {torch.__version__} finds none, so use --device cpu"
        )
    if device.type not in ("cpu", "cuda"):
        raise OptionError(f"--device {name}: calibration runs on cpu or cuda")
    return device


def _of(model: Model, work: Path | None) -> str:
    """What tells this model from others without reading its weights: where they come from, and what was done to them.

    Files of finished layers are named by what decides them, so when they were written does not matter.
    """
    own = "" if work is None else str(work)
    entries = [
        (
            name,
            e.shape,
            e.data.origin,
            [(f, s[:2]) for f, s in e.data.files if not (own and f.startswith(own))],
            e.provenance,
        )
        for name, e in model.entries.items()
    ]
    return identity(entries, dict(model.config), model.report)
