"""Inputs of matrices, and keys and values, rounded while the graph runs, as an ActSpec says.

Static scales of 8-bit integers are QuantizeLinear and DequantizeLinear, which ONNX Runtime fuses with the product. All else is plain
arithmetic (ReduceMax, Div, Round, Cast): per token, per group, with scales of 8 bits under a global one. Codes of int8 that are
found at run time meet int8 weights in MatMulInteger. Scales are those of
vLLM's kernels: largest magnitude / 127 for int8 (model_executor/layers/quantization/utils/int8_utils.py), / 448 and not below
1 / (448 * 512) for FP8 (input_quant_fp8.py), powers of two for MXFP8 (utils/mxfp8_utils.py) and as compressed-tensors rounds them for
MXFP4 (quantization/utils/mxfp_utils.py). FP8 is a Cast there and back: ONNX Runtime 1.31 fuses QuantizeLinear to FP8 into a
MatMulIntegerToFloat that it then refuses to load.
"""

from __future__ import annotations

from dataclasses import replace
from math import log
from typing import TYPE_CHECKING, Protocol

from lconvert.converters import regrid
from lconvert.ir import E2M1, E4M3, E8M0, ActSpec, Entry, QTensor, Tensor, int_grid

if TYPE_CHECKING:
    from lconvert.converters.onnx_builder import Builder
    from lconvert.formats.onnx_graph import Graph

FLOAT, UINT8, FLOAT8 = 1, 2, 17  # TensorProto.FLOAT, UINT8, FLOAT8E4M3FN
_LARGEST = {E4M3: 448.0, E2M1: 6.0}
#: The least scale that is found: of FP8 vLLM's, of integers one that nothing real falls below.
_LEAST_FP8, _LEAST = 1 / (448.0 * 512.0), 1e-30
#: What the last node of a rounding is called, by which it is found again (onnx_rounding).
NAME = "rounded"


class Site(Protocol):
    """Where plain arithmetic goes: a graph of a dtype, in which values have so many dimensions."""

    @property
    def graph(self) -> Graph: ...
    @property
    def dtype(self) -> str: ...
    @property
    def rank(self) -> int: ...


def reason(a: ActSpec, b: Builder, powers: bool = False) -> str:
    """Why a graph cannot round inputs so; empty where it can."""
    if a.grid.kind == "codebook" or (a.grid.kind == "float" and a.grid not in _LARGEST):
        return f"a grid of {a.grid.bits} bits ({a.grid.kind}) has no ONNX operators"
    if a.per == "head":
        return "scales per head have no graph"
    if a.per == "group" and not a.group:
        return "its groups have no size"
    static = not a.dynamic and not powers
    if static and a.scale is None:
        return "its static scale is not in the checkpoint"
    if a.scale is not None and regrid.numbers(a.scale).size != 1:
        return "it has several static scales"
    if b.dialect.dynamic_inputs or (b.dialect.nodes and static and _as_nodes(a, b)):
        return ""
    return (
        "TensorRT takes static symmetric scales of int8 and FP8, one per tensor, that the graph's dtype holds"
    )


def exponents(entry: Entry) -> bool:
    """Whether the scales of this entry's inputs are powers of two, as those of its weights are (MXFP8, MXFP4, UE8M0)."""
    a, q = entry.activation, entry.data
    dynamic = a is not None and a.dynamic and a.per == "group" and a.scale is None
    return dynamic and isinstance(q, QTensor) and isinstance(q.scale, QTensor) and q.scale.grid == E8M0


def quantized(b: Builder, x: str, a: ActSpec, powers: bool = False) -> str:
    """x rounded to codes and back, in its own type; `reason` has nothing against it."""
    if not a.dynamic and _as_nodes(a, b):
        return _nodes(b, x, a)
    return arithmetic(b, x, a, powers)


def arithmetic(b: Site, x: str, a: ActSpec, powers: bool = False) -> str:
    """The same by plain operators alone."""
    g = b.graph
    wide = x if b.dtype == "F32" else g.op("Cast", x, to=FLOAT)
    if a.per == "group" and a.dynamic:
        y = _grouped(b, wide, a, powers)
    else:
        y = _rounded(b, wide, a, powers, _axis(b, a))
    return str(y if b.dtype == "F32" else g.op("CastLike", y, x, name=NAME))


def text(a: ActSpec, powers: bool = False) -> str:
    """In a few words: "FP8, dynamic per token"."""
    names = {E4M3: "FP8", E2M1: "FP4"}
    grid = names.get(a.grid) or f"{'' if a.grid.signed else 'u'}int{a.grid.bits}"
    per = f"group of {a.group}" if a.per == "group" else a.per
    return f"{grid}, {'dynamic' if a.dynamic else 'static'} per {per}{', powers of two' if powers else ''}"


def whole(a: ActSpec | None, b: Builder) -> bool:
    """Whether inputs are signed 8-bit integers with a scale per token or for all, found at run time: MatMulInteger takes them."""
    if a is None or not b.shape.rounding or not b.dialect.dynamic_inputs or a.per not in ("token", "tensor"):
        return False
    return a.grid == int_grid(8, True) and a.dynamic and a.scale is None and a.zero is None


def codes(b: Site, x: str, a: ActSpec) -> tuple[str, str]:
    """Codes of x as UINT8 with a zero point of 128, and their scales in fp32, for inputs that are `whole`.

    ONNX Runtime's signed by signed products take 26 times as long (K = N = 2048, AVX512-VNNI).
    """
    g, key = b.graph, (x, a.per)

    def scale() -> str:
        wide = x if b.dtype == "F32" else g.op("Cast", x, to=FLOAT)
        return str(
            g.op("Max", g.op("Div", _largest(b, wide, _axis(b, a)), _number(b, 127.0)), _number(b, _LEAST))
        )

    scales = g.once(("scales", *key), scale)

    def made() -> str:
        wide = x if b.dtype == "F32" else g.op("Cast", x, to=FLOAT)
        rounded = g.op("Round", g.op("Div", wide, scales))
        return str(g.op("Cast", g.op("Add", rounded, _number(b, 128.0)), to=UINT8))

    return g.once(("codes", *key), made), scales


# --- static ------------------------------------------------------------------------------------------------


def _as_nodes(a: ActSpec, b: Builder) -> bool:
    """Whether QuantizeLinear says it: one scale that the graph's dtype holds."""
    if a.scale is None or a.divisor or a.per != "tensor":
        return False
    fp8 = a.grid == E4M3 and b.dialect.nodes
    whole = (
        a.grid.kind == "int"
        and a.grid.bits == 8
        and ((a.grid.signed and not _zero(a)) or not b.dialect.nodes)
    )
    return (fp8 or whole) and regrid.holds(a.scale, b.dtype)


def _nodes(b: Builder, x: str, a: ActSpec) -> str:
    g = b.graph
    type_ = "FLOAT8E4M3FN" if a.grid == E4M3 else "INT8" if a.grid.signed else "UINT8"
    assert a.scale is not None
    scale, zero = b.number(float(regrid.numbers(a.scale).reshape(-1)[0])), g.constant(_zero(a), type_)
    return str(g.op("DequantizeLinear", g.op("QuantizeLinear", x, scale, zero), scale, zero))


def _zero(a: ActSpec) -> int:
    return 0 if a.zero is None else int(regrid.numbers(a.zero).reshape(-1)[0])


def _stored(b: Site, scale: Tensor) -> str:
    return str(b.graph.constant(float(regrid.numbers(scale).reshape(-1)[0]), "FLOAT"))


def _static(b: Site, a: ActSpec) -> str:
    """The stored scale as a multiplier, in fp32."""
    assert a.scale is not None
    scale = _stored(b, a.scale)
    return str(b.graph.op("Div", _number(b, 1.0), scale)) if a.divisor else scale


# --- while the graph runs ----------------------------------------------------------------------------------


def _number(b: Site, x: float) -> str:
    return b.graph.constant(x, "FLOAT")


def _grouped(b: Site, x: str, a: ActSpec, powers: bool) -> str:
    """Groups along the last axis, a short last one filled with zeros, which change no maximum. No -1 in shapes: x may have no rows."""
    g, size = b.graph, a.group
    assert size
    front, width = g.op("Shape", x, end=-1), g.op("Shape", x, start=-1)
    groups = g.op("Div", g.op("Add", width, g.constant([size - 1])), g.constant([size]))
    whole = g.op("Mul", groups, g.constant([size]))
    lack = g.op("Concat", g.constant([0]), g.op("Sub", whole, width), axis=0)
    filled = g.op("Pad", x, lack, "", g.constant([-1]))
    cut = g.op("Reshape", filled, g.op("Concat", front, groups, g.constant([size]), axis=0))
    y = _rounded(b, cut, replace(a, per="token"), powers, b.rank)
    joined = g.op("Reshape", y, g.op("Concat", front, whole, axis=0))
    return str(g.op("Slice", joined, g.constant([0]), width, g.constant([-1]), name=NAME))


def _rounded(b: Site, x: str, a: ActSpec, powers: bool, axis: int | None) -> str:
    """Codes of x along an axis, or of all of it, times their scale."""
    g = b.graph
    if a.grid.kind == "int":
        return _integers(b, x, a, axis)
    if not a.dynamic:
        scale = _static(b, a)
    else:
        top = _largest(b, x, axis)
        scale = _power(b, top, a) if powers else _float_scale(b, top, a)
    y = g.op("Div", x, scale)
    y = _fp8(b, y) if a.grid == E4M3 else _fp4(b, y)
    return str(g.op("Mul", y, scale, name=NAME))


def _axis(b: Site, a: ActSpec) -> int | None:
    """The axis of features, None where one scale is for everything."""
    return None if a.per == "tensor" else b.rank - 1


def _largest(b: Site, x: str, axis: int | None) -> str:
    """The largest magnitude along an axis or of everything."""
    return _extreme(b, "ReduceMax", b.graph.op("Abs", x), axis)


def _extreme(b: Site, kind: str, x: str, axis: int | None) -> str:
    """Also of the no tokens that an expert gets: ONNX Runtime 1.31 does not reduce them along axis -1, and everything needs a zero."""
    g = b.graph
    if axis is not None:
        return str(g.op(kind, x, g.constant([axis]), keepdims=1))
    flat = g.op("Concat", g.op("Reshape", x, g.constant([-1])), g.constant([0.0], "FLOAT"), axis=0)
    return str(g.op(kind, flat, g.constant([0]), keepdims=0))


def _float_scale(b: Site, top: str, a: ActSpec) -> str:
    g, overall = b.graph, None if a.scale is None else _stored(b, a.scale)
    scale = g.op("Div", top, _number(b, _LARGEST[a.grid]))
    if overall is None or a.per == "tensor":
        return str(g.op("Max", scale, _number(b, _LEAST_FP8 if a.grid == E4M3 else _LEAST)))
    if a.grid == E4M3:  # fbgemm: an upper bound
        return str(g.op("Min", g.op("Max", scale, _number(b, _LEAST_FP8)), overall))
    ops = ("Mul", "Div") if a.divisor else ("Div", "Mul")
    small = _fp8(b, g.op(ops[0], scale, overall))
    # a group whose scale rounds to nothing is all zeros
    small = g.op("Where", g.op("Equal", small, _number(b, 0.0)), _number(b, 1.0), small)
    return str(g.op(ops[1], small, overall))


def _power(b: Site, top: str, a: ActSpec) -> str:
    """The least power of two s with top <= 448 s for FP8, and top < 7 s for FP4, where 7 is halfway to what does not exist.

    Log may be one off, so its guess is compared with both neighbours: those products are exact.
    """
    g = b.graph
    limit, beyond = (448.0, "Greater") if a.grid == E4M3 else (7.0, "GreaterOrEqual")
    safe = g.op("Max", top, _number(b, _LEAST))
    guess = g.op("Ceil", g.op("Div", g.op("Log", g.op("Div", safe, _number(b, limit))), _number(b, log(2.0))))
    power = g.op("Pow", _number(b, 2.0), g.op("Max", guess, _number(b, -126.0)))
    double = g.op("Mul", power, _number(b, 2.0))
    half = g.op("Mul", power, _number(b, 0.5))
    power = g.op("Where", g.op(beyond, safe, g.op("Mul", power, _number(b, limit))), double, power)
    enough = g.op("Not", g.op(beyond, safe, g.op("Mul", half, _number(b, limit))))
    return str(g.op("Where", enough, half, power))


def _integers(b: Site, x: str, a: ActSpec, axis: int | None) -> str:
    g, bits = b.graph, a.grid.bits
    low, high = (-(1 << (bits - 1)), (1 << (bits - 1)) - 1) if a.grid.signed else (0, (1 << bits) - 1)
    zero: str | None = None
    if not a.dynamic:
        scale, at = _static(b, a), _zero(a)
        zero = _number(b, float(at)) if at else None
    elif a.grid.signed:
        scale = g.op("Max", g.op("Div", _largest(b, x, axis), _number(b, float(high))), _number(b, _LEAST))
    else:
        top = g.op("Max", _extreme(b, "ReduceMax", x, axis), _number(b, 0.0))
        bottom = g.op("Min", _extreme(b, "ReduceMin", x, axis), _number(b, 0.0))
        scale = g.op(
            "Max", g.op("Div", g.op("Sub", top, bottom), _number(b, float(high))), _number(b, _LEAST)
        )
        zero = g.op("Round", g.op("Neg", g.op("Div", bottom, scale)))
    y = g.op("Round", g.op("Div", x, scale))
    y = y if zero is None else g.op("Add", y, zero)
    y = g.op("Clip", y, _number(b, float(low)), _number(b, float(high)))
    y = y if zero is None else g.op("Sub", y, zero)
    return str(g.op("Mul", y, scale, name=NAME))


def _fp8(b: Site, x: str) -> str:
    """To E4M3, nearest, ties to even, 448 where it is more, and back."""
    g = b.graph
    return str(g.op("Cast", g.op("Cast", x, to=FLOAT8, saturate=1), to=FLOAT))


def _fp4(b: Site, x: str) -> str:
    """To E2M1 in arithmetic: steps of 1/2 below 2, 1 below 4, 2 up to 6; the parity of a multiple is that of its code."""
    g = b.graph
    size = g.op("Abs", x)
    coarse = g.op("Where", g.op("Less", size, _number(b, 4.0)), _number(b, 1.0), _number(b, 2.0))
    step = g.op("Where", g.op("Less", size, _number(b, 2.0)), _number(b, 0.5), coarse)
    y = g.op("Mul", g.op("Round", g.op("Div", x, step)), step)
    return str(g.op("Clip", y, _number(b, -6.0), _number(b, 6.0)))
