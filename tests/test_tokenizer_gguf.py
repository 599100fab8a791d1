"""Tokenizers lowered to GGUF, loaded by llama.cpp, compared id by id.

Equality is claimed for every text outside the limits that the lowering names, and each limit is shown to be real.
"""

from __future__ import annotations

import copy
import io
import json
from pathlib import Path
from typing import Any

import pytest

from lconvert.converters import tokenizer_gguf
from lconvert.converters.pretokenizers import BYTES, LLAMA3, to_json
from lconvert.converters.sentencepiece_model import template
from lconvert.converters.tokenizer_hf import read_tokenizer
from lconvert.errors import InputError, UnsupportedError
from lconvert.formats import gguf
from lconvert.ir import Tokenizer
from lconvert.validators import corpus
from lconvert.validators import tokens as token_proof
from tests import upstream
from tests.llama_vocab import loaded, prove, reference, write

tokenizers = pytest.importorskip("tokenizers")
sentencepiece = pytest.importorskip("sentencepiece")


# --- the tokenizers --------------------------------------------------------------------------------------


def spm(algorithm: str, **options: Any) -> bytes:
    """A tokenizer.model trained on the corpus."""
    lines = [t.replace("\n", " ") for group in corpus.TEXTS.values() for t in group if t.strip()]
    out = io.BytesIO()
    sentencepiece.SentencePieceTrainer.Train(
        **{
            "sentence_iterator": iter(lines * 3), "model_writer": out, "vocab_size": 1400, "model_type": algorithm,
            "byte_fallback": algorithm == "bpe", "normalization_rule_name": "identity", "remove_extra_whitespaces": False,
            "character_coverage": 0.995, "user_defined_symbols": ["<|user|>", "zz"], "hard_vocab_limit": False,
            "minloglevel": 2, "max_sentence_length": 10000, **options,
        }
    )  # fmt: skip
    return out.getvalue()


@pytest.fixture(scope="module")
def bpe_model() -> bytes:
    return spm("bpe")


def folder(path: Path, model: bytes, **config: Any) -> Path:
    (path / "tokenizer.model").write_bytes(model)
    (path / "tokenizer_config.json").write_text(json.dumps(config))
    return path


def read(path: Path, model: bytes, **config: Any) -> Tokenizer:
    found = read_tokenizer(folder(path, model, **config))
    assert found is not None
    return found


@pytest.fixture(scope="module")
def llama3() -> Tokenizer:
    """Byte-level BPE with Llama 3's regex, trained on the corpus."""
    marks = ["<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>"]
    data: dict[str, Any] = {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": [], "normalizer": None,
        "pre_tokenizer": to_json((LLAMA3, BYTES)), "post_processor": None, "decoder": None,
        "model": {"type": "BPE", "vocab": {}, "merges": [], "ignore_merges": True},
    }  # fmt: skip
    fast = tokenizers.Tokenizer.from_str(json.dumps(data))
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=1500, initial_alphabet=alphabet, show_progress=False)
    fast.train_from_iterator([t for group in corpus.TEXTS.values() for t in group], trainer)
    fast.add_special_tokens(marks)
    ids = [fast.token_to_id(m) for m in marks]
    data = json.loads(fast.to_str())
    data["post_processor"] = template((ids[0], marks[0]), None)
    return Tokenizer(data, special={"bos": (ids[0],), "eos": (ids[1],)})


def with_added(tokenizer: Tokenizer, *new: tuple[str, str]) -> Tokenizer:
    """The tokenizer with more added tokens, each (text, flags)."""
    data = copy.deepcopy(dict(tokenizer.json))
    vocab = data["model"]["vocab"]
    at = max([t["id"] for t in data["added_tokens"]] + list(vocab.values()))
    for text, flags in new:
        at += 1
        known = ("single_word", "lstrip", "rstrip", "normalized", "special")
        data["added_tokens"].append({"id": at, "content": text, **{f: f in flags.split() for f in known}})
    return Tokenizer(data, tokenizer.config, special=tokenizer.special)


# --- SentencePiece BPE -----------------------------------------------------------------------------------


@pytest.mark.parametrize("prefix", [True, False])
def test_sentencepiece_bpe_is_equal_everywhere(prefix: bool, tmp_path: Path) -> None:
    model = spm("bpe", add_dummy_prefix=prefix)
    tokenizer = read(tmp_path, model)
    report, lowered = prove(tmp_path, tokenizer)
    assert report.equal, str(report)
    assert lowered.limits == ()
    assert lowered.keys["tokenizer.ggml.model"].data == "llama"
    assert ("tokenizer.ggml.add_space_prefix" in lowered.keys) is not prefix
    processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    fast = reference(tokenizer)
    fast.encode_special_tokens = True
    for text in corpus.texts():
        assert fast.encode(text, add_special_tokens=False).ids == processor.encode(text), text


def test_scores_are_sentencepieces_own(bpe_model: bytes, tmp_path: Path) -> None:
    lowered = tokenizer_gguf.lower(read(tmp_path, bpe_model), 1400, "llama")
    processor = sentencepiece.SentencePieceProcessor(model_proto=bpe_model)
    scores = lowered.keys["tokenizer.ggml.scores"].data
    types = lowered.keys["tokenizer.ggml.token_type"].data
    normal = [i for i in range(processor.get_piece_size()) if types[i] == 1]  # type: ignore[index]
    assert len(normal) > 1000
    assert [float(scores[i]) for i in normal] == [processor.get_score(i) for i in normal]  # type: ignore[index]


def test_collapsed_spaces_are_a_limit(tmp_path: Path) -> None:
    tokenizer = read(tmp_path, spm("bpe", remove_extra_whitespaces=True))
    report, lowered = prove(tmp_path, tokenizer)
    assert report.equal, str(report)
    assert any(c.beyond_different for c in report.counts)
    assert [x.reason for x in lowered.limits] == [
        "the source drops leading, trailing or repeated spaces, llama.cpp keeps them all"
    ]


def test_merges_that_scores_cannot_say(bpe_model: bytes, tmp_path: Path) -> None:
    """With a merge missing, llama.cpp's joining by score would use what the source does not."""
    data = copy.deepcopy(dict(read(tmp_path, bpe_model).json))
    merges = data["model"]["merges"]
    lone = [i for i, m in enumerate(merges) if sum("".join(n) == "".join(m) for n in merges) > 1][-1]
    del merges[lone]
    report, lowered = prove(tmp_path, Tokenizer(data))
    assert report.equal, str(report)
    assert any("joins pieces by score, which cannot say the merges" in x.reason for x in lowered.limits)
    # without a space before the text llama.cpp can go by rank instead, and is equal again
    data["normalizer"] = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    report, lowered = prove(tmp_path, Tokenizer(data))
    assert report.equal, str(report)
    assert lowered.keys["tokenizer.ggml.pre"].data == "sarvam-moe"
    assert not any("by score" in x.reason for x in lowered.limits)


def test_no_byte_fallback_is_refused(bpe_model: bytes, tmp_path: Path) -> None:
    data = copy.deepcopy(dict(read(tmp_path, bpe_model).json))
    data["model"]["byte_fallback"] = False
    with pytest.raises(UnsupportedError, match="byte fallback: off"):
        tokenizer_gguf.to_gguf(Tokenizer(data), 1400, "llama")


@pytest.mark.parametrize(
    ("scheme", "split", "said"),
    [
        ("always", False, ["no space before a text that begins with one"]),
        ("first", False, ["no space before a text that begins with one", "before the text only"]),
        ("never", False, []),
        ("always", True, ["no space before a text that begins with one"]),
    ],
)
def test_metaspace(scheme: str, split: bool, said: list[str], bpe_model: bytes, tmp_path: Path) -> None:
    data = copy.deepcopy(dict(read(tmp_path, bpe_model).json))
    data["normalizer"] = None
    data["pre_tokenizer"] = {
        "type": "Metaspace",
        "replacement": "▁",
        "prepend_scheme": scheme,
        "split": split,
    }
    report, lowered = prove(tmp_path, Tokenizer(data))
    assert report.equal, str(report)
    reasons = [x.reason for x in lowered.limits]
    assert len(reasons) == len(said)
    assert all(s in r for s, r in zip(said, reasons, strict=True))


def test_splitting_at_spaces_matters_if_tokens_hold_them(tmp_path: Path) -> None:
    data = copy.deepcopy(dict(read(tmp_path, spm("bpe", split_by_whitespace=False)).json))
    data["normalizer"] = None
    data["pre_tokenizer"] = {
        "type": "Metaspace",
        "replacement": "▁",
        "prepend_scheme": "never",
        "split": True,
    }
    report, lowered = prove(tmp_path, Tokenizer(data))
    assert report.equal, str(report)
    assert any(c.beyond_different for c in report.counts)
    assert any("splits at spaces, llama.cpp does not and may use" in x.reason for x in lowered.limits)


# --- unigram ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("table", ["identity", "nmt_nfkc"])
@pytest.mark.parametrize("collapse", [False, True])
@pytest.mark.parametrize("prefix", [False, True])
def test_unigram(table: str, collapse: bool, prefix: bool, tmp_path: Path) -> None:
    options = {
        "normalization_rule_name": table,
        "remove_extra_whitespaces": collapse,
        "add_dummy_prefix": prefix,
    }
    report, lowered = prove(tmp_path, read(tmp_path, spm("unigram", **options)))
    assert report.equal, str(report)
    assert lowered.keys["tokenizer.ggml.model"].data == "t5"
    assert lowered.keys["tokenizer.ggml.remove_extra_whitespaces"].data is (collapse and prefix)
    assert ("tokenizer.ggml.precompiled_charsmap" in lowered.keys) is (table == "nmt_nfkc")
    assert sum(count for _, count, _ in report.rows()) > 90


def test_unigram_with_byte_fallback_is_a_limit(tmp_path: Path) -> None:
    report, lowered = prove(tmp_path, read(tmp_path, spm("unigram", byte_fallback=True)))
    assert report.equal, str(report)
    assert any("is bytes in the source, the unknown token in llama.cpp" in x.reason for x in lowered.limits)


# --- added tokens ----------------------------------------------------------------------------------------

ADDED: dict[str, tuple[list[tuple[str, str]], str]] = {
    "plain": ([("<tool>", ""), ("<|look|>", ""), ("<sp>", "special"), ("  ", ""), ("\n\n\n", ""), ("    ", "")], ""),
    "one word": ([("zqz", "special")], "takes a word that is the text of a special token, as 'zqz'"),
    "lstrip": ([("<tool>", "lstrip")], "flag lstrip (strip the whitespace before the token) of the added token '<tool>'"),
    "rstrip": ([("<tool>", "rstrip special")], "flag rstrip (strip the whitespace after the token)"),
    "single_word": ([("qwrd", "single_word")], "flag single_word (match whole words only)"),
    "inner": ([("abc", ""), ("xabcx", "normalized")], "the added token 'abc' is found inside 'xabcx'"),
    "rendered": ([("<|start|>", "special"), ("<|message|>", "special")], "llama.cpp parses '<|start|>', '<|message|>' always"),
    "not an end": (
        [("<|end|>", "special"), ("<|return|>", "special"), ("<|call|>", "special")],
        "llama.cpp parses '<|end|>' always",
    ),
    "forced": ([("<|im_end|>", ""), ("<EOT>", "special")], "makes control tokens of '<|im_end|>' because of their text"),
}  # fmt: skip


@pytest.mark.parametrize("case", ADDED)
def test_added_tokens_of_byte_level_bpe(case: str, llama3: Tokenizer, tmp_path: Path) -> None:
    new, said = ADDED[case]
    report, lowered = prove(tmp_path, with_added(llama3, *new))
    assert report.equal, str(report)
    found = [x.reason for x in lowered.limits]
    assert (len(found) == 1 and said in found[0]) if said else found == []
    assert any(c.beyond_different for c in report.counts) is bool(said)


@pytest.mark.parametrize("case", [c for c in ADDED if c != "one word"])
def test_added_tokens_of_sentencepiece_bpe(case: str, bpe_model: bytes, tmp_path: Path) -> None:
    new, said = ADDED[case]
    report, lowered = prove(tmp_path, with_added(read(tmp_path, bpe_model), *new))
    assert report.equal, str(report)
    assert any(said in x.reason for x in lowered.limits) or not said


def test_added_tokens_matched_in_normalized_text(bpe_model: bytes, tmp_path: Path) -> None:
    report, lowered = prove(tmp_path, with_added(read(tmp_path, bpe_model), ("<tool>", "normalized")))
    assert report.equal, str(report)
    assert any(
        "looks for the added token '<tool>' in normalized text (Prepend ▁" in x.reason for x in lowered.limits
    )
    assert any(c.beyond_different for c in report.counts)


def test_overlapping_added_tokens(llama3: Tokenizer, tmp_path: Path) -> None:
    tokenizer = with_added(llama3, ("abc", ""), ("bcdef", ""))
    lowered = tokenizer_gguf.lower(tokenizer, 4200, "llama")
    [limit] = lowered.limits
    assert "as 'abc' and 'bcdef' can" in limit.reason
    assert limit.reaches("abcdef", True)
    assert not limit.reaches("abc bcdef", True)
    fast = reference(tokenizer)
    with loaded(write(tmp_path / "v.gguf", lowered.keys)) as llama:
        assert llama.tokenize("abcdef", special=True) != fast.encode("abcdef", add_special_tokens=False).ids
        assert (
            llama.tokenize("abc bcdef", special=True)
            == fast.encode("abc bcdef", add_special_tokens=False).ids
        )


def test_ordinary_token_with_a_forced_text(bpe_model: bytes, tmp_path: Path) -> None:
    """`</s>` in the vocabulary of a model whose eos is another token: llama.cpp makes it a control token."""
    data = copy.deepcopy(dict(read(tmp_path, bpe_model).json))
    data["added_tokens"] = [t for t in data["added_tokens"] if t["content"] != "</s>"]
    report, lowered = prove(tmp_path, Tokenizer(data, special={"eos": (0,)}))
    assert report.equal, str(report)
    assert any(c.beyond_different for c in report.counts)
    assert any("makes control tokens of '</s>'" in x.reason for x in lowered.limits)
    assert "llama.cpp also stops at '</s>', because of the text" in lowered.notes


# --- rows without a token, special tokens, names ---------------------------------------------------------


def test_rows_without_a_token_are_unused_pads(llama3: Tokenizer, tmp_path: Path) -> None:
    size = len(reference(llama3).get_vocab(with_added_tokens=True))
    lowered = tokenizer_gguf.lower(llama3, size + 3, "llama")
    texts, types = (lowered.keys[f"tokenizer.ggml.{k}"].data for k in ("tokens", "token_type"))
    assert texts[size:] == [f"[PAD{i}]" for i in range(size, size + 3)]  # type: ignore[index]
    assert list(types[size:]) == [5, 5, 5]  # type: ignore[index,arg-type]
    assert (
        "3 embedding rows without a token are named [PAD<id>] and never produced by the tokenizer"
        in lowered.notes
    )
    with loaded(write(tmp_path / "v.gguf", lowered.keys)) as llama:
        assert size not in llama.tokenize(f"[PAD{size}]", special=True)


def test_a_pad_never_takes_the_text_of_a_token(llama3: Tokenizer, tmp_path: Path) -> None:
    size = len(reference(llama3).get_vocab(with_added_tokens=True))
    tokenizer = with_added(llama3, (f"[PAD{size + 1}]", "special"))
    lowered = tokenizer_gguf.lower(tokenizer, size + 2, "llama")
    assert lowered.keys["tokenizer.ggml.tokens"].data[size:] == [f"[PAD{size + 1}]", f"[PAD{size + 1}]_"]  # type: ignore[index]
    with loaded(write(tmp_path / "v.gguf", lowered.keys)):
        pass


def test_more_tokens_than_rows(llama3: Tokenizer) -> None:
    size = len(reference(llama3).get_vocab(with_added_tokens=True))
    with pytest.raises(
        InputError,
        match=rf"has 1 tokens beyond the {size - 1} rows of the embedding, the first is .* with id {size - 1}",
    ):
        tokenizer_gguf.to_gguf(llama3, size - 1, "llama")


def test_bos_and_eos_follow_the_post_processor(llama3: Tokenizer, tmp_path: Path) -> None:
    (bos,), (eos, *_) = llama3.special["bos"], llama3.special["eos"]
    names = {t["id"]: t["content"] for t in llama3.json["added_tokens"]}
    for on in ((True, True), (True, False), (False, True), (False, False)):
        processor = template((bos, names[bos]) if on[0] else None, (eos, names[eos]) if on[1] else None)
        data = {**llama3.json, "post_processor": processor}
        tokenizer = Tokenizer(data, {}, special=llama3.special)
        lowered = tokenizer_gguf.lower(tokenizer, 4200, "llama")
        with loaded(write(tmp_path / "v.gguf", lowered.keys)) as llama:
            assert llama.framed("a b", special=True) == reference(tokenizer).encode("a b").ids
    assert lowered.keys["tokenizer.ggml.add_bos_token"].data is False
    assert "add_bos_token=false is written because llama.cpp would assume the opposite" in lowered.notes


def test_a_config_that_contradicts_the_post_processor_loses(llama3: Tokenizer) -> None:
    tokenizer = Tokenizer(
        llama3.json, {"add_bos_token": False, "add_eos_token": True}, special=llama3.special
    )
    lowered = tokenizer_gguf.lower(tokenizer, 4200, "llama")
    assert (lowered.framing.bos, lowered.framing.eos) == (True, False)
    assert sum("post_processor the opposite, which counts" in n for n in lowered.notes) == 2


def test_a_long_prefix_is_a_limit(llama3: Tokenizer) -> None:
    names = {t["id"]: t["content"] for t in llama3.json["added_tokens"]}
    a, b = sorted(names)[:2]
    marks = [{"SpecialToken": {"id": names[i], "type_id": 0}} for i in (a, b)]
    processor = {"type": "TemplateProcessing", "single": [*marks, {"Sequence": {"id": "A", "type_id": 0}}]}
    lowered = tokenizer_gguf.lower(
        Tokenizer({**llama3.json, "post_processor": processor}, {}, special=llama3.special), 4200, "llama"
    )
    assert any(f"begins every text with {names[a]} {names[b]}" in x.reason for x in lowered.limits)
    assert not any(x.reaches("text", True) for x in lowered.limits)
    assert lowered.keys["tokenizer.ggml.add_bos_token"].data is False


def test_every_end_token_of_the_source_ends_generation(llama3: Tokenizer, tmp_path: Path) -> None:
    tokenizer = with_added(llama3, ("<stop1>", "special"), ("<stop2>", "special"))
    ids = {t["content"]: t["id"] for t in tokenizer.json["added_tokens"]}
    stops = (llama3.special["eos"][0], ids["<stop1>"])
    lowered = tokenizer_gguf.lower(
        Tokenizer(tokenizer.json, special={**llama3.special, "eos": stops}), 4200, "llama"
    )
    assert lowered.keys["tokenizer.ggml.eom_token_id"].data == ids["<stop1>"]
    with loaded(write(tmp_path / "v.gguf", lowered.keys)) as llama:
        assert all(map(llama.ends_generation, stops))
        assert not llama.ends_generation(ids["<stop2>"])


def test_phi3_names(llama3: Tokenizer, bpe_model: bytes, tmp_path: Path) -> None:
    """A model named phi-3 strips whitespace after special tokens, and does not load without `</s>`."""
    plain = tokenizer_gguf.lower(llama3, 4200, "phi3")
    name, note = tokenizer_gguf.general_name("wiki-Phi3-mini", plain.name_rule)
    assert (name, plain.name_rule) == ("wiki-Phi 3-mini", "not phi-3")
    assert note.startswith("general.name is 'wiki-Phi 3-mini' instead of 'wiki-Phi3-mini'")
    with (
        pytest.raises(AssertionError, match="does not load"),
        loaded(write(tmp_path / "a.gguf", plain.keys, "wiki-phi3")),
    ):
        pass
    with loaded(write(tmp_path / "b.gguf", plain.keys, name)):
        pass

    tokenizer = with_added(
        read(tmp_path, bpe_model), ("<|endoftext|>", "special"), ("<|assistant|>", "special rstrip")
    )
    for token in tokenizer.json["added_tokens"]:
        token["rstrip"] = token["content"] not in ("<unk>", "<s>", "<|endoftext|>")
    lowered = tokenizer_gguf.lower(tokenizer, 1500, "phi3")
    assert lowered.name_rule == "phi-3"
    name, note = tokenizer_gguf.general_name("mini", lowered.name_rule)
    assert name == "mini (phi-3)" and note
    assert tokenizer_gguf.general_name("Phi-3 mini", lowered.name_rule) == ("Phi-3 mini", "")
    report, _ = prove(tmp_path, tokenizer, "phi3", name)
    assert report.equal, str(report)


def test_chat_templates(llama3: Tokenizer) -> None:
    tokenizer = Tokenizer(
        llama3.json, chat_template="d", extra_templates={"tool use": "t", "rag": "r"}, special=llama3.special
    )
    keys, _ = tokenizer_gguf.to_gguf(tokenizer, 4200, "llama")
    found = {k: v.data for k, v in keys.items() if "chat_template" in k}
    assert found == {
        "tokenizer.chat_template.rag": "r",
        "tokenizer.chat_template.tool_use": "t",
        "tokenizer.chat_templates": ["rag", "tool_use"],
        "tokenizer.chat_template": "d",
    }
    clash = Tokenizer(llama3.json, extra_templates={"a b": "", "a-b": ""})
    with pytest.raises(InputError, match="two chat templates would be named 'a_b'"):
        tokenizer_gguf.to_gguf(clash, 4200, "llama")


@pytest.mark.parametrize("name", ["wiki-llama-12m", "stories260K"])
def test_trained_models(name: str, shared: Path, tmp_path: Path) -> None:
    tokenizer = read_tokenizer(shared / "models" / name)
    assert tokenizer is not None
    report, _ = prove(tmp_path, tokenizer)
    assert report.equal, str(report)
    texts = list(corpus.texts(corpus.added_texts(tokenizer.json)))
    assert token_proof.autotokenizer_differs(shared / "models" / name, texts) is None


# --- llama.cpp's own converter ---------------------------------------------------------------------------


def upstream_keys(source: Path, out: Path) -> dict[str, Any]:
    reason = upstream.converter_available()
    if reason is not None:
        pytest.skip(reason)
    upstream.convert(source, out, extra=["--vocab-only"])
    return {k: v for k, v in gguf.read(out).metadata.items() if k.startswith("tokenizer.")}


@pytest.mark.parametrize("name", ["wiki-llama-12m", "stories260K", "wiki-gemma3"])
def test_keys_are_upstreams(name: str, shared: Path, tmp_path: Path) -> None:
    """Same keys in the same order with the same bytes."""
    source = shared / "models" / name
    config = json.loads((source / "config.json").read_text())
    tokenizer = read_tokenizer(source)
    assert tokenizer is not None
    keys, _ = tokenizer_gguf.to_gguf(tokenizer, config["vocab_size"], config["model_type"])
    theirs = upstream_keys(source, tmp_path / "u.gguf")
    assert list(keys) == list(theirs)
    assert keys == theirs


def test_keys_of_a_sentencepiece_model_are_upstreams(bpe_model: bytes, tmp_path: Path) -> None:
    """But for user-defined pieces, whose types and scores upstream takes for those of ordinary ones."""
    extra = {
        str(i): {"content": t, "special": s, "normalized": False}
        for i, t, s in ((1, "<s>", True), (1400, "<x>", False))
    }
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 1408, "hidden_size": 64,
        "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64, "max_position_embeddings": 64,
        "rms_norm_eps": 1e-5, "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    tokenizer = read(tmp_path, bpe_model, added_tokens_decoder=extra, add_bos_token=True, add_eos_token=False)
    keys, _ = tokenizer_gguf.to_gguf(tokenizer, 1408, "llama")
    theirs = upstream_keys(tmp_path, tmp_path / "u.gguf")
    own = {"<|user|>", "zz"}
    texts = list(theirs["tokenizer.ggml.tokens"].data)
    for name, value in theirs.items():
        mine = keys[name]
        if name in ("tokenizer.ggml.token_type", "tokenizer.ggml.scores"):
            differ = {texts[i] for i, (a, b) in enumerate(zip(value.data, mine.data, strict=True)) if a != b}
            assert differ <= own | {"<unk>"}, name
        else:
            assert mine == value, name


def test_detokenizing_is_a_note(llama3: Tokenizer) -> None:
    tokenizer = Tokenizer(llama3.json, {"clean_up_tokenization_spaces": False}, special=llama3.special)
    said = "llama_detokenize drops spaces before punctuation for 'llama-bpe'; the source does the opposite"
    assert said in tokenizer_gguf.lower(tokenizer, 4200, "llama").notes
    assert not any("llama_detokenize" in n for n in tokenizer_gguf.lower(llama3, 4200, "llama").notes)


def test_two_rows_of_one_text(bpe_model: bytes, tmp_path: Path) -> None:
    tokenizer = read(tmp_path, spm("bpe", add_dummy_prefix=False))
    clash = with_added(tokenizer, ("▁ x", "normalized"), ("  x", ""))
    with pytest.raises(InputError, match=r"two tokens would have the text '  x', which llama.cpp refuses"):
        tokenizer_gguf.to_gguf(clash, 1500, "llama")
