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
from lconvert.converters import gguf_carry, gguf_names
from lconvert.errors import InputError, MissingPackageError
from lconvert.formats import gguf
from lconvert.ir import Decoder, Model, QTensor, Tensor
from lconvert.kernels.blocks import BLOCKS
from lconvert.kernels.qtensor import values
from lconvert.validators import codes, folder_values, stored
from lconvert.validators.slabs import largest_difference, slabs

#: Types whose encoder needs an importance matrix or takes minutes: their blocks are not encoded again.
SLOW = ("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S")
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
    the stored scales; stray: codes that are not, in a tensor where nearly all are. steps, bias: of grids that are no block type
    (codes.Fit). carried: how a source that is quantized itself is held: exact, rounded, requantized, or differs (carried.judge).
    compressed: whether values are those of the model that a method made, by the manifest; None where it has no digest of them.
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
    steps: float | None = None
    bias: float | None = None
    carried: str | None = None
    compressed: bool | None = None


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
    return TensorCheck(
        tensors=len(own.tensors),
        structure=tuple(structure),
        max_difference=worst,
        table=check_entries(artifact, source, progress),
        bits_per_weight=stored.gguf_bits(own) or 0.0,
        types=_counted(t.type for t in own.tensors.values()),
    )


def check_folder(
    path: Path, artifact: Model, source: Model, progress: Callable[[], None] = lambda: None
) -> TensorCheck:
    """A Hugging Face or .lcir folder; what it stores is seen independently by the safetensors package."""
    count, differences, worst = folder_values.independent(path)
    table = check_entries(artifact, source, progress, block_types=(path / "lcir.json").is_file())
    return TensorCheck(
        tensors=count,
        structure=tuple(differences),
        max_difference=worst,
        table=table,
        bits_per_weight=stored.bits_per_weight((r.bytes, r.shape) for r in table) or 0.0,
        types=_counted(r.type for r in table),
    )


def _counted(names: Iterable[str]) -> dict[str, int]:
    return dict(sorted(Counter(names).items()))


def check_entries(
    artifact: Model,
    source: Model,
    progress: Callable[[], None] = lambda: None,
    *,
    block_types: bool = True,
) -> tuple[TensorRow, ...]:
    """Every entry against the source's, in fp32, slab by slab. block_types: grids that are a GGUF block type's are named by it."""
    rows = []
    for role, entry in artifact.entries.items():
        data, original = _as_stored(role, artifact, entry.data, source.entries[role].data)
        shift = norm_shift(role, artifact, source)
        rows.append(compare(role, data, original, shift, block_types=block_types))
        progress()
    return tuple(rows)


def _as_stored(
    role: str, artifact: Model, data: Tensor | QTensor, original: Tensor | QTensor
) -> tuple[Tensor | QTensor, Tensor | QTensor]:
    """Both sides with the rows of the file, so that its blocks can be compared: latent attention's keys stand transposed."""
    if not role.endswith("attn.k_b") or not isinstance(data, QTensor) or data.block[1] != 1:
        return data, original
    rows = data.rows // artifact.decoder.layer(int(role.split(".")[1])).attention.heads
    turned = gguf_names.transposed_codes(data, rows)
    if turned is None:
        return data, original
    return turned, gguf_names.transposed(gguf_carry.dense([original])[0], rows)


def norm_shift(role: str, artifact: Model, source: Model) -> float:
    """What the artifact's values of a role are above the source's: norms may be stored with another offset."""
    if "norm" not in role or not isinstance(source.arch, Decoder):
        return 0.0
    return source.arch.norm_offset - artifact.decoder.norm_offset


def typical_bits(artifact: Model) -> float:
    """Bits per weight that at least half of the layers' weights have at most; small models store much of their
    size in the embedding and the output, which have rules of their own."""
    sizes = sorted(
        (8 * stored.nbytes(e.data) / max(e.data.size, 1), e.data.size)
        for name, e in artifact.entries.items()
        if name.startswith("layers.") and len(e.shape) > 1
    )
    half, seen = sum(n for _, n in sizes) / 2, 0
    for bits, n in sizes:
        seen += n
        if seen >= half:
            return bits
    return 32.0


def _type(data: Any, block_types: bool = True) -> str:
    if isinstance(data, QTensor):
        from lconvert.formats.gguf_blocks import native_type

        return (native_type(data) if block_types else None) or portable_type(data)
    return str(data.dtype)


def portable_type(q: QTensor) -> str:
    """A grid that is no block type in a few letters: "int4 g32", "uint4 row", "fp8 128x128", "nvfp4 g16"."""
    return f"{grid_name(q)} {_block_name(q)}"


def grid_name(q: QTensor) -> str:
    """int4, uint8, fp8, nvfp4, mxfp4, mxfp8, codebook16 ..."""
    g = q.grid
    if g.kind == "codebook":
        return f"codebook{len(g.values)}"
    if g.kind == "int":
        return f"{'u' * (not g.signed)}int{g.bits}"
    inner = q.scale.grid if isinstance(q.scale, QTensor) else None
    family = "" if inner is None else "mx" if inner.kind == "float" and inner.mantissa == 0 else "nv"
    return f"{family}fp{g.bits}"


def _block_name(q: QTensor) -> str:
    height, width = q.block[0], q.block[-1]
    if height == -1:
        return "tensor"
    return "row" if width == -1 else f"g{width}" if height == 1 else f"{height}x{width}"


def _independent_difference(package: Any, own: gguf.GGUFFile, name: str, other: Any) -> float:
    """max |ours - theirs| over a tensor, both in fp32."""
    info = own.tensors[name]
    raw = gguf.raw(own, name)
    cols = info.shape[-1]
    blocks = other.data.view(np.uint8).reshape(raw.shape)
    return largest_difference(
        (raw.shape[0], cols),
        lambda a, b: kernels.dequantize(info.type, raw.read(a, b), cols),
        lambda a, b: package.dequantize(blocks[a:b].reshape(-1), other.tensor_type).reshape(b - a, cols),
    )


def compare(
    role: str,
    data: Tensor | QTensor,
    original: Tensor | QTensor,
    shift: float = 0.0,
    *,
    block_types: bool = True,
) -> TensorRow:
    """One entry against the source's, `shift` added to the source's values (norms stored with another offset)."""
    type_ = _type(data, block_types)
    block = BLOCKS.get(type_) if isinstance(data, QTensor) else None
    stock = block is not None and _stock_encodes(type_, data, original)
    cast = data.dtype if isinstance(data, Tensor) and data.dtype in ("F16", "BF16") else ""
    sums = _Sums()
    for start, stop in slabs(tuple(data.shape)):
        a: NDArray[np.float32] = values(data, start, stop)
        b: NDArray[np.float32] = values(original, start, stop)
        if shift:
            b = b + np.float32(shift)
        sums.add(a, b, block.elems if block else 0, type_ if stock else "")
        if cast:
            sums.cast(a, b, cast)
    size = stored.nbytes(data)
    other = bool(sums.blocks) and sums.same < _STOCK * sums.blocks
    far, total = 0, 0
    portable = isinstance(data, QTensor) and block is None and not sums.equal
    found = None
    if isinstance(data, QTensor) and (
        portable or (other and isinstance(original, Tensor) and type_ in codes.TYPES)
    ):
        found = codes.fit(data, original)
        # Scales of wide integers may be rounded after their codes, which moves the largest by a quarter of a step.
        wide = portable and data.grid.kind == "int" and data.grid.bits > 6
        far, total = found.wild if wide else found.far, found.total
    return TensorRow(
        name=role,
        type=type_,
        shape=tuple(data.shape),
        bytes=size,
        bits_per_weight=8 * size / max(data.size, 1),
        exact=sums.equal,
        promised=isinstance(data, Tensor),
        kept=sums.equal or (bool(cast) and sums.is_cast),
        relative_error=finite((sums.error / sums.norm) ** 0.5 if sums.norm else 0.0),
        block_error=finite(sums.worst) if block else None,
        block_rms=finite(sums.worst_rms) if block else None,
        stock_blocks=sums.same / sums.blocks if sums.blocks else None,
        damaged=sums.worse if sums.blocks and sums.same >= _STOCK * sums.blocks else 0,
        error_ratio=finite(sums.ratio) if other else None,
        stock_ratio=finite(sums.error / sums.best if sums.best else 1.0) if other else None,
        nearest=1 - far / total if total else None,
        stray=far if far <= (1 - codes.NEARLY_ALL) * total else 0,
        non_finite=sums.non_finite,
        steps=finite(found.steps) if found and portable else None,
        bias=finite(found.bias) if found and portable else None,
    )


def finite(x: float) -> float:
    """JSON has neither infinity nor NaN; what is beyond all gates stays beyond them."""
    return float(x) if np.isfinite(x) else float(np.finfo(np.float64).max)


def _stock_encodes(type_: str, data: Tensor | QTensor, original: Tensor | QTensor) -> bool:
    """Whether llama.cpp's encoder of this type can be run on the source's values for a comparison."""
    plain = isinstance(original, Tensor) and len(data.shape) > 1
    return plain and type_ not in SLOW and data.shape[-1] % BLOCKS[type_].elems == 0


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
