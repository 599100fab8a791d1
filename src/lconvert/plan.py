"""A Plan says what is written where, from what, and with which verdict; `executor.execute` carries it out.

A plan is made from headers and side tensors only: every output tensor's type, offset and size is fixed
before any byte is written.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from . import __version__
from .fingerprint import Values
from .ir import Model

Kind = Literal["exact", "widened", "quantized", "rounded", "requantized", "refused"]

#: Verdicts, the most faithful first.
KINDS: tuple[Kind, ...] = ("exact", "widened", "quantized", "rounded", "requantized", "refused")


@dataclass(frozen=True)
class Verdict:
    """What happens to values on the way. `error` is the relative RMS error, None until measured."""

    kind: Kind
    reason: str = ""
    error: float | None = None

    def __str__(self) -> str:
        if self.kind in ("exact", "widened"):
            return self.kind
        if self.kind == "refused":
            return f"refused ({self.reason})"
        return f"{self.kind}({'?' if self.error is None else format(self.error, '.2e')})"


def worst(verdicts: Iterable[Verdict]) -> Verdict:
    """The least faithful of some verdicts, the first where several are."""
    return max(verdicts, key=lambda v: KINDS.index(v.kind))


@dataclass(frozen=True)
class Slab:
    """Bytes of some rows of an output tensor, with the squared error and the squared norm of what was measured."""

    data: Any  # a C-contiguous buffer
    squared_error: float = 0.0
    squared_norm: float = 0.0


#: Of a matrix that is rounded, one row of this many is compared with the source.
MEASURE_EVERY = 16
#: `held` of scales, zero points and shapes.
SIDE = "scales and shapes"


@dataclass(frozen=True)
class Item:
    """One tensor of the artifact. `produce(start, stop)` returns the Slab of these rows, from any thread.

    rule: why it has this type. held: for the codes of a quantized module, what they are ("int4, groups of 32"), and SIDE for
    its other tensors.
    """

    name: str
    type: str
    shape: tuple[int, ...]
    offset: int
    rows: int
    row_bytes: int
    source_row_bytes: int
    sources: tuple[str, ...]
    verdict: Verdict
    produce: Callable[[int, int], Slab] = field(repr=False, compare=False)
    rule: str = ""
    held: str = ""

    @property
    def nbytes(self) -> int:
        return self.rows * self.row_bytes


def known(name: str, type: str, array: Any, sources: tuple[str, ...], rule: str = "") -> Item:
    """The item of a small tensor whose numbers are known already: a NumPy array in the storage type of `type`."""
    data = array.tobytes()
    exact = Verdict("exact")
    return Item(
        name, type, array.shape, 0, 1, len(data), len(data), sources, exact, lambda a, b: Slab(data), rule
    )


def refused(name: str, shape: tuple[int, ...], roles: tuple[str, ...], verdict: Verdict) -> Item:
    """A tensor that the target cannot hold; a plan with one is not executed."""

    def produce(start: int, stop: int) -> Slab:
        raise AssertionError("a refused tensor is never produced")

    return Item(name, "-", shape, 0, 0, 0, 0, roles, verdict, produce)


@dataclass(frozen=True)
class FilePlan:
    """One file: its header bytes, then the items at their offsets with zeros between, `size` bytes in all."""

    name: str
    head: bytes = field(repr=False)
    items: tuple[Item, ...]
    size: int


@dataclass(frozen=True)
class Source:
    """A file that is read, with what identifies its state: size, mtime in ns, inode."""

    path: str
    stamp: tuple[int, int, int]


def sources(model: Model) -> tuple[Source, ...]:
    """The files behind a model, in the state in which their headers were read."""
    seen: dict[str, Source] = {}
    for entry in model.entries.values():
        for path, state in entry.data.files:
            seen.setdefault(path, Source(path, state))
    return tuple(seen.values())


@dataclass(frozen=True)
class Plan:
    """Everything that will be written. `losses` are the model-level verdicts. values: of a model whose weights methods have replaced,
    what its entries are, by role; the manifest keeps digests of them."""

    target: str
    files: tuple[FilePlan, ...]
    sources: tuple[Source, ...]
    options: Mapping[str, Any]
    losses: tuple[Verdict, ...] = ()
    notes: tuple[str, ...] = ()
    values: Mapping[str, Values] = field(default_factory=dict, repr=False, compare=False)

    @property
    def size(self) -> int:
        return sum(f.size for f in self.files)

    def items(self) -> Iterator[Item]:
        for f in self.files:
            yield from f.items

    def fingerprint(self) -> str:
        """Equal for two plans that write the same bytes from the same files."""
        h = hashlib.sha256()
        for f in self.files:
            h.update(f"{f.name} {f.size} ".encode() + hashlib.sha256(f.head).digest())
            for i in f.items:
                h.update(f"{i.name} {i.type} {i.shape} {i.offset} {i.sources}".encode())
        h.update(repr([(s.path, s.stamp) for s in self.sources]).encode())
        h.update(json.dumps(self.options, sort_keys=True, default=str).encode() + __version__.encode())
        return h.hexdigest()

    def to_json(self) -> dict[str, Any]:
        """The plan as plain data, for `--dry-run --json` and the manifest."""
        return {
            "target": self.target,
            "size": self.size,
            "options": dict(self.options),
            "losses": [asdict(v) for v in self.losses],
            "notes": list(self.notes),
            "files": [
                {
                    "name": f.name,
                    "size": f.size,
                    "tensors": [
                        {
                            "name": i.name,
                            "type": i.type,
                            "shape": list(i.shape),
                            "offset": i.offset,
                            "bytes": i.nbytes,
                            "sources": list(i.sources),
                            "rule": i.rule,
                            **({"held": i.held} if i.held else {}),
                            "verdict": {k: v for k, v in asdict(i.verdict).items() if v not in (None, "")},
                        }
                        for i in f.items
                    ],
                }
                for f in self.files
            ],
        }


def refusals(plan: Plan) -> list[str]:
    """Why this plan cannot be executed as it stands; empty when it can."""
    reasons: dict[str, list[str]] = {}
    for i in plan.items():
        if i.verdict.kind == "refused":
            reasons.setdefault(i.verdict.reason, []).append(i.name)
    more = {reason: f" (and {len(names) - 1} more)" if names[1:] else "" for reason, names in reasons.items()}
    out = [f"{names[0]}{more[reason]}: {reason}" for reason, names in reasons.items()]
    return out + [v.reason for v in plan.losses if v.kind == "refused"]


def manifest_path(out: Path) -> Path:
    return out.with_name(out.name + ".manifest.json")


def stamp(path: str | Path) -> tuple[int, int, int]:
    s = os.stat(path)
    return (s.st_size, s.st_mtime_ns, s.st_ino)
