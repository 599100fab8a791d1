"""What was freed goes back to the system. glibc keeps freed arrays of up to 32 MB for later ones, in pieces that later ones often do not
fit, so what a process holds would grow with every layer though no array is left of it (malloc_trim(3))."""

from __future__ import annotations

import ctypes
import functools
import sys
from collections.abc import Callable


@functools.cache
def _trim() -> Callable[[int], int]:
    """glibc's malloc_trim; elsewhere nothing is done."""
    if sys.platform == "linux":
        try:
            found: Callable[[int], int] = ctypes.CDLL(None).malloc_trim
        except (OSError, AttributeError):  # another C library
            return lambda pad: 0
        return found
    return lambda pad: 0


def give_back() -> None:
    """Once per layer or window: it takes a few milliseconds."""
    _trim()(0)
