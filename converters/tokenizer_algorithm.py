"""What a GGUF file can say about an algorithm, and what the files that choose one share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lconvert.converters.sentencepiece_model import SPACE
from lconvert.converters.token_limits import Limit, not_in_form
from lconvert.converters.tokenizer_hf import merge_pairs
from lconvert.errors import UnsupportedError


@dataclass(frozen=True)
class Algorithm:
    """What the file must say for llama.cpp to tokenize like the source.

    model, pre: tokenizer.ggml.model and .pre ("" for none). scores: by text, None if the algorithm reads none.
    add_bos, add_eos: what llama.cpp assumes when the file does not say. space_prefix, remove_extra_whitespaces: keys
    to be written, None for not. normalizer: what the source does to texts, added tokens
    included, before it looks for normalized tokens ("" if nothing). limits: the texts that come out differently.
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


def merge_lines(model: Mapping[str, Any]) -> tuple[list[str], str]:
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


UNICODE_FORMS = {
    form: Limit(
        f"the source normalizes text to {form}, which llama.cpp does not; text in that form is equal",
        not_in_form(form),
    )
    for form in ("NFC", "NFD", "NFKC", "NFKD")
}
