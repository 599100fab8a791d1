"""`lconvert eval`: what can the artifact still do, and what did the conversion cost?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click

from lconvert.cli.common import fail_fast_files, keep_inputs, save, status, table, threads_option
from lconvert.errors import OptionError


@click.command("eval")
@click.argument("artifact", type=click.Path(path_type=Path))
@click.option("--reference", type=click.Path(path_type=Path), help="The model that it was made from.")
@click.option(
    "--task",
    "tasks",
    multiple=True,
    metavar="TASK",
    help="A YAML task file, a folder of them, or the name of any lm-eval task.",
)
@click.option("--needle", is_flag=True, help="Search for a fact hidden in a long text.")
@click.option(
    "--haystack", type=click.Path(path_type=Path), help="Text to hide it in [default: a built-in excerpt]."
)
@click.option("--runtime", metavar="NAME", help="Runtime of ARTIFACT [default: the one it is made for].")
@click.option("--python", type=click.Path(path_type=Path), help="Interpreter that has that runtime.")
@click.option("--reference-runtime", metavar="NAME", help="Runtime of the reference [default: by its kind].")
@click.option(
    "--context",
    type=click.IntRange(8, 1 << 20),
    help="Tokens at a time [default: the model's, at most 4096].",
)
@click.option("--limit", type=click.IntRange(1), metavar="N", help="The first N documents of each task.")
@click.option("--chat", is_flag=True, help="Ask through the chat template.")
@click.option(
    "--max-drop",
    "drops",
    multiple=True,
    metavar="[METRIC=]DROP",
    help="Exit 1 if a metric is worse than the reference's by more than this; without METRIC, any share of right answers.",
)
@click.option(
    "--allow-task-code",
    is_flag=True,
    help="Run Python code that task files name (!function) and metrics that are downloaded.",
)
@click.option("--json", "as_json", is_flag=True, help="Machine-readable report on stdout.")
@click.option("--report", type=click.Path(path_type=Path), help="Write the JSON report here as well.")
@threads_option
def command(
    artifact: Path,
    reference: Path | None,
    tasks: tuple[str, ...],
    needle: bool,
    haystack: Path | None,
    runtime: str | None,
    python: Path | None,
    reference_runtime: str | None,
    context: int | None,
    limit: int | None,
    chat: bool,
    drops: tuple[str, ...],
    allow_task_code: bool,
    as_json: bool,
    report: Path | None,
    threads: int | None,
) -> int:
    """Run lm-eval tasks and the needle search on ARTIFACT, through the runtime it is for.

    With --reference both are asked the same, so that the difference is measured document by document: its error is far
    smaller than either score's, and answers that turned wrong and right are counted apart.

    Task files are data: code that they name runs only with --allow-task-code. Tasks by name need lm-eval's data sets,
    from the local cache or from the Hugging Face hub.

    Exit codes: 0 done and within --max-drop, 1 a drop is larger, 2 usage or unsupported input, 3 a package is missing.

    \b
    Examples:
      lconvert eval my-model-Q4_K_M.gguf --reference ./my-model --task examples/tasks --max-drop 0.02
      lconvert eval ./my-model-gptq --task hellaswag --limit 200 --runtime vllm --python .venv-vllm/bin/python
      lconvert eval my-model-Q4_K_M.gguf --reference ./my-model --needle --context 4096 --report needle.json
    """
    fail_fast_files(read=[haystack], written=[report])
    read = [path for path in (haystack, *map(Path, tasks)) if path is not None]
    keep_inputs([p for p in (artifact, reference) if p is not None], read, [report] if report else ())
    limits = dict(_drop(text) for text in drops)
    for path in (artifact, reference):
        if path is not None and not path.exists():
            raise OptionError(f"{path}: no such file or folder; check the path")
    from lconvert.validators import documents
    from lconvert.validators.evaluation import Where, Work, evaluate
    from lconvert.validators.proof import read_text

    work = Work(tasks, limit, chat, allow_task_code, read_text(haystack) if needle or haystack else None)
    with status("evaluating") as tell:
        proof = evaluate(
            Where(artifact, runtime, python),
            work,
            reference=None if reference is None else Where(reference, reference_runtime),
            context=context,
            threads=threads,
            max_drop=limits,
            progress=tell,
        )
    content = documents.dumps(proof.to_json())
    if report:
        save(report, content)
    if as_json:
        click.echo(content, nl=False)
    else:
        _print(proof)
    return proof.exit_code


def _drop(text: str) -> tuple[str, float]:
    """("" or the metric, the drop)."""
    metric, _, number = text.rpartition("=")
    try:
        value = float(number)
    except ValueError:
        value = -1.0
    if not value >= 0:
        raise OptionError(f"--max-drop {text}: expected a drop such as 0.02, or acc=0.02")
    return metric, value


def _print(proof: Any) -> None:
    rows = proof.details.get("tasks", [])
    against = f"{proof.candidate} against {proof.reference}" if proof.reference else proof.candidate
    if rows and proof.reference:
        columns = ("task", "metric", "n", "reference", "candidate", "difference", "worse", "better", "p")
        table(against, columns, [_compared(r) for r in rows], right=range(2, 9))
    elif rows:
        values = [(r["task"], r["metric"], r["n"], _figure(r, "value")) for r in rows]
        table(against, ("task", "metric", "n", "value"), values, right=(2, 3))
    others = [c for c in proof.checks if c.tier in ("calibration", "needle")]
    if others:
        table(
            "" if rows else against,
            ("tier", "figure", "measured"),
            [(c.tier, c.name, c.value) for c in others],
        )
    _grid(proof.details.get("needle"))
    for check in proof.checks:
        if check.passed is False:
            worse = check.value if check.measured is None else f"worse by {check.measured:.4g}"
            click.echo(f"FAIL {check.name}: {worse}, {check.gate} is allowed")
    if any(c.gate.startswith("no worse") for c in proof.checks):
        click.echo("PASS" if proof.passed else "FAIL")


def _compared(row: Mapping[str, Any]) -> Sequence[str]:
    return (
        row["task"],
        row["metric"],
        row["n"],
        _figure(row, "reference_value"),
        _figure(row, "value"),
        _figure(row, "difference", "+"),
        *("" if row[k] is None else str(row[k]) for k in ("worse", "better")),
        "" if row["p"] is None else f"{row['p']:.2g}",
    )


def _figure(row: Mapping[str, Any], key: str, sign: str = "") -> str:
    """A value with its standard error."""
    error = row["stderr" if key == "value" else key.removesuffix("_value") + "_stderr"]
    return f"{row[key]:{sign}.4f}" + ("" if error is None else f" ± {error:.4f}")


def _grid(found: Mapping[str, Any] | None) -> None:
    """Prompts in which the right key ranks first, by length and depth: reference/candidate of so many trials."""
    if not found:
        return
    cells: dict[tuple[int, float], list[Mapping[str, Any]]] = {}
    longest: dict[int, int] = {}
    for cell in found["grid"]:
        cells.setdefault((cell["size"], cell["depth"]), []).append(cell)
        longest[cell["size"]] = max(longest.get(cell["size"], 0), cell["tokens"])
    depths = sorted({depth for _, depth in cells})
    rows = [
        (str(longest[size]), *(_count(cells[size, depth]) for depth in depths)) for size in sorted(longest)
    ]
    table("needle found, by tokens and depth", ("tokens", *(f"{d:.0%}" for d in depths)), rows)


def _count(cells: Sequence[Mapping[str, Any]]) -> str:
    ours, theirs = ([c.get(f"found_{role}") for c in cells] for role in ("reference", "candidate"))
    pair = f"{sum(map(bool, ours))}" + ("" if None in theirs else f"/{sum(map(bool, theirs))}")
    return f"{pair} of {len(cells)}"
