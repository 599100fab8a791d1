"""`bench`: size, load time, memory and speed of artifacts in their runtimes, side by side.

One repetition gives every artifact a turn before the next repetition starts, in an order that rotates, so that a
noisy machine hurts all alike; ratios between artifacts are taken within a repetition for the same reason. A turn is
a fresh process that holds this model alone: open, warm up, prefill, one request, close. So every figure has as many
samples as there are repetitions, and no other model is in memory or on the processor meanwhile.

    load_s                 opening the model, without interpreter and imports; its files are in the page cache from
                           the second repetition on, as a rule from the first
    prefill_tokens_per_s   prompt tokens / TTFT of a request for one token
    decode_tokens_per_s    1 / ITL of the request: tokens per second per user after the first token
    output_tokens_per_s    output tokens / latency of the request, the prompt's share included
    peak_memory_bytes      largest resident size (VmHWM) of the process, pages of mapped files included, and
    baseline_memory_bytes  what it was before the model was opened: interpreter and packages

TTFT, ITL, TPOT, latency and goodput are defined in latency.py. They are counted in the process of the model: the pipe
to it is not in them, and there is one request at a time (bench_server.py measures concurrent ones).
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from lconvert import __version__
from lconvert.errors import InputError, LconvertError, OptionError, RuntimeFailure
from lconvert.validators.latency import Request, Slo, goodput, spread, timings
from lconvert.validators.machine import GpuMeter, describe
from lconvert.validators.proof import builtin_text
from lconvert.validators.runtimes import DEFAULT, RUNTIMES, Purpose, kind
from lconvert.validators.runtimes.config import RuntimeSettings, settings
from lconvert.validators.stored import stored

SCHEMA = "lconvert.bench/1"

#: figures of a repetition that are compared with the first artifact's
RATIOS = ("load_s", "prefill_tokens_per_s", "decode_tokens_per_s", "ttft_s", "tpot_s", "latency_s")


@dataclass(frozen=True)
class Entry:
    """What to measure. runtime: None for the default of the artifact's kind; python: an interpreter that has it."""

    path: str | Path
    runtime: str | None = None
    label: str | None = None
    python: str | Path | None = None


@dataclass(frozen=True)
class Load:
    """What every turn is given: prompt and output tokens, requests before the measured ones, and the settings."""

    prompt_tokens: int
    output_tokens: int
    warmup: int
    slo: Slo | None
    threads: int | None
    purpose: Purpose
    timeout: float | None


@dataclass(frozen=True)
class Turn:
    """What one repetition of one artifact gave."""

    load: float
    prefill: float  # TTFT of a request for one token
    request: Request
    peak: int | None
    baseline: int | None
    energy: float | None  # joules of the GPUs during the request
    gpu_memory: int | None


@dataclass
class Contender:
    """One artifact in one runtime, and its turns so far, by repetition."""

    entry: Entry
    runtime: str
    label: str
    python: str | Path | None  # None: this interpreter
    settings: RuntimeSettings
    turns: dict[int, Turn] = field(default_factory=dict)
    info: dict[str, str] = field(default_factory=dict)
    error: str | None = None
    exit_code: int = 0


def bench(
    artifacts: Sequence[Entry],
    *,
    prompt_tokens: int = 512,
    output_tokens: int = 64,
    repetitions: int = 5,
    warmup: int = 1,
    threads: int | None = None,
    purpose: Purpose = "speed",
    slo: Slo | None = None,
    seed: int = 0,
    baseline: str | None = None,
    python: Mapping[str, Path] | None = None,
    timeout: float | None = None,
    progress: Callable[[str], None] = lambda what: None,
) -> dict[str, Any]:
    """Measure `artifacts`; returns the JSON form "lconvert.bench/1".

    purpose: "speed" opens a model as it is served, "parity" as `validate` does. baseline: the label that ratios refer
    to (default: the first). python: interpreters by runtime, under "" that of all others
    (default: what lconvert.toml says, else this one). timeout: seconds that opening or one request may take (default: what lconvert.toml says,
    else 600). An artifact that cannot be measured
    has `error` (and the exit code that it stands for) in its result, the others are measured. Raises OptionError and
    InputError for arguments that are wrong before anything runs.
    """
    if prompt_tokens < 1 or output_tokens < 2 or repetitions < 1 or warmup < 0:
        raise OptionError(
            "a benchmark needs 1 prompt token, 2 output tokens (one gap) and 1 repetition at least, and no "
            f"negative warm-up; got {prompt_tokens}, {output_tokens}, {repetitions}, {warmup}"
        )
    contenders = _contenders(artifacts, python or {})
    labels = [c.label for c in contenders]
    if baseline is not None and baseline not in labels:
        raise OptionError(f"no artifact has the label {baseline!r}; labels: {', '.join(labels)}")
    load = Load(prompt_tokens, output_tokens, warmup, slo, threads, purpose, timeout)
    places = starts(repetitions * (2 + warmup), seed).reshape(repetitions, -1)
    state = describe()
    for r in range(repetitions):
        for c in (contenders[(r + i) % len(contenders)] for i in range(len(contenders))):
            if c.error is None:
                progress(f"{c.label}, repetition {r + 1} of {repetitions}")
                _attempt(c, r, load, places[r])
    base = contenders[labels.index(baseline) if baseline else 0]
    used = {
        "prompt_tokens": prompt_tokens,
        "output_tokens": output_tokens,
        "repetitions": repetitions,
        "warmup": warmup,
        "threads": threads,
        "purpose": purpose,
        "seed": seed,
        "slo": slo.to_json() if slo else None,
        "baseline": base.label,
    }
    return document([_result(c, base, load) for c in contenders], used, machine=state)


def document(
    results: Sequence[dict[str, Any]],
    settings: Mapping[str, Any],
    server: Sequence[dict[str, Any]] = (),
    machine: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Results of artifacts and sweeps of servers as one "lconvert.bench/1"."""
    return {
        "schema": SCHEMA,
        "lconvert": __version__,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": dict(describe() if machine is None else machine),
        "settings": dict(settings),
        "results": list(results),
        "server": list(server),
    }


def _contenders(artifacts: Sequence[Entry], pythons: Mapping[str, Path]) -> list[Contender]:
    """Arguments that are wrong, before the long part; labels that differ."""
    if not artifacts:
        raise OptionError("nothing to measure: name an artifact")
    out = []
    for entry in artifacts:
        path = Path(entry.path)
        if not path.exists():
            raise InputError(f"{path}: no such file or folder; check the path")
        found = kind(path)
        name = entry.runtime or DEFAULT[found]
        if name not in RUNTIMES:
            raise OptionError(f"unknown runtime {name}; runtimes: {', '.join(RUNTIMES)}")
        if found not in RUNTIMES[name][2]:
            fitting = [n for n, (_, _, kinds) in RUNTIMES.items() if found in kinds]
            raise OptionError(
                f"{path}: {name} does not load {found} artifacts; these do: {', '.join(fitting)}"
            )
        configured = settings(name)
        python = entry.python or pythons.get(name) or pythons.get("") or configured.python
        out.append(Contender(entry, name, entry.label or _stem(path), python, configured))
    plain = [c.label for c in out]
    for c in out:
        if plain.count(c.label) > 1:
            c.label = f"{c.label} {c.runtime}"
    for i, c in enumerate(out):
        n = sum(c.label == other.label for other in out[:i])
        if n:
            c.label = f"{c.label} #{n + 1}"
    return out


def _stem(path: Path) -> str:
    resolved = path.resolve()
    return resolved.name if resolved.is_dir() else resolved.stem


def starts(n: int, seed: int) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Where in the text each of n prompts starts, as a part of its length: no two alike, in random order."""
    rng = np.random.default_rng(seed)
    return (rng.permutation(n) + rng.random(n)) / n


def prompt(ids: Sequence[int], start: float, n: int) -> list[int]:
    """n tokens of a text, read in a circle from the part `start` of its length."""
    first = int(start * len(ids))
    return [ids[(first + i) % len(ids)] for i in range(n)]


def _attempt(c: Contender, repetition: int, load: Load, starts: np.ndarray[Any, Any]) -> None:
    """One turn; what goes wrong in it is the contender's error."""
    try:
        c.turns[repetition] = _turn(c, load, starts)
    except LconvertError as e:
        c.error, c.exit_code = str(e), e.exit_code


def _turn(c: Contender, load: Load, starts: np.ndarray[Any, Any]) -> Turn:
    from lconvert.validators.runtimes.remote import Remote

    runtime = Remote(
        c.runtime,
        c.entry.path,
        context=load.prompt_tokens + load.output_tokens,
        threads=load.threads,
        purpose=load.purpose,
        python=c.python or sys.executable,
        timeout=load.timeout or c.settings.timeout,
        options=c.settings.options,
    )
    try:
        c.info = runtime.info()
        ids = runtime.tokenize(builtin_text(), special=False)
        if not ids:
            raise RuntimeFailure(f"{c.label}: {c.runtime} makes no tokens of the text, so there is no prompt")
        prompts = [prompt(ids, s, load.prompt_tokens) for s in starts]
        for ahead in prompts[2:]:
            runtime.generate(ahead, load.output_tokens)
        prefill = _checked(runtime.generate(prompts[0], 1).seconds, 1, c)
        with GpuMeter() as meter:
            seconds = _checked(
                runtime.generate(prompts[1], load.output_tokens).seconds, load.output_tokens, c
            )
        return Turn(
            load=runtime.load_seconds,
            prefill=prefill[0],
            request=Request(seconds, len(seconds)),
            peak=runtime.peak_memory(),
            baseline=runtime.baseline_memory,
            energy=meter.energy_j,
            gpu_memory=meter.memory_bytes,
        )
    finally:
        runtime.close()


def _checked(seconds: tuple[float, ...], n: int, c: Contender) -> tuple[float, ...]:
    """Times that a speed can be computed from."""
    if len(seconds) != n:
        raise RuntimeFailure(f"{c.label}: {c.runtime} made {len(seconds)} tokens where {n} were asked for")
    if seconds[0] <= 0 or any(b < a for a, b in pairwise(seconds)):
        raise RuntimeFailure(f"{c.label}: {c.runtime} reports times that do not increase")
    return seconds


def _samples(c: Contender, load: Load) -> dict[str, dict[int, float]]:
    """Figure -> repetition -> value."""
    out: dict[str, dict[int, float]] = {}
    for r, t in c.turns.items():
        itl = t.request.itl
        values = {
            "load_s": t.load,
            "prefill_tokens_per_s": load.prompt_tokens / t.prefill,
            "decode_tokens_per_s": 1 / itl if itl else None,
            "output_tokens_per_s": t.request.tokens / t.request.latency,
            "ttft_s": t.request.ttft,
            "tpot_s": itl or None,
            "latency_s": t.request.latency,
        }
        for name, value in values.items():
            if value is not None:
                out.setdefault(name, {})[r] = value
    return out


def _ratios(c: Contender, base: Contender, load: Load) -> dict[str, Any] | None:
    """Each figure over the baseline's of the same repetition: what the machine did to both cancels."""
    ours, theirs = _samples(c, load), _samples(base, load)
    out = {}
    for name in RATIOS:
        pairs = [v / theirs[name][r] for r, v in ours.get(name, {}).items() if r in theirs.get(name, {})]
        if pairs:
            out[name] = spread(pairs)
    return {"to": base.label, **out} if out else None


def _result(c: Contender, base: Contender, load: Load) -> dict[str, Any]:
    size, bits = stored(Path(c.entry.path))
    samples = {name: spread(list(runs.values())) for name, runs in _samples(c, load).items()}
    requests = [t.request for t in c.turns.values()]
    over = timings(requests) if requests else {}
    limits = load.slo
    return {
        "artifact": str(c.entry.path),
        "runtime": c.runtime,
        "label": c.label,
        "python": str(c.python) if c.python else None,
        "info": c.info,
        "bytes": size,
        "bits_per_weight": bits,
        "load_s": samples.get("load_s"),
        "peak_memory_bytes": max((t.peak for t in c.turns.values() if t.peak is not None), default=None),
        "baseline_memory_bytes": max(
            (t.baseline for t in c.turns.values() if t.baseline is not None), default=None
        ),
        "prefill_tokens_per_s": samples.get("prefill_tokens_per_s"),
        "decode_tokens_per_s": samples.get("decode_tokens_per_s"),
        "output_tokens_per_s": samples.get("output_tokens_per_s"),
        "ttft_s": _both(over.get("ttft_s"), samples.get("ttft_s")),
        "itl_s": over.get("itl_s"),
        "tpot_s": _both(over.get("tpot_s"), samples.get("tpot_s")),
        "latency_s": _both(over.get("latency_s"), samples.get("latency_s")),
        "goodput": goodput(requests, sum(r.latency for r in requests), limits)
        if limits and requests
        else None,
        "ratio": _ratios(c, base, load),
        "gpu": _gpu(c),
        "error": c.error,
        "exit_code": c.exit_code,
    }


def _both(over: dict[str, Any] | None, runs: dict[str, Any] | None) -> dict[str, Any] | None:
    """Percentiles over requests together with the spread: here one request is one repetition."""
    return {**(over or {}), **(runs or {})} or None


def _gpu(c: Contender) -> dict[str, Any] | None:
    energies = [(t.energy, t.request.tokens) for t in c.turns.values() if t.energy is not None]
    memory = [t.gpu_memory for t in c.turns.values() if t.gpu_memory is not None]
    if not energies or not memory:
        return None
    return {
        "energy_j": spread([e for e, _ in energies]),
        "joules_per_token": spread([e / n for e, n in energies]),
        "memory_bytes": max(memory),
    }
