"""Are a runtime's token ids the source's? Ids against ids, with special tokens parsed and as plain text.

The reference is tokenizer.json through the `tokenizers` package. transformers may make something else of the same
folder (its classes rebuild parts of a tokenizer); `autotokenizer_differs` says so, but does not decide.

Texts that a known limit of llama.cpp reaches (converters.token_limits) are counted apart: equality is claimed, and
must hold, for all others.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from lconvert.converters import tokenizer_gguf
from lconvert.errors import UnsupportedError
from lconvert.ir import Tokenizer
from lconvert.validators import corpus as builtin
from lconvert.validators.runtimes.hf import encode

#: (text, special tokens are parsed) -> ids, without bos and eos.
Encode = Callable[[str, bool], Sequence[int]]
#: (text, special tokens are parsed) -> why the ids may differ, "" if they must not.
Excuse = Callable[[str, bool], str]

MODES: tuple[tuple[bool, str], ...] = (
    (False, "ids, special tokens as text"),
    (True, "ids, special tokens parsed"),
)


class Tokenize(Protocol):
    """A runtime's tokenizer: ids of `text`, without bos and eos."""

    def __call__(self, text: str, *, special: bool) -> Sequence[int]: ...


@dataclass(frozen=True)
class Difference:
    """One text whose ids differ, from position `at` on. excuse: the limit that reaches it, "" if none does."""

    text: str
    special: bool
    expected: tuple[int, ...]
    found: tuple[int, ...]
    at: int
    excuse: str = ""

    def __str__(self) -> str:
        shown = self.text if len(self.text) <= 60 else self.text[:57] + "..."
        mode = "parsed" if self.special else "as text"
        window = slice(max(0, self.at - 1), self.at + 4)
        return (
            f"{shown!r}, special tokens {mode}: from id {self.at} on expected {list(self.expected[window])}, found "
            f"{list(self.found[window])}"
        )


@dataclass(frozen=True)
class Count:
    """texts, and ids of the reference in them; different: texts that differ and must not; beyond: texts that a known
    limit reaches, beyond_different: those of them that do differ."""

    name: str
    texts: int = 0
    ids: int = 0
    different: int = 0
    beyond: int = 0
    beyond_different: int = 0


@dataclass(frozen=True)
class TokenReport:
    """One count per mode, the first few differences of each kind, and the limits that reach texts of the corpus."""

    counts: tuple[Count, ...]
    differences: tuple[Difference, ...]
    limits: tuple[str, ...] = ()

    @property
    def equal(self) -> bool:
        return not any(c.different for c in self.counts)

    def rows(self) -> list[tuple[str, int, int]]:
        """(name, texts for which equality is claimed, how many of them differ)."""
        return [(c.name, c.texts - c.beyond, c.different) for c in self.counts]

    def examples(self) -> list[str]:
        """Differences that must not be, then the limits with how many texts they reach."""
        out = [str(d) for d in self.differences if not d.excuse]
        beyond = sum(c.beyond for c in self.counts)
        if beyond:
            differ = sum(c.beyond_different for c in self.counts)
            out.append(
                f"{beyond} texts are beyond what llama.cpp can do, {differ} of them differ: {'; '.join(self.limits)}"
            )
        return out

    def to_json(self) -> dict[str, Any]:
        return {
            "equal": self.equal,
            "counts": [vars(c) for c in self.counts],
            "differences": [
                {**vars(d), "expected": list(d.expected), "found": list(d.found)} for d in self.differences
            ],
            "limits": list(self.limits),
        }

    def __str__(self) -> str:
        texts, ids = sum(c.texts for c in self.counts), sum(c.ids for c in self.counts)
        different = sum(c.different for c in self.counts)
        head = f"equal on {texts} texts ({ids} ids)" if self.equal else f"{different} of {texts} texts differ"
        return "\n  ".join([f"tokens: {head}", *self.examples()])


def compare(
    tokenizer: Tokenizer, reference: Any, tokenize: Tokenize, corpus: str = "", *, limited: bool = True
) -> TokenReport:
    """A runtime's `tokenize` against `reference`, a tokenizers.Tokenizer of `tokenizer`'s tokenizer.json.

    limited: the runtime is llama.cpp, whose known limits excuse differences.

    On the built-in texts, on texts made of the tokenizer's own added tokens, and on the paragraphs of `corpus`.
    """
    texts = [*builtin.texts(builtin.added_texts(tokenizer.json)), *_paragraphs(corpus)]
    excuse = excuses(tokenizer) if limited else no_excuse
    return compare_texts(
        lambda text, special: encode(reference, text, special=special),
        lambda text, special: tokenize(text, special=special),
        texts,
        excuse,
    )


def no_excuse(text: str, special: bool) -> str:
    """Of runtimes that run tokenizer.json itself."""
    return ""


def excuses(tokenizer: Tokenizer) -> Excuse:
    """Why llama.cpp's ids of a text may differ."""
    try:
        limits = tokenizer_gguf.limits(tokenizer)
    except UnsupportedError:  # llama.cpp was given some other tokenizer: then nothing excuses a difference
        return no_excuse
    return lambda text, special: next((x.reason for x in limits if x.reaches(text, special)), "")


def _paragraphs(text: str) -> Iterator[str]:
    """Stretches of about 2000 characters that end at the end of a line."""
    part = ""
    for line in text.splitlines(keepends=True):
        part += line
        if len(part) >= 2000:
            yield part
            part = ""
    if part:
        yield part


def compare_texts(
    expected: Encode,
    found: Encode,
    texts: Iterable[str],
    excuse: Excuse = no_excuse,
    keep: int = 10,
) -> TokenReport:
    """Both encoders on every text in both modes; keeps the first `keep` differences with and without excuse."""
    counts = {
        mode: dict.fromkeys(("texts", "ids", "different", "beyond", "beyond_different"), 0)
        for mode, _ in MODES
    }
    kept: dict[bool, list[Difference]] = {True: [], False: []}
    limits: dict[str, None] = {}
    for text in texts:
        for mode, _ in MODES:
            a, b = tuple(expected(text, mode)), tuple(found(text, mode))
            why = excuse(text, mode)
            count = counts[mode]
            count["texts"] += 1
            count["ids"] += len(a)
            if why:
                count["beyond"] += 1
                limits[why] = None
            if a == b:
                continue
            count["beyond_different" if why else "different"] += 1
            if len(kept[bool(why)]) < keep:
                kept[bool(why)].append(Difference(text, mode, a, b, first_difference(a, b), why))
    return TokenReport(
        counts=tuple(Count(name, **counts[mode]) for mode, name in MODES),
        differences=(*kept[False], *kept[True]),
        limits=tuple(limits),
    )


def first_difference(a: Sequence[Any], b: Sequence[Any]) -> int:
    """Where two sequences part; the length of the shorter one where it is the start of the other."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def autotokenizer_differs(folder: Path, texts: Iterable[str]) -> str | None:
    """What transformers' AutoTokenizer makes of the folder where it is not what tokenizer.json says, else None.

    Also None where there is no tokenizer.json or no transformers. Remote code is never run.
    """
    path = Path(folder) / "tokenizer.json"
    if not path.exists():
        return None
    try:
        from tokenizers import Tokenizer as Fast
        from transformers import AutoTokenizer
        from transformers.utils import logging
    except ImportError:
        return None
    logging.set_verbosity_error()  # it warns of texts longer than the model's context
    try:
        auto = AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
    except Exception as e:  # noqa: BLE001 - any class of transformers may raise anything
        return f"transformers cannot load the tokenizer of {folder}: {type(e).__name__}: {e}"
    own = Fast.from_file(str(path))
    own.no_truncation()
    own.no_padding()
    compared = list(texts)
    for framed in (False, True):
        for text in compared:
            a = own.encode(text, add_special_tokens=framed).ids
            b = list(auto(text, add_special_tokens=framed)["input_ids"])
            if a != b:
                at = first_difference(a, b)
                return (
                    f"transformers' {type(auto).__name__} gives other ids than tokenizer.json: {text[:60]!r} "
                    f"{'with' if framed else 'without'} bos and eos, from id {at} on {b[at : at + 5]} instead of "
                    f"{a[at : at + 5]}; tokenizer.json counts"
                )
    return None
