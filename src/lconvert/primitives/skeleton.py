"""transformers' model without its layers: what enters the first one, what every layer is called with, and what the last one's output becomes.

Families differ in what happens before the first layer (position embeddings, scales), in what layers are given (masks and rotary tables
per kind of layer) and in what becomes of products of the head (scales, caps). The model's own code says all of it: it runs with every layer's
forward replaced by one that notes its arguments and returns the hidden states as they came, or those that are to leave the last layer.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from lconvert.forward import Forward, packages
from lconvert.ir import Model
from lconvert.kernels.qtensor import effective

#: Rows of the embedding that are dequantized at once.
_ROWS = 4096


#: Token ids of windows of one length.
Windows = Sequence[Sequence[int]]


class _Stop(Exception):
    """The part of the model that was wanted has run."""


class Skeleton:
    """forward: built lazily. ids: all token ids that will be run, which decide the rows of the embedding that are held."""

    def __init__(self, forward: Forward, model: Model, ids: set[int]) -> None:
        self._forward, self._torch = forward, packages()[0]
        inside = {id(p) for layer in forward.layers for p in layer.parameters()}
        #: The module that looks tokens up, which holds the rows of `tokens` alone, and others outside of layers and head.
        self.embed = forward.module.get_input_embeddings()
        head = forward.module.get_output_embeddings()
        self.outer = [
            m
            for m in forward.module.modules()
            if m not in (self.embed, head)
            and any(id(p) not in inside for p in m._parameters.values() if p is not None)
        ]
        for part in self.outer:
            forward.fill(part, model)
        self.embed.padding_idx = None  # it says which row gets no gradient
        self.tokens = sorted(ids)
        self._at = {token: i for i, token in enumerate(self.tokens)}
        rows = _rows(model, self.tokens)
        self.embed.weight = self._torch.nn.Parameter(self._torch.from_numpy(rows), requires_grad=False)
        #: What layers return beside the hidden states, in a tuple; None where they return these alone.
        self._rest: tuple[Any, ...] | None = None

    def entering(self, windows: Windows, *, slopes: bool = False) -> Any:
        """(b, t, d): the hidden states that the first layer gets; with a graph for gradients where these are wanted (slopes)."""
        return self._caught(windows, slopes=slopes)[0]

    def logits(self, windows: Windows, hidden: Any) -> Any:
        """(b, t, vocab): what becomes of hidden states (b, t, d) that leave the last layer. Norm and head are filled, and where `hidden` is."""

        def instead(layer: Any) -> Callable[..., Any]:
            return lambda x, *args, **kwargs: hidden if self._rest is None else (hidden, *self._rest)

        with _replaced(self._forward.layers, instead):
            return self._forward.module(self._ids(windows), use_cache=False).logits

    def kwargs(self, window: tuple[int, ...]) -> list[Mapping[str, Any]]:
        """What every layer is called with beside the hidden states, for windows of this length; batches of one broadcast."""
        layers, found = self._forward.layers, list[Mapping[str, Any]]()
        hidden, given = self._caught([window])
        self._forward.fill(layers[0])
        with self._torch.no_grad():
            out = layers[0](hidden, **given)
        self._forward.drop(layers[0])
        self._rest = rest = out[1:] if isinstance(out, tuple) else None

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
        for part in (*self.outer, self.embed):
            self._forward.drop(part)

    def _caught(self, windows: Windows, *, slopes: bool = False) -> tuple[Any, dict[str, Any]]:
        first = self._forward.layers[0]
        found: list[Any] = []

        def called(x: Any, *args: Any, **kwargs: Any) -> Any:
            found.extend((x, dict(zip(_names(first), args, strict=False)) | kwargs))
            raise _Stop

        with _replaced([first], lambda layer: called):
            self._run(windows, slopes=slopes)
        return found[0], found[1]

    def _run(self, windows: Windows, *, slopes: bool = False) -> None:
        with self._torch.set_grad_enabled(slopes):
            try:
                self._forward.module(self._ids(windows), use_cache=False)
            except _Stop:
                return
        raise AssertionError("the model ran without calling its layers")

    def _ids(self, windows: Windows) -> Any:
        return self._torch.tensor([[self._at[i] for i in w] for w in windows])


def ending(forward: Forward) -> tuple[Any, Any]:
    """The final norm and the output matrix."""
    for full, _, parameter in forward.parameters(forward.module):
        if parameter.dim() == 1 and forward.bind(full, tuple(parameter.shape)).parts[0][0] == "norm":
            norm = forward.module.get_submodule(full.rpartition(".")[0])
            return norm, forward.module.get_output_embeddings()
    raise AssertionError("a decoder has a final norm")


def first(out: Any) -> Any:
    """The hidden states of what a layer returns."""
    return out[0] if isinstance(out, tuple) else out


def moved(value: Any, device: Any) -> Any:
    """What a layer is called with, on a device."""
    if isinstance(value, Mapping):
        return {k: moved(v, device) for k, v in value.items()}
    if isinstance(value, tuple):
        return tuple(moved(v, device) for v in value)
    return value.to(device) if hasattr(value, "to") else value


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
