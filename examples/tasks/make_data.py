"""Writes the data of the tasks in this folder from any English prose, the same for the same text:

    python examples/tasks/make_data.py validators/text/excerpt.txt examples/tasks

Paragraphs are separated by blank lines. No model is asked anything, so no model is favoured.
"""

from __future__ import annotations

import json
import random
import re
import sys
from collections.abc import Iterable
from pathlib import Path

QUESTIONS, WORDS, PASSAGES = 150, 200, 30
HALF = 12  # words of a sentence's ending that a question shows
BEFORE = 40  # words of text before the sentence


def paragraphs(text: str) -> list[str]:
    found = (" ".join(p.split()) for p in text.split("\n\n"))
    return [p for p in found if len(p.split()) >= 60]


def endings(texts: Iterable[str]) -> list[tuple[str, str]]:
    """(text up to the middle of a sentence, the next HALF words) of every sentence long enough."""
    out = []
    for text in texts:
        at = 0
        for sentence in re.split(r"(?<=[.!?])\s+", text):
            words, before = sentence.split(), text[:at].split()
            at += len(sentence) + 1
            middle = len(words) // 2
            if middle >= HALF:
                context = [*before[-BEFORE:], *words[:middle]]
                out.append((" ".join(context), " ".join(words[middle : middle + HALF])))
    return out


def questions(texts: list[str], rng: random.Random) -> list[dict[str, object]]:
    """The true ending, at a random place among three with two neighbouring words exchanged."""
    out = []
    for context, ending in rng.sample(endings(texts), QUESTIONS):
        words = ending.split()
        places = [i for i in range(HALF - 1) if words[i] != words[i + 1]]
        choices = [" ".join(exchanged(words, i)) for i in rng.sample(places, 3)]
        right = rng.randrange(4)
        choices.insert(right, ending)
        out.append({"context": context, "choices": choices, "right": right})
    return out


def exchanged(words: list[str], i: int) -> list[str]:
    return [*words[:i], words[i + 1], words[i], *words[i + 2 :]]


def next_words(texts: list[str], rng: random.Random) -> list[dict[str, object]]:
    """BEFORE words of text and the word after them."""
    places = []
    for text in texts:
        words = text.split()
        places += [(words[i - BEFORE : i], words[i]) for i in range(BEFORE, len(words)) if words[i].isalpha()]
    return [{"context": " ".join(c), "word": w} for c, w in rng.sample(places, WORDS)]


def main(source: str, folder: str) -> None:
    texts = paragraphs(Path(source).read_text(encoding="utf-8"))
    rng = random.Random(0)
    data = {
        "endings": questions(texts, rng),
        "next_word": next_words(texts, rng),
        "prose": [{"text": t} for t in rng.sample(texts, PASSAGES)],
    }
    for name, rows in data.items():
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (Path(folder) / f"{name}.jsonl").write_text(lines, encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
