"""Experts that a Hugging Face folder stores as one tensor per layer: their rows as views of that tensor.

Stacks are (expert, out, in), or transposed (expert, in, out), and in MXFP4 a pair of packed tensors. Rows come out one
expert after another, and within an expert one part after another, as `archs.common.Bind` counts them.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lconvert.archs.common import Bind
from lconvert.errors import InputError
from lconvert.formats import mxfp4_blocks, safetensors
from lconvert.formats.overflow import finite_weights
from lconvert.formats.scheme import Stored
from lconvert.ir import NUMPY_DTYPE, Model, QTensor, Tensor, concat_rows

Tensors = dict[str, tuple[safetensors.SafetensorsFile, safetensors.TensorInfo]]


def part_by_part(t: Tensor, experts: int, parts: int) -> Tensor:
    """The rows of `t` with those of an expert's parts one part after another, where they take turns in `t`: a view."""
    if parts < 2:
        return t
    height = t.shape[0] // experts
    each = height // parts

    def read(start: int, stop: int) -> NDArray[Any]:
        out, at = [t.read(0, 0)], start
        while at < stop:
            block, first = divmod(at, each)
            expert, part = divmod(block, parts)
            count = min(stop - at, each - first)
            low = expert * height + first * parts
            out.append(t.read(low, low + count * parts)[part::parts])
            at += count
        return np.concatenate(out)

    return replace(t, read=read)


def in_turns(t: Tensor, experts: int, parts: int) -> Tensor:
    """The inverse of `part_by_part`."""
    if parts < 2:
        return t
    height = t.shape[0] // experts
    each = height // parts

    def read(start: int, stop: int) -> NDArray[Any]:
        out = np.empty((stop - start, *t.shape[1:]), NUMPY_DTYPE[t.dtype])
        for expert in range(start // height, -(-stop // height)) if start < stop else ():
            base = expert * height
            low, high = max(start - base, 0), min(stop - base, height)
            for part in range(parts):
                first, last = -(-(low - part) // parts), -(-(high - part) // parts)
                rows = t.read(base + part * each + first, base + part * each + last)
                out[base + first * parts + part - start : base + high - start : parts] = rows
        return out

    return replace(t, read=read)


def dense(bind: Bind, file: safetensors.SafetensorsFile, name: str) -> Tensor:
    """A stack in a float type as rows."""
    rows = safetensors.stacked(file, name, transpose=bind.transpose)
    return part_by_part(rows, bind.experts, bind.alternating)


def mxfp4(bind: Bind, tensors: Tensors) -> QTensor | None:
    """A stack in MXFP4 as rows, its tensors taken out of `tensors`; None where the folder holds a plain one."""
    names = [bind.hf + suffix for suffix in mxfp4_blocks.SUFFIXES]
    if not any(n in tensors for n in names):
        return None
    sides = []
    for name, shape in zip(names, mxfp4_blocks.shapes(bind.experts, bind.stored), strict=True):
        if name not in tensors:
            raise InputError(
                f"{bind.hf}: the tensor {name} is missing; the checkpoint is incomplete, download it again"
            )
        file, info = tensors.pop(name)
        if (info.dtype, info.shape) != ("U8", shape):
            raise InputError(
                f"{file.path}: tensor {name} is {info.dtype} of shape {info.shape}, the configuration implies U8 of {shape}"
            )
        sides.append(part_by_part(safetensors.stacked(file, name), bind.experts, bind.alternating))
    return finite_weights(mxfp4_blocks.raised(*sides))


def store_mxfp4(model: Model, bind: Bind) -> dict[str, Stored] | None:
    """The packed tensors of a stack by their names, a row for each expert; None where MXFP4 does not hold it exactly."""
    parts = [model.entries[role].data for role, _ in bind.parts]
    quantized = [q for q in parts if isinstance(q, QTensor) and mxfp4_blocks.fits(q)]
    if not bind.experts or len(quantized) < len(parts):
        return None
    sides = zip(*(mxfp4_blocks.packed(q) for q in quantized), strict=True)
    out = {}
    for suffix, shape, found in zip(
        mxfp4_blocks.SUFFIXES, mxfp4_blocks.shapes(bind.experts, bind.stored), sides, strict=True
    ):
        rows = in_turns(concat_rows(found), bind.experts, bind.alternating)

        def read(start: int, stop: int, rows: Tensor = rows, shape: tuple[int, ...] = shape) -> NDArray[Any]:
            return rows.read(start * shape[1], stop * shape[1]).reshape(stop - start, *shape[1:])

        out[bind.hf + suffix] = Stored("U8", shape, read)
    return out
