"""Model repositories against Triton's own schema, and what the python back end's model does."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

import lconvert
from lconvert.cli import cli
from lconvert.converters import kinds, onnx, tensorrt, triton
from lconvert.errors import InputError, OptionError, OutputError
from lconvert.executor import execute
from tests.conftest import DEMO

for package in ("onnx", "tensorrt_rtx", "tritonclient"):
    pytest.importorskip(package, reason=f"{package} is not installed")


@pytest.fixture(scope="module")
def graph(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("graphs") / "small"
    execute(onnx.plan(kinds.plain(), onnx.Options("trt")), folder)
    return folder / "model.onnx"


@pytest.fixture(scope="module")
def engine(graph: Path) -> Path:
    path = graph.parent / "engine.plan"
    tensorrt.build(graph, path, tensorrt.Options("tensorrt_rtx", (1, 1, 4), (1, 1, 8), (0, 1, 8), (89,)))
    return path


@pytest.fixture(scope="module")
def gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("gguf") / "demo F32.gguf"
    lconvert.convert(DEMO, path, ftype="F32")
    return path


def configs(out: Path) -> dict[str, Any]:
    found = {p.parent.name: triton.checked(p.read_text()) for p in out.glob("*/config.pbtxt")}
    assert None not in found.values() and all(c.name == n for n, c in found.items())
    return found


def test_a_repository_of_every_back_end(graph: Path, engine: Path, gguf: Path, tmp_path: Path) -> None:
    out = tmp_path / "repository"
    result = CliRunner().invoke(cli, ["triton-repo", str(graph), str(engine), str(gguf), str(DEMO), "-o", str(out), "--instances", "2"])  # fmt: skip
    assert result.exit_code == 0, result.output
    found = configs(out)
    assert {n: c.backend for n, c in found.items()} == {"small": "onnxruntime", "engine": "tensorrt", "demo-F32": "python", "demo_model": "vllm"}  # fmt: skip
    KIND = type(found["small"].instance_group[0])
    assert [found[n].instance_group[0].kind for n in ("small", "engine", "demo-F32", "demo_model")] == [KIND.KIND_CPU, KIND.KIND_GPU, KIND.KIND_CPU, KIND.KIND_MODEL]  # fmt: skip
    assert all(c.instance_group[0].count == 2 and c.max_batch_size == 0 for c in found.values())
    for name in ("small", "engine"):
        ports = {p.name: p for p in (*found[name].input, *found[name].output)}
        assert list(ports["input_ids"].dims) == [-1, -1] and list(ports["logits"].dims) == [-1, -1, 64]
        assert list(ports["past_key_values.0.key"].dims) == [-1, 4, -1, 32]
        assert {p.data_type for p in ports.values()} == {9, 10}  # INT64, FP16 of model_config.proto
    assert found["demo_model"].model_transaction_policy.decoupled
    assert json.loads((out / "demo_model" / "1" / "model.json").read_text())["model"] == str(DEMO.resolve())
    for name, artifact in (("small", graph), ("engine", engine), ("demo-F32", gguf)):
        held = next(p for p in (out / name / "1").iterdir() if p.suffix == artifact.suffix)
        assert held.read_bytes() == artifact.read_bytes()
    assert (out / "small" / "1" / "model.onnx.data").stat().st_size > 1000
    readme = (out / "README.md").read_text()
    assert "tritonserver --model-repository=/models" in readme and "not started here" in readme
    assert "TensorRT-RTX is not loaded" in readme and "was checked against model_config.proto" in readme


def test_batches_that_triton_forms(graph: Path, tmp_path: Path) -> None:
    options = triton.Options(max_batch=8, delay=250, gpus=(0, 1), link=True)
    triton.write([graph], tmp_path / "r", options)
    c = configs(tmp_path / "r")["small"]
    assert c.max_batch_size == 8 and c.dynamic_batching.max_queue_delay_microseconds == 250
    assert {p.name: list(p.dims) for p in c.input}["past_key_values.0.value"] == [4, -1, 32]
    assert list(c.instance_group[0].gpus) == [0, 1]
    assert (tmp_path / "r" / "small" / "1" / "model.onnx").resolve() == graph.resolve()


#: The server's own module, which exists in the server alone, and one request with and one without a prompt.
_SERVER = """
import json, sys, types
import numpy as np

class Tensor:
    def __init__(self, name, array):
        self.name, self.array = name, array
    def as_numpy(self):
        return self.array

utils = types.ModuleType("triton_python_backend_utils")
utils.Tensor, utils.TritonError = Tensor, RuntimeError
utils.get_input_tensor_by_name = lambda request, name: request.get(name)
utils.InferenceResponse = lambda tensors=(), error=None: types.SimpleNamespace(tensors=tensors, error=error)
sys.modules["triton_python_backend_utils"] = utils
sys.path.insert(0, sys.argv[1] + "/1")
from model import TritonPythonModel

model = TritonPythonModel()
model.initialize({"model_config": sys.argv[2], "model_repository": sys.argv[1], "model_version": "1"})
request = {"prompt": Tensor("prompt", np.array([b"The old man"], object)), "max_tokens": Tensor("max_tokens", np.array([4]))}
good, bad = model.execute([request, {}])
print(json.dumps([good.tensors[0].as_numpy()[0].decode(), str(good.error), str(bad.error)]))
"""


def test_the_python_model_completes(gguf: Path, tmp_path: Path) -> None:
    """Its file runs with llama.cpp, in a process of its own as in the server."""
    pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
    triton.write([gguf], tmp_path / "r")
    config = configs(tmp_path / "r")["demo-F32"]
    parameters = {k: {"string_value": v.string_value} for k, v in config.parameters.items()}
    call = [sys.executable, "-P", "-c", _SERVER, tmp_path / "r" / "demo-F32", json.dumps({"parameters": parameters})]  # fmt: skip
    done = subprocess.run(call, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    text, error, refused = json.loads(done.stdout.splitlines()[-1])
    assert text.strip() and error == "None" and refused != "None"


def test_the_schema_refuses_what_it_does_not_know() -> None:
    with pytest.raises(InputError, match="does not fit"):
        triton.checked('name: "m"\nmax_batches: 3\n')


@pytest.mark.parametrize("name", ['a"b', "back\\slash", "new\nline", "ünïcode", "a{}"])
def test_names_are_quoted(name: str) -> None:
    port = triton.Port(name, "TYPE_FP32", (-1, 2))
    c = triton.checked(triton.config("m", "onnxruntime", [[port], []], triton.Options()))
    assert c.input[0].name == name


def test_scalars_are_reshaped() -> None:
    c = triton.checked(triton.config("m", "onnxruntime", [[triton.Port("x", "TYPE_FP32", ())], []], triton.Options()))  # fmt: skip
    assert list(c.input[0].dims) == [1] and list(c.input[0].reshape.shape) == []


def test_what_cannot_be_served_leaves_nothing(graph: Path, engine: Path, tmp_path: Path) -> None:
    out = tmp_path / "r"
    (tmp_path / "x.txt").write_text("x")
    copied = tmp_path / "e.plan"
    copied.write_bytes(b"x")
    copied.with_name("e.plan.manifest.json").write_text("[]")
    (tmp_path / "bad.onnx").write_text("not onnx")
    for paths, kind, message in (
        ([tmp_path / "x.txt"], InputError, "no artifact that Triton serves"),
        ([tmp_path / "absent.onnx"], InputError, "no artifact that Triton serves"),
        ([tmp_path / "bad.onnx"], InputError, "is not an ONNX file"),
        ([copied], InputError, "no manifest of an engine"),
        ([graph, graph], OptionError, "two artifacts would be served as small"),
    ):
        with pytest.raises(kind, match=message):
            triton.write(paths, out)
    out.mkdir()
    (out / "mine").write_text("precious")
    with pytest.raises(OutputError, match="--force replaces"):
        triton.write([graph], out)
    with pytest.raises(OutputError, match="no repository of lconvert"):
        triton.write([graph], out, force=True)
    assert (out / "mine").read_text() == "precious"
    triton.write([graph], tmp_path / "twice")
    triton.write([engine], tmp_path / "twice", force=True)
    assert set(configs(tmp_path / "twice")) == {"engine"}
    assert sorted(p.name for p in tmp_path.iterdir() if p.name.startswith(".")) == []


@pytest.mark.parametrize(
    "bad", [{"instances": 0}, {"max_batch": -1}, {"delay": 5}, {"context": 0}, {"delay": -1}]
)
def test_settings_that_make_no_sense(bad: dict[str, int]) -> None:
    with pytest.raises(OptionError, match=r"give|batches"):
        triton.Options(**bad)


def test_batches_need_a_dimension_that_varies() -> None:
    ports = [[triton.Port("x", "TYPE_FP32", (1, 3))], []]
    with pytest.raises(OptionError, match="first dimension that varies"):
        triton.config("m", "onnxruntime", ports, triton.Options(max_batch=2))
