"""What changing some weights does to a model's predictions: mean KL divergence against the original, on calibration windows.

    KLD = mean over tokens of sum_v p_v (ln p_v - ln q_v),  p of the original, q of the changed model, nats

One layer is in memory at a time, in fp32, then the head. What entered each layer of the original lies in a file (4 bytes per layer, token
and hidden feature): a change in layer k is measured by running the layers from k on. The original's logits lie in another one while they
take less than `_KEPT` bytes, and are computed again from the last layer's output otherwise.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

from lconvert.errors import InputError, OptionError
from lconvert.forward import Forward, packages
from lconvert.ir import Entry, Model, Tensor, dense
from lconvert.primitives.activations import Activations
from lconvert.primitives.freed import give_back
from lconvert.primitives.shelf import Shelf
from lconvert.primitives.skeleton import Skeleton, ending, first, moved

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

_KEPT = 1 << 30
_TOKENS = 2048  # that run together
_LOGITS = 128 << 20  # bytes of them that are computed together

#: Role -> what its matrix becomes, (out, in): an array, or a tensor that is read when its layer runs.
Changed = Mapping[str, "NDArray[np.float32] | Tensor"]


def needed(model: Model) -> int:
    """Bytes in memory at least: a layer in fp32, or the head with the logits that are computed together."""
    d = model.decoder
    sizes = [0] * d.layers
    for name, entry in model.entries.items():
        if name.startswith("layers."):
            sizes[int(name.split(".")[1])] += 4 * entry.data.size
    return max(*sizes, 4 * model.entries["embed" if d.tied else "head"].data.size + 4 * d.vocab)


class Probe:
    """A model, the windows that it is watched on, and what the original says to them."""

    def __init__(self, model: Model, windows: Sequence[Sequence[int]], device: str = "cpu") -> None:
        """windows: token ids; those of one length run together."""
        if not windows:
            raise OptionError("a calibration text of at least one token is needed to measure a change")
        self.torch, _ = packages()
        self.model, self.device = model, device
        self.layers, self.hidden = model.decoder.layers, model.decoder.hidden
        self.batches = list(_batches(windows))
        self.tokens = sum(len(b) * len(b[0]) for b in self.batches)
        self.forward = Forward(model, lazily=True, finite=True)
        self.shelf = Shelf()

    # --- the original -------------------------------------------------------------------------------------

    @cached_property
    def skeleton(self) -> Skeleton:
        return Skeleton(self.forward, self.model, self._ids())

    @cached_property
    def kwargs(self) -> Mapping[int, list[Mapping[str, Any]]]:
        """What layers are called with, for windows of each length."""
        one = {len(b[0]): tuple(b[0]) for b in self.batches}
        return {n: [moved(k, self.device) for k in self.skeleton.kwargs(w)] for n, w in one.items()}

    @cached_property
    def entering(self) -> list[Activations]:
        """Per batch: its windows' hidden states before every layer and after the last, one after another."""
        kept = [self.room(b, self.layers + 1) for b in self.batches]
        with self.torch.no_grad():
            for into, batch in zip(kept, self.batches, strict=True):
                into.put(0, self.skeleton.entering(batch))
            for i in range(self.layers):
                with self.layer(i) as layer:
                    for into, batch in zip(kept, self.batches, strict=True):
                        x = into.get(i * len(batch), (i + 1) * len(batch))
                        into.put((i + 1) * len(batch), self.run(layer, i, x))
        return kept

    @cached_property
    def _logits(self) -> list[Activations] | None:
        """Per batch: the logits of every token, or None where they are too many. InputError where they are not finite."""
        vocab = self.model.decoder.vocab
        keep = self.tokens * vocab * 4 <= _KEPT
        kept = []
        with self.torch.no_grad(), self.head():
            for n, batch in enumerate(self.batches):
                if keep:
                    kept.append(Activations(len(batch) * len(batch[0]), 1, vocab, "f32", self.shelf.file()))
                for a, b in self.cuts(n):
                    logits = self.logits(n, a, b, self._leaving(n)[a:b])
                    if not bool(logits.isfinite().all()):
                        raise InputError(
                            f"{self.model.source}: its logits are not finite; nothing can be compared with them"
                        )
                    if keep:
                        kept[n].put(a, logits.unsqueeze(1))
        return kept if keep else None

    def entering_head(self) -> NDArray[np.float32]:
        """Mean square of every feature (hidden,) that the head multiplies."""
        torch = self.torch
        assert self.skeleton is not None  # which fills the norm
        norm = ending(self.forward)[0].to(self.device)
        sums = torch.zeros(self.hidden, dtype=torch.float64, device=self.device)
        with torch.no_grad():
            for n in range(len(self.batches)):
                sums += norm(self._leaving(n)).double().square().sum(0)
        found: NDArray[np.float32] = (sums / self.tokens).float().cpu().numpy()
        return found

    # --- a change -----------------------------------------------------------------------------------------

    def kld(self, changed: Changed) -> float:
        """Mean KLD of the model with these weights instead of its own."""
        other = self._with(changed)
        with self.torch.no_grad():
            total = self._divergence(other, self._changed_leaving(other, changed), changed)
        if not math.isfinite(total):
            raise InputError(
                f"{self.model.source}: logits are not finite after rounding {', '.join(changed)}"
            )
        return max(0.0, total / self.tokens)

    def _with(self, changed: Changed) -> Model:
        new: dict[str, Entry] = {}
        for role, w in changed.items():
            data = w if isinstance(w, Tensor) else dense(w)
            new[role] = replace(self.model.entries[role], data=data, transform=None)
        return self.model.with_entries(new)

    def _changed_leaving(self, other: Model, changed: Changed) -> list[Activations] | None:
        """What leaves the last layer of a changed model; None where that is as in the original."""
        start = self._first(changed)
        if start == self.layers:
            return None
        now = [self.room(batch, 1) for batch in self.batches]
        for into, own, batch in zip(now, self.entering, self.batches, strict=True):
            into.put(0, own.get(start * len(batch), (start + 1) * len(batch)))
        if {"embed", "pos_embed"} & set(changed):
            skeleton = Skeleton(Forward(other, lazily=True), other, self._ids())
            for into, batch in zip(now, self.batches, strict=True):
                into.put(0, skeleton.entering(batch))
        for i in range(start, self.layers):
            with self.layer(i, other) as layer:
                for into, batch in zip(now, self.batches, strict=True):
                    into.put(0, self.run(layer, i, into.get(0, len(batch))))
        return now

    def _divergence(self, other: Model, leaving: list[Activations] | None, changed: Changed) -> float:
        """Sum over tokens of KL(p || q)."""
        kept, total = self._logits, 0.0
        with self.head(other):
            mine = own = self._head_weights()
            if kept is None and {"head", "embed"} & set(changed):
                with self.head():
                    own = self._head_weights()
            for n, batch in enumerate(self.batches):
                x = self._leaving(n)
                y = x if leaving is None else self._flat(leaving[n].get(0, len(batch)))
                for a, b in self.cuts(n):
                    if kept is None:
                        self._use(own)
                        p = self.logits(n, a, b, x[a:b])
                        self._use(mine)
                    else:
                        p = kept[n].get(a, b)[:, 0].to(self.device)
                    total += float(_divergence(self.torch, p, self.logits(n, a, b, y[a:b])))
        return total

    def _first(self, changed: Changed) -> int:
        """The first layer that feels the change."""
        places = [int(r.split(".")[1]) if r.startswith("layers.") else self.layers for r in changed]
        inner = {"embed", "pos_embed"} & set(changed)
        return 0 if inner else min(places, default=self.layers)

    # --- parts --------------------------------------------------------------------------------------------

    @contextmanager
    def layer(self, i: int, model: Model | None = None) -> Iterator[Any]:
        """A layer, its weights in memory while it lasts."""
        assert self.kwargs
        layer = self.forward.layers[i]
        self.forward.fill(layer, model)
        layer.to(self.device)
        try:
            yield layer
        finally:
            self.forward.drop(layer)
            give_back()

    def run(self, layer: Any, i: int, hidden: Any) -> Any:
        """(b, t, d): what layer i makes of hidden states."""
        return first(layer(hidden.to(self.device), **self.kwargs[hidden.shape[1]][i]))

    @contextmanager
    def head(self, model: Model | None = None) -> Iterator[Any]:
        """The head, its weights in memory while it lasts; a tied one is the embedding's matrix."""
        norm, head = ending(self.forward)
        assert self.entering is not None  # the original's, which needs weights of its own
        norm.to(self.device)
        held = self._head_weights()
        for full, name, parameter in self.forward.parameters(head):
            if self.model.decoder.tied and name == "weight":
                full = self.embedding
            weight = self.forward.load(full, tuple(parameter.shape), model)
            self.forward.put(head, name, weight.to(self.device))
        try:
            yield head
        finally:
            self._use(held)
            give_back()

    def _head_weights(self) -> dict[str, Any]:
        return dict(ending(self.forward)[1]._parameters)

    def _use(self, weights: Mapping[str, Any]) -> None:
        ending(self.forward)[1]._parameters.update(weights)

    @property
    def embedding(self) -> str:
        """The embedding's name in the model."""
        return f"{self.forward._names[id(self.forward.module.get_input_embeddings())]}.weight"

    def logits(self, batch: int, start: int, stop: int, hidden: Any) -> Any:
        """(stop - start, vocab) of tokens of a batch, which are whole windows or within one, by what leaves the last layer for them."""
        ids = self._piece(batch, start, stop)
        shape = (len(ids), len(ids[0]), self.hidden)
        return self.skeleton.logits(ids, hidden.reshape(shape).to(self.device)).flatten(0, 1)

    def cuts(self, batch: int) -> Iterator[tuple[int, int]]:
        """Tokens of a batch whose logits are computed together: as many windows as `_LOGITS` bytes hold, or a part of one."""
        length = len(self.batches[batch][0])
        total = len(self.batches[batch]) * length
        most = max(1, _LOGITS // (4 * self.model.decoder.vocab))
        step = most // length * length
        if step:
            yield from ((a, min(a + step, total)) for a in range(0, total, step))
            return
        for w in range(0, total, length):
            yield from ((w + a, w + min(a + most, length)) for a in range(0, length, most))

    def room(self, batch: Sequence[Sequence[int]], times: int) -> Activations:
        """Room for hidden states of a batch, so many times."""
        return Activations(times * len(batch), len(batch[0]), self.hidden, "f32", self.shelf.file())

    def _leaving(self, batch: int) -> Any:
        """(tokens, d): what leaves the original's last layer."""
        n = len(self.batches[batch])
        return self._flat(self.entering[batch].get(self.layers * n, (self.layers + 1) * n))

    def _flat(self, hidden: Any) -> Any:
        return hidden.flatten(0, 1).to(self.device)

    def _piece(self, batch: int, start: int, stop: int) -> list[list[int]]:
        windows = self.batches[batch]
        length = len(windows[0])
        if (stop - start) % length == 0:
            return windows[start // length : stop // length]
        at = start % length
        return [windows[start // length][at : at + stop - start]]

    def _ids(self) -> set[int]:
        return {i for batch in self.batches for w in batch for i in w}


def _divergence(torch: Any, p: Any, q: Any) -> Any:
    """Sum over tokens of KL(p || q), fp64."""
    lp, lq = torch.log_softmax(p.float(), -1), torch.log_softmax(q.float(), -1)
    return (lp.exp() * (lp - lq)).sum(-1).double().sum()


def _batches(windows: Sequence[Sequence[int]]) -> Iterator[list[list[int]]]:
    """Windows of one length together, in order of length and place."""
    lengths = sorted({len(w) for w in windows}, reverse=True)
    for length in lengths:
        same = [list(w) for w in windows if len(w) == length]
        step = max(1, _TOKENS // max(1, length))
        for at in range(0, len(same), step):
            yield same[at : at + step]
