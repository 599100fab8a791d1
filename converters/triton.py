"""A model repository for Triton Inference Server: a folder per model with config.pbtxt and a version folder.

Back ends by what an artifact is: onnxruntime (.onnx), tensorrt (.plan), vllm (a Hugging Face folder), python (a GGUF file through
llama-cpp-python). Fields are those of model_config.proto in triton-inference-server/common; vLLM's model.json is vllm_backend's. Back
ends and their parameters: server/docs/user_guide/model_configuration.md.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lconvert.errors import InputError, OptionError, OutputError
from lconvert.formats import onnx_reader

#: ONNX's and TensorRT's names of types -> Triton's.
_ONNX_TYPES = {"FLOAT": "TYPE_FP32", "FLOAT16": "TYPE_FP16", "BFLOAT16": "TYPE_BF16", "INT64": "TYPE_INT64", "INT32": "TYPE_INT32", "INT8": "TYPE_INT8", "UINT8": "TYPE_UINT8", "BOOL": "TYPE_BOOL"}  # fmt: skip
_PLAN_TYPES = {"FLOAT": "TYPE_FP32", "HALF": "TYPE_FP16", "BF16": "TYPE_BF16", "INT64": "TYPE_INT64", "INT32": "TYPE_INT32", "INT8": "TYPE_INT8", "BOOL": "TYPE_BOOL"}  # fmt: skip
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
README = "README.md"


@dataclass(frozen=True)
class Options:
    """instances: of each model, on `gpu` numbers, or on the CPU if there are none. max_batch: 0 leaves batching to the model. delay:
    microseconds that a batch waits for more requests. context: tokens for llama.cpp and vLLM. link: artifacts are linked, not copied."""

    instances: int = 1
    gpus: tuple[int, ...] = ()
    max_batch: int = 0
    delay: int = 0
    context: int = 2048
    link: bool = False

    def __post_init__(self) -> None:
        for name, least in (("instances", 1), ("max_batch", 0), ("delay", 0), ("context", 1)):
            if getattr(self, name) < least:
                raise OptionError(f"{name} {getattr(self, name)}; give {least} or more")
        if self.delay and not self.max_batch:
            raise OptionError("a delay belongs to batches; give --max-batch too")


@dataclass(frozen=True)
class Served:
    """One model of the repository. files: name inside the version folder -> what is copied there, or text."""

    name: str
    backend: str
    config: str
    files: Mapping[str, Path | str]


@dataclass(frozen=True)
class Port:
    """An input or output, its shape with -1 for what varies, the batch first."""

    name: str
    type: str
    shape: tuple[int, ...]


def served(path: Path, options: Options) -> Served:
    """How an artifact is served. InputError for what no back end takes."""
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", path.resolve().stem if path.is_file() else path.resolve().name)
    name = name.strip(".-")[:100] or "model"
    if path.is_dir() and (path / "model.onnx").is_file():
        return _onnx(name, path / "model.onnx", options)
    if path.is_dir() and (path / "config.json").is_file():
        return _vllm(name, path, options)
    if path.is_file() and path.suffix == ".onnx":
        plain = path.resolve().parent.name if path.name == "model.onnx" else path.stem
        return _onnx(re.sub(r"[^A-Za-z0-9._-]+", "-", plain).strip(".-") or "model", path, options)
    if path.is_file() and path.suffix in (".plan", ".engine"):
        return _plan(name, path, options)
    if path.is_file() and path.suffix == ".gguf":
        return _llamacpp(name, path, options)
    raise InputError(
        f"{path}: no artifact that Triton serves; give an .onnx, .plan or .gguf file, or a folder with config.json"
    )


def _onnx(name: str, path: Path, options: Options) -> Served:
    model = onnx_reader.read(path)
    g, types = model.proto.graph, {v: k for k, v in _data_types().items()}

    def port(v: Any) -> Port:
        t = v.type.tensor_type
        type_ = _ONNX_TYPES.get(types.get(t.elem_type, ""))
        if type_ is None:
            raise InputError(f"{path}: {v.name} is of a type that Triton does not have")
        return Port(v.name, type_, tuple(d.dim_value if d.HasField("dim_value") else -1 for d in t.shape.dim))

    ports = [[port(v) for v in side if v.name not in model.tensors] for side in (g.input, g.output)]
    files: dict[str, Path | str] = {"model.onnx": path, **{d.name: d for d in model.files[1:]}}
    return Served(name, "onnxruntime", config(name, "onnxruntime", ports, options), files)


def _data_types() -> dict[str, int]:
    from lconvert.formats.onnx_graph import package

    return dict(package().TensorProto.DataType.items())


def _plan(name: str, path: Path, options: Options) -> Served:
    """Inputs and outputs are those of the engine's manifest; without one Triton completes the configuration itself."""
    from lconvert.plan import manifest_path

    ports: list[list[Port]] = [[], []]
    manifest = manifest_path(path)
    if manifest.is_file():
        try:
            report = json.loads(manifest.read_text())["report"]
            for i, side in enumerate(("inputs", "outputs")):
                ports[i] = [
                    Port(n, _PLAN_TYPES[v["type"]], tuple(v["shape"])) for n, v in report[side].items()
                ]
        except (ValueError, KeyError, TypeError, AttributeError) as e:
            raise InputError(f"{manifest}: is no manifest of an engine ({e!r}); build it again") from None
    return Served(name, "tensorrt", config(name, "tensorrt", ports, options), {"model.plan": path})


def _vllm(name: str, path: Path, options: Options) -> Served:
    """vLLM batches by itself: model.json holds its engine arguments."""
    arguments = {"model": str(path.resolve()), "max_model_len": options.context}
    if options.gpus:
        arguments["gpu_memory_utilization"] = 0.9
    text = json.dumps(arguments, indent=1) + "\n"
    return Served(name, "vllm", config(name, "vllm", [[], []], options), {"model.json": text})


_LLAMACPP = '''"""Completions by llama.cpp: one prompt to one text, for Triton's python back end (needs llama-cpp-python)."""

import json
from pathlib import Path

import numpy as np
import triton_python_backend_utils as utils
from llama_cpp import Llama


class TritonPythonModel:
    def initialize(self, args):
        settings = {k: v["string_value"] for k, v in json.loads(args["model_config"])["parameters"].items()}
        folder = Path(args["model_repository"]) / args["model_version"]
        self.model = Llama(
            str(folder / settings["gguf"]),
            n_ctx=int(settings["n_ctx"]),
            n_gpu_layers=int(settings["n_gpu_layers"]),
            verbose=False,
        )

    def execute(self, requests):
        return [self._answer(r) for r in requests]

    def _answer(self, request):
        try:
            prompt = utils.get_input_tensor_by_name(request, "prompt").as_numpy().reshape(-1)[0].decode()
            limit = utils.get_input_tensor_by_name(request, "max_tokens")
            n = 128 if limit is None else int(limit.as_numpy().reshape(-1)[0])
            text = self.model.create_completion(prompt, max_tokens=n, temperature=0)["choices"][0]["text"]
            out = utils.Tensor("text", np.array([text.encode()], dtype=np.object_))
            return utils.InferenceResponse([out])
        except Exception as e:
            return utils.InferenceResponse(error=utils.TritonError(str(e)))
'''


def _llamacpp(name: str, path: Path, options: Options) -> Served:
    ports = [
        [Port("prompt", "TYPE_STRING", (1,)), Port("max_tokens", "TYPE_INT32", (1,))],
        [Port("text", "TYPE_STRING", (1,))],
    ]
    given = {"gguf": "model.gguf", "n_ctx": str(options.context), "n_gpu_layers": "-1" if options.gpus else "0"}  # fmt: skip
    text = config(name, "python", ports, options, parameters=given, optional=("max_tokens",))
    return Served(name, "python", text, {"model.py": _LLAMACPP, "model.gguf": path})


# --- config.pbtxt ------------------------------------------------------------------------------------------


def config(
    name: str,
    backend: str,
    ports: Sequence[Sequence[Port]],
    options: Options,
    *,
    parameters: Mapping[str, str] | None = None,
    optional: Sequence[str] = (),
) -> str:
    """The text of config.pbtxt. Batches are formed by Triton for onnxruntime and tensorrt alone, where shapes begin with the batch."""
    batched = bool(options.max_batch) and backend in ("onnxruntime", "tensorrt")
    if batched and any(len(p.shape) < 1 or p.shape[0] != -1 for side in ports for p in side):
        raise OptionError(
            f"{name}: --max-batch needs a first dimension that varies in every input and output"
        )
    lines = [f"name: {_text(name)}", f"backend: {_text(backend)}"]
    lines.append(f"max_batch_size: {options.max_batch if batched else 0}")
    for side, given in zip(("input", "output"), ports, strict=True):
        for p in given:
            dims = p.shape[1:] if batched else p.shape
            more = ", optional: true" if p.name in optional else ""
            reshape = "" if dims else ", reshape: { shape: [ ] }"
            shown = ", ".join(map(str, dims or (1,)))
            lines.append(f"{side} {{ name: {_text(p.name)}, data_type: {p.type}, dims: [ {shown} ]{reshape}{more} }}")  # fmt: skip
    if batched:
        lines.append(f"dynamic_batching {{ max_queue_delay_microseconds: {options.delay} }}")
    if backend == "vllm":
        lines.append("model_transaction_policy { decoupled: true }")
        lines.append(f"instance_group [ {{ count: {options.instances}, kind: KIND_MODEL }} ]")
    else:
        kind = "KIND_GPU" if options.gpus or backend == "tensorrt" else "KIND_CPU"
        on = f", gpus: [ {', '.join(map(str, options.gpus))} ]" if options.gpus else ""
        lines.append(f"instance_group [ {{ count: {options.instances}, kind: {kind}{on} }} ]")
    for key, value in (parameters or {}).items():
        lines.append(f"parameters {{ key: {_text(key)}, value: {{ string_value: {_text(value)} }} }}")
    return "\n".join(lines) + "\n"


def _text(s: str) -> str:
    """A string of protobuf's text format."""
    return '"' + "".join(c if c.isascii() and c.isprintable() and c not in '"\\' else "".join(f"\\{b:03o}" for b in c.encode()) for c in s) + '"'  # fmt: skip


def schema() -> Any:
    """ModelConfig of model_config.proto, out of the package tritonclient; None without it.

    The module is loaded by its path: the package itself imports grpc.
    """
    found = importlib.util.find_spec("tritonclient")
    for folder in (found.submodule_search_locations or ()) if found else ():
        path = Path(folder) / "grpc" / "model_config_pb2.py"
        spec = importlib.util.spec_from_file_location("model_config_pb2", path)
        if path.is_file() and spec and spec.loader:
            module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
            return module.ModelConfig
    return None


def checked(text: str) -> Any:
    """The configuration as protobuf understands it; InputError where the schema does not know a field. None without the schema."""
    made = schema()
    if made is None:
        return None
    from google.protobuf import text_format

    try:
        return text_format.Parse(text, made())
    except text_format.ParseError as e:
        raise InputError(f"config.pbtxt does not fit model_config.proto: {e}") from None


# --- the folder --------------------------------------------------------------------------------------------


def write(paths: Sequence[Path], out: Path, options: Options = Options(), *, force: bool = False) -> list[Served]:  # fmt: skip
    """The repository of artifacts; all of it or nothing."""
    models = [served(p, options) for p in paths]
    names = [m.name for m in models]
    if len(set(names)) < len(names):
        twice = next(n for n in names if names.count(n) > 1)
        raise OptionError(f"two artifacts would be served as {twice}; rename one")
    if out.exists() and (not force or not out.is_dir() or (any(out.iterdir()) and not _ours(out))):
        raise OutputError(
            f"{out}: exists{'' if force and out.is_dir() else '; --force replaces a repository'}{' and is no repository of lconvert' if force else ''}"
        )
    for m in models:
        checked(m.config)
    scratch = None
    try:
        out.absolute().parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.absolute().parent))
        for m in models:
            _one(scratch / m.name, m, options)
        (scratch / README).write_text(readme(models, options), encoding="utf-8")
        scratch.chmod(0o755)
        if out.exists():
            shutil.rmtree(out)
        os.replace(scratch, out)
    except OSError as e:
        raise OutputError(f"{out}: cannot be written ({e.strerror or e})") from None
    finally:
        if scratch is not None:
            shutil.rmtree(scratch, ignore_errors=True)
    return models


def _ours(out: Path) -> bool:
    readme = out / README
    return readme.is_file() and _TITLE in readme.read_text(encoding="utf-8", errors="replace")


def _one(folder: Path, m: Served, options: Options) -> None:
    version = folder / "1"
    version.mkdir(parents=True)
    (folder / "config.pbtxt").write_text(m.config, encoding="utf-8")
    for name, what in m.files.items():
        to = version / name
        to.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(what, str):
            to.write_text(what, encoding="utf-8")
        elif options.link:
            to.symlink_to(what.resolve())
        else:
            shutil.copyfile(what, to)


_TITLE = "# Model repository for Triton Inference Server"
_IMAGES = {
    "vllm": "a `-vllm-python-py3` image",
    "python": "any image, with `pip install llama-cpp-python` in it",
}


def readme(models: Sequence[Served], options: Options) -> str:
    """How to start the server, and how to ask each model."""
    rows = [f"| {m.name} | {m.backend} | {_IMAGES.get(m.backend, 'a `-py3` image')} |" for m in models]
    gpus = "--gpus all " if options.gpus or any(m.backend in ("tensorrt", "vllm") for m in models) else ""
    first = models[0].name
    notes = [
        f"- {m.name}: vLLM reads the folder named in `{m.name}/1/model.json`; mount it into the container under the same path."
        for m in models
        if m.backend == "vllm"
    ]
    notes += [
        f"- {m.name}: the engine runs on the compute capabilities and with the TensorRT version of its manifest alone; one of TensorRT-RTX is not loaded by Triton's tensorrt back end."
        for m in models
        if m.backend == "tensorrt"
    ]
    lines = [_TITLE, "", "| model | back end | image |", "|---|---|---|", *rows, "", "Start it, in the folder that holds this one:", "", "```sh",
        f"docker run --rm {gpus}-p 8000:8000 -p 8001:8001 -p 8002:8002 -v \"$PWD/REPOSITORY:/models\" \\",
        "  nvcr.io/nvidia/tritonserver:YY.MM-py3 tritonserver --model-repository=/models --exit-on-error=true", "```", "",
        "REPOSITORY is this folder, YY.MM a release. It is ready when this answers 200:", "", "```sh",
        f"curl -i localhost:8000/v2/models/{first}/ready", f"curl localhost:8000/v2/models/{first}/config", "```", ""]  # fmt: skip
    lines += [*notes, ""] if notes else []
    checked_by = (
        "checked against model_config.proto"
        if schema() is not None
        else "not checked against model_config.proto, which is in the package tritonclient"
    )
    return "\n".join([*lines, f"Each config.pbtxt was {checked_by}; the server itself was not started here.", ""])  # fmt: skip
