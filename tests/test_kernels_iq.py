"""IQ1, IQ2, IQ3: bytes and floats of ggml on every instruction set, and lossless parts."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from lconvert import kernels
from lconvert.errors import InputError, OptionError
from lconvert.formats.gguf_blocks import native_type, packer, raised
from lconvert.ir import dense
from lconvert.kernels import qtensor
from lconvert.kernels.reference.iq import SCALE_VALUES, SUB, VALUES
from lconvert.kernels.reference.iq_tables import lattice, neighbours
from tests import ggml_oracle
from tests.kernel_cases import (
    F32,
    INPUTS,
    assert_dequantizes_as_ggml,
    assert_quantizes_as_ggml,
    assert_same_blocks,
    importances,
    make_input,
    random_blocks,
)

needs_ggml = pytest.mark.skipif(ggml_oracle.MISSING is not None, reason=str(ggml_oracle.MISSING))

TYPES = tuple(VALUES)
NEED_WEIGHTS = ("IQ2_XXS", "IQ2_XS", "IQ1_S")
# ggml aborts on most of these: no neighbour has a finite error.
BEYOND_GGML = ("squares-overflow", "huge", "any-bits")
ROWS, COLS = 2, 512


def _weights(type: str, cols: int) -> dict[str, F32 | None]:
    return {k: w for k, w in importances(cols).items() if w is not None or type not in NEED_WEIGHTS}


@needs_ggml
@pytest.mark.parametrize("name", [n for n in INPUTS if n not in BEYOND_GGML])
@pytest.mark.parametrize("type", TYPES)
def test_quantize_equals_ggml(type: str, name: str) -> None:
    for weights in _weights(type, COLS).values():
        assert_quantizes_as_ggml(type, make_input(name, ROWS, COLS), weights)


@pytest.mark.parametrize("name", BEYOND_GGML)
@pytest.mark.parametrize("type", TYPES)
def test_instruction_sets_agree_beyond_ggml(type: str, name: str) -> None:
    x = make_input(name, ROWS, COLS)
    for weights in _weights(type, COLS).values():
        expected = kernels.quantize(type, x, weights=weights, isa="reference")
        for isa in kernels.isas():
            assert_same_blocks(type, kernels.quantize(type, x, weights=weights, isa=isa), expected, x, isa)


@needs_ggml
@pytest.mark.parametrize("type", TYPES)
@pytest.mark.parametrize("rows, cols", [(1, 256), (17, 256), (1, 4096), (3, 2304)])
def test_every_shape(type: str, rows: int, cols: int) -> None:
    weights = importances(cols)
    assert_quantizes_as_ggml(type, make_input("student", rows, cols), weights["wide"])


@needs_ggml
@pytest.mark.parametrize("type", TYPES)
@settings(max_examples=15, deadline=None)
@given(
    x=arrays(np.float32, (1, 256), elements=st.floats(-(2.0**30), 2.0**30, width=32)),
    weights=arrays(np.float32, 256, elements=st.floats(0, 2.0**20, width=32)),
)
def test_any_moderate_values(type: str, x: F32, weights: F32) -> None:
    assert_quantizes_as_ggml(type, x, weights)


@needs_ggml
@pytest.mark.parametrize("type", TYPES)
def test_threads_give_the_same_bytes(type: str) -> None:
    x = make_input("normal", 40, 512)
    weights = importances(512)["random"]
    with ThreadPoolExecutor(4) as pool:
        slabs = pool.map(
            lambda row: kernels.quantize(type, x[row : row + 7], weights=weights), range(0, 40, 7)
        )
    assert np.array_equal(np.concatenate(list(slabs)), ggml_oracle.quantize(type, x, weights))


@needs_ggml
@pytest.mark.parametrize("type", TYPES)
def test_needs_weights_where_ggml_does(type: str) -> None:
    assert ggml_oracle.requires_weights(type) == (type in NEED_WEIGHTS)
    x = make_input("normal", 1, 256)
    for isa in (*kernels.isas(), None):
        if type in NEED_WEIGHTS:
            with pytest.raises(OptionError, match=f"{type} needs an importance matrix"):
                kernels.quantize(type, x, isa=isa)
        else:
            assert kernels.quantize(type, x, isa=isa).any()


@needs_ggml
def test_iq3_s_moves_up_behind_zeros_as_ggml_does() -> None:
    """ggml does not advance its output behind a sub-block of zeros; the same bytes mean the same wrong values."""
    x = make_input("normal", 1, 256)
    clean = kernels.quantize("IQ3_S", x)
    x[0, 32:64] = 0
    assert_quantizes_as_ggml("IQ3_S", x)
    blocks = kernels.quantize("IQ3_S", x)
    assert np.array_equal(blocks[0, 2:10], clean[0, 2:10])
    assert np.array_equal(blocks[0, 10:58], clean[0, 18:66]) and not blocks[0, 58:66].any()
    error = np.abs(kernels.dequantize("IQ3_S", blocks, 256) - x).reshape(8, 32).max(axis=1)
    assert error[0] < 0.5 and (error[2:] > 1).all()


@needs_ggml
@pytest.mark.parametrize("type", TYPES)
def test_dequantize_equals_ggml(type: str) -> None:
    assert_dequantizes_as_ggml(type, random_blocks(type, 40, 9), 256 * 9)


# ---- parts ----


def _finite_blocks(type: str, rows: int, blocks_per_row: int) -> np.ndarray:
    """Random blocks with finite scales."""
    blocks = random_blocks(type, rows, blocks_per_row)
    d = kernels.unpack(type, blocks)["super_scale"]
    parts = kernels.unpack(type, blocks)
    parts["super_scale"] = np.where(np.isfinite(d), d, np.float16(0.5))
    return kernels.pack(type, parts)


@pytest.mark.parametrize("type", TYPES)
def test_pack_inverts_unpack_for_all_bytes(type: str) -> None:
    blocks = random_blocks(type, 50, 7)
    assert np.array_equal(kernels.pack(type, kernels.unpack(type, blocks)), blocks)


@pytest.mark.parametrize("type", TYPES)
def test_parts_have_their_shapes(type: str) -> None:
    parts = kernels.unpack(type, random_blocks(type, 5, 3))
    assert parts["codes"].shape == (5, 768) and parts["codes"].dtype == np.uint8
    assert parts["codes"].max() == len(VALUES[type]) - 1
    assert parts["scale"].shape == (5, 768 // SUB[type]) and parts["scale"].dtype == np.uint8
    assert parts["scale"].max() == len(SCALE_VALUES[type]) - 1
    assert parts["super_scale"].shape == (5, 3) and parts["super_scale"].dtype == np.float16
    if type.startswith("IQ1"):
        assert parts["zero"].shape == parts["scale"].shape and parts["zero"].dtype == np.float16
        assert set(np.unique(parts["zero"])) == {-0.125, 0.125}
    else:
        assert set(parts) == {"codes", "scale", "super_scale"}


@needs_ggml
@pytest.mark.parametrize("type", TYPES)
def test_qtensor_means_what_ggml_reads(type: str) -> None:
    """The canonical value of the raised blocks is ggml's, and they pack to the bytes they came from."""
    blocks = _finite_blocks(type, 20, 6)
    q = raised(type, dense(blocks))
    expected = ggml_oracle.dequantize(type, blocks, 1536)
    assert np.array_equal(qtensor.dequantize(q).view(np.uint32), expected.view(np.uint32))
    assert np.array_equal(qtensor.dequantize(q, 3, 11), expected[3:11])
    assert native_type(q) == type
    assert np.array_equal(packer(type, q)(0, 20), blocks)
    assert np.array_equal(packer(type, q)(4, 9), blocks[4:9])


def _damaged(type: str, part: str, row: int, col: int, value: float) -> dict[str, np.ndarray]:
    parts = kernels.unpack(type, random_blocks(type, 3, 2))
    parts[part][row, col] = value
    return parts


@pytest.mark.parametrize("type", TYPES)
def test_pack_refuses_codes_off_the_lattice(type: str) -> None:
    parts = kernels.unpack(type, random_blocks(type, 3, 2))
    size, half = lattice(type).size, len(VALUES[type]) // 2
    level = int(neighbours(type).count.argmax())  # a code that is no point
    levels = lattice(type).digits(np.array(level, np.int32))
    parts["codes"][1, 264 : 264 + size] = levels if type.startswith("IQ1") else half + levels
    parts["codes"][1, 264 + size : 272] = parts["codes"][0, 264 + size : 272]
    if size == 4:  # the neighbour in the same 8 values: any point, all positive
        parts["codes"][1, 268:272] = half
    message = (
        rf"row 1, column 264 starts {size} codes that are no point of the lattice; {type} cannot store it"
    )
    with pytest.raises(InputError, match=message):
        kernels.pack(type, parts)


@pytest.mark.parametrize("type", ["IQ2_XXS", "IQ2_XS", "IQ3_XXS"])
def test_pack_refuses_an_odd_number_of_signs(type: str) -> None:
    parts = kernels.unpack(type, random_blocks(type, 3, 2))
    parts["codes"][2, 303] = len(VALUES[type]) - 1 - parts["codes"][2, 303]
    with pytest.raises(
        InputError, match="row 2, column 296 starts 8 values with an odd number of negative ones"
    ):
        kernels.pack(type, parts)


@pytest.mark.parametrize("type", TYPES)
def test_pack_refuses_parts_out_of_range(type: str) -> None:
    with pytest.raises(InputError, match=rf"row 1, column 5 is no code below {len(VALUES[type])}"):
        kernels.pack(type, _damaged(type, "codes", 1, 5, len(VALUES[type])))
    with pytest.raises(InputError, match=rf"row 1, column {3 * SUB[type]} has a scale not below"):
        kernels.pack(type, _damaged(type, "scale", 1, 3, len(SCALE_VALUES[type])))


def test_pack_refuses_what_only_iq1_can_have_wrong() -> None:
    for type in ("IQ1_S", "IQ1_M"):
        with pytest.raises(
            InputError, match=f"column {SUB[type]} has a zero that is neither 0.125 nor -0.125"
        ):
            kernels.pack(type, _damaged(type, "zero", 0, 1, 0))
    scales = kernels.unpack("IQ1_M", random_blocks("IQ1_M", 3, 2))["scale"]
    with pytest.raises(InputError, match="row 0, column 48 starts 16 values with two scales"):
        kernels.pack("IQ1_M", _damaged("IQ1_M", "scale", 0, 7, (scales[0, 7] + 1) % 8))


# ---- tables ----


@pytest.mark.parametrize("type", TYPES)
def test_neighbours_are_the_nearest_shells_in_order(type: str) -> None:
    grid, near = lattice(type), neighbours(type)
    points = grid.digits(grid.points)
    assert np.array_equal(grid.codes(points), grid.points)
    assert np.array_equal(grid.index[grid.points], np.arange(len(points)))
    off = np.flatnonzero(near.count)
    assert len(off) + len(points) == grid.levels**grid.size
    for code in off[:: len(off) // 50]:
        distance = ((points - grid.digits(np.array(code, np.int32))) ** 2).sum(axis=1)
        limit = np.unique(distance)[grid.shells - 1]
        expected = sorted((d, i) for i, d in enumerate(distance.tolist()) if d <= limit)
        got = near.points[near.first[code] : near.first[code] + near.count[code]]
        assert got.tolist() == [int(grid.points[i]) for _, i in expected]
