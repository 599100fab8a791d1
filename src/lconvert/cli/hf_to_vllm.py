"""`lconvert hf-to-vllm`: any source to a folder that vLLM serves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from lconvert.cli.exporting import flags, natural, run_preset
from lconvert.converters import targets


@click.command("hf-to-vllm")
@flags(targets.VLLM, group="Weights per scale of the integer flags (-1: a row).")
def command(source: str, output: Path | None, preset: str | None, **rest: Any) -> int:
    """Write SOURCE (a checkpoint, quantized or not, a GGUF file, an .lcir folder) as a folder that vLLM serves.

    Without a flag everything keeps the numbers it has: what is quantized is carried exactly or refused with a reason, what
    is plain stays plain. A flag quantizes what is plain yet, by --method; without a flag --method takes --w4a16 or --w8a8. The
    format is compressed-tensors but for --gptq, --awq and --dense, and for gpt-oss with experts in MXFP4, which has a layout
    of its own.

    \b
    Examples:
      lconvert hf-to-vllm ./model-GPTQ -o served
      lconvert hf-to-vllm ./my-model --w4a16
      lconvert hf-to-vllm ./my-model --fp8 --kv-fp8 --calibrate text.txt
      lconvert hf-to-vllm model-Q4_0.gguf -o served --dry-run
    """
    preset = natural(preset, rest["how"], {"w4": "w4a16", "w4z": "w4a16-asym", "w8a8": "w8a8"})
    format = targets.VLLM[preset].format if preset else "compressed-tensors"
    target = targets.for_vllm(format)
    return run_preset(source, output, target, targets.VLLM, preset=preset, ending="vllm", **rest)
