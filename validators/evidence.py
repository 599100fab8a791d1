"""Sections of the HTML report on numbers: what was compared, distributions, layers, weights. A missing key is no section."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lconvert.validators import page, plots, show
from lconvert.validators.page import Cell

Details = Mapping[str, Any]

#: the order in which comparisons are shown
_ORDER = ("cost", "stock", "served", "fidelity", "graph")


def first(details: Details, measure: str) -> Mapping[str, Any] | None:
    """The first comparison of a measure: the artifact in the runtime that it is for."""
    found: Mapping[str, Any] | None = next(
        (x for x in details.get("logits", ()) if x["measure"] == measure), None
    )
    return found


def headlines(details: Details) -> list[tuple[str, str, str]]:
    """(name, figure, remark) of what is asked first."""
    artifact, cost = details.get("artifact", {}), (first(details, "cost") or {}).get("stats", {})
    own = (first(details, "fidelity") or {}).get("stats", {})
    kld, ppl = cost.get("kld", {}), cost.get("ppl", {})
    both = f"{show.fixed(ppl.get('reference'))} → {show.fixed(ppl.get('candidate'))}" if ppl else ""
    return [
        ("KL divergence, mean", show.number(kld.get("mean")), show.interval(kld.get("mean_ci"))),
        (
            "Same top-1 token",
            show.percent(cost.get("same_top1")),
            show.interval(cost.get("same_top1_ci"), show.percent),
        ),
        ("Perplexity ratio", show.fixed(ppl.get("ratio"), 4), both),
        (
            "Fidelity KLD",
            show.number(own.get("kld", {}).get("mean")),
            "runtime against the artifact's own numbers",
        ),
        (
            "Bits per weight",
            show.fixed(artifact.get("bits_per_weight")),
            str(artifact.get("file_type") or ""),
        ),
        ("Size", show.size(artifact.get("bytes")), f"{show.parameters(artifact.get('parameters'))} weights"),
    ]


def compared(report: Mapping[str, Any]) -> str:
    """Source, artifact, text, settings and runtimes."""
    d = report["details"]
    source, artifact, settings = d.get("reference", {}), d.get("artifact", {}), d.get("settings", {})
    text = settings.get("text", {})
    windows = settings.get("windows")
    model = _list(
        source.get("family"),
        _unit(show.parameters(source.get("parameters")), "parameters"),
        _unit(show.count(source.get("layers")), "layers"),
        _unit(show.count(source.get("vocabulary")), "tokens of vocabulary"),
        _unit(show.count(source.get("context")), "tokens of context"),
    )
    file = _list(
        artifact.get("kind"),
        artifact.get("file_type"),
        show.size(artifact.get("bytes")),
        _unit(show.fixed(artifact.get("bits_per_weight"), 3), "bits per weight"),
    )
    count = (
        "the whole text"
        if "windows" in settings and windows is None
        else _unit(show.count(windows), "windows")
    )
    size = _unit(show.count(settings.get("context")), "tokens")
    rows: list[tuple[str, Any]] = [
        ("Original", _under(report["reference"], model, source.get("sha256"))),
        ("Artifact", _under(report["candidate"], file, artifact.get("sha256"))),
        ("Text", _under(text.get("name"), show.size(text.get("bytes")), text.get("sha256"))),
        ("Compared", _list(f"{count} of {size}" if count and size else count or size)),
        ("Tiers", _list(*settings.get("tiers", ()))),
        ("Threads", settings.get("threads")),
    ]
    for r in d.get("runtimes", ()):
        more = [f"{k} {v}" for k, v in r.items() if k not in ("role", "runtime") and v]
        rows.append((f"Runtime, {r.get('role', '')}".rstrip(", "), _under(r["runtime"], _list(*more), None)))
    return page.facts(rows)


def logits(details: Details, key: str, drawn: bool) -> str:
    """Distances of the distributions: one row per comparison, the shape of the distribution, and the position."""
    entries = sorted(details.get("logits", ()), key=lambda x: (*_ORDER, x["measure"]).index(x["measure"]))
    if not entries:
        return ""
    runtimes = {x.get("runtime") for x in entries}
    labels = [x["measure"] + (f", {x.get('runtime')}" if len(runtimes) > 1 else "") for x in entries]
    figures = []
    if drawn:
        histograms = [
            (n, x["stats"]["histogram"])
            for n, x in zip(labels, entries, strict=True)
            if x["stats"].get("histogram")
        ]
        if histograms:
            figures += _distributions(histograms, key)
        lines = [
            _position_series(n, x["stats"])
            for n, x in zip(labels, entries, strict=True)
            if x["stats"].get("positions") and x["measure"] != "graph"
        ]
        if lines:
            figures.append(_positions(lines, key))
    rows = [_statistics(n, x["stats"]) for n, x in zip(labels, entries, strict=True)]
    scored = " and ".join(dict.fromkeys(show.count(x["stats"]["tokens"]) for x in entries))
    caption = f"{scored} tokens, full vocabulary, nats; below: 95 % confidence intervals"
    hints = [_MEASURES[m] for m in dict.fromkeys(x["measure"] for x in entries) if m in _MEASURES]
    return page.section(
        "Next-token distributions",
        f'<p class="hint">{" ".join(hints)}</p>' if hints else "",
        page.table(_COLUMNS, rows, right=range(1, len(_COLUMNS)), caption=caption, layout="wide"),
        page.plots(*figures),
    )


_MEASURES = {
    "cost": "Cost: the artifact against the original.",
    "stock": "Stock: the stock encoder at the same size against the original.",
    "fidelity": "Fidelity: the artifact in its runtime against its own numbers evaluated in fp32.",
    "served": "Served: the cost at the settings that one would serve with.",
    "graph": "Graph: its numbers as F32 weights in the runtime against the same evaluation.",
}

_COLUMNS = (
    "comparison", "KLD mean", "median", "99 %", "99.9 %", "max", "same top-1", "ppl ratio", "Δp rms", "max Δ logit",
)  # fmt: skip


def _statistics(label: str, s: Mapping[str, Any]) -> tuple[Any, ...]:
    kld, ci, ppl, p = s["kld"], s["kld"].get("ci", {}), s.get("ppl", {}), s.get("p_correct", {})
    error = ppl.get("log_ratio_se")
    spread = (
        f"± {show.number(error * ppl['ratio'], 2)}"
        if error is not None and ppl.get("ratio") is not None
        else ""
    )
    return (
        label,
        page.with_interval(show.number(kld["mean"]), show.interval(kld.get("mean_ci"))),
        show.number(kld.get("median")),
        page.with_interval(show.number(kld.get("p99")), show.interval(ci.get("p99"))),
        show.number(kld.get("p999")),
        show.number(kld.get("max")),
        page.with_interval(
            show.percent(s.get("same_top1")), show.interval(s.get("same_top1_ci"), show.percent)
        ),
        page.with_interval(show.fixed(ppl.get("ratio"), 4), spread),
        show.percent(p.get("rms_delta")),
        show.number(s.get("max_logit_difference")),
    )


def _distributions(histograms: Sequence[tuple[str, Mapping[str, Any]]], key: str) -> list[str]:
    names = ", ".join(n for n, _ in histograms)
    title = "How far off each token is"
    a = plots.svg(
        plots.distribution(histograms),
        f"{key}-h",
        title,
        f"histogram of the KL divergence per token: {names}",
    )
    tail = "How heavy the tail is"
    b = plots.svg(
        plots.survival(histograms), f"{key}-s", tail, f"share of tokens above a KL divergence: {names}"
    )
    return [
        page.figure(a, title, "Share of tokens by their KL divergence, log axis"),
        page.figure(b, tail, "Share of tokens whose KL divergence is larger than x"),
    ]


def _position_series(label: str, stats: Mapping[str, Any]) -> plots.Series:
    parts = stats["positions"]
    return plots.Series(label, [(p["start"] + p["end"]) / 2 for p in parts], [p["kld_mean"] for p in parts])


def _positions(lines: Sequence[plots.Series], key: str) -> str:
    title = "Does the error grow with the context?"
    drawing = plots.svg(
        plots.positions(lines), f"{key}-p", title, "mean KL divergence by position in the window"
    )
    return page.figure(drawing, title, "Mean KL divergence by position in the window")


def curve(details: Details, label: str, key: str, drawn: bool) -> str:
    """Quality against size, with the stock types as the curve."""
    stock, own = details.get("curve", ()), (first(details, "cost") or {}).get("stats", {})
    bits = details.get("artifact", {}).get("bits_per_weight")
    if not stock:
        return ""
    mine = (
        []
        if bits is None or not own
        else [{"label": label, "bits_per_weight": bits, "kld_mean": own["kld"]["mean"]}]
    )
    figures = [_pareto(mine, stock, key)] if drawn else []
    rows = [
        (r["type"], show.size(r.get("bytes")), show.fixed(r["bits_per_weight"]), show.number(r["kld_mean"]))
        for r in stock
    ] + [
        (
            m["label"],
            show.size(details["artifact"].get("bytes")),
            show.fixed(bits),
            show.number(m["kld_mean"]),
        )
        for m in mine
    ]
    table = page.table(("type", "size", "bits/weight", "KLD mean"), rows, right=(1, 2, 3))
    return page.section("Quality against size", page.plots(*figures, table))


def _pareto(rows: Sequence[Mapping[str, Any]], stock: Sequence[Mapping[str, Any]], key: str) -> str:
    title = "Is the size well spent?"
    drawing = plots.svg(
        plots.quality(rows, stock), f"{key}-q", title, "mean KL divergence against bits per weight"
    )
    return page.figure(
        drawing, title, "Lower left is better; the curve is llama.cpp's own types on the same model and text"
    )


def layers(details: Details, key: str, drawn: bool) -> str:
    """The hidden state's error after each decoder layer, and which layers err more than rounding explains."""
    found = details.get("layers")
    if not found or not found["layers"]:
        return ""
    rows = found["layers"]
    broken = [n for n, x in enumerate(rows) if x.get("broken") or x["layer"] == found.get("first_broken")]
    figures = []
    if drawn:
        title = "Error of the hidden state"
        text = "relative error after each layer: accumulated, its own, and what rounding explains"
        drawing = plots.layers([str(x["layer"]) for x in rows], _layer_series(found), broken)
        hint = "After each decoder layer; own: with the original's input"
        figures.append(page.figure(plots.svg(drawing, f"{key}-l", title, text), title, hint))
    if broken:
        worst = rows[broken[0]]
        says = (
            f'<p><span class="is-fail">✗ The first layer out of line: {show.markup(worst["layer"])}.</span>'
        )
        says += f" {show.markup(_list(*worst.get('tensors', ())))}</p>"
    else:
        says = '<p><span class="is-pass">✓ No layer is out of line.</span></p>'
    cells: list[tuple[Any, ...]] = [
        (
            x["layer"],
            show.number(x["relative_error"]),
            show.number(x.get("own_error")),
            show.number(x.get("explained_error")),
            show.fixed(x.get("cosine"), 6),
            _list(*x.get("tensors", ())),
        )
        for x in rows
    ]
    columns: tuple[str, ...] = (
        "layer",
        "accumulated",
        "own error",
        "rounding explains",
        "cosine",
        "tensors out of line",
    )
    if not any(row[-1] for row in cells):
        columns, cells = columns[:-1], [row[:-1] for row in cells]
    table = page.table(columns, cells, right=range(5), tall=len(rows) > 16, failed=broken, layout="wide")
    remarks = page.items([*found.get("differences", ()), *found.get("notes", ())])
    return page.section("Layer by layer", says, page.plots(*figures, table), remarks)


def _layer_series(found: Mapping[str, Any]) -> list[plots.Series]:
    rows = found["layers"]
    kinds = (
        ("accumulated", "relative_error"),
        ("its own", "own_error"),
        ("rounding explains", "explained_error"),
    )
    every = [(label, [x.get(key) for x in rows]) for label, key in kinds]
    return [plots.Series(label, range(len(rows)), y) for label, y in every if any(v is not None for v in y)]


def overlays(reports: Sequence[Mapping[str, Any]], labels: Sequence[str]) -> list[str]:
    """Plots with one curve per report, of the cost."""
    named = [
        (label, r["details"], (first(r["details"], "cost") or {}).get("stats", {}))
        for r, label in zip(reports, labels, strict=True)
    ]
    out: list[str] = []
    points = [
        {
            "label": label,
            "bits_per_weight": d["artifact"].get("bits_per_weight"),
            "kld_mean": s["kld"]["mean"],
        }
        for label, d, s in named
        if s and d.get("artifact")
    ]
    if points:
        out.append(_pareto(points, next((d["curve"] for _, d, _ in named if d.get("curve")), ()), "all"))
    histograms = [(label, s["histogram"]) for label, _, s in named if s.get("histogram")]
    out += _distributions(histograms, "all") if histograms else []
    lines = [_position_series(label, s) for label, _, s in named if s.get("positions")]
    out += [_positions(lines, "all")] if lines else []
    deep = [
        (label, d["layers"]["layers"]) for label, d, _ in named if d.get("layers") and d["layers"]["layers"]
    ]
    if deep:
        names = max(([str(x["layer"]) for x in rows] for _, rows in deep), key=len)
        series = [
            plots.Series(label, range(len(rows)), [x["relative_error"] for x in rows]) for label, rows in deep
        ]
        title = "Error of the hidden state"
        drawing = plots.svg(
            plots.layers(names, series, []), "all-l", title, "accumulated relative error by layer"
        )
        out.append(page.figure(drawing, title, "After each decoder layer, accumulated"))
    return out


def made(details: Details) -> str:
    """Options, files and sources out of the manifest."""
    manifest = details.get("manifest", {})
    plan = manifest.get("plan", {})
    options = ", ".join(f"{k} {v}" for k, v in plan.get("options", {}).items())
    files = [
        (n, show.size(f.get("size")), page.mono(f.get("sha256")))
        for n, f in manifest.get("files", {}).items()
    ]
    sources = [
        (show.name(n), show.size(f.get("size")), page.mono(f.get("sha256")))
        for n, f in manifest.get("sources", {}).items()
    ]
    return page.facts([("Target", plan.get("target")), ("Options", options)]) + page.table(
        ("file", "size", "sha256"), [*files, *sources], right=(1,), stack=True
    )


def _under(name: Any, remark: str, sha256: Any) -> Cell | None:
    """A name with what it is and its hash below."""
    if name is None:
        return None
    lines = [show.markup(remark)] if remark not in ("", show.MISSING) else []
    lines += [f"sha256 <code>{show.markup(sha256)}</code>"] if sha256 else []
    return Cell(show.markup(name) + "".join(f'<span class="ci">{line}</span>' for line in lines))


def _list(*parts: Any) -> str:
    return ", ".join(str(p) for p in parts if p not in (None, "", show.MISSING))


def _unit(figure: str, unit: str) -> str:
    return "" if figure == show.MISSING else f"{figure} {unit if figure != '1' else unit.removesuffix('s')}"
