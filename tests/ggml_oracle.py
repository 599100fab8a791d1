"""ggml's own quantisers, called through ctypes: the oracle of every kernel test.

Tests use it so (the second line only where it is absent):

    from tests import ggml_oracle
    pytestmark = pytest.mark.skipif(ggml_oracle.MISSING is not None, reason=str(ggml_oracle.MISSING))
"""

from __future__ import annotations

import ctypes
import importlib.util
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from lconvert.kernels.blocks import BLOCKS

_DEQUANTIZE = {name: f"dequantize_row_{name.lower().replace('_k', '_K')}" for name in BLOCKS} | {
    "F16": "ggml_fp16_to_fp32_row",
    "BF16": "ggml_bf16_to_fp32_row",
}


def _load() -> tuple[ctypes.CDLL | None, str | None]:
    spec = importlib.util.find_spec("llama_cpp")
    if spec is None or spec.origin is None:
        return None, "llama-cpp-python is not installed (pip install lconvert[llamacpp])"
    found = sorted((Path(spec.origin).parent / "lib").glob("libggml-base.*"))
    if not found:
        return None, f"no libggml-base beside {spec.origin}"
    library = ctypes.CDLL(str(found[0]))
    library.ggml_quantize_chunk.restype = ctypes.c_size_t
    library.ggml_quantize_requires_imatrix.restype = ctypes.c_bool

    class InitParams(ctypes.Structure):
        _fields_ = [("size", ctypes.c_size_t), ("buffer", ctypes.c_void_p), ("no_alloc", ctypes.c_bool)]

    library.ggml_init.argtypes = (InitParams,)
    library.ggml_init.restype = ctypes.c_void_p
    library.ggml_init(InitParams(1 << 20, None, False))  # fills ggml's lookup tables
    return library, None


_LIBRARY, MISSING = _load()


def requires_weights(type: str) -> bool:
    """Whether ggml refuses `type` without an importance matrix."""
    assert _LIBRARY is not None
    return bool(_LIBRARY.ggml_quantize_requires_imatrix(ctypes.c_int(BLOCKS[type].ggml_id)))


def quantize(
    type: str,
    x: NDArray[np.float32],
    weights: NDArray[np.float32] | None = None,
    out: NDArray[np.uint8] | None = None,
) -> NDArray[np.uint8]:
    """ggml_quantize_chunk on x (rows, cols): uint8 (rows, row_bytes)."""
    assert _LIBRARY is not None
    x = np.ascontiguousarray(x, np.float32)
    rows, cols = x.shape
    if weights is not None:
        weights = np.ascontiguousarray(weights, np.float32)
        assert weights.shape == (cols,)
    block = BLOCKS[type]
    if out is None:
        out = np.zeros((rows, block.row_bytes(cols)), np.uint8)
    _LIBRARY.ggml_quantize_chunk(
        ctypes.c_int(block.ggml_id),
        ctypes.c_void_p(x.ctypes.data),
        ctypes.c_void_p(out.ctypes.data),
        ctypes.c_int64(0),
        ctypes.c_int64(rows),
        ctypes.c_int64(cols),
        ctypes.c_void_p(None if weights is None else weights.ctypes.data),
    )
    return out


def dequantize(type: str, blocks: NDArray[np.uint8], cols: int) -> NDArray[np.float32]:
    """ggml's to_float on blocks (rows, row_bytes): float32 (rows, cols)."""
    assert _LIBRARY is not None
    blocks = np.ascontiguousarray(blocks, np.uint8)
    out = np.zeros((blocks.shape[0], cols), np.float32)
    getattr(_LIBRARY, _DEQUANTIZE[type])(
        ctypes.c_void_p(blocks.ctypes.data), ctypes.c_void_p(out.ctypes.data), ctypes.c_int64(out.size)
    )
    return out
