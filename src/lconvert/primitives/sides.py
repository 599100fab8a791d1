"""What stands beside codes: scales, zero points and minima of every group, as tensors, and as the format keeps them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from lconvert.forward import packages


@dataclass(frozen=True)
class Sides:
    """Of every group (rows, groups): scale, zero and offset as they act, fp32; `stored`: what the format keeps, by name."""

    scale: Any
    zero: Any = None
    offset: Any = None
    stored: dict[str, Any] = field(default_factory=dict)

    def columns(self, start: int, stop: int) -> Sides:
        """Groups start..stop alone; what is stored is left out."""

        def cut(x: Any) -> Any:
            return None if x is None else x[:, start:stop]

        return Sides(cut(self.scale), cut(self.zero), cut(self.offset))


def joined(parts: list[Sides]) -> Sides:
    """Sides of spans that lie side by side."""
    torch, _ = packages()

    def cat(found: list[Any]) -> Any:
        return None if found[0] is None else torch.cat(found, 1)

    stored = {k: cat([p.stored[k] for p in parts]) for k in parts[0].stored}
    return Sides(
        cat([p.scale for p in parts]), cat([p.zero for p in parts]), cat([p.offset for p in parts]), stored
    )


def picked(first: Any, yes: tuple[Any, Sides], no: tuple[Any, Sides]) -> tuple[Any, Sides]:
    """Positions and sides of `yes` for the rows where `first` (rows,) holds, else of `no`."""
    torch, _ = packages()
    pick = first.unsqueeze(-1)

    def of(a: Any, b: Any) -> Any:
        return None if a is None else torch.where(pick, a, b)

    (p, s), (q, t) = yes, no
    stored = {k: of(v, t.stored[k]) for k, v in s.stored.items()}
    return of(p, q), Sides(of(s.scale, t.scale), of(s.zero, t.zero), of(s.offset, t.offset), stored)
