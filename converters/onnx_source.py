"""An ONNX graph that lconvert wrote, read back into a Model: numbers out of the graph, traits out of the config.json beside it.

What a weight means is taken from the nodes around it, not from how its writer would have stored it: which way a matrix is multiplied,
the axis and blocks of its DequantizeLinear, what is done to its input, what is subtracted from the product. That the other nodes
compute the traits is what logits show.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lconvert.archs import configured
from lconvert.archs.common import binds
from lconvert.converters import onnx_activations, onnx_pairs, onnx_rounding, onnx_source_conv
from lconvert.converters.onnx_pairs import wrong as _wrong
from lconvert.converters.onnx_rounding import Rounding
from lconvert.converters.tokenizer_hf import read_tokenizer
from lconvert.errors import InputError, UnsupportedError
from lconvert.formats import onnx_reader
from lconvert.formats.json_object import read_object
from lconvert.formats.onnx_graph import package
from lconvert.formats.onnx_reader import OnnxFile, Stored, integers
from lconvert.formats.overflow import finite_weights
from lconvert.ir import (
    E2M1,
    E4M3,
    ActSpec,
    Decoder,
    Entry,
    Grid,
    KVSpec,
    Model,
    QTensor,
    Tensor,
    Transform,
    as_f32,
    dense,
    int_grid,
)
from lconvert.spec import check

_GRIDS: Mapping[str, Grid] = {
    "INT4": int_grid(4, True), "UINT4": int_grid(4, False), "UINT2": int_grid(2, False), "INT8": int_grid(8, True),
    "UINT8": int_grid(8, False), "FLOAT8E4M3FN": E4M3, "FLOAT4E2M1": E2M1,
}  # fmt: skip
_NAMES = {"FLOAT": "F32", "FLOAT16": "F16", "BFLOAT16": "BF16"}


@dataclass(frozen=True)
class Found:
    """The model, the second copy of a tied table that the head multiplies by (None where there is none), the graph's dtype, the file."""

    model: Model
    head: Entry | None
    dtype: str
    file: OnnxFile

    @property
    def unrounded(self) -> Mapping[str, str]:
        """What the model rounds and the graph says that it does not: "inputs of attn.q", "keys", and why."""
        try:
            said = json.loads(self.file.metadata.get("unrounded", "{}"))
        except ValueError:
            return {}
        return {k: v for k, v in said.items() if isinstance(v, str)} if isinstance(said, dict) else {}


def ours(file: OnnxFile) -> bool:
    """Whether lconvert wrote the graph, with a configuration beside it."""
    return "lconvert" in file.metadata and (file.path.parent / "config.json").is_file()


def read(file: OnnxFile) -> Found:
    """InputError for a graph whose weights are missing or used in a way that lconvert never writes."""
    for node in file.proto.graph.node:
        if node.op_type == "MatMulNBits" and len(node.input) < 3:
            raise InputError(
                f"{file.path}: node {node.name!r}, {node.op_type}, has {len(node.input)} inputs; it is damaged"
            )
    folder = file.path.parent
    config = read_object(folder / "config.json")
    arch, traits, *_ = configured(config, str(folder / "config.json"))
    decoder = traits if isinstance(traits, Decoder) else None
    roles = dict.fromkeys(role for bind in binds(arch.names, traits) for role, _ in bind.parts)
    entries = {role: _entry(file, role) for role in roles}
    head = _entry(file, "head") if decoder and decoder.tied and "head" in file.tensors else None
    generation = folder / "generation_config.json"
    model = Model(
        arch=replace(decoder, norm_offset=0.0) if decoder else traits,
        config=config,
        entries=entries,
        tokenizer=read_tokenizer(folder),
        generation=read_object(generation) if generation.exists() else {},
        name=folder.resolve().name,
        source=str(file.path),
        kv=_cache(file, decoder) if decoder else None,
    )
    return Found(check(model), head, dtype(file), file)


def load(path: Path) -> Model:
    """The model of a graph that lconvert wrote; UnsupportedError for another one, whose nodes could mean anything."""
    file = onnx_reader.read(path)
    if not ours(file):
        raise UnsupportedError(
            f"{path}: a graph that lconvert did not write, or without the config.json of its folder; give the model it was made from"
        )
    model = read(file).model
    checked = {
        name: replace(e, data=finite_weights(e.data, e.transform.param if e.transform else None))
        for name, e in model.entries.items()
        if isinstance(e.data, QTensor)
    }
    return model.with_entries(checked)


def dtype(file: OnnxFile) -> str:
    """Of the logits: F32, F16 or BF16."""
    onnx = package()
    for port in file.proto.graph.output:
        if port.name == "logits":
            name = onnx.TensorProto.DataType.Name(port.type.tensor_type.elem_type)
            if name in _NAMES:
                return _NAMES[name]
    raise InputError(f"{file.path}: has no output logits of floats")


# --- one weight --------------------------------------------------------------------------------------------


def _one(file: OnnxFile, name: str, role: str, kinds: tuple[str, ...]) -> Any:
    """The only node of these kinds that takes a value."""
    found = [n for n in file.consumers.get(name, ()) if n.op_type in kinds]
    if len(found) != 1:
        raise _wrong(file, role, f"{len(found)} of {' and '.join(kinds)} take {name!r}, expected one")
    return found[0]


def _cast(file: OnnxFile, name: str) -> str:
    """A value, or where only a Cast to the graph's dtype takes it (F32 scales in a half graph), what comes out of that."""
    uses = file.consumers.get(name, [])
    return str(uses[0].output[0]) if len(uses) == 1 and uses[0].op_type == "Cast" else name


def _entry(file: OnnxFile, role: str) -> Entry:
    if (table := file.tensors.get(role + ".table")) is not None:
        return Entry(role, _table(file, role, table))
    t = file.tensors.get(role)
    if t is None:
        raise InputError(f"{file.path}: holds no weight for {role}; it is not complete, or of another model")
    uses = file.consumers.get(role, [])
    if not uses:
        raise _wrong(file, role, "no node takes it")
    if len(t.shape) == 4:
        data, x = onnx_source_conv.weight(file, role, t)
        return Entry(role, data, activation=_input(file, role, x)[0])
    if t.type == "INT32":
        return Entry(role, onnx_source_conv.bias(file, role, t))
    kinds = {n.op_type for n in uses}
    if "DequantizeLinear" in kinds:
        return _quantized(file, role, t)
    if kinds == {"MatMulInteger"}:
        return _whole(file, role, t)
    if kinds == {"MatMulNBits"}:
        return _in_bits(file, role, t)
    if t.type not in _NAMES:
        raise _wrong(file, role, f"it is {t.type} and nothing dequantizes it")
    if kinds == {"MatMul"} and len(t.shape) == 2:
        if any(n.input[1] != role for n in uses):
            raise _wrong(file, role, "it is multiplied from the left")
        return Entry(role, onnx_reader.turned(t), activation=_input(file, role, uses[0].input[0])[0])
    return Entry(role, onnx_reader.tensor(t))


def _number(file: OnnxFile, name: str, role: str) -> Stored:
    found = file.tensors.get(name)
    if found is None:
        raise _wrong(file, role, f"{name!r} is no constant")
    return found


def _grid(file: OnnxFile, role: str, t: Stored) -> Grid:
    if t.type not in _GRIDS or len(t.shape) != 2:
        raise _wrong(file, role, f"codes of type {t.type} and shape {t.shape}")
    return _GRIDS[t.type]


def _quantized(file: OnnxFile, role: str, t: Stored) -> Entry:
    """Codes (columns, rows) behind a DequantizeLinear and a MatMul."""
    node = _one(file, role, role, ("DequantizeLinear",))
    if len(file.consumers[role]) != 1 or node.input[0] != role:
        raise _wrong(file, role, "its codes are taken by several nodes")
    matrix = _cast(file, node.output[0])
    product = _one(file, matrix, role, ("MatMul",))
    if product.input[1] != matrix:
        raise _wrong(file, role, "it is multiplied from the left")
    q = replace(_blocks(file, role, node, t), zero=_zero(file, role, node, t))
    if (minimum := file.tensors.get(role + ".minimum")) is not None:
        q = _with_minimum(file, role, q, minimum, product)
    q = _with_factor(file, role, q, product.output[0])
    activation, order, scaled = _input(file, role, product.input[0])
    if order is not None:
        q = _reordered(file, role, q, order)
    for name, seen in ((".order", order), (".input_scale", scaled)):
        if role + name in file.tensors and seen is None:
            raise _wrong(file, role, f"{role + name!r} is not applied to its input")
    return Entry(role, q, activation=activation, transform=_scaled(scaled))


def _scaled(t: Stored | None) -> Transform | None:
    """What the features of an input are multiplied with."""
    return None if t is None else Transform("scale", "input", onnx_reader.tensor(t), folded=False)


def _whole(file: OnnxFile, role: str, t: Stored) -> Entry:
    """Codes that meet codes of the input in integers: a scale per token, found at run time, and one per row come after."""
    product = _one(file, role, role, ("MatMulInteger",))
    cast = _one(file, product.output[0], role, ("Cast",))
    tokens = _one(file, cast.output[0], role, ("Mul",))
    scale = _number(file, _one(file, tokens.output[0], role, ("Mul",)).input[1], role)
    if t.type != "INT8" or product.input[1] != role or scale.shape not in ((t.shape[1],), (1,)):
        raise _wrong(file, role, f"{t.type} codes with scales of shape {scale.shape} after their product")
    block = (1, -1) if scale.shape[0] == t.shape[1] else (-1, -1)
    q = QTensor((t.shape[1], t.shape[0]), onnx_reader.turned(t), int_grid(8, True), block, _column(scale))
    seen = onnx_rounding.codes(file, product.input[0])
    if seen is None:
        raise _wrong(file, role, "its input becomes codes in no way that a scheme has")
    _, order, scaled = _input(file, role, seen.source)
    if order is not None or (scaled is None) != (role + ".input_scale" not in file.tensors):
        raise _wrong(file, role, f"{role + '.input_scale'!r} is not applied to its input")
    return Entry(role, q, activation=seen.spec, transform=_scaled(scaled))


def _with_factor(file: OnnxFile, role: str, q: QTensor, product: str) -> QTensor:
    """The outer of two scales, which the product is multiplied with or divided by, back in the scales."""
    for _ in range(2):  # after what is subtracted, if anything is
        for node in file.consumers.get(product, ()):
            if node.name.rpartition(".")[2] == "factor" and node.input[0] == product:
                factor = _f32(_number(file, node.input[1], role)).reshape(())
                assert isinstance(q.scale, Tensor)
                scale = as_f32(q.scale.load(), q.scale.dtype)
                if node.op_type == "Mul":
                    return replace(q, scale=dense(scale * factor))
                if (scale == 1).all():
                    return replace(q, scale=dense(scale * factor), divisor=True)
                return replace(q, scale=dense(scale / factor))
        after = [n for n in file.consumers.get(product, ()) if n.op_type == "Sub" and n.input[0] == product]
        if len(after) != 1:
            break
        product = after[0].output[0]
    return q


def _in_bits(file: OnnxFile, role: str, t: Stored) -> Entry:
    """Codes (rows, blocks, bytes) of a MatMulNBits (docs/ContribOperators.md of onnxruntime), unsigned, around a zero point."""
    node = _one(file, role, role, ("MatMulNBits",))
    said = integers(node)
    k, n, bits, size = (said.get(name, 0) for name in ("K", "N", "bits", "block_size"))
    if bits not in (2, 4, 8) or size < 16 or k < 1 or k % size or t.type != "UINT8" or node.input[1] != role:
        raise _wrong(file, role, f"{bits} bits in blocks of {size} of {k} columns, held as {t.type}")
    blocks = k // size
    scale = _number(file, node.input[2], role)
    if t.shape != (n, blocks, size * bits // 8) or scale.shape != (n, blocks) or scale.type not in _NAMES:
        raise _wrong(file, role, f"codes of shape {t.shape} and scales of shape {scale.shape}")
    codes = onnx_reader.bits_of_rows(t, bits, k)
    zero: Tensor = dense(np.full((n, blocks), 1 << (bits - 1), np.uint8))
    if len(node.input) > 3 and node.input[3]:
        packed = _number(file, node.input[3], role)
        if packed.type != "UINT8" or packed.shape != (n, -(-blocks * bits // 8)):
            raise _wrong(file, role, f"zero points of type {packed.type} and shape {packed.shape}")
        zero = onnx_reader.bits_of_rows(packed, bits, blocks)
    if len(node.input) > 4 and any(node.input[4:]):
        raise _wrong(file, role, "an order or a bias inside its product")
    q = QTensor((n, k), codes, int_grid(bits, False), (1, size), onnx_reader.tensor(scale), zero)
    q = _with_factor(file, role, q, node.output[0])
    activation, order, _ = _input(file, role, node.input[0])
    if order is None and role + ".order" in file.tensors:
        raise _wrong(file, role, "the order of its columns is not applied to its input")
    return Entry(role, q if order is None else _reordered(file, role, q, order), activation=activation)


def _blocks(file: OnnxFile, role: str, node: Any, t: Stored) -> QTensor:
    """The codes with their scale."""
    grid, codes = _grid(file, role, t), onnx_reader.turned(t)
    n, k = codes.shape
    said = integers(node)
    axis, size, name = said.get("axis", 1), said.get("block_size", 0), node.input[1]
    nested = file.producers.get(name)
    if nested is not None:
        if nested.op_type != "DequantizeLinear" or axis != 0 or size < 1 or len(nested.input) != 2:
            raise _wrong(file, role, f"its scales come out of {nested.op_type}")
        fine, coarse = (_number(file, name, role) for name in nested.input)
        if fine.type != "FLOAT8E4M3FN" or fine.shape != (-(-k // size), n) or coarse.shape:
            raise _wrong(file, role, f"scales of type {fine.type} and shape {fine.shape}")
        above = Tensor((1, 1), "F32", lambda a, b: _f32(coarse).reshape(1, 1), coarse.origin)
        blocks = onnx_reader.turned(fine)
        scale: Tensor | QTensor = QTensor(blocks.shape, blocks, E4M3, (-1, -1), above)
        return QTensor((n, k), codes, grid, (1, size), scale)
    stored = _number(file, name, role)
    if stored.type not in _NAMES:
        raise _wrong(file, role, f"a scale of type {stored.type}")
    if not stored.shape:
        one = dense(_f32(stored).reshape(1, 1))
        return QTensor((n, k), codes, grid, (-1, -1), one)
    if axis == 1 and stored.shape == (n,) and not size:
        return QTensor((n, k), codes, grid, (1, -1), _column(stored))
    if axis == 0 and size > 0 and k % size == 0 and stored.shape == (k // size, n):
        return QTensor((n, k), codes, grid, (1, size), onnx_reader.turned(stored))
    raise _wrong(
        file,
        role,
        f"axis {axis}, blocks of {size}, scales of shape {stored.shape} for codes of shape {t.shape}",
    )


def _zero(file: OnnxFile, role: str, node: Any, t: Stored) -> Tensor | None:
    """The zero points, where there are any."""
    if len(node.input) < 3 or not node.input[2]:
        return None
    zero, scale = _number(file, node.input[2], role), file.tensors.get(node.input[1])
    if zero.type != t.type or scale is None or zero.shape != scale.shape:
        raise _wrong(file, role, f"zero points of type {zero.type} and shape {zero.shape}")
    if zero.type == "INT8" and not zero.load().any():
        return None
    if not zero.shape:
        return dense(zero.load().reshape(1, 1))
    return _column(zero) if len(zero.shape) == 1 else onnx_reader.turned(zero)


def _column(t: Stored) -> Tensor:
    """A vector as (n, 1)."""
    flat = onnx_reader.tensor(t)
    return replace(flat, shape=(*t.shape, 1), read=lambda a, b: t.load()[a:b].reshape(b - a, 1))


def _f32(t: Stored) -> NDArray[np.float32]:
    return as_f32(t.load(), _NAMES.get(t.type, "F32"))


def _with_minimum(file: OnnxFile, role: str, q: QTensor, t: Stored, product: Any) -> QTensor:
    """Codes less something per block: a zero point where it is one, so that values are those of its integers."""
    less = _one(file, t.name, role, ("MatMul",))
    minus = _one(file, product.output[0], role, ("Sub",))
    if list(minus.input) != [product.output[0], _cast(file, less.output[0])] or less.input[1] != t.name:
        raise _wrong(file, role, "its minimum is not subtracted from the product")
    minimum = onnx_reader.turned(t)
    if not isinstance(q.scale, Tensor) or q.scale.shape != minimum.shape:
        raise _wrong(file, role, f"a minimum of shape {t.shape} for other scales")
    scale, low = as_f32(q.scale.load(), q.scale.dtype), as_f32(minimum.load(), minimum.dtype)
    with np.errstate(all="ignore"):
        zero = np.rint(low / np.where(scale == 0, 1, scale))
    if (np.abs(zero) < 1 << 15).all() and np.array_equal(zero * scale, low):
        return replace(q, zero=dense(zero.astype(np.int16)))
    return replace(q, offset=minimum)


def _reordered(file: OnnxFile, role: str, q: QTensor, t: Stored) -> QTensor:
    """Columns in the order of the input, each with the number of its block."""
    order = t.load().reshape(-1)
    k, width = q.shape[1], q.block[1]
    if t.type != "INT64" or order.shape != (k,) or not np.array_equal(np.sort(order), np.arange(k)):
        raise _wrong(file, role, "the order of its columns is no permutation")
    place = np.argsort(order)
    stored = q.codes
    codes = replace(stored, read=lambda a, b: np.ascontiguousarray(stored.read(a, b)[:, place]))
    if width == -1:
        return replace(q, codes=codes)
    return replace(q, codes=codes, g_idx=dense((place // width).astype(np.int32)))


def _input(file: OnnxFile, role: str, name: str) -> tuple[ActSpec | None, Stored | None, Stored | None]:
    """What is done to the input of a product: rounding, the order of its features, their scale."""
    return treated(file, role, name)[:3]


def treated(file: OnnxFile, role: str, name: str) -> tuple[ActSpec | None, Stored | None, Stored | None, str]:
    """The same, and the value that all of it is done to. name: of the product's input."""
    activation, order, scaled = None, None, None
    for _ in range(4):
        node: Any = file.producers.get(name)
        kind = "" if node is None else node.op_type
        if activation is None and (seen := _rounding(file, role, name)) is not None:
            activation, name = seen.spec, seen.source
        elif kind == "Gather" and node.input[1] == role + ".order":
            if integers(node).get("axis", 0) != -1:
                raise _wrong(file, role, "the order of its columns is taken along another axis")
            order, name = file.tensors.get(node.input[1]), node.input[0]
        elif kind == "Mul" and role + ".input_scale" in node.input:
            place = list(node.input).index(role + ".input_scale")
            scaled, name = file.tensors.get(role + ".input_scale"), node.input[1 - place]
        else:
            break
    return activation, order, scaled, name


def _rounding(file: OnnxFile, role: str, name: str) -> Rounding | None:
    """How a value was rounded, by nodes that quantize or by plain operators; None where it was not."""
    node = file.producers.get(name)
    if node is None:
        return None
    if (pair := onnx_pairs.found(file, role, name)) is not None:
        return pair
    seen = onnx_rounding.found(file, name)
    if seen is None and node.name.startswith(onnx_activations.NAME):
        raise _wrong(file, role, f"what is called {node.name[:80]!r} rounds in no way that a scheme does")
    return seen


def _cache(file: OnnxFile, d: Decoder) -> KVSpec | None:
    """How keys and values are rounded before they are kept."""
    sides = [_side(file, d, side) for side in ("key", "value")]
    if sides[0] is None or sides[1] is None:
        if sides[0] is not sides[1]:
            raise InputError(
                f"{file.path}: of keys and values only one is rounded; lconvert writes no such graph"
            )
        return None
    return KVSpec(sides[0], sides[1])


def _side(file: OnnxFile, d: Decoder, side: str) -> ActSpec | None:
    """The same of one of both, with the scales of all layers in one."""
    specs = []
    for i in range(d.layers):
        role = f"layers.{i}.{side}"
        node = file.producers.get(f"present.{i}.{side}")
        kept = node is not None and node.op_type in ("Concat", "TensorScatter") and len(node.input) > 1
        seen = _rounding(file, role, node.input[1]) if kept and node is not None else None
        specs.append(None if seen is None else seen.spec)
    first = specs[0]
    alike = {
        None if s is None else (s.grid, s.per, s.dynamic, s.group, s.scale is None, s.divisor) for s in specs
    }
    if len(alike) != 1:
        raise InputError(f"{file.path}: {side}s are rounded in several ways; lconvert writes no such graph")
    if first is None or first.scale is None:
        return first
    scales = [
        as_f32(s.scale.load(), s.scale.dtype).reshape(-1)
        for s in specs
        if s is not None and s.scale is not None
    ]
    return replace(first, scale=dense(np.concatenate(scales)))


def _table(file: OnnxFile, role: str, t: Stored) -> QTensor:
    """Rows whose codes and scales are looked up before they are dequantized; after it for TensorRT, whose scales must be constants."""
    grid = _grid(file, role, t)
    if [n.op_type for n in file.consumers.get(t.name, ())] == ["DequantizeLinear"]:
        return _whole_table(file, role, t, grid)
    rows = _one(file, t.name, role, ("Gather",))
    node = _one(file, rows.output[0], role, ("DequantizeLinear",))
    said = integers(node)
    sides = dict(_looked_up(file, role, rows, node))
    scale = sides.pop("scale", None)
    size = said.get("block_size", 0)
    if (
        scale is None
        or said.get("axis", 1) != 2
        or size < 1
        or scale.shape != (t.shape[0], t.shape[1] // size)
    ):
        raise _wrong(
            file, role, f"axis {said.get('axis', 1)}, blocks of {size} for a table of shape {t.shape}"
        )
    return QTensor(t.shape, onnx_reader.tensor(t), grid, (1, size), scale, sides.get("zero"))


def _whole_table(file: OnnxFile, role: str, t: Stored, grid: Grid) -> QTensor:
    node = _one(file, t.name, role, ("DequantizeLinear",))
    said = integers(node)
    size, scale = said.get("block_size", 0), _number(file, node.input[1], role)
    if _one(file, node.output[0], role, ("Gather",)).input[0] != node.output[0] or len(node.input) != 2:
        raise _wrong(file, role, "the rows of its table are not looked up")
    if said.get("axis") != 1 or size < 1 or scale.shape != (t.shape[0], t.shape[1] // size):
        raise _wrong(
            file, role, f"axis {said.get('axis', 1)}, blocks of {size} for a table of shape {t.shape}"
        )
    return QTensor(t.shape, onnx_reader.tensor(t), grid, (1, size), onnx_reader.tensor(scale))


def _looked_up(file: OnnxFile, role: str, rows: Any, node: Any) -> Iterator[tuple[str, Tensor]]:
    for name, value in zip(("scale", "zero"), node.input[1:], strict=False):
        gather = file.producers.get(value)
        if gather is None or gather.op_type != "Gather" or gather.input[1] != rows.input[1]:
            raise _wrong(file, role, f"the {name} of its rows is not looked up with them")
        yield name, onnx_reader.tensor(_number(file, gather.input[0], role))
