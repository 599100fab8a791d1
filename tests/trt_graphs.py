"""Smallest graphs that break one rule of TensorRT's, and their legal twins."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from onnx import TensorProto, helper

from lconvert.converters import tensorrt

K = 64
_PACKED = {"INT4": 2, "UINT4": 2, "FLOAT4E2M1": 2, "UINT2": 4, "INT2": 4}


class Small:
    """A graph of x (4, 64) to y under construction."""

    def __init__(self, dtype: str = "FLOAT16", opset: int = 25) -> None:
        self.nodes: list[Any] = []
        self.tensors: list[Any] = []
        self.dtype, self.opset = dtype, opset

    def t(self, type_: str, shape: tuple[int, ...], value: Any = None) -> str:
        """A constant: codes of a byte pattern, or numbers."""
        name, n = f"t{len(self.tensors)}", int(np.prod(shape))
        if type_ in _PACKED or type_.startswith("FLOAT8") or type_ in ("INT8", "UINT8"):
            size = -(-n // _PACKED.get(type_, 1))
            raw = np.full(size, 0x11 if value is None else value, np.uint8).tobytes()
            made = helper.make_tensor(name, getattr(TensorProto, type_), shape, raw, raw=True)
        else:
            numbers = np.broadcast_to(np.asarray(0.01 if value is None else value), shape).reshape(-1)
            made = helper.make_tensor(name, getattr(TensorProto, type_), shape, numbers.tolist())
        self.tensors.append(made)
        return name

    def op(self, kind: str, *inputs: str, outputs: int = 1, domain: str = "", **attributes: Any) -> Any:
        names = [f"n{len(self.nodes)}.{i}" for i in range(outputs)]
        self.nodes.append(
            helper.make_node(kind, list(inputs), names, f"{kind}.{len(self.nodes)}", domain=domain, **attributes)
        )  # fmt: skip
        return names[0] if outputs == 1 else names

    def cast(self, x: str, to: str = "FLOAT16") -> str:
        return str(self.op("Cast", x, to=getattr(TensorProto, to)))

    def model(self, result: str) -> Any:
        last = helper.make_node("Identity", [result], ["y"], "last")
        ports = [helper.make_tensor_value_info(n, getattr(TensorProto, self.dtype), s) for n, s in (("x", (4, K)), ("y", None))]  # fmt: skip
        graph = helper.make_graph([*self.nodes, last], "g", ports[:1], ports[1:], self.tensors)
        opsets = [helper.make_opsetid(d, v) for d, v in (("", self.opset), ("trt", 1), ("com.microsoft", 1))]
        return helper.make_model(graph, opset_imports=opsets, ir_version=11)


@dataclass(frozen=True)
class Pair:
    """rule: that `bad` breaks. sm: built for."""

    rule: str
    bad: Callable[[Small], str]
    good: Callable[[Small], str]
    sm: int = 120
    good_sm: int = 120


def product(type_: str = "INT8", *, scale: Any = None, scales: str = "FLOAT16", block: int = 32, zero: Any = None, cast: bool = False, **more: Any) -> Callable[[Small], str]:  # fmt: skip
    """x times a matrix of codes."""

    def made(g: Small) -> str:
        shape = (K // block, K) if block else (K,)
        inputs = [g.t(type_, (K, K)), g.t(scales, shape, scale)]
        inputs += [] if zero is None else [g.t(type_, shape, zero)]
        where = {"axis": 0, "block_size": block} if block else {"axis": 1}
        w = g.op("DequantizeLinear", *inputs, **where, **more)
        return str(g.op("MatMul", "x", g.cast(w) if cast else w))

    return made


def inputs(type_: str, zero: int) -> Callable[[Small], str]:
    """x quantized, times a matrix of INT8."""

    def made(g: Small) -> str:
        s, z = g.t("FLOAT16", ()), g.t(type_, (), zero)
        x = g.op("DequantizeLinear", g.op("QuantizeLinear", "x", s, z), s, z)
        return str(g.op("MatMul", x, g.op("DequantizeLinear", g.t("INT8", (K, K)), g.t("FLOAT16", ()))))

    return made


def attention(outputs: int = 1, dtype: str = "FLOAT16", wide: int = 32, **more: Any) -> Callable[[Small], str]:  # fmt: skip
    def made(g: Small) -> str:
        def heads(width: int) -> str:
            cut = g.op("Reshape", "x", g.t("INT64", (4,), [1, 2, 4, 32]))
            y = g.op("MatMul", cut, g.t("FLOAT16", (32, width)))
            return str(y if dtype == "FLOAT16" else g.cast(y, dtype))

        y = g.op("Attention", heads(32), heads(32), heads(wide), outputs=outputs, **more)
        return g.cast(y if outputs == 1 else y[0])

    return made


def rows(scales: int, block: int) -> Callable[[Small], str]:
    """As many rows of scales for the columns of a matrix."""

    def made(g: Small) -> str:
        w = g.op(
            "DequantizeLinear", g.t("INT4", (K, K)), g.t("FLOAT16", (scales, K)), axis=0, block_size=block
        )
        return str(g.op("MatMul", "x", w))

    return made


def middle(block: int = 32, axis: int = 0) -> Callable[[Small], str]:
    """Codes of three dimensions with blocks along one of them."""

    def made(g: Small) -> str:
        shape = [K, 2, 32]
        scales = [n // block if i == axis else n for i, n in enumerate(shape)]
        w = g.op("DequantizeLinear", g.t("INT4", tuple(shape)), g.t("FLOAT16", tuple(scales)), axis=axis, block_size=block)  # fmt: skip
        return str(g.op("MatMul", "x", g.op("Reshape", w, g.t("INT64", (2,), [K, K]))))

    return made


def dynamic(g: Small) -> str:
    codes, _, _ = g.op("DynamicQuantizeLinear", g.cast("x", "FLOAT"), outputs=3)
    return g.cast(g.cast(codes, "INT32"))


def integers(g: Small) -> str:
    return g.cast(g.op("MatMulInteger", g.cast("x", "INT8"), g.t("INT8", (K, K))))


def contributed(g: Small) -> str:
    packed = g.t("UINT8", (K, 2, 16))
    return str(g.op("MatMulNBits", "x", packed, g.t("FLOAT16", (K * 2,)), domain="com.microsoft", K=K, N=K, bits=4, block_size=32))  # fmt: skip


def nvfp4(**more: Any) -> Callable[[Small], str]:
    """Scales in two levels, in F32."""

    def made(g: Small) -> str:
        scales = g.op("DequantizeLinear", g.t("FLOAT8E4M3FN", (K // 16, K)), g.t("FLOAT", ()))
        w = g.op("DequantizeLinear", g.t("FLOAT4E2M1", (K, K)), scales, axis=0, block_size=16, **more)
        return str(g.op("MatMul", "x", w if more else g.cast(w)))

    return made


def there_and_back(type_: str) -> Callable[[Small], str]:
    return lambda g: g.cast(g.cast("x", type_))


def looked_up(first: bool) -> Callable[[Small], str]:
    """Rows of a table of codes by numbers out of x, before or after they are dequantized."""

    def made(g: Small) -> str:
        row = g.op(
            "Gather", g.op("Gather", "x", g.t("INT64", (), 0), axis=0), g.t("INT64", (4,), [0, 1, 2, 3])
        )
        at, table = g.cast(row, "INT64"), [g.t("INT8", (K, K)), g.t("FLOAT16", (K, 2))]
        if first:
            table = [g.op("Gather", t, at) for t in table]
        y = g.op("DequantizeLinear", *table, axis=1, block_size=32)
        return str(y if first else g.op("Gather", y, at))

    return made


def one(kind: str) -> Callable[[Small], str]:
    return lambda g: str(g.op(kind, "x"))


PAIRS: tuple[Pair, ...] = (
    Pair("tensor-type", product("UINT4"), product("INT4")),
    Pair("tensor-type", product("UINT2"), product("INT4", block=8)),
    Pair("tensor-type", product("FLOAT8E5M2"), product("FLOAT8E4M3FN")),
    Pair("tensor-type", lambda g: g.cast(g.cast("x", "INT16")), lambda g: g.cast(g.cast("x", "INT32"))),
    Pair("code-type", product("UINT8"), product("INT8")),
    Pair("code-type", product("UINT8", block=0, zero=0), product("INT8", block=0, zero=0)),
    Pair("zero-point", product("INT4", zero=0x88), product("INT4", zero=0)),
    Pair("zero-point", product("INT8", block=0, zero=3), product("INT8", block=0)),
    Pair("zero-point", inputs("INT8", 3), inputs("INT8", 0)),
    Pair("zero-point", inputs("UINT8", 128), inputs("UINT8", 0)),
    Pair("positive-scale", product("INT8", scale=-0.01), product("INT4", scale=-0.01)),
    Pair("positive-scale", product("INT8", scale=0.0, block=0), product("INT4", scale=0.0)),
    Pair("positive-scale", product("FLOAT8E4M3FN", scale=-0.01), product("FLOAT8E4M3FN")),
    Pair("block-output-type", product("INT4", scales="FLOAT", output_dtype=TensorProto.FLOAT16), product("INT4", scales="FLOAT", cast=True)),
    Pair("block-axis", middle(32, 0), middle(32, 2)),
    Pair("block-axis", product("INT4", block=1), product("INT4", block=2)),
    Pair("whole-blocks", rows(3, 24), rows(4, 16)),
    Pair("attention-outputs", attention(3), attention()),
    Pair("attention-type", attention(dtype="FLOAT"), attention(dtype="BFLOAT16")),
    Pair("attention-options", attention(softcap=30.0), attention()),
    Pair("attention-options", attention(softmax_precision=1), attention()),
    Pair("attention-heads", attention(wide=64), attention()),
    Pair("domain", contributed, product("INT4")),
    Pair("operator", dynamic, inputs("INT8", 0)),
    Pair("operator", integers, inputs("INT8", 0)),
    Pair("operator", lambda g: g.cast(g.op("NonZero", "x")), one("Relu")),
    Pair("block-output-type", nvfp4(output_dtype=TensorProto.FLOAT16), nvfp4()),
    *(Pair("cast-type", there_and_back(t), there_and_back("INT8")) for t in ("FLOAT8E4M3FN", "INT4", "FLOAT4E2M1", "UINT8")),
    Pair("computed-codes", looked_up(first=True), looked_up(first=False)),
    Pair("fp4-target", product("FLOAT4E2M1", block=16), product("FLOAT4E2M1", block=16), sm=89),
    Pair("fp8-target", product("FLOAT8E4M3FN"), product("FLOAT8E4M3FN"), sm=86, good_sm=89),
    Pair("int4-target", product("INT4"), product("INT4"), sm=75, good_sm=80),
    Pair("bf16-target", attention(dtype="BFLOAT16"), attention(dtype="BFLOAT16"), sm=75, good_sm=80),
)  # fmt: skip


def without_backends(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if no package of TensorRT were installed."""
    real = tensorrt.importlib.import_module

    def absent(name: str) -> Any:
        if name in tensorrt.BACKENDS:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return real(name)

    monkeypatch.setattr(tensorrt.importlib, "import_module", absent)
