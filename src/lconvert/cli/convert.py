"""`lconvert convert`: any source to any target."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from lconvert.cli.calibrating import How
from lconvert.cli.exporting import options, run
from lconvert.converters import methods
from lconvert.converters.targets import OFFERED


@click.command("convert")
@click.argument("source")
@click.option("--to", "target", type=click.Choice(OFFERED), required=True, help="What to write.")
@click.option(
    "-o", "--output", type=click.Path(path_type=Path), help="Output file or folder [default: NAME-TARGET]."
)
@click.option("--recipe", help="Recipe file (YAML) or name, to apply first; see `lconvert recipes`.")
@options
def command(source: str, target: str, output: Path | None, recipe: str | None, how: How, **rest: Any) -> int:
    """Write SOURCE in another format, every number carried exactly or refused with a reason.

    SOURCE is a checkpoint (plain, GPTQ, AWQ, compressed-tensors, FP8, ModelOpt, bitsandbytes ...), a GGUF file or an .lcir
    folder. `lconvert carry SOURCE` shows beforehand what each target would hold. --recipe and --method quantize what is plain
    yet; a method without a recipe rounds to int4 in groups of 128.

    \b
    Examples:
      lconvert convert ./model-GPTQ --to gguf
      lconvert convert ./model-AWQ --to compressed-tensors -o out
      lconvert convert model-Q8_0.gguf --to gptq
      lconvert convert ./my-model --to awq --recipe uint4-g32
    """
    from lconvert import recipe as recipes
    from lconvert.cli.common import file_stem, must_end

    file = {"gguf": ".gguf", "ir": ".lcir"}.get(target)
    ending = file or f"-{target}"
    if output and file:
        must_end(output, file)
    out = output or Path(file_stem(Path(source).name.removesuffix(".gguf").removesuffix(".lcir")) + ending)
    loaded = recipes.load(recipe) if recipe else None
    if how.method is not None:
        loaded = methods.applied(how.method, loaded or methods.without_preset(target, how.method), how.text)
    return run(source, out, target, loaded, how=how, **rest)
