"""The verbs as functions: read a model, convert it, validate the result.

>>> import lconvert
>>> model = lconvert.read("examples/demo_model")
>>> model.arch.layers, len(model.entries)
(3, 29)

A source may be a path or a model that passes have changed; `result` has the paths, the measured verdicts and the manifest:

>>> result = lconvert.convert(model, "demo.gguf", ftype="Q4_K_M", force=True)
>>> result.paths[0].name, result.plan.size
('demo.gguf', 1538656)
>>> {i.type: str(i.verdict.kind) for i in result.plan.items()}
{'F32': 'widened', 'Q6_K': 'quantized', 'Q4_K': 'quantized'}

The proof, here without the runtimes:

>>> report = lconvert.validate("examples/demo_model", "demo.gguf", tiers=["structure", "tensors"])
>>> report.passed, report.exit_code
(True, 0)

What is wrong is an `lconvert.errors.LconvertError` with a message of one sentence:

>>> lconvert.convert("examples/demo_model", "demo.bin")
Traceback (most recent call last):
    ...
lconvert.errors.OptionError: demo.bin: the output must end in .gguf
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict, Unpack

from lconvert.converters import read

from .errors import OptionError
from .executor import Progress, Result, execute
from .plan import Plan

__all__ = ["convert", "plan_gguf", "read", "validate"]

if TYPE_CHECKING:
    from lconvert.converters import gguf
    from lconvert.formats.imatrix import Imatrix
    from lconvert.validators.parity import Report

    from .ir import Model


class GGUFOptions(TypedDict, total=False):
    """How to lower to GGUF; see `lconvert hf-to-gguf --help` for the options' meaning."""

    ftype: str | None
    pure: bool
    leave_output_tensor: bool
    output_tensor_type: str | None
    token_embedding_type: str | None
    tensor_types: Sequence[tuple[str, str]]
    imatrix: str | Path | Mapping[str, Any] | None
    split_max_size: int | None
    allow_requantize: bool
    allow_loss: Sequence[str]
    name: str | None


def plan_gguf(model: Model, out: str | Path, **options: Unpack[GGUFOptions]) -> Plan:
    """The plan of a GGUF file."""
    from lconvert.converters import gguf

    return gguf.plan(model, Path(out).name, gguf_options(**options))


def gguf_options(**options: Unpack[GGUFOptions]) -> gguf.Options:
    """How to lower to GGUF, as the converter takes it."""
    from lconvert.converters import gguf, gguf_mixture

    if unknown := options.keys() - GGUFOptions.__annotations__.keys():
        raise TypeError(f"unknown options of a GGUF file: {', '.join(sorted(unknown))}")
    weights = _importances(options.get("imatrix"))
    types = gguf_mixture.Options(
        ftype=options.get("ftype") or "COPY",
        pure=options.get("pure", False),
        leave_output_tensor=options.get("leave_output_tensor", False),
        output_tensor_type=options.get("output_tensor_type"),
        token_embedding_type=options.get("token_embedding_type"),
        tensor_types=tuple(options.get("tensor_types", ())),
        imatrix=None if weights is None else frozenset(weights),
    )
    return gguf.Options(
        types,
        imatrix=weights,
        split_max_size=options.get("split_max_size"),
        allow_requantize=options.get("allow_requantize", False),
        allow_loss=tuple(options.get("allow_loss", ())),
        name=options.get("name"),
    )


def _importances(imatrix: str | Path | Mapping[str, Any] | None) -> Imatrix | None:
    """An importance matrix from a file, or from arrays by tensor name; an empty one is none."""
    from lconvert.formats.imatrix import Imatrix, read

    if imatrix is None:
        return None
    if isinstance(imatrix, str | Path):
        found = read(Path(imatrix))
    else:
        found = imatrix if isinstance(imatrix, Imatrix) else Imatrix(Path("(given as arrays)"), imatrix)
    return found if len(found) else None


def convert(
    source: str | Path | Model,
    out: str | Path,
    *,
    threads: int | None = None,
    force: bool = False,
    resume: bool = False,
    progress: Progress | None = None,
    **options: Unpack[GGUFOptions],
) -> Result:
    """Convert to the format that `out` names (.gguf) and return what was written.

    Nothing appears under the final name unless all of it is complete.
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
