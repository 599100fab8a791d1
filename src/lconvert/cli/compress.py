"""`lconvert compress`: a recipe applied to a model, kept in lconvert's own format."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from lconvert.cli import calibrating, producing
from lconvert.cli.calibrating import How
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
    "--recipe", help="Recipe file (YAML) or name; see `lconvert recipes`. Without one, a plain copy."
)
@click.option("--dry-run", is_flag=True, help="Show the plan; write nothing.")
@click.option("--json", "as_json", is_flag=True, help="Machine-readable output on stdout.")
@click.option("--force", is_flag=True, help="Replace an existing output.")
@click.option("--resume", is_flag=True, help="Continue a run that was killed, from its last finished layer.")
@calibrating.options
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
    how: How,
) -> int:
    """Compress SOURCE by a recipe and write it as an .lcir folder, which every converter reads.

    --method takes the place of round-to-nearest in the recipe; without one it rounds to int4 in groups of 128. modelopt:CONFIG takes
    no recipe: NVIDIA's ModelOpt compresses SOURCE in an environment of its own, and what it exports is kept as it is.

    \b
    Examples:
      lconvert compress ./my-model -o my-model.lcir --recipe int4-g128
      lconvert compress ./my-model -o my-model.lcir --recipe fp8-static --calibrate text.txt
      lconvert compress ./my-model -o my-model.lcir --recipe recipe.yaml
      lconvert compress ./my-model -o my-model.lcir --method modelopt:INT4_AWQ_CFG --calibrate text.txt
      lconvert hf-to-gguf my-model.lcir -o my-model.gguf
    """
    from lconvert import recipe as recipes
    from lconvert.converters import lcir, methods
    from lconvert.errors import OptionError
    from lconvert.executor import execute
    from lconvert.primitives.job import Job

    if output.suffix != ".lcir":
        raise OptionError(f"{output}: the output must end in .lcir")
    passes = recipes.load(recipe) if recipe else recipes.Recipe("", ())
    if how.method is not None:
        passes = methods.applied(
            how.method, passes if recipe else methods.without_preset("compress", how.method), how.text
        )
    producing.alone(how, f"--recipe {recipe}" if recipe else None)
    run: dict[str, Any] = {"dry_run": dry_run, "force": force, "resume": resume, "threads": threads}
    with producing.source(how, source, output, **run) as found:
        model = found.model
        if how.method is not None:
            methods.something_to_round(how.method, passes, model)
        if dry_run:
            outline = methods.outline(passes)
            plan = lcir.plan(outline.apply(model, Job(how.calibrated(passes))), {})
            return print_plan(calibrating.outlined(plan, passes), as_json)
        calibrating.possible(passes, model, output, force, lambda m: lcir.plan(m, {}))
        with calibrating.run(how, passes, model, output, resume=resume, threads=threads) as job:
            compressed = calibrating.applied(passes, model, job)
            plan = found.recorded(calibrating.recorded(lcir.plan(compressed, {}), passes, job, model))
            with progress_bar("writing", plan.size) as tell:
                result = execute(plan, output, threads=threads, force=force, resume=resume, progress=tell)
    if not no_card:
        write_card(source, result, folder=output)
    if as_json:
        said = {k: plan.options.get(k) for k in ("recipe", "calibration", "producer")}
        files = [str(p) for p in result.paths]
        report, manifest = list(plan.notes), dict(result.manifest)
        click.echo(json.dumps({"files": files, **said, "report": report, "manifest": manifest}, indent=1))
    else:
        print_result(result)
    return 0
