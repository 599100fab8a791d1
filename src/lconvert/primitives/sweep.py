"""A stretch of columns of GPTQ's sweep: what every column's error does to the next ones, for scales that are given.

    q_i = nearest level of w_i;  e_i = (w_i - q_i) / U_ii;  w_k -= e_i U_ik (+ w_i P_ik) for the columns k > i of the stretch

The compiled kernel does it on a CPU (kernels/sweep.h); `in_torch` is its specification, and what runs on a GPU.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Any

from lconvert import interrupt
from lconvert.forward import packages
from lconvert.primitives.levels import Levels
from lconvert.primitives.sides import Sides
from lconvert.primitives.trials import ratio


@dataclass(frozen=True)
class Swept:
    """position uint8 (rows, n) of the levels; error fp32 (rows, n), e_i."""

    position: Any
    error: Any


def columns(
    w: Any,
    upper: Any,
    levels: Levels,
    sides: Sides,
    group: Any,
    threads: int = 1,
    *,
    old: Any = None,
    kept: Any = None,
) -> Swept:
    """w (rows, n) fp32, upper (n, n) of U, group (n,) the index of each column's scale in `sides`.

    old (rows, n), values that are there already: coordinate descent instead. w is then E H of these columns for the errors E = W - old of all,
    upper H itself; each value becomes the level nearest to old + w_i / H_ii, `error` what it changed by. kept (rows, n) uint8: 0 where a
    value stays 0.
    """
    from lconvert.kernels import isa, native_module

    native = native_module()
    if native is None or w.device.type != "cpu":
        return in_torch(w, upper, levels, sides, group, old=old, kept=kept)
    torch, _ = packages()
    rows = w.shape[0]
    position = torch.empty(w.shape, dtype=torch.uint8)
    error = torch.empty_like(w)

    def array(x: Any) -> Any:
        return None if x is None else x.contiguous().numpy()

    values, midpoints = (None, None) if levels.uniform else (levels.values, levels.midpoints)
    given = (array(w), array(upper), levels.low, len(levels.values), values, midpoints, array(sides.scale), array(sides.zero),
             array(sides.offset), array(group.to(torch.int32)), array(old), array(kept), array(position), array(error))  # fmt: skip
    step = max(16, -(-rows // max(1, threads) // 16) * 16)
    name = isa()
    run_all(lambda a: native.sweep(name, *given, a, min(a + step, rows)), range(0, rows, step), threads)
    return Swept(position, error)


@functools.cache
def _pool(threads: int) -> ThreadPoolExecutor:
    """Kept as long as the process: to start threads takes ten times as long as a stretch of a small matrix."""
    return ThreadPoolExecutor(threads, thread_name_prefix="sweep")


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_pool.cache_clear)  # a child has none of its parent's threads


def run_all(work: Callable[[int], None], items: range, threads: int) -> None:
    """`work` of every item, on so many threads, of which the calling one is the first."""
    if threads <= 1 or len(items) <= 1:
        for item in items:
            work(item)
        return
    with interrupt.deferred():  # for a stretch's milliseconds: the pool outlives it, and must not keep a lock
        rest = [_pool(threads - 1).submit(work, item) for item in items[1:]]
        try:
            work(items[0])
        finally:
            wait(rest)
    for done in rest:
        done.result()


def in_torch(
    w: Any,
    upper: Any,
    levels: Levels,
    sides: Sides,
    group: Any,
    *,
    old: Any = None,
    kept: Any = None,
) -> Swept:
    """The same, column by column."""
    torch, _ = packages()
    w = w.clone()
    position = torch.empty(w.shape, dtype=torch.uint8, device=w.device)
    error = torch.empty_like(w)
    for i in range(w.shape[1]):
        x = w[:, i].clone() if old is None else old[:, i] + w[:, i] / upper[i, i]
        k = int(group[i])
        s = sides.scale[:, k]
        y = x if sides.offset is None else x + sides.offset[:, k]
        y = ratio(y, s)
        y = y if kept is None else y * (kept[:, i] != 0)
        p = levels.position(y) if sides.zero is None else levels.nearest_from(y, sides.zero[:, k])
        q = levels.at(p)
        if sides.zero is not None:
            q = q - sides.zero[:, k]
        q = q * s
        if sides.offset is not None:
            q = q - sides.offset[:, k]
        e = (x - q) / upper[i, i] if old is None else q - old[:, i]
        position[:, i], error[:, i] = p, e
        if i + 1 < w.shape[1]:
            w[:, i + 1 :] -= torch.outer(e, upper[i, i + 1 :])
    return Swept(position, error)
