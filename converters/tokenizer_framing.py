"""Which special tokens a tokenizer puts around every text: its post_processor, else tokenizer_config.json's flags."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lconvert.converters.token_limits import Limit, framing
from lconvert.errors import InputError
from lconvert.formats.files import show
from lconvert.ir import Tokenizer


@dataclass(frozen=True)
class Framing:
    """Whether the source puts bos before and eos after a text, and what it adds beyond that."""

    bos: bool
    eos: bool
    prefix: tuple[str, ...] = ()
    suffix: tuple[str, ...] = ()


def read_framing(tokenizer: Tokenizer, notes: list[str]) -> tuple[Framing, list[Limit]]:
    """What the post_processor adds; without one, tokenizer_config.json's flags count, as in llama.cpp's converter."""
    data, config = tokenizer.json, tokenizer.config
    prefix, suffix, found = _processor(data.get("post_processor"))
    if not found:
        asked = {r: config.get(f"add_{r}_token") is True for r in ("bos", "eos")}
        said = [
            Limit(
                f"tokenizer_config.json asks for {r}, so llama.cpp adds it; tokenizer.json alone does not",
                framing,
            )
            for r, on in asked.items()
            if on
        ]
        return Framing(asked["bos"], asked["eos"]), said
    ids = ids_by_text(tokenizer)
    names = {i: t for t, i in ids.items()}
    for text in (*prefix, *suffix):
        if text not in ids:
            raise InputError(f"tokenizer.json: the post_processor adds {show(text)}, which is no token")
    bos = names.get(tokenizer.special.get("bos", tokenizer.special.get("cls", (-1,)))[0])
    if bos is None and len(prefix) == 1:
        bos = prefix[0]  # no file names a bos token, so it is the one that begins every text
    said = []
    if prefix and prefix != (bos,):
        said.append(
            Limit(
                f"the source begins every text with {' '.join(prefix)}; llama.cpp can only begin it with the bos token "
                f"({bos})",
                framing,
            )
        )
    if len(suffix) > 1:
        said.append(
            Limit(
                f"the source ends every text with {' '.join(suffix)}; llama.cpp can only add one token",
                framing,
            )
        )
    for role, on in (("bos", bool(prefix)), ("eos", bool(suffix))):
        if config.get(f"add_{role}_token") is (not on):
            notes.append(
                f"tokenizer_config.json says add_{role}_token={not on}, tokenizer.json's post_processor the opposite, "
                "which counts"
            )
    return Framing(prefix == (bos,), len(suffix) == 1, prefix, suffix), said


def _processor(processor: Mapping[str, Any] | None) -> tuple[tuple[str, ...], tuple[str, ...], bool]:
    """The special tokens before and after a single text, and whether the post_processor decides it at all."""
    if processor is None:
        return (), (), False
    kind = processor.get("type")
    if kind == "Sequence":
        parts = [_processor(p) for p in processor.get("processors") or []]
        return (
            tuple(t for p in reversed(parts) for t in p[0]),
            tuple(t for p in parts for t in p[1]),
            any(p[2] for p in parts),
        )
    if kind == "TemplateProcessing":
        return _template(processor)
    if kind in ("RobertaProcessing", "BertProcessing"):
        cls, sep = (processor.get(n) or ("",) for n in ("cls", "sep"))
        return (str(cls[0]),), (str(sep[0]),), True
    return (), (), kind == "ByteLevel"


def _template(processor: Mapping[str, Any]) -> tuple[tuple[str, ...], tuple[str, ...], bool]:
    single = processor.get("single") or []
    marks = [p.get("SpecialToken", {}).get("id") if isinstance(p, Mapping) else None for p in single]
    if None not in marks:
        raise InputError("tokenizer.json: the post_processor's template `single` has no place for the text")
    place = marks.index(None)
    table = processor.get("special_tokens") or {}

    def expand(names: list[Any]) -> tuple[str, ...]:
        return tuple(str(t) for n in names for t in (table.get(n) or {}).get("tokens") or [n])

    return expand(marks[:place]), expand(marks[place + 1 :]), True


def adds_separator(tokenizer: Tokenizer) -> bool | None:
    """Whether two texts are joined by sep or eos, None if the post_processor says nothing of pairs.

    As llama.cpp's converter reads it: a separator counts only where no other token ends the pair.
    """
    found = None
    for part in _parts(tokenizer.json.get("post_processor")):
        if part["type"] == "RobertaProcessing":
            found = True
        if part["type"] != "TemplateProcessing":
            continue
        single, pair = _names(part.get("single")), _names(part.get("pair"))
        first, last = (single[i] if len(single) > 1 else None for i in (0, -1))
        start = 1 if first and pair[:1] == [first] else 0
        stop = len(pair) - (1 if last and pair[-1:] == [last] else 0)
        middle = pair[start + 1 : stop - 1]
        if not middle:
            continue
        names = {i: t for t, i in ids_by_text(tokenizer).items()}
        ends = {names.get(i) for role in ("sep", "eos") for i in tokenizer.special.get(role, ())[:1]}
        found = (middle[0] in ends and not last) or (len(middle) == 2 and middle[1] in ends)
    return found


def _parts(processor: Mapping[str, Any] | None) -> list[Mapping[str, Any]]:
    if processor is None:
        return []
    return [processor, *(p for part in processor.get("processors") or [] for p in _parts(part))]


def _names(marks: list[Mapping[str, Any]] | None) -> list[str | None]:
    """The special tokens of a template; None stands for a text."""
    return [m["SpecialToken"]["id"] if "SpecialToken" in m else None for m in marks or []]


def ids_by_text(tokenizer: Tokenizer) -> dict[str, int]:
    vocab = tokenizer.json["model"]["vocab"]
    pairs = vocab.items() if isinstance(vocab, Mapping) else ((text, i) for i, (text, _) in enumerate(vocab))
    return dict(pairs) | {t["content"]: t["id"] for t in tokenizer.json.get("added_tokens") or []}


def kinds(processor: Mapping[str, Any] | None) -> set[str]:
    """The types of the post_processor's parts."""
    return {part["type"] for part in _parts(processor)}
