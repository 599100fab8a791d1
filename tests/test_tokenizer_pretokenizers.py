"""Every row of the pre-tokenizer table against llama.cpp.

The merges are learned from text that was not split at all, so that any cut that the two make differently shows.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lconvert.converters import pretokenizers, tokenizer_gguf
from lconvert.converters.pretokenizers import BYTES, DEFAULT, GPT2, TABLE, Pre
from lconvert.errors import UnsupportedError
from lconvert.ir import Tokenizer
from lconvert.validators import corpus
from tests.llama_vocab import prove

tokenizers = pytest.importorskip("tokenizers")


def byte_level(pre_tokenizer: dict[str, Any], ignore_merges: bool = False) -> dict[str, Any]:
    """A tokenizer.json without vocabulary."""
    return {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": [], "normalizer": None,
        "pre_tokenizer": pre_tokenizer, "post_processor": None, "decoder": None,
        "model": {"type": "BPE", "vocab": {}, "merges": [], "ignore_merges": ignore_merges},
    }  # fmt: skip


@pytest.fixture(scope="session")
def merged() -> dict[str, Any]:
    """Vocabulary and merges learned across every boundary there is."""
    texts = [t for group in corpus.TEXTS.values() for t in group]
    fast = tokenizers.Tokenizer.from_str(json.dumps(byte_level(pretokenizers.to_json((BYTES,)))))
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=3000, initial_alphabet=alphabet, special_tokens=["<|bos|>"], show_progress=False
    )
    fast.train_from_iterator([" ".join(texts), "".join(texts), *texts, *texts], trainer)
    data: dict[str, Any] = json.loads(fast.to_str())
    return data


def with_pre(merged: dict[str, Any], pre: Pre) -> Tokenizer:
    data = {**merged, "pre_tokenizer": pretokenizers.to_json(pre.steps)}
    return Tokenizer({**data, "model": {**merged["model"], "ignore_merges": pre.ignore_merges}})


ROWS = list({(p.steps, p.ignore_merges): p for p in reversed((*TABLE, DEFAULT))}.values())


@pytest.mark.parametrize("pre", ROWS, ids=[f"{p.name}-{len(p.steps)}" for p in ROWS])
def test_each_structure_is_equal_outside_its_limits(pre: Pre, merged: dict[str, Any], tmp_path: Path) -> None:
    report, lowered = prove(tmp_path, with_pre(merged, pre))
    assert report.equal, str(report)
    claimed = sum(count for _, count, _ in report.rows())
    assert claimed > (160 if pre.differs or pre.crossed else 270)
    assert pretokenizers.named(str(lowered.keys["tokenizer.ggml.pre"].data)).steps == pre.steps or pre.crossed  # type: ignore[union-attr]


@pytest.mark.parametrize(
    "pre", [p for p in ROWS if p.differs or p.crossed], ids=lambda p: f"{p.name}-{len(p.steps)}"
)
def test_limits_are_real(pre: Pre, merged: dict[str, Any], tmp_path: Path) -> None:
    """A limit that no text proves would only make the claim smaller."""
    report, lowered = prove(tmp_path, with_pre(merged, pre))
    assert any(c.beyond_different for c in report.counts)
    assert any(n.startswith("tokens differ") for n in lowered.notes)


@pytest.mark.parametrize("pre", TABLE, ids=[f"{p.name}-{i}" for i, p in enumerate(TABLE)])
def test_model_types_name_their_row_and_llama_cpp_knows_it(
    pre: Pre, merged: dict[str, Any], tmp_path: Path
) -> None:
    model_type = pre.model_types[0] if pre.model_types else "llama"
    names = [p.name for p in pretokenizers.candidates(pre.steps, pre.normalizer, model_type)]
    assert pre.name in names
    if pre.model_types:
        assert names[0] == pre.name
        prove(tmp_path, with_pre(merged, pre), model_type)


def test_spellings_become_one() -> None:
    split = {"type": "Split", "behavior": "Isolated", "invert": False}
    llama3 = {**split, "pattern": {"Regex": pretokenizers.LLAMA3}}
    written_out = pretokenizers.LLAMA3.replace(
        "(?i:'s|'t|'re|'ve|'m|'ll|'d)", "(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])"
    )
    removed = {**llama3, "behavior": "Removed", "invert": True}
    possessive = pretokenizers.QWEN2.replace("]?\\p{L}+", "]?+\\p{L}++")
    raw_newlines = pretokenizers.QWEN2.replace("\\r\\n", "\r\n")
    assert pretokenizers.steps_of({**split, "pattern": {"Regex": written_out}}) == (pretokenizers.LLAMA3,)
    assert pretokenizers.steps_of(removed) == (pretokenizers.LLAMA3,)
    assert pretokenizers.canonical_regex(possessive) == pretokenizers.QWEN2
    assert pretokenizers.canonical_regex(raw_newlines) == pretokenizers.QWEN2
    assert pretokenizers.steps_of({"type": "ByteLevel", "add_prefix_space": False}) == (GPT2, BYTES)
    assert pretokenizers.steps_of({"type": "Digits", "individual_digits": True}) == (r"\p{N}",)
    assert pretokenizers.steps_of(None) == ()


def test_what_only_looks_alike_stays_apart() -> None:
    split = {"type": "Split", "behavior": "MergedWithNext", "invert": False, "pattern": {"Regex": GPT2}}
    assert pretokenizers.steps_of(split) != (GPT2,)
    assert pretokenizers.steps_of({**split, "behavior": "Removed"}) != (GPT2,)
    inner = pretokenizers.DEEPSEEK3
    assert pretokenizers.canonical_regex(inner) == inner  # '*+,' inside a class is no possessive quantifier


@pytest.mark.parametrize("pre", TABLE, ids=[f"{p.name}-{i}" for i, p in enumerate(TABLE)])
def test_table_reads_what_it_writes(pre: Pre) -> None:
    assert pretokenizers.steps_of(pretokenizers.to_json(pre.steps)) == pre.steps


@pytest.mark.parametrize(
    ("part", "said"),
    [
        (
            {"type": "Split", "pattern": {"Regex": "[a-z]+"}, "behavior": "Isolated", "invert": False},
            "split: [a-z]+",
        ),
        ({"type": "ByteLevel", "add_prefix_space": True}, "add_prefix_space=True"),
        ({"type": "BertPreTokenizer"}, "BertPreTokenizer"),
    ],
)
def test_an_unknown_structure_is_printed(part: dict[str, Any], said: str, merged: dict[str, Any]) -> None:
    data = {
        **merged,
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [part, *pretokenizers.to_json((BYTES,))["pretokenizers"]],
        },
    }
    with pytest.raises(UnsupportedError) as e:
        tokenizer_gguf.to_gguf(Tokenizer(data), 3000, "llama")
    assert said in str(e.value)
    assert "llama.cpp has no pre-tokenizer for this structure, and cannot be told a regex" in str(e.value)


@pytest.mark.parametrize("normalizer", [{"type": "Lowercase"}, {"type": "BertNormalizer"}])
def test_an_unknown_normalizer_is_printed(normalizer: dict[str, Any], merged: dict[str, Any]) -> None:
    data = {**merged, "normalizer": normalizer, "pre_tokenizer": pretokenizers.to_json((GPT2, BYTES))}
    with pytest.raises(UnsupportedError, match=f"normalizer: {normalizer['type']}"):
        tokenizer_gguf.to_gguf(Tokenizer(data), 3000, "llama")


def test_nfc_is_a_limit_and_nothing_else(merged: dict[str, Any], tmp_path: Path) -> None:
    data = {
        **merged,
        "normalizer": {"type": "NFC"},
        "pre_tokenizer": pretokenizers.to_json((pretokenizers.QWEN2, BYTES)),
    }
    report, lowered = prove(tmp_path, Tokenizer(data), "qwen2")
    assert report.equal, str(report)
    assert any(c.beyond_different for c in report.counts)
    assert lowered.keys["tokenizer.ggml.pre"].data == "qwen2"
    assert any("normalizes text to NFC" in n for n in lowered.notes)


def test_ignore_merges_that_matters_is_refused(merged: dict[str, Any]) -> None:
    model = {**merged["model"], "ignore_merges": True, "vocab": {**merged["model"]["vocab"], "zqzq": 3000}}
    data = {**merged, "model": model, "pre_tokenizer": pretokenizers.to_json((pretokenizers.QWEN2, BYTES))}
    with pytest.raises(UnsupportedError, match=r"ignore_merges=True .*the merges do not build .zqzq."):
        tokenizer_gguf.to_gguf(Tokenizer(data), 3001, "qwen2")


def test_ignore_merges_that_does_nothing_is_dropped(tmp_path: Path) -> None:
    fast = tokenizers.Tokenizer.from_str(
        json.dumps(byte_level(pretokenizers.to_json((pretokenizers.QWEN2, BYTES))))
    )
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=600, initial_alphabet=alphabet, show_progress=False)
    fast.train_from_iterator([t for g in corpus.TEXTS.values() for t in g], trainer)
    data = json.loads(fast.to_str())
    data["model"]["ignore_merges"] = True
    report, lowered = prove(tmp_path, Tokenizer(data), "qwen2")
    assert report.equal, str(report)
    assert any("ignore_merges=True" in n and "makes no difference" in n for n in lowered.notes)
