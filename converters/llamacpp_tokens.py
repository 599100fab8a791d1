"""What llama.cpp does to tokens because of their text, or of the model's name: no key of the file turns it off.

All from llama_vocab::impl::load in src/llama-vocab.cpp.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

from lconvert.converters.sentencepiece_model import CONTROL, USER_DEFINED
from lconvert.converters.token_limits import Limit, containing

#: Roles of special tokens that have a key of their own (tokenizer.ggml.<name>), in the order of the file.
KEYS: Mapping[str, str] = {
    "bos": "bos_token_id",
    "eos": "eos_token_id",
    "eot": "eot_token_id",
    "eom": "eom_token_id",
    "unk": "unknown_token_id",
    "sep": "seperator_token_id",  # sic
    "pad": "padding_token_id",
    "mask": "mask_token_id",
}

#: The first of these becomes the end-of-turn token unless the file names one.
END_OF_TURN = frozenset({
    "<|eot_id|>", "<|im_end|>", "<|end|>", "<end_of_turn>", "<|endoftext|>", "<|end_of_text|>", "<EOT>", "_<EOT>",
    "[EOT]", "<｜end▁of▁sentence｜>", "<end_of_utterance>",
})  # fmt: skip
END_OF_MESSAGE = frozenset({"<|eom_id|>"})
#: Generation ends at each of these.
END_OF_GENERATION = END_OF_TURN | END_OF_MESSAGE | frozenset({
    "<|return|>", "<|call|>", "<|flush|>", "<|calls|>", "</s>", "[EOS]", "<eos>", "<turn|>", "<|tool_response>",
    "[e~[",
})  # fmt: skip
#: Made control tokens whatever type the file gives them, like END_OF_GENERATION.
_FILL_IN_MIDDLE = frozenset({
    "<|fim_prefix|>", "<fim-prefix>", "<fim_prefix>", "<｜fim▁begin｜>", "<PRE>", "▁<PRE>", "<|code_prefix|>",
    "<|prefix|>", "<|fim_suffix|>", "<fim-suffix>", "<fim_suffix>", "<｜fim▁hole｜>", "<SUF>", "▁<SUF>",
    "<|code_suffix|>", "<|suffix|>", "<|fim_middle|>", "<fim-middle>", "<fim_middle>", "<｜fim▁end｜>", "<MID>",
    "▁<MID>", "<|code_middle|>", "<|middle|>", "<|fim_pad|>", "<fim-pad>", "<fim_pad>", "<PAD>", "[PAD]",
    "<|fim_repo|>", "<|repo_name|>", "<fim-repo>", "<REPO>", "<reponame>", "<|file_sep|>",
})  # fmt: skip
#: Made user-defined, so that they are always rendered and always parsed.
FORCED_USER_DEFINED = frozenset({"<|channel|>", "<|message|>", "<|start|>", "<|constrain|>"})

#: Without the key, these ids.
DEFAULT_IDS: Mapping[str, Mapping[str, int]] = {
    "llama": {"bos": 1, "eos": 2, "unk": 0},
    "gpt2": {"bos": 11, "eos": 11},
    "t5": {"eos": 1, "unk": 2, "pad": 0},
    "gemma4": {},
}

#: In a model of this name llama.cpp strips the whitespace after every special token but these three.
PHI3_NAMES = ("phi-3", "phi3")
PHI3_PLAIN = frozenset({"<unk>", "<s>", "<|endoftext|>"})
PHI3_NEEDS = ("</s>", "<unk>", "<s>", "<|endoftext|>")

NameRule = Literal["phi-3", "not phi-3"]


def ends(texts: frozenset[str]) -> frozenset[str]:
    """The texts of a vocabulary at which llama.cpp ends generation, with the exceptions that it makes."""
    found = END_OF_GENERATION & texts
    calls = {"<|call|>", "<|calls|>"} & texts
    if {"<|call|>", "<|return|>"} <= texts or (calls and "<|flush|>" in texts):
        found -= {"<|end|>"}
    if {"<|tool_response>", "<|plamo:eos|>"} & texts:
        found -= {"</s>"}
    return found


def by_text(texts: Sequence[str], types: Sequence[int], added: Mapping[str, bool]) -> list[Limit]:
    """What the forced types change. `added`: text -> special."""
    spelled, parsed, hidden, lost = [], [], [], []
    known = frozenset(texts)
    excepted = (END_OF_GENERATION & known) - ends(known)
    forced = ends(known) | _FILL_IN_MIDDLE
    for text, kind in zip(texts, types, strict=True):
        if text in forced and kind != CONTROL:
            if text not in added:
                spelled.append(text)
            elif kind == USER_DEFINED:
                hidden.append(text)
        elif added.get(text) and (text in FORCED_USER_DEFINED or text in excepted - {"</s>"}):
            parsed.append(text)
        elif text in added and text in excepted:
            lost.append(text)
    causes = (
        (
            spelled,
            True,
            (
                "llama.cpp makes control tokens of {} because of their text; with special tokens parsed each is one token, "
                "which the source spells out"
            ),
        ),
        (
            hidden,
            False,
            (
                "llama.cpp makes control tokens of {} because of their text; with special tokens not parsed it spells them "
                "out, the source, where they are not special, does not"
            ),
        ),
        (parsed, False, "llama.cpp parses {} always, because of their text; in the source they are special"),
        (lost, True, "llama.cpp never parses {} in a vocabulary like this one, the source does"),
    )
    return [Limit(why.format(_some(found)), containing(found, mode)) for found, mode, why in causes if found]


def name_rule(rstrip: frozenset[str], texts: frozenset[str], special: frozenset[str]) -> NameRule:
    """What general.name must contain, or must not.

    rstrip: the tokens that strip whitespace after them in the source; texts: the whole vocabulary; special: the
    tokens that are not normal, which in a model named phi-3 all do. That name is fatal where a token that llama.cpp
    then looks up does not exist.
    """
    loads = all(t in texts for t in PHI3_NEEDS)
    return "phi-3" if loads and rstrip == (special - PHI3_PLAIN) | {"</s>"} else "not phi-3"


def general_name(name: str, rule: NameRule) -> tuple[str, str]:
    """`name` made to follow the rule, and a note if it had to be changed (else "")."""
    said = any(n in name.lower() for n in PHI3_NAMES)
    if rule == "phi-3" and not said:
        new = f"{name} (phi-3)"
        why = "only then does llama.cpp strip the whitespace after special tokens, as this tokenizer does"
    elif rule == "not phi-3" and said:
        new = name
        for mark in PHI3_NAMES:
            at = new.lower().find(mark)
            while at >= 0:
                new = f"{new[: at + 3]} {new[at + len(mark) - 1 :]}"
                at = new.lower().find(mark)
        why = "in a model named phi-3 llama.cpp strips whitespace after special tokens, which this tokenizer does not"
    else:
        return name, ""
    return new, f"general.name is {new!r} instead of {name!r}: {why}"


def _some(texts: Sequence[str]) -> str:
    shown = ", ".join(map(repr, texts[:5]))
    return shown + (f" and {len(texts) - 5} more" if len(texts) > 5 else "")
