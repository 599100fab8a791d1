"""Weights and biases of convolutions out of a graph that lconvert wrote (onnx_cnn.py): codes along the output channels, int32 biases."""

from __future__ import annotations

from typing import Any

import numpy as np

from lconvert.errors import InputError
from lconvert.formats import onnx_reader
from lconvert.formats.onnx_reader import OnnxFile, Stored, integers
from lconvert.ir import QTensor, Tensor, as_f32, dense, int_grid

_FLOATS = {"FLOAT": "F32", "FLOAT16": "F16", "BFLOAT16": "BF16"}


def _wrong(file: OnnxFile, role: str, what: str) -> InputError:
    return InputError(f"{file.path}: {role}: {what}; lconvert writes no such graph")


def _only(file: OnnxFile, name: str, role: str, kinds: tuple[str, ...]) -> Any:
    """The one node that takes a value, of one of these kinds."""
    found = file.consumers.get(name, [])
    if len(found) != 1 or found[0].op_type not in kinds:
        raise _wrong(
            file,
            role,
            f"{name!r} is taken by {[n.op_type for n in found]}, expected one {' or '.join(kinds)}",
        )
    return found[0]


def weight(file: OnnxFile, role: str, t: Stored) -> tuple[Tensor | QTensor, str]:
    """What a convolution multiplies by, and the name of its input."""
    node = _only(file, role, role, ("Conv", "DequantizeLinear"))
    if node.op_type == "Conv":
        if len(node.input) < 2 or node.input[1] != role or t.type not in _FLOATS:
            raise _wrong(file, role, f"{t.type} where a convolution has no weight")
        return onnx_reader.tensor(t), str(node.input[0])
    after = _only(file, node.output[0], role, ("Conv", "Cast"))
    name = node.output[0]
    if after.op_type == "Cast":
        name = after.output[0]
        after = _only(file, name, role, ("Conv",))
    if len(after.input) < 2 or after.input[1] != name or t.type != "INT8":
        raise _wrong(file, role, f"{t.type} codes that no convolution multiplies by")
    scale = _scale(file, role, node, t.shape[0])
    block = (-1 if scale.size == 1 and not _axis(file, node) else 1, -1, -1, -1)
    shaped = dense(scale.reshape(-1, 1, 1, 1))
    return QTensor(t.shape, onnx_reader.tensor(t), int_grid(8, True), block, shaped), str(after.input[0])


def _axis(file: OnnxFile, node: Any) -> bool:
    """Whether a DequantizeLinear has a scale for each output channel."""
    found = file.tensors.get(node.input[1])
    return found is not None and len(found.shape) == 1


def _scale(file: OnnxFile, role: str, node: Any, channels: int) -> Any:
    found = file.tensors.get(node.input[1])
    if found is None or found.type not in _FLOATS:
        raise _wrong(file, role, f"its scale {node.input[1]!r} is no constant of floats")
    if len(node.input) > 2 and node.input[2]:
        raise _wrong(file, role, "a zero point")
    if found.shape not in ((), (channels,)) or (found.shape and integers(node).get("axis", 1) != 0):
        raise _wrong(file, role, f"scales of shape {found.shape} along axis {integers(node).get('axis', 1)}")
    return as_f32(found.load(), _FLOATS[found.type]).reshape(-1)


def bias(file: OnnxFile, role: str, t: Stored) -> Tensor:
    """The numbers that int32 codes stand for."""
    node = _only(file, role, role, ("DequantizeLinear",))
    conv = _only(file, node.output[0], role, ("Conv",))
    if len(conv.input) < 3 or conv.input[2] != node.output[0] or len(t.shape) != 1:
        raise _wrong(file, role, "codes that are no convolution's bias")
    scale = _scale(file, role, node, t.shape[0])
    return dense((t.load().astype(np.float64) * scale).astype(np.float32))
