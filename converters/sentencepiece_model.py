"""SentencePiece models as data: tokenizer.model -> pieces -> tokenizer.json.

The file is a protocol buffer (sentencepiece_model.proto). It is parsed here, field by field, because nothing else is
needed of it and because it comes from strangers. `tokenizer_json` says in the words of the `tokenizers` package what
SentencePiece would do with the pieces; a vocabulary read from GGUF takes the same way.
"""

from __future__ import annotations

import base64
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from lconvert.errors import InputError, UnsupportedError

SPACE = "▁"
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)  # the same numbers as in GGUF

_LIMIT = 256 << 20  # bytes of a tokenizer.model; the largest published ones take 5 MB


@dataclass(frozen=True)
class Pieces:
    """A vocabulary with scores. `types` are the constants above; `charsmap` is the compiled normalization table."""

    algorithm: Literal["bpe", "unigram"]
    texts: Sequence[str]
    scores: Sequence[float]
    types: Sequence[int]
    add_dummy_prefix: bool = True
    remove_extra_whitespaces: bool = False
    charsmap: bytes = b""
    unk: int = 0
    bos: int = -1
    eos: int = -1
    pad: int = -1


# --- the protocol buffer ---------------------------------------------------------------------------------


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
        shift += 7
        if shift > 63:
            raise ValueError("a number of more than 64 bits")


def _fields(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    """(field number, value) of a message: an int for varints, the bytes for everything else."""
    at = 0
    while at < len(data):
        tag, at = _varint(data, at)
        wire = tag & 7
        if wire == 0:
            number, at = _varint(data, at)
            yield tag >> 3, number
            continue
        if wire == 2:
            size, at = _varint(data, at)
        elif wire in (1, 5):
            size = 8 if wire == 1 else 4
        else:
            raise ValueError(f"wire type {wire}")
        if size > len(data) - at:
            raise ValueError(f"a field of {size} bytes where {len(data) - at} are left")
        yield tag >> 3, data[at : at + size]
        at += size


def _signed(value: int | bytes) -> int:
    """An int32 field: negative numbers are stored as 64 bits."""
    if not isinstance(value, int):
        raise TypeError("bytes where a number belongs")
    return value - (1 << 64) if value >> 63 else value


def _bytes(value: int | bytes) -> bytes:
    if not isinstance(value, bytes):
        raise TypeError("a number where bytes belong")
    return value


def _piece(data: bytes) -> tuple[str, float, int]:
    text, score, kind = "", 0.0, NORMAL
    for number, value in _fields(data):
        if number == 1:
            text = _bytes(value).decode()
        elif number == 2:
            score = struct.unpack("<f", _bytes(value))[0]
        elif number == 3:
            kind = _signed(value)
    return text, score, kind


_ALGORITHMS: Mapping[int, Literal["bpe", "unigram"]] = {1: "unigram", 2: "bpe"}


def parse(data: bytes, origin: str) -> Pieces:
    """The pieces of a tokenizer.model. InputError if it is none, UnsupportedError for word and character models."""
    pieces: list[tuple[str, float, int]] = []
    trainer: dict[int, int | bytes] = {}
    normalizer: dict[int, int | bytes] = {}
    try:
        for number, value in _fields(data):
            if number == 1:
                pieces.append(_piece(_bytes(value)))
            elif number == 2:
                trainer = dict(_fields(_bytes(value)))
            elif number == 3:
                normalizer = dict(_fields(_bytes(value)))
        kind = _signed(trainer.get(3, 1))
        ids = {name: _signed(trainer.get(field, default)) for name, field, default in _IDS}
        found = Pieces(
            algorithm=_ALGORITHMS.get(kind, "bpe"),
            texts=[p[0] for p in pieces],
            scores=[p[1] for p in pieces],
            types=[p[2] for p in pieces],
            add_dummy_prefix=bool(normalizer.get(3, 1)),
            remove_extra_whitespaces=bool(normalizer.get(4, 1)),
            charsmap=_bytes(normalizer.get(2, b"")),
            **ids,
        )
    except (TypeError, ValueError, IndexError, struct.error) as e:
        raise InputError(f"{origin}: no SentencePiece model ({e}); download it again") from None
    if not pieces:
        raise InputError(f"{origin}: no SentencePiece model (it holds no pieces); download it again")
    if kind not in _ALGORITHMS:
        raise UnsupportedError(
            f"{origin}: a SentencePiece model of type {kind}; only unigram (1) and BPE (2) are known"
        )
    return found


_IDS = (("unk", 40, 0), ("bos", 41, 1), ("eos", 42, 2), ("pad", 43, (1 << 64) - 1))


def read(path: Path) -> Pieces:
    """`parse` of a file."""
    try:
        if path.stat().st_size > _LIMIT:
            raise InputError(f"{path}: {path.stat().st_size} bytes are too many for a tokenizer.model")
        return parse(path.read_bytes(), str(path))
    except OSError as e:
        raise InputError(f"{path}: cannot be read: {e.strerror or e}") from None


# --- as tokenizer.json -----------------------------------------------------------------------------------


def merges(vocab: Mapping[str, int], scores: Sequence[float]) -> list[list[str]]:
    """The merges that join pieces in the order of their scores, as SentencePiece and llama.cpp do.

    Every way to put a piece together out of two others is one merge; the best piece comes first, among the ways to
    make one piece those of lower ids. (llama.cpp: llm_tokenizer_spm_session::try_add_bigram)
    """
    found = []
    for text, i in vocab.items():
        for cut in range(1, len(text)):
            left, right = vocab.get(text[:cut]), vocab.get(text[cut:])
            if left is not None and right is not None:
                found.append((-scores[i], i, left, right, cut, text))
    found.sort()
    return [[text[:cut], text[cut:]] for _, _, _, _, cut, text in found]


def _replace(pattern: str, content: str, kind: str = "String") -> dict[str, Any]:
    return {"type": "Replace", "pattern": {kind: pattern}, "content": content}


def collapse_spaces() -> list[dict[str, Any]]:
    """The normalizers that say remove_extra_whitespaces."""
    return [_replace(r"\A +| +\z", "", "Regex"), _replace(" {2,}", " ", "Regex")]


def _normalizers(p: Pieces) -> list[dict[str, Any]]:
    out: list[dict[str, Any]] = []
    if p.charsmap:
        out.append({"type": "Precompiled", "precompiled_charsmap": base64.b64encode(p.charsmap).decode()})
    if p.remove_extra_whitespaces:
        out += collapse_spaces()
    if p.add_dummy_prefix:
        out.append({"type": "Prepend", "prepend": SPACE})
    return [*out, _replace(" ", SPACE)]


def _decoder(p: Pieces) -> dict[str, Any]:
    decoders: list[dict[str, Any]] = [_replace(SPACE, " "), {"type": "ByteFallback"}, {"type": "Fuse"}]
    if p.add_dummy_prefix:
        decoders.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    return {"type": "Sequence", "decoders": decoders}


def _model(p: Pieces, vocab: Mapping[str, int]) -> dict[str, Any]:
    fallback = BYTE in p.types
    if p.algorithm == "unigram":
        entries = [[t, s] for t, s in zip(p.texts, p.scores, strict=True)]
        return {"type": "Unigram", "unk_id": p.unk, "vocab": entries, "byte_fallback": fallback}
    return {
        "type": "BPE",
        "dropout": None,
        "unk_token": p.texts[p.unk] if 0 <= p.unk < len(p.texts) else None,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": True,
        "byte_fallback": fallback,
        "ignore_merges": False,
        "vocab": dict(vocab),
        "merges": merges(vocab, p.scores),
    }


def added_token(i: int, text: str, special: bool, normalized: bool = False) -> dict[str, Any]:
    """An entry of tokenizer.json's added_tokens."""
    flags = {"single_word": False, "lstrip": False, "rstrip": False}
    return {"id": i, "content": text, **flags, "normalized": normalized, "special": special}


def template(bos: tuple[int, str] | None, eos: tuple[int, str] | None) -> dict[str, Any] | None:
    """A post_processor that puts `bos` before and `eos` after, each (id, text)."""
    if bos is None and eos is None:
        return None

    def mark(t: tuple[int, str] | None, kind: int) -> list[dict[str, Any]]:
        return [{"SpecialToken": {"id": t[1], "type_id": kind}}] if t else []

    a, b = (
        [*mark(bos, k), {"Sequence": {"id": name, "type_id": k}}, *mark(eos, k)]
        for k, name in enumerate("AB")
    )
    special = {t[1]: {"id": t[1], "ids": [t[0]], "tokens": [t[1]]} for t in (bos, eos) if t}
    return {"type": "TemplateProcessing", "single": a, "pair": a + b, "special_tokens": special}


def tokenizer_json(p: Pieces, add_bos: bool, add_eos: bool) -> dict[str, Any]:
    """What SentencePiece does with these pieces, as a tokenizer.json.

    User-defined pieces that hold spaces become added tokens only where nothing is put before the text: `tokenizers`
    matches them on normalized text, where the prefix would become part of them. Elsewhere their merges, which have
    the highest scores, build them all the same.
    """
    vocab = {text: i for i, text in enumerate(p.texts)}
    if len(vocab) != len(p.texts):
        twice = next(t for i, t in enumerate(p.texts) if vocab[t] != i)
        raise InputError(f"the SentencePiece vocabulary has the piece {twice!r} twice")
    added = []
    for i, (text, kind) in enumerate(zip(p.texts, p.types, strict=True)):
        if kind in (UNKNOWN, CONTROL):
            added.append(added_token(i, text, True))
        elif kind == USER_DEFINED and SPACE not in text:
            added.append(added_token(i, text, False))
        elif kind == USER_DEFINED and not p.add_dummy_prefix:
            added.append(added_token(i, text, False, normalized=True))
    normalizers = _normalizers(p)
    many = {"type": "Sequence", "normalizers": normalizers}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": normalizers[0] if len(normalizers) == 1 else many,
        "pre_tokenizer": None,
        "post_processor": template(_mark(p, p.bos, add_bos), _mark(p, p.eos, add_eos)),
        "decoder": _decoder(p),
        "model": _model(p, vocab),
    }


def _mark(p: Pieces, i: int, wanted: bool) -> tuple[int, str] | None:
    return (i, p.texts[i]) if wanted and 0 <= i < len(p.texts) else None
