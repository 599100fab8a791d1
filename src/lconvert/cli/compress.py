"""`lconvert compress`: a recipe applied to a model, kept in lconvert's own format."""

from __future__ import annotations

import json
from pathlib import Path

import click

from lconvert.cli.common import (
    no_card_option,
    print_plan,
    print_result,
    progress_bar,
    threads_option,
    write_card,
)


@click.command("compress")
@click.argument("source")
@click.option(
    "-o", "--output", type=click.Path(path_type=Path), required=True, help="Output folder, NAME.lcir."
)
@click.option(
    "--recipe", help="Recipe file (YAML) or preset; see `lconvert recipes`. Without one, a plain copy."
)
@click.option("--dry-run", is_flag=True, help="Show the plan; write nothing.")
@click.option("--json", "as_json", is_flag=True, help="Machine-readable output on stdout.")
@click.option("--force", is_flag=True, help="Replace an existing output.")
@click.option("--resume", is_flag=True, help="Continue a run that was killed.")
@no_card_option
@threads_option
def command(
    source: str,
    output: Path,
    recipe: str | None,
    dry_run: bool,
    as_json: bool,
    force: bool,
    resume: bool,
    no_card: bool,
    threads: int | None,
) -> int:
    """Compress SOURCE by a recipe and write it as an .lcir folder, which every converter reads.

    \b
    Examples:
      lconvert compress ./my-model -o my-model.lcir --recipe int4-g128
      lconvert compress ./my-model -o my-model.lcir --recipe recipe.yaml
      lconvert hf-to-gguf my-model.lcir -o my-model.gguf
    """
    import lconvert
    from lconvert import recipe as recipes
    from lconvert.converters import lcir
    from lconvert.errors import OptionError
    from lconvert.executor import execute

    if output.suffix != ".lcir":
        raise OptionError(f"{output}: the output must end in .lcir")
    loaded = recipes.load(recipe) if recipe else None
    model = lconvert.read(source)
    if loaded:
        model = loaded.apply(model)
    plan = lcir.plan(model, {"recipe": loaded.name if loaded else None})
    if dry_run:
        return print_plan(plan, as_json)
    with progress_bar("compressing", plan.size) as tell:
        result = execute(plan, output, threads=threads, force=force, resume=resume, progress=tell)
    if not no_card:
        write_card(source, result, folder=output)
    if as_json:
        click.echo(
            json.dumps({"files": [str(p) for p in result.paths], "manifest": dict(result.manifest)}, indent=1)
        )
    else:
        print_result(result)
    return 0
