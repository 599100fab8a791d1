"""Files that are written past the page cache hold what was written, whatever the pieces, the place and the file system."""

from __future__ import annotations

import errno
import os
import random
from pathlib import Path

import numpy as np
import pytest

from lconvert import written
from lconvert.written import BLOCK, SIZE, Written

DIRECT = getattr(os, "O_DIRECT", None)


def run(path: Path, at: int, pieces: list[bytes], flushes: set[int]) -> bytes:
    """The file after these pieces; what is said to be in it after a flush is."""
    fd = os.open(path, os.O_RDWR)
    try:
        before = path.read_bytes()[:at]
        out = Written(path, fd, at, at + sum(map(len, pieces)))
        total = b""
        for i, piece in enumerate(pieces):
            out.write(memoryview(piece))
            total += bytes(piece)
            if i in flushes:
                out.flush()
                assert out.at == at + len(total) and path.read_bytes() == before + total
        out.flush()
        out.close()
        return path.read_bytes()
    finally:
        os.close(fd)


@pytest.mark.parametrize("seed", range(12))
def test_bytes_are_those_that_were_given(seed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(written, "LEAST", 0)
    r = random.Random(seed)
    at = r.choice([0, 1, BLOCK, BLOCK + 1, 3 * BLOCK - 1, SIZE + 5])
    start = r.randbytes(at)
    sizes = [
        r.choice([0, 1, 100, BLOCK - 1, BLOCK, 3 * BLOCK + 7, SIZE - 1, SIZE, SIZE + BLOCK + 3])
        for _ in range(9)
    ]
    pieces = [r.randbytes(n) for n in sizes]
    path = tmp_path / "file"
    path.write_bytes(start)
    assert run(path, at, pieces, set(r.sample(range(9), 3))) == start + b"".join(pieces)


@pytest.mark.skipif(DIRECT is None, reason="this system has no direct writes")
@pytest.mark.parametrize("after", [0, 1])
def test_a_file_system_without_direct_writes(
    after: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It refuses to open the file so, or the write itself."""
    monkeypatch.setattr(written, "LEAST", 0)
    real_open, real_write, direct = os.open, os.pwrite, set[int]()

    def opening(path: object, flags: int, *rest: int) -> int:
        fd = real_open(path, flags, *rest)  # type: ignore[arg-type]
        if DIRECT is not None and flags & DIRECT:
            if not after:
                os.close(fd)
                raise OSError(errno.EINVAL, "no direct writes")
            direct.add(fd)
        return fd

    def writing(fd: int, data: object, at: int) -> int:
        if fd in direct:
            raise OSError(errno.EINVAL, "no direct writes")
        return real_write(fd, data, at)  # type: ignore[arg-type]

    monkeypatch.setattr(os, "open", opening)
    monkeypatch.setattr(os, "pwrite", writing)
    path, data = tmp_path / "file", random.Random(1).randbytes(SIZE + 12345)
    path.touch()
    assert run(path, 0, [data, data], {0}) == data + data


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
def test_failures_are_not_hidden(code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(written, "LEAST", 0)

    def failing(fd: int, data: object, at: int) -> int:
        raise OSError(code, os.strerror(code))

    path = tmp_path / "file"
    path.touch()
    monkeypatch.setattr(os, "pwrite", failing)
    with pytest.raises(OSError, match=os.strerror(code)) as e:
        run(path, 0, [bytes(SIZE)], set())
    assert e.value.errno == code


@pytest.mark.parametrize("skip", [0, 1, BLOCK])
@pytest.mark.parametrize("before", [0, 7, BLOCK, SIZE])
def test_aligned_memory_is_written_from_where_it_is(
    skip: int, before: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(written, "LEAST", 0)
    raw = np.frombuffer(bytearray(random.Random(3).randbytes(3 * written.STRAIGHT)), np.uint8)
    start = -raw.ctypes.data % BLOCK
    piece = memoryview(raw[start + skip : start + skip + 2 * written.STRAIGHT + 99])  # type: ignore[arg-type]
    path = tmp_path / "file"
    path.touch()
    found = run(path, 0, [bytes(before), piece, b"end", piece], {1})  # type: ignore[list-item]
    assert found == bytes(before) + bytes(piece) + b"end" + bytes(piece)


def test_small_files_are_written_as_ever(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.touch()
    fd = os.open(path, os.O_RDWR)
    out = Written(path, fd, 0, 100)
    out.write(b"abc")
    assert path.read_bytes() == b"abc"
    out.flush()
    out.close()
    os.close(fd)
