"""A synthetic Llama-shaped bf16 checkpoint to Q4_K_M: lconvert against llama.cpp's converter and quantizer.

Both sides run in this session, one after the other, on the same files with a warm page cache; tensor bytes must be
equal. lconvert runs with --no-validate; its time includes fsync, the output's hash and the source's. Prints a table
and, with --json, machine-readable figures.

    python benchmarks/end_to_end.py                    # 1e9 parameters, 2 threads
    python benchmarks/end_to_end.py --parameters 1e8 --runs 3
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT))  # for tests.upstream; appended, so that no folder here hides a package

from tests import upstream

from lconvert.archs import find
from lconvert.archs.common import Keys, binds
from lconvert.formats import gguf, safetensors

DEMO = ROOT / "examples" / "demo_model"


def config(parameters: float, embedding_rows: int) -> dict[str, object]:
    """A Llama 3.2-like shape with about so many parameters."""
    hidden = 2048
    per_layer = hidden * hidden * 2 + 2 * hidden * 512 + 3 * hidden * 8192
    layers = max(1, round((parameters - 2 * embedding_rows * hidden) / per_layer))
    return {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": hidden, "intermediate_size": 8192,
        "num_hidden_layers": layers, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64,
        "vocab_size": embedding_rows, "max_position_embeddings": 8192, "rms_norm_eps": 1e-5, "rope_theta": 500000.0,
        "hidden_act": "silu", "tie_word_embeddings": False, "dtype": "bfloat16",
    }  # fmt: skip


def write_checkpoint(folder: Path, parameters: float, embedding_rows: int) -> int:
    """Random bf16 weights, normally distributed, written slab by slab; returns the number of parameters."""
    folder.mkdir(parents=True)
    made = config(parameters, embedding_rows)
    (folder / "config.json").write_text(json.dumps(made))
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json", "chat_template.jinja"):
        if (DEMO / name).exists():
            shutil.copy(DEMO / name, folder / name)
    arch = find("llama")
    listing = [(b.hf, "BF16", b.shape) for b in binds(arch.names, arch.traits(Keys(made)))]
    head, offsets = safetensors.header_bytes(listing, {"format": "pt"})
    rng = np.random.default_rng(0)
    pool = (rng.standard_normal(1 << 24, dtype=np.float32) * np.float32(0.02)).view(np.uint32)
    bits = ((pool + 0x7FFF + ((pool >> 16) & 1)) >> 16).astype(np.uint16)
    total = 0
    with open(folder / "model.safetensors", "wb") as f:
        f.write(head)
        for (_, _, shape), at in sorted(zip(listing, offsets, strict=True), key=lambda x: x[1]):
            f.seek(at)
            left = int(np.prod(shape))
            total += left
            while left:
                start = int(rng.integers(0, len(bits) // 2))
                piece = bits[start : start + min(left, len(bits) // 2)]
                f.write(piece.tobytes())
                left -= len(piece)
    return total


def watched(command: list[str], env: dict[str, str] | None = None) -> tuple[float, float, float]:
    """(wall seconds, peak RSS in MB, peak anonymous RSS in MB) of a command; its failure ends the benchmark."""
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=env)
    peak = {"VmHWM": 0, "RssAnon": 0}

    def poll() -> None:
        while process.poll() is None:
            try:
                for line in Path(f"/proc/{process.pid}/status").read_text().splitlines():
                    key, _, value = line.partition(":")
                    if key in peak:
                        peak[key] = max(peak[key], int(value.split()[0]))
            except (OSError, IndexError):
                pass
            time.sleep(0.01)

    poller = threading.Thread(target=poll)
    poller.start()
    error = process.stderr.read().decode() if process.stderr else ""
    process.wait()
    wall = time.perf_counter() - start
    poller.join()
    if process.returncode:
        raise SystemExit(f"{command[:4]} failed: {error[-2000:]}")
    return wall, peak["VmHWM"] / 1e3, peak["RssAnon"] / 1e3


def warm(path: Path) -> None:
    with open(path, "rb") as f:
        while f.read(1 << 24):
            pass


def same_tensors(a: Path, b: Path) -> bool:
    x, y = gguf.read(a), gguf.read(b)
    if list(x.tensors) != list(y.tensors):
        return False

    def slabs(file: gguf.GGUFFile, name: str) -> Iterator[bytes]:
        t = gguf.raw(file, name)
        return (t.read(i, min(i + 4096, t.rows)).tobytes() for i in range(0, t.rows, 4096))

    return all(
        x.tensors[n].type == y.tensors[n].type
        and all(p == q for p, q in zip(slabs(x, n), slabs(y, n), strict=True))
        for n in x.tensors
    )


_QUANTIZE = """
import sys
from pathlib import Path
sys.path.append(sys.argv[1])
from tests import upstream
upstream.quantize(Path(sys.argv[2]), Path(sys.argv[3]), "Q4_K_M", nthread=int(sys.argv[4]))
"""


def main() -> None:
    arguments = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    arguments.add_argument("--parameters", type=float, default=1e9)
    arguments.add_argument("--embedding-rows", type=int, default=32000)
    arguments.add_argument("--threads", type=int, default=2)
    arguments.add_argument("--runs", type=int, default=1)
    arguments.add_argument("--skip-upstream", action="store_true", help="memory and time of lconvert alone")
    arguments.add_argument("--json", action="store_true")
    options = arguments.parse_args()
    reason = upstream.available()
    if reason and not options.skip_upstream:
        raise SystemExit(f"the incumbents cannot run: {reason}")
    lconvert = str(Path(sys.executable).parent / "lconvert")
    idle = watched([sys.executable, "-c", "import lconvert"])[1]
    with tempfile.TemporaryDirectory(dir=os.environ.get("BENCH_TMP")) as folder:
        work = Path(folder)
        parameters = write_checkpoint(work / "model", options.parameters, options.embedding_rows)
        rows: list[dict[str, float]] = []
        equal = None
        for _ in range(options.runs):
            warm(work / "model" / "model.safetensors")
            row: dict[str, float] = {}
            command = [lconvert, "hf-to-gguf", str(work / "model"), "--q4_k_m", "--no-validate", "--force"]
            command += ["--threads", str(options.threads), "-o", str(work / "ours.gguf"), "--name", "model"]
            row["lconvert_s"], row["lconvert_rss_mb"], row["lconvert_anonymous_mb"] = watched(command)
            if not options.skip_upstream:
                env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {
                    "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": str(options.threads)
                }  # fmt: skip
                convert = [
                    sys.executable,
                    "-P",
                    "-c",
                    upstream._RUNNER,
                    str(upstream.source_folder()),
                    "llama-bpe",
                ]
                convert += [str(work / "model"), "--outfile", str(work / "dense.gguf"), "--outtype", "bf16"]
                row["converter_s"], converter_rss, _ = watched(convert, env)
                quantize = [sys.executable, "-P", "-c", _QUANTIZE, str(ROOT), str(work / "dense.gguf")]
                quantize += [str(work / "theirs.gguf"), str(options.threads)]
                row["quantizer_s"], quantizer_rss, _ = watched(quantize, env)
                row["upstream_rss_mb"] = max(converter_rss, quantizer_rss)
                row["intermediate_mb"] = (work / "dense.gguf").stat().st_size / 1e6
                equal = same_tensors(work / "ours.gguf", work / "theirs.gguf")
                row["ratio"] = (row["converter_s"] + row["quantizer_s"]) / row["lconvert_s"]
            rows.append(row)
    out = {
        "parameters": parameters,
        "threads": options.threads,
        "idle_rss_mb": idle,
        "equal_bytes": equal,
        "runs": rows,
    }
    if options.json:
        print(json.dumps(out, indent=1))
        return
    print(f"{parameters / 1e9:.2f}e9 parameters, bf16 to Q4_K_M, {options.threads} threads, warm cache")
    for row in rows:
        print(f"  lconvert               {row['lconvert_s']:7.1f} s   peak RSS {row['lconvert_rss_mb']:.0f} MB "
              f"({row['lconvert_rss_mb'] - idle:.0f} above idle, anonymous {row['lconvert_anonymous_mb']:.0f})")  # fmt: skip
        if "ratio" in row:
            print(f"  converter + quantizer  {row['converter_s']:7.1f} + {row['quantizer_s']:.1f} s   peak RSS "
                  f"{row['upstream_rss_mb']:.0f} MB, intermediate file {row['intermediate_mb']:.0f} MB")  # fmt: skip
            print(f"  {row['ratio']:.1f}x less wall time; tensor bytes {'equal' if equal else 'DIFFER'}")
    if equal is False:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
