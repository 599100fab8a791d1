"""ONNX Runtime rewrites products with dequantized weights into MatMulNBits when it loads a graph: did it keep every integer and scale?

The session's optimized graph is written to a temporary folder and read back with the same distrust as any file. Layout of
MatMulNBits: docs/ContribOperators.md of onnxruntime; codes (N, blocks, bytes), zero points packed along the blocks of a row.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lconvert.converters.onnx_source import Found
from lconvert.errors import InputError
from lconvert.formats import onnx_reader
from lconvert.formats.onnx_reader import OnnxFile, integers
from lconvert.ir import QTensor, as_f32
from lconvert.validators import stored
from lconvert.validators.proof import Proof
from lconvert.validators.runtimes import short
from lconvert.validators.runtimes.onnxruntime import package

#: Largest graph that is written out once more.
_LIMIT = 8 << 30


def run(proof: Proof, found: Found) -> None:
    """The check, where there are quantized weights and the runtime loads the graph at all."""
    roles = _products(found)
    if not roles:
        return
    if stored.size(found.file.files) > _LIMIT:
        proof.not_proven.append(
            "structure: fusion in ONNX Runtime, whose graph would take as much room again"
        )
        return
    with tempfile.TemporaryDirectory(prefix="lconvert-") as name:
        made = Path(name) / "optimized.onnx"
        if (failure := _optimized(found.file.path, made)) is not None:
            reason = failure.partition(". ")[0]
            proof.not_proven.append(
                f"structure: fusion in ONNX Runtime, which does not load the graph ({reason})"
            )
            return
        fused = onnx_reader.read(made)
        wrong, count = [], 0
        for node in fused.proto.graph.node:
            if node.op_type != "MatMulNBits":
                continue
            role = roles.get(node.name.partition("/")[0])  # "NAME/MatMulAddFusion"
            if role is None:
                wrong.append(f"{node.name!r} multiplies by weights that the file does not have")
                continue
            count += 1
            if (what := _differs(fused, node, found, role)) is not None:
                wrong.append(f"{role}: {what}")
    what = f"{count} of {len(roles)} products fused, integers and scales kept"
    proof.count("structure", "fusion in ONNX Runtime", wrong, what)


def _products(found: Found) -> dict[str, str]:
    """Role by the name of the node that multiplies by its codes."""
    out: dict[str, str] = {}
    entries = {**found.model.entries, **({} if found.head is None else {"head": found.head})}
    for role, entry in entries.items():
        if (
            not isinstance(entry.data, QTensor)
            or entry.data.grid.kind != "int"
            or role not in found.file.tensors
        ):
            continue
        for node in found.file.consumers[role]:
            out |= {
                n.name: role for n in found.file.consumers.get(node.output[0], ()) if n.op_type == "MatMul"
            }
    return out


def _optimized(path: Path, made: Path) -> str | None:
    """Write the graph as the runtime rewrites it; why it cannot."""
    runtime = package()
    options = runtime.SessionOptions()
    options.log_severity_level = 4
    options.optimized_model_filepath = str(made)
    for key, value in (
        ("session.qdq_matmulnbits_accuracy_level", "1"),
        ("session.optimized_model_external_initializers_file_name", "optimized.data"),
        ("session.optimized_model_external_initializers_min_size_in_bytes", "1024"),
    ):
        options.add_session_config_entry(key, value)
    try:
        runtime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as e:  # noqa: BLE001 - its errors derive from Exception alone
        return short(e)
    return None


def _differs(fused: OnnxFile, node: Any, found: Found, role: str) -> str | None:
    """What the fused product holds otherwise than the file."""
    said = integers(node)
    k, n, bits, size = (said.get(name, 0) for name in ("K", "N", "bits", "block_size"))
    own = found.file.tensors[role]
    scale_name = next(x.input[1] for x in found.file.consumers[role] if x.op_type == "DequantizeLinear")
    if own.shape != (k, n) or bits not in (2, 4, 8) or size < 1:
        return f"{bits} bits, shape ({k}, {n}), blocks of {size}; the file has {own.shape}"
    blocks = -(-k // size)
    try:
        codes = _unpacked(_array(fused, node.input[1], np.uint8), bits).reshape(n, blocks * size)[:, :k]
        scales = _array(fused, node.input[2], np.float32).reshape(n, blocks)
        zero = np.full((n, blocks), 1 << (bits - 1), np.int16)
        if len(node.input) > 3 and node.input[3]:
            zero = _unpacked(_array(fused, node.input[3], np.uint8), bits).reshape(n, -1)[:, :blocks]
    except ValueError:
        return "tensors of other sizes than its attributes say"
    at = np.arange(k) // size
    theirs = codes - zero[:, at]
    if not np.array_equal(theirs, _integers(found, role)):
        return "other integers"
    mine = found.file.tensors[scale_name]
    wanted = as_f32(mine.load(), {"FLOAT": "F32", "FLOAT16": "F16", "BFLOAT16": "BF16"}[mine.type])
    full = wanted.reshape(-1, n)[_blocks_of(k, wanted, n)].T if wanted.ndim else np.full((n, k), wanted)
    return None if np.array_equal(scales[:, at], full) else "other scales"


def _blocks_of(k: int, scale: NDArray[Any], n: int) -> NDArray[np.int64]:
    """Row of the scales of every column of the weight."""
    rows = scale.size // n
    return np.arange(k) // (k // rows)


def _integers(found: Found, role: str) -> NDArray[np.int16]:
    """Codes less their zero points as they lie in the file, (rows, columns)."""
    node = next(x for x in found.file.consumers[role] if x.op_type == "DequantizeLinear")
    codes = found.file.tensors[role].load().astype(np.int16).T
    if len(node.input) < 3 or not node.input[2]:
        return codes
    zero = found.file.tensors[node.input[2]].load().astype(np.int16)
    if zero.ndim < 2:
        return codes - zero.reshape(-1, 1)
    return codes - zero.T[:, np.arange(codes.shape[1]) // (codes.shape[1] // zero.shape[0])]


def _array(file: OnnxFile, name: str, dtype: Any) -> NDArray[Any]:
    t = file.tensors.get(name)
    if t is None:
        raise InputError(f"{file.path}: MatMulNBits without the constant {name!r}")
    x = t.load()
    return as_f32(x, "F16" if t.type == "FLOAT16" else "F32") if dtype is np.float32 else x


def _unpacked(x: NDArray[np.uint8], bits: int) -> NDArray[np.int16]:
    """Codes out of bytes, the first in the low bits, along the last axis."""
    per = 8 // bits
    out = np.empty((*x.shape[:-1], x.shape[-1] * per), np.int16)
    for i in range(per):
        out[..., i::per] = x >> (i * bits) & ((1 << bits) - 1)
    return out
