"""What a runtime must offer to be validated and measured. One file per runtime; heavy packages are imported
inside it.

`open_runtime` opens an artifact in a runtime, in this process or, with `python`, in another interpreter's.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

from lconvert.errors import InputError, OptionError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

#: parity: the settings that remove the runtime's own approximations; speed: what it would be served with.
Purpose = Literal["parity", "speed"]


@dataclass(frozen=True)
class Generation:
    """Greedy continuation. `seconds[i]` is when token i was there, counted from the request (seconds[0] is
    the TTFT).
    """

    ids: tuple[int, ...]
    seconds: tuple[float, ...]


class Runtime(Protocol):
    """A model loaded in some runtime."""

    def tokenize(self, text: str, *, special: bool) -> list[int]:
        """Ids of a text without BOS or EOS; `special`: control tokens in the text become their ids."""
        ...

    def logits(self, ids: list[int]) -> NDArray[np.float32]:
        """fp32 logits (len(ids), vocab) of one forward pass from an empty context."""
        ...

    def generate(self, ids: list[int], n: int) -> Generation:
        """Exactly `n` greedy tokens after the prompt `ids` (end-of-text tokens do not stop it), from an empty
        context.
        """
        ...

    def info(self) -> dict[str, str]:
        """ "runtime" (its name), versions, device, kernels and settings, for the report."""
        ...

    def close(self) -> None: ...


#: name -> (module, class, artifact kinds it loads). The class is called with (path, context=, threads=, purpose=).
RUNTIMES: Mapping[str, tuple[str, str, tuple[str, ...]]] = {
    "llama.cpp": ("llamacpp", "LlamaCpp", ("gguf",)),
    "transformers": ("hf", "Transformers", ("hf",)),
    "dequantized": ("hf", "Dequantized", ("gguf", "hf", "lcir")),
    "onnxruntime": ("onnxruntime", "OnnxRuntime", ("onnx",)),
    "tensorrt": ("tensorrt", "TensorRT", ("onnx",)),
    "vllm": ("vllm", "Vllm", ("hf",)),
}

#: the runtime that an artifact is for, by kind
DEFAULT: Mapping[str, str] = {
    "gguf": "llama.cpp",
    "hf": "transformers",
    "lcir": "dequantized",
    "onnx": "onnxruntime",
}


def kind(path: str | Path) -> str:
    """gguf, onnx, lcir or hf (a folder with config.json); OptionError for anything else."""
    p = graph(Path(path))
    if p.suffix in (".gguf", ".onnx"):
        return p.suffix[1:]
    if p.suffix == ".lcir":
        return "lcir"
    if (p / "config.json").is_file():
        return "hf"
    raise OptionError(
        f"{p}: not an artifact that a runtime loads (.gguf, .onnx, .lcir or a folder with config.json)"
    )


def graph(path: Path) -> Path:
    """The model.onnx of a folder that holds its weights in it; any other path as it is."""
    if (path / "model.onnx").is_file() and not any(path.glob("*.safetensors")):
        return path / "model.onnx"
    return path


def installed(*distributions: str) -> str | None:
    """The version of the first of these distributions that this interpreter has."""
    from importlib.metadata import PackageNotFoundError, version

    for name in distributions:
        try:
            return version(name)
        except PackageNotFoundError:
            continue
    return None


def short(e: Exception) -> str:
    """An exception's message in one line."""
    text = " ".join(str(e).split())
    return text if len(text) <= 400 else text[:400] + "..."


def fits(tokens: int, context: int | None) -> None:
    """InputError where there are no tokens, or more than the context that the model was opened with."""
    if tokens < 1:
        raise InputError("no tokens: a prompt needs at least one")
    if context is not None and tokens > context:
        raise InputError(f"{tokens} tokens do not fit the context of {context}")


def open_runtime(
    name: str,
    path: str | Path,
    *,
    context: int = 512,
    threads: int | None = None,
    purpose: Purpose = "parity",
    python: str | Path | None = None,
    timeout: float = 600.0,
    options: Mapping[str, Any] | None = None,
) -> Runtime:
    """The artifact `path` loaded in the runtime `name`.

    context: tokens that must fit. python: an interpreter that has the runtime's packages; the runtime then
    lives in a process of that interpreter (`remote.Remote`) and every call may take `timeout` seconds at
    most. options: what this runtime alone understands, such as `dtype` (`config.OPTIONS` lists them). Raises
    OptionError for an unknown name, MissingPackageError where the runtime is not installed, InputError where
    it refuses the artifact, RuntimeFailure where it crashed or hung.
    """
    if name not in RUNTIMES:
        raise OptionError(f"unknown runtime {name}; runtimes: {', '.join(RUNTIMES)}")
    if python is not None:
        from lconvert.validators.runtimes.remote import Remote

        return Remote(
            name,
            path,
            context=context,
            threads=threads,
            purpose=purpose,
            python=python,
            timeout=timeout,
            options=options,
        )
    module, cls, _ = RUNTIMES[name]
    found = getattr(importlib.import_module(f"{__name__}.{module}"), cls)
    runtime: Runtime = found(path, context=context, threads=threads, purpose=purpose, **(options or {}))
    return runtime
