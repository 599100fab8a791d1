"""Round to nearest: every weight on its own, on any grid, without calibration.

Two families of grids. Block types of GGUF (Q4_K, IQ4_NL, MXFP4 ...) use ggml's own scale searches, so the result is
what llama-quantize writes. Portable integer grids (int2 .. int8, uint2 .. uint8) choose one scale per group:

    symmetric   s = max|x| / (2^(b-1) - 1)            code = clamp(rint(x / s), -2^(b-1), 2^(b-1) - 1)
    asymmetric  s = (max - min) / (2^b - 1), z = rint(-min / s), min <= 0 <= max

search "mse" tries s, 0.99 s .. 0.5 s and keeps the smallest squared error. Chosen scales are rounded to 8 significant
bits first (7 for asymmetric ones), which makes them exact in fp16 and bf16 runtimes and, up to 4 bits, keeps z * s exact
in fp16 (7 + 4 bits fit its 11).

Small floats (passes/rtn_float.py): fp8 (E4M3; a scale per row, per tensor or per 128 x 128 block), fp4 (NVFP4: E2M1 with an E4M3
scale per 16 and one global scale) and nf4 (bitsandbytes' table, an absolute maximum per group). Scales that exist once per
tensor are tied over the modules that runtimes fuse, and a global scale is a power of two, so that its reciprocal is exact.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from lconvert.errors import InputError, OptionError
from lconvert.ir import Entry, Model, QTensor, Tensor, as_f32, int_grid, parts
from lconvert.passes import rtn_float, rtn_whole
from lconvert.passes.rtn_float import Peak
from lconvert.spec import check

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

_SHRINK = 50  # candidates of the MSE search: s, 0.99 s, .. 0.51 s


@dataclass(frozen=True)
class Options:
    """grid: int2..int8 (symmetric), uint2..uint8 (asymmetric), fp8, fp4, nf4, or a GGUF block type. group: values per scale along
    the input dimension, -1 for a whole row (of a convolution: an output channel), tensor for int8 with one scale; fp8 takes -1, tensor or block (128 x 128); block types, fp4 bring their own. targets, ignore: regular expressions on
    canonical names; a weight is rounded if it matches `targets` and not `ignore`."""

    grid: str = "int4"
    group: int | str = 128
    search: Literal["minmax", "mse"] = "minmax"
    targets: str = r".*\.(q|k|v|o|q_a|q_b|kv_a|k_b|v_b|gate|up|down)"
    ignore: str = ""

    def __post_init__(self) -> None:
        if self.search not in ("minmax", "mse"):
            raise OptionError(f"rtn: search {self.search!r}; choose minmax or mse")
        if self.grid == "fp8":
            if self.group not in (-1, "tensor", "block"):
                raise OptionError(
                    f"rtn: group {self.group!r}; fp8 takes -1 (a scale per row), tensor or block"
                )
        elif self.group == "tensor":
            if self.grid != "int8" or self.search != "minmax":
                raise OptionError(
                    f"rtn: group tensor with {self.grid} {self.search}; one scale is for int8 and minmax"
                )
        elif isinstance(self.group, str) or (self.group != -1 and self.group < 1):
            raise OptionError(f"rtn: group {self.group}; expected a positive number, or -1 for a whole row")
        if not re.fullmatch(r"u?int[2-8]|fp8|fp4|nf4", self.grid):
            from lconvert.formats.gguf_blocks import SCHEMES

            if self.grid.upper() not in SCHEMES:
                raise OptionError(
                    f"rtn: grid {self.grid!r}; choose int2..int8, uint2..uint8, fp8, fp4, nf4 or {', '.join(SCHEMES)}"
                )
        for pattern in (self.targets, self.ignore):
            try:
                re.compile(pattern)
            except re.error as e:
                raise OptionError(f"rtn: {pattern!r} is not a regular expression ({e})") from None


def run(model: Model, options: Options) -> Model:
    """The model with every matching dense matrix as a QTensor; nothing is computed before it is read."""
    new: dict[str, Entry] = {}
    peaks = rtn_float.peaks(model) if options.grid in ("fp4", "fp8") else {}
    for name, entry in model.entries.items():
        wanted = re.fullmatch(options.targets, name) and not (
            options.ignore and re.fullmatch(options.ignore, name)
        )
        if not wanted or not isinstance(entry.data, Tensor) or len(entry.data.shape) not in (2, 4):
            continue
        note = f"rtn {options.grid} group {options.group} {options.search}"
        new[name] = replace(
            entry, data=quantized(entry.data, options, peaks.get(name)), provenance=(*entry.provenance, note)
        )
    if not new:
        raise OptionError(f"rtn: no dense matrix matches targets {options.targets!r}")
    return check(model.with_entries(new, f"rtn: {len(new)} tensors to {options.grid}"))


def quantized(t: Tensor, options: Options, peak: Peak | None = None) -> QTensor:
    """A dense (out, in) matrix on the grid of `options`, lazily. peak: the largest magnitude that its global scale must cover."""
    if options.grid in rtn_float.GRIDS and len(t.shape) == 2:
        return rtn_float.quantized(t, options.grid, options.group, peak or Peak((t,)))
    if options.group == "tensor" or len(t.shape) == 4:
        return rtn_whole.quantized(t, options)
    if re.fullmatch(r"u?int[2-8]", options.grid):
        return _portable(t, options)
    return _block_type(t, options.grid.upper())


def _block_type(t: Tensor, type_: str) -> QTensor:
    from lconvert import kernels
    from lconvert.formats.gguf_blocks import raised

    block = kernels.BLOCKS[type_]
    if t.shape[1] % block.elems:
        raise OptionError(
            f"{t.origin}: rows of {t.shape[1]} values do not divide into {type_}'s blocks of {block.elems}"
        )

    def read(start: int, stop: int) -> Any:
        return kernels.quantize(type_, t.read(start, stop), t.dtype)

    return raised(type_, Tensor((t.rows, block.row_bytes(t.shape[1])), "U8", read, t.origin, t.files))


def short_scale(s: NDArray[np.float32], bits: int) -> NDArray[np.float32]:
    """Scales rounded to so many significant bits, to nearest, ties to even; 0 stays 0."""
    import numpy as np

    mantissa, exponent = np.frexp(s)
    out: NDArray[np.float32] = np.ldexp(np.rint(np.ldexp(mantissa, bits)), exponent - bits).astype(np.float32)
    return out


def _portable(t: Tensor, options: Options) -> QTensor:
    import numpy as np

    signed = options.grid.startswith("int")
    bits = int(options.grid[-1])
    rows, cols = t.shape
    assert isinstance(options.group, int)  # Options has checked it
    group = cols if options.group == -1 else options.group
    if cols % group:
        raise OptionError(f"{t.origin}: rows of {cols} values do not divide into groups of {group}")
    count = cols // group

    def compute(start: int, stop: int) -> dict[str, NDArray[Any]]:
        from lconvert.kernels.rounding import group_extent

        x = as_f32(t.read(start, stop), t.dtype)
        try:
            low, high = group_extent(x, group)
        except InputError as e:
            raise InputError(f"{t.origin}: {e} in rows {start}..{stop}") from None
        found = (_symmetric if signed else _asymmetric)(x, group, low, high, bits, options.search)
        if (found["scale"] > 65504).any():
            raise InputError(f"{t.origin}: a scale beyond fp16 in rows {start}..{stop}")
        found["scale"] = found["scale"].astype(np.float16)
        return found

    reader = parts(compute, cols)
    codes = Tensor(t.shape, "I8" if signed else "U8", reader("codes"), t.origin, t.files)
    scale = Tensor((rows, count), "F16", reader("scale"), t.origin, t.files, exact_in=("BF16",))
    zero = None if signed else Tensor((rows, count), "U8", reader("zero"), t.origin, t.files)
    block = (1, -1) if options.group == -1 else (1, group)
    return QTensor(t.shape, codes, int_grid(bits, signed), block, scale, zero)


Trial = Callable[[Any], "tuple[NDArray[Any], NDArray[np.float32] | None]"]


def _best(
    x: NDArray[np.float32],
    group: int,
    scale: NDArray[np.float32],
    search: str,
    significant: int,
    trial: Trial,
) -> tuple[NDArray[Any], NDArray[np.float32], NDArray[np.float32] | None]:
    """`trial(scale) -> codes, zero` at the scale, or at the shrunken scale with the least squared error."""
    import numpy as np

    first = storable(short_scale(scale, significant))
    codes, zero = trial(first)
    if search == "minmax":
        return codes, first, zero
    cut = (*scale.shape, group)

    def loss(codes: NDArray[Any], zero: Any, s: NDArray[np.float32]) -> NDArray[np.float64]:
        steps = codes.reshape(cut).astype(np.float32) - (0 if zero is None else zero[..., None])
        out: NDArray[np.float64] = ((steps * s[..., None] - x.reshape(cut)).astype(np.float64) ** 2).sum(-1)
        return out

    best, chosen = loss(codes, zero, first), first
    for step in range(1, _SHRINK):
        s = storable(short_scale(scale * np.float32(1 - step / 100), significant))
        c, z = trial(s)
        error = loss(c, z, s)
        better = error < best
        best, chosen = np.where(better, error, best), np.where(better, s, chosen)
        codes = np.where(better[..., None], c.reshape(cut), codes.reshape(cut)).reshape(x.shape)
        zero = None if zero is None or z is None else np.where(better, z, zero)
    return codes, chosen, zero


def storable(s: NDArray[np.float32]) -> NDArray[np.float32]:
    """Scales below fp16's smallest normal number on multiples of 2^-24, which subnormal fp16 holds, and bf16 with their few bits."""
    import numpy as np

    unit, normal = np.float32(2.0**-24), np.float32(2.0**-14)
    return np.where(s < normal, np.rint(np.minimum(s, normal) / unit) * unit, s)


def _symmetric(
    x: NDArray[np.float32],
    group: int,
    low: NDArray[np.float32],
    high: NDArray[np.float32],
    bits: int,
    search: str,
) -> dict[str, NDArray[Any]]:
    import numpy as np

    from lconvert.kernels.rounding import round_groups

    top = (1 << (bits - 1)) - 1

    def trial(s: NDArray[np.float32]) -> tuple[NDArray[Any], None]:
        return round_groups(x, group, s, None, -top - 1, top), None

    scale = _f32(np.maximum(np.abs(low), np.abs(high)) / np.float32(top))
    codes, scale, _ = _best(x, group, scale, search, 8, trial)
    return {"codes": codes, "scale": scale}


def _asymmetric(
    x: NDArray[np.float32],
    group: int,
    low: NDArray[np.float32],
    high: NDArray[np.float32],
    bits: int,
    search: str,
) -> dict[str, NDArray[Any]]:
    import numpy as np

    from lconvert.kernels.rounding import round_groups

    top = (1 << bits) - 1
    low, high = np.minimum(low, np.float32(0)), np.maximum(high, np.float32(0))

    def trial(s: NDArray[np.float32]) -> tuple[NDArray[Any], NDArray[np.float32]]:
        zero = np.clip(np.rint(np.divide(-low, s, out=np.zeros_like(s), where=s > 0)), 0, top)
        return round_groups(x, group, s, zero, 0, top).view(np.uint8), zero

    codes, scale, zero = _best(x, group, _f32((high - low) / np.float32(top)), search, 7, trial)
    assert zero is not None
    return {"codes": codes, "scale": scale, "zero": zero.astype(np.uint8)}


def _f32(x: Any) -> NDArray[np.float32]:
    """What NumPy computes out of fp32 arrays and scalars is fp32; its annotations do not say so."""
    out: NDArray[np.float32] = x
    return out
