"""How far a compressed artifact is from its source (validators/yardstick.py), and how many bytes it takes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lconvert
from lconvert.validators import stored, yardstick


class Yardstick:
    """The source's logits on `windows` windows of a text."""

    def __init__(self, source: Path, text: Path, windows: int) -> None:
        model = lconvert.read(str(source))
        self._measure = yardstick.Yardstick(model, yardstick.text_windows(model, text, windows))

    def __call__(self, candidate: Path) -> dict[str, Any]:
        return {**self._measure(lconvert.read(str(candidate))), "bytes": stored.stored(candidate)[0]}
