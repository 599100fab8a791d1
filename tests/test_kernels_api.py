"""The kernel API: what it refuses and how it says so, buffers, chunks, threads, the choice of instruction set."""

from __future__ import annotations

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from lconvert import kernels
from lconvert.errors import InputError, OptionError
from lconvert.kernels.reference import FAMILY, NEEDS_WEIGHTS
from tests.kernel_cases import make_input

X = make_input("normal", 6, 512)
WEIGHTS = np.linspace(0.1, 2, 512).astype(np.float32)
COMPILED = [isa for isa in kernels.isas() if isa != "reference"]


def _weights(type: str) -> NDArray[np.float32] | None:
    return WEIGHTS if type in NEEDS_WEIGHTS else None


def _as_bfloat16(x: NDArray[np.float32]) -> NDArray[np.uint16]:
    return (x.view(np.uint32) >> 16).astype(np.uint16)


@pytest.mark.parametrize("isa", kernels.isas())
@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_refuses_values_that_are_not_finite(isa: str, dtype: str, value: float) -> None:
    x = X.copy()
    x[4, 300] = value
    source: Any = {"F32": x, "F16": x.astype(np.float16), "BF16": _as_bfloat16(x)}[dtype]
    with pytest.raises(
        InputError, match=rf"value {value} at row 4, column 300 is not finite; it cannot be stored as Q4_K"
    ):
        kernels.quantize("Q4_K", source, dtype, isa=isa)


@pytest.mark.parametrize("isa", kernels.isas())
def test_refuses_values_beyond_the_narrow_floats(isa: str) -> None:
    x = X.copy()
    x[0, 0], x[2, 7] = (
        65519.996,
        -65520.0,
    )  # the last float below the half-way point to infinity, and that point
    with pytest.raises(InputError, match=r"value -65520 at row 2, column 7 is too large for F16"):
        kernels.quantize("F16", x, isa=isa)
    x[2, 7] = 0
    assert kernels.quantize("F16", x, isa=isa)[0, :2].view(np.float16) == 65504
    x[5, 511] = np.finfo(np.float32).max
    with pytest.raises(InputError, match=r"row 5, column 511 is too large for BF16"):
        kernels.quantize("BF16", x, isa=isa)
    assert kernels.quantize("Q8_0", x, isa=isa).shape == (6, 544)


@pytest.mark.parametrize("isa", kernels.isas())
def test_reports_the_first_bad_value_of_a_large_slab(isa: str) -> None:
    """Beyond the first chunk, and the first in row-major order."""
    x = np.zeros((700, 1024), np.float32)
    x[650, 3] = np.nan
    x[651, 2] = np.inf
    with pytest.raises(InputError, match="value nan at row 650, column 3 "):
        kernels.quantize("F32", x, isa=isa)


def test_refuses_rows_that_are_no_whole_blocks() -> None:
    with pytest.raises(
        OptionError, match="Q4_K stores blocks of 256 values; rows of 480 do not divide evenly"
    ):
        kernels.quantize("Q4_K", X[:, :480])
    with pytest.raises(OptionError, match="Q8_0 stores blocks of 32 values; rows of 48"):
        kernels.dequantize("Q8_0", np.zeros((1, 51), np.uint8), 48)


def test_refuses_wrong_arguments() -> None:
    with pytest.raises(OptionError, match="no kernel for type 'Q9_K'; known: F32, F16"):
        kernels.quantize("Q9_K", X)
    with pytest.raises(OptionError, match=r"x must be 2-dimensional .*float16.*, got float32 \(6, 512\)"):
        kernels.quantize("Q4_K", X, "F16")
    with pytest.raises(
        OptionError, match=r"weights must have one value per column \(512\), got shape \(6,\)"
    ):
        kernels.quantize("Q4_K", X, weights=WEIGHTS[:6])
    with pytest.raises(OptionError, match=r"instruction set 'mmx' cannot run here; available: .*reference"):
        kernels.quantize("Q4_K", X, isa="mmx")
    with pytest.raises(OptionError, match=r"out must be contiguous uint8 \(6, 288\)"):
        kernels.quantize("Q4_K", X, out=np.empty((6, 287), np.uint8))
    with pytest.raises(OptionError, match="IQ2_XXS needs an importance matrix"):
        kernels.quantize("IQ2_XXS", X)


def test_refuses_weights_that_are_not_finite() -> None:
    weights = WEIGHTS.copy()
    weights[9] = np.inf
    with pytest.raises(InputError, match="importance weight of column 9 is not finite"):
        kernels.quantize("Q4_K", X, weights=weights)


def test_refuses_blocks_of_the_wrong_size() -> None:
    with pytest.raises(
        InputError, match=r"Q4_K blocks must be uint8 \(rows, k \* 144\), got uint8 \(2, 100\)"
    ):
        kernels.unpack("Q4_K", np.zeros((2, 100), np.uint8))
    with pytest.raises(InputError, match="Q4_K rows of 512 values take 288 bytes, got 144"):
        kernels.dequantize("Q4_K", np.zeros((2, 144), np.uint8), 512)


@pytest.mark.parametrize("type", FAMILY)
def test_shapes_and_buffers(type: str) -> None:
    """out= is filled in place; read-only arrays and any view of x do."""
    row_bytes = kernels.BLOCKS[type].row_bytes(512)
    out = np.empty((6, row_bytes), np.uint8)
    blocks = kernels.quantize(type, X, weights=_weights(type), out=out)
    assert blocks is out
    reverse = np.asfortranarray(X)[::-1]
    assert np.array_equal(kernels.quantize(type, reverse, weights=_weights(type)), blocks[::-1])
    frozen, frozen_blocks = X.copy(), blocks.copy()
    frozen.flags.writeable = frozen_blocks.flags.writeable = False
    assert np.array_equal(kernels.quantize(type, frozen, weights=_weights(type)), blocks)
    values = kernels.dequantize(type, frozen_blocks, 512)
    assert values.shape == (6, 512) and values.dtype == np.float32
    target = np.empty((6, 512), np.float32)
    assert kernels.dequantize(type, blocks, 512, out=target) is target
    assert np.array_equal(target, values)
    assert kernels.quantize(type, X[:0], weights=_weights(type)).shape == (0, row_bytes)


@pytest.mark.parametrize("isa", kernels.isas())
@pytest.mark.parametrize("type", ["Q8_0", "Q4_K", "F32"])
def test_narrow_sources_are_widened_exactly(isa: str, type: str) -> None:
    for dtype, source in (("F16", X.astype(np.float16)), ("BF16", _as_bfloat16(X))):
        wide = (
            source.astype(np.float32) if dtype == "F16" else (source.astype(np.uint32) << 16).view(np.float32)
        )
        assert np.array_equal(
            kernels.quantize(type, source, dtype, isa=isa), kernels.quantize(type, wide, isa=isa)
        )


@pytest.mark.parametrize("isa", COMPILED)
@pytest.mark.parametrize("rows, cols", [(1100, 256), (2, 256 * 600)])
def test_chunks_do_not_show(isa: str, rows: int, cols: int) -> None:
    """More rows than a chunk holds, and rows longer than a chunk."""
    x = make_input("student", rows, cols)
    weights = np.abs(make_input("normal", 1, cols)[0])
    whole = kernels.quantize("Q6_K", x.astype(np.float16), "F16", weights, isa=isa)
    x = x.astype(np.float16).astype(np.float32)
    for row in (0, rows // 2, rows - 1):
        assert np.array_equal(
            whole[row : row + 1], kernels.quantize("Q6_K", x[row : row + 1], weights=weights, isa=isa)
        )


def test_threads_share_an_output() -> None:
    x = make_input("normal", 64, 1024)
    out = np.zeros((64, kernels.BLOCKS["Q5_K"].row_bytes(1024)), np.uint8)
    with ThreadPoolExecutor(4) as pool:
        for future in [
            pool.submit(kernels.quantize, "Q5_K", x[row : row + 8], out=out[row : row + 8])
            for row in range(0, 64, 8)
        ]:
            future.result()
    assert np.array_equal(out, kernels.quantize("Q5_K", x))


@pytest.mark.parametrize("isa", COMPILED)
def test_flush_to_zero_does_not_show(isa: str) -> None:
    """A library that switches denormals off in this thread does not change the bytes, and keeps its setting."""
    torch = pytest.importorskip("torch", reason="torch is not installed: nothing here can set flush-to-zero")
    x = make_input("reciprocal-overflows", 4, 512)
    expected = kernels.quantize("Q4_K", x, isa=isa)
    if not torch.set_flush_denormal(True):
        pytest.skip("this CPU has no flush-to-zero mode")
    try:
        got = kernels.quantize("Q4_K", x, isa=isa)
        still_flushing = float(np.float32(1e-38) * np.float32(0.1)) == 0
    finally:
        torch.set_flush_denormal(False)
    assert np.array_equal(got, expected) and still_flushing


def test_isas_end_with_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LCONVERT_ISA", raising=False)
    assert kernels.isas()[-1] == "reference"
    assert kernels.isa() == kernels.isas()[0]
    monkeypatch.setenv("LCONVERT_ISA", "reference")
    assert kernels.isa() == "reference"
    monkeypatch.setenv("LCONVERT_ISA", "altivec")
    with pytest.raises(OptionError, match="instruction set 'altivec' cannot run here"):
        kernels.isa()


def test_without_the_compiled_module() -> None:
    """NumPy takes over with the same bytes, after one warning."""
    code = """
import sys, warnings
sys.modules["lconvert.kernels._native"] = None
import numpy as np
from lconvert import kernels
with warnings.catch_warnings(record=True) as seen:
    warnings.simplefilter("always")
    x = np.linspace(-1, 1, 512, dtype=np.float32).reshape(2, 256)
    print(kernels.quantize("Q4_K", x).tobytes().hex())
    kernels.quantize("Q4_K", x)
print(kernels.native_available(), kernels.isas(), len(seen), seen[0].category.__name__, seen[0].message)
"""
    path = [entry for entry in sys.path if entry]
    result = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path[:0] = {path!r}\n{code}"],
        capture_output=True,
        text=True,
        check=True,
    )
    blocks, state = result.stdout.splitlines()
    x = np.linspace(-1, 1, 512, dtype=np.float32).reshape(2, 256)
    assert blocks == kernels.quantize("Q4_K", x).tobytes().hex()
    assert state.startswith("False ('reference',) 1 SlowKernelsWarning lconvert: compiled kernels not found")
