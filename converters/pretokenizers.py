"""What the pre-tokenizer names of llama.cpp mean: structure of a tokenizer.json <-> `tokenizer.ggml.pre`.

llama.cpp cannot be told a regex. It knows names, and each name hard-wires a chain of regexes and some flags
(src/llama-vocab.cpp: llm_tokenizer_bpe for the regexes, llama_vocab::impl::load for the flags). This table says for
each name which tokenizer.json it stands for, as canonical steps:

    a regex       Split on it, Isolated
    BYTES         ByteLevel without its own regex and without a prefix space (with its regex: GPT2, BYTES)

`steps_of` brings a pre_tokenizer into that form. Spellings that match the same strings become one: Digits and
Punctuation become their regexes, a Split that removes what it does not match is Isolated when the regex covers every
text, possessive quantifiers and written-out case variants become the plain form.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lconvert.converters.token_limits import (
    Limit,
    characters,
    digit,
    inner_capital,
    wide,
    wide_case,
    wide_digit,
    wide_space,
)
from lconvert.errors import UnsupportedError
from lconvert.formats.files import show

BYTES = "<bytes>"

# The building blocks. Named after the first model that used them.
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORD = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_SYMBOLS = r" ?[^\s\p{L}\p{N}]+[\r\n]*"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"

DIGIT, DIGITS = r"\p{N}", r"\p{N}+"
PUNCTUATION = r"[\p{P}!-/:-@\[-`{-~]"
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LLAMA3 = rf"{_CONTRACTIONS}|{_WORD}|\p{{N}}{{1,3}}|{_SYMBOLS}|{_SPACES}"
QWEN2 = rf"{_CONTRACTIONS}|{_WORD}|\p{{N}}|{_SYMBOLS}|{_SPACES}"
QWEN35 = rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+|\p{{N}}| ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*|{_SPACES}"
_CASED = rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+%s|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*%s"
TEKKEN = _CASED % ("", "") + rf"|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_SPACES}"
_O200K_TAIL = rf"| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_SPACES}"
O200K = _CASED % (f"{_CONTRACTIONS}?", f"{_CONTRACTIONS}?") + r"|\p{N}{1,3}" + _O200K_TAIL
YOUTU = _CASED % (f"{_CONTRACTIONS}?", f"{_CONTRACTIONS}?") + r"|\p{N}" + _O200K_TAIL
_CJK = "[一-龥\u3040-ゟ゠-ヿ]+"
_ASCII_WORD = r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"""
DEEPSEEK3 = rf"{_ASCII_WORD}| ?[\p{{P}}\p{{S}}]+[\r\n]*|{_SPACES}"
SPARK = rf"{_ASCII_WORD}| ?[\p{{P}}\p{{S}}]+|[\r\n]|\s+(?!\S)|\s+"
# The Latin, Greek, Cyrillic, Armenian, Georgian, Cherokee ... letters with case, as DeepSeek LLM lists them.
_DEEPSEEK_LETTERS = (
    "A-Za-zµÀ-ÖØ-öø-ƺƼ-ƿǄ-ʓʕ-ʯͰ-ͳͶͷͻ-ͽͿΆΈ-ΊΌΎ-ΡΣ-ϵϷ-ҁҊ-ԯԱ-ՖႠ-ჅᎠ-Ᏽᏸ-ᏽᲐ-ᲺᲽ-Ჿᴀ-ᴫᵫ-ᵷᵹ-ᶚḀ-ἕἘ-Ἕἠ-ὅὈ-Ὅὐ-ὗὙὛὝ"
    "Ὗ-\u1f7dᾀ-ᾴᾶ-ᾼ\u1fbeῂ-ῄῆ-ῌῐ-\u1fd3ῖ-\u1fdbῠ-Ῥῲ-ῴῶ-ῼℂℇℊ-ℓℕℙ-ℝℤ\u2126ℨ\u212a-ℭℯ-ℴℹℼ-ℿⅅ-ⅉⅎↃↄⰀ-ⱻⱾ-ⳤⳫ"
    "-ⳮⳲⳳꙀ-ꙭꚀ-ꚛꜢ-ꝯꝱ-ꞇꞋ-ꞎꭰ-ꮿﬀ-ﬆﬓ-ﬗＡ-Ｚａ-ｚ𐐀-𐑏𐒰-𐓓𐓘-𐓻𐲀-𐲲𐳀-𐳲𑢠-𑣟𞤀-𞥃"
)
_HAN_HANGUL = "[一-龥ࠀ-一가-퟿]+"
_BLOOM = r" ?[^(\s|[.,!?…。，、।۔،])]+"


def _newline_words(tail: str) -> tuple[str, ...]:
    return (r"[\r\n]", *tail.split("\0"))


@dataclass(frozen=True)
class Pre:
    """One name of llama.cpp and what it hard-wires.

    steps: the tokenizer.json that it stands for. ignore_merges, add_bos, clean_spaces: its flags, add_bos only
    where the file has no tokenizer.ggml.add_bos_token. normalizer and model_types: where several names do the same,
    the models that use this one. differs: texts on which llama.cpp's own regexes do something else. crossed: cuts that
    only the source makes, which matter where a token of the vocabulary matches the regex, that is, crosses one.
    """

    name: str
    steps: tuple[str, ...]
    ignore_merges: bool = False
    add_bos: bool = False
    clean_spaces: bool = True
    normalizer: tuple[str, ...] = ()
    model_types: tuple[str, ...] = ()
    differs: tuple[Limit, ...] = ()
    crossed: tuple[tuple[str, Limit], ...] = ()


_NFC = ("NFC",)
_CASE = Limit(
    "llama.cpp tells upper from lower case, and combining marks from letters, in ASCII only, so words with an inner "
    "capital or a mark outside ASCII may be cut elsewhere",
    characters(wide_case),
)
_DIGITS = Limit("llama.cpp cuts runs of digits outside ASCII elsewhere", characters(wide_digit))
_WIDE = Limit("llama.cpp cuts at whitespace outside ASCII, such as U+3000, elsewhere", characters(wide_space))
_NO_CASE = Limit(
    "llama.cpp does not tell upper from lower case, so words with an inner capital may be cut elsewhere",
    inner_capital,
)
_LATIN1_DIGITS = "0-9²³¹¼½¾"  # what Digits takes for digits among the characters that stand for bytes
_BYTE_DIGITS = (
    f"[{_LATIN1_DIGITS}][^{_LATIN1_DIGITS}]|[^{_LATIN1_DIGITS}][{_LATIN1_DIGITS}]",
    Limit(
        "the source cuts between digits and what surrounds them, bytes of other characters included; llama.cpp does not, "
        "and some tokens cross these cuts",
        characters(lambda c: wide(c) or digit(c)),
    ),
)
_SINGLE_DIGITS = (
    "[0-9][0-9]",
    Limit(
        "the source cuts numbers into digits, llama.cpp does not, and some tokens have several",
        characters(digit),
    ),
)
_RIGHT_TO_LEFT = Limit(
    "llama.cpp counts the digits of every run in threes from the right, the source only where a word ends",
    characters(digit),
)

#: In order of preference among equals. Names that llama.cpp treats exactly as an earlier one, and that no model type
#: here calls for, are in ALIASES.
TABLE: tuple[Pre, ...] = (
    Pre("gpt-2", (GPT2, BYTES)),
    Pre("olmo", (GPT2, BYTES), normalizer=_NFC, model_types=("olmo", "olmo2", "olmoe", "gpt_neox")),
    Pre("mpt", (GPT2, BYTES), normalizer=_NFC, model_types=("mpt",)),
    Pre("phi-2", (GPT2, BYTES), model_types=("phi",)),
    Pre("exaone4", (GPT2, BYTES), model_types=("exaone4",)),
    Pre("modern-bert", (GPT2, BYTES), normalizer=_NFC, model_types=("modernbert",)),
    Pre("jais", (GPT2, BYTES), model_types=("jais",)),
    Pre("trillion", (GPT2, BYTES), clean_spaces=False, model_types=("trillion",)),
    Pre("granite-docling", (GPT2, BYTES), clean_spaces=False, model_types=("idefics3",)),
    Pre("starcoder", (DIGIT, GPT2, BYTES), model_types=("starcoder2",)),
    Pre("refact", (DIGIT, GPT2, BYTES), model_types=("gpt_refact", "granite", "granitemoe", "gpt_bigcode")),
    Pre("command-r", (DIGIT, GPT2, BYTES), clean_spaces=False, normalizer=_NFC, model_types=("cohere", "cohere2")),
    Pre("smollm", (DIGIT, GPT2, BYTES), clean_spaces=False, model_types=("smollm",)),
    Pre("codeshell", (DIGIT, GPT2, BYTES), model_types=("codeshell",)),
    Pre("exaone", (DIGIT, GPT2, BYTES), model_types=("exaone",)),
    Pre("minerva-7b", (DIGIT, GPT2, BYTES), model_types=("minerva",)),
    Pre("mellum2", (DIGIT, GPT2, BYTES), model_types=("mellum",)),
    Pre("llama-bpe", (LLAMA3, BYTES), ignore_merges=True, add_bos=True),
    Pre("lfm2", (LLAMA3, BYTES), ignore_merges=True, add_bos=True, model_types=("lfm2", "lfm2_moe")),
    Pre("falcon-h1", (LLAMA3, BYTES), ignore_merges=True, add_bos=True, model_types=("falcon_h1",)),
    Pre("glm4", (LLAMA3, BYTES), ignore_merges=True, model_types=("glm", "glm4", "glm4_moe")),
    Pre("smaug-bpe", (LLAMA3, BYTES)),
    Pre("dbrx", (LLAMA3, BYTES), model_types=("dbrx",)),
    Pre("chatglm-bpe", (LLAMA3, BYTES), model_types=("chatglm",)),
    Pre("qwen2", (QWEN2, BYTES), clean_spaces=False, normalizer=_NFC),
    Pre("stablelm2", (QWEN2, BYTES), model_types=("stablelm",)),
    Pre("hunyuan", (QWEN2, BYTES), clean_spaces=False, model_types=("hunyuan_v1_moe",)),
    Pre("qwen35", (QWEN35, BYTES), clean_spaces=False, normalizer=_NFC),
    Pre("seed-coder", (
        rf"{_CONTRACTIONS}|{_WORD}|\p{{N}}| ?[^\s\p{{L}}\p{{N}}\r\n]+|{_SPACES}", BYTES), clean_spaces=False),
    Pre("bailingmoe", (
        rf"{_CONTRACTIONS}|{_WORD}|\p{{N}}|{_SYMBOLS}|\s*[\r\n]|\s+(?!\S)|\s+", BYTES), clean_spaces=False),
    Pre("ufakzeka", (rf"{_WORD}|\p{{N}}|{_SYMBOLS}|{_SPACES}", BYTES), clean_spaces=False),
    Pre("minicpm5", (
        r"\p{N}{1,3}", rf"{_CONTRACTIONS}|{_WORD}|\p{{N}}+|{_SYMBOLS}|{_SPACES}", BYTES), ignore_merges=True),
    Pre("exaone-moe", (
        (rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?(?:\p{{L}}\p{{M}}*(?: \p{{L}}\p{{M}}*)*)+|\p{{N}}"
        r"| ?[^\s\p{L}\p{N}]+[\r\n/]?|\s*[\r\n]|\s+(?!\S)|\s+"), BYTES)),
    Pre("jais-2", (
        rf"{_CONTRACTIONS}|{_WORD}|\p{{N}}{{1,3}}|{_SYMBOLS}|\s*[\r\n]+"
        + "".join(rf"|\s{{{n}}}(?!\S)" for n in ("512", "256", "128", "64", "32", "16", "8", "4", "1,2"))
        + r"|\s", BYTES)),
    Pre("tekken", (TEKKEN, BYTES), ignore_merges=True, add_bos=True, clean_spaces=False, differs=(_CASE,)),
    Pre("gpt-4o", (O200K, BYTES), clean_spaces=False, differs=(_CASE,)),
    Pre("llama4", (O200K, BYTES), clean_spaces=False, model_types=("llama4", "llama4_text"), differs=(_CASE,)),
    Pre("minimax-m2", (O200K, BYTES), clean_spaces=False, model_types=("minimax_m2",), differs=(_CASE,)),
    Pre("granite-embed-multi-97m", (O200K, BYTES), ignore_merges=True, clean_spaces=False, differs=(_CASE,)),
    Pre("youtu", (
        "[가-힣ㄱ-ㆎ]+|[！…“”‘’—：；，、-〿︰-﹏]+|[ㄅ-ㄯ]+|" + _CJK, YOUTU, BYTES),
        ignore_merges=True, clean_spaces=False, differs=(_NO_CASE,)),
    Pre("tiny_aya", (r"\d{1,3}(?=(?:\d{3})*\b)", O200K, BYTES), clean_spaces=False,
        differs=(_NO_CASE, _RIGHT_TO_LEFT)),
    Pre("deepseek-llm", (
        *_newline_words(f"\\s?[{_DEEPSEEK_LETTERS}]+\0\\s?[!-/:-~！-／：-～‘-‟\u3000-。]+\0\\s+$\0{_HAN_HANGUL}"),
        DIGIT, BYTES), clean_spaces=False, differs=(_DIGITS, _WIDE),
        crossed=(_SINGLE_DIGITS,)),
    Pre("deepseek-coder", (
        *_newline_words(f"\\s?\\p{{L}}+\0\\s?\\p{{P}}+\0{_HAN_HANGUL}"), DIGIT, BYTES), clean_spaces=False,
        differs=(_WIDE,)),
    Pre("deepseek-v3", (r"\p{N}{1,3}", _CJK, DEEPSEEK3, BYTES), clean_spaces=False),
    Pre("hunyuan-dense", (r"\p{N}{1,3}", _CJK, DEEPSEEK3, BYTES), clean_spaces=False,
        model_types=("hunyuan_v1_dense",)),
    Pre("spark2_5", (r"\p{N}{1,3}", _CJK, SPARK, DIGIT, BYTES), clean_spaces=False),
    Pre("falcon", (PUNCTUATION + "+", GPT2, BYTES, "[0-9][0-9][0-9]")),
    Pre("falcon", (PUNCTUATION + "+", GPT2, BYTES, DIGITS, "[0-9][0-9][0-9]"), crossed=(_BYTE_DIGITS,)),
    Pre("superbpe", (r"\p{N}+", r"(?=(\d{3})+(?!\d))", BYTES), clean_spaces=False, differs=(_DIGITS,)),
    Pre("poro-chat", (_BLOOM, BYTES), clean_spaces=False),
    Pre("bloom", (_BLOOM, BYTES), model_types=("bloom",)),
    Pre("viking", (_BLOOM, DIGIT, BYTES), clean_spaces=False),
    Pre("chameleon", (
        "<sentinel:[0-9]+>", "(IMGIMG)((A|B|C|D|E|F|G|H|I){1,4})Z", r"([\t\n]|    |  )", DIGIT, PUNCTUATION,
        GPT2, BYTES), add_bos=True, clean_spaces=False),
    Pre("laguna", (r"[^\n]+|[\n]+", QWEN2, BYTES), clean_spaces=False),
)  # fmt: skip

#: Names that llama.cpp reads as another name of the table (llama-vocab.cpp, load): used when a GGUF file is read.
ALIASES: Mapping[str, str] = {
    "llama3": "llama-bpe", "llama-v3": "llama-bpe", "falcon3": "llama-bpe", "pixtral": "llama-bpe",
    "midm-2.0": "llama-bpe", "jina-v5-nano": "llama-bpe", "jina-es": "gpt-2", "jina-de": "gpt-2",
    "gigachat": "gpt-2", "jina-v2-es": "gpt-2", "jina-v2-de": "gpt-2", "a.x-4.0": "gpt-2", "mellum": "gpt-2",
    "deepseek-r1-qwen": "qwen2", "kormo": "qwen2", "f2llmv2": "qwen2", "megrez": "qwen2", "grok-2": "qwen2",
    "solar-open": "hunyuan", "glm5": "glm4", "gpt3-finnish": "bloom", "kanana2": "gpt-4o", "talkie": "gpt-4o",
    "cohere2moe": "tiny_aya", "bailingmoe2": "bailingmoe", "llada-moe": "bailingmoe", "hy_v4": "deepseek-v3",
    "joyai-llm": "deepseek-v3",
}  # fmt: skip

#: A vocabulary without a name: llama.cpp's fallback chain, which no tokenizer.json is known to use.
DEFAULT = Pre("default", (r"[\p{P}\$\+<=>\^~\|]+", GPT2, DIGITS, "[0-9][0-9][0-9]", BYTES))


def named(name: str) -> Pre | None:
    """The row of a `tokenizer.ggml.pre`, None if this table has none."""
    if name in ("", "default"):
        return DEFAULT
    wanted = ALIASES.get(name, name)
    return next((p for p in TABLE if p.name == wanted), None)


def candidates(steps: tuple[str, ...], normalizer: tuple[str, ...], model_type: str) -> list[Pre]:
    """The rows of these steps, the most fitting first: by model type, by normalizer, for any model type, by table."""
    rows = [p for p in (*TABLE, DEFAULT) if p.steps == steps]
    return sorted(
        rows, key=lambda p: (model_type not in p.model_types, bool(p.model_types), p.normalizer != normalizer)
    )


# --- canonical form --------------------------------------------------------------------------------------

_SPELLINGS: tuple[tuple[str, str], ...] = (
    ("\r", r"\r"),
    ("\n", r"\n"),
    ("\t", r"\t"),
    ("(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])", _CONTRACTIONS),
    ("'(?i:[sdmt]|ll|ve|re)", _CONTRACTIONS),
    (r"\p{N}{1}", r"\p{N}"),
    (r"\s{1}", r"\s"),
)
#: Escapes and character classes are left alone; outside them a quantifier may be followed by the possessive mark.
_POSSESSIVE = re.compile(r"(\\[pP]\{\w*\}|\\.|\[(?:\\.|[^\]\\])*\])|([?*+}])\+")


def canonical_regex(regex: str) -> str:
    """`regex` in the spelling of the table.

    Dropping possessive marks is sound for what the table can match: nothing follows in those alternatives that a
    shorter match would help.
    """
    for spelling, plain in _SPELLINGS:
        regex = regex.replace(spelling, plain)
    return _POSSESSIVE.sub(lambda m: m[1] or m[2], regex)


def steps_of(pre_tokenizer: Mapping[str, Any] | None) -> tuple[str, ...]:
    """The canonical steps of a tokenizer.json's pre_tokenizer.

    What has no canonical form is spelled out in angle brackets, so that it matches no row and can be printed.
    """
    if pre_tokenizer is None:
        return ()
    kind = pre_tokenizer.get("type")
    if kind == "Sequence":
        parts = pre_tokenizer.get("pretokenizers")
        return tuple(step for part in parts or () for step in steps_of(part))
    read = _READERS.get(str(kind))
    return read(pre_tokenizer) if read else (_spelled(pre_tokenizer),)


def _spelled(part: Mapping[str, Any]) -> str:
    flags = ", ".join(f"{k}={v!r}" for k, v in part.items() if k != "type")
    return f"<{part.get('type')}({flags})>"


def _byte_level(part: Mapping[str, Any]) -> tuple[str, ...]:
    if part.get("add_prefix_space"):
        return (_spelled(part),)
    return (GPT2, BYTES) if part.get("use_regex", True) else (BYTES,)


def _split(part: Mapping[str, Any]) -> tuple[str, ...]:
    pattern = part.get("pattern")
    regex = pattern.get("Regex") if isinstance(pattern, Mapping) else None
    behavior, invert = part.get("behavior"), bool(part.get("invert"))
    if not isinstance(regex, str):
        return (f"<Split(pattern={pattern!r}, behavior={behavior!r}, invert={invert!r})>",)
    regex = canonical_regex(regex)
    covers = regex.endswith((r"|\s+", r"|\s"))
    if (behavior == "Isolated" and not invert) or (covers and behavior in ("Isolated", "Removed") and invert):
        return (regex,)
    return (_spelled(part),)


def _digits(part: Mapping[str, Any]) -> tuple[str, ...]:
    return (DIGIT if part.get("individual_digits") else DIGITS,)


def _punctuation(part: Mapping[str, Any]) -> tuple[str, ...]:
    forms = {"Isolated": PUNCTUATION, "Contiguous": PUNCTUATION + "+"}
    return (forms.get(str(part.get("behavior", "Isolated")), _spelled(part)),)


def _metaspace(part: Mapping[str, Any]) -> tuple[str, ...]:
    old = "always" if part.get("add_prefix_space", True) else "never"
    return (
        metaspace(
            str(part.get("prepend_scheme", old)), bool(part.get("split", True)), part.get("replacement")
        ),
    )


def metaspace(scheme: str, split: bool, replacement: object = "▁") -> str:
    """The canonical step of a Metaspace pre-tokenizer, which writes a space as another character."""
    return f"<Metaspace(replacement={replacement!r}, prepend_scheme={scheme!r}, split={split!r})>"


_READERS = {
    "Metaspace": _metaspace,
    "ByteLevel": _byte_level,
    "Split": _split,
    "Digits": _digits,
    "Punctuation": _punctuation,
}


def to_json(steps: tuple[str, ...]) -> dict[str, Any]:
    """A pre_tokenizer of tokenizer.json for a row's steps; the inverse of `steps_of`."""

    def part(step: str) -> dict[str, Any]:
        if step == BYTES:
            return {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
        if step == DIGITS:
            return {"type": "Digits", "individual_digits": False}
        if step == PUNCTUATION + "+":
            return {"type": "Punctuation", "behavior": "Contiguous"}
        return {"type": "Split", "pattern": {"Regex": step}, "behavior": "Isolated", "invert": False}

    return {"type": "Sequence", "pretokenizers": [part(s) for s in steps]}


def unknown(key: str) -> UnsupportedError:
    """The error for a structure that no name stands for; `key` is printed in full."""
    return UnsupportedError(
        f"tokenizer.json: llama.cpp has no pre-tokenizer for this structure, and cannot be told a regex.\n{key}\n"
        "Another target can take this tokenizer; for GGUF, llama.cpp must learn it first."
    )


def describe(
    steps: tuple[str, ...], normalizer: tuple[str, ...], ignore_merges: bool, byte_fallback: bool, model: str
) -> str:
    """The key of a tokenizer, one line per part."""
    lines = [f"  model: {model}, ignore_merges={ignore_merges}, byte_fallback={byte_fallback}"]
    lines += [f"  normalizer: {n if len(n) < 200 else n[:60] + ' ...'}" for n in normalizer] or [
        "  normalizer: none"
    ]
    lines += [f"  split: {s if len(s) < 400 else show(s)}" for s in steps] or ["  split: none"]
    return "\n".join(lines)
