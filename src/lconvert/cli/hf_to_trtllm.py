"""`lconvert hf-to-trtllm`: any source to a folder that TensorRT-LLM's PyTorch backend serves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from lconvert.cli.exporting import options, preset_flags, run

#: Flag -> what it does to weights that are not quantized yet; converters/targets.py has the passes (a test compares them).
PRESETS = {
    "fp8": "FP8, a scale per tensor, static activations",
    "fp8-pc-pt": "FP8, a scale per row, activations per token",
    "nvfp4": "NVFP4 weights and activations",
    "nvfp4a16": "NVFP4 weights",
    "w4a16-awq": "int4 weights, symmetric, groups of 128",
    "w8a8-sq": "int8 weights per row, static int8 activations",
    "dense": "plain weights",
}


@click.command("hf-to-trtllm")
@click.argument("source")
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Output folder [default: NAME-FLAG].")
@preset_flags(PRESETS)
@click.option("--group", type=int, help="Weights per scale of the integer flags.")
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
    """Write SOURCE (a checkpoint, quantized or not, a GGUF file, an .lcir folder) as a folder for TensorRT-LLM.

    The folder has ModelOpt's unified layout (hf_quant_config.json), or gpt-oss's own if its experts are MXFP4; trtllm-serve
    loads both. Without a flag everything keeps the numbers it has, or is refused with a reason. TensorRT-LLM itself needs a
    GPU and is not part of the proof.

    \b
    Examples:
      lconvert hf-to-trtllm ./model-NVFP4 -o served
      lconvert hf-to-trtllm ./my-model --fp8 --calibration text.txt
      lconvert hf-to-trtllm ./model-GPTQ-g128 -o served --dry-run
    """
    from lconvert.cli.common import fail_fast_files, file_stem
    from lconvert.converters import targets

    fail_fast_files(read=[calibration])
    recipe = None
    if presets or kv_fp8:
        text = str(calibration or "")
        recipe = targets.recipe(
            presets or "dense", targets.TENSORRT_LLM, calibration=text, group=group, kv=kv_fp8
        )
    out = output or Path(f"{file_stem(Path(source).name)}-{presets or 'trtllm'}")
    return run(
        source, out, "dense" if presets == "dense" else "tensorrt-llm", recipe, command="hf-to-trtllm", **rest
    )
