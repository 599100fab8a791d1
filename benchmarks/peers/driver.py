"""What the scripts of all peers share: the command line, the clock, and one process for each case.

    python run_PEER.py --model DIR --calibration FILE.npz --out DIR [--threads N] CASE...

A script runs in the interpreter of its peer, so this file needs only torch, NumPy and transformers. FILE.npz holds `ids` (windows,
tokens), the same ones for every peer, and `text`, the path of the file that they come from. Each case writes the checkpoint OUT/CASE and OUT/CASE.json: seconds of the
compression itself (no imports, no reading, no writing), peak memory of the process, the options that were set, and versions.
A case that fails has its error there and no checkpoint.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch


@dataclass
class Clock:
    """Adds up the time of its `with` blocks."""

    seconds: float = 0.0

    @contextmanager
    def running(self) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds += time.perf_counter() - start


@dataclass(frozen=True)
class Task:
    """model: its folder. folder: where the checkpoint goes. ids: (windows, tokens) int64, and the text they come from."""

    model: Path
    folder: Path
    ids: torch.Tensor
    text: str
    clock: Clock

    def load(self) -> Any:
        """The model in the type it is stored in, as the peers' own examples load it."""
        from transformers import AutoModelForCausalLM

        return AutoModelForCausalLM.from_pretrained(self.model, dtype="auto").eval()


@dataclass(frozen=True)
class Case:
    """`run` writes the checkpoint; `settings` are what differs from the peer's defaults."""

    run: Callable[[Task], None]
    settings: Mapping[str, Any] = field(default_factory=dict)


def main(peer: str, packages: tuple[str, ...], cases: Mapping[str, Case]) -> None:
    parser = argparse.ArgumentParser(description=f"Compress a model with {peer}.")
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--calibration", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("cases", nargs="+", metavar="CASE")
    options = parser.parse_args()
    if unknown := [c for c in options.cases if c not in cases]:
        raise SystemExit(f"{peer} has no case {unknown[0]}; there are {', '.join(cases)}")
    options.out.mkdir(parents=True, exist_ok=True)
    versions = {name: _version(name) for name in (*packages, "torch", "transformers")}
    for name in options.cases:
        sys.stdout.flush()
        child = os.fork()
        if not child:
            _child(name, cases[name], versions, options)
        usage = os.wait4(child, 0)[2]
        path = options.out / f"{name}.json"
        found = json.loads(path.read_text()) if path.exists() else {"error": "the process died"}
        found["peak_rss_mb"] = round(usage.ru_maxrss / 1024)
        path.write_text(json.dumps(found, indent=1, default=str) + "\n")
        print(f"== {peer} {name}: {found.get('error') or found['seconds']}", flush=True)


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:  # run from a source tree
        return str(import_module(name).__version__)


def _child(name: str, case: Case, versions: Mapping[str, str], options: argparse.Namespace) -> None:
    """Ends the process: whatever a peer leaves behind ends with it."""
    folder, clock = options.out / name, Clock()
    shutil.rmtree(folder, ignore_errors=True)
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    found: dict[str, Any] = {"settings": case.settings, "versions": versions, "threads": options.threads}
    try:
        with np.load(options.calibration) as given:
            ids, text = torch.from_numpy(given["ids"]).to(torch.int64), str(given["text"])
        case.run(Task(options.model, folder, ids, text, clock))
        found["seconds"] = round(clock.seconds, 2)
    except BaseException as e:  # noqa: BLE001 - peers raise anything, and the other cases must still run
        traceback.print_exc()
        shutil.rmtree(folder, ignore_errors=True)
        found["error"] = f"{type(e).__name__}: {' '.join(str(e).split())[:300]}"
    (options.out / f"{name}.json").write_text(json.dumps(found, default=str))
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
