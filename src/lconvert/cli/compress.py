"""`lconvert compress`: a recipe applied to a model, kept in lconvert's own format."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from lconvert.cli import allocating, calibrating, producing
from lconvert.cli.calibrating import How
from lconvert.cli.common import (
    must_end,
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
    "--recipe",
    help="Recipe file (YAML) or name; see `lconvert recipes`. Without one, a plain copy, or what --method or --target say.",
)
@allocating.options
@click.option("--dry-run", is_flag=True, help="Show the plan; write nothing.")
@click.option("--json", "as_json", is_flag=True, help="Machine-readable output on stdout.")
@click.option("--force", is_flag=True, help="Replace an existing output.")
@click.option("--resume", is_flag=True, help="Continue a run that was killed, from its last finished layer.")
@calibrating.options
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
    how: How,
    **given: Any,
) -> int:
    """Compress SOURCE by a recipe, or by choosing a type per matrix under a budget (--target), and write it as an .lcir folder, which
    every converter reads.

    --method takes the place of round-to-nearest in the recipe, and in what --target chose; without either it rounds to int4 in groups of
    128. modelopt:CONFIG takes no recipe: NVIDIA's ModelOpt compresses SOURCE in an environment of its own, and what it exports is kept as
    it is.

    \b
    Examples:
      lconvert compress ./my-model -o my-model.lcir --recipe int4-g128
      lconvert compress ./my-model -o my-model.lcir --recipe fp8-static --calibrate text.txt
      lconvert compress ./my-model -o my-model.lcir --recipe recipe.yaml
      lconvert compress ./my-model -o my-model.lcir --target gguf --bpw 4.25 --calibrate text.txt
      lconvert compress ./my-model -o my-model.lcir --target gguf --size 4G --method gptq --calibrate text.txt
      lconvert compress ./my-model --target gguf --max-kld 0.02 --calibrate text.txt --recipe-out small.yaml
      lconvert compress ./my-model -o my-model.lcir --method modelopt:INT4_AWQ_CFG --calibrate text.txt
      lconvert hf-to-gguf my-model.lcir -o my-model.gguf
    """
    from lconvert import recipe as recipes
    from lconvert.converters import lcir, methods
    from lconvert.errors import OptionError
    from lconvert.executor import execute
    from lconvert.primitives.job import Job

    wanted = allocating.request(given)
    if output is None and wanted.recipe_out is None:
        raise OptionError(
            "nothing to write: give an output with -o NAME.lcir, or --recipe-out FILE with --target"
        )
    if output is not None:
        must_end(output, ".lcir")
    if wanted.wanted and recipe:
        raise OptionError("--recipe and --target both say what becomes of each matrix; give one of them")
    passes = recipes.load(recipe) if recipe else recipes.Recipe("", ())
    if how.method is not None and not wanted.wanted:
        passes = methods.applied(
            how.method, passes if recipe else methods.without_preset("compress", how.method), how.text
        )
    chosen = "--target" if wanted.wanted else f"--recipe {recipe}" if recipe else None
    producing.alone(how, chosen)
    run: dict[str, Any] = {"dry_run": dry_run, "force": force, "resume": resume, "threads": threads}
    with producing.source(how, source, output or Path(), **run) as found:
        model = found.model
        if wanted.wanted:
            calibrating.check_device(how.device)
            job = Job(how.calibrated(passes), how.device, how.activations, how.bytes(), threads=threads)
            passes = allocating.run(model, wanted, job, how.method, how.amount, quiet=as_json)
        if how.method is not None:
            methods.something_to_round(how.method, passes, model)
        if output is None:
            return 0
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
