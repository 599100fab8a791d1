"""MXFP4 and NVFP4: bytes and floats of ggml on every instruction set."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from lconvert import kernels
from lconvert.kernels.reference.fp4 import DOUBLED_E2M1, floor_log2, to_ue4m3, ue4m3_half
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

TYPES = ("MXFP4", "NVFP4")
ROWS, COLS = 5, 64 * 21
SMALLEST = np.float32(2.0**-125)  # MXFP4 blocks below it are undefined in ggml unless all zero


def _defined(type: str, x: np.ndarray) -> np.ndarray:
    """x with the blocks that ggml does not define replaced by zeros."""
    if type == "NVFP4":
        return x
    largest = np.abs(x).reshape(len(x), -1, 32).max(axis=2)
    return np.where(np.repeat(largest >= SMALLEST, 32, axis=1), x, np.float32(0))


@needs_ggml
@pytest.mark.parametrize("name", INPUTS)
@pytest.mark.parametrize("type", TYPES)
def test_quantize_equals_ggml(type: str, name: str) -> None:
    x = _defined(type, make_input(name, ROWS, COLS))
    assert_quantizes_as_ggml(type, x)
    assert_quantizes_as_ggml(type, x, importances(COLS)["random"])


@needs_ggml
@pytest.mark.parametrize("type", TYPES)
@settings(max_examples=40, deadline=None)
@given(raw=arrays(np.uint32, (2, 64), elements=st.integers(0, 0xFFFFFFFF)))
def test_any_finite_bits(type: str, raw: np.ndarray) -> None:
    x = np.where(np.isfinite(raw.view(np.float32)), raw.view(np.float32), np.float32(0))
    assert_quantizes_as_ggml(type, _defined(type, x))


@needs_ggml
def test_mxfp4_scale_around_every_power_of_two() -> None:
    """The largest values of blocks from 64 floats below to 2 above each power: where log2f rounds up."""
    powers = np.ldexp(np.float32(1), np.arange(-124, 128)).astype(np.float32)
    near = powers.view(np.int32)[:, None] + np.arange(-64, 3, dtype=np.int32)
    x = np.zeros((near.size, 32), np.float32)
    x[:, 7] = near.ravel().view(np.float32)
    x[:, 8] = -x[:, 7]
    x[:, 9] = x[:, 7] * np.float32(0.4)
    assert_quantizes_as_ggml("MXFP4", x)


def test_floor_log2_is_that_of_the_rounded_logarithm() -> None:
    """Against the double logarithm rounded to float32, on every binade."""
    exponents = np.arange(-126, 128, dtype=np.int32)
    near = ((exponents + 127) << 23)[:, None] + np.arange(-100, 100, dtype=np.int32)
    sample = np.random.default_rng(0).integers(0x00800000, 0x7F800000, 200_000, dtype=np.int32)
    bits = np.concatenate([near.ravel(), sample])
    x = bits[(bits >= 0x00800000) & (bits < 0x7F800000)].view(np.float32)
    assert np.array_equal(floor_log2(x), np.floor(np.log2(x.astype(np.float64)).astype(np.float32)))


@needs_ggml
def test_nvfp4_scale_for_every_magnitude() -> None:
    """Sub-blocks whose largest value runs through the upper 16 bits of all positive floats, with neighbours."""
    upper = np.arange(0, 0x7F80, dtype=np.uint32) << 16
    largest = np.concatenate([upper, upper + 1, upper + 0x8000, upper + 0xFFFF]).view(np.float32)
    x = np.zeros((largest.size, 16), np.float32)
    x[:, 3] = largest
    x[:, 4] = -largest * np.float32(0.21)
    assert_quantizes_as_ggml("NVFP4", x.reshape(-1, 64 * 255))


def test_ue4m3_bytes_survive() -> None:
    """Every finite byte whose value ggml does not saturate is its own nearest byte."""
    values = np.arange(0, 15 << 3, dtype=np.uint8)
    assert np.array_equal(to_ue4m3(ue4m3_half(values) * np.float32(2)), values)
    assert to_ue4m3(np.float32([255, 256, 448, 1e30])).tolist() == [0x7E, 0x7E, 0x7E, 0x7E]


@needs_ggml
@pytest.mark.parametrize("type", TYPES)
def test_dequantize_equals_ggml(type: str) -> None:
    assert_dequantizes_as_ggml(type, random_blocks(type, 9, 40), 40 * (32 if type == "MXFP4" else 64))


@pytest.mark.parametrize("type", TYPES)
def test_pack_inverts_unpack(type: str) -> None:
    blocks = random_blocks(type, 7, 50)
    assert np.array_equal(kernels.pack(type, kernels.unpack(type, blocks)), blocks)


def test_parts_mean_what_they_say() -> None:
    """value = E2M1 code times the E8M0 power of two, or times the UE4M3 scale."""
    x = make_input("student", ROWS, COLS)
    blocks = kernels.quantize("MXFP4", x, isa="reference")
    parts = kernels.unpack("MXFP4", blocks)
    assert parts["scale"].dtype == np.uint8 and parts["scale"].shape == (ROWS, COLS // 32)
    power = np.ldexp(np.float32(1), parts["scale"].astype(np.int32) - 127)
    values = DOUBLED_E2M1[parts["codes"]] / 2 * np.repeat(power, 32, axis=1)
    assert np.array_equal(kernels.dequantize("MXFP4", blocks, COLS, isa="reference"), values)

    blocks = kernels.quantize("NVFP4", x, isa="reference")
    parts = kernels.unpack("NVFP4", blocks)
    assert parts["scale"].dtype == np.uint8 and parts["scale"].shape == (ROWS, COLS // 16)
    values = DOUBLED_E2M1[parts["codes"]] * np.repeat(ue4m3_half(parts["scale"]), 16, axis=1)
    assert np.array_equal(kernels.dequantize("NVFP4", blocks, COLS, isa="reference"), values)
    assert not (parts["codes"] == 8).any()


def test_mxfp4_below_the_smallest_scale() -> None:
    """Documented choice where ggml converts a negative float to an unsigned byte."""
    x = np.linspace(-(2.0**-126), 2.0**-126, 32, dtype=np.float32)[None]
    for isa in kernels.isas():
        blocks = kernels.quantize("MXFP4", x, isa=isa)
        assert blocks[0, 0] == 0
        assert np.abs(kernels.dequantize("MXFP4", blocks, 32, isa=isa) - x).max() <= 2.0**-128
