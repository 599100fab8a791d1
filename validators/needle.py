"""Needle in a haystack: is a fact that stands somewhere in a long text still found after conversion?

A sentence with a random key is put into running text at a depth of 0 to 100 %, and its beginning is repeated at the end.
Two readings of the same prompt: the right key must be the most probable one among distractors (which base models of any
size can do better than chance), and greedy decoding must write it (which takes a model that can copy). What a release
asks is whether the candidate still finds what the reference found, so the agreement of the two is reported as well.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from lconvert.errors import InputError, OptionError
from lconvert.validators.scoring import Scorer

#: Sentences with {key}; the prompt ends with the same words up to the key.
NEEDLES = (
    "The name of the old gardener was {key}.",
    "The secret word of the garden was {key}.",
    "The ship in the harbour was called {key}.",
    "The first thing on the list was {key}.",
)
#: Common words that mean nothing in the sentences; short, so that most vocabularies hold them in few tokens.
KEYS = (
    "apple", "silver", "winter", "candle", "forest", "marble", "thunder", "pepper", "violet", "copper", "lantern",
    "meadow", "orange", "pillow", "river", "saddle", "ticket", "velvet", "walnut", "yellow", "anchor", "basket",
    "cotton", "dragon", "engine", "feather", "garlic", "hammer", "island", "jacket", "kettle", "ladder",
)  # fmt: skip
DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
SHARES = (0.25, 0.5, 1.0)  # of the context
_ROOM = 16  # tokens of the context that the key and its decoding may take
LEAST = 64  # tokens of the shortest prompt that is a haystack


@dataclass(frozen=True)
class Reading:
    """One model on one prompt. rank: of the right key, 1 is best; exact: greedy decoding writes it."""

    rank: int
    exact: bool
    written: str


@dataclass(frozen=True)
class Cell:
    """One prompt: its length in the reference's tokens (size: what was asked for), the depth of the needle, and what both
    models read.

    candidate: None where only one model was asked.
    """

    tokens: int
    size: int
    depth: float
    trial: int
    key: str
    reference: Reading
    candidate: Reading | None = None

    def to_json(self) -> dict[str, Any]:
        row = asdict(self) | {"found_reference": self.reference.rank == 1}
        return row | ({"found_candidate": self.candidate.rank == 1} if self.candidate else {})


@dataclass(frozen=True)
class Found:
    """Shares over all prompts. chance: of ranking first by luck. agreement: both rank the same key first or both
    do not; same_text: both write the same greedily. None where only one model was asked."""

    grid: tuple[Cell, ...]
    chance: float
    reference: float
    reference_exact: float
    candidate: float | None = None
    candidate_exact: float | None = None
    agreement: float | None = None
    same_text: float | None = None

    def to_json(self) -> dict[str, Any]:
        """The report's details.needle."""
        return asdict(self) | {"grid": [c.to_json() for c in self.grid]}


@dataclass(frozen=True)
class Prompt:
    """keys[0] is the right one."""

    text: str
    tokens: int
    size: int
    depth: float
    trial: int
    keys: tuple[str, ...]


def prompts(
    haystack: str,
    count: Callable[[str], int],
    context: int,
    *,
    lengths: Sequence[int] | None = None,
    depths: Sequence[float] = DEPTHS,
    trials: int = 2,
    distractors: int = 7,
    seed: int = 0,
) -> list[Prompt]:
    """All prompts of the grid, the same for the same arguments.

    haystack: running text, used from different places and repeated where it is too short. count: tokens of a text.
    context: tokens that a prompt with its answer may take. lengths: tokens of the prompts [default: shares of the
    context]. OptionError for lengths, depths or distractors that cannot be; InputError for a text that is too small.
    """
    most = context - _ROOM
    sizes = sorted(set(lengths or (max(LEAST, int(most * share)) for share in SHARES)))
    if not sizes or sizes[0] < LEAST or sizes[-1] > most:
        raise OptionError(
            f"needle: lengths {', '.join(map(str, sizes))} are not within {LEAST} and {most} tokens, the context of "
            f"{context} without room for an answer"
        )
    if not all(0 <= d <= 1 for d in depths) or not depths:
        raise OptionError("needle: depths are shares of the text, from 0 to 1")
    if not 1 <= distractors < len(KEYS):
        raise OptionError(f"needle: 1 to {len(KEYS) - 1} distractors are possible, not {distractors}")
    words = haystack.split()
    if len(words) < LEAST:
        raise InputError(
            f"needle: the text has {len(words)} words; at least {LEAST} are needed for a haystack"
        )
    rng = random.Random(seed)
    out = []
    for size in sizes:
        for depth in depths:
            for trial in range(trials):
                needle = NEEDLES[trial % len(NEEDLES)]
                keys = tuple(rng.sample(KEYS, distractors + 1))
                start = rng.randrange(len(words))
                text = _fill(words[start:] + words[:start], needle, keys[0], depth, size, count)
                out.append(Prompt(text, count(text), size, depth, trial, keys))
    return out


def _fill(
    words: Sequence[str], needle: str, key: str, depth: float, size: int, count: Callable[[str], int]
) -> str:
    """The longest prompt of at most `size` tokens: words, the needle after `depth` of them, words, the question."""

    def text(n: int) -> str:
        chosen = [words[i % len(words)] for i in range(n)]
        at = round(depth * n)
        parts = [
            " ".join(chosen[:at]),
            needle.format(key=key),
            " ".join(chosen[at:]),
            needle.split(" {key}")[0],
        ]
        return " ".join(filter(None, parts))

    low, high = 0, size  # a word is at least one token
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if count(text(middle)) <= size else (low, middle - 1)
    return text(low)


def read(
    scorer: Scorer, prompts: Sequence[Prompt], progress: Callable[[str], None] = lambda what: None
) -> list[Reading]:
    """One model's reading of every prompt."""
    out = []
    for n, prompt in enumerate(prompts):
        progress(f"needle {n + 1} of {len(prompts)}")
        scores = scorer.scores([scorer.request(prompt.text, f" {key}") for key in prompt.keys])
        rank = 1 + sum(s.logprob >= scores[0].logprob for s in scores[1:])
        written = scorer.generate(prompt.text, _ROOM - 1, [".", "\n"]).strip()
        out.append(Reading(rank, written.split()[:1] == [prompt.keys[0]], written))
    return out


def found(
    prompts: Sequence[Prompt], reference: Sequence[Reading], candidate: Sequence[Reading] | None = None
) -> Found:
    """Both models' readings side by side."""
    others: Sequence[Reading | None] = candidate if candidate is not None else [None] * len(prompts)
    grid = tuple(
        Cell(p.tokens, p.size, p.depth, p.trial, p.keys[0], r, c)
        for p, r, c in zip(prompts, reference, others, strict=True)
    )
    result = {"reference": _first(reference), "reference_exact": _share([r.exact for r in reference])}
    if candidate is not None:
        pairs = list(zip(reference, candidate, strict=True))
        result |= {
            "candidate": _first(candidate),
            "candidate_exact": _share([r.exact for r in candidate]),
            "agreement": _share([(a.rank == 1) == (b.rank == 1) for a, b in pairs]),
            "same_text": _share([a.written == b.written for a, b in pairs]),
        }
    return Found(grid, 1 / len(prompts[0].keys), **result)


def _first(readings: Sequence[Reading]) -> float:
    return _share([r.rank == 1 for r in readings])


def _share(hits: Sequence[bool]) -> float:
    return sum(hits) / len(hits)
