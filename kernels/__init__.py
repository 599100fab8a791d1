"""Quantise to the GGUF storage types and back: ggml's bytes exactly, on every machine.

`quantize` gives what `ggml_quantize_chunk` gives on x86-64 (ggml/src/ggml.c of llama.cpp), `dequantize` what ggml's
`dequantize_row_*` gives. The compiled module `_native` holds one table of kernels per instruction set; a type or a
machine without them is served by `lconvert.kernels.reference`, slower and with the same bytes. The environment
variable LCONVERT_ISA forces one of `isas()`.
"""

from __future__ import annotations

import os
import warnings
from functools import cache
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from lconvert.errors import InputError, OptionError
from lconvert.kernels.blocks import BLOCKS, BlockType
from lconvert.kernels.reference import FAMILY, NEEDS_WEIGHTS, family

__all__ = [
    "BLOCKS",
    "SlowKernelsWarning",
    "dequantize",
    "isa",
    "isas",
    "native_available",
    "native_module",
    "pack",
    "quantize",
    "unpack",
]

# Magnitude bits from which on a value cannot be stored: infinities and NaN, and for the narrow floats what would
# round to infinity.
_LIMITS = {"F16": 0x477FF000, "BF16": 0x7F7F8000}
_NOT_FINITE = 0x7F800000
_SUSPECT = 0x47000000  # 2^15: from there on a block's F16 scale or minimum can become infinite
_SOURCES = {"F32": np.float32, "F16": np.float16, "BF16": np.uint16}
_REFERENCE_CHUNK = 1 << 18  # values that the NumPy reference handles at a time


class SlowKernelsWarning(RuntimeWarning):
    """The compiled kernels are missing, NumPy does the work."""


@cache
def _compiled() -> ModuleType | None:
    try:
        from lconvert.kernels import _native
    except ImportError as error:
        warnings.warn(
            f"lconvert: compiled kernels not found ({error}); quantising with NumPy, 10 to 100 times slower, "
            "same bytes. Reinstall where a C++17 compiler is available.",
            SlowKernelsWarning,
            stacklevel=3,
        )
        return None
    return _native


@cache
def _compiled_types(isa: str) -> frozenset[int]:
    native = _compiled()
    return frozenset(native.types(isa)) if native and isa != "reference" else frozenset()


def native_module() -> ModuleType | None:
    """The compiled module, or None where it is missing or $LCONVERT_ISA asks for the reference."""
    return _compiled() if isa() != "reference" else None


def native_available() -> bool:
    """Whether the compiled module is installed."""
    return _compiled() is not None


def isas() -> tuple[str, ...]:
    """Instruction sets that run here, the fastest first; "reference" (NumPy) is always last."""
    native = _compiled()
    return (*reversed(native.isas()), "reference") if native else ("reference",)


def isa() -> str:
    """The instruction set in use: $LCONVERT_ISA or the fastest. OptionError if it cannot run here."""
    return _checked_isa(os.environ.get("LCONVERT_ISA") or isas()[0])


def _checked_isa(name: str) -> str:
    if name not in isas():
        raise OptionError(f"instruction set {name!r} cannot run here; available: {', '.join(isas())}")
    return name


def _block_type(type: str) -> BlockType:
    if type not in FAMILY:
        raise OptionError(f"no kernel for type {type!r}; known: {', '.join(FAMILY)}")
    return BLOCKS[type]


def _checked_cols(block: BlockType, cols: int) -> None:
    if cols % block.elems:
        raise OptionError(
            f"{block.name} stores blocks of {block.elems} values; rows of {cols} do not divide evenly"
        )


def _rows_of(block: BlockType, blocks: NDArray[np.uint8], cols: int | None = None) -> NDArray[np.uint8]:
    """`blocks` as a checked contiguous (rows, row_bytes) array."""
    if blocks.dtype != np.uint8 or blocks.ndim != 2 or blocks.shape[1] % block.nbytes:
        raise InputError(
            f"{block.name} blocks must be uint8 (rows, k * {block.nbytes}), got {blocks.dtype} {blocks.shape}"
        )
    if cols is not None and block.row_bytes(cols) != blocks.shape[1]:
        raise InputError(
            f"{block.name} rows of {cols} values take {block.row_bytes(cols)} bytes, got {blocks.shape[1]}"
        )
    return np.ascontiguousarray(blocks)


def quantize(
    type: str,
    x: NDArray[Any],
    dtype: str = "F32",
    weights: NDArray[np.float32] | None = None,
    isa: str | None = None,
    out: NDArray[np.uint8] | None = None,
    *,
    finite_scales: bool = False,
) -> NDArray[np.uint8]:
    """The rows of `x` (rows, cols) as blocks, uint8 (rows, row_bytes).

    `dtype` says what x holds: "F32" (float32), "F16" (float16) or "BF16" (its bits as uint16). `weights` (cols,) is
    the importance of each column, as ggml's imatrix; types that know no importance ignore it, those of
    `reference.NEEDS_WEIGHTS` demand it. For F16 and BF16 the result is a cast, round to nearest even.

    `finite_scales` refuses rows so large that a scale of a block becomes infinite in F16 (llama.cpp does not load such
    files, ggml_validate_row_data); without it the bytes are ggml's all the same.

    Raises InputError at the first NaN, infinity or value beyond F16/BF16, naming row and column, and OptionError if
    cols is not a multiple of the block length or needed weights are missing. Releases the GIL; threads may call it on
    disjoint rows.
    """
    block = _block_type(type)
    if dtype not in _SOURCES or x.dtype != _SOURCES[dtype] or x.ndim != 2:
        raise OptionError(f"x must be 2-dimensional {_SOURCES.get(dtype, dtype)}, got {x.dtype} {x.shape}")
    rows, cols = x.shape
    _checked_cols(block, cols)
    if weights is None and type in NEEDS_WEIGHTS:
        raise OptionError(f"{type} needs an importance matrix: its search has no meaning without one")
    if weights is not None:
        if weights.shape != (cols,):
            raise OptionError(f"weights must have one value per column ({cols}), got shape {weights.shape}")
        weights = np.ascontiguousarray(weights, np.float32)
        if not np.isfinite(weights).all():
            raise InputError(f"importance weight of column {np.isfinite(weights).argmin()} is not finite")
    if out is None:
        out = np.empty((rows, block.row_bytes(cols)), np.uint8)
    elif out.shape != (rows, block.row_bytes(cols)) or out.dtype != np.uint8 or not out.flags.c_contiguous:
        raise OptionError(f"out must be contiguous uint8 {(rows, block.row_bytes(cols))}")

    use = _isa_in_use(isa)
    x = np.ascontiguousarray(x)
    limit = _LIMITS.get(type, _NOT_FINITE)
    native = _compiled()

    def run(limit: int) -> int:
        """-1, or the flat index of the first value whose magnitude bits reach `limit`; then `out` is unfinished."""
        if native and block.ggml_id in _compiled_types(use):
            return int(native.quantize(use, block.ggml_id, x, weights, limit, out))
        return _quantize_reference(type, x, dtype, weights, limit, out)

    watched = finite_scales and block.elems > 1
    bad = run(_SUSPECT if watched else limit)
    if watched and bad >= 0:
        bad = run(limit)
        if bad < 0:
            _check_scales(type, out, cols)
    if bad >= 0:
        row, col = divmod(bad, cols)
        value = float(_widen(x[row, col : col + 1], dtype)[0])
        reason = "is not finite" if not np.isfinite(value) else f"is too large for {type}"
        raise InputError(
            f"value {value:g} at row {row}, column {col} {reason}; it cannot be stored as {type}"
        )
    return out


def _check_scales(type: str, blocks: NDArray[np.uint8], cols: int) -> None:
    good = np.isfinite(dequantize(type, blocks, cols)).all(axis=1)
    if not good.all():
        raise InputError(
            f"values in row {good.argmin()} are too large for {type}: a scale would be infinite in F16; choose BF16 or "
            "F32 for this tensor"
        )


def _isa_in_use(name: str | None) -> str:
    """`name` if it can run here, or the default."""
    return isa() if name is None else _checked_isa(name)


def _widen(x: NDArray[Any], dtype: str) -> NDArray[np.float32]:
    """`x` of source dtype "F32", "F16" or "BF16" (uint16 bits) as float32, exactly."""
    if dtype == "BF16":
        return (x.astype(np.uint32) << np.uint32(16)).view(np.float32)
    return x.astype(np.float32)


def _quantize_reference(
    type: str,
    x: NDArray[Any],
    dtype: str,
    weights: NDArray[np.float32] | None,
    limit: int,
    out: NDArray[np.uint8],
) -> int:
    """Fills `out`; -1 or the flat index of the first value whose magnitude bits reach `limit`."""
    rows, cols = x.shape
    step = max(1, _REFERENCE_CHUNK // max(cols, 1))
    spec = family(type).QUANTIZE[type]
    for row in range(0, rows, step):
        values = np.ascontiguousarray(_widen(x[row : row + step], dtype))
        bad = (values.view(np.uint32) & np.uint32(0x7FFFFFFF)) >= limit
        if bad.any():
            first: int = row * cols + int(bad.argmax())
            return first
        out[row : row + step] = spec(values, weights)
    return -1


def dequantize(
    type: str,
    blocks: NDArray[np.uint8],
    cols: int,
    isa: str | None = None,
    out: NDArray[np.float32] | None = None,
) -> NDArray[np.float32]:
    """The values of `blocks` uint8 (rows, row_bytes), float32 (rows, cols), bit for bit those of ggml.

    Raises InputError if the bytes are no whole rows of `cols` values.
    """
    block = _block_type(type)
    _checked_cols(block, cols)
    blocks = _rows_of(block, blocks, cols)
    shape = (blocks.shape[0], cols)
    if out is None:
        out = np.empty(shape, np.float32)
    elif out.shape != shape or out.dtype != np.float32 or not out.flags.c_contiguous:
        raise OptionError(f"out must be contiguous float32 {shape}")
    use = _isa_in_use(isa)
    native = _compiled()
    if native and block.ggml_id in _compiled_types(use):
        native.dequantize(use, block.ggml_id, blocks, out)
        return out
    step = max(1, _REFERENCE_CHUNK // max(cols, 1))
    for row in range(0, shape[0], step):
        out[row : row + step] = family(type).DEQUANTIZE[type](blocks[row : row + step], cols)
    return out


class _Parts(NamedTuple):
    """What the compiled `pack` and `unpack` move: the range of the codes and the type of `sub` codes' scale."""

    low: int
    high: int
    sub: int = 32
    scale: type[np.generic] = np.float16
    offset: bool = False

    @property
    def code(self) -> type[np.generic]:
        return np.int8 if self.low < 0 else np.uint8


_PARTS = {
    "Q4_0": _Parts(-8, 7),
    "Q4_1": _Parts(0, 15, offset=True),
    "Q5_0": _Parts(-16, 15),
    "Q5_1": _Parts(0, 31, offset=True),
    "Q8_0": _Parts(-128, 127),
    "MXFP4": _Parts(0, 15, scale=np.uint8),
    "NVFP4": _Parts(0, 15, 16, np.uint8),
}


def unpack(type: str, blocks: NDArray[np.uint8]) -> dict[str, NDArray[Any]]:
    """The integers and scales inside `blocks` uint8 (rows, row_bytes); `pack` is the inverse.

    Parts: "codes" (rows, cols); "scale", and where the type has them "offset", "super_scale", "super_offset". Their
    meaning per type is in the family's reference module. Releases the GIL for the types of 32 and 64 values.
    """
    block = _block_type(type)
    blocks = _rows_of(block, blocks)
    native = native_module()
    if native is None or type not in _PARTS:
        parts: dict[str, NDArray[Any]] = family(type).UNPACK[type](blocks)
        return parts
    layout = _PARTS[type]
    rows, cols = len(blocks), blocks.shape[1] // block.nbytes * block.elems
    parts = {"codes": np.empty((rows, cols), layout.code)}
    for name in ("scale", "offset") if layout.offset else ("scale",):
        parts[name] = np.empty((rows, cols // layout.sub), layout.scale)
    native.unpack_blocks(block.ggml_id, blocks, *_part_bytes(parts))
    return parts


def pack(type: str, parts: dict[str, NDArray[Any]]) -> NDArray[np.uint8]:
    """Blocks uint8 (rows, row_bytes) of the given parts, those of `unpack`.

    For the types of 32 and 64 values InputError names the first code out of range or a part of the wrong shape, and the
    GIL is released; for the others codes and scales must be in range.
    """
    block = _block_type(type)
    if type not in _PARTS:
        blocks: NDArray[np.uint8] = family(type).PACK[type](parts)
        return blocks
    layout = _PARTS[type]
    parts = _checked_parts(block, layout, parts)
    native = native_module()
    if native is None:
        _check_codes(block, layout, parts["codes"])
        blocks = family(type).PACK[type](parts)
        return blocks
    rows, cols = parts["codes"].shape
    blocks = np.empty((rows, block.row_bytes(cols)), np.uint8)
    if not native.pack_blocks(block.ggml_id, *_part_bytes(parts), blocks):
        _check_codes(block, layout, parts["codes"])
    return blocks


def _part_bytes(parts: dict[str, NDArray[Any]]) -> list[NDArray[np.uint8] | None]:
    """Codes, scale and offset as bytes."""
    return [parts[name].view(np.uint8) if name in parts else None for name in ("codes", "scale", "offset")]


def _checked_parts(
    block: BlockType, layout: _Parts, parts: dict[str, NDArray[Any]]
) -> dict[str, NDArray[Any]]:
    """Contiguous parts of the stored types and of shapes that belong together; codes of another type are in range."""
    codes = parts["codes"]
    if codes.ndim != 2:
        raise InputError(f"{block.name} codes must be (rows, columns), got shape {codes.shape}")
    _checked_cols(block, codes.shape[1])
    if codes.dtype != layout.code:
        _check_codes(block, layout, codes)
    found = {"codes": np.ascontiguousarray(codes, layout.code)}
    shape = (len(codes), codes.shape[1] // layout.sub)
    for name in ("scale", "offset") if layout.offset else ("scale",):
        if parts[name].shape != shape:
            raise InputError(f"{block.name} {name} must have shape {shape}, got {parts[name].shape}")
        found[name] = np.ascontiguousarray(parts[name], layout.scale)
    return found


def _check_codes(block: BlockType, layout: _Parts, codes: NDArray[Any]) -> None:
    bad = (codes < layout.low) | (codes > layout.high)
    if bad.any():
        row, col = divmod(int(bad.argmax()), codes.shape[1])
        raise InputError(
            f"code {codes[row, col]} at row {row}, column {col} is outside {block.name}'s {layout.low} to {layout.high}"
        )
