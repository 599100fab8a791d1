"""The comparison of token ids, and what it says."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from lconvert.converters.pretokenizers import BYTES, GPT2, LLAMA3, to_json
from lconvert.ir import Tokenizer
from lconvert.validators import corpus, tokens

tokenizers = pytest.importorskip("tokenizers")


def trained(**parts: Any) -> dict[str, Any]:
    """A small byte-level tokenizer.json."""
    data: dict[str, Any] = {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": [], "normalizer": None,
        "pre_tokenizer": to_json((GPT2, BYTES)), "post_processor": None, "decoder": None,
        "model": {"type": "BPE", "vocab": {}, "merges": []}, **parts,
    }  # fmt: skip
    fast = tokenizers.Tokenizer.from_str(json.dumps(data))
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=600, initial_alphabet=alphabet, special_tokens=["<|bos|>"], show_progress=False
    )
    fast.train_from_iterator([*corpus.TEXTS["prose"], *corpus.TEXTS["numbers"] * 3], trainer)
    found: dict[str, Any] = json.loads(fast.to_str())
    return found


def fast_of(data: dict[str, Any]) -> Any:
    return tokenizers.Tokenizer.from_str(json.dumps(data))


def runtime(data: dict[str, Any], broken: str = "") -> tokens.Tokenize:
    """A runtime that gives the reference's ids, but for texts that hold `broken`."""
    fast = fast_of(data)

    def tokenize(text: str, *, special: bool) -> Sequence[int]:
        fast.encode_special_tokens = not special
        ids: list[int] = fast.encode(text, add_special_tokens=False).ids
        return [*ids[:-1], ids[-1] + 1] if broken and broken in text else ids

    return tokenize


def test_equal() -> None:
    data = trained()
    report = tokens.compare(Tokenizer(data), fast_of(data), runtime(data), "one line\n" * 1000)
    assert report.equal and report.examples() == []
    (name, texts, differ), (other, _, _) = report.rows()
    assert (name, other) == ("ids, special tokens as text", "ids, special tokens parsed")
    built_in = len(list(corpus.texts(corpus.added_texts(data))))
    assert (texts, differ) == (built_in + 5, 0)  # 9000 characters in stretches of 2000
    assert str(report).startswith(f"tokens: equal on {2 * texts} texts (")


def test_truncation_of_the_reference_does_not_count() -> None:
    data = trained()
    cut = {
        **data,
        "truncation": {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0},
    }
    assert tokens.compare(Tokenizer(cut), fast_of(cut), runtime(data)).equal


def test_differences_are_counted_and_shown() -> None:
    data = trained()
    report = tokens.compare(Tokenizer(data), fast_of(data), runtime(data, "Ishmael"))
    assert not report.equal
    assert [differ for _, _, differ in report.rows()] == [1, 1]
    first = report.differences[0]
    assert first.at == len(first.expected) - 1 and not first.excuse
    assert report.examples()[0].startswith("'Call me Ishmael. Some years ago")
    assert "special tokens as text: from id" in report.examples()[0]
    assert json.loads(json.dumps(report.to_json()))["counts"][0]["different"] == 1
    assert str(report).startswith("tokens: 2 of ")


def test_what_a_limit_reaches_is_counted_apart() -> None:
    data = trained(normalizer={"type": "NFC"})
    report = tokens.compare(Tokenizer(data), fast_of(data), runtime({**data, "normalizer": None}))
    assert report.equal
    assert all(c.beyond >= c.beyond_different > 0 for c in report.counts)
    [text] = report.examples()
    assert "texts are beyond what llama.cpp can do" in text
    assert "the source normalizes text to NFC" in text


def test_nothing_is_excused_for_an_unknown_structure() -> None:
    data = trained()
    data["pre_tokenizer"] = {"type": "Whitespace"}
    report = tokens.compare(Tokenizer(data), fast_of(data), runtime(trained(), "zzz"))
    assert not report.equal
    assert all(c.beyond == 0 for c in report.counts)


def test_corpus_has_every_kind_of_text() -> None:
    text = "".join(corpus.texts(["<x>", "<y>"]))
    for sample in (
        "Ishmael",
        "石头记",
        "吾輩",
        "모든",
        "ملوك",
        "בראשית",
        "सभी",
        "👨\u200d👩",
        "e\u0301",
        "\r\n",
        "\u3000",
        "<|im_end|>",
        "<x><y>",
    ):
        assert sample in text, sample
    assert len(list(corpus.texts())) == len(set(corpus.texts())) > 130
    text.encode()


def hf_folder(path: Path, data: dict[str, Any], **config: Any) -> Path:
    (path / "tokenizer.json").write_text(json.dumps(data))
    (path / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", **config})
    )
    return path


def test_autotokenizer_that_agrees(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    assert tokens.autotokenizer_differs(hf_folder(tmp_path, trained()), list(corpus.texts())) is None
    assert tokens.autotokenizer_differs(tmp_path / "nowhere", ["a"]) is None


def test_autotokenizer_that_rewrites_the_pre_tokenizer(tmp_path: Path) -> None:
    """transformers 5 gives a folder of model type qwen2 Qwen2's own pre-tokenizer."""
    pytest.importorskip("transformers")
    data = trained(pre_tokenizer=to_json((LLAMA3, BYTES)))
    hf_folder(tmp_path, data, tokenizer_class="Qwen2Tokenizer")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen2"}))
    said = tokens.autotokenizer_differs(tmp_path, ["12 345 6789", "it's"] * 3)
    assert said is not None
    assert "gives other ids than tokenizer.json: " in said and said.endswith("tokenizer.json counts")


def test_autotokenizer_that_does_not_load(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    (tmp_path / "tokenizer.json").write_text("{}")
    said = tokens.autotokenizer_differs(tmp_path, ["a"])
    assert said is not None and said.startswith("transformers cannot load the tokenizer of")
