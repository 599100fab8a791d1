"""`lconvert gguf-to-hf`: any source back to a Hugging Face folder with dense weights."""

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


@click.command("gguf-to-hf")
@click.argument("source")
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True, help="Output folder.")
@click.option(
    "--dtype",
    type=click.Choice(["f32", "f16", "bf16"]),
    help="Storage type of all tensors [default: dense ones keep theirs, dequantized ones are f32].",
)
@click.option("--dry-run", is_flag=True, help="Show the plan; write nothing.")
@click.option("--json", "as_json", is_flag=True, help="Machine-readable output on stdout.")
@click.option("--force", is_flag=True, help="Replace existing files.")
@no_card_option
@threads_option
def command(
    source: str,
    output: Path,
    dtype: str | None,
    dry_run: bool,
    as_json: bool,
    force: bool,
    no_card: bool,
    threads: int | None,
) -> int:
    """Write SOURCE (a GGUF file, an .lcir folder, a checkpoint) as a folder that transformers loads.

    Block types are dequantized; config and tokenizer are rebuilt from the metadata, and what was rebuilt is listed.

    \b
    Examples:
      lconvert gguf-to-hf model-Q4_K_M.gguf -o model-hf
      lconvert gguf-to-hf model-Q8_0.gguf -o model-hf --dtype bf16
    """
    import lconvert
    from lconvert.converters import hf
    from lconvert.executor import execute

    model = lconvert.read(source)
    plan = hf.plan(model, dtype.upper() if dtype else None)
    if dry_run:
        return print_plan(plan, as_json)
    with progress_bar("writing", plan.size) as tell:
        result = execute(plan, output, threads=threads, force=force, progress=tell)
    if not no_card:
        write_card(source, result, folder=output)
    if as_json:
        click.echo(
            json.dumps({"files": [str(p) for p in result.paths], "manifest": dict(result.manifest)}, indent=1)
        )
    else:
        print_result(result)
    return 0
