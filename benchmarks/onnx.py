"""ONNX export and inference against the incumbents, in one run on one machine.

Export: a synthetic Llama-shaped bf16 checkpoint to fp32 and int4 by lconvert, by onnxruntime-genai's model builder and (fp32) by
torch.onnx.export; wall time, CPU time and memory, for two sizes. Inference: int4 graphs of the same model in plain ONNX
Runtime (`lconvert bench`: prefill and decode tok/s), both in onnxruntime-genai's own loop, and llama.cpp's Q4_0.

    python -P benchmarks/onnx.py --peer .venv-genai/bin/python
    python -P benchmarks/onnx.py --peer .venv-genai/bin/python --parameters 3e8 --skip-inference

--peer: an interpreter with onnxruntime-genai, onnxscript, torch and transformers.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path = [p for p in sys.path if Path(p).resolve() != ROOT / "benchmarks"]  # this file is no package `onnx`
sys.path.append(str(ROOT))

from benchmarks.end_to_end import warm, watched, write_checkpoint

_TORCH = """
import sys, torch, transformers
model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32).eval()
model.config.use_cache = False
ids = torch.zeros((1, 8), dtype=torch.int64)
batch, sequence = torch.export.Dim("batch"), torch.export.Dim("sequence")
shapes = {"input_ids": {0: batch, 1: sequence}, "attention_mask": {0: batch, 1: sequence}}
torch.onnx.export(model, (), sys.argv[2], kwargs={"input_ids": ids, "attention_mask": torch.ones_like(ids)},
                  dynamo=True, external_data=True, dynamic_shapes=shapes, opset_version=18)
"""

_LOOP = """
import json, sys, time
import onnxruntime_genai as og
model = og.Model(sys.argv[1])
prompt, new, runs = int(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
out = []
for _ in range(runs):
    params = og.GeneratorParams(model)
    params.set_search_options(max_length=prompt + new + 1, min_length=prompt + new + 1, do_sample=False)
    generator = og.Generator(model, params)
    start = time.perf_counter()
    generator.append_tokens([(7 * i + 3) % 1000 for i in range(prompt)])
    generator.generate_next_token()
    first = time.perf_counter()
    for _ in range(new):
        generator.generate_next_token()
    out.append((prompt / (first - start), new / (time.perf_counter() - first)))
print(json.dumps(out))
"""


def timed(command: list[str]) -> dict[str, float]:
    """Wall and CPU seconds, peak RSS and peak anonymous memory in MB of a command."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    wall, rss, anonymous = watched(command, {k: v for k, v in os.environ.items() if k != "PYTHONSTARTUP"})
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {"wall_s": wall, "cpu_s": cpu, "rss_mb": rss, "anonymous_mb": anonymous}


def exports(source: Path, work: Path, peer: str, threads: int) -> dict[str, dict[str, dict[str, float]]]:
    """precision -> exporter -> figures."""
    out: dict[str, dict[str, dict[str, float]]] = {}
    ours = [sys.executable, "-m", "lconvert", "hf-to-onnx", str(source), "--no-validate", "--force"]
    builder = [peer, "-m", "onnxruntime_genai.models.builder", "-m", str(source), "-i", str(source)]
    for precision in ("fp32", "int4"):
        warm(source / "model.safetensors")
        row = out[precision] = {}
        to = work / f"ours-{precision}"
        row["lconvert"] = timed([*ours, f"--{precision}", "--threads", str(threads), "-o", str(to)])
        to = work / f"builder-{precision}"
        row["genai builder"] = timed(
            [*builder, "-o", str(to), "-p", precision, "-e", "cpu", "-c", str(work / "cache")]
        )
    (work / "torch").mkdir(exist_ok=True)
    row = out["fp32"]
    row["torch.onnx"] = timed([peer, "-c", _TORCH, str(source), str(work / "torch" / "model.onnx")])
    return out


def inference(source: Path, work: Path, peer: str, threads: int, prompt: int, new: int) -> dict[str, Any]:
    """Tokens per second of int4 graphs and of Q4_0."""
    gguf = work / "q4_0.gguf"
    subprocess.run(
        [sys.executable, "-m", "lconvert", "hf-to-gguf", str(source), "--q4_0", "--pure", "--no-validate", "--force", "-o", str(gguf)],
        check=True,
        stdout=subprocess.DEVNULL,
    )  # fmt: skip
    artifacts = [str(work / "ours-int4"), str(work / "builder-int4"), str(gguf)]
    command = [sys.executable, "-m", "lconvert", "bench", *artifacts, "--json", "--threads", str(threads)]
    command += ["--prompt", str(prompt), "--tokens", str(new)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    own = [sys.executable, "-m", "lconvert", "hf-to-onnx", str(source), "--int4", "--dialect", "genai", "--no-validate", "--force"]  # fmt: skip
    subprocess.run([*own, "-o", str(work / "ours-genai")], check=True, stdout=subprocess.DEVNULL)
    loops = {}
    for name in ("ours-genai", "builder-int4"):
        loop = [peer, "-c", _LOOP, str(work / name), str(prompt), str(new), "5"]
        runs = json.loads(subprocess.run(loop, check=True, capture_output=True, text=True).stdout)
        loops[name] = {"prefill": median(r[0] for r in runs), "decode": median(r[1] for r in runs)}
    return {"bench": json.loads(done.stdout), "genai loop": loops}


def main() -> None:
    arguments = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    arguments.add_argument("--peer", required=True, help="interpreter with onnxruntime-genai and onnxscript")
    arguments.add_argument("--parameters", type=float, nargs="+", default=[1e8, 4e8])
    arguments.add_argument("--threads", type=int, default=2)
    arguments.add_argument("--prompt", type=int, default=256)
    arguments.add_argument("--new", type=int, default=64)
    arguments.add_argument("--skip-inference", action="store_true")
    options = arguments.parse_args()
    out: dict[str, Any] = {}
    for parameters in options.parameters:
        with tempfile.TemporaryDirectory(dir=os.environ.get("BENCH_TMP")) as folder:
            work, source = Path(folder), Path(folder) / "model"
            made = write_checkpoint(source, parameters, 32000 if parameters > 2e8 else 8192)
            found = out[f"{made:.3g} parameters"] = {
                "export": exports(source, work, options.peer, options.threads)
            }
            for precision, rows in found["export"].items():
                for name, row in rows.items():
                    ratio = row["wall_s"] / rows["lconvert"]["wall_s"]
                    print(f"{made:9.3g}  {precision}  {name:14} {row['wall_s']:7.1f} s  CPU {row['cpu_s']:7.1f} s  RSS {row['rss_mb']:7.0f} MB  "
                          f"anonymous {row['anonymous_mb']:7.0f} MB  {ratio:5.1f}x", flush=True)  # fmt: skip
            if not options.skip_inference:
                found["inference"] = inference(
                    source, work, options.peer, options.threads, options.prompt, options.new
                )
                speeds = {
                    r["label"]: (r["prefill_tokens_per_s"]["median"], r["decode_tokens_per_s"]["median"])
                    for r in found["inference"]["bench"]["results"]
                }
                for name, loop in found["inference"]["genai loop"].items():
                    speeds[f"{name} in genai's loop"] = (loop["prefill"], loop["decode"])
                for name, (prefill, decode) in speeds.items():
                    own = speeds["ours-int4"]
                    print(f"{made:9.3g}  {name:30} prefill {prefill:7.0f} tok/s (ours {own[0] / prefill:.2f}x)  "
                          f"decode {decode:6.1f} (ours {own[1] / decode:.2f}x)", flush=True)  # fmt: skip
    print(json.dumps(out))


if __name__ == "__main__":
    main()
