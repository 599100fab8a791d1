"""The mutation score: planted faults that the default gates catch, and good artifacts that they accuse. Prints the README's table.

    python -P benchmarks/mutation_score.py [--redraw N] [--json OUT]

The faults and the good artifacts are those of tests/faults, validated with all tiers (two windows of 128 tokens each).
--redraw adds N to the seeds of the random models: the score must not depend on the draw. Exit code 1 if a fault survives, is
named by another tier than its own, or a good artifact is accused.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[1]))  # appended, so that no folder here hides a package
from tests.conftest import SHARED
from tests.faults.faults import EQUIVALENT, FAULTS, HIDDEN, PENDING, SHARED_FAULTS, Fault
from tests.faults.judge import judge, largest_difference, plant
from tests.faults.models import GOOD, Models, unseen


def row(*cells: object) -> None:
    print("| " + " | ".join(str(c).replace("|", "\\|").replace("\n", " ") for c in cells) + " |", flush=True)


def planted(models: Models, faults: tuple[Fault, ...], work: Path) -> list[dict[str, Any]]:
    row("fault", "model", "type", "caught by", "what it says")
    row(*["---"] * 5)
    out = []
    for number, fault in enumerate(faults):
        folder = work / str(number)
        folder.mkdir()
        found = judge(models, fault.model, plant(models, fault, folder))
        caught = found.tier == fault.tier and found.says(fault.says)
        name = fault.model + (" (unseen)" if unseen(fault.model) else "")
        row(
            fault.name,
            name,
            fault.type,
            found.tier if caught else f"**{found.tier or 'SURVIVED'}**",
            found.words,
        )
        out.append({"fault": fault.id, "expected": fault.tier, "tiers": found.tiers, "caught": caught})
    return out


def accused(models: Models) -> list[str]:
    out = []
    for model, type_ in GOOD:
        found = judge(models, model, models.artifact(model, type_))
        if found.tiers:
            out.append(f"{model} {type_}: {found.tier}: {found.words}")
    return out


def main() -> int:
    arguments = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    arguments.add_argument("--redraw", type=int, default=0)
    arguments.add_argument("--json", type=Path)
    options = arguments.parse_args()
    faults = FAULTS + (SHARED_FAULTS if SHARED.is_dir() else ())
    with tempfile.TemporaryDirectory() as work:
        models = Models(Path(work), options.redraw)
        rows = planted(models, faults, Path(work))
        alarms = accused(models)
        print("\nDamage that only the manifest's hash is sure to show, and what the gates say without it:\n")
        row("fault", "model", "type", "without a manifest")
        row(*["---"] * 4)
        for fault in HIDDEN:
            folder = Path(work) / f"hidden-{fault.id}"
            folder.mkdir()
            found = judge(models, fault.model, plant(models, replace(fault, manifest=None), folder))
            row(
                fault.name,
                fault.model,
                fault.type,
                f"{found.tier}: {found.words}" if found.tier else "nothing",
            )
        print("\nChanges that change nothing:\n")
        row("change", "model", "type", "max |delta logit| in llama.cpp")
        row(*["---"] * 4)
        for change in EQUIVALENT:
            folder = Path(work) / f"equivalent-{change.id}"
            folder.mkdir()
            bad = plant(models, change, folder)
            difference = largest_difference(models.artifact(change.model, change.type), bad)
            row(change.name, change.model, change.type, f"{difference:g}")
    if PENDING:
        print("\nPending, required with their format:\n")
    for name, format_ in PENDING:
        print(f"- {name} ({format_})")
    print(
        "\nFaults of ONNX graphs (masks, caches that grow and caches of fixed length, positions, rotary tables, nodes, packed weights, external data) are planted by\n"
        "tests/faults/graphs.py and judged by tests/test_onnx_faults.py."
    )
    caught = sum(r["caught"] for r in rows)
    fresh = sum(unseen(f.model) for f in faults)
    print(f"\n**caught: {caught} of {len(rows)}** ({fresh} of them on models that no gate was set on)")
    print(f"**false alarms: {len(alarms)} of {len(GOOD)}** good artifacts")
    for line in alarms:
        print(f"- {line}")
    if options.json:
        options.json.write_text(json.dumps({"faults": rows, "alarms": alarms}, indent=1) + "\n")
    return 0 if caught == len(rows) and not alarms else 1


if __name__ == "__main__":
    sys.exit(main())
