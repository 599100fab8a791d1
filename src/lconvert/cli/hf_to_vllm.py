"""`lconvert hf-to-vllm`: any source to a folder that vLLM serves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from lconvert.cli.exporting import options, preset_flags, run

#: Flag -> what it does to weights that are not quantized yet; converters/targets.py has the passes (a test compares them).
PRESETS = {
    "w4a16": "int4 weights, symmetric, groups of 128",
    "w4a16-asym": "int4 weights with zero points, groups of 128",
    "w8a16": "int8 weights, a scale per row",
    "w8a8": "int8 weights and activations, dynamic per token",
    "fp8": "FP8 weights (a scale per row) and activations, dynamic per token",
    "fp8-static": "FP8 weights and activations, a scale per tensor",
    "fp8-block": "FP8 weights in blocks of 128 x 128",
    "nvfp4": "NVFP4 weights and activations",
    "nvfp4a16": "NVFP4 weights",
    "mxfp4": "MXFP4 weights (of gpt-oss the experts alone)",
    "gptq": "int4 weights, symmetric, groups of 128, in a GPTQ folder",
    "awq": "int4 weights with zero points, groups of 128, in an AWQ folder",
    "dense": "plain weights",
}


@click.command("hf-to-vllm")
@click.argument("source")
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Output folder [default: NAME-FLAG].")
@preset_flags(PRESETS)
@click.option("--group", type=int, help="Weights per scale of the integer flags (-1: a row).")
@click.option("--kv-fp8", is_flag=True, help="Store scales for an FP8 KV cache.")
@click.option(
    "--calibration", type=click.Path(path_type=Path), help="Text that shows the range of activations."
)
@options
def command(
    source: str,
    output: Path | None,
    presets: str | None,
    group: int | None,
    kv_fp8: bool,
    calibration: Path | None,
    **rest: Any,
) -> int:
    """Write SOURCE (a checkpoint, quantized or not, a GGUF file, an .lcir folder) as a folder that vLLM serves.

    Without a flag everything keeps the numbers it has: what is quantized is carried exactly or refused with a reason, what
    is plain stays plain. A flag quantizes what is plain yet, rounding to nearest. The format is compressed-tensors but for
    --gptq, --awq and --dense, and for gpt-oss with experts in MXFP4, which has a layout of its own.

    \b
    Examples:
      lconvert hf-to-vllm ./model-GPTQ -o served
      lconvert hf-to-vllm ./my-model --w4a16
      lconvert hf-to-vllm ./my-model --fp8 --kv-fp8 --calibration text.txt
      lconvert hf-to-vllm model-Q4_0.gguf -o served --dry-run
    """
    from lconvert.cli.common import fail_fast_files, file_stem
    from lconvert.converters import targets

    fail_fast_files(read=[calibration])
    recipe = None
    if presets or kv_fp8:
        text = str(calibration or "")
        recipe = targets.recipe(presets or "dense", targets.VLLM, calibration=text, group=group, kv=kv_fp8)
    format = targets.VLLM[presets].format if presets else "compressed-tensors"
    out = output or Path(f"{file_stem(Path(source).name)}-{presets or 'vllm'}")
    return run(source, out, targets.for_vllm(format), recipe, **rest)
