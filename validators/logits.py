"""Distance between two models' next-token distributions, from fp32 logits over the full vocabulary.

KL(P || Q) = sum_v p_v (ln p_v - ln q_v) per token in nats, P the reference, with fp64 log-softmax. Logits are taken one
window at a time and turned into fp64 a few rows at a time; what is kept per token is a handful of numbers, so memory does
not grow with the text.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lconvert.errors import InputError, RuntimeFailure
from lconvert.primitives.freed import give_back

Logits = Callable[[list[int]], NDArray[np.float32]]
Floats = NDArray[np.float64]

LEAST = 16  # tokens that are worth comparing
_ELEMENTS = 1 << 22  # fp64 values of one distribution at a time
_BLOCK = 32  # neighbouring tokens that are resampled together: their errors are correlated
_RESAMPLES = 400
_WORST = 10
_CONTEXT = 24  # tokens shown before a bad one
_BINS = 16  # of the position in the window
_QUANTILES = {"median": 0.5, "p90": 0.9, "p99": 0.99, "p999": 0.999}
_EDGES = np.linspace(-16.0, 2.0, 73)  # of the histogram, log10 of KLD


@dataclass(frozen=True)
class LogitStats:
    """Statistics over all tokens of all windows; `data` is the JSON form (docs/report.md, "stats")."""

    data: Mapping[str, Any]
    kld: Floats = field(repr=False)  # per token, in order: what paired comparisons need

    @property
    def tokens(self) -> int:
        return int(self.data["tokens"])

    @property
    def kld_mean(self) -> float:
        return float(self.data["kld"]["mean"])

    @property
    def kld_max(self) -> float:
        return float(self.data["kld"]["max"])

    @property
    def same_top1(self) -> float:
        return float(self.data["same_top1"])

    @property
    def max_logprob_difference(self) -> float:
        return float(self.data["max_logprob_difference"])

    def to_json(self) -> dict[str, Any]:
        return dict(self.data)


def log_softmax(x: NDArray[np.float32]) -> Floats:
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
    models: Mapping[str, Logits],
    pairs: Sequence[tuple[str, str]],
    texts: Sequence[list[int]],
    *,
    progress: Callable[[], None] = lambda: None,
    decode: Callable[[list[int]], str] | None = None,
) -> dict[tuple[str, str], LogitStats]:
    """Run every model over the windows once and compare `pairs` of them, (reference, candidate) by name.

    The last token's prediction of a window is compared but has no target to score. decode: ids to text, for the worst
    tokens. Raises InputError where vocabularies differ, RuntimeFailure for logits that are not numbers.
    """
    sums = {pair: _Pair() for pair in pairs}
    needed = list(dict.fromkeys(name for pair in pairs for name in pair))
    for number, ids in enumerate(texts):
        logits = {name: _checked(name, models[name](ids), ids) for name in needed}
        sizes = {name: x.shape[1] for name, x in logits.items()}
        if len(set(sizes.values())) > 1:
            found = ", ".join(f"{name} has {n} tokens" for name, n in sizes.items())
            raise InputError(f"vocabularies differ: {found}; these are not the same model")
        step = max(1, _ELEMENTS // next(iter(sizes.values())))
        for start in range(0, len(ids), step):
            stop = min(start + step, len(ids))
            soft = {name: log_softmax(x[start:stop]) for name, x in logits.items()}
            for (p, q), acc in sums.items():
                raw = float(np.abs(logits[p][start:stop] - logits[q][start:stop]).max())
                acc.add(number, start, ids, soft[p], soft[q], raw)
        del logits, soft
        give_back()  # between windows of several megabytes glibc keeps and fragments it: 1.4 MB a window
        progress()
    return {pair: acc.result(texts, decode) for pair, acc in sums.items()}


def _checked(name: str, x: NDArray[np.float32], ids: list[int]) -> NDArray[np.float32]:
    if x.ndim != 2 or x.shape[0] != len(ids):
        raise RuntimeFailure(f"{name}: logits of shape {x.shape} for {len(ids)} tokens")
    if not np.isfinite(x).all():
        at = int(np.argwhere(~np.isfinite(x))[0][0])
        raise RuntimeFailure(
            f"{name}: the logits after token {at} of a window are not finite (NaN or infinite)"
        )
    return x


class _Pair:
    """What is kept of one pair while windows go by: some numbers per token, and the worst tokens."""

    def __init__(self) -> None:
        self.kld: list[Floats] = []
        self.window: list[NDArray[np.int32]] = []
        self.position: list[NDArray[np.int32]] = []
        self.same = 0
        self.flips = 0
        self.log_p: list[Floats] = []  # of the correct token, reference
        self.log_q: list[Floats] = []  # the same, candidate
        self.logit = self.logprob = 0.0
        self.worst: list[dict[str, Any]] = []

    def add(self, window: int, start: int, ids: list[int], p: Floats, q: Floats, raw: float) -> None:
        rows = len(p)
        difference = p - q
        kld = np.einsum("ij,ij->i", np.exp(p), difference)
        self.kld.append(kld)
        self.window.append(np.full(rows, window, np.int32))
        self.position.append(np.arange(start, start + rows, dtype=np.int32))
        top_p, top_q = p.argmax(-1), q.argmax(-1)
        self.same += int((top_p == top_q).sum())
        self.logit = max(self.logit, raw)
        self.logprob = max(self.logprob, float(np.abs(difference, out=difference).max()))
        targets = np.array(ids[start + 1 : start + 1 + rows], dtype=np.int64)
        at = np.arange(len(targets))
        self.log_p.append(p[at, targets])
        self.log_q.append(q[at, targets])
        right_p, right_q = top_p[: len(targets)] == targets, top_q[: len(targets)] == targets
        self.flips += int((right_p != right_q).sum())
        self._worst(window, start, kld, p, q, targets)

    def _worst(
        self, window: int, start: int, kld: Floats, p: Floats, q: Floats, targets: NDArray[np.int64]
    ) -> None:
        least = self.worst[-1]["kld"] if len(self.worst) == _WORST else -1.0
        for i in np.argsort(kld)[::-1][:_WORST]:
            if kld[i] <= least:
                break
            self.worst.append(
                {
                    "window": window,
                    "position": start + int(i),
                    "kld": float(kld[i]),
                    "target": int(targets[i]) if i < len(targets) else None,
                    "reference_top": _top(p[i]),
                    "candidate_top": _top(q[i]),
                }
            )
        self.worst = sorted(self.worst, key=lambda w: -w["kld"])[:_WORST]

    def result(self, texts: Sequence[list[int]], decode: Callable[[list[int]], str] | None) -> LogitStats:
        kld, window = np.concatenate(self.kld), np.concatenate(self.window)
        position = np.concatenate(self.position)
        log_p, log_q = np.concatenate(self.log_p), np.concatenate(self.log_q)
        n, scored = len(kld), len(log_p)
        mean, ci = _bootstrap(kld, window)
        delta = log_p - log_q  # of negative log-likelihoods: candidate minus reference
        # exp(p) - exp(q) without cancellation: tiny differences are what parity is about
        dp = np.exp(log_q) - np.exp(log_p)
        ppl = math.exp(-float(log_p.mean())) if scored else None
        ratio = float(delta.mean()) if scored else 0.0
        data = {
            "tokens": n,
            "windows": len(texts),
            "scored": scored,
            "kld": {
                "mean": float(kld.mean()),
                "mean_ci": mean,
                **{name: float(np.quantile(kld, at)) for name, at in _QUANTILES.items()},
                "max": float(kld.max()),
                "ci": ci,
            },
            "same_top1": self.same / n,
            "same_top1_ci": wilson(self.same, n),
            "flips": self.flips / max(scored, 1),
            "flips_ci": wilson(self.flips, scored),
            "ppl": {
                "reference": ppl,
                "candidate": None if ppl is None else _bounded_exp(-float(log_q.mean())),
                "ratio": _bounded_exp(ratio),
                "log_ratio": ratio,
                "log_ratio_se": _standard_error(delta),
            },
            "p_correct": {
                "rms_delta": float(np.sqrt(np.mean(dp**2))) if scored else 0.0,
                "rms_delta_se": _rms_error(dp),
                "mean_delta": float(dp.mean()) if scored else 0.0,
            },
            "max_logit_difference": self.logit,
            "max_logprob_difference": self.logprob,
            "positions": _positions(kld, position),
            "drift": _drift(kld, position),
            "histogram": _histogram(kld),
            "worst": [_shown(w, texts, decode) for w in self.worst],
        }
        return LogitStats(data, kld)


def _top(row: Floats) -> list[tuple[int, float]]:
    best = np.argpartition(row, -3)[-3:] if len(row) > 3 else np.arange(len(row))
    return [(int(i), float(np.exp(row[i]))) for i in sorted(best, key=lambda i: -row[i])]


def _shown(
    w: dict[str, Any], texts: Sequence[list[int]], decode: Callable[[list[int]], str] | None
) -> dict[str, Any]:
    """A bad token with its text: what came before it, what came, what both models expected."""

    def text(ids: list[int]) -> str:
        return decode(ids) if decode else " ".join(map(str, ids))

    ids, at = texts[w["window"]], w["position"]
    return w | {
        "context": text(ids[max(0, at + 1 - _CONTEXT) : at + 1]),
        "target": "" if w["target"] is None else text([w["target"]]),
        "reference_top": [[text([t]), p] for t, p in w["reference_top"]],
        "candidate_top": [[text([t]), p] for t, p in w["candidate_top"]],
    }


def _bounded_exp(x: float) -> float:
    return math.exp(min(x, 700.0))


def _blocks(n: int, groups: NDArray[np.int32] | None) -> list[NDArray[np.int64]]:
    """Indices 0..n-1 as runs of at most _BLOCK that do not cross from one window to the next."""
    edges = [0] if groups is None else [0, *(np.flatnonzero(np.diff(groups)) + 1).tolist()]
    out = []
    for a, b in zip(edges, [*edges[1:], n], strict=True):
        out += [np.arange(i, min(i + _BLOCK, b)) for i in range(a, b, _BLOCK)]
    return out


def _bootstrap(kld: Floats, window: NDArray[np.int32]) -> tuple[list[float], dict[str, list[float]]]:
    """95% intervals of mean and quantiles by a block bootstrap (Kuensch 1989): tokens near each other err together."""
    rng = np.random.default_rng(0)
    parts = [kld[i] for i in _blocks(len(kld), window)]
    means, found = [], []
    for _ in range(_RESAMPLES):
        sample = np.concatenate([parts[i] for i in rng.integers(0, len(parts), len(parts))])
        means.append(float(sample.mean()))
        found.append(np.quantile(sample, list(_QUANTILES.values())))
    low, high = np.quantile(found, [0.025, 0.975], axis=0)
    ci = {name: [float(a), float(b)] for name, a, b in zip(_QUANTILES, low, high, strict=True)}
    return [float(x) for x in np.quantile(means, [0.025, 0.975])], ci


def paired(ours: LogitStats, other: LogitStats) -> tuple[float, float]:
    """Mean over tokens of KLD(ours) - KLD(other) on the same text, and its standard error by blocks."""
    if len(ours.kld) != len(other.kld):
        raise InputError("statistics of different texts cannot be paired")
    delta = ours.kld - other.kld
    return float(delta.mean()), _standard_error(delta)


def _standard_error(x: Floats) -> float:
    """Standard error of the mean, from means of blocks of neighbours."""
    means = np.array([x[i].mean() for i in _blocks(len(x), None)])
    return float(means.std(ddof=1) / math.sqrt(len(means))) if len(means) > 1 else 0.0


def _rms_error(x: Floats) -> float:
    """Standard error of the root mean square, by the delta method."""
    rms = float(np.sqrt(np.mean(x**2))) if len(x) else 0.0
    return _standard_error(x**2) / (2 * rms) if rms else 0.0


def wilson(hits: int, n: int) -> list[float]:
    """95% interval of a proportion (Wilson 1927)."""
    if not n:
        return [0.0, 1.0]
    z, share = 1.959964, hits / n
    middle = share + z * z / (2 * n)
    spread = z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return [max(0.0, (middle - spread) / (1 + z * z / n)), min(1.0, (middle + spread) / (1 + z * z / n))]


def _positions(kld: Floats, position: NDArray[np.int32]) -> list[dict[str, Any]]:
    """Mean KLD by position in the window."""
    edges = np.linspace(0, int(position.max()) + 1, _BINS + 1).astype(int)
    out = []
    for a, b in zip(edges[:-1].tolist(), edges[1:].tolist(), strict=True):
        inside = kld[(position >= a) & (position < b)]
        if len(inside):
            out.append({"start": a, "end": b, "kld_mean": float(inside.mean())})
    return out


def _drift(kld: Floats, position: NDArray[np.int32]) -> dict[str, float]:
    """Mean KLD in the first and the last quarter of the windows: what grows with the length of the prompt."""
    size = int(position.max()) + 1
    first, last = kld[position < size / 4], kld[position >= size * 3 / 4]
    a, b = float(first.mean()) if len(first) else 0.0, float(last.mean()) if len(last) else 0.0
    return {"first": a, "last": b, "ratio": b / a if a > 0 else 1.0}


def _histogram(kld: Floats) -> dict[str, Any]:
    """Counts by log10 of the KLD; the outer bins take everything below and above."""
    logs = np.log10(np.clip(kld, 10.0 ** _EDGES[0], 10.0 ** _EDGES[-1]))
    counts, _ = np.histogram(logs, _EDGES)
    return {"log10_edges": _EDGES.round(4).tolist(), "counts": counts.tolist()}
