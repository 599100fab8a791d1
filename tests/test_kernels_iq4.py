"""IQ4_NL and IQ4_XS: bytes and floats of ggml on every instruction set."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from lconvert import kernels
from lconvert.kernels.reference.iq4 import VALUES, nearest_code
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

TYPES = ("IQ4_NL", "IQ4_XS")
ROWS, COLS = 5, 256 * 5


@needs_ggml
@pytest.mark.parametrize("name", INPUTS)
@pytest.mark.parametrize("type", TYPES)
def test_quantize_equals_ggml(type: str, name: str) -> None:
    for weights in importances(COLS).values():
        assert_quantizes_as_ggml(type, make_input(name, ROWS, COLS), weights)


@needs_ggml
@pytest.mark.parametrize("type", TYPES)
@pytest.mark.parametrize("rows, cols", [(1, 256), (17, 256), (1, 4096)])
def test_every_shape(type: str, rows: int, cols: int) -> None:
    for weights in importances(cols).values():
        assert_quantizes_as_ggml(type, make_input("normal", rows, cols), weights)


@needs_ggml
@pytest.mark.parametrize("type", TYPES)
@settings(max_examples=30, deadline=None)
@given(raw=arrays(np.uint32, (1, 256), elements=st.integers(0, 0xFFFFFFFF)), weighted=st.booleans())
def test_any_finite_bits(type: str, raw: np.ndarray, weighted: bool) -> None:
    x = np.where(np.isfinite(raw.view(np.float32)), raw.view(np.float32), np.float32(0))
    assert_quantizes_as_ggml(type, x, np.abs(x[0]) / np.float32(3e38) if weighted else None)


@needs_ggml
@pytest.mark.parametrize("type", TYPES)
def test_dequantize_equals_ggml(type: str) -> None:
    assert_dequantizes_as_ggml(type, random_blocks(type, 9, 8), 256 if type == "IQ4_NL" else 2048)


def test_nearest_code_is_the_nearest_value() -> None:
    """Against exact distances, around every midpoint and far outside; the upper neighbour wins a tie."""
    middles = ((VALUES[1:] + VALUES[:-1]) / 2).astype(np.float32)
    around = (middles.view(np.int32)[:, None] + np.arange(-40, 41, dtype=np.int32)).view(np.float32).ravel()
    x = np.concatenate(
        [around, np.linspace(-300, 300, 20001, dtype=np.float32), np.float32([1e9, -1e9, 0, 1e-30])]
    )
    distance = np.abs(x.astype(np.float64)[:, None] - VALUES.astype(np.float64))
    upper_first = 15 - np.argmin(distance[:, ::-1], axis=1)
    assert np.array_equal(nearest_code(x), upper_first)
    assert nearest_code(np.float32([np.nan])).tolist() == [15]


@pytest.mark.parametrize("type", TYPES)
def test_pack_inverts_unpack(type: str) -> None:
    blocks = random_blocks(type, 7, 50)
    assert np.array_equal(kernels.pack(type, kernels.unpack(type, blocks)), blocks)


def test_parts_mean_what_they_say() -> None:
    """value = scale * VALUES[code], in IQ4_XS with a sub-scale in between."""
    x = make_input("student", ROWS, COLS)
    blocks = kernels.quantize("IQ4_NL", x, isa="reference")
    parts = kernels.unpack("IQ4_NL", blocks)
    assert parts["codes"].shape == x.shape and parts["scale"].shape == (ROWS, COLS // 32)
    values = np.repeat(parts["scale"].astype(np.float32), 32, axis=1) * VALUES[parts["codes"]]
    assert np.array_equal(kernels.dequantize("IQ4_NL", blocks, COLS, isa="reference"), values)

    blocks = kernels.quantize("IQ4_XS", x, isa="reference")
    parts = kernels.unpack("IQ4_XS", blocks)
    assert parts["super_scale"].shape == (ROWS, COLS // 256) and parts["scale"].shape == (ROWS, COLS // 32)
    assert parts["scale"].min() == -32 and parts["scale"].dtype == np.int8
    step = np.repeat(parts["super_scale"].astype(np.float32), 8, axis=1) * parts["scale"].astype(np.float32)
    values = np.repeat(step, 32, axis=1) * VALUES[parts["codes"]]
    assert np.array_equal(kernels.dequantize("IQ4_XS", blocks, COLS, isa="reference"), values)
