"""Ecosystems to the IR and back. `read` finds the reader for a path."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from lconvert.errors import InputError, UnsupportedError

if TYPE_CHECKING:
    from lconvert.ir import Model


def read(source: str | Path) -> Model:
    """A model from a Hugging Face folder or hub name, a GGUF file, an .lcir folder, or an ONNX graph that lconvert wrote.

    Costs the headers; weights are read when they are used. Raises InputError for damaged input and
    UnsupportedError for what cannot be represented exactly.
    """
    try:
        path = Path(source).expanduser()
        kind = "file" if path.is_file() else "lcir" if (path / "lcir.json").exists() else "other"
    except (
        OSError,
        RuntimeError,
    ) as e:  # a name too long, an unknown user's ~, a folder that is closed to us
        reason = getattr(e, "strerror", None) or e
        raise InputError(f"{str(source)[:80]!r}: cannot be read: {reason}") from None
    if kind == "file":
        return _read_file(path)
    if kind == "lcir":
        return _read_lcir(path)
    if (path / "model.onnx").is_file() and not any(path.glob("*.safetensors")):
        return _read_file(path / "model.onnx")
    from lconvert.converters import hf

    return hf.read(source)


def _read_file(path: Path) -> Model:
    if path.suffix == ".gguf":
        from lconvert.converters import gguf_source

        return gguf_source.read(path)
    if path.suffix == ".onnx":
        from lconvert.converters import onnx_source

        return onnx_source.load(path)
    if path.suffix in (".bin", ".pt", ".pth", ".ckpt"):
        raise UnsupportedError(
            f"{path}: pickle files can run code when they are opened, so lconvert never does; save the model as "
            "safetensors and give its folder"
        )
    if path.suffix in (".safetensors", ".json"):
        raise InputError(f"{path}: one file of a model; give the folder that holds it, {path.parent}")
    raise InputError(
        f"{path}: not a model that lconvert knows; give a Hugging Face folder, a .gguf file or an .lcir folder"
    )


def _read_lcir(path: Path) -> Model:
    from lconvert.converters.tokenizer_hf import check_json
    from lconvert.formats import ir

    model = ir.read(path)
    if model.tokenizer is not None:
        check_json(model.tokenizer.json, f"{path / ir.META}: tokenizer")
    return model
