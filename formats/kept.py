"""Arrays that are kept whole for a while, because readers come back for parts of them that lie scattered.

Slabs of columns, or rows in another order, of a lazy array each touch all of it: it is made once and cut in memory.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable
from concurrent.futures import Future
from typing import Any

from numpy.typing import NDArray


class Kept:
    """The arrays of the last `count` keys, for several threads: who asks for an array that another thread is making waits for it,
    while arrays of other keys are made."""

    def __init__(self, count: int) -> None:
        self._count = count
        self._lock = threading.Lock()
        # In the order in which they were first asked for.
        self._arrays: dict[Hashable, Future[NDArray[Any]]] = {}

    def get(self, key: Hashable, make: Callable[[], NDArray[Any]]) -> NDArray[Any]:
        """The array of `key`, out of `make` unless it is kept; those that were asked for first go first, so that beside arrays in the
        making no more are held than `count`."""
        with self._lock:
            found = self._arrays.get(key)
            mine = found is None
            if found is None:
                self._drop(self._count - 1)
                found = self._arrays[key] = Future()
        if mine:
            try:
                found.set_result(make())
            except BaseException as e:  # noqa: BLE001 - whoever waits is told, this thread below
                with self._lock:
                    self._arrays.pop(key, None)
                found.set_exception(e)
            else:
                with self._lock:
                    self._drop(self._count)
        return found.result()

    def put(self, key: Hashable, array: NDArray[Any]) -> None:
        """Keep an array that was made on the way to another one."""
        self.get(key, lambda: array)

    def take(self, key: Hashable) -> NDArray[Any] | None:
        """An array that is kept, which then is no more."""
        with self._lock:
            found = self._arrays.pop(key, None)
        return None if found is None else found.result()

    def _drop(self, count: int) -> None:
        made = [k for k, f in self._arrays.items() if f.done()]
        for key in made[: max(0, len(made) - count)]:
            del self._arrays[key]
