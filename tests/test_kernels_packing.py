"""Packing of codes: every layout against a definition in whole numbers, against its peer's packing and its files."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from lconvert import kernels
from lconvert.errors import InputError, OptionError
from lconvert.formats import safetensors
from lconvert.ir import as_f32
from lconvert.kernels import packing
from lconvert.kernels.reference import family
from tests.conftest import ROOT, SHARED

Codes = NDArray[Any]

WIDTHS = range(1, 9)
# Parts of a word and of a group of eight, more than a tile of 64 columns by 512 codes, and nothing.
SHAPES = [(1, 1), (3, 5), (16, 37), (70, 1100), (65, 64), (2, 2048), (0, 8), (4, 0)]
GGUF_TYPES = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "MXFP4", "NVFP4")
PATHS = ("native", "reference") if kernels.native_available() else ("reference",)


@pytest.fixture(params=PATHS)
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The compiled module and the NumPy specification in turn."""
    if request.param == "reference":
        monkeypatch.setenv("LCONVERT_ISA", "reference")
    else:
        monkeypatch.delenv("LCONVERT_ISA", raising=False)
    assert (kernels.native_module() is None) == (request.param == "reference")
    name: str = request.param
    return name


def random_codes(rows: int, cols: int, bits: int, signed: bool = False) -> Codes:
    rng = np.random.default_rng(1000 * rows + 10 * cols + bits)
    stored = rng.integers(0, 1 << bits, (rows, cols))
    return (stored - (1 << bits >> 1)).astype(np.int8) if signed else stored.astype(np.uint8)


def stream_of(row: Codes, bits: int, signed: bool = False) -> int:
    """The definition: a row is one whole number, code j its digit j to the base 2**bits."""
    offset = 1 << (bits - 1) if signed else 0
    return sum((int(code) + offset) << (bits * j) for j, code in enumerate(row))


def number_of(words: NDArray[np.uint32]) -> int:
    return sum(int(word) << (32 * j) for j, word in enumerate(words))


# --- the definition ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("bits", WIDTHS)
def test_rows_are_streams_of_bits(path: str, bits: int, signed: bool, shape: tuple[int, int]) -> None:
    codes = random_codes(*shape, bits, signed)
    words = packing.pack_rows(codes, bits, signed=signed)
    assert words.dtype == np.uint32 and words.shape == (shape[0], -(-shape[1] * bits // 32))
    for row in {0, shape[0] // 2, shape[0] - 1} & set(range(shape[0])):
        assert number_of(words[row]) == stream_of(codes[row], bits, signed)
    again = packing.unpack_rows(words, bits, shape[1], signed=signed)
    assert again.dtype == codes.dtype and np.array_equal(again, codes)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("bits", WIDTHS)
def test_columns_are_streams_of_bits(path: str, bits: int, signed: bool, shape: tuple[int, int]) -> None:
    codes = random_codes(*shape, bits, signed)
    words = packing.pack_columns(codes, bits, signed=signed)
    assert words.dtype == np.uint32 and words.shape == (-(-shape[1] * bits // 32), shape[0])
    assert np.array_equal(words.T, packing.pack_rows(codes, bits, signed=signed))
    again = packing.unpack_columns(words, bits, shape[1], signed=signed)
    assert again.dtype == codes.dtype and again.flags.c_contiguous and np.array_equal(again, codes)
    start, stop = shape[0] // 3, shape[0] - shape[0] // 4
    slab = packing.unpack_columns(words, bits, shape[1], signed=signed, start=start, stop=stop)
    assert np.array_equal(slab, codes[start:stop])


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("bits", WIDTHS)
def test_words_that_waste_their_rest(path: str, bits: int, signed: bool, shape: tuple[int, int]) -> None:
    codes = random_codes(*shape, bits, signed)
    words = packing.pack_rows(codes, bits, signed=signed, stream=False)
    each = 32 // bits
    assert words.shape == (shape[0], -(-shape[1] // each))
    for row in range(min(shape[0], 3)):
        for k, word in enumerate(words[row]):
            assert word == stream_of(codes[row, k * each : (k + 1) * each], bits, signed)
    again = packing.unpack_rows(words, bits, shape[1], signed=signed, stream=False)
    assert again.dtype == codes.dtype and np.array_equal(again, codes)
    if 32 % bits == 0:
        assert np.array_equal(words, packing.pack_rows(codes, bits, signed=signed))


def test_three_bits_of_gptq(path: str) -> None:
    """32 values in 3 words: values 10 and 21 lie across two of them."""
    codes = np.zeros((1, 32), np.uint8)
    codes[0, [0, 10, 21, 31]] = [1, 0b111, 0b110, 0b101]
    words = packing.pack_columns(codes, 3)
    assert [int(word) for word in words[:, 0]] == [1 | 3 << 30, 1, 0b11 | 0b101 << 29]


@pytest.mark.parametrize("n, k", [(8, 1), (16, 37), (1000, 130), (64, 64), (8, 0), (0, 5)])
def test_awq_words(path: str, n: int, k: int) -> None:
    codes = random_codes(n, k, 4)
    words = packing.pack_awq(codes)
    assert words.dtype == np.uint32 and words.shape == (k, n // 8)
    for row in range(min(k, 3)):
        for word in range(n // 8):
            eight = codes[8 * word : 8 * word + 8, row]
            assert words[row, word] == stream_of(eight[[0, 2, 4, 6, 1, 3, 5, 7]], 4)
    assert np.array_equal(packing.unpack_awq(words), codes)
    assert np.array_equal(packing.unpack_awq(words, 8 * (n // 24), n), codes[8 * (n // 24) :])


@pytest.mark.parametrize("n, k", [(2, 1), (6, 37), (100, 130), (0, 5)])
def test_pairs_of_rows(path: str, n: int, k: int) -> None:
    codes = random_codes(n, k, 4, signed=True)
    packed = packing.pack_row_pairs(codes)
    assert packed.dtype == np.uint8 and packed.shape == (n // 2, k)
    for i in range(n // 2):
        for byte, low, high in zip(packed[i], codes[2 * i], codes[2 * i + 1], strict=True):
            assert byte == int(low) % 16 + 16 * (int(high) % 16)
    again = packing.unpack_row_pairs(packed)
    assert again.dtype == np.int8 and np.array_equal(again, codes)


@pytest.mark.parametrize("high_first", [False, True])
@pytest.mark.parametrize("rows, cols", [(1, 1), (3, 16), (5, 37), (2, 1030), (0, 4), (3, 0)])
def test_nibbles(path: str, rows: int, cols: int, high_first: bool) -> None:
    codes = random_codes(rows, cols, 4)
    packed = packing.pack_nibbles(codes, high_first=high_first)
    assert packed.dtype == np.uint8 and packed.shape == (rows, -(-cols // 2))
    for row in range(rows):
        pairs = [*codes[row], 0][: 2 * packed.shape[1]]
        first, second = pairs[::2], pairs[1::2]
        low, high = (second, first) if high_first else (first, second)
        expected = [int(a) + 16 * int(b) for a, b in zip(low, high, strict=True)]
        assert packed[row].tolist() == expected
    assert np.array_equal(packing.unpack_nibbles(packed, cols, high_first=high_first), codes)
    if cols % 2 == 0:
        assert np.array_equal(packing.unpack_nibbles(packed, high_first=high_first), codes)


@settings(max_examples=150, deadline=None)
@given(
    bits=st.integers(1, 8),
    rows=st.integers(0, 70),
    cols=st.integers(0, 600),
    signed=st.booleans(),
    stream=st.booleans(),
    seed=st.integers(0, 2**32 - 1),
)
def test_any_words(bits: int, rows: int, cols: int, signed: bool, stream: bool, seed: int) -> None:
    """Words of a foreign writer, unused bits set: they are ignored, and written as 0."""
    rng = np.random.default_rng(seed)
    shape = (rows, packing.words_for(cols, bits, stream))
    words = rng.integers(0, 2**32, shape, dtype=np.uint32)
    codes = packing.unpack_rows(words, bits, cols, signed=signed, stream=stream)
    clean = packing.pack_rows(codes, bits, signed=signed, stream=stream)
    assert np.array_equal(
        packing.unpack_rows(clean, bits, cols, signed=signed, stream=stream), codes
    ) and np.array_equal(clean & words, clean)
    for row in range(min(rows, 2)):
        used = bits * cols
        if stream:
            assert number_of(clean[row]) == number_of(words[row]) % (1 << used)
    if stream:
        turned = packing.unpack_columns(np.ascontiguousarray(words.T), bits, cols, signed=signed)
        assert np.array_equal(turned, codes)
        assert np.array_equal(packing.pack_columns(codes, bits, signed=signed), clean.T)


# --- arrays -------------------------------------------------------------------------------------------------


def test_arrays_of_every_kind(path: str) -> None:
    """int32 and bytes instead of uint32, read-only, strided, and bytes of a mapped file that start anywhere."""
    codes = random_codes(24, 40, 4)
    words = packing.pack_rows(codes, 4)
    frozen = words.copy()
    frozen.flags.writeable = False
    wide = np.zeros((24, 10), np.uint32)
    wide[:, ::2] = words
    raw = np.frombuffer(b"x" + words.tobytes(), np.uint8)[1:]
    unaligned = raw.view(np.uint32).reshape(words.shape)
    assert not unaligned.flags.aligned
    same: Any
    for same in (words.view(np.int32), words.view(np.uint8), frozen, wide[:, ::2], unaligned):
        assert np.array_equal(packing.unpack_rows(same, 4, 40), codes)
        turned = np.asfortranarray(same) if same.dtype != np.uint8 else same
        assert np.array_equal(packing.unpack_rows(turned, 4, 40), codes)
    assert np.array_equal(packing.pack_rows(np.asfortranarray(codes), 4), words)
    columns = np.ascontiguousarray(packing.pack_columns(codes, 4))
    shifted = np.frombuffer(b"xyz" + columns.tobytes(), np.uint8)[3:].view(np.int32).reshape(columns.shape)
    assert np.array_equal(packing.unpack_columns(shifted, 4, 40, start=5), codes[5:])
    awq = np.frombuffer(b"x" + packing.pack_awq(codes).tobytes(), np.uint8)[1:].view(np.uint32).reshape(40, 3)
    assert np.array_equal(packing.unpack_awq(awq, 8, 16), codes[8:16])


def test_slabs_of_a_common_output(path: str) -> None:
    """A slab fills its columns and leaves the others alone."""
    codes = random_codes(200, 96, 3)
    whole = packing.pack_columns(codes, 3)
    out = np.full_like(whole, 7)
    for start in (0, 130):
        assert packing.pack_columns(codes[start : start + 70], 3, out=out, start=start) is out
    expected = whole.copy()
    expected[:, 70:130] = 7
    assert np.array_equal(out, expected)

    codes = random_codes(208, 31, 4)
    whole = packing.pack_awq(codes)
    out = np.full_like(whole, 7)
    for start in (0, 128):
        assert packing.pack_awq(codes[start : start + 80], out=out, start=start) is out
    expected = whole.copy()
    expected[:, 10:16] = 7
    assert np.array_equal(out, expected)


def test_refuses_outputs_that_do_not_fit(path: str) -> None:
    codes = np.zeros((16, 64), np.uint8)
    with pytest.raises(
        OptionError, match=r"out must be contiguous uint32 with 8 rows of words, got uint32 \(9, 16\)"
    ):
        packing.pack_columns(codes, 4, out=np.zeros((9, 16), np.uint32))
    with pytest.raises(
        OptionError, match=r"out must be contiguous uint32 with 64 rows of words, got int32 \(64, 2\)"
    ):
        packing.pack_awq(codes, out=np.zeros((64, 2), np.int32))
    with pytest.raises(OptionError, match=r"columns 8 to 24 are not within 0 to 16"):
        packing.pack_columns(codes, 4, out=np.zeros((8, 16), np.uint32), start=8)
    with pytest.raises(OptionError, match=r"columns 1 to 17 are not within 0 to 16"):
        packing.pack_columns(codes, 4, start=1)
    with pytest.raises(OptionError, match=r"columns 1 to 3 are not within 0 to 2"):
        packing.pack_awq(codes, out=np.zeros((64, 2), np.uint32), start=8)
    with pytest.raises(InputError, match=r"AWQ words hold 8 rows each; 16 rows from row 4 cut a word"):
        packing.pack_awq(codes, out=np.zeros((64, 4), np.uint32), start=4)


def test_threads_share_words() -> None:
    codes = random_codes(512, 640, 4)
    words = packing.pack_columns(codes, 4)

    def slab(start: int) -> NDArray[np.uint32]:
        return packing.pack_rows(packing.unpack_columns(words, 4, 640, start=start, stop=start + 64), 4)

    with ThreadPoolExecutor(4) as pool:
        slabs = list(pool.map(slab, range(0, 512, 64)))
    assert np.array_equal(np.concatenate(slabs), packing.pack_rows(codes, 4))


@pytest.mark.skipif(not kernels.native_available(), reason="the compiled kernels are not installed")
@pytest.mark.parametrize("bits", WIDTHS)
def test_neighbouring_rows_stay_untouched(bits: int) -> None:
    """Stores of eight bytes never leave the rows: threads write beside them."""
    native = kernels.native_module()
    assert native is not None
    for cols in range(1, 70):
        codes = random_codes(2, cols, bits)
        words = packing.words_for(cols, bits)
        target = np.full((4, 4 * words), 0xA5, np.uint8)
        native.pack_rows(codes, bits, True, 0, target[1:3])
        assert (target[[0, 3]] == 0xA5).all()
        back = np.full((4, cols), 0xA5, np.uint8)
        native.unpack_rows(target[1:3], bits, True, 0, back[1:3])
        assert (back[[0, 3]] == 0xA5).all() and np.array_equal(back[1:3], codes)


@pytest.mark.skipif(not kernels.native_available(), reason="the compiled kernels are not installed")
def test_the_compiled_module_checks_sizes() -> None:
    """It is the last guard before memory is written."""
    native = kernels.native_module()
    assert native is not None
    b = np.zeros
    calls: list[Callable[[], Any]] = [
        lambda: native.unpack_rows(b((2, 8), np.uint8), 4, True, 0, b((2, 17), np.uint8)),
        lambda: native.unpack_rows(b((2, 8), np.uint8), 9, True, 0, b((2, 16), np.uint8)),
        lambda: native.pack_rows(b((2, 17), np.uint8), 4, True, 0, b((2, 8), np.uint8)),
        lambda: native.unpack_columns(b((2, 8), np.uint8), 4, 0, 1, b((2, 16), np.uint8)),
        lambda: native.pack_columns(b((2, 16), np.uint8), 4, 0, 1, b((2, 8), np.uint8)),
        lambda: native.unpack_awq(b((3, 8), np.uint8), 8, b((16, 3), np.uint8)),
        lambda: native.pack_awq(b((16, 3), np.uint8), 8, b((3, 8), np.uint8)),
        lambda: native.unpack_row_pairs(b((3, 8), np.uint8), b((5, 8), np.uint8)),
        lambda: native.pack_row_pairs(b((3, 8), np.uint8), b((1, 8), np.uint8)),
        lambda: native.unpack_nibbles(b((3, 8), np.uint8), False, b((3, 17), np.uint8)),
        lambda: native.pack_nibbles(b((3, 17), np.uint8), False, b((3, 8), np.uint8)),
        lambda: native.pack_blocks(
            2, b((1, 32), np.uint8), b((1, 1), np.uint8), None, b((1, 18), np.uint8)
        ),
        lambda: native.pack_blocks(
            3, b((1, 32), np.uint8), b((1, 2), np.uint8), None, b((1, 20), np.uint8)
        ),
        lambda: native.unpack_blocks(
            2, b((1, 19), np.uint8), b((1, 32), np.uint8), b((1, 2), np.uint8), None
        ),
    ]  # fmt: skip
    for call in calls:
        with pytest.raises(ValueError, match=r"do not fit"):
            call()
    with pytest.raises(ValueError, match="no packing kernel for ggml type 12"):
        native.unpack_blocks(12, b((1, 19), np.uint8), b((1, 32), np.uint8), b((1, 2), np.uint8), None)


# --- errors -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("bits", range(1, 8))
def test_refuses_codes_out_of_range(path: str, bits: int, signed: bool) -> None:
    """In whole groups of eight, in the rest of a row, and the first of several in row-major order."""
    low = -(1 << (bits - 1)) if signed else 0
    high = low + (1 << bits) - 1
    packers: list[Callable[[Codes], Any]] = [
        lambda codes: packing.pack_rows(codes, bits, signed=signed),
        lambda codes: packing.pack_rows(codes, bits, signed=signed, stream=False),
        lambda codes: packing.pack_columns(codes, bits, signed=signed),
    ]
    for value in (high + 1, low - 1, 127, -128) if signed else (high + 1, 255):
        for row, col in ((66, 3), (2, 1036), (69, 700)):
            codes = random_codes(70, 1037, bits, signed)
            codes[row, col] = codes[69, 1000] = value
            for pack in packers:
                message = (
                    rf"code {value} at row {row}, column {col} does not fit {bits} bits \({low} to {high}\)"
                )
                with pytest.raises(InputError, match=message):
                    pack(codes)


def test_refuses_codes_beyond_a_nibble(path: str) -> None:
    codes = random_codes(72, 70, 4)
    codes[9, 69] = codes[70, 0] = 16
    for pack in (
        packing.pack_awq,
        packing.pack_nibbles,
        lambda codes: packing.pack_nibbles(codes, high_first=True),
    ):
        with pytest.raises(InputError, match=r"code 16 at row 9, column 69 does not fit 4 bits \(0 to 15\)"):
            pack(codes)
    for value in (8, -9):
        signed = random_codes(6, 70, 4, signed=True)
        signed[3, 69] = signed[4, 0] = value
        with pytest.raises(InputError, match=rf"code {value} at row 3, column 69 .* \(-8 to 7\)"):
            packing.pack_row_pairs(signed)


def test_refuses_sizes_that_do_not_fit(path: str) -> None:
    words = np.zeros((2, 3), np.uint32)
    with pytest.raises(InputError, match=r"rows of 25 codes of 4 bits take 4 words, got 3"):
        packing.unpack_rows(words, 4, 25)
    with pytest.raises(InputError, match=r"rows of 16 codes of 4 bits take 2 words, got 3"):
        packing.unpack_rows(words, 4, 16)
    with pytest.raises(InputError, match=r"rows of 32 codes of 3 bits take 4 words, got 3"):
        packing.unpack_rows(words, 3, 32, stream=False)
    with pytest.raises(InputError, match=r"columns of 24 codes of 4 bits take 3 words, got 2"):
        packing.unpack_columns(words, 4, 24)
    with pytest.raises(InputError, match=r"rows of 25 nibbles take 13 bytes, got 12"):
        packing.unpack_nibbles(np.zeros((2, 12), np.uint8), 25)
    with pytest.raises(InputError, match=r"13 bytes per row are no whole 32-bit words"):
        packing.unpack_rows(np.zeros((2, 13), np.uint8), 4, 26)
    with pytest.raises(InputError, match=r"AWQ words hold 8 rows each; 12 rows from row 0 cut a word"):
        packing.pack_awq(np.zeros((12, 3), np.uint8))
    with pytest.raises(InputError, match=r"two rows share a byte; 3 rows do not divide evenly"):
        packing.pack_row_pairs(np.zeros((3, 3), np.int8))


def test_refuses_wrong_arguments(path: str) -> None:
    words = np.zeros((2, 3), np.uint32)
    for bits in (0, 9):
        with pytest.raises(OptionError, match=f"codes take 1 to 8 bits, not {bits}"):
            packing.unpack_rows(words, bits, 24)
    with pytest.raises(OptionError, match=r"rows 1 to 4 are not within 0 to 3"):
        packing.unpack_columns(words, 4, 16, start=1, stop=4)
    with pytest.raises(OptionError, match=r"rows 2 to 1 are not within 0 to 3"):
        packing.unpack_columns(words, 4, 16, start=2, stop=1)
    with pytest.raises(OptionError, match=r"AWQ words hold 8 rows each; rows 4 to 24 cut a word"):
        packing.unpack_awq(words, 4)
    with pytest.raises(
        InputError, match=r"packed words must be uint32 \(rows, words\), got float32 \(2, 3\)"
    ):
        packing.unpack_rows(words.view(np.float32), 4, 24)  # type: ignore[arg-type]
    with pytest.raises(
        InputError, match=r"packed nibbles must be uint8 \(rows, bytes\), got uint32 \(2, 3\)"
    ):
        packing.unpack_nibbles(words)  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"codes must be int8 \(rows, columns\), got uint8 \(2, 8\)"):
        packing.pack_rows(np.zeros((2, 8), np.uint8), 4, signed=True)
    with pytest.raises(InputError, match=r"codes must be uint8 \(rows, columns\), got uint8 \(8,\)"):
        packing.pack_rows(np.zeros(8, np.uint8), 4)


# --- compressed-tensors ---------------------------------------------------------------------------------------

# compressed_tensors 0.17, pack_to_int32 of `(7 * column + 3 * row) % 2**bits - 2**(bits - 1)`, 2 x 13 codes.
GOLDEN = {
    3: [[0x3829CBB8, 0x12E], [0x13977053, 0x1C1]],
    4: [[0x1A3C5E70, 0x4D6F8], [0x4D6F81A3, 0x7092B]],
    5: [[0x7CAB8E0, 0x1A6FE22A, 0x14], [0xDFC4543, 0x20916E8D, 0x17]],
}
VLLM_PYTHON = Path(os.environ.get("LCONVERT_VLLM_PYTHON") or ROOT / ".venv-vllm" / "bin" / "python")
PEER = """
import json, sys, numpy as np, torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32, unpack_from_int32
for line in sys.stdin:
    codes, bits, dim = json.loads(line)
    codes = torch.tensor(codes, dtype=torch.int8)
    words = pack_to_int32(codes, bits, dim)
    assert torch.equal(unpack_from_int32(words, bits, codes.shape, dim), codes)
    print(json.dumps((words.numpy().astype(np.int64) & 0xFFFFFFFF).tolist()))
"""


@pytest.mark.parametrize("bits", GOLDEN)
def test_golden_words_of_compressed_tensors(path: str, bits: int) -> None:
    row, col = np.indices((2, 13))
    codes = ((7 * col + 3 * row) % (1 << bits) - (1 << (bits - 1))).astype(np.int8)
    words = np.array(GOLDEN[bits], np.uint32)
    assert np.array_equal(packing.pack_rows(codes, bits, signed=True, stream=False), words)
    assert np.array_equal(packing.unpack_rows(words, bits, 13, signed=True, stream=False), codes)


@pytest.mark.skipif(
    not VLLM_PYTHON.exists(), reason="the vLLM environment, which has compressed_tensors, is missing"
)
def test_equals_compressed_tensors() -> None:
    """Both dimensions of its pack_to_int32, every width; along dimension 0 the result is that of the transpose."""
    cases = [
        (random_codes(*shape, bits, signed=True), bits, dim)
        for bits in WIDTHS
        for shape in ((5, 37), (64, 33), (1, 1))
        for dim in (0, 1)
    ]
    lines = "\n".join(json.dumps((codes.tolist(), bits, dim)) for codes, bits, dim in cases)
    run = subprocess.run(
        [str(VLLM_PYTHON), "-P", "-c", PEER],
        input=lines,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    found = [np.array(json.loads(line), np.uint32) for line in run.stdout.splitlines()]
    assert len(found) == len(cases)
    for (codes, bits, dim), words in zip(cases, found, strict=True):
        ours = packing.pack_rows(codes if dim else codes.T, bits, signed=True, stream=False)
        assert np.array_equal(ours if dim else ours.T, words), (codes.shape, bits, dim)


# --- files that peers wrote -----------------------------------------------------------------------------------

CHECKPOINTS = SHARED / "checkpoints"
DENSE = SHARED / "models" / "wiki-mistral" / "model.safetensors"
needs_shared = pytest.mark.skipif(
    not (CHECKPOINTS.is_dir() and DENSE.is_file()),
    reason="the shared checkpoints are not beside this checkout",
)
LINEARS = ("model.layers.0.self_attn.o_proj", "model.layers.1.mlp.down_proj")


@cache
def _file(path: Path) -> safetensors.SafetensorsFile:
    return safetensors.read_header(path)


def _array(folder: str, name: str) -> NDArray[Any]:
    file = _file(CHECKPOINTS / folder / "model.safetensors" if folder else DENSE)
    tensor = safetensors.tensor(file, name)
    array = tensor.load()
    return as_f32(array, tensor.dtype) if tensor.dtype in ("F16", "BF16", "F32") else array


def _likeness(w: NDArray[np.float32], linear: str) -> float:
    """Mean over input channels of the cosine with the dense weight: no rescaling of channels changes it."""
    dense = _array("", linear + ".weight")
    dots = (w * dense).sum(axis=0)
    return float(np.mean(dots / (np.linalg.norm(w, axis=0) * np.linalg.norm(dense, axis=0))))


def _spread(scale: NDArray[np.float32], cols: int) -> NDArray[np.float32]:
    return np.repeat(scale, cols // scale.shape[1], axis=1)


@needs_shared
@pytest.mark.parametrize("linear", LINEARS)
def test_reads_gptq(path: str, linear: str) -> None:
    words, scale = _array("gqm_gptq", linear + ".qweight"), _array("gqm_gptq", linear + ".scales").T
    cols = 8 * len(words)
    codes = packing.unpack_columns(words, 4, cols, signed=True)
    assert _likeness(codes * _spread(scale, cols), linear) > 0.99
    assert np.array_equal(packing.pack_columns(codes, 4, signed=True), words.view(np.uint32))
    zeros = _array("gqm_gptq", linear + ".qzeros")  # packed along the output dimension, stored less one
    assert (packing.unpack_rows(zeros, 4, 8 * zeros.shape[1]) == 7).all()


@needs_shared
@pytest.mark.parametrize("linear", LINEARS)
def test_reads_awq(path: str, linear: str) -> None:
    words, scale = _array("gqm_awq", linear + ".qweight"), _array("gqm_awq", linear + ".scales").T
    codes, zeros = packing.unpack_awq(words), packing.unpack_awq(_array("gqm_awq", linear + ".qzeros"))
    cols = codes.shape[1]
    levels = codes.astype(np.float32) - _spread(zeros.astype(np.float32), cols)
    assert _likeness(levels * _spread(scale, cols), linear) > 0.98
    plain = packing.unpack_rows(words, 4, len(codes)).T.astype(np.float32)  # neighbours in order: wrong
    assert _likeness((plain - _spread(zeros.astype(np.float32), cols)) * _spread(scale, cols), linear) < 0.6
    assert np.array_equal(packing.pack_awq(codes), words.view(np.uint32))


@needs_shared
@pytest.mark.parametrize("linear", LINEARS)
def test_reads_compressed_tensors(path: str, linear: str) -> None:
    folder = "llmc_gptq_asym_g32"
    rows, cols = (int(n) for n in _array(folder, linear + ".weight_shape"))
    words, scale = _array(folder, linear + ".weight_packed"), _array(folder, linear + ".weight_scale")
    codes = packing.unpack_rows(words, 4, cols)
    zeros = packing.unpack_columns(_array(folder, linear + ".weight_zero_point"), 4, rows).T  # along rows
    levels = codes.astype(np.float32) - _spread(zeros.astype(np.float32), cols)
    assert codes.shape == (rows, cols) and _likeness(levels * _spread(scale, cols), linear) > 0.98
    assert np.array_equal(packing.pack_rows(codes, 4), words.view(np.uint32))


@needs_shared
@pytest.mark.parametrize("linear", LINEARS)
def test_reads_pairs_of_rows_of_modelopt(path: str, linear: str) -> None:
    packed, scale = (
        _array("mo_INT4_AWQ_CFG", linear + ".weight"),
        _array("mo_INT4_AWQ_CFG", linear + ".weight_scale"),
    )
    codes = packing.unpack_row_pairs(packed)
    rows, cols = codes.shape
    assert -7 <= codes.min() < -5 and 5 < codes.max() <= 7
    assert _likeness(codes * _spread(scale, cols), linear) > 0.98
    swapped = codes.reshape(rows // 2, 2, cols)[:, ::-1].reshape(rows, cols)
    assert _likeness(swapped * _spread(scale, cols), linear) < 0.3
    assert np.array_equal(packing.pack_row_pairs(codes), packed)


@needs_shared
@pytest.mark.parametrize("linear", LINEARS)
def test_reads_nvfp4_of_modelopt(path: str, linear: str) -> None:
    """The tensor's codes alone: E2M1 values keep their order within a block."""
    packed = _array("mo_NVFP4_DEFAULT_CFG", linear + ".weight")
    e2m1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)
    values = np.concatenate([e2m1, -e2m1])
    first, second = (values[packing.unpack_nibbles(packed, high_first=high)] for high in (False, True))
    dense = _array("", linear + ".weight")
    amax = np.abs(dense.reshape(len(dense), -1, 16)).max(axis=2)
    scale = np.repeat(amax / 6, 16, axis=1)
    assert _likeness(first * scale, linear) > 0.98 and _likeness(second * scale, linear) < 0.3


# --- GGUF blocks ----------------------------------------------------------------------------------------------


def _random_parts(type: str, rows: int, blocks: int) -> tuple[NDArray[np.uint8], dict[str, NDArray[Any]]]:
    """Blocks of arbitrary bytes and what the NumPy specification finds in them."""
    rng = np.random.default_rng(kernels.BLOCKS[type].ggml_id)
    raw = rng.integers(0, 256, (rows, blocks * kernels.BLOCKS[type].nbytes), dtype=np.uint8)
    return raw, family(type).UNPACK[type](raw)


@pytest.mark.parametrize("rows, blocks", [(1, 1), (7, 5), (64, 3), (3, 0)])
@pytest.mark.parametrize("type", GGUF_TYPES)
def test_blocks_equal_the_specification(path: str, type: str, rows: int, blocks: int) -> None:
    """Byte for byte, NaN scales included, and the same parts in the same order and types."""
    raw, expected = _random_parts(type, rows, blocks)
    parts = kernels.unpack(type, raw)
    assert list(parts) == list(expected)
    for name, part in parts.items():
        assert part.dtype == expected[name].dtype and part.shape == expected[name].shape
        assert part.tobytes() == expected[name].tobytes()
    frozen = {name: np.asfortranarray(part) for name, part in parts.items()}
    for part in frozen.values():
        part.flags.writeable = False
    assert np.array_equal(kernels.pack(type, frozen), raw)
    assert np.array_equal(family(type).PACK[type](parts), raw)


@pytest.mark.parametrize("type", GGUF_TYPES)
def test_blocks_mean_the_same_to_gguf(path: str, type: str) -> None:
    """gguf-py's dequantiser finds the codes that were packed, one at a time in a block of one code."""
    quants = pytest.importorskip("gguf.quants", reason="gguf is not installed")
    gguf = pytest.importorskip("gguf", reason="gguf is not installed")
    elems = kernels.BLOCKS[type].elems
    low, high = kernels._PARTS[type].low, kernels._PARTS[type].high
    cols = 4 * elems
    rng = np.random.default_rng(5)
    codes = rng.integers(low, high + 1, (6, cols)).astype(np.int8 if low < 0 else np.uint8)
    if type == "MXFP4":
        parts = {"codes": codes, "scale": rng.integers(120, 130, (6, cols // 32)).astype(np.uint8)}
        scale = np.ldexp(1.0, parts["scale"].astype(int) - 127)
    elif type == "NVFP4":
        exponent = rng.integers(5, 10, (6, cols // 16))  # UE4M3 without mantissa: 2**(exponent - 7)
        parts = {"codes": codes, "scale": (exponent << 3).astype(np.uint8)}
        scale = np.ldexp(1.0, exponent - 7)
    else:
        scale = rng.integers(1, 99, (6, cols // 32)) / 64
        parts = {"codes": codes, "scale": scale.astype(np.float16)}
    if type.endswith("_1"):
        parts["offset"] = (rng.integers(-50, 50, scale.shape) / 32).astype(np.float16)
    e2m1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    levels = np.concatenate([e2m1, -e2m1])[codes] if "FP4" in type else codes.astype(np.float64)
    values = levels * np.repeat(scale, cols // scale.shape[1], axis=1)
    if "offset" in parts:
        values = values - np.repeat(parts["offset"].astype(np.float64), 32, axis=1)
    found = quants.dequantize(kernels.pack(type, parts), gguf.GGMLQuantizationType[type])
    assert np.array_equal(found, values)


@pytest.mark.parametrize("type", GGUF_TYPES)
def test_wide_codes_and_scales_are_narrowed(path: str, type: str) -> None:
    """Codes of any integer type in range, scales of a float type that rounds to nearest."""
    raw, parts = _random_parts(type, 3, 4)
    wide = {
        name: part.astype(np.int32 if part.dtype.kind in "iu" else np.float16) for name, part in parts.items()
    }
    assert np.array_equal(kernels.pack(type, wide), raw)
    if type == "Q4_0":
        third = dict(parts, scale=np.full((3, 4), 1 / 3, np.float32))
        assert (kernels.unpack(type, kernels.pack(type, third))["scale"] == np.float16(1 / 3)).all()


@pytest.mark.parametrize("type", GGUF_TYPES)
def test_blocks_refuse_codes_out_of_range(path: str, type: str) -> None:
    _, parts = _random_parts(type, 5, 6)
    low, high = kernels._PARTS[type].low, kernels._PARTS[type].high
    for value in (low - 1, high + 1):
        for dtype in (np.int16, parts["codes"].dtype):
            if not np.iinfo(dtype).min <= value <= np.iinfo(dtype).max:
                continue
            codes = parts["codes"].astype(dtype)
            codes[3, 59] = codes[4, 1] = value
            message = rf"code {value} at row 3, column 59 is outside {type}'s {low} to {high}"
            with pytest.raises(InputError, match=message):
                kernels.pack(type, {**parts, "codes": codes})


def test_blocks_refuse_parts_of_the_wrong_shape(path: str) -> None:
    _, parts = _random_parts("Q4_1", 5, 6)
    with pytest.raises(InputError, match=r"Q4_1 offset must have shape \(5, 6\), got \(5, 5\)"):
        kernels.pack("Q4_1", {**parts, "offset": parts["offset"][:, :5]})
    with pytest.raises(InputError, match=r"Q4_1 scale must have shape \(5, 6\), got \(4, 6\)"):
        kernels.pack("Q4_1", {**parts, "scale": parts["scale"][:4]})
    with pytest.raises(
        OptionError, match=r"Q4_1 stores blocks of 32 values; rows of 190 do not divide evenly"
    ):
        kernels.pack("Q4_1", {**parts, "codes": parts["codes"][:, :190]})
    with pytest.raises(InputError, match=r"Q4_1 codes must be \(rows, columns\), got shape \(192,\)"):
        kernels.pack("Q4_1", {**parts, "codes": parts["codes"][0]})


def test_blocks_in_threads() -> None:
    raw, parts = _random_parts("Q4_0", 64, 20)

    def slab(start: int) -> NDArray[np.uint8]:
        rows = slice(start, start + 8)
        return kernels.pack("Q4_0", {name: part[rows] for name, part in parts.items()})

    with ThreadPoolExecutor(4) as pool:
        assert np.array_equal(np.concatenate(list(pool.map(slab, range(0, 64, 8)))), raw)
