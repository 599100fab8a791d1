"""Methods against each other: mean KLD over bits per weight, in the style of plots.py. Colour says who, marker says which method."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lconvert.validators import plots

_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")


def methods(rows: Sequence[Mapping[str, Any]], curve: Sequence[Mapping[str, Any]], curve_name: str) -> Any:
    """Rows have bits_per_weight, kld_mean, maker and method; those of `curve` have `type` for maker and method, and are joined."""
    with plots._drawing(5.4) as (figure, axes):
        makers = list(dict.fromkeys(r["maker"] for r in rows))
        names = list(dict.fromkeys(r["method"] for r in rows))
        line = sorted(curve, key=lambda r: float(r["bits_per_weight"]))
        x, y = [r["bits_per_weight"] for r in line], [r["kld_mean"] for r in line]
        axes.plot(
            x, y, color=plots.COLOURS["muted"], marker="o", markersize=3.5, linewidth=1.2, label=curve_name
        )
        sides: tuple[tuple[tuple[int, int], str], ...] = (((5, 4), "left"), ((-5, -12), "right"))
        for n, (a, b, r) in enumerate(zip(x, y, line, strict=True)):  # neighbours on either side of the line
            plots._label(axes, a, b, r["type"], plots.COLOURS["muted"], *sides[n % 2])
        for r in rows:
            n = makers.index(r["maker"])
            axes.plot(
                [r["bits_per_weight"]], [r["kld_mean"]], linestyle="", color=plots._style(n)["color"], markersize=6.5, alpha=0.85,
                marker=_MARKERS[names.index(r["method"]) % len(_MARKERS)], markeredgecolor=plots.COLOURS["paper"],
            )  # fmt: skip
        for n, maker in enumerate(makers):
            axes.plot(
                [], [], linestyle="-", linewidth=5, color=plots._style(n)["color"], label=plots._text(maker)
            )
        for n, name in enumerate(names):
            marker = _MARKERS[n % len(_MARKERS)]
            axes.plot(
                [], [], linestyle="", marker=marker, color=plots.COLOURS["ink"], label=plots._text(name)
            )
        axes.set_xscale("log", base=2)
        sizes = [v for v in (2, 2.5, 3, 3.5, 4, 4.5, 5, 6, 7, 8) if min(x, default=2) * 0.8 < v]
        axes.set_xticks(sizes, [f"{v:g}" for v in sizes])
        axes.xaxis.minorticks_off()
        plots._log(axes, [r["kld_mean"] for r in (*rows, *line)])
        plots._name(axes, "bits per weight of the matrices", "mean KL divergence, nats", legend=True)
        return figure
