"""Reading tokenizers from folders that nobody vouches for."""

from __future__ import annotations

import copy
import io
import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from lconvert.converters import sentencepiece_model, tokenizer_gguf
from lconvert.converters.pretokenizers import BYTES, GPT2, to_json
from lconvert.converters.tokenizer_hf import read_tokenizer
from lconvert.errors import InputError, LconvertError, UnsupportedError

ALPHABET = "abcdefgh"


def small() -> dict[str, Any]:
    """A sound byte-level tokenizer.json of a few tokens."""
    vocab = {c: i for i, c in enumerate(ALPHABET)} | {"ab": 8, "abc": 9, "<s>": 10}
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    return {
        "version": "1.0",
        "added_tokens": [
            {"id": 10, "content": "<s>", **flags, "special": True},
            {"id": 11, "content": "</s>", **flags, "special": True},
            {"id": 12, "content": "<tool>", **flags, "special": False},
        ],
        "normalizer": None,
        "pre_tokenizer": to_json((GPT2, BYTES)),
        "post_processor": sentencepiece_model.template((10, "<s>"), None),
        "decoder": None,
        "model": {"type": "BPE", "vocab": vocab, "merges": [["a", "b"], "ab c"]},
    }


def write(folder: Path, **files: Any) -> Path:
    for name, content in files.items():
        path = folder / (name.replace("__", "/").replace("_dot_", "."))
        path.parent.mkdir(exist_ok=True)
        path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return folder


def test_no_tokenizer(tmp_path: Path) -> None:
    assert read_tokenizer(write(tmp_path, config_dot_json={"bos_token_id": 1})) is None


@pytest.mark.parametrize("name", ["tekken.json", "vocab.json", "vocab.txt", "qwen.tiktoken", "spiece.model"])
def test_other_formats_get_advice(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text("{}")
    with pytest.raises(
        UnsupportedError, match=f"{name} is .*there is no tokenizer.json; load the folder with transformers"
    ):
        read_tokenizer(tmp_path)


def test_special_ids_and_templates(tmp_path: Path) -> None:
    write(
        tmp_path,
        tokenizer_dot_json=small(),
        tokenizer_config_dot_json={
            "bos_token": "<s>",
            "eos_token": {"content": "</s>"},
            "pad_token": "nowhere",
        },
        special_tokens_map_dot_json={"unk_token": "a"},
        config_dot_json={"eos_token_id": [12, 9], "pad_token_id": 3, "text_config": {"sep_token_id": 4}},
        generation_config_dot_json={"eos_token_id": [9, 8], "bos_token_id": 5},
        chat_template_dot_jinja="main",
        additional_chat_templates__rag_dot_jinja="rag",
    )
    tokenizer = read_tokenizer(tmp_path)
    assert tokenizer is not None
    assert tokenizer.special == {"bos": (10,), "eos": (11, 12, 9, 8), "unk": (0,), "sep": (4,), "pad": (3,)}
    assert (tokenizer.chat_template, tokenizer.extra_templates) == ("main", {"rag": "rag"})


def test_a_template_in_the_config_wins(tmp_path: Path) -> None:
    config = {"chat_template": [{"name": "default", "template": "d"}, {"name": "tool", "template": "t"}]}
    write(tmp_path, tokenizer_dot_json=small(), tokenizer_config_dot_json=config, chat_template_dot_jinja="x")
    tokenizer = read_tokenizer(tmp_path)
    assert tokenizer is not None
    assert (tokenizer.chat_template, tokenizer.extra_templates) == ("d", {"tool": "t"})


def broken(**changes: Any) -> dict[str, Any]:
    data = small()
    for path, value in changes.items():
        *way, last = path.split("__")
        at = data
        for step in way:
            at = at[step]
        at[last] = value
    return data


TOKEN = {"id": 12, "content": "<tool>"}


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ("{", "no sound JSON"),
        ("[]", "expected a JSON object, found list"),
        ('{"a": 1, "a": 2}', "the key 'a' is there twice"),
        ("[" * 100_000, "no sound JSON"),
        (broken(model=None), "there is no `model`"),
        (broken(model__vocab=None), "`model.vocab` is missing"),
        (broken(model__merges=None), "`model.merges` is missing"),
        (broken(model__merges=[["a"]]), r"merge 0 is \['a'\], not a pair"),
        (broken(model__merges=["a b c"]), "merge 0 is 'a b c', not a pair"),
        (
            broken(model__merges=[["a", "c"]]),
            "the merge of 'a' and 'c' needs 'ac', which is not in the vocabulary",
        ),
        (broken(model__vocab__z=3), "'d' and 'z' both have the id 3"),
        (broken(model__vocab__z=-1), "'z' has the id -1"),
        (broken(model__vocab__z=2**31), "'z' has the id 2147483648"),
        (broken(model__vocab__z=True), "'z' has the id True"),
        (broken(model__vocab__z="3"), "'z' has the id '3'"),
        (broken(**{"model__vocab__\ud800": 30}), "a text is not Unicode"),
        (broken(added_tokens={}), ""),
        (broken(added_tokens="x"), "`added_tokens` is not a list"),
        (broken(added_tokens=[{"id": 4}]), "an added token without content"),
        (broken(added_tokens=[TOKEN, TOKEN]), "the added token '<tool>' is there twice"),
        (broken(added_tokens=[{"id": 3, "content": "x"}]), "'d' and 'x' both have the id 3"),
        (
            broken(added_tokens=[{"id": 3, "content": "a"}]),
            "'a' has id 0 in the vocabulary and 3 as added token",
        ),
        (broken(normalizer=[]), r"`normalizer` is \[\], not an object with a type"),
        (broken(model={"type": "Unigram", "vocab": [["a", 0.5], ["a", 1]]}), "the piece 'a' is there twice"),
        (broken(model={"type": "Unigram", "vocab": [["a"]]}), r"item 0 of `model.vocab` is \['a'\]"),
        (broken(model={"type": "Unigram", "vocab": [["a", None]]}), "piece 0, 'a', has the score None"),
    ],
)
def test_damaged_tokenizer_json(data: Any, said: str, tmp_path: Path) -> None:
    write(tmp_path, tokenizer_dot_json=data)
    if not said:
        assert read_tokenizer(tmp_path) is not None
        return
    with pytest.raises(InputError, match=said) as e:
        read_tokenizer(tmp_path)
    assert str(e.value).startswith(str(tmp_path / "tokenizer.json"))


@pytest.mark.parametrize(
    "template", [3, [{"name": "x"}], [{"name": "x", "template": "a"}, {"name": "x", "template": "b"}]]
)
def test_damaged_templates(template: Any, tmp_path: Path) -> None:
    write(tmp_path, tokenizer_dot_json=small(), tokenizer_config_dot_json={"chat_template": template})
    with pytest.raises(InputError, match=r"chat.template"):
        read_tokenizer(tmp_path)


def test_a_post_processor_of_unknown_tokens(tmp_path: Path) -> None:
    processor = sentencepiece_model.template((10, "<nowhere>"), None)
    tokenizer = read_tokenizer(write(tmp_path, tokenizer_dot_json=broken(post_processor=processor)))
    assert tokenizer is not None
    with pytest.raises(InputError, match="the post_processor adds '<nowhere>', which is no token"):
        tokenizer_gguf.to_gguf(tokenizer, 20, "llama")


def paths(value: Any, way: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    if way:
        yield way
    for key, child in (
        value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    ):
        yield from paths(child, (*way, key))


JUNK: tuple[Any, ...] = (
    None,
    True,
    -1,
    2**70,
    1.5,
    "",
    "x",
    [],
    [None],
    [[]],
    {},
    {"type": "Sequence"},
    {"id": []},
    "\ud800",
)


def unigram() -> dict[str, Any]:
    """A sound unigram tokenizer.json."""
    pieces = [["<unk>", 0.0], ["▁", -1.0], *([c, -2.0 - i] for i, c in enumerate(ALPHABET)), ["<s>", 0.0]]
    data = small()
    data["added_tokens"] = [{"id": 10, "content": "<s>", "special": True, "normalized": False}]
    data["normalizer"] = {"type": "Precompiled", "precompiled_charsmap": "BAAAAAAAAAAA"}
    data["pre_tokenizer"] = {
        "type": "Metaspace",
        "replacement": "▁",
        "prepend_scheme": "always",
        "split": False,
    }
    return {**data, "model": {"type": "Unigram", "unk_id": 0, "vocab": pieces, "byte_fallback": False}}


@pytest.mark.parametrize("base", [small, unigram])
@pytest.mark.parametrize("seed", range(3))
def test_any_junk_anywhere_is_a_clear_error_or_nothing(
    base: Callable[[], Any], seed: int, tmp_path: Path
) -> None:
    """Every place of the file replaced by things that do not belong there."""
    rng = random.Random(seed)
    whole = base()
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    whole["normalizer"] = whole["normalizer"] or {
        "type": "Sequence",
        "normalizers": [{"type": "NFC"}, replace],
    }
    for way in paths(whole):
        data = copy.deepcopy(whole)
        at = data
        for step in way[:-1]:
            at = at[step]
        at[way[-1]] = rng.choice(JUNK)
        write(
            tmp_path,
            tokenizer_dot_json=data,
            tokenizer_config_dot_json={"added_tokens_decoder": rng.choice(JUNK)},
        )
        try:
            tokenizer = read_tokenizer(tmp_path)
            assert tokenizer is not None
            tokenizer_gguf.to_gguf(tokenizer, 20, "llama")
        except LconvertError as e:
            assert str(e)


# --- tokenizer.model -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model() -> bytes:
    sentencepiece = pytest.importorskip("sentencepiece")
    out = io.BytesIO()
    lines = ["the quick brown fox jumps over the lazy dog", "pack my box with five dozen liquor jugs"] * 50
    sentencepiece.SentencePieceTrainer.Train(
        sentence_iterator=iter(lines), model_writer=out, vocab_size=320, model_type="bpe", byte_fallback=True,
        hard_vocab_limit=False, minloglevel=2, pad_id=3,
    )  # fmt: skip
    return out.getvalue()


def test_sentencepiece_model_alone(model: bytes, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(model)
    extra = {"400": {"content": "<|x|>", "special": True}}
    write(tmp_path, tokenizer_config_dot_json={"add_eos_token": True, "added_tokens_decoder": extra})
    tokenizer = read_tokenizer(tmp_path)
    assert tokenizer is not None
    assert tokenizer.special == {"bos": (1,), "eos": (2,), "unk": (0,), "pad": (3,)}
    single = tokenizer.json["post_processor"]["single"]
    assert [next(iter(p.values()))["id"] for p in single] == ["<s>", "A", "</s>"]
    assert tokenizer.json["added_tokens"][-1]["content"] == "<|x|>"


def test_sentencepiece_parser_agrees_with_the_package(model: bytes) -> None:
    sentencepiece = pytest.importorskip("sentencepiece")
    theirs = sentencepiece.SentencePieceProcessor(model_proto=model)
    ours = sentencepiece_model.parse(model, "m")
    n = theirs.get_piece_size()
    assert list(ours.texts) == [theirs.id_to_piece(i) for i in range(n)]
    assert list(ours.scores) == [theirs.get_score(i) for i in range(n)]
    kinds = {2: theirs.is_unknown, 3: theirs.is_control, 5: theirs.is_unused, 6: theirs.is_byte}
    assert all(kinds[k](i) for i, k in enumerate(ours.types) if k in kinds)
    assert (ours.unk, ours.bos, ours.eos, ours.pad) == (0, 1, 2, 3)
    assert ours.remove_extra_whitespaces and ours.add_dummy_prefix and ours.charsmap


def test_damaged_sentencepiece_model(model: bytes, tmp_path: Path) -> None:
    rng = random.Random(0)
    with pytest.raises(InputError, match="no SentencePiece model"):
        sentencepiece_model.parse(b"", "m")
    with pytest.raises(
        InputError, match=r"m: no SentencePiece model \(a field of .* bytes where .* are left\)"
    ):
        sentencepiece_model.parse(model[: len(model) // 2], "m")
    for _ in range(300):
        bad = bytearray(model)
        for _ in range(3):
            bad[rng.randrange(len(bad))] = rng.randrange(256)
        (tmp_path / "tokenizer.model").write_bytes(bad)
        try:
            read_tokenizer(tmp_path)
        except LconvertError as e:
            assert str(e)
