"""Views, the meaning of a QTensor, and what makes a Model illegal."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import lconvert
from lconvert.converters.gguf_names import interleave
from lconvert.errors import InputError, SpecError
from lconvert.ir import (
    E2M1,
    E4M3,
    E8M0,
    Grid,
    Model,
    QTensor,
    Tensor,
    concat_rows,
    dense,
    int_grid,
    take_rows,
)
from lconvert.kernels.qtensor import dequantize, float_values
from lconvert.spec import check, problems
from tests.checkpoints import write_llama


def test_take_rows_is_indexing() -> None:
    x = np.arange(60, dtype=np.float32).reshape(12, 5)
    view = take_rows(dense(x), ((2, 4), (7, 8), (0, 3)))
    want = np.concatenate([x[2:4], x[7:8], x[0:3]])
    assert view.shape == want.shape
    for a in range(7):
        for b in range(a, 7):
            assert np.array_equal(view.read(a, b), want[a:b])


def test_concat_rows_is_concatenation() -> None:
    parts = [np.full((n, 3), n, np.float32) for n in (2, 1, 4)]
    view = concat_rows(tuple(dense(p) for p in parts))
    want = np.concatenate(parts)
    assert np.array_equal(view.load(), want)
    assert np.array_equal(view.read(1, 5), want[1:5])


@given(heads=st.integers(1, 4), half=st.integers(1, 8), start=st.integers(0, 63), length=st.integers(0, 64))
@settings(max_examples=100, deadline=None)
def test_interleave_is_llamas_permutation(heads: int, half: int, start: int, length: int) -> None:
    """Against the reshape of llama.cpp's converter (conversion/llama.py permute), any slab, and its inverse."""
    rows = heads * 2 * half
    x = np.arange(rows * 3, dtype=np.float32).reshape(rows, 3)
    want = x.reshape(heads, 2, half, 3).swapaxes(1, 2).reshape(rows, 3)
    t = interleave(dense(x), 2 * half)
    a = min(start, rows)
    b = min(a + length, rows)
    assert np.array_equal(t.read(a, b), want[a:b])
    assert np.array_equal(interleave(t, 2 * half, inverse=True).read(a, b), x[a:b])


def test_float_grids_are_the_published_formats() -> None:
    assert float_values(2, 1, True, 4).tolist() == [
        0,
        0.5,
        1,
        1.5,
        2,
        3,
        4,
        6,
        -0.0,
        -0.5,
        -1,
        -1.5,
        -2,
        -3,
        -4,
        -6,
    ]
    e4m3 = float_values(4, 3, True, 8)
    assert e4m3[0x7E] == 448 and np.isnan(e4m3[0x7F]) and e4m3[1] == 2.0**-9
    e8m0 = float_values(8, 0, False, 8)
    assert e8m0[127] == 1 and e8m0[0] == 2.0**-127 and np.isnan(e8m0[255])


def test_float_grids_agree_with_torch() -> None:
    torch = pytest.importorskip("torch", reason="torch is not installed")
    codes = torch.arange(256, dtype=torch.uint8)
    theirs = codes.view(torch.float8_e4m3fn).float().numpy()
    assert np.array_equal(float_values(4, 3, True, 8), theirs, equal_nan=True)
    theirs = codes.view(torch.float8_e5m2).float().numpy()
    ours = float_values(5, 2, True, 8)
    finite = np.isfinite(theirs)
    assert np.array_equal(ours[finite], theirs[finite])
    theirs = codes.view(torch.float8_e8m0fnu).float().numpy()
    assert np.array_equal(float_values(8, 0, False, 8), theirs, equal_nan=True)


def test_canonical_evaluation_takes_the_scale_first() -> None:
    """(c - z) * (s * g) - o, each product one fp32 rounding; (c * s) * g differs for these numbers."""
    f32 = np.float32
    s, g, z, o = 7, f32(1.1), f32(3), f32(0.3)
    inner = QTensor(
        (1, 1), dense(np.array([[s]], np.uint8)), int_grid(6, False), (1, 1), dense(np.array([[g]], f32))
    )
    codes = dense(np.array([[5, 9]], np.uint8))
    q = QTensor(
        (1, 2),
        codes,
        int_grid(4, False),
        (1, 2),
        inner,
        dense(np.array([[z]], f32)),
        dense(np.array([[o]], f32)),
    )
    scale = f32(f32(s) * g)
    want = [f32(f32(f32(c) - z) * scale) - o for c in (5, 9)]
    assert dequantize(q).tolist() == [[float(f32(w)) for w in want]]


@given(
    rows=st.integers(1, 5),
    blocks=st.integers(1, 4),
    width=st.sampled_from([1, 2, 16]),
    height=st.sampled_from([1, 2, -1]),
    data=st.data(),
)
@settings(max_examples=60, deadline=None)
def test_dequantize_slabs_equal_the_definition(
    rows: int, blocks: int, width: int, height: int, data: st.DataObject
) -> None:
    rng = np.random.default_rng(data.draw(st.integers(0, 99)))
    cols = blocks * width
    h = rows if height == -1 else height
    count = (-(-rows // h), blocks)
    codes = rng.integers(0, 16, (rows, cols), dtype=np.uint8)
    scale = rng.standard_normal(count).astype(np.float32)
    zero = rng.integers(0, 16, count).astype(np.uint8)
    q = QTensor((rows, cols), dense(codes), int_grid(4, False), (height, width), dense(scale), dense(zero))
    want = np.array(
        [
            [
                np.float32(np.float32(codes[r, c]) - np.float32(zero[r // h, c // width]))
                * scale[r // h, c // width]
                for c in range(cols)
            ]
            for r in range(rows)
        ],
        np.float32,
    )
    assert np.array_equal(dequantize(q), want)
    a = data.draw(st.integers(0, rows))
    b = data.draw(st.integers(a, rows))
    assert np.array_equal(dequantize(q, a, b), want[a:b])


def test_act_order_uses_g_idx() -> None:
    codes = np.array([[1, 2, 3, 4]], np.uint8)
    q = QTensor((1, 4), dense(codes), int_grid(4, False), (1, 2), dense(np.array([[1.0, 10.0]], np.float32)),
                g_idx=dense(np.array([1, 0, 1, 0], np.int32)))  # fmt: skip
    assert dequantize(q).tolist() == [[10, 2, 30, 4]]


def test_codebook_grid() -> None:
    q = QTensor((1, 3), dense(np.array([[2, 0, 1]], np.uint8)), Grid("codebook", 2, values=(-1.0, 0.5, 3.0)), (1, 3),
                dense(np.array([[2.0]], np.float32)))  # fmt: skip
    assert dequantize(q).tolist() == [[6, -2, 1]]


def test_grids_differ() -> None:
    assert len({E2M1, E4M3, E8M0, int_grid(4, True), int_grid(4, False)}) == 5


# --- spec ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return lconvert.read(write_llama(tmp_path_factory.mktemp("m") / "model"))


def _with(model: Model, name: str, tensor: Tensor | QTensor) -> Model:
    return model.with_entries({name: replace(model.entries[name], data=tensor)})


def test_a_read_model_is_legal(model: Model) -> None:
    assert problems(model) == []


def test_spec_names_missing_unknown_and_misshapen_entries(model: Model) -> None:
    fewer = replace(model, entries={k: v for k, v in model.entries.items() if k != "layers.1.attn.k"})
    assert problems(fewer) == ["missing entry layers.1.attn.k (128, 256)"]
    extra = replace(model, entries={**model.entries, "layers.9.mlp.up": model.entries["norm"]})
    assert "unknown entry layers.9.mlp.up" in problems(extra)
    wrong = _with(model, "norm", dense(np.ones(3, np.float32)))
    assert problems(wrong)[0].startswith("norm: shape (3,), but the configuration implies (256,)")
    with pytest.raises(SpecError, match="missing entry"):
        check(fewer)


def test_spec_names_illegal_quantized_tensors(model: Model) -> None:
    codes = dense(np.zeros((256, 256), np.uint8))
    scale = dense(np.ones((256, 7), np.float32))
    q = QTensor((256, 256), codes, int_grid(4, False), (1, 32), scale)
    assert problems(_with(model, "layers.0.attn.o", q)) == [
        "layers.0.attn.o: scale has shape (256, 7), expected one value per block (256, 8)"
    ]
    q = replace(q, scale=dense(np.ones((256, 8), np.int32)))
    assert "scale is stored as I32" in problems(_with(model, "layers.0.attn.o", q))[0]


def test_spec_names_illegal_traits(model: Model) -> None:
    attention = replace(model.arch.default.attention, kv_heads=3)
    bad = replace(model, arch=replace(model.arch, default=replace(model.arch.default, attention=attention)))
    assert problems(bad) == ["layer 0: 8 heads are not a multiple of 3 key-value heads"]


def test_reading_is_lazy(tmp_path: Path) -> None:
    """A Model costs its headers: weights that cannot be read any more do not matter until they are used."""
    folder = write_llama(tmp_path / "model")
    model = lconvert.read(folder)
    (folder / "model.safetensors").unlink()
    assert problems(model) == []
    with pytest.raises(InputError, match="no such file"):
        model.entries["norm"].data.load()
