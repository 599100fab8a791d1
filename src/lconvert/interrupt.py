"""Ctrl-C while worker threads run.

Python raises KeyboardInterrupt between any two bytecodes of the main thread. Inside `ThreadPoolExecutor.submit` that can
leave a lock of the pool taken for ever, and the shutdown that follows waits for it (CPython issue 74174 describes the
race). So the signal is only noted here, and raised where no lock is held.
"""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, wait
from typing import Any, TypeVar

T = TypeVar("T")

#: Seconds between two looks for a noted interrupt while a result is awaited.
SLICE = 0.2


@contextlib.contextmanager
def deferred() -> Iterator[Callable[[], None]]:
    """Note the first SIGINT instead of raising it; the function given raises KeyboardInterrupt if there was one.

    A second SIGINT acts as before, at once, for somebody who does not want to wait. One that came too late for the last
    check is raised at the end. Outside the main thread, or where the program handles SIGINT itself, nothing changes.
    """
    noted = False  # no Event: the handler could meet its lock taken by the thread that it interrupts

    def check() -> None:
        nonlocal noted
        if noted:
            noted = False
            raise KeyboardInterrupt

    if (
        threading.current_thread() is not threading.main_thread()
        or signal.getsignal(signal.SIGINT) is not signal.default_int_handler
    ):
        yield check
        return

    def note(number: int, frame: Any) -> None:
        nonlocal noted
        noted = True
        signal.signal(signal.SIGINT, signal.default_int_handler)

    signal.signal(signal.SIGINT, note)
    try:
        yield check
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    check()


def result(future: Future[T], check: Callable[[], None]) -> T:
    """A future's result; a noted interrupt is raised while it is awaited."""
    while not future.done():
        check()
        wait((future,), timeout=SLICE)
    check()
    return future.result()
