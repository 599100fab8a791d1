"""The other side of `remote.Remote`: a process of another interpreter in which a runtime's models live.

`PYTHON -E worker.py RUNTIME PACKAGE...` imports the runtime's packages once, then forks one process per
model, because some runtimes take longer to import than to load. The process talks over a socket given to it,
never over stdout, which libraries print to. A frame is a JSON message followed by safetensors bytes
(github.com/huggingface/safetensors, README, "Format"), F32 only. Nothing of the parent's environment is
imported but the folder PACKAGE of lconvert, so that here only NumPy and the runtime's own packages are
needed.
"""

from __future__ import annotations

import sys

if __name__ == "__main__" and not getattr(sys.flags, "safe_path", False):
    del sys.path[0]  # this folder: its files have the names of the packages that they import

import contextlib
import functools
import importlib
import importlib.util
import json
import os
import signal
import socket
import struct
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

#: magic, bytes of JSON, bytes of safetensors
_HEAD = struct.Struct(">4sIQ")
_MAGIC = b"LCW1"
_MESSAGE_LIMIT = 1 << 28
_PAYLOAD_LIMIT = 1 << 40


class Closed(Exception):
    """The other side is gone."""


class Garbage(Exception):
    """What came is not a frame."""


def send(to: socket.socket, message: Mapping[str, Any], **arrays: NDArray[np.float32]) -> None:
    """Write one frame. Arrays go out of their own memory, without a copy where they are contiguous."""
    import numpy as np

    parts, layout, at = [], {}, 0
    for name, array in arrays.items():
        parts.append(np.ascontiguousarray(array, dtype="<f4"))
        layout[name] = {
            "dtype": "F32",
            "shape": list(array.shape),
            "data_offsets": [at, at + parts[-1].nbytes],
        }
        at += parts[-1].nbytes
    header = b""
    if parts:
        text = json.dumps(layout).encode()
        text += b" " * (-len(text) % 8)
        header = struct.pack("<Q", len(text)) + text
    body = json.dumps(message).encode()
    try:
        to.sendall(_HEAD.pack(_MAGIC, len(body), len(header) + at) + body + header)
        for part in parts:
            to.sendall(part.reshape(-1).view(np.uint8).data)
    except (BrokenPipeError, ConnectionError):
        raise Closed from None


def receive(
    at: socket.socket, deadline: float | None = None
) -> tuple[dict[str, Any], dict[str, NDArray[np.float32]]]:
    """Read one frame. TimeoutError past `deadline` (of time.monotonic), Closed at the end, Garbage for
    anything else.
    """
    magic, size, payload = _HEAD.unpack(_exactly(at, _HEAD.size, deadline))
    if magic != _MAGIC or size > _MESSAGE_LIMIT or payload > _PAYLOAD_LIMIT:
        raise Garbage(f"{magic!r}")
    try:
        message = json.loads(bytes(_exactly(at, size, deadline)))
    except ValueError as e:
        raise Garbage(str(e)) from None
    if not isinstance(message, dict):
        raise Garbage(f"a {type(message).__name__}")
    return message, _arrays(_exactly(at, payload, deadline)) if payload else {}


def _exactly(at: socket.socket, size: int, deadline: float | None) -> memoryview:
    data = memoryview(bytearray(size))
    done = 0
    while done < size:
        if deadline is not None:
            left = deadline - time.monotonic()
            if left <= 0:
                raise TimeoutError
            at.settimeout(left)
        try:
            got = at.recv_into(data[done:])
        except ConnectionError:
            got = 0
        if not got:
            raise Closed
        done += got
    return data


def _arrays(data: memoryview) -> dict[str, NDArray[np.float32]]:
    import numpy as np

    try:
        (size,) = struct.unpack_from("<Q", data)
        header = json.loads(bytes(data[8 : 8 + size]))
        return {
            name: np.frombuffer(data[8 + size + begin : 8 + size + end], "<f4").reshape(part["shape"])
            for name, part in header.items()
            for begin, end in [part["data_offsets"]]
        }
    except (ValueError, KeyError, TypeError, struct.error) as e:
        raise Garbage(f"safetensors: {e}") from None


# --- the process of one model


def _tokenize(runtime: Any, m: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    return {"ids": runtime.tokenize(m["text"], special=m["special"])}, {}


def _logits(runtime: Any, m: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    return {}, {"logits": runtime.logits(m["ids"])}


def _generate(runtime: Any, m: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    made = runtime.generate(m["ids"], m["n"])
    return {"ids": list(made.ids), "seconds": list(made.seconds)}, {}


def _info(runtime: Any, m: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    return {"info": {**runtime.info(), "python": sys.version.split()[0]}}, {}


def _memory(runtime: Any, m: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    return memory(), {}


OPS: Mapping[str, Callable[[Any, Mapping[str, Any]], tuple[dict[str, Any], dict[str, Any]]]] = {
    "tokenize": _tokenize,
    "logits": _logits,
    "generate": _generate,
    "info": _info,
    "memory": _memory,
}


def memory() -> dict[str, int | None]:
    """Bytes of this process: "peak" (VmHWM) and "resident" (VmRSS) of Linux's /proc, None elsewhere."""
    try:
        with open("/proc/self/status", encoding="ascii", errors="replace") as f:
            fields = dict(line.split(":", 1) for line in f if ":" in line)
        return {k: 1024 * int(fields[v].split()[0]) for k, v in (("peak", "VmHWM"), ("resident", "VmRSS"))}
    except (OSError, KeyError, ValueError):
        return {"peak": None, "resident": None}


def serve(connection: socket.socket, kind: Callable[..., Any], request: Mapping[str, Any]) -> None:
    """Open the model that `request` names, then answer until the other side closes."""
    runtime: Any = None

    def answer(work: Callable[[], tuple[dict[str, Any], dict[str, Any]]]) -> None:
        try:
            message, arrays = work()
        except Exception as e:  # noqa: BLE001 - whatever a runtime raises goes to the parent
            traceback.print_exc()
            send(connection, error(e))
        else:
            send(connection, {"ok": True, **message}, **arrays)

    def opened() -> tuple[dict[str, Any], dict[str, Any]]:
        nonlocal runtime
        before = memory()["resident"]
        start = time.perf_counter()
        runtime = kind(request["path"], **request["arguments"])
        return {"load_seconds": time.perf_counter() - start, "baseline": before}, {}

    with contextlib.suppress(Closed):
        answer(opened)
        while runtime is not None:
            message, _ = receive(connection)
            answer(functools.partial(OPS[message["op"]], runtime, message))
    if runtime is not None:
        runtime.close()


def error(e: BaseException) -> dict[str, Any]:
    """An exception as a message: its class by name, so that lconvert's own errors arrive as themselves."""
    return {"ok": False, "error": type(e).__name__, "message": str(e)}


# --- the process that forks them


def importable(places: list[str]) -> None:
    """Make the package lconvert importable from the folders `places` and from nowhere else.

    An editable installation has two: the sources, and a folder with nothing but the compiled kernels.
    """
    places = sorted(places, key=lambda p: not os.path.isfile(os.path.join(p, "__init__.py")))
    spec = importlib.util.spec_from_file_location(
        "lconvert", os.path.join(places[0], "__init__.py"), submodule_search_locations=places
    )
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules["lconvert"] = module
    spec.loader.exec_module(module)
    for place in places[1:]:
        for name in filter(lambda n: os.path.isdir(os.path.join(place, n)), os.listdir(place)):
            importlib.import_module(f"lconvert.{name}").__path__.append(os.path.join(place, name))


def prepared(name: str) -> Callable[..., Any]:
    """The class of the runtime `name`, its packages imported."""
    runtimes = importlib.import_module("lconvert.validators.runtimes")
    module, cls, _ = runtimes.RUNTIMES[name]
    found = importlib.import_module(f"{runtimes.__name__}.{module}")
    found.prepare()
    kind: Callable[..., Any] = getattr(found, cls)
    return kind


def main(name: str, places: list[str]) -> None:
    control = socket.socket(fileno=os.dup(0))
    with open(os.devnull) as nothing:
        os.dup2(nothing.fileno(), 0)
    if sys.version_info < (3, 11):  # noqa: UP036 - the other interpreter may be any
        return send_plain(control, f"it is Python {sys.version.split()[0]}, and lconvert needs 3.11 or newer")
    if importlib.util.find_spec("numpy") is None:
        return send_plain(control, "numpy is not installed there")
    importable(places)
    try:
        kind = prepared(name)
    except Exception as e:  # noqa: BLE001 - a broken installation can raise anything
        traceback.print_exc()
        return send(control, error(e))
    send(control, {"ok": True, "pid": os.getpid()})
    with contextlib.suppress(Closed):
        _forks(control, kind)


def send_plain(control: socket.socket, reason: str) -> None:
    """The frame for a missing package, made without NumPy."""
    body = json.dumps({"ok": False, "error": "MissingPackageError", "message": reason}).encode()
    control.sendall(_HEAD.pack(_MAGIC, len(body), 0) + body)


def _forks(control: socket.socket, kind: Callable[..., Any]) -> None:
    """Fork a process per "open" message, end one per "end" message; when the parent is gone, end all."""
    alive, alive_here = os.pipe()  # ends when this process does: only it holds the other end
    children: set[int] = set()
    try:
        while True:
            message, _ = receive(control)
            if message["op"] == "open":
                _, fds, _, _ = socket.recv_fds(control, 1, 2)
                pid = os.fork()
                if not pid:
                    os.close(alive_here)
                    control.close()
                    _child(alive, fds, kind, message)
                for fd in fds:
                    os.close(fd)
                children.add(pid)
                send(control, {"ok": True, "pid": pid})
            else:
                pid = message["pid"]
                status = _ended(pid, message["grace"])
                children.discard(pid)
                send(control, {"ok": True, "status": status})
    finally:
        for pid in children:
            os.kill(pid, signal.SIGKILL)


def _child(alive: int, fds: list[int], kind: Callable[..., Any], request: Mapping[str, Any]) -> None:
    code = 1
    try:
        threading.Thread(target=lambda: (os.read(alive, 1), os._exit(1)), daemon=True).start()
        os.dup2(fds[1], 1)
        os.dup2(fds[1], 2)
        serve(socket.socket(fileno=fds[0]), kind, request)
        code = 0
    except BaseException:  # noqa: BLE001 - a forked process must not run on in the code of the one that forked it
        traceback.print_exc()
    finally:
        with contextlib.suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def _ended(pid: int, grace: float) -> int:
    """Exit status as subprocess gives it (negative: the signal), after at most `grace` seconds and then a
    SIGKILL.
    """
    deadline = time.monotonic() + grace
    while True:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() > deadline:
            os.kill(pid, signal.SIGKILL)
            return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        time.sleep(0.01)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
