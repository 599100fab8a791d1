"""transformers' model without its layers: what enters the first one, and what every layer is called with.

Families differ in what happens before the first layer (position embeddings, scales) and in what layers are given (masks and rotary tables
per kind of layer). The model's own code says both: it runs with every layer's forward replaced by one that notes its arguments and
returns the hidden states as they came.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from lconvert.forward import Forward, packages
from lconvert.ir import Model
from lconvert.kernels.qtensor import effective

#: Rows of the embedding that are dequantized at once.
_ROWS = 4096


class _Stop(Exception):
    """The part of the model that was wanted has run."""


class Skeleton:
    """forward: built lazily. ids: all token ids that will be run, which decide the rows of the embedding that are held."""

    def __init__(self, forward: Forward, model: Model, ids: set[int]) -> None:
        self._forward, self._torch = forward, packages()[0]
        inside = {id(p) for layer in forward.layers for p in layer.parameters()}
        self._embed = forward.module.get_input_embeddings()
        head = forward.module.get_output_embeddings()
        self._outer = [
            m
            for m in forward.module.modules()
            if m not in (self._embed, head)
            and any(id(p) not in inside for p in m._parameters.values() if p is not None)
        ]
        for part in self._outer:
            forward.fill(part)
        self._embed.padding_idx = None  # it says which row gets no gradient
        self._at = {token: i for i, token in enumerate(sorted(ids))}
        rows = _rows(model, list(self._at))
        self._embed.weight = self._torch.nn.Parameter(self._torch.from_numpy(rows), requires_grad=False)

    def entering(self, windows: list[tuple[int, ...]]) -> Any:
        """(b, t, d): the hidden states that the first layer gets."""
        return self._caught(windows)[0]

    def kwargs(self, window: tuple[int, ...]) -> list[Mapping[str, Any]]:
        """What every layer is called with beside the hidden states, for windows of this length; batches of one broadcast."""
        layers, found = self._forward.layers, list[Mapping[str, Any]]()
        hidden, given = self._caught([window])
        self._forward.fill(layers[0])
        with self._torch.no_grad():
            out = layers[0](hidden, **given)
        self._forward.drop(layers[0])
        rest = out[1:] if isinstance(out, tuple) else None

        def note(layer: Any) -> Callable[..., Any]:
            names = _names(layer)

            def called(x: Any, *args: Any, **kwargs: Any) -> Any:
                found.append(dict(zip(names, args, strict=False)) | kwargs)
                if len(found) == len(layers):
                    raise _Stop
                return x if rest is None else (x, *rest)

            return called

        with _replaced(layers, note):
            self._run([window])
        return found

    def release(self) -> None:
        """Drop all weights."""
        for part in (*self._outer, self._embed):
            self._forward.drop(part)

    def _caught(self, windows: list[tuple[int, ...]]) -> tuple[Any, dict[str, Any]]:
        first = self._forward.layers[0]
        found: list[Any] = []

        def called(x: Any, *args: Any, **kwargs: Any) -> Any:
            found.extend((x, dict(zip(_names(first), args, strict=False)) | kwargs))
            raise _Stop

        with _replaced([first], lambda layer: called):
            self._run(windows)
        return found[0], found[1]

    def _run(self, windows: list[tuple[int, ...]]) -> None:
        ids = self._torch.tensor([[self._at[i] for i in w] for w in windows])
        with self._torch.no_grad():
            try:
                self._forward.module(ids, use_cache=False)
            except _Stop:
                return
        raise AssertionError("the model ran without calling its layers")


def first(out: Any) -> Any:
    """The hidden states of what a layer returns."""
    return out[0] if isinstance(out, tuple) else out


def _rows(model: Model, tokens: list[int]) -> Any:
    import numpy as np

    entry = model.entries["embed"]
    out = np.empty((len(tokens), entry.shape[1]), np.float32)
    wanted = np.array(tokens)
    for start in range(0, entry.shape[0], _ROWS):
        here = (wanted >= start) & (wanted < start + _ROWS)
        if here.any():
            out[here] = effective(entry, start, min(start + _ROWS, entry.shape[0]))[wanted[here] - start]
    return out


def _names(layer: Any) -> list[str]:
    """Parameters of a layer's forward after the hidden states."""
    return list(inspect.signature(type(layer).forward).parameters)[2:]


@contextmanager
def _replaced(layers: list[Any], make: Callable[[Any], Any]) -> Iterator[None]:
    for layer in layers:
        layer.forward = make(layer)
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward
