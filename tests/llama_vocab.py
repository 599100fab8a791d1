"""The oracle for tokenizers: llama.cpp, through the installed llama_cpp, on a file that holds a vocabulary only."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from lconvert.converters import tokenizer_gguf
from lconvert.converters.tokenizer_hf import check_json
from lconvert.formats import gguf
from lconvert.formats.gguf_values import Value
from lconvert.ir import Tokenizer
from lconvert.validators import tokens

REPO = Path(__file__).resolve().parents[1]

#: What llama.cpp wants to know about a llama before it reads the vocabulary.
_HEADER: Mapping[str, Value] = {
    "general.architecture": gguf.string("llama"),
    "llama.context_length": gguf.u32(512),
    "llama.embedding_length": gguf.u32(64),
    "llama.block_count": gguf.u32(1),
    "llama.feed_forward_length": gguf.u32(64),
    "llama.attention.head_count": gguf.u32(2),
    "llama.attention.layer_norm_rms_epsilon": gguf.f32(1e-5),
    "llama.rope.dimension_count": gguf.u32(32),
}


def vocab_folder() -> Path:
    """llama.cpp's folder of vocabularies (ggml-vocab-*.gguf with .inp and .out)."""
    named = os.environ.get("LCONVERT_LLAMACPP_SRC")
    for source in (Path(named) if named else None, REPO / ".venv" / "share" / "llama.cpp"):
        if source is not None and (source / "models" / "ggml-vocab-gpt-2.gguf").exists():
            return source / "models"
    pytest.skip("llama.cpp's sources are missing: set LCONVERT_LLAMACPP_SRC to vendor/llama.cpp of the sdist")


#: Callbacks that llama.cpp may call until the process ends.
_KEPT: list[Any] = []


@dataclass(frozen=True)
class LlamaVocab:
    """`tokenize` adds nothing; `framed` adds what llama.cpp adds to every text by itself."""

    tokenize: tokens.Tokenize
    framed: tokens.Tokenize
    ends_generation: Callable[[int], bool]


def write(path: Path, keys: Mapping[str, Value], name: str = "test") -> Path:
    """A GGUF file of these tokenizer keys and no tensors."""
    head, _, _ = gguf.header({**_HEADER, "general.name": gguf.string(name), **keys}, [])
    path.write_bytes(head)
    return path


@contextmanager
def loaded(path: Path) -> Iterator[LlamaVocab]:
    llama_cpp = pytest.importorskip("llama_cpp")
    _KEPT.append(llama_cpp.llama_log_callback(lambda level, text, data: None))
    llama_cpp.llama_log_set(_KEPT[-1], None)
    llama_cpp.llama_backend_init()
    params = llama_cpp.llama_model_default_params()
    params.vocab_only = True
    model = llama_cpp.llama_model_load_from_file(str(path).encode(), params)
    assert model, f"llama.cpp does not load {path}"
    vocab = llama_cpp.llama_model_get_vocab(model)

    def tokenizer(framed: bool) -> tokens.Tokenize:
        def tokenize(text: str, *, special: bool) -> list[int]:
            raw = text.encode()
            room = len(raw) + 16
            ids = (llama_cpp.llama_token * room)()
            n = llama_cpp.llama_tokenize(vocab, raw, len(raw), ids, room, framed, special)
            assert n >= 0
            return list(ids[:n])

        return tokenize

    try:
        yield LlamaVocab(
            tokenizer(False), tokenizer(True), lambda i: bool(llama_cpp.llama_vocab_is_eog(vocab, i))
        )
    finally:
        llama_cpp.llama_model_free(model)


def reference(tokenizer: Tokenizer) -> Any:
    tokenizers = pytest.importorskip("tokenizers")
    return tokenizers.Tokenizer.from_str(json.dumps(tokenizer.json))


def prove(
    tmp_path: Path, tokenizer: Tokenizer, model_type: str = "llama", name: str = "test"
) -> tuple[tokens.TokenReport, tokenizer_gguf.Lowered]:
    """Lowers, writes, loads with llama.cpp, compares: ids on the corpus, and what is put around every text."""
    check_json(tokenizer.json, "test")
    rows = len(reference(tokenizer).get_vocab(with_added_tokens=True))
    lowered = tokenizer_gguf.lower(tokenizer, rows, model_type)
    fast = reference(tokenizer)
    with loaded(write(tmp_path / "vocab.gguf", lowered.keys, name)) as llama:
        report = tokens.compare(tokenizer, fast, llama.tokenize)
        frame = [llama.framed(t, special=True) for t in ("a", "word")]
    if not any("tokenizer_config" in n or "every text" in n for n in lowered.notes):
        assert frame == [fast.encode(t).ids for t in ("a", "word")]
    return report, lowered
