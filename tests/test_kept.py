"""Arrays that are kept whole: made once while they are among the last, by one thread, and let go before the next is made."""

from __future__ import annotations

import threading
import weakref
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from numpy.typing import NDArray

from lconvert.formats.kept import Kept


def test_the_last_two_are_kept() -> None:
    kept, made = Kept(2), []

    def get(key: str) -> float:
        def make() -> NDArray[np.float32]:
            made.append(key)
            return np.full(3, len(made), np.float32)

        return float(kept.get(key, make)[0])

    assert [get(key) for key in "aabab"] == [1, 1, 2, 1, 2]
    assert [get(key) for key in "cba"] == [3, 2, 4]
    assert "".join(made) == "abca"


def test_the_oldest_is_gone_before_the_next_is_made() -> None:
    kept = Kept(1)
    first = weakref.ref(kept.get("a", lambda: np.zeros(3)))
    assert first() is not None

    def make() -> NDArray[np.float64]:
        assert first() is None
        return np.ones(3)

    assert kept.get("b", make).sum() == 3


def test_what_could_not_be_made_is_made_again() -> None:
    def fail() -> NDArray[np.float64]:
        raise OSError("gone")

    kept = Kept(1)
    kept.get("a", lambda: np.zeros(3))
    with pytest.raises(OSError, match="gone"):
        kept.get("b", fail)
    assert kept.get("b", lambda: np.ones(3)).sum() == 3
    assert kept.get("a", lambda: np.full(3, 2.0)).sum() == 6


def test_threads_share_one_array() -> None:
    kept, made = Kept(1), []

    def make() -> NDArray[np.float64]:
        made.append(1)
        return np.arange(1000.0)

    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda _: kept.get("a", make), range(64)))
    assert len(made) == 1 and all(x is found[0] for x in found)


def test_another_array_is_made_meanwhile() -> None:
    """Two threads make two arrays at a time; who wants the first waits for it."""
    kept, first, second = Kept(2), threading.Event(), threading.Event()

    def slow() -> NDArray[np.float64]:
        first.set()
        assert second.wait(10)
        return np.zeros(1)

    def other() -> NDArray[np.float64]:
        second.set()
        return np.ones(1)

    with ThreadPoolExecutor(3) as pool:
        a = pool.submit(kept.get, "a", slow)
        assert first.wait(10)
        again = pool.submit(kept.get, "a", other)
        assert pool.submit(kept.get, "b", other).result(10).sum() == 1
        assert a.result(10) is again.result(10)


def test_what_is_taken_is_kept_no_more() -> None:
    kept = Kept(2)
    kept.put("a", np.arange(3))
    assert kept.take("b") is None
    taken = kept.take("a")
    assert taken is not None and taken.tolist() == [0, 1, 2] and kept.take("a") is None
