"""`lconvert compress`: a recipe applied to a model, kept in lconvert's own format."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from lconvert.cli import allocating
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
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Output folder, NAME.lcir.")
@click.option(
    "--recipe", help="Recipe file (YAML) or preset; see `lconvert recipes`. Without one, a plain copy."
)
@allocating.options
@click.option("--dry-run", is_flag=True, help="Show the plan; write nothing.")
@click.option("--json", "as_json", is_flag=True, help="Machine-readable output on stdout.")
@click.option("--force", is_flag=True, help="Replace an existing output.")
@click.option("--resume", is_flag=True, help="Continue a run that was killed.")
@no_card_option
@threads_option
def command(
    source: str,
    output: Path | None,
    recipe: str | None,
    dry_run: bool,
    as_json: bool,
    force: bool,
    resume: bool,
    no_card: bool,
    threads: int | None,
    **given: Any,
) -> int:
    """Compress SOURCE by a recipe, or by choosing a type per matrix under a budget (--target), and write it as an .lcir folder, which
    every converter reads.

    \b
    Examples:
      lconvert compress ./my-model -o my-model.lcir --recipe int4-g128
      lconvert compress ./my-model -o my-model.lcir --recipe recipe.yaml
      lconvert compress ./my-model -o my-model.lcir --target gguf --bpw 4.25 --calibrate text.txt
      lconvert compress ./my-model --target gguf --max-kld 0.02 --calibrate text.txt --recipe-out small.yaml
      lconvert hf-to-gguf my-model.lcir -o my-model.gguf
    """
    import lconvert
    from lconvert import recipe as recipes
    from lconvert.converters import lcir
    from lconvert.errors import OptionError
    from lconvert.executor import execute
    from lconvert.primitives.job import Calibration, Job

    wanted = allocating.request(given)
    if output is None and wanted.recipe_out is None:
        raise OptionError(
            "nothing to write: give an output with -o NAME.lcir, or --recipe-out FILE with --target"
        )
    if output is not None and output.suffix != ".lcir":
        raise OptionError(f"{output}: the output must end in .lcir")
    if recipe and wanted.wanted:
        raise OptionError("--recipe and --target both say what becomes of each matrix; give one")
    job = Job(Calibration(str(wanted.calibrate or "")), threads=threads)
    loaded = recipes.load(recipe) if recipe else None
    model = lconvert.read(source)
    if loaded:
        model = loaded.apply(model, job)
    if wanted.wanted:
        model = allocating.run(model, wanted, job, quiet=as_json)
    if output is None:
        return 0
    plan = lcir.plan(model, {"recipe": loaded.name if loaded else wanted.target})
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
