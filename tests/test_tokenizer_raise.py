"""llama.cpp's own vocabularies raised to tokenizer.json and lowered again.

The oracles are the ids that llama.cpp ships with them (ggml-vocab-*.gguf.out, made with the models' own tokenizers),
llama.cpp itself on the file that was written, and the keys of the file that was read.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lconvert.converters import tokenizer_gguf
from lconvert.converters.tokenizer_gguf import from_gguf
from lconvert.errors import InputError, UnsupportedError
from lconvert.formats import gguf
from lconvert.formats.gguf_values import Value
from lconvert.validators import tokens
from tests.llama_vocab import loaded, reference, vocab_folder, write

#: Vocabularies with .inp and .out, and the model type that a Hugging Face folder of the model states. (bert-bge is
#: WordPiece, which is not lowered.)
FILES = {
    "command-r": "cohere", "deepseek-coder": "llama", "deepseek-llm": "llama", "falcon": "falcon", "gemma-4": "gemma4",
    "gpt-2": "gpt2", "llama-bpe": "llama", "llama-spm": "llama", "mpt": "mpt", "phi-3": "phi3", "qwen2": "qwen2",
    "qwen35": "qwen3_5", "refact": "gpt_refact", "starcoder": "starcoder2",
}  # fmt: skip


@pytest.mark.parametrize("name", FILES)
def test_vocabularies_of_llama_cpp(name: str, tmp_path: Path) -> None:
    source = vocab_folder() / f"ggml-vocab-{name}.gguf"
    keys = gguf.read(source).metadata
    tokenizer, notes = from_gguf(keys)
    assert tokenizer is not None
    assert notes[0].startswith("tokenizer.json is rebuilt")
    fast = reference(tokenizer)

    texts = Path(f"{source}.inp").read_text(encoding="utf-8").split("\n__ggml_vocab_test__\n")
    lines = Path(f"{source}.out").read_text(encoding="utf-8").split("\n")
    assert len(texts) > 40
    for text, line in zip(texts, lines, strict=False):
        assert fast.encode(text, add_special_tokens=False).ids == [int(i) for i in line.split()], text

    lowered = tokenizer_gguf.lower(tokenizer, len(keys["tokenizer.ggml.tokens"].data), FILES[name])  # type: ignore[arg-type]
    same_keys(name, keys, lowered.keys)
    model_name = str(keys["general.name"].data)
    with loaded(write(tmp_path / "vocab.gguf", lowered.keys, model_name)) as llama:
        report = tokens.compare(tokenizer, fast, llama.tokenize)
        assert llama.framed("a", special=True) == fast.encode("a").ids
    assert report.equal, str(report)


def same_keys(name: str, source: Any, ours: dict[str, Value]) -> None:
    """Every key is as in llama.cpp's file, but for what is better now."""
    for key, theirs in source.items():
        if not key.startswith("tokenizer."):
            continue
        mine = ours[key]
        if key == "tokenizer.ggml.token_type":  # these files are older than the type for rows without a token
            texts = ours["tokenizer.ggml.tokens"].data
            differ = np.flatnonzero(np.asarray(theirs.data) != np.asarray(mine.data))
            assert all(texts[i] == f"[PAD{i}]" and mine.data[i] == 5 for i in differ)  # type: ignore[index]
        elif key == "tokenizer.ggml.scores" and name in (
            "llama-spm",
            "phi-3",
        ):  # runs of spaces, all -1e9 there
            differ = np.flatnonzero(np.asarray(theirs.data) != np.asarray(mine.data))
            texts = ours["tokenizer.ggml.tokens"].data
            assert len(differ) < 20
            assert all(theirs.data[i] == -1e9 and set(texts[i]) == {"▁"} for i in differ)  # type: ignore[index]
        elif key == "tokenizer.chat_templates":
            assert sorted(theirs.data) == list(mine.data)  # type: ignore[arg-type]
        else:
            assert mine == theirs, key
    extra = {k for k in ours if k not in source}
    assert extra - {"tokenizer.ggml.add_sep_token"} <= (
        {"tokenizer.ggml.add_bos_token"} if name == "llama-bpe" else set()
    )


@pytest.mark.parametrize("name", ["aquila", "baichuan", "gpt-neox", "nomic-bert-moe"])
def test_vocabularies_without_expected_ids(name: str, tmp_path: Path) -> None:
    """No oracle but llama.cpp on the very same keys: its ids against those of the tokenizer.json."""
    keys = dict(gguf.read(vocab_folder() / f"ggml-vocab-{name}.gguf").metadata)
    tokenizer, notes = from_gguf(keys)
    assert tokenizer is not None
    if name in ("aquila", "gpt-neox"):
        assert any("the file names no pre-tokenizer" in n for n in notes)
    own = {k: v for k, v in keys.items() if k.startswith("tokenizer.")}
    with loaded(write(tmp_path / "vocab.gguf", own)) as llama:
        report = tokens.compare(tokenizer, reference(tokenizer), llama.tokenize)
    assert report.equal, str(report)


# --- small and damaged files -----------------------------------------------------------------------------


def small(**changes: Value | None) -> dict[str, Value]:
    texts = [*"abc", "ab", "<s>", "[PAD5]"]
    keys = {
        "model": gguf.string("gpt2"),
        "pre": gguf.string("gpt-2"),
        "tokens": gguf.array("str", texts),
        "token_type": gguf.array("i32", [1, 1, 1, 1, 3, 5]),
        "merges": gguf.array("str", ["a b", "x y"]),
        "bos_token_id": gguf.u32(4),
        "fim_pre_token_id": gguf.u32(2),
    }
    found = {**keys, **changes}
    return {f"tokenizer.ggml.{k}": v for k, v in found.items() if v is not None}


def test_what_was_rebuilt_is_said() -> None:
    tokenizer, notes = from_gguf(small())
    assert tokenizer is not None
    assert tokenizer.json["model"]["vocab"] == {"a": 0, "b": 1, "c": 2, "ab": 3, "<s>": 4}
    assert tokenizer.json["model"]["merges"] == [["a", "b"]]
    assert tokenizer.special["bos"] == (4,)
    assert notes == (
        "tokenizer.json is rebuilt: flags of added tokens, normalizer and post-processor are llama.cpp's",
        "1 merges of tokens that the vocabulary does not have were dropped",
        "not carried over: tokenizer.ggml.fim_pre_token_id",
    )


def test_no_tokenizer_at_all() -> None:
    assert from_gguf({}) == (None, ("the file holds no tokenizer",))
    assert from_gguf(small(model=gguf.string("no_vocab")))[0] is None


def test_bos_that_a_name_assumes() -> None:
    tokenizer, notes = from_gguf(small(pre=gguf.string("tekken")))
    assert tokenizer is not None
    assert tokenizer.json["post_processor"]["single"][0] == {"SpecialToken": {"id": "<s>", "type_id": 0}}
    assert "bos is added to every text, because llama.cpp assumes it for this tokenizer" in notes
    assert any("is not quite the 'tekken' written here" in n for n in notes)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model": gguf.u32(1)}, "tokenizer.ggml.model is of kind u32, not str"),
        ({"tokens": None}, "the vocabulary is missing or empty"),
        ({"tokens": gguf.array("i32", [1])}, "tokenizer.ggml.tokens is no array of strings"),
        ({"token_type": gguf.array("i32", [1])}, "tokenizer.ggml.token_type has 1 items for 6 tokens"),
        ({"token_type": gguf.array("f32", [1.0] * 6)}, "tokenizer.ggml.token_type is no array of i32"),
        ({"bos_token_id": gguf.string("x")}, "bos_token_id is of kind str, not u32"),
        ({"add_bos_token": gguf.boolean(True), "bos_token_id": None}, "no key says which token that is"),
        (
            {"model": gguf.string("llama"), "scores": gguf.array("f32", [0.0])},
            "scores has 1 items for 6 tokens",
        ),
        (
            {"model": gguf.string("llama"), "tokens": gguf.array("str", ["a", "a"]), "token_type": None},
            "the piece 'a' twice",
        ),
        ({"tokens": gguf.array("str", [*"abc", "ab", "\udcff", "z"])}, "token 4 is not Unicode text"),
    ],
)
def test_damaged_keys(changes: dict[str, Value | None], said: str) -> None:
    with pytest.raises(InputError, match=said):
        from_gguf(small(**changes))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model": gguf.string("rwkv")}, "tokenizer.ggml.model is 'rwkv', which has no tokenizer.json"),
        (
            {"pre": gguf.string("kimi-k2")},
            "tokenizer.ggml.pre is 'kimi-k2'; this pre-tokenizer has no tokenizer.json",
        ),
    ],
)
def test_tokenizers_that_cannot_be_raised(changes: dict[str, Value | None], said: str) -> None:
    with pytest.raises(UnsupportedError, match=said):
        from_gguf(small(**changes))
