"""What the flags of hf-to-onnx do to weights that are not quantized yet, and which consumers run the result.

Imports without NumPy: the help of the verb is made of this table.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from lconvert.converters import targets
from lconvert.converters.onnx_classifier_presets import ByKind, Chosen, Later
from lconvert.converters.targets import Preset
from lconvert.errors import OptionError
from lconvert.recipe import Recipe

#: Every product with a matrix, the head among them, and the embedding: a table whose rows are looked up.
_PRODUCTS = r".*\.(q|k|v|o|q_a|q_b|kv_a|k_b|v_b|gate|up|down)|head"
_ALL = _PRODUCTS + "|embed"

PRESETS: Mapping[str, Preset] = {
    "int4": Preset("int4 weights, symmetric, blocks of 32, the head too; int8 for the embedding", "onnx",
                   (("rtn", {"grid": "int4", "group": 32, "search": "signed-max", "targets": _ALL, "grids": {"embed": "int8"}}),)),
    "int8": Preset("int8 weights, a scale per row, the head and the embedding too", "onnx",
                   (("rtn", {"grid": "int8", "group": -1, "search": "signed-max", "targets": _ALL}),)),
    "w8a8": Preset("int8 weights per row, int8 activations, static (--calibrate)", "onnx",
                   (("rtn", {"grid": "int8", "group": -1}), ("activations", {"grid": "int8", "dynamic": False})), True),
    "fp8": Preset("FP8 weights and activations, a scale per tensor, static (--calibrate)", "onnx",
                  (("rtn", {"grid": "fp8", "group": "tensor"}), ("activations", {"grid": "fp8", "dynamic": False})), True),
    "nvfp4": Preset("NVFP4 weights (TensorRT)", "onnx", (("rtn", {"grid": "fp4"}),)),
}  # fmt: skip

#: Flags whose result a dialect does not run, and why.
REFUSED: Mapping[tuple[str, str], str] = {
    ("ort", "nvfp4"): "ONNX Runtime's CPU has no FP4 operators (NOT_IMPLEMENTED); --dialect trt has them, --int4 runs here",
    ("genai", "nvfp4"): "MatMulNBits holds integers only; --dialect trt has FP4, --int4 runs here",
    ("genai", "w8a8"): "its graph multiplies by MatMulNBits, whose inputs are floats; --dialect ort has static int8",
    ("genai", "fp8"): "MatMulNBits holds integers only; --dialect trt and ort have FP8",
}  # fmt: skip
#: Where only whole matrices can be quantized, TensorRT looks rows up in floats, and scales must not be negative.
_TENSORRT = ("trt",)


def recipe(
    preset: str,
    dialect: str,
    *,
    calibration: str = "",
    block: int | None = None,
    observer: str | None = None,
    method: str = "",
) -> Recipe:
    """The passes of a flag, by a method; OptionError where the dialect does not run them or an option does not apply. What depends on the kind of
    model (onnx_classifier_presets.py) is said when it is applied."""
    if reason := REFUSED.get((dialect, preset)):
        raise OptionError(f"--{preset} with --dialect {dialect}: {reason}")
    if block is not None and preset not in ("int4", "int8"):
        raise OptionError(f"--block-size does not apply to --{preset}, whose blocks are fixed")
    if block is not None and (block < 16 or block & (block - 1)):
        raise OptionError(
            f"--block-size {block}: consumers take powers of two from 16 on; choose 32, 64 or 128"
        )
    chosen = Chosen(preset, dialect, calibration, block, observer, method)
    if PRESETS[preset].calibrated and not calibration:
        missing = f"--{preset} has static scales, which a text must show; add --calibrate TEXT"
        return Later(f"--{preset}", (), chosen=chosen, reason=missing)
    made = targets.recipe(preset, _table(dialect), calibration=calibration, group=block, method=method)
    return ByKind(made.name, made.steps, made.about, made.calibration, chosen)


def _table(dialect: str) -> Mapping[str, Preset]:
    if dialect not in _TENSORRT:
        return PRESETS
    return {name: replace(p, steps=tuple(map(_for_tensorrt, p.steps))) for name, p in PRESETS.items()}


def _for_tensorrt(step: tuple[str, Mapping[str, Any]]) -> tuple[str, Mapping[str, Any]]:
    name, options = step
    others = {"targets": _PRODUCTS} if options.get("targets") == _ALL else {}
    return name, {k: v for k, v in options.items() if k not in ("search", "grids")} | others
