"""The plots of a report, as SVG that takes its colours and its font from the page around it, or as PNG and SVG files.

A figure is drawn in the colours of the light theme. `svg` replaces each of them by a CSS variable of the page (`--ink`,
`--s1` ...), so that one drawing serves light, dark and print; `save` keeps them. Series differ in line style and marker as
well as in colour, and the colours keep their distance under the common forms of colour blindness. Nothing is rasterised, and
the same figures give the same bytes.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from lconvert.errors import MissingPackageError, OptionError
from lconvert.validators import show

#: CSS variable -> its colour in the light theme; report.css has both themes
COLOURS: Mapping[str, str] = {
    "ink": "#1b2027",
    "muted": "#5b6573",
    "line": "#d9dee5",
    "paper": "#fffffe",
    "s1": "#0b62a8",
    "s2": "#c2410c",
    "s3": "#0f7a5f",
    "s4": "#93418f",
    "s5": "#7a5c00",
    "s6": "#4a5a8a",
}
_SERIES = ("s1", "s2", "s3", "s4", "s5", "s6")
_LINES = ("-", (0, (5, 2)), (0, (1.5, 1.5)), (0, (6, 2, 1.5, 2)))
_MARKERS = ("o", "s", "^", "D", "v", "P")
_WIDTH, _HEIGHT = 5.4, 3.5  # inches; 72 units of the SVG each
_LEAST = 1e-14  # nats; what is drawn for zero on a log axis


@dataclass(frozen=True)
class Series:
    """One curve: its name in the legend, and x and y; None in y is a gap."""

    label: str
    x: Sequence[float]
    y: Sequence[float | None]


def available() -> bool:
    """Whether matplotlib can be imported."""
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError:
        return False
    return True


# --- figures --------------------------------------------------------------------------------------------------


def distribution(histograms: Sequence[tuple[str, Mapping[str, Any]]]) -> Any:
    """Share of tokens by their KLD: one outline for each (label, STATS.histogram)."""
    with _drawing() as (figure, axes):
        for n, (label, h) in enumerate(histograms):
            edges, counts = _bins(h)
            total = sum(counts) or 1
            width = (edges[-1] - edges[0]) / len(counts) if counts else 1.0
            heights = [
                100 * c / total * width / ((b - a) or 1)
                for (a, b), c in zip(pairwise(edges), counts, strict=True)
            ]
            if not counts:
                continue
            style = _style(n)
            axes.stairs(heights, edges, fill=True, color=style["color"], alpha=0.16, linewidth=0)
            axes.stairs(
                heights, edges, color=style["color"], linestyle=style["linestyle"], label=_text(label)
            )
        _powers(axes, _range([h for _, h in histograms]))
        axes.set_ylim(bottom=0)
        _name(axes, "KL divergence of a token, nats", "tokens per bin, %", legend=len(histograms) > 1)
        return figure


def survival(histograms: Sequence[tuple[str, Mapping[str, Any]]]) -> Any:
    """Share of tokens whose KLD is larger than x, both axes logarithmic: the tail, which a mean hides."""
    with _drawing() as (figure, axes):
        lowest = 1.0
        for n, (label, h) in enumerate(histograms):
            edges, counts = _bins(h)
            total = sum(counts) or 1
            above, left = [1.0] if edges else [], total
            for c in counts:
                left -= c
                above.append(left / total)
            points = [(x, y) for x, y in zip(edges, above, strict=True) if y > 0]
            lowest = min([lowest, *(y for _, y in points)])
            axes.plot(*zip(*points, strict=True), label=_text(label), **_style(n)) if points else None
        _powers(axes, _range([h for _, h in histograms]))
        axes.set_yscale("log")
        axes.set_ylim(lowest / 1.5, 1.5)
        _ticks(axes.yaxis, percent=True)
        _name(axes, "x: KL divergence, nats", "tokens above x", legend=len(histograms) > 1)
        return figure


def positions(series: Sequence[Series]) -> Any:
    """Mean KLD by position in the window."""
    with _drawing() as (figure, axes):
        _curves(axes, series, marker=True)
        _log(axes, [y for s in series for y in s.y])
        axes.set_xlim(left=0)
        _name(axes, "position in the window, tokens", "mean KL divergence, nats", legend=len(series) > 1)
        return figure


def layers(names: Sequence[str], series: Sequence[Series], broken: Sequence[int]) -> Any:
    """Errors by layer; x of the series are indices into `names`, `broken` the layers that are marked."""
    with _drawing() as (figure, axes):
        for n in broken:
            axes.axvspan(n - 0.5, n + 0.5, color=COLOURS["s2"], alpha=0.14, linewidth=0)
        if broken:
            axes.annotate(
                _text(f"first broken: {names[broken[0]]}"), (broken[0], 0.04), xycoords=("data", "axes fraction"),
                color=COLOURS["s2"], rotation=90, ha="center", fontsize=10,
            )  # fmt: skip
        _curves(axes, series, marker=len(names) <= 40)
        _log(axes, [y for s in series for y in s.y])
        step = max(1, -(-len(names) // 10))
        shown = [n for n in range(0, len(names), step) if n + step <= len(names) or n == len(names) - 1]
        axes.set_xticks(shown, [_text(names[n], 8) for n in shown])
        axes.set_xlim(-0.5, len(names) - 0.5)
        _name(axes, "layer", "relative error", legend=len(series) > 1)
        return figure


def lines(series: Sequence[Series], x: str, y: str) -> Any:
    """Curves over a few values of x, each of them a tick."""
    with _drawing() as (figure, axes):
        _curves(axes, series, marker=True)
        values = sorted({v for s in series for v in s.x})
        axes.set_xscale("symlog", base=2, linthresh=1)
        axes.set_xticks(values, [f"{v:g}" for v in values])
        axes.xaxis.minorticks_off()
        axes.set_ylim(bottom=0)
        _name(axes, x, y, legend=len(series) > 1)
        return figure


def quality(rows: Sequence[Mapping[str, Any]], stock_rows: Sequence[Mapping[str, Any]]) -> Any:
    """Mean KLD against bits per weight: `stock_rows` as the curve, `rows` as points on top of it.

    A row has bits_per_weight, kld_mean, and type or label as its name.
    """
    with _drawing() as (figure, axes):
        stock = sorted(filter(_drawable, stock_rows), key=lambda r: float(r["bits_per_weight"]))
        if stock:
            x, y = [r["bits_per_weight"] for r in stock], [max(r["kld_mean"], _LEAST) for r in stock]
            axes.plot(
                x, y, color=COLOURS["muted"], linestyle="-", marker="o", markersize=4, label="stock types"
            )
            for a, b, r in zip(x, y, stock, strict=True):
                _label(axes, a, b, r.get("type", ""), COLOURS["muted"], (5, 4), "left")
        for n, row in enumerate(filter(_drawable, rows)):
            a, b, style = row["bits_per_weight"], max(row["kld_mean"], _LEAST), _style(n)
            name = str(row.get("label") or row.get("type") or "")
            axes.plot(
                [a], [b], linestyle="", marker=_marker(n, ("*", *_MARKERS[1:])), markersize=13 if n % 6 == 0 else 8,
                color=style["color"], markeredgecolor=COLOURS["paper"], label=_text(name), zorder=5,
            )  # fmt: skip
        drawn = [r for r in (*stock, *filter(_drawable, rows))]
        _log(axes, [r["kld_mean"] for r in drawn])
        axes.margins(x=0.14, y=0.1)
        _name(axes, "bits per weight", "mean KL divergence, nats", legend=bool(rows))
        return figure


def frontiers(models: Sequence[tuple[str, Sequence[Mapping[str, Any]]]]) -> Any:
    """Mean KLD against bits per weight for several models, one curve each; the topmost names the types of its points, if any."""
    with _drawing(4.4) as (figure, axes):
        series = []
        for label, found in models:
            rows = sorted(filter(_drawable, found), key=lambda r: float(r["bits_per_weight"]))
            series.append(
                Series(
                    label,
                    [r["bits_per_weight"] for r in rows],
                    [max(r["kld_mean"], _LEAST) for r in rows],
                )
            )
        _curves(axes, series, marker=True)
        _log(axes, [y for s in series for y in s.y])
        top = max(models, key=lambda m: max(float(r["kld_mean"]) for r in m[1]))
        for row in filter(_drawable, top[1]):
            at = row["bits_per_weight"], max(row["kld_mean"], _LEAST)
            if row.get("type"):
                _label(axes, *at, row["type"], COLOURS["muted"], (5, 4), "left")
        axes.margins(x=0.1, y=0.1)
        _name(axes, "bits per weight", "mean KL divergence, nats", legend=len(models) > 1)
        return figure


def bars(rows: Sequence[tuple[str, Mapping[str, Any]]], unit: str, factor: float = 1.0) -> Any:
    """Medians as horizontal bars with the range of the repetitions; a row is (label, {median, min, max})."""
    kept = [(label, s) for label, s in rows if s.get("median") is not None]
    with _drawing(height=0.95 + 0.5 * max(len(kept), 1)) as (figure, axes):
        for n, (_, s) in enumerate(kept):
            middle = factor * s["median"]
            low, high = (factor * (s[k] if s.get(k) is not None else s["median"]) for k in ("min", "max"))
            axes.barh(n, middle, height=0.58, color=COLOURS["s1"], alpha=0.85, linewidth=0)
            spread = [[max(middle - low, 0)], [max(high - middle, 0)]]
            axes.errorbar([middle], [n], xerr=spread, color=COLOURS["ink"], capsize=3, linewidth=1.2)
            _label(axes, high, n, show.number(middle), COLOURS["ink"], (6, -4), "left")
        axes.set_yticks(range(len(kept)), [_text(label, 28) for label, _ in kept])
        axes.invert_yaxis()
        axes.margins(x=0.16)
        axes.set_xlim(left=0)
        axes.grid(False, axis="y")
        _name(axes, unit, "", legend=False)
        return figure


def reliability(series: Sequence[tuple[str, Sequence[Mapping[str, Any]]]]) -> Any:
    """Accuracy against confidence, one curve for each (label, bins); the diagonal is perfect calibration."""
    with _drawing() as (figure, axes):
        axes.plot([0, 1], [0, 1], color=COLOURS["muted"], linewidth=1, linestyle=(0, (1, 2)), label="perfect")
        curves = []
        for label, bins in series:
            full = [b for b in bins if b["count"] and b["confidence"] is not None]
            curves.append(Series(label, [b["confidence"] for b in full], [b["accuracy"] for b in full]))
        _curves(axes, curves, marker=True)
        axes.set_xlim(0, 1)
        axes.set_ylim(0, 1)
        _name(axes, "confidence", "accuracy", legend=True)
        return figure


# --- output ---------------------------------------------------------------------------------------------------


def svg(figure: Any, key: str, title: str, description: str) -> str:
    """The figure as an <svg> element for a page: `key` makes its ids unique there; title and description are for readers."""
    out = io.StringIO()
    with _settings(key):
        figure.savefig(out, format="svg", transparent=True, metadata=dict.fromkeys(_METADATA))
    text = out.getvalue()
    text = re.sub(r"<metadata>.*?</metadata>\s*", "", text[text.index("<svg") :], flags=re.DOTALL)
    head = re.search(r'<svg[^>]*viewBox="([^"]+)"[^>]*>', text)
    assert head is not None
    used = set(re.findall(r'(?:href="|url\()#([^")]+)', text))
    text = re.sub(
        r' id="([^"]*)"', lambda m: f' id="{key}-{m[1]}"' if m[1] in used else "", text[head.end() :]
    )
    text = re.sub(r'(xlink:href="|url\()#', rf"\1#{key}-", text).replace("xlink:href", "href")
    text = re.sub(r"<!--.*?-->\s*", "", text, flags=re.DOTALL)
    text = re.sub(
        r"<style.*?</style>\s*", "", text, flags=re.DOTALL
    )  # would reach the whole page; report.css has it
    # matplotlib names a fallback chain of families; the page's own font is meant
    text = re.sub(r"font: ([\d.]+px)[^;\"]*", r"font-size: \1", text)
    for name, colour in COLOURS.items():
        text = text.replace(colour, f"var(--{name})")
    labels = f'<title id="{key}-t">{show.markup(title)}</title><desc id="{key}-d">{show.markup(description)}</desc>'
    return (
        f'<svg role="img" aria-labelledby="{key}-t {key}-d" viewBox="{head[1]}" preserveAspectRatio="xMidYMid meet">'
        f"{labels}{text.strip()}"
    )


def save(figure: Any, path: Path) -> None:
    """The figure as a .png or .svg file in the light theme."""
    if path.suffix not in (".png", ".svg"):
        raise OptionError(f"{path}: plots are written as .png or .svg")
    with _settings("lconvert"):
        metadata = dict.fromkeys(_METADATA) if path.suffix == ".svg" else {"Software": None}
        figure.savefig(path, dpi=200, facecolor=COLOURS["paper"], metadata=metadata)


def pareto(rows: Sequence[Mapping[str, Any]], stock_rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """The plot of quality against size (see `quality`) as a .png or .svg file."""
    save(quality(rows, stock_rows), path)


_METADATA = ("Creator", "Date", "Format", "Type")
_STYLE: Mapping[str, Any] = {
    "svg.fonttype": "none",
    "font.family": "DejaVu Sans",
    "font.size": 11.5,
    "axes.edgecolor": COLOURS["muted"],
    "axes.labelcolor": COLOURS["ink"],
    "axes.linewidth": 0.8,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": COLOURS["line"],
    "grid.linewidth": 0.7,
    "lines.linewidth": 1.8,
    "xtick.color": COLOURS["muted"],
    "ytick.color": COLOURS["muted"],
    "xtick.labelsize": 10.5,
    "ytick.labelsize": 10.5,
    "legend.fontsize": 10.5,
    "legend.frameon": False,
    "text.color": COLOURS["ink"],
    "text.parse_math": False,
    "axes.unicode_minus": True,
}


@contextmanager
def _drawing(height: float = _HEIGHT) -> Iterator[tuple[Any, Any]]:
    """A figure and its axes in our style; MissingPackageError without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise MissingPackageError("matplotlib is not installed: pip install 'lconvert[report]'") from None
    with _settings(""):
        figure = Figure(figsize=(_WIDTH, height), layout="constrained")
        yield figure, figure.subplots()


def _settings(salt: str) -> Any:
    """matplotlib in our style, whatever the user's own settings are; ids come from `salt` and not from chance."""
    import matplotlib

    default: Any = matplotlib.rcParamsDefault
    context: Any = matplotlib.rc_context
    kept = {k: v for k, v in default.items() if not k.startswith("backend")}
    return context({**kept, **_STYLE, "svg.hashsalt": salt})


def _style(n: int) -> dict[str, Any]:
    return {"color": COLOURS[_SERIES[n % len(_SERIES)]], "linestyle": _LINES[n % len(_LINES)]}


def _marker(n: int, markers: Sequence[str] = _MARKERS) -> str:
    """The marker of a series: when the colours begin again, they meet other markers."""
    return markers[(n + n // len(_SERIES)) % len(markers)]


def _curves(axes: Any, series: Sequence[Series], marker: bool) -> None:
    for n, s in enumerate(series):
        shape = {"marker": _marker(n), "markersize": 4} if marker else {}
        y = [float("nan") if v is None else v for v in s.y]
        axes.plot(s.x, y, label=_text(s.label), **_style(n), **shape)


def _name(axes: Any, x: str, y: str, *, legend: bool) -> None:
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    labels = axes.get_legend_handles_labels()[1]
    if legend and labels:
        widest = max(map(len, labels))
        axes.figure.legend(
            loc="outside upper left", ncols=max(1, 60 // (widest + 8)), borderaxespad=0.2, columnspacing=1.4
        )


def _log(axes: Any, values: Sequence[float | None]) -> None:
    """A log axis where the values are positive and span more than a factor of 5, with plain numbers on it."""
    known = [v for v in values if v is not None]
    if known and min(known) > 0 and max(known) / min(known) > 5:
        axes.set_yscale("log")
    elif known and min(known) >= 0:
        axes.set_ylim(bottom=0)
    _ticks(axes.yaxis)


def _ticks(axis: Any, percent: bool = False) -> None:
    """Plain numbers, and powers of ten where a plain number is hard to read."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    def written(value: float, _: Any) -> str:
        if percent:
            return f"{100 * value:g} %"
        small = 0 < abs(value) < 1e-3 or abs(value) >= 1e5
        exponent = math.floor(math.log10(abs(value)) + 1e-9) if small else 0
        mantissa = f"{value / 10.0**exponent:.3g}".replace("-", "−")
        if not small:
            return mantissa
        return ("" if mantissa == "1" else f"{mantissa}·") + _power(exponent)

    axis.set_major_formatter(FuncFormatter(written))
    if axis.get_scale() == "log":
        low, high = sorted(axis.get_view_interval())
        near = high < 100 * low
        axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if near else (1.0,), numticks=8))
        axis.set_minor_formatter(NullFormatter())


def _power(exponent: float) -> str:
    return "10" + f"{exponent:.0f}".translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))


def _bins(histogram: Mapping[str, Any]) -> tuple[list[float], list[float]]:
    """Edges and counts, with one edge more than counts; two empty lists where there are no bins."""
    edges, counts = list(histogram["log10_edges"]), list(histogram["counts"])
    n = min(len(counts), len(edges) - 1)
    return (edges[: n + 1], counts[:n]) if n > 0 else ([], [])


def _range(histograms: Sequence[Mapping[str, Any]]) -> tuple[float, float]:
    """From the first to the last bin that holds anything, in log10."""
    low, high = [], []
    for edges, counts in map(_bins, histograms):
        full = [n for n, c in enumerate(counts) if c]
        if full:
            low.append(edges[full[0]])
            high.append(edges[full[-1] + 1])
    return (min(low), max(high)) if low and min(low) < max(high) else (-8.0, 0.0)


def _powers(axes: Any, limits: tuple[float, float]) -> None:
    """An x axis in log10 whose labels are powers of ten."""
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    axes.set_xlim(*limits)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=7, integer=True))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda v, _: _power(v)))


def _drawable(row: Mapping[str, Any]) -> bool:
    return row.get("bits_per_weight") is not None and row.get("kld_mean") is not None


def _label(
    axes: Any, x: float, y: float, text: Any, colour: str, offset: tuple[int, int], align: str
) -> None:
    axes.annotate(
        _text(text), (x, y), xytext=offset, textcoords="offset points", color=colour, fontsize=10, ha=align
    )


def _text(value: Any, limit: int = 40) -> str:
    """A foreign name for matplotlib: no markup (mathtext is off), nothing invisible, bounded."""
    plain = show.visible(value)
    plain = plain if len(plain) <= limit else plain[: limit // 2 - 1] + "…" + plain[-limit // 2 :]
    return plain.lstrip("_") or "–"
