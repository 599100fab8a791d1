"""TQ1_0 and TQ2_0: bytes and floats of ggml on every instruction set."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from lconvert import kernels
from tests import ggml_oracle
from tests.kernel_cases import (
    INPUTS,
    assert_dequantizes_as_ggml,
    assert_quantizes_as_ggml,
    importances,
    make_input,
    random_blocks,
)

needs_ggml = pytest.mark.skipif(ggml_oracle.MISSING is not None, reason=str(ggml_oracle.MISSING))

TYPES = ("TQ1_0", "TQ2_0")
ROWS, COLS = 5, 256 * 5


@needs_ggml
@pytest.mark.parametrize("name", INPUTS)
@pytest.mark.parametrize("type", TYPES)
def test_quantize_equals_ggml(type: str, name: str) -> None:
    x = make_input(name, ROWS, COLS)
    assert_quantizes_as_ggml(type, x)
    assert_quantizes_as_ggml(type, x, importances(COLS)["random"])


@needs_ggml
@pytest.mark.parametrize("type", TYPES)
@settings(max_examples=30, deadline=None)
@given(raw=arrays(np.uint32, (1, 256), elements=st.integers(0, 0xFFFFFFFF)))
def test_any_finite_bits(type: str, raw: np.ndarray) -> None:
    x = np.where(np.isfinite(raw.view(np.float32)), raw.view(np.float32), np.float32(0))
    assert_quantizes_as_ggml(type, x)


@needs_ggml
@pytest.mark.parametrize("type", TYPES)
def test_every_digit_string(type: str) -> None:
    """All 3**5 contents of a TQ1_0 byte (TQ2_0: of four 2-bit fields and the next one), at every place in the block."""
    digits = np.array(np.unravel_index(np.arange(243), (3,) * 5)).T - 1
    x = np.zeros((243, 256), np.float32)
    for first, nbytes, count in ((0, 32, 5), (160, 16, 5), (240, 4, 4)):
        for k in range(count):
            x[:, first + k * nbytes : first + (k + 1) * nbytes] = digits[:, k, None]
    x *= np.float32(0.75)
    assert_quantizes_as_ggml(type, x)
    assert np.array_equal(kernels.dequantize(type, kernels.quantize(type, x), 256), x)


@needs_ggml
@pytest.mark.parametrize("type", TYPES)
def test_dequantize_equals_ggml(type: str) -> None:
    assert_dequantizes_as_ggml(type, random_blocks(type, 9, 40), 256 * 40)


def test_pack_inverts_unpack() -> None:
    blocks = random_blocks("TQ2_0", 7, 50)
    assert np.array_equal(kernels.pack("TQ2_0", kernels.unpack("TQ2_0", blocks)), blocks)


def test_pack_makes_tq1_0_canonical() -> None:
    """Blocks as quantised survive; arbitrary bytes change at most once and keep their values."""
    quantized = kernels.quantize("TQ1_0", make_input("normal", ROWS, COLS))
    assert np.array_equal(kernels.pack("TQ1_0", kernels.unpack("TQ1_0", quantized)), quantized)
    blocks = random_blocks("TQ1_0", 7, 50)
    parts = kernels.unpack("TQ1_0", blocks)
    packed = kernels.pack("TQ1_0", parts)
    again = kernels.unpack("TQ1_0", packed)
    assert np.array_equal(again["codes"], parts["codes"])
    assert np.array_equal(again["scale"].view(np.uint16), parts["scale"].view(np.uint16))
    assert np.array_equal(kernels.pack("TQ1_0", again), packed)
    assert not np.array_equal(packed, blocks)


@pytest.mark.parametrize("type", TYPES)
def test_parts_mean_what_they_say(type: str) -> None:
    x = make_input("student", ROWS, COLS)
    blocks = kernels.quantize(type, x, isa="reference")
    parts = kernels.unpack(type, blocks)
    largest = np.abs(x).reshape(ROWS, -1, 256).max(axis=2)
    assert np.array_equal(parts["scale"], largest.astype(np.float16))
    expected = np.trunc(
        2 * x.astype(np.float64) / np.repeat(largest, 256, axis=1)
    )  # no value lies near a tie
    assert np.array_equal(parts["codes"], np.sign(expected) + 1)
    values = (parts["codes"].astype(np.float32) - 1) * np.repeat(
        parts["scale"].astype(np.float32), 256, axis=1
    )
    assert np.array_equal(kernels.dequantize(type, blocks, COLS, isa="reference"), values)
