"""The proof on the runtime: one grid in several containers gives the very same log-probabilities in vLLM.

Scales have all bits of an fp16 mantissa in use, so that a container whose scales a runtime would round to the model's dtype
differs; the model's dtype is the same for all. transformers loads every compressed-tensors folder, llama.cpp the repacked GGUF.
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

import lconvert
from lconvert.converters import targets
from lconvert.converters.kinds import with_full_scales
from lconvert.executor import execute
from lconvert.forward import Forward
from lconvert.ir import Model
from lconvert.passes import activations, kv, rtn
from lconvert.plan import refusals
from lconvert.validators.logits import log_softmax
from lconvert.validators.runtimes import open_runtime
from lconvert.validators.runtimes.remote import workers
from tests.conftest import DEMO, ROOT

PYTHON = Path(os.environ.get("LCONVERT_VLLM_PYTHON") or ROOT / ".venv-vllm" / "bin" / "python")
pytestmark = pytest.mark.skipif(
    not PYTHON.exists(), reason="the vLLM environment is missing: LCONVERT_VLLM_PYTHON, .venv-vllm"
)
IDS = [int(i) for i in np.random.default_rng(1).integers(0, 2000, 64)]


@pytest.fixture(autouse=True, scope="module")
def one_worker() -> Iterator[None]:
    with workers():
        yield


def written(model: Model, target: str, folder: Path) -> Path:
    plan = targets.plan(model, target, folder.name)
    assert not refusals(plan), refusals(plan)
    execute(plan, folder)
    return folder


def served(folder: Path) -> tuple[np.ndarray, dict[str, str]]:
    runtime = open_runtime("vllm", folder, context=len(IDS), threads=1, python=PYTHON)
    try:
        return runtime.logits(IDS), runtime.info()
    finally:
        runtime.close()


def rounded(grid: str, group: int | str = 32) -> Model:
    return rtn.run(lconvert.read(DEMO), rtn.Options(grid=grid, group=group))


def divergence(model: Model, logits: np.ndarray) -> float:
    """Mean KL divergence of the runtime from the dequantized model in fp32."""
    a, b = log_softmax(Forward(model).logits(IDS)), log_softmax(logits)
    return float((np.exp(a) * (a - b)).sum(-1).mean())


@pytest.mark.parametrize(
    ("grid", "containers"),
    [("int4", ("vllm", "gptq", "gptq_v2", "awq")), ("uint4", ("vllm", "awq"))],
)
def test_one_grid_in_every_container_is_bit_identical(
    grid: str, containers: tuple[str, ...], tmp_path: Path
) -> None:
    """Also through a second conversion: what was written as GPTQ is carried on to compressed-tensors."""
    model = with_full_scales(rounded(grid))
    found = {t: served(written(model, t, tmp_path / t)) for t in containers}
    first = containers[-1]
    found["again"] = served(written(lconvert.read(tmp_path / first), "vllm", tmp_path / "again"))
    want, info = found["vllm"]
    assert info["dtype"] == "float16", "scales with a full fp16 mantissa live in a float16 model"
    for name, (logits, told) in found.items():
        assert told["dtype"] == "float16" and told["quantization"] != "none", name
        assert np.array_equal(logits, want), f"{name}: {np.abs(logits - want).max()}"
    assert divergence(model, want) < 1e-4


def test_a_runtime_that_rounds_scales_is_seen(tmp_path: Path) -> None:
    """The same folder with bfloat16 in its config: vLLM rounds the scales, and the log-probabilities differ."""
    model = with_full_scales(rounded("int4"))
    folder = written(model, "vllm", tmp_path / "m")
    exact = divergence(model, served(folder)[0])
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"dtype": "bfloat16"}))
    assert divergence(model, served(folder)[0]) > 5 * exact


@pytest.mark.parametrize(
    ("name", "limit"),
    [("w8a8", 0.02), ("fp8", 0.05), ("fp8 cache", 0.02)],
)
def test_quantized_activations_and_cache_stay_near(name: str, limit: float, tmp_path: Path) -> None:
    if name == "fp8 cache":
        model = kv.run(
            lconvert.read(DEMO), kv.Options(text=str(ROOT / "validators" / "text" / "excerpt.txt"), windows=2)
        )
    else:
        grid = "int8" if name == "w8a8" else "fp8"
        model = activations.run(rounded(grid, -1), activations.Options(grid))
    logits, info = served(written(model, "vllm", tmp_path / "m"))
    assert 0 < divergence(model, logits) < limit
    if name == "fp8 cache":
        assert "fp8" in info["kv_cache"]


_LOAD = """
import json, sys
import torch
from transformers import AutoModelForCausalLM
ids = json.loads(sys.argv[1])
for folder in sys.argv[2:]:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0].float()
    print(json.dumps({"folder": folder, "logits": logits[-1].tolist()}), flush=True)
"""


def test_transformers_loads_every_compressed_tensors_folder(tmp_path: Path) -> None:
    """Weight-only schemes, whose widths fill words, run there; the last position's logits are those of our own reading."""
    models = {
        "w4": with_full_scales(rounded("int4")),
        "w4-asym": rounded("uint4"),
        "w8": rounded("int8", -1),
        "w8a8": activations.run(rounded("int8", -1), activations.Options("int8")),
        "fp8": activations.run(rounded("fp8", -1), activations.Options("fp8")),
    }
    folders = {n: written(m, "compressed-tensors", tmp_path / n) for n, m in models.items()}
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "TORCHDYNAMO_DISABLE": "1"}
    environment.pop("PYTHONPATH", None)
    command = [str(PYTHON), "-c", _LOAD, json.dumps(IDS), *map(str, folders.values())]
    out = subprocess.run(
        command, check=False, capture_output=True, text=True, timeout=600, env=environment, cwd=tmp_path
    )
    assert out.returncode == 0, out.stderr[-2000:]
    lines = [json.loads(line) for line in out.stdout.splitlines() if line.startswith("{")]
    assert len(lines) == len(models)
    for line in lines:
        name = Path(line["folder"]).name
        a = log_softmax(Forward(models[name]).logits(IDS)[-1:])
        b = log_softmax(np.asarray([line["logits"]], np.float32))
        kld = float((np.exp(a) * (a - b)).sum())
        assert kld < (1e-6 if name in ("w4", "w4-asym", "w8") else 0.05), (name, kld)


def test_repacked_gguf_runs_in_llama_cpp(tmp_path: Path) -> None:
    pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
    model = with_full_scales(rounded("int4"))
    gptq = written(model, "gptq", tmp_path / "gptq")
    plan = targets.plan(lconvert.read(gptq), "gguf", "m.gguf")
    assert {i.type for i in plan.items() if i.name.startswith("blk") and len(i.shape) == 2} == {"Q4_0"}
    execute(plan, tmp_path)
    runtime = open_runtime("llama.cpp", tmp_path / "m.gguf", context=len(IDS), threads=1)
    try:
        assert divergence(model, runtime.logits(IDS)) < 0.01
    finally:
        runtime.close()


def test_nvfp4_in_both_conventions_through_vllm_s_emulation(tmp_path: Path) -> None:
    """A divisor in compressed-tensors, a multiplier in ModelOpt: the same log-probabilities, and near the dequantized model."""
    text = str(ROOT / "validators" / "text" / "excerpt.txt")
    model = activations.run(rounded("fp4", 16), activations.Options("fp4", text=text, windows=2))
    first, info = served(written(model, "vllm", tmp_path / "a"))
    second, other = served(written(model, "modelopt", tmp_path / "b"))
    assert info["quantization"] == "compressed-tensors" and "modelopt" in other["quantization"]
    assert "emulated" in info["execution"]
    assert np.array_equal(first, second)
    assert divergence(model, first) < 0.2, "activations of 4 bits: a check of the loader against gross errors"
