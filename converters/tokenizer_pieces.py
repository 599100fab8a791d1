"""BPE on characters and unigram, SentencePiece's algorithms -> llama.cpp's `llama`, `t5`, or BPE on characters by rank."""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Mapping, Sequence
from typing import Any

from lconvert.converters import pretokenizers
from lconvert.converters.sentencepiece_model import SPACE
from lconvert.converters.token_limits import (
    Limit,
    Reaches,
    always,
    blank,
    characters,
    clusters,
    containing,
    either,
    leading_space,
    odd_spaces,
    table_changes,
    tabled,
)
from lconvert.converters.tokenizer_algorithm import (
    COLLAPSE,
    ESCAPE,
    PREPEND,
    TRIM,
    UNICODE_FORMS,
    Algorithm,
    merge_lines,
)
from lconvert.converters.tokenizer_hf import merge_pairs
from lconvert.errors import InputError

BYTE_TOKENS = tuple(f"<0x{b:02X}>" for b in range(256))
_BYTE_SET = frozenset(BYTE_TOKENS)


def is_byte(text: str) -> bool:
    return text in _BYTE_SET


# --- BPE on characters -----------------------------------------------------------------------------------

_FIRST = "the source puts a space before the text only, llama.cpp also before each text that follows a special token"
_ONCE = "the source puts no space before a text that begins with one, llama.cpp does"
_EDGES = "llama.cpp drops leading and trailing spaces, the source keeps one"
_TRIMS = "the source drops leading, trailing or repeated spaces, llama.cpp keeps them all"
_TABLE = "the source normalizes text by its own table, which llama.cpp does not"
_BLANK = "the source puts a space before a text of nothing but spaces, llama.cpp does not"
_CLUSTERS = "the source normalizes what is one character on the screen as a whole, llama.cpp piece by piece"


def _between(reason: str, test: Reaches, added: Sequence[str]) -> Limit:
    """A limit that also concerns the texts between added tokens."""
    return Limit(reason, either(test, containing(added)))


#: pre-tokenizers that only deal with the prefix: canonical steps -> (prefix, what llama.cpp does differently)
_PREFIXES: Mapping[tuple[str, ...], tuple[bool, tuple[str, ...]]] = {
    (): (False, ()),
    ("<Split(pattern={'String': ' '}, behavior='MergedWithPrevious', invert=False)>",): (False, ()),
    **{
        (pretokenizers.metaspace(scheme, split),): (scheme != "never", said)
        for split in (False, True)
        for scheme, said in (("always", (_ONCE,)), ("first", (_ONCE, _FIRST)), ("never", ()))
    },
}


def characters_bpe(
    model: Mapping[str, Any],
    steps: tuple[str, ...],
    normalizer: tuple[str, ...],
    added: Sequence[str],
    model_type: str,
    key: str,
) -> Algorithm:
    spaces = [n for n in normalizer if n in (PREPEND, ESCAPE)]
    other = [n for n in normalizer if n not in (PREPEND, ESCAPE)]
    prefix, said = _PREFIXES.get(steps, (False, None))
    metaspace = bool(steps) and steps[0].startswith("<Metaspace")
    known = spaces in ([PREPEND, ESCAPE], [ESCAPE]) if not metaspace else not spaces
    if said is None or not known or model.get("ignore_merges"):
        raise pretokenizers.unknown(key)
    prefix = prefix or PREPEND in spaces
    notes: list[str] = []
    limits = [_between(s, leading_space, added) for s in said]
    limits += [_foreign_normalizer(n, key, added) for n in other]
    if metaspace and "split=True" in steps[0]:
        limits += _inner_spaces(model["vocab"])
    missing = [t for t in BYTE_TOKENS if t not in model["vocab"]]
    if not model.get("byte_fallback") or missing:
        key += (
            f"\n  byte fallback: {'off' if not missing else f'{len(missing)} of 256 byte tokens are missing'}"
        )
        raise pretokenizers.unknown(key)
    merges, _ = merge_lines(model)
    if model_type in _CHARACTER_BPE and not prefix:
        name, pre = _CHARACTER_BPE[model_type]
        return _by_rank(name, pre, model, merges, notes, limits)
    scores, problem = piece_scores(model, added)
    if problem and not prefix:
        notes.append(f"BPE by rank instead of by score, because {problem}")
        return _by_rank("gpt2", "sarvam-moe", model, merges, notes, limits)
    if problem:
        limits.append(
            Limit(f"llama.cpp joins pieces by score, which cannot say the merges: {problem}", always)
        )
    return Algorithm(
        model="llama",
        pre="default",
        add_bos=True,
        add_eos=False,
        scores=scores,
        space_prefix=None if prefix else False,
        normalizer=", ".join(normalizer),
        notes=tuple(notes),
        limits=tuple(limits),
    )


#: Architectures for which llama.cpp has character BPE by rank: tokenizer.ggml.model and .pre.
_CHARACTER_BPE: Mapping[str, tuple[str, str]] = {
    "gemma4": ("gemma4", ""),
    "gemma4_text": ("gemma4", ""),
    "sarvam_moe": ("gpt2", "sarvam-moe"),
}


def _by_rank(
    name: str, pre: str, model: Mapping[str, Any], merges: list[str], notes: list[str], limits: list[Limit]
) -> Algorithm:
    mixed = [t for t in model["vocab"] if "\n" in t and t.strip("\n")]
    if mixed:
        limits.append(
            Limit(
                f"llama.cpp never joins a newline with anything else, as in the token {mixed[0]!r}",
                containing(["\n"]),
            )
        )
    return Algorithm(
        model=name,
        pre=pre,
        add_bos=name == "gemma4",
        add_eos=False,
        scores=dict.fromkeys(model["vocab"], -1000.0) if name == "gemma4" else None,
        merges=merges,
        space_prefix=False if name == "gemma4" else None,
        normalizer=ESCAPE,
        notes=tuple(notes),
        limits=tuple(limits),
    )


def _foreign_normalizer(step: str, key: str, added: Sequence[str]) -> Limit:
    """The limit for a normalizer that llama.cpp leaves out; UnsupportedError for one that changes ordinary text."""
    if step in UNICODE_FORMS:
        return UNICODE_FORMS[step]
    if step in COLLAPSE or step in TRIM:
        return _between(_TRIMS, odd_spaces, added)
    if step.startswith("Precompiled "):
        return Limit(_TABLE, either(table_changes, clusters))
    raise pretokenizers.unknown(key)


def _inner_spaces(vocab: Mapping[str, int]) -> list[Limit]:
    inner = [t for t in vocab if SPACE in t.lstrip(SPACE) and not t.endswith(SPACE)]
    if not inner:
        return []
    return [
        Limit(
            f"the source splits at spaces, llama.cpp does not and may use {inner[0]!r}",
            containing([" ", SPACE]),
        )
    ]


def piece_scores(model: Mapping[str, Any], added: Sequence[str]) -> tuple[dict[str, float], str]:
    """Scores by which joining pieces gives the merges' order, and why that is not quite so ("" if it is).

    Exact if each token's merges follow one another and are all the ways to put it together. The scores are
    SentencePiece's own where the ids tell them: minus the number of the piece, and -1e9 (here: and less) for those
    that are last in the order but not in the ids, which were put in later.
    """
    vocab: Mapping[str, int] = model["vocab"]
    order: dict[str, None] = {}
    pairs = set()
    current = None
    problem = ""
    for left, right in merge_pairs(model):
        text = left + right
        if text != current and text in order:
            problem = problem or f"the merges of {text!r} do not follow one another"
        order[text] = None
        current = text
        pairs.add((left, right))
    for text in vocab:
        for cut in range(1, len(text)):
            if text[:cut] in vocab and text[cut:] in vocab and (text[:cut], text[cut:]) not in pairs:
                problem = problem or f"{text[:cut]!r} and {text[cut:]!r} join to a token, but not by a merge"
    return _numbered(vocab, list(order), frozenset(added)), problem


def _numbered(vocab: Mapping[str, int], order: list[str], added: frozenset[str]) -> dict[str, float]:
    """Scores that fall along `order`: by id where the ids rise with it, up to a few late pieces at the end."""
    ids = [vocab[t] for t in order]
    rising = next((i for i in range(1, len(ids)) if ids[i] <= ids[i - 1]), len(ids))
    late = order[rising:]
    if order and len(late) <= _LATE:
        start = min((vocab[t] for t in order if t not in added), default=min(ids))
        scores = {t: float(min(0, start - i)) for t, i in vocab.items()}
        scores |= {t: -float(vocab[t] - start) for t in order}  # the first is -0.0, as in SentencePiece
        return scores | {t: -1e9 - 64.0 * k for k, t in enumerate(late)}  # 64 is the step of float32 there
    ranked = {t: -float(i) for i, t in enumerate(order)}
    return {t: ranked.get(t, -float(len(order)) if len(t) == 1 else 0.0) for t in vocab}


_LATE = 64


# --- unigram ---------------------------------------------------------------------------------------------


def unigram(
    model: Mapping[str, Any],
    steps: tuple[str, ...],
    normalizer: tuple[str, ...],
    added: Sequence[str],
    key: str,
) -> Algorithm:
    tables = [n for n in normalizer if n.startswith("Precompiled ")]
    spaces = [n for n in normalizer if n in (PREPEND, ESCAPE)]
    collapse = any(n in COLLAPSE for n in normalizer)
    trimmed = any(n in TRIM for n in normalizer)
    rest = [n for n in normalizer if n not in (*tables, *spaces, *COLLAPSE, *TRIM)]
    if steps[:1] == ("<WhitespaceSplit()>",):
        steps, collapse, trimmed = steps[1:], True, True
    prefix, said = _PREFIXES.get(steps, (False, None))
    metaspace = bool(steps) and steps[0].startswith("<Metaspace")
    known = spaces in ([PREPEND, ESCAPE], [ESCAPE]) if not metaspace else not spaces
    if said is None or not known or len(tables) > 1 or model.get("unk_id") is None:
        raise pretokenizers.unknown(key)
    prefix = prefix or PREPEND in spaces
    limits = [_foreign_normalizer(n, key, added) for n in rest]
    seen = tabled if tables else (lambda test: test)  # spaces count once the table has made them
    if collapse and not trimmed:
        limits.append(_between(_EDGES, seen(odd_spaces), added))
    elif collapse and not prefix:  # llama.cpp puts a space before every text whose spaces it collapses
        limits.append(_between(_TRIMS, seen(odd_spaces), added))
        collapse = False
    elif trimmed and not collapse:
        limits.append(_between(_TRIMS, seen(odd_spaces), added))
    if metaspace:
        reach = containing([SPACE]) if collapse else seen(leading_space)
        limits += [_between(s, reach, added) for s in said]
    if prefix and not collapse:
        limits.append(_between(_BLANK, seen(blank), added))
    if tables:
        limits.append(Limit(_CLUSTERS, clusters))
    scores = {text: float(score) for text, score in model["vocab"]}
    if metaspace and "split=True" in steps[0]:
        limits += _inner_spaces({text: i for i, text in enumerate(scores)})
    limits.append(
        Limit("of two equally good cuts of a repetition llama.cpp may take the other one", _repetition)
    )
    if model.get("byte_fallback"):
        limits.append(
            Limit(
                "a character without a token is bytes in the source, the unknown token in llama.cpp",
                characters(lambda c: c not in scores and c != " "),
            )
        )
        limits.append(
            Limit(
                "the source takes a text such as '<0x41>' for the byte token of that name",
                containing(["<0x"]),
            )
        )
    pieces = [t for t in added if t in scores]
    if pieces:
        limits.append(
            Limit(
                "the texts of added tokens are pieces for the source even where special tokens are not parsed",
                containing(pieces, special=False),
            )
        )
    return Algorithm(
        model="t5",
        pre="default",
        add_bos=False,
        add_eos=True,
        scores=scores,
        space_prefix=prefix,
        remove_extra_whitespaces=collapse,
        charsmap=_charsmap(tables[0].split(" ", 1)[1]) if tables else None,
        normalizer="the normalizer" if normalizer else "",
        limits=tuple(limits),
    )


def _repetition(text: str, special: bool) -> bool:
    return re.search(r"(\S{1,8}?)\1{5,}", text) is not None


def _charsmap(text: str) -> bytes:
    """A Precompiled normalizer's table. Its first word is the size of the trie that follows."""
    try:
        data = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as e:
        raise InputError(f"tokenizer.json: the precompiled_charsmap is no base64 ({e})") from None
    if len(data) < 4 or int.from_bytes(data[:4], "little") + 4 >= len(data):
        raise InputError("tokenizer.json: the precompiled_charsmap is cut short; download it again")
    return data
