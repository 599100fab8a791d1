"""Greedy continuations: how long do two models say the same, and is the first difference an error or a tie?

Two runtimes that compute the same function still differ in the last bits, so where the reference itself hardly prefers
one token to another either may win. Such a tie is counted and stepped over: the candidate goes on from the reference's
text. Any other difference ends the comparison of its prompt, because from there on the texts are different ones.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from lconvert.errors import InputError
from lconvert.validators.runtimes import Generation
from lconvert.validators.tokens import first_difference

#: Two tokens are tied when the reference's logits for them are nearer than this. The difference of two logits of the F32
#: artifacts of nine trained models in llama.cpp is off from transformers' by at most 4.3e-5, and by 2.4e-3 where the
#: model uses GELU, for which ggml has a table in half precision.
TIE = 5e-3


@dataclass(frozen=True)
class Divergence:
    """The first difference of a prompt. at: how many tokens agreed before it. margin: by how much the reference's logit
    of the token it expected is above that of the token found. tie: the margin is too small to mean anything."""

    prompt: int
    at: int
    expected: int
    found: int
    margin: float
    tie: bool


@dataclass(frozen=True)
class GreedyReport:
    """tokens: asked for in all; agreed: those before a difference that is no tie. identical: prompts without such one.

    differences: the first of each prompt that has one, and the ties before it.
    """

    prompts: int
    tokens: int
    agreed: int
    identical: int
    differences: tuple[Divergence, ...]

    @property
    def agreement(self) -> float:
        return self.agreed / self.tokens

    @property
    def ties(self) -> int:
        return sum(d.tie for d in self.differences)

    def to_json(self) -> dict[str, Any]:
        return {
            "prompts": self.prompts,
            "tokens": self.tokens,
            "agreement": self.agreement,
            "identical": self.identical,
            "ties": self.ties,
            "first_differences": [vars(d) for d in self.differences if not d.tie],
            "tied": [vars(d) for d in self.differences if d.tie],
        }


class Greedy(Protocol):
    """The part of a `Runtime` that is needed here."""

    def logits(self, ids: list[int]) -> NDArray[np.float32]: ...

    def generate(self, ids: list[int], n: int) -> Generation: ...


def compare(
    reference: Greedy,
    candidate: Greedy,
    prompts: Sequence[list[int]],
    n: int,
    *,
    tie: float = TIE,
    progress: Callable[[], None] = lambda: None,
) -> GreedyReport:
    """`n` greedy tokens after each prompt in both runtimes; a prompt and its tokens must fit their contexts."""
    if not prompts or n < 1:
        raise InputError("nothing to compare: greedy continuation needs a prompt and a number of tokens")
    differences: list[Divergence] = []
    agreed = identical = 0
    for number, prompt in enumerate(prompts):
        expected = list(reference.generate(prompt, n).ids)
        at = 0
        while at < n:
            found = candidate.generate(prompt + expected[:at], n - at).ids
            at += first_difference(expected[at:], found)
            if at == n:
                break
            token = found[at - n]
            logits = reference.logits(prompt + expected[:at])[-1]
            margin = float(logits[expected[at]]) - float(logits[token])
            differences.append(Divergence(number, at, expected[at], token, margin, abs(margin) < tie))
            if not differences[-1].tie:
                break
            at += 1
        agreed += at
        identical += at == n
        progress()
    return GreedyReport(len(prompts), n * len(prompts), agreed, identical, tuple(differences))
