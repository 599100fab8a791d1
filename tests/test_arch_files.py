"""Checkpoints and GGUF files as others write them: older tensor names, buffers, and metadata left to defaults."""

from __future__ import annotations

import dataclasses
import importlib
from pathlib import Path

import numpy as np
import pytest

import lconvert
from lconvert.archs import find
from lconvert.errors import InputError, UnsupportedError
from lconvert.ir import Model, Tensor
from tests import arch_cases
from tests.arch_cases import Case
from tests.arch_cases.gemma2 import GEMMA

for package in ("llama_cpp", "torch", "transformers"):
    pytest.importorskip(package, reason=f"{package} is not installed")
import safetensors.torch
import torch

from tests import random_models
from tests.built_models import Built

CASES = {c.name: c for c in arch_cases.load()}


def respell(folder: Path, rename: dict[str, str], extra: dict[str, torch.Tensor] | None = None) -> None:
    """Replace prefixes of tensor names in the checkpoint, and add tensors."""
    path = folder / "model.safetensors"
    tensors = safetensors.torch.load_file(path)
    for old, new in rename.items():
        tensors = {new + k.removeprefix(old) if k.startswith(old) else k: v for k, v in tensors.items()}
    safetensors.torch.save_file(tensors | (extra or {}), path, metadata={"format": "pt"})


def bits(model: Model) -> dict[str, bytes]:
    out = {}
    for name, entry in model.entries.items():
        assert isinstance(entry.data, Tensor)
        out[name] = entry.data.load().tobytes()
    return out


@pytest.mark.parametrize(
    ("name", "rename"),
    [("gpt2-tied", {"transformer.": ""}), ("gpt_neox-sequential", {"embed_out.": "lm_head."})],
)
def test_other_spelling(name: str, rename: dict[str, str], tmp_path: Path) -> None:
    folder = random_models.build(CASES[name], tmp_path)
    want = bits(lconvert.read(folder))
    respell(folder, rename)
    assert bits(lconvert.read(folder)) == want


@pytest.mark.parametrize(
    ("name", "buffer"),
    [
        ("gpt2-tied", "transformer.h.1.attn.bias"),
        ("gpt2-tied", "h.0.attn.masked_bias"),
        ("gpt_neox-sequential", "gpt_neox.layers.0.attention.rotary_emb.inv_freq"),
        ("falcon-7b", "transformer.h.0.self_attention.rotary_emb.inv_freq"),
        ("llama-gqa", "model.layers.0.self_attn.rotary_emb.inv_freq"),
        ("deepseek_v3-groups", "model.layers.0.self_attn.rotary_emb.inv_freq"),
    ],
)
def test_derived_buffers_are_listed_as_inert(name: str, buffer: str, tmp_path: Path) -> None:
    folder = random_models.build(CASES[name], tmp_path)
    respell(folder, {}, {buffer: torch.ones(1)})
    assert f"inert tensor: {buffer}" in lconvert.read(folder).report


@pytest.mark.parametrize("name", ["falcon-7b", "gpt2-tied", "starcoder2-plain"])
def test_stored_tied_head(name: str, tmp_path: Path) -> None:
    """A head stored beside a tied embedding is fine if it is the embedding, and an error if it is not."""
    folder = random_models.build(CASES[name], tmp_path)
    stored = safetensors.torch.load_file(folder / "model.safetensors")
    embed = next(
        v for k, v in stored.items() if k.endswith(("embed_tokens.weight", "embeddings.weight", "wte.weight"))
    )
    respell(folder, {}, {"lm_head.weight": embed.clone()})
    assert any("lm_head.weight (tied" in line for line in lconvert.read(folder).report)
    respell(folder, {}, {"lm_head.weight": embed + 1})
    with pytest.raises(InputError, match="differs from the embedding although tie_word_embeddings is true"):
        lconvert.read(folder)


def test_unknown_bias_is_refused(tmp_path: Path) -> None:
    folder = random_models.build(CASES["phi3-plain"], tmp_path)
    respell(folder, {}, {"model.layers.0.self_attn.qkv_proj.bias": torch.ones(512)})
    with pytest.raises(UnsupportedError, match=r"unknown tensor model\.layers\.0\.self_attn\.qkv_proj\.bias"):
        lconvert.read(folder)


#: Keys that upstream's converter leaves out, because llama.cpp's default is the model's value.
_GEMMA3 = Case("upstream", "gemma3_text", GEMMA | {"num_hidden_layers": 7}, tokens=100)
LEFT_OUT = {
    "gemma2-alternating": ("attention.sliding_window_pattern", "rope.freq_base", "rope.dimension_count"),
    "gemma3_text-upstream": (
        "attention.sliding_window_pattern",
        "rope.freq_base_swa",
        "rope.dimension_count",
    ),
    "falcon-40b": (
        "rope.freq_base",
        "rope.dimension_count",
        "attention.key_length",
        "attention.value_length",
    ),
    "gpt_neox-sequential": ("rope.freq_base", "attention.head_count_kv", "attention.key_length"),
    "gpt2-tied": ("attention.head_count_kv", "attention.key_length", "attention.value_length"),
    "starcoder2-plain": ("rope.dimension_count", "attention.key_length", "attention.value_length"),
    "deepseek_v2-yarn": (
        "expert_gating_func",
        "expert_group_count",
        "expert_group_used_count",
        "expert_weights_scale",
        "rope.freq_base",
        "rope.scaling.yarn_beta_fast",
        "rope.scaling.yarn_beta_slow",
    ),
    "gpt_oss-experts": ("attention.sliding_window_pattern", "rope.dimension_count"),
    "phi3-short": ("rope.scaling.type", "attention.key_length", "attention.value_length"),
}


@pytest.mark.parametrize("name", LEFT_OUT)
def test_defaults_of_the_graph(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file without these keys is the same to llama.cpp, and is read back as the same model."""
    case = _GEMMA3 if name == _GEMMA3.name else CASES[name]
    b = Built(case, tmp_path)
    arch = find(case.model_type)
    short = dataclasses.replace(arch.gguf, keys=lambda d: arch.gguf.keys(d) | dict.fromkeys(LEFT_OUT[name]))
    with monkeypatch.context() as m:
        module = importlib.import_module(f"lconvert.archs.{case.model_type}")
        m.setattr(module, "ARCH", dataclasses.replace(arch, gguf=short))
        lconvert.convert(b.model, tmp_path / "short.gguf", ftype="F32", allow_loss=case.losses)
    assert np.array_equal(b.in_llama_cpp(case, tmp_path / "short.gguf"), b.full(case))
    back = lconvert.read(tmp_path / "short.gguf").arch
    full = lconvert.read(b.gguf).arch
    assert back == full
    assert dataclasses.replace(full, norm_offset=b.model.arch.norm_offset) == b.model.arch
