"""Modules that runtimes fuse: alike and tied with equal numbers, or refused; act-order moved where nothing else sees it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import lconvert
from lconvert.converters import act_order, fusion
from lconvert.converters.kinds import plain
from lconvert.formats.scheme import Held
from lconvert.ir import (
    E2M1,
    E4M3,
    E8M0,
    ActSpec,
    Entry,
    Model,
    QTensor,
    Tensor,
    Transform,
    dense,
    int_grid,
)
from lconvert.kernels.qtensor import dequantize, float_values
from tests.exact_values import same, value

_STEPS = settings(max_examples=60, deadline=None)
_RNG = np.random.default_rng(11)


def integers(bits: int = 4, group: int = 4, *, zero: bool = False, rows: int = 3, cols: int = 8) -> QTensor:
    count = 1 if group == -1 else cols // group
    half = 1 << (bits - 1)
    codes = _RNG.integers(0, 1 << bits, (rows, cols)).astype(np.uint8)
    signed = (codes.astype(np.int16) - half).astype(np.int8)
    scale = dense(_RNG.uniform(0.01, 0.02, (rows, count)).astype(np.float16))
    side = dense(_RNG.integers(0, 1 << bits, (rows, count)).astype(np.uint8)) if zero else None
    return QTensor(
        (rows, cols), dense(codes if zero else signed), int_grid(bits, not zero), (1, group), scale, side
    )


def nvfp4(codes: Any, outer: float, *, divisor: bool = False) -> QTensor:
    """Two rows of 32 with these four E4M3 block scales below a global one."""
    local = dense(np.asarray(codes, np.uint8).reshape(2, 2))
    scale = QTensor((2, 2), local, E4M3, (-1, -1), dense(np.float32([[outer]])), divisor=divisor)
    weights = dense(_RNG.integers(0, 16, (2, 32)).astype(np.uint8))
    return QTensor((2, 32), weights, E2M1, (1, 16), scale)


def unified(**members: QTensor | Held | None) -> Any:
    held = {k: v if isinstance(v, Held) else Held(v) for k, v in members.items()}
    return fusion.unify(held)


def _alike(found: Any) -> None:
    assert not isinstance(found, str), found
    assert len({fusion.signature(h) for h in found.values()}) == 1


# --- one scheme ------------------------------------------------------------------------------------------


@given(
    st.lists(
        st.tuples(st.sampled_from([2, 3, 4, 8]), st.sampled_from([2, 4, 8, -1]), st.booleans()),
        min_size=2,
        max_size=3,
    )
)
@_STEPS
def test_integers_of_any_widths_groups_and_zero_points_become_alike(
    kinds: list[tuple[int, int, bool]],
) -> None:
    members = {str(i): integers(b, g, zero=z) for i, (b, g, z) in enumerate(kinds)}
    found = unified(**members)
    _alike(found)
    for name, q in members.items():
        assert same(q, found[name].weight)
    first = next(iter(found.values())).weight
    assert first.grid.bits == max(b for b, _, _ in kinds)
    assert (first.zero is not None) == any(z for _, _, z in kinds)


def test_members_that_are_alike_already_are_left_alone() -> None:
    q, k = integers(), integers()
    found = unified(q=q, k=k)
    assert found["q"].weight is q and found["k"].weight is k


def test_groups_that_do_not_divide_each_other_take_the_greatest_common_one() -> None:
    found = unified(q=integers(4, 6, cols=24), k=integers(4, 4, cols=24))
    _alike(found)
    assert found["q"].weight.block == (1, 2)


def test_nothing_to_do_for_plain_members() -> None:
    found = unified(q=None, k=None)
    assert found["q"].weight is None


def test_a_plain_member_among_quantized_ones_is_named() -> None:
    reason = unified(q=integers(), k=None, v=integers())
    assert reason.startswith("k is not quantized") and "in one matrix" in reason


@pytest.mark.parametrize(
    "other",
    [
        nvfp4([0x38] * 4, 1.0),
        QTensor((3, 8), dense(np.zeros((3, 8), np.uint8)), E4M3, (1, -1), dense(np.ones((3, 1), np.float32))),
        replace(integers(zero=True), zero=None, offset=dense(np.ones((3, 2), np.float16))),
    ],
    ids=["nvfp4", "fp8", "minimum"],
)
def test_what_cannot_be_alike_is_refused(other: QTensor) -> None:
    assert "quantized differently" in unified(q=integers(), k=other)


@pytest.mark.parametrize("groups", [(2, 4), (4, 4)])
@pytest.mark.parametrize("both", [True, False])
def test_act_order_is_never_regrouped(groups: tuple[int, int], both: bool) -> None:
    """A g_idx counts groups of the size it was made for: finer ones would give every column another scale."""

    def ordered(q: QTensor) -> QTensor:
        g_idx = _RNG.permutation(np.arange(8) // q.block[1]).astype(np.int32)
        return replace(q, g_idx=dense(g_idx))

    q, k = integers(4, groups[0]), integers(4, groups[1])
    q, k = ordered(q), ordered(k) if both else k
    found = unified(q=q, k=k)
    if isinstance(found, str):
        assert "quantized differently" in found
    else:
        assert both and groups[0] == groups[1]
        assert same(q, found["q"].weight) and same(k, found["k"].weight)


# --- scales that exist once ------------------------------------------------------------------------------


def _fp8(scale: float, rows: int = 2) -> QTensor:
    codes = dense(_RNG.integers(0, 0x7E, (rows, 4)).astype(np.uint8))
    return QTensor((rows, 4), codes, E4M3, (-1, -1), dense(np.float32([[scale]])))


def test_untied_scales_per_tensor_are_said_per_row() -> None:
    q, k = _fp8(0.5), _fp8(0.3, rows=3)
    found = unified(q=q, k=k)
    assert found["q"].weight.block == found["k"].weight.block == (1, -1)
    assert same(q, found["q"].weight) and same(k, found["k"].weight)
    tied = unified(q=_fp8(0.5), k=_fp8(0.5))
    assert tied["q"].weight.block == (-1, -1)


def test_fp8_is_rounded_to_the_largest_scale_where_asked() -> None:
    """What vLLM does when it loads them (requantize_with_max_scale), against torch."""
    torch = pytest.importorskip("torch", reason="torch is not installed")
    members = {"q": Held(_fp8(0.5)), "k": Held(_fp8(0.3, rows=5)), "v": Held(_fp8(0.5))}
    found = fusion.to_largest(members)
    assert found is not None and found["q"].weight is members["q"].weight
    k, was = found["k"].weight, members["k"].weight
    assert k is not None and was is not None and k.scale.load()[0, 0] == np.float32(0.5)  # type: ignore[union-attr]
    over = torch.from_numpy(dequantize(was)) / np.float32(0.5)
    theirs = over.to(torch.float8_e4m3fn).float().numpy() * np.float32(0.5)
    assert np.array_equal(dequantize(k), theirs)
    assert fusion.to_largest({"q": Held(_fp8(0.5)), "k": Held(integers())}) is None
    assert fusion.to_largest({"q": Held(_fp8(0.0)), "k": Held(_fp8(0.0))}) is None


def _representable(q: QTensor, common: float) -> bool:
    """Whether every block scale could be one of E4M3's numbers times (or over) a common global scale."""
    s = q.scale
    assert isinstance(s, QTensor) and isinstance(s.scale, Tensor)
    own = float(s.scale.load()[0, 0])
    table = {float(v) for v in float_values(4, 3, True, 8) if np.isfinite(v)}
    factor = common / own if s.divisor else own / common
    return all(float(float_values(4, 3, True, 8)[c]) * factor in table for c in s.codes.load().flat)


@given(
    locals_=st.lists(st.lists(st.integers(0, 0x7E), min_size=4, max_size=4), min_size=2, max_size=3),
    shifts=st.lists(st.integers(-9, 9), min_size=3, max_size=3),
    factor=st.sampled_from([1.0, 1.0, 1.0, 1.5]),
    divisor=st.booleans(),
)
@settings(max_examples=150, deadline=None)
def test_global_scales_are_tied_exactly_where_any_common_one_exists(
    locals_: list[list[int]], shifts: list[int], factor: float, divisor: bool
) -> None:
    outer = [3e-3 * 2.0**s * (factor if i else 1.0) for i, s in enumerate(shifts)]
    parts = {
        str(i): nvfp4(c, o, divisor=divisor) for i, (c, o) in enumerate(zip(locals_, outer, strict=False))
    }
    found = unified(**parts)
    base = float(np.float32(outer[0]))
    possible = any(all(_representable(q, base * 2.0**e) for q in parts.values()) for e in range(-40, 41))
    assert (not isinstance(found, str)) == possible, found
    if isinstance(found, str):
        assert "no power of two" in found
        return
    common = {float(h.weight.scale.scale.load()[0, 0]) for h in found.values()}
    assert len(common) == 1
    for name, q in parts.items():
        assert same(q, found[name].weight)


def test_a_common_scale_between_those_of_the_members() -> None:
    """q's scales bear a factor of 2 upwards only, k's 2 downwards only: neither's own global scale will do for both."""
    q, k = nvfp4([0x7E - 8, 0x01, 0x01, 0x01], 4.0), nvfp4([0x02, 0x7E, 0x7E, 0x7E], 1.0)
    found = unified(q=q, k=k)
    assert found["q"].weight.scale.scale.load()[0, 0] == 2.0
    assert same(q, found["q"].weight) and same(k, found["k"].weight)


@pytest.mark.parametrize(("a", "b"), [(0.0, 1.0), (1.0, 0.0), (-1.0, 1.0), (np.inf, 1.0)])
def test_odd_global_scales_are_refused_and_no_crash(a: float, b: float) -> None:
    assert "global scales" in unified(q=nvfp4([0x38] * 4, a), k=nvfp4([0x38] * 4, b))


def test_scales_of_powers_of_two_need_no_tying() -> None:
    """MXFP4 has no global scale: ones everywhere."""

    def mx() -> QTensor:
        scale = QTensor((2, 2), dense(_RNG.integers(110, 140, (2, 2)).astype(np.uint8)), E8M0, (-1, -1),
                        dense(np.ones((1, 1), np.float32)))  # fmt: skip
        return QTensor((2, 64), dense(_RNG.integers(0, 16, (2, 64)).astype(np.uint8)), E2M1, (1, 32), scale)

    q, k = mx(), mx()
    found = unified(q=q, k=k)
    assert found["q"].weight is q and found["k"].weight is k


# --- activations and transforms --------------------------------------------------------------------------


def _static(scale: float, **changes: Any) -> ActSpec:
    return replace(ActSpec(E4M3, "tensor", False, scale=dense(np.float32([scale]))), **changes)


@pytest.mark.parametrize(
    ("a", "b", "reason"),
    [
        (_static(0.5), _static(0.5), ""),
        (None, None, ""),
        (_static(0.5), _static(0.25), "take the largest"),
        (_static(0.5), None, "of others not"),
        (None, _static(0.5), "of others not"),
        (_static(0.5), _static(0.5, divisor=True), "quantized differently"),
        (_static(0.5), _static(0.5, grid=int_grid(8, True)), "quantized differently"),
        (_static(0.5), replace(_static(0.5), dynamic=True, scale=None), "quantized differently"),
        (_static(0.5), _static(0.5, zero=dense(np.int32([3]))), "take the largest"),
    ],
)
def test_one_input_has_one_quantization(a: ActSpec | None, b: ActSpec | None, reason: str) -> None:
    for first, second in ((a, b), (b, a)):
        found = unified(gate=Held(_fp8(1.0), first), up=Held(_fp8(1.0), second))
        assert reason in found if reason else not isinstance(found, str)


def test_one_input_has_one_scale_before_it() -> None:
    def scaled(x: list[float] | None) -> Held:
        t = None if x is None else Transform("scale", "input", dense(np.float32(x)), folded=False)
        return Held(integers(), None, t)

    p = [1.0, 2, 3, 4, 5, 6, 7, 8]
    assert not isinstance(unified(q=scaled(p), k=scaled(p)), str)
    assert "pre_quant_scale" in unified(q=scaled(p), k=scaled(p[::-1]))
    assert "pre_quant_scale" in unified(q=scaled(p), k=scaled(None))


# --- act-order -------------------------------------------------------------------------------------------


def _ordered(rows: int, cols: int, group: int, seed: int, **changes: Any) -> QTensor:
    rng = np.random.default_rng(seed)
    g_idx = rng.permutation(np.arange(cols) // group).astype(np.int32)
    codes = dense(rng.integers(-8, 8, (rows, cols)).astype(np.int8))
    scale = dense(rng.uniform(0.001, 0.002, (rows, cols // group)).astype(np.float16))
    q = QTensor((rows, cols), codes, int_grid(4, True), (1, group), scale, g_idx=dense(g_idx))
    return replace(q, **changes)


def _with(model: Model, **data: QTensor) -> Model:
    new = {n.replace("__", "."): q for n, q in data.items()}
    return model.with_entries({n: replace(model.entries[n], data=q) for n, q in new.items()})


def test_order_makes_groups_contiguous() -> None:
    q = _ordered(2, 16, 4, 1)
    by = act_order.order(q)
    assert by is not None and q.g_idx is not None
    assert (q.g_idx.load()[by] == np.arange(16) // 4).all()
    uneven = replace(q, g_idx=dense(np.array([0] * 5 + [1] * 3 + [2] * 4 + [3] * 4, np.int32)))
    assert act_order.order(uneven) is None, "groups of other sizes than the file says"


@pytest.mark.parametrize("gate", ["dense", "act-order", "per tensor", "blocks", "nvfp4"])
def test_rows_before_down_move_whatever_they_are_held_as(gate: str) -> None:
    """layers.0.mlp of the plain Llama (hidden 256, inner 512), one product by hand."""
    rng = np.random.default_rng(5)
    kinds: Mapping[str, Any] = {
        "act-order": lambda: _ordered(512, 256, 32, 7),
        "per tensor": lambda: QTensor((512, 256), dense(rng.integers(0, 0x7E, (512, 256)).astype(np.uint8)), E4M3,
                                      (-1, -1), dense(np.float32([[1e-4]]))),
        "blocks": lambda: QTensor((512, 256), dense(rng.integers(0, 0x7E, (512, 256)).astype(np.uint8)), E4M3,
                                  (128, 128), dense(rng.uniform(1e-5, 1e-4, (4, 2)).astype(np.float32))),
        "nvfp4": lambda: QTensor((512, 256), dense(rng.integers(0, 16, (512, 256)).astype(np.uint8)), E2M1, (1, 16),
                                 QTensor((512, 16), dense(rng.integers(1, 0x7E, (512, 16)).astype(np.uint8)), E4M3,
                                         (-1, -1), dense(np.float32([[1e-4]])))),
    }  # fmt: skip
    model = _with(plain(), layers__0__mlp__down=_ordered(256, 512, 32, 3))
    if gate != "dense":
        model = _with(model, layers__0__mlp__gate=kinds[gate](), layers__0__mlp__up=kinds[gate]())
    moved, notes = act_order.absorb(model)
    assert notes and moved.entries["layers.0.mlp.down"].data.g_idx is None  # type: ignore[union-attr]
    x = rng.standard_normal(256)

    def mlp(m: Model) -> Any:
        from lconvert.kernels.qtensor import effective

        w = {k: effective(m.entries[f"layers.0.mlp.{k}"]).astype(np.float64) for k in ("gate", "up", "down")}
        g = w["gate"] @ x
        return w["down"] @ (g / (1 + np.exp(-g)) * (w["up"] @ x))

    np.testing.assert_allclose(mlp(moved), mlp(model), rtol=1e-9, atol=1e-12)
    for role in ("gate", "up"):
        a, b = (m.entries[f"layers.0.mlp.{role}"].data for m in (model, moved))
        by = act_order.order(model.entries["layers.0.mlp.down"].data)  # type: ignore[arg-type]
        assert by is not None
        if isinstance(a, QTensor) and isinstance(b, QTensor):
            for row in (0, 100, 511):
                assert value(b, row, 17) == value(a, int(by[row]), 17)


def test_a_scaled_input_keeps_its_order() -> None:
    """An unfolded scale of down's inputs is counted in the order of the file: the g_idx stays, and is refused later."""
    model = _with(plain(), layers__0__mlp__down=_ordered(256, 512, 32, 3))
    name = "layers.0.mlp.down"
    t = Transform("scale", "input", dense(np.ones(512, np.float32)), folded=False)
    model = model.with_entries({name: replace(model.entries[name], transform=t)})
    moved, notes = act_order.absorb(model)
    assert moved is model and not notes


def test_biases_move_with_their_rows() -> None:
    rng = np.random.default_rng(0)
    model = _with(plain(), layers__0__mlp__down=_ordered(256, 512, 32, 3))
    biases = {
        f"layers.0.mlp.{k}.bias": Entry(
            f"layers.0.mlp.{k}.bias", dense(rng.standard_normal(512).astype(np.float32))
        )
        for k in ("gate", "up")
    }
    model = replace(model, entries={**model.entries, **biases})
    moved, _ = act_order.absorb(model)
    by = act_order.order(model.entries["layers.0.mlp.down"].data)  # type: ignore[arg-type]
    for name, e in biases.items():
        assert np.array_equal(moved.entries[name].data.load(), e.data.load()[by])  # type: ignore[union-attr]


@pytest.mark.parametrize("case", ["mixtral-experts", "deepseek_v2-groups"])
def test_every_expert_has_its_own_order(case: str) -> None:
    """Routed and shared experts; the logits of the whole model stay."""
    from lconvert.forward import Forward
    from tests import case_models

    model = lconvert.read(case_models.folder(case))
    downs = [n for n in model.entries if n.endswith(".down")]
    assert any(".experts.1." in n for n in downs)
    new = {}
    for i, n in enumerate(downs):
        rows, cols = model.entries[n].shape
        group = 32 if cols % 32 == 0 else cols // 2
        new[n] = replace(model.entries[n], data=_ordered(rows, cols, group, i))
    model = model.with_entries(new)
    moved, notes = act_order.absorb(model)
    assert f"of {len(downs)} down_proj" in notes[0]
    a, b = (Forward(m).logits([1, 2, 3, 4, 5]) for m in (model, moved))
    assert np.abs(a - b).max() <= 2e-5 * np.abs(a).max()
