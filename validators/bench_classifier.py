"""`bench` of encoders and networks of images: sequences or images per second by batch, and how long a batch takes.

Artifacts take turns within a repetition, each for a moment (`_MOMENT`), so that a noisy machine hurts all alike; ratios are of the same
repetition. All live in this process: a model of this kind fits, and no cache or server is part of what is measured.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from lconvert import __version__
from lconvert.converters import read
from lconvert.errors import LconvertError, OptionError
from lconvert.forward import packages, sequential
from lconvert.ir import Convnet, Decoder, Encoder, Model
from lconvert.validators.latency import spread
from lconvert.validators.machine import describe
from lconvert.validators.runtimes import kind
from lconvert.validators.runtimes.onnx_classifier import OnnxClassifier
from lconvert.validators.stored import stored

SCHEMA = "lconvert.classifier-bench/1"
#: Seconds, and runs, that one turn has at least.
_MOMENT, _LEAST = 0.25, 3
_LENGTH = 128

Run = Callable[[Mapping[str, Any]], Any]


@dataclass
class _Contender:
    path: str
    runtime: str
    model: Model
    run: Run
    load: float
    seconds: dict[tuple[int, int], list[float]] = field(
        default_factory=dict
    )  # by batch and repetition: of each run


def chosen(artifacts: Sequence[str]) -> bool:
    """Whether these are encoders or networks of images; OptionError for some that are and some that are language models. What cannot be
    read counts as neither: opening it says why."""
    found: dict[bool, list[str]] = {True: [], False: []}
    for path in artifacts:
        with contextlib.suppress(LconvertError):
            found[not isinstance(read(path).arch, Decoder)].append(path)
    if found[True] and found[False]:
        names = ", ".join(found[True])
        raise OptionError(
            f"{names}: no language model; measure encoders and networks of images apart from {found[False][0]}"
        )
    return bool(found[True])


def bench(
    artifacts: Sequence[str],
    *,
    batches: Sequence[int] = (1, 8),
    length: int | None = None,
    repetitions: int = 5,
    threads: int | None = None,
    seed: int = 0,
    progress: Callable[[str], None] = lambda what: None,
) -> dict[str, Any]:
    """Measure `artifacts`, ONNX folders in ONNX Runtime and plain folders in transformers or torch, on random ids or images.

    length: tokens of every sequence, by default 128 or what the smallest context has. Returns the JSON form SCHEMA.
    """
    if not batches or min(batches) < 1 or repetitions < 1:
        raise OptionError(
            f"a benchmark needs batches and repetitions of 1 at least; got {list(batches)}, {repetitions}"
        )
    contenders = [_opened(path, threads) for path in artifacts]
    shapes = {(type(c.model.arch), getattr(c.model.arch, "image", None)) for c in contenders}
    if len(shapes) > 1:
        raise OptionError("these models take different inputs; measure encoders and networks of images apart")
    contexts = [c.model.arch.context for c in contenders if isinstance(c.model.arch, Encoder)]
    used = min([length or _LENGTH, *contexts]) if contexts else None
    if length is not None and used is not None and length > used:
        raise OptionError(f"--prompt {length}: the smallest of these models has {used} positions")
    for batch in batches:
        feeds = [_feed(c.model, batch, used or 0, seed) for c in contenders]
        for c, feed in zip(contenders, feeds, strict=True):
            c.run(feed)  # what is allocated once
        for r in range(repetitions):
            order = [(r + i) % len(contenders) for i in range(len(contenders))]
            for at in order:
                progress(f"{contenders[at].path}, batch {batch}, repetition {r + 1} of {repetitions}")
                contenders[at].seconds[batch, r] = _turn(contenders[at].run, feeds[at])
    settings = {
        "batches": list(batches),
        "length": used,
        "repetitions": repetitions,
        "threads": threads,
        "seed": seed,
    }
    return {
        "schema": SCHEMA,
        "lconvert": __version__,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": describe(),
        "settings": settings,
        "results": [_result(c, contenders[0], batch) for c in contenders for batch in batches],
    }


def _turn(run: Run, feed: Mapping[str, Any]) -> list[float]:
    out: list[float] = []
    while len(out) < _LEAST or sum(out) < _MOMENT:
        start = time.perf_counter()
        run(feed)
        out.append(time.perf_counter() - start)
    return out


def _result(c: _Contender, base: _Contender, batch: int) -> dict[str, Any]:
    size, bits = stored(Path(c.path))
    turns, others = ([x for (n, _), x in sorted(y.seconds.items()) if n == batch] for y in (c, base))
    own, theirs = ([float(np.median(turn)) for turn in x] for x in (turns, others))
    every = [s for turn in turns for s in turn]
    return {
        "artifact": c.path,
        "runtime": c.runtime,
        "batch": batch,
        "bytes": size,
        "bits_per_weight": bits,
        "load_s": c.load,
        "examples_per_s": spread([batch / s for s in own]),
        "latency_s": {"p50": float(np.median(every)), "p99": float(np.quantile(every, 0.99))},
        "ratio": spread([b / a for a, b in zip(own, theirs, strict=True)]),
    }


def _opened(path: str, threads: int | None) -> _Contender:
    what, model, start = kind(path), read(path), time.perf_counter()
    if what == "onnx":
        run: Run = OnnxClassifier(path, threads=threads, purpose="speed").logits
        runtime = "onnxruntime"
    elif what == "hf":
        runtime, run = _torch(path, model, threads)
    else:
        raise OptionError(
            f"{path}: {what} folders of classifiers are run by no runtime; convert it: lconvert hf-to-onnx {path}"
        )
    return _Contender(path, runtime, model, run, time.perf_counter() - start)


def _torch(path: str, model: Model, threads: int | None) -> tuple[str, Run]:
    """transformers as it is served on a CPU, or torch; one number of threads for all of a process."""
    torch, transformers = packages()
    if threads:
        torch.set_num_threads(threads)
    if isinstance(model.arch, Convnet):
        module, name = sequential(model), "torch"
    else:
        transformers.utils.logging.disable_progress_bar()
        own = transformers.AutoModelForSequenceClassification.from_pretrained(path, local_files_only=True)
        module, name = own.eval(), "transformers"

    def run(feed: Mapping[str, Any]) -> Any:
        arrays = {k: torch.from_numpy(v) for k, v in feed.items()}
        with torch.inference_mode():
            return module(arrays["images"]) if "images" in arrays else module(**arrays).logits

    return name, run


def _feed(model: Model, batch: int, length: int, seed: int) -> dict[str, Any]:
    """Full sequences, without padding, or images."""
    rng, arch = np.random.default_rng(seed), model.arch
    if isinstance(arch, Convnet):
        return {"images": rng.random((batch, *arch.image), dtype=np.float32)}
    assert isinstance(arch, Encoder)
    ids = rng.integers(0, arch.vocab, (batch, length))
    found = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
    return found | ({"token_type_ids": np.zeros_like(ids)} if arch.token_types else {})
