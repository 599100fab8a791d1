"""`lconvert validate`: is this artifact the model it came from?"""

from __future__ import annotations

import json
from pathlib import Path

import click

from lconvert.cli.common import fail_fast_files, print_report, status, threads_option


@click.command("validate")
@click.argument("reference")
@click.argument("candidate", type=click.Path(path_type=Path))
@click.option(
    "--text", type=click.Path(path_type=Path), help="Evaluation text [default: a built-in excerpt]."
)
@click.option("--tier", "tiers", multiple=True, help="structure, tensors, tokens, logits [default: all].")
@click.option(
    "--context", type=click.IntRange(8, 1 << 20), default=512, show_default=True, help="Tokens per window."
)
@click.option(
    "--windows", type=click.IntRange(1), default=8, show_default=True, help="Windows of text to compare."
)
@click.option("--all-windows", is_flag=True, help="Compare the whole text.")
@click.option(
    "--gates", type=click.Path(path_type=Path), help="Thresholds [default: the shipped gates.yaml]."
)
@click.option(
    "--require", multiple=True, metavar="RUNTIME", help="Exit 3 when this runtime (llamacpp) is missing."
)
@click.option("--json", "as_json", is_flag=True, help="Machine-readable report on stdout.")
@click.option("--report", type=click.Path(path_type=Path), help="Write the JSON report here as well.")
@threads_option
def command(
    reference: str,
    candidate: Path,
    text: Path | None,
    tiers: tuple[str, ...],
    context: int,
    windows: int,
    all_windows: bool,
    gates: Path | None,
    require: tuple[str, ...],
    as_json: bool,
    report: Path | None,
    threads: int | None,
) -> int:
    """Compare CANDIDATE (a GGUF file) with REFERENCE (the model it was made from).

    Exit codes: 0 all gates passed, 1 a gate failed, 2 usage or unsupported input, 3 a required runtime is missing.

    \b
    Examples:
      lconvert validate ./my-model my-model-Q4_K_M.gguf
      lconvert validate ./my-model my-model-Q4_K_M.gguf --text heldout.txt --json > report.json
      lconvert validate ./my-model my-model-F32.gguf --tier tensors --tier tokens
    """
    from lconvert.validators import parity

    fail_fast_files(read=[text, gates, candidate], written=[report])
    with status("validating") as tell:
        proof = parity.validate(
            reference,
            candidate,
            text=text,
            tiers=tiers or parity.TIERS,
            context=context,
            max_windows=None if all_windows else windows,
            threads=threads,
            gates=gates,
            require=require,
            progress=tell,
        )
    content = json.dumps(proof.to_json(), indent=1)
    if report:
        report.write_text(content + "\n")
    if as_json:
        click.echo(content)
    else:
        print_report(proof)
    return proof.exit_code
