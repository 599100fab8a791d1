"""A part of a layer is computed once: what enters its last matrix (attn.o, mlp.down) is kept while all that comes after is compressed.

Methods pass the calibration text through a layer once per group of matrices that share an input. From the second group on queries, keys and values
are final, and so is what attention makes of them: attention then returns attn.o of the inputs that were kept. That is done only where
the module around the matrix returns nothing but the matrix's output, which one pass is watched for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from lconvert.primitives.activations import Activations

#: (features of a token) -> where they are kept for all windows.
Room = Callable[[int], Activations]


class Replay:
    """Of the module within `layer` that `last` is the last matrix of; windows: how many there are in all."""

    def __init__(self, layer: Any, last: Any, windows: int, room: Room) -> None:
        path = next(name for name, m in layer.named_modules() if m is last)
        self._part = layer.get_submodule(path.rpartition(".")[0])
        self._last, self._windows, self._room = last, windows, room
        self._kept: Activations | None = None
        self._heard: set[int] = set()
        #: Whether the module returns what its last matrix returns, as such or as the first of a tuple; None: not known so far.
        self._plain: bool | None = None
        self._tuple = 0

    def forget(self) -> None:
        """Something before the last matrix has changed."""
        self._kept, self._heard = None, set()

    @contextmanager
    def running(self, start: int, stop: int) -> Iterator[None]:
        """Around one pass of the windows start..stop through the layer."""
        if self._plain is False:
            yield
        elif len(self._heard) < self._windows:
            with self._recorded(start, stop):
                yield
        elif self._plain is None:
            with self._watched():
                yield
        else:
            with self._replayed(start, stop):
                yield

    @contextmanager
    def _recorded(self, start: int, stop: int) -> Iterator[None]:
        def keep(module: Any, args: tuple[Any, ...]) -> None:
            x = args[0].detach()
            if self._kept is None:
                self._kept = self._room(x.shape[-1])
            self._kept.put(start, x.reshape(stop - start, -1, x.shape[-1]))
            self._heard |= set(range(start, stop))

        hook = self._last.register_forward_pre_hook(keep, prepend=True)
        try:
            yield
        finally:
            hook.remove()

    @contextmanager
    def _watched(self) -> Iterator[None]:
        made: list[Any] = []

        def told(module: Any, args: Any, out: Any) -> None:
            if not made:
                return
            first, rest = (out[0], out[1:]) if isinstance(out, tuple) else (out, ())
            same = hasattr(first, "data_ptr") and first.data_ptr() == made[-1].data_ptr()
            self._plain = same and first.numel() == made[-1].numel() and all(r is None for r in rest)
            self._tuple = len(rest) + 1 if isinstance(out, tuple) else 0

        hooks = [
            self._last.register_forward_hook(lambda module, args, out: made.append(out)),
            self._part.register_forward_hook(told),
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    @contextmanager
    def _replayed(self, start: int, stop: int) -> Iterator[None]:
        assert self._kept is not None
        x = self._kept.get(start, stop)

        def instead(*args: Any, **kwargs: Any) -> Any:
            out = self._last(x.to(next(self._last.parameters()).device))
            return (out, *(None for _ in range(self._tuple - 1))) if self._tuple else out

        self._part.forward = instead
        try:
            yield
        finally:
            del self._part.forward
