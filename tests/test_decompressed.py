"""Folders of compressed-tensors in transformers in fp32: the logits are those of the numbers that the folder holds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import lconvert
from lconvert.converters import targets
from lconvert.executor import execute
from lconvert.forward import Forward
from tests import case_models
from tests.conftest import DEMO

torch = pytest.importorskip("torch", reason="torch is not installed")
transformers = pytest.importorskip("transformers", reason="transformers is not installed")
pytest.importorskip("compressed_tensors", reason="compressed_tensors is not installed")

from lconvert.validators.runtimes import decompressed, hf

IDS = [1, 5, 9, 200, 31, 7, 64, 2, 90, 17]


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """In bfloat16, as models are published: scales are stored in that too."""
    root, out = tmp_path_factory.mktemp("sources"), {}
    for name, folder in {"dense": DEMO, "experts": case_models.folder("mixtral-experts")}.items():
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
        model.save_pretrained(root / name)
        out[name] = root / name
    return out


def written(source: Path, preset: str, out: Path, **options: Any) -> Path:
    model = lconvert.read(source)
    made = targets.recipe(preset, targets.VLLM, **options).apply(model)
    target = targets.for_vllm(targets.VLLM[preset].format)
    execute(targets.plan(made, target, out.name, original=model), out)
    return out


def logits(runtime: Any) -> np.ndarray[Any, Any]:
    try:
        return np.asarray(runtime.logits(IDS))
    finally:
        runtime.close()


@pytest.mark.parametrize("kind", ["dense", "experts"])
@pytest.mark.parametrize("preset", ["w4a16", "w4a16-asym", "w8a16", "nvfp4a16", "mxfp4"])
def test_weights_alone_lose_nothing(sources: dict[str, Path], kind: str, preset: str, tmp_path: Path) -> None:
    options = {"group": 32} if preset.startswith("w4") else {}
    out = written(sources[kind], preset, tmp_path / "out", **options)
    found, own = logits(hf.Transformers(out)), logits(hf.Dequantized(out))
    assert np.abs(found - own).max() <= 1e-6 * np.abs(own).max()


@pytest.mark.parametrize("preset", ["w8a8", "fp8", "fp8-block"])
def test_experts_hold_the_numbers_of_the_folder_where_inputs_are_quantized(
    sources: dict[str, Path], preset: str, tmp_path: Path
) -> None:
    out = written(sources["experts"], preset, tmp_path / "out")
    forward, found = Forward(lconvert.read(out)), hf.Transformers(out)
    experts = [(n, p) for n, p in found._model.named_parameters() if ".experts." in n]
    assert experts
    for name, parameter in experts:
        assert torch.equal(parameter, forward.load(name, tuple(parameter.shape))), name
    assert np.isfinite(logits(found)).all()


def test_another_dtype_is_computed_in_when_it_is_asked_for(sources: dict[str, Path], tmp_path: Path) -> None:
    out = written(sources["dense"], "nvfp4a16", tmp_path / "out")
    for dtype in ("float16", "bfloat16"):
        runtime = hf.Transformers(out, dtype=dtype)
        assert runtime.info()["dtype"] == dtype
        assert np.isfinite(logits(runtime)).all()


def test_the_packages_are_as_they_were_afterwards(sources: dict[str, Path], tmp_path: Path) -> None:
    from compressed_tensors.compressors.nvfp4 import base
    from transformers.integrations.compressed_tensors import CompressedTensorsDequantize

    before = base.unpack_fp4_from_uint8, vars(CompressedTensorsDequantize)["convert"]

    def fail() -> None:
        assert base.unpack_fp4_from_uint8 is not before[0]
        raise ValueError

    with pytest.raises(ValueError):
        decompressed.loaded(fail)
    assert before == (base.unpack_fp4_from_uint8, vars(CompressedTensorsDequantize)["convert"])


def test_other_folders_are_loaded_as_ever(tmp_path: Path) -> None:
    assert not decompressed.concerns(DEMO) and not decompressed.concerns(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": {"quant_method": "gptq"}}))
    assert not decompressed.concerns(tmp_path)
