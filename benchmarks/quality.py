"""Quality of every method, ours and the peers', on the same model, text, bits and group; and of llama.cpp's types.

    python -P benchmarks/quality.py MODEL... --calibrate FILE --text FILE --out DIR [--python PEER=PYTHON]...
    python -P benchmarks/quality.py MODEL... --text FILE --out DIR --only llama.cpp      # the types of GGUF files alone

methods.py says what is compared and under which options. Peers run in interpreters of their own (tests/oracles/make_checkpoints.py
says what to install); one without an interpreter is left out. All get the same token windows, and what they write is read by
lconvert and measured against the source in fp32: mean KLD with its 95% interval, 99.9% KLD, same top-1, perplexity, each over the
whole vocabulary. GGUF types are measured twice: as llama.cpp has them, and with embeddings and output left in BF16 ("matrices"),
which is what the other methods round. Checkpoints and numbers stay in --out; a later run makes what is missing, or all of it anew
with --fresh: only then are the times those of one run. Seconds are those of the compression itself, without imports and files.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT))  # appended, so that no folder here hides a package

from benchmarks.measure import Yardstick
from benchmarks.methods import LLAMACPP, MAKERS, METHODS, OURS, TYPES, Method

import lconvert
from lconvert.errors import LconvertError
from lconvert.primitives.job import Calibration
from lconvert.primitives.text import windows
from lconvert.validators import plots
from lconvert.validators.plots_methods import methods as drawing

PEERS = Path(__file__).resolve().parent / "peers"
OFFLINE = {
    "HF_HUB_OFFLINE": "1",
    "TORCHDYNAMO_DISABLE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "CUDA_VISIBLE_DEVICES": "",
}
MATRICES_ONLY = {"output_tensor_type": "BF16", "token_embedding_type": "BF16"}


@dataclass(frozen=True)
class Run:
    """One model's part of the benchmark."""

    model: Path
    out: Path
    options: argparse.Namespace

    def path(self, maker: str, case: str, ending: str = "") -> Path:
        return self.out / maker / f"{case}{ending}"


def cases(only: str) -> Iterator[tuple[Method, str, str]]:
    """(method, maker, case) of every line whose METHOD/GRID/MAKER/CASE contains `only`, a regular expression."""
    for method in METHODS:
        for maker, names in method.cases.items():
            for case in names:
                if re.search(only, f"{method.name}/{method.grid}/{maker}/{case}"):
                    yield method, maker, case


def complete(about: Path) -> bool:
    """Whether a case is there; one that failed is tried again."""
    return about.exists() and "error" not in json.loads(about.read_text())


def compress(run: Run, maker: str, names: Sequence[str], python: str) -> None:
    """The cases that are not there yet, in the maker's interpreter."""
    wanted = [
        c for c in dict.fromkeys(names) if run.options.fresh or not complete(run.path(maker, c, ".json"))
    ]
    if not wanted:
        return
    calibration = run.out / "calibration.npz"
    threads = str(run.options.threads)
    command = [python, str(PEERS / f"run_{maker}.py"), "--model", str(run.model), "--threads", threads]
    command += ["--calibration", str(calibration), "--out", str(run.out / maker), *wanted]
    paths = os.pathsep.join(filter(None, (str(ROOT / "src"), os.environ.get("PYTHONPATH", ""))))
    ours = {"PYTHONPATH": paths} if maker == OURS else {}
    log = run.out / f"{maker}.log"
    print(f"{run.model.name}: {MAKERS[maker]}: {' '.join(wanted)}", file=sys.stderr, flush=True)
    with open(log, "ab") as f:
        environment = {**os.environ, **OFFLINE, "OMP_NUM_THREADS": threads, **ours}
        done = subprocess.run(command, env=environment, cwd=run.out, stdout=f, stderr=f, check=False)
    if done.returncode:
        print(f"{MAKERS[maker]}: ended with exit code {done.returncode}; {log} says why", file=sys.stderr)


def quantize(run: Run, type_: str, imatrix: Path | None, matrices: bool) -> str:
    """A GGUF file of llama.cpp's mixture; the name of its case."""
    case = f"{type_}{'-imatrix' if imatrix else ''}{'-matrices' if matrices else ''}"
    path = run.path(LLAMACPP, case, ".gguf")
    if run.options.fresh or not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        options = MATRICES_ONLY if matrices else {}
        lconvert.convert(run.model, path, ftype=type_, imatrix=imatrix, force=True, **options)
    return case


def measured(run: Run, yardstick: Yardstick, artifact: Path) -> dict[str, Any]:
    """The numbers of one artifact, kept beside it together with what they hold for."""
    kept = artifact.with_name(artifact.name + ".measured.json")
    key = [run.options.windows, hashlib.sha256(run.options.text.read_bytes()).hexdigest()[:16]]
    key.append(max(f.stat().st_mtime_ns for f in (artifact, *artifact.glob("*"))))
    if kept.exists() and (old := json.loads(kept.read_text()))["key"] == key:
        return dict(old["numbers"])
    try:
        numbers = yardstick(artifact)
    except LconvertError as e:
        numbers = {"error": f"{type(e).__name__}: {e}"}
    kept.write_text(json.dumps({"key": key, "numbers": numbers}, indent=1) + "\n")
    return numbers


def method_rows(run: Run, yardstick: Yardstick) -> Iterator[dict[str, Any]]:
    for method, maker, case in cases(run.options.only):
        about = run.path(maker, case, ".json")
        row = {
            "model": run.model.name,
            "method": method.name,
            "grid": method.grid,
            "maker": MAKERS[maker],
            "case": case,
        }
        if not about.exists():
            yield {**row, "error": f"not run: --python {maker}=PYTHON" if maker != OURS else "not run"}
            continue
        row |= json.loads(about.read_text())
        yield row if "error" in row else {**row, **measured(run, yardstick, run.path(maker, case))}


def type_rows(run: Run, yardstick: Yardstick) -> Iterator[dict[str, Any]]:
    given = str(run.options.imatrix or "").replace("{model}", run.model.name)
    for imatrix in (None, Path(given)) if given else (None,):
        for matrices in (False, True):
            for type_ in TYPES:
                if not re.search(run.options.only, f"types/{type_}/{LLAMACPP}/{type_}"):
                    continue
                case = quantize(run, type_, imatrix, matrices)
                scope = "matrices" if matrices else "all"
                method = "with imatrix" if imatrix else "stock"
                row = {
                    "model": run.model.name,
                    "method": method,
                    "grid": type_,
                    "maker": MAKERS[LLAMACPP],
                    "case": case,
                }
                path = run.path(LLAMACPP, case, ".gguf")
                yield {**row, "type": type_, "scope": scope, **measured(run, yardstick, path)}


HEAD = "| method | grid | by | case | bits | mean KLD (95% CI) | 99.9% | same top-1 | perplexity | MB | s | peak MB |"


def line(r: Mapping[str, Any]) -> str:
    cells = [r["method"], r["grid"], r["maker"], r["case"]]
    if "error" in r:
        return f"| {' | '.join([*cells, r['error'], *['' for _ in range(7)]])} |"
    zeros = f", {100 * r['zeros']:.0f}% zero" if r["zeros"] > 0.4 and r["bits_per_weight"] > 8 else ""
    cells += [f"{r['bits_per_weight']:.2f}{zeros}"]
    cells += [f"{r['kld_mean']:.4g} ({r['kld_ci'][0]:.3g} .. {r['kld_ci'][1]:.3g})", f"{r['kld_p999']:.3g}"]
    cells += [f"{100 * r['same_top1']:.2f}%", f"{r['ppl']:.3f}", f"{r['bytes'] / 1e6:.2f}"]
    cells += [f"{r['seconds']:.1f}" if "seconds" in r else "", str(r.get("peak_rss_mb", ""))]
    return f"| {' | '.join(cells)} |"


def _served(row: Mapping[str, Any]) -> float:
    """Mean KLD, as a runtime has it that gives stacked matrices one scale (measure.py)."""
    return float(row.get("served", row["kld_mean"]))


def verdicts(rows: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Ours against the best and the fastest peer of each method."""
    for method in METHODS:
        group = [
            r for r in rows if (r["method"], r["grid"]) == (method.name, method.grid) and "kld_mean" in r
        ]
        ours = [r for r in group if r["maker"] == MAKERS[OURS]]
        others = [r for r in group if r["maker"] != MAKERS[OURS]]
        if not others:
            continue
        best = min(others, key=_served)
        stored = f", {best['kld_mean']:.4g} as stored" if "served" in best else ""
        cells = [method.name, method.grid, f"{_served(best):.4g} ({best['maker']} {best['case']}{stored})"]
        if ours:
            own = min(ours, key=_served)
            fast = min(others, key=lambda r: float(r["seconds"]))
            quality, speed = _served(own) / _served(best), fast["seconds"] / max(own["seconds"], 1e-3)
            cells += [
                f"{_served(own):.4g} ({own['case']})",
                f"x{quality:.3f}",
                f"x{speed:.2f} {fast['maker']}",
            ]
        else:
            cells += ["missing", "", ""]
        yield f"| {' | '.join(cells)} |"


def draw(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """The best case of each maker, method and grid that rounds weights alone, above llama.cpp's types on the same matrices."""
    best: dict[tuple[str, ...], Mapping[str, Any]] = {}
    for r in rows:
        if (
            "kld_mean" not in r
            or "scope" in r
            or r["bits_per_weight"] > 8.6
            or re.search("W8A8|W4A4|FP8", r["grid"])
        ):
            continue
        key = (r["maker"], r["method"], r["grid"])
        if key not in best or r["kld_mean"] < best[key]["kld_mean"]:
            best[key] = r
    widest = 1.3 * max((r["bits_per_weight"] for r in best.values()), default=8.0)
    stock = [
        r
        for r in rows
        if r.get("scope") == "matrices" and r["method"] == "stock" and r["bits_per_weight"] < widest
    ]
    plots.save(drawing(list(best.values()), stock, "llama.cpp's types"), path)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("models", nargs="+", type=Path)
    parser.add_argument("--text", type=Path, required=True, help="evaluation text")
    parser.add_argument("--calibrate", type=Path, help="calibration text, another one")
    parser.add_argument("--out", type=Path, required=True, help="checkpoints and numbers, kept")
    parser.add_argument("--python", action="append", default=[], metavar="PEER=PYTHON")
    parser.add_argument("--only", default="", help="regular expression on METHOD/GRID/PEER/CASE")
    parser.add_argument("--imatrix", help="importance matrix for the GGUF types; {model} is the model's name")
    parser.add_argument("--windows", type=int, default=32, help="of the evaluation text")
    parser.add_argument("--calibration-windows", type=int, default=64)
    parser.add_argument("--context", type=int, default=512, help="tokens of a calibration window")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--fresh", action="store_true")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path, help="with several models, {model} is the model's name")
    options = parser.parse_args()
    pythons = {OURS: sys.executable, **dict(p.split("=", 1) for p in options.python)}
    if unknown := sorted(set(pythons) - set(MAKERS)):
        parser.error(f"--python: no peer is called {unknown[0]}; there are {', '.join(MAKERS)}")
    everything = []
    for model in options.models:
        run = Run(model.resolve(), options.out.resolve() / model.name, options)
        run.out.mkdir(parents=True, exist_ok=True)
        if options.calibrate:
            text = str(options.calibrate.resolve())
            wanted = Calibration(text, options.calibration_windows, options.context)
            ids = np.array(windows(lconvert.read(str(model)), wanted).ids, np.int32)
            np.savez(run.out / "calibration.npz", ids=ids, text=text)
            for maker, python in pythons.items():
                compress(run, maker, [c for _, m, c in cases(options.only) if m == maker], python)
        yardstick = Yardstick(model, options.text, options.windows)
        print(f"\n{model.name}\n\n{HEAD}\n|{'---|' * HEAD.count(' | ')}---|", flush=True)
        rows = []
        for r in (*method_rows(run, yardstick), *type_rows(run, yardstick)):
            rows.append(r)
            print(line(r), flush=True)
        print(
            "\n| method | grid | best peer | ours | KLD, ours / best | speed against the fastest |\n|---|---|---|---|---|---|"
        )
        print("\n".join(verdicts(rows)), flush=True)
        everything += rows
        if options.plot:
            draw(rows, Path(str(options.plot).replace("{model}", model.name)))
    if options.json:
        options.json.write_text(json.dumps(everything, indent=1) + "\n")


if __name__ == "__main__":
    main()
