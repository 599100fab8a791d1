"""Sections of the HTML report on what the model does: tokens, continuations, needles, calibration, tasks, worst tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lconvert.validators import evidence, page, plots, show
from lconvert.validators.evidence import Details
from lconvert.validators.page import Cell


def tokens(details: Details) -> str:
    """Token ids and the chat template."""
    found, chat = details.get("tokens", {}), details.get("chat")
    rows = [
        (c["name"], show.count(c["texts"]), show.count(c.get("ids")), show.count(c["different"]))
        for c in found.get("counts", ())
    ]
    parts = [page.table(("texts", "compared", "ids", "different"), rows, right=(1, 2, 3))]
    examples = [(str(d.get(k)) for k in ("text", "expected", "found")) for d in found.get("differences", ())]
    parts.append(
        page.fold(
            "Differences", page.table(("text", "expected", "found"), [tuple(e) for e in examples], stack=True)
        )
    )
    if chat:
        says = f"{show.count(chat['different'])} of {show.count(chat['conversations'])} renderings differ"
        parts.append(f"<p>Chat template: {says}.</p>")
        keys = list(dict.fromkeys(k for d in chat.get("differences", ()) for k in d))
        wrong = [[str(d.get(k)) for k in keys] for d in chat.get("differences", ())]
        parts.append(page.table(keys, wrong, stack=True))
        parts.append(page.items([f"skipped: {s}" for s in chat.get("skipped", ())]))
    parts.append(page.items(found.get("limits", ())))
    return page.section("Tokens", *parts)


def greedy(details: Details) -> str:
    """How far greedy continuations agree, and where each departs."""
    found = details.get("greedy")
    if not found:
        return ""
    agreement = show.percent(found["agreement"])
    same = (
        f"{show.count(found.get('identical'))} of {show.count(found['prompts'])} prompts continue identically"
    )
    ties = f", {show.count(found['ties'])} differ only in a tie" if found.get("ties") else ""
    rows = [
        (
            d.get("prompt"),
            show.count(d.get("at")),
            _token(d.get("expected")),
            _token(d.get("found")),
            show.number(d.get("margin")),
        )
        for d in found.get("first_differences", ())
    ]
    return page.section(
        "Greedy continuation",
        f"<p>{agreement} of {show.count(found.get('tokens'))} tokens agree before the first difference; {same}{ties}.</p>",
        page.table(
            ("prompt", "tokens before", "expected", "found", "margin of logits"),
            rows,
            right=(1, 4),
            stack=True,
        ),
    )


def needle(details: Details) -> str:
    """Found or lost, by length of the text and depth of the needle."""
    cells = details.get("needle", {}).get("grid", ())
    depths, lengths = sorted({c["depth"] for c in cells}), sorted({c.get("size", c["tokens"]) for c in cells})
    found: dict[tuple[Any, Any], list[Mapping[str, Any]]] = {}
    for c in cells:
        found.setdefault((c.get("size", c["tokens"]), c["depth"]), []).append(c)

    def cell(group: Sequence[Mapping[str, Any]]) -> tuple[bool | None, str] | None:
        pairs = [
            (c.get("found_reference"), c.get("found_candidate", c.get("found_reference"))) for c in group
        ]
        ours, theirs = sum(bool(b) for _, b in pairs), sum(bool(a) for a, _ in pairs)
        if not group:
            return None
        good = None if not ours and not theirs else ours >= theirs
        if len(group) > 1:
            return good, f"{ours} of {len(group)}" + (f", was {theirs}" if ours != theirs else "")
        return good, "found" if ours else "lost" if theirs else "lost by both"

    rows = [(show.count(n), [cell(found.get((n, d), ())) for d in depths]) for n in lengths]
    caption = "By depth of the needle in the text; red: the original finds more"
    grid = page.grid(caption, "tokens", [show.percent(d, 0) for d in depths], rows)
    return page.section("Needle in a haystack", grid)


def calibration(details: Details, key: str, drawn: bool) -> str:
    """Reliability diagram, ECE and Brier score of reference and candidate."""
    found = {k: v for k, v in details.get("calibration", {}).items() if k in ("reference", "candidate") and v}
    if not found:
        return ""
    names = {"reference": "original", "candidate": "artifact"}
    rows = [(names[k], show.fixed(v.get("ece"), 4), show.fixed(v.get("brier"), 4)) for k, v in found.items()]
    table = page.table(("model", "expected calibration error", "Brier score"), rows, right=(1, 2))
    if not drawn:
        return page.section("Calibration", table)
    title = "Is it right as often as it says?"
    drawing = plots.reliability([(names[k], v["bins"]) for k, v in found.items()])
    figure = page.figure(
        plots.svg(drawing, f"{key}-c", title, "accuracy against confidence"),
        title,
        "Accuracy by confidence of the likeliest token",
    )
    return page.section("Calibration", page.plots(figure, table))


def tasks(details: Details) -> str:
    """Scores of artifact and original on the same documents, and the paired difference."""

    def with_error(value: Any, error: Any) -> Cell:
        return page.with_interval(
            show.fixed(value, 4), f"± {show.fixed(error, 4)}" if error is not None else ""
        )

    rows = [
        (
            t["task"],
            t["metric"],
            t.get("backend"),
            show.count(t.get("n")),
            with_error(t.get("reference_value"), t.get("reference_stderr")),
            with_error(t["value"], t.get("stderr")),
            with_error(t.get("difference"), t.get("difference_stderr")),
            show.number(t.get("p"), 2),
        )
        for t in details.get("tasks", ())
    ]
    columns = ("task", "metric", "runtime", "n", "original", "artifact", "difference", "p")
    return page.section("Tasks", page.table(columns, rows, right=range(3, 8), stack=True))


def worst(details: Details) -> str:
    """The tokens with the largest KLD: the text before, the token that follows, and what both models expect."""
    cost = evidence.first(details, "cost")
    found = cost["stats"].get("worst", ()) if cost else ()
    cards = []
    for w in found:
        target = f"<mark>{show.markup(w['target'])}</mark>" if w.get("target") else ""
        place = f"window {w['window']}, position {w['position']}" if "window" in w and "position" in w else ""
        cards.append(
            f"<li><strong>{show.number(w['kld'])}</strong> <span class=hint>nats, {show.markup(place)}</span>"
            f'<p class="text" dir="auto">…{show.markup(w["context"])}{target}</p>'
            f"{_expected(w.get('reference_top', ()), w.get('candidate_top', ()))}</li>"
        )
    inner = '<ul class="worst">' + "\n".join(cards) + "</ul>" if cards else ""
    hint = '<p class="hint">The tokens with the largest KL divergence from the original; what follows in the text is marked.</p>'
    return page.section("Worst tokens", hint, inner) if cards else ""


def _expected(reference: Sequence[Any], candidate: Sequence[Any]) -> str:
    rows = []
    for n in range(max(len(reference), len(candidate))):
        cells = "".join(
            f"<td>{_token(side[n][0]).html}</td><td class=n>{show.percent(side[n][1], 1)}</td>"
            if n < len(side)
            else "<td></td><td></td>"
            for side in (reference, candidate)
        )
        rows.append(f"<tr>{cells}</tr>")
    head = '<thead><tr><th scope="col" colspan="2">original</th><th scope="col" colspan="2">artifact</th></tr></thead>'
    return f"<table>{head}<tbody>{''.join(rows)}</tbody></table>" if rows else ""


def _token(text: Any) -> Cell:
    return Cell(f'<span class="token">{show.markup(text)}</span>')
