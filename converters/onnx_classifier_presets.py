"""What the flags of hf-to-onnx do to encoders and networks of images: other matrices than a decoder's, static inputs with an observer.

Imports without NumPy, as onnx_presets.py does.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from lconvert.errors import OptionError
from lconvert.ir import Convnet, Decoder, Model
from lconvert.primitives.job import Calibration
from lconvert.recipe import Recipe, Step, step

#: As passes/observers.py names them, which imports NumPy.
OBSERVERS = ("minmax", "percentile", "entropy", "mse")
#: Embeddings stay in floats: a table's rows are looked up, not multiplied.
_MATRICES: Mapping[str, Any] = {"targets": r".*", "ignore": r".*embed"}
_OTHERS = "--int8 has int8 weights, --w8a8 int8 inputs as well"


@dataclass(frozen=True)
class Chosen:
    """Options of the verb that concern quantization."""

    preset: str
    dialect: str
    calibration: str = ""
    block: int | None = None
    observer: str | None = None
    method: str = ""


@dataclass(frozen=True)
class ByKind(Recipe):
    """A flag's passes: `steps` for a decoder, others for another kind of model, which is known when it has been read."""

    chosen: Chosen = Chosen("", "")

    def of(self, model: Model) -> Recipe:
        c = self.chosen
        if not isinstance(model.arch, Decoder):
            return Recipe(self.name, _steps(model, c), calibration=Calibration(c.calibration))
        if c.observer is not None:
            raise OptionError(
                f"--observer: {model.source} is a language model, whose static scales cover all that was seen; leave it out"
            )
        return self.of_decoder()

    def of_decoder(self) -> Recipe:
        return self


@dataclass(frozen=True)
class Later(ByKind):
    """The same where a decoder's passes cannot be made: `reason` is raised for one."""

    reason: str = ""

    def of_decoder(self) -> Recipe:
        raise OptionError(self.reason)


def _steps(model: Model, c: Chosen) -> tuple[Step, ...]:
    """The passes for an encoder or a network of images; OptionError where there are none."""
    if c.dialect == "genai":
        _ = model.decoder  # refuses it by name
    if c.preset not in _STEPS:
        raise OptionError(f"--{c.preset}: {model.source} is a {model.arch.family}; {_OTHERS}")
    if c.method not in ("", "rtn"):
        raise OptionError(
            f"--method {c.method}: {model.source} is a {model.arch.family}; methods are for language models"
        )
    if c.observer is not None and c.preset != "w8a8":
        raise OptionError(
            f"--observer chooses ranges of inputs, which --{c.preset} leaves in floats; add it to --w8a8"
        )
    return (_STEPS[c.preset](model, c),)


def _search(c: Chosen) -> dict[str, str]:
    """Scales that leave no code unused are negative at times, which TensorRT refuses."""
    return {} if c.dialect == "trt" else {"search": "signed-max"}


def _int8(model: Model, c: Chosen) -> Step:
    if c.block is not None and isinstance(model.arch, Convnet):
        raise OptionError(
            "--block-size does not apply to a network of images, which has a scale per output channel"
        )
    return step("rtn", {"grid": "int8", "group": c.block or -1, **_search(c), **_MATRICES})


def _int4(model: Model, c: Chosen) -> Step:
    if isinstance(model.arch, Convnet):
        raise OptionError(f"--int4: convolutions are held in int8; {_OTHERS}")
    return step("rtn", {"grid": "int4", "group": c.block or 32, **_search(c), **_MATRICES})


def _w8a8(model: Model, c: Chosen) -> Step:
    from lconvert.passes.examples import wanted

    if not c.calibration:
        raise OptionError(
            f"--w8a8 has static scales, which examples must show; add --calibrate FILE: {wanted(model)}"
        )
    symmetric = c.dialect == "trt"  # TensorRT refuses zero points
    return step("static", {"observer": c.observer or "minmax", "symmetric": symmetric})


_STEPS: Mapping[str, Callable[[Model, Chosen], Step]] = {"int8": _int8, "int4": _int4, "w8a8": _w8a8}
