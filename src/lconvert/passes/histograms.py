"""What enters every matrix and convolution while the model runs over examples, as histograms.

Examples are mappings of arrays: `input_ids` and what else transformers' forward takes (`attention_mask`, `token_type_ids`), or `images`
(batch, channels, height, width). They run twice: for the ends of the histograms, then for what is between them. Positions that the
attention mask leaves out do not count.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np

from lconvert.errors import InputError, OptionError
from lconvert.ir import Convnet, Model, Plain, Pool
from lconvert.passes.observers import BINS, Histogram

Examples = Sequence[Mapping[str, Any]]


def watched(c: Convnet, step: int) -> int:
    """The step whose input is what becomes codes for a weighted step: before the pooling and flattening in front of it, which keep them."""
    while step and (isinstance(c.steps[step - 1], Pool) or c.steps[step - 1] == Plain("flatten")):
        step -= 1
    return step


def inputs(model: Model, examples: Examples) -> dict[str, Histogram]:
    """Role of each matrix and convolution -> the histogram of its input."""
    if not examples:
        raise OptionError(
            "calibration: there are no examples; some dozens of what the model will see are enough"
        )
    modules, run = _convnet(model) if isinstance(model.arch, Convnet) else _transformer(model)
    ends: dict[str, tuple[float, float]] = {}

    def widen(role: str, x: Any) -> None:
        low, high = float(x.min()), float(x.max())
        if not np.isfinite([low, high]).all():
            raise InputError(f"calibration: the input of {role} holds NaN or infinite values")
        was = ends.get(role, (low, high))
        ends[role] = (min(was[0], low), max(was[1], high))

    _watch(modules, run, examples, widen)
    counts = {role: np.zeros(BINS, np.int64) for role in ends}

    def count(role: str, x: Any) -> None:
        low, high = ends[role]
        if low < high:
            counts[role] += np.histogram(x, BINS, (low, high))[0]

    _watch(modules, run, examples, count)
    return {role: Histogram(counts[role], *ends[role]) for role in ends}


Modules = list[tuple[Any, tuple[str, ...]]]


def _transformer(model: Model) -> tuple[Modules, Callable[[Mapping[str, Any]], None]]:
    from lconvert.forward import Forward, packages

    torch, _ = packages()
    forward = Forward(model, finite=True)

    def run(example: Mapping[str, Any]) -> None:
        forward.module(**{k: torch.as_tensor(np.asarray(v, np.int64)) for k, v in example.items()})

    return forward.linears(), run


def _convnet(model: Model) -> tuple[Modules, Callable[[Mapping[str, Any]], None]]:
    from lconvert.forward import packages, sequential

    torch, _ = packages()
    arch, module = model.arch, sequential(model)
    assert isinstance(arch, Convnet)

    def run(example: Mapping[str, Any]) -> None:
        module(torch.as_tensor(np.asarray(example["images"], np.float32)))

    return [(module[watched(arch, i)], (f"steps.{i}",)) for i, _ in arch.weighted()], run


def _watch(
    modules: Modules,
    run: Callable[[Mapping[str, Any]], None],
    examples: Examples,
    see: Callable[[str, Any], None],
) -> None:
    """Every example through the model; `see(role, values)` for what enters each module, without padding."""
    from lconvert.forward import packages

    torch, _ = packages()
    mask: Any = None

    def hook(roles: tuple[str, ...]) -> Any:
        def seen(module: Any, args: tuple[Any, ...]) -> None:
            x = args[0].detach().float().numpy()
            if mask is not None and x.shape[:2] == mask.shape and x.ndim == 3:
                x = x[mask]
            for role in roles:
                see(role, x)

        return seen

    with _hooks([m.register_forward_pre_hook(hook(roles)) for m, roles in modules]), torch.no_grad():
        for example in examples:
            given = example.get("attention_mask")
            mask = None if given is None else np.asarray(given, bool)
            run(example)


@contextmanager
def _hooks(handles: list[Any]) -> Iterator[None]:
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
