"""vLLM's own config classes on folders that peers wrote: the CPU build that is installed, and the CUDA wheel, which imports
without a GPU. `make test` unpacks it beside the environment of vLLM."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

import lconvert
from lconvert.converters import targets
from lconvert.errors import OptionError
from lconvert.executor import execute
from lconvert.validators import vllm_config
from lconvert.validators.runtimes import config
from tests.conftest import ROOT

PEERS = ROOT / "tests" / "fixtures" / "peers"
PYTHON = Path(os.environ.get("LCONVERT_VLLM_PYTHON") or ROOT / ".venv-vllm" / "bin" / "python")
WHEEL = Path(os.environ.get("LCONVERT_VLLM_WHEEL") or ROOT / ".venv-vllm" / "cuda-wheel")
pytestmark = pytest.mark.skipif(
    not PYTHON.exists(), reason="the vLLM environment is missing: LCONVERT_VLLM_PYTHON, .venv-vllm"
)
has_wheel = pytest.mark.skipif(
    not WHEEL.is_dir(),
    reason="vLLM's CUDA wheel is not unpacked: LCONVERT_VLLM_WHEEL, .venv-vllm/cuda-wheel",
)

#: What the CUDA build says of folders that peers wrote: the method it resolves, and a part of its refusal, "" for none.
CUDA = {
    "gptqmodel-gptq-4-g32": ("auto_gptq", ""),
    "gptqmodel-gptq-4-g32-asym": ("auto_gptq", "sym=False"),
    "autoround-awq-4-g32": ("auto_awq", ""),
    "llmcompressor-w4afp8-g32": ("compressed-tensors", "No compressed-tensors compatible scheme"),
    "modelopt-mixed": ("modelopt_mixed", ""),
    "modelopt-int8-sq": ("modelopt", "ModelOpt currently only supports"),
}


@has_wheel
def test_the_cuda_build_without_a_gpu() -> None:
    for name, (method, refusal) in CUDA.items():
        found = vllm_config.ask(str(PYTHON), PEERS / name, WHEEL)
        assert found.get("version", "").startswith("0.33"), (name, found)
        assert found["method"] == method, (name, found)
        said = " ".join(found["refused"])
        assert bool(said) == bool(refusal) and refusal in said, (name, found)


def test_vllm_is_missing_in_an_interpreter() -> None:
    found = vllm_config.ask(sys.executable, PEERS / "autoround-awq-4-g32", None)
    assert found == {"missing": "ModuleNotFoundError: No module named 'vllm'"}
    assert "nowhere/python" in vllm_config.ask("/nowhere/python", PEERS, None)["missing"]


def test_the_gate_of_a_proof(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder that we write passes; the same with a config that vLLM refuses fails, and says in whose words."""
    wheel = f"wheel = {str(WHEEL)!r}\n" if WHEEL.is_dir() else ""
    (tmp_path / "lconvert.toml").write_text(f"[runtimes.vllm]\npython = {str(PYTHON)!r}\n{wheel}")
    monkeypatch.setenv(config.VARIABLE, str(tmp_path / "lconvert.toml"))
    source, folder = PEERS / "gptqmodel-gptq-4-g32", tmp_path / "model"
    model = lconvert.read(source)
    execute(targets.plan(model, "gptq", folder.name), folder)
    builds = ["config class of vLLM", "config class of vLLM (cuda-wheel)"][: 2 if WHEEL.is_dir() else 1]

    def verdicts() -> dict[str, bool | None]:
        report = lconvert.validate(source, folder, tiers=("structure",))
        return {c.name: c.passed for c in report.checks if c.name.startswith("config class of vLLM")}

    monkeypatch.chdir(tmp_path)
    if WHEEL.is_dir() and WHEEL.name != "cuda-wheel":
        builds[1] = f"config class of vLLM ({WHEEL.name})"
    assert verdicts() == dict.fromkeys(builds, True)
    for name in ("config.json", "quantize_config.json"):
        path = folder / name
        path.write_text(path.read_text().replace('"sym": true', '"sym": false'))
    assert verdicts() == dict.fromkeys(builds, False)


def test_the_key_of_lconvert_toml(tmp_path: Path) -> None:
    toml = tmp_path / "lconvert.toml"
    toml.write_text("[runtimes.vllm]\nwheel = 'cuda'\n")
    with pytest.raises(OptionError, match=r"wheel is 'cuda'; expected the folder of an unpacked"):
        config.load(toml)
    (tmp_path / "cuda").mkdir()
    assert config.load(toml)["vllm"].wheel == tmp_path / "cuda"
    toml.write_text("[runtimes.onnxruntime]\nwheel = 'cuda'\n")
    with pytest.raises(OptionError, match=r"unknown key runtimes.onnxruntime.wheel"):
        config.load(toml)


def test_a_folder_for_tensorrt_llm_is_not_judged_by_vllm() -> None:
    from lconvert.validators.proof import Options, Proof

    model = lconvert.read(PEERS / "modelopt-int8-sq")
    options = Options(runtimes=("vllm",), python={"vllm": str(PYTHON)})
    proof = Proof(model, model, PEERS / "modelopt-int8-sq", "hf", {}, options, lambda text: None)
    vllm_config.check(proof, "trtllm")
    assert not proof.checks and not proof.not_proven
    vllm_config.check(proof, "vllm")
    assert [c.passed for c in proof.checks] == [False]
