"""Load on a server: against one whose times are known, ones that fail in every way, and real ones."""

from __future__ import annotations

import http.server
import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

import lconvert
from lconvert.cli import bench as verb
from lconvert.errors import MissingPackageError, OptionError, RuntimeFailure
from lconvert.validators import documents
from lconvert.validators import serving as server_module
from lconvert.validators.bench_server import Target, ask, sweep
from lconvert.validators.latency import Slo
from lconvert.validators.serving import serving
from tests.conftest import DEMO, ROOT

FIRST, GAP, TOKENS = 0.05, 0.01, 8


class Handler(http.server.BaseHTTPRequestHandler):
    """A completion server of the standard library; the model's name says how it behaves."""

    protocol_version = "HTTP/1.1"
    #: per streamed request: when it came, and when each token was sent
    sent: list[list[float]]
    prompts: list[str]
    lock = threading.Lock()
    model = "steady"

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def _json(self, body: Any, status: int = 200) -> None:
        data = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def do_GET(self) -> None:
        self._json({"data": [{"id": self.model}] if self.model != "unnamed" else []})

    def do_POST(self) -> None:
        came = time.perf_counter()
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if not body.get("stream"):
            if body["model"] == "refuses":
                return self._json({"error": "no such model"}, 404)
            tokens = len(body["prompt"]) // 5
            return self._json({"usage": {"prompt_tokens": tokens} if body["model"] != "uncounted" else None})
        with self.lock:
            self.prompts.append(body["prompt"])
            mine = [came]
            self.sent.append(mine)
            late = body["model"] == "fails half" and len(self.prompts) % 2 == 0
        how = "dies" if late else body["model"]
        if how == "500":
            return self._json({"error": "broken"}, 500)
        if how == "silent":
            time.sleep(1.5)
            return None
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        self._event({"choices": [{"text": "", "finish_reason": None}]})  # no token yet: not the first one
        time.sleep(FIRST)
        n = body["max_tokens"]
        step = 2 if how == "pairs" else 1
        for i in range(0, n, step):
            if how == "dies" and i >= n // 2:
                self.close_connection = True
                self.connection.shutdown(socket.SHUT_RDWR)  # in the middle of a chunked body
                return None
            if how == "ends early" and i >= n // 2:
                break
            mine.append(time.perf_counter())
            last = i + step >= n
            self._event({"choices": [{"text": " word" * step, "finish_reason": "length" if last else None}]})
            if how == "complains":
                self._event({"error": {"message": "out of memory"}})
            if how == "garbles":
                self._chunk(b"data: {not json\n\n")
            if not last:
                time.sleep(GAP * step)
        if body.get("stream_options", {}).get("include_usage") and how not in ("uncounted", "ends early"):
            self._event({"choices": [], "usage": {"prompt_tokens": 99, "completion_tokens": n}})
        if how != "ends early":
            self._chunk(b": a comment\n\ndata: [DONE]\n\n")
        self._chunk(b"")
        return None

    def _event(self, data: Any) -> None:
        self._chunk(b"data: " + json.dumps(data).encode() + b"\n\n")

    def _chunk(self, data: bytes) -> None:
        self.wfile.write(f"{len(data):x}\r\n".encode() + data + b"\r\n")
        self.wfile.flush()


class Known:
    def __init__(self) -> None:
        self.handler = type("H", (Handler,), {"sent": [], "prompts": []})
        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), self.handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True).start()

    def sweep(self, model: str = "steady", **options: Any) -> list[dict[str, Any]]:
        self.handler.sent.clear()  # type: ignore[attr-defined]
        self.handler.prompts.clear()  # type: ignore[attr-defined]
        given: dict[str, Any] = {
            "concurrencies": (1,),
            "requests": 4,
            "output_tokens": TOKENS,
            "prompt_tokens": 20,
        }
        return sweep(self.url, model=model, **(given | options))


@pytest.fixture(scope="module")
def known() -> Iterator[Known]:
    server = Known()
    yield server
    server.server.shutdown()
    server.server.server_close()


# --- the arithmetic, against the server's own clock


def test_times_are_those_at_which_the_server_sent(known: Known) -> None:
    (level,) = known.sweep(requests=6)
    sent = known.handler.sent[1:]  # type: ignore[attr-defined]  # the first is the warm-up
    assert (level["completed"], level["requests"], level["errors"]) == (6, 6, {})
    first = [s[1] - s[0] for s in sent]
    gaps = [b - a for s in sent for a, b in pairwise(s[1:])]
    itl = [(s[-1] - s[1]) / (TOKENS - 1) for s in sent]
    assert min(first) >= FIRST and min(gaps) >= GAP
    slack = 0.02  # two processes' worth of threads on a busy machine
    assert np.median(first) <= level["ttft_s"]["p50"] <= np.median(first) + slack
    assert level["itl_s"]["n"] == 6 * (TOKENS - 1)
    assert level["itl_s"]["p50"] == pytest.approx(np.median(gaps), abs=0.005)
    assert level["tpot_s"]["p50"] == pytest.approx(np.median(itl), abs=0.005)
    assert level["itl_s"]["mean"] == pytest.approx(level["tpot_s"]["mean"])
    whole = level["ttft_s"]["mean"] + (TOKENS - 1) * level["tpot_s"]["mean"]
    assert level["latency_s"]["mean"] == pytest.approx(whole)
    assert level["output_tokens"] == 6 * TOKENS and level["tokens_from"] == "usage"
    assert level["prompt_tokens"] == 99 and level["shorter"] == 0


def test_throughput_grows_with_the_users_and_their_own_does_not(known: Known) -> None:
    one, four = known.sweep(concurrencies=(1, 4), requests=8)
    assert four["output_tokens_per_s"] > 2 * one["output_tokens_per_s"]
    assert four["output_tokens_per_s_per_user"] < 1.3 * one["output_tokens_per_s_per_user"]
    assert one["output_tokens_per_s"] == pytest.approx(8 * TOKENS / one["duration_s"])
    least = FIRST + (TOKENS - 1) * GAP
    assert one["duration_s"] >= 8 * least and four["duration_s"] >= 2 * least
    assert one["requests_per_s"] == pytest.approx(8 / one["duration_s"])


def test_goodput_under_limits_on_either_side_of_the_truth(known: Known) -> None:
    (good,) = known.sweep(slo=Slo(ttft=5, tpot=5))
    assert good["goodput"]["share"] == 1.0
    assert good["goodput"]["requests_per_s"] == pytest.approx(good["requests_per_s"])
    for limits in (Slo(ttft=FIRST * 0.9), Slo(tpot=GAP * 0.9), Slo(ttft=5, tpot=GAP * 0.9)):
        (bad,) = known.sweep(slo=limits)
        assert bad["goodput"]["share"] == 0 and bad["goodput"]["requests_per_s"] == 0


def test_chunks_of_two_tokens_are_counted_as_the_server_reports(known: Known) -> None:
    (level,) = known.sweep("pairs")
    assert level["output_tokens"] == 4 * TOKENS
    assert level["itl_s"]["n"] == 4 * (TOKENS // 2 - 1), "gaps are between chunks"
    chunk = level["itl_s"]["p50"]
    assert chunk >= 2 * GAP
    assert level["tpot_s"]["p50"] == pytest.approx(chunk * (TOKENS / 2 - 1) / (TOKENS - 1), rel=0.3)


def test_without_usage_chunks_are_counted_and_that_is_said(known: Known) -> None:
    (level,) = known.sweep("uncounted")
    assert level["tokens_from"] == "chunks" and level["output_tokens"] == 4 * TOKENS
    assert level["prompt_tokens"] is None


def test_prompts_have_the_asked_length_and_are_all_different(known: Known) -> None:
    """The server counts a token per five characters."""
    known.sweep(concurrencies=(1, 2), requests=4, prompt_tokens=40)
    prompts = known.handler.prompts  # type: ignore[attr-defined]
    assert len(prompts) == 9 and {len(p) for p in prompts} == {200}
    assert len({p[:20] for p in prompts}) == 9


def test_the_model_is_the_first_that_the_server_lists(known: Known) -> None:
    (level,) = sweep(known.url, concurrencies=(1,), requests=1, output_tokens=4, prompt_tokens=4)
    assert level["model"] == "steady" and level["url"] == known.url


# --- servers that fail


@pytest.mark.parametrize(
    ("how", "reason"),
    [
        ("500", "HTTP 500"),
        ("silent", "timed out"),
        ("dies", "broke off"),
        ("ends early", "broke off"),
        ("complains", "error in the stream"),
        ("garbles", "malformed answer"),
    ],
)
def test_failures_are_counted_by_reason_and_end_the_sweep(known: Known, how: str, reason: str) -> None:
    started = time.monotonic()
    levels = known.sweep(how, concurrencies=(2, 4), requests=2, timeout=0.6, slo=Slo(ttft=1))
    assert len(levels) == 1, "nothing was answered: more users would not help"
    (level,) = levels
    assert level["errors"] == {reason: 2} and level["completed"] == 0
    assert level["ttft_s"] is None and level["output_tokens"] == 0 and level["goodput"]["share"] == 0
    assert time.monotonic() - started < 10
    json.dumps(level)


def test_requests_that_fail_are_in_no_time_and_not_good(known: Known) -> None:
    (level,) = known.sweep("fails half", requests=8, slo=Slo(ttft=5))
    assert level["completed"] == 4 and level["errors"] == {"broke off": 4}
    assert level["ttft_s"]["n"] == 4 and level["output_tokens"] == 4 * TOKENS
    assert level["goodput"]["share"] == 0.5


def test_no_server_is_one_clear_error() -> None:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{s.getsockname()[1]}"
    with pytest.raises(RuntimeFailure, match=f"{url}: no server answers \\(connection refused\\)"):
        sweep(url, concurrencies=(1,))


def test_a_server_that_refuses_the_probe_is_quoted(known: Known) -> None:
    with pytest.raises(RuntimeFailure, match=r"answers HTTP 404: .*no such model"):
        known.sweep("refuses")


def test_a_server_without_models_asks_for_a_name(known: Known, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(known.handler, "model", "unnamed")
    with pytest.raises(RuntimeFailure, match="lists no model; name it"):
        sweep(known.url, concurrencies=(1,))


@pytest.mark.parametrize("url", ["ftp://here", "http://", "http://host:port"])
def test_an_address_that_is_none_is_refused(url: str) -> None:
    with pytest.raises(OptionError, match="not an address"):
        sweep(url)


def test_addresses() -> None:
    found = Target.parse("https://host/team/v1/", {}, 1.0)
    assert (found.secure, found.host, found.port, found.base) == (True, "host", 443, "/team")
    assert Target.parse("localhost:8000", {}, 1.0).port == 8000


def test_impossible_settings_are_refused() -> None:
    for wrong in ({"concurrencies": ()}, {"concurrencies": (0,)}, {"output_tokens": 1}, {"requests": 0}):
        with pytest.raises(OptionError, match="a sweep needs"):
            sweep("http://localhost:1", **wrong)


# --- the command


def _run(*args: str) -> tuple[int, str]:
    result = CliRunner().invoke(verb.command, list(args), standalone_mode=False)
    if result.exception:
        raise result.exception
    return int(result.return_value or 0), result.output


def test_the_command_prints_a_row_per_concurrency(known: Known, tmp_path: Path) -> None:
    args = (
        "--server",
        known.url,
        "--concurrency",
        "1,2",
        "--requests",
        "2",
        "--tokens",
        "4",
        "--prompt",
        "10",
    )
    code, out = _run(*args, "--header", "X-Key: secret", "--report", str(tmp_path / "s.json"))
    assert code == 0
    rows = [line.split() for line in out.splitlines() if line.startswith("steady")]
    assert [(r[1], r[2:5]) for r in rows] == [("1", ["2", "of", "2"]), ("2", ["2", "of", "2"])]
    saved = (tmp_path / "s.json").read_text()
    assert [r["concurrency"] for r in json.loads(saved)["server"]] == [1, 2]
    assert "secret" not in saved
    assert list(documents.problems(json.loads(saved), documents.schema("lconvert.bench"))) == []
    code, out = _run(*args, "--model", "500")
    assert code == 1 and "1 users: 2 requests failed: HTTP 500" in out


# --- servers of our own


def _processes(mark: str) -> list[str]:
    out = subprocess.run(["ps", "-ww", "-eo", "pid,args"], capture_output=True, text=True, check=True).stdout
    return [line for line in out.splitlines() if mark in line]


def _stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: str) -> Path:
    """A "llama.cpp" whose server is `code`; {port} and {path} are its arguments."""
    script = tmp_path / "server.py"
    script.write_text(code)
    artifact = tmp_path / "model.gguf"
    artifact.touch()
    kinds, _, module, install = server_module.SERVERS["llama.cpp"]
    entry = (kinds, lambda path, port, context, threads: [str(script), str(port), path], module, install)
    monkeypatch.setitem(server_module.SERVERS, "llama.cpp", entry)  # type: ignore[arg-type]
    return artifact


_ANSWERS = """
import http.server, subprocess, sys
stubborn = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print(flush=True); time.sleep(60)"
child = subprocess.Popen([sys.executable, "-c", stubborn, sys.argv[2]], stdout=subprocess.PIPE)
child.stdout.readline()
class H(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200); self.send_header("Content-Length", "2"); self.end_headers(); self.wfile.write(b"{}")
http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), H).serve_forever()
"""


def test_a_server_and_its_processes_end_with_the_block(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    artifact = _stand_in(tmp_path, monkeypatch, _ANSWERS)
    with pytest.raises(ZeroDivisionError), serving("llama.cpp", artifact, context=8, timeout=20) as url:
        assert url.startswith("http://127.0.0.1:")
        assert len(_processes(str(artifact))) == 2
        raise ZeroDivisionError
    deadline = time.monotonic() + 10
    while _processes(str(artifact)) and time.monotonic() < deadline:  # killed, not yet gone
        time.sleep(0.05)
    assert not _processes(str(artifact))


@pytest.mark.parametrize(
    ("code", "error", "message"),
    [
        (
            "raise SystemExit('no memory')",
            RuntimeFailure,
            "ended with exit code 1; its last output: no memory",
        ),
        ("import no_such_server", MissingPackageError, r"pip install 'llama-cpp-python\[server\]'"),
        ("import time; time.sleep(60)", RuntimeFailure, "did not answer within 1 s"),
    ],
)
def test_a_server_that_does_not_come_up_says_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: str, error: type[Exception], message: str
) -> None:
    artifact = _stand_in(tmp_path, monkeypatch, code)
    with pytest.raises(error, match=message), serving("llama.cpp", artifact, context=8, timeout=1.0):
        pass
    assert not _processes(str(artifact))


def _interpreter(variable: str, folder: str, module: str) -> str:
    """An interpreter that can import `module`: named by a variable, in a folder of the checkout, or this one."""
    beside = ROOT / folder / "bin" / "python"
    candidates = [os.environ.get(variable), str(beside) if beside.exists() else None, sys.executable]
    for python in filter(None, candidates):
        check = f"import importlib.util as u; raise SystemExit(u.find_spec({module!r}) is None)"
        if subprocess.run([python, "-c", check], check=False).returncode == 0:
            return python
    pytest.skip(f"no interpreter with {module}: set {variable} or make {folder}")


def test_llama_cpps_server(tmp_path: Path) -> None:
    """F32: this package's kernels for quantized weights crash on processors with AMX (llama.cpp issue 20824)."""
    python = _interpreter("LCONVERT_LLAMA_SERVER_PYTHON", ".venv-llama-server", "uvicorn")
    path = lconvert.convert(DEMO, tmp_path / "f32.gguf", ftype="F32").paths[0]
    with serving("llama.cpp", path, context=128, threads=1, python=python, timeout=120) as url:
        levels = sweep(url, concurrencies=(1, 2), requests=3, prompt_tokens=32, output_tokens=8)
    for level in levels:
        assert level["completed"] == 3 and not level["errors"]
        assert 0 < level["ttft_s"]["p50"] <= level["latency_s"]["p50"]
    with pytest.raises(RuntimeFailure, match="no server answers"):
        sweep(url)


def test_vllms_server() -> None:
    python = _interpreter("LCONVERT_VLLM_PYTHON", ".venv-vllm", "vllm")
    with serving("vllm", DEMO, context=128, threads=1, python=python) as url:
        levels = sweep(url, concurrencies=(1, 4), requests=4, prompt_tokens=32, output_tokens=8)
    for level in levels:
        assert level["completed"] == 4 and not level["errors"]
        assert level["tokens_from"] == "usage" and level["output_tokens"] == 4 * 8 and level["shorter"] == 0
        assert level["prompt_tokens"] == pytest.approx(32, rel=0.3)
        assert 0 < level["ttft_s"]["p50"] <= level["latency_s"]["p50"]


def test_a_request_to_a_server_that_drips_ends_at_its_limit() -> None:
    """Bytes come all the time, so no single wait is too long; the whole is."""
    listener = socket.create_server(("127.0.0.1", 0))

    def drip() -> None:
        connection, _ = listener.accept()
        with connection:
            connection.recv(65536)
            connection.sendall(b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n")
            try:
                for _ in range(100):
                    connection.sendall(b": still there\n\n")
                    time.sleep(0.05)
            except OSError:
                return

    threading.Thread(target=drip, daemon=True).start()
    outcome = ask(Target.parse(f"127.0.0.1:{listener.getsockname()[1]}", {}, 0.4), {"prompt": "x"})
    listener.close()
    assert outcome.error == "timed out" and 0.4 <= outcome.end - outcome.start < 2
