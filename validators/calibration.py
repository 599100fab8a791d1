"""Does a model's confidence mean what it says? Expected calibration error and Brier score.

ECE (Naeini et al. 2015; Guo et al. 2017): answers are sorted into bins of equal width by the confidence of the top
answer, and ECE = sum over bins of count / n * |accuracy - mean confidence|. Brier (1950): the mean over answers of
sum_k (p_k - [k is right])^2, between 0 and 2. Quantization can leave accuracy alone and ruin both.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lconvert.errors import InputError
from lconvert.validators.tasks import Choice

BINS = 15


@dataclass(frozen=True)
class Bin:
    """Answers whose confidence is in (low, high]; confidence and accuracy are means, None of an empty bin."""

    low: float
    high: float
    confidence: float | None
    accuracy: float | None
    count: int


@dataclass(frozen=True)
class Calibration:
    """n answers; `bins` are the reliability plot."""

    n: int
    accuracy: float
    confidence: float
    ece: float
    brier: float
    brier_stderr: float | None
    bins: tuple[Bin, ...]

    def to_json(self) -> dict[str, Any]:
        """The report's details.calibration of one model."""
        return asdict(self)


class Reliability:
    """Calibration over rows of probabilities, as sums, so that memory does not grow with the rows."""

    def __init__(self, bins: int = BINS) -> None:
        self._edges = np.linspace(0.0, 1.0, bins + 1)
        self._count, self._confidence, self._hits = (np.zeros(bins) for _ in range(3))
        self._brier = self._brier_squares = 0.0

    def add(self, logprobs: NDArray[np.floating[Any]], targets: NDArray[np.integer[Any]]) -> None:
        """logprobs (rows, classes): natural logarithms, normalised; targets (rows): the class that was right."""
        if logprobs.ndim != 2 or targets.shape != logprobs.shape[:1]:
            raise InputError(
                f"calibration: {targets.shape} targets do not go with {logprobs.shape} log-probabilities"
            )
        if not len(targets):
            return
        rows = np.arange(len(targets))
        p = np.exp(logprobs.astype(np.float64))
        top = p.argmax(axis=1)
        confidence, hit = p[rows, top], (top == targets).astype(np.float64)
        size = len(self._count)
        at = np.clip(np.searchsorted(self._edges, confidence, side="left") - 1, 0, size - 1)
        self._count += np.bincount(at, minlength=size)
        self._confidence += np.bincount(at, confidence, size)
        self._hits += np.bincount(at, hit, size)
        brier = (p * p).sum(axis=1) - 2 * p[rows, targets] + 1
        self._brier += float(brier.sum())
        self._brier_squares += float((brier * brier).sum())

    def result(self) -> Calibration:
        """InputError where nothing was added."""
        n = int(self._count.sum())
        if not n:
            raise InputError("calibration: no answers with one right choice; a task with labels is needed")
        bins = tuple(
            Bin(float(low), float(high), c / k if k else None, h / k if k else None, int(k))
            for low, high, k, c, h in zip(
                self._edges, self._edges[1:], self._count, self._confidence, self._hits, strict=False
            )
        )
        mean = self._brier / n
        variance = max(self._brier_squares / n - mean * mean, 0.0) * n / (n - 1) if n > 1 else None
        return Calibration(
            n=n,
            accuracy=float(self._hits.sum()) / n,
            confidence=float(self._confidence.sum()) / n,
            ece=float(np.abs(self._hits - self._confidence).sum()) / n,
            brier=mean,
            brier_stderr=None if variance is None else math.sqrt(variance / n),
            bins=bins,
        )


def of_choices(choices: Iterable[Choice], bins: int = BINS) -> Calibration:
    """Multiple-choice questions: the log-likelihoods of the choices, normalised over the choices of each question."""
    found = Reliability(bins)
    for choice in choices:
        x = np.array(choice.logprobs, np.float64)
        x -= x.max()
        x -= np.log(np.exp(x).sum())
        found.add(x[None, :], np.array([choice.right]))
    return found.result()
