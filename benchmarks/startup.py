"""Start-up: `lconvert --help` and `--version` against a bare interpreter, wall seconds, best and median of several runs."""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from pathlib import Path

RUNS = 7


def seconds(command: list[str]) -> list[float]:
    out = []
    for _ in range(RUNS):
        start = time.perf_counter()
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        out.append(time.perf_counter() - start)
    return out


def main() -> None:
    lconvert = str(Path(sys.executable).parent / "lconvert")
    commands = {
        "python -c pass": [sys.executable, "-c", "pass"],
        "python -c 'import click'": [sys.executable, "-c", "import click"],
        "lconvert --version": [lconvert, "--version"],
        "lconvert --help": [lconvert, "--help"],
        "lconvert hf-to-gguf --help": [lconvert, "hf-to-gguf", "--help"],
        "python -c 'import gguf'": [sys.executable, "-P", "-c", "import gguf"],
    }
    print(f"{'command':30} {'best':>8} {'median':>8}   (s, {RUNS} runs)")
    for name, command in commands.items():
        found = seconds(command)
        print(f"{name:30} {min(found):8.3f} {statistics.median(found):8.3f}")


if __name__ == "__main__":
    main()
