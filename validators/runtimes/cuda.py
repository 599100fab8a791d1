"""NVIDIA's driver by ctypes: is there a GPU, and memory on it. Calls are those of cuda.h; nothing but the driver's library is needed.

It was written without a GPU at hand: here only the answer "there is none" was ever run.
"""

from __future__ import annotations

import ctypes
import sys
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lconvert.errors import RuntimeFailure

_NAME = "nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"
#: CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR and MINOR.
_MAJOR, _MINOR = 75, 76


@cache
def _driver() -> Any:
    """The library after cuInit, None where there is none or it finds no device."""
    try:
        found = ctypes.CDLL(_NAME)
    except OSError:
        return None
    return found if found.cuInit(0) == 0 else None


def count() -> int:
    """GPUs that the driver shows."""
    if (driver := _driver()) is None:
        return 0
    n = ctypes.c_int(0)
    return n.value if driver.cuDeviceGetCount(ctypes.byref(n)) == 0 else 0


def capability() -> int:
    """Of the first GPU: 89 for 8.9."""
    parts = []
    for which in (_MAJOR, _MINOR):
        value = ctypes.c_int(0)
        _call("cuDeviceGetAttribute", ctypes.byref(value), which, 0)
        parts.append(value.value)
    return 10 * parts[0] + parts[1]


def name() -> str:
    text = ctypes.create_string_buffer(256)
    _call("cuDeviceGetName", text, 256, 0)
    return text.value.decode(errors="replace")


def _call(function: str, *arguments: Any) -> None:
    driver = _driver()
    if driver is None:
        raise RuntimeFailure(f"{_NAME}: NVIDIA's driver is not installed or finds no GPU")
    if (code := getattr(driver, function)(*arguments)) != 0:
        raise RuntimeFailure(f"{function} of NVIDIA's driver failed with code {code} (cuda.h, CUresult)")


def use() -> None:
    """Make the first GPU's primary context, which TensorRT uses too, that of this thread."""
    context = ctypes.c_void_p()
    _call("cuDevicePrimaryCtxRetain", ctypes.byref(context), 0)
    _call("cuCtxSetCurrent", context)


class Buffer:
    """Memory on the GPU of at least one byte."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._at = ctypes.c_uint64()
        _call("cuMemAlloc_v2", ctypes.byref(self._at), ctypes.c_size_t(max(1, size)))

    @property
    def address(self) -> int:
        return int(self._at.value)

    def put(self, x: NDArray[Any]) -> None:
        """x, which is contiguous and as long as the buffer."""
        if x.nbytes:
            _call("cuMemcpyHtoD_v2", self._at, ctypes.c_void_p(x.ctypes.data), ctypes.c_size_t(x.nbytes))

    def get(self, shape: tuple[int, ...], dtype: Any) -> NDArray[Any]:
        out = np.empty(shape, dtype)
        if out.nbytes:
            _call("cuMemcpyDtoH_v2", ctypes.c_void_p(out.ctypes.data), self._at, ctypes.c_size_t(out.nbytes))
        return out

    def free(self) -> None:
        if self.address:
            _call("cuMemFree_v2", self._at)
            self._at = ctypes.c_uint64()


def synchronize() -> None:
    _call("cuCtxSynchronize")
