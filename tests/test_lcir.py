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
from lconvert.formats.gguf_blocks import SCHEMES
from lconvert.ir import E2M1, E4M3, E8M0, Grid, Model, QTensor, Tensor, dense, int_grid
from lconvert.plan import execute
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
