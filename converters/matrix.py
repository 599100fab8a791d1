"""The carry matrix: for a model, or for the general kinds of sources, what each target holds and why."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

from lconvert.converters import targets
from lconvert.errors import LconvertError
from lconvert.ir import Model
from lconvert.plan import KINDS, SIDE, Item, Kind


@dataclass(frozen=True)
class ClassVerdict:
    """What happens to one class of tensors (the same matrix in every layer and expert)."""

    tensors: str
    count: int
    held: str
    kind: Kind
    reason: str = ""

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


_CLASSES = (
    (r"kv\.\d+", "KV cache"),
    (r".*(norm|sinks).*", "norms"),
    (r".*\.bias", "biases"),
    (r"(pos_)?embed", "embedding"),
    (r"head", "head"),
    (r"layers\.\d+\.moe\.experts\.\d+\.(gate|up)", "experts gate, up"),
    (r"layers\.\d+\.moe\.experts\.\d+\.down", "experts down"),
    (r"layers\.\d+\.moe\.router.*", "router"),
    (r"layers\.\d+\.(?:mlp|moe\.shared)\.(gate|up)", "gate, up"),
    (r"layers\.\d+\.(?:mlp|moe\.shared)\.down", "down"),
    (r"layers\.\d+\.attn\.o", "o"),
    (r"layers\.\d+\.attn\..*", "q, k, v"),
)


_SIDE = re.compile(r"\.(codes|scale|zero|offset|g_idx|activation|transform)(\..*)?$")


def class_of(role: str) -> str:
    """The class that a canonical role belongs to."""
    plain = _SIDE.sub("", role)
    return next((name for pattern, name in _CLASSES if re.fullmatch(pattern, plain)), "other")


def verdicts(model: Model, target: str, **options: Any) -> list[ClassVerdict]:
    """Per class of tensors, the worst verdict and its reason; one line "all" where the target refuses the whole model."""
    try:
        plan = targets.plan(model, target, "model.gguf" if target == "gguf" else "model", **options)
    except LconvertError as e:
        return [ClassVerdict("all", len(model.entries), "", "refused", str(e))]
    found: dict[str, list[Item]] = {}
    for item in plan.items():
        if item.sources and item.sources != ("traits",):
            found.setdefault(class_of(item.sources[0]), []).append(item)
    out = []
    for name in dict.fromkeys([c for _, c in _CLASSES if c in found] + list(found)):
        items = found[name]
        worst = max(items, key=lambda i: KINDS.index(i.verdict.kind))
        main = [i for i in items if not _is_side(i)] or items
        held = ", ".join(dict.fromkeys(i.held or i.type for i in main))
        out.append(
            ClassVerdict(
                name, len({i.sources for i in items}), held, worst.verdict.kind, worst.verdict.reason
            )
        )
    return out


def _is_side(item: Item) -> bool:
    return item.held == SIDE or item.name.endswith(".scale")


def cell(model: Model, target: str) -> ClassVerdict:
    """The worst verdict of the matrices inside the layers: what becomes of everything else is the same for all sources."""
    found = verdicts(model, target)
    inside = [v for v in found if v.tensors in _INSIDE] or found
    return max(inside, key=lambda v: KINDS.index(v.kind))


_INSIDE = ("q, k, v", "o", "gate, up", "down", "experts gate, up", "experts down", "KV cache")


def table(names: Iterable[str]) -> dict[str, dict[str, ClassVerdict]]:
    """The general matrix: what each kind of source meets at each target."""
    from lconvert.converters import kinds

    listed = list(names)
    out = {}
    for kind, make in kinds.KINDS.items():
        model = make()
        out[kind] = {t: cell(model, t) for t in listed}
    return out
