"""Round to nearest: every weight on its own, on any grid, without calibration.

Two families of grids. Block types of GGUF (Q4_K, IQ4_NL, MXFP4 ...) use ggml's own scale searches, so the result is
what llama-quantize writes. Portable integer grids (int2 .. int8, uint2 .. uint8) choose one scale per group:

    symmetric   s = max|x| / (2^(b-1) - 1)            code = clamp(rint(x / s), -2^(b-1), 2^(b-1) - 1)
    asymmetric  s = (max - min) / (2^b - 1), z = rint(-min / s), min <= 0 <= max

search "signed-max" (symmetric only) gives the value of the largest magnitude the code -2^(b-1), which makes s smaller, and negative where
that value is positive: what Q4_0 (ggml-quants.c quantize_row_q4_0_ref) and ONNX Runtime's quantizer (mlas q4_dq.cpp) do. TensorRT takes
no negative scales. "mse" tries s, 0.99 s .. 0.5 s and keeps the smallest squared error. "importance" looks at a calibration text and takes the
scales with the least squared error weighted by each input's mean square (passes/rtn_weighted.py), on every grid. Chosen scales are rounded to 8 significant
bits first (7 for asymmetric ones), which makes them exact in fp16 and bf16 runtimes and, up to 4 bits, keeps z * s exact
in fp16 (7 + 4 bits fit its 11).

Small floats (passes/rtn_float.py): fp8 (E4M3; a scale per row, per tensor or per 128 x 128 block), fp4 (NVFP4: E2M1 with an E4M3
scale per 16 and one global scale) and nf4 (bitsandbytes' table, an absolute maximum per group). Scales that exist once per
tensor are tied over the modules that runtimes fuse, and a global scale is a power of two, so that its reciprocal is exact.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from lconvert.errors import InputError, OptionError, few
from lconvert.ir import Entry, Model, QTensor, Tensor, as_f32, int_grid, parts
from lconvert.passes import rtn_float, rtn_whole
from lconvert.passes.rtn_float import Peak
from lconvert.primitives import masks
from lconvert.primitives.job import Job
from lconvert.primitives.placement import Placed, Placement, nothing, undivided
from lconvert.spec import check

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

_SHRINK = 50  # candidates of the MSE search: s, 0.99 s, .. 0.51 s


@dataclass(frozen=True)
class Options(Placement):
    """search: minmax, signed-max (int2 .. int8) or mse, how scales of integer grids, fp4 and MXFP4 are chosen; importance: by least squares weighted with the inputs
    of a calibration text, on any grid; signed: these may be negative for integers, which TensorRT does not take. Of a convolution, a row is an output
    channel, and int8 may have one scale for a whole tensor (group: tensor)."""

    search: Literal["minmax", "signed-max", "mse", "importance"] = "minmax"
    signed: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.search not in ("minmax", "signed-max", "mse", "importance"):
            raise OptionError(f"rtn: search {self.search!r}; choose minmax, signed-max, mse or importance")
        if self.signed and self.search != "importance":
            raise OptionError(f"rtn: signed with search {self.search}; it is for importance")
        if self.search == "signed-max" and not re.fullmatch(r"int[2-8]", self.grid):
            raise OptionError(f"rtn: search signed-max with {self.grid}; it is for int2 .. int8")
        if self.group == "tensor" and self.grid == "int8" and self.search != "minmax":
            raise OptionError(
                f"rtn: group tensor with {self.grid} {self.search}; one scale is for int8 and minmax"
            )


def run(model: Model, options: Options, job: Job = Job()) -> Model:  # noqa: B008 - immutable
    """The model with every matching dense matrix as a QTensor; nothing is computed before it is read, but for search importance."""
    if options.search == "importance":
        from lconvert.passes import rtn_weighted

        return rtn_weighted.run(model, options, job)
    new: dict[str, Entry] = {}
    wanted = list(options.chosen(model))
    peaks = rtn_float.peaks(model) if {options.grid, *(p.grid for _, p in wanted)} & {"fp4", "fp8"} else {}
    for entry, placed in wanted:
        assert isinstance(entry.data, Tensor)
        chosen = Options(placed.grid, placed.group, search=_search(options, placed))
        note = f"rtn {placed.grid} group {placed.group} {chosen.search}"
        data = quantized(entry.data, chosen, peaks.get(entry.name))
        new[entry.name] = replace(entry, data=data, provenance=(*entry.provenance, note))
    if not new:
        raise nothing("rtn", options.targets, model)
    told = replace(model, report=(*model.report, *_lost(model, new)))
    return check(told.with_entries(new, f"rtn: {len(new)} tensors to {options.grid}"))


def _lost(model: Model, new: Mapping[str, Entry]) -> tuple[str, ...]:
    """A line where the model was pruned and its zeros land in blocks with a minimum of their own, from which no code leads back to 0."""
    names = [n for n, e in new.items() if isinstance(e.data, QTensor) and e.data.offset is not None]
    if not names or not masks.said(model):
        return ()
    return (
        f"rtn: {few(names)}: the pruned model's zeros cannot be kept exactly on blocks that have a minimum",
    )


def calibrated(options: Options) -> bool:
    """Search importance alone looks at inputs."""
    return options.search == "importance"


def _search(options: Options, placed: Placed) -> Literal["minmax", "signed-max", "mse", "importance"]:
    """The search of `options` where an exception's grid has it."""
    if options.search == "signed-max" and not re.fullmatch(r"int[2-8]", placed.grid):
        return "minmax"
    return "minmax" if placed.group == "tensor" else options.search


def quantized(t: Tensor, options: Options, peak: Peak | None = None) -> QTensor:
    """A dense (out, in) matrix on the grid of `options`, lazily. peak: the largest magnitude that its global scale must cover."""
    searched = options.grid.upper() == "MXFP4" and options.search == "mse"
    if (options.grid in rtn_float.GRIDS or searched) and len(t.shape) == 2:
        name = options.grid.upper() if searched else options.grid
        return rtn_float.quantized(t, name, options.group, peak or Peak((t,)), options.search)
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
        raise undivided(t.origin, t.shape[1], block.elems, type_)

    def read(start: int, stop: int) -> Any:
        try:
            return kernels.quantize(type_, t.read(start, stop), t.dtype)
        except InputError as e:
            raise InputError(f"{t.origin}: {e} (rows counted from {start})") from None

    return raised(type_, Tensor((t.rows, block.row_bytes(t.shape[1])), "U8", read, t.origin, t.files))


def _portable(t: Tensor, options: Options) -> QTensor:
    import numpy as np

    signed = options.grid.startswith("int")
    bits = int(options.grid[-1])
    rows, cols = t.shape
    assert isinstance(options.group, int)  # Options has checked it
    group = cols if options.group == -1 else options.group
    if cols % group:
        raise undivided(t.origin, cols, group, options.grid)
    count = cols // group

    def compute(start: int, stop: int) -> dict[str, NDArray[Any]]:
        x = t.read(start, stop)
        x = x if t.dtype in ("BF16", "F16", "F32") else as_f32(x, t.dtype)
        try:
            codes, scale, zero = _rounded(x, group, bits, signed, options.search)
        except InputError as e:
            raise InputError(f"{t.origin}: {e} in rows {start}..{stop}") from None
        if (np.abs(scale) > 65504).any():
            raise InputError(f"{t.origin}: a scale beyond fp16 in rows {start}..{stop}")
        found = {"codes": codes if signed else codes.view(np.uint8), "scale": scale.astype(np.float16)}
        return found if zero is None else {**found, "zero": zero}

    reader = parts(compute, cols)
    codes = Tensor(t.shape, "I8" if signed else "U8", reader("codes"), t.origin, t.files)
    scale = Tensor((rows, count), "F16", reader("scale"), t.origin, t.files, exact_in=("BF16",))
    zero = None if signed else Tensor((rows, count), "U8", reader("zero"), t.origin, t.files)
    block = (1, -1) if options.group == -1 else (1, group)
    return QTensor(t.shape, codes, int_grid(bits, signed), block, scale, zero)


def _rounded(
    x: NDArray[Any], group: int, bits: int, signed: bool, search: str
) -> tuple[NDArray[Any], NDArray[np.float32], NDArray[np.uint8] | None]:
    """Codes, scales and zero points at the scale that covers a group, or at the shrunken scale with the least squared error."""
    import numpy as np

    from lconvert.kernels import rounding
    from lconvert.kernels.reference.rounding import short_scale, storable, widest_scale, zero_points

    if search != "mse":
        return rounding.nearest_groups(x, group, bits, signed, search == "signed-max")
    x = rounding.widened(x)
    low, high = rounding.group_extent(x, group)
    widest = widest_scale(low, high, bits, signed)
    least, most = (-(1 << (bits - 1)), (1 << (bits - 1)) - 1) if signed else (0, (1 << bits) - 1)
    cut = (*widest.shape, group)
    values = x.reshape(cut)
    best = np.full(widest.shape, np.inf)
    codes = np.zeros(cut, np.int8)
    scale, zero = widest, np.zeros_like(widest)
    for step in range(_SHRINK):
        s = storable(short_scale(widest * np.float32(1 - step / 100), 8 if signed else 7))
        z = None if signed else zero_points(low, s, bits)
        c = rounding.round_groups(x, group, s, z, least, most)
        y = rounding.group_values(c if signed else c.view(np.uint8), group, s, z).reshape(cut)
        error = ((y - values).astype(np.float64) ** 2).sum(-1)
        better = error < best
        best, scale = np.where(better, error, best), np.where(better, s, scale)
        codes = np.where(better[..., None], c.reshape(cut), codes)
        zero = zero if z is None else np.where(better, z, zero)
    return codes.reshape(x.shape), scale, None if signed else zero.astype(np.uint8)
