"""gpt-oss as it is released, as a target: the experts of a layer in MXFP4, packed into two tensors per stack, all else plain.

transformers, vLLM and TensorRT-LLM load this layout, and for gpt-oss alone (transformers quantizers/quantizer_mxfp4.py; vLLM
quantization/mxfp4.py GptOssMxfp4Config; TensorRT-LLM _torch/model_config.py load_hf_quant_config). None of them has a place
for another quantized matrix beside the experts, nor for a folder in which some stacks are packed and some are plain.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from math import prod

import numpy as np

from lconvert.archs import find
from lconvert.archs.common import Bind, binds
from lconvert.converters import hf, hf_experts
from lconvert.converters.carry import describe
from lconvert.errors import OptionError
from lconvert.formats import mxfp4_blocks
from lconvert.formats.gguf_blocks import native_type
from lconvert.formats.scheme import Held, Stored
from lconvert.ir import Entry, Model, QTensor, Tensor
from lconvert.kernels.qtensor import dequantize, effective
from lconvert.passes import rtn
from lconvert.plan import MEASURE_EVERY, SIDE, Item, Slab, Verdict, refused, worst

FAMILY = "gpt_oss"
#: Canonical names of the matrices that the layout holds in MXFP4.
EXPERTS = r".*\.moe\.experts\.\d+\.(gate|up|down)"
#: The only dtype of activations beside MXFP4 experts (vLLM quantization/mxfp4.py get_supported_act_dtypes).
SERVED = "BF16"

_OTHERS = "only gpt-oss has this layout, for its experts; --to vllm writes compressed-tensors"

Measure = Callable[[int, int], tuple[float, float]]


def stacks(model: Model) -> dict[str, Bind]:
    """The tensors that hold the matrices of all experts of a layer, by name; none of a family without this layout."""
    if model.arch.family != FAMILY:
        return {}
    listed = binds(find(FAMILY).names, model.arch)
    return {b.hf: b for b in listed if b.experts and len(b.shape) == 3}


def wanted(model: Model) -> bool:
    """Whether this layout is the one for a model: experts of gpt-oss that are MXFP4 already."""
    roles = (role for bind in stacks(model).values() for role, _ in bind.parts)
    found = (model.entries[role].data for role in roles)
    return any(isinstance(q, QTensor) and native_type(q) == "MXFP4" for q in found)


def dtype(own: str, asked: str | None, runtime: str) -> str:
    """The model's dtype: `own`, or the one that runtimes serve it in. OptionError where another is asked for."""
    if not runtime:
        return asked or own
    if asked not in (None, SERVED):
        raise OptionError(
            f"dtype {asked}: {runtime} serves MXFP4 experts in bfloat16 only; leave --dtype out, or write --to mxfp4"
        )
    return SERVED


def items(
    model: Model, original: Model, dtype: str, done: Mapping[str, Verdict], *, allow_requantize: bool
) -> list[Item]:
    """The tensors of the folder, offsets to come: stacks packed, the rest in `dtype`.

    original: the model before passes, against which roundings are measured; done: what they did to entries.
    """
    packed = stacks(model)
    out: list[Item] = []
    for t in hf.to_hf(model, dtype):
        bind = packed.get(t.name)
        if bind is not None:
            out += _stack(model, original, bind, done, allow_requantize)
            continue
        if not packed and len(t.shape) > 1 and t.sources[0].startswith("layers."):
            out.append(refused(t.name, t.shape, t.sources, Verdict("refused", _OTHERS)))
            continue
        quantized = [q for r in t.sources if isinstance(q := model.entries[r].data, QTensor)]
        if allow_requantize or not quantized:
            out.append(t)
        else:
            reason = (
                f"it is {describe(Held(quantized[0]))}, and beside MXFP4 experts everything is plain in gpt-oss's folders; "
                f"--allow-requantize stores its values in {dtype}"
            )
            out.append(refused(t.name, t.shape, t.sources, Verdict("refused", reason)))
    return out


def _stack(
    model: Model, original: Model, bind: Bind, done: Mapping[str, Verdict], allow_requantize: bool
) -> Iterator[Item]:
    """The two tensors of a stack, a row of slabs for each expert."""
    roles = tuple(role for role, _ in bind.parts)
    verdict = worst(done.get(role, Verdict("exact")) for role in roles)
    stored = hf_experts.store_mxfp4(model, bind)
    if stored is None and allow_requantize:
        again = _requantized(model, roles)
        stored = hf_experts.store_mxfp4(again, bind)
        verdict = Verdict("requantized", "dequantized and rounded again to MXFP4") if stored else verdict
        model = again
    if stored is None:
        yield refused(bind.hf, bind.shape, roles, Verdict("refused", _problem(model, roles)))
        return
    rounded = verdict.kind not in ("exact", "widened")
    measure = _errors(model, original, bind) if rounded else None
    side = Verdict("exact") if rounded else verdict
    elements = prod(bind.shape[1:])
    for suffix, (name, tensor) in zip(mxfp4_blocks.SUFFIXES, stored.items(), strict=True):
        main = suffix == mxfp4_blocks.SUFFIXES[0]
        count = tensor.shape[0]
        produce = partial(_slab, tensor, measure if main else None)
        yield Item(
            name,
            tensor.dtype,
            tensor.shape,
            0,
            count,
            prod(tensor.shape[1:]),
            elements * 2,
            roles,
            verdict if main else side,
            produce,
            held="mxfp4, groups of 32" if main else SIDE,
        )


def _problem(model: Model, roles: tuple[str, ...]) -> str:
    """Why a stack is not packed: its first expert that is not MXFP4."""
    for role in roles:
        q = model.entries[role].data
        if isinstance(q, Tensor):
            return f"{role} is plain, and gpt-oss's MXFP4 folders hold all experts packed; hf-to-vllm --mxfp4 rounds them to it"
        if not mxfp4_blocks.fits(q):
            return (
                f"{role} is {describe(Held(q))}, and gpt-oss's MXFP4 folders hold nothing else for experts; "
                "--allow-requantize rounds its values again, --to dense keeps them unquantized"
            )
    raise AssertionError("a stack of MXFP4 experts is packed")


def _requantized(model: Model, roles: tuple[str, ...]) -> Model:
    """The quantized experts among `roles` that are no MXFP4, rounded to it."""
    new: dict[str, Entry] = {}
    for role in roles:
        entry = model.entries[role]
        q = entry.data
        if isinstance(q, QTensor) and not mxfp4_blocks.fits(q):
            flat = Tensor(q.shape, "F32", partial(effective, entry), q.origin, q.files)
            new[role] = replace(entry, data=rtn.quantized(flat, rtn.Options(grid="MXFP4")))
    return model.with_entries(new)


def _errors(model: Model, original: Model, bind: Bind) -> Measure:
    """Squared error and squared norm of a sample of the rows of some experts against the source."""
    each = len(bind.parts) // bind.experts

    def measure(start: int, stop: int) -> tuple[float, float]:
        error = norm = 0.0
        for role, _ in bind.parts[start * each : stop * each]:
            q = model.entries[role].data
            assert isinstance(q, QTensor)
            # Whole matrices: rows of a stack that is stored transposed are dear one by one.
            exact = effective(original.entries[role])[::MEASURE_EVERY].astype(np.float64)
            now = dequantize(q)[::MEASURE_EVERY].astype(np.float64)
            error += float(np.square(now - exact).sum())
            norm += float(np.square(exact).sum())
        return error, norm

    return measure


def _slab(stored: Stored, measure: Measure | None, start: int, stop: int) -> Slab:
    data = np.ascontiguousarray(stored.read(start, stop))
    return Slab(data) if measure is None else Slab(data, *measure(start, stop))
