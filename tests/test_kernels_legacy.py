"""Q4_0, Q4_1, Q5_0, Q5_1, Q8_0: bytes and floats of ggml on every instruction set."""

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

TYPES = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0")
ROWS, COLS = 5, 32 * 21  # 105 blocks: no multiple of any lane count


@needs_ggml
@pytest.mark.parametrize("name", INPUTS)
@pytest.mark.parametrize("type", TYPES)
def test_quantize_equals_ggml(type: str, name: str) -> None:
    for weights in importances(COLS).values():
        assert_quantizes_as_ggml(type, make_input(name, ROWS, COLS), weights)


@needs_ggml
@pytest.mark.parametrize("type", TYPES)
@pytest.mark.parametrize("rows, cols", [(1, 32), (2, 32), (17, 64), (33, 32), (1, 4096)])
def test_every_shape(type: str, rows: int, cols: int) -> None:
    for weights in importances(cols).values():
        assert_quantizes_as_ggml(type, make_input("normal", rows, cols), weights)


@needs_ggml
@pytest.mark.parametrize("type", TYPES)
@settings(max_examples=40, deadline=None)
@given(raw=arrays(np.uint32, (2, 32), elements=st.integers(0, 0xFFFFFFFF)), weighted=st.booleans())
def test_any_finite_bits(type: str, raw: np.ndarray, weighted: bool) -> None:
    x = np.where(np.isfinite(raw.view(np.float32)), raw.view(np.float32), np.float32(0))
    assert_quantizes_as_ggml(type, x, np.abs(x[0]) / np.float32(3e38) if weighted else None)


@needs_ggml
@pytest.mark.parametrize("type", TYPES)
def test_dequantize_equals_ggml(type: str) -> None:
    assert_dequantizes_as_ggml(type, random_blocks(type, 9, 40), 32 * 40)


@pytest.mark.parametrize("type", TYPES)
def test_pack_inverts_unpack(type: str) -> None:
    blocks = random_blocks(type, 7, 50)
    assert np.array_equal(kernels.pack(type, kernels.unpack(type, blocks)), blocks)


@pytest.mark.parametrize("type", TYPES)
def test_parts_mean_what_they_say(type: str) -> None:
    """value = scale * code - offset, with codes in the range of the type."""
    blocks = kernels.quantize(type, make_input("student", ROWS, COLS), isa="reference")
    parts = kernels.unpack(type, blocks)
    bits = int(type[1])
    low, high = (0, 2**bits - 1) if type.endswith("_1") else (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    assert parts["codes"].shape == (ROWS, COLS)
    assert low <= parts["codes"].min() < 0.8 * low + 0.2 * high and high == parts["codes"].max()
    assert parts["scale"].shape == (ROWS, COLS // 32) and parts["scale"].dtype == np.float16
    scale = np.repeat(parts["scale"].astype(np.float32), 32, axis=1)
    values = parts["codes"].astype(np.float32) * scale
    if type.endswith("_1"):
        values = values - np.repeat(parts["offset"].astype(np.float32), 32, axis=1)
    else:
        assert "offset" not in parts
    assert np.array_equal(kernels.dequantize(type, blocks, COLS, isa="reference"), values)


def test_known_blocks() -> None:
    """Written out by hand: the rounding rules of three types on one block."""
    x = np.zeros((1, 32), np.float32)
    x[0, :4] = [-8, 0.5, 1.5, 7.4]
    q4 = kernels.unpack("Q4_0", kernels.quantize("Q4_0", x))
    assert q4["scale"][0, 0] == 1 and q4["codes"][0, :5].tolist() == [-8, 1, 2, 7, 0]  # halves up
    x[0, :5] = [127, 0.5, -0.5, 2.5, 63.49]
    q8 = kernels.unpack("Q8_0", kernels.quantize("Q8_0", x))
    assert q8["scale"][0, 0] == 1 and q8["codes"][0, :6].tolist() == [127, 1, -1, 3, 63, 0]  # away from zero
    x = np.linspace(-2, 13, 32, dtype=np.float32)[None]
    q41 = kernels.unpack("Q4_1", kernels.quantize("Q4_1", x))
    assert (
        q41["scale"][0, 0] == 1 and q41["offset"][0, 0] == 2 and q41["codes"][0, [0, 31]].tolist() == [0, 15]
    )


@pytest.mark.parametrize("type, code", [("Q4_0", -8), ("Q5_0", -16), ("Q4_1", 0), ("Q5_1", 0), ("Q8_0", 0)])
def test_scale_without_reciprocal_gives_code_zero(type: str, code: int) -> None:
    """Documented choice where C leaves the conversion of infinity undefined."""
    x = np.linspace(-1e-40, 1e-40, 32, dtype=np.float32)[None]
    for isa in kernels.isas():
        parts = kernels.unpack(type, kernels.quantize(type, x, isa=isa))
        assert (parts["codes"] == code).all() and (parts["scale"] == 0).all()
