"""Positioned reads from files that nobody vouches for.

Every read opens the file anew. That costs 3 microseconds more than a shared descriptor, nothing beside a slab of
a weight, and leaves no descriptor to leak or to share between threads; a file that was replaced, rewritten or
cut short after its header was read is noticed each time. There is no mmap: resident memory would grow with the
file, and a file cut short meanwhile would kill the process with SIGBUS.
"""

from __future__ import annotations

import io
import os
import reprlib
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from lconvert.errors import InputError

#: How files begin that are often handed over by mistake.
_FOREIGN: tuple[tuple[bytes, str], ...] = (
    (b"version https://git-lfs", "it is a Git LFS pointer, run `git lfs pull` to fetch the file itself"),
    (b"PK\x03\x04", "it is a zip archive, perhaps a PyTorch checkpoint: save the model as safetensors"),
    (b"\x80\x02", "it is a Python pickle, which is never loaded: save the model as safetensors"),
    (b"GGUF", "it is a GGUF file: give it a name that ends in .gguf"),
    (b"<!DOCTYPE", "it is a web page: the download went to the wrong address"),
    (b"<html", "it is a web page: the download went to the wrong address"),
)


class Stamp(NamedTuple):
    """What tells one state of a file from another."""

    size: int
    mtime_ns: int
    inode: int


_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 80
_SHORT.maxlist, _SHORT.maxdict, _SHORT.maxlevel = 8, 6, 3


def show(value: object) -> str:
    """A name or value out of a file as it may appear in a message: quoted, escaped and short, whatever its size."""
    if isinstance(value, str | bytes) and len(value) > 80:
        return repr(value[:77]) + "..."
    return _SHORT.repr(value)


def foreign(head: bytes, otherwise: str) -> str:
    """What a file that begins with `head` is instead, and what to do about it; `otherwise` if that is unknown."""
    return next((text for start, text in _FOREIGN if head.startswith(start)), otherwise)


@contextmanager
def reading(path: Path) -> Iterator[tuple[io.FileIO, Stamp]]:
    """Opens a regular file unbuffered, with its stamp. Every OSError, inside the block too, is an InputError."""
    if "\0" in str(path):
        raise InputError(f"{show(str(path))}: cannot be read: no path holds a null byte")
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):  # before open: opening a pipe would wait for its writer
            what = "a directory" if os.path.isdir(path) else "not a regular file"
            raise InputError(f"{path}: this is {what}; name a model file")
        with open(path, "rb", buffering=0) as f:
            s = os.fstat(f.fileno())
            yield f, Stamp(s.st_size, s.st_mtime_ns, s.st_ino)
    except FileNotFoundError:
        raise InputError(f"{path}: there is no such file; check the path") from None
    except OSError as e:
        raise InputError(f"{path}: cannot be read: {e.strerror or e}") from e


def fill(f: io.FileIO, offset: int, out: NDArray[Any] | bytearray) -> int:
    """Reads into all of `out` from `offset`; returns the bytes read, fewer only at the end of the file."""
    view = memoryview(out).cast("B")  # type: ignore[arg-type]
    f.seek(offset)
    done = 0
    while done < len(view):
        n = f.readinto(view[done:])
        if not n:
            break
        done += n
    return done


@contextmanager
def unchanged(path: Path, stamp: Stamp, origin: str) -> Iterator[io.FileIO]:
    """Opens the file whose header was read when it had `stamp`; InputError if it is another one by now."""
    with reading(path) as (f, now):
        if now != stamp:
            raise InputError(
                f"{origin}: the file changed while it was being converted ({stamp.size} bytes when its header was "
                f"read, {now.size} now); start again once nothing writes to it"
            )
        yield f


def short_read(origin: str, wanted: int, got: int) -> InputError:
    return InputError(
        f"{origin}: {wanted} bytes wanted but the file ended after {got}; it was cut short, download it again"
    )


def read_at(path: Path, stamp: Stamp, offset: int, nbytes: int, origin: str) -> NDArray[np.uint8]:
    """Exactly `nbytes` bytes from `offset` as a fresh array. `origin` names them in errors."""
    out = np.empty(nbytes, np.uint8)
    with unchanged(path, stamp, origin) as f:
        got = fill(f, offset, out)
    if got != nbytes:
        raise short_read(origin, nbytes, got)
    return out
