"""How many bytes an artifact takes, and how many bits one of its weights."""

from __future__ import annotations

from math import prod
from pathlib import Path
from typing import Any

from lconvert.errors import LconvertError
from lconvert.validators.runtimes import kind


def stored(path: Path) -> tuple[int, float | None]:
    """(bytes of the artifact's files, stored bits per weight of its tensors with two or more dimensions).

    Bits are None where lconvert cannot read the artifact, such as a graph.
    """
    try:
        if kind(path) == "gguf":
            from lconvert.formats import gguf

            file = gguf.read(path)
            return file.size, _per_weight([(8.0 * t.nbytes, t.shape) for t in file.tensors.values()])
        size = sum(f.stat().st_size for f in _files(path))
        if kind(path) == "onnx":
            return size, None
        from lconvert.converters import read

        entries = read(path).entries.values()
        return size, _per_weight([(_bits(e.data), e.shape) for e in entries])
    except LconvertError:
        return sum(f.stat().st_size for f in _files(path)), None


def _per_weight(tensors: list[tuple[float, tuple[int, ...]]]) -> float | None:
    wide = [(bits, prod(shape)) for bits, shape in tensors if len(shape) > 1]
    return sum(b for b, _ in wide) / sum(n for _, n in wide) if wide else None


def _bits(data: Any) -> float:
    """Stored bits of a tensor, scales and zero points included."""
    from lconvert.ir import DTYPE_SIZE, QTensor

    if not isinstance(data, QTensor):
        return 8.0 * DTYPE_SIZE[data.dtype] * float(data.size)
    sides = [s for s in (data.scale, data.zero, data.offset) if s is not None]
    return float(data.grid.bits * data.size) + sum(map(_bits, sides))


def _files(path: Path) -> list[Path]:
    """The files that hold an artifact's weights; of a graph, the external data beside it (NAME.onnx.data, .onnx_data)."""
    if path.is_dir():
        return list(path.glob("*.safetensors")) or list(path.glob("*.bin"))
    return [path, *(f for f in path.parent.glob(f"{path.name}?data") if f.is_file())]
