"""What TensorRT's parser and builder ask of a graph beyond ONNX, and how the same numbers are said within that.

- Scales of INT8 and FP8 codes are positive ("Scale coefficients must all be positive", onnx-tensorrt's QuantDequantLinearHelper): a
  block with a negative one has its codes negated, one with a zero scale holds zeros.
- Fewer bits come first: zero points of 4-bit codes are a second product instead of 8-bit codes.
- Scales that the graph's dtype lacks stay in F32 and the matrix is cast; plans keep the codes packed (measured: docs/tensorrt.md).
- Inputs are quantized by static symmetric Q/DQ pairs, or to NVFP4 by the operator TRT_FP4DynamicQuantize of the domain `trt`. Their
  scales and those of the weights they meet are F32: the builder wants both of one type ("type mismatch between matmul operand scales").
- Rotary embeddings of neighbours (`interleaved`) break the builder with dynamic shapes: the dimensions are put into halves first,
  for queries and keys alike, which leaves every score as it is.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from lconvert.converters import regrid
from lconvert.errors import UnsupportedError
from lconvert.ir import ActSpec, Attention, QTensor, Rope, Tensor, dense

if TYPE_CHECKING:
    from lconvert.converters.onnx_builder import Builder
    from lconvert.converters.onnx_weights import Form, Held

#: The domain of TensorRT's own operators, and what TRT_FP4DynamicQuantize makes of 16 numbers: E2M1 codes and an E4M3 scale.
DOMAIN, FP4_BLOCK, FP8_TYPE = "trt", 16, 17
_BITS = {"INT4": 4, "FLOAT4E2M1": 4, "INT8": 8, "FLOAT8E4M3FN": 8}


def legal(forms: Iterable[Form], q: QTensor) -> list[Form]:
    """Forms of q with positive scales, narrow before wide; those that no sign change makes legal are left out."""
    whole = regrid.integers(q) if regrid.is_plain(q) else None
    lowest = regrid.span(whole)[0] if whole is not None else -128
    made = [positive(form, lowest) for form in forms]
    return sorted((form for form in made if form is not None), key=lambda form: _BITS[form.type])


def positive(form: Form, lowest: int = -128) -> Form | None:
    """The same values with scales above zero; the parser takes INT4 and NVFP4 as they are. lowest: code that there can be."""
    q = form.codes
    if _BITS[form.type] == 4 or not isinstance(q.scale, Tensor):
        return form
    scale = regrid.numbers(q.scale)
    if (scale > 0).all():
        return form
    if form.type == "INT8" and lowest <= -128 and (scale < 0).any():
        return None  # -128 has no opposite
    sign = np.sign(scale).astype(np.int8)
    width = q.block[1] if q.block[1] > 0 else q.shape[1]

    def read(start: int, stop: int) -> NDArray[Any]:
        x = q.codes.read(start, stop)
        rows = sign if sign.shape[0] == 1 else sign[start:stop]
        by = np.repeat(rows, width, axis=1)
        if form.type == "INT8":
            return x.astype(np.int8) * by
        bits = x.view(np.uint8) ^ np.where(by < 0, 0x80, 0).astype(np.uint8)
        return np.where(by == 0, 0, bits).astype(np.uint8).view(x.dtype)

    above = dense(np.where(scale == 0, np.float32(1), np.abs(scale)))
    return replace(form, codes=replace(q, codes=replace(q.codes, read=read), scale=above))


# --- inputs ------------------------------------------------------------------------------------------------


def quantized_input(b: Builder, x: str, a: ActSpec) -> str:
    """x rounded to codes and back, by nodes that TensorRT fuses into the product."""
    if why := _lacking(a, "inputs"):
        raise UnsupportedError(f"{why}; {_REMEDY}")
    if _is_nvfp4(a):
        return _nvfp4(b, x, _multiplier(a))
    g, type_ = b.graph, "INT8" if a.grid.kind == "int" else "FLOAT8E4M3FN"
    s, z = g.constant(_multiplier(a), "FLOAT"), g.constant(0, type_)
    y = g.op("QuantizeLinear", g.op("Cast", x, to=1), s, z)
    return cast(b, g.op("DequantizeLinear", y, s, z))


def cache_reason(a: ActSpec) -> str:
    """Why keys or values cannot be rounded so; empty where they can."""
    if _is_nvfp4(a):
        return "TRT_FP4DynamicQuantize takes two or three dimensions, and a cache has four"
    return _lacking(a, "keys or values")


def _is_nvfp4(a: ActSpec) -> bool:
    return (a.grid.exponent, a.grid.mantissa) == (2, 1) and a.group == FP4_BLOCK and a.scale is not None


def _lacking(a: ActSpec, what: str) -> str:
    """What of `a` TensorRT has no form for; empty where there is one."""
    if _is_nvfp4(a):
        return ""
    if a.grid.kind == "int" and (not a.grid.signed or (a.zero is not None and regrid.numbers(a.zero).any())):
        return f"TensorRT refuses non-zero zero points, and this model's {what} have them"
    integers = a.grid.kind == "int" and a.grid.bits == 8
    if not (integers or (a.grid.exponent, a.grid.mantissa) == (4, 3)):
        return f"TensorRT has no {what} of {a.grid.bits} bits ({a.grid.kind})"
    if a.dynamic or a.scale is None:
        return f"TensorRT's parser has no {what} quantized per {a.per} while the model runs (DynamicQuantizeLinear is refused)"
    count = regrid.numbers(a.scale).size
    return f"{what} with {count} static scales have no TensorRT form" if count != 1 else ""


_REMEDY = "quantize the plain model with static symmetric inputs (--w8a8, --fp8 with --calibrate TEXT), or use the ort dialect"


def _multiplier(a: ActSpec) -> float:
    """The one static scale, as what multiplies codes."""
    assert a.scale is not None
    value = np.float32(regrid.numbers(a.scale).reshape(-1)[0])
    return float(np.float32(1) / value) if a.divisor else float(value)


def _nvfp4(b: Builder, x: str, scale: float) -> str:
    """Blocks of 16 with scales found at run time below a static global one."""
    g = b.graph
    s = g.constant(scale, "FLOAT")
    codes, fine = g.op(
        "TRT_FP4DynamicQuantize", x, s, outputs=2, domain=DOMAIN, axis=-1, block_size=FP4_BLOCK, scale_type=FP8_TYPE
    )  # fmt: skip
    scales = g.op("DequantizeLinear", fine, s, name="scales")
    return cast(b, g.op("DequantizeLinear", codes, scales, axis=-1, block_size=FP4_BLOCK))


# --- the rest of the graph ---------------------------------------------------------------------------------


def cast(b: Builder, x: str) -> str:
    """x in the graph's dtype."""
    return str(b.graph.op("Cast", x, to=b.graph._type(b.number_type)))


def halves(b: Builder, x: str, rope: Rope, width: int) -> tuple[str, Rope]:
    """x whose turned dimensions lie as halves, not as neighbours, and the rope that turns them so."""
    order = np.arange(width)
    order[: rope.dim] = np.concatenate([np.arange(0, rope.dim, 2), np.arange(1, rope.dim, 2)])
    index = b.graph.constant(order)
    return str(b.graph.op("Gather", x, index, axis=-1, name="halves")), replace(rope, layout="half")


def fused(a: Attention) -> bool:
    """Whether Attention takes these heads: "Query, Key, Value tensors must have the same head dimension"."""
    return a.mla is None or a.mla.v_dim == a.head_dim


def quantized_rows(b: Builder, role: str, found: Held, ids: str) -> str:
    """Rows of a quantized table, dequantized before they are gathered: scales must be constants."""
    from lconvert.converters import onnx_arrays as arrays
    from lconvert.converters import onnx_weights as weights

    form, g = found.form, b.graph
    assert form is not None and isinstance(form.codes.scale, Tensor)
    q, scales = form.codes, form.codes.scale
    table = arrays.as_they_lie(role + ".table", q.codes, form.type)
    codes = b._add(table, role, found.verdict, weights.describe(form))
    type_ = "FLOAT" if form.wide else b.number_type
    scale = b._add(arrays.as_they_lie(role + ".table.scale", scales, type_), role, found.verdict, side=True)
    rows = g.op("Gather", g.op("DequantizeLinear", codes, scale, axis=1, block_size=q.block[1]), ids)
    return cast(b, rows) if form.wide else str(rows)
