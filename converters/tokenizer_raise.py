"""The tokenizer.* keys of a GGUF file -> ir.Tokenizer: a tokenizer.json that does what llama.cpp does with the file.

A GGUF file does not hold the source's tokenizer.json. The vocabulary, merges and special tokens are in it; the
pre-tokenizer is one of llama.cpp's names, for which pretokenizers.TABLE has the structure; flags of added tokens,
normalizers and the post-processor are lost. What was put in their place is listed in the notes.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from lconvert.converters import llamacpp_tokens, pretokenizers, sentencepiece_model
from lconvert.converters.llamacpp_tokens import KEYS
from lconvert.converters.sentencepiece_model import (
    CONTROL,
    NORMAL,
    SPACE,
    UNKNOWN,
    UNUSED,
    USER_DEFINED,
    Pieces,
    added_token,
)
from lconvert.converters.tokenizer_hf import check_json
from lconvert.errors import InputError, UnsupportedError
from lconvert.formats.files import show
from lconvert.formats.gguf_values import Value
from lconvert.ir import Tokenizer

_P = "tokenizer.ggml."
_READ = {
    _P + name
    for name in (
        "model", "pre", "tokens", "scores", "token_type", "merges", "add_bos_token", "add_eos_token", "add_sep_token",
        "add_space_prefix", "remove_extra_whitespaces", "precompiled_charsmap", *KEYS.values(),
    )
}  # fmt: skip
_PAD = re.compile(r"\[PAD(\d+)\]_*")
_CHARACTER_PRE = ("gemma4", "sarvam-moe", "granite-embed-multi-311m")


def from_gguf(keys: Mapping[str, Value]) -> tuple[Tokenizer | None, tuple[str, ...]]:
    """The tokenizer of a file's metadata (None if it has none) and what was reconstructed.

    InputError: keys that contradict each other. UnsupportedError: a tokenizer that tokenizer.json cannot say.
    """
    model = _get(keys, "model", "str", "")
    if model in ("", "no_vocab", "none"):
        return None, ("the file holds no tokenizer",)
    texts = _strings(keys, "tokens")
    if not texts:
        raise InputError("tokenizer.ggml.tokens: the vocabulary is missing or empty")
    types = _types(keys, texts)
    special = _special(keys, texts, model)
    notes: list[str] = []
    framing = _framing(keys, model, special, notes)
    if model == "gpt2" or model == "gemma4":
        data = _ranked(keys, model, texts, types, special, framing, notes)
    elif model in ("llama", "t5"):
        data = _pieces(keys, model, texts, types, special, framing)
    else:
        raise UnsupportedError(
            f"tokenizer.ggml.model is {show(model)}, which has no tokenizer.json; known are gpt2, llama, t5, gemma4"
        )
    if any(n in _get(keys, None, "str", "", "general.name").lower() for n in llamacpp_tokens.PHI3_NAMES):
        _strip_right(data, notes)
    check_json(data, "tokenizer.json rebuilt from GGUF")
    left = sorted(k for k in keys if k.startswith(_P) and k not in _READ)
    if left:
        notes.append("not carried over: " + ", ".join(left))
    notes.insert(
        0, "tokenizer.json is rebuilt: flags of added tokens, normalizer and post-processor are llama.cpp's"
    )
    template, extra = _templates(keys)
    config = _config(keys, data, texts, types, special)
    return Tokenizer(data, config, template, extra, {r: (i,) for r, i in special.items()}), tuple(notes)


# --- reading keys ----------------------------------------------------------------------------------------


def _get(keys: Mapping[str, Value], name: str | None, kind: str, default: Any, full: str = "") -> Any:
    key = full or _P + str(name)
    value = keys.get(key)
    if value is None:
        return default
    if value.kind != kind:
        raise InputError(f"{key} is of kind {value.kind}, not {kind}")
    return value.data


def _strings(keys: Mapping[str, Value], name: str) -> list[str]:
    value = keys.get(_P + name)
    if value is None:
        return []
    if value.kind != "array" or value.item != "str":
        raise InputError(f"{_P}{name} is no array of strings")
    data: Any = value.data
    return list(data)


def _numbers(keys: Mapping[str, Value], name: str, items: tuple[str, ...], least: int) -> list[Any] | None:
    value = keys.get(_P + name)
    if value is None:
        return None
    if value.kind != "array" or value.item not in items:
        raise InputError(f"{_P}{name} is no array of {' or '.join(items)}")
    data: list[Any] = np.asarray(value.data).tolist()
    if len(data) < least:
        raise InputError(f"{_P}{name} has {len(data)} items for {least} tokens")
    return data


def _types(keys: Mapping[str, Value], texts: Sequence[str]) -> list[int]:
    found = _numbers(keys, "token_type", ("i32",), len(texts))
    return [NORMAL] * len(texts) if found is None else found


def _special(keys: Mapping[str, Value], texts: Sequence[str], model: str) -> dict[str, int]:
    """Ids by role, llama.cpp's defaults included; an id beyond the vocabulary is llama.cpp's default as well."""
    out = {}
    for role, name in KEYS.items():
        default = llamacpp_tokens.DEFAULT_IDS.get(model, {}).get(role)
        found = _get(keys, name, "u32", default)
        if found is not None and found >= len(texts):
            found = default
        if found is not None and found < len(texts):
            out[role] = int(found)
    return out


def _framing(
    keys: Mapping[str, Value], model: str, special: Mapping[str, int], notes: list[str]
) -> dict[str, bool]:
    """Whether llama.cpp adds bos and eos, from the keys or from what the pre-tokenizer's name assumes."""
    row = pretokenizers.named(_get(keys, "pre", "str", "")) if model == "gpt2" else None
    assumed = {
        "bos": model == "llama" or (row is not None and row.add_bos),
        "eos": model == "t5",
    }
    out = {}
    for role, default in assumed.items():
        on = bool(_get(keys, f"add_{role}_token", "bool", default))
        if model == "gemma4" and role == "bos":
            on = True
        if on and role not in special:
            raise InputError(
                f"llama.cpp adds a {role} token to every text of this file, but no key says which token that is"
            )
        if on and _P + f"add_{role}_token" not in keys:
            notes.append(f"{role} is added to every text, because llama.cpp assumes it for this tokenizer")
        out[role] = on
    return out


def _templates(keys: Mapping[str, Value]) -> tuple[str | None, dict[str, str]]:
    start = "tokenizer.chat_template."
    named = {k[len(start) :]: _get(keys, None, "str", "", k) for k in keys if k.startswith(start)}
    return _get(keys, None, "str", None, "tokenizer.chat_template"), named


# --- building tokenizer.json -----------------------------------------------------------------------------


def _holes(texts: Sequence[str], types: Sequence[int]) -> set[int]:
    """Rows without a token: named [PAD<own id>], and not normal."""
    out = set()
    for i, (text, kind) in enumerate(zip(texts, types, strict=False)):
        found = _PAD.fullmatch(text) if kind != NORMAL and kind != CONTROL else None
        if found and int(found[1]) == i:
            out.add(i)
    return out


def _added(texts: Sequence[str], types: Sequence[int], holes: set[int]) -> list[dict[str, Any]]:
    kinds = {CONTROL: True, UNKNOWN: True, USER_DEFINED: False}
    return [
        added_token(i, text, kinds[kind])
        for i, (text, kind) in enumerate(zip(texts, types, strict=False))
        if kind in kinds and i not in holes
    ]


def _template(
    texts: Sequence[str], special: Mapping[str, int], framing: Mapping[str, bool]
) -> dict[str, Any] | None:
    bos, eos = ((special[r], texts[special[r]]) if framing[r] else None for r in ("bos", "eos"))
    return sentencepiece_model.template(bos, eos)


def _ranked(
    keys: Mapping[str, Value],
    model: str,
    texts: Sequence[str],
    types: Sequence[int],
    special: Mapping[str, int],
    framing: Mapping[str, bool],
    notes: list[str],
) -> dict[str, Any]:
    """BPE by rank: byte-level, or on characters for the names that llama.cpp treats so."""
    name = "gemma4" if model == "gemma4" else _get(keys, "pre", "str", "")
    characters = name in _CHARACTER_PRE
    row = None if characters else pretokenizers.named(name)
    if row is None and not characters:
        raise UnsupportedError(
            f"tokenizer.ggml.pre is {show(name)}; this pre-tokenizer has no tokenizer.json here"
        )
    if row is pretokenizers.DEFAULT:
        notes.append(
            "the file names no pre-tokenizer; llama.cpp's fallback was taken, which may not be the model's own"
        )
    if row is not None:
        notes += [
            f"llama.cpp is not quite the {row.name!r} written here: {limit.reason}" for limit in row.differs
        ]
    holes = _holes(texts, types)
    vocab = {text: i for i, text in enumerate(texts) if i not in holes}
    merges, dropped = _merges(keys, vocab)
    if dropped:
        notes.append(f"{dropped} merges of tokens that the vocabulary does not have were dropped")
    processor = _template(texts, special, framing)
    if processor is None and _P + "add_bos_token" in keys and not characters:
        processor = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": False, "use_regex": True}
    unk = special.get("unk")
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": _added(texts, types, holes),
        "normalizer": _ESCAPE if characters else None,
        "pre_tokenizer": _AT_SPACES if row is None else pretokenizers.to_json(row.steps),
        "post_processor": processor,
        "decoder": _CHARACTER_DECODER if characters else _BYTE_DECODER,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": texts[unk] if characters and unk is not None else None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": characters,
            "byte_fallback": characters,
            "ignore_merges": row is not None and row.ignore_merges,
            "vocab": vocab,
            "merges": merges,
        },
    }


_ESCAPE = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
_AT_SPACES = {"type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious", "invert": False}
_BYTE_DECODER = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}
_CHARACTER_DECODER = {
    "type": "Sequence",
    "decoders": [
        {"type": "Replace", "pattern": {"String": SPACE}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ],
}


def _merges(keys: Mapping[str, Value], vocab: Mapping[str, int]) -> tuple[list[list[str]], int]:
    """Merges as pairs, cut at the first space after their first character, as llama.cpp does."""
    out, dropped = [], 0
    for line in _strings(keys, "merges"):
        cut = line.find(" ", 1)
        left, right = line[:cut], line[cut + 1 :]
        if cut > 0 and left in vocab and right in vocab and left + right in vocab:
            out.append([left, right])
        else:
            dropped += 1
    return out, dropped


def _pieces(
    keys: Mapping[str, Value],
    model: str,
    texts: Sequence[str],
    types: Sequence[int],
    special: Mapping[str, int],
    framing: Mapping[str, bool],
) -> dict[str, Any]:
    """SentencePiece: BPE by score (`llama`) or unigram (`t5`)."""
    scores = _numbers(keys, "scores", ("f32", "i32"), len(texts)) or [0.0] * len(texts)
    charsmap = _numbers(keys, "precompiled_charsmap", ("u8", "i8"), 0)
    holes = _holes(texts, types)
    kept = [UNUSED if i in holes else kind for i, kind in enumerate(types[: len(texts)])]
    pieces = Pieces(
        algorithm="bpe" if model == "llama" else "unigram",
        texts=texts,
        scores=scores[: len(texts)],
        types=kept,
        add_dummy_prefix=bool(_get(keys, "add_space_prefix", "bool", model == "llama")),
        remove_extra_whitespaces=model == "t5"
        and bool(_get(keys, "remove_extra_whitespaces", "bool", False)),
        charsmap=bytes(b & 255 for b in charsmap) if charsmap and model == "t5" else b"",
        unk=special.get("unk", 0),
    )
    data = sentencepiece_model.tokenizer_json(pieces, False, False)
    data["post_processor"] = _template(texts, special, framing)
    if model == "llama":
        for i in holes:
            del data["model"]["vocab"][texts[i]]
    return data


def _strip_right(data: dict[str, Any], notes: list[str]) -> None:
    """In a model named phi-3 llama.cpp strips whitespace after special tokens."""
    for token in data["added_tokens"]:
        token["rstrip"] = token["content"] not in llamacpp_tokens.PHI3_PLAIN
    notes.append("special tokens strip the whitespace after them, because the model's name contains phi-3")


def _config(
    keys: Mapping[str, Value],
    data: Mapping[str, Any],
    texts: Sequence[str],
    types: Sequence[int],
    special: Mapping[str, int],
) -> dict[str, Any]:
    """A tokenizer_config.json: special tokens by text and the flags that the file states."""
    out: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast"}
    row = (
        pretokenizers.named(_get(keys, "pre", "str", ""))
        if _get(keys, "model", "str", "") == "gpt2"
        else None
    )
    out["clean_up_tokenization_spaces"] = row.clean_spaces if row else False
    for role in ("bos", "eos", "unk", "sep", "pad", "mask"):
        if role in special and _P + KEYS[role] in keys:
            out[f"{role}_token"] = texts[special[role]]
    for role in ("bos", "eos"):
        if _P + f"add_{role}_token" in keys:
            out[f"add_{role}_token"] = bool(keys[_P + f"add_{role}_token"].data)
    scores = _numbers(keys, "scores", ("f32", "i32"), len(texts)) or []
    listed = [t for t in data["added_tokens"] if scores and scores[t["id"]] == -1000.0]
    if listed and len(listed) < len(texts) and _get(keys, "model", "str", "") == "llama":
        out["added_tokens_decoder"] = {
            str(t["id"]): {k: v for k, v in t.items() if k != "id"} for t in listed
        }
    return out
