"""The proof as data: checks against gates, and the figures behind them. docs/report.md describes its JSON form."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from typing import Any

from lconvert import __version__

SCHEMA = "lconvert.report/2"

#: tiers in the order in which they are run and printed
TIERS = ("structure", "tensors", "tokens", "logits")
#: run only when asked for
OPTIONAL_TIERS = ("layers",)


@dataclass(frozen=True)
class Check:
    """One line of the proof. `passed` is None for a figure that no gate judges.

    value and gate are for people; measured and limit are the same as numbers where there is one number.
    """

    tier: str
    name: str
    value: str
    gate: str
    passed: bool | None
    measured: float | None = None
    limit: float | None = None


@dataclass(frozen=True)
class Report:
    """The whole proof; `details` holds the full statistics."""

    reference: str
    candidate: str
    checks: tuple[Check, ...]
    not_proven: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    details: Mapping[str, Any] = field(default_factory=dict)
    missing_required: bool = False
    created: str = field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))

    @property
    def passed(self) -> bool:
        judged = [c.passed for c in self.checks if c.passed is not None]
        return bool(judged) and all(judged)

    @property
    def exit_code(self) -> int:
        """0 passed, 1 a gate failed (or nothing was judged), 3 a required runtime is missing."""
        if any(c.passed is False for c in self.checks):
            return 1
        if self.missing_required:
            return 3
        return 0 if self.passed else 1

    def stats(self, measure: str = "cost", runtime: str | None = None) -> Mapping[str, Any]:
        """The statistics of one comparison ("cost", "fidelity", "graph", "stock"), of one runtime or the first.

        KeyError where it was not made.
        """
        for row in self.details.get("logits", ()):
            if row["measure"] == measure and runtime in (None, row["runtime"]):
                found: Mapping[str, Any] = row["stats"]
                return found
        raise KeyError(f"{measure} was not measured" + (f" in {runtime}" if runtime else ""))

    def to_json(self) -> dict[str, Any]:
        return {
            "schema": SCHEMA,
            "lconvert": __version__,
            "created": self.created,
            "reference": self.reference,
            "candidate": self.candidate,
            "passed": self.passed,
            "exit_code": self.exit_code,
            "checks": [asdict(c) for c in self.checks],
            "not_proven": list(self.not_proven),
            "notes": list(self.notes),
            "details": dict(self.details),
        }
