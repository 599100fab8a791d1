"""Gradients of a loss, part after part from the head to the embedding: one layer's weights in memory, and one window's graph through it.

What entered every layer lies in a file (probe.py). A part (head, layer, embedding) runs again from there, is differentiated by what
the loss's gradient is at its output, and hands on the gradient at its input, which lies in a file too:

    head        dL/dx, dL/dw of L(x, w)                    x what leaves the last layer, pieces of a window where logits are many
    layers      (dy/dx)^T g, (dy/dw)^T g of y(x, w)        g the gradient at the output
    embedding   (dy/de)^T g, (dy/dw)^T g of y(e(w))        e rows that were looked up

That is the chain rule, with one more forward pass than a graph of the whole model takes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lconvert.archs.common import Bind
from lconvert.forward import packages
from lconvert.primitives.activations import Activations
from lconvert.primitives.skeleton import ending

if TYPE_CHECKING:
    from lconvert.primitives.probe import Probe

#: logits (tokens, vocab) of tokens start..stop of a window, the window's ids -> the sum of their losses.
Loss = Callable[[Any, list[int], int, int], Any]

EMBEDDING = -1


@dataclass(frozen=True)
class Held:
    """A matrix, or several, of a part: its parameter, and which roles it holds. rows: those of the role that the parameter has, where it has not all."""

    parameter: Any
    bind: Bind
    roles: tuple[str, ...]
    rows: Any = None

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the parameter with all its rows."""
        shape = tuple(self.parameter.shape)
        return shape if self.rows is None else (self.bind.stored[0], *shape[1:])


@dataclass(frozen=True)
class Step:
    """y computed from x with a graph; dy: the gradient at y, None for a loss. rows: tokens of the window."""

    x: Any
    y: Any
    dy: Any
    rows: slice


class Backwards:
    """window: (batch, number in it). Go through `parts`, inside through all `windows`, and `hand` on what `steps` gave."""

    def __init__(self, probe: Probe, loss: Loss | None = None) -> None:
        self.probe, self.loss = probe, loss
        self.torch = probe.torch
        self._entering = probe.entering  # which runs all layers
        self.windows = [(n, w) for n, batch in enumerate(probe.batches) for w in range(len(batch))]
        self._slopes = [probe.room(b, 1) for b in probe.batches]

    def parts(self, least: int = EMBEDDING) -> Iterator[int]:
        """The head (the number of layers), then layers from the last on, then the embedding (-1), with weights in memory; none below `least`."""
        for i in range(self.probe.layers, least - 1, -1):
            with self.part(i):
                yield i

    @contextmanager
    def part(self, i: int) -> Iterator[None]:
        """Weights of a part."""
        if i == EMBEDDING:
            yield
            return
        with self.probe.head() if i == self.probe.layers else self.probe.layer(i):
            yield

    def held(self, i: int, only: Callable[[str], bool]) -> list[Held]:
        """The wanted matrices of a part, as long as its weights are there. A tied head's is `embed`, as the embedding's is."""
        probe, forward = self.probe, self.probe.forward
        found = []
        for full, parameter in self._parameters(i):
            if parameter.dim() < 2:
                continue
            looked_up = i == EMBEDDING and full == probe.embedding
            bind = forward.bind(full, tuple(parameter.shape))
            roles = tuple(
                r for r in dict.fromkeys(role for role, _ in bind.parts) if len(probe.model.entries[r].shape) == 2 and only(r)
            )  # fmt: skip
            if roles:
                rows = self.torch.tensor(probe.skeleton.tokens) if looked_up else None
                found.append(Held(parameter, bind, roles, rows))
        return found

    def _parameters(self, i: int) -> Iterator[tuple[str, Any]]:
        probe, forward = self.probe, self.probe.forward
        if i == probe.layers:
            _, head = ending(forward)
            tied = probe.model.decoder.tied
            for full, name, p in forward.parameters(head):
                yield (probe.embedding if tied and name == "weight" else full), p
        elif i == EMBEDDING:
            for part in (probe.skeleton.embed, *probe.skeleton.outer):
                for name, p in part._parameters.items():
                    if p is not None:
                        yield f"{forward._names[id(part)]}.{name}", p
        else:
            yield from ((full, p) for full, _, p in forward.parameters(forward.layers[i]))

    def steps(self, i: int, window: tuple[int, int]) -> Iterator[Step]:
        """A window through a part, where gradients are wanted: one step, or several of a head whose logits are many."""
        probe, (n, w) = self.probe, window
        whole = slice(0, len(probe.batches[n][w]))
        if i == EMBEDDING:
            yield self._looked_up(window, whole)
            return
        x = self.entering(i, window)
        if i < probe.layers:
            x.requires_grad_()
            y = probe.run(probe.forward.layers[i], i, x)
            yield Step(x, y, self._slopes[n].get(w, w + 1).to(probe.device), whole)
            return
        assert self.loss is not None
        start = w * whole.stop
        for a, b in self._cuts(n, whole.stop):
            piece = x[0, a:b].detach().requires_grad_()
            logits = probe.logits(n, start + a, start + b, piece).float()
            yield Step(piece, self.loss(logits, probe.batches[n][w], a, b), None, slice(a, b))

    def _cuts(self, batch: int, length: int) -> list[tuple[int, int]]:
        """Tokens of a window that the head takes together."""
        return [(a, min(b, length)) for a, b in self.probe.cuts(batch) if a < length]

    def _looked_up(self, window: tuple[int, int], whole: slice) -> Step:
        probe, (n, w) = self.probe, window
        rows: list[Any] = []
        with _noting(probe.skeleton.embed, rows):
            y = probe.skeleton.entering([probe.batches[n][w]], slopes=True)
        return Step(rows[0], y, self._slopes[n].get(w, w + 1), whole)

    def entering(self, i: int, window: tuple[int, int]) -> Any:
        """(1, t, d): what entered a layer, or the head."""
        n, w = window
        at = i * len(self.probe.batches[n]) + w
        return self._entering[n].get(at, at + 1).to(self.probe.device)

    def hand(self, window: tuple[int, int], slopes: list[Any]) -> None:
        """On to the part before: the gradients at the x of all steps of a window, in order."""
        put(self._slopes, window, slopes)


def put(kept: list[Activations], window: tuple[int, int], pieces: list[Any]) -> None:
    """A window's (t, d), in pieces, or as one (1, t, d)."""
    torch, _ = packages()
    n, w = window
    kept[n].put(w, pieces[0] if pieces[0].dim() == 3 else torch.cat(pieces)[None])


@contextmanager
def _noting(module: Any, into: list[Any]) -> Iterator[None]:
    hook = module.register_forward_hook(lambda m, args, out: into.append(out))
    try:
        yield
    finally:
        hook.remove()


@contextmanager
def requiring(held: list[Held]) -> Iterator[list[Any]]:
    """The parameters, which want gradients while it lasts."""
    parameters = [h.parameter for h in held]
    for p in parameters:
        p.requires_grad_(True)
    try:
        yield parameters
    finally:
        for p in parameters:
            p.requires_grad_(False)
