"""Concurrent requests against an OpenAI-compatible server: latency and throughput as the number of users grows.

A level of concurrency C is a closed loop: C users, each sends its next request when the last one is answered. The
client is http.client in one thread per user: nothing to install, and a thread that waits for a socket costs a server
on the same machine nothing. While an answer streams, lines are only stamped; they are parsed after it.

Definitions are those of latency.py; TTFT here includes the connection and the HTTP headers. A chunk without text is
no token. Output tokens are what the server reports ("tokens_from": "usage"; `stream_options.include_usage`), or, of
servers that report nothing, the number of chunks with text ("chunks"), which is too low where one holds several.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import numpy as np

from lconvert.errors import OptionError, RuntimeFailure
from lconvert.validators.bench import starts
from lconvert.validators.latency import Request, Slo, goodput, timings
from lconvert.validators.proof import builtin_text

_GUESS = 4.0  # characters per token where the server does not say


@dataclass(frozen=True)
class Target:
    """A server: `base` is the path before /v1 ("" for http://host:port)."""

    secure: bool
    host: str
    port: int
    base: str
    headers: Mapping[str, str]
    timeout: float

    @classmethod
    def parse(cls, url: str, headers: Mapping[str, str], timeout: float) -> Target:
        """OptionError for what is not an http or https address."""
        try:
            parts = urlsplit(url if "://" in url else f"http://{url}")
            port = parts.port
        except ValueError as e:
            raise OptionError(f"{url}: not an address ({e})") from None
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise OptionError(f"{url}: not an address; give it as http://host:port")
        secure = parts.scheme == "https"
        base = parts.path.rstrip("/").removesuffix("/v1")
        return cls(secure, parts.hostname, port or (443 if secure else 80), base, headers, timeout)

    @contextlib.contextmanager
    def send(
        self, method: str, path: str, body: Mapping[str, Any] | None = None
    ) -> Iterator[http.client.HTTPResponse]:
        """The answer to a request, its body not read yet. Raises OSError and http.client.HTTPException."""
        connect = http.client.HTTPSConnection if self.secure else http.client.HTTPConnection
        connection = connect(self.host, self.port, timeout=self.timeout)
        data = None if body is None else json.dumps(body).encode()
        headers = {"Content-Type": "application/json", "Connection": "close", **self.headers}
        try:
            connection.request(method, f"{self.base}{path}", data, headers)
            with connection.getresponse() as response:
                yield response
        finally:
            connection.close()


@dataclass(frozen=True)
class Outcome:
    """One request: answered, or why not. start and end are on the clock of time.perf_counter."""

    start: float
    end: float
    request: Request | None = None
    error: str | None = None
    prompt_tokens: int | None = None
    counted: bool = False  # tokens are the number of chunks


def sweep(
    url: str,
    *,
    model: str | None = None,
    concurrencies: Sequence[int] = (1, 2, 4, 8),
    requests: int | None = None,
    prompt_tokens: int = 512,
    output_tokens: int = 64,
    slo: Slo | None = None,
    timeout: float = 120.0,
    seed: int = 0,
    headers: Mapping[str, str] | None = None,
    extra: Mapping[str, Any] | None = None,
    progress: Callable[[str], None] = lambda what: None,
) -> list[dict[str, Any]]:
    """Measure the server at `url`: one entry of "server" in lconvert.bench/1 per concurrency.

    model: default is the first that the server lists. requests: of each level (default: 4 per user, 8 at least).
    prompt_tokens is met by the length of the text, from the server's own count of a probe; every prompt is another
    part of the built-in text, so that no prefix cache helps. output_tokens: the limit; `ignore_eos` asks servers that
    know it (vLLM, llama-server) not to stop before. extra: further fields of the request. timeout: seconds that a
    request may take. Requests that fail are counted by reason and are in no time. A level at which none is answered
    ends the sweep. Raises OptionError for arguments, RuntimeFailure for a server that does not answer the probe.
    """
    if not concurrencies or min(concurrencies) < 1 or prompt_tokens < 1 or output_tokens < 2:
        raise OptionError("a sweep needs concurrencies from 1, 1 prompt token and 2 output tokens at least")
    if requests is not None and requests < 1:
        raise OptionError("a sweep needs at least one request per level")
    target = Target.parse(url, headers or {}, timeout)
    name = model or _first_model(target, url)
    fields = {"model": name, "temperature": 0, "ignore_eos": True, **(extra or {})}
    progress("probe")
    characters = _probe(target, url, fields, 2 * prompt_tokens)
    counts = [requests or max(8, 4 * c) for c in concurrencies]
    prompts = _prompts(sum(counts) + 1, max(1, round(characters * prompt_tokens)), seed)
    body = {**fields, "max_tokens": output_tokens, "stream": True, "stream_options": {"include_usage": True}}
    ask(target, {**body, "prompt": prompts.pop()})  # warm-up: the first stream is slower than the others
    levels = []
    for users, n in zip(concurrencies, counts, strict=True):
        progress(f"{users} concurrent")
        mine, prompts = prompts[:n], prompts[n:]
        outcomes = _level(target, [{**body, "prompt": p} for p in mine], users)
        levels.append({"url": url, "model": name, **_summary(outcomes, users, output_tokens, slo)})
        if not levels[-1]["completed"]:
            break
    return levels


def _first_model(target: Target, url: str) -> str:
    try:
        with target.send("GET", "/v1/models") as response:
            status, content = response.status, response.read()
        if status != 200:
            raise RuntimeFailure(f"{url}: /v1/models answers HTTP {status}; name the model (--model)")
        return str(json.loads(content)["data"][0]["id"])
    except (OSError, http.client.HTTPException) as e:
        raise RuntimeFailure(f"{url}: no server answers ({_reason(e)})") from None
    except (ValueError, KeyError, IndexError, TypeError):
        raise RuntimeFailure(f"{url}: /v1/models lists no model; name it (--model)") from None


def _probe(target: Target, url: str, fields: Mapping[str, Any], characters: int) -> float:
    """Characters per token of the built-in text, as the server counts."""
    text = _prompts(1, characters, 0)[0]
    try:
        with target.send("POST", "/v1/completions", {**fields, "prompt": text, "max_tokens": 1}) as response:
            status, content = response.status, response.read()
    except (OSError, http.client.HTTPException) as e:
        raise RuntimeFailure(f"{url}: the server does not answer a completion ({_reason(e)})") from None
    if status != 200:
        said = " ".join(content.decode("utf-8", "replace").split())[:300]
        raise RuntimeFailure(f"{url}: /v1/completions answers HTTP {status}: {said}")
    try:
        return len(text) / int(json.loads(content)["usage"]["prompt_tokens"])
    except (ValueError, KeyError, TypeError, ZeroDivisionError):
        return _GUESS


def _prompts(n: int, characters: int, seed: int) -> list[str]:
    """n pieces of the built-in text read in a circle, no two from the same place."""
    text = builtin_text()
    rounds = text * (2 + characters // len(text))
    places = (starts(n, seed) * len(text)).astype(int)
    return [rounds[at : at + characters] for at in places]


def _level(target: Target, bodies: Sequence[Mapping[str, Any]], users: int) -> list[Outcome]:
    """All requests, `users` at a time."""
    outcomes: list[Outcome] = []
    waiting = iter(bodies)
    lock = threading.Lock()

    def user() -> None:
        while True:
            with lock:
                body = next(waiting, None)
            if body is None:
                return
            outcomes.append(ask(target, body))

    threads = [threading.Thread(target=user, daemon=True) for _ in range(users)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    return outcomes


def ask(target: Target, body: Mapping[str, Any]) -> Outcome:
    """One streamed completion. Whatever goes wrong is the outcome's `error`, a short phrase that can be counted."""
    start = time.perf_counter()
    lines: list[tuple[float, bytes]] = []
    error = None
    try:
        with target.send("POST", "/v1/completions", body) as response:
            if response.status != 200:
                error = f"HTTP {response.status}"
            while error is None and (line := response.readline()):
                lines.append((time.perf_counter() - start, line))
                if lines[-1][0] > target.timeout:
                    error = "timed out"
    except (OSError, http.client.HTTPException) as e:
        error = "broke off" if lines and not isinstance(e, TimeoutError) else _reason(e)
    end = time.perf_counter()
    return Outcome(start, end, error=error) if error else _read(lines, start, end)


def _reason(e: BaseException) -> str:
    """An exception of a connection in words."""
    if isinstance(e, TimeoutError):
        return "timed out"
    if isinstance(e, ConnectionRefusedError):
        return "connection refused"
    if isinstance(e, ConnectionError | http.client.IncompleteRead | http.client.RemoteDisconnected):
        return "connection closed"
    return f"{type(e).__name__}: {e}"


def _read(lines: Sequence[tuple[float, bytes]], start: float, end: float) -> Outcome:
    """The stamped lines of a server-sent event stream (HTML standard, 9.2; OpenAI's completion chunks in JSON)."""
    seconds: list[float] = []
    last, prompt, reported, finished = None, None, None, False
    for at, line in lines:
        if not line.startswith(b"data:"):
            continue  # comments, event names and the empty lines between events
        data = line[5:].strip()
        if data == b"[DONE]":
            finished = True
            continue
        try:
            chunk = json.loads(data)
            if "error" in chunk:
                return Outcome(start, end, error="error in the stream")
            for choice in chunk.get("choices") or ():
                last = at
                finished = finished or choice.get("finish_reason") is not None
                if choice.get("text"):
                    seconds.append(at)
            usage = chunk.get("usage") or {}
            prompt = usage.get("prompt_tokens", prompt)
            reported = usage.get("completion_tokens", reported)
        except (ValueError, AttributeError, TypeError):
            return Outcome(start, end, error="malformed answer")
    if not finished:
        return Outcome(start, end, error="broke off" if lines else "empty answer")
    if not seconds:
        return Outcome(start, end, error="no text")
    tokens = len(seconds) if reported is None else max(int(reported), 1)
    return Outcome(start, end, Request(tuple(seconds), tokens, last), None, prompt, reported is None)


def _summary(outcomes: Sequence[Outcome], users: int, asked: int, slo: Slo | None) -> dict[str, Any]:
    """One level: times over the answered requests, rates over the time from the first request to the last answer."""
    good = [o for o in outcomes if o.request is not None]
    answered = [o.request for o in outcomes if o.request is not None]
    duration = max(o.end for o in outcomes) - min(o.start for o in outcomes)
    tokens = sum(r.tokens for r in answered)
    prompts = [o.prompt_tokens for o in good if o.prompt_tokens is not None]
    return {
        "concurrency": users,
        "requests": len(outcomes),
        "completed": len(good),
        "errors": dict(Counter(o.error for o in outcomes if o.error)),
        "shorter": sum(r.tokens < asked for r in answered),
        "duration_s": duration,
        "prompt_tokens": float(np.median(prompts)) if prompts else None,
        "output_tokens": tokens,
        "tokens_from": "chunks" if any(o.counted for o in good) else "usage",
        **timings(answered),
        "requests_per_s": len(good) / duration,
        "output_tokens_per_s": tokens / duration,
        "output_tokens_per_s_per_user": float(np.mean([r.tokens / r.latency for r in answered]))
        if answered
        else None,
        "goodput": goodput(answered, duration, slo, len(outcomes)) if slo else None,
    }
