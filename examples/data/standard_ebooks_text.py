"""Plain text of Standard Ebooks checkouts: the public-domain text the demo model is trained and measured on.

    python standard_ebooks_text.py BOOK [BOOK ...] --out FILE [--chapters FIRST-LAST]

BOOK is a clone of one of https://github.com/standardebooks (see README.md here for the list and the commits).
One paragraph per line, a blank line between paragraphs, two blank lines between chapters; headings and notes are
left out, and typographic quotes and spaces become the ones on a keyboard, so that a typed prompt looks like the text.
"""

from __future__ import annotations

import argparse
import re
from html.parser import HTMLParser
from pathlib import Path

KEYBOARD = str.maketrans(
    {
        "\u2018": "'",
        "\u2019": "'",
        "\u201c": '"',
        "\u201d": '"',
        "\u00a0": " ",
        "\u200a": "",  # hair space, between nested quotation marks
        "\u202f": " ",
        "\u2011": "-",
        "\u2060": "",  # word joiner, before every dash
        "\ufeff": "",
    }
)


class Paragraphs(HTMLParser):
    """Collects the text of each <p>, without the marks of notes (<a>)."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.paragraphs: list[str] = []
        self._pieces: list[str] | None = None
        self._in_link = False

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "p":
            self._pieces = []
        elif tag == "a":
            self._in_link = True
        elif tag == "br" and self._pieces is not None:
            self._pieces.append(" ")

    def handle_endtag(self, tag: str) -> None:
        if tag == "a":
            self._in_link = False
        elif tag == "p" and self._pieces is not None:
            text = re.sub(r"\s+", " ", "".join(self._pieces).translate(KEYBOARD)).strip()
            if text:
                self.paragraphs.append(text)
            self._pieces = None

    def handle_data(self, data: str) -> None:
        if self._pieces is not None and not self._in_link:
            self._pieces.append(data)


def chapter_files(book: Path) -> list[Path]:
    """The files chapter-1.xhtml ... of one checkout in reading order; raises FileNotFoundError if there are none."""
    files = (book / "src/epub/text").glob("chapter-*.xhtml")
    numbered = sorted((tuple(map(int, re.findall(r"\d+", path.stem))), path) for path in files)
    if not numbered:
        raise FileNotFoundError(f"{book}: no src/epub/text/chapter-*.xhtml; name a Standard Ebooks checkout")
    return [path for _, path in numbered]


def chapter_text(path: Path) -> str:
    parser = Paragraphs()
    parser.feed(path.read_text(encoding="utf-8"))
    return "\n\n".join(parser.paragraphs)


def main() -> None:
    arguments = argparse.ArgumentParser(description="Plain text of Standard Ebooks checkouts.")
    arguments.add_argument("books", nargs="+", type=Path, metavar="BOOK")
    arguments.add_argument("--out", type=Path, required=True)
    arguments.add_argument("--chapters", help="of each book, FIRST-LAST, counted from 1 (default: all)")
    options = arguments.parse_args()
    first, last = 1, None
    if options.chapters:
        first, last = (int(number) for number in options.chapters.split("-"))
    chapters = [
        chapter_text(path) for book in options.books for path in chapter_files(book)[first - 1 : last]
    ]
    options.out.write_text("\n\n\n".join(chapters) + "\n", encoding="utf-8")
    print(f"{options.out}: {len(chapters)} chapters, {options.out.stat().st_size} bytes")


if __name__ == "__main__":
    main()
