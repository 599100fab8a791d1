"""`lconvert recipes`: the built-in recipes and the passes they are made of."""

from __future__ import annotations

import dataclasses
import json

import click

from lconvert.cli.common import table


@click.command("recipes")
@click.option("--json", "as_json", is_flag=True, help="Machine-readable output.")
def command(as_json: bool) -> int:
    """List the built-in recipes, and every pass with its options.

    \b
    Examples:
      lconvert recipes
      lconvert compress ./my-model -o out.lcir --recipe int4-g128
    """
    from lconvert import passes
    from lconvert.recipe import PRESETS

    options = {name: dataclasses.asdict(passes.find(name).Options()) for name in passes.PASSES}
    if as_json:
        recipes = {n: {"about": about, "passes": steps} for n, (about, steps) in PRESETS.items()}
        click.echo(json.dumps({"recipes": recipes, "passes": options}, indent=1))
        return 0
    table("Recipes", ("name", "what it is"), [(n, about) for n, (about, _) in PRESETS.items()])
    click.echo()
    rows = [
        (n, passes.PASSES[n], ", ".join(f"{k}={v!r}" for k, v in options[n].items())) for n in passes.PASSES
    ]
    table("Passes", ("name", "what it does", "options and defaults"), rows)
    return 0
