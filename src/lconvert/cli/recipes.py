"""`lconvert recipes`: the recipes that have a name, and the passes they are made of."""

from __future__ import annotations

import dataclasses
import json

import click

from lconvert.cli.common import table


@click.command("recipes")
@click.option("--json", "as_json", is_flag=True, help="Machine-readable output.")
def command(as_json: bool) -> int:
    """List the recipes that come along, and every pass with its options.

    A recipe is a short YAML file; docs/compression.md says how to write one.

    \b
    Examples:
      lconvert recipes
      lconvert compress ./my-model -o out.lcir --recipe int4-g128
    """
    from lconvert import passes, recipe

    found = [recipe.load(name) for name in recipe.names()]
    options = {name: dataclasses.asdict(passes.find(name).Options()) for name in passes.PASSES}
    if as_json:
        listed = {
            r.name: {
                "about": r.about,
                "calibration": vars(r.calibration),
                "passes": [s.to_json() for s in r.steps],
            }
            for r in found
        }
        click.echo(json.dumps({"recipes": listed, "passes": options}, indent=1))
        return 0
    rows = [(r.name, " + ".join(s.name for s in r.steps), r.about) for r in found]
    table("Recipes", ("name", "passes", "what it is"), rows)
    click.echo()
    rows = [
        (n, passes.PASSES[n], ", ".join(f"{k}={v!r}" for k, v in options[n].items())) for n in passes.PASSES
    ]
    table("Passes", ("name", "what it does", "options and defaults"), rows)
    return 0
