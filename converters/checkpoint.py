"""Quantized Hugging Face folders as a target: compressed-tensors, GPTQ, AWQ, FP8, ModelOpt, bitsandbytes, gpt-oss's own, or plain.

`plan` takes what every linear module holds (`checkpoint_modules`), chooses the model's dtype (`checkpoint_dtype`), and lays the
tensors out through the format's Writer. Side tensors are looked at, weights are not.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from math import prod
from typing import Any

import numpy as np

from lconvert.archs import find
from lconvert.converters import hf, mxfp4_experts, replaced, serving
from lconvert.converters.carry import WEIGHT_ONLY, describe
from lconvert.converters.checkpoint_dtype import model_dtype, stored_scale, with_input_scale
from lconvert.converters.checkpoint_modules import Linear, Lowered, Options, linears, lowered, pieces, writer
from lconvert.converters.regrid import numbers
from lconvert.formats import bitsandbytes, modelopt, safetensors
from lconvert.formats.scheme import Held, Stored, Writer
from lconvert.ir import Model, QTensor, Tensor, as_f32
from lconvert.kernels.qtensor import dequantize, effective
from lconvert.passes import fused
from lconvert.plan import MEASURE_EVERY, SIDE, Item, Plan, Slab, Verdict, known, refused, sources
from lconvert.primitives.levels import power_of_two_above

__all__ = ["Options", "plan"]


# --- items ----------------------------------------------------------------------------------------------


def _errors(held: QTensor, linear: Linear, original: Model) -> Callable[[int, int], tuple[float, float]]:
    """Squared error and squared norm of a sample of rows of one module against the source."""
    spans, at = [], 0
    for role, (a, b) in pieces(linear.bind):
        spans.append((at, at + b - a, role, a))
        at += b - a

    def measure(start: int, stop: int) -> tuple[float, float]:
        error = norm = 0.0
        for row in range(-(-start // MEASURE_EVERY) * MEASURE_EVERY, stop, MEASURE_EVERY):
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


def _unquantized(item: Item, model: Model, options: Options) -> Item:
    """A tensor in the model's dtype; not a stack of quantized experts, whose bits would be lost to the reader unasked."""
    stacked = len(item.shape) > 2 and any(isinstance(model.entries[r].data, QTensor) for r in item.sources)
    if not stacked or options.allow_requantize:
        return item
    reason = (
        f"its experts are stored in one tensor, for which {options.format} has no quantized layout; leave experts plain, or "
        f"store their values in {item.type} (--allow-requantize, or --to dense)"
    )
    return refused(item.name, item.shape, item.sources, Verdict("refused", reason))


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
    for group in fused.groups(model.decoder):
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
    return dict.fromkeys(heads, Held(None)) if model.decoder.tied else {}


def _kv_items(model: Model, fmt: Writer, attention: Mapping[int, str]) -> Iterator[Item]:
    """The static scales of the KV cache, one tensor per layer and side."""
    if model.kv is None:
        return
    for template, side in zip(fmt.kv_names, (model.kv.k, model.kv.v), strict=True):
        if side.scale is None:
            continue
        scale = side.scale.load()
        for i, attn in attention.items():
            yield known(template.format(attn=attn), side.scale.dtype, scale[i : i + 1], (f"kv.{i}",))


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
    held = [stored_scale(h, dtype, options) for h in held]
    if options.runtime == "tensorrt-llm":
        held = [with_input_scale(h, dtype) for h in held]
    fmt = writer(options.format)
    if isinstance(fmt, bitsandbytes.Writer):
        fmt = replace(fmt, dtype=hf.TORCH_NAMES[dtype])
    ranges = _fp8_ranges(model, held) if options.format == "modelopt" else {}
    quantized = {h.bind.hf: h for h in held if h.held.weight is not None or h.verdict.kind == "refused"}
    items: list[Item] = []
    for item in hf.to_hf(model, dtype):
        linear = quantized.get(item.name)
        if linear is None:
            items.append(_unquantized(item, model, options))
        elif linear.verdict.kind == "refused":
            items.append(refused(item.name, item.shape, linear.roles, linear.verdict))
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
    config = hf.config(model, dtype)
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
    items = list(hf.to_hf(model, dtype))
    return _folder(model, options, hf.config(model, dtype), items, {}, notes)


def _plan_mxfp4(ready: Lowered, options: Options) -> Plan:
    model, notes = ready.model, ready.notes
    dtype = mxfp4_experts.dtype(model_dtype(model, [], options), options.dtype, options.runtime)
    items = mxfp4_experts.items(
        model, ready.original, dtype, ready.done, allow_requantize=options.allow_requantize
    )
    if any(e.activation is not None for e in model.entries.values()):
        notes = (*notes, "how inputs are quantized is left out: the folder holds weights alone")
    config = hf.config(model, dtype)
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
    files = list(hf.files(model, config, items))
    files += [hf.text_file(name, json.dumps(data, indent=1) + "\n") for name, data in extra.items()]
    said = {k: v for k, v in vars(options).items() if v}
    return Plan(
        options.runtime or options.format,
        tuple(files),
        sources(model),
        said,
        notes=(*model.report, *notes),
        values=replaced.values(model),
    )
