"""Rounding in groups: the compiled kernels against their NumPy specification, and that against the definition."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lconvert import kernels
from lconvert.errors import InputError
from lconvert.kernels import rounding, transpose
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


COMPILED = [i for i in kernels.isas() if i != "reference"]


@pytest.mark.skipif(not COMPILED, reason="compiled kernels missing")
@pytest.mark.parametrize("isa", COMPILED)
@pytest.mark.parametrize("group", [1, 3, 8, 32, 128, 200])
@pytest.mark.parametrize("range_", [(-8, 7), (0, 15), (-128, 127), (0, 255)])
def test_compiled_is_the_specification(
    isa: str, group: int, range_: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LCONVERT_ISA", isa)
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


def stored(x: np.ndarray, dtype: str) -> tuple[np.ndarray, np.ndarray]:
    """The array in a storage type, and the values it then has."""
    if dtype == "BF16":
        kept = (x.view(np.uint32) >> np.uint32(16)).astype(np.uint16)
        return kept, (kept.astype(np.uint32) << np.uint32(16)).view(np.float32)
    kept = np.clip(x, -6e4, 6e4).astype(np.float16) if dtype == "F16" else x
    return kept, kept.astype(np.float32)


@pytest.mark.skipif(not COMPILED, reason="compiled kernels missing")
@pytest.mark.parametrize("isa", COMPILED)
@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize(("signed", "signed_max"), [(True, False), (True, True), (False, False)])
def test_scales_by_extent_are_the_specification(
    isa: str, dtype: str, bits: int, signed: bool, signed_max: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Codes, scales and zero points: ties, zeros, one sign only, scales in fp16's subnormal range and beyond it; then the values."""
    monkeypatch.setenv("LCONVERT_ISA", isa)
    for seed in range(12):
        group = (1, 5, 16, 32, 100, 128)[seed % 6]
        x, _, _ = arrays(seed, 9, 3, group)
        x[0] = 0
        x[1], x[2] = np.abs(x[1]), -np.abs(x[2])
        x[3:7] *= np.float32([1e-3, 1e-6, 1e-8, 1e-30])[:, None]
        kept, wide = stored(x, dtype)
        want = reference.nearest_groups(wide, group, bits, signed, signed_max)
        got = rounding.nearest_groups(kept, group, bits, signed, signed_max)
        for a, b in zip(want, got, strict=True):
            assert (a is None) == (b is None)
            assert a is None or (np.array_equal(a, b) and not (np.signbit(b) & (b == 0)).any())
        codes, scale, zero = got
        held = codes if signed else codes.view(np.uint8)
        zeros = None if zero is None else zero.astype(np.float32)
        y = rounding.group_values(held, group, scale, zeros)
        assert np.array_equal(y, reference.group_values(held, group, scale, zeros))
        np.testing.assert_allclose(rounding.squares(kept, y), reference.squares(wide, y), rtol=1e-12)


@pytest.mark.skipif(not COMPILED, reason="compiled kernels missing")
def test_sums_of_squares_do_not_depend_on_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    x, _, _ = arrays(3, 7, 5, 13)
    y = (x * np.float32(0.9)).astype(np.float32)
    found = set()
    for isa in COMPILED:
        monkeypatch.setenv("LCONVERT_ISA", isa)
        found.add(rounding.squares(x, y))
    assert len(found) == 1


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("isa", kernels.isas())
@pytest.mark.parametrize("at", [0, 31, 37, 39])
def test_what_is_not_finite_has_no_scale(
    isa: str, bad: float, at: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LCONVERT_ISA", isa)
    x = np.zeros((4, 80), np.float32)
    x[2, at] = bad
    with pytest.raises(InputError, match="NaN or infinite"):
        rounding.nearest_groups(x, 40, 4, True)


@pytest.mark.parametrize("isa", (*kernels.isas()[:1], "reference"))
@pytest.mark.parametrize(("n", "k"), [(1, 1), (64, 64), (130, 70), (258, 3), (6, 200)])
def test_transposition(isa: str, n: int, k: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Slabs of rows become columns; codes are packed, the first in the low bits."""
    monkeypatch.setenv("LCONVERT_ISA", isa)
    r = np.random.default_rng(n * k)
    for dtype in (np.uint8, np.uint16, np.float32):
        x = r.integers(0, 255, (n, k)).astype(dtype)
        out = np.full((k, n + 5), 7, dtype)
        transpose.transpose_rows(x[: n // 2], out, 2)
        transpose.transpose_rows(x[n // 2 :], out, 2 + n // 2)
        assert np.array_equal(out[:, 2 : n + 2], x.T)
        assert (out[:, :2] == 7).all() and (out[:, n + 2 :] == 7).all()
    bf16 = r.integers(0, 1 << 15, (n, k)).astype(np.uint16)
    wide = np.zeros((k, n), np.float32)
    transpose.transpose_rows(bf16, wide, 0)
    assert np.array_equal(wide.view(np.uint32) >> 16, bf16.T)
    for bits in (2, 4, 8):
        per = 8 // bits
        if n % (2 * per):
            continue
        codes = r.integers(-(1 << (bits - 1)), 1 << (bits - 1), (n, k)).astype(np.int8)
        out = np.zeros((k, n // per), np.uint8)
        transpose.pack_transposed(codes[: n // 2], bits, out, 0)
        transpose.pack_transposed(codes[n // 2 :], bits, out, n // 2)
        fields = [(out >> (bits * p)) & ((1 << bits) - 1) for p in range(per)]
        assert np.array_equal(np.stack(fields, -1).reshape(k, n), codes.T.view(np.uint8) & ((1 << bits) - 1))
