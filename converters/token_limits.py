"""Where llama.cpp's token ids are known not to be the source's: a reason, and the texts that it can reach.

A limit is found in the structure of a tokenizer, not by trying texts. Its test errs on the side of reaching too many
texts: outside all limits the ids must be equal, and that is what a proof of equality is about.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import pairwise

#: (text, special tokens are parsed) -> may the ids differ?
Reaches = Callable[[str, bool], bool]


@dataclass(frozen=True)
class Limit:
    """`str()` is the sentence for plans and reports."""

    reason: str
    reaches: Reaches

    def __str__(self) -> str:
        return f"tokens differ: {self.reason}"


def always(text: str, special: bool) -> bool:
    return True


def framing(text: str, special: bool) -> bool:
    """For what concerns only the tokens put before and after a text: the ids of the text itself are equal."""
    return False


def characters(test: Callable[[str], bool]) -> Reaches:
    """Texts with a character that passes `test`."""
    return lambda text, special: any(map(test, text))


def containing(texts: Iterable[str], special: bool | None = None) -> Reaches:
    """Texts that contain one of `texts`; `special` restricts it to one way of parsing."""
    found = re.compile("|".join(map(re.escape, texts)) or r"(?!)")
    return lambda text, mode: (special is None or special == mode) and found.search(text) is not None


def either(*tests: Reaches) -> Reaches:
    return lambda text, special: any(t(text, special) for t in tests)


def not_in_form(form: str) -> Reaches:
    """Texts that a Unicode normalization form would change."""
    return lambda text, special: unicodedata.normalize(form, text) != text  # type: ignore[arg-type]


def table_changes(text: str, special: bool) -> bool:
    """Texts that SentencePiece's usual tables (NFKC, with other kinds of space and without controls) may change."""
    odd = ("Cc", "Cf", "Zs", "Zl", "Zp")
    return unicodedata.normalize("NFKC", text) != text or any(
        c == "▁" or (c != " " and unicodedata.category(c) in odd) for c in text
    )


def tabled(test: Reaches) -> Reaches:
    """`test` on what SentencePiece's usual tables make of a text: every kind of space a space, no controls."""

    def char(c: str) -> str:
        if c == "▁" or c.isspace() or unicodedata.category(c)[0] == "Z":
            return " "
        return "" if unicodedata.category(c) in ("Cc", "Cf") else c

    return lambda text, special: test(unicodedata.normalize("NFKC", "".join(map(char, text))), special)


def clusters(text: str, special: bool) -> bool:
    """Texts in which several code points may be one character: CR LF, marks, jamo, flags, joined emoji."""
    return "\r\n" in text or any(
        unicodedata.category(c) in ("Mn", "Mc", "Me", "Cf", "Sk")
        or "\u1100" <= c <= "\u11ff"
        or "\U0001f1e6" <= c <= "\U0001f1ff"
        for c in text
    )


def blank(text: str, special: bool) -> bool:
    """Texts of nothing but spaces."""
    return text != "" and not text.strip(" ")


def odd_spaces(text: str, special: bool) -> bool:
    return text != text.strip() or "  " in text


def leading_space(text: str, special: bool) -> bool:
    return text[:1] in (" ", "▁")


def wide_case(c: str) -> bool:
    """Capitals outside ASCII and combining marks."""
    return ord(c) > 127 and (unicodedata.category(c) in ("Lu", "Lt") or unicodedata.category(c)[0] == "M")


def inner_capital(text: str, special: bool) -> bool:
    """Texts with a capital after a letter or a combining mark."""
    return any(
        unicodedata.category(b) in ("Lu", "Lt") and unicodedata.category(a)[0] in "LM"
        for a, b in pairwise(text)
    )


def wide_digit(c: str) -> bool:
    return ord(c) > 127 and unicodedata.category(c)[0] == "N"


def wide_space(c: str) -> bool:
    return ord(c) > 127 and (c.isspace() or unicodedata.category(c)[0] == "Z")


def wide(c: str) -> bool:
    return ord(c) > 127


def digit(c: str) -> bool:
    return unicodedata.category(c)[0] == "N"
