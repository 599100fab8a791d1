"""Rows of QTensors taken and stacked: views that keep every number, whatever the blocks."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from lconvert.ir import (
    E2M1,
    E4M3,
    QTensor,
    Tensor,
    concat_quantized,
    concat_rows,
    dense,
    int_grid,
    take_quantized,
)
from lconvert.kernels.qtensor import dequantize
from tests.exact_values import values

_STEPS = settings(max_examples=80, deadline=None)


def matrix(
    rng: np.random.Generator,
    rows: int,
    block: tuple[int, int],
    *,
    cols: int = 8,
    kind: str = "int",
    zero: bool = False,
) -> QTensor:
    """Random numbers in blocks of any height; kind nested has scales of two levels."""
    count = (1 if block[0] == -1 else -(-rows // block[0]), 1 if block[1] == -1 else -(-cols // block[1]))
    scale: Any = dense(rng.uniform(0.5, 2, count).astype(np.float32))
    if kind == "nested":
        local = dense(rng.integers(1, 0x7E, count).astype(np.uint8))
        scale = QTensor(count, local, E4M3, (-1, -1), dense(rng.uniform(0.5, 2, (1, 1)).astype(np.float32)))
    grid = {"int": int_grid(4, not zero), "nested": E2M1, "fp8": E4M3}[kind]
    signed = grid.kind == "int" and grid.signed
    codes = (
        rng.integers(-8, 8, (rows, cols)).astype(np.int8)
        if signed
        else rng.integers(0, 16, (rows, cols)).astype(np.uint8)
    )
    side = dense(rng.integers(0, 16, count).astype(np.uint8)) if zero else None
    return QTensor((rows, cols), dense(codes), grid, block, scale, side)


def _slabs(q: QTensor, whole: NDArray[np.float32]) -> None:
    for start in range(q.rows):
        for stop in (start + 1, min(start + 3, q.rows), q.rows):
            assert np.array_equal(dequantize(q, start, stop), whole[start:stop])


@st.composite
def cases(draw: Any) -> tuple[QTensor, tuple[tuple[int, int], ...]]:
    rng = np.random.default_rng(draw(st.integers(0, 9999)))
    rows = draw(st.integers(2, 13))
    block = draw(st.sampled_from([(1, 4), (1, -1), (-1, -1), (3, 3), (4, 8), (5, -1), (-1, 4)]))
    kind = draw(st.sampled_from(["int", "fp8", "nested"]))
    q = matrix(rng, rows, block, kind=kind, zero=kind == "int" and draw(st.booleans()))
    ranges = []
    for _ in range(draw(st.integers(1, 3))):
        a = draw(st.integers(0, rows - 1))
        ranges.append((a, draw(st.integers(a + 1, rows))))
    return q, tuple(ranges)


@given(cases())
@_STEPS
def test_taken_rows_are_the_rows(case: tuple[QTensor, tuple[tuple[int, int], ...]]) -> None:
    q, ranges = case
    whole = dequantize(q)
    want = np.concatenate([whole[a:b] for a, b in ranges])
    found = take_quantized(q, ranges)
    assert found.shape == want.shape and np.array_equal(dequantize(found), want)
    _slabs(found, want)


@pytest.mark.parametrize("kind", ["int", "fp8", "nested"])
def test_blocks_of_two_dimensions_stay_blocks_where_ranges_do_not_cut_them(kind: str) -> None:
    q = matrix(np.random.default_rng(0), 10, (4, 4), kind=kind)
    assert take_quantized(q, ((4, 8),)).block == (4, 4)
    assert take_quantized(q, ((8, 10),)).block == (4, 4), "the short block at the end"
    assert take_quantized(q, ((4, 8), (0, 4))).block == (4, 4)
    assert take_quantized(q, ((2, 6),)).block == (1, 4)
    back = take_quantized(
        q, ((8, 10), (0, 8))
    )  # the short block comes first: it would be filled up with other rows
    whole = dequantize(q)
    assert np.array_equal(dequantize(back), np.concatenate([whole[8:], whole[:8]]))


@given(
    rows=st.lists(st.integers(1, 9), min_size=1, max_size=4),
    heights=st.lists(st.sampled_from([1, 2, 3, -1]), min_size=4, max_size=4),
    alike=st.booleans(),
    width=st.sampled_from([4, 8, -1]),
    kind=st.sampled_from(["int", "fp8", "nested", "zero"]),
    seed=st.integers(0, 999),
)
@_STEPS
def test_stacked_parts_are_their_rows(
    rows: list[int], heights: list[int], alike: bool, width: int, kind: str, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    zero, kind = kind == "zero", "int" if kind == "zero" else kind
    listed = heights[:1] * 4 if alike else heights
    parts = tuple(
        matrix(rng, n, (h, width), kind=kind, zero=zero) for n, h in zip(rows, listed, strict=False)
    )
    found = concat_quantized(parts)
    want = np.concatenate([dequantize(p) for p in parts])
    assert np.array_equal(dequantize(found), want)
    _slabs(found, want)


@given(cases())
@_STEPS
def test_cutting_and_stacking_gives_the_same_numbers_back(
    case: tuple[QTensor, tuple[tuple[int, int], ...]],
) -> None:
    q, ranges = case
    edges = sorted({0, q.rows, *(a for a, _ in ranges)})
    parts = tuple(take_quantized(q, (span,)) for span in pairwise(edges))
    assert np.array_equal(dequantize(concat_quantized(parts)), dequantize(q))


def test_equal_scales_of_whole_tensors_stay_one() -> None:
    """q, k and v with tied scales are one matrix with one scale."""
    rng = np.random.default_rng(0)
    scale = dense(np.float32([[0.25]]))
    parts = tuple(replace(matrix(rng, n, (-1, -1), kind="fp8"), scale=scale) for n in (4, 2, 2))
    found = concat_quantized(parts)
    assert found.block == (-1, -1) and found.scale.shape == (1, 1)
    other = replace(parts[1], scale=dense(np.float32([[0.5]])))
    assert concat_quantized((parts[0], other)).block == (1, -1)


def test_globals_of_nested_scales_stay_one_where_equal() -> None:
    rng = np.random.default_rng(0)
    a, b = matrix(rng, 4, (1, 4), kind="nested"), matrix(rng, 2, (1, 4), kind="nested")
    assert isinstance(a.scale, QTensor) and isinstance(b.scale, QTensor)
    tied = replace(b, scale=replace(b.scale, scale=a.scale.scale))
    found = concat_quantized((a, tied))
    assert isinstance(found.scale, QTensor) and found.scale.block == (-1, -1)
    untied = concat_quantized((a, b))
    assert isinstance(untied.scale, QTensor) and untied.scale.block == (1, -1)
    assert np.array_equal(dequantize(untied), np.concatenate([dequantize(a), dequantize(b)]))


def _changed(q: QTensor, **changes: Any) -> QTensor:
    return replace(q, **changes)


@pytest.mark.parametrize(
    "change",
    [
        lambda q: _changed(q, grid=int_grid(8, True)),
        lambda q: _changed(q, divisor=True),
        lambda q: _changed(q, block=(q.block[0], 4), scale=dense(np.ones((q.scale.shape[0], 2), np.float32))),
        lambda q: _changed(q, zero=dense(np.zeros(q.scale.shape, np.uint8))),
        lambda q: _changed(q, g_idx=dense(np.zeros(8, np.int32))),
        lambda q: _changed(q, mask=dense(np.ones((4, 8), bool))),
        lambda q: _changed(q, scale=dense(np.ones(q.scale.shape, np.float16))),
        lambda q: matrix(np.random.default_rng(0), 4, (-1, -1), cols=16),
    ],
    ids=["grid", "divisor", "groups", "zero points", "act-order", "mask", "dtype", "columns"],
)
@pytest.mark.parametrize("height", [1, -1])
def test_parts_that_differ_in_structure_are_not_stacked(change: Any, height: int) -> None:
    """Not even where all of their scales are equal: codes would be read on the wrong grid."""
    q = matrix(np.random.default_rng(0), 4, (height, -1))
    q = replace(q, scale=dense(np.ones(q.scale.shape, np.float32)))
    other = change(replace(q, scale=dense(np.ones(q.scale.shape, np.float32))))
    with pytest.raises(ValueError, match="cannot stack"):
        concat_quantized((q, other))


def test_act_order_is_kept_by_a_range_of_rows() -> None:
    rng = np.random.default_rng(0)
    q = replace(matrix(rng, 6, (1, 4)), g_idx=dense(rng.permutation(np.arange(8) // 4).astype(np.int32)))
    assert np.array_equal(dequantize(take_quantized(q, ((2, 5),))), dequantize(q)[2:5])


def test_views_read_what_they_are_asked_for() -> None:
    """A range of rows costs these rows and their blocks."""
    seen: list[tuple[str, int, int]] = []

    def watched(t: Tensor, name: str) -> Tensor:
        def read(a: int, b: int) -> Any:
            seen.append((name, a, b))
            return t.read(a, b)

        return replace(t, read=read)

    q = matrix(np.random.default_rng(0), 64, (4, 4))
    assert isinstance(q.scale, Tensor)
    q = replace(q, codes=watched(q.codes, "codes"), scale=watched(q.scale, "scale"))
    view = take_quantized(q, ((8, 24), (40, 48)))
    assert not seen, "making the view reads nothing"
    dequantize(view, 4, 8)
    assert seen == [("codes", 12, 16), ("scale", 3, 4)]


def test_what_the_maker_promises_outlives_stacking() -> None:
    def part(*promised: str) -> Tensor:
        return replace(dense(np.ones((2, 2), np.float16)), exact_in=promised)

    assert concat_rows((part("BF16", "F32"), part("BF16"))).exact_in == ("BF16",)
    assert concat_rows((part("BF16"), part())).exact_in == ()


def test_row_order_of_the_oracle() -> None:
    """dequantize against exact arithmetic, for blocks of two dimensions that do not divide the matrix."""
    q = matrix(np.random.default_rng(3), 7, (3, 3), kind="nested")
    exact = np.array([[float(x) for x in row] for row in values(q)])
    np.testing.assert_allclose(dequantize(q), exact, rtol=3e-7)
