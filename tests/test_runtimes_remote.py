"""A runtime in another interpreter: the same answers bit for bit, and a clear error for everything that can
go wrong.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import sysconfig
import textwrap
import threading
import time
import venv
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import lconvert
from lconvert.errors import InputError, LconvertError, MissingPackageError, OptionError, RuntimeFailure
from lconvert.interpreters import interpreter
from lconvert.validators.runtimes import open_runtime, remote, worker
from lconvert.validators.runtimes.config import FILE, VARIABLE, RuntimeSettings, load, settings
from lconvert.validators.runtimes.remote import Remote, close_all, probe, workers
from tests.conftest import DEMO

for name in ("torch", "transformers", "llama_cpp"):
    pytest.importorskip(name, reason=f"{name} is not installed")

PACKAGES = Path(sysconfig.get_path("purelib"))
IDS = [2042, *range(5, 90)]


@pytest.fixture(scope="module")
def gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return lconvert.convert(DEMO, tmp_path_factory.mktemp("remote") / "Q4_K_M.gguf", ftype="Q4_K_M").paths[0]


@pytest.fixture(autouse=True, scope="module")
def no_worker_is_left() -> Iterator[None]:
    with workers():
        yield
    assert not remote._POOL


def gone(pid: int, within: float = 10.0) -> bool:
    """Is the process gone, or dead and not yet collected?"""
    deadline = time.monotonic() + within
    while time.monotonic() < deadline:
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except (FileNotFoundError, ProcessLookupError):
            return True
        if state == "Z":
            return True
        time.sleep(0.02)
    return False


needs_proc = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="the system has no /proc")


# --- the same answers


@pytest.mark.parametrize("purpose", ["parity", "speed"])
def test_llama_cpp_gives_the_same_bits(gguf: Path, purpose: Any) -> None:
    here = open_runtime("llama.cpp", gguf, context=128, threads=1, purpose=purpose)
    there = open_runtime("llama.cpp", gguf, context=128, threads=1, purpose=purpose, python=sys.executable)
    assert np.array_equal(there.logits(IDS), here.logits(IDS))
    assert there.generate(IDS, 20).ids == here.generate(IDS, 20).ids
    for special in (True, False):
        text = "one <|eot_id|> two \N{SNOWMAN} \0 end"
        assert there.tokenize(text, special=special) == here.tokenize(text, special=special)
    assert there.info() == {**here.info(), "python": sys.version.split()[0]}
    there.close()
    here.close()


def test_transformers_gives_the_same_logits() -> None:
    here = open_runtime("transformers", DEMO, threads=1)
    there = open_runtime("transformers", DEMO, threads=1, python=sys.executable)
    assert np.array_equal(there.logits(IDS), here.logits(IDS))
    assert there.generate(IDS, 10).ids == here.generate(IDS, 10).ids
    there.close()


def test_several_models_share_a_worker(gguf: Path) -> None:
    close_all()
    first = Remote("llama.cpp", gguf, context=64, threads=1)
    (forks,) = remote._POOL.values()
    second = Remote("llama.cpp", gguf, context=64, threads=1)
    assert list(remote._POOL.values()) == [forks] and first._pid != second._pid
    a, b = first.logits(IDS[:50]), second.logits(IDS[:50])
    assert np.array_equal(a, b) and np.array_equal(first.logits(IDS[:50]), a)
    first.close()
    assert np.array_equal(second.logits(IDS[:50]), a)
    second.close()
    first.close()
    with pytest.raises(RuntimeFailure, match="logits after the process was closed or failed"):
        second.logits(IDS)


@needs_proc
def test_memory_and_load_time(gguf: Path) -> None:
    runtime = Remote("llama.cpp", gguf, context=64, threads=1)
    assert 0 < runtime.load_seconds < 60
    peak, before = runtime.peak_memory(), runtime.baseline_memory
    assert peak is not None and before is not None
    assert peak > before + gguf.stat().st_size / 2
    runtime.close()


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An interpreter that has NumPy and llama-cpp-python with what that imports, and nothing else of this
    one.
    """
    folder = tmp_path_factory.mktemp("bare")
    venv.create(folder / "env", with_pip=False, symlinks=True)
    links = folder / "packages"
    links.mkdir()
    wanted = ("numpy", "llama_cpp", "typing_extensions", "diskcache", "jinja2", "markupsafe")
    for path in PACKAGES.iterdir():
        if path.name.partition(".")[0] in wanted or path.name.startswith("llama_cpp_python-"):
            (links / path.name).symlink_to(path)
    (site,) = (folder / "env").glob("lib/python*/site-packages")
    (site / "links.pth").write_text(str(links))
    return folder / "env" / "bin" / "python"


def test_nothing_of_ours_is_needed_there(bare: Path, gguf: Path) -> None:
    script = "import importlib.util as u; print([n for n in ('click', 'torch', 'yaml', 'lconvert') if u.find_spec(n)])"
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run([bare, "-c", script], capture_output=True, text=True, check=True, env=env)
    assert done.stdout.strip() == "[]"
    here = open_runtime("llama.cpp", gguf, context=128, threads=1)
    there = open_runtime("llama.cpp", gguf, context=128, threads=1, python=bare)
    assert np.array_equal(there.logits(IDS), here.logits(IDS))
    there.close()


# --- an interpreter that will not do


def test_a_package_is_missing_there(bare: Path, tmp_path: Path) -> None:
    with pytest.raises(MissingPackageError, match=rf"{bare}: (torch|transformers) is not installed"):
        Remote("transformers", DEMO, python=bare)
    with pytest.raises(MissingPackageError, match=rf"{bare}: vLLM is not installed.*doctor --install vllm"):
        probe("vllm", bare)
    venv.create(tmp_path / "empty", with_pip=False, symlinks=True)
    with pytest.raises(MissingPackageError, match="numpy is not installed there"):
        Remote("llama.cpp", DEMO, python=tmp_path / "empty" / "bin" / "python")


def test_an_interpreter_that_is_none(tmp_path: Path) -> None:
    text = tmp_path / "python"
    with pytest.raises(
        OptionError, match="python: this interpreter does not exist; give the path of a Python"
    ):
        Remote("llama.cpp", DEMO, python=text)
    text.write_text("import this")
    with pytest.raises(OptionError, match="this interpreter is not executable"):
        Remote("llama.cpp", DEMO, python=text)
    text.chmod(0o755)
    with pytest.raises(OptionError, match="cannot be started as a Python interpreter"):
        Remote("llama.cpp", DEMO, python=text)
    text.write_text("#!/bin/sh\necho no python here >&2; exit 7\n")
    with pytest.raises(
        RuntimeFailure, match=r"(?s)start of llama.cpp: .*ended with exit code 7.*no python here"
    ):
        Remote("llama.cpp", DEMO, python=text)
    text.write_text("#!/bin/sh\nsleep 60\n")
    with pytest.raises(RuntimeFailure, match=r"start of llama.cpp took longer than the limit of 0.3 s"):
        Remote("llama.cpp", DEMO, python=text, timeout=0.3)
    text.write_text("#!/bin/sh\necho this is no frame at all, but it is long enough >&0\n")
    with pytest.raises(RuntimeFailure, match=r"the start of llama.cpp: the process ended with exit code 0"):
        Remote("llama.cpp", DEMO, python=text)


def test_links_to_interpreters_are_kept(bare: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An environment's python is a link to the one it was made from, which has other packages."""
    assert interpreter(bare) == str(bare) and bare.is_symlink()
    monkeypatch.setenv("PATH", str(bare.parent))
    assert interpreter("python") == str(bare)


# --- what the runtime refuses


def test_refusals_arrive_as_they_are(gguf: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(gguf.read_bytes()[:5000])
    with pytest.raises(InputError, match=r"broken\.gguf: llama.cpp cannot load it: "):
        Remote("llama.cpp", broken)
    runtime = Remote("llama.cpp", gguf, context=64, threads=1)
    with pytest.raises(InputError, match="65 tokens do not fit the context of 64"):
        runtime.logits([1] * 65)
    assert runtime.logits([1, 2]).shape == (2, 2048)  # an error is an answer, not the end
    runtime.close()
    with pytest.raises(RuntimeFailure, match=r"opening the model failed \(TypeError: .*colour"):
        Remote("llama.cpp", gguf, options={"colour": "red"})


# --- crashes and hangs


def during(seconds: float, act: Any) -> threading.Timer:
    timer = threading.Timer(seconds, act)
    timer.start()
    return timer


@needs_proc
def test_killed_in_the_middle(gguf: Path) -> None:
    runtime = Remote("dequantized", gguf, context=512, threads=1)
    pid = runtime._pid
    assert pid is not None
    during(0.5, lambda: os.kill(pid, signal.SIGKILL))
    start = time.monotonic()
    with pytest.raises(
        RuntimeFailure, match=r"during generate the process was killed by signal 9 \(SIGKILL; .*memory"
    ):
        runtime.generate(IDS, 420)
    assert 0.3 < time.monotonic() - start < 10 and gone(pid)
    with pytest.raises(RuntimeFailure, match="tokenize after the process was closed or failed"):
        runtime.tokenize("more", special=False)
    runtime.close()
    fresh = Remote("dequantized", gguf, context=512, threads=1)
    assert len(fresh.generate(IDS, 2).ids) == 2
    fresh.close()


@needs_proc
def test_a_hang(gguf: Path) -> None:
    runtime = Remote("llama.cpp", gguf, context=64, threads=1, timeout=1.0)
    pid = runtime._pid
    assert pid is not None
    os.kill(pid, signal.SIGSTOP)
    start = time.monotonic()
    with pytest.raises(
        RuntimeFailure, match="logits took longer than the limit of 1 s; the process was ended"
    ):
        runtime.logits([1, 2, 3])
    assert 0.9 < time.monotonic() - start < 5 and gone(pid)


@needs_proc
def test_the_worker_itself_is_killed(gguf: Path) -> None:
    runtime = Remote("llama.cpp", gguf, context=64, threads=1)
    forks, pid = runtime._worker, runtime._pid
    assert pid is not None
    os.kill(forks._process.pid, signal.SIGKILL)
    assert gone(pid), "a model's process must not outlive the one that forked it"
    with pytest.raises(RuntimeFailure, match="during logits the process died"):
        runtime.logits([1])
    again = Remote("llama.cpp", gguf, context=64, threads=1)  # the pool starts another one
    assert again._worker is not forks and again.logits([1]).shape == (1, 2048)
    again.close()


@needs_proc
def test_an_interrupt_ends_the_process(gguf: Path) -> None:
    """Half an answer would be left in the socket, and be taken for the next one."""
    runtime = Remote("dequantized", gguf, context=512, threads=1)
    pid = runtime._pid
    assert pid is not None
    during(0.5, lambda: os.kill(os.getpid(), signal.SIGINT))
    with pytest.raises(KeyboardInterrupt):
        runtime.generate(IDS, 420)
    assert gone(pid)
    with pytest.raises(RuntimeFailure, match="after the process was closed or failed"):
        runtime.logits([1])


@needs_proc
@pytest.mark.parametrize("busy", [False, True], ids=["idle", "stopped"])
def test_nothing_outlives_its_parent(gguf: Path, busy: bool) -> None:
    code = f"""
        import os, signal, time
        from lconvert.validators.runtimes.remote import Remote
        r = Remote("llama.cpp", {str(gguf)!r}, context=64)
        if {busy}:
            os.kill(r._pid, signal.SIGSTOP)
        print(r._worker._process.pid, r._pid, flush=True)
        time.sleep(60)
    """
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(str(Path(p).parent) for p in lconvert.__path__)}
    parent = subprocess.Popen(
        [sys.executable, "-P", "-c", textwrap.dedent(code)], stdout=subprocess.PIPE, text=True, env=env
    )
    assert parent.stdout is not None
    pids = [int(x) for x in parent.stdout.readline().split()]
    assert len(pids) == 2
    parent.kill()
    parent.wait()
    parent.stdout.close()
    assert all(gone(pid) for pid in pids)


#: A runtime that misbehaves as it is told, in the real worker: only the class that it serves is another one.
STAND_IN = """
import ctypes, importlib.util, os, sys, time
import numpy as np
spec = importlib.util.spec_from_file_location("worker", sys.argv[1])
worker = importlib.util.module_from_spec(spec)
spec.loader.exec_module(worker)
sent = worker.send

def noise():
    print("progress: 50%", flush=True)
    os.system("echo from a child process")
    os.write(1, b"\\xff\\x00LCW1")

def garbage():
    worker.send = lambda to, message, **arrays: to.sendall(b"GARBAGE" * 100)

def half():
    def send(to, message, **arrays):
        to.sendall(worker._HEAD.pack(b"LCW1", 100, 0) + b"{")
        os._exit(0)
    worker.send = send

ACTS = {
    "noise": noise,
    "segfault": lambda: ctypes.string_at(0),
    "exit": lambda: os._exit(7),
    "memory": lambda: np.empty(1 << 50),
    "bug": lambda: {}["no such key"],
    "garbage": garbage,
    "half": half,
    "sleep": lambda: time.sleep(60),
    "": lambda: None,
}

class StandIn:
    def __init__(self, path, context, threads, purpose, opening=""):
        print("opening", path, flush=True)
        ACTS[opening]()
    def tokenize(self, text, special):
        ACTS[text]()
        return [1, 2, 3]
    def logits(self, ids):
        return np.zeros((len(ids), 5), np.float32)
    def close(self):
        pass

worker.prepared = lambda name: StandIn
worker.main(sys.argv[2], sys.argv[3:])
"""


@pytest.fixture(scope="module")
def stand_in(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An interpreter that runs the worker with `StandIn` for whatever runtime is asked for."""
    folder = tmp_path_factory.mktemp("stand_in")
    (folder / "stand_in.py").write_text(STAND_IN)
    python = folder / "python"
    python.write_text(f'#!/bin/sh\nshift\nexec "{sys.executable}" -P -E "{folder}/stand_in.py" "$@"\n')
    python.chmod(0o755)
    return python


FAILURES = [
    ("segfault", r"the process was killed by signal 11 \(SIGSEGV\)", True),
    ("exit", "the process ended with exit code 7", True),
    ("memory", "ran out of memory during", False),
    ("bug", r"failed \(KeyError: 'no such key'\); its last output:(?s:.*)in <lambda>", False),
    ("garbage", r"the process sent something that is no answer \(b'GARB'\)", True),
    ("half", "the process ended with exit code 0", True),
    ("sleep", "took longer than the limit of 2 s; the process was ended", True),
]


@pytest.mark.parametrize(("act", "message", "deadly"), FAILURES, ids=[f[0] for f in FAILURES])
def test_what_a_runtime_can_do(stand_in: Path, act: str, message: str, deadly: bool) -> None:
    runtime = Remote("llama.cpp", "model", python=stand_in, timeout=2.0)
    with pytest.raises(RuntimeFailure, match=message) as caught:
        runtime.tokenize(act, special=False)
    assert "tokenize" in str(caught.value) and str(stand_in) in str(caught.value)
    if not deadly:
        assert runtime.logits([1, 2]).shape == (2, 5)
    runtime.close()
    with pytest.raises(RuntimeFailure, match=message) as caught:
        Remote("llama.cpp", "model", python=stand_in, timeout=2.0, options={"opening": act})
    assert "opening the model" in str(caught.value)


def test_noise_does_not_matter(stand_in: Path) -> None:
    runtime = Remote("llama.cpp", "model", python=stand_in)
    assert runtime.tokenize("noise", special=False) == [1, 2, 3]
    assert "progress: 50%" in runtime._log.tail() and "from a child process" in runtime._log.tail()
    runtime.close()


# --- frames


def pair() -> tuple[socket.socket, socket.socket]:
    return socket.socketpair()


@pytest.mark.parametrize("shape", [(3, 5), (0, 7), (2, 0), (1, 100_000), (1,)])
def test_arrays_arrive_bit_for_bit(shape: tuple[int, ...]) -> None:
    a, b = pair()
    array = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    array.reshape(-1)[:1] = np.nan
    array.reshape(-1)[-1:] = -0.0
    sender = threading.Thread(
        target=worker.send, args=(a, {"x": "\N{SNOWMAN}"}), kwargs={"p": array, "q": array.T}
    )
    sender.start()
    message, arrays = worker.receive(b, time.monotonic() + 10)
    sender.join()
    assert message == {"x": "\N{SNOWMAN}"} and list(arrays) == ["p", "q"]
    assert arrays["p"].tobytes() == array.tobytes() and arrays["p"].shape == shape
    assert arrays["q"].tobytes() == array.T.tobytes()
    a.close(), b.close()


def test_the_payload_is_safetensors() -> None:
    from safetensors.numpy import load as read

    a, b = pair()
    array = np.arange(6, dtype=np.float32).reshape(2, 3)
    worker.send(a, {}, logits=array)
    a.close()
    data = b"".join(iter(lambda: b.recv(1 << 16), b""))
    _, size, payload = worker._HEAD.unpack(data[: worker._HEAD.size])
    assert len(data) == worker._HEAD.size + size + payload
    assert np.array_equal(read(data[-payload:])["logits"], array)
    b.close()


HEAD = worker._HEAD
BAD = {
    "magic": HEAD.pack(b"HTTP", 2, 0) + b"{}",
    "length": HEAD.pack(b"LCW1", 1 << 30, 0),
    "payload": HEAD.pack(b"LCW1", 2, 1 << 60) + b"{}",
    "json": HEAD.pack(b"LCW1", 2, 0) + b"{]",
    "bytes": HEAD.pack(b"LCW1", 2, 0) + b"\xff\xff",
    "list": HEAD.pack(b"LCW1", 2, 0) + b"[]",
    "short safetensors": HEAD.pack(b"LCW1", 2, 3) + b"{}abc",
    "safetensors": HEAD.pack(b"LCW1", 2, 12) + b"{}" + b"\x04" + b"\0" * 7 + b"{no}",
    "offsets": HEAD.pack(b"LCW1", 2, 65)
    + b'{}\x39\0\0\0\0\0\0\0{"p":{"dtype":"F32","shape":[9],"data_offsets":[0,36]}}  ',
}


@pytest.mark.parametrize("data", BAD.values(), ids=BAD)
def test_what_is_no_frame(data: bytes) -> None:
    a, b = pair()
    a.sendall(data)
    a.close()
    with pytest.raises(worker.Garbage):
        worker.receive(b, time.monotonic() + 5)
    b.close()


def test_the_end_and_the_time_limit() -> None:
    a, b = pair()
    with pytest.raises(TimeoutError):
        worker.receive(b, time.monotonic() + 0.05)
    a.sendall(HEAD.pack(b"LCW1", 10, 0) + b"{")
    with pytest.raises(TimeoutError):
        worker.receive(b, time.monotonic() + 0.05)
    a.close()
    with pytest.raises(worker.Closed):
        worker.receive(b, time.monotonic() + 5)
    with pytest.raises(worker.Closed):
        worker.send(b, {}, logits=np.zeros(1 << 20, np.float32))
    b.close()


# --- lconvert.toml


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv(VARIABLE, raising=False)
    return tmp_path / FILE


def test_settings(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert load() == {} and settings("vllm") == RuntimeSettings(None, 600.0, {})
    file.write_text(
        '[runtimes.vllm]\npython = "env/bin/python"\ntimeout = 30\noptions = {kv_cache_gib = 2}\n'
        '[runtimes."llama.cpp"]\npython = "python3"\n'
    )
    assert settings("vllm") == RuntimeSettings(file.parent / "env/bin/python", 30.0, {"kv_cache_gib": 2})
    assert settings("llama.cpp") == RuntimeSettings(Path("python3"))
    assert settings("transformers") == RuntimeSettings()
    other = file.parent / "elsewhere" / "my.toml"
    other.parent.mkdir()
    other.write_text('[runtimes.vllm]\npython = "../b/python"\n')
    monkeypatch.setenv(VARIABLE, str(other))
    assert settings("vllm").python == file.parent / "b" / "python"
    other.unlink()
    with pytest.raises(
        OptionError, match=r"my\.toml: cannot be read \(LCONVERT_CONFIG names it\): No such file"
    ):
        settings("vllm")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[runtimes", "is not TOML"),
        ("[runtime.vllm]", "unknown key runtime; known: runtimes"),
        ("runtimes = 3", "runtimes is 3; expected a table"),
        ("[runtimes.openvino]", "unknown key runtimes.openvino; known: llama.cpp, transformers, dequantized"),
        ("[runtimes.llama.cpp]", 'unknown key runtimes.llama; known: .*write .runtimes."llama.cpp"'),
        ("[runtimes]\nvllm = 'x'", "runtimes.vllm is 'x'; expected a table"),
        (
            "[runtimes.vllm]\npyhton = 'x'",
            "unknown key runtimes.vllm.pyhton; known: python, timeout, options",
        ),
        ("[runtimes.vllm]\npython = 3", "runtimes.vllm.python is 3; expected the path of an interpreter"),
        ("[runtimes.vllm]\npython = ''", "runtimes.vllm.python is ''; expected the path"),
        ("[runtimes.vllm]\ntimeout = 0", "runtimes.vllm.timeout is 0; expected a number of seconds above 0"),
        ("[runtimes.vllm]\ntimeout = true", "runtimes.vllm.timeout is True"),
        ("[runtimes.vllm]\ntimeout = inf", "runtimes.vllm.timeout is inf"),
        ("[runtimes.vllm]\ntimeout = nan", "runtimes.vllm.timeout is nan"),
        ("[runtimes.vllm]\noptions = 1", "runtimes.vllm.options is 1; expected a table"),
        (
            "[runtimes.vllm.options]\ndtyp = 'x'",
            "unknown key runtimes.vllm.options.dtyp; known: dtype, kv_cache",
        ),
        ("[runtimes.vllm.options]\ndtype = 1", "runtimes.vllm.options.dtype is 1; expected str"),
        ("[runtimes.dequantized.options]\nx = 1", "unknown key runtimes.dequantized.options.x; known: none"),
    ],
)
def test_mistakes_in_the_file(file: Path, text: str, message: str) -> None:
    file.write_text(text)
    with pytest.raises(OptionError, match=message) as caught:
        load()
    assert str(caught.value).startswith(FILE) and isinstance(caught.value, LconvertError)
