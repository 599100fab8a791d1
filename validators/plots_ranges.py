"""What int8 makes of a model, in the style of plots.py: histograms with the ranges that observers chose, errors of weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from lconvert.errors import MissingPackageError
from lconvert.validators import plots

if TYPE_CHECKING:
    from lconvert.passes.observers import Histogram

_COLUMNS, _WIDTH, _HEIGHT = 3, 3.6, 2.3  # inches
_SHOWN = 128  # bars of a panel


def ranges(panels: Sequence[tuple[str, Histogram, Mapping[str, tuple[float, float]]]]) -> Any:
    """A panel for each (role, histogram, observer -> (low, high)): counts on a log axis, cuts as vertical lines.

    Ends that coincide with the histogram's own lie on the frame of its bars.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise MissingPackageError("matplotlib is not installed: pip install 'lconvert[report]'") from None
    rows = max(1, -(-len(panels) // _COLUMNS))
    with plots._settings(""):
        figure = Figure(figsize=(_COLUMNS * _WIDTH, rows * _HEIGHT + 0.4), layout="constrained")
        grid = figure.subplots(rows, _COLUMNS, squeeze=False)
        for axes in grid.reshape(-1)[len(panels) :]:
            axes.set_axis_off()
        for axes, (role, h, cuts) in zip(grid.reshape(-1), panels, strict=False):
            step = max(1, len(h.counts) // _SHOWN)
            counts, edges = h.counts.reshape(-1, step).sum(1), h.edges[::step]
            axes.stairs(counts, edges, fill=True, color=plots.COLOURS["muted"], alpha=0.35, linewidth=0)
            axes.set_yscale("log")
            plots._ticks(axes.yaxis)
            for n, (observer, ends) in enumerate(cuts.items()):
                for k, end in enumerate(ends):
                    axes.axvline(end, label=observer if not k else None, linewidth=1.3, **plots._style(n))
            axes.set_title(plots._text(role), fontsize=9.5)
            axes.tick_params(labelsize=8)
        handles, labels = grid[0][0].get_legend_handles_labels()
        if labels:
            figure.legend(handles, labels, loc="outside upper left", ncols=len(labels))
        return figure


def weights(names: Sequence[str], errors: Sequence[tuple[str, Sequence[float]]]) -> Any:
    """Relative RMS error of every weight, in percent: one bar for each (label, error by name)."""
    width = 0.8 / max(1, len(errors))
    with plots._drawing(0.9 + 0.28 * len(names)) as (figure, axes):
        places = range(len(names))
        for n, (label, values) in enumerate(errors):
            at = [p + (n - (len(errors) - 1) / 2) * width for p in places]
            shown = [100 * v for v in values]
            axes.barh(at, shown, width, color=plots._style(n)["color"], label=plots._text(label))
        axes.set_yticks(list(places), [plots._text(n) for n in names])
        axes.tick_params(axis="y", labelsize=8)
        axes.invert_yaxis()
        plots._name(axes, "relative RMS error of the weight, %", "", legend=True)
        return figure
