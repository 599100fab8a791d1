"""Structure and tensor values of a GGUF file, read by the independent `gguf` package and compared with the IR."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lconvert.errors import MissingPackageError
from lconvert.formats import gguf
from lconvert.ir import Model, QTensor
from lconvert.kernels.blocks import BLOCKS
from lconvert.kernels.qtensor import values

_SLAB = 1 << 22  # values compared at a time


@dataclass(frozen=True)
class TensorCheck:
    """Comparison of all tensors: against our reading of the file, and against the source model."""

    tensors: int
    structure: tuple[str, ...]  # what the independent reader sees differently
    max_difference: float  # independent dequantization against the canonical one; must be 0
    exact: int  # tensors whose values equal the source's
    worst_exact: tuple[str, ...]  # tensors promised exact that are not
    relative_error: dict[str, float]  # by stored type, against the source: RMS error / RMS of the source
    block_error: dict[
        str, tuple[float, str]
    ]  # by stored type: the worst block's max |error| / max |source|, where
    bits_per_weight: float  # of all weights with two or more dimensions
    types: dict[str, int]


def _reader(path: Path) -> Any:
    try:
        import gguf as package
    except ImportError:
        raise MissingPackageError(
            "the gguf package is not installed: pip install 'lconvert[llamacpp]'"
        ) from None
    return package, package.GGUFReader(str(path))


def check_gguf(
    path: Path, artifact: Model, source: Model, progress: Callable[[], None] = lambda: None
) -> TensorCheck:
    """`artifact`: the file read by lconvert; `source`: the model it was made from.

    The independent reader sees every stored tensor; values are compared role by role in fp32.
    """
    own = gguf.read(path)
    structure: list[str] = []
    independent: dict[str, Any] = {}
    package: Any = None
    for shard in own.paths:
        package, reader = _reader(shard)
        independent |= {t.name: t for t in reader.tensors}
    if set(independent) != set(own.tensors):
        structure.append(f"tensor names differ: {sorted(set(independent) ^ set(own.tensors))[:4]}")
    worst = 0.0
    for name, info in own.tensors.items():
        other = independent.get(name)
        if other is None:
            continue
        seen = (other.tensor_type.name, tuple(int(n) for n in reversed(other.shape)), int(other.n_bytes))
        if seen != (info.type, info.shape, info.nbytes):
            structure.append(
                f"{name}: the independent reader sees {seen}, lconvert {(info.type, info.shape)}"
            )
            continue
        worst = max(worst, _independent_difference(package, own, name, other))
        progress()
    promised: list[str] = []
    exact = 0
    sums: dict[str, list[float]] = {}
    blocks: dict[str, tuple[float, str]] = {}
    for role, entry in artifact.entries.items():
        original = source.entries[role]
        type_ = _type(entry.data)
        lossless = isinstance(entry.data, QTensor) is False and type_ in ("F32", _type(original.data))
        equal, squared_error, squared_norm, block = _difference(
            entry.data, original.data, artifact, source, role
        )
        if block > blocks.get(type_, (0.0, ""))[0]:
            blocks[type_] = (block, role)
        exact += equal
        if lossless and not equal:
            promised.append(role)
        pair = sums.setdefault(type_, [0.0, 0.0])
        pair[0] += squared_error
        pair[1] += squared_norm
        progress()
    matrices = [t for t in own.tensors.values() if len(t.shape) > 1]
    weights = sum(int(np.prod(t.shape)) for t in matrices)
    types: dict[str, int] = {}
    for t in own.tensors.values():
        types[t.type] = types.get(t.type, 0) + 1
    return TensorCheck(
        tensors=len(own.tensors),
        structure=tuple(structure),
        max_difference=worst,
        exact=exact,
        worst_exact=tuple(promised),
        relative_error={t: (e / n) ** 0.5 if n else 0.0 for t, (e, n) in sorted(sums.items())},
        block_error=dict(sorted(blocks.items())),
        bits_per_weight=sum(8 * t.nbytes for t in matrices) / max(weights, 1),
        types=types,
    )


def typical_bits(path: Path) -> float:
    """Bits per weight that at least half of the layers' weights have at most; small models store much of their
    size in the embedding and the output, which have rules of their own."""
    sizes = sorted(
        (BLOCKS[t.type].bits_per_weight, int(np.prod(t.shape)))
        for t in gguf.read(path).tensors.values()
        if t.name.startswith("blk.") and len(t.shape) > 1
    )
    half, seen = sum(n for _, n in sizes) / 2, 0
    for bits, n in sizes:
        seen += n
        if seen >= half:
            return bits
    return 32.0


def _type(data: Any) -> str:
    if isinstance(data, QTensor):
        from lconvert.formats.gguf_blocks import native_type

        return native_type(data) or "quantized"
    return str(data.dtype)


def _independent_difference(package: Any, own: gguf.GGUFFile, name: str, other: Any) -> float:
    """max |ours - theirs| over a tensor, both in fp32, slab by slab; NaN counts as infinite."""
    from lconvert import kernels

    info = own.tensors[name]
    raw = gguf.raw(own, name)
    cols = info.shape[-1]
    step = max(1, _SLAB // max(cols, 1))
    stored = other.data.view(np.uint8).reshape(raw.shape)
    worst = 0.0
    for start in range(0, raw.shape[0], step):
        stop = min(start + step, raw.shape[0])
        ours = kernels.dequantize(info.type, raw.read(start, stop), cols)
        theirs = package.dequantize(stored[start:stop].reshape(-1), other.tensor_type).reshape(ours.shape)
        difference = np.abs(ours.astype(np.float64) - theirs)
        worst = max(worst, float(np.nan_to_num(difference, nan=np.inf).max(initial=0.0)))
    return worst


def _difference(
    data: Any, original: Any, artifact: Model, source: Model, role: str
) -> tuple[bool, float, float, float]:
    """(equal everywhere, squared error, squared norm, worst block) of an entry against the source's."""
    step = max(1, _SLAB // max(1, int(np.prod(data.shape[1:]))))
    equal, error, norm, worst = True, 0.0, 0.0, 0.0
    width = BLOCKS[_type(data)].elems if isinstance(data, QTensor) and _type(data) in BLOCKS else 0
    shift = (
        np.float32(source.arch.norm_offset) - np.float32(artifact.arch.norm_offset) if "norm" in role else 0
    )
    for start in range(0, data.rows, step):
        stop = min(start + step, data.rows)
        a: NDArray[np.float32] = values(data, start, stop)
        b: NDArray[np.float32] = values(original, start, stop)
        if shift:
            b = b + np.float32(shift)
        equal = equal and np.array_equal(a, b)
        delta = a.astype(np.float64) - b
        error += float(np.square(delta).sum())
        norm += float(np.square(b, dtype=np.float64).sum())
        if width:
            wrong = np.abs(delta).reshape(-1, width).max(axis=1)
            largest = np.abs(b).reshape(-1, width).max(axis=1)
            ratio = np.divide(wrong, largest, out=np.where(wrong > 0, np.inf, 0.0), where=largest > 0)
            worst = max(worst, float(ratio.max(initial=0.0)))
    return equal, error, norm, worst
