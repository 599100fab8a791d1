"""`lconvert imatrix`: an importance matrix, measured on a text, as llama-imatrix would write it."""

from __future__ import annotations

import json
from pathlib import Path

import click

from lconvert.cli.common import (
    fail_fast_files,
    fail_fast_output,
    must_end,
    parse_size,
    status,
    threads_option,
)


@click.command("imatrix", context_settings={"max_content_width": 110})
@click.argument("source")
@click.argument("text", type=click.Path(path_type=Path))
@click.option(
    "-o", "--output", type=click.Path(path_type=Path), required=True, help="Output file, NAME.gguf."
)
@click.option(
    "--windows",
    type=click.IntRange(1),
    default=128,
    show_default=True,
    help="Windows of the text that are run.",
)
@click.option("--context", type=click.IntRange(1), default=512, show_default=True, help="Tokens of a window.")
@click.option(
    "--no-output-tensor", is_flag=True, help="Leave output.weight out, as llama-imatrix does by default."
)
@click.option("--device", default="cpu", show_default=True, help="Where the model runs: cpu or cuda.")
@click.option(
    "--memory",
    metavar="SIZE",
    help="Memory that it may take (e.g. 8G); hidden states beyond it go to a file.",
)
@click.option("--force", is_flag=True, help="Replace an existing output.")
@click.option("--json", "as_json", is_flag=True, help="Machine-readable output on stdout.")
@threads_option
def command(
    source: str,
    text: Path,
    output: Path,
    windows: int,
    context: int,
    no_output_tensor: bool,
    device: str,
    memory: str | None,
    force: bool,
    as_json: bool,
    threads: int | None,
) -> int:
    """Run SOURCE over TEXT and write the mean squares of what enters every matrix, for llama-quantize and hf-to-gguf --imatrix.

    The model runs one layer at a time, whatever its size; experts count the tokens that chose them.

    \b
    Examples:
      lconvert imatrix ./my-model calibration.txt -o imatrix.gguf
      lconvert hf-to-gguf ./my-model --iq3_xxs --imatrix imatrix.gguf
      lconvert imatrix ./my-model code.txt -o code.gguf --windows 64 --context 2048 --memory 8G
    """
    import lconvert
    from lconvert.converters import gguf_importance
    from lconvert.formats import imatrix
    from lconvert.primitives.importance import measure
    from lconvert.primitives.job import Calibration, Job

    must_end(output, ".gguf")
    fail_fast_files(read=[text], written=[output])
    fail_fast_output(output, force)
    model = lconvert.read(source)
    calibration = Calibration(str(text), windows, context)
    with status("measuring") as tell:
        job = Job(
            calibration,
            device=device,
            memory=parse_size(memory, "--memory"),
            threads=threads,
            progress=lambda what, done, total: tell(f"layer {done} of {total}"),
        )
        measured = measure(model, job)
    found, notes = gguf_importance.sums(model, measured, output=not no_output_tensor)
    imatrix.write(output, found, datasets=[str(text)], chunks=measured.windows, chunk=measured.length)
    if as_json:
        out = {
            "file": str(output),
            "tensors": len(found),
            "chunks": measured.windows,
            "chunk_size": measured.length,
        }
        click.echo(json.dumps(out | {"notes": notes}, indent=1))
        return 0
    click.echo(
        f"wrote {output}: importances of {len(found)} tensors from {measured.windows} windows of {measured.length} tokens"
    )
    for note in notes:
        click.echo(f"note: {note}")
    return 0
