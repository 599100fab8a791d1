"""The building blocks of the HTML report: tables, heat maps, figures and folds. Everything foreign is escaped here.

A cell is a `Cell`, or a foreign text or number, which is escaped; only `Cell.html` is taken as it stands.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from lconvert.validators import show


@dataclass(frozen=True)
class Cell:
    """HTML of a table cell that is already escaped."""

    html: str


@cache
def style() -> str:
    """The style sheet, without the white space that only its source needs."""
    text = Path(__file__).with_name("report.css").read_text(encoding="utf-8")
    return "\n".join(line.strip() for line in text.splitlines() if line.strip())


def page(title: str, body: Sequence[str], footer: str) -> str:
    """A whole document. The policy forbids every request, whatever a text in it should try."""
    policy = "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{show.markup(title)}</title>\n<style>\n{style()}\n</style>\n</head>\n<body>\n"
        + "\n".join(part for part in body if part)
        + f'\n<footer class="hint"><p>{footer}</p></footer>\n</body>\n</html>\n'
    )


def section(heading: str, *parts: str, level: int = 2) -> str:
    """A heading with what belongs to it; nothing at all when there is nothing."""
    kept = [p for p in parts if p]
    return "\n".join([f"<h{level}>{show.markup(heading)}</h{level}>", *kept]) if kept else ""


def fold(summary: str, *parts: str, open_: bool = False) -> str:
    """A <details>; nothing when it would hold nothing. `summary` is HTML."""
    kept = [p for p in parts if p]
    state = " open" if open_ else ""
    return (
        f"<details{state}><summary>{summary}</summary>\n" + "\n".join(kept) + "\n</details>" if kept else ""
    )


def table(
    columns: Sequence[str],
    rows: Sequence[Sequence[Any]],
    *,
    right: Sequence[int] = (),
    caption: str = "",
    stack: bool = False,
    failed: Sequence[int] = (),
    tall: bool = False,
    layout: str = "",
) -> str:
    """A table that scrolls inside itself; `stack`: on a phone each row becomes a small list instead.

    right: columns of numbers. failed: rows shown as failed. layout: a class of the style sheet.
    caption and columns are ours, cells are foreign.
    """
    if not rows:
        return ""
    mark = [' class="n"' if n in right else "" for n in range(len(columns))]
    head = "".join(f'<th scope="col"{m}>{show.markup(c)}</th>' for m, c in zip(mark, columns, strict=True))
    body = []
    for at, row in enumerate(rows):
        cells = [
            f"<td{mark[n]}{_label(columns[n], n) if stack else ''}>{_cell(value)}</td>"
            for n, value in enumerate(row)
        ]
        body.append(("<tr class=failed>" if at in failed else "<tr>") + "".join(cells) + "</tr>")
    title = f"<caption>{show.markup(caption)}</caption>" if caption else ""
    classes = " ".join(name for name in ("stack" if stack else "", layout) if name)
    kind = f' class="{classes}"' if classes else ""
    inner = (
        f"<table{kind}>{title}<thead><tr>{head}</tr></thead>\n<tbody>\n"
        + "\n".join(body)
        + "\n</tbody></table>"
    )
    return _scroll(inner, caption or ", ".join(columns), tall)


def facts(rows: Sequence[tuple[str, Any]]) -> str:
    """Names and values, one under the other; rows without a value are left out."""
    kept = [(name, value) for name, value in rows if value not in (None, "", show.MISSING)]
    body = "\n".join(f'<tr><th scope="row">{show.markup(n)}</th><td>{_cell(v)}</td></tr>' for n, v in kept)
    return f'<table class="facts"><tbody>\n{body}\n</tbody></table>' if kept else ""


def heat(
    caption: str,
    corner: str,
    columns: Sequence[Any],
    rows: Sequence[tuple[Any, Sequence[float | None]]],
    form: Any,
    *,
    log: bool = False,
) -> str:
    """A heat map as a table of numbers: the stronger the colour, the larger the value; empty cells are None."""
    known = [v for _, values in rows for v in values if v is not None and (v > 0 or not log)]
    if not known:
        return ""
    scaled = (lambda v: math.log(v)) if log else (lambda v: v)
    low, high = scaled(min(known)), scaled(max(known))

    def cell(value: float | None) -> str:
        if value is None:
            return "<td></td>"
        share = 0.0 if (log and value <= 0) or high == low else (scaled(value) - low) / (high - low)
        return f'<td class="c" style="--w:{6 + 38 * share:.0f}">{form(value)}</td>'

    body = [(name, "".join(map(cell, values))) for name, values in rows]
    return _matrix(caption, corner, columns, body)


def grid(
    caption: str,
    corner: str,
    columns: Sequence[Any],
    rows: Sequence[tuple[Any, Sequence[tuple[bool | None, str] | None]]],
) -> str:
    """A table of good, bad and (None) neutral cells with a word in each."""
    if not rows:
        return ""
    kinds = {True: "good", False: "bad", None: "even"}

    def cell(found: tuple[bool | None, str] | None) -> str:
        return f'<td class="{kinds[found[0]]}">{show.markup(found[1])}</td>' if found else "<td></td>"

    body = [(name, "".join(map(cell, cells))) for name, cells in rows]
    return _matrix(caption, corner, columns, body)


def _matrix(caption: str, corner: str, columns: Sequence[Any], rows: Sequence[tuple[Any, str]]) -> str:
    """A table of names and the HTML of cells, with a name above each column."""
    head = "".join(f'<th scope="col" class="n">{_cell(c)}</th>' for c in (corner, *columns))
    body = "\n".join(f'<tr><th scope="row" class="n">{_cell(n)}</th>{cells}</tr>' for n, cells in rows)
    inner = (
        f'<table class="heat"><caption>{show.markup(caption)}</caption><thead><tr>{head}</tr></thead>\n'
        f"<tbody>\n{body}\n</tbody></table>"
    )
    return _scroll(inner, caption, len(rows) > 20)


def figure(svg: str, title: str, hint: str = "") -> str:
    """A plot with what it shows as its caption."""
    small = f"<small>{show.markup(hint)}</small>" if hint else ""
    return f"<figure><figcaption>{show.markup(title)}{small}</figcaption>\n{svg}\n</figure>"


def plots(*figures: str) -> str:
    kept = [f for f in figures if f]
    return '<div class="plots">\n' + "\n".join(kept) + "\n</div>" if kept else ""


def tiles(entries: Sequence[tuple[str, str, str]]) -> str:
    """(name, figure, remark) side by side; entries whose figure is missing are left out."""
    kept = [e for e in entries if e[1] != show.MISSING]
    inner = "".join(
        f"<div><dt>{show.markup(name)}</dt><dd>{show.markup(value)}"
        + (f"<small>{show.markup(remark)}</small>" if remark else "")
        + "</dd></div>"
        for name, value, remark in kept
    )
    return f'<dl class="tiles">{inner}</dl>' if kept else ""


def items(texts: Sequence[Any]) -> str:
    inner = "".join(f"<li>{_cell(t)}</li>" for t in texts)
    return f"<ul>{inner}</ul>" if inner else ""


def result(passed: bool | None) -> Cell:
    """The outcome of a check: a word and a sign, never the colour alone."""
    if passed is None:
        return Cell("")
    return Cell('<span class="is-pass">✓ pass</span>' if passed else '<span class="is-fail">✗ FAIL</span>')


def with_interval(value: str, pair: str) -> Cell:
    return Cell(show.markup(value) + (f'<span class="ci">{show.markup(pair)}</span>' if pair else ""))


def mono(text: Any) -> Cell:
    return Cell(f"<code>{show.markup(text)}</code>")


def _cell(value: Any) -> str:
    return value.html if isinstance(value, Cell) else show.markup(show.MISSING if value is None else value)


def _label(column: str, n: int) -> str:
    return f' data-h="{show.markup(column)}"' if n and column else ""


def _scroll(inner: str, label: str, tall: bool) -> str:
    kind = "scroll tall" if tall else "scroll"
    return f'<div class="{kind}" role="region" tabindex="0" aria-label="{show.markup(label)}">{inner}</div>'
