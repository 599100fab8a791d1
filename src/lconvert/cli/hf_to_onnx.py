"""`lconvert hf-to-onnx`: any source to an ONNX graph."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lconvert.cli import calibrating
from lconvert.cli.calibrating import How
from lconvert.cli.common import file_stem
from lconvert.cli.exporting import decorated, natural, one_of, output_options, write
from lconvert.converters import methods, onnx_presets
from lconvert.converters import onnx_classifier_presets as classifiers
from lconvert.errors import OptionError
from lconvert.ir import Decoder
from lconvert.passes import examples

if TYPE_CHECKING:
    from lconvert.ir import Model
    from lconvert.plan import Plan

_DIALECTS = {
    "ort": "standard operators in F32, for ONNX Runtime",
    "trt": "within TensorRT's rules, F16 or BF16",
    "genai": "ONNX Runtime's own operators, for onnxruntime-genai",
}
_FLOATS = {
    "fp32": ("F32", " [default for ort and genai]"),
    "fp16": ("F16", " [default for trt]"),
    "bf16": ("BF16", ""),
}
_RUN = {
    "ort": "run it: python examples/onnx_generate.py {out} 'Once upon a time'",
    "trt": "build an engine: lconvert build-engine {out} -o model.plan",
    "genai": "run it: onnxruntime_genai.Model({out!r}) in Python",
}
#: The same of encoders and networks of images.
_RUN_OTHERS = {
    "ort": "run it: python examples/onnx_classify.py {out} 'A text', or FILE.npz; measure it: lconvert bench {out}",
    "trt": _RUN["trt"],
}


def _arguments() -> tuple[Any, ...]:
    dialects = "; ".join(f"{name}: {about}" for name, about in _DIALECTS.items())
    return (
        click.argument("source"),
        click.option("-o", "--output", type=click.Path(path_type=Path), help="Output folder [default: NAME-onnx-FLAG]."),
        *one_of("dtype", {name: f"A graph in {dtype}{more}" for name, (dtype, more) in _FLOATS.items()}),
        *one_of("preset", {name: p.about for name, p in onnx_presets.PRESETS.items()}),
        click.option("--dialect", type=click.Choice(list(_DIALECTS)), default="ort", show_default=True, help=f"{dialects}."),
        click.option("--block-size", type=int, help="Weights per scale of --int4 [default: 32] and --int8 [default: a row]."),
        calibrating.options,
        click.option("--observer", type=click.Choice(classifiers.OBSERVERS), help="How --w8a8 of encoders and image networks cuts ranges [default: minmax]."),
        click.option("--recipe", help="Recipe file (YAML) or name instead of a flag; see `lconvert recipes`."),
        click.option("--prefill-only", is_flag=True, help="Logits of a prompt; no keys and values in or out."),
        click.option("--static-cache", is_flag=True, help="Keys and values in a cache of fixed length, written in place (TensorScatter)."),
        click.option("--last-logit", is_flag=True, help="Logits of the last token alone."),
        click.option("--positions", type=click.IntRange(1), help="Positions the graph is for [default: the model's context]."),
        output_options,
    )  # fmt: skip


@click.command("hf-to-onnx")
@lambda command: decorated(command, _arguments())
def command(
    source: str,
    output: Path | None,
    dtype: str | None,
    preset: str | None,
    dialect: str,
    block_size: int | None,
    observer: str | None,
    recipe: str | None,
    prefill_only: bool,
    static_cache: bool,
    last_logit: bool,
    positions: int | None,
    how: How,
    **rest: Any,
) -> int:
    """Write SOURCE (a checkpoint, quantized or not, a GGUF file, an .lcir folder) as a folder with an ONNX graph.

    What is quantized keeps its integers and scales: ONNX Runtime and TensorRT multiply by them as they are. A flag
    quantizes what is plain yet, by --method; without a flag --method takes --int4 or --w8a8. The folder has model.onnx, its weights beside it in
    model.onnx.data, the configuration, the tokenizer and a manifest.

    \b
    Examples:
      lconvert hf-to-onnx ./my-model --int4
      lconvert hf-to-onnx ./model-GPTQ -o served
      lconvert hf-to-onnx ./my-model --w8a8 --calibrate text.txt
      lconvert hf-to-onnx ./my-bert --w8a8 --calibrate sentences.txt --observer mse
      lconvert hf-to-onnx ./my-convnet --w8a8 --calibrate images.npz
      lconvert hf-to-onnx ./my-model --dialect trt --bf16 --int4 --block-size 128
      lconvert hf-to-onnx model-Q4_0.gguf --dry-run
    """
    from lconvert import recipe as recipes

    if block_size is not None and preset is None:
        raise OptionError("--block-size says how to quantize; add --int4 or --int8")
    if observer is not None and preset is None:
        raise OptionError("--observer chooses ranges of static inputs; add --w8a8 and --calibrate")
    if recipe is not None and preset is not None:
        raise OptionError(f"--recipe and --{preset} both say how to quantize; choose one")
    passes = recipes.load(recipe) if recipe else None
    if passes is None:
        preset = natural(preset, how, {"w4": "int4", "w8a8": "w8a8"})
    if preset is not None:
        passes = onnx_presets.recipe(
            preset,
            dialect,
            calibration=how.text,
            block=block_size,
            observer=observer,
            method=how.method or "",
        )
    elif passes is not None and how.method is not None:
        passes = methods.applied(how.method, passes, how.text)
    chosen: dict[str, Any] = {
        "dialect": dialect,
        "dtype": _FLOATS[dtype][0] if dtype else None,
        "prefill_only": prefill_only,
        "static_cache": static_cache,
        "last_logit": last_logit,
        "positions": positions,
    }

    def plan(model: Model, original: Model) -> Plan:
        from lconvert.converters import onnx

        return onnx.plan(model, onnx.Options(**chosen), original)

    name = file_stem(Path(source).name)
    out = output or Path("-".join([name, "onnx", *([preset] if preset else [])]))
    if rest["text"] is None and how.calibration is not None and examples.is_arrays(how.calibration):
        rest["text"] = how.calibration

    def hint(model: Model) -> str:
        line = _RUN[dialect] if isinstance(model.arch, Decoder) else _RUN_OTHERS[dialect]
        return line.format(out=shlex.quote(str(out)))

    return write(source, out, passes, plan, folder=True, hint=hint, how=how, **rest)
