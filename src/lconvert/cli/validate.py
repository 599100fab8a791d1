"""`lconvert validate`: is this artifact the model it came from?"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click

from lconvert.cli.common import (
    fail_fast_files,
    interpreters,
    keep_inputs,
    print_report,
    save,
    status,
    threads_option,
)
from lconvert.errors import OptionError

_FILE = click.Path(path_type=Path)


@click.command("validate")
@click.argument("reference")
@click.argument("candidate", type=_FILE)
@click.option("--text", type=_FILE, help="Evaluation text [default: a built-in excerpt].")
@click.option(
    "--tier", "tiers", multiple=True, help="structure, tensors, tokens, logits [default: all], layers."
)
@click.option("--layers", is_flag=True, help="Also compare hidden states layer by layer.")
@click.option(
    "--context", type=click.IntRange(8, 1 << 20), default=512, show_default=True, help="Tokens per window."
)
@click.option(
    "--windows", type=click.IntRange(1), default=8, show_default=True, help="Windows of text to compare."
)
@click.option("--all-windows", is_flag=True, help="Compare the whole text.")
@click.option(
    "--runtime", "runtimes", multiple=True, metavar="NAME", help="Run it in NAME [default: the format's own]."
)
@click.option(
    "--python",
    "pythons",
    multiple=True,
    metavar="[NAME=]PATH",
    help="Interpreter that has the runtime [default: this one, or lconvert.toml].",
)
@click.option("--timeout", type=click.FloatRange(1), help="Seconds that one call of a runtime may take.")
@click.option("--no-relative", is_flag=True, help="Do not compare with llama.cpp's own quantizer.")
@click.option("--curve", is_flag=True, help="Measure all stock types (Q8_0 ... Q2_K) for the Pareto plot.")
@click.option(
    "--greedy", type=click.IntRange(0), default=32, show_default=True, help="Tokens of greedy continuation."
)
@click.option("--baseline", type=_FILE, help="An earlier --report: fail where a figure became worse.")
@click.option("--gates", type=_FILE, help="Thresholds [default: the shipped gates.yaml].")
@click.option("--require", multiple=True, metavar="RUNTIME", help="Exit 3 when this runtime is missing.")
@click.option("--cache", type=_FILE, help="Folder of reference logits [default: the user's cache folder].")
@click.option("--no-cache", is_flag=True, help="Neither read nor keep reference logits.")
@click.option("--json", "as_json", is_flag=True, help="Machine-readable report on stdout.")
@click.option("--report", type=_FILE, help="Write the JSON report here as well.")
@click.option("--html", type=_FILE, help="Write a self-contained page with plots.")
@click.option("--junit", type=_FILE, help="Write JUnit XML for the CI's test view.")
@click.option("--markdown", type=_FILE, help="Write a section for a model card.")
@threads_option
def command(
    reference: str,
    candidate: Path,
    tiers: tuple[str, ...],
    layers: bool,
    windows: int,
    all_windows: bool,
    pythons: tuple[str, ...],
    runtimes: tuple[str, ...],
    no_relative: bool,
    greedy: int,
    cache: Path | None,
    no_cache: bool,
    as_json: bool,
    report: Path | None,
    html: Path | None,
    junit: Path | None,
    markdown: Path | None,
    **options: Any,
) -> int:
    """Compare CANDIDATE (GGUF, ONNX, .lcir, or a Hugging Face folder) with REFERENCE (the model it was made from).

    Exit codes: 0 all gates passed, 1 a gate failed, 2 usage or unsupported input, 3 a required runtime is missing.

    \b
    Examples:
      lconvert validate ./my-model my-model-Q4_K_M.gguf
      lconvert validate ./my-model my-model-Q4_K_M.gguf --text heldout.txt --html report.html --junit junit.xml
      lconvert validate ./my-model my-model-Q4_K_M.gguf --layers --baseline last-release.json
      lconvert validate ./my-model ./my-model --runtime vllm --python .venv-vllm/bin/python
    """
    from lconvert.validators import documents, parity

    read = [options["text"], options["gates"], options["baseline"]]
    fail_fast_files(read=read, written=[report, html, junit, markdown])
    if candidate.suffix in (".gguf", ".onnx"):
        fail_fast_files(read=[candidate])
    outputs = [p for p in (report, html, junit, markdown) if p]
    keep_inputs((Path(reference), candidate), [p for p in read[:2] if p], outputs)
    if no_cache and cache:
        raise OptionError("--cache and --no-cache contradict each other")
    chosen = tuple(tiers) or parity.TIERS
    with status("validating") as tell:
        proof = parity.validate(
            reference,
            candidate,
            tiers=(*chosen, *(("layers",) if layers and "layers" not in chosen else ())),
            max_windows=None if all_windows else windows,
            runtimes=runtimes,
            python=_interpreters(pythons, runtimes),
            cache=False if no_cache else cache,
            relative=not no_relative,
            greedy=(4 if greedy else 0, greedy),
            progress=tell,
            **options,
        )
    data = proof.to_json()
    content = documents.dumps(data)
    if report:
        save(report, content)
    _write(html, junit, markdown, data)
    if as_json:
        click.echo(content, nl=False)
    else:
        print_report(proof)
    return proof.exit_code


def _interpreters(given: Sequence[str], runtimes: Sequence[str]) -> dict[str, Path]:
    """--python values by runtime; one without a name is for the one runtime that was chosen."""
    out = interpreters(given)
    if "" in out:
        if len(runtimes) != 1:
            raise OptionError(f"--python {out['']}: say for which runtime, as in --python vllm={out['']}")
        out = {runtimes[0]: out.pop("")} | out
    return out


def _write(html: Path | None, junit: Path | None, markdown: Path | None, data: dict[str, Any]) -> None:
    from lconvert.validators import card, html as page, junit as xml  # noqa: I001

    makers: tuple[tuple[Path | None, Callable[[], str]], ...] = (
        (html, lambda: page.html([data], [])),
        (junit, lambda: xml.junit([data])),
        (markdown, lambda: card.section(data)),
    )
    for path, make in makers:
        if path is not None:
            save(path, make())
