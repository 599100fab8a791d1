"""A large file that is written once, in order, past the page cache.

What a conversion writes is not read again soon, and a cache full of it must be synced at the end: with O_DIRECT the same bytes take a
third of the time and a tenth of the kernel's work (1.5 GB on a virtual disk: 1.1 s against 3.3 .. 5.2 s), and other programs keep their
cache. Where the system or the file system has no such way, and for small files, it is ordinary writing.
"""

from __future__ import annotations

import errno
import mmap
import os
from pathlib import Path
from typing import Any

#: Files of fewer bytes go through the page cache, which whoever reads them next is glad of.
LEAST = 64 << 20
#: Bytes that are written at a time, and what their place and number must be multiples of (4096: the largest usual sector).
SIZE, BLOCK = 8 << 20, 4096
#: Aligned memory of so many bytes is written from where it is.
STRAIGHT = 1 << 20


class Written:
    """Writes behind byte `at` of an open file. Bytes are in the file after `flush`, on the disk after a sync of `fd`."""

    def __init__(self, path: Path, fd: int, at: int, size: int) -> None:
        """size: of the whole file, in the end."""
        self.at = at
        self._fd = fd
        self._direct = _direct(path) if size >= LEAST else None
        self._buffer: mmap.mmap | None = None
        if self._direct is not None:
            self._buffer = mmap.mmap(-1, SIZE)  # whose memory is aligned
            self._base = at // BLOCK * BLOCK
            self._buffer[: at - self._base] = os.pread(fd, at - self._base, self._base)

    def write(self, data: Any) -> None:
        """Add bytes."""
        view = memoryview(data).cast("B")
        if self._buffer is None:
            self._ordinary(view, self.at)
            self.at += len(view)
            return
        if len(view) >= STRAIGHT and self.at % BLOCK == 0 and _address(view) % BLOCK == 0:
            self._out(self.at - self._base)
            whole = view[: len(view) // BLOCK * BLOCK]
            self._put(whole, self.at)
            self.at = self._base = self.at + len(whole)
            view = view[len(whole) :]
        while len(view):
            fill = self.at - self._base
            n = min(len(view), SIZE - fill)
            self._buffer[fill : fill + n] = view[:n]
            self.at += n
            view = view[n:]
            if self.at - self._base == SIZE:
                self._out(SIZE)

    def flush(self) -> None:
        """All that was added is in the file."""
        if self._buffer is None:
            return
        fill = self.at - self._base
        whole = fill // BLOCK * BLOCK
        rest = self._buffer[whole:fill]
        self._out(whole)
        self._ordinary(memoryview(rest), self._base)
        self._buffer[: len(rest)] = rest  # the block is written again when it is full

    def close(self) -> None:
        """Let go of what only writing needs; the file stays open."""
        direct, self._direct = self._direct, None
        if direct is not None:
            os.close(direct)
        self._buffer = None

    def _out(self, n: int) -> None:
        """The first n bytes of the buffer, whole blocks."""
        assert self._buffer is not None
        self._put(memoryview(self._buffer)[:n], self._base)
        self._base += n

    def _put(self, view: memoryview, at: int) -> None:
        """Whole blocks of aligned memory."""
        done = 0
        while done < len(view) and self._direct is not None:
            try:
                done += os.pwrite(self._direct, view[done:], at + done)
            except OSError as e:
                if e.errno != errno.EINVAL:
                    raise
                os.close(self._direct)  # a file system that opens files so and then does not write them
                self._direct = None
            if done % BLOCK:  # a full disk or a limit, of which the ordinary write tells
                done = done // BLOCK * BLOCK
                break
        self._ordinary(view[done:], at + done)

    def _ordinary(self, view: memoryview, at: int) -> None:
        while len(view):
            n = os.pwrite(self._fd, view, at)
            view, at = view[n:], at + n


def _address(view: memoryview) -> int:
    import numpy as np

    return int(np.frombuffer(view, np.uint8).ctypes.data)


def _direct(path: Path) -> int | None:
    """The file, opened for direct writes; None where there is no such thing."""
    flag = getattr(os, "O_DIRECT", None)
    if flag is None:
        return None
    try:
        return os.open(path, os.O_WRONLY | flag)
    except OSError:
        return None
