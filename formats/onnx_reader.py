"""An ONNX file as it lies: its graph, and where the bytes of every tensor are. Nothing that it says is trusted.

Tensors are read out of the file or of the external data beside it, which must lie in the same folder and be as long as type and
shape say (onnx/docs/ExternalData.md); so must those inside of nodes and subgraphs, which runtimes open as well. Codes of 4 and 2
bits are unpacked here, the first in the low bits (onnx.proto, TensorProto).
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property, partial
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lconvert.errors import InputError, UnsupportedError
from lconvert.formats import onnx_graph, onnx_proto
from lconvert.formats.onnx_graph import package
from lconvert.formats.onnx_proto import short
from lconvert.ir import Dtype, Tensor

#: Bits of an element of every type of fixed size (onnx.proto, TensorProto.DataType).
_BITS: Mapping[str, int] = {
    **onnx_graph.BITS, "DOUBLE": 64, "UINT64": 64, "UINT32": 32, "INT16": 16, "UINT16": 16, "COMPLEX64": 64, "COMPLEX128": 128,
    "FLOAT8E5M2": 8, "FLOAT8E4M3FNUZ": 8, "FLOAT8E5M2FNUZ": 8, "FLOAT8E8M0": 8, "INT2": 2,
}  # fmt: skip
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
_LIMIT = 2 << 30  # bytes of one protobuf message
_NAME = 255  # bytes of a file's name


@dataclass(frozen=True)
class Stored:
    """A tensor of the file. `path` with `offset` for external data, else `inline`: its bytes, or what makes them."""

    name: str
    type: str
    shape: tuple[int, ...]
    path: Path
    offset: int = 0
    inline: bytes | Callable[[], bytes] | None = field(default=None, repr=False)

    @property
    def nbytes(self) -> int:
        return -(-prod(self.shape) * _BITS.get(self.type, 0) // 8)

    @property
    def origin(self) -> str:
        return f"{self.path.name}:{self.name}"

    def raw(self) -> NDArray[np.uint8]:
        """Its bytes, mapped."""
        if self.inline is not None:
            return np.frombuffer(self.inline() if callable(self.inline) else self.inline, np.uint8)
        if not self.nbytes:
            return np.empty(0, np.uint8)
        return np.memmap(self.path, np.uint8, "r", self.offset, (self.nbytes,))

    def load(self) -> NDArray[Any]:
        """The whole array, codes unpacked."""
        return _unpacked(self.raw(), self.type)[: prod(self.shape)].reshape(self.shape)

    def array(self) -> NDArray[Any]:
        """The numbers in their own type, as onnx's numpy_helper has them: of ml_dtypes where NumPy has none."""
        onnx = package()
        t = onnx.TensorProto(data_type=onnx.TensorProto.DataType.Value(self.type), dims=self.shape)
        t.raw_data = self.raw().tobytes()
        return np.asarray(onnx.numpy_helper.to_array(t))

    def numbers(self) -> NDArray[np.float64]:
        """What its elements are worth, of any type that holds real numbers."""
        if self.type not in _BITS or self.type.startswith("COMPLEX"):
            raise UnsupportedError(f"{self.origin}: {self.type} where numbers are expected")
        return self.array().astype(np.float64)


@dataclass(frozen=True)
class OnnxFile:
    """The proto without external data, and its tensors by name. inner: those inside of nodes and subgraphs, with the node they are
    in; a graph of a plan has no file at `path` yet."""

    path: Path
    proto: Any = field(repr=False)
    tensors: Mapping[str, Stored] = field(repr=False)
    inner: tuple[tuple[Any, Stored], ...] = field(default=(), repr=False)

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
    def constants(self) -> dict[str, Stored]:
        """Tensors by the name that the nodes of the graph know them by: initializers, and outputs of Constant."""
        made = {n.output[0]: t for n, t in self.inner if n.op_type == "Constant" and n.output}
        return {**made, **self.tensors}

    @cached_property
    def files(self) -> tuple[Path, ...]:
        """The file and those that hold its external data."""
        every = (*self.tensors.values(), *(t for _, t in self.inner))
        return (self.path, *sorted({t.path for t in every if t.path != self.path}))

    def digest(self) -> str:
        """sha256 of the graph and of the data files that it names, in order of their names."""
        found = hashlib.sha256()
        for path in self.files:
            with path.open("rb") as f:
                while block := f.read(1 << 22):
                    found.update(block)
        return found.hexdigest()


def read(path: str | Path) -> OnnxFile:
    """The graph with every tensor checked.

    InputError: no ONNX model, damaged, a tensor that reaches outside or lies about its size. UnsupportedError: 2 GB in one file, a
    version of ONNX that the package does not know.
    """
    path, onnx = Path(path), package()
    if not path.is_file():
        raise InputError(f"{path}: {'is a folder' if path.is_dir() else 'no such file'}; name an .onnx file")
    try:
        if path.stat().st_size >= _LIMIT:
            raise UnsupportedError(f"{path}: 2 GB or more in one file; store the weights as external data")
        data = path.read_bytes()
    except OSError as e:
        raise InputError(f"{path}: cannot be read ({e.strerror or e})") from None
    try:
        proto = onnx.ModelProto.FromString(data)
    except Exception as e:  # noqa: BLE001 - protobuf has its own errors
        raise InputError(f"{path}: is not an ONNX file, or is damaged ({short(e)}); check the path") from None
    if not proto.HasField("graph") or not proto.graph.node or not proto.opset_import:
        raise InputError(f"{path}: is not an ONNX file, or cut off: it holds no graph; check the path")
    return opened(path, proto)


def opened(path: Path, proto: Any, made: Mapping[str, Callable[[], bytes]] | None = None) -> OnnxFile:
    """A ModelProto with its tensors checked; path: where it lies. made: bytes by name of tensors whose data file is not written yet."""
    onnx = package()
    onnx_proto.check(path, proto)
    tensors: dict[str, Stored] = {}
    for t in proto.graph.initializer:
        if not t.name or t.name in tensors:
            raise InputError(f"{path}: two initializers are called {short(t.name)!r}; names must differ")
        maker = None if made is None else made.get(t.name)
        tensors[t.name] = _stored(onnx, path, t, maker)
    inner = tuple((node, _stored(onnx, path, t)) for node, t in onnx_proto.inner(proto))
    return OnnxFile(path, proto, tensors, inner)


def integers(node: Any) -> dict[str, int]:
    """Attributes of a node that are whole numbers, by name."""
    kind = package().AttributeProto.INT
    return {a.name: int(a.i) for a in node.attribute if a.type == kind}


def _stored(onnx: Any, path: Path, t: Any, made: Callable[[], bytes] | None = None) -> Stored:
    where = f"{path}: tensor {short(t.name)!r}"
    known = onnx.TensorProto.DataType.values()
    type_ = onnx.TensorProto.DataType.Name(t.data_type) if t.data_type in known else str(t.data_type)
    external = t.data_location == onnx.TensorProto.EXTERNAL
    if type_ not in _BITS and (type_ != "STRING" or external):
        raise UnsupportedError(f"{where} is of type {type_}, which lconvert does not read")
    shape = tuple(int(n) for n in t.dims)
    if any(n < 0 for n in shape) or prod(shape) > _MOST:
        raise InputError(f"{where} has the impossible shape {short(shape)}")
    if made is not None:
        return Stored(t.name, type_, shape, path, 0, made)
    if external:
        return _external(where, path, t, type_, shape)
    found = Stored(t.name, type_, shape, path)
    if size := len(t.raw_data):
        if size != found.nbytes:
            raise InputError(f"{where} holds {size} bytes, its shape and type want {found.nbytes}")
        return Stored(t.name, type_, shape, path, 0, partial(getattr, t, "raw_data"))
    data = b""
    if type_ in _FIELDS:
        data = np.asarray(getattr(t, _FIELDS[type_]), _NUMPY[_DTYPES[type_]]).tobytes()
    elif found.nbytes and _BITS[type_] < 8:
        data = np.asarray(t.int32_data).astype(np.uint8).tobytes()
    elif found.nbytes:
        try:
            data = onnx.numpy_helper.to_array(t).tobytes()
        except Exception as e:  # noqa: BLE001 - whatever NumPy has against it
            raise InputError(f"{where} cannot be read ({short(e)})") from None
    if len(data) != found.nbytes:
        raise InputError(f"{where} holds {len(data)} bytes, its shape and type want {found.nbytes}")
    return Stored(t.name, type_, shape, path, 0, data)


def _inside(link: Path, folder: Path) -> bool:
    try:
        return link.resolve().is_relative_to(folder.resolve())
    except (OSError, RuntimeError):  # links in a circle
        return False


def _external(where: str, path: Path, t: Any, type_: str, shape: tuple[int, ...]) -> Stored:
    said = {e.key: e.value for e in t.external_data}
    location = said.get("location", "")
    plain = Path(location).name == location and location not in ("", ".", "..") and "\0" not in location
    if not plain or len(location.encode()) > _NAME:
        raise InputError(
            f"{where} lies in {short(location)!r}; external data must be a file beside the model, named without a folder"
        )
    file = path.parent / location
    if file.is_symlink() and not _inside(file, path.parent):
        raise InputError(
            f"{where} lies in {location}, a link that leads out of the folder; copy the file there"
        )
    if not file.is_file():
        raise InputError(f"{where} lies in {location}, which is missing; copy it beside {path.name}")
    numbers = {}
    for key in ("offset", "length"):
        text = said.get(key, "0" if key == "offset" else "")
        if text and not (text.isascii() and text.isdigit() and len(text) < 20):
            raise InputError(f"{where}: its {key} is {short(text)!r}, expected a number of bytes")
        numbers[key] = int(text or 0)
    made = Stored(t.name, type_, shape, file, numbers["offset"])
    if said.get("length") and numbers["length"] != made.nbytes:
        raise InputError(
            f"{where} is {numbers['length']} bytes long, its shape {short(shape)} in {type_} wants {made.nbytes}"
        )
    if (end := made.offset + made.nbytes) > (size := file.stat().st_size):
        raise InputError(f"{where} ends at byte {end} of {location}, which has {size}; it is cut off")
    return made


# --- arrays ------------------------------------------------------------------------------------------------


def _unpacked(raw: NDArray[np.uint8], type_: str) -> NDArray[Any]:
    """Elements out of bytes, along the last axis."""
    if type_ not in _DTYPES:
        raise UnsupportedError(f"a tensor of {type_}, which lconvert does not read")
    bits = _BITS[type_]
    if bits >= 8:
        return np.ascontiguousarray(raw).view(_NUMPY[_DTYPES[type_]])
    shifts = np.arange(0, 8, bits, dtype=np.uint8)
    codes = (raw[..., None] >> shifts) & np.uint8((1 << bits) - 1)
    codes = codes.reshape(*raw.shape[:-1], -1)
    return ((codes ^ 8) - np.uint8(8)).view(np.int8) if type_ == "INT4" else codes


def tensor(t: Stored) -> Tensor:
    """The tensor as it lies."""
    rows = t.shape[0] if t.shape else 1
    width = prod(t.shape[1:]) * _BITS[t.type]

    def read(start: int, stop: int) -> NDArray[Any]:
        if width % 8:
            return t.load()[start:stop]
        raw = t.raw().reshape(rows, width // 8)[start:stop]
        return _unpacked(raw, t.type).reshape(stop - start, *t.shape[1:])

    return Tensor(t.shape, _DTYPES[t.type], read, t.origin, _files(t))


def turned(t: Stored) -> Tensor:
    """A matrix (columns, rows) as (rows, columns), which is how weights are written down in the IR."""
    k, n = t.shape
    bits = _BITS[t.type]

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
