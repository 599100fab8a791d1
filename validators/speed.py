"""The benchmark's section of the HTML report: one table, and bars for what is compared first."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lconvert.validators import page, plots, show

_COLUMNS = (
    "artifact", "size", "bits/weight", "load", "peak memory", "prefill, tok/s", "decode, tok/s", "TTFT", "ITL", "TPOT",
    "latency", "goodput, req/s",
)  # fmt: skip

#: key of a result, title of its bars, unit on the axis, factor
_BARS = (
    ("prefill_tokens_per_s", "Prefill, more is better", "tokens per second", 1.0),
    ("decode_tokens_per_s", "Decode, more is better", "tokens per second", 1.0),
    ("ttft_s", "Time to first token, less is better", "milliseconds", 1e3),
)


def section(bench: Mapping[str, Any], key: str, drawn: bool) -> str:
    """One bench document: machine, settings, results, and the sweep against a server."""
    machine, results = bench["machine"], bench["results"]
    labels = show.distinct([_label(r, results) for r in results])
    good = [(n, r) for n, r in zip(labels, results, strict=True) if not r.get("error")]
    bad = [f"{n}: {r['error']}" for n, r in zip(labels, results, strict=True) if r.get("error")]
    figures = []
    if drawn:
        for name, title, unit, factor in _BARS:
            kept = [(n, r[name]) for n, r in good if r.get(name)]
            rows = list(zip(show.shortened([n for n, _ in kept]), [v for _, v in kept], strict=True))
            if rows:
                drawing = plots.svg(plots.bars(rows, unit, factor), f"{key}-{name}", title, f"bars: {unit}")
                figures.append(page.figure(drawing, title, "Median, with the range of the repetitions"))
    memory = machine.get("memory")
    facts = page.facts(
        [
            ("Machine", machine.get("cpu")),
            ("Cores", machine.get("cores")),
            ("Memory", show.size(memory) if memory is not None else None),
            ("GPU", _plain(machine.get("gpu")) if machine.get("gpu") else None),
            (
                "Settings",
                ", ".join(f"{k} {_plain(v)}" for k, v in bench["settings"].items() if v is not None),
            ),
            ("Measured", bench["created"]),
        ]
    )
    return page.section(
        "Speed",
        facts,
        page.table(_COLUMNS, [_row(n, r) for n, r in good], right=range(1, len(_COLUMNS)), layout="wide"),
        page.plots(*figures),
        page.items(bad),
        _server(bench.get("server", ()), key, drawn),
    )


def _label(result: Mapping[str, Any], results: Sequence[Mapping[str, Any]]) -> str:
    several = len({r["runtime"] for r in results}) > 1
    name = show.name(result["label"] or result["artifact"])
    return f"{name}, {result['runtime']}" if several and result["runtime"] not in name else name


def _row(label: str, r: Mapping[str, Any]) -> tuple[Any, ...]:
    goodput = r.get("goodput") or {}
    kept = show.percent(goodput.get("share"), 0)
    return (
        label,
        show.size(r.get("bytes")),
        show.fixed(r.get("bits_per_weight")),
        show.seconds(_middle(r.get("load_s"))),
        show.size(r.get("peak_memory_bytes")),
        _spread(r.get("prefill_tokens_per_s"), show.rate),
        _spread(r.get("decode_tokens_per_s"), show.rate),
        _spread(r.get("ttft_s"), show.seconds),
        _tail(r.get("itl_s")),
        show.seconds(_middle(r.get("tpot_s"))),
        _tail(r.get("latency_s")),
        page.with_interval(
            show.number(goodput.get("requests_per_s")), "" if kept == show.MISSING else f"{kept} of requests"
        ),
    )


def _middle(s: Mapping[str, Any] | None) -> Any:
    return next((s[k] for k in ("median", "p50", "mean") if s.get(k) is not None), None) if s else None


def _spread(s: Mapping[str, Any] | None, form: Any) -> Any:
    return page.with_interval(
        form(_middle(s)), show.interval([(s or {}).get("min"), (s or {}).get("max")], form)
    )


def _tail(s: Mapping[str, Any] | None) -> Any:
    p99 = (s or {}).get("p99")
    return page.with_interval(show.seconds(_middle(s)), "" if p99 is None else f"p99 {show.seconds(p99)}")


_LEVEL = (
    "server", "concurrent", "answered", "output tok/s", "req/s", "TTFT", "ITL", "TPOT", "latency",
    "goodput, req/s",
)  # fmt: skip


def _server(levels: Sequence[Mapping[str, Any]], key: str, drawn: bool) -> str:
    """The concurrency sweep: one row per level, and how throughput and waiting grow."""
    rows = [
        (
            _place(x),
            show.count(x["concurrency"]),
            f"{show.count(x.get('completed'))} of {show.count(x.get('requests'))}",
            show.rate(x.get("output_tokens_per_s")),
            show.number(x.get("requests_per_s")),
            _tail(x.get("ttft_s")),
            _tail(x.get("itl_s")),
            show.seconds(_middle(x.get("tpot_s"))),
            _tail(x.get("latency_s")),
            show.number((x.get("goodput") or {}).get("requests_per_s")),
        )
        for x in levels
    ]
    figures = []
    if drawn:
        for name, title, unit, value in (
            ("o", "Throughput", "output tokens per second", lambda x: x.get("output_tokens_per_s")),
            ("t", "Time to first token", "seconds, median", lambda x: _middle(x.get("ttft_s"))),
        ):
            series = _by_place(levels, value)
            if series:
                drawing = plots.svg(
                    plots.lines(series, "requests at a time", unit), f"{key}-{name}", title, unit
                )
                figures.append(page.figure(drawing, title, f"By concurrency, {unit}"))
    table = page.table(_LEVEL, rows, right=range(1, len(_LEVEL)), layout="wide")
    return page.section("Against a server", table, page.plots(*figures), level=3)


def _place(level: Mapping[str, Any]) -> str:
    return show.name(level.get("model") or level.get("url") or "server")


def _by_place(levels: Sequence[Mapping[str, Any]], value: Any) -> list[plots.Series]:
    found: dict[str, list[tuple[float, float]]] = {}
    for x in levels:
        if value(x) is not None:
            found.setdefault(f"{_place(x)} {x.get('url', '')}", []).append((x["concurrency"], value(x)))
    several = len({k.partition(" ")[0] for k in found}) < len(found)
    return [
        plots.Series(k if several else k.partition(" ")[0], *zip(*sorted(points), strict=True))
        for k, points in found.items()
    ]


def _plain(value: Any) -> str:
    if isinstance(value, Mapping):
        middle = _middle(value)
        return (
            show.number(middle)
            if middle is not None
            else ", ".join(f"{k} {_plain(v)}" for k, v in value.items())
        )
    if isinstance(value, list | tuple):
        return ", ".join(map(_plain, value))
    return show.number(value) if isinstance(value, float) else show.MISSING if value is None else str(value)
