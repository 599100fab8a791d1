"""Against an earlier report of the same kind: what passed must still pass, and no figure may have become worse."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from lconvert.errors import InputError, OptionError
from lconvert.validators import documents
from lconvert.validators.proof import Proof
from lconvert.validators.report import SCHEMA, Check

#: (figure in the statistics, how it is named, whether larger is worse)
_FIGURES: tuple[tuple[tuple[str, ...], str, bool], ...] = (
    (("kld", "mean"), "mean KLD", True),
    (("kld", "p99"), "99% KLD", True),
    (("same_top1",), "same top-1", False),
    (("ppl", "ratio"), "perplexity ratio", True),
)


def load(path: Path) -> dict[str, Any]:
    """A report of `lconvert validate --report`; InputError for anything else."""
    data = documents.load(path)
    details = data.get("details", {})
    text = details.get("settings", {}).get("text", {})
    if data["schema"] != SCHEMA or "sha256" not in text or details.get("artifact", {}).get("bytes") is None:
        raise InputError(f"{path}: is no report of a validation; write one with lconvert validate --report")
    return data


def comparable(old: dict[str, Any], settings: Mapping[str, Any]) -> None:
    """OptionError where `old` was measured with another text, another window or another number of them."""
    for key in ("text", "context", "windows"):
        a, b = (
            s.get(key) if key != "text" else s[key]["sha256"] for s in (old["details"]["settings"], settings)
        )
        if a != b:
            raise OptionError(f"the baseline was measured with another {key}: {a} there, {b} here")


def regressions(old: dict[str, Any], proof: Proof) -> Iterator[Check]:
    """Checks of the tier "baseline" against the report `old`, which is comparable."""
    passed = {(c["tier"], c["name"]): c["passed"] for c in old["checks"]}
    now = {(c.tier, c.name): c.passed for c in proof.checks}
    lost = [f"{t}: {n}" for (t, n), ok in passed.items() if ok and t != "baseline" and not now.get((t, n))]
    missing = (
        f"{len(lost)} no longer pass" if lost else f"all {sum(bool(v) for v in passed.values())} still pass"
    )
    yield Check("baseline", "checks that passed", missing, "0", not lost, len(lost), 0)
    for name in lost[:5]:
        proof.notes.append(f"passed in the baseline, does not now: {name}")
    rows = {(r["measure"], r["runtime"]): r["stats"] for r in proof.details.get("logits", [])}
    for row in old["details"].get("logits", []):
        new = rows.get((row["measure"], row["runtime"]))
        if new is None or row["measure"] == "stock":
            continue
        yield from _figures(
            row, new, float(proof.gates["baseline"]["factor"]), float(proof.gates["baseline"]["floor"])
        )
    before, after = old["details"]["artifact"]["bytes"], proof.details["artifact"]["bytes"]
    limit = before * float(proof.gates["baseline"]["factor"])
    value = f"{after} bytes, {before} before"
    yield Check("baseline", "size", value, f"<= {limit:.0f}", after <= limit, after, limit)


def _figures(row: dict[str, Any], new: dict[str, Any], factor: float, floor: float) -> Iterator[Check]:
    for keys, title, up in _FIGURES:
        a, b = _at(row["stats"], keys), _at(new, keys)
        if a is None or b is None:  # was not finite, or not measured: nothing to fall behind
            continue
        limit = a * factor + floor if up else a / factor - floor
        passed = b <= limit if up else b >= limit
        name = f"{row['measure']} ({row['runtime']}): {title}"
        sign = "<=" if up else ">="
        yield Check("baseline", name, f"{b:.4g}, {a:.4g} before", f"{sign} {limit:.4g}", passed, b, limit)


def _at(stats: Any, keys: tuple[str, ...]) -> float | None:
    for key in keys:
        stats = stats[key]
    return None if stats is None else float(stats)
