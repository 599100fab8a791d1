"""Speed of the quantisation kernels against ggml's, one thread each, in the same process.

    PYTHONPATH=src python benchmarks/kernels.py [--types Q4_K,Q6_K] [--isas avx512,avx2] [--rounds 5] [--json out.json]

Every type that both sides have is timed without importance weights (where ggml allows that) and with them, on every
instruction set that runs here. ggml and the instruction sets take turns and the best time of each counts, so that other
load on the machine disturbs them alike. The bytes are compared as well: a fast kernel that differs is reported.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lconvert import kernels
from lconvert.kernels.reference import FAMILY

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from tests import ggml_oracle

COLS = 4096
MOST_ROWS = 4096  # 64 MB of float32, beyond every cache


def seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def rows_for(type: str, weights: NDArray[np.float32] | None, budget: float) -> int:
    """Rows of COLS values that ggml quantises in about `budget` seconds."""
    x = np.random.default_rng(0).standard_normal((1, COLS)).astype(np.float32)
    one = min(seconds(lambda: ggml_oracle.quantize(type, x, weights)) for _ in range(2))
    return min(MOST_ROWS, max(1, int(budget / one)))


def measure(type: str, weighted: bool, isas: list[str], rounds: int, budget: float) -> dict[str, Any]:
    """Best Mvalues/s of ggml and of each instruction set."""
    rng = np.random.default_rng(1)
    weights = rng.random(COLS).astype(np.float32) + np.float32(0.01) if weighted else None
    rows = rows_for(type, weights, budget)
    x = rng.standard_normal((rows, COLS)).astype(np.float32)
    expected = np.zeros((rows, kernels.BLOCKS[type].row_bytes(COLS)), np.uint8)
    out = np.zeros_like(expected)
    best: dict[str, float] = {}
    equal = True
    for _ in range(rounds):
        taken = seconds(lambda: ggml_oracle.quantize(type, x, weights, expected))
        best["ggml"] = min(best.get("ggml", taken), taken)
        for isa in isas:
            taken = seconds(lambda isa=isa: kernels.quantize(type, x, weights=weights, isa=isa, out=out))  # type: ignore[misc]
            best[isa] = min(best.get(isa, taken), taken)
            equal &= np.array_equal(out, expected)
    speed = {name: x.size / taken / 1e6 for name, taken in best.items()}
    return {
        "type": type,
        "weighted": weighted,
        "values": x.size,
        "equal": equal,
        "mvalues_per_s": {name: round(value, 1) for name, value in speed.items()},
        "ratio": {isa: round(speed[isa] / speed["ggml"], 2) for isa in isas},
    }


def cases(types: list[str]) -> Iterator[tuple[str, bool]]:
    for type in types:
        if not ggml_oracle.requires_weights(type):
            yield type, False
        if FAMILY[type] != "float":
            yield type, True


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--types", default=",".join(FAMILY), help="comma-separated, default: all")
    parser.add_argument("--isas", default=",".join(i for i in kernels.isas() if i != "reference"))
    parser.add_argument("--rounds", type=int, default=5, help="turns of every contender (default 5)")
    parser.add_argument("--budget", type=float, default=0.2, help="seconds of ggml per turn (default 0.2)")
    parser.add_argument("--json", type=Path, help="also write the numbers there")
    options = parser.parse_args()
    if ggml_oracle.MISSING is not None:
        sys.exit(ggml_oracle.MISSING)

    isas = options.isas.split(",")
    print(
        f"{'type':8} {'weights':7} {'ggml':>7}  "
        + "  ".join(f"{isa:>15}" for isa in isas)
        + "   Mvalues/s (ratio)"
    )
    results = []
    for type, weighted in cases(options.types.split(",")):
        result = measure(type, weighted, isas, options.rounds, options.budget)
        results.append(result)
        speed, ratio = result["mvalues_per_s"], result["ratio"]
        columns = "  ".join(f"{speed[isa]:8.1f} ({ratio[isa]:4.1f})" for isa in isas)
        verdict = "" if result["equal"] else "   BYTES DIFFER"
        print(
            f"{type:8} {'yes' if weighted else 'no':7} {speed['ggml']:7.1f}  {columns}{verdict}", flush=True
        )
    if options.json:
        report = {"machine": platform.processor() or platform.machine(), "cols": COLS, "results": results}
        options.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
