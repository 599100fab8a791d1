"""An ONNX file as it lies: its graph, and where the bytes of every tensor are. Nothing that it says is trusted.

Tensors are read out of the file or of the external data beside it, which must lie in the same folder and be as long as type and
shape say (onnx/docs/ExternalData.md). Codes of 4 and 2 bits are unpacked here, the first in the low bits (onnx.proto, TensorProto).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lconvert.errors import InputError, UnsupportedError
from lconvert.formats.onnx_graph import BITS, package
from lconvert.ir import Dtype, Tensor

#: What a stored type is read as; codes of small floats are their bits.
_DTYPES: Mapping[str, Dtype] = {
    "FLOAT": "F32", "FLOAT16": "F16", "BFLOAT16": "BF16", "INT64": "I64", "INT32": "I32", "INT8": "I8", "UINT8": "U8",
    "BOOL": "BOOL", "INT4": "I8", "UINT4": "U8", "UINT2": "U8", "FLOAT4E2M1": "U8", "FLOAT8E4M3FN": "U8",
}  # fmt: skip
_NUMPY = {
    "F32": "<f4",
    "F16": "<f2",
    "BF16": "<u2",
    "I64": "<i8",
    "I32": "<i4",
    "I8": "i1",
    "U8": "u1",
    "BOOL": "?",
}
#: Where small constants keep their numbers, by type, if not as raw bytes.
_FIELDS = {"FLOAT": "float_data", "INT64": "int64_data"}
_MOST = 1 << 40  # elements


@dataclass(frozen=True)
class Stored:
    """A tensor of the file. `path` with `offset` for external data, else `inline`."""

    name: str
    type: str
    shape: tuple[int, ...]
    path: Path
    offset: int = 0
    inline: bytes | None = field(default=None, repr=False)

    @property
    def nbytes(self) -> int:
        return -(-prod(self.shape) * BITS[self.type] // 8)

    @property
    def origin(self) -> str:
        return f"{self.path.name}:{self.name}"

    def raw(self) -> NDArray[np.uint8]:
        """Its bytes, mapped."""
        if self.inline is not None:
            return np.frombuffer(self.inline, np.uint8)
        if not self.nbytes:
            return np.empty(0, np.uint8)
        return np.memmap(self.path, np.uint8, "r", self.offset, (self.nbytes,))

    def load(self) -> NDArray[Any]:
        """The whole array, codes unpacked."""
        return _unpacked(self.raw(), self.type)[: prod(self.shape)].reshape(self.shape)


@dataclass(frozen=True)
class OnnxFile:
    """The proto without external data, and its tensors by name."""

    path: Path
    proto: Any = field(repr=False)
    tensors: Mapping[str, Stored] = field(repr=False)

    @cached_property
    def metadata(self) -> dict[str, str]:
        return {p.key: p.value for p in self.proto.metadata_props}

    @cached_property
    def producers(self) -> dict[str, Any]:
        """Node by the name of a value that it makes."""
        return {name: node for node in self.proto.graph.node for name in node.output if name}

    @cached_property
    def consumers(self) -> dict[str, list[Any]]:
        """Nodes by the name of a value that they take."""
        out = defaultdict(list)
        for node in self.proto.graph.node:
            for name in dict.fromkeys(node.input):
                out[name].append(node)
        return dict(out)

    @cached_property
    def files(self) -> tuple[Path, ...]:
        """The file and those that hold its external data."""
        return (self.path, *dict.fromkeys(t.path for t in self.tensors.values() if t.path != self.path))


def read(path: Path) -> OnnxFile:
    """The graph with every initializer checked; InputError for what is damaged, reaches outside or lies about its size."""
    onnx = package()
    try:
        data = path.read_bytes()
    except OSError as e:
        raise InputError(f"{path}: cannot be read ({e.strerror or e})") from None
    try:
        proto = onnx.load_model_from_string(data)
    except Exception as e:  # noqa: BLE001 - protobuf has its own errors
        raise InputError(f"{path}: is not an ONNX file ({_short(e)})") from None
    if not proto.HasField("graph") or not proto.graph.node or not proto.opset_import:
        raise InputError(f"{path}: holds no graph; it is empty or cut off")
    tensors: dict[str, Stored] = {}
    for t in proto.graph.initializer:
        if not t.name or t.name in tensors:
            raise InputError(f"{path}: two initializers are called {_short(t.name)!r}; names must differ")
        tensors[t.name] = _stored(onnx, path, t)
    return OnnxFile(path, proto, tensors)


def integers(node: Any) -> dict[str, int]:
    """Attributes of a node that are whole numbers, by name."""
    kind = package().AttributeProto.INT
    return {a.name: int(a.i) for a in node.attribute if a.type == kind}


def _short(text: object) -> str:
    flat = " ".join(str(text).split())
    return flat if len(flat) <= 160 else flat[:160] + "..."


def _stored(onnx: Any, path: Path, t: Any) -> Stored:
    where = f"{path}: initializer {_short(t.name)!r}"
    known = onnx.TensorProto.DataType.values()
    type_ = onnx.TensorProto.DataType.Name(t.data_type) if t.data_type in known else str(t.data_type)
    if type_ not in _DTYPES:
        raise UnsupportedError(f"{where} is of type {type_}, which lconvert does not read")
    shape = tuple(int(n) for n in t.dims)
    if any(n < 0 for n in shape) or prod(shape) > _MOST:
        raise InputError(f"{where} has the impossible shape {_short(shape)}")
    if t.data_location == onnx.TensorProto.EXTERNAL:
        return _external(where, path, t, type_, shape)
    found = Stored(t.name, type_, shape, path)
    data = bytes(t.raw_data)
    if not data and type_ in _FIELDS:
        data = np.asarray(getattr(t, _FIELDS[type_]), _NUMPY[_DTYPES[type_]]).tobytes()
    elif not data and found.nbytes:
        try:
            data = onnx.numpy_helper.to_array(t).tobytes() if BITS[type_] >= 8 else b""
        except Exception as e:  # noqa: BLE001 - whatever NumPy has against it
            raise InputError(f"{where} cannot be read ({_short(e)})") from None
    if len(data) != found.nbytes:
        raise InputError(f"{where} holds {len(data)} bytes, its shape and type want {found.nbytes}")
    return Stored(t.name, type_, shape, path, 0, data)


def _external(where: str, path: Path, t: Any, type_: str, shape: tuple[int, ...]) -> Stored:
    said = {e.key: e.value for e in t.external_data}
    location = said.get("location", "")
    if not location or "\0" in location or Path(location).name != location or location in (".", ".."):
        raise InputError(
            f"{where} lies in {_short(location)!r}; external data must be a file beside the model, named without a folder"
        )
    file = path.parent / location
    if file.is_symlink() and not file.resolve().is_relative_to(path.parent.resolve()):
        raise InputError(f"{where} lies in {location}, a link that leads out of the folder")
    if not file.is_file():
        raise InputError(f"{where} lies in {location}, which is missing; copy it beside {path.name}")
    numbers = {}
    for key in ("offset", "length"):
        text = said.get(key, "0" if key == "offset" else "")
        if text and not (text.isascii() and text.isdigit() and len(text) < 20):
            raise InputError(f"{where}: its {key} is {_short(text)!r}, expected a number")
        numbers[key] = int(text or 0)
    made = Stored(t.name, type_, shape, file, numbers["offset"])
    if said.get("length") and numbers["length"] != made.nbytes:
        raise InputError(
            f"{where} is {numbers['length']} bytes long, its shape {shape} in {type_} wants {made.nbytes}"
        )
    if (end := made.offset + made.nbytes) > (size := file.stat().st_size):
        raise InputError(f"{where} ends at byte {end} of {location}, which has {size}; it is cut off")
    return made


# --- arrays ------------------------------------------------------------------------------------------------


def _unpacked(raw: NDArray[np.uint8], type_: str) -> NDArray[Any]:
    """Elements out of bytes, along the last axis."""
    bits = BITS[type_]
    if bits >= 8:
        return np.ascontiguousarray(raw).view(_NUMPY[_DTYPES[type_]])
    shifts = np.arange(0, 8, bits, dtype=np.uint8)
    codes = (raw[..., None] >> shifts) & np.uint8((1 << bits) - 1)
    codes = codes.reshape(*raw.shape[:-1], -1)
    return ((codes ^ 8) - np.uint8(8)).view(np.int8) if type_ == "INT4" else codes


def tensor(t: Stored) -> Tensor:
    """The tensor as it lies."""
    rows = t.shape[0] if t.shape else 1
    width = prod(t.shape[1:]) * BITS[t.type]

    def read(start: int, stop: int) -> NDArray[Any]:
        if width % 8:
            return t.load()[start:stop]
        raw = t.raw().reshape(rows, width // 8)[start:stop]
        return _unpacked(raw, t.type).reshape(stop - start, *t.shape[1:])

    return Tensor(t.shape, _DTYPES[t.type], read, t.origin, _files(t))


def turned(t: Stored) -> Tensor:
    """A matrix (columns, rows) as (rows, columns), which is how weights are written down in the IR."""
    k, n = t.shape
    bits = BITS[t.type]

    def read(start: int, stop: int) -> NDArray[Any]:
        if n * bits % 8:
            return np.ascontiguousarray(t.load()[:, start:stop].T)
        first, last = start * bits // 8, -(-stop * bits // 8)
        part = _unpacked(np.ascontiguousarray(t.raw().reshape(k, n * bits // 8)[:, first:last]), t.type)
        skip = start - first * 8 // bits
        return np.ascontiguousarray(part[:, skip : skip + stop - start].T)

    return Tensor((n, k), _DTYPES[t.type], read, t.origin, _files(t))


def bits_of_rows(t: Stored, bits: int, cols: int) -> Tensor:
    """Codes of `bits` bits in rows of bytes, each of which may have more room than its `cols` codes need."""
    rows = t.shape[0]

    def read(start: int, stop: int) -> NDArray[Any]:
        raw = t.raw().reshape(rows, -1)[start:stop]
        return np.ascontiguousarray(_unpacked(raw, f"UINT{bits}")[:, :cols])

    return Tensor((rows, cols), "U8", read, t.origin, _files(t))


def _files(t: Stored) -> tuple[tuple[str, tuple[int, int, int]], ...]:
    state = t.path.stat()
    return ((str(t.path), (state.st_size, state.st_mtime_ns, state.st_ino)),)
