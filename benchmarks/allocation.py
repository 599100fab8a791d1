"""Allocation against llama-quantize's mixtures at their own file sizes: mean KLD on a text that calibration never saw.

    python -P benchmarks/allocation.py MODEL --calibrate CALIB.txt --text TEST.txt [--sensitivity imatrix] [--json OUT]

Per file type: the stock mixture as llama-quantize writes it, the same with importances of the calibration text, the same types rounded by
other methods (--methods), and our choice at the size of that file to the byte, from the types that stock K-quant mixtures use and from all
of them, rounded to nearest with importances and by those methods. Everything is dequantized and run in fp32.
"""

from __future__ import annotations

import argparse
import json
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import lconvert
from lconvert.archs import find
from lconvert.cli.allocating import recipe as allocated
from lconvert.converters import gguf_grids, gguf_names, methods
from lconvert.ir import Model
from lconvert.kernels.qtensor import effective
from lconvert.passes import allocate
from lconvert.primitives.job import Calibration, Job
from lconvert.primitives.placement import TABLES
from lconvert.primitives.probe import Probe
from lconvert.primitives.text import windows
from lconvert.recipe import Recipe

K_QUANTS = ("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "Q8_0")


def stock_types(model: Model, ftype: str) -> tuple[dict[str, str], int]:
    """Types by role of a stock mixture, and the size of its file."""
    plan = lconvert.plan_gguf(model, "stock.gguf", ftype=ftype)
    held = {s.name: s.roles for s in gguf_names.layout(find(model.arch.family), model.decoder)}
    types = {
        r: i.type for i in plan.items() for r in held.get(i.name, ()) if i.type not in ("F32", "F16", "BF16")
    }
    return types, plan.size


def overhead(model: Model) -> int:
    """Bytes of the file that are no tensors."""
    plan = lconvert.plan_gguf(model, "dense.gguf", ftype="Q8_0")
    return plan.size - sum(-(-i.nbytes // 32) * 32 for i in plan.items())


def rounded(model: Model, recipe: Recipe, job: Job) -> dict[str, Any]:
    """Values of what a recipe changes, by role."""
    made = recipe.apply(model, job)
    return {r: effective(e) for r, e in made.entries.items() if e.data is not model.entries[r].data}


def _short(more: dict[str, Any]) -> str:
    if "types" not in more:
        return ""
    types = Counter(more["types"].values())
    ends = {r: more["types"][r] for r in ("embed", "head") if r in more["types"]}
    return (
        f"predicted {more['predicted']:.5f}, on calibration {more['calibration']:.5f}, {dict(types)}, {ends}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model")
    parser.add_argument("--calibrate", required=True)
    parser.add_argument("--text", required=True)
    parser.add_argument("--windows", type=int, default=32, help="of 256 tokens, that are evaluated")
    parser.add_argument("--sensitivity", default="imatrix")
    parser.add_argument("--calibration-windows", type=int, default=16)
    parser.add_argument("--refine", type=int, default=0)
    parser.add_argument("--methods", nargs="*", default=["gptq", "gptaq"])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--types", nargs="*", default=["Q4_K_M", "Q3_K_M", "Q2_K"])
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()

    model = lconvert.read(args.model)
    job = Job(Calibration(args.calibrate, args.windows, 512), threads=args.threads)
    test = Probe(model, windows(model, Calibration(args.text, args.windows, 256)).ids)
    head = overhead(model)

    options = allocate.Options(
        "gguf",
        bpw=16,
        sensitivity=args.sensitivity,
        windows=args.calibration_windows,
        refine=args.refine,
    )
    start = time.perf_counter()
    first = allocate.Search(model, options, job)
    print(f"losses of all options: {time.perf_counter() - start:.0f} s", flush=True)
    every = first.items
    kept = [replace(i, options=tuple(o for o in i.options if o.name in K_QUANTS)) for i in every]
    ours = {"allocated, all types": every, "allocated, K-quants": kept}
    plain = allocate.Rounding(model, {})
    rows: list[dict[str, Any]] = []

    def row(ftype: str, what: str, size: int, kld: float, **more: Any) -> None:
        rows.append({"type": ftype, "label": what, "size": size, "kld_mean": kld, **more})
        print(f"{ftype:8} {what:32} {size:>10} {kld:.5f}  {_short(more)}", flush=True)

    for ftype in args.types:
        types, size = stock_types(model, ftype)
        row(ftype, "stock", size, test.kld({r: plain.values(r, t) for r, t in types.items()}))
        row(
            ftype,
            "stock + imatrix",
            size,
            test.kld({r: first.rounding.values(r, t) for r, t in types.items()}),
        )
        for method in args.methods:
            lowering = lconvert.api.gguf_options(ftype=ftype)
            made = gguf_grids.recipe(method, model, lowering, args.calibrate)
            tables = {r: first.rounding.values(r, t) for r, t in types.items() if r in TABLES}
            row(ftype, f"stock types, {method}", size, test.kld(tables | rounded(model, made, job)))
        for what, items in ours.items():
            first.items = items
            found = first.outcome(size - head - first.menu.fixed)
            names = found.allocation.names()
            chosen = {r: names[i.name] for i in items for r in i.members}
            kld = test.kld({r: first.values(r, t) for r, t in chosen.items()})
            said = {"predicted": found.allocation.loss, "calibration": found.measured, "types": names}
            row(ftype, what, found.size + head, kld, **said)
            for method in args.methods:
                made = methods.applied(method, allocated(first, found), args.calibrate)
                row(ftype, f"{what}, {method}", found.size + head, test.kld(rounded(model, made, job)))
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
