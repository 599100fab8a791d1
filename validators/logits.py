"""Distance between two models' next-token distributions: KL divergence over the full vocabulary.

KL(P || Q) = sum_v p_v (ln p_v - ln q_v) per token, P the reference, from fp32 logits with fp64 log-softmax.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lconvert.errors import InputError

Logits = Callable[[list[int]], NDArray[np.float32]]
LEAST = 16  # tokens that are worth comparing
_ROWS = 64  # tokens at a time: bounds the fp64 copies to rows x vocabulary


@dataclass(frozen=True)
class LogitStats:
    """Statistics over all scored tokens. `positions` are the mean KLD by quarter of the window."""

    tokens: int
    windows: int
    kld_mean: float
    kld_median: float
    kld_p99: float
    kld_max: float
    same_top1: float
    ppl_reference: float
    ppl_candidate: float
    max_logit_difference: float
    positions: tuple[float, ...]

    @property
    def ppl_ratio(self) -> float:
        return self.ppl_candidate / self.ppl_reference

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "ppl_ratio": self.ppl_ratio}


def log_softmax(x: NDArray[np.float32]) -> NDArray[np.float64]:
    y = x.astype(np.float64)
    y -= y.max(axis=-1, keepdims=True)
    y -= np.log(np.exp(y).sum(axis=-1, keepdims=True))
    return y


def windows(ids: Sequence[int], length: int, bos: int | None, limit: int | None) -> list[list[int]]:
    """Non-overlapping windows of `length` tokens, each starting with BOS where the model has one."""
    body = length - (bos is not None)
    parts = [list(ids[i : i + body]) for i in range(0, len(ids), body)]
    full = [p for p in parts if len(p) == body] or parts[:1]
    full = full[:limit] if limit else full
    return [([bos] if bos is not None else []) + p for p in full if p]


def compare(
    reference: Logits,
    candidate: Logits,
    texts: Sequence[list[int]],
    progress: Callable[[], None] = lambda: None,
) -> LogitStats:
    """Run both models over the windows; the last token's prediction is compared but has no target to score."""
    klds: list[NDArray[np.float64]] = []
    quarter: list[list[float]] = [[], [], [], []]
    same, scored, worst = 0, 0, 0.0
    nll_reference = nll_candidate = 0.0
    for ids in texts:
        p_all, q_all = reference(ids), candidate(ids)
        if p_all.shape[1] != q_all.shape[1]:
            raise InputError(f"vocabularies differ: {p_all.shape[1]} and {q_all.shape[1]} tokens")
        kld = np.empty(len(ids))
        for a in range(0, len(ids), _ROWS):
            b = min(a + _ROWS, len(ids))
            p, q = log_softmax(p_all[a:b]), log_softmax(q_all[a:b])
            kld[a:b] = (np.exp(p) * (p - q)).sum(axis=-1)
            same += int((p.argmax(-1) == q.argmax(-1)).sum())
            worst = max(worst, float(np.abs(p_all[a:b] - q_all[a:b]).max()))
            targets = np.array(ids[a + 1 : b + 1])
            rows = np.arange(len(targets))
            nll_reference -= float(p[rows, targets].sum())
            nll_candidate -= float(q[rows, targets].sum())
            scored += len(targets)
        klds.append(kld)
        for n, part in enumerate(np.array_split(kld, 4)):
            quarter[n].extend(part.tolist())
        progress()
    every = np.concatenate(klds)
    return LogitStats(
        tokens=len(every),
        windows=len(texts),
        kld_mean=float(every.mean()),
        kld_median=float(np.median(every)),
        kld_p99=float(np.quantile(every, 0.99)),
        kld_max=float(every.max()),
        same_top1=same / len(every),
        ppl_reference=math.exp(nll_reference / max(scored, 1)),
        ppl_candidate=math.exp(nll_candidate / max(scored, 1)),
        max_logit_difference=worst,
        positions=tuple(float(np.mean(q)) if q else 0.0 for q in quarter),
    )
