"""Deployment grids: what a rounder computes with is what the IR and ggml read back, bit for bit, and no scale is worse than the stock search's."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from lconvert import kernels
from lconvert.errors import OptionError
from lconvert.formats import gguf_blocks
from lconvert.ir import dense
from lconvert.kernels.qtensor import dequantize
from lconvert.passes import rtn
from lconvert.primitives import grids, zeros
from lconvert.primitives.placement import Placed
from tests import ggml_oracle

PORTABLE = [("int2", 64), ("int3", 128), ("int4", 32), ("int4", 128), ("int5", 64), ("int8", -1), ("uint2", 32), ("uint4", 128),
            ("uint8", -1), ("fp4", -1), ("nf4", 64), ("fp8", -1)]  # fmt: skip
BLOCKS = [
    "Q4_0",
    "Q4_1",
    "Q5_0",
    "Q5_1",
    "Q8_0",
    "Q2_K",
    "Q3_K",
    "Q4_K",
    "Q5_K",
    "Q6_K",
    "IQ4_NL",
    "IQ4_XS",
    "MXFP4",
    "NVFP4",
]
ALL = [Placed(name, group) for name, group in PORTABLE] + [Placed(name, -1) for name in BLOCKS]


def weights(seed: int = 0, rows: int = 24, cols: int = 512) -> Any:
    g = torch.Generator().manual_seed(seed)
    w = torch.randn(rows, cols, generator=g) * 0.02
    w[:, ::61] *= 5
    w[3] = 0
    w[4, :128] = 0.01
    return w


def importance(cols: int = 512) -> Any:
    return torch.rand(cols, generator=torch.Generator().manual_seed(9)) ** 3 + 1e-3


def found(placed: Placed, w: Any) -> grids.DeploymentGrid:
    return grids.find(placed, w.shape[1], peak=float(w.abs().max()))


@pytest.mark.parametrize("placed", ALL, ids=str)
@pytest.mark.parametrize("weighted", [False, True])
def test_values_are_the_ir_s(placed: Placed, weighted: bool) -> None:
    w = weights()
    g = found(placed, w)
    position, sides = g.nearest(w, importance() if weighted else None)
    q = g.qtensor(position, sides, dense(w.numpy()))
    assert np.array_equal(dequantize(q), g.values(position, sides).numpy())
    assert torch.isfinite(g.values(position, sides)).all() and not g.values(position, sides)[3].any()


@pytest.mark.parametrize("type_", BLOCKS)
def test_ggml_reads_the_same_values_out_of_the_blocks(type_: str) -> None:
    w = weights()
    g = found(Placed(type_, -1), w)
    position, sides = g.nearest(w)
    q = g.qtensor(position, sides, dense(w.numpy()))
    assert gguf_blocks.native_type(q) == type_
    blocks = gguf_blocks.packer(type_, q)(0, len(w))
    assert np.array_equal(
        ggml_oracle.dequantize(type_, blocks, w.shape[1]), g.values(position, sides).numpy()
    )


def squared(w: Any, y: Any, h: Any) -> float:
    return float(((torch.as_tensor(y) - w).double() ** 2 * h).sum())


@pytest.mark.parametrize("placed", ALL, ids=str)
def test_scales_serve_better_than_the_stock_search(placed: Placed) -> None:
    w, h = weights(), importance()
    g = found(placed, w)
    one = torch.ones(512)
    ours = [squared(w, g.values(*g.nearest(w, x)), one if x is None else x) for x in (None, h)]
    stock = dequantize(rtn.quantized(dense(w.numpy()), rtn.Options(placed.grid, placed.group)))
    assert ours[0] <= squared(w, stock, one) * (1 + 1e-6)
    if placed.grid in BLOCKS:
        blocks = kernels.quantize(placed.grid, w.numpy(), weights=h.numpy())
        stock = kernels.dequantize(placed.grid, blocks, 512)
    assert ours[1] <= squared(w, stock, h) * (1 + 1e-6)


@pytest.mark.parametrize(("name", "bits"), [("int4", 8), ("int8", 8), ("uint4", 7), ("uint2", 7)])
def test_portable_scales_are_short(name: str, bits: int) -> None:
    w = weights()
    g = found(Placed(name, 64), w)
    _, sides = g.nearest(w, importance())
    mantissa = torch.frexp(sides.scale)[0] * (1 << bits)
    assert torch.equal(mantissa, mantissa.round())
    q = g.qtensor(*g.nearest(w), dense(w.numpy()))
    assert q.scale.dtype == "F16" and "BF16" in q.scale.exact_in  # type: ignore[union-attr]
    scale = torch.from_numpy(q.scale.load().astype(np.float32))  # type: ignore[union-attr]
    assert torch.equal(scale, scale.to(torch.bfloat16).float())


@pytest.mark.parametrize("placed", ALL, ids=str)
def test_zero_is_on_the_grid_or_said_not_to_be(placed: Placed) -> None:
    w = weights()
    w[5:, 7] = 0
    g = found(placed, w)
    position, sides = g.nearest(w)
    q = g.qtensor(position, sides, dense(w.numpy()))
    assert g.holds_zero == zeros.holds_zero(q)
    if g.holds_zero:
        assert not g.values(position, sides)[5:, 7].any()


def test_negative_scales_only_where_they_were_asked_for() -> None:
    w = weights().abs()
    for signed in (False, True):
        g = grids.find(Placed("int4", 32), 512, signed=signed)
        assert bool((g.nearest(w)[1].scale < 0).any()) == signed


@pytest.mark.parametrize("placed", ALL, ids=str)
def test_extremes(placed: Placed) -> None:
    for w in (
        torch.zeros(2, 512),
        torch.full((2, 512), 3.0),
        torch.full((2, 512), -1e-30),
        weights(rows=6) * 1e4,
    ):
        g = grids.find(placed, 512, peak=float(w.abs().max()))
        y = g.values(*g.nearest(w))
        assert torch.isfinite(y).all()
        assert float(((y - w) ** 2).sum()) <= float((w**2).sum()) * 1.000001


def test_a_row_s_result_does_not_depend_on_its_neighbours() -> None:
    w = weights(rows=40, cols=256)
    for placed in (Placed("Q4_K", -1), Placed("uint4", 64)):
        g = found(placed, w)
        whole = g.values(*g.nearest(w))
        assert torch.equal(whole[17:19], g.values(*g.nearest(w[17:19])))


def test_what_cannot_be() -> None:
    with pytest.raises(OptionError, match="lattice"):
        grids.find(Placed("IQ2_XS", -1), 512)
    with pytest.raises(
        OptionError, match=r"layers\.0\.attn\.q: rows of 500 values do not divide into \S+'s blocks of 256"
    ):
        grids.find(Placed("Q4_K", -1), 500, what="layers.0.attn.q")
