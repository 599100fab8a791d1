"""Memory of `lconvert compress`: does its peak grow with the number of layers? It should not, whatever the method.

    python -P benchmarks/memory.py --calibrate TEXT [--layers 4 16] [--vocab 2048 131072] [--methods gptq awq ...] [--json OUT]

Random Llama checkpoints (bf16, sharded) are made in a temporary folder and compressed in fresh processes on few windows.
Peaks are of anonymous memory (RssAnon), sampled every few milliseconds, less what a process that only imports torch and
transformers holds; pages of mapped files are not in it. `planned` is what the run says it needs where --memory allows it too little: the
largest layer, statistics of a block and one window (primitives/budget.py); activations come on top, or into a file.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

_TOKENIZER = Path(__file__).parents[1] / "examples/demo_model"
_EVERY = 0.005  # seconds between two samples
_IMPORTS = "import torch, transformers; transformers.LlamaForCausalLM; input()"
_TYPES = "Q4_0,Q8_0"


def _allocation(sensitivity: str) -> tuple[str, ...]:
    budget = ("--target", "gguf", "--bpw", "6", "--types", _TYPES)
    return (*budget, "--sensitivity", sensitivity)


#: Name -> arguments of `lconvert compress`.
METHODS: Mapping[str, tuple[str, ...]] = {
    "rtn": ("--recipe", "int4-g128"),
    "gptq": ("--recipe", "gptq-w4g128"),
    "gptaq": ("--recipe", "gptaq-w4g128"),
    "awq": ("--recipe", "awq-w4g128"),
    "autoround": ("--recipe", "{autoround}"),
    "smoothquant": ("--recipe", "smoothquant-w8a8"),
    "sparsegpt": ("--recipe", "sparsegpt-2of4"),
    "magnitude": ("--recipe", "magnitude-50"),
    "quarot": ("--recipe", "quarot-w4g128"),
    "allocation, imatrix": _allocation("imatrix"),
    "allocation, fisher": _allocation("fisher"),
    "allocation, hessian": _allocation("hessian"),
    "allocation, kld": _allocation("kld"),
}
_AUTOROUND = {
    "schema": "lconvert.recipe/1",
    "passes": [{"autoround": {"grid": "int4", "group": 128, "iterations": 4}}],
}


@dataclass(frozen=True)
class Peak:
    """Bytes: anonymous and resident at most, and the wall seconds of the run."""

    anonymous: int
    resident: int
    seconds: float


def checkpoint(folder: Path, layers: int, vocab: int, hidden: int) -> Path:
    """A random Llama in bf16, made by a process of its own; its first tokens are those of the demo model."""
    config = {
        "hidden_size": hidden, "intermediate_size": 3 * hidden, "num_hidden_layers": layers, "vocab_size": vocab,
        "num_attention_heads": hidden // 64, "num_key_value_heads": hidden // 256, "max_position_embeddings": 2048,
        "tie_word_embeddings": False,
    }  # fmt: skip
    code = (
        "import json, sys, torch, transformers as t; torch.manual_seed(0); torch.set_default_dtype(torch.bfloat16);"
        "t.LlamaForCausalLM(t.LlamaConfig(**json.loads(sys.argv[1]), dtype='bfloat16'))"
        ".save_pretrained(sys.argv[2], max_shard_size='256MB')"
    )
    subprocess.run([sys.executable, "-P", "-c", code, json.dumps(config), str(folder)], check=True)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((_TOKENIZER / name).read_bytes())
    return folder


def _status(pid: int) -> dict[str, int]:
    """Memory of a process in bytes, by the names of /proc/PID/status; nothing of one that has ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return {}
    found = (line.split() for line in lines if line.startswith(("RssAnon", "VmHWM")))
    return {name.rstrip(":"): int(value) << 10 for name, value, _ in found}


def watched(process: subprocess.Popen[str]) -> Peak:
    """The peaks of a process until it ends."""
    start, anonymous, resident = time.perf_counter(), 0, 0
    while process.poll() is None:
        now = _status(process.pid)
        anonymous = max(anonymous, now.get("RssAnon", 0))
        resident = max(resident, now.get("VmHWM", 0))
        time.sleep(_EVERY)
    return Peak(anonymous, resident, time.perf_counter() - start)


def imports() -> int:
    """Anonymous bytes of a process that has imported what compression imports, and waits."""
    with subprocess.Popen([sys.executable, "-P", "-c", _IMPORTS], stdin=subprocess.PIPE, text=True) as p:
        held, before = 0, -1
        while held == 0 or held != before:
            time.sleep(2)
            before, held = held, _status(p.pid).get("RssAnon", 0)
        p.communicate("\n")
    return held


def compressing(model: Path, out: Path, arguments: tuple[str, ...]) -> subprocess.Popen[str]:
    command = [
        sys.executable,
        "-P",
        "-m",
        "lconvert",
        "compress",
        str(model),
        "-o",
        str(out),
        "--force",
        "--no-card",
    ]
    quiet: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([*command, *arguments], **quiet)


def planned(model: Path, out: Path, arguments: tuple[str, ...]) -> float | None:
    """Bytes that a run says it needs; None where it takes no text."""
    process = compressing(model, out, (*arguments, "--memory", "1K"))
    _, said = process.communicate()
    if process.returncode == 0:
        return None
    found = re.search(r"calibration needs ([0-9.]+) (MB|GB)", said)
    assert found, said
    return float(found[1]) * {"MB": 1e6, "GB": 1e9}[found[2]]


def rows(args: argparse.Namespace, folder: Path) -> Iterator[dict[str, Any]]:
    """One method on one model after another."""
    recipe = folder / "autoround.yaml"
    recipe.write_text(yaml.safe_dump(_AUTOROUND))
    text = (
        "--calibrate",
        str(args.calibrate),
        "--calibration-windows",
        str(args.windows),
        "--calibration-context",
        "256",
    )
    base = imports()
    for vocab in args.vocab:
        models = {n: checkpoint(folder / f"{vocab}-{n}", n, vocab, args.hidden) for n in args.layers}
        for method in args.methods:
            own = tuple(a.format(autoround=recipe) if a == "{autoround}" else a for a in METHODS[method])
            arguments = (*own, *text, "--threads", str(args.threads), *args.more)
            for layers, model in models.items():
                out = folder / "out.lcir"
                need = None if args.memory or "--target" in own else planned(model, out, arguments)
                memory = ("--memory", args.memory) if args.memory else ()
                process = compressing(model, out, (*arguments, *memory))
                peak = watched(process)
                _, said = process.communicate()
                row = {"method": method, "vocab": vocab, "layers": layers, "planned": need, "anonymous": peak.anonymous - base,
                       "resident": peak.resident, "seconds": peak.seconds, "error": said if process.returncode else ""}  # fmt: skip
                yield row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--calibrate", type=Path, required=True)
    parser.add_argument("--layers", type=int, nargs="+", default=[4, 16])
    parser.add_argument("--vocab", type=int, nargs="+", default=[2048, 131072])
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--windows", type=int, default=4)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--memory", help="as the option of compress: spill what is above")
    parser.add_argument("--more", nargs="*", default=[], help="further arguments of compress")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    os.environ |= {"OMP_NUM_THREADS": str(args.threads)}
    found = []
    print(
        f"{'method':22} {'vocab':>7} {'layers':>6} {'anonymous':>10} {'planned':>9} {'s':>6}   (MB above imports)"
    )
    with tempfile.TemporaryDirectory() as folder:
        for row in rows(args, Path(folder)):
            found.append(row)
            need = f"{row['planned'] / 1e6:.0f}" if row["planned"] else ""
            line = f"{row['method']:22} {row['vocab']:>7} {row['layers']:>6} {row['anonymous'] / 1e6:>10.0f} {need:>9} {row['seconds']:>6.0f}"
            print(line + f"   {row['error'].strip()[-200:]}", flush=True)
    if args.json:
        args.json.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
