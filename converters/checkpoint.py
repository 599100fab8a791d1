"""Quantized Hugging Face folders as a target: compressed-tensors, GPTQ, AWQ, FP8, ModelOpt, bitsandbytes, gpt-oss's own, or plain.

`plan` asks for every linear module how the format holds its numbers exactly (`carry`), sees that modules which runtimes fuse
agree (`fusion`), chooses the model's dtype so that scales survive in it, and lays the tensors out through the format's
Writer. Side tensors are looked at, weights are not.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lconvert.archs import find
from lconvert.archs.common import Bind, binds
from lconvert.converters import act_order, fold, fusion, hf, mxfp4_experts, serving
from lconvert.converters.carry import WEIGHT_ONLY, Carried, carry, describe, requantized
from lconvert.converters.regrid import holds, nearest, numbers, recast
from lconvert.errors import OptionError
from lconvert.formats import bitsandbytes, modelopt, safetensors
from lconvert.formats.scheme import Held, Stored, Writer
from lconvert.ir import Model, QTensor, Tensor, Transform, as_f32, concat_quantized, dense, take_quantized
from lconvert.kernels.qtensor import dequantize, effective
from lconvert.passes import fused
from lconvert.passes.rtn_float import power_of_two_above
from lconvert.plan import SIDE, FilePlan, Item, Plan, Slab, Verdict, sources, worst

#: Every row of this many is compared with the source to measure the error of a rounding.
_MEASURE_EVERY = 16


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


def writer(format: str) -> Writer:
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
    for group in fused.groups(model.arch):
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


def _pieces(bind: Bind) -> Iterator[tuple[str, tuple[int, int]]]:
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
    for role, span in _pieces(bind):
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
        if options.format != "dense" and found.held.weight is not None and found.verdict.kind != "refused":
            shape = bind.shape[::-1] if bind.transpose else bind.shape
            problem = _problem(options, shape, found.held)
            if problem is None and bind.transpose and "weight" in writer(options.format).store(found.held):
                problem = (
                    "the model stores this matrix transposed, which runtimes would apply to its codes as well"
                )
            if problem is not None:
                found = replace(found, verdict=Verdict("refused", problem))
        out.append(Linear(module, bind, found.held, found.verdict))
    return out


# --- dtype -----------------------------------------------------------------------------------------------

_TORCH = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}
_NAMES = {v: k for k, v in _TORCH.items()}


def model_dtype(model: Model, held: list[Linear], options: Options) -> str:
    """The dtype that the config will name: the source's own if every scale survives in it, else another 16-bit one."""
    if options.dtype:
        return options.dtype
    own = str(model.config.get("dtype") or model.config.get("torch_dtype") or "bfloat16").removeprefix(
        "torch."
    )
    first = _TORCH.get(own, "BF16")
    if not any(h.held.weight for h in held):
        return first
    choices = list(dict.fromkeys([first if first != "F32" else "BF16", "BF16", "F16"]))
    return next((d for d in choices if all(_survives(h, d, options) for h in held)), choices[0])


def casts(held: Held, format: str, runtime: str = "") -> bool:
    """Whether a runtime turns the plain scales of this module into the model's dtype when it loads it.

    vLLM: weight-only integers (params_dtype). TensorRT-LLM: W4A16_AWQ_LinearMethod.create_weights, tensorrt_llm/_torch/
    modules/linear.py.
    """
    q = held.weight
    if q is None or not isinstance(q.scale, Tensor):
        return False
    weight_only = q.grid.kind == "int" and held.activation is None
    by_format = FORMATS[format].cast_scales or (format == "compressed-tensors" and weight_only)
    return by_format or (runtime == "tensorrt-llm" and weight_only)


def _survives(linear: Linear, dtype: str, options: Options) -> bool:
    q = linear.held.weight
    if (
        q is None
        or not casts(linear.held, options.format, options.runtime)
        or not isinstance(q.scale, Tensor)
    ):
        return True
    return holds(q.scale, dtype)


def _stored_scale(linear: Linear, dtype: str, options: Options) -> Linear:
    """Scales in the dtype in which the runtime holds them: exactly, or with the verdict that says otherwise."""
    q = linear.held.weight
    if q is None or not isinstance(q.scale, Tensor) or dtype in (q.scale.dtype, "F32"):
        return linear
    if not casts(linear.held, options.format, options.runtime):
        return linear
    verdict = linear.verdict
    if holds(q.scale, dtype):
        scale = recast(q.scale, dtype)
    else:
        value = numbers(q.scale)
        if dtype == "F16" and float(np.abs(value).max()) > 65504:
            reason = f"a scale of {float(np.abs(value).max()):.3g} is beyond F16; serve the model in bfloat16"
            return replace(linear, verdict=Verdict("refused", reason))
        if verdict.kind in ("exact", "widened"):
            verdict = Verdict("rounded", f"scales from {q.scale.dtype} to the model's {dtype}")
        scale = dense(nearest(value, dtype), dtype, q.scale.origin)  # type: ignore[arg-type]
    return replace(linear, held=replace(linear.held, weight=replace(q, scale=scale)), verdict=verdict)


def _with_input_scale(linear: Linear, dtype: str) -> Linear:
    """An int4 matrix that TensorRT-LLM does not fuse gets a scale of its input, of ones: its loader demands one.

    W4A16_AWQ_LinearMethod.load_weights_vanilla, tensorrt_llm/_torch/modules/linear.py.
    """
    q = linear.held.weight
    fusible = any(r.rpartition(".")[2] in ("q", "k", "v", "gate", "up") for r in linear.roles)
    if q is None or q.grid.kind != "int" or q.grid.bits != 4 or linear.held.transform is not None or fusible:
        return linear
    ones = np.ones(q.shape[1], np.float32)
    param = dense(nearest(ones, dtype), dtype)  # type: ignore[arg-type]
    identity = Transform("scale", "input", param, folded=False)
    return replace(linear, held=replace(linear.held, transform=identity))


# --- items -----------------------------------------------------------------------------------------------


def _errors(held: QTensor, linear: Linear, original: Model) -> Callable[[int, int], tuple[float, float]]:
    """Squared error and squared norm of a sample of rows of one module against the source."""
    spans, at = [], 0
    for role, (a, b) in _pieces(linear.bind):
        spans.append((at, at + b - a, role, a))
        at += b - a

    def measure(start: int, stop: int) -> tuple[float, float]:
        error = norm = 0.0
        for row in range(-(-start // _MEASURE_EVERY) * _MEASURE_EVERY, stop, _MEASURE_EVERY):
            lo, _, role, first = next(s for s in spans if s[0] <= row < s[1])
            exact = effective(original.entries[role], first + row - lo, first + row - lo + 1).astype(
                np.float64
            )
            now = dequantize(held, row, row + 1).astype(np.float64)
            if linear.held.transform is not None and linear.held.transform.param is not None:
                param = linear.held.transform.param
                now = now * as_f32(param.load(), param.dtype)
            error += float(np.square(now - exact).sum())
            norm += float(np.square(exact).sum())
        return error, norm

    return measure


def _slab(stored: Stored, rows: int, weight_rows: int, measure: Any, start: int, stop: int) -> Slab:
    """Rows of a stored tensor; one that is made in one piece, or has other rows than the weight, is measured at once."""
    whole = rows == 1
    first, last = (0, stored.shape[0] if stored.shape else 1) if whole else (start, stop)
    data = np.ascontiguousarray(stored.read(first, last))
    if measure is None or (rows != weight_rows and start > 0):
        return Slab(data)
    return Slab(data, *(measure(start, stop) if rows == weight_rows else measure(0, weight_rows)))


def _items(linear: Linear, fmt: Writer, original: Model) -> Iterator[Item]:
    """The stored tensors of a quantized module; offsets come later."""
    q = linear.held.weight
    assert q is not None
    measured = linear.verdict.kind not in ("exact", "widened")
    main = True
    for suffix, stored in fmt.store(linear.held).items():
        rows = 1 if stored.whole or not stored.shape else stored.shape[0]
        size = prod(stored.shape) * safetensors.DTYPE_BITS[stored.dtype] // 8
        measure = _errors(q, linear, original) if main and measured else None

        produce = partial(_slab, stored, rows, q.rows, measure)
        row_bytes = size // rows if rows else 0
        source_row = q.size * 2 // rows if rows else 0
        verdict = linear.verdict if main or linear.verdict.kind in ("exact", "widened") else Verdict("exact")
        yield Item(
            f"{linear.module}.{suffix}",
            stored.dtype,
            stored.shape,
            0,
            rows,
            row_bytes,
            source_row,
            linear.roles,
            verdict,
            produce,
            held=describe(linear.held) if main else SIDE,
        )
        main = False


def _refused(name: str, shape: tuple[int, ...], roles: tuple[str, ...], verdict: Verdict) -> Item:
    def produce(start: int, stop: int) -> Slab:
        raise AssertionError("a refused tensor is never produced")

    return Item(name, "-", shape, 0, 0, 0, 0, roles, verdict, produce)


def _unquantized(t: hf.HfTensor, model: Model, options: Options) -> Item:
    """A tensor in the model's dtype; not a stack of quantized experts, whose bits would be lost to the reader unasked."""
    stacked = len(t.shape) > 2 and any(isinstance(model.entries[r].data, QTensor) for r in t.sources)
    if not stacked or options.allow_requantize:
        return hf.item(t)
    reason = (
        f"its experts are stored in one tensor, for which {options.format} has no quantized layout; leave experts plain, or "
        f"store their values in {t.dtype} (--allow-requantize, or --to dense)"
    )
    return _refused(t.name, t.shape, t.sources, Verdict("refused", reason))


def _fp8_ranges(model: Model, held: list[Linear]) -> dict[str, float]:
    """weight_scale_2 of W4A8_AWQ by role: with it TensorRT-LLM brings int4 weights into FP8's range, equal in fused modules.

    A power of two at or above the largest weight over 448, found from the scales alone: dividing by it is exact.
    """
    tops: dict[str, float] = {}
    for h in held:
        q = h.held.weight
        if (
            q is not None
            and q.grid.kind == "int"
            and h.held.activation is not None
            and isinstance(q.scale, Tensor)
        ):
            top = float(np.abs(numbers(q.scale)).max()) * (1 << (q.grid.bits - 1))
            tops |= dict.fromkeys(h.roles, power_of_two_above(top / 448))
    for group in fused.groups(model.arch):
        found = [tops[r] for r in group if r in tops]
        tops |= {r: max(found) for r in group if r in tops}
    return tops


def _for_module(fmt: Writer, linear: Linear, ranges: Mapping[str, float]) -> Writer:
    if linear.roles[0] not in ranges or not isinstance(fmt, modelopt.Writer):
        return fmt
    return replace(fmt, weight_scale_2=ranges[linear.roles[0]])


def _tied_head(model: Model) -> dict[str, Held]:
    """The head of a model that shares the embedding's weights: a linear module without a tensor, which stays plain."""
    heads = [n.hf.removesuffix(".weight") for n in find(model.arch.family).names if n.roles == ("head",)]
    return dict.fromkeys(heads, Held(None)) if model.arch.tied else {}


def _small(name: str, array: NDArray[Any], dtype: str, roles: tuple[str, ...]) -> Item:
    data = np.ascontiguousarray(array).tobytes()
    return Item(
        name, dtype, array.shape, 0, 1, len(data), len(data), roles, Verdict("exact"), lambda a, b: Slab(data)
    )


def _kv_items(model: Model, fmt: Writer, attention: Mapping[int, str]) -> Iterator[Item]:
    """The static scales of the KV cache, one tensor per layer and side."""
    if model.kv is None:
        return
    for template, side in zip(fmt.kv_names, (model.kv.k, model.kv.v), strict=True):
        if side.scale is None:
            continue
        scale = side.scale.load()
        for i, attn in attention.items():
            yield _small(template.format(attn=attn), scale[i : i + 1], side.scale.dtype, (f"kv.{i}",))


# --- the plan --------------------------------------------------------------------------------------------


def plan(model: Model, options: Options, original: Model | None = None) -> Plan:
    """The folder of a quantized model: config, weights, tokenizer. Execute it into the folder.

    original: the model before passes, against which roundings are measured. Raises OptionError for options that contradict
    each other and UnsupportedError for what has no place in the format.
    """
    ready = lowered(model, options, original)
    model, notes = ready.model, ready.notes
    if options.format == "mxfp4":
        return _plan_mxfp4(ready, options)
    held = linears(ready, options)
    dtype = model_dtype(model, held, options)
    if options.format == "dense":
        return _plan_dense(model, dtype, options, notes)
    held = [_stored_scale(h, dtype, options) for h in held]
    if options.runtime == "tensorrt-llm":
        held = [_with_input_scale(h, dtype) for h in held]
    fmt = writer(options.format)
    if isinstance(fmt, bitsandbytes.Writer):
        fmt = replace(fmt, dtype=_NAMES[dtype])
    ranges = _fp8_ranges(model, held) if options.format == "modelopt" else {}
    quantized = {h.bind.hf: h for h in held if h.held.weight is not None or h.verdict.kind == "refused"}
    items: list[Item] = []
    for t in hf.to_hf(model, dtype):
        linear = quantized.get(t.name)
        if linear is None:
            items.append(_unquantized(t, model, options))
        elif linear.verdict.kind == "refused":
            items.append(_refused(t.name, t.shape, linear.roles, linear.verdict))
        else:
            items += _items(linear, _for_module(fmt, linear, ranges), ready.original)
    attention = {
        int(h.roles[0].split(".")[1]): h.module.rpartition(".")[0]
        for h in held
        if any(r.endswith((".attn.k", ".attn.k_b")) for r in h.roles)
    }
    items += _kv_items(model, fmt, attention)
    modules = {h.module: h.held for h in held} | _tied_head(model)
    kv = model.kv
    weights = [h.weight for h in modules.values() if h.weight is not None]
    notes = (*notes, *serving.notes(options.runtime, options.format, weights))
    if options.format in WEIGHT_ONLY and any(e.activation is not None for e in model.entries.values()):
        notes = (
            *notes,
            "how inputs are quantized is left out: the format holds weights, which run at the model's precision",
        )
    config = hf.config(model, _NAMES[dtype])
    extra: dict[str, Any] = {}
    if not any(i.verdict.kind == "refused" for i in items) and (
        kv is not None or any(h.weight for h in modules.values())
    ):
        config["quantization_config"] = fmt.config(modules, kv)
        extra = fmt.side_files(config["quantization_config"])
    return _folder(model, options, config, items, extra, notes)


def _plan_dense(model: Model, dtype: str, options: Options, notes: tuple[str, ...]) -> Plan:
    if model.kv is not None:
        notes = (*notes, "the quantization of the KV cache is not part of a plain checkpoint")
    items = [hf.item(t) for t in hf.to_hf(model, dtype)]
    return _folder(model, options, hf.config(model, _NAMES[dtype]), items, {}, notes)


def _plan_mxfp4(ready: Lowered, options: Options) -> Plan:
    model, notes = ready.model, ready.notes
    dtype = mxfp4_experts.dtype(model_dtype(model, [], options), options.dtype, options.runtime)
    items = mxfp4_experts.items(
        model, ready.original, dtype, ready.done, allow_requantize=options.allow_requantize
    )
    if any(e.activation is not None for e in model.entries.values()):
        notes = (*notes, "how inputs are quantized is left out: the folder holds weights alone")
    config = hf.config(model, _NAMES[dtype])
    if not any(i.verdict.kind == "refused" for i in items):
        config["quantization_config"] = writer("mxfp4").config({}, model.kv)
    return _folder(model, options, config, items, {}, notes)


def _folder(
    model: Model,
    options: Options,
    config: dict[str, Any],
    items: list[Item],
    extra: dict[str, Any],
    notes: tuple[str, ...],
) -> Plan:
    real = [i for i in items if i.type != "-"]
    head, offsets = safetensors.header_bytes([(i.name, i.type, i.shape) for i in real], {"format": "pt"})
    placed = sorted(
        (replace(i, offset=at) for i, at in zip(real, offsets, strict=True)), key=lambda i: i.offset
    )
    end = max((i.offset + i.nbytes for i in placed), default=len(head))
    listed = tuple(placed) + tuple(i for i in items if i.type == "-")
    files = hf.text_files(model, config)
    files += [hf.text_file(name, json.dumps(data, indent=1) + "\n") for name, data in extra.items()]
    files.insert(1, FilePlan("model.safetensors", head, listed, end))
    said = {k: v for k, v in vars(options).items() if v}
    return Plan(
        options.runtime or options.format, tuple(files), sources(model), said, notes=(*model.report, *notes)
    )
