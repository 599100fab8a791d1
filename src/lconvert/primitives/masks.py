"""Which weights are kept: scores, patterns with exact counts, and the schedule of iterative pruning.

A mask is bool of the weight's shape (out, in); True is kept. Scores, the least of which go first:

    magnitude   |w|                  (Han et al., arXiv 1506.02626)
    wanda       |w_ij| ||x_j||_2     (arXiv 2306.11695, eq. 1; ||x_j|| over all calibration tokens)

Patterns: unstructured, a share of each row or of the whole tensor; N:M, of every M neighbours along the input dimension N are kept
(NVIDIA's meaning, arXiv 2104.08378: 2:4 has at most 2 values other than zero; SparseGPT's and Wanda's scripts count the zeros instead).

Iterative pruning follows the cubic schedule of Zhu and Gupta (arXiv 1710.01878, eq. 1), s_t = s_f (1 - (1 - t / T)^3).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, Literal

from lconvert.errors import InputError, OptionError
from lconvert.ir import Model

UNSTRUCTURED = "unstructured"


@dataclass(frozen=True)
class Pattern:
    """`keep` of every `of` neighbours, or where `of` is 0 the largest share of a row or of the tensor (`per`)."""

    keep: int = 0
    of: int = 0
    per: Literal["row", "tensor"] = "row"

    def __str__(self) -> str:
        return f"{self.keep}:{self.of}" if self.of else UNSTRUCTURED

    @property
    def sparsity(self) -> float | None:
        """The share of zeros that the pattern says; None where it says none."""
        return 1 - self.keep / self.of if self.of else None


def parse(text: str, per: Literal["row", "tensor"] = "row") -> Pattern:
    """unstructured, or N:M with 0 < N < M; OptionError for anything else."""
    if text == UNSTRUCTURED:
        return Pattern(per=per)
    found = re.fullmatch(r"([0-9]{1,3}):([0-9]{1,3})", text, re.ASCII)
    keep, of = map(int, found.groups()) if found else (0, 0)
    if not 0 < keep < of:
        raise OptionError(
            f"pattern {text!r}; expected unstructured, or N:M with N of every M weights kept, such as 2:4"
        )
    return Pattern(keep, of)


def said(model: Model) -> str:
    """The line of the model's report that says how it was pruned, by whatever pass; "" where it was not."""
    return next((line for line in model.report if re.match(r"sparse: \d+ matrices", line)), "")


def asked(how: str | float) -> tuple[Pattern, float]:
    """Pattern and share of zeros of N:M, or of a share over the whole tensor; OptionError for anything else."""
    if isinstance(how, str):
        pattern = parse(how)
        if pattern.sparsity is not None:
            return pattern, pattern.sparsity
    elif not isinstance(how, bool) and 0 < how < 1:
        return Pattern(per="tensor"), float(how)
    raise OptionError(f"{how!r}; expected N:M in quotes, such as '2:4', or a share of zeros, such as 0.5")


def fits(pattern: Pattern, cols: int, name: str) -> None:
    """OptionError for rows that groups of M do not divide."""
    if pattern.of and cols % pattern.of:
        raise OptionError(
            f"{name}: rows of {cols} weights do not divide into groups of {pattern.of}, so it cannot be {pattern}; "
            "leave it out with ignore, or choose unstructured"
        )


def magnitude(w: Any) -> Any:
    return w.abs()


def wanda(w: Any, norms: Any) -> Any:
    """w (out, in), norms (in,): the 2-norm of each input channel over the tokens."""
    return w.abs() * norms


def count(share: float, of: int) -> int:
    """How many of `of` weights a share is, to nearest, halves up."""
    return int(share * of + 0.5 + 1e-9)


def least(score: Any, number: int) -> Any:
    """The `number` least scores of the last axis, as bool; among equal ones the first go first."""
    if number == 0:
        return score < score.new_full((), -float("inf"))
    edge = score.kthvalue(number, dim=-1, keepdim=True).values
    below, equal = score < edge, score == edge
    room = number - below.sum(-1, keepdim=True)
    return below | (equal & (equal.cumsum(-1, dtype=room.dtype) <= room))


def kept(score: Any, pattern: Pattern, sparsity: float, name: str = "weight") -> Any:
    """The mask of scores (out, in) at a sparsity: exact counts, per group of M, per row or over the tensor.

    For N:M a sparsity below the pattern's (a step of a schedule) prunes round(sparsity M) of every group. InputError for NaN.
    """
    rows, cols = score.shape
    fits(pattern, cols, name)
    if bool(score.isnan().any()):
        raise InputError(
            f"{name}: its weights hold NaN, or the inputs that score them do, so they have no order; the checkpoint is damaged"
        )
    if pattern.of:
        cut = score.reshape(rows, cols // pattern.of, pattern.of)
        return ~least(cut, count(sparsity, pattern.of)).reshape(rows, cols)
    cut = score if pattern.per == "row" else score.reshape(1, -1)
    return ~least(cut, count(sparsity, cut.shape[1])).reshape(rows, cols)


def cubic(step: int, steps: int, final: float) -> float:
    """The sparsity after step 1 .. steps."""
    return float(final * (1 - (1 - step / steps) ** 3))
