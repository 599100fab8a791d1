"""Arrays that are kept whole for a while, because readers come back for parts of them that lie scattered.

Slabs of columns, or rows in another order, of a lazy array each touch all of it: it is made once and cut in memory.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable
from typing import Any

from numpy.typing import NDArray


class Kept:
    """The arrays of the last `count` keys, for several threads: while one makes an array, others wait for it."""

    def __init__(self, count: int) -> None:
        self._count = count
        self._lock = threading.Lock()
        self._arrays: dict[Hashable, NDArray[Any]] = {}

    def get(self, key: Hashable, make: Callable[[], NDArray[Any]]) -> NDArray[Any]:
        """The array of `key`, out of `make` unless it is kept; the oldest goes first, so that no more are held than `count`."""
        with self._lock:
            if key not in self._arrays:
                while len(self._arrays) >= self._count:
                    del self._arrays[next(iter(self._arrays))]
                self._arrays[key] = make()
            return self._arrays[key]

    def put(self, key: Hashable, array: NDArray[Any]) -> None:
        """Keep an array that was made on the way to another one."""
        self.get(key, lambda: array)
