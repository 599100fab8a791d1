"""Half-quadratic quantization: scales and zero points for the least |error|^p of the weights alone, without a text.

primitives/hqq.py has the method. Grids are uint2 .. uint8 in groups, with zero points between the codes (`zeros: integer`), which AWQ, GPTQ,
compressed-tensors, ONNX and Q4_1 hold, or anywhere (`zeros: float`), as its authors store them: an ONNX graph holds these as minima, no other target does.
Integer zero points go with scales of 7 significant bits, float ones are F16 beside F16 scales.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Literal

from lconvert.errors import InputError, OptionError
from lconvert.forward import packages, threads
from lconvert.ir import Entry, Model, QTensor, Tensor, as_f32, dense, int_grid
from lconvert.primitives import hqq as method
from lconvert.primitives.families import SLAB, half, short
from lconvert.primitives.finished import Folder
from lconvert.primitives.hqq import Settings, Store
from lconvert.primitives.job import Job
from lconvert.primitives.placement import Placed, Placement, nothing, undivided
from lconvert.spec import check


@dataclass(frozen=True)
class Options(Placement):
    """p, beta, kappa, iterations, scale: as in primitives/hqq.py (norm, weight of the quadratic term, its growth, rounds, whether scales are
    fitted too). zeros: integer or float."""

    grid: str = "uint4"
    group: int | str = 64
    zeros: Literal["integer", "float"] = "integer"
    p: float = 0.7
    beta: float = 10.0
    kappa: float = 1.01
    iterations: int = 20
    scale: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.zeros not in ("integer", "float"):
            raise OptionError(f"hqq: zeros {self.zeros!r}; choose integer or float")
        self.settings()

    def settings(self) -> Settings:
        return Settings(self.p, self.beta, self.kappa, self.iterations, self.scale)


def run(model: Model, options: Options, job: Job = Job()) -> Model:  # noqa: B008 - immutable
    """The model with every matching dense matrix on its grid, layer after layer; what is finished lies in a file."""
    wanted = list(options.chosen(model))
    if not wanted:
        raise nothing("hqq", options.targets, model)
    for entry, placed in wanted:
        _check(entry, placed)
    folder = Folder(None, "", "hqq", resume=False)
    new: dict[str, Entry] = {}
    for number, (_, members) in enumerate(groupby(wanted, lambda w: _layer(w[0].name))):
        made: dict[str, Entry] = {}
        for entry, placed in members:
            note = f"hqq {placed} {options.zeros} zeros"
            with threads(job.threads):
                data = _quantized(entry, placed, options, job.device)
            made[entry.name] = replace(entry, data=data, provenance=(*entry.provenance, note))
            job.tell("hqq", len(new) + len(made), len(wanted))
        new |= folder.save(number, made, ()).entries
    return check(
        model.with_entries(
            new, f"hqq: {len(new)} matrices to {', '.join(sorted({str(p) for _, p in wanted}))}"
        )
    )


def calibrated(options: Options) -> bool:
    """Weights alone are looked at."""
    return False


def _layer(name: str) -> str:
    found = re.match(r"layers\.\d+\.", name)
    return found[0] if found else ""


def _check(entry: Entry, placed: Placed) -> None:
    if not re.fullmatch(r"uint[2-8]", placed.grid):
        raise OptionError(
            f"hqq: {entry.name}: grid {placed.grid}; it fits zero points, so choose uint2 .. uint8, or none to leave it"
        )
    shape = entry.shape
    if len(shape) != 2:
        raise OptionError(
            f"hqq: {entry.name}: is a convolution; it rounds matrices, so leave it out (grids: {{{entry.name}: none}})"
        )
    if placed.group != -1 and shape[1] % int(placed.group):
        raise undivided(f"hqq: {entry.name}", shape[1], int(placed.group), placed.grid)


def _quantized(entry: Entry, placed: Placed, options: Options, device: str) -> QTensor:
    torch, _ = packages()
    t = entry.data
    assert isinstance(t, Tensor)
    rows, cols = t.shape
    group = cols if placed.group == -1 else int(placed.group)
    grid = int_grid(int(placed.grid[-1]), False)
    top = (1 << grid.bits) - 1
    codes, scales, zeros = [], [], []
    for a, b in _slabs(rows, cols):
        x = torch.from_numpy(as_f32(t.read(a, b), t.dtype).copy()).to(device).reshape(-1, group)
        if not bool(torch.isfinite(x).all()):
            raise InputError(f"{t.origin}: holds NaN or infinite values in rows {a}..{b}")
        s, z = method.fit(x, top, _store(options, top), options.settings())
        if bool((s >= 65024).any()):
            raise InputError(f"{t.origin}: a scale beyond fp16 in rows {a}..{b}")
        codes.append(method.coded(x, s, z, top).to(torch.uint8).reshape(b - a, cols).cpu())
        scales.append(s.reshape(b - a, -1).cpu())
        zeros.append(z.reshape(b - a, -1).cpu())
    code, scale, zero = (torch.cat(parts) for parts in (codes, scales, zeros))
    stored = replace(dense(scale.half().numpy()), exact_in=("BF16",) if options.zeros == "integer" else ())
    held = zero.to(torch.uint8) if options.zeros == "integer" else zero.half()
    block = (1, -1) if placed.group == -1 else (1, group)
    named = replace(dense(code.numpy()), origin=t.origin)
    return QTensor(t.shape, named, grid, block, stored, dense(held.numpy()))


def _store(options: Options, top: int) -> Store:
    """What a scale and a zero point are when they are stored."""
    if options.zeros == "float":
        return lambda s, z: (half(s), half(z))
    return lambda s, z: (short(s.clamp(min=0), 7), z.round().clamp(0, top))


def _slabs(rows: int, cols: int) -> Iterator[tuple[int, int]]:
    step = max(1, SLAB // cols)
    for a in range(0, rows, step):
        yield a, min(a + step, rows)
