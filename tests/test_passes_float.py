"""Small floats by their definitions, and what calibration sees against transformers itself."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from statistics import NormalDist
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import lconvert
from lconvert import executor, kernels
from lconvert.converters import targets
from lconvert.converters.kinds import matrices, plain
from lconvert.errors import InputError, LconvertError, OptionError
from lconvert.executor import execute
from lconvert.formats.gguf_blocks import packer
from lconvert.ir import E2M1, E4M3, ActSpec, Model, QTensor, Tensor, dense
from lconvert.kernels.qtensor import dequantize, float_values
from lconvert.passes import activations, fused, kv, rtn, rtn_float
from lconvert.plan import refusals
from lconvert.primitives import importance, levels
from lconvert.primitives import text as text_windows
from lconvert.primitives.job import Calibration, Job
from lconvert.primitives.text import Windows, windows
from tests import case_models
from tests.conftest import DEMO
from tests.exact_values import grid_value

torch = pytest.importorskip("torch", reason="torch is not installed")


def weights(rows: int = 6, cols: int = 64, seed: int = 0) -> Tensor:
    """Rows of very different size; one of zeros, one with a single outlier, one of equal values."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((rows, cols)).astype(np.float32) * np.float32(0.05)
    x *= 2.0 ** rng.integers(-6, 3, (rows, 1)).astype(np.float32)
    x[1] = 0
    x[2, 5] = 3.0
    x[3] = -0.25
    return dense(x)


def _quantized(t: Tensor, grid: str, group: int | str = -1) -> QTensor:
    return rtn.quantized(t, rtn.Options(grid=grid, group=group))


# --- FP8 -------------------------------------------------------------------------------------------------


def test_fp8_rounds_as_torch_does() -> None:
    """Every bfloat16 up to 480, every tie between neighbours and what lies next to it; torch saturates to NaN beyond."""
    every = (np.arange(1 << 16, dtype=np.uint32) << 16).view(np.float32)
    table = np.sort(float_values(4, 3, True, 8)[np.isfinite(float_values(4, 3, True, 8))])
    ties = (table[:-1].astype(np.float64) + table[1:]) / 2
    close = np.concatenate(
        [ties, np.nextafter(ties.astype(np.float32), 1e9), np.nextafter(ties.astype(np.float32), -1e9)]
    )
    x = np.concatenate([every, close.astype(np.float32)])
    x = x[np.isfinite(x) & (np.abs(x) <= 464)]
    theirs = torch.from_numpy(x).to(torch.float8_e4m3fn).view(torch.uint8).numpy()
    ours = rtn_float.nearest(E4M3, x)
    value = float_values(4, 3, True, 8)
    assert np.array_equal(value[ours], value[theirs])
    assert len(x) > 30_000


@pytest.mark.parametrize("x", [448, 464, 465, 480, 1e4, 3e38, np.inf])
def test_fp8_saturates(x: float) -> None:
    both = rtn_float.nearest(E4M3, np.float32([x, -x]))
    assert both.tolist() == [0x7E, 0xFE], "448, and never NaN"


@pytest.mark.parametrize("group", [-1, "tensor", "block"])
def test_fp8_is_its_definition(group: int | str) -> None:
    """s = max|x| / 448 on 8 significant bits; code = E4M3 nearest to x / s."""
    t = weights(300, 200)
    q = _quantized(t, "fp8", group)
    x = t.load()
    tile = {-1: (1, 200), "tensor": (300, 200), "block": (128, 128)}[group]
    s = q.scale.load()  # type: ignore[union-attr]
    assert s.dtype == np.float32 and s.shape == (-(-300 // tile[0]), -(-200 // tile[1]))
    for i, j in np.ndindex(*s.shape):
        part = x[i * tile[0] : (i + 1) * tile[0], j * tile[1] : (j + 1) * tile[1]]
        want = np.abs(part).max() / np.float32(448)
        assert abs(s[i, j] - want) <= want * 2.0**-8
        mantissa = np.frexp(s[i, j])[0] * 256
        assert mantissa == np.rint(mantissa), "exact in bfloat16"
        codes = q.codes.load()[i * tile[0] : (i + 1) * tile[0], j * tile[1] : (j + 1) * tile[1]]
        if s[i, j] == 0:
            assert not codes.any()
            continue
        over = np.clip(part / s[i, j], -448, 448)
        theirs = torch.from_numpy(over.copy()).to(torch.float8_e4m3fn).float().numpy()
        assert np.array_equal(float_values(4, 3, True, 8)[codes], theirs)
    whole = dequantize(q)
    for a, b in ((0, 1), (127, 129), (250, 300)):
        assert np.array_equal(dequantize(q, a, b), whole[a:b])
    assert np.abs(whole - x).max() <= np.abs(x).max() / 16


# --- NVFP4 -----------------------------------------------------------------------------------------------


def _e2m1(x: float) -> Fraction:
    """The E2M1 number nearest to x, ties to the even code, by trying all sixteen."""
    codes = sorted(range(16), key=lambda c: (abs(grid_value(E2M1, c) - Fraction(x)), c & 1))
    return grid_value(E2M1, codes[0])


def test_nvfp4_is_its_definition() -> None:
    t = weights()
    q = _quantized(t, "fp4", 16)
    assert q.grid == E2M1 and q.block == (1, 16) and isinstance(q.scale, QTensor) and q.scale.grid == E4M3
    x, local = t.load(), q.scale.codes.load()
    g = float(q.scale.scale.load()[0, 0])  # type: ignore[union-attr]
    peak = float(np.abs(x).max()) / (6 * 448)
    assert g / 2 < peak <= g and np.frexp(g)[0] == 0.5
    top = np.abs(x.reshape(6, 4, 16)).max(-1) / np.float32(6) / np.float32(g)
    theirs = torch.from_numpy(top).to(torch.float8_e4m3fn).view(torch.uint8).numpy()
    assert np.array_equal(local, theirs)
    scale = float_values(4, 3, True, 8)[local] * np.float32(g)
    for row, col in np.ndindex(6, 64):
        s = scale[row, col // 16]
        want = _e2m1(float(x[row, col] / s)) if s else Fraction(0)
        assert grid_value(E2M1, int(q.codes.load()[row, col])) == want


def test_e2m1_ties_go_to_even_codes() -> None:
    ties = np.float32([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 6.5, -0.25, -0.75, -2.5, -5.0, -7.0])
    ours = [grid_value(E2M1, int(c)) for c in rtn_float.nearest(E2M1, ties)]
    assert [float(v) for v in ours] == [0, 1, 1, 2, 2, 4, 4, 6, 0, -1, -2, -4, -6]


@given(st.floats(2.0**-149, 2.0**120, width=32))
@settings(max_examples=300, deadline=None)
def test_the_power_of_two_above_is_the_smallest_one(x: float) -> None:
    found = levels.power_of_two_above(x)
    assert Fraction(x) <= Fraction(found) and np.frexp(found)[0] == 0.5
    assert Fraction(found) / 2 < Fraction(x) or found == 2.0**-126
    assert np.isfinite(np.float32(1) / np.float32(found)), "compressed-tensors stores the reciprocal"


def test_the_power_of_two_above_a_number_just_above_one() -> None:
    assert levels.power_of_two_above(np.nextafter(0.25, 1)) == 0.5
    assert levels.power_of_two_above(0.25) == 0.25 and levels.power_of_two_above(0.0) == 1.0


# --- NF4 -------------------------------------------------------------------------------------------------


def test_nf4_are_the_quantiles_of_its_paper() -> None:
    """QLoRA, appendix E, as bitsandbytes' create_normal_map computes them: 8 quantiles above zero, 7 below, over the largest."""
    offset = 0.9677083
    above = [NormalDist().inv_cdf(p) for p in np.linspace(offset, 0.5, 9)[:-1]]
    below = [-NormalDist().inv_cdf(p) for p in np.linspace(offset, 0.5, 8)[:-1]]
    want = np.array(sorted([*above, 0.0, *below])) / max(above)
    np.testing.assert_allclose(levels.NF4_VALUES, want, atol=2e-7)
    assert levels.NF4_VALUES[7] == 0 and len(levels.NF4_VALUES) == 16
    assert all(float(np.float32(v)) == v for v in levels.NF4_VALUES), "fp32 numbers"


def test_nf4_takes_the_nearest_value() -> None:
    t = weights()
    q = _quantized(t, "nf4", 32)
    x, scale = t.load().reshape(6, 2, 32), q.scale.load()  # type: ignore[union-attr]
    assert np.array_equal(scale, np.abs(x).max(-1)), "absolute maxima, unrounded"
    table = np.array(levels.NF4_VALUES, np.float32)
    found = table[q.codes.load()].reshape(x.shape)
    with np.errstate(invalid="ignore", divide="ignore"):
        over = np.where(scale[..., None] > 0, x / scale[..., None], 0)
    best = np.abs(table - over[..., None]).min(-1)
    assert (np.abs(found - over) <= best + 1e-7).all()


# --- all of them -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("grid", ["fp8", "fp4", "nf4"])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_nan_and_infinity_are_named(grid: str, bad: float) -> None:
    x = weights().load().copy()
    x[4, 7] = bad
    q = _quantized(dense(x, origin="file: tensor w"), grid, {"fp8": -1, "fp4": 16, "nf4": 32}[grid])
    with pytest.raises(InputError, match="file: tensor w: holds NaN or infinite values in rows"):
        dequantize(q)


@pytest.mark.parametrize(("grid", "group"), [("fp4", 16), ("nf4", 48)])
def test_widths_that_do_not_divide_are_named(grid: str, group: int) -> None:
    with pytest.raises(
        OptionError, match=f"rows of 40 values do not divide into (groups|fp4's blocks) of {group}"
    ):
        _quantized(dense(np.zeros((2, 40), np.float32)), grid, group)


@pytest.mark.parametrize(
    ("grid", "group"), [("fp8", -1), ("fp8", "tensor"), ("fp8", "block"), ("fp4", 16), ("nf4", 32)]
)
def test_a_matrix_of_zeros_stays_zero(grid: str, group: int | str) -> None:
    q = _quantized(dense(np.zeros((3, 64), np.float32)), grid, group)
    assert not dequantize(q).any()


@pytest.mark.parametrize(
    "options",
    [{"grid": "fp8", "group": 128}, {"grid": "fp8", "group": "row"}, {"grid": "int4", "group": "tensor"},
     {"grid": "nf4", "group": 0}, {"grid": "fp9"}, {"search": "best"}, {"targets": "("}],
)  # fmt: skip
def test_options_that_make_no_sense_are_refused(options: Any) -> None:
    with pytest.raises(OptionError, match="rtn: "):
        rtn.Options(**options)


@pytest.mark.parametrize(("grid", "group"), [("fp8", "tensor"), ("fp4", 16)])
def test_fused_modules_share_their_largest_magnitude(grid: str, group: int | str) -> None:
    model = plain()
    loud = model.entries["layers.0.attn.k"]
    x = loud.data.load().copy()  # type: ignore[union-attr]
    x[3, 3] = 0x4120  # 10.0
    model = model.with_entries({loud.name: replace(loud, data=dense(x, "BF16"))})
    out = rtn.run(model, rtn.Options(grid=grid, group=group))

    def outer(role: str) -> float:
        q = out.entries[f"layers.0.{role}"].data
        assert isinstance(q, QTensor)
        s = q.scale.scale if isinstance(q.scale, QTensor) else q.scale
        return float(s.load()[0, 0])  # type: ignore[union-attr]

    assert outer("attn.q") == outer("attn.k") == outer("attn.v") > 3 * outer("attn.o")
    assert outer("mlp.gate") == outer("mlp.up")
    assert len(list(fused.groups(model.arch))) == len(fused.FUSED)


# --- what is read, and when ------------------------------------------------------------------------------


def counted(model: Model) -> tuple[Model, Counter[str], list[int]]:
    """The model, the rows that were read of each matrix, and the size in values of every read."""
    seen: Counter[str] = Counter()
    sizes: list[int] = []
    new = {}
    for name, e in matrices(model).items():

        def read(a: int, b: int, t: Any = e.data, name: str = name) -> Any:
            seen[name] += b - a
            sizes.append((b - a) * t.shape[1])
            return t.read(a, b)

        new[name] = replace(e, data=replace(e.data, read=read))
    return model.with_entries(new), seen, sizes


def _passes(counts: Counter[str], model: Model) -> float:
    """How often every row was read, on the average."""
    return sum(counts.values()) / sum(e.data.rows for e in matrices(model).values())


#: Preset -> how often planning reads all weights: per-tensor scales must be known to tie them, zero points for AWQ's range.
_PLANNING = {"nvfp4a16": 1.0, "awq": 2.0}


@pytest.mark.parametrize("preset", [n for n, p in targets.VLLM.items() if not p.calibrated])
def test_a_plan_computes_no_weights_that_it_does_not_need(preset: str, tmp_path: Path) -> None:
    model, seen, _ = counted(plain())
    p = targets.VLLM[preset]
    changed = targets.recipe(preset, targets.VLLM).apply(model)
    assert not seen, "a pass is lazy"
    plan = targets.plan(changed, targets.for_vllm(p.format), "m", original=model)
    assert refusals(plan) == []
    assert _passes(seen, model) <= _PLANNING.get(preset, 0.0)
    seen.clear()
    execute(plan, tmp_path / "m", threads=1)
    # codes, scales and zero points are stored one after another, and every 16th row is measured
    limit = {"dense": 1.0, "awq": 3.2, "w4a16-asym": 3.2}.get(preset, 2.2)
    assert _passes(seen, model) <= limit


@pytest.mark.parametrize("preset", [n for n, p in targets.VLLM.items() if not p.calibrated and n != "dense"])
def test_weights_are_computed_in_slabs(preset: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import lconvert.ir

    monkeypatch.setattr(executor, "SLAB_BYTES", 32 << 10)
    monkeypatch.setattr(lconvert.ir, "COMPUTED", 32 << 10)
    model, _, sizes = counted(plain())
    changed = targets.recipe(preset, targets.VLLM).apply(model)
    plan = targets.plan(changed, "vllm", "m", original=model)
    sizes.clear()
    execute(plan, tmp_path / "m", threads=1)
    assert max(sizes) <= 64 << 10, "values in memory at once; the largest matrix has 128 Ki"


# --- activations and the cache ---------------------------------------------------------------------------

_TEXT = "It is a truth universally acknowledged, that a single man in possession of a good fortune must be in want. "


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(_TEXT * 12)
    return path


class Watched:
    """transformers' own model on the same windows: largest inputs of every Linear, largest keys and values."""

    def __init__(self, folder: Path, batches: list[list[int]]) -> None:
        transformers = pytest.importorskip("transformers", reason="transformers is not installed")
        model = transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, attn_implementation="eager", local_files_only=True
        ).eval()
        self.inputs: dict[str, float] = {}
        for name, module in model.named_modules():
            if isinstance(module, torch.nn.Linear):
                module.register_forward_pre_hook(lambda m, args, n=name: self._see(n, args[0]))
        self.keys: dict[int, float] = {}
        self.values: dict[int, float] = {}
        with torch.no_grad():
            for ids in batches:
                model(torch.tensor([ids]), use_cache=False)
                cache = None
                for token in ids:  # one at a time: what a sliding window drops later was its last row once
                    out = model(torch.tensor([[token]]), past_key_values=cache, use_cache=True)
                    cache = out.past_key_values
                    for i, layer in enumerate(cache.layers):
                        for held, x in ((self.keys, layer.keys), (self.values, layer.values)):
                            held[i] = max(held.get(i, 0.0), float(x[..., -1, :].abs().max()))

    def _see(self, name: str, x: Any) -> None:
        if x.shape[1] > 1:
            self.inputs[name] = max(self.inputs.get(name, 0.0), float(x.abs().max()))


def seen(model: Model, text: Path) -> dict[str, float]:
    """Largest inputs by role, on two windows of 24 tokens."""
    found = importance.measure(model, Job(Calibration(str(text), windows=2, context=24))).moments
    return {role: float(m.peak.max()) for role, m in found.items()}


def test_peaks_are_those_of_hooks_on_transformers(text: Path) -> None:
    model = lconvert.read(DEMO)
    batches = [list(w) for w in windows(model, Calibration(str(text), windows=2, context=24)).ids]
    found, theirs = seen(model, text), Watched(DEMO, batches)
    assert len(theirs.inputs) == 3 * 7 + 1
    for name, peak in theirs.inputs.items():
        if "layers." not in name:
            continue
        _, i, part, leaf = name.rsplit(".", 3)
        role = f"layers.{i}.{'attn' if part == 'self_attn' else 'mlp'}.{leaf.removesuffix('_proj')}"
        assert found[role] == pytest.approx(peak, rel=1e-5), name
    for ours, peaks in zip(kv.peaks(model, batches), (theirs.keys, theirs.values), strict=True):
        assert ours.keys() == peaks.keys() == {0, 1, 2}
        assert all(ours[i] == pytest.approx(peaks[i], rel=1e-4) for i in peaks)


@pytest.mark.parametrize("case", ["gemma3_text-pattern", "mistral-window", "phi3-plain"])
def test_keys_that_leave_a_window_count_as_well(case: str) -> None:
    """The cache of a sliding window holds its end alone after a long prompt."""
    folder = case_models.folder(case)
    model = lconvert.read(folder)
    rng = np.random.default_rng(1)
    window = model.arch.layer(0).attention.window or 32
    batches = [[int(i) for i in rng.integers(0, model.arch.vocab, window + 24)]]
    theirs = Watched(folder, batches)
    for ours, peaks in zip(kv.peaks(model, batches), (theirs.keys, theirs.values), strict=True):
        assert all(ours[i] == pytest.approx(peaks[i], rel=1e-4) for i in peaks)


def test_an_expert_that_no_token_chose_gets_the_largest_scale_of_its_layer(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = rtn.run(lconvert.read(case_models.folder("mixtral-experts")), rtn.Options("int8", -1))
    shown = Windows(((5, 6),))  # two tokens that choose two experts of four each
    monkeypatch.setattr(text_windows, "windows", lambda model, calibration: shown)
    job = Job(Calibration("two tokens"))
    out = activations.run(model, activations.Options(dynamic=False), job)
    moments = importance.measure(model, job).moments
    unseen = [r for r, m in moments.items() if not m.count]
    assert unseen
    for role in unseen:
        layer, kind = role.split(".experts.")[0], role.rsplit(".", 1)[1]
        others = [
            out.entries[r].activation for r in moments if r.startswith(layer) and r.endswith("." + kind)
        ]
        scales = [float(a.scale.load()[0]) for a in others if a is not None and a.scale is not None]
        a = out.entries[role].activation
        assert a is not None and a.scale is not None and float(a.scale.load()[0]) == max(scales)
    assert any("no token of the text chose " + unseen[0] in line for line in out.report)


def test_static_scales_cover_what_was_seen(text: Path) -> None:
    model = rtn.run(lconvert.read(DEMO), rtn.Options(grid="fp8", group="tensor"))
    options = activations.Options("fp8", dynamic=False, text=str(text), windows=2, context=24)
    inputs = seen(model, text)
    out = activations.run(model, options)
    for name, e in matrices(out).items():
        a = e.activation
        assert (
            a is not None and a.scale is not None and (a.per, a.dynamic, a.group) == ("tensor", False, None)
        )
        assert float(a.scale.load()[0]) == pytest.approx(inputs[name] / 448, rel=2.0**-8)
    same = [out.entries[f"layers.1.attn.{r}"].activation for r in "qkv"]
    assert len({float(a.scale.load()[0]) for a in same if a and a.scale}) == 1, "one input, one scale"


def test_nvfp4_inputs_have_a_power_of_two_as_global_scale(text: Path) -> None:
    model = rtn.run(lconvert.read(DEMO), rtn.Options(grid="fp4"))
    inputs = seen(model, text)
    out = activations.run(model, activations.Options("fp4", text=str(text), windows=2, context=24))
    for name, e in matrices(out).items():
        a = e.activation
        assert (
            a is not None
            and a.scale is not None
            and (a.grid, a.per, a.dynamic, a.group) == (E2M1, "group", True, 16)
        )
        g, want = float(a.scale.load()[0]), inputs[name] / (6 * 448)
        assert np.frexp(g)[0] == 0.5 and g / 2 < want <= g


@pytest.mark.parametrize(
    ("grid", "group", "per", "size"),
    [("int8", 0, "token", None), ("fp8", 0, "token", None), ("fp8", 128, "group", 128)],
)
def test_dynamic_inputs_need_no_text(grid: str, group: int, per: str, size: int | None) -> None:
    model = rtn.run(plain(), rtn.Options(grid="int8", group=-1))
    out = activations.run(model, activations.Options(grid, group=group, ignore=r".*\.down"))
    a = out.entries["layers.0.mlp.up"].activation
    assert a is not None and (a.per, a.group, a.dynamic, a.scale) == (per, size, True, None)
    assert out.entries["layers.0.mlp.down"].activation is None and out.entries["head"].activation is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"grid": "int4"}, "choose int8, fp8, fp4"),
        ({"group": -3}, "positive size"),
        ({"group": 128, "dynamic": False, "text": "x"}, "groups are dynamic"),
    ],
)
def test_activation_options_are_checked(options: Any, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        activations.Options(**options)


@pytest.mark.parametrize("options", [{"dynamic": False}, {"grid": "fp4"}])
def test_static_scales_without_a_text_are_refused_when_the_pass_runs(options: Any) -> None:
    model = rtn.run(plain(), rtn.Options(grid="int8", group=-1))
    with pytest.raises(OptionError, match="activations: needs a calibration text; name one"):
        activations.run(model, activations.Options(**options))


def test_the_text_of_a_run_is_as_long_as_the_run_says(text: Path) -> None:
    """A pass's own text goes before it, with its own windows."""
    model = rtn.run(lconvert.read(DEMO), rtn.Options(grid="int8", group=-1))
    job = Job(Calibration(str(text), windows=2, context=24))
    own = activations.Options(dynamic=False, text=str(text), windows=2, context=24)
    shared, alone = (
        activations.run(model, activations.Options(dynamic=False), job),
        activations.run(model, own),
    )
    for name, entry in alone.entries.items():
        if entry.activation is not None and entry.activation.scale is not None:
            other = shared.entries[name].activation
            assert other is not None and other.scale is not None
            assert np.array_equal(other.scale.load(), entry.activation.scale.load())
    caches = (
        kv.run(model, kv.Options(text=str(text), windows=2, context=24)),
        kv.run(model, kv.Options(), job),
    )
    assert all(c.kv is not None and c.kv.k.scale is not None for c in caches)
    assert len({c.kv.k.scale.load().tobytes() for c in caches if c.kv and c.kv.k.scale}) == 1


def test_nothing_to_quantize_is_an_error() -> None:
    with pytest.raises(OptionError, match="no quantized matrix"):
        activations.run(plain(), activations.Options())


def test_cache_scales_are_the_peaks_over_448(text: Path) -> None:
    model = lconvert.read(DEMO)
    keys, held = kv.peaks(model, windows(model, Calibration(str(text), windows=2, context=24)).ids)
    out = kv.run(model, kv.Options(text=str(text), windows=2, context=24))
    assert out.kv is not None
    for side, peaks in ((out.kv.k, keys), (out.kv.v, held)):
        assert side.scale is not None and (side.grid, side.per, side.dynamic) == (E4M3, "tensor", False)
        got = side.scale.load()
        assert got.shape == (3,) and got.dtype == np.float32
        np.testing.assert_allclose(got, [peaks[i] / 448 for i in range(3)], rtol=2.0**-8)
    bare = kv.run(model, kv.Options())
    assert bare.kv is not None and bare.kv.k.scale is not None and (bare.kv.k.scale.load() == 1).all()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot be read"),
        (b"\xff\xfe\x00", "cannot be read as UTF-8"),
        (b"", "calibration text is too short: 1 tokens"),
    ],
)
def test_a_calibration_text_that_is_none(content: bytes | None, message: str, tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(LconvertError, match=message):
        kv.run(lconvert.read(DEMO), kv.Options(text=str(path)))


def test_a_model_without_a_tokenizer_cannot_be_calibrated(text: Path) -> None:
    with pytest.raises(InputError, match="has no tokenizer"):
        kv.run(plain(), kv.Options(text=str(text)))


@pytest.mark.parametrize("target", ["compressed-tensors", "modelopt"])
def test_what_was_calibrated_is_what_the_folder_says(target: str, text: Path, tmp_path: Path) -> None:
    model = rtn.run(lconvert.read(DEMO), rtn.Options(grid="fp8", group="tensor"))
    model = activations.run(
        model, activations.Options("fp8", dynamic=False, text=str(text), windows=1, context=16)
    )
    model = kv.run(model, kv.Options(text=str(text), windows=1, context=16))
    plan = targets.plan(model, target, "m")
    assert refusals(plan) == []
    execute(plan, tmp_path / "m")
    back = lconvert.read(tmp_path / "m")
    assert back.kv is not None and model.kv is not None
    for a, b in ((model.kv.k, back.kv.k), (model.kv.v, back.kv.v)):
        assert a.scale is not None and b.scale is not None and np.array_equal(a.scale.load(), b.scale.load())
    for name, e in matrices(model).items():
        a, b = e.activation, back.entries[name].activation
        assert (
            isinstance(a, ActSpec) and isinstance(b, ActSpec) and a.scale is not None and b.scale is not None
        )
        assert (a.grid, a.per, a.dynamic) == (b.grid, b.per, b.dynamic)
        assert np.array_equal(a.scale.load().reshape(-1), b.scale.load().reshape(-1)), name
        assert np.array_equal(dequantize(e.data), dequantize(back.entries[name].data))  # type: ignore[arg-type]


@pytest.mark.parametrize("target", ["vllm", "tensorrt-llm", "compressed-tensors", "modelopt"])
def test_nvfp4_weights_and_inputs_are_exact_in_both_conventions(
    target: str, text: Path, tmp_path: Path
) -> None:
    """Global scales of powers of two, as multipliers (ModelOpt) or divisors (compressed-tensors)."""
    model = rtn.run(lconvert.read(DEMO), rtn.Options(grid="fp4"))
    model = activations.run(model, activations.Options("fp4", text=str(text), windows=1, context=16))
    plan = targets.plan(model, target, "m")
    kinds = {str(i.verdict.kind) for i in plan.items() if i.sources[0].startswith("layers.") and i.held}
    assert kinds == {"exact"}
    execute(plan, tmp_path / "m")
    back = lconvert.read(tmp_path / "m")
    for name, e in matrices(model).items():
        a, b = e.activation, back.entries[name].activation
        assert a is not None and b is not None and a.scale is not None and b.scale is not None
        x, y = float(a.scale.load().reshape(-1)[0]), float(b.scale.load().reshape(-1)[0])
        assert x == (1 / y if b.divisor else y)
        assert np.array_equal(dequantize(e.data), dequantize(back.entries[name].data))  # type: ignore[arg-type]


@pytest.mark.parametrize(("grid", "group"), [("MXFP4", 32), ("fp4", 16)])
def test_searched_scales_of_microscaled_floats_are_the_best_near_the_rule(grid: str, group: int) -> None:
    """Group by group no worse than the rule's scale; of MXFP4 the best over all powers of two that cut off no more than rounding would."""
    rng = np.random.default_rng(8)
    x = rng.standard_normal((24, 128)).astype(np.float32) * np.exp(rng.uniform(-6, 3, (24, 1))).astype(
        np.float32
    )
    x[3] = 0
    t = dense(x)

    def errors(search: Any) -> Any:
        q = rtn.quantized(t, rtn.Options(grid, search=search))
        return ((dequantize(q) - x).astype(np.float64) ** 2).reshape(24, -1, group).sum(-1), q

    (plain, _), (found, q) = errors("minmax"), errors("mse")
    if grid == "fp4":
        assert (found <= plain).all() and found.sum() < 0.95 * plain.sum()
    else:
        scale = 2.0 ** np.arange(-30, 12)
        values = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])
        y = np.abs(x.reshape(24, -1, 1, group)) / scale[:, None]
        best = ((values[np.abs(y[..., None] - values).argmin(-1)] - y) * scale[:, None]) ** 2
        best = np.where(np.abs(y).max(-1) <= 7, best.sum(-1), np.inf).min(-1)
        np.testing.assert_allclose(found, best, rtol=1e-6)
        assert found.sum() < 0.95 * plain.sum()
        blocks = packer("MXFP4", q)(0, 24)
        assert np.array_equal(kernels.dequantize("MXFP4", blocks, 128), dequantize(q))
