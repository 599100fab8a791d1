"""The oracle driver itself: upstream's converter and quantizer run, and say so when they do not."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest

from lconvert.converters.gguf_mixture import Options, TensorInfo, choose_types, hyper_from_metadata
from lconvert.formats import gguf as container

from . import upstream

MODEL = upstream.SHARED / "models" / "wiki-llama-12m"


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    reason = upstream.available()
    if reason is None and not MODEL.is_dir():
        reason = f"{MODEL.name} is not among the shared models"
    if reason is not None:
        pytest.skip(reason)
    return upstream.convert(MODEL, tmp_path_factory.mktemp("upstream") / "model.gguf", "bf16", pre="gpt-2")


def test_convert(converted: Path) -> None:
    reader = gguf.GGUFReader(converted)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    assert fields["general.architecture"] == "llama"
    assert fields["tokenizer.ggml.pre"] == "gpt-2"
    kinds = {t.name: t.tensor_type.name for t in reader.tensors}
    assert kinds["blk.0.attn_q.weight"] == "BF16"
    assert kinds["blk.0.attn_norm.weight"] == "F32"


def test_quantize(converted: Path, tmp_path: Path) -> None:
    """Q4_K_M of a real model: dry run, written file and our rules agree."""
    out = upstream.quantize(converted, tmp_path / "q4.gguf", "Q4_K_M", nthread=2)
    written = {t.name: t.tensor_type.name for t in gguf.GGUFReader(out).tensors}
    assert list(written.items()) == list(upstream.plan(converted, "Q4_K_M").items())
    source = container.read(converted)
    tensors = [TensorInfo(t.name, t.shape, t.type) for t in source.tensors.values()]
    ours = choose_types(tensors, hyper_from_metadata(source.metadata), Options("Q4_K_M"))
    assert {name: choice.type for name, choice in ours.items()} == written
    assert "Q6_K" in written.values() and "Q4_K" in written.values()


def test_quantize_with_imatrix_changes_bytes(converted: Path, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    tensors = gguf.GGUFReader(converted).tensors
    imatrix = {t.name: rng.random(int(t.shape[0]), dtype=np.float32) + 0.1 for t in tensors}
    only = {
        "tensor_types": ((r"blk\.[1-9]", "F16"),),
        "output_tensor_type": "F16",
        "token_embedding_type": "F16",
    }
    plain = upstream.quantize(converted, tmp_path / "plain.gguf", "Q4_0", **only)
    weighted = upstream.quantize(converted, tmp_path / "weighted.gguf", "Q4_0", imatrix=imatrix, **only)
    names = [t.name for t in gguf.GGUFReader(plain).tensors if t.tensor_type.name == "Q4_0"]
    assert names
    data = [{t.name: t.data for t in gguf.GGUFReader(p).tensors} for p in (plain, weighted)]
    assert not any(np.array_equal(data[0][n], data[1][n]) for n in names)


def test_failures_are_told(converted: Path, tmp_path: Path) -> None:
    with pytest.raises(upstream.UpstreamError, match="requires an imatrix"):
        upstream.quantize(converted, tmp_path / "out.gguf", "IQ2_XXS")
    (tmp_path / "config.json").write_text('{"architectures": ["NoSuchModel"]}')
    with pytest.raises(upstream.UpstreamError, match="NoSuchModel is not supported"):
        upstream.convert(tmp_path, tmp_path / "out.gguf")


def test_missing_sources(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("LCONVERT_LLAMACPP_SRC", str(tmp_path))
    assert upstream.converter_available() == (
        "convert_hf_to_gguf.py of llama.cpp not found (set LCONVERT_LLAMACPP_SRC)"
    )
