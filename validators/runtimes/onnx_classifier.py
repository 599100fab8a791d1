"""A graph that classifies, in ONNX Runtime on the CPU: arrays by the names of its inputs, and `logits` (batch, labels).

Static rounding of inputs, QuantizeLinear and DequantizeLinear, can be left out of the graph (`rounding=False`). What remains is the same
graph with the same weights in floats, whose logits can be held to a reference closely: where inputs are rounded, a difference
in the last place moves some of them to another code, and later layers multiply it.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lconvert.errors import InputError, MissingPackageError
from lconvert.validators.runtimes import Purpose, graph, onnx_session, short
from lconvert.validators.runtimes.onnxruntime import package

_TYPES: Mapping[str, Any] = {
    "tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(int64)": np.int64, "tensor(int32)": np.int32,
}  # fmt: skip
_FOLDER_OPTION = "session.model_external_initializers_file_folder_path"
#: What else rounds inputs: scales that are found while the graph runs.
_OTHERS = ("DynamicQuantizeLinear", "MatMulInteger", "ConvInteger")


def without_rounding(path: Path) -> bytes | None:
    """The graph with its inputs left as they are; None where it rounds none by static scales alone."""
    try:
        import onnx
    except ImportError:
        raise MissingPackageError("onnx is not installed: pip install 'lconvert[onnx]'") from None
    proto = onnx.load(str(path), load_external_data=False)
    made = {n.output[0]: n for n in proto.graph.node if n.output}
    pairs = [
        (n, made[n.input[0]])
        for n in proto.graph.node
        if n.op_type == "DequantizeLinear"
        and n.input[0] in made
        and made[n.input[0]].op_type == "QuantizeLinear"
    ]
    if not pairs or any(n.op_type in _OTHERS for n in proto.graph.node):
        return None
    for back, there in pairs:
        kept = onnx.helper.make_node("Identity", [there.input[0]], list(back.output), name=back.name)
        back.CopyFrom(kept)
    left = [n for n in proto.graph.node if n.op_type != "QuantizeLinear"]
    del proto.graph.node[:]
    proto.graph.node.extend(left)
    out: bytes = proto.SerializeToString()
    return out


class OnnxClassifier:
    """A graph in a session; InputError where ONNX Runtime does not load or run it. rounding: InputError where there is none that can be
    left out."""

    def __init__(
        self,
        path: str | Path,
        *,
        threads: int | None = None,
        purpose: Purpose = "parity",
        rounding: bool = True,
    ) -> None:
        self._runtime, self.path = package(), graph(Path(path))
        self._threads = threads
        self._settings = dict(onnx_session.settings(onnx_session.opened(self.path), purpose))
        self._settings["session.qdq_matmulnbits_accuracy_level"] = "1" if purpose == "parity" else "4"
        self._model: str | bytes = str(self.path)
        if not rounding:
            bare = without_rounding(self.path)
            if bare is None:
                raise InputError(f"{self.path}: rounds no inputs by static scales alone")
            self._model = bare
            self._settings.pop(onnx_session.PRECISE, None)  # of integer products, of which none is left
            self._settings[onnx_session.UNFUSED] = "1"  # weights in floats, once, at load
            self._settings[_FOLDER_OPTION] = str(self.path.resolve().parent)
        self._session = self._opened()
        self.inputs = {i.name: i for i in self._session.get_inputs()}
        if "logits" not in [o.name for o in self._session.get_outputs()]:
            raise InputError(f"{self.path}: has no output logits, so it is no classifier that lconvert wrote")
        if odd := [i.name for i in self.inputs.values() if i.type not in _TYPES]:
            raise InputError(
                f"{self.path}: input {odd[0]} is a {self.inputs[odd[0]].type}, which cannot be fed"
            )

    def _opened(self) -> Any:
        options = self._runtime.SessionOptions()
        options.log_severity_level = 4
        for key, value in self._settings.items():
            options.add_session_config_entry(key, value)
        if self._threads:
            options.intra_op_num_threads = self._threads
        try:
            return self._runtime.InferenceSession(self._model, options, providers=["CPUExecutionProvider"])
        except Exception as e:  # noqa: BLE001 - its errors derive from Exception alone
            raise InputError(f"{self.path}: ONNX Runtime does not load it ({short(e)})") from None

    def logits(self, feed: Mapping[str, Any]) -> NDArray[np.float32]:
        """(batch, labels). Arrays that the graph has no input for are an error, as are inputs without an array."""
        if feed.keys() != self.inputs.keys():
            raise InputError(f"{self.path}: takes {', '.join(self.inputs)}; given are {', '.join(feed)}")
        arrays = {k: np.asarray(v, _TYPES[self.inputs[k].type]) for k, v in feed.items()}
        found = self._ran(arrays)
        count = len(next(iter(feed.values())))
        if found.ndim != 2 or len(found) != count:
            raise InputError(f"{self.path}: logits have the shape {found.shape}, expected ({count}, labels)")
        return np.asarray(found, np.float32)

    def _ran(self, arrays: Mapping[str, Any]) -> NDArray[Any]:
        """The output. The setting against saturation gives weights one zero point beside their scales per channel (core/optimizer/qdq_transformer/avx2_weight_s8_to_u8.cc),
        which fails where such a weight is not multiplied in integers; then it is left out."""
        try:
            found: NDArray[Any] = self._session.run(["logits"], arrays)[0]
        except Exception as e:  # noqa: BLE001 - its errors derive from Exception alone
            if "zero_point" not in str(e) or self._settings.pop(onnx_session.PRECISE, None) is None:
                raise InputError(f"{self.path}: ONNX Runtime failed ({short(e)})") from None
            self._session = self._opened()
            return self._ran(arrays)
        return found

    def info(self) -> dict[str, str]:
        providers = ", ".join(self._session.get_providers())
        said = {key.removeprefix("session."): v for key, v in self._settings.items() if key != _FOLDER_OPTION}
        return {
            "runtime": "onnxruntime",
            "onnxruntime": str(self._runtime.__version__),
            "device": providers,
            **said,
        }
