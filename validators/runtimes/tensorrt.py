"""A decoder in TensorRT or TensorRT-RTX on this host's GPU: an engine is built of the graph, loaded and fed like a session of ONNX Runtime.

Without a GPU nothing of it can run; then it says so. It was written without one at hand, against the interface of TensorRT's Python
package (ICudaEngine, IExecutionContext.execute_async_v3), which TensorRT-RTX shares.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lconvert.converters import tensorrt, trt_messages
from lconvert.errors import InputError, LconvertError, MissingPackageError, OptionError, UnsupportedError
from lconvert.formats import onnx_reader
from lconvert.validators.runtimes import Purpose, cuda, short
from lconvert.validators.runtimes.onnxruntime import OnnxRuntime

#: Prompts of one batch that the profile has room for.
_BATCH = 3
_NAMES = {
    "FLOAT": "tensor(float)",
    "HALF": "tensor(float16)",
    "INT64": "tensor(int64)",
    "INT32": "tensor(int32)",
}
NO_GPU = "no NVIDIA GPU is here, so no engine was run"


def prepare() -> None:
    """Import what the class here needs; MissingPackageError where there is no package or no GPU."""
    tensorrt.load()
    if not cuda.count():
        raise MissingPackageError(NO_GPU)


@dataclass(frozen=True)
class Port:
    """An input or output as ONNX Runtime describes one; BF16 is fed and handed out in F32."""

    name: str
    type: str
    shape: list[Any]


class Session:
    """An engine with the part of InferenceSession's interface that OnnxRuntime uses."""

    def __init__(self, path: Path, context: int) -> None:
        prepare()
        self._backend, self._trt = tensorrt.load()
        self.engine = self._built(path, context)
        self._context = self.engine.create_execution_context()
        names = [self.engine.get_tensor_name(i) for i in range(self.engine.num_io_tensors)]
        fed = self._trt.TensorIOMode.INPUT
        self._in = [n for n in names if self.engine.get_tensor_mode(n) == fed]
        self._out = [n for n in names if n not in self._in]

    def _built(self, path: Path, context: int) -> Any:
        """The engine, deserialized. Profile: what a validation feeds."""
        held = tensorrt.positions(onnx_reader.read(path)) or 2 * context
        most = min(context, held)
        sms = (cuda.capability(),) if self._trt.__name__ == "tensorrt_rtx" else ()
        cuda.use()
        with tempfile.TemporaryDirectory(prefix="lconvert-") as folder:
            plan = Path(folder) / "model.plan"
            past = (0, min(1, held - most), held - most)
            options = tensorrt.Options(self._backend.name, (1, 1, _BATCH), (1, 1, most), past, sms)
            try:
                tensorrt.build(path, plan, options)
            except OptionError as e:  # a GPU that RTX does not build for
                raise MissingPackageError(f"no engine was run: {e}") from None
            except UnsupportedError as e:
                raise InputError(str(e)) from None
            logger, messages = trt_messages.logger(self._trt)
            engine = self._trt.Runtime(logger).deserialize_cuda_engine(plan.read_bytes())
        if engine is None:
            why = trt_messages.explain(messages, "no reason was given")
            raise InputError(f"{path}: {self._trt.__name__} does not load the engine it built ({why})")
        return engine

    @property
    def label(self) -> dict[str, str]:
        trt = self._trt
        return {trt.__name__: str(trt.__version__), "device": f"{cuda.name()}, SM{cuda.capability()}"}

    def kind(self, name: str) -> str:
        """TensorRT's name of a type: HALF, BF16."""
        return str(self.engine.get_tensor_dtype(name)).rpartition(".")[2]

    def _ports(self, names: Sequence[str]) -> list[Port]:
        return [
            Port(n, _NAMES.get(self.kind(n), "tensor(float)"), [d if d >= 0 else "n" for d in self.engine.get_tensor_shape(n)])
            for n in names
        ]  # fmt: skip

    def get_inputs(self) -> list[Port]:
        return self._ports(self._in)

    def get_outputs(self) -> list[Port]:
        return self._ports(self._out)

    def _dtype(self, name: str) -> Any:
        if self.kind(name) == "BF16":
            import ml_dtypes

            return ml_dtypes.bfloat16
        return self._trt.nptype(self.engine.get_tensor_dtype(name))

    def run(self, outputs: Sequence[str], feed: Mapping[str, NDArray[Any]]) -> list[NDArray[Any]]:
        """Outputs by name; those of BF16 in F32."""
        buffers: dict[str, cuda.Buffer] = {}
        cuda.use()
        try:
            for name in self._in:
                x = np.ascontiguousarray(feed[name], self._dtype(name))
                if not self._context.set_input_shape(name, x.shape):
                    raise InputError(f"input {name} of shape {x.shape} is outside of the engine's profile")
                buffers[name] = cuda.Buffer(x.nbytes)
                buffers[name].put(x)
            shapes = {n: tuple(self._context.get_tensor_shape(n)) for n in self._out}
            for name, shape in shapes.items():
                size = int(np.prod(shape)) * np.dtype(self._dtype(name)).itemsize
                buffers[name] = cuda.Buffer(size)
            for name, buffer in buffers.items():
                self._context.set_tensor_address(name, buffer.address)
            if not self._context.execute_async_v3(0):
                raise InputError("the engine failed")
            cuda.synchronize()
            return [self._array(n, buffers[n], shapes[n]) for n in outputs]
        finally:
            for buffer in buffers.values():
                buffer.free()

    def _array(self, name: str, buffer: cuda.Buffer, shape: tuple[int, ...]) -> NDArray[Any]:
        out = buffer.get(shape, self._dtype(name))
        return out.astype(np.float32) if self.kind(name) == "BF16" else out


class TensorRT(OnnxRuntime):
    """The same decoder, by an engine."""

    def _open(self, path: Path, context: int, purpose: Purpose, threads: int | None) -> Any:
        self._settings = {}
        try:
            return Session(path, context)
        except LconvertError:
            raise
        except Exception as e:  # noqa: BLE001 - bindings raise what they like
            raise InputError(f"{path}: TensorRT does not load it ({short(e)})") from None

    def _float(self) -> str:
        kinds = {"HALF": "float16", "BF16": "bfloat16"}
        return kinds.get(self._session.kind("logits"), "float32")

    def info(self) -> dict[str, str]:
        return {"runtime": "tensorrt", **self._session.label, "dtype": self._dtype}
