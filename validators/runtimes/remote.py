"""A runtime in another interpreter: `Remote` has the methods of a Runtime, the model lives in a process of
`worker.py`.

A crash, a hang or a missing package there is one of lconvert's errors here, with what was asked and the last
lines that the process wrote. Workers are kept per (interpreter, runtime), because importing a runtime can
take longer than loading a model; `close_all` ends them, and so does the end of this process.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import lconvert
from lconvert import errors
from lconvert.errors import LconvertError, MissingPackageError, OptionError, RuntimeFailure
from lconvert.interpreters import interpreter
from lconvert.validators.runtimes import Generation, Purpose, worker

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

_TAIL = 12  # lines of the process's output in an error message
_GRACE = 5.0  # seconds that a process gets to end by itself


class _Log:
    """What a process writes to stdout and stderr, in a temporary file."""

    def __init__(self) -> None:
        self.file: IO[bytes] = tempfile.TemporaryFile(prefix="lconvert-")  # noqa: SIM115 - lives as long as the process

    def tail(self) -> str:
        """The last lines, as the end of an error message."""
        size = os.fstat(self.file.fileno()).st_size
        lines = (
            os.pread(self.file.fileno(), 8192, max(0, size - 8192)).decode("utf-8", "replace").splitlines()
        )
        last = [line.rstrip() for line in lines if line.strip()][-_TAIL:]
        return "; its last output:\n  " + "\n  ".join(last) if last else "; it wrote nothing"


def _died(status: int | None) -> str:
    if status is None:
        return "died"
    if status >= 0:
        return f"ended with exit code {status}"
    try:
        name = signal.Signals(-status).name
    except ValueError:
        name = "unknown"
    hint = "; the system does that when memory runs out" if -status == signal.SIGKILL else ""
    return f"was killed by signal {-status} ({name}{hint})"


class _Worker:
    """The process that forks the models' processes of one runtime."""

    def __init__(self, python: str, name: str, timeout: float) -> None:
        self.python, self.name = python, name
        self._lock = threading.Lock()
        self._log = _Log()
        self._control, theirs = socket.socketpair()
        try:
            self._process = subprocess.Popen(
                [python, "-E", worker.__file__, name, *lconvert.__path__],
                stdin=theirs.fileno(),
                stdout=self._log.file,
                stderr=self._log.file,
                start_new_session=True,  # Ctrl-C is for this process, which ends the others in order
            )
        except OSError as e:
            self._control.close()
            raise OptionError(f"{python}: cannot be started as a Python interpreter ({e.strerror})") from None
        finally:
            theirs.close()
        answer = self._receive(time.monotonic() + timeout, f"the start of {name}", timeout)
        if not answer["ok"]:
            self.close()
            if answer["error"] == "MissingPackageError":
                raise MissingPackageError(f"{python}: {answer['message']}")
            raise RuntimeFailure(
                f"{python}: {name} cannot be imported ({answer['error']}: {answer['message']}){self._log.tail()}"
            )

    @property
    def alive(self) -> bool:
        return self._process.poll() is None

    def _receive(self, deadline: float, doing: str, timeout: float) -> dict[str, Any]:
        try:
            return worker.receive(self._control, deadline)[0]
        except TimeoutError:
            self.close()
            raise RuntimeFailure(
                f"{self.python}: {doing} took longer than the limit of {timeout:g} s{self._log.tail()}"
            ) from None
        except (worker.Closed, worker.Garbage):
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(_GRACE)
            status = self._process.poll()
            self.close()
            raise RuntimeFailure(
                f"{self.python}: {doing}: the process {_died(status)}{self._log.tail()}"
            ) from None
        except BaseException:
            self.close()
            raise

    def open(self, request: Mapping[str, Any], log: _Log, timeout: float) -> tuple[socket.socket, int]:
        """A new process for the model of `request`: its socket, and its process id."""
        ours, theirs = socket.socketpair()
        with self._lock, theirs:
            with contextlib.suppress(worker.Closed, OSError):  # a dead worker shows in the answer
                worker.send(self._control, {"op": "open", **request})
                socket.send_fds(self._control, [b"F"], [theirs.fileno(), log.file.fileno()])
            answer = self._receive(time.monotonic() + timeout, f"the start of {self.name}", timeout)
        return ours, int(answer["pid"])

    def end(self, pid: int, grace: float) -> int | None:
        """Make sure that a model's process has ended; its exit status, None if the worker itself is gone."""
        with self._lock:
            if not self.alive:
                return None
            try:
                worker.send(self._control, {"op": "end", "pid": pid, "grace": grace})
                status: int = worker.receive(self._control, time.monotonic() + grace + _GRACE)[0]["status"]
            except (worker.Closed, worker.Garbage, TimeoutError, OSError):
                return None
        return status

    def close(self) -> None:
        """End the process; the models' processes end with it."""
        self._control.close()
        try:
            self._process.wait(1.0)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


_POOL: dict[tuple[str, str], _Worker] = {}
_POOL_LOCK = threading.Lock()


def _worker(python: str, name: str, timeout: float) -> _Worker:
    with _POOL_LOCK:
        found = _POOL.get((python, name))
        if found is None or not found.alive:
            found = _POOL[python, name] = _Worker(python, name, timeout)
        return found


def close_all() -> None:
    """End every worker, and with them every model that is still open in one."""
    with _POOL_LOCK:
        while _POOL:
            _POOL.popitem()[1].close()


atexit.register(close_all)


@contextlib.contextmanager
def workers() -> Iterator[None]:
    """A block after which no worker is left."""
    try:
        yield
    finally:
        close_all()


def probe(name: str, python: str | Path, timeout: float = 600.0) -> None:
    """Import the runtime's packages in `python`; raises what a Remote would."""
    _Worker(interpreter(python), name, timeout).close()


class Remote:
    """The runtime `name` with the model `path` in a process of the interpreter `python`.

    load_seconds: what opening the model took there, without the import of the runtime; baseline_memory: bytes
    that the process had in memory before it, None where the system does not say. Every call, this one
    included, may take `timeout` seconds. Raises OptionError for an interpreter that cannot be started,
    MissingPackageError where it lacks the runtime, RuntimeFailure when the process dies, hangs or breaks off;
    other lconvert errors of the runtime arrive as they are.
    """

    def __init__(
        self,
        name: str,
        path: str | Path,
        *,
        context: int = 512,
        threads: int | None = None,
        purpose: Purpose = "parity",
        python: str | Path = sys.executable,
        timeout: float = 600.0,
        options: Mapping[str, Any] | None = None,
    ) -> None:
        if os.name != "posix":
            raise OptionError("a runtime in another interpreter needs Linux or macOS: processes are forked")
        self._timeout, self._what = timeout, f"{name} in {python}"
        self._log = _Log()
        self._pid: int | None = None
        self._socket: socket.socket | None = None
        self._worker = _worker(interpreter(python), name, timeout)
        request = {
            "path": os.path.abspath(os.path.expanduser(path)),
            "arguments": {"context": context, "threads": threads, "purpose": purpose, **(options or {})},
        }
        self._socket, self._pid = self._worker.open(request, self._log, timeout)
        try:
            answer, _ = self._receive("opening the model")
        except LconvertError:
            self._end(_GRACE)
            raise
        self.load_seconds = float(answer["load_seconds"])
        self.baseline_memory: int | None = answer["baseline"]

    def _call(self, op: str, **message: Any) -> tuple[dict[str, Any], dict[str, NDArray[np.float32]]]:
        if self._socket is None:
            raise RuntimeFailure(f"{self._what}: {op} after the process was closed or failed")
        with contextlib.suppress(worker.Closed, OSError):  # a dead process shows in the answer
            self._socket.settimeout(self._timeout)
            worker.send(self._socket, {"op": op, **message})
        return self._receive(op)

    def _receive(self, doing: str) -> tuple[dict[str, Any], dict[str, NDArray[np.float32]]]:
        assert self._socket is not None
        try:
            answer, arrays = worker.receive(self._socket, time.monotonic() + self._timeout)
        except TimeoutError:
            self._end(0.0)
            raise RuntimeFailure(
                f"{self._what}: {doing} took longer than the limit of {self._timeout:g} s; the process was "
                f"ended{self._log.tail()}"
            ) from None
        except worker.Closed:
            status = self._end(1.0)
            raise RuntimeFailure(
                f"{self._what}: during {doing} the process {_died(status)}{self._log.tail()}"
            ) from None
        except worker.Garbage as e:
            self._end(0.0)
            raise RuntimeFailure(
                f"{self._what}: during {doing} the process sent something that is no answer ({e}){self._log.tail()}"
            ) from None
        except BaseException:  # an interrupt leaves half an answer in the socket
            self._end(0.0)
            raise
        if not answer.get("ok"):
            raise self._error(answer, doing)
        return answer, arrays

    def _error(self, answer: Mapping[str, Any], doing: str) -> LconvertError:
        name, message = answer["error"], answer["message"]
        kind = getattr(errors, str(name), None)
        if isinstance(kind, type) and issubclass(kind, LconvertError):
            prefix = f"{self._what}: " if issubclass(kind, (MissingPackageError, RuntimeFailure)) else ""
            return kind(f"{prefix}{message}")
        if name == "MemoryError":
            return RuntimeFailure(f"{self._what}: ran out of memory during {doing}")
        return RuntimeFailure(f"{self._what}: {doing} failed ({name}: {message}){self._log.tail()}")

    def tokenize(self, text: str, *, special: bool) -> list[int]:
        return list(self._call("tokenize", text=text, special=special)[0]["ids"])

    def logits(self, ids: list[int]) -> NDArray[np.float32]:
        return self._call("logits", ids=[int(i) for i in ids])[1]["logits"]

    def generate(self, ids: list[int], n: int) -> Generation:
        answer, _ = self._call("generate", ids=[int(i) for i in ids], n=n)
        return Generation(tuple(answer["ids"]), tuple(answer["seconds"]))

    def info(self) -> dict[str, str]:
        return dict(self._call("info")[0]["info"])

    def peak_memory(self) -> int | None:
        """The largest resident size of the model's process so far, in bytes; None where the system does not
        say.
        """
        peak = self._call("memory")[0]["peak"]
        return None if peak is None else int(peak)

    def _end(self, grace: float) -> int | None:
        """End the model's process; its exit status where it is known."""
        if self._socket is None or self._pid is None:
            return None
        self._socket.close()
        self._socket = None
        return self._worker.end(self._pid, grace)

    def close(self) -> None:
        self._end(_GRACE)
