"""Inputs, keys and values that a graph quantizes by nodes of their own, read back as the ActSpec that the nodes mean.

QuantizeLinear and DequantizeLinear are the pair that ONNX Runtime fuses; in TensorRT's graphs a Cast to F32 stands before it and one to
the graph's dtype after it (converters/onnx_trt.py), and NVFP4 is TRT_FP4DynamicQuantize with two DequantizeLinear.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from lconvert.converters.onnx_rounding import Rounding
from lconvert.converters.onnx_trt import DOMAIN, FP4_BLOCK, FP8_TYPE
from lconvert.errors import InputError, UnsupportedError
from lconvert.formats.onnx_reader import OnnxFile, integers
from lconvert.ir import E2M1, E4M3, ActSpec, Grid, as_f32, dense, int_grid

_GRIDS: dict[str, Grid] = {"INT8": int_grid(8, True), "UINT8": int_grid(8, False), "FLOAT8E4M3FN": E4M3}
_FLOATS = {"FLOAT": "F32", "FLOAT16": "F16", "BFLOAT16": "BF16"}
#: TensorProto.FLOAT
_F32 = 1
FP4_QUANTIZE = "TRT_FP4DynamicQuantize"


def wrong(file: OnnxFile, role: str, what: str) -> InputError:
    return InputError(f"{file.path}: {role}: {what}; lconvert writes no such graph")


def found(file: OnnxFile, role: str, name: str) -> Rounding | None:
    """How the value `name` was quantized and dequantized on the way to it, None where no such nodes stand before it.

    InputError for nodes that take different scales there and back, or attributes that no scheme has.
    """
    last = file.producers.get(name)
    cast = last if last is not None and last.op_type == "Cast" else None
    back = last if cast is None else file.producers.get(cast.input[0])
    if back is None or back.op_type != "DequantizeLinear":
        return None
    there = file.producers.get(back.input[0])
    if there is None:
        return None
    if (there.op_type, there.domain) == (FP4_QUANTIZE, DOMAIN):
        return Rounding(there.input[0], _nvfp4(file, role, there, back))
    if there.op_type != "QuantizeLinear":
        return None
    spec, source = _static(file, role, there, back), str(there.input[0])
    if cast is not None:
        widened = file.producers.get(source)
        if widened is None or widened.op_type != "Cast" or integers(widened).get("to") != _F32:
            raise wrong(file, role, "its input is rounded in another type than the one that it is cast from")
        source = str(widened.input[0])
    return Rounding(source, spec)


def _static(file: OnnxFile, role: str, there: Any, back: Any) -> ActSpec:
    """Static where the scale is a constant."""
    if list(there.input[1:]) != list(back.input[1:]):
        raise wrong(file, role, "its input is dequantized with another scale than it is quantized with")
    if integers(there).get("saturate", 1) != 1:
        raise wrong(file, role, "its input is not saturated")
    scale = file.tensors.get(there.input[1])
    zero = file.tensors.get(there.input[2]) if len(there.input) > 2 else None
    grid = _GRIDS.get("UINT8" if zero is None else zero.type)
    if grid is None:
        raise UnsupportedError(f"{file.path}: {role}: an input of type {zero.type if zero else '?'}")
    if scale is None:
        return ActSpec(grid, "token", True)
    if scale.shape not in ((), (1,)) or scale.type not in _FLOATS:
        raise wrong(file, role, f"a static scale of type {scale.type} and shape {scale.shape} for its input")
    middle = None
    if zero is not None and grid.kind == "int" and zero.load().reshape(-1)[:1].any():
        middle = dense(zero.load().reshape(1).astype(np.int32))
    given = as_f32(scale.load(), _FLOATS[scale.type]).reshape(1)
    return ActSpec(grid, "tensor", False, None, dense(given), middle)


def _nvfp4(file: OnnxFile, role: str, there: Any, back: Any) -> ActSpec:
    """Blocks of 16 along the features, their FP8 scales found at run time below the one that is stored."""
    scales = file.producers.get(back.input[1]) if len(back.input) == 2 else None
    inner = scales is not None and scales.op_type == "DequantizeLinear" and len(scales.input) == 2
    if scales is None or not inner or len(there.input) != 2 or len(there.output) != 2:
        raise wrong(file, role, "its input of FP4 has no scales in two levels")
    if [back.input[0], scales.input[0]] != list(there.output) or scales.input[1] != there.input[1]:
        raise wrong(file, role, "its input is dequantized with another scale than it is quantized with")
    said, wanted = integers(there), {"axis": -1, "block_size": FP4_BLOCK}
    if said != {**wanted, "scale_type": FP8_TYPE} or integers(back) != wanted:
        raise wrong(file, role, f"its input of FP4 is quantized with {said}")
    scale = file.tensors.get(there.input[1])
    if scale is None or scale.type != "FLOAT" or scale.shape not in ((), (1,)):
        raise wrong(file, role, "the scale of its input of FP4 is not one constant")
    return ActSpec(E2M1, "group", True, FP4_BLOCK, dense(as_f32(scale.load(), "F32").reshape(1)))
