"""The HTML report: one file that a release manager opens, reads at a glance and forwards. No network, no script.

The verdict comes first, with what failed; then what was compared; then the figures, and last what was not proven.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lconvert import __version__
from lconvert.validators import behaviour, evidence, page, plots, show, speed, weights
from lconvert.validators.page import Cell

_CLASSES = {0: "pass", 1: "fail", 2: "fail", 3: "part"}
_NO_PLOTS = '<p class="hint">Plots are missing because matplotlib is not installed: pip install &#x27;lconvert[report]&#x27;</p>'


def html(reports: Sequence[Mapping[str, Any]], benches: Sequence[Mapping[str, Any]] = ()) -> str:
    """One page for any number of reports (lconvert.report/2) and benchmarks (lconvert.bench/1).

    Several reports stand side by side in a comparison, each with its details folded below. The same documents give the
    same bytes. Without matplotlib the page has its tables and says why there are no plots.
    """
    labels = show.distinct([show.name(r["candidate"]) for r in reports])
    drawn = plots.available()
    fast = [speed.section(b, f"b{n}", drawn) for n, b in enumerate(benches)]
    body: list[str] = []
    if len(reports) == 1:
        title = f"{show.VERDICTS[reports[0]['exit_code']]}: {labels[0]}"
        body += [_top(reports[0]), verdict(reports[0], labels[0]), *single(reports[0], "r0", drawn, fast)]
    elif reports:
        failed = sum(not r["passed"] for r in reports)
        title = (
            f"{len(reports)} artifacts, {failed} failed"
            if failed
            else f"{len(reports)} artifacts, none failed"
        )
        body += [_top(reports[0]), _banner(reports, labels, title), comparison(reports, labels, drawn), *fast]
        parts = [
            page.fold(
                f"{_verdict_word(r)} {show.markup(label)}", verdict(r, label), *single(r, f"r{n}", drawn),
                open_=r["exit_code"] != 0,
            )
            for n, (r, label) in enumerate(zip(reports, labels, strict=True))
        ]  # fmt: skip
        body.append(page.section("Each artifact", *parts))
    else:
        title = "lconvert benchmark"
        body += [f"<h1>{title}</h1>", *fast]
    if not drawn:
        body.append(_NO_PLOTS)
    versions = sorted({str(d["lconvert"]) for d in (*reports, *benches)} or {__version__})
    footer = f"Measured by lconvert {show.markup(', '.join(versions))}; KL divergences are in nats per token, sizes decimal."
    return page.page(title, body, footer)


def _top(report: Mapping[str, Any]) -> str:
    made = str(report["created"]).replace("T", " ").replace("+00:00", " UTC")
    return (
        f'<p class="top">Release gate · lconvert {show.markup(report["lconvert"])} · {show.markup(made)}</p>'
    )


def _verdict_word(report: Mapping[str, Any]) -> str:
    code = report["exit_code"]
    sign = {"pass": "✓", "fail": "✗", "part": "◐"}[_CLASSES[code]]
    return f'<span class="is-{_CLASSES[code]}">{sign} {show.VERDICTS[code]}</span>'


def _banner(reports: Sequence[Mapping[str, Any]], labels: Sequence[str], title: str) -> str:
    """The verdict over several artifacts: the worst of them."""
    codes = {r["exit_code"] for r in reports}
    code = next(c for c in (1, 2, 3, 0) if c in codes)
    lines = [
        Cell(f"{_verdict_word(r)} <strong>{show.markup(label)}</strong>{_failed(r)}")
        for r, label in zip(reports, labels, strict=True)
    ]
    return (
        f'<section class="verdict {_CLASSES[code]}" aria-label="verdict">\n'
        f'<div class="word">{show.VERDICTS[code]}</div>\n<h1 class="what">{title}</h1>\n{page.items(lines)}\n</section>'
    )


def _failed(report: Mapping[str, Any]) -> str:
    names = [show.markup(f"{c['tier']}: {c['name']}") for c in report["checks"] if c["passed"] is False]
    return f": {', '.join(names)}" if names else ""


def verdict(report: Mapping[str, Any], label: str) -> str:
    """The banner: the word, the artifact, what failed, and what is missing."""
    code, judged = report["exit_code"], [c for c in report["checks"] if c["passed"] is not None]
    failed = [c for c in judged if not c["passed"]]
    if failed:
        says = f"{len(failed)} of {len(judged)} gates failed"
    elif code == 3:
        says = f"all {len(judged)} gates that could be checked hold, but a required runtime is missing"
    elif not judged:
        says = "nothing was judged, so nothing is proven"
    else:
        says = f"all {len(judged)} gates hold"
    lines = [
        Cell(
            f"<strong>{show.markup(c['tier'])}: {show.markup(c['name'])}</strong>: "
            f"{show.markup(show.figures(c['value']))}; gate {show.markup(show.figures(c['gate']))}"
        )
        for c in failed
    ]
    missing: list[Any] = list(report["not_proven"]) if code == 3 else []
    open_ = len(report["not_proven"])
    rest = (
        f'<p class="hint">Not proven: {open_} {"things" if open_ > 1 else "thing"}, listed below.</p>'
        if open_
        else ""
    )
    return (
        f'<section class="verdict {_CLASSES[code]}" aria-label="verdict">\n'
        f'<div class="word">{show.VERDICTS[code]}</div>\n'
        f'<h1 class="what">{show.markup(label)}: {says}</h1>\n'
        f"{page.items([*lines, *missing])}{rest}\n</section>"
    )


def single(report: Mapping[str, Any], key: str, drawn: bool, more: Sequence[str] = ()) -> list[str]:
    """Everything below the verdict of one report; `more`: sections of other documents among them."""
    details = report["details"]
    return [
        page.tiles(evidence.headlines(details)),
        page.section("What was compared", evidence.compared(report)),
        page.section("Checks", *checks(report)),
        evidence.logits(details, key, drawn),
        evidence.curve(details, show.name(report["candidate"]), key, drawn),
        *more,
        evidence.layers(details, key, drawn),
        weights.tensors(details),
        behaviour.tokens(details),
        behaviour.greedy(details),
        behaviour.needle(details),
        behaviour.calibration(details, key, drawn),
        behaviour.tasks(details),
        behaviour.worst(details),
        page.section("Not proven", page.items(report["not_proven"])),
        page.section("Notes", page.items(report["notes"])),
        page.section("How it was made", evidence.made(details)),
    ]


def checks(report: Mapping[str, Any]) -> list[str]:
    """One table per tier, in the order in which they ran."""
    tiers: dict[str, list[Mapping[str, Any]]] = {}
    for c in report["checks"]:
        tiers.setdefault(c["tier"], []).append(c)
    out = []
    for tier, rows in tiers.items():
        cells = [
            (c["name"], show.figures(c["value"]), show.figures(c["gate"]), page.result(c["passed"]))
            for c in rows
        ]
        failed = [n for n, c in enumerate(rows) if c["passed"] is False]
        columns = ("check", "measured", "gate", "result")
        out += [
            f"<h3>{show.markup(tier)}</h3>",
            page.table(columns, cells, stack=True, failed=failed, layout="checks"),
        ]
    return out


def comparison(reports: Sequence[Mapping[str, Any]], labels: Sequence[str], drawn: bool) -> str:
    """All artifacts in one table, and the plots that lie over each other."""
    rows = []
    for r, label in zip(reports, labels, strict=True):
        d, cost = r["details"], evidence.first(r["details"], "cost")
        artifact, stats = d.get("artifact", {}), (cost or {}).get("stats", {})
        kld, ppl = stats.get("kld", {}), stats.get("ppl", {})
        rows.append(
            (
                Cell(_verdict_word(r)),
                label,
                show.name(r["reference"]),
                show.size(artifact.get("bytes")),
                show.fixed(artifact.get("bits_per_weight")),
                page.with_interval(show.number(kld.get("mean")), show.interval(kld.get("mean_ci"))),
                show.number(kld.get("p99")),
                show.percent(stats.get("same_top1")),
                show.fixed(ppl.get("ratio"), 4),
            )
        )
    columns = (
        "verdict",
        "artifact",
        "original",
        "size",
        "bits/weight",
        "KLD mean",
        "KLD 99 %",
        "same top-1",
        "ppl ratio",
    )
    bad = [n for n, r in enumerate(reports) if r["exit_code"] == 1]
    table = page.table(
        columns,
        rows,
        right=(3, 4, 5, 6, 7, 8),
        failed=bad,
        stack=True,
        caption="cost: artifact against original",
    )
    return table + (page.plots(*evidence.overlays(reports, show.shortened(labels))) if drawn else "")
