"""The IR's own format: writing then reading is exact for every grid; other versions and damage are refused."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import lconvert
from lconvert import recipe
from lconvert.converters import lcir
from lconvert.errors import InputError, LconvertError, UnsupportedError
from lconvert.executor import execute
from lconvert.formats.gguf_blocks import SCHEMES
from lconvert.ir import (
    E2M1,
    E4M3,
    E8M0,
    ActSpec,
    Grid,
    KVSpec,
    Model,
    QTensor,
    Tensor,
    Transform,
    dense,
    int_grid,
)
from lconvert.kernels.qtensor import dequantize
from tests.checkpoints import write_llama
from tests.conftest import DEMO

GRIDS = [int_grid(b, s) for b in range(2, 9) for s in (False, True)] + [
    E2M1,
    E4M3,
    E8M0,
    Grid("float", 8, True, exponent=5, mantissa=2),
    Grid("codebook", 4, values=tuple(float(i * i) for i in range(16))),
]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return lconvert.read(write_llama(tmp_path_factory.mktemp("m") / "model"))


def write(model: Model, folder: Path) -> Model:
    execute(lcir.plan(model, {}), folder, force=True)
    return lconvert.read(folder)


def assert_equal(a: Tensor | QTensor | None, b: Tensor | QTensor | None) -> None:
    if a is None or b is None:
        assert a is b
        return
    assert type(a) is type(b) and a.shape == b.shape
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        assert a.dtype == b.dtype
        assert a.load().tobytes() == b.load().tobytes()
        return
    assert isinstance(a, QTensor) and isinstance(b, QTensor)
    assert (a.grid, a.block) == (b.grid, b.block)
    for side in ("codes", "scale", "zero", "offset", "g_idx"):
        assert_equal(getattr(a, side), getattr(b, side))
    assert a.divisor == b.divisor


def random_codes(rng: np.random.Generator, grid: Grid, shape: tuple[int, ...]) -> Any:
    if grid.kind == "int" and grid.signed:
        return rng.integers(-(1 << (grid.bits - 1)), 1 << (grid.bits - 1), shape, dtype=np.int8)
    return rng.integers(0, 1 << grid.bits, shape).astype(np.uint8)


@given(
    grid=st.sampled_from(GRIDS),
    outer=st.sampled_from([None, int_grid(6, False), int_grid(8, True), E4M3]),
    zero=st.booleans(),
    offset=st.booleans(),
    act_order=st.booleans(),
    scale=st.sampled_from(["F32", "F16", "BF16"]),
    seed=st.integers(0, 1000),
)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_every_grid_comes_back(
    model: Model, tmp_path_factory: pytest.TempPathFactory, grid: Grid, outer: Grid | None, zero: bool, offset: bool,
    act_order: bool, scale: str, seed: int,
) -> None:  # fmt: skip
    rng = np.random.default_rng(seed)

    def plain(shape: tuple[int, ...]) -> Tensor:
        x = rng.standard_normal(shape).astype(np.float32)
        if scale == "BF16":
            return dense((x.view(np.uint32) >> 16).astype(np.uint16), "BF16")
        return dense(x.astype(np.float16) if scale == "F16" else x)

    def side() -> Tensor | QTensor:
        if outer is None:
            return plain((256, 8))
        return QTensor((256, 8), dense(random_codes(rng, outer, (256, 8))), outer, (1, 8), plain((256, 1)))

    q = QTensor(
        (256, 256), dense(random_codes(rng, grid, (256, 256))), grid, (1, 32), side(),
        zero=dense(rng.integers(0, 16, (256, 8)).astype(np.uint8)) if zero else None,
        offset=side() if offset else None,
        g_idx=dense(rng.permutation(np.arange(256, dtype=np.int32) // 32)) if act_order else None,
    )  # fmt: skip
    name = "layers.0.attn.o"
    changed = model.with_entries({name: replace(model.entries[name], data=q)})
    again = write(changed, tmp_path_factory.mktemp("x") / "m.lcir")
    assert_equal(q, again.entries[name].data)


@pytest.mark.parametrize("type_", sorted(SCHEMES))
def test_every_block_type_comes_back(type_: str, model: Model, tmp_path: Path) -> None:
    """Every GGUF block type that has an encoder, through rtn on its grid."""
    from lconvert.passes import rtn

    try:
        compressed = rtn.run(model, rtn.Options(grid=type_))
        compressed.entries["layers.0.attn.q"].data.codes.load()  # type: ignore[union-attr]
    except LconvertError as e:
        assert "importance" in str(e) or "imatrix" in str(e), e
        return
    again = write(compressed, tmp_path / "m.lcir")
    for role, entry in compressed.entries.items():
        assert_equal(entry.data, again.entries[role].data)


def test_everything_else_comes_back(tmp_path: Path) -> None:
    model = lconvert.read(DEMO)
    again = write(model, tmp_path / "m.lcir")
    for part in ("arch", "config", "tokenizer", "generation", "name"):
        assert getattr(again, part) == getattr(model, part), part
    assert again.entries.keys() == model.entries.keys()
    for role, entry in model.entries.items():
        assert_equal(entry.data, again.entries[role].data)


def test_a_folder_converts_like_its_source(tmp_path: Path) -> None:
    write(lconvert.read(DEMO), tmp_path / "m.lcir")
    a = lconvert.convert(DEMO, tmp_path / "a.gguf", ftype="Q4_K_M", name="x")
    b = lconvert.convert(tmp_path / "m.lcir", tmp_path / "b.gguf", ftype="Q4_K_M", name="x")
    assert a.paths[0].read_bytes() == b.paths[0].read_bytes()


def test_compressing_writes_the_same_bytes_twice(tmp_path: Path) -> None:
    for name in ("a", "b"):
        model = recipe.load("int4-g32-mse").apply(lconvert.read(DEMO))
        execute(lcir.plan(model, {}), tmp_path / f"{name}.lcir", threads=1 if name == "a" else 3)
    for file in ("lcir.json", "tensors.safetensors"):
        assert (tmp_path / "a.lcir" / file).read_bytes() == (tmp_path / "b.lcir" / file).read_bytes()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write(recipe.load("q4_k").apply(lconvert.read(DEMO)), tmp_path / "m.lcir")
    return tmp_path / "m.lcir"


def _edit(folder: Path, change: Any) -> None:
    meta = json.loads((folder / "lcir.json").read_text())
    change(meta)
    (folder / "lcir.json").write_text(json.dumps(meta))


@pytest.mark.parametrize("schema", ["lcir/2", "lcir/0", None, 7])
def test_another_schema_is_refused_by_name(folder: Path, schema: Any) -> None:
    _edit(folder, lambda m: m.update(schema=schema))
    with pytest.raises(UnsupportedError, match=r"this lconvert reads 'lcir/1'"):
        lconvert.read(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m["entries"].pop("norm"), "no entry uses"),
        (lambda m: m["entries"]["norm"].update(tensor="gone"), "does not hold"),
        (lambda m: m["entries"]["norm"].update(tensor=["a"]), "does not hold"),
        (lambda m: m["entries"].update(norm=3), "not a tensor node"),
        (lambda m: m["entries"]["layers.0.attn.q"].pop("scale"), "incomplete"),
        (lambda m: m["entries"]["layers.0.attn.q"]["grid"].update(wings=2), "unknown fields"),
        (lambda m: m["entries"]["layers.0.attn.q"].update(block=[1, 0]), "block"),
        (lambda m: m["arch"].update(layers=9), "missing entry"),
        (lambda m: m["arch"].pop("default"), "traits are missing"),
        (lambda m: m["arch"]["default"].pop("attention"), "incomplete"),
        (lambda m: m["arch"].update(overrides={"x": {}}), "layer"),
        (lambda m: m.update(entries=[]), "no entries"),
        (lambda m: m.update(config=[]), "must be an object"),
        (lambda m: m.update(tokenizer=[]), "must be an object"),
    ],
)
def test_damage_is_one_clear_error(folder: Path, change: Any, message: str) -> None:
    _edit(folder, change)
    with pytest.raises(LconvertError, match=message):
        lconvert.read(folder)


def test_a_cut_file_is_a_clear_error(folder: Path) -> None:
    data = (folder / "tensors.safetensors").read_bytes()
    (folder / "tensors.safetensors").write_bytes(data[:-10])
    with pytest.raises(InputError):
        lconvert.read(folder)
    shutil.copy(DEMO / "config.json", folder / "lcir.json")
    with pytest.raises(UnsupportedError, match="schema None"):
        lconvert.read(folder)


# --- what quantized sources bring besides weights ---------------------------------------------------------


def _spec(per: str, dynamic: bool, **sides: Any) -> ActSpec:
    group = 16 if per == "group" else None
    return ActSpec(E2M1 if per == "group" else E4M3, per, dynamic, group, **sides)  # type: ignore[arg-type]


_ONE = dense(np.array([0.125], np.float32))
_ACTIVATIONS = {
    "dynamic": _spec("token", True),
    "static": _spec("tensor", False, scale=_ONE),
    "static with a zero point": _spec("tensor", False, scale=_ONE, zero=dense(np.array([3], np.int32))),
    "global, divides": _spec("group", True, scale=_ONE, divisor=True),
    "bf16": _spec("tensor", False, scale=dense(np.array([0x3E00], np.uint16), "BF16")),
}


def assert_same_spec(a: ActSpec | None, b: ActSpec | None) -> None:
    assert a is not None and b is not None
    assert replace(a, scale=None, zero=None) == replace(b, scale=None, zero=None)
    assert_equal(a.scale, b.scale)
    assert_equal(a.zero, b.zero)


@pytest.mark.parametrize("kind", _ACTIVATIONS)
def test_activations_come_back(kind: str, model: Model, tmp_path: Path) -> None:
    name = "layers.1.mlp.down"
    changed = model.with_entries({name: replace(model.entries[name], activation=_ACTIVATIONS[kind])})
    again = write(changed, tmp_path / "m.lcir")
    assert_same_spec(again.entries[name].activation, _ACTIVATIONS[kind])
    assert again.entries["layers.0.mlp.down"].activation is None


def test_the_cache_comes_back(model: Model, tmp_path: Path) -> None:
    scale = dense(np.array([0.5, 0.25], np.float32))
    for kv in (
        KVSpec(_spec("tensor", False, scale=scale), _spec("tensor", False, scale=scale)),
        KVSpec(_spec("token", True), _spec("head", True), residual_window=32, sinks=4, pre_rope=True),
    ):
        again = write(replace(model, kv=kv), tmp_path / "m.lcir").kv
        assert again is not None
        assert_same_spec(again.k, kv.k)
        assert_same_spec(again.v, kv.v)
        assert (again.residual_window, again.sinks, again.pre_rope) == (
            kv.residual_window,
            kv.sinks,
            kv.pre_rope,
        )
    assert write(model, tmp_path / "m.lcir").kv is None


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
def test_an_unfolded_scale_comes_back(dtype: str, model: Model, tmp_path: Path) -> None:
    x = np.linspace(0.5, 2, 512, dtype=np.float32)
    bits = {"F32": x, "F16": x.astype(np.float16), "BF16": (x.view(np.uint32) >> 16).astype(np.uint16)}[dtype]
    t = Transform("scale", "input", dense(bits, "BF16" if dtype == "BF16" else None), folded=False)
    name = "layers.0.mlp.down"
    changed = model.with_entries({name: replace(model.entries[name], transform=t)})
    again = write(changed, tmp_path / "m.lcir").entries[name].transform
    assert again is not None and (again.kind, again.where, again.folded) == ("scale", "input", False)
    assert_equal(again.param, t.param)


@pytest.mark.parametrize("divisor", [False, True])
def test_scales_that_divide_come_back(divisor: bool, model: Model, tmp_path: Path) -> None:
    codes = np.random.default_rng(0).integers(0, 16, (256, 512)).astype(np.uint8)
    local = dense(np.full((256, 32), 0x38, np.uint8))
    scale = QTensor((256, 32), local, E4M3, (-1, -1), dense(np.float32([[1234.5]])), divisor=divisor)
    q = QTensor((256, 512), dense(codes), E2M1, (1, 16), scale)
    outer = QTensor((256, 512), dense(codes), int_grid(4, False), (-1, -1), dense(np.float32([[7.0]])),
                    dense(np.uint8([[8]])), divisor=divisor)  # fmt: skip
    new = {
        n: replace(model.entries[n], data=d)
        for n, d in (("layers.0.mlp.down", q), ("layers.1.mlp.down", outer))
    }
    again = write(model.with_entries(new), tmp_path / "m.lcir")
    for n, e in new.items():
        back = again.entries[n].data
        assert isinstance(back, QTensor) and isinstance(e.data, QTensor)
        assert_equal(back, e.data)
        assert back.divisor == e.data.divisor
        if isinstance(back.scale, QTensor):
            assert back.scale.divisor == divisor
        assert np.array_equal(dequantize(back), dequantize(e.data))


def test_whole_model_transforms_are_refused(model: Model) -> None:
    t = Transform("rotate", "residual", folded=False)
    with pytest.raises(UnsupportedError, match="unfolded transforms of the whole model"):
        lcir.plan(replace(model, transforms=(t,)), {})
    lcir.plan(replace(model, transforms=(replace(t, folded=True),)), {})


@pytest.fixture
def quantized_folder(model: Model, tmp_path: Path) -> Path:
    scale = dense(np.array([0.5, 0.25], np.float32))
    t = Transform("scale", "input", dense(np.ones(512, np.float32)), folded=False)
    kv = KVSpec(_spec("tensor", False, scale=scale), _spec("tensor", False, scale=scale))
    name = "layers.0.mlp.down"
    entry = replace(model.entries[name], activation=_ACTIVATIONS["static"], transform=t)
    write(replace(model.with_entries({name: entry}), kv=kv), tmp_path / "m.lcir")
    return tmp_path / "m.lcir"


def _down(meta: Any) -> Any:
    return meta["entries"]["layers.0.mlp.down"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: _down(m).pop("activation"), "no entry uses"),
        (lambda m: _down(m).update(activation=None), "is not a grid|expected an object"),
        (lambda m: _down(m).update(activation=[]), "expected an object"),
        (lambda m: _down(m)["activation"].update(per="row"), "ActSpec.per is 'row'"),
        (lambda m: _down(m)["activation"].update(dynamic=1), "ActSpec.dynamic"),
        (lambda m: _down(m)["activation"].update(group="16"), "ActSpec.group"),
        (lambda m: _down(m)["activation"].update(grid={"kind": "int"}), "grid|Grid"),
        (lambda m: _down(m)["activation"].update(wings=2), "unknown fields"),
        (lambda m: _down(m)["activation"].update(scale={"tensor": "gone"}), "does not hold"),
        (
            lambda m: _down(m)["activation"]["scale"].update(tensor="layers.0.mlp.down.transform"),
            "one value|no entry uses",
        ),
        (lambda m: _down(m).pop("transform"), "no entry uses"),
        (lambda m: _down(m)["transform"].update(kind="twist"), "Transform.kind"),
        (lambda m: _down(m)["transform"].update(folded=True), "never says"),
        (lambda m: _down(m)["transform"].pop("param"), "param|no entry uses"),
        (lambda m: _down(m)["transform"]["param"].update(tensor="norm"), "512|no entry uses"),
        (lambda m: m.pop("kv"), "no entry uses"),
        (lambda m: m["kv"].pop("v"), "expected an object"),
        (lambda m: m["kv"]["k"].update(per="everywhere"), "ActSpec.per"),
        (lambda m: m["kv"].update(sinks="two"), "KVSpec.sinks"),
        (lambda m: m["kv"]["k"]["scale"].update(tensor="kv.v.scale"), "no entry uses"),
        (lambda m: m["kv"]["k"]["scale"].update(tensor="norm"), "one value per layer|no entry uses"),
    ],
)
def test_damage_to_what_is_beside_the_weights(quantized_folder: Path, change: Any, message: str) -> None:
    _edit(quantized_folder, change)
    with pytest.raises(LconvertError, match=message):
        lconvert.read(quantized_folder)


@pytest.mark.parametrize(
    ("which", "shape", "message"),
    [
        ("kv.k.scale", (3,), r"kv: k has scales of shape \(3,\), expected one for each of 2 layers"),
        ("kv.v.scale", (2, 1), r"kv: v has scales of shape \(2, 1\)"),
        (
            "layers.0.mlp.down.transform",
            (511,),
            "layers.0.mlp.down: the transform of its input has not one value for each of 512 inputs",
        ),
    ],
)
def test_side_tensors_of_another_size(
    model: Model, which: str, shape: tuple[int, ...], message: str, tmp_path: Path
) -> None:
    """A cache with a scale too many, or a scale of another width: the file is whole, the model is not."""
    wrong = dense(np.ones(shape, np.float32))
    right = dense(np.ones(2, np.float32))
    if which.startswith("kv"):
        sides = [_spec("tensor", False, scale=wrong if which == f"kv.{s}.scale" else right) for s in "kv"]
        changed = replace(model, kv=KVSpec(sides[0], sides[1]))
    else:
        name = "layers.0.mlp.down"
        t = Transform("scale", "input", wrong, folded=False)
        changed = model.with_entries({name: replace(model.entries[name], transform=t)})
    execute(lcir.plan(changed, {}), tmp_path / "m.lcir")
    with pytest.raises(LconvertError, match=message):
        lconvert.read(tmp_path / "m.lcir")


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
def test_scales_that_are_no_numbers_are_named(bad: float, dtype: str, model: Model, tmp_path: Path) -> None:
    x = np.ones((256, 16), np.float32)
    x[77, 3] = bad
    bits = {"F32": x, "F16": x.astype(np.float16), "BF16": (x.view(np.uint32) >> 16).astype(np.uint16)}[dtype]
    scale = dense(bits, "BF16" if dtype == "BF16" else None)
    q = QTensor((256, 512), dense(np.ones((256, 512), np.int8)), int_grid(4, True), (1, 32), scale)
    name = "layers.0.mlp.down"
    again = write(
        model.with_entries({name: replace(model.entries[name], data=q)}), tmp_path / "m.lcir"
    ).entries[name]
    assert isinstance(again.data, QTensor)
    assert np.array_equal(dequantize(again.data, 0, 77), np.ones((77, 512), np.float32))
    with pytest.raises(
        InputError, match=r"layers\.0\.mlp\.down\.scale: holds NaN or infinite scales in rows"
    ):
        dequantize(again.data)
