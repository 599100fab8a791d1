"""Figures and foreign texts as people read them: sensible precision, units, and nothing that could act as markup.

Names and texts come out of files that somebody else made, so they are data: control characters are shown, not obeyed.
"""

from __future__ import annotations

import html
import math
import re
import unicodedata
from collections.abc import Mapping, Sequence
from typing import Any

MISSING = "–"
_MINUS = "−"  # as wide as a digit, and not a place to break a line


def number(value: Any, digits: int = 3) -> str:
    """`digits` significant digits: 0.0134, 12.3, and 1.20e−10 where zeros would have to be counted."""
    if not _finite(value):
        return MISSING
    if value == 0:
        return "0"
    if abs(value) < 1e-4 or abs(value) >= 1e5:
        mantissa, exponent = f"{value:.{digits - 1}e}".split("e")
        return f"{mantissa}e{int(exponent)}".replace("-", _MINUS)
    places = max(0, digits - 1 - math.floor(math.log10(abs(value))))
    return f"{value:.{places}f}".replace("-", _MINUS)


def interval(pair: Any, form: Any = number) -> str:
    """A confidence interval as "low … high"; empty without one."""
    if not isinstance(pair, list | tuple) or len(pair) != 2 or not all(map(_finite, pair)):
        return ""
    low, high = form(pair[0]), form(pair[1])
    unit = high.partition(" ")[2]
    return f"{low.removesuffix(f' {unit}')} … {high}" if unit else f"{low} … {high}"


def percent(value: Any, places: int = 2) -> str:
    """A share as per cent; a share below 1 is never rounded up to 100."""
    if not _finite(value):
        return MISSING
    text = f"{100 * value:.{places}f}"
    if value < 1 and float(text) >= 100:
        text = f"{100 - 10**-places:.{places}f}"
    return f"{text} %".replace("-", _MINUS)


def fixed(value: Any, places: int = 2) -> str:
    return f"{value:.{places}f}".replace("-", _MINUS) if _finite(value) else MISSING


def count(value: Any) -> str:
    """A whole number in groups of three, parted by thin spaces."""
    return f"{int(value):,}".replace(",", "\u202f") if _finite(value) else MISSING


def rate(value: Any) -> str:
    """Tokens per second: three digits and no more than are there."""
    if not _finite(value):
        return MISSING
    return count(round(value)) if value >= 100 else number(value)


def seconds(value: Any) -> str:
    if not _finite(value):
        return MISSING
    for factor, unit in ((1e6, "µs"), (1e3, "ms")):
        if abs(value) * factor < 1000:
            return f"{number(value * factor)} {unit}"
    return f"{number(value)} s"


def size(value: Any) -> str:
    """Bytes in decimal multiples, as disks and hubs count."""
    if not _finite(value):
        return MISSING
    for unit in ("B", "kB", "MB", "GB"):
        if abs(value) < 1000:
            return f"{value:.0f} B" if unit == "B" else f"{number(value)} {unit}"
        value /= 1000
    return f"{number(value)} TB"


def parameters(value: Any) -> str:
    if not _finite(value):
        return MISSING
    for factor, unit in ((1e9, "billion"), (1e6, "million")):
        if value >= factor:
            return f"{number(value / factor)} {unit}"
    return count(value)


#: exit code of a report -> its verdict, in one word
VERDICTS: Mapping[int, str] = {0: "PASS", 1: "FAIL", 2: "ERROR", 3: "INCOMPLETE"}


def figures(text: Any) -> str:
    """A line of figures with real minus signs, which also do not break: 1.2e-10 as 1.2e−10."""
    return re.sub(r"(?<=\de)-(?=\d)", _MINUS, str(text)).replace("<=", "≤").replace(">=", "≥")


def verdict(report: Mapping[str, Any]) -> str:
    return VERDICTS[report["exit_code"]]


def name(path: Any) -> str:
    """The last part of a path or hub name, which is what people call a file."""
    text = str(path).replace("\\", "/").rstrip("/")
    return visible(text.rsplit("/", 1)[-1] or text)


def distinct(labels: Sequence[str]) -> list[str]:
    """Labels with a number behind those that occur more than once."""
    seen: dict[str, int] = {}
    out = []
    for label in labels:
        seen[label] = seen.get(label, 0) + 1
        out.append(f"{label} ({seen[label]})" if seen[label] > 1 else label)
    return out


def shortened(labels: Sequence[str]) -> list[str]:
    """What tells labels apart, for plots: without the words at their beginning and end that all of them share."""
    if len(labels) < 2:
        return list(labels)
    parts = [re.split(r"(?<=[-./ ])|(?=[./ ])", label) for label in labels]
    kept = [list(p) for p in parts]
    for end in (0, -1):
        while all(len(p) > 1 for p in kept) and len({p[end] for p in kept}) == 1:
            for p in kept:
                p.pop(end)
    out = ["".join(p).strip("-_./ ") for p in kept]
    return out if all(out) and len(set(out)) == len(out) else list(labels)


def visible(text: Any) -> str:
    """A text with control, format and private characters replaced by pictures of them or by their code."""
    return "".join(_PICTURES.get(c) or (_code(c) if _unprintable(c) else c) for c in str(text))


def markup(text: Any) -> str:
    """A foreign text for HTML, in an element or a quoted attribute."""
    return html.escape(visible(text), quote=True)


def markdown(text: Any) -> str:
    """A foreign text for Markdown outside of code: no link, emphasis, HTML, table, list or heading comes of it."""
    plain = html.escape(visible(text), quote=False)
    plain = _SPECIAL.sub(r"\\\g<0>", plain)
    plain = _BEGINNING.sub(r"\1\\\2", plain)
    return plain.replace("://", ":&#47;&#47;")


def code(text: Any) -> str:
    """A foreign text as a Markdown code span that also holds in a table's cell."""
    plain = visible(text).replace("|", "\\|")
    ticks = "`" * (1 + max(map(len, re.findall("`+", plain)), default=0))
    pad = " " if plain[:1] in ("`", " ", "") or plain[-1:] in ("`", " ") else ""
    return f"{ticks}{pad}{plain}{pad}{ticks}"


def fence(lines: str, language: str = "") -> str:
    """A code block that its content cannot close; line ends in it are ours, control characters are shown."""
    body = "\n".join(visible(line) for line in lines.split("\n"))
    ticks = "`" * max(3, 1 + max(map(len, re.findall("`+", body)), default=0))
    return f"{ticks}{language}\n{body}\n{ticks}"


def _finite(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


_PICTURES = {"\n": "↵", "\r": "␍", "\t": "⇥"}
#: what acts anywhere in a line; an underscore inside a word does not
_SPECIAL = re.compile(r"[\\`*{}\[\]|~@$]|(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])|(?<=www)\.", re.IGNORECASE)
#: what acts at the beginning of a line or list item: headings, lists, rules
_BEGINNING = re.compile(r"^(\s*(?=[#=]|[+\-](?:[\s\-]|$))|\s*\d{1,9}(?=[.)](?:\s|$)))(.)", re.DOTALL)


def _unprintable(c: str) -> bool:
    return unicodedata.category(c) in ("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp")


def _code(c: str) -> str:
    return f"\\x{ord(c):02x}" if ord(c) < 256 else f"\\u{ord(c):04x}"
