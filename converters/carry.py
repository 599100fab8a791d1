"""How a format holds the numbers of one entry: exactly, in a wider form, rounded again where that is allowed, or not at all.

For each format `candidates` lists the forms it could take, the most faithful first; the Writer's `problem` decides, and the
first reason is what the user reads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial

import numpy as np

from lconvert.converters import regrid
from lconvert.formats.scheme import Held
from lconvert.ir import E4M3, E8M0, UE4M3, ActSpec, Entry, QTensor, Tensor, dense, row_blocks
from lconvert.kernels.qtensor import effective
from lconvert.passes import rtn
from lconvert.plan import Kind, Verdict

#: Why a format or the runtime behind it cannot have a module in this form, in words; None if it can.
Problem = Callable[[Held], str | None]


@dataclass(frozen=True)
class Carried:
    """What a module will hold, and the verdict."""

    held: Held
    verdict: Verdict


@dataclass(frozen=True)
class Integers:
    """Integer forms of a format: the widths it has for symmetric and asymmetric codes, and the dtypes of its scales."""

    symmetric: tuple[int, ...]
    asymmetric: tuple[int, ...]
    scales: tuple[str, ...] = ("F16", "BF16")


_WIDTHS = (2, 3, 4, 5, 6, 7, 8)
INTEGERS: Mapping[str, Integers] = {
    "compressed-tensors": Integers(_WIDTHS, _WIDTHS),
    "gptq": Integers((2, 3, 4, 8), (2, 3, 4, 8)),
    "gptq_v2": Integers((2, 3, 4, 8), (2, 3, 4, 8)),
    "awq": Integers((), (4,)),
    "modelopt": Integers((4, 8), (), ("F32", "BF16", "F16")),
}

#: What a format rounds to where it cannot hold a source and may round again: options of the pass rtn.
FALLBACK: Mapping[str, Mapping[str, object]] = {
    "compressed-tensors": {"grid": "int4", "group": 128},
    "gptq": {"grid": "int4", "group": 128},
    "gptq_v2": {"grid": "int4", "group": 128},
    "awq": {"grid": "uint4", "group": 128},
    "fp8": {"grid": "fp8", "group": "block"},
    "modelopt": {"grid": "int4", "group": 128},
    "bitsandbytes": {"grid": "nf4", "group": 64},
}

#: What a format that quantizes inputs as well says of them then.
FALLBACK_INPUTS: Mapping[str, ActSpec] = {"fp8": ActSpec(E4M3, "group", dynamic=True, group=128)}


def _integer_forms(q: QTensor, widths: Integers) -> Iterator[QTensor]:
    whole = regrid.integers(q)
    if whole is None:
        return
    whole = row_blocks(whole)
    for bits in widths.symmetric:
        if (form := regrid.symmetric(whole, bits)) is not None and (
            fit := regrid.with_scale_dtype(form, widths.scales)
        ):
            yield fit
    for bits in widths.asymmetric:
        if (form := regrid.asymmetric(whole, bits)) is not None and (
            fit := regrid.with_scale_dtype(form, widths.scales)
        ):
            yield fit


def _signed_scales(q: QTensor) -> QTensor | None:
    """NVFP4's block scales as E4M3, where the source (GGUF) stores them without their sign bit."""
    s = q.scale
    if not isinstance(s, QTensor) or s.grid != UE4M3:
        return None
    return replace(q, scale=replace(s, grid=E4M3))


def reciprocal(q: QTensor, *, exact: bool = False) -> QTensor | None:
    """The global scale in the other convention, rounded to fp32 by one unit in its last place, or only where that is `exact`."""
    s = q.scale
    if not isinstance(s, QTensor) or not isinstance(s.scale, Tensor):
        return None
    turned = regrid.inverse(regrid.numbers(s.scale))
    if turned is None or (exact and not turned.exact):
        return None
    return replace(q, scale=replace(s, scale=dense(turned.values), divisor=not s.divisor))


#: Formats of weights alone: how inputs are quantized is left out, so that they run at the model's precision.
WEIGHT_ONLY = ("gptq", "gptq_v2", "awq", "bitsandbytes")


def describe(held: Held) -> str:
    """What a module holds, in a few words: "int4, groups of 32", "fp8 per row; inputs fp8 per token"."""
    q, a = held.weight, held.activation
    if q is None:
        return "plain"
    if isinstance(q.scale, QTensor):
        kind = {(4, E4M3): "nvfp4", (4, E8M0): "mxfp4", (8, E8M0): "mxfp8"}.get(
            (q.grid.bits, q.scale.grid), f"{q.grid.bits} bits"
        )
    elif q.grid.kind == "codebook":
        kind = f"codebook of {len(q.grid.values)}"
    else:
        kind = (
            ("fp" if q.grid.kind == "float" else "int")
            + str(q.grid.bits)
            + (" with zero points" if q.zero is not None else "")
        )
    height, width = q.block
    where = "per tensor" if height == width == -1 else "per row" if width == -1 else f"groups of {width}"
    text = f"{kind}, blocks of {height} x {width}" if height > 1 else f"{kind}, {where}"
    if q.g_idx is not None:
        text += ", act-order"
    if a is not None:
        text += f"; inputs {'fp' if a.grid.kind == 'float' else 'int'}{a.grid.bits} per {a.per}"
    return text + ("; inputs scaled" if held.transform is not None else "")


def candidates(q: QTensor, format: str) -> Iterator[QTensor]:
    """Forms of equal value, the most faithful first."""
    divides = format == "compressed-tensors"
    for form in (q, _signed_scales(q)):
        if form is None:
            continue
        yield form
        turns = isinstance(form.scale, QTensor) and form.scale.divisor != divides
        if turns and (other := reciprocal(form, exact=True)) is not None:
            yield other
    if regrid.is_plain(q) and q.grid.kind == "float" and isinstance(q.scale, Tensor) and q.block == (-1, -1):
        yield row_blocks(q)
    if isinstance(q.scale, QTensor) and q.grid == E4M3 and (flat := regrid.plain_scale(q)) is not None:
        yield flat  # exponents (ue8m0) as the numbers they stand for
    if format in INTEGERS:
        yield from _integer_forms(q, INTEGERS[format])


def carry(
    entry: Entry, problem: Problem | None, format: str, *, allow_requantize: bool, transforms: bool = False
) -> Carried:
    """The entry in a format. problem None: a plain checkpoint, where dequantized values are rounded to the model's dtype.

    transforms: the format stores scales of inputs.
    """
    plain = Held(None)
    if not isinstance(entry.data, QTensor):
        return Carried(Held(None, entry.activation, entry.transform), Verdict("exact"))
    if problem is None:
        return Carried(plain, Verdict("rounded", "dequantized"))
    reasons = []
    q = entry.data
    unfolded = entry.transform is not None and not entry.transform.folded and not transforms
    if unfolded:
        why = "its input is scaled first (pre_quant_scale), which the format has no place for and which nothing before it can take"
        return requantized(entry, problem, format) if allow_requantize else _refusal(why)
    activation = None if format in WEIGHT_ONLY else entry.activation
    for form in candidates(q, format):
        held = Held(form, activation, entry.transform)
        reason = problem(held)
        if reason is None:
            return Carried(held, Verdict(_kind(q, form)))
        reasons.append(reason)
    for form, note in _rounded(q, format):
        held = Held(form, _reciprocal_input(activation, form), entry.transform)
        if problem(held) is None:
            return Carried(held, Verdict("rounded", note))
    if allow_requantize:
        return requantized(entry, problem, format)
    return _refusal(reasons[0])


def _rounded(q: QTensor, format: str) -> Iterator[tuple[QTensor, str]]:
    """Forms with the same codes whose scales lose bits by a plain cast, and what was cast."""
    other = reciprocal(_signed_scales(q) or q)
    if other is not None:
        yield other, "the reciprocal of a global scale, which fp32 rounds"
    if format not in INTEGERS or (whole := regrid.integers(q)) is None or not isinstance(whole.scale, Tensor):
        return
    value = regrid.numbers(whole.scale)
    top, least = float(np.abs(value).max(initial=0)), float(np.abs(value[value != 0]).min(initial=1))
    dtype = "F16" if top <= 65504 and least >= 2.0**-14 else "BF16"
    cast = replace(whole, scale=dense(regrid.nearest(value, dtype), dtype, whole.scale.origin))  # type: ignore[arg-type]
    for form in _integer_forms(cast, INTEGERS[format]):
        yield form, f"scales from {whole.scale.dtype} to {dtype}"


def _reciprocal_input(a: ActSpec | None, form: QTensor) -> ActSpec | None:
    """The global scale of NVFP4's inputs in the convention of the weight's."""
    s = form.scale
    if a is None or a.scale is None or not a.dynamic or not isinstance(s, QTensor) or a.divisor == s.divisor:
        return a
    return replace(a, scale=dense(np.float32(1) / regrid.numbers(a.scale)), divisor=s.divisor)


def _refusal(reason: str) -> Carried:
    hint = "--allow-requantize rounds its values again, --to dense keeps them unquantized"
    return Carried(Held(None), Verdict("refused", f"{reason}; {hint}"))


def _kind(q: QTensor, form: QTensor) -> Kind:
    """exact where codes keep their width and scales their blocks, else widened."""
    width = form.shape[1]

    def group(t: QTensor) -> tuple[int, int]:
        return (t.block[0] if t.block[0] != -1 else t.shape[0], width if t.block[1] == -1 else t.block[1])

    same = form.grid.bits == q.grid.bits and form.grid.kind == q.grid.kind and group(form) == group(q)
    return "exact" if same else "widened"


def requantized(entry: Entry, problem: Problem, format: str) -> Carried:
    """The entry's values rounded again to what `format` falls back to."""
    q = entry.data
    assert isinstance(q, QTensor)
    read: Callable[[int, int], object] = partial(effective, entry)
    flat = Tensor(q.shape, "F32", read, q.origin, q.files)  # type: ignore[arg-type]
    chosen = dict(FALLBACK[format])
    if isinstance(chosen["group"], int) and q.shape[1] % chosen["group"]:
        chosen["group"] = next((g for g in (64, 32) if q.shape[1] % g == 0), -1)
    held = Held(rtn.quantized(flat, rtn.Options(**chosen)), FALLBACK_INPUTS.get(format))  # type: ignore[arg-type]
    if (reason := problem(held)) is not None:
        return Carried(Held(None), Verdict("refused", reason))
    return Carried(held, Verdict("requantized", f"dequantized and rounded again to {chosen['grid']}"))
