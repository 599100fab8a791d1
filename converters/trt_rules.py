"""What TensorRT's parser and builder refuse, found in an ONNX graph before either is asked.

Every rule was measured: the smallest graph that breaks it fails in TensorRT-RTX 1.7.1 and its legal twin builds (tests/test_trt_rules.py
holds table and builder together). Messages are of onnx-tensorrt's ModelImporter and of Myelin, the builder's compiler.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from lconvert.errors import InputError, UnsupportedError
from lconvert.formats.onnx_graph import package
from lconvert.formats.onnx_reader import OnnxFile, Stored, opened
from lconvert.plan import Item, Plan


@dataclass(frozen=True)
class Finding:
    """A node or tensor that breaks a rule."""

    rule: str
    node: str
    found: str
    why: str
    remedy: str

    def __str__(self) -> str:
        return f"{self.node}: {self.found} [{self.rule}: {self.why}]; {self.remedy}"


@dataclass(frozen=True)
class View:
    """A graph with what rules ask of it: types and shapes of values, constants. sms: compute capabilities that are built for."""

    model: OnnxFile
    sms: tuple[int, ...] = ()
    names: Mapping[int, str] = field(
        default_factory=lambda: {v: k for k, v in package().TensorProto.DataType.items()}
    )

    @property
    def nodes(self) -> Sequence[Any]:
        nodes: Sequence[Any] = self.model.proto.graph.node
        return nodes

    def of(self, *kinds: str) -> Iterator[Any]:
        return (n for n in self.nodes if n.op_type in kinds)

    @property
    def constants(self) -> Mapping[str, Stored]:
        return self.model.constants

    @cached_property
    def producers(self) -> Mapping[str, Any]:
        return {name: n for n in self.nodes for name in n.output}

    @cached_property
    def _values(self) -> Mapping[str, Any]:
        onnx = package()
        try:
            inferred = onnx.shape_inference.infer_shapes(self.model.proto)
        except (
            onnx.shape_inference.InferenceError,
            RuntimeError,
            ValueError,
        ):  # the parser says what is wrong
            inferred = self.model.proto
        g = inferred.graph
        return {v.name: v.type.tensor_type for v in (*g.input, *g.output, *g.value_info)}

    def type(self, name: str) -> str:
        """ONNX's name of a value's type, "" where it is not known."""
        if name in self.constants:
            return self.constants[name].type
        return self.names[self._values[name].elem_type] if name in self._values else ""

    def shape(self, name: str) -> tuple[int | None, ...] | None:
        """None where the rank is not known; None for dimensions that are not fixed."""
        if name in self.constants:
            return self.constants[name].shape
        if name not in self._values or not self._values[name].HasField("shape"):
            return None
        dims = self._values[name].shape.dim
        return tuple(d.dim_value if d.HasField("dim_value") else None for d in dims)

    @cached_property
    def used(self) -> Mapping[str, str]:
        """The first node that takes a value of a type, by type."""
        out: dict[str, str] = {}
        for n in self.nodes:
            four = ["FLOAT4E2M1"] if n.op_type == "TRT_FP4DynamicQuantize" else []
            for type_ in (*map(self.type, filter(None, n.input)), *four):
                out.setdefault(type_, n.name or n.output[0])
        return out

    def numbers(self, name: str) -> Any:
        """A constant's numbers as float64, None for a value that is computed."""
        return self.constants[name].numbers() if name in self.constants else None


def attribute(node: Any, name: str, default: Any = None) -> Any:
    return next((package().helper.get_attribute_value(a) for a in node.attribute if a.name == name), default)


@dataclass(frozen=True)
class Rule:
    """why: what TensorRT says. find: the nodes that break it and what is there."""

    name: str
    why: str
    remedy: str
    find: Callable[[View], Iterator[tuple[str, str]]] = field(repr=False)


_DEQUANTIZE, _QUANTIZE = "DequantizeLinear", "QuantizeLinear"
#: Types of codes; UINT8 is taken for inputs (QuantizeLinear's output) with a zero point of 0, not for weights.
CODES = ("INT8", "INT4", "FLOAT8E4M3FN", "FLOAT4E2M1")
_NO_TENSORS = ("UINT4", "UINT2", "INT2", "INT16", "UINT16", "UINT32", "UINT64", "FLOAT8E5M2", "FLOAT8E4M3FNUZ", "FLOAT8E5M2FNUZ", "STRING", "COMPLEX64", "COMPLEX128")  # fmt: skip
#: Operators of ONNX that the parser has no importer or no plugin for.
NO_OPERATORS = ("DynamicQuantizeLinear", "MatMulInteger", "ConvInteger", "QLinearMatMul", "QLinearConv", "NonZero", "SequenceEmpty", "SequenceConstruct", "StringNormalizer", "Unique")  # fmt: skip
#: Lowest compute capability with a type (measured: the builder's "HW-specific datatypes").
HARDWARE: Mapping[str, int] = {"FLOAT4E2M1": 100, "FLOAT8E4M3FN": 89, "INT4": 80, "BFLOAT16": 80}


def _tensor_types(v: View) -> Iterator[tuple[str, str]]:
    for name, t in v.constants.items():
        if t.type in _NO_TENSORS:
            yield name, f"a tensor of {t.type}"
    for n in v.of("Cast"):
        to = v.names.get(attribute(n, "to", 1), "")
        if to in _NO_TENSORS:
            yield n.name, f"a Cast to {to}"


def _code_types(v: View) -> Iterator[tuple[str, str]]:
    for n in v.of(_DEQUANTIZE):
        type_ = v.type(n.input[0])
        if (
            type_
            and type_ not in (*CODES, *_NO_TENSORS)
            and not (type_ == "UINT8" and n.input[0] not in v.constants)
        ):
            yield n.name, f"codes of {type_}"


def _zero_points(v: View) -> Iterator[tuple[str, str]]:
    for n in v.of(_DEQUANTIZE, _QUANTIZE):
        zero = n.input[2] if len(n.input) > 2 else ""
        if zero in v.constants and v.type(zero) not in _NO_TENSORS and v.numbers(zero).any():
            yield n.name, f"zero point {zero} is not 0"


def _scales(v: View) -> Iterator[tuple[str, str]]:
    for n in v.of(_DEQUANTIZE, _QUANTIZE):
        four = v.type(n.input[0]) in ("INT4", "FLOAT4E2M1") and n.op_type == _DEQUANTIZE
        s = None if four else v.numbers(n.input[1])
        if s is not None and not (s > 0).all():
            worst = s[~(s > 0)].reshape(-1)[0]
            yield n.name, f"{int((~(s > 0)).sum())} of {s.size} scales in {n.input[1]} are like {worst:g}"


def _output_type(v: View) -> Iterator[tuple[str, str]]:
    for n in v.of(_DEQUANTIZE):
        to = attribute(n, "output_dtype", 0)
        scale = v.type(n.input[1])
        if to and scale and v.names[to] != scale and attribute(n, "block_size", 0):
            yield n.name, f"scales of {scale} and output_dtype {v.names[to]}"


def _blocks(v: View) -> Iterator[tuple[str, str]]:
    for n in v.of(_DEQUANTIZE, _QUANTIZE):
        size, shape = attribute(n, "block_size", 0), v.shape(n.input[0])
        if not size or shape is None:
            continue
        axis = attribute(n, "axis", 1) % len(shape)
        if axis < len(shape) - 2:
            yield n.name, f"blocks along dimension {axis} of {len(shape)}"
        if size == 1:
            yield n.name, "blocks of 1"


def _whole_blocks(v: View) -> Iterator[tuple[str, str]]:
    for n, size, axis, codes, scales in _blocked(v):
        if codes[axis] is not None and scales[axis] is not None and codes[axis] % max(1, scales[axis]):
            yield n.name, f"{codes[axis]} in blocks of {size}"


def _blocked(v: View) -> Iterator[tuple[Any, int, int, Any, Any]]:
    """(node, block size, axis, shape of the codes, of the scales) where both shapes are known and of one rank."""
    for n in v.of(_DEQUANTIZE, _QUANTIZE):
        codes, scales = v.shape(n.input[0]), v.shape(n.input[1])
        if codes and scales and len(codes) == len(scales) > 1:
            axis = attribute(n, "axis", 1)
            if not -len(codes) <= axis < len(codes):
                raise InputError(
                    f"{v.model.path}: {n.name}: axis {axis} of {len(codes)} dimensions; the graph is damaged"
                )
            yield n, attribute(n, "block_size", 0), axis % len(codes), codes, scales


def _sound(v: View) -> None:
    """InputError where a size of blocks is not that of the shapes, which TensorRT would go by without a word, or a scale is no number."""
    for n, size, axis, codes, scales in _blocked(v):
        k, blocks = codes[axis], scales[axis]
        if k is not None and blocks is not None and (size < 1 or -(-k // size) != blocks):
            raise InputError(
                f"{v.model.path}: {n.name}: block_size {size}, but {k} codes have {blocks} scales along axis {axis}; the graph is damaged"
            )
    for n in v.of(_DEQUANTIZE, _QUANTIZE):
        s = v.numbers(n.input[1])
        if s is not None and not np.isfinite(s).all():
            raise InputError(
                f"{v.model.path}: {n.name}: scales in {n.input[1]} that are no finite numbers; quantize the model again"
            )


def _attention_outputs(v: View) -> Iterator[tuple[str, str]]:
    for n in v.of("Attention"):
        if not n.domain and sum(map(bool, n.output)) > 1:
            yield n.name, f"{sum(map(bool, n.output))} outputs"


def _attention_type(v: View) -> Iterator[tuple[str, str]]:
    for n in v.of("Attention"):
        if v.type(n.input[0]) in ("FLOAT", "DOUBLE"):
            yield n.name, f"queries of {v.type(n.input[0])}"


def _attention_options(v: View) -> Iterator[tuple[str, str]]:
    for n in v.of("Attention"):
        if attribute(n, "softcap", 0.0):
            yield n.name, f"softcap {attribute(n, 'softcap'):g}"
        if attribute(n, "softmax_precision") is not None:
            yield n.name, "softmax_precision"


def _attention_heads(v: View) -> Iterator[tuple[str, str]]:
    for n in v.of("Attention"):
        shapes = [v.shape(x) for x in n.input[:3]]
        widths = [s[-1] for s in shapes if s is not None and len(s) == 4]
        if len(widths) == 3 and None not in widths and len(set(widths)) > 1:
            yield n.name, f"queries, keys and values {widths} wide"


def _domains(v: View) -> Iterator[tuple[str, str]]:
    for n in v.nodes:
        if n.domain not in ("", "ai.onnx", "trt"):
            yield n.name or n.output[0], f"{n.domain}.{n.op_type}"


def _operators(v: View) -> Iterator[tuple[str, str]]:
    for n in v.of(*NO_OPERATORS):
        if n.domain in ("", "ai.onnx"):
            yield n.name or n.output[0], n.op_type


def _needs(type_: str) -> Callable[[View], Iterator[tuple[str, str]]]:
    """The first node that takes this type, where it is built for older hardware than has it."""

    def find(v: View) -> Iterator[tuple[str, str]]:
        below = [sm for sm in v.sms if sm < HARDWARE[type_]]
        if below and type_ in v.used:
            yield v.used[type_], f"{type_} for SM {', '.join(map(str, below))}"

    return find


def _casts(v: View) -> Iterator[tuple[str, str]]:
    for n in v.of("Cast"):
        to = v.names.get(attribute(n, "to", 1), "")
        if to in (*CODES, "UINT8") and to != "INT8":
            yield n.name, f"a Cast to {to}"


def _computed_codes(v: View) -> Iterator[tuple[str, str]]:
    for n in v.of(_DEQUANTIZE):
        before = v.producers.get(n.input[0])
        if before is not None and before.op_type not in (_QUANTIZE, "Constant", "TRT_FP4DynamicQuantize"):
            yield n.name, f"codes out of {before.op_type} {before.name}"


def _interleaved(v: View) -> Iterator[tuple[str, str]]:
    turned = {n.output[0]: n for n in v.of("RotaryEmbedding") if attribute(n, "interleaved", 0)}
    given = {i.name for i in v.model.proto.graph.input}
    for n in v.of("Concat"):
        hit = [turned[x] for x in n.input if x in turned]
        if hit and given & set(n.input) and None in (v.shape(n.output[0]) or (None,)):
            yield hit[0].name, f"interleaved, and appended to {next(x for x in n.input if x in given)}"


def _free_caches(v: View) -> Iterator[tuple[str, str]]:
    for n in v.of("TensorScatter"):
        axis, shape = attribute(n, "axis", -2), v.shape(n.input[0])
        if shape is not None and shape[axis] is None:
            yield n.name, f"a cache of free length {n.input[0]}"


_HARDWARE_SAYS = "Cannot compile for target(s), because the model contains HW-specific datatypes"
RULES: tuple[Rule, ...] = (
    Rule("tensor-type", "Failed to import initializer; Unsupported ONNX data type", "store codes as INT4, INT8, FLOAT8E4M3FN or FLOAT4E2M1 (the trt dialect does)", _tensor_types),
    Rule("code-type", "Found unsupported input type", "store codes as INT4, INT8, FLOAT8E4M3FN or FLOAT4E2M1 (the trt dialect does)", _code_types),
    Rule("zero-point", "Non-zero zero point is not supported", "export with the trt dialect: zero points of weights become a second product; inputs need symmetric quantization", _zero_points),
    Rule("positive-scale", "Scale coefficients must all be positive", "negate the block's codes with its scale (the trt dialect does); a scale of 0 is a block of zeros", _scales),
    Rule("block-output-type", "Myelin infer_type: could not infer output types", "leave output_dtype out and add a Cast, which is fused", _output_type),
    Rule("block-axis", "The blocking dimension must be the last or second to last dimension; only a single blocking dimension is allowed", "quantize in blocks of more than one along the last two dimensions", _blocks),
    Rule("whole-blocks", "The quantization axis must divide into whole blocks", "quantize with a block size that divides the columns (hf-to-onnx --block-size)", _whole_blocks),
    Rule("attention-outputs", "TensorRT only supports Attention nodes with one output (NVIDIA/TensorRT issue 4738)", "concatenate keys and values outside of Attention (both dialects do)", _attention_outputs),
    Rule("attention-type", "Attention operation was not supported by a dedicated kernel", "export with --fp16 or --bf16", _attention_type),
    Rule("attention-options", "Setting softcap / softmax precision is not supported in TensorRT Attention", "write the attention out of MatMul and Softmax (the trt dialect does)", _attention_options),
    Rule("attention-heads", "Key and Value must have the same shape; Query, Key, Value tensors must have the same head dimension", "write the attention out of MatMul and Softmax (the trt dialect does)", _attention_heads),
    Rule("domain", "Plugin not found", "export with the ort or trt dialect, which use operators of ONNX alone", _domains),
    Rule("operator", "no importer or plugin for the operator", "quantize inputs statically with QuantizeLinear and DequantizeLinear; avoid shapes that depend on data", _operators),
    Rule("cast-type", "validateQuantizedTypesProducersConsumers; TensorRT does not support UINT8 types for intermediate tensors", "make codes with QuantizeLinear (the trt dialect does)", _casts),
    Rule("computed-codes", "matchQuantizedConstantPluginOrDQ: not intended as a quantized value", "dequantize constants, then look rows up (the trt dialect does)", _computed_codes),
    Rule("fp4-target", _HARDWARE_SAYS, "build for --sm 120 alone, or use int4", _needs("FLOAT4E2M1")),
    Rule("fp8-target", _HARDWARE_SAYS, "build for --sm 89,120, or use int8", _needs("FLOAT8E4M3FN")),
    Rule("int4-target", _HARDWARE_SAYS, "build for --sm 80 and later, or use int8", _needs("INT4")),
    Rule("bf16-target", _HARDWARE_SAYS, "build for --sm 80 and later, or export with --fp16", _needs("BFLOAT16")),
    Rule("static-cache", "The KV cache tensor must have a static sequence length dimension (kVCacheUpdateLayer.cpp)", "export with --dialect trt --static-cache, for --positions as many as it is to hold", _free_caches),
    Rule("interleaved-rotary", "MyelinCheckException: ssa.cpp (TensorRT-RTX 1.7.1, dynamic shapes)", "put the dimensions into halves before turning (the trt dialect does)", _interleaved),
)  # fmt: skip


def check(model: OnnxFile, sms: Sequence[int] = ()) -> list[Finding]:
    """Everything in the graph that TensorRT refuses. sms: compute capabilities to build for, such as 89 and 120."""
    view = View(model, tuple(sms))
    try:
        _sound(view)
        return _found(view)
    except (IndexError, KeyError, ZeroDivisionError, TypeError) as e:
        raise InputError(
            f"{model.path}: a node lacks inputs or attributes that its operator has ({e})"
        ) from None


def _found(view: View) -> list[Finding]:
    return [
        Finding(r.name, node, found, r.why, r.remedy) for r in RULES for node, found in dict(r.find(view)).items()
    ]  # fmt: skip


def targets(model: OnnxFile, sms: Sequence[int]) -> tuple[int, ...]:
    """Those of `sms` that have every type of the graph."""
    used = View(model).used
    least = max((HARDWARE[t] for t in used if t in HARDWARE), default=0)
    return tuple(sm for sm in sms if sm >= least)


def planned(plan: Plan) -> OnnxFile:
    """The graph of a plan, whose small tensors are made when a rule asks for them."""
    graph = next(f for f in plan.files if f.name.endswith(".onnx"))
    proto = package().ModelProto.FromString(graph.head)

    def maker(item: Item) -> Callable[[], bytes]:
        return lambda: bytes(np.ascontiguousarray(item.produce(0, item.rows).data).tobytes())

    return opened(Path(graph.name), proto, {item.name: maker(item) for item in plan.items()})


def require(model: OnnxFile, sms: Sequence[int] = ()) -> None:
    """UnsupportedError that names the first findings, if there are any."""
    found = check(model, sms)
    if found:
        more = f" (and {len(found) - 3} more: lconvert plan {model.path} --to trt)" if len(found) > 3 else ""
        raise UnsupportedError(f"{model.path}: TensorRT refuses " + "; ".join(map(str, found[:3])) + more)
