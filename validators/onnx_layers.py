"""Quantized products of a graph for TensorRT, cut out one by one and run through the onnx package's reference evaluator.

No runtime of this machine multiplies all that such graphs hold (FP4, BF16), and ONNX Runtime fuses what it runs. The evaluator computes every
operator as ONNX's specification says: dequantized weights must be the source's bit for bit, in the type that the graph gives them, and
products what fp64 makes of rounded inputs and these weights. Inputs in NVFP4 are TensorRT's own operator, which only its documentation
defines ("DynamicQuantize": scale = largest of 16 / 6, stored in FP8 below the global one); it is written down here a second time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lconvert.converters import onnx_source
from lconvert.converters.onnx_pairs import FP4_QUANTIZE
from lconvert.converters.onnx_source import Found
from lconvert.converters.onnx_trt import DOMAIN, FP4_BLOCK
from lconvert.errors import InputError
from lconvert.formats.onnx_graph import package
from lconvert.formats.onnx_reader import OnnxFile
from lconvert.ir import ActSpec, Entry, QTensor, as_f32
from lconvert.kernels.qtensor import values
from lconvert.validators import rounded_forward
from lconvert.validators.proof import Proof
from lconvert.validators.runtimes import short

#: Weights that are evaluated at most, in all: about ten seconds. Tokens of the inputs.
LIMIT, _TOKENS = 1 << 25, 4
#: A product may differ from fp64's by so many units in the last place of the graph's type, relative to the sum of its terms' magnitudes:
#: weights, products, what is subtracted from them and the difference are rounded once each.
_ROUNDINGS = 4
_UNIT = {"F32": 2.0**-24, "F16": 2.0**-11, "BF16": 2.0**-8}
_SIDES = {"FLOAT": "F32", "FLOAT16": "F16", "BFLOAT16": "BF16"}


@dataclass(frozen=True)
class Cut:
    """Nodes from the input x of a linear to its product y; matrix: what its codes are dequantized to, (columns, rows)."""

    nodes: tuple[Any, ...]
    x: str
    y: str
    matrix: str


def check(proof: Proof, found: Found) -> None:
    """Both checks of a graph of the dialect trt; nothing for others, and where nothing is quantized."""
    if found.file.metadata.get("dialect") != "trt":
        return
    roles = products(found)
    chosen = sample(roles, {r: found.model.entries[r].data.size for r in roles}, LIMIT)
    if not chosen:
        return
    wrong, worst, at, limit = [], 0.0, chosen[0], _ROUNDINGS * _UNIT[found.dtype]
    for i, role in enumerate(chosen):
        proof.progress(f"product {i + 1} of {len(chosen)} in onnx's reference evaluator")
        source = proof.expected.entries[role]
        entry = found.model.entries[role]
        own = source if isinstance(source.data, QTensor) else entry
        try:
            weights, off = compare(found, role, Entry(role, own.data, entry.activation, entry.transform))
        except InputError as e:
            wrong.append(str(e))
            continue
        if weights:
            wrong.append(f"{role}: {weights}")
        if off > worst:
            worst, at = off, role
    share = f"{len(chosen)} of {len(roles)} products"
    proof.count("tensors", "weights in onnx's reference evaluator", wrong, f"{share}, bit for bit")
    value = f"off by up to {worst:.2e} of their terms in {at}; {share}"
    gate = f"<= {limit:.1e}"
    proof.at_most("tensors", "products in onnx's reference evaluator", value, worst, limit, gate)
    if len(chosen) < len(roles):
        proof.notes.append(
            f"onnx's reference evaluator ran {share}, of every kind some, in the first, the last and layers between"
        )


def products(found: Found) -> list[str]:
    """Roles whose codes a DequantizeLinear turns into the matrix of a product."""
    out = []
    for role, entry in found.model.entries.items():
        taken = found.file.consumers.get(role, ())
        matrix = isinstance(entry.data, QTensor) and len(entry.shape) == 2  # a convolution is no product
        if matrix and any(n.op_type == "DequantizeLinear" for n in taken):
            out.append(role)
    return out


def sample(roles: Sequence[str], sizes: dict[str, int], limit: int) -> list[str]:
    """All roles, or of every kind as many as fit, from both ends of the model inwards; one of each kind in any case."""
    kinds: dict[str, list[str]] = {}
    for role in roles:
        kinds.setdefault(".".join(p for p in role.split(".") if not p.isdigit()), []).append(role)
    lines = [_inwards(line) for line in kinds.values()]
    chosen, total = set[str](), 0
    for place in range(max(map(len, lines), default=0)):
        for line in lines:
            if place < len(line) and (place == 0 or total + sizes[line[place]] <= limit):
                chosen.add(line[place])
                total += sizes[line[place]]
    return [role for role in roles if role in chosen]


def _inwards(line: Sequence[str]) -> list[str]:
    """First, last, middle, then the rest."""
    ends = [line[0], line[-1], line[len(line) // 2]]
    return list(dict.fromkeys([*ends, *line]))


# --- one product -------------------------------------------------------------------------------------------


def compare(found: Found, role: str, entry: Entry) -> tuple[str, float]:
    """What differs in the weights, "" for nothing, and how far the product is off relative to the magnitudes of its terms.

    entry: the numbers that the product must multiply by, with what is done to its input.
    """
    q = entry.data
    assert isinstance(q, QTensor)
    cut, file = cut_out(found.file, role), found.file
    _, order, _, _ = onnx_source.treated(file, role, _product(file, role).input[0])
    x = _inputs(entry, found.dtype)
    try:
        matrix, y = evaluate(file, cut, x, found.dtype)
    except (ValueError, TypeError, RuntimeError, NotImplementedError, IndexError) as e:
        raise InputError(
            f"{file.path}: {role}: onnx's reference evaluator does not run it ({short(e)})"
        ) from None
    wanted = values(q).T.astype(np.float64)
    if order is not None:
        wanted = wanted[order.load().reshape(-1)]
    if matrix.shape != wanted.shape:
        return f"a matrix of shape {matrix.shape}, expected {wanted.shape}", float("inf")
    low = _minimum(file, role, wanted.shape)
    differs = _weights(matrix, wanted, low)
    given = _treated(entry, x, found.dtype)
    if order is not None:
        given = given[..., order.load().reshape(-1)]
    given = given.astype(np.float64)
    terms = np.abs(given) @ (np.abs(wanted + low) + np.abs(low))
    with np.errstate(invalid="ignore"):
        off = np.abs(y.astype(np.float64) - given @ wanted) / np.where(terms == 0, 1, terms)
    return differs, float(np.nan_to_num(off, nan=np.inf).max(initial=0.0))


def _weights(matrix: NDArray[Any], wanted: NDArray[np.float64], low: NDArray[np.float64]) -> str:
    """How many numbers of the matrix are not the values plus what is subtracted later, rounded to the matrix's type."""
    whole = wanted + low
    wrong = np.asarray(matrix != whole.astype(np.float32).astype(matrix.dtype))
    if low.any():  # the values themselves are a rounded difference
        unit = 2.0**-24 if matrix.dtype == np.float32 else 2.0**-11 if matrix.dtype == np.float16 else 2.0**-8
        room = unit * np.abs(whole) + 2.0**-23 * (np.abs(wanted) + np.abs(low))
        wrong &= ~(np.abs(matrix.astype(np.float64) - whole) <= room)
    if not wrong.any():
        return ""
    column, row = np.argwhere(wrong)[0]
    got, expected = float(matrix[column, row]), float(whole[column, row])
    return f"{int(wrong.sum())} of {wrong.size} weights differ; the first at row {row}, column {column} is {got:g}, expected {expected:g}"


def _minimum(file: OnnxFile, role: str, shape: tuple[int, ...]) -> NDArray[np.float64]:
    """What is subtracted of every weight by a second product."""
    t = file.tensors.get(role + ".minimum")
    if t is None:
        return np.zeros((1, 1))
    low = as_f32(t.load(), _SIDES.get(t.type, "F32")).astype(np.float64)
    return np.repeat(low, shape[0] // low.shape[0], axis=0)


def _product(file: OnnxFile, role: str) -> Any:
    """The MatMul behind the codes."""
    node = next(n for n in file.consumers[role] if n.op_type == "DequantizeLinear")
    name, kinds = node.output[0], ("MatMul", "Cast")
    for _ in range(2):
        after = [n for n in file.consumers.get(name, ()) if n.op_type in kinds]
        if len(after) == 1 and after[0].op_type == "MatMul":
            return after[0]
        name = after[0].output[0] if len(after) == 1 else ""
    raise InputError(
        f"{file.path}: {role}: its matrix is multiplied by no MatMul; lconvert writes no such graph"
    )


def cut_out(file: OnnxFile, role: str) -> Cut:
    """The nodes of one product, with what is done to its input, in the order of the graph."""
    product = _product(file, role)
    x = onnx_source.treated(file, role, product.input[0])[3]
    y = product.output[0]
    if role + ".minimum" in file.tensors:
        minus = [n for n in file.consumers.get(y, ()) if n.op_type == "Sub" and n.input[0] == y]
        y = minus[0].output[0] if len(minus) == 1 else y
    matrix = next(n for n in file.consumers[role] if n.op_type == "DequantizeLinear").output[0]
    wanted, left = set[str](), [y]
    while left:
        name = left.pop()
        if name in (x, "") or name in file.tensors or name in wanted:
            continue
        if (node := file.producers.get(name)) is None or len(wanted) > 200:
            raise InputError(f"{file.path}: {role}: its product depends on {name!r} besides its input")
        wanted |= {n for n in node.output if n}
        left += node.input
    nodes = tuple(n for n in file.proto.graph.node if wanted.intersection(n.output))
    return Cut(nodes, x, y, matrix)


def evaluate(file: OnnxFile, cut: Cut, x: NDArray[Any], dtype: str) -> tuple[NDArray[Any], NDArray[Any]]:
    """The matrix and the product as the evaluator computes them. x: (1, tokens, columns), in the graph's type."""
    from onnx.reference import ReferenceEvaluator

    onnx = package()
    names = {name for n in cut.nodes for name in n.input}
    folder, held = file.path.parent, []
    for proto in file.proto.graph.initializer:
        if proto.name in names:
            copy = onnx.TensorProto()
            copy.CopyFrom(proto)
            if copy.data_location == onnx.TensorProto.EXTERNAL:
                onnx.external_data_helper.load_external_data_for_tensor(copy, str(folder))
                copy.data_location = onnx.TensorProto.DEFAULT
            held.append(copy)
    kind = getattr(onnx.TensorProto, {v: k for k, v in _SIDES.items()}[dtype])
    ports = [onnx.helper.make_tensor_value_info(n, kind, None) for n in (cut.x, cut.matrix, cut.y)]
    graph = onnx.helper.make_graph(list(cut.nodes), "product", ports[:1], ports[1:], held)
    opsets = list(file.proto.opset_import)
    model = onnx.helper.make_model(graph, opset_imports=opsets, ir_version=file.proto.ir_version)
    ran = ReferenceEvaluator(model, new_ops=[_dynamic_quantize()]).run(None, {cut.x: x})
    return np.asarray(ran[0]), np.asarray(ran[1])


def _dynamic_quantize() -> Any:
    """TRT_FP4DynamicQuantize for the evaluator."""
    import ml_dtypes
    from onnx.reference.op_run import OpRun

    def _run(
        self: Any,
        x: Any,
        scale: Any,
        axis: int | None = None,
        block_size: int | None = None,
        scale_type: int | None = None,
    ) -> Any:
        if (axis, block_size) != (-1, FP4_BLOCK):
            raise ValueError(f"blocks of {block_size} along axis {axis}")
        cut = x.astype(np.float32).reshape(*x.shape[:-1], -1, FP4_BLOCK)
        fine = (np.abs(cut).max(-1) / np.float32(6) / scale).astype(np.float32)
        fine = np.minimum(fine, np.float32(448)).astype(ml_dtypes.float8_e4m3fn)
        steps = (fine.astype(np.float32) * scale)[..., None]
        codes = np.divide(cut, steps, out=np.zeros_like(cut), where=steps != 0)
        return np.clip(codes, -6, 6).astype(ml_dtypes.float4_e2m1fn).reshape(x.shape), fine

    return type(FP4_QUANTIZE, (OpRun,), {"op_domain": DOMAIN, "_run": _run})


# --- inputs ------------------------------------------------------------------------------------------------


def _inputs(entry: Entry, dtype: str) -> NDArray[Any]:
    """Numbers that fill the range of a static scale, with some beyond it; always the same."""
    k = entry.data.shape[1]
    x = np.random.default_rng(k).standard_normal((1, _TOKENS, k)).astype(np.float32)
    return _typed(x * np.float32(_range(entry.activation) / 3), dtype)


def _range(a: ActSpec | None) -> float:
    if a is None or a.scale is None:
        return 3.0
    scale = float(rounded_forward.number(a.scale)[0])
    largest = 127.0 if a.grid.kind == "int" else 6.0 * 448 if a.group else 448.0
    return (1 / scale if a.divisor else scale) * largest


def _treated(entry: Entry, x: NDArray[Any], dtype: str) -> NDArray[np.float32]:
    """x as the product gets it, by this project's formulas."""
    y = x.astype(np.float32)
    t = entry.transform
    if t is not None and not t.folded and t.param is not None:
        y = _typed(y * as_f32(t.param.load(), t.param.dtype).reshape(-1), dtype).astype(np.float32)
    if entry.activation is not None:
        y = rounded_forward.rounded(y, entry.activation)
    return _typed(y, dtype).astype(np.float32)


def _typed(x: NDArray[Any], dtype: str) -> NDArray[Any]:
    import ml_dtypes

    kinds = {"F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}
    return np.asarray(x, kinds[dtype])
