"""What one choice does to a model, in the style of plots.py: curves over the choice, or points side by side.

Rows have series, x and kld_mean, and where it is known kld_ci (low, high). An x that is text is a place of its own, in the order in which
they come; numbers stand where they belong. A KLD of 0 has no place on a log axis and is left out: the table beside the plot has it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lconvert.validators import plots

Rows = Sequence[Mapping[str, Any]]
_KLD = "mean KL divergence, nats"


def curves(rows: Rows, x: str) -> Any:
    """A curve per series with its 95% interval as a band; a series of one row is a line across. Rows that have a type are named by it."""
    with plots._drawing(4.2) as (figure, axes):
        places = _places(rows)
        drawn = [r for r in rows if r["kld_mean"] > 0]
        series = _grouped(rows)
        for n, (name, every) in enumerate(series.items()):
            style, found = plots._style(n), [r for r in every if r in drawn]
            if len(every) == 1:
                axes.axhline(every[0]["kld_mean"], label=plots._text(name), linewidth=1.4, **style)
                continue
            at = [_at(r, places) for r in found]
            marker = {"marker": plots._marker(n), "markersize": 4.5}
            axes.plot(at, [r["kld_mean"] for r in found], label=plots._text(name), **style, **marker)
            if all(r.get("kld_ci") for r in found):
                low, high = zip(*(r["kld_ci"] for r in found), strict=True)
                axes.fill_between(at, low, high, color=style["color"], alpha=0.1, linewidth=0)
        for n, r in enumerate(
            r for r in drawn if "type" in r
        ):  # on both sides in turn: neighbours may be close
            offset, align = ((5, 5), "left") if n % 2 == 0 else ((-4, -12), "right")
            plots._label(
                axes, _at(r, places), r["kld_mean"], r["type"], plots.COLOURS["muted"], offset, align
            )
        if places:
            axes.set_xticks(list(places.values()), [plots._text(p) for p in places])
        plots._log(axes, [r["kld_mean"] for r in drawn])
        plots._name(axes, x, _KLD, legend=len(series) > 1)
        return figure


def points(rows: Rows) -> Any:
    """A stripe of the plot per x, in it a point with its 95% interval for each of its rows, one below the other; the KLD on a log axis."""
    series, names = _grouped(rows), list(dict.fromkeys(str(r["x"]) for r in rows))
    stripes = {name: [r for r in rows if str(r["x"]) == name] for name in names}
    with plots._drawing(1.3 + 0.17 * len(rows) + 0.17 * len(names) + 0.25 * len(series)) as (figure, axes):
        at, middles, edges = 0.0, [], []
        for found in stripes.values():
            middles.append(at + (len(found) - 1) / 2)
            for r in sorted(found, key=lambda r: list(series).index(str(r["series"]))):
                _point(axes, r, at, list(series).index(str(r["series"])))
                at += 1
            edges.append(at)
            at += 1
        for n, name in enumerate(series):
            shape = {"marker": plots._marker(n), "markersize": 5.5, "color": plots._style(n)["color"]}
            axes.plot([], [], linestyle="", label=plots._text(name), **shape)
        for edge in edges[:-1]:
            axes.axhline(edge, color=plots.COLOURS["line"], linewidth=0.8)
        axes.set_xscale("log")
        plots._ticks(axes.xaxis)
        axes.grid(visible=False, axis="y")
        axes.set_yticks(middles, [plots._text(n) for n in names])
        axes.tick_params(axis="y", length=0)
        axes.set_ylim(edges[-1], -1)
        plots._name(axes, _KLD, "", legend=len(series) > 1)
        return figure


def _point(axes: Any, row: Mapping[str, Any], at: float, n: int) -> None:
    middle = row["kld_mean"]
    if middle <= 0:
        return
    low, high = row.get("kld_ci") or (middle, middle)
    spread = [[max(0.0, middle - low)], [max(0.0, high - middle)]]
    axes.errorbar(
        [middle], [at], xerr=spread, linestyle="", marker=plots._marker(n), markersize=5.5, capsize=2.5,
        color=plots._style(n)["color"], elinewidth=1.2,
    )  # fmt: skip


def _grouped(rows: Rows) -> dict[str, list[Mapping[str, Any]]]:
    """By series, in the order in which they come."""
    found: dict[str, list[Mapping[str, Any]]] = {}
    for r in rows:
        found.setdefault(str(r["series"]), []).append(r)
    return found


def _places(rows: Rows) -> dict[str, int]:
    """Where values of x stand that are text."""
    return {x: n for n, x in enumerate(dict.fromkeys(r["x"] for r in rows if isinstance(r["x"], str)))}


def _at(row: Mapping[str, Any], places: Mapping[str, int]) -> float:
    return places[row["x"]] if isinstance(row["x"], str) else float(row["x"])
