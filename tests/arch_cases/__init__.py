"""Random models that stand for every architecture: one file per model_type, one `Case` per variant.

A file exposes CASES; the first case is the plainest and also the one whose traits the mutation tests remove. Every
config is tiny but unusual where it matters: fewer key-value heads than heads, contexts beyond windows and original
rope lengths, biases present.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Case:
    """One random model and what llama.cpp is expected to make of it.

    config: keyword arguments of the transformers config class, on top of SMALL in the same file.
    losses: names of the losses that the architecture file must declare, no more and no fewer.
    refused: whether converting needs --allow-trait-loss. loads: whether llama.cpp can open the file at all.
    exact: number of leading positions that must agree; None is all of them. wrong: mean KLD that the positions after
    `exact` exceed, which shows that the declared loss is real.
    floor: mean KLD against transformers in fp32. Models with GELU are compared twice: plainly, under `floor`, and
    with ggml's half-precision GELU table put into the reference, where almost only rounding is left.
    returns: model_type under which the GGUF is read back, where llama.cpp has one graph for several.
    tokens: length of the random prompt; context: n_ctx of llama.cpp (a multiple of 256).
    """

    id: str
    model_type: str
    config: Mapping[str, Any] = field(default_factory=dict)
    losses: tuple[str, ...] = ()
    refused: bool = False
    loads: bool = True
    exact: int | None = None
    wrong: float = 0.0
    floor: float = 1e-10
    returns: str = ""
    tokens: int = 200
    context: int = 256
    dtype: str = "float32"

    @property
    def name(self) -> str:
        return f"{self.model_type}-{self.id}"


def load() -> list[Case]:
    """The cases of every file in this folder, in order of file name."""
    names = sorted(m.name for m in pkgutil.iter_modules(__path__))
    return [c for n in names for c in importlib.import_module(f"{__name__}.{n}").CASES]


def some(per: int) -> list[str]:
    """Names of the first `per` cases of every architecture: the plainest, and what it is known for."""
    seen: dict[str, list[str]] = {}
    for case in load():
        seen.setdefault(case.model_type, []).append(case.name)
    return [name for names in seen.values() for name in names[:per]]
