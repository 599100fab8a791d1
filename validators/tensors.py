"""Structure and tensor values of a GGUF file, read by the independent `gguf` package and compared with the IR."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lconvert import kernels
from lconvert.errors import InputError, MissingPackageError
from lconvert.formats import gguf
from lconvert.ir import Model, QTensor, Tensor
from lconvert.kernels.blocks import BLOCKS
from lconvert.kernels.qtensor import values
from lconvert.validators import codes, folder_values

_SLAB = 1 << 22  # values compared at a time


#: Types whose encoder needs an importance matrix or takes minutes: their blocks are not encoded again.
_SLOW = ("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S")
#: From this share of blocks on that are the stock encoder's, all of them were meant to be.
_STOCK = 0.5
#: Two compilers may round a search differently; damage makes a block worse by more than this.
_WORSE = 1.001


@dataclass(frozen=True)
class TensorRow:
    """One tensor of the artifact, by canonical role, against the source's.

    promised: a float type, whose values must be the source's, or the source's rounded to nearest; kept: they are.
    relative_error: RMS error / RMS of the source. block_error: in the worst block, max |error| / max |source|;
    block_rms: the same with root mean squares.
    stock_blocks: share of blocks whose values are those of the stock encoder (llama.cpp's, without importances) on the
    source's values, None where it was not run. damaged: blocks that are not, in a tensor where most are, and that are
    further from the source. error_ratio: the worst block's squared error / the same block's by the stock encoder, in a
    tensor that some other method has encoded. stock_ratio: the same over the whole tensor. nearest: there, the share of codes that are the nearest to the source given
    the stored scales; stray: codes that are not, in a tensor where nearly all are.
    """

    name: str
    type: str
    shape: tuple[int, ...]
    bytes: int
    bits_per_weight: float
    exact: bool
    promised: bool
    kept: bool
    relative_error: float | None
    block_error: float | None = None
    block_rms: float | None = None
    stock_blocks: float | None = None
    damaged: int = 0
    error_ratio: float | None = None
    stock_ratio: float | None = None
    nearest: float | None = None
    stray: int = 0
    non_finite: int = 0


@dataclass(frozen=True)
class TensorCheck:
    """All tensors: against an independent reading of the files, and against the source model."""

    tensors: int
    structure: tuple[str, ...]  # what the independent reader sees differently
    max_difference: float | None  # independent values against ours; must be 0. None: not all were compared
    table: tuple[TensorRow, ...]
    bits_per_weight: float  # of all weights with two or more dimensions
    types: dict[str, int]

    @property
    def exact(self) -> int:
        return sum(row.exact for row in self.table)

    @property
    def broken_promises(self) -> list[str]:
        """Float tensors whose values are neither the source's nor these rounded to nearest."""
        return [r.name for r in self.table if r.promised and not r.kept]

    def by_type(self, of: Callable[[TensorRow], float | None]) -> dict[str, tuple[float, str]]:
        """The largest value of a column per quantized type, and the tensor that has it."""
        out: dict[str, tuple[float, str]] = {}
        for row in self.table:
            value = of(row)
            if value is not None and value >= out.get(row.type, (0.0, ""))[0]:
                out[row.type] = (value, row.name)
        return dict(sorted(out.items()))

    def to_json(self) -> dict[str, Any]:
        blocks = self.by_type(lambda r: r.block_error)
        errors = self.by_type(lambda r: r.relative_error)
        return {
            "tensors": self.tensors,
            "exact": self.exact,
            "max_difference": self.max_difference,
            "types": self.types,
            "bits_per_weight": self.bits_per_weight,
            "block_error": {t: list(pair) for t, pair in blocks.items()},
            "relative_error": {t: value for t, (value, _) in errors.items()},
            "table": [asdict(row) for row in self.table],
        }


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
    matrices = [t for t in own.tensors.values() if len(t.shape) > 1]
    return TensorCheck(
        tensors=len(own.tensors),
        structure=tuple(structure),
        max_difference=worst,
        table=check_entries(artifact, source, progress),
        bits_per_weight=_bits(sum(t.nbytes for t in matrices), sum(int(np.prod(t.shape)) for t in matrices)),
        types=_counted(t.type for t in own.tensors.values()),
    )


def check_folder(
    path: Path, artifact: Model, source: Model, progress: Callable[[], None] = lambda: None
) -> TensorCheck:
    """A Hugging Face or .lcir folder; what it stores is seen independently by the safetensors package."""
    count, differences, worst = folder_values.independent(path)
    table = check_entries(artifact, source, progress)
    matrices = [r for r in table if len(r.shape) > 1]
    return TensorCheck(
        tensors=count,
        structure=tuple(differences),
        max_difference=worst,
        table=table,
        bits_per_weight=_bits(sum(r.bytes for r in matrices), sum(int(np.prod(r.shape)) for r in matrices)),
        types=_counted(r.type for r in table),
    )


def _bits(size: int, weights: int) -> float:
    return 8 * size / max(weights, 1)


def _counted(names: Iterable[str]) -> dict[str, int]:
    return dict(sorted(Counter(names).items()))


def check_entries(
    artifact: Model, source: Model, progress: Callable[[], None] = lambda: None
) -> tuple[TensorRow, ...]:
    """Every entry against the source's, in fp32, slab by slab."""
    rows = []
    for role, entry in artifact.entries.items():
        shift = source.arch.norm_offset - artifact.arch.norm_offset if "norm" in role else 0.0
        rows.append(compare(role, entry.data, source.entries[role].data, shift))
        progress()
    return tuple(rows)


def typical_bits(artifact: Model) -> float:
    """Bits per weight that at least half of the layers' weights have at most; small models store much of their
    size in the embedding and the output, which have rules of their own."""
    sizes = sorted(
        (_bits(_stored_bytes(e.data), e.data.size), e.data.size)
        for name, e in artifact.entries.items()
        if name.startswith("layers.") and len(e.shape) > 1
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
        with np.errstate(invalid="ignore"):  # infinities: counted where values are
            difference = np.abs(ours.astype(np.float64) - theirs)
        worst = max(worst, float(np.nan_to_num(difference, nan=np.inf).max(initial=0.0)))
    return worst


def compare(role: str, data: Tensor | QTensor, original: Tensor | QTensor, shift: float = 0.0) -> TensorRow:
    """One entry against the source's, `shift` added to the source's values (norms stored with another offset)."""
    type_ = _type(data)
    block = BLOCKS.get(type_) if isinstance(data, QTensor) else None
    stock = block is not None and _stock_encodes(type_, data, original)
    cast = data.dtype if isinstance(data, Tensor) and data.dtype in ("F16", "BF16") else ""
    step = max(1, _SLAB // max(1, int(np.prod(data.shape[1:]))))
    sums = _Sums()
    for start in range(0, data.rows, step):
        stop = min(start + step, data.rows)
        a: NDArray[np.float32] = values(data, start, stop)
        b: NDArray[np.float32] = values(original, start, stop)
        if shift:
            b = b + np.float32(shift)
        sums.add(a, b, block.elems if block else 0, type_ if stock else "")
        if cast:
            sums.cast(a, b, cast)
    size = _stored_bytes(data)
    other = bool(sums.blocks) and sums.same < _STOCK * sums.blocks
    far, total = 0, 0
    if other and isinstance(data, QTensor) and isinstance(original, Tensor) and type_ in codes.TYPES:
        far, total = codes.not_nearest(data, original)
    return TensorRow(
        name=role,
        type=type_,
        shape=tuple(data.shape),
        bytes=size,
        bits_per_weight=_bits(size, data.size),
        exact=sums.equal,
        promised=isinstance(data, Tensor),
        kept=sums.equal or (bool(cast) and sums.is_cast),
        relative_error=_finite((sums.error / sums.norm) ** 0.5 if sums.norm else 0.0),
        block_error=_finite(sums.worst) if block else None,
        block_rms=_finite(sums.worst_rms) if block else None,
        stock_blocks=sums.same / sums.blocks if sums.blocks else None,
        damaged=sums.worse if sums.blocks and sums.same >= _STOCK * sums.blocks else 0,
        error_ratio=_finite(sums.ratio) if other else None,
        stock_ratio=_finite(sums.error / sums.best if sums.best else 1.0) if other else None,
        nearest=1 - far / total if total else None,
        stray=far if far <= (1 - codes.NEARLY_ALL) * total else 0,
        non_finite=sums.non_finite,
    )


def _finite(x: float) -> float:
    """JSON has no infinity; what is beyond all gates stays beyond them."""
    return x if np.isfinite(x) else float(np.finfo(np.float64).max)


def _stored_bytes(data: Tensor | QTensor) -> int:
    block = BLOCKS.get(_type(data)) if isinstance(data, QTensor) else None
    if block is not None:
        return data.size // block.elems * block.nbytes
    if isinstance(data, Tensor):
        return data.size * BLOCKS[data.dtype].nbytes
    side = sum(_stored_bytes(t) for t in (data.scale, data.zero, data.offset) if t is not None)
    return -(-data.size * data.grid.bits // 8) + side


def _stock_encodes(type_: str, data: Tensor | QTensor, original: Tensor | QTensor) -> bool:
    """Whether llama.cpp's encoder of this type can be run on the source's values for a comparison."""
    plain = isinstance(original, Tensor) and len(data.shape) > 1
    return plain and type_ not in _SLOW and data.shape[-1] % BLOCKS[type_].elems == 0


class _Sums:
    """What is summed over the slabs of one tensor."""

    def __init__(self) -> None:
        self.equal = self.is_cast = True
        self.error = self.norm = self.worst = self.worst_rms = self.ratio = self.best = 0.0
        self.blocks = self.same = self.worse = self.non_finite = 0

    def add(self, a: NDArray[np.float32], b: NDArray[np.float32], width: int, type_: str) -> None:
        """a: the artifact's values, b: the source's; type_: the encoder to compare with, if any."""
        self.non_finite += int(a.size - np.isfinite(a).sum())
        if np.array_equal(a, b):
            self.norm += float(np.square(b, dtype=np.float64).sum())
            self.blocks += a.size // width if type_ else 0
            self.same += a.size // width if type_ else 0
            return
        self.equal = False
        with np.errstate(invalid="ignore"):
            delta = a.astype(np.float64) - b
        squares = np.square(delta)
        self.error += float(squares.sum())
        self.norm += float(np.square(b, dtype=np.float64).sum())
        if not width:
            return
        wrong = np.abs(delta).reshape(-1, width).max(axis=1)
        largest = np.abs(b).reshape(-1, width).max(axis=1)
        ratio = np.divide(wrong, largest, out=np.where(wrong > 0, np.inf, 0.0), where=largest > 0)
        self.worst = max(self.worst, float(ratio.max(initial=0.0)))
        wrong = squares.reshape(-1, width).sum(axis=1)
        largest = np.square(b, dtype=np.float64).reshape(-1, width).sum(axis=1)
        ratio = np.divide(wrong, largest, out=np.where(wrong > 0, np.inf, 0.0), where=largest > 0)
        self.worst_rms = max(self.worst_rms, float(ratio.max(initial=0.0)) ** 0.5)
        if type_:
            self._stock(a, b, squares.reshape(-1, width).sum(axis=1), width, type_)

    def cast(self, a: NDArray[np.float32], b: NDArray[np.float32], type_: str) -> None:
        """Whether a is b rounded to nearest in F16 or BF16."""
        rows = np.ascontiguousarray(b.reshape(1, -1) if b.ndim == 1 else b.reshape(b.shape[0], -1))
        try:
            rounded = kernels.dequantize(type_, kernels.quantize(type_, rows), rows.shape[1])
        except InputError:  # beyond the type's range: nothing that it could be rounded to
            self.is_cast = False
            return
        self.is_cast &= np.array_equal(a.reshape(rounded.shape), rounded)

    def _stock(
        self,
        a: NDArray[np.float32],
        b: NDArray[np.float32],
        squares: NDArray[np.float64],
        width: int,
        type_: str,
    ) -> None:
        encoded = kernels.quantize(type_, np.ascontiguousarray(b))
        c = kernels.dequantize(type_, encoded, b.shape[1])
        same = (a == c).reshape(-1, width).all(axis=1)
        best = np.square(c.astype(np.float64) - b).reshape(-1, width).sum(axis=1)
        self.best += float(best.sum())
        self.blocks += len(same)
        self.same += int(same.sum())
        other = ~same
        self.worse += int((other & ~(squares <= best * _WORSE)).sum())
        ratio = np.divide(squares, best, out=np.where(squares > 0, np.inf, 1.0), where=best > 0)
        self.ratio = max(self.ratio, float(ratio[other].max(initial=0.0)))
