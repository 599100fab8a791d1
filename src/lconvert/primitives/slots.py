"""Where a canonical weight lies in transformers' parameters: views, so that reading and writing need no copy of a layer.

transformers fuses (Phi-3's qkv_proj), takes turns (GPT-NeoX's heads), transposes (GPT-2's Conv1D) and stacks (experts); a canonical weight
is (out, in). A `Slot` is the pieces of one weight, in the order of its rows.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Container, Iterable, Iterator
from dataclasses import dataclass
from math import inf
from typing import Any

from lconvert.archs.common import Bind
from lconvert.forward import Forward, norm_shift, packages
from lconvert.ir import Decoder, Model, Moe


@dataclass(frozen=True)
class Slot:
    """views: pieces (rows, in) of parameters of the running layer. more, less: added for the parameter and taken off it."""

    views: tuple[Any, ...]
    more: float = 0.0
    less: float = 0.0

    def get(self) -> Any:
        torch, _ = packages()
        out = torch.cat(self.views) if len(self.views) > 1 else self.views[0].clone()
        return out - self.more + self.less if self.more != self.less else out

    def set(self, weight: Any) -> None:
        if self.more != self.less:
            weight = weight + self.more - self.less
        at = 0
        for view in self.views:
            view.copy_(weight[at : at + len(view)])
            at += len(view)


def pieces(bind: Bind, parameter: Any) -> Iterator[tuple[str, Any]]:
    """(role, view of its rows) of one parameter, in order."""
    x = parameter.swapaxes(-1, -2) if bind.transpose else parameter
    if bind.row is not None:  # this tensor is one row of its role
        yield bind.parts[0][0], x[None]
        return
    per = bind.stored[0] // (bind.experts or 1)
    for role, ranges in bind.parts:
        for a, b in ranges:
            if not bind.experts:
                yield role, x[a:b]
                continue
            one, low = x[a // per], a % per
            if bind.alternating:
                rows = per // bind.alternating
                one = one.unflatten(0, (rows, bind.alternating))[:, low // rows]
                low %= rows
            yield role, one[low : low + b - a]


def matrices(bind: Bind, parameter: Any) -> dict[str, Any]:
    """What an array in the layout of a parameter holds of each role, (out, in)."""
    torch, _ = packages()
    found: dict[str, list[Any]] = {}
    for role, view in pieces(bind, parameter):
        found.setdefault(role, []).append(view)
    return {role: v[0] if len(v) == 1 else torch.cat(v) for role, v in found.items()}


def slots(forward: Forward, part: Any, model: Model, named: Any = None) -> dict[str, Slot]:
    """Every canonical entry that `part`, whose parameters are filled, computes with. named: the part of the model that it copies."""
    found: dict[str, list[Any]] = {}
    own = dict(part.named_parameters())
    for full, name, _ in forward.parameters(part if named is None else named):
        parameter = own[name]
        bind = forward.bind(full, tuple(parameter.shape))
        for role, view in pieces(bind, parameter.data):
            found.setdefault(role, []).append(view)
    return {role: Slot(tuple(views), *norm_shift(model, role)) for role, views in found.items()}


def stages(d: Decoder, i: int) -> tuple[tuple[str, ...], ...]:
    """The matrices of layer i in the order in which they act, those of one input together.

    Experts have a stage per expert for (gate, up) and one for (down,), as each sees tokens of its own. The router shares its input
    with the shared experts.
    """
    layer = d.layer(i)
    a, m = layer.attention, layer.mlp
    out: list[tuple[str, ...]]
    if a.mla is None:
        out = [("attn.q", "attn.k", "attn.v")]
    elif a.mla.q_rank is None:
        out = [("attn.q", "attn.kv_a"), ("attn.k_b", "attn.v_b")]
    else:
        out = [("attn.q_a", "attn.kv_a"), ("attn.q_b",), ("attn.k_b", "attn.v_b")]
    after: list[tuple[str, ...]] = [("attn.o",)]
    entering: tuple[str, ...]
    if isinstance(m, Moe):
        entering = ("moe.router", "moe.shared.gate", "moe.shared.up") if m.shared else ("moe.router",)
        leaving: list[tuple[str, ...]] = [("moe.shared.down",)] if m.shared else []
        for e in range(m.experts):
            leaving += [
                (f"moe.experts.{e}.gate", f"moe.experts.{e}.up"),
                (f"moe.experts.{e}.down",),
            ]
    else:
        entering = ("mlp.gate", "mlp.up") if m.kind == "gated" else ("mlp.up",)
        leaving = [("mlp.down",)]
    if layer.block == "parallel_shared":  # both halves act on one norm's output
        out[0] += entering
    else:
        after.append(entering)
    return tuple(tuple(f"layers.{i}.{r}" for r in stage) for stage in (*out, *after, *leaving))


def waves(
    stages: Iterable[tuple[str, ...]],
    wanted: Container[str],
    size: Callable[[str], int] = lambda role: 0,
    most: float = inf,
) -> list[list[tuple[str, ...]]]:
    """What can be observed in one pass and then changed, in order: the wanted matrices of one stage, or those of all experts that do the same, as no
    expert's input depends on another one. size: bytes that the statistics of a stage take, by its first matrix; a wave of more than `most` is
    cut."""
    levels: dict[str, list[tuple[str, ...]]] = {}
    for stage in stages:
        if mine := tuple(role for role in stage if role in wanted):
            levels.setdefault(re.sub(r"\.experts\.[0-9]+\.", ".experts.", stage[0]), []).append(mine)
    return [wave for level in levels.values() for wave in cut(level, size, most)]


def cut(
    stages: Iterable[tuple[str, ...]], size: Callable[[str], int], most: float
) -> Iterator[list[tuple[str, ...]]]:
    """Stages in order, as many together as take at most `most`, and one at least."""
    wave: list[tuple[str, ...]] = []
    held = 0
    for stage in stages:
        if wave and held + size(stage[0]) > most:
            yield wave
            wave, held = [], 0
        wave.append(stage)
        held += size(stage[0])
    if wave:
        yield wave
