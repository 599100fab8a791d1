"""Do chats reach the model as they would from the source? Templates rendered on both sides, then the ids, then stops.

The reference is transformers' `apply_chat_template` of the source's folder. The artifact's template is what its runtime
finds in it (llama.cpp for GGUF), with the special tokens that the runtime knows; it is rendered by transformers'
renderer, which tells whether the template survived, and for GGUF by llama-cpp-python's own one, where a template may
also fail. llama.cpp's servers render Jinja in C++ code that no Python binding reaches: that is not proven here.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from string import ascii_letters, digits
from typing import Any

from lconvert.ir import Model, Tokenizer
from lconvert.validators.bounded import Bounded
from lconvert.validators.chat_sides import TRANSFORMERS, Side, folder_side, gguf_side, model_side
from lconvert.validators.conversations import conversations
from lconvert.validators.tokens import Excuse, excuses, first_difference, no_excuse

_KEPT = 10  # differences that a report shows
_FRAMED = ""  # what tokenizers add to any text is all that they make of none


@dataclass(frozen=True)
class Difference:
    """conversation: its name, the template's and the renderer's. expected and found: around the first difference."""

    conversation: str
    expected: str
    found: str

    def __str__(self) -> str:
        return f"{self.conversation}: {self.found!r}, expected {self.expected!r}"


@dataclass(frozen=True)
class Stop:
    """A special token or a set of them. extra: ids at which only the artifact's runtime stops."""

    name: str
    expected: tuple[int, ...]
    found: tuple[int, ...]
    equal: bool
    extra: tuple[int, ...] = ()


@dataclass(frozen=True)
class ChatReport:
    """conversations: renderings compared (templates x conversations x renderers); different: those that are not equal.

    refused: conversations that the template refuses on both sides alike. skipped: what was not compared, and why.
    """

    conversations: int
    different: int
    refused: int = 0
    differences: tuple[Difference, ...] = ()
    skipped: tuple[str, ...] = ()
    stops: tuple[Stop, ...] = ()
    notes: tuple[str, ...] = ()
    templates: tuple[str, ...] = ()

    @property
    def equal(self) -> bool:
        return not self.different and all(s.equal for s in self.stops)

    def rows(self) -> list[tuple[str, str, bool]]:
        """(name, value, passed) for each line of a proof."""
        out = []
        if self.conversations or self.different:
            value = f"{self.different} of {self.conversations} renderings differ"
            if self.refused:
                value += f", {self.refused} are refused by both"
            out.append(("chat template", value, not self.different))
        for s in self.stops:
            value = f"{list(s.found)}" if s.equal else f"{list(s.found)} instead of {list(s.expected)}"
            out.append((s.name, value, s.equal))
        return out

    def to_json(self) -> dict[str, Any]:
        return {
            "conversations": self.conversations,
            "different": self.different,
            "refused": self.refused,
            "templates": list(self.templates),
            "differences": [vars(d) for d in self.differences],
            "skipped": list(self.skipped),
            "stops": [
                {**vars(s), "expected": list(s.expected), "found": list(s.found), "extra": list(s.extra)}
                for s in self.stops
            ],
            "notes": list(self.notes),
        }


def compare(source: Model, artifact: Model) -> ChatReport:
    """Chats of the model `source` against those of `artifact`, both as read from their files.

    Raises MissingPackageError where transformers, or llama-cpp-python for a GGUF, is not installed.
    """
    if source.tokenizer is None:
        return ChatReport(0, 0, notes=("the source has no tokenizer",))
    if artifact.tokenizer is None:
        return ChatReport(1, 1, differences=(Difference("tokenizer", "a tokenizer", "none"),))
    reference = folder_side(source) if _is_folder(source) else model_side(source)
    gguf_file = Path(artifact.source).suffix == ".gguf"
    if gguf_file:
        candidate = gguf_side(Path(artifact.source))
    else:
        candidate = folder_side(artifact) if _is_folder(artifact) else model_side(artifact)
    excuse = excuses(source.tokenizer) if gguf_file else no_excuse
    try:
        return compare_sides(reference, candidate, excuse, _special_text(source.tokenizer))
    finally:
        candidate.close()


def _is_folder(model: Model) -> bool:
    return (Path(model.source) / "config.json").is_file()


def _special_text(tokenizer: Tokenizer) -> str:
    """A few of the tokenizer's own special tokens."""
    added = tokenizer.json.get("added_tokens") or []
    return "".join([str(t["content"]) for t in added if t.get("special")][:6])


# --- comparing -------------------------------------------------------------------------------------------


def compare_sides(
    reference: Side, candidate: Side, excuse: Excuse = no_excuse, special: str = ""
) -> ChatReport:
    """Every template that either side has, on every conversation, in every renderer of the candidate."""
    found: list[Difference] = []
    skipped: list[str] = []
    compared = refused = 0
    silent: list[str] = []
    named, stored = (
        {_plain(name): text for name, text in side.templates.items()} for side in (reference, candidate)
    )
    names = sorted({*named, *stored})
    talks = conversations(special)
    renderers = [next(iter(reference.renderers.values())), *candidate.renderers.values()]
    with Bounded(renderers, talks) as render:
        for name in names:
            a, b = named.get(name), stored.get(name)
            if a is None or b is None:
                compared += 1
                found.append(Difference(f"template {name}", _described(a), _described(b)))
                continue
            before = compared - refused
            for number, conversation in enumerate(talks):
                for which, renderer in enumerate(candidate.renderers, start=1):
                    if conversation.continues and renderer != TRANSFORMERS:
                        continue  # a service of transformers, not of the template
                    where = f"{conversation.name} ({name}, {renderer})"
                    compared += 1
                    wanted = render(0, a, reference.tokens, number)
                    seen = render(which, b, candidate.tokens, number)
                    if wanted.text is None and seen.text is None:
                        refused += 1
                        continue
                    if wanted.text != seen.text:  # the template may print the time, which has gone on
                        wanted = render(0, a, reference.tokens, number)
                        seen = render(which, b, candidate.tokens, number)
                    if wanted.text is None or wanted.text != seen.text:
                        found.append(Difference(where, *_around(str(wanted), str(seen))))
                        continue
                    ids = list(reference.encode(wanted.text)), list(candidate.encode(wanted.text))
                    if ids[0] == ids[1]:
                        continue
                    why = excuse(wanted.text, True)
                    if why:
                        skipped.append(f"ids of {where}: {why}")
                    else:
                        found.append(Difference(f"ids of {where}", *_around_ids(*ids)))
            if compared - refused == before:
                silent.append(f"the template {name} refuses every conversation")
    stops, notes = _stops(reference, candidate, excuse)
    notes += silent
    if not names:
        notes = [*notes, "neither side has a chat template"]
    return ChatReport(
        conversations=compared,
        different=len({d.conversation.removeprefix("ids of ") for d in found}),
        refused=refused,
        differences=tuple(found[:_KEPT]),
        skipped=tuple(dict.fromkeys(skipped)),
        stops=tuple(stops),
        notes=(*reference.notes, *candidate.notes, *notes),
        templates=tuple(names),
    )


def _plain(name: str) -> str:
    """A template's name as a GGUF key has it: letters and digits, the rest underscores."""
    return "".join(c if c in ascii_letters + digits else "_" for c in name)


def _described(template: str | None) -> str:
    return "no template" if template is None else f"a template of {len(template)} characters"


def _around(a: str, b: str) -> tuple[str, str]:
    """Both texts around the first difference."""
    at = first_difference(a, b)
    part = slice(max(0, at - 30), at + 50)
    return a[part], b[part]


def _around_ids(a: list[int], b: list[int]) -> tuple[str, str]:
    at = first_difference(a, b)
    part = slice(max(0, at - 2), at + 6)
    return f"from id {at} on: {a[part]}", f"from id {at} on: {b[part]}"


def _stops(a: Side, b: Side, excuse: Excuse) -> tuple[list[Stop], list[str]]:
    """bos and eos ids, what ends a text, and what the tokenizers put around one."""
    rows, notes = [], []
    if a.bos is not None:
        rows.append(Stop("bos", (a.bos,), _some(b.bos), a.bos == b.bos))
    if a.ends:
        # Of several, any may be the one that the file calls eos.
        expected = _some(a.eos) or tuple(sorted(a.ends))
        rows.append(Stop("eos", expected, _some(b.eos), b.eos in a.ends))
        extra = tuple(sorted(b.ends - a.ends))
        rows.append(
            Stop("ends of text", tuple(sorted(a.ends)), tuple(sorted(b.ends)), a.ends <= b.ends, extra)
        )
        if extra:
            notes.append(f"the artifact's runtime also stops at {list(extra)}")
    framed = tuple(a.framed(_FRAMED)), tuple(b.framed(_FRAMED))
    if framed[0] == framed[1] or not excuse(_FRAMED, True):
        rows.append(Stop("bos and eos around a text", *framed, framed[0] == framed[1]))
    return rows, notes


def _some(token: int | None) -> tuple[int, ...]:
    return () if token is None else (token,)
