"""The KV cache in FP8, with static scales from a calibration text or 1.0 without one."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from lconvert.errors import InputError, OptionError
from lconvert.forward import Forward, packages, threads
from lconvert.ir import E4M3, ActSpec, KVSpec, Model, Tensor, dense
from lconvert.primitives.job import Job
from lconvert.primitives.text import unsaid, windows


@dataclass(frozen=True)
class Options:
    """grid: fp8 (E4M3, the only one that vLLM and TensorRT-LLM take scales for). text: what scales are measured on; else
    the run's; without one they are 1.0, which FP8's range of 448 usually allows. windows, context: how much of `text` is run."""

    grid: str = "fp8"
    text: str = ""
    windows: int = 32
    context: int = 512

    def __post_init__(self) -> None:
        if self.grid != "fp8":
            raise OptionError(f"kv: grid {self.grid!r}; only fp8 can be stored in a checkpoint")


def run(model: Model, options: Options, job: Job = Job()) -> Model:  # noqa: B008 - immutable
    """The model with a KVSpec; scales are rounded to 8 significant bits."""
    import numpy as np

    layers = model.decoder.layers
    keys, values = dict.fromkeys(range(layers), 448.0), dict.fromkeys(range(layers), 448.0)
    notes: tuple[str, ...] = ()
    text = options.text or job.calibration.text
    if text:
        own = options if options.text else job.calibration
        shown = windows(model, replace(job.calibration, text=text, windows=own.windows, context=own.context))
        with threads(job.threads):
            keys, values = peaks(model, shown.ids)
        notes = unsaid(shown.notes, model)
        if len(keys) != layers:
            raise OptionError(f"kv: {len(keys)} of {layers} layers showed a cache of keys and values")

    def scales(peaks: dict[int, float]) -> Tensor:
        from lconvert.kernels.reference.rounding import short_scale

        x = np.array([peaks[i] / 448.0 for i in range(layers)], np.float32)
        return dense(short_scale(np.where(x > 0, x, np.float32(1)), 8))

    spec = KVSpec(
        ActSpec(E4M3, "tensor", False, scale=scales(keys)),
        ActSpec(E4M3, "tensor", False, scale=scales(values)),
    )
    how = "calibrated" if text else "scale 1"
    return replace(model, kv=spec, report=(*model.report, *notes, f"kv: cache in fp8, {how}"))


def peaks(model: Model, windows: Iterable[Sequence[int]]) -> tuple[dict[int, float], dict[int, float]]:
    """Largest magnitudes of keys and of values by layer, over windows of token ids. Keys as the cache holds them, after the rotary embedding."""
    torch, transformers = packages()
    forward = Forward(model, finite=True)
    keys: dict[int, float] = {}
    values: dict[int, float] = {}
    for ids in windows:
        cache = transformers.DynamicCache()  # made with the config it would drop what leaves a window
        with torch.no_grad():
            out = forward.module(torch.tensor([list(ids)]), past_key_values=cache, use_cache=True)
        held = [x for x in getattr(out.past_key_values, "layers", []) if getattr(x, "keys", None) is not None]
        for i, layer in enumerate(held):
            keys[i] = max(keys.get(i, 0.0), float(layer.keys.abs().max()))
            values[i] = max(values.get(i, 0.0), float(layer.values.abs().max()))
    if bad := [i for i in keys if not math.isfinite(keys[i] + values[i])]:
        raise InputError(
            f"{model.source}: keys or values of layer {bad[0]} are NaN or infinite on the calibration text; its weights are damaged or "
            "overflow in fp32"
        )
    return keys, values
