"""Ecosystems to the IR and back. `read` finds the reader for a path."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from lconvert.errors import InputError

if TYPE_CHECKING:
    from lconvert.ir import Model


def read(source: str | Path) -> Model:
    """A model from a Hugging Face folder or hub name, a GGUF file, or an .lcir folder.

    Costs the headers; weights are read when they are used. Raises InputError for damaged input and
    UnsupportedError for what cannot be represented exactly.
    """
    path = Path(source).expanduser()
    if path.is_file():
        if path.suffix == ".gguf":
            from lconvert.converters import gguf_source

            return gguf_source.read(path)
        raise InputError(
            f"{path}: not a model that lconvert knows; give a Hugging Face folder, a .gguf file or an .lcir folder"
        )
    if (path / "lcir.json").exists():
        from lconvert.formats import ir

        return ir.read(path)
    from lconvert.converters import hf

    return hf.read(source)
