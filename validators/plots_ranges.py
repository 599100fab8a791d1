"""What int8 makes of a model, in the style of plots.py: histograms with the ranges that observers chose, errors of weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from lconvert.errors import MissingPackageError
from lconvert.validators import plots

if TYPE_CHECKING:
    from lconvert.passes.observers import Histogram

_COLUMNS, _WIDTH, _HEIGHT = 3, 3.6, 2.5  # inches
_SHOWN = 128  # bars of a panel
_LEAST = 0.7  # where the log axis of counts begins, below a bar of one value
_SPANS = 0.32  # share of a panel's height that the ranges have above the bars


def ranges(panels: Sequence[tuple[str, Histogram, Mapping[str, tuple[float, float]]]]) -> Any:
    """A panel for each (role, histogram, observer -> (low, high)): counts on a log axis, and above them the range of each observer
    from its low to its high end, one below the other, so that equal ones do not hide each other.
    """
    try:
        from matplotlib.figure import Figure
        from matplotlib.ticker import FixedLocator, MaxNLocator, NullLocator
    except ImportError:
        raise MissingPackageError("matplotlib is not installed: pip install 'lconvert[report]'") from None
    rows = max(1, -(-len(panels) // _COLUMNS))
    with plots._settings(""):
        figure = Figure(figsize=(_COLUMNS * _WIDTH, rows * _HEIGHT + 0.8), layout="constrained")
        grid = figure.subplots(rows, _COLUMNS, squeeze=False)
        for axes in grid.reshape(-1)[len(panels) :]:
            axes.set_axis_off()
        for axes, (role, h, cuts) in zip(grid.reshape(-1), panels, strict=False):
            step = max(1, len(h.counts) // _SHOWN)
            counts, edges = h.counts.reshape(-1, step).sum(1), h.edges[::step]
            bars = {"color": plots.COLOURS["muted"], "alpha": 0.35, "linewidth": 0, "baseline": _LEAST}
            axes.stairs(counts, edges, fill=True, **bars)
            axes.set_yscale("log")
            top = 2 * max(1, int(counts.max()))
            axes.set_ylim(_LEAST, _LEAST * (top / _LEAST) ** (1 / (1 - _SPANS)))
            for n, (observer, ends) in enumerate(cuts.items()):
                at = 1 - _SPANS * (n + 0.6) / len(cuts)
                style = {**plots._style(n), "transform": axes.get_xaxis_transform()}
                axes.plot(ends, (at, at), label=observer, linewidth=1.6, **style)
                style["linestyle"] = ""
                axes.plot(ends, (at, at), marker="|", markersize=8, markeredgewidth=1.8, **style)
            axes.set_title(plots._text(role), fontsize=10)
            axes.tick_params(labelsize=8)
            axes.xaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10]))
            powers = [10**n for n in range(20) if 10**n <= top]  # none where only ranges are
            axes.yaxis.set_major_locator(FixedLocator(powers))
            axes.yaxis.set_major_formatter("{x:,.0f}")
            axes.yaxis.set_minor_locator(NullLocator())
        figure.supxlabel("value of the input", fontsize=11)
        figure.supylabel("values per bin", fontsize=11)
        handles, labels = grid[0][0].get_legend_handles_labels()
        if labels:
            figure.legend(handles, labels, loc="outside upper left", ncols=len(labels), fontsize=11)
        return figure


def weights(names: Sequence[str], errors: Sequence[tuple[str, Sequence[float]]]) -> Any:
    """Relative RMS error of every weight, in percent: one bar for each (label, error by name)."""
    width = 0.8 / max(1, len(errors))
    with plots._drawing(1.1 + 0.28 * len(names)) as (figure, axes):
        places = range(len(names))
        for n, (label, values) in enumerate(errors):
            at = [p + (n - (len(errors) - 1) / 2) * width for p in places]
            shown = [100 * v for v in values]
            axes.barh(at, shown, width, color=plots._style(n)["color"], label=plots._text(label))
        axes.set_yticks(list(places), [plots._text(n) for n in names])
        axes.tick_params(axis="y", labelsize=9)
        axes.grid(visible=False, axis="y")
        axes.set_ylim(len(names) - 0.4, -0.6)
        plots._name(axes, "relative RMS error of the weight, %", "", legend=True)
        return figure
