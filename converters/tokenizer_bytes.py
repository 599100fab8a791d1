"""Byte-level BPE -> llama.cpp's `gpt2`: the pre-tokenizer's name, and what the name's flags change."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from lconvert.converters import pretokenizers
from lconvert.converters.token_limits import Limit, always, containing
from lconvert.converters.tokenizer_algorithm import UNICODE_FORMS, Algorithm, merge_lines
from lconvert.converters.tokenizer_hf import merge_pairs


def _alphabet() -> tuple[str, ...]:
    """The 256 characters that stand for bytes in a byte-level vocabulary (GPT-2's table)."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    moved = iter(range(0x100, 0x200))
    return tuple(chr(b if b in printable else next(moved)) for b in range(256))


ALPHABET = _alphabet()
#: What the pre-tokenizers with ignore_merges may leave in one piece.
_ONE_WORD = re.compile(r"[\W_]?[^\W\d_]+(?:'\w+)?|\d{1,3}|[\W_]+")
_NEVER = frozenset({0xC0, 0xC1, *range(0xF5, 0x100)})  # no byte of any UTF-8 text


def byte_level(
    model: Mapping[str, Any],
    steps: tuple[str, ...],
    normalizer: tuple[str, ...],
    special: Sequence[str],
    model_type: str,
    key: str,
) -> Algorithm:
    rows = pretokenizers.candidates(steps, normalizer, model_type)
    if not rows or any(n not in UNICODE_FORMS for n in normalizer):
        raise pretokenizers.unknown(key)
    notes: list[str] = []
    limits = [UNICODE_FORMS[n] for n in normalizer]
    wanted = bool(model.get("ignore_merges"))
    row = next((r for r in rows if r.ignore_merges == wanted), None)
    if row is None:
        stuck = unreachable(model, frozenset(special))
        row = rows[0]
        flag = f"ignore_merges={wanted} (llama.cpp's {row.name!r} sets {row.ignore_merges})"
        if stuck is not None:
            raise pretokenizers.unknown(f"{key}\n  {flag} matters: the merges do not build {stuck!r}")
        notes.append(f"{flag} makes no difference: the merges build every token")
    limits += row.differs
    limits += [limit for regex, limit in row.crossed if any(map(re.compile(regex).search, model["vocab"]))]
    words = [t for t in special if t not in model["vocab"] and _ONE_WORD.fullmatch(t)]
    if row.ignore_merges and words:
        limits.append(
            Limit(
                f"llama.cpp takes a word that is the text of a special token, as {words[0]!r}, for that token even where "
                "special tokens are not parsed",
                containing(words, special=False),
            )
        )
    missing = bytes(b for b, c in enumerate(ALPHABET) if c not in model["vocab"] and b not in _NEVER)
    if missing and (model.get("unk_token") or model.get("byte_fallback")):
        limits.append(
            Limit(
                f"{len(missing)} of the bytes of UTF-8 are no tokens; llama.cpp drops such bytes, the source writes "
                f"{model.get('unk_token')!r}",
                lambda text, special: any(b in missing for b in text.encode()),
            )
        )
    merges, twice = merge_lines(model)
    if twice:
        limits.append(
            Limit(
                f"the merge {twice!r} is there twice; llama.cpp takes the first, the source the last", always
            )
        )
    return Algorithm(
        model="gpt2",
        pre=row.name,
        add_bos=row.add_bos,
        add_eos=False,
        merges=merges,
        normalizer=", ".join(normalizer),
        notes=tuple(notes),
        limits=tuple(limits),
    )


def unreachable(model: Mapping[str, Any], added: frozenset[str]) -> str | None:
    """A token that is not added and that BPE does not build from its own characters, None if there is none.

    If there is none, ignore_merges changes nothing: a word that is a token is merged into that token anyhow.
    """
    ranks = {pair: i for i, pair in reversed(list(enumerate(merge_pairs(model))))}
    for text in model["vocab"]:
        parts = list(text) if text not in added else []
        while len(parts) > 1:
            best = min(range(len(parts) - 1), key=lambda i: ranks.get((parts[i], parts[i + 1]), len(ranks)))
            if (parts[best], parts[best + 1]) not in ranks:
                return str(text)
            parts[best : best + 2] = [parts[best] + parts[best + 1]]
    return None
