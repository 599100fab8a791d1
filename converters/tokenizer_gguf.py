"""ir.Tokenizer -> the tokenizer.* keys of a GGUF file.

Keys, order and values are those of llama.cpp's own converter, except where that would make llama.cpp tokenize other
than the source's tokenizer.json (each such place says so in a note):

- an added token is control exactly if it is special; the converter also takes what looks special (`<|...|>`)
- scores of a SentencePiece vocabulary come from the merges, not from a placeholder
- add_bos_token and add_eos_token are written wherever llama.cpp would assume something else
- named chat templates are in the order of their names

Notes that begin with `tokens differ` are texts or settings for which llama.cpp's ids are not the source's.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from string import ascii_letters, digits
from typing import Any

import numpy as np

from lconvert.converters import (
    added_tokens,
    llamacpp_tokens,
    pretokenizers,
    tokenizer_pieces,
    tokenizer_vocab,
)
from lconvert.converters.llamacpp_tokens import KEYS, NameRule, general_name
from lconvert.converters.sentencepiece_model import (
    BYTE,
    CONTROL,
    NORMAL,
    SPACE,
    UNKNOWN,
    UNUSED,
    USER_DEFINED,
)
from lconvert.converters.token_limits import Limit, framing
from lconvert.converters.tokenizer_algorithm import Algorithm
from lconvert.converters.tokenizer_framing import (
    Framing,
    adds_separator,
    ids_by_text,
    kinds,
    read_framing,
)
from lconvert.converters.tokenizer_raise import from_gguf
from lconvert.errors import InputError
from lconvert.formats.gguf_values import Value, array, boolean, string, u32
from lconvert.ir import Tokenizer

#: Rendered and parsed always, because llama.cpp's chat parsers read them (conversion/gemma.py, Gemma4Model).
_VISIBLE: Mapping[str, frozenset[str]] = {
    "gemma4": frozenset({
        "<|channel>", "<channel|>", "<|tool_call>", "<tool_call|>", "<|tool_response>", "<tool_response|>", '<|"|>',
    }),
}  # fmt: skip


@dataclass(frozen=True)
class Lowered:
    """The keys, what there is to say about them, and what general.name must contain or avoid.

    limits: the texts for which llama.cpp's ids are known to differ; their sentences are among the notes.
    """

    keys: dict[str, Value]
    notes: tuple[str, ...]
    limits: tuple[Limit, ...]
    name_rule: NameRule
    framing: Framing


def to_gguf(
    tokenizer: Tokenizer, vocab_size: int, model_type: str
) -> tuple[dict[str, Value], tuple[str, ...]]:
    """The tokenizer.* keys for an embedding of `vocab_size` rows, and notes.

    InputError: more tokens than rows. UnsupportedError: llama.cpp has no such tokenizer; prints its structure.
    """
    lowered = lower(tokenizer, vocab_size, model_type)
    return lowered.keys, lowered.notes


def lower(tokenizer: Tokenizer, vocab_size: int, model_type: str) -> Lowered:
    """`to_gguf` with what the rest of the file must respect."""
    data = tokenizer.json
    algorithm = tokenizer_vocab.choose(data, model_type)
    added = {t["content"]: t for t in data.get("added_tokens") or []}
    texts, types, pads = _table(tokenizer, algorithm, vocab_size, model_type)
    notes = list(algorithm.notes)
    if pads:
        notes.append(
            f"{pads} embedding rows without a token are named [PAD<id>] and never produced by the tokenizer"
        )

    special = {r: ids[0] for r, ids in tokenizer.special.items() if ids and ids[0] < vocab_size}
    lost = sorted(r for r, ids in tokenizer.special.items() if ids and ids[0] >= vocab_size)
    notes += [
        f"the {r} token has id {tokenizer.special[r][0]}, beyond the {vocab_size} rows: left out"
        for r in lost
    ]
    frame, said = read_framing(tokenizer, notes)
    found = [*algorithm.limits, *said]
    if frame.bos and "bos" not in special and frame.prefix:
        special["bos"] = ids_by_text(tokenizer)[frame.prefix[0]]
    _end_tokens(tokenizer, frame, special, texts, notes)

    rule = llamacpp_tokens.name_rule(
        frozenset(t for t, token in added.items() if token.get("rstrip")),
        frozenset(texts),
        frozenset(t for t, k in zip(texts, types, strict=True) if k in (CONTROL, USER_DEFINED, UNKNOWN)),
    )
    found += added_tokens.limits(list(added.values()), rule, algorithm.normalizer)
    found += llamacpp_tokens.by_text(
        texts, types, {t: bool(token.get("special")) for t, token in added.items()}
    )
    notes += _looks_special(added)
    notes += _eog_notes(tokenizer, special, texts, algorithm.model)
    notes += _not_loaded(tokenizer, added)
    notes += _detokenizer_notes(tokenizer, algorithm)

    keys = {"tokenizer.ggml.model": string(algorithm.model)}
    if algorithm.pre:
        keys["tokenizer.ggml.pre"] = string(algorithm.pre)
    keys["tokenizer.ggml.tokens"] = array("str", texts)
    if algorithm.scores is not None:
        keys["tokenizer.ggml.scores"] = array("f32", _scores(tokenizer, algorithm.scores, texts, types))
    keys["tokenizer.ggml.token_type"] = array("i32", np.asarray(types, np.int32))
    if algorithm.remove_extra_whitespaces is not None:
        keys["tokenizer.ggml.remove_extra_whitespaces"] = boolean(algorithm.remove_extra_whitespaces)
    if algorithm.charsmap is not None:
        keys["tokenizer.ggml.precompiled_charsmap"] = array("u8", np.frombuffer(algorithm.charsmap, np.uint8))
    if algorithm.merges is not None:
        keys["tokenizer.ggml.merges"] = array("str", algorithm.merges)
    for role, name in KEYS.items():
        if role in special:
            keys[f"tokenizer.ggml.{name}"] = u32(special[role])
    keys |= _flags(tokenizer, algorithm, frame, special, notes)
    separator = adds_separator(tokenizer)
    if separator is not None:
        keys["tokenizer.ggml.add_sep_token"] = boolean(separator)
    if algorithm.model == "gemma4" and not frame.bos:
        found.append(
            Limit("llama.cpp adds bos to every text of a gemma4 tokenizer, the source does not", framing)
        )
    if algorithm.space_prefix is not None:
        keys["tokenizer.ggml.add_space_prefix"] = boolean(algorithm.space_prefix)
    keys |= _templates(tokenizer)
    found = list({limit.reason: limit for limit in found}.values())
    notes = [*map(str, found), *notes]
    return Lowered(keys, tuple(dict.fromkeys(notes)), tuple(found), rule, frame)


def limits(tokenizer: Tokenizer) -> tuple[Limit, ...]:
    """The limits of a tokenizer in llama.cpp, whatever model it is for."""
    vocab = ids_by_text(tokenizer)
    return lower(tokenizer, max(vocab.values(), default=0) + 1, "").limits


# --- the vocabulary --------------------------------------------------------------------------------------


def _table(
    tokenizer: Tokenizer, algorithm: Algorithm, rows: int, model_type: str
) -> tuple[list[str], list[int], int]:
    """Text and type of every row, and how many rows have no token."""
    data = tokenizer.json
    vocab = data["model"]["vocab"]
    if isinstance(vocab, list):
        vocab = {text: i for i, (text, _) in enumerate(vocab)}
    added = {t["id"]: t for t in data.get("added_tokens") or []}
    by_id = {i: text for text, i in vocab.items()} | {i: t["content"] for i, t in added.items()}
    if by_id and max(by_id) >= rows:
        over = sorted(i for i in by_id if i >= rows)
        raise InputError(
            f"tokenizer.json has {len(over)} tokens beyond the {rows} rows of the embedding, the first is "
            f"{by_id[over[0]]!r} with id {over[0]}; the tokenizer belongs to another model, or the embedding was not resized"
        )
    unknown = _unknown(tokenizer, algorithm)
    visible = _VISIBLE.get(model_type.removesuffix("_text"), frozenset())
    taken = set(by_id.values())
    texts: list[str] = []
    types: list[int] = []
    for i in range(rows):
        text = by_id.get(i)
        if text is None:
            texts.append(_pad(i, taken))
            types.append(UNUSED)
            continue
        if text == f"[PAD{i}]" and i not in added and algorithm.model == "t5":
            kind = UNUSED  # a unigram vocabulary is a list without holes
        else:
            kind = _type(text, added.get(i), vocab, algorithm, unknown)
        if kind == USER_DEFINED and added[i].get("normalized") and algorithm.normalizer:
            text = text.replace(SPACE, " ")  # matched in normalized text, which llama.cpp never sees
        texts.append(text)
        types.append(USER_DEFINED if text in visible else kind)
    if len(set(texts)) != len(texts):
        twice, _ = Counter(texts).most_common(1)[0]
        raise InputError(f"two tokens would have the text {twice!r}, which llama.cpp refuses")
    return texts, types, types.count(UNUSED)


def _pad(i: int, taken: set[str]) -> str:
    text = f"[PAD{i}]"
    while text in taken:
        text += "_"
    return text


def _unknown(tokenizer: Tokenizer, algorithm: Algorithm) -> str | None:
    """The text of the unknown token where llama.cpp's algorithm has one (its own type UNKNOWN)."""
    model = tokenizer.json["model"]
    if algorithm.model == "t5":
        return str(model["vocab"][model["unk_id"]][0])
    listed = tokenizer.config.get("added_tokens_decoder")
    return model.get("unk_token") if algorithm.model == "llama" and not listed else None


def _type(
    text: str,
    token: Mapping[str, Any] | None,
    vocab: Mapping[str, int],
    a: Algorithm,
    unknown: str | None,
) -> int:
    if text == unknown:
        return UNKNOWN
    if token is None:
        return BYTE if a.model != "gpt2" and tokenizer_pieces.is_byte(text) else _raw_byte(text, a)
    if token.get("special"):
        return CONTROL
    # An added token that holds the space character is matched in the raw text, where there is none: what makes it
    # out of spaces are the merges of the vocabulary.
    if SPACE in text and a.normalizer and not token.get("normalized") and text in vocab:
        return NORMAL
    return USER_DEFINED


def _raw_byte(text: str, a: Algorithm) -> int:
    return BYTE if a.pre == "sarvam-moe" and tokenizer_pieces.is_byte(text) else NORMAL


def _scores(tokenizer: Tokenizer, scores: Mapping[str, float], texts: list[str], types: list[int]) -> Any:
    """Scores by row: the algorithm's, -1000 for tokens that tokenizer_config.json adds, -10000 for rows without."""
    listed = tokenizer.config.get("added_tokens_decoder")
    config = {int(i) for i in listed if str(i).isdecimal()} if isinstance(listed, Mapping) else set()
    out = np.zeros(len(texts), np.float32)
    base = tokenizer.json["model"]["vocab"]
    for i, (text, kind) in enumerate(zip(texts, types, strict=True)):
        if kind == UNUSED:
            out[i] = -10000.0
        elif kind != NORMAL and (i in config or text not in scores) and isinstance(base, dict):
            out[i] = -1000.0
        elif kind in (CONTROL, UNKNOWN) and isinstance(base, dict) and i < len(base):
            out[i] = max(scores[text], -1000.0) if scores[text] == -1000.0 else 0.0
        else:
            out[i] = scores.get(text, -1000.0)
    return out


# --- special tokens --------------------------------------------------------------------------------------


def _end_tokens(
    tokenizer: Tokenizer, frame: Framing, special: dict[str, int], texts: list[str], notes: list[str]
) -> None:
    """Fills special's eos, eot and eom so that llama.cpp adds the right token and stops at all that end a text."""
    ends = [i for i in tokenizer.special.get("eos", ()) if i < len(texts)]
    for role in ("eot", "eom"):
        ends += [i for i in tokenizer.special.get(role, ()) if i < len(texts)]
    if len(frame.suffix) == 1 and (added := ids_by_text(tokenizer).get(frame.suffix[0])) is not None:
        if special.get("eos", added) != added:
            notes.append(
                f"eos is {frame.suffix[0]!r}, which the source adds after a text; its own eos "
                f"{texts[special['eos']]!r} still ends a text"
            )
        special["eos"] = added
    known = llamacpp_tokens.ends(frozenset(texts))
    left = [i for i in dict.fromkeys(ends) if texts[i] not in known and i != special.get("eos")]
    taken = {special[r] for r in ("eot", "eom") if r in special}
    left = [i for i in left if i not in taken]
    for role in ("eom", "eot"):
        named = llamacpp_tokens.END_OF_MESSAGE if role == "eom" else llamacpp_tokens.END_OF_TURN
        if left and role not in special and not any(t in named for t in texts):
            special[role] = left.pop(0)
    if left:
        notes.append(
            "llama.cpp does not stop at "
            + ", ".join(repr(texts[i]) for i in left)
            + ", which the source's configuration "
            "says end a text: it has no more keys for such tokens"
        )


def _flags(
    tokenizer: Tokenizer,
    a: Algorithm,
    frame: Framing,
    special: Mapping[str, int],
    notes: list[str],
) -> dict[str, Value]:
    """add_bos_token and add_eos_token: where the source says something, or llama.cpp would assume otherwise."""
    out: dict[str, Value] = {}
    processor = tokenizer.json.get("post_processor")
    byte_level = "ByteLevel" in kinds(processor)
    for role, on, default in (("bos", frame.bos, a.add_bos), ("eos", frame.eos, a.add_eos)):
        said = on or byte_level or isinstance(tokenizer.config.get(f"add_{role}_token"), bool)
        if on and role not in special and role not in llamacpp_tokens.DEFAULT_IDS[a.model]:
            raise InputError(
                f"the source adds a {role} token to every text, but no file says which token that is"
            )
        if said or on != default:
            out[f"tokenizer.ggml.add_{role}_token"] = boolean(on)
        if on != default and not said:
            notes.append(
                f"add_{role}_token={str(on).lower()} is written because llama.cpp would assume the opposite"
            )
    return out


# --- notes -----------------------------------------------------------------------------------------------


def _looks_special(added: Mapping[str, Mapping[str, Any]]) -> list[str]:
    marks = (("<|", "|>"), ("<｜", "｜>"), ("<unused", ">"))
    texts = [
        t
        for t, token in added.items()
        if not token.get("special") and any(t.startswith(a) and t.endswith(b) for a, b in marks)
    ]
    if not texts:
        return []
    return [
        (
            f"{len(texts)} added tokens that look special but are not, as {texts[0]!r}, are user-defined (llama.cpp's "
            "converter makes them control tokens): they are parsed and rendered always, as in the source"
        )
    ]


def _eog_notes(tokenizer: Tokenizer, special: Mapping[str, int], texts: list[str], model: str) -> list[str]:
    out = []
    wanted = set(tokenizer.special.get("eos", ()))
    ends = llamacpp_tokens.ends(frozenset(texts))
    also = [t for i, t in enumerate(texts) if t in ends and i not in wanted]
    if also:
        out.append(f"llama.cpp also stops at {', '.join(map(repr, also))}, because of the text")
    for role, i in llamacpp_tokens.DEFAULT_IDS[model].items():
        if role in ("bos", "eos") and role not in special and i < len(texts):
            out.append(f"the source has no {role} token; llama.cpp takes token {i}, {texts[i]!r}")
    return out


def _detokenizer_notes(tokenizer: Tokenizer, algorithm: Algorithm) -> list[str]:
    """What the pre-tokenizer's name says about turning ids into text again; ids do not depend on it."""
    row = pretokenizers.named(algorithm.pre) if algorithm.model == "gpt2" else None
    asked = tokenizer.config.get("clean_up_tokenization_spaces")
    if row is None or not isinstance(asked, bool) or asked == row.clean_spaces:
        return []
    does = "drops" if row.clean_spaces else "keeps"
    return [
        f"llama_detokenize {does} spaces before punctuation for {row.name!r}; the source does the opposite"
    ]


def _not_loaded(tokenizer: Tokenizer, added: Mapping[str, Any]) -> list[str]:
    """Added tokens of tokenizer_config.json that tokenizer.json, the reference, does not have."""
    listed = tokenizer.config.get("added_tokens_decoder")
    entries = listed.values() if isinstance(listed, Mapping) else ()
    texts = [e["content"] for e in entries if isinstance(e, Mapping) and isinstance(e.get("content"), str)]
    missing = [t for t in texts if t not in added]
    if not missing:
        return []
    return [
        f"tokenizer_config.json adds {missing[0]!r} and {len(missing) - 1} others that tokenizer.json does not have"
    ]


def _templates(tokenizer: Tokenizer) -> dict[str, Value]:
    """The chat templates; names keep letters and digits only, as llama.cpp's converter has them."""
    named: dict[str, str] = {}
    for name in sorted(tokenizer.extra_templates):
        plain = "".join(c if c in ascii_letters + digits else "_" for c in name)
        if plain in named:
            raise InputError(f"two chat templates would be named {plain!r} in the file")
        named[plain] = tokenizer.extra_templates[name]
    out = {f"tokenizer.chat_template.{name}": string(text) for name, text in named.items()}
    if named:
        out["tokenizer.chat_templates"] = array("str", list(named))
    if tokenizer.chat_template is not None:
        out["tokenizer.chat_template"] = string(tokenizer.chat_template)
    return out


__all__ = ["Framing", "Limit", "Lowered", "from_gguf", "general_name", "limits", "lower", "to_gguf"]
