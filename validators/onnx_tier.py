"""An ONNX graph that lconvert wrote: is it legal, does it hold the source's numbers, and does the onnx package read the same ones?"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lconvert.converters import onnx_source, rotary
from lconvert.converters.onnx_source import Found
from lconvert.converters.onnx_weights import kind_of
from lconvert.formats import onnx_reader
from lconvert.formats.onnx_graph import BITS, package
from lconvert.formats.onnx_reader import Stored
from lconvert.ir import Decoder, Model, Rope, as_f32
from lconvert.validators import classifier_structure, classifier_weights, onnx_fusion, stored, tensors
from lconvert.validators.proof import Proof
from lconvert.validators.runtimes import short
from lconvert.validators.tensors import TensorCheck

_FLOATS = {"F32": "FLOAT", "F16": "FLOAT16", "BF16": "BFLOAT16"}
#: What cos and sin may be off by: another C library, and half a unit in the last place of the graph's type.
_TABLE = {"F32": 2.0**-22, "F16": 2.0**-11, "BF16": 2.0**-8}


def check(proof: Proof, found: Found) -> TensorCheck:
    """Every weight against the source's, and against another program's reading of the file."""
    differences, worst = independent(found)
    rows = []
    for role, entry in found.model.entries.items():
        original = proof.expected.entries[role].data
        row = classifier_weights.compare(role, found, entry.data, original)
        rows.append(
            row or tensors.compare(role, entry.data, original, _shift(role, proof), block_types=False)
        )
    return TensorCheck(
        tensors=len(found.file.tensors),
        structure=tuple(differences),
        max_difference=worst,
        table=tuple(rows),
        bits_per_weight=stored.bits_per_weight((r.bytes, r.shape) for r in rows) or 0.0,
        types=dict(sorted(Counter(r.type for r in rows).items())),
    )


def _shift(role: str, proof: Proof) -> float:
    """Norms hold what they multiply by; a bias is added to nothing."""
    if role.endswith(".bias") or "norm" not in role or not isinstance(proof.source.arch, Decoder):
        return 0.0
    return proof.source.arch.norm_offset


def structure(proof: Proof, found: Found) -> None:
    """What the graph says of itself, apart from the numbers of its weights."""
    proof.count("structure", "onnx.checker", _checker(found), "accepts it, types and shapes inferred")
    proof.count("structure", "types", list(_types(found)), f"floats are {found.dtype}")
    decoder = isinstance(found.model.arch, Decoder)
    ports = list(_ports(found) if decoder else classifier_structure.ports(found))
    proof.count("structure", "inputs and outputs", ports, "as exporters name them")
    if not decoder:
        classifier_structure.products(proof, found)
        return
    proof.count("structure", "rotary tables", list(_rotary(proof, found)), "as the traits say")
    if found.head is not None:
        same = tensors.compare("head", found.head.data, proof.expected.entries["embed"].data)
        table = found.model.entries["embed"].data
        equal = same.exact or tensors.compare("head", found.head.data, table).exact
        wrong = [] if equal else ["the head multiplies by other numbers than the embedding holds"]
        proof.count("structure", "tied head", wrong, "holds the embedding's numbers")
    proof.guarded("structure", "fusion in ONNX Runtime", lambda: onnx_fusion.run(proof, found), "onnxruntime")


def _checker(found: Found) -> list[str]:
    """What onnx.checker has against the graph; it infers all types and shapes on the way."""
    try:
        package().checker.check_model(str(found.file.path), full_check=True)
    except Exception as e:  # noqa: BLE001 - its errors derive from Exception alone
        return [short(e)]
    return []


def _types(found: Found) -> Iterator[str]:
    """Floats of the graph that are not of its dtype."""
    names = package().TensorProto.DataType
    graph, wanted = found.file.proto.graph, _FLOATS[found.dtype]
    for port in (*graph.input, *graph.output):
        type_ = names.Name(port.type.tensor_type.elem_type)
        if type_ in _FLOATS.values() and type_ != wanted:
            yield f"{port.name} is {type_}"
    for name, t in found.file.tensors.items():
        if t.type in _FLOATS.values() and t.type != wanted and t.inline is None:
            allowed = _wide if isinstance(found.model.arch, Decoder) else _scales
            if not allowed(found, t):
                yield f"{name} is {t.type}"


def _scales(found: Found, t: Stored) -> bool:
    """Whether a tensor is scales alone, which TensorRT wants in F32 in a half graph (onnx_trt.py)."""
    kinds = {n.op_type for n in found.file.consumers.get(t.name, ())}
    return bool(kinds) and kinds <= {"QuantizeLinear", "DequantizeLinear"}


def _wide(found: Found, t: Stored) -> bool:
    """Whether it is a scale or a minimum that stays in F32 for TensorRT, and what it makes is cast to the graph's dtype."""
    if found.file.metadata.get("dialect") != "trt" or t.type != "FLOAT":
        return False
    uses = [n for n in found.file.consumers.get(t.name, ()) if t.name == n.input[1]]
    kinds = {"scale": "DequantizeLinear", "minimum": "MatMul"}
    made = [n.output[0] for n in uses if n.op_type == kinds.get(t.name.rpartition(".")[2])]
    after = [n for name in made for n in found.file.consumers.get(name, ())]
    return bool(after) and {n.op_type for n in after} <= {"Cast", "Gather"}


def _ports(found: Found) -> Iterator[str]:
    """Inputs and outputs that are missing or of another shape than the traits imply."""
    d, graph = found.model.decoder, found.file.proto.graph
    inputs, outputs = ({p.name: _shape(p) for p in side} for side in (graph.input, graph.output))
    counted = ("position_ids",) if found.file.metadata.get("dialect") != "genai" else ()
    for name in ("input_ids", "attention_mask", *counted):
        if name not in inputs:
            yield f"there is no input {name}"
    if outputs.get("logits", (0,))[-1] != d.vocab:
        yield f"logits have the shape {outputs.get('logits')}, the vocabulary has {d.vocab} tokens"
    if not any(name.startswith("past_key_values") for name in inputs):
        return
    yield from _writes(found)
    for i, layer in d.each():
        a = layer.attention
        for side in ("key", "value"):
            width = a.mla.v_dim if a.mla is not None and side == "value" else a.head_dim
            for name, ports in ((f"past_key_values.{i}.{side}", inputs), (f"present.{i}.{side}", outputs)):
                shape = ports.get(name, ())
                if len(shape) != 4 or (shape[1], shape[3]) != (a.kv_heads, width):
                    yield f"{name} has the shape {shape or 'of nothing: it is absent'}, expected {a.kv_heads} heads of {width}"


def _writes(found: Found) -> Iterator[str]:
    """Caches of fixed length that go on at their beginning when they are full, that are written along another axis, and those that
    nothing reads after they are written, which only the order of nodes would make right."""
    nodes = found.file.proto.graph.node
    read = {name for node in nodes for name in node.input}
    for node in (n for n in nodes if n.op_type == "TensorScatter"):
        said = {a.name: package().helper.get_attribute_value(a) for a in node.attribute}
        if said.get("mode", b"linear") != b"linear":
            yield f"{node.output[0]} is written in a circle, so that a full cache loses its beginning"
        if said.get("axis", -2) not in (2, -2):
            yield f"{node.output[0]} is written along axis {said['axis']}, positions are axis 2"
        if node.output[0] not in read:
            yield f"nothing reads {node.output[0]}, so attention does not see what is written"


def _shape(port: Any) -> tuple[int | str, ...]:
    return tuple(d.dim_param or d.dim_value for d in port.type.tensor_type.shape.dim)


def unrounded(expected: Model, found: Found) -> tuple[Model, list[str]]:
    """What the graph should round, less what it says it does not and indeed does not, and sentences about that."""
    said, model = found.unrounded, found.model
    left: dict[str, str] = {}
    entries = {}
    for role, entry in expected.entries.items():
        what = f"inputs of {kind_of(role)}"
        if entry.activation is not None and model.entries[role].activation is None and what in said:
            entries[role] = replace(entry, activation=None)
            left[what] = said[what]
    made = expected.with_entries(entries) if entries else expected
    cache = [w for w in ("the cache", "keys", "values") if w in said]
    if expected.kv is not None and model.kv is None and cache:
        made = replace(made, kv=None)
        left |= {w: said[w] for w in cache}
    alike: dict[str, list[str]] = {}
    for what, how in left.items():
        alike.setdefault(how, []).append(what)
    return made, [
        f"{', '.join([some[0], *(w.removeprefix('inputs of ') for w in some[1:])])} {how}"
        for how, some in alike.items()
    ]


# --- rotary tables -----------------------------------------------------------------------------------------


def positions(found: Found) -> int:
    """How many positions the graph was made for."""
    text = found.file.metadata.get("positions", "")
    return (
        min(int(text), found.model.decoder.context)
        if text.isascii() and text.isdigit() and len(text) < 12
        else found.model.decoder.context
    )


def ropes(d: Decoder) -> list[Rope]:
    """The different ropes of the layers, in their order."""
    return list(dict.fromkeys(layer.attention.rope for _, layer in d.each() if layer.attention.rope))


def _rotary(proof: Proof, found: Found) -> Iterator[str]:
    several = ropes(found.model.decoder)
    count = positions(found)
    if count < found.model.decoder.context:
        proof.notes.append(
            f"the graph ends at {count} of the model's {found.model.decoder.context} positions, by choice"
        )
    for i, rope in enumerate(several):
        for long in (False, True)[: 1 + (rope.scaling == "longrope")]:
            for kind, expected in zip(("cos", "sin"), rotary.tables(rope, count, long=long), strict=True):
                name = f"rotary.{kind}{'.long' if long else ''}{f'.{i}' if len(several) > 1 else ''}"
                t = found.file.tensors.get(name)
                if t is None:
                    yield f"there is no {name}"
                elif t.shape != expected.shape:
                    yield f"{name} has {t.shape} numbers, {count} positions want {expected.shape}"
                elif (off := _off(t, expected)) > _TABLE[found.dtype] * max(
                    1.0, float(np.abs(expected).max())
                ):
                    yield f"{name} is off by up to {off:.2g}"


def _off(t: Stored, expected: NDArray[np.float32]) -> float:
    dtypes = {v: k for k, v in _FLOATS.items()}
    off = np.abs(as_f32(t.load(), dtypes.get(t.type, "F32")).astype(np.float64) - expected)
    return float(np.nan_to_num(off, nan=np.inf).max(initial=0.0))


# --- another reading ---------------------------------------------------------------------------------------


def independent(found: Found) -> tuple[list[str], float]:
    """Initializers as the onnx package reads them: what it sees differently, and the largest difference of stored codes or bits."""
    onnx = package()
    folder, wrong, worst = found.file.path.parent, [], 0.0
    for proto in found.file.proto.graph.initializer:
        own = found.file.tensors[proto.name]
        try:
            theirs = _theirs(onnx, proto, folder)
        except Exception as e:  # noqa: BLE001 - its errors have no common class
            wrong.append(f"{proto.name}: the onnx package does not read it ({short(e)})")
            continue
        if tuple(theirs.shape) != own.shape:
            wrong.append(
                f"{proto.name}: the onnx package sees the shape {theirs.shape}, lconvert {own.shape}"
            )
            continue
        worst = max(worst, _distance(own.load(), theirs))
    return wrong, worst


def _theirs(onnx: Any, proto: Any, folder: Path) -> NDArray[Any]:
    """Codes as integers, floats of 8 and 4 bits as their bits, others as numbers."""
    copy = onnx.TensorProto()
    copy.CopyFrom(proto)
    if copy.data_location == onnx.TensorProto.EXTERNAL:
        onnx.external_data_helper.load_external_data_for_tensor(copy, str(folder))
        copy.data_location = onnx.TensorProto.DEFAULT
        with contextlib.suppress(ValueError):
            copy.ClearField("external_data")
    array: NDArray[Any] = onnx.numpy_helper.to_array(copy)
    name = onnx.TensorProto.DataType.Name(copy.data_type)
    if name.startswith("FLOAT8") or name == "FLOAT4E2M1":
        return array.view(np.uint8) & np.uint8((1 << BITS[name]) - 1)
    if name == "BFLOAT16":
        return array.view(np.uint16)
    return array.astype(np.int16) if BITS[name] < 8 else array


def _distance(a: NDArray[Any], b: NDArray[Any]) -> float:
    if a.dtype == b.dtype and a.tobytes() == b.tobytes():
        return 0.0
    with np.errstate(invalid="ignore"):
        off = np.abs(a.astype(np.float64) - b.astype(np.float64))
    return float(np.nan_to_num(off, nan=np.inf).max(initial=0.0))


def read(path: Path) -> Found | None:
    """The graph read back, None for one that lconvert did not write."""
    file = onnx_reader.read(path)
    return onnx_source.read(file) if onnx_source.ours(file) else None
