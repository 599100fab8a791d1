"""A tokenizer.json's vocabulary and algorithm -> the one of llama.cpp's algorithms that does the same.

llama.cpp has four that matter here: byte-level BPE and BPE on characters (`gpt2`, by rank of the merge, after a
pre-tokenizer known by name), SentencePiece BPE (`llama`, by score of the joined piece, no pre-tokenizer) and unigram
(`t5`, Viterbi). Which one a tokenizer.json needs follows from its structure alone; nothing is guessed from names.
Where the algorithm is the right one but some texts come out differently, a limit says which.
"""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lconvert.errors import InputError, UnsupportedError

from . import pretokenizers
from .pretokenizers import BYTES
from .sentencepiece_model import SPACE
from .token_limits import (
    Limit,
    Reaches,
    always,
    blank,
    characters,
    clusters,
    containing,
    either,
    leading_space,
    not_in_form,
    odd_spaces,
    table_changes,
    tabled,
)
from .tokenizer_hf import merge_pairs

BYTE_TOKENS = tuple(f"<0x{b:02X}>" for b in range(256))


def _alphabet() -> tuple[str, ...]:
    """The 256 characters that stand for bytes in a byte-level vocabulary (GPT-2's table)."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    moved = iter(range(0x100, 0x200))
    return tuple(chr(b if b in printable else next(moved)) for b in range(256))


ALPHABET = _alphabet()
_NEVER = frozenset({0xC0, 0xC1, *range(0xF5, 0x100)})  # no byte of any UTF-8 text


@dataclass(frozen=True)
class Algorithm:
    """What the file must say for llama.cpp to tokenize like the source.

    model, pre: tokenizer.ggml.model and .pre ("" for none). scores: by text, None if the algorithm reads none.
    add_bos, add_eos: what llama.cpp assumes when the file does not say. space_prefix, remove_extra_whitespaces: keys
    to be written, None for not. spaces: added tokens hold spaces where the vocabulary has the replacement character.
    """

    model: str
    pre: str
    add_bos: bool
    add_eos: bool
    scores: Mapping[str, float] | None = None
    merges: Sequence[str] | None = None
    space_prefix: bool | None = None
    remove_extra_whitespaces: bool | None = None
    charsmap: bytes | None = None
    normalizer: str = ""
    notes: tuple[str, ...] = ()
    limits: tuple[Limit, ...] = ()


def choose(data: Mapping[str, Any], model_type: str) -> Algorithm:
    """The algorithm for a checked tokenizer.json. UnsupportedError prints the structure that has none."""
    model = data["model"]
    kind = model.get("type", "BPE")
    steps = pretokenizers.steps_of(data.get("pre_tokenizer"))
    normalizer = normalizers(data.get("normalizer"))
    added = [t["content"] for t in data.get("added_tokens") or []]
    key = pretokenizers.describe(
        steps, normalizer, bool(model.get("ignore_merges")), bool(model.get("byte_fallback")), kind
    )
    odd = [f for f in ("continuing_subword_prefix", "end_of_word_suffix", "dropout") if model.get(f)]
    if odd:
        key += "".join(f"\n  {f}: {model[f]!r}" for f in odd)
    elif kind == "Unigram":
        return _unigram(model, steps, normalizer, added, key)
    elif kind == "BPE" and BYTES in steps:
        return _byte_level(model, steps, normalizer, added, model_type, key)
    elif kind == "BPE":
        return _characters(model, steps, normalizer, added, model_type, key)
    raise pretokenizers.unknown(key)


# --- normalizers -----------------------------------------------------------------------------------------

PREPEND, ESCAPE = f"Prepend {SPACE}", f"Replace ' ' with {SPACE}"
COLLAPSE = ("Replace / {2,}/ with ' '", f"Replace / {{2,}}/ with {SPACE}", "Replace / +/ with ' '")
TRIM = ("Strip left and right", r"Replace /\A +| +\z/ with ''", "Strip right", "Strip left")


def normalizers(normalizer: Mapping[str, Any] | None) -> tuple[str, ...]:
    """A normalizer as a flat list of readable steps."""
    if normalizer is None:
        return ()
    kind = normalizer.get("type")
    if kind == "Sequence":
        return tuple(step for part in normalizer.get("normalizers") or () for step in normalizers(part))
    if kind == "Prepend":
        return (f"Prepend {normalizer.get('prepend')}",)
    if kind == "Strip":
        sides = [s for s in ("left", "right") if normalizer.get(f"strip_{s}")]
        return (f"Strip {' and '.join(sides)}",) if sides else ()
    if kind == "Replace":
        pattern = normalizer.get("pattern")
        pattern = pattern if isinstance(pattern, Mapping) else {}
        what = f"/{pattern['Regex']}/" if "Regex" in pattern else repr(pattern.get("String"))
        content = normalizer.get("content")
        return (f"Replace {what} with {content if content == SPACE else repr(content)}",)
    if kind == "Precompiled":
        return (f"Precompiled {normalizer.get('precompiled_charsmap')}",)
    flags = ", ".join(f"{k}={v!r}" for k, v in normalizer.items() if k != "type")
    return (f"{kind}({flags})" if flags else str(kind),)


_UNICODE_FORMS = {
    form: Limit(
        f"the source normalizes text to {form}, which llama.cpp does not; text in that form is equal", not_in_form(form)
    )
    for form in ("NFC", "NFD", "NFKC", "NFKD")
}


# --- byte-level BPE --------------------------------------------------------------------------------------


def _byte_level(
    model: Mapping[str, Any],
    steps: tuple[str, ...],
    normalizer: tuple[str, ...],
    added: Sequence[str],
    model_type: str,
    key: str,
) -> Algorithm:
    rows = pretokenizers.candidates(steps, normalizer, model_type)
    if not rows or any(n not in _UNICODE_FORMS for n in normalizer):
        raise pretokenizers.unknown(key)
    notes: list[str] = []
    limits = [_UNICODE_FORMS[n] for n in normalizer]
    wanted = bool(model.get("ignore_merges"))
    row = next((r for r in rows if r.ignore_merges == wanted), None)
    if row is None:
        stuck = unreachable(model, frozenset(added))
        row = rows[0]
        flag = f"ignore_merges={wanted} (llama.cpp's {row.name!r} sets {row.ignore_merges})"
        if stuck is not None:
            raise pretokenizers.unknown(f"{key}\n  {flag} matters: the merges do not build {stuck!r}")
        notes.append(f"{flag} makes no difference: the merges build every token")
    limits += row.differs
    limits += [limit for regex, limit in row.crossed if any(map(re.compile(regex).search, model["vocab"]))]
    missing = bytes(b for b, c in enumerate(ALPHABET) if c not in model["vocab"] and b not in _NEVER)
    if missing and (model.get("unk_token") or model.get("byte_fallback")):
        limits.append(
            Limit(
                f"{len(missing)} of the bytes of UTF-8 are no tokens; llama.cpp drops such bytes, the source writes "
                f"{model.get('unk_token')!r}",
                lambda text, special: any(b in missing for b in text.encode()),
            )
        )
    merges, twice = _merges(model)
    if twice:
        limits.append(Limit(f"the merge {twice!r} is there twice; llama.cpp takes the first, the source the last", always))
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


def _merges(model: Mapping[str, Any]) -> tuple[list[str], str]:
    """Merges as lines "left right", and one that occurs twice. The first space must be the one between them."""
    lines = []
    for left, right in merge_pairs(model):
        if " " in left[1:] or left[0] == " " or " " in right:
            raise UnsupportedError(
                f"tokenizer.json: the merge of {left!r} and {right!r} holds a space, which ends its first part in GGUF"
            )
        lines.append(f"{left} {right}")
    if len(set(lines)) == len(lines):
        return lines, ""
    seen: set[str] = set()
    return lines, next(line for line in lines if line in seen or seen.add(line))  # type: ignore[func-returns-value]


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


def _metaspace(scheme: str, split: bool) -> str:
    return f"<Metaspace(replacement={SPACE!r}, prepend_scheme={scheme!r}, split={split!r})>"


#: pre-tokenizers that only deal with the prefix: canonical steps -> (prefix, what llama.cpp does differently)
_PREFIXES: Mapping[tuple[str, ...], tuple[bool, tuple[str, ...]]] = {
    (): (False, ()),
    ("<Split(pattern={'String': ' '}, behavior='MergedWithPrevious', invert=False)>",): (False, ()),
    **{
        (_metaspace(scheme, split),): (scheme != "never", said)
        for split in (False, True)
        for scheme, said in (("always", (_ONCE,)), ("first", (_ONCE, _FIRST)), ("never", ()))
    },
}


def _characters(
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
        key += f"\n  byte fallback: {'off' if not missing else f'{len(missing)} of 256 byte tokens are missing'}"
        raise pretokenizers.unknown(key)
    merges, _ = _merges(model)
    if model_type in _CHARACTER_BPE and not prefix:
        name, pre = _CHARACTER_BPE[model_type]
        return _by_rank(name, pre, model, merges, notes, limits)
    scores, problem = piece_scores(model)
    if problem and not prefix:
        notes.append(f"BPE by rank instead of by score, because {problem}")
        return _by_rank("gpt2", "sarvam-moe", model, merges, notes, limits)
    if problem:
        limits.append(Limit(f"llama.cpp joins pieces by score, which cannot say the merges: {problem}", always))
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
                f"llama.cpp never joins a newline with anything else, as in the token {mixed[0]!r}", containing(["\n"])
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
    if step in _UNICODE_FORMS:
        return _UNICODE_FORMS[step]
    if step in COLLAPSE or step in TRIM:
        return _between(_TRIMS, odd_spaces, added)
    if step.startswith("Precompiled "):
        return Limit(_TABLE, either(table_changes, clusters))
    raise pretokenizers.unknown(key)


def _inner_spaces(vocab: Mapping[str, int]) -> list[Limit]:
    inner = [t for t in vocab if SPACE in t.lstrip(SPACE) and not t.endswith(SPACE)]
    if not inner:
        return []
    return [Limit(f"the source splits at spaces, llama.cpp does not and may use {inner[0]!r}", containing([" ", SPACE]))]


def piece_scores(model: Mapping[str, Any]) -> tuple[dict[str, float], str]:
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
    return _numbered(vocab, list(order)), problem


def _numbered(vocab: Mapping[str, int], order: list[str]) -> dict[str, float]:
    """Scores that fall along `order`: by id where the ids rise with it, up to a few late pieces at the end."""
    ids = [vocab[t] for t in order]
    rising = next((i for i in range(1, len(ids)) if ids[i] <= ids[i - 1]), len(ids))
    late = order[rising:]
    if order and len(late) <= _LATE:
        start = min(ids)
        scores = {t: float(min(0, start - i)) for t, i in vocab.items()}
        return scores | {t: -1e9 - 64.0 * k for k, t in enumerate(late)}  # 64 is the step of float32 there
    ranked = {t: -float(i) for i, t in enumerate(order)}
    return {t: ranked.get(t, -float(len(order)) if len(t) == 1 else 0.0) for t in vocab}


_LATE = 64


# --- unigram ---------------------------------------------------------------------------------------------


def _unigram(
    model: Mapping[str, Any], steps: tuple[str, ...], normalizer: tuple[str, ...], added: Sequence[str], key: str
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
    if model.get("byte_fallback"):
        limits.append(
            Limit(
                "a character without a token is bytes in the source, the unknown token in llama.cpp",
                characters(lambda c: c not in scores and c != " "),
            )
        )
        limits.append(
            Limit("the source takes a text such as '<0x41>' for the byte token of that name", containing(["<0x"]))
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


def _charsmap(text: str) -> bytes:
    """A Precompiled normalizer's table. Its first word is the size of the trie that follows."""
    try:
        data = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as e:
        raise InputError(f"tokenizer.json: the precompiled_charsmap is no base64 ({e})") from None
    if len(data) < 4 or int.from_bytes(data[:4], "little") + 4 >= len(data):
        raise InputError("tokenizer.json: the precompiled_charsmap is cut short; download it again")
    return data


def is_byte(text: str) -> bool:
    return text in _BYTE_SET


_BYTE_SET = frozenset(BYTE_TOKENS)
