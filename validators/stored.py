"""The files of an artifact, how many bytes they take, and how many bits one of its weights."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING

from lconvert.errors import LconvertError
from lconvert.validators.runtimes import graph, kind

if TYPE_CHECKING:
    from lconvert.formats.gguf import GGUFFile
    from lconvert.ir import QTensor, Tensor


def files(path: Path) -> list[Path]:
    """The files that hold an artifact's weights: shards; of a graph, the external data beside it (NAME.data, NAME_data)."""
    path = graph(path)
    if path.is_dir():
        return sorted(path.glob("*.safetensors")) or sorted(path.glob("*.bin"))
    if path.suffix == ".gguf":
        from lconvert.formats import gguf

        return list(gguf.read(path).paths)
    return [path, *sorted(f for f in path.parent.glob(f"{path.name}?data") if f.is_file())]


def size(paths: Iterable[Path]) -> int:
    """Bytes of files."""
    return sum(p.stat().st_size for p in paths)


def nbytes(data: Tensor | QTensor) -> int:
    """Stored bytes of a tensor, scales and zero points included."""
    from lconvert.formats.gguf_blocks import native_type
    from lconvert.ir import DTYPE_SIZE, QTensor
    from lconvert.kernels.blocks import BLOCKS

    if not isinstance(data, QTensor):
        return data.size * DTYPE_SIZE[data.dtype]
    if type_ := native_type(data):
        return data.size // BLOCKS[type_].elems * BLOCKS[type_].nbytes
    sides = (data.scale, data.zero, data.offset)
    return -(-data.size * data.grid.bits // 8) + sum(nbytes(s) for s in sides if s is not None)


def bits_per_weight(tensors: Iterable[tuple[int, Sequence[int]]]) -> float | None:
    """8 x bytes / weights of the (bytes, shape) with two or more dimensions; None where there are none."""
    wide = [(bytes_, prod(shape)) for bytes_, shape in tensors if len(shape) > 1]
    return 8 * sum(b for b, _ in wide) / sum(n for _, n in wide) if wide else None


def gguf_bits(file: GGUFFile) -> float | None:
    """`bits_per_weight` of a GGUF file's tensors."""
    return bits_per_weight((t.nbytes, t.shape) for t in file.tensors.values())


def gguf_file_type(file: GGUFFile) -> str | None:
    """llama.cpp's mixture that general.file_type names; None where it names none."""
    from lconvert.converters.gguf_mixture_rules import FTYPES

    value = file.metadata.get("general.file_type")
    return next((n for n, f in FTYPES.items() if value is not None and f.number == value.data), None)


def stored(path: Path) -> tuple[int, float | None]:
    """(bytes of the artifact's files, stored bits per weight of its tensors with two or more dimensions).

    Bits are None where lconvert cannot read the artifact, such as a graph.
    """
    try:
        if kind(path) == "gguf":
            from lconvert.formats import gguf

            file = gguf.read(path)
            return file.size, gguf_bits(file)
        total = size(files(path))
        if kind(path) == "onnx":
            return total, None
        from lconvert.converters import read

        return total, bits_per_weight((nbytes(e.data), e.shape) for e in read(path).entries.values())
    except LconvertError:
        return size([path] if path.is_file() else files(path)), None
