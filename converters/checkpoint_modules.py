"""What every linear module of a quantized folder holds, and with which verdict.

Each is asked how the format holds its numbers exactly (`carry`); modules which runtimes fuse are made to agree (`fusion`).
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cache, partial
from typing import Any

from lconvert.archs import find
from lconvert.archs.common import Bind, binds
from lconvert.converters import act_order, fold, fusion, serving
from lconvert.converters.carry import Carried, carry, requantized
from lconvert.errors import OptionError
from lconvert.formats.scheme import Held, Writer
from lconvert.ir import Model, QTensor, concat_quantized, take_quantized
from lconvert.passes import fused
from lconvert.passes.rotate import untied
from lconvert.plan import Verdict, worst


@dataclass(frozen=True)
class Format:
    """A container: the module and the keywords of its Writer; `cast_scales`: a runtime holds plain scales in the model's
    dtype (vLLM's WNA16, GPTQ and AWQ kernels allocate them with params_dtype); `transforms`: it stores pre_quant_scale."""

    module: str
    options: Mapping[str, Any] = field(default_factory=dict)
    cast_scales: bool = False
    transforms: bool = False


FORMATS: Mapping[str, Format] = {
    "compressed-tensors": Format("compressed_tensors"),
    "gptq": Format("gptq", {"version": 1}, cast_scales=True),
    "gptq_v2": Format("gptq", {"version": 2}, cast_scales=True),
    "awq": Format("awq", cast_scales=True),
    "fp8": Format("fp8"),
    "modelopt": Format("modelopt", transforms=True),
    "bitsandbytes": Format("bitsandbytes"),
    "mxfp4": Format("mxfp4_blocks"),
}


@dataclass(frozen=True)
class Options:
    """format: one of FORMATS, or "dense". dtype: of the model (BF16, F16, F32), None to choose. runtime: "vllm" or
    "tensorrt-llm" to apply what its loader refuses. allow_requantize: round again what the format cannot hold."""

    format: str = "compressed-tensors"
    dtype: str | None = None
    runtime: str = ""
    allow_requantize: bool = False

    def __post_init__(self) -> None:
        if self.format not in (*FORMATS, "dense"):
            raise OptionError(f"format {self.format!r}; choose {', '.join(FORMATS)} or dense")
        if self.dtype not in (None, "BF16", "F16", "F32"):
            raise OptionError(f"dtype {self.dtype!r}; choose BF16, F16 or F32")


@cache
def writer(format: str) -> Writer:
    """The Writer of one of FORMATS."""
    f = FORMATS[format]
    made: Writer = importlib.import_module(f"lconvert.formats.{f.module}").Writer(**f.options)
    return made


# --- linear modules --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Linear:
    """One linear module of the artifact: its name, the source tensor it replaces, what it holds and with which verdict."""

    module: str
    bind: Bind
    held: Held
    verdict: Verdict

    @property
    def roles(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(role for role, _ in self.bind.parts))


def _is_linear(bind: Bind) -> bool:
    roles = [role for role, _ in bind.parts]
    plain = len(bind.shape) == 2 and bind.row is None and not bind.experts
    return plain and not any("embed" in r or "norm" in r for r in roles)


@dataclass(frozen=True)
class Lowered:
    """A model ready for a format, and what the way there did to entries (role -> verdict, where it was not exact)."""

    model: Model
    original: Model
    notes: tuple[str, ...] = ()
    done: Mapping[str, Verdict] = field(default_factory=dict)


def lowered(model: Model, options: Options, original: Model | None = None) -> Lowered:
    """Unfolded scales and act-order moved to where the format has a place for them."""
    original = original or model
    if "head" in model.entries and "head" not in original.entries:
        original = untied(original)  # a pass made it: the original's is its embedding
    notes: tuple[str, ...] = ()
    done: dict[str, Verdict] = {}
    for role, entry in model.entries.items():
        before = original.entries[role].data
        if before is not entry.data:
            note = entry.provenance[-1] if entry.provenance else ""
            done[role] = Verdict("requantized" if isinstance(before, QTensor) else "quantized", note)
    for_this = options.format != "dense" and FORMATS[options.format].transforms
    stored = (for_this and not _int4(model)) or options.format == "dense"
    if options.runtime == "tensorrt-llm" or not stored:
        # A plain checkpoint multiplies the values themselves; TensorRT-LLM reads the scales of o_proj and down_proj alone.
        folded = fold.transforms(model, norms_only=for_this)
        model, notes = folded.model, folded.notes
        original = fold.transforms(original, norms_only=for_this).model
        done |= {
            r: Verdict("rounded", "the product with a scale of inputs")
            for r in folded.rounded
            if r not in done
        }
    if options.format != "dense" and (options.runtime or not options.format.startswith("gptq")):
        model, said = act_order.absorb(model)
        original = act_order.absorb(original)[0]
        notes = (*notes, *said)
    return Lowered(model, original, notes, done)


def _int4(model: Model) -> bool:
    """Whether inputs of int4 matrices are scaled: TensorRT-LLM's layout for them, which is ModelOpt's, has norms folded."""
    scaled = (e.data for e in model.entries.values() if e.transform is not None and not e.transform.folded)
    return any(isinstance(q, QTensor) and (q.grid.kind, q.grid.bits) == ("int", 4) for q in scaled)


def _carried(ready: Lowered, options: Options) -> dict[str, Carried]:
    """Every entry as the format holds it."""
    model = ready.model
    out: dict[str, Carried] = {}
    for role, entry in model.entries.items():
        if len(entry.data.shape) != 2:
            continue
        plain = options.format == "dense"
        found = carry(
            entry,
            None if plain else partial(_problem, options, entry.shape),
            options.format,
            allow_requantize=options.allow_requantize,
            transforms=not plain and FORMATS[options.format].transforms,
        )
        if role in ready.done and found.verdict.kind in ("exact", "widened"):
            found = replace(found, verdict=ready.done[role])
        out[role] = found
    for group in fused.groups(model.decoder):
        members = {r: out[r].held for r in group if r in out}
        if len(members) < 2 or any(out[r].verdict.kind == "refused" for r in members):
            continue
        unified = fusion.unify(members)
        if isinstance(unified, str) and options.allow_requantize:
            for r in members:
                entry = model.entries[r]
                if isinstance(entry.data, QTensor):
                    out[r] = requantized(entry, partial(_problem, options, entry.shape), options.format)
            unified = fusion.unify({r: out[r].held for r in members})
        if not isinstance(unified, str) and _spoiled(members, unified, model, options):
            if options.allow_requantize and (largest := fusion.to_largest(members)) is not None:
                verdict = Verdict("requantized", "rounded to the largest scale of its fused module")
                out |= {
                    r: Carried(h, verdict) for r, h in largest.items() if h.weight is not out[r].held.weight
                }
                continue
            unified = (
                "its parts have different scales per tensor, of which runtimes take the largest, and a scale per row has no "
                "place beside how their input is quantized; --allow-requantize rounds them to the largest"
            )
        for role in members:
            if isinstance(unified, str):
                reason = f"{', '.join(r.split('.', 2)[-1] for r in members)}: {unified}"
                out[role] = replace(out[role], verdict=Verdict("refused", reason))
            elif unified[role].weight is not out[role].held.weight:
                verdict = out[role].verdict
                wider = (
                    Verdict("widened", "restated for its fused module")
                    if verdict.kind == "exact"
                    else verdict
                )
                out[role] = Carried(unified[role], wider)
    return out


def _spoiled(
    members: Mapping[str, Held], unified: Mapping[str, Held], model: Model, options: Options
) -> bool:
    """Whether a form that is alike in all members is none that the format holds."""
    return any(
        held.weight is not members[r].weight and _problem(options, model.entries[r].shape, held) is not None
        for r, held in unified.items()
    )


def _problem(options: Options, shape: tuple[int, ...], held: Held) -> str | None:
    """Why the format, or the runtime that is to load it, cannot have a module in this form."""
    found = writer(options.format).problem(held)
    return found or serving.problem(options.runtime, options.format, held, shape)


def pieces(bind: Bind) -> Iterator[tuple[str, tuple[int, int]]]:
    """(role, rows of the role) in the order of the source tensor's rows."""
    placed = []
    for role, ranges in bind.parts:
        at = 0
        for start, stop in ranges:
            placed.append((start, role, (at, at + stop - start)))
            at += stop - start
    for _, role, rows in sorted(placed):
        yield role, rows


def _fused(bind: Bind, carried: Mapping[str, Carried]) -> Carried:
    """What the module of a bind holds: the rows of its roles in order."""
    roles = list(dict.fromkeys(role for role, _ in bind.parts))
    verdict = worst(carried[r].verdict for r in roles)
    first = carried[roles[0]].held
    if len(roles) == 1 or first.weight is None or verdict.kind == "refused":
        return Carried(first, verdict)
    rows = []
    for role, span in pieces(bind):
        part = carried[role].held.weight
        assert part is not None  # fusion.unify has seen to it
        rows.append(take_quantized(part, (span,)))
    try:
        whole = concat_quantized(tuple(rows))
    except ValueError as e:
        return Carried(Held(None), Verdict("refused", str(e)))
    return Carried(replace(first, weight=whole), verdict)


def linears(ready: Lowered, options: Options) -> list[Linear]:
    """Every linear module of the artifact and what it holds."""
    arch = find(ready.model.arch.family)
    carried = _carried(ready, options)
    out = []
    for bind in binds(arch.names, ready.model.arch):
        if not _is_linear(bind):
            continue
        found = _fused(bind, carried)
        module = bind.hf.removesuffix(".weight")
        if found.held.weight is not None and found.verdict.kind != "refused":
            problem = _of_the_whole(bind, found.held, options)
            if problem is not None:
                found = replace(found, verdict=Verdict("refused", problem))
        out.append(Linear(module, bind, found.held, found.verdict))
    return out


def _of_the_whole(bind: Bind, held: Held, options: Options) -> str | None:
    """Why the format cannot have a module although it has each of its parts, which were asked one by one."""
    shape = bind.shape[::-1] if bind.transpose else bind.shape
    if bind.parts[1:] and (problem := _problem(options, shape, held)) is not None:
        return problem
    if bind.transpose and "weight" in writer(options.format).store(held):
        return "the model stores this matrix transposed, which runtimes would apply to its codes as well"
    return None
