"""Restating a QTensor keeps every number, in exact arithmetic, and gives up only where there is no such form."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from lconvert.converters import regrid
from lconvert.ir import E2M1, E4M3, E8M0, Grid, QTensor, Tensor, dense, int_grid, row_blocks
from tests.exact_values import bits, same, side_value, storable, values

_STEPS = settings(max_examples=60, deadline=None)
_GRIDS = [int_grid(b, s) for b in range(2, 9) for s in (True, False)] + [E2M1, E4M3]


def _codes(rng: np.random.Generator, grid: Grid, shape: tuple[int, int]) -> Tensor:
    if grid.kind == "int" and grid.signed:
        half = 1 << (grid.bits - 1)
        return dense(rng.integers(-half, half, shape).astype(np.int8))
    top = len(grid.values) if grid.kind == "codebook" else 1 << grid.bits
    found = rng.integers(0, top, shape).astype(np.uint8)
    if grid == E4M3:
        found[(found & 0x7F) == 0x7F] = 0x7E
    return dense(found)


def _scale(rng: np.random.Generator, shape: tuple[int, int], dtype: str, short: bool) -> Tensor:
    """Random positive scales of 1/64 to 1: with the type's full mantissa, or with five bits."""
    x = rng.uniform(1 / 64, 1, shape).astype(np.float32)
    if short:
        mantissa, exponent = np.frexp(x)
        x = np.ldexp(np.rint(mantissa * 32), exponent - 5).astype(np.float32)
    data = bits(x, dtype)
    return dense(data, "BF16") if dtype == "BF16" else dense(data)


@st.composite
def tensors(draw: Any, grids: list[Grid] = _GRIDS, zeros: str = "any") -> QTensor:
    """Small QTensors with plain scales: all heights of blocks, per group, row and tensor."""
    rng = np.random.default_rng(draw(st.integers(0, 10_000)))
    grid = draw(st.sampled_from(grids))
    rows, count, width = draw(st.integers(1, 5)), draw(st.integers(1, 3)), draw(st.sampled_from([2, 4]))
    whole = draw(st.booleans())
    height = draw(st.sampled_from([1, 2, -1]))
    cols = count * width
    block = (height, -1 if whole else width)
    side = (1 if height == -1 else -(-rows // height), 1 if whole else count)
    scale = _scale(rng, side, draw(st.sampled_from(["F16", "BF16", "F32"])), draw(st.booleans()))
    zero = None
    if grid.kind == "int" and not grid.signed:
        kind = draw(st.sampled_from(["middle", "range", "beyond", "float"])) if zeros == "any" else zeros
        middle = np.full(side, 1 << (grid.bits - 1), np.uint8)
        found: Any = {
            "middle": lambda: middle,
            "range": lambda: rng.integers(0, 1 << grid.bits, side).astype(np.uint8),
            "beyond": lambda: rng.integers(-3, (1 << grid.bits) + 3, side).astype(np.int16),
            "float": lambda: (rng.integers(0, 2 << grid.bits, side) / 2).astype(np.float16),
        }[kind]()
        zero = dense(found)
    return QTensor((rows, cols), _codes(rng, grid, (rows, cols)), grid, block, scale, zero)


def _reads_in_slabs(q: QTensor) -> None:
    """Rows one at a time are the rows of the whole."""
    whole = q.codes.load()
    for row in range(q.rows):
        assert np.array_equal(q.codes.read(row, row + 1), whole[row : row + 1])


@given(tensors())
@_STEPS
def test_integers_say_the_same_numbers(q: QTensor) -> None:
    found = regrid.integers(q)
    if found is None:
        possible = q.grid != E4M3 and (q.zero is None or not bool((regrid.numbers(q.zero) % 1).any()))
        assert not possible, "whole codes, plain scale and whole zero points have a form"
        return
    assert found.grid.kind == "int" and found.grid.bits <= 8 and isinstance(found.scale, Tensor)
    assert found.grid.signed == (found.codes.dtype == "I8") and (found.zero is None) <= found.grid.signed
    assert same(q, found)
    _reads_in_slabs(found)


@given(
    table=st.lists(st.integers(-140, 140), min_size=2, max_size=16),
    power=st.integers(-12, 12),
    seed=st.integers(0, 99),
)
@_STEPS
def test_a_codebook_of_multiples_of_a_power_of_two_is_integers(
    table: list[int], power: int, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    step = 2.0**power
    grid = Grid("codebook", 4, values=tuple(v * step for v in table))
    scale = dense(rng.uniform(1e-3, 1, (2, 1)).astype(np.float16))
    q = QTensor((2, 6), _codes(rng, grid, (2, 6)), grid, (1, -1), scale)
    found = regrid.integers(q)
    if found is None:
        assert power > 0 or not all(-128 <= v <= 127 for v in table)
    else:
        assert same(q, found) and found.grid.bits <= 8


def test_codebooks_of_other_numbers_are_refused() -> None:
    grid = Grid("codebook", 2, values=(-1.0, -1 / 3, 1 / 3, 1.0))
    q = QTensor((1, 4), dense(np.arange(4, dtype=np.uint8)[None]), grid, (1, -1), dense(np.float32([[1]])))
    assert regrid.integers(q) is None
    lattice = Grid("codebook", 4, values=(1.0, 2.0), lattice="IQ2_S")
    q = replace(q, codes=dense(np.array([[0, 1, 0, 1]], np.uint8)), grid=lattice)
    assert regrid.integers(q) is None, "its codes are restricted, which integers would forget"


def test_halves_of_subnormal_scales_are_not_lost() -> None:
    """E2M1's values are halves: integers need half the scale, which the smallest numbers do not have."""
    codes = dense(np.array([[1, 2, 7, 15]], np.uint8))
    for exponent, exact in ((-149, False), (-148, True), (-24, True)):
        q = QTensor((1, 4), codes, E2M1, (1, -1), dense(np.array([[2.0**exponent]], np.float32)))
        found = regrid.integers(q)
        assert (found is not None) == exact, exponent
        assert found is None or same(q, found)
    small = QTensor((1, 4), codes, E2M1, (1, -1), dense(np.array([[2.0**-24]], np.float16)))
    found = regrid.integers(small)
    assert found is not None and same(small, found) and found.scale.dtype == "F32"  # type: ignore[union-attr]


@given(tensors([int_grid(b, s) for b in range(2, 9) for s in (True, False)]), st.integers(2, 8))
@_STEPS
def test_asymmetric_codes_are_the_same_numbers(q: QTensor, width: int) -> None:
    whole = regrid.integers(q)
    assume(whole is not None)
    assert whole is not None
    found = regrid.asymmetric(whole, width)
    if found is None:
        zero = None if whole.zero is None else regrid.numbers(whole.zero)
        outside = zero is not None and (zero.min() < 0 or zero.max() >= 1 << width)
        assert whole.grid.bits > width or outside
        return
    assert found.grid == int_grid(width, False) and found.codes.dtype == "U8"
    assert found.zero is not None and found.zero.dtype == "U8" and found.zero.load().max() < 1 << width
    assert same(q, found) and int(found.codes.load().max()) < 1 << width
    _reads_in_slabs(found)


@given(tensors([int_grid(b, s) for b in range(2, 9) for s in (True, False)]), st.integers(2, 8))
@_STEPS
def test_symmetric_codes_are_the_same_numbers(q: QTensor, width: int) -> None:
    whole = regrid.integers(q)
    assume(whole is not None)
    assert whole is not None
    found = regrid.symmetric(whole, width)
    least, most = -(1 << (width - 1)), (1 << (width - 1)) - 1
    if found is None:
        codes = (
            range(1 << whole.grid.bits)
            if not whole.grid.signed
            else range(-(1 << (whole.grid.bits - 1)), 1 << (whole.grid.bits - 1))
        )
        zeros = (
            [Fraction(0)]
            if whole.zero is None
            else {Fraction(float(z)) for z in regrid.numbers(whole.zero).flat}
        )
        assert any(not least <= c - z <= most for c in codes for z in zeros), "every difference was in range"
        return
    assert found.grid == int_grid(width, True) and found.zero is None
    assert found.codes.load().min() >= least and found.codes.load().max() <= most
    assert same(q, found)
    _reads_in_slabs(found)


@given(tensors(), st.sampled_from([1, 2, 4, 6, 8, -1]))
@_STEPS
def test_finer_groups_hold_the_same_numbers(q: QTensor, size: int) -> None:
    found = regrid.regrouped(q, size)
    cols = q.shape[1]
    now, want = (cols if n == -1 else n for n in (q.block[1], size))
    if found is None:
        assert now % want or cols % want
        return
    assert found.block == (1, size) and found.scale.shape == (q.rows, cols // want)
    assert same(q, found)


@given(tensors(), st.permutations(["F16", "BF16", "F32"]), st.integers(1, 3))
@_STEPS
def test_scales_take_the_first_type_that_holds_them(q: QTensor, order: list[str], count: int) -> None:
    allowed = order[:count]
    assert isinstance(q.scale, Tensor)
    numbers = [Fraction(float(x)) for x in regrid.numbers(q.scale).flat]
    fit = [d for d in allowed if all(storable(x, d) for x in numbers)]
    found = regrid.with_scale_dtype(q, allowed)
    if found is None:
        assert not fit
        return
    assert isinstance(found.scale, Tensor)
    assert found.scale.dtype == (q.scale.dtype if q.scale.dtype in allowed else fit[0])
    assert same(q, found)


def test_a_promise_of_the_maker_is_taken_without_looking() -> None:
    """Scales that know which types hold them are not read while a plan is made."""

    def read(start: int, stop: int) -> Any:
        raise AssertionError("was read")

    scale = Tensor((4, 2), "F16", read, exact_in=("BF16",))
    q = QTensor((4, 8), dense(np.zeros((4, 8), np.int8)), int_grid(4, True), (1, 4), scale)
    found = regrid.with_scale_dtype(q, ("BF16",))
    assert found is not None and found.scale.dtype == "BF16" and found.scale.exact_in == ("BF16",)  # type: ignore[union-attr]
    finer = regrid.regrouped(q, 2)
    assert finer is not None and regrid.holds(finer.scale, "BF16")  # type: ignore[arg-type]


@given(
    x=st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1, max_size=8),
    dtype=st.sampled_from(["F16", "BF16", "F32"]),
)
@settings(max_examples=300, deadline=None)
def test_fits_is_the_definition_of_the_types(x: list[float], dtype: str) -> None:
    numbers = np.array([x], np.float32)
    exact = all(storable(Fraction(v), dtype) for v in x)
    assert regrid.fits(numbers, dtype) == exact
    if exact:
        held = regrid.nearest(numbers, dtype)
        back = dense(held, "BF16") if dtype == "BF16" else dense(held)
        assert np.array_equal(regrid.numbers(back), numbers)


def test_a_negative_zero_becomes_zero() -> None:
    recast = regrid.recast(dense(np.array([[-0.0, 1.0]], np.float32)), "F16").load()
    assert recast.tobytes() == np.array([[0.0, 1.0]], np.float16).tobytes()


@pytest.mark.parametrize("dtype", ["F16", "BF16"])
def test_nearest_is_torchs_rounding(dtype: str) -> None:
    torch = pytest.importorskip("torch", reason="torch is not installed")
    rng = np.random.default_rng(0)
    wild = rng.integers(0, 1 << 32, 20_000, dtype=np.uint32).view(np.float32)
    near = (rng.integers(0, 1 << 16, 5_000, dtype=np.uint32) << 16 | np.uint32(0x8000)).view(
        np.float32
    )  # BF16's ties
    x = np.concatenate([wild, near])
    x = x[np.isfinite(x) & (np.abs(x) < 60_000 if dtype == "F16" else np.abs(x) < 3e38)]
    theirs = torch.from_numpy(x).to(torch.float16 if dtype == "F16" else torch.bfloat16)
    assert np.array_equal(regrid.nearest(x, dtype).view(np.int16), theirs.view(torch.int16).numpy())


# --- two levels of scales --------------------------------------------------------------------------------


@given(
    inner=st.sampled_from([int_grid(6, False), int_grid(8, True), E4M3, E8M0]),
    outer=st.sampled_from(["F16", "BF16", "F32"]),
    divisor=st.booleans(),
    per=st.sampled_from([(-1, -1), (1, 2), (1, -1)]),
    seed=st.integers(0, 999),
    power=st.booleans(),
)
@_STEPS
def test_two_levels_become_one_where_fp32_holds_every_product(
    inner: Grid, outer: str, divisor: bool, per: tuple[int, int], seed: int, power: bool
) -> None:
    rng = np.random.default_rng(seed)
    local = (
        rng.integers(100, 140, (3, 4)).astype(np.uint8)
        if inner == E8M0
        else _codes(rng, inner, (3, 4)).load()
    )
    side = (1 if per[0] == -1 else 3, 1 if per[1] == -1 else 2)
    scale = _scale(rng, side, outer, short=False)
    if power:
        exact = bits(2.0 ** rng.integers(-9, 9, side), outer)
        scale = dense(exact, "BF16") if outer == "BF16" else dense(exact)
    s = QTensor((3, 4), dense(local), inner, per, scale, divisor=divisor)
    q = QTensor((3, 16), _codes(rng, E2M1, (3, 16)), E2M1, (1, 4), s)
    found = regrid.plain_scale(q)
    products = [side_value(s, r, c) for r in range(3) for c in range(4)]
    if found is None:
        assert not all(storable(p, "F32") for p in products)
    else:
        assert isinstance(found.scale, Tensor) and same(q, found)


@given(
    st.lists(st.floats(2.0**-149, 2.0**127, width=32), min_size=1, max_size=3), st.booleans(), st.booleans()
)
@settings(max_examples=200, deadline=None)
def test_divisors_become_multipliers_where_they_are_powers_of_two(
    x: list[float], power: bool, nested: bool
) -> None:
    numbers = np.array([x], np.float32).T
    if power:
        numbers = np.ldexp(np.float32(0.5), np.frexp(numbers)[1]).astype(np.float32)
    codes = dense(np.arange(len(x) * 2, dtype=np.int8).reshape(-1, 2))
    q = QTensor((len(x), 2), codes, int_grid(8, True), (1, -1), dense(numbers), divisor=True)
    if nested:
        ones = dense(np.ones((len(x), 2), np.int8))
        q = QTensor((len(x), 2), ones, int_grid(2, True), (1, 1), q)
    found = regrid.multiplied(q)
    possible = all(storable(1 / Fraction(float(v)), "F32") for v in numbers.flat)
    assert (found is not None) == possible
    if found is not None:
        assert same(q, found) and not found.divisor
        assert not isinstance(found.scale, QTensor) or not found.scale.divisor


def test_a_plain_divisor_is_not_read_as_a_multiplier() -> None:
    """Transformers' BitNet divides by its scale: integers(q) must not multiply by it."""
    codes = dense(np.array([[-1, 0, 1, 1]], np.int8))
    for value, exact in ((8.0, True), (3.0, False)):
        q = QTensor(
            (1, 4), codes, int_grid(2, True), (-1, -1), dense(np.array([[value]], np.float32)), divisor=True
        )
        found = regrid.integers(q)
        assert (found is not None) == exact
        assert found is None or same(q, found)


# --- minima ----------------------------------------------------------------------------------------------


@given(seed=st.integers(0, 999), whole=st.booleans(), width=st.integers(2, 8))
@_STEPS
def test_a_minimum_becomes_a_zero_point_where_it_is_whole_steps(seed: int, whole: bool, width: int) -> None:
    rng = np.random.default_rng(seed)
    scale = _scale(rng, (2, 2), "F16", short=True)
    top = 1 << width
    zero = rng.integers(-1 if seed % 5 == 0 else 0, top + (seed % 7 == 0), (2, 2))
    offset = regrid.numbers(scale) * zero.astype(np.float32)
    if not whole:
        offset = offset + np.float32(2.0**-12)
    codes = _codes(rng, int_grid(width, False), (2, 8))
    q = QTensor((2, 8), codes, int_grid(width, False), (1, 4), scale, offset=dense(offset.astype(np.float32)))
    found = regrid.integers(q)
    steps = offset.astype(np.float64) / regrid.numbers(scale)
    possible = bool(((steps == np.rint(steps)) & (steps >= 0) & (steps < top)).all())
    assert (found is not None) == possible
    assert found is None or (found.offset is None and same(q, found))


def test_a_minimum_over_a_scale_of_zero() -> None:
    """All weights of a constant group are its minimum: no scale says that with a zero point."""
    codes = dense(np.zeros((1, 4), np.uint8))
    for offset, exact in ((0.0, True), (0.5, False)):
        q = QTensor((1, 4), codes, int_grid(4, False), (1, -1), dense(np.zeros((1, 1), np.float16)),
                    offset=dense(np.array([[offset]], np.float16)))  # fmt: skip
        found = regrid.integers(q)
        assert (found is not None) == exact
        assert found is None or same(q, found)


# --- what is left alone ----------------------------------------------------------------------------------


def test_act_order_masks_and_corrections_are_not_plain() -> None:
    q = QTensor(
        (2, 4),
        dense(np.zeros((2, 4), np.int8)),
        int_grid(4, True),
        (1, 2),
        dense(np.ones((2, 2), np.float32)),
    )
    assert regrid.is_plain(q) and regrid.integers(q) is not None
    for extra in (
        {"g_idx": dense(np.array([0, 1, 0, 1], np.int32))},
        {"mask": dense(np.ones((2, 4), bool))},
        {"outliers": {"values": dense(np.ones(1, np.float32))}},
        {"low_rank": (dense(np.ones((1, 4), np.float32)), dense(np.ones((2, 1), np.float32)))},
    ):
        assert regrid.integers(replace(q, **extra)) is None


@given(tensors())
@_STEPS
def test_row_blocks_say_the_same_numbers(q: QTensor) -> None:
    found = row_blocks(q)
    assert found.block[0] == 1 and same(q, found)
    assert found.scale.shape[0] == q.rows
    for row in range(q.rows):
        assert np.array_equal(found.scale.read(row, row + 1), found.scale.load()[row : row + 1])  # type: ignore[union-attr]


def test_values_are_the_definition() -> None:
    """The oracle itself, on numbers computed by hand."""
    q = QTensor((1, 2), dense(np.array([[5, 9]], np.uint8)), int_grid(4, False), (1, 2), dense(np.float32([[0.5]])),
                dense(np.uint8([[3]])), dense(np.float32([[0.25]])))  # fmt: skip
    assert values(q) == [[Fraction(3, 4), Fraction(11, 4)]]
