"""What changing some weights does to a model's predictions: mean KL divergence against the original, on calibration windows.

    KLD = mean over tokens of sum_v p_v (ln p_v - ln q_v),  p of the original, q of the changed model, nats

The weights stay in memory in fp32, and so does what entered each decoder layer of the original: a change in layer k is measured by running
the layers from k on. That takes 4 bytes per weight and per layer, token and hidden feature; the original's logits are kept while they take
less than `_KEPT` bytes, and computed again from the last layer's output otherwise.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from lconvert.errors import InputError, OptionError
from lconvert.forward import Forward, packages
from lconvert.ir import Entry, Model, dense

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

_KEPT = 1 << 30
_TOKENS = 2048  # that run together

#: Role -> what its matrix becomes, fp32 (out, in).
Changed = Mapping[str, "NDArray[np.float32]"]


class Probe:
    """A model in memory, the windows that it is watched on, and what the original says to them."""

    def __init__(self, model: Model, windows: Sequence[Sequence[int]], device: str = "cpu") -> None:
        """windows: token ids; those of one length run together. InputError where the original's logits are not finite."""
        if not windows:
            raise OptionError("a calibration text of at least one token is needed to measure a change")
        self.torch, _ = packages()
        self.model = model
        self.forward = _resident(model)
        self.module = self.forward.module.to(device)
        self.batches = [self.torch.tensor(b, device=device) for b in _batches(windows)]
        self.tokens = sum(int(b.numel()) for b in self.batches)
        self._parameters = {
            name: (p, roles_of(self.forward, model, name)) for name, p in self.module.named_parameters()
        }
        self._entering: list[
            list[Any]
        ] = []  # per batch: the input of every layer, then the output of the last
        self._logits: list[Any] = []
        self._tuples = False  # whether layers return their output in a tuple

    # --- running ------------------------------------------------------------------------------------------

    def logits(self, ids: Any) -> Any:
        """Logits (windows, tokens, vocab) of token ids (windows, tokens), with gradients where weights want them."""
        return self.module(ids, use_cache=False).logits

    def windows(self) -> Iterator[Any]:
        """Every window by itself, ids (1, tokens)."""
        for batch in self.batches:
            yield from batch.split(1)

    def kld(self, changed: Changed) -> float:
        """Mean KLD of the model with these weights instead of its own."""
        with self.torch.no_grad():
            self._watch_original()
            self._put(changed)
            try:
                start, total = self._first(changed), 0.0
                for n in range(len(self.batches)):
                    total += float(_divergence(self.torch, self._original(n), self._from(n, start)))
            finally:
                self._put({}, restore=changed)
        if not math.isfinite(total):
            raise InputError(
                f"{self.model.source}: logits are not finite after rounding {', '.join(changed)}"
            )
        return max(0.0, total / self.tokens)

    def entering_head(self) -> NDArray[np.float32]:
        """Mean square of every feature (hidden,) that the head multiplies."""
        torch = self.torch
        sums = torch.zeros(self.model.decoder.hidden, dtype=torch.float64)

        def hook(module: Any, args: tuple[Any, ...]) -> None:
            sums.add_(args[0].reshape(-1, len(sums)).double().square().sum(0).cpu())

        hook_ = self.module.get_output_embeddings().register_forward_pre_hook(hook)
        try:
            with torch.no_grad():
                for ids in self.batches:
                    self.logits(ids)
        finally:
            hook_.remove()
        found: NDArray[np.float32] = (sums / self.tokens).float().numpy()
        return found

    def matrices(self) -> Iterator[tuple[str, Any, tuple[str, ...]]]:
        """Parameters with the roles of matrices that they hold: (name, parameter, roles)."""
        for name, (parameter, roles) in self._parameters.items():
            if any(len(self.model.entries[r].shape) == 2 for r in roles):
                yield name, parameter, roles

    def part(self, name: str, values: Any, role: str) -> NDArray[np.float32]:
        """What belongs to `role` of an array in the layout of a parameter, as (out, in)."""
        array = values.detach().float().cpu().numpy()
        if name not in self.forward._binds:
            return _expert(array, name, role)
        bind = self.forward._binds[name]
        array = array.swapaxes(-1, -2) if bind.transpose else array
        ranges = dict(bind.parts)[role]
        rows: NDArray[np.float32] = self.torch.cat(
            [self.torch.from_numpy(array.reshape(bind.stored)[a:b].copy()) for a, b in ranges]
        ).numpy()
        return rows

    # --- parts ------------------------------------------------------------------------------------------

    def _watch_original(self) -> None:
        if self._entering:
            return
        kept = sum(b.numel() for b in self.batches) * self.model.decoder.vocab * 4 <= _KEPT
        for ids in self.batches:
            logits, entering = self._watched_run(ids)
            if not bool(logits.isfinite().all()):
                raise InputError(
                    f"{self.model.source}: its logits are not finite; nothing can be compared with them"
                )
            self._entering.append(entering)
            self._logits.append(logits if kept else None)

    def _watched_run(self, ids: Any) -> tuple[Any, list[Any]]:
        """Logits of the original, and what enters every layer and leaves the last."""
        entering: list[Any] = []

        def before(layer: Any, args: Any, kwargs: Any) -> None:
            entering.append(args[0] if args else kwargs["hidden_states"])

        def after(layer: Any, args: Any, out: Any) -> None:
            self._tuples = isinstance(out, tuple)
            entering.append(out[0] if self._tuples else out)

        hooks = [layer.register_forward_pre_hook(before, with_kwargs=True) for layer in self.forward.layers]
        hooks.append(self.forward.layers[-1].register_forward_hook(after))
        try:
            return self.logits(ids), entering
        finally:
            for hook in hooks:
                hook.remove()

    def _original(self, batch: int) -> Any:
        found = self._logits[batch]
        return self._from(batch, len(self.forward.layers)) if found is None else found

    def _from(self, batch: int, start: int) -> Any:
        """Logits of a batch, from layer `start` on, with what entered that layer in the original."""
        if start == 0:
            return self.logits(self.batches[batch])
        with self._skipping(self._entering[batch][start], start):
            return self.logits(self.batches[batch])

    def _first(self, changed: Changed) -> int:
        """The first layer that feels the change."""
        layers = len(self.forward.layers)
        places = [int(r.split(".")[1]) if r.startswith("layers.") else layers for r in changed]
        inner = {"embed", "pos_embed"} & set(changed)
        return 0 if inner else min(places, default=layers)

    @contextmanager
    def _skipping(self, hidden: Any, start: int) -> Iterator[None]:
        """Layers before `start` hand on `hidden`, so that masks, rotary tables and the head stay the model's own."""
        skipped = self.forward.layers[:start]

        def instead(*args: Any, **kwargs: Any) -> Any:
            return (hidden,) if self._tuples else hidden

        for layer in skipped:
            layer.forward = instead
        try:
            yield
        finally:
            for layer in skipped:
                del layer.forward

    def _put(self, changed: Changed, restore: Changed | None = None) -> None:
        """Write these matrices into the parameters that hold them; `restore`: the original's instead."""
        touched = set(restore or changed)
        new: dict[str, Entry] = {
            r: replace(self.model.entries[r], data=dense(w), transform=None) for r, w in changed.items()
        }
        self.forward._model = self.model.with_entries(new)
        try:
            for name, (parameter, roles) in self._parameters.items():
                if touched.intersection(roles):
                    parameter.data.copy_(self.forward._load(name, tuple(parameter.shape)))
        finally:
            self.forward._model = self.model


def _divergence(torch: Any, p: Any, q: Any) -> Any:
    """Sum over tokens of KL(p || q), fp64."""
    lp, lq = torch.log_softmax(p.float(), -1), torch.log_softmax(q.float(), -1)
    return (lp.exp() * (lp - lq)).sum(-1).double().sum()


def _resident(model: Model) -> Forward:
    """Forward with all weights in memory: nothing is loaded or dropped while it runs."""
    _ = model.decoder  # which refuses a model of another kind
    forward = Forward(model)
    for layer in forward.layers:
        layer._forward_pre_hooks.clear()
        layer._forward_hooks.clear()
        forward.fill(layer)
    return forward


def roles_of(forward: Forward, model: Model, parameter: str) -> tuple[str, ...]:
    """The canonical roles whose values a parameter of the transformers model holds."""
    if parameter in forward._binds:
        return tuple(dict.fromkeys(role for role, _ in forward._binds[parameter].parts))
    layer = parameter.split(".layers.", 1)[-1].split(".", 1)[0]
    kinds = {"experts.gate_up_proj": (".gate", ".up"), "experts.down_proj": (".down",)}
    for ending, wanted in kinds.items():
        if parameter.endswith(ending):
            prefix = f"layers.{layer}.moe.experts."
            return tuple(r for r in model.entries if r.startswith(prefix) and r.endswith(wanted))
    return (f"layers.{layer}.moe.router",)


def _expert(array: NDArray[Any], name: str, role: str) -> NDArray[np.float32]:
    """One expert's matrix out of a stack (experts, out, in); gate and up lie one after the other."""
    if role.endswith(".router"):
        return array
    rows: NDArray[np.float32] = array[int(role.split(".")[4])]
    if not name.endswith("gate_up_proj"):
        return rows
    half = len(rows) // 2
    return rows[:half] if role.endswith(".gate") else rows[half:]


def _batches(windows: Sequence[Sequence[int]]) -> Iterator[list[list[int]]]:
    """Windows of one length together, in order of length and place."""
    lengths = sorted({len(w) for w in windows}, reverse=True)
    for length in lengths:
        same = [list(w) for w in windows if len(w) == length]
        step = max(1, _TOKENS // max(1, length))
        for at in range(0, len(same), step):
            yield same[at : at + step]
