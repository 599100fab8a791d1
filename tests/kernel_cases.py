"""Inputs that every kernel test shares, and the comparison against ggml.

The distributions are those on which quantisers differ: ties of every rounding rule, signed zeros, denormals, powers of
two and their neighbours, overflow of squares, one outlier per block.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from lconvert import kernels
from lconvert.kernels.blocks import BLOCKS
from tests import ggml_oracle

F32 = NDArray[np.float32]
U8 = NDArray[np.uint8]


def _ulps(x: F32, steps: NDArray[np.int64]) -> F32:
    """x moved by `steps` floats away from zero."""
    return (x.view(np.int32) + steps.astype(np.int32)).view(np.float32)


def _powers(rng: np.random.Generator, rows: int, cols: int, low: int, high: int) -> F32:
    signs = rng.choice(np.array([-1, 1], np.float32), (rows, cols))
    return np.ldexp(signs, rng.integers(low, high, (rows, cols))).astype(np.float32)


def _outliers(rng: np.random.Generator, rows: int, cols: int) -> F32:
    x = rng.normal(0, 0.01, (rows, cols))
    x[:, 5::32] = 50
    return x.astype(np.float32)


def _bits(rng: np.random.Generator, rows: int, cols: int) -> F32:
    raw = rng.integers(0, 2**32, (rows, cols), dtype=np.uint32).view(np.float32)
    return np.where(np.isfinite(raw), raw, np.float32(1))


def _scaled(scale: float) -> Callable[[np.random.Generator, int, int], F32]:
    return lambda rng, rows, cols: (rng.standard_normal((rows, cols)) * scale).astype(np.float32)


def _steps(anchor: float, unit: float, span: int) -> Callable[[np.random.Generator, int, int], F32]:
    """Multiples of `unit` within +-span units and their float neighbours, every block of 16 led by `anchor`: the scale is exact."""

    def make(rng: np.random.Generator, rows: int, cols: int) -> F32:
        exact = (rng.integers(-span, span + 1, (rows, cols)) * unit).astype(np.float32)
        x = np.where(exact == 0, exact, _ulps(exact, rng.integers(-1, 2, (rows, cols))))
        x = np.clip(x, -abs(anchor), abs(anchor)).astype(np.float32)
        x[:, ::16] = anchor
        return x

    return make


_INPUTS: dict[str, Callable[[np.random.Generator, int, int], F32]] = {
    "normal": _scaled(1),
    "student": lambda rng, rows, cols: rng.standard_t(2, (rows, cols)).astype(np.float32),
    "bfloat16": lambda rng, rows, cols: (_scaled(1)(rng, rows, cols).view(np.uint32) & 0xFFFF0000).view(
        np.float32
    ),
    "sparse": lambda rng, rows, cols: _scaled(1)(rng, rows, cols) * (rng.random((rows, cols)) < 0.3),
    "nearly-empty": lambda rng, rows, cols: _scaled(1)(rng, rows, cols) * (rng.random((rows, cols)) < 0.02),
    "tiny": _scaled(1e-7),
    "around-1e-15": _scaled(4e-16),
    "squares-underflow": _scaled(1e-30),
    "near-smallest-normal": _scaled(2e-38),
    "reciprocal-overflows": _scaled(3e-39),
    "denormal": _scaled(1e-41),
    "zero": lambda rng, rows, cols: np.zeros((rows, cols), np.float32),
    "signed-zeros": lambda rng, rows, cols: np.copysign(np.float32(0), _scaled(1)(rng, rows, cols)),
    "constant": lambda rng, rows, cols: np.full((rows, cols), 0.37, np.float32),
    "negative-constant": lambda rng, rows, cols: np.full((rows, cols), -0.37, np.float32),
    "negative": lambda rng, rows, cols: -1 - np.abs(_scaled(1)(rng, rows, cols)),
    "positive": lambda rng, rows, cols: 1 + np.abs(_scaled(1)(rng, rows, cols)),
    "powers-of-two": lambda rng, rows, cols: _powers(rng, rows, cols, -20, 20),
    "below-powers-of-two": lambda rng, rows, cols: _ulps(
        _powers(rng, rows, cols, -20, 20), rng.integers(-50, 3, (rows, cols))
    ),
    "equal-magnitudes": lambda rng, rows, cols: rng.choice(np.array([-3, 3], np.float32), (rows, cols)),
    "halves": lambda rng, rows, cols: (rng.integers(-16, 17, (rows, cols)) / 2).astype(np.float32),
    "halves-of-127": _steps(127, 0.5, 254),
    "halves-of-8": _steps(-8, 0.5, 16),
    "halves-of-16": _steps(-16, 0.5, 32),
    "quarters-of-1": _steps(1, 0.25, 4),
    "quarters-of-6": _steps(6, 0.25, 24),
    "half-precision-limit": _scaled(65504),
    "above-448": _scaled(3000),
    "squares-overflow": _scaled(1e20),
    "huge": _scaled(1e37),
    "outlier": _outliers,
    "any-bits": _bits,
}
INPUTS = tuple(_INPUTS)


def make_input(name: str, rows: int, cols: int) -> F32:
    """The named distribution, always the same values."""
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    return np.ascontiguousarray(_INPUTS[name](rng, rows, cols), np.float32)


def importances(cols: int) -> dict[str, F32 | None]:
    """No importance matrix, and rows of one."""
    rng = np.random.default_rng(cols)
    gaps = rng.random(cols) * (rng.random(cols) < 0.5)
    gaps[cols // 4 : cols // 2] = 0
    return {
        "none": None,
        "uniform": np.ones(cols, np.float32),
        "random": rng.random(cols).astype(np.float32),
        "with-zeros": gaps.astype(np.float32),
        "wide": np.exp(8 * rng.standard_normal(cols)).astype(np.float32),
    }


def assert_quantizes_as_ggml(type: str, x: F32, weights: F32 | None = None) -> None:
    """Every instruction set, the NumPy reference included, gives ggml's bytes."""
    expected = ggml_oracle.quantize(type, x, weights)
    for isa in kernels.isas():
        assert_same_blocks(type, kernels.quantize(type, x, weights=weights, isa=isa), expected, x, isa)


def assert_same_blocks(type: str, got: U8, expected: U8, x: F32, isa: str) -> None:
    block = BLOCKS[type]
    differ = np.flatnonzero((got.reshape(-1, block.nbytes) != expected.reshape(-1, block.nbytes)).any(axis=1))
    if differ.size:
        first = int(differ[0])
        raise AssertionError(
            f"{type} on {isa}: {differ.size} of {got.size // block.nbytes} blocks differ, first {first}: "
            f"{got.reshape(-1, block.nbytes)[first].tolist()} instead of "
            f"{expected.reshape(-1, block.nbytes)[first].tolist()} for {x.reshape(-1, block.elems)[first].tolist()}"
        )


def assert_dequantizes_as_ggml(type: str, blocks: U8, cols: int) -> None:
    """Every instruction set gives ggml's floats bit for bit; of NaN only the place is compared."""
    expected = ggml_oracle.dequantize(type, blocks, cols)
    for isa in kernels.isas():
        got = kernels.dequantize(type, blocks, cols, isa=isa)
        assert np.array_equal(np.isnan(got), np.isnan(expected)), f"{type} on {isa}: NaN at other places"
        same = np.where(np.isnan(got), 0, got).view(np.uint32) == np.where(
            np.isnan(expected), 0, expected
        ).view(np.uint32)
        assert same.all(), f"{type} on {isa}: {np.count_nonzero(~same)} values differ"


def random_blocks(type: str, rows: int, blocks_per_row: int) -> U8:
    """Arbitrary bytes."""
    rng = np.random.default_rng(BLOCKS[type].ggml_id)
    return rng.integers(0, 256, (rows, blocks_per_row * BLOCKS[type].nbytes), dtype=np.uint8)
