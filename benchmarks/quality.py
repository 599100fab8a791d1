"""Quality against size: every model in every type, converted, validated, and drawn as one plot.

python -P benchmarks/quality.py MODEL... [--text FILE] [--plot docs/quality.svg] [--json FILE]

Prints a Markdown table: bits per weight, mean KLD against transformers in fp32 with its 95% interval, 99.9% KLD, same top-1,
perplexity ratio, and the verdict of `lconvert validate` with its default gates.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import lconvert
from lconvert.validators import plots

TYPES = ("Q8_0", "Q6_K", "Q5_K_M", "Q4_K_M", "Q3_K_M", "Q2_K")


def measure(model: Path, type_: str, text: Path | None, windows: int, work: Path) -> dict[str, Any]:
    path = lconvert.convert(model, work / f"{model.name}-{type_}.gguf", ftype=type_, force=True).paths[0]
    report = lconvert.validate(model, path, text=text, max_windows=windows)
    stats = report.stats()
    return {
        "model": model.name,
        "type": type_,
        "bits_per_weight": report.details["artifact"]["bits_per_weight"],
        "bytes": report.details["artifact"]["bytes"],
        "kld_mean": stats["kld"]["mean"],
        "kld_ci": stats["kld"]["mean_ci"],
        "kld_p999": stats["kld"]["p999"],
        "same_top1": stats["same_top1"],
        "ppl_ratio": stats["ppl"]["ratio"],
        "fidelity": report.stats("fidelity")["kld"]["mean"],
        "passed": report.passed,
        "failed": [f"{c.tier}: {c.name}: {c.value}" for c in report.checks if c.passed is False],
    }


def main() -> None:
    arguments = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    arguments.add_argument("models", nargs="+", type=Path)
    arguments.add_argument("--text", type=Path)
    arguments.add_argument("--windows", type=int, default=8)
    arguments.add_argument("--plot", type=Path)
    arguments.add_argument("--json", type=Path)
    options = arguments.parse_args()
    rows: list[dict[str, Any]] = []
    print("| model | type | bits | mean KLD (95% CI) | 99.9% | same top-1 | perplexity | |")
    print("|---|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as work:
        for model in options.models:
            for type_ in TYPES:
                r = measure(model, type_, options.text, options.windows, Path(work))
                rows.append(r)
                ci = f"{r['kld_ci'][0]:.2e} .. {r['kld_ci'][1]:.2e}"
                cells = [r["model"], type_, f"{r['bits_per_weight']:.2f}", f"{r['kld_mean']:.2e} ({ci})"]
                cells += [f"{r['kld_p999']:.2e}", f"{100 * r['same_top1']:.2f}%", f"x{r['ppl_ratio']:.4f}"]
                print(f"| {' | '.join([*cells, 'pass' if r['passed'] else 'FAIL'])} |", flush=True)
                for line in r["failed"]:
                    print(f"<!-- {line} -->")
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n")
    if options.plot:
        models = list(dict.fromkeys(r["model"] for r in rows))
        plots.save(plots.frontiers([(m, [r for r in rows if r["model"] == m]) for m in models]), options.plot)


if __name__ == "__main__":
    main()
