"""What a validation costs beside the runtimes that it has to run, and whether its memory grows with the text.

python -P benchmarks/validation.py [MODEL] [--text FILE] [--type Q4_K_M] [--windows 8]

Each measurement is a process of its own: both runtimes alone on the same windows; `lconvert validate` without cached logits;
the same again with them; and once more on four times the windows. Wall time includes starting Python and importing.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import lconvert

HERE = Path(__file__).resolve().parent

_ALONE = """
import json, sys
from pathlib import Path
import lconvert
from lconvert.validators.logits import windows
from lconvert.validators.proof import builtin_text
from lconvert.validators.runtimes import open_runtime
from lconvert.validators.runtimes.hf import reference_tokenizer
model, artifact, text, count = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], int(sys.argv[4])
source = lconvert.read(model)
corpus = Path(text).read_text() if text else builtin_text()
ids = list(reference_tokenizer(source.tokenizer).encode(corpus, add_special_tokens=False).ids)
bos = source.tokenizer.special.get("bos", (None,))[0]
texts = windows(ids, min(512, source.arch.context), bos, count)
for name, path in (("transformers", model), ("llama.cpp", artifact)):
    runtime = open_runtime(name, path)
    for ids in texts:
        runtime.logits(ids)
    runtime.close()
print(sum(map(len, texts)), file=sys.stderr)
"""


def timed(command: list[str]) -> tuple[float, int, str]:
    """(seconds, peak RSS in bytes of the child, its stderr)."""
    code = (
        "import resource, subprocess, sys, json; p = subprocess.run(sys.argv[1:], stdout=subprocess.DEVNULL, "
        "stderr=subprocess.PIPE, text=True); "
        "print(json.dumps([p.returncode, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024, p.stderr]))"
    )
    start = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", code, *command], capture_output=True, text=True, check=True)
    seconds = time.perf_counter() - start
    returncode, peak, stderr = json.loads(done.stdout)
    if returncode:
        raise SystemExit(stderr)
    return seconds, peak, stderr


def main() -> None:
    arguments = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    arguments.add_argument("model", nargs="?", type=Path, default=HERE.parent / "examples" / "demo_model")
    arguments.add_argument("--text", type=Path)
    arguments.add_argument("--type", default="Q4_K_M")
    arguments.add_argument("--windows", type=int, default=8)
    options = arguments.parse_args()
    text = [] if options.text is None else ["--text", str(options.text)]
    with tempfile.TemporaryDirectory() as folder:
        path = lconvert.convert(options.model, Path(folder) / "m.gguf", ftype=options.type).paths[0]

        def validate(count: int, cache: list[str]) -> list[str]:
            call = [sys.executable, "-P", "-m", "lconvert", "validate", str(options.model), str(path), *text]
            return [*call, "--windows", str(count), *cache]

        alone = [sys.executable, "-P", "-c", _ALONE, str(options.model), str(path), str(options.text or "")]
        cache = ["--cache", str(Path(folder) / "cache")]
        rows = [
            ("both runtimes alone", [*alone, str(options.windows)]),
            ("validate, nothing cached", validate(options.windows, ["--no-cache"])),
            ("validate, structure and tensors only", [*validate(1, ["--no-cache"]), "--tier", "tensors"]),
            ("validate, filling the cache", validate(options.windows, cache)),
            ("validate, reference logits cached", validate(options.windows, cache)),
            ("validate, four times the windows", validate(4 * options.windows, ["--no-cache"])),
        ]
        print("| | seconds | peak RSS, MB |")
        print("|---|---|---|")
        for name, command in rows:
            seconds, peak, stderr = timed(command)
            tokens = f" ({stderr.split()[-1]} tokens)" if name.startswith("both") else ""
            print(f"| {name}{tokens} | {seconds:.1f} | {peak / 1e6:.0f} |", flush=True)


if __name__ == "__main__":
    main()
