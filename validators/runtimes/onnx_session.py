"""Settings that a graph needs of ONNX Runtime, seen in its nodes and in the types of its weights.

Names: onnxruntime_session_options_config_keys.h. Measured with 1.31: QuantizeLinear to FP8 is fused into a MatMulIntegerToFloat that
takes no FP8, and the session fails unless that fusion is off (or optimization is at its basic level, where every run unpacks the
weights again: 6 times as slow). With the fusion off FP8 weights are unpacked once, at load: 7 times as fast as the default, in
the memory of fp32. Integer weights of a graph that also has FP8 nodes are then unpacked as well.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from lconvert.formats import onnx_reader
from lconvert.formats.onnx_reader import OnnxFile
from lconvert.validators.runtimes import Purpose

UNFUSED = "session.disable_quant_qdq"
PRECISE = "session.x64quantprecision"
_INTEGER_PRODUCTS = {"MatMulInteger", "DynamicQuantizeLinear", "QuantizeLinear", "ConvInteger"}


def opened(path: Path) -> OnnxFile | None:
    """The graph, checked before the runtime sees it; None where the onnx package is not there to look."""
    return onnx_reader.read(path) if find_spec("onnx") else None


def settings(file: OnnxFile | None, purpose: Purpose) -> Mapping[str, str]:
    """Session entries for a graph; none where it is not known."""
    if file is None:
        return {}
    graph, types = file.proto.graph, {t.name: t.type for t in file.tensors.values()}
    out: dict[str, str] = {}
    if _fp8_nodes(graph, types) or _fp8_weights(graph, types):
        out[UNFUSED] = "1"
    if purpose == "parity" and any(n.op_type in _INTEGER_PRODUCTS for n in graph.node):
        out[PRECISE] = "1"  # 8-bit products saturate on x86 without VNNI
    return out


def _fp8_nodes(graph: Any, types: Mapping[str, str]) -> bool:
    return any(
        n.op_type == "QuantizeLinear" and len(n.input) == 3 and types.get(n.input[2], "").startswith("FLOAT8")
        for n in graph.node
    )


def _fp8_weights(graph: Any, types: Mapping[str, str]) -> bool:
    """Whether weights that are dequantized are FP8 and none is of integers, which the fusion packs into MatMulNBits."""
    held = {types.get(n.input[0], "") for n in graph.node if n.op_type == "DequantizeLinear"} - {""}
    return bool(held) and all(t.startswith("FLOAT8") for t in held)
