"""Reading an ONNX file that somebody else wrote: the graph, and the bytes of tensors that lie in files beside it.

Nothing in the file is trusted: locations of external data stay in the model's folder, offsets and lengths within their files
(onnx/docs/ExternalData.md).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lconvert.errors import InputError, UnsupportedError
from lconvert.formats.onnx_graph import BITS, package

_LIMIT = 2 << 30


@dataclass(frozen=True)
class OnnxModel:
    """A ModelProto and where its external data is. raw: bytes of an external initializer by name, where they are not in files."""

    proto: Any
    path: Path | None = None
    raw: Mapping[str, Callable[[], bytes]] | None = None

    @property
    def name(self) -> str:
        return str(self.path) if self.path else "the planned graph"

    def array(self, tensor: Any) -> NDArray[Any]:
        """The numbers of an initializer as stored: float8 and 4-bit types as ml_dtypes arrays. InputError for bytes that are missing."""
        onnx, inside = package(), tensor
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            inside = onnx.TensorProto(name=tensor.name, data_type=tensor.data_type, dims=tensor.dims)
            inside.raw_data = self._external(tensor)
        try:
            return np.asarray(onnx.numpy_helper.to_array(inside))
        except (ValueError, TypeError, KeyError) as e:
            raise InputError(
                f"{self.name}: {tensor.name}: the numbers do not fit their shape ({e})"
            ) from None

    def _external(self, tensor: Any) -> bytes:
        if self.raw is not None:
            return self.raw[tensor.name]()
        path, offset, length = located(self, tensor)
        with path.open("rb") as f:
            f.seek(offset)
            return f.read(length)


def read(path: str | Path) -> OnnxModel:
    """The graph of a file, whose external data is checked to be there.

    InputError: no ONNX model, damaged, or external data that is missing, too short, or outside of its folder.
    """
    path, onnx = Path(path), package()
    from google.protobuf.message import DecodeError

    if not path.is_file():
        raise InputError(f"{path}: {'is a folder' if path.is_dir() else 'no such file'}; name an .onnx file")
    if path.stat().st_size >= _LIMIT:
        raise UnsupportedError(f"{path}: 2 GB or more in one file; store the weights as external data")
    proto = onnx.ModelProto()
    try:
        proto.ParseFromString(path.read_bytes())
    except DecodeError:
        raise InputError(f"{path}: is not an ONNX model, or is damaged; check the path") from None
    if not proto.opset_import or not proto.graph.node:
        raise InputError(f"{path}: is not an ONNX model: it has no operators; check the path")
    model = OnnxModel(proto, path)
    for tensor in proto.graph.initializer:
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            located(model, tensor)
    return model


def located(model: OnnxModel, tensor: Any) -> tuple[Path, int, int]:
    """File, offset and length of an external tensor."""
    assert model.path is not None
    where = {
        e.key: e.value if isinstance(e.value, str) else "" for e in tensor.external_data
    }  # bytes: no UTF-8
    what, location = f"{model.name}: {tensor.name}", where.get("location", "")
    folder = model.path.parent.resolve()
    path = folder / location
    if not location or "\0" in location or not path.resolve().is_relative_to(folder):
        raise InputError(
            f"{what}: external data at {location!r}, outside of the model's folder; it is not read"
        )
    if not path.is_file():
        raise InputError(f"{what}: its data file {location} is missing; it belongs beside {model.path.name}")
    size = path.stat().st_size
    try:
        offset, length = int(where.get("offset", 0)), int(where.get("length", size))
    except ValueError:
        raise InputError(f"{what}: offset or length of its external data is no number") from None
    if offset < 0 or length < 0 or offset + length > size:
        raise InputError(f"{what}: bytes {offset} .. {offset + length} of {location}, which has {size}")
    names = {v: k for k, v in package().TensorProto.DataType.items()}
    bits = BITS.get(names.get(tensor.data_type, ""))
    if bits and length != -(-prod(tensor.dims) * bits // 8):
        raise InputError(
            f"{what}: {length} bytes of data for shape {tuple(tensor.dims)}; the file is damaged"
        )
    return path, offset, length


def digest(model: OnnxModel) -> str:
    """sha256 of the graph and of the data files that it names, in order of their names."""
    import hashlib

    assert model.path is not None
    onnx, found = package(), hashlib.sha256()
    tensors = [t for t in model.proto.graph.initializer if t.data_location == onnx.TensorProto.EXTERNAL]
    for path in (model.path, *sorted({located(model, t)[0] for t in tensors})):
        with path.open("rb") as f:
            while block := f.read(1 << 22):
                found.update(block)
    return found.hexdigest()
