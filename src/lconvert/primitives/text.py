"""Calibration windows: the first tokens of a text, cut into pieces of one length.

A text is tokenised as one piece, without special tokens inside, and cut. Where the tokenizer begins every text with tokens of its own
(BOS), these stand in front of the text, and take the place of the first tokens of every later window: that is what llama-imatrix does
(tools/imatrix/imatrix.cpp, `compute_imatrix`), and what a model sees when it is used. Without them the first word of a window
takes BOS's part as the attention sink, with activations that no prompt has. (GPTQ's and llm-compressor's windows are bare cuts of a text.)

Only full windows are run, so that all have one shape; a text that is shorter than one makes one shorter window.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lconvert.errors import InputError, MissingPackageError, OptionError
from lconvert.ir import Model
from lconvert.primitives.job import Calibration, identity

#: Fewer tokens than this say nothing about any model.
SHORTEST = 64
#: Shares of tokens that stand for no piece of text from which on a text is not what the tokenizer was made for.
_UNKNOWN, _BYTES = 0.01, 0.1
#: Characters per token below which it is not either: of ASCII, and of scripts whose characters are words or syllables.
_ASCII, _OTHER = 1.3, 0.7
#: Share of runs of `_RUN` tokens that occurred before, above which a text repeats itself; prose has less than a hundredth of them.
_AGAIN, _RUN = 0.5, 16


@dataclass(frozen=True)
class Windows:
    """ids: windows of token ids, all of one length. notes: what the report should say about them. name: the file's, for messages."""

    ids: tuple[tuple[int, ...], ...]
    notes: tuple[str, ...] = ()
    name: str = "the text"

    @property
    def length(self) -> int:
        return len(self.ids[0])

    @property
    def tokens(self) -> int:
        return len(self.ids) * self.length

    def digest(self) -> str:
        return identity(self.ids)


def windows(model: Model, calibration: Calibration) -> Windows:
    """The windows of `calibration`; OptionError for a text that is too short, InputError for a file that is no text."""
    path, notes = Path(calibration.text), []
    tokenizer = _tokenizer(model)
    words = _text(path)
    size = calibration.context
    if size > model.decoder.context:
        size = model.decoder.context
        notes.append(
            f"calibration: windows of {size} tokens, all that the model's context allows, instead of {calibration.context}"
        )
    front = _front(model, tokenizer)
    ids = front + _encode(tokenizer, words, calibration.windows * size)
    count = min(calibration.windows, len(ids) // size)
    if count == 0 and len(ids) < min(SHORTEST, size):
        raise OptionError(
            f"{path}: the calibration text is too short: {len(ids)} tokens, and {min(SHORTEST, size)} are needed at least "
            f"({calibration.windows * size} for {calibration.windows} windows of {size}); give a longer text"
        )
    if count == 0:
        size = len(ids)
        notes.append(
            f"calibration: {path.name} has {size} tokens, which make one window shorter than {calibration.context}"
        )
    elif count < calibration.windows:
        notes.append(
            f"calibration: {path.name} has {len(ids)} tokens, which make {count} full windows of {size} instead of "
            f"{calibration.windows}"
        )
    found = [ids[i * size : (i + 1) * size] for i in range(max(1, count))]
    notes += _doubts(model, tokenizer, path.name, found)
    cut = len(front) if len(front) < size else 0
    return Windows(tuple(tuple(front[:cut] + w[cut:]) for w in found), tuple(notes), path.name)


def unsaid(notes: Iterable[str], model: Model) -> tuple[str, ...]:
    """Notes on a text that the model's report does not hold yet: a recipe may run one text several times."""
    return tuple(note for note in notes if note not in model.report)


def _tokenizer(model: Model) -> Any:
    if model.tokenizer is None:
        raise InputError(f"{model.source}: has no tokenizer, so no text can be used for calibration")
    try:
        from tokenizers import Tokenizer
    except ImportError:
        raise MissingPackageError("tokenizers is not installed: pip install 'lconvert[hf]'") from None
    made = Tokenizer.from_str(json.dumps(model.tokenizer.json))
    made.no_truncation()
    made.no_padding()
    return made


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as e:
        raise InputError(f"{path}: cannot be read as UTF-8 text ({e})") from None


def _front(model: Model, tokenizer: Any) -> list[int]:
    """The special tokens that begin every text: the post_processor's; without one tokenizer_config.json's flag counts."""
    assert model.tokenizer is not None
    if model.tokenizer.json.get("post_processor") is None:
        asked = model.tokenizer.config.get("add_bos_token") is True
        return list(model.tokenizer.special.get("bos", ())[:1]) if asked else []
    bare, framed = (list(tokenizer.encode("a", add_special_tokens=s).ids) for s in (False, True))
    for at in range(len(framed) - len(bare) + 1):
        if framed[at : at + len(bare)] == bare:
            return framed[:at]
    return []


def _encode(tokenizer: Any, words: str, wanted: int) -> list[int]:
    """At least the first `wanted` tokens, of a beginning of the text that is long enough for them."""
    size = 8 * wanted + 4096
    while True:
        ids: list[int] = tokenizer.encode(words[:size], add_special_tokens=False).ids
        if size >= len(words) or len(ids) >= wanted + SHORTEST:  # the last word may be cut
            return ids
        size *= 2


def _repeated(ids: list[int]) -> float:
    """The share of runs of `_RUN` tokens that are not the first of their kind."""
    runs = [tuple(ids[i : i + _RUN]) for i in range(len(ids) - _RUN + 1)]
    return 1 - len(set(runs)) / len(runs) if runs else 0.0


def _doubts(model: Model, tokenizer: Any, name: str, found: list[list[int]]) -> list[str]:
    """Whether the tokenizer was made for such a text: unknown tokens, bytes instead of pieces, tokens of a character; and whether it is a text at
    all, and not the same again and again."""
    assert model.tokenizer is not None
    ids = [i for w in found for i in w]
    unknown = set(model.tokenizer.special.get("unk", ()))
    lost = sum(i in unknown for i in ids) / len(ids)
    if lost > _UNKNOWN:
        return [
            f"calibration: {lost:.0%} of the tokens of {name} are unknown to the tokenizer; the text may be of another language"
        ]
    bytes_of = {f"<0x{i:02X}>" for i in range(256)}
    single = {i for text in bytes_of if (i := tokenizer.token_to_id(text)) is not None}
    spelled = sum(i in single for i in ids) / len(ids)
    if spelled > _BYTES:
        return [
            f"calibration: {spelled:.0%} of the tokens of {name} are single bytes; the text may be of another language"
        ]
    used = tokenizer.decode(ids, skip_special_tokens=True)
    per = len(used) / len(ids)
    if per < (_ASCII if used.isascii() else _OTHER):
        return [
            f"calibration: {name} has {per:.2f} characters per token; the tokenizer was not made for such a text"
        ]
    again = _repeated(ids)
    if again > _AGAIN:
        return [
            f"calibration: {again:.0%} of {name} repeats what stands before in it, which tells no more than once; give a longer text"
        ]
    return []
