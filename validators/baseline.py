"""Against an earlier report of the same kind: what passed must still pass, and no figure may have become worse."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lconvert.errors import InputError, OptionError
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
    """A report of `lconvert validate --report`; OptionError for anything else."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except OSError as e:
        raise InputError(f"{path}: cannot be read ({e.strerror})") from None
    except (ValueError, RecursionError) as e:
        raise OptionError(f"{path}: is not JSON ({e})") from None
    if not isinstance(data, dict) or data.get("schema") != SCHEMA:
        found = data.get("schema") if isinstance(data, dict) else type(data).__name__
        raise OptionError(f"{path}: is {found!r}, not a report ({SCHEMA}); write one with validate --report")
    return data


def regressions(path: Path, proof: Proof) -> Iterator[Check]:
    """Checks of the tier "baseline"."""
    old = load(path)
    try:
        yield from _compared(old, proof)
    except (KeyError, TypeError, AttributeError) as e:
        raise OptionError(f"{path}: is not a complete report ({type(e).__name__}: {e})") from None


def _compared(old: dict[str, Any], proof: Proof) -> Iterator[Check]:
    settings = proof.details["settings"]
    for key in ("text", "context", "windows"):
        a, b = (s[key] if key != "text" else s[key]["sha256"] for s in (old["details"]["settings"], settings))
        if a != b:
            raise OptionError(f"the baseline was measured with another {key}: {a} there, {b} here")
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
        limit = a * factor + floor if up else a / factor - floor
        passed = b <= limit if up else b >= limit
        name = f"{row['measure']} ({row['runtime']}): {title}"
        sign = "<=" if up else ">="
        yield Check("baseline", name, f"{b:.4g}, {a:.4g} before", f"{sign} {limit:.4g}", passed, b, limit)


def _at(stats: Any, keys: tuple[str, ...]) -> float:
    for key in keys:
        stats = stats[key]
    return float(stats)
