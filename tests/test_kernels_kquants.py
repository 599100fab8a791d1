"""Q2_K .. Q6_K and the float casts: bytes and floats of ggml on every instruction set."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from numpy.typing import NDArray

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

TYPES = ("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K")
FLOATS = ("F32", "F16", "BF16")
ROWS, COLS = 3, 256 * 7  # 21 super-blocks: no multiple of any lane count
RANGES = {"Q2_K": (0, 3), "Q3_K": (-4, 3), "Q4_K": (0, 15), "Q5_K": (0, 31), "Q6_K": (-32, 31)}


@needs_ggml
@pytest.mark.parametrize("name", INPUTS)
@pytest.mark.parametrize("type", TYPES)
def test_quantize_equals_ggml(type: str, name: str) -> None:
    for weights in importances(COLS).values():
        assert_quantizes_as_ggml(type, make_input(name, ROWS, COLS), weights)


@needs_ggml
@pytest.mark.parametrize("type", TYPES)
def test_importance_of_zero(type: str) -> None:
    """A search without any weight keeps its first candidate."""
    assert_quantizes_as_ggml(type, make_input("student", ROWS, COLS), np.zeros(COLS, np.float32))


@needs_ggml
@pytest.mark.parametrize("type", TYPES)
@pytest.mark.parametrize("rows, cols", [(1, 256), (2, 256), (17, 256), (1, 256 * 33), (3, 768)])
def test_every_shape(type: str, rows: int, cols: int) -> None:
    for weights in importances(cols).values():
        assert_quantizes_as_ggml(type, make_input("normal", rows, cols), weights)


@needs_ggml
@pytest.mark.parametrize("type", TYPES)
def test_sub_blocks_of_very_different_size(type: str) -> None:
    """Most sub-scales round to zero, so the codes of the search stay: they must be the winner's."""
    x = make_input("normal", 8, 256 * 4)
    size = np.exp(5 * make_input("student", 8, 256 * 4 // 16).clip(-9, 9))
    x = x * np.repeat(size, 16, axis=1)
    for weights in importances(x.shape[1]).values():
        assert_quantizes_as_ggml(type, x, weights)


@needs_ggml
@pytest.mark.parametrize("type", TYPES)
@settings(max_examples=25, deadline=None)
@given(raw=arrays(np.uint32, (1, 256), elements=st.integers(0, 0xFFFFFFFF)), weighted=st.booleans())
def test_any_finite_bits(type: str, raw: NDArray[np.uint32], weighted: bool) -> None:
    values = raw.view(np.float32)
    x = np.where(np.isfinite(values), values, np.float32(0))
    assert_quantizes_as_ggml(type, x, np.abs(x[0]) / np.float32(3e38) if weighted else None)


@needs_ggml
@pytest.mark.parametrize("type", TYPES)
@settings(max_examples=25, deadline=None)
@given(
    raw=arrays(np.int8, (1, 256), elements=st.integers(-9, 9)),
    importance=arrays(np.int8, 256, elements=st.integers(0, 3)),
)
def test_small_integers(type: str, raw: NDArray[np.int8], importance: NDArray[np.int8]) -> None:
    """Ties of every kind, with few distinct values."""
    x = raw.astype(np.float32)
    assert_quantizes_as_ggml(type, x)
    assert_quantizes_as_ggml(type, x, importance.astype(np.float32))


@needs_ggml
@pytest.mark.parametrize("type", TYPES)
def test_dequantize_equals_ggml(type: str) -> None:
    assert_dequantizes_as_ggml(type, random_blocks(type, 9, 12), 256 * 12)


@pytest.mark.parametrize("type", TYPES + FLOATS)
def test_pack_inverts_unpack(type: str) -> None:
    blocks = random_blocks(type, 7, 16)
    assert np.array_equal(kernels.pack(type, kernels.unpack(type, blocks)), blocks)


@pytest.mark.parametrize("type", TYPES)
def test_parts_mean_what_they_say(type: str) -> None:
    """value = super_scale*scale*code - super_offset*offset, with codes in the range of the type."""
    x = make_input("student", ROWS, COLS)
    blocks = kernels.quantize(type, x, isa="reference")
    parts = kernels.unpack(type, blocks)
    sub = COLS // parts["scale"].shape[1]
    low, high = RANGES[type]
    assert parts["codes"].shape == (ROWS, COLS)
    assert (parts["codes"].min(), parts["codes"].max()) == (low, high)
    assert sub == (32 if type in ("Q4_K", "Q5_K") else 16)
    assert parts["super_scale"].shape == (ROWS, COLS // 256) and parts["super_scale"].dtype == np.float16

    def spread(super_part: str, part: str) -> NDArray[np.float32]:
        super_value = np.repeat(parts[super_part].astype(np.float32), 256 // sub, axis=1)
        return np.repeat(super_value * parts[part].astype(np.float32), sub, axis=1)

    values = spread("super_scale", "scale") * parts["codes"].astype(np.float32)
    if low == 0:
        values = values - spread("super_offset", "offset")
    else:
        assert "offset" not in parts and parts["codes"].dtype == parts["scale"].dtype == np.int8
    assert np.array_equal(values, kernels.dequantize(type, blocks, COLS))


@pytest.mark.parametrize(
    "type, bound", [("Q2_K", 0.35), ("Q3_K", 0.2), ("Q4_K", 0.09), ("Q5_K", 0.05), ("Q6_K", 0.025)]
)
def test_error_is_that_of_the_bit_width(type: str, bound: float) -> None:
    """Root mean square error on normal values relative to their size: a sanity check that needs no oracle."""
    x = make_input("normal", 8, 2048)
    error = kernels.dequantize(type, kernels.quantize(type, x), 2048) - x
    assert bound / 2 < float(np.sqrt(np.mean(error**2))) < bound


@needs_ggml
@pytest.mark.parametrize("name", INPUTS)
@pytest.mark.parametrize("type, limit", [("F32", 3.4e38), ("F16", 65519.0), ("BF16", 3.39e38)])
def test_casts_equal_ggml(type: str, limit: float, name: str) -> None:
    x = make_input(name, 3, 77).clip(-np.float32(limit), np.float32(limit))
    assert_quantizes_as_ggml(type, x)


@needs_ggml
@pytest.mark.parametrize("type", ["F16", "BF16"])
def test_widening_every_code_equals_ggml(type: str) -> None:
    codes = np.arange(65536, dtype=np.uint16).reshape(16, 4096)
    assert_dequantizes_as_ggml(type, codes.view(np.uint8), 4096)


@pytest.mark.parametrize("isa", kernels.isas())
def test_narrow_floats_round_trip(isa: str) -> None:
    """Every finite float16 and bfloat16 survives the way over float32."""
    codes = np.arange(65536, dtype=np.uint16).reshape(1, -1)
    for type, infinity in (("F16", 0x7C00), ("BF16", 0x7F80)):
        finite = codes[(codes & infinity) != infinity].reshape(1, -1)
        source: NDArray[Any] = finite.view(np.float16) if type == "F16" else finite
        assert np.array_equal(kernels.quantize(type, source, type, isa=isa).view(np.uint16), finite)
