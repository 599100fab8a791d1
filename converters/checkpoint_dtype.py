"""The dtype of a quantized folder: one that its scales survive in, since runtimes turn them into it when they load them."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from lconvert.converters import hf
from lconvert.converters.checkpoint_modules import FORMATS, Linear, Options
from lconvert.converters.regrid import holds, nearest, numbers, recast
from lconvert.formats.scheme import Held
from lconvert.ir import Model, Tensor, Transform, dense
from lconvert.plan import Verdict


def model_dtype(model: Model, held: list[Linear], options: Options) -> str:
    """The dtype that the config will name: the source's own if every scale survives in it, else another 16-bit one."""
    if options.dtype:
        return options.dtype
    first = hf.stated_dtype(model.config) or "BF16"
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


def stored_scale(linear: Linear, dtype: str, options: Options) -> Linear:
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


def with_input_scale(linear: Linear, dtype: str) -> Linear:
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
