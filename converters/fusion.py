"""Modules that serving runtimes fuse into one must be quantized alike, with tied scales: q/k/v, gate/up, experts.

vLLM and TensorRT-LLM load q_proj, k_proj and v_proj into one matrix (gate and up likewise) and take the maximum over
scales that exist once per tensor (vLLM 0.32, compressed_tensors_w4a4_nvfp4.py, w8a8_utils.requantize_with_max_scale): members
with different ones would be silently wrong. `unify` restates a group so that nothing is left to take a maximum of, exactly, or
says why it cannot.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from math import gcd
from typing import Any

import numpy as np

from lconvert.converters.regrid import asymmetric, numbers, regrouped
from lconvert.formats.scheme import Held, view
from lconvert.ir import E4M3, ActSpec, QTensor, Tensor, dense, row_blocks
from lconvert.kernels.qtensor import dequantize, float_values
from lconvert.passes.rtn_float import nearest


def signature(held: Held) -> tuple[Any, ...]:
    """What must be equal in a fused module: everything but the numbers."""
    q, a = held.weight, held.activation
    weight: tuple[Any, ...] = ()
    if q is not None:
        inner = (q.scale.grid, q.scale.block, q.scale.divisor) if isinstance(q.scale, QTensor) else ("plain",)
        weight = (q.grid, q.block, q.zero is None, q.offset is None, q.g_idx is None, inner)
    act = None if a is None else (a.grid, a.per, a.dynamic, a.group, a.zero is None)
    return weight, act, held.transform is None


def unify(members: Mapping[str, Held]) -> Mapping[str, Held] | str:
    """The members of a fused module with one scheme and tied scales and equal numbers, or the reason why not."""
    held = list(members.values())
    if all(h.weight is None for h in held):
        return members
    if missing := [name for name, h in members.items() if h.weight is None]:
        return f"{', '.join(missing)} is not quantized, but is served in one matrix with modules that are"
    if (reason := _activations(members)) is not None:
        return reason
    if len({signature(h) for h in held}) > 1:
        alike = _integers_alike(members)
        if alike is None:
            return "its parts are quantized differently, but are served in one matrix"
        members = alike
    return _tied(members)


def _activations(members: Mapping[str, Held]) -> str | None:
    """One input, hence one activation spec and, where it is static, one scale."""
    specs = [h.activation for h in members.values()]
    first = specs[0]
    for a in specs[1:]:
        if (a is None) != (first is None):
            return "activations of some of its parts are quantized, of others not"
        if a is None or first is None:
            continue
        if _kind(a) != _kind(first):
            return "activations of its parts are quantized differently"
        if not (_same(a.scale, first.scale) and _same(a.zero, first.zero)):
            return "its parts have different static input scales, of which a runtime would take the largest"
    params = [h.transform.param for h in members.values() if h.transform is not None]
    if params and (len(params) < len(specs) or not all(_same(params[0], p) for p in params[1:])):
        return "its parts have different pre_quant_scale, but one input"
    return None


def _kind(a: ActSpec) -> tuple[Any, ...]:
    return a.grid, a.per, a.dynamic, a.group, a.divisor


def _same(a: Tensor | None, b: Tensor | None) -> bool:
    if a is None or b is None:
        return a is b
    return bool(np.array_equal(numbers(a).reshape(-1), numbers(b).reshape(-1)))


def _integers_alike(members: Mapping[str, Held]) -> Mapping[str, Held] | None:
    """Integer members with the widest bits, zero points if one has them, and the finest groups."""
    parts = {k: h.weight for k, h in members.items() if h.weight is not None}
    if any(
        q.grid.kind != "int" or q.offset is not None or q.g_idx is not None or not isinstance(q.scale, Tensor)
        for q in parts.values()
    ):
        return None
    bits = max(q.grid.bits for q in parts.values())
    with_zero = any(q.zero is not None for q in parts.values())
    size = gcd(*(q.shape[1] if q.block[1] == -1 else q.block[1] for q in parts.values()))
    out = {}
    for name, q in parts.items():
        same = asymmetric(q, bits) if with_zero else replace(q, grid=replace(q.grid, bits=bits))
        fine = None if same is None else regrouped(same, size)
        if fine is None:
            return None
        out[name] = replace(members[name], weight=fine)
    return out


# --- scales that exist once per tensor --------------------------------------------------------------------


def _tied(members: Mapping[str, Held]) -> Mapping[str, Held] | str:
    parts = {k: h.weight for k, h in members.items() if h.weight is not None}
    first = next(iter(parts.values()))
    if isinstance(first.scale, QTensor) and first.scale.block == (-1, -1):
        tied = _tie_globals(parts)
        if tied is None:
            return "its parts have different global scales whose ratio is no power of two that their block scales can absorb"
        return {k: replace(members[k], weight=q) for k, q in tied.items()}
    if first.block == (-1, -1) and isinstance(first.scale, Tensor):
        values = {
            float(numbers(q.scale).reshape(-1)[0]) for q in parts.values() if isinstance(q.scale, Tensor)
        }
        if len(values) > 1:  # one scale per row says the same and cannot be mixed up
            return {k: replace(members[k], weight=row_blocks(q)) for k, q in parts.items()}
    return members


def to_largest(members: Mapping[str, Held]) -> Mapping[str, Held] | None:
    """FP8 members with one scale each, rounded to the largest of them as runtimes do when they load; None for others."""
    parts = {k: h.weight for k, h in members.items() if h.weight is not None}
    scales = {}
    for name, q in parts.items():
        if q.grid != E4M3 or q.block != (-1, -1) or not isinstance(q.scale, Tensor) or q.divisor:
            return None
        scales[name] = float(numbers(q.scale).reshape(-1)[0])
    top = max(scales, key=lambda k: scales[k])
    if len(parts) < len(members) or not 0 < scales[top] < np.inf:
        return None
    common = np.float32(scales[top])

    def rounded(q: QTensor) -> QTensor:
        codes = view(q.codes, q.shape, "U8", lambda a, b: nearest(E4M3, dequantize(q, a, b) / common))
        return replace(q, codes=codes, scale=parts[top].scale)

    return {
        k: replace(members[k], weight=q if scales[k] == scales[top] else rounded(q)) for k, q in parts.items()
    }


def _tie_globals(parts: Mapping[str, QTensor]) -> Mapping[str, QTensor] | None:
    """One global scale for all, the ratios moved into the block scales: exact, or None.

    A member's block scales bear a range of factors that holds 1, so that a common scale, if there is any, lies between the
    members' own.
    """
    outer = {}
    for name, q in parts.items():
        assert isinstance(q.scale, QTensor)
        if not isinstance(q.scale.scale, Tensor):
            return None
        outer[name] = float(numbers(q.scale.scale).reshape(-1)[0])
    if len(set(outer.values())) == 1:
        return parts
    top, least = max(outer.values()), min(outer.values())
    if not 0 < least <= top < np.inf:
        return None
    for step in range(int(np.log2(top / least)) + 1):
        common = top / 2.0**step
        tied = {name: _rescaled(q, outer[name], common) for name, q in parts.items()}
        if all(tied.values()):
            return {k: q for k, q in tied.items() if q is not None}
    return None


def _rescaled(q: QTensor, own: float, common: float) -> QTensor | None:
    """The same numbers with the global scale `common`: every E4M3 block scale times own / common (or its inverse)."""
    s = q.scale
    assert isinstance(s, QTensor)
    if s.grid != E4M3:
        return q if own == common else None
    ratio = common / own if s.divisor else own / common
    if np.frexp(ratio)[0] != 0.5:
        return None
    table = float_values(4, 3, True, 8)
    order = {float(v): code for code, v in reversed(list(enumerate(table))) if np.isfinite(v)}
    moved = np.array([order.get(float(v) * ratio, -1) if np.isfinite(v) else -1 for v in table])
    codes = moved[s.codes.load()]
    if (codes < 0).any():
        return None
    codes_tensor = view(s.codes, s.shape, "U8", lambda a, b: codes[a:b].astype(np.uint8))
    outer = dense(np.full((1, 1), common, np.float32))
    return replace(q, scale=replace(s, codes=codes_tensor, scale=outer))
