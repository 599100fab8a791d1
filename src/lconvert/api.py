"""The verbs as functions: read a model, convert it, validate the result.

>>> import lconvert                                                     # doctest: +SKIP
>>> model = lconvert.read("examples/demo_model")                        # doctest: +SKIP
>>> model.arch.layers, len(model.entries)                               # doctest: +SKIP
(2, 20)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import InputError, OptionError
from .plan import Plan, Progress, Result, execute

if TYPE_CHECKING:
    from lconvert.validators.parity import Report

    from .ir import Model


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
            f"{path}: not a model lconvert knows; give a Hugging Face folder, a .gguf file or an .lcir folder"
        )
    if (path / "lcir.json").exists():
        from lconvert.formats import ir

        return ir.read(path)
    from lconvert.converters import hf

    return hf.read(source)


def plan_gguf(
    model: Model,
    out: str | Path,
    *,
    ftype: str | None = None,
    pure: bool = False,
    leave_output_tensor: bool = False,
    output_tensor_type: str | None = None,
    token_embedding_type: str | None = None,
    tensor_types: Sequence[tuple[str, str]] = (),
    imatrix: str | Path | Mapping[str, Any] | None = None,
    split_max_size: int | None = None,
    allow_requantize: bool = False,
    allow_loss: Sequence[str] = (),
    name: str | None = None,
) -> Plan:
    """The plan of a GGUF file; see `lconvert hf-to-gguf --help` for the options' meaning."""
    from lconvert.converters import gguf, gguf_mixture

    weights: Mapping[str, Any] | None
    if isinstance(imatrix, str | Path):
        from lconvert.formats.imatrix import read as read_imatrix

        weights = read_imatrix(Path(imatrix))
    else:
        weights = imatrix
    types = gguf_mixture.Options(
        ftype=ftype or "COPY",
        pure=pure,
        leave_output_tensor=leave_output_tensor,
        output_tensor_type=output_tensor_type,
        token_embedding_type=token_embedding_type,
        tensor_types=tuple(tensor_types),
        imatrix=None if weights is None else frozenset(weights),
    )
    options = gguf.Options(
        types,
        imatrix=weights,
        split_max_size=split_max_size,
        allow_requantize=allow_requantize,
        allow_loss=tuple(allow_loss),
        name=name,
    )
    return gguf.plan(model, Path(out).name, options)


def convert(
    source: str | Path | Model,
    out: str | Path,
    *,
    threads: int | None = None,
    force: bool = False,
    resume: bool = False,
    progress: Progress | None = None,
    **options: Any,
) -> Result:
    """Convert to the format that `out` names (.gguf) and return what was written.

    `options` are those of `plan_gguf`. Nothing appears under the final name unless all of it is complete.
    """
    target = Path(out)
    if target.suffix != ".gguf":
        raise OptionError(f"{target}: the output must end in .gguf")
    model = read(source) if isinstance(source, str | Path) else source
    plan = plan_gguf(model, target, **options)
    return execute(plan, target.parent, threads=threads, force=force, resume=resume, progress=progress)


def validate(reference: str | Path, candidate: str | Path, **options: Any) -> Report:
    """Compare an artifact with the model it came from; see `lconvert validate --help`."""
    from lconvert.validators.parity import validate as run

    return run(reference, candidate, **options)
