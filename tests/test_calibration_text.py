"""Calibration windows against the tokenizers package, and texts that are of no use."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from random import Random

import pytest
from tokenizers import Tokenizer

import lconvert
from lconvert.errors import InputError, OptionError
from lconvert.ir import Model
from lconvert.primitives.job import Calibration
from lconvert.primitives.text import windows
from tests.conftest import DEMO

SENTENCE = "The valley was settled long before anyone wrote about it, and most of what is known comes from the river. "
#: No sixteen words of it occur twice.
WORDS = " ".join(Random(0).choices(SENTENCE.split(), k=8000))


@pytest.fixture(scope="module")
def model() -> Model:
    return lconvert.read(DEMO)


def ids_of(model: Model, words: str) -> list[int]:
    assert model.tokenizer is not None
    found: list[int] = (
        Tokenizer.from_str(json.dumps(model.tokenizer.json)).encode(words, add_special_tokens=False).ids
    )
    return found


def with_bos(model: Model, bos: int | None) -> Model:
    """The model with a tokenizer that begins every text with `bos`, or none that does."""
    assert model.tokenizer is not None
    data = dict(model.tokenizer.json)
    data["post_processor"] = None
    if bos is not None:
        text = Tokenizer.from_str(json.dumps(model.tokenizer.json)).id_to_token(bos)
        data["post_processor"] = {
            "type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": text, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {text: {"id": text, "ids": [bos], "tokens": [text]}},
        }
    return replace(model, tokenizer=replace(model.tokenizer, json=data))


def written(path: Path, words: str) -> str:
    path.write_text(words, encoding="utf-8")
    return str(path)


def test_windows_are_cuts_of_the_text(model: Model, tmp_path: Path) -> None:
    text = written(tmp_path / "t.txt", WORDS)
    plain = with_bos(model, None)
    found = windows(plain, Calibration(text, 3, 40))
    assert [i for w in found.ids for i in w] == ids_of(model, WORDS)[:120] and not found.notes
    assert (found.length, found.tokens) == (40, 120)


def test_every_window_begins_as_every_text_does(model: Model, tmp_path: Path) -> None:
    text = written(tmp_path / "t.txt", WORDS)
    found = windows(with_bos(model, 1), Calibration(text, 3, 40))
    ids = [1, *ids_of(model, WORDS)]
    assert [w[0] for w in found.ids] == [1, 1, 1]
    assert [w[1:] for w in found.ids] == [tuple(ids[i * 40 + 1 : i * 40 + 40]) for i in range(3)]


def test_without_a_post_processor_the_flag_counts(model: Model, tmp_path: Path) -> None:
    text = written(tmp_path / "t.txt", WORDS)
    plain = with_bos(model, None)
    assert plain.tokenizer is not None
    asked = replace(plain.tokenizer, config={"add_bos_token": True}, special={"bos": (7,)})
    assert windows(replace(plain, tokenizer=asked), Calibration(text, 2, 16)).ids[1][0] == 7


def test_a_short_text_makes_fewer_windows(model: Model, tmp_path: Path) -> None:
    text = written(tmp_path / "t.txt", WORDS)
    model = with_bos(model, None)
    have = len(ids_of(model, WORDS))
    found = windows(model, Calibration(text, 10**4, 100))
    assert len(found.ids) == have // 100
    assert found.notes == (
        f"calibration: t.txt has {have} tokens, which make {have // 100} full windows of 100 instead of 10000",
    )


def test_a_text_of_less_than_a_window_makes_a_shorter_one(model: Model, tmp_path: Path) -> None:
    words = WORDS[:400]
    have = len(ids_of(model, words))
    assert 64 <= have < 200
    found = windows(with_bos(model, None), Calibration(written(tmp_path / "t.txt", words), 4, 200))
    assert (len(found.ids), found.length) == (1, have)
    assert found.notes == (f"calibration: t.txt has {have} tokens, which make one window shorter than 200",)


def test_a_text_of_some_words_is_refused(model: Model, tmp_path: Path) -> None:
    text = written(tmp_path / "t.txt", "Four words of text.")
    with pytest.raises(
        OptionError, match=r"too short: \d tokens, and 64 are needed at least \(800 for 4 windows of 200\)"
    ):
        windows(with_bos(model, None), Calibration(text, 4, 200))
    with pytest.raises(OptionError, match="too short: 0 tokens"):
        windows(with_bos(model, None), Calibration(written(tmp_path / "e.txt", ""), 4, 200))


def test_windows_are_not_longer_than_the_context(model: Model, tmp_path: Path) -> None:
    text = written(tmp_path / "t.txt", WORDS)
    found = windows(model, Calibration(text, 2, 10**6))
    assert found.length == model.decoder.context
    assert found.notes[0] == (
        f"calibration: windows of {model.decoder.context} tokens, all that the model's context allows, instead of 1000000"
    )


def test_only_as_much_text_is_tokenised_as_is_run(
    model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lconvert.primitives import text

    sizes = []
    original = text._encode

    class Counting:
        def __init__(self, inner: Tokenizer):
            self.inner = inner

        def encode(self, words: str, add_special_tokens: bool) -> object:
            sizes.append(len(words))
            return self.inner.encode(words, add_special_tokens=add_special_tokens)

    monkeypatch.setattr(
        text, "_encode", lambda tokenizer, words, wanted: original(Counting(tokenizer), words, wanted)
    )
    found = windows(with_bos(model, None), Calibration(written(tmp_path / "t.txt", WORDS), 2, 64))
    assert [i for w in found.ids for i in w] == ids_of(model, WORDS)[:128]
    assert max(sizes) < len(WORDS) / 4


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            "पहाड़ी गाँव में बच्चे सुबह जल्दी उठते हैं और नदी के किनारे खेलते हैं। " * 60,
            "characters per token|single bytes|unknown",
        ),
        ("".join(chr(33 + i * 7919 % 94) for i in range(4000)), "characters per token"),
    ],
)
def test_a_text_that_the_tokenizer_was_not_made_for_is_reported(
    model: Model, tmp_path: Path, words: str, said: str
) -> None:
    import re

    found = windows(model, Calibration(written(tmp_path / "t.txt", words), 2, 128))
    assert len(found.notes) == 1 and re.search(said, found.notes[0]), found.notes
    good = windows(model, Calibration(written(tmp_path / "g.txt", WORDS), 2, 128))
    assert not good.notes


def test_a_text_that_says_the_same_again_and_again_is_reported(model: Model, tmp_path: Path) -> None:
    found = windows(model, Calibration(written(tmp_path / "t.txt", SENTENCE * 400), 2, 128))
    assert len(found.notes) == 1 and "of t.txt repeats what stands before in it" in found.notes[0]


def test_what_is_no_text_is_refused(model: Model, tmp_path: Path) -> None:
    (tmp_path / "b.txt").write_bytes(bytes(range(128, 256)) * 40)
    with pytest.raises(InputError, match="cannot be read as UTF-8 text"):
        windows(model, Calibration(str(tmp_path / "b.txt")))
    with pytest.raises(InputError, match="no tokenizer"):
        windows(replace(model, tokenizer=None), Calibration(str(tmp_path / "b.txt")))
