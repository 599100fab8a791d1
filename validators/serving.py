"""An OpenAI-compatible server for one artifact, started for a block of code and always ended with it."""

from __future__ import annotations

import contextlib
import http.client
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from lconvert.errors import MissingPackageError, OptionError, RuntimeFailure
from lconvert.validators.bench_server import Target
from lconvert.validators.runtimes import kind

_LOCAL = "127.0.0.1"
_GRACE = 10.0  # seconds that a server gets to end by itself


def _llama_cpp(path: str, port: int, context: int, threads: int | None) -> list[str]:
    """llama-cpp-python's server: one request at a time, the others wait (by default they would end the running one)."""
    some = ["--n_threads", str(threads), "--n_threads_batch", str(threads)] if threads else []
    place = ["--host", _LOCAL, "--port", str(port)]
    return [
        "-m",
        "llama_cpp.server",
        "--model",
        path,
        *place,
        "--n_ctx",
        str(context),
        "--interrupt_requests",
        "false",
        *some,
    ]


def _vllm(path: str, port: int, context: int, threads: int | None) -> list[str]:
    """vLLM without compilation, which would cost more than a sweep measures, and without its prefix cache."""
    place = ["--host", _LOCAL, "--port", str(port)]
    plain = ["--enforce-eager", "--no-enable-prefix-caching", "--max-model-len", str(context)]
    return ["-m", "vllm.entrypoints.openai.api_server", "--model", path, *place, *plain]


#: name -> (kinds of artifact, arguments of the interpreter, module that it needs, what installs that)
SERVERS: Mapping[str, tuple[tuple[str, ...], Callable[..., list[str]], str, str]] = {
    "llama.cpp": (("gguf",), _llama_cpp, "llama_cpp.server.app", "llama-cpp-python[server]"),
    "vllm": (("hf",), _vllm, "vllm.entrypoints.openai.api_server", "vllm"),
}


@contextlib.contextmanager
def serving(
    name: str,
    path: str | Path,
    *,
    context: int,
    threads: int | None = None,
    python: str | Path | None = None,
    timeout: float = 300.0,
) -> Iterator[str]:
    """The address of a server that has the artifact loaded; it is ended with the block, whatever happens in it.

    python: an interpreter that has the server. timeout: seconds until it must answer. Raises OptionError for a name or
    an artifact that does not fit, MissingPackageError without the server's packages, RuntimeFailure when it does not come up.
    """
    if name not in SERVERS:
        raise OptionError(f"unknown server {name}; servers: {', '.join(SERVERS)}")
    kinds, arguments, module, install = SERVERS[name]
    if kind(path) not in kinds:
        raise OptionError(f"{path}: {name} serves {', '.join(kinds)} artifacts, this is {kind(path)}")
    interpreter = str(python or sys.executable)
    with socket.socket() as s:
        s.bind((_LOCAL, 0))
        port = s.getsockname()[1]
    environment = {
        **os.environ,
        "PYTHONSAFEPATH": "1",  # the current folder may hold folders with the names of the server's packages
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        # vLLM's engine spends a quarter of a minute compiling helpers; eager mode does not need them.
        "TORCHDYNAMO_DISABLE": "1",
        **({"OMP_NUM_THREADS": str(threads)} if threads else {}),
    }
    environment.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB; the default is a share of all memory
    with tempfile.TemporaryFile(prefix="lconvert-") as log:
        try:
            process = subprocess.Popen(
                [interpreter, *arguments(os.path.abspath(path), port, context, threads)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=environment,
                start_new_session=True,  # its own processes end with it
            )
        except OSError as e:
            raise OptionError(f"{interpreter}: cannot be started ({e.strerror})") from None
        try:
            url = f"http://{_LOCAL}:{port}"
            _wait(process, url, timeout, lambda: _tail(log.fileno()), (interpreter, name, module, install))
            yield url
        finally:
            _end(process)


def _wait(
    process: subprocess.Popen[bytes],
    url: str,
    timeout: float,
    tail: Callable[[], str],
    what: tuple[str, str, str, str],
) -> None:
    """Until /v1/models answers."""
    interpreter, name, module, install = what
    target = Target.parse(url, {}, 5.0)
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        if (code := process.poll()) is not None:
            said = tail()
            if "No module named" in said or "ModuleNotFoundError" in said:
                raise MissingPackageError(
                    f"{interpreter}: the server of {name} is not installed there ({module}): pip install '{install}'; {said}"
                )
            raise RuntimeFailure(f"{interpreter}: the server of {name} ended with exit code {code}; {said}")
        with (
            contextlib.suppress(OSError, http.client.HTTPException),
            target.send("GET", "/v1/models") as response,
        ):
            if response.status == 200:
                return
        time.sleep(0.1)
    raise RuntimeFailure(f"{interpreter}: the server of {name} did not answer within {timeout:g} s; {tail()}")


def _tail(file: int) -> str:
    size = os.fstat(file).st_size
    lines = os.pread(file, 8192, max(0, size - 8192)).decode("utf-8", "replace").splitlines()
    return "its last output: " + " | ".join(line.strip() for line in lines[-6:] if line.strip())


def _end(process: subprocess.Popen[bytes]) -> None:
    """The server, and the processes that it started and may have left."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGTERM)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(_GRACE)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
