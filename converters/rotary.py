"""Frequencies of rotary embeddings, as transformers computes them (modeling_rope_utils.py), in fp32.

The angle of dimension pair i at position p is p * frequencies[i]; cos and sin are multiplied by the attention factor.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from lconvert.archs.common import yarn_attention
from lconvert.errors import UnsupportedError
from lconvert.ir import Rope

_F32 = np.float32
_MOST = 1 << 24  # rows of a table


def frequencies(rope: Rope, *, long: bool = False) -> NDArray[np.float32]:
    """One per pair of turning dimensions. long: of longrope, those for contexts beyond the original one."""
    exponents = np.arange(0, rope.dim, 2, dtype=np.float32) / _F32(rope.dim)
    period: NDArray[np.float32] = _F32(rope.theta) ** exponents
    match rope.scaling:
        case "linear":
            return np.asarray(_F32(1) / period / _F32(rope.factor))
        case "llama3":
            return _llama3(rope, np.asarray(_F32(1) / period))
        case "yarn":
            return _yarn(rope, period)
        case "longrope":
            factors = np.asarray(rope.long_factors if long else rope.short_factors, np.float32)
            return np.asarray(_F32(1) / (factors * period))
    return np.asarray(_F32(1) / period)


def attention_factor(rope: Rope) -> float:
    """What cos and sin are multiplied by."""
    if rope.scaling == "yarn":
        return yarn_attention(rope)
    if rope.scaling != "longrope":
        return 1.0
    if rope.attention_factor is not None:
        return rope.attention_factor
    return math.sqrt(1 + math.log(rope.factor) / math.log(rope.original_context)) if rope.factor > 1 else 1.0


def _llama3(rope: Rope, inverse: NDArray[np.float32]) -> NDArray[np.float32]:
    """Low frequencies are divided by the factor, high ones kept, those between are mixed."""
    wavelength = _F32(2 * math.pi) / inverse
    low = rope.original_context / rope.low_freq_factor
    high = rope.original_context / rope.high_freq_factor
    slow = inverse / _F32(rope.factor)
    smooth = (_F32(rope.original_context) / wavelength - _F32(rope.low_freq_factor)) / _F32(
        rope.high_freq_factor - rope.low_freq_factor
    )
    mixed = (_F32(1) - smooth) * slow + smooth * inverse
    return np.where(wavelength > low, slow, np.where(wavelength < high, inverse, mixed)).astype(np.float32)


def _yarn(rope: Rope, period: NDArray[np.float32]) -> NDArray[np.float32]:
    """Interpolated, extrapolated, and a ramp between them over the dimensions that turn beta_slow to beta_fast times."""

    def dimension(turns: float) -> float:
        return rope.dim * math.log(rope.original_context / (turns * 2 * math.pi)) / (2 * math.log(rope.theta))

    low, high = dimension(rope.beta_fast), dimension(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rope.dim - 1)
    if low == high:
        high += 0.001  # no division by zero
    ramp = np.clip((np.arange(rope.dim // 2, dtype=np.float32) - _F32(low)) / _F32(high - low), 0, 1)
    extrapolated = _F32(1) - ramp.astype(np.float32)
    inverse = _F32(1) / period
    slow = _F32(1) / (_F32(rope.factor) * period)
    return np.asarray(slow * (_F32(1) - extrapolated) + inverse * extrapolated)


def tables(
    rope: Rope, positions: int, *, long: bool = False
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """cos and sin of the positions 0 .. positions - 1, shape (positions, dim / 2). UnsupportedError for more than fit into memory."""
    if positions > _MOST:
        raise UnsupportedError(
            f"cos and sin of {positions} positions; at most {_MOST} are made: choose fewer with --positions"
        )
    angles = np.arange(positions, dtype=np.float32)[:, None] * frequencies(rope, long=long)
    factor = _F32(attention_factor(rope))
    return (np.cos(angles) * factor).astype(np.float32), (np.sin(angles) * factor).astype(np.float32)
