"""A small convolutional network as an ONNX graph: `images` (batch, channels, height, width) to `logits`.

Static int8 is QuantizeLinear and DequantizeLinear around every convolution, as ONNX Runtime's selectors want it: what a step leaves is
rounded with the scale of the next weight's input, before pooling (which keeps codes; a mean is rounded again) and after it. With
uint8 inputs and ReLU, whose zero is the zero point, that makes QLinearConv, MaxPool on codes and MatMulIntegerToFloat. Biases of
such convolutions are int32 at the product of both scales. TensorRT wants symmetric inputs and biases as numbers; ONNX Runtime runs the
convolutions of such a graph in floats, as it does those before another activation than ReLU.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from lconvert.converters import onnx_arrays as arrays
from lconvert.converters import onnx_trt, regrid
from lconvert.converters import onnx_weights as weights
from lconvert.converters.onnx_builder import Builder, Shape
from lconvert.converters.onnx_weights import DIALECTS, Dialect
from lconvert.errors import UnsupportedError
from lconvert.ir import ActSpec, Conv, Convnet, Entry, Linear, Model, Pool, QTensor, Step, Tensor
from lconvert.kernels.qtensor import values
from lconvert.passes.histograms import watched
from lconvert.plan import Verdict

_POOLS = {"max": "MaxPool", "average": "AveragePool"}


def build(model: Model, dialect: Dialect, dtype: str, shape: Shape) -> Builder:
    """The whole graph of a convolutional network. `shape` says what only decoders have."""
    c = model.arch
    if not isinstance(c, Convnet):
        raise UnsupportedError(f"{model.source}: {c.family} is no convolutional network")
    b = Builder(model, dialect, dtype, shape)
    g = b.graph
    g.output("logits", b.number_type, ("batch", _last(c)))
    x = g.input("images", b.number_type, ("batch", *c.image))
    coded = {k: role for i, _ in c.weighted() for role in [f"steps.{i}"] for k in range(watched(c, i), i + 1)}
    for i, step in enumerate(c.steps):
        if (role := coded.get(i)) is not None:
            with g.scope(f"steps.{i}.input"):
                x = b._quantized(x, model.entries[role])
        with g.scope("steps" if isinstance(step, Linear) else f"steps.{i}"):
            x = _step(b, x, i, step)
    g.op("Squeeze", x, g.constant([1]), output="logits")
    return b


def _last(c: Convnet) -> int:
    """How many features come out; the last weighted step decides, or the flattened image does."""
    from lconvert.spec import shapes

    return shapes(c)[-1][0]


def _step(b: Builder, x: str, i: int, step: Step) -> str:
    """One step. Features are (batch, 1, features): ONNX Runtime fuses a product of matrices and its bias into a Gemm in floats."""
    g = b.graph
    match step:
        case Conv():
            return _conv(b, x, f"steps.{i}", step)
        case Linear():
            return b.linear(x, f"steps.{i}")
        case Pool():
            sides = [step.size, step.size]
            return str(g.op(_POOLS[step.kind], x, kernel_shape=sides, strides=sides))
    if step.kind == "flatten":
        return str(g.op("Reshape", x, g.constant([0, 1, -1])))
    kinds: dict[str, dict[str, Any]] = {"relu": {}, "tanh": {}, "gelu": {"approximate": "none"}}
    return str(g.op(step.kind.capitalize(), x, **kinds[step.kind]))


def _conv(b: Builder, x: str, role: str, step: Conv) -> str:
    entry = b.model.entries[role]
    inputs = [x, _weight(b, entry)]
    if step.bias:
        inputs.append(_bias(b, role, entry))
    sizes: dict[str, Any] = {
        "kernel_shape": list(step.kernel),
        "strides": [step.stride] * 2,
        "pads": [step.padding] * 4,
    }
    return str(b.graph.op("Conv", *inputs, **sizes))


def _int8(q: Any, dtype: str) -> bool:
    """Codes that DequantizeLinear has a form for: int8 with a scale per output channel, or one, that the graph's dtype holds."""
    return (
        isinstance(q, QTensor)
        and (q.grid.kind, q.grid.bits, q.grid.signed) == ("int", 8, True)
        and q.zero is None
        and q.offset is None
        and isinstance(q.scale, Tensor)
        and not q.divisor
        and q.block[0] in (1, -1)
        and set(q.block[1:]) == {-1}
        and regrid.holds(q.scale, dtype)
    )


def _scales(q: QTensor) -> NDArray[np.float32]:
    assert isinstance(q.scale, Tensor)
    return regrid.numbers(q.scale).reshape(-1)


def _weight(b: Builder, entry: Entry) -> str:
    q, role, g = entry.data, entry.name, b.graph
    if not isinstance(q, QTensor) or not _int8(q, b.dtype):
        own = q.dtype if isinstance(q, Tensor) else "F32"
        verdict = weights.plain(own, b.dtype)
        if isinstance(q, QTensor):
            verdict = Verdict(
                "widened" if b.dtype == "F32" else "rounded",
                f"as {b.dtype} values: no int8 whose scales {b.dtype} holds",
            )
        return b._add(arrays.rows(role, entry, b.dtype), role, verdict)
    exact, text = Verdict("exact"), f"INT8, per {'tensor' if q.block[0] == -1 else 'channel'}"
    scales = np.where(
        _scales(q) == 0, np.float32(1), _scales(q)
    )  # of codes that are all 0; TensorRT wants none of 0
    wide = (
        b.dialect is DIALECTS["trt"] and entry.activation is not None
    )  # as the scale of its input, onnx_trt.py
    codes = b._add(arrays.as_they_lie(role, q.codes, "INT8"), role, exact, text)
    if q.block[0] == -1:
        one = g.constant(float(scales[0]), "FLOAT" if wide else b.number_type)
        matrix = str(g.op("DequantizeLinear", codes, one))
    else:
        held = (scales, "FLOAT") if wide else (arrays.stored(scales, b.dtype), b.number_type)
        made = arrays.array(role + ".scale", *held)
        matrix = str(g.op("DequantizeLinear", codes, b._add(made, role, exact, side=True), axis=0))
    return onnx_trt.cast(b, matrix) if wide else matrix


def _bias(b: Builder, role: str, entry: Entry) -> str:
    """The bias: int32 where the product is one of integers in ONNX Runtime, else numbers."""
    name, q, a = role + ".bias", entry.data, entry.activation
    whole = isinstance(q, QTensor) and _int8(q, b.dtype) and _static(a)
    if not whole or b.dtype != "F32" or b.dialect is not DIALECTS["ort"]:
        return b.vector(name)
    assert isinstance(q, QTensor)
    assert a is not None and a.scale is not None
    x = values(b.model.entries[name].data).astype(np.float64)
    scale = (regrid.numbers(a.scale).reshape(-1)[0] * _scales(q)).astype(np.float32)
    divisor = np.where(scale > 0, scale, np.float32(1)).astype(np.float64)
    codes = np.rint(x / divisor)
    if np.abs(codes).max() > np.iinfo(np.int32).max:
        b.notes[f"{name} is beyond int32 at the scales of its product: this convolution runs in floats"] = (
            None
        )
        return b.vector(name)
    error = float(np.sqrt(np.square(codes * divisor - x).sum() / max(np.square(x).sum(), 1e-300)))
    verdict = Verdict("quantized", "to int32 at the scales of the product", error)
    made = b._add(arrays.array(name, codes.astype(np.int32), "INT32"), name, verdict, "INT32")
    if q.block[0] == -1:
        return str(b.graph.op("DequantizeLinear", made, b.number(float(scale[0])), name="dequantized_bias"))
    side = b._add(
        arrays.array(name + ".scale", divisor.astype(np.float32)), name, Verdict("exact"), side=True
    )
    return str(b.graph.op("DequantizeLinear", made, side, axis=0, name="dequantized_bias"))


def _static(a: ActSpec | None) -> bool:
    """Whether inputs are codes from 0 on with one scale: ReLU is then the lower end of the codes, and the convolution an integer one."""
    return a is not None and not a.dynamic and a.scale is not None and a.per == "tensor" and not a.grid.signed
