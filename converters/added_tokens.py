"""Added tokens of a tokenizer.json that llama.cpp would match elsewhere, found by their flags and texts.

`tokenizers` finds added tokens leftmost first, the longest of those that begin at one place, in two rounds: the ones
with normalized=false in the text itself, then the others in the normalized text. llama.cpp goes through all of them
from the longest to the shortest and cuts each out wherever it finds it (llama-vocab.cpp, tokenizer_st_partition). It
knows no flags, except that a model named phi-3 strips whitespace after special tokens.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from lconvert.converters.llamacpp_tokens import NameRule
from lconvert.converters.token_limits import Limit, Reaches, containing


def limits(added: Sequence[Mapping[str, Any]], rule: NameRule, normalizer: str) -> list[Limit]:
    """One per cause. normalizer: what it does to the text of an added token ("" if nothing)."""
    causes = (
        ("lstrip", "strip the whitespace before the token", [t for t in added if t.get("lstrip")]),
        (
            "rstrip",
            "strip the whitespace after the token",
            [t for t in added if t.get("rstrip")] if rule != "phi-3" else [],
        ),
        ("single_word", "match whole words only", [t for t in added if t.get("single_word")]),
    )
    out = [
        Limit(f"llama.cpp does not know the flag {flag} ({what}) of {_names(tokens)}", _with(tokens))
        for flag, what, tokens in causes
        if tokens
    ]
    changed = [t for t in added if t.get("normalized")] if normalizer else []
    if changed:
        out.append(
            Limit(
                f"the source looks for {_names(changed)} in normalized text ({normalizer}), llama.cpp in the text as it came",
                _with(changed),
            )
        )
    if pair := _overlap([t["content"] for t in added]):
        out.append(
            Limit(
                f"where added tokens overlap, as {pair[0]!r} and {pair[1]!r} can, llama.cpp takes the longer, the source "
                "the one that begins first",
                _overlapping([t["content"] for t in added]),
            )
        )
    if pair := _inner(added):
        out.append(
            Limit(
                f"the added token {pair[0]!r} is found inside {pair[1]!r} by the source, which looks for normalized "
                "tokens last; llama.cpp takes the longer",
                containing([pair[0]]),
            )
        )
    return out


def _with(tokens: Sequence[Mapping[str, Any]]) -> Reaches:
    return containing(t["content"] for t in tokens)


def _overlapping(texts: Sequence[str]) -> Reaches:
    """Texts in which two different added tokens share characters without one holding the other."""
    longest = "|".join(re.escape(t) for t in sorted(texts, key=len, reverse=True))
    found = re.compile(f"(?=({longest}))")

    def reaches(text: str, special: bool) -> bool:
        end, last = 0, ""
        for m in found.finditer(text):
            if m.start() < end < m.start() + len(m[1]) and m[1] != last:
                return True
            if m.start() + len(m[1]) > end:
                end, last = m.start() + len(m[1]), m[1]
        return False

    return reaches


def _overlap(texts: Sequence[str]) -> tuple[str, str] | None:
    """(a, b) where a text that ends a begins b, which is no shorter: then the order of the search matters.

    Runs of one character do not count: where the longer does not fit at one place, it does not fit later.
    """
    begins: dict[str, str] = {}
    for text in sorted(texts, key=len):
        if len(set(text)) > 1:
            begins |= {text[:cut]: text for cut in range(1, len(text))}
    for text in texts:
        for cut in range(1, len(text)):
            other = begins.get(text[cut:])
            if other is not None and other != text and len(other) >= len(text):
                return text, other
    return None


def _inner(added: Sequence[Mapping[str, Any]]) -> tuple[str, str] | None:
    plain = [t["content"] for t in added if not t.get("normalized")]
    late = [t["content"] for t in added if t.get("normalized")]
    return next(((p, n) for n in late for p in plain if p in n), None)


def _names(tokens: Sequence[Mapping[str, Any]]) -> str:
    texts = [repr(t["content"]) for t in tokens[:5]]
    more = f" and {len(tokens) - 5} more" if len(tokens) > 5 else ""
    return ("the added token " if len(tokens) == 1 else "the added tokens ") + ", ".join(texts) + more
