"""Execution of a Plan.

Row slabs stream through a thread pool: they are produced in parallel and written and hashed in file order, so memory
is bounded by the slabs in flight and the bytes do not depend on the number of threads. Output goes to a temporary name,
is synced, and is renamed at the end; a killed run leaves nothing under the final name and `resume` continues it.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from . import __version__, fingerprint, interrupt
from .errors import InputError, OutputError, UnsupportedError
from .plan import FilePlan, Item, Plan, Slab, Source, manifest_path, refusals, stamp
from .written import Written

#: Bytes of source data per slab. Large enough to amortise a task, small enough that a few per thread stay cheap.
SLAB_BYTES = 8 << 20
#: A journal entry at most this often, so that its sync does not throttle the stream.
CHECKPOINT_BYTES = 256 << 20
CHECKPOINT_SECONDS = 1.0


Progress = Callable[[int, str], None]


@dataclass(frozen=True)
class Result:
    """What execution wrote: final paths, the plan with measured verdicts, and the manifest."""

    paths: tuple[Path, ...]
    plan: Plan
    manifest: Mapping[str, Any]


@contextlib.contextmanager
def _explained(path: Path) -> Iterator[None]:
    """Operating-system failures as one clear error."""
    try:
        yield
    except OSError as e:
        if e.errno in (errno.ENOSPC, errno.EDQUOT):
            raise OutputError(
                f"{path}: the disk is full; free some space and run again with --resume"
            ) from None
        if e.errno in (errno.EACCES, errno.EROFS, errno.EPERM):
            raise OutputError(f"{path}: no permission to write there ({e.strerror})") from None
        if e.errno == errno.EFBIG:
            raise OutputError(
                f"{path}: cannot be written (File too large): the file system or ulimit -f forbids it; raise the limit and run again with --resume"
            ) from None
        raise OutputError(f"{path}: cannot be written ({e.strerror or e})") from None


Sums = dict[str, list[float]]  # tensor -> [squared error, squared norm]


class _Journal:
    """How far a run came, beside the partial file: bytes of each file that are on disk, and the errors measured so far.

    Syncing happens in a thread of its own, so that the stream goes on meanwhile and write-back is spread over the run.
    """

    def __init__(self, path: Path, fingerprint: str) -> None:
        self.path, self.fingerprint = path, fingerprint
        self.done: dict[str, int] = {}
        self.errors: Sums = {}
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="journal")
        self._pending: Future[None] | None = None

    def load(self) -> None:
        """What an earlier run of the same plan recorded; nothing if there is none."""
        try:
            state = json.loads(self.path.read_text())
            if state["fingerprint"] == self.fingerprint:
                self.done = {str(k): int(v) for k, v in state["done"].items()}
                self.errors = {str(k): [float(v[0]), float(v[1])] for k, v in state["errors"].items()}
        except (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError):
            self.done, self.errors = {}, {}

    def ready(self) -> bool:
        """Whether the last record is not under way any more."""
        return self._pending is None or self._pending.done()

    def record(self, fd: int, name: str, at: int, errors: Sums) -> None:
        """Start to sync `at` bytes of a file and note them."""
        self.wait()
        state = {k: list(v) for k, v in errors.items()}
        self._pending = self._thread.submit(self._write, fd, name, at, state)

    def _write(self, fd: int, name: str, at: int, errors: Sums) -> None:
        os.fdatasync(fd) if hasattr(os, "fdatasync") else os.fsync(fd)
        self.done[name] = at
        temporary = self.path.with_name(self.path.name + ".new")
        state = {"fingerprint": self.fingerprint, "done": self.done, "errors": errors}
        temporary.write_text(json.dumps(state))
        os.replace(temporary, self.path)

    def wait(self) -> None:
        """Until the last record is written; raises what went wrong with it."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def settle(self) -> None:
        """Until nothing is under way; a failure that is already being reported is not repeated."""
        with contextlib.suppress(OSError):
            self.wait()

    def close(self) -> None:
        self._thread.shutdown(wait=True)


def _tasks(file: FilePlan, done: int) -> Iterator[tuple[Item, int, int]]:
    """(item, start row, stop row) in file order, from the first row that is not finished."""
    for item in file.items:
        step = max(1, SLAB_BYTES // max(1, item.source_row_bytes))
        first = max(0, done - item.offset) // item.row_bytes if item.row_bytes else 0
        for start in range(min(first, item.rows), item.rows, step):
            yield item, start, min(start + step, item.rows)


class _SourceHashes(threading.Thread):
    """sha256 of every source file, computed beside the conversion (hashlib releases the GIL)."""

    def __init__(self, sources: tuple[Source, ...]) -> None:
        super().__init__(daemon=True, name="source-hashes")
        self.sources, self.hashes, self.stop = sources, dict[str, str](), threading.Event()

    def run(self) -> None:
        buffer = bytearray(1 << 20)
        for source in self.sources:
            h = hashlib.sha256()
            try:
                with open(source.path, "rb", buffering=0) as f:
                    while (n := f.readinto(buffer)) and not self.stop.is_set():
                        h.update(memoryview(buffer)[:n])
            except OSError:
                return  # the comparison of stamps reports it
            self.hashes[source.path] = h.hexdigest()


class _Digest:
    """sha256 of what is written, beside the writing (hashlib releases the GIL); one piece waits at most."""

    def __init__(self) -> None:
        self._hash = hashlib.sha256()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="digest")
        self._pending: Future[None] | None = None

    def update(self, data: Any) -> None:
        """Add bytes that nobody changes any more."""
        self._wait()
        self._pending = self._thread.submit(self._hash.update, data)

    def hexdigest(self) -> str:
        """Of everything; nothing can be added any more."""
        self._wait()
        self._thread.shutdown(wait=True)
        return self._hash.hexdigest()

    def _wait(self) -> None:
        if self._pending is not None:
            self._pending.result()


def _check_unchanged(plan: Plan) -> None:
    for source in plan.sources:
        try:
            now = stamp(source.path)
        except OSError as e:
            raise InputError(f"{source.path}: vanished during the conversion ({e.strerror})") from None
        if now != source.stamp:
            raise InputError(f"{source.path}: changed during the conversion; nothing was written, run again")


def _stream(
    file: FilePlan,
    path: Path,
    fd: int,
    done: int,
    pool: ThreadPoolExecutor,
    threads: int,
    journal: _Journal,
    errors: Sums,
    progress: Progress,
    check: Callable[[], None],
) -> str:
    """Write one file from byte `done` on; returns its sha256 and adds to the error sums. `check` raises a noted Ctrl-C."""
    digest = _Digest()
    at = 0
    while at < done:  # what an earlier run left is part of the hash
        chunk = os.pread(fd, min(1 << 22, done - at), at)
        if not chunk:
            raise OutputError(
                f"{file.name}: the partial file is shorter than its journal says; run without --resume"
            )
        digest.update(chunk)
        at += len(chunk)
    if done:
        progress(done, file.name)

    def put(data: Any) -> None:
        view = memoryview(data).cast("B")
        digest.update(view)
        out.write(view)
        progress(len(view), file.name)

    out = Written(path, fd, at, file.size)
    window: deque[tuple[Item, int, Future[Slab]]] = deque()
    tasks = _tasks(file, at)
    last_bytes, last_time = at, time.monotonic()
    try:
        if at < len(file.head):
            put(memoryview(file.head)[at:])
        while True:
            while len(window) < threads + 2 and (task := next(tasks, None)) is not None:
                item, start, stop = task
                window.append((item, start, pool.submit(item.produce, start, stop)))
            if not window:
                break
            item, start, future = window.popleft()
            slab = interrupt.result(future, check)
            position = item.offset + start * item.row_bytes
            if out.at < position:
                put(bytes(position - out.at))
            view = memoryview(slab.data).cast("B")
            put(view[out.at - position :])
            if slab.squared_norm or slab.squared_error:
                sums = errors.setdefault(item.name, [0.0, 0.0])
                sums[0] += slab.squared_error
                sums[1] += slab.squared_norm
            due = (
                out.at - last_bytes >= CHECKPOINT_BYTES or time.monotonic() - last_time >= CHECKPOINT_SECONDS
            )
            if due and journal.ready():
                out.flush()
                journal.record(fd, file.name, out.at, errors)
                last_bytes, last_time = out.at, time.monotonic()
        if out.at < file.size:
            put(bytes(file.size - out.at))
        out.flush()
    except BaseException:
        for _, _, future in window:
            future.cancel()
        raise
    finally:
        out.close()
    return digest.hexdigest()


def _measured(plan: Plan, errors: Mapping[str, list[float]]) -> Plan:
    """The plan with the errors that execution measured."""

    def measured(item: Item) -> Item:
        if item.verdict.kind in ("exact", "widened") or item.name not in errors:
            return item
        squared_error, squared_norm = errors[item.name]
        relative = (squared_error / squared_norm) ** 0.5 if squared_norm else 0.0
        return replace(item, verdict=replace(item.verdict, error=relative))

    return replace(plan, files=tuple(replace(f, items=tuple(map(measured, f.items))) for f in plan.files))


def cpus() -> int:
    """CPUs this process may use."""
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def _claim(path: Path) -> int:
    """A descriptor that keeps other runs from writing the partial file `path`, until it is closed."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        import fcntl

        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        mine = os.fstat(fd).st_ino == os.stat(path).st_ino  # else the other run has just renamed it
    except (BlockingIOError, FileNotFoundError):
        mine = False
    except (ImportError, OSError):
        mine = True  # a system or file system without locks
    if not mine:
        os.close(fd)
        raise OutputError(f"{path}: another run is writing this file; wait for it or choose another output")
    return fd


def execute(
    plan: Plan,
    folder: Path,
    *,
    threads: int | None = None,
    force: bool = False,
    resume: bool = False,
    progress: Progress | None = None,
) -> Result:
    """Write the plan's files into `folder`.

    threads: workers (default: the CPUs this process may use). force: replace existing files. resume: continue a
    killed run of the same plan; bytes are the same either way. progress(bytes, file) is called as bytes arrive.
    Raises OutputError (target exists, disk full, no permission), InputError (NaN, a changed source) and leaves nothing
    under a final name unless all of it is complete.
    """
    if refused := refusals(plan):
        more = f" (and {len(refused) - 3} more)" if len(refused) > 3 else ""
        raise UnsupportedError("; ".join(refused[:3]) + more)
    threads = threads or cpus()
    tell = progress or (lambda n, name: None)
    final = [folder / f.name for f in plan.files]
    if os.path.lexists(folder) and not folder.is_dir():
        raise OutputError(f"{folder}: exists and is no folder; choose another output")
    sources = {os.path.realpath(s.path) for s in plan.sources}
    for path in final:
        if os.path.realpath(path) in sources:
            raise OutputError(f"{path}: is also the source; choose another output name")
        if path.is_dir():
            raise OutputError(f"{path}: is a folder")
        if path.exists() and not force:
            raise OutputError(f"{path}: exists; --force replaces it")
    with interrupt.deferred() as check:
        return _execute(plan, folder, final, threads, resume, tell, check)


def _execute(
    plan: Plan,
    folder: Path,
    final: list[Path],
    threads: int,
    resume: bool,
    tell: Progress,
    check: Callable[[], None],
) -> Result:
    partial = [p.with_name(p.name + ".partial") for p in final]
    journal = _Journal(final[0].with_name(final[0].name + ".partial.json"), plan.fingerprint())
    hasher = _SourceHashes(plan.sources)
    hashes: list[str] = []
    keep = False
    new = [p for p in (folder, *folder.parents) if not p.exists()]
    with _explained(folder):
        free = os.statvfs(new[-1].parent if new else folder)
        _check_unchanged(plan)
        if resume:
            journal.load()
        done, errors = journal.done, {k: list(v) for k, v in journal.errors.items()}
        needed = plan.size - sum(done.values())
        if free.f_bavail * free.f_frsize < needed:
            raise OutputError(
                f"{folder}: {needed / 1e6:.0f} MB are needed, {free.f_bavail * free.f_frsize / 1e6:.0f} MB are free"
            )
    pool = ThreadPoolExecutor(threads, thread_name_prefix="slab")
    beside = manifest_path(final[0])
    temporary = beside.with_name(beside.name + ".partial")
    claim: int | None = None
    try:
        with _explained(folder):
            folder.mkdir(parents=True, exist_ok=True)
            claim = _claim(partial[0])
        hasher.start()
        for file, path in zip(plan.files, partial, strict=True):
            with _explained(path):
                start = done.get(file.name, 0)
                if not path.exists() or path.stat().st_size < start:
                    start = 0  # what the journal speaks of is gone
                fd = os.open(path, os.O_RDWR | os.O_CREAT | (0 if start else os.O_TRUNC), 0o644)
                try:
                    os.ftruncate(fd, start)
                    hashes.append(_stream(file, path, fd, start, pool, threads, journal, errors, tell, check))
                    journal.wait()
                    os.fsync(fd)
                    if len(plan.files) > 1:
                        journal.record(fd, file.name, file.size, errors)
                finally:
                    journal.settle()
                    os.close(fd)
        noted = {
            kind: {role: pool.submit(v.digest) for role, v in some.items()}
            for kind, some in fingerprint.wanted(plan).items()
        }
        compressed = {
            k: {r: interrupt.result(d, check) for r, d in some.items()} for k, some in noted.items()
        }
        while hasher.is_alive():
            check()
            hasher.join(interrupt.SLICE)
        _check_unchanged(plan)
        finished = _measured(plan, errors)
        manifest = {
            "schema": "lconvert.manifest/1",
            "lconvert": __version__,
            "files": {f.name: {"sha256": h, "size": f.size} for f, h in zip(plan.files, hashes, strict=True)},
            "sources": {
                s.path: {"sha256": hasher.hashes.get(s.path), "size": s.stamp[0]} for s in plan.sources
            },
            **({"compressed": compressed} if plan.values else {}),
            "plan": finished.to_json(),
        }
        check()  # from here on it is done
        with _explained(folder):
            temporary.write_text(json.dumps(manifest, indent=1) + "\n")
            # The first file goes last: while it is missing, a sharded artifact does not load.
            for source, target in reversed(list(zip(partial, final, strict=True))):
                os.replace(source, target)
            os.replace(temporary, beside)
            _sync_folder(folder)
    except KeyboardInterrupt:
        keep = bool(done)
        what = "what was finished is kept for --resume" if keep else "nothing was written"
        raise KeyboardInterrupt(what) from None
    except OutputError:
        keep = bool(done)
        raise
    finally:
        hasher.stop.set()
        pool.shutdown(wait=True, cancel_futures=True)
        journal.close()
        if not keep:
            for path in (*partial, journal.path, temporary) if claim is not None else ():
                with contextlib.suppress(OSError):
                    path.unlink()
            for path in new:  # folders that this run made and that hold nothing
                with contextlib.suppress(OSError):
                    path.rmdir()
        if claim is not None:
            os.close(claim)
    return Result(tuple(final), finished, manifest)


def _sync_folder(folder: Path) -> None:
    """Make the renames durable; not every file system can, and then there is nothing to do."""
    with contextlib.suppress(OSError):
        fd = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)
