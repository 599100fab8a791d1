"""Exact zeros: which grids hold them, how a quantized weight gets them, and how many a tensor has.

A mask is carried as zeros among the values, and nothing else: no format that lconvert writes stores one, and a runtime with kernels for sparse
weights (TensorRT's 2:4 tactics) finds the zeros itself. So a grid can be pruned on only if 0 is one of its values whatever its scales are:

    integers, signed     code 0: intN, Q4_0 Q5_0 Q8_0 Q3_K Q6_K
    integers, zero point the zero point itself, where it is an integer that is a code: uintN
    small floats         code 0: fp8, MXFP4, NVFP4
    codebooks            where 0 is a level: nf4, TQ1_0, TQ2_0; not IQ4_NL and IQ4_XS, whose levels pass it by

Grids with a minimum (Q4_1 Q5_1 Q2_K Q4_K Q5_K) hold it only where the minimum happens to be a multiple of the scale; the other IQ types are
confined to lattices without it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from lconvert.errors import OptionError
from lconvert.formats.kept import Kept
from lconvert.ir import QTensor, Tensor

if TYPE_CHECKING:
    from numpy.typing import NDArray

#: Patterns that are looked for, the tighter one first.
_LOOKED_FOR = ((2, 4), (4, 8))
_SLAB = 1 << 22  # values at a time


def zero_code(q: QTensor) -> int | None:
    """The code whose value is 0, or that is 0 above the zero points of `q` if it has some; None where no code is."""
    if q.offset is not None or q.grid.lattice or q.outliers or q.low_rank is not None:
        return None
    if q.grid.kind == "codebook":
        return q.grid.values.index(0.0) if 0.0 in q.grid.values and q.zero is None else None
    return 0 if q.zero is None or (q.grid.kind == "int" and _points_at_codes(q)) else None


def holds_zero(q: QTensor) -> bool:
    """Whether an exact 0 is on the grid of every one of its blocks, whatever the scales are."""
    return zero_code(q) is not None


def _points_at_codes(q: QTensor) -> bool:
    """Whether every zero point is itself a code."""
    assert q.zero is not None
    if q.zero.dtype not in ("I8", "U8", "I16", "U16", "I32", "U32", "I64"):
        return False
    zero = q.zero.load()
    low = -(1 << (q.grid.bits - 1)) if q.grid.signed else 0
    return bool(((zero >= low) & (zero < low + (1 << q.grid.bits))).all())


@dataclass(frozen=True)
class Bits:
    """A mask (out, in) at one bit per weight; True is kept."""

    shape: tuple[int, int]
    packed: NDArray[Any]

    @classmethod
    def of(cls, mask: Any) -> Bits:
        """Of a bool array or torch tensor."""
        import numpy as np

        array = np.asarray(mask.cpu() if hasattr(mask, "cpu") else mask, bool)
        return cls((array.shape[0], array.shape[1]), np.packbits(array, axis=1))

    def rows(self, start: int, stop: int) -> NDArray[Any]:
        import numpy as np

        return np.unpackbits(self.packed[start:stop], axis=1, count=self.shape[1]).view(bool)


#: Masks that are read by slabs, at one bit per weight: of the matrix that is written, and of the next one.
_KEPT = Kept(2)


@dataclass(frozen=True, eq=False)
class Remade:
    """A mask (out, in) that is made when its rows are read: masks of all matrices would be a bit per weight of the model."""

    shape: tuple[int, int]
    make: Callable[[], Any]

    def rows(self, start: int, stop: int) -> NDArray[Any]:
        packed = _KEPT.get(self, lambda: Bits.of(self.make()).packed)
        return Bits(self.shape, packed).rows(start, stop)


def masked(t: Tensor, mask: Bits | Remade) -> Tensor:
    """A dense tensor with exact zeros, +0, where the mask says; a view in the same dtype, whose survivors keep their bits."""
    import numpy as np

    def read(start: int, stop: int) -> NDArray[Any]:
        rows = t.read(start, stop)
        return np.where(mask.rows(start, stop), rows, rows.dtype.type(0))

    return replace(t, read=read)


def refuse(q: QTensor, name: str) -> None:
    """OptionError for a grid on which nothing can be pruned."""
    if not holds_zero(q):
        raise OptionError(
            f"{name}: no code of its grid means 0 whatever the scales are, so it cannot be pruned as it is; "
            "quantize onto intN, uintN, Q4_0, Q5_0, Q8_0, Q3_K, Q6_K, fp8, nf4, MXFP4 or NVFP4 instead"
        )


def pruned(q: QTensor, mask: Bits | Remade, name: str = "") -> QTensor:
    """A quantized matrix whose masked codes mean 0; scales and the other codes stay. OptionError where its grid holds no 0."""
    import numpy as np

    refuse(q, name or q.origin)
    code = zero_code(q)

    def read(start: int, stop: int) -> NDArray[Any]:
        codes = q.codes.read(start, stop)
        at = codes.dtype.type(code) if q.zero is None else _spread(q, start, stop).astype(codes.dtype)
        return np.where(mask.rows(start, stop), codes, at)

    return replace(q, codes=replace(q.codes, read=read))


def _spread(q: QTensor, start: int, stop: int) -> NDArray[Any]:
    """The zero point of every weight in rows start..stop."""
    import numpy as np

    assert q.zero is not None
    height = q.shape[0] if q.block[0] == -1 else q.block[0]
    rows = np.arange(start, stop) // height
    side = q.zero.read(start // height, -(-stop // height))[rows - start // height]
    if q.g_idx is not None:
        return side[:, q.g_idx.load()]
    return side[:, np.arange(q.shape[1]) // (q.shape[1] if q.block[1] == -1 else q.block[1])]


@dataclass(frozen=True)
class Sparsity:
    """zeros of `size` values; pattern: 2:4 or 4:8 if every group of neighbours along the last axis keeps to it, else empty."""

    zeros: int
    size: int
    pattern: str = ""

    @property
    def share(self) -> float:
        return self.zeros / self.size if self.size else 0.0


def measured(data: Tensor | QTensor) -> Sparsity:
    """The zeros among the values of a tensor, read in slabs of rows."""
    import numpy as np

    zeros = 0
    cols = data.shape[-1] if len(data.shape) == 2 else 0
    patterns = [(keep, of) for keep, of in _LOOKED_FOR if cols and cols % of == 0]
    for rows in _slabs(data):
        nonzero = rows != 0
        zeros += nonzero.size - int(np.count_nonzero(nonzero))
        patterns = [
            (keep, of)
            for keep, of in patterns
            if nonzero.reshape(-1, of).sum(-1, dtype=np.uint8).max(initial=0) <= keep
        ]
    size = int(np.prod(data.shape))
    return Sparsity(zeros, size, f"{patterns[0][0]}:{patterns[0][1]}" if patterns and zeros else "")


def _slabs(data: Tensor | QTensor) -> Iterator[NDArray[Any]]:
    from lconvert.kernels.qtensor import values

    step = max(1, _SLAB // max(1, data.size // max(1, data.rows)))
    for start in range(0, data.rows, step):
        yield values(data, start, min(start + step, data.rows))
