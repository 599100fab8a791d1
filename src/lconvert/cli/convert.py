"""`lconvert convert`: any source to any target."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from lconvert.cli.exporting import options, run

TARGETS = (
    "gguf",
    "vllm",
    "tensorrt-llm",
    "compressed-tensors",
    "gptq",
    "gptq_v2",
    "awq",
    "fp8",
    "modelopt",
    "bitsandbytes",
    "mxfp4",
    "ir",
    "dense",
)


@click.command("convert")
@click.argument("source")
@click.option("--to", "target", type=click.Choice(TARGETS), required=True, help="What to write.")
@click.option(
    "-o", "--output", type=click.Path(path_type=Path), help="Output file or folder [default: NAME-TARGET]."
)
@click.option("--recipe", help="Recipe file (YAML) or preset to apply first; see `lconvert recipes`.")
@options
def command(source: str, target: str, output: Path | None, recipe: str | None, **rest: Any) -> int:
    """Write SOURCE in another format, every number carried exactly or refused with a reason.

    SOURCE is a checkpoint (plain, GPTQ, AWQ, compressed-tensors, FP8, ModelOpt, bitsandbytes ...), a GGUF file or an .lcir
    folder. `lconvert carry SOURCE` shows beforehand what each target would hold.

    \b
    Examples:
      lconvert convert ./model-GPTQ --to gguf
      lconvert convert ./model-AWQ --to compressed-tensors -o out
      lconvert convert model-Q8_0.gguf --to gptq
      lconvert convert ./my-model --to awq --recipe uint4-g32
    """
    from lconvert import recipe as recipes
    from lconvert.cli.common import file_stem

    ending = {"gguf": ".gguf", "ir": ".lcir"}.get(target, f"-{target}")
    out = output or Path(file_stem(Path(source).name.removesuffix(".gguf").removesuffix(".lcir")) + ending)
    loaded = recipes.load(recipe) if recipe else None
    return run(source, out, target, loaded, **rest)
