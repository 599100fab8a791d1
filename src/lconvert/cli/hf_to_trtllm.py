"""`lconvert hf-to-trtllm`: any source to a folder that TensorRT-LLM's PyTorch backend serves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from lconvert.cli.exporting import flags, natural, run_preset
from lconvert.converters import targets


@click.command("hf-to-trtllm")
@flags(targets.TENSORRT_LLM, group="Weights per scale of the integer flags.")
def command(source: str, output: Path | None, preset: str | None, **rest: Any) -> int:
    """Write SOURCE (a checkpoint, quantized or not, a GGUF file, an .lcir folder) as a folder for TensorRT-LLM.

    The folder has ModelOpt's unified layout (hf_quant_config.json), or gpt-oss's own if its experts are MXFP4; trtllm-serve
    loads both. Without a flag everything keeps the numbers it has, or is refused with a reason. TensorRT-LLM itself needs a
    GPU and is not part of the proof. --method says how a flag rounds; without a flag it takes --w4a16-awq or --w8a8-sq.

    \b
    Examples:
      lconvert hf-to-trtllm ./model-NVFP4 -o served
      lconvert hf-to-trtllm ./my-model --fp8 --calibrate text.txt
      lconvert hf-to-trtllm ./model-GPTQ-g128 -o served --dry-run
    """
    preset = natural(preset, rest["how"], {"w4": "w4a16-awq", "w8a8": "w8a8-sq"})
    target, served = "dense" if preset == "dense" else "tensorrt-llm", "tensorrt-llm"
    return run_preset(
        source, output, target, targets.TENSORRT_LLM, preset=preset, served=served, ending="trtllm", **rest
    )
