"""Rounding in groups: the compiled kernels against their NumPy specification, and that against the definition."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lconvert import kernels
from lconvert.errors import InputError
from lconvert.kernels import rounding
from lconvert.kernels.reference import rounding as reference

FLOATS = st.floats(-1e4, 1e4, width=32)


def arrays(seed: int, rows: int, count: int, group: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Values with ties, tiny and large ones; scales with zeros; zero points."""
    r = np.random.default_rng(seed)
    x = (r.standard_normal((rows, count * group)) * 10.0 ** r.integers(-6, 5, (rows, 1))).astype(np.float32)
    scale = (np.abs(r.standard_normal((rows, count))) * 10.0 ** r.integers(-6, 3)).astype(np.float32)
    scale[r.random(scale.shape) < 0.1] = 0
    cut = x.reshape(rows, count, group)
    cut[..., ::3] = (np.rint(cut[..., ::3]) + 0.5) * scale[..., None]  # ties
    return x, scale, r.integers(0, 16, scale.shape).astype(np.float32)


@pytest.mark.skipif(not kernels.native_available(), reason="compiled kernels missing")
@pytest.mark.parametrize("group", [1, 3, 8, 32, 128, 200])
@pytest.mark.parametrize("range_", [(-8, 7), (0, 15), (-128, 127), (0, 255)])
def test_compiled_is_the_specification(group: int, range_: tuple[int, int]) -> None:
    for seed in range(20):
        x, scale, zero = arrays(seed, 1 + seed % 5, 1 + seed % 4, group)
        for z in (None, zero):
            with np.errstate(over="ignore"):
                want = reference.round_groups(x, group, scale, z, *range_)
            assert np.array_equal(rounding.round_groups(x, group, scale, z, *range_), want)
        for got, expected in zip(
            rounding.group_extent(x, group), reference.group_extent(x, group), strict=True
        ):
            assert np.array_equal(got, expected)


@settings(max_examples=200, deadline=None)
@given(FLOATS, st.floats(2.0**-20, 1e3, width=32), st.integers(0, 15))
def test_the_definition(x: float, scale: float, zero: int) -> None:
    """To nearest, ties to even, of the quotient in fp32."""
    quotient = np.float32(x) / np.float32(scale)
    wanted = min(max(round(Fraction(float(quotient))) + zero, 0), 15)
    one = np.array([[x]], np.float32)
    got = rounding.round_groups(
        one, 1, np.array([[scale]], np.float32), np.array([[zero]], np.float32), 0, 15
    )
    assert got[0, 0] == wanted


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_refused(bad: float, monkeypatch: pytest.MonkeyPatch) -> None:
    x = np.zeros((4, 64), np.float32)
    x[2, 37] = bad
    with pytest.raises(InputError, match="NaN or infinite"):
        rounding.group_extent(x, 32)
    monkeypatch.setenv("LCONVERT_ISA", "reference")
    with pytest.raises(InputError, match="NaN or infinite"):
        rounding.group_extent(x, 32)
