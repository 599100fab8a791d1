"""`lconvert report`: the JSON of validations and benchmarks as pages, CI results, model cards and tracker runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click

from lconvert.cli.common import fail_fast_files, save
from lconvert.errors import InputError, OptionError, OutputError


@click.command("report")
@click.argument("files", nargs=-1, required=True, metavar="JSON...", type=click.Path(path_type=Path))
@click.option(
    "-o", "--output", type=click.Path(path_type=Path), help="Write one self-contained HTML page here."
)
@click.option(
    "--junit", "junit_path", type=click.Path(path_type=Path), help="Write JUnit XML for a CI system here."
)
@click.option(
    "--markdown", type=click.Path(path_type=Path), help="Write the proof as a section for a model card here."
)
@click.option(
    "--card", type=click.Path(path_type=Path), metavar="DIR",
    help="Write a model card (README.md) into this folder; a card by others is left alone.",
)  # fmt: skip
@click.option("--mlflow", metavar="URI", help="Write the figures into this MLflow tracking store.")
@click.option("--wandb", metavar="PROJECT", help="Write the figures into this Weights & Biases project.")
@click.option("--fail-on-failed", is_flag=True, help="Exit 1 when a report failed, 3 when one is incomplete.")
def command(
    files: tuple[Path, ...],
    output: Path | None,
    junit_path: Path | None,
    markdown: Path | None,
    card: Path | None,
    mlflow: str | None,
    wandb: str | None,
    fail_on_failed: bool,
) -> int:
    """Merge the JSON of `lconvert validate` and `lconvert bench` into what people and other tools read.

    Exit codes: 0 written (with --fail-on-failed: and all passed), 1 a report failed, 2 usage or a file that is no report,
    3 a report is incomplete, or mlflow or wandb is not installed.

    \b
    Examples:
      lconvert report q4.json q8.json bench.json -o report.html
      lconvert report q4.json --junit junit.xml --markdown proof.md
      lconvert report q4.json --card ./my-model-gguf
      lconvert report q4.json q8.json --mlflow sqlite:///mlflow.db
    """
    from lconvert.validators import documents

    written = [p for p in (output, junit_path, markdown) if p is not None]
    if not written and card is None and not mlflow and not wandb:
        raise OptionError(
            "nothing to write: give at least one of -o, --junit, --markdown, --card, --mlflow, --wandb"
        )
    fail_fast_files(read=files, written=written)
    for path in written:
        if any(path.exists() and path.samefile(f) for f in files):
            raise OutputError(f"{path}: is one of the reports; choose another output")
    if card is not None and not card.is_dir():
        raise OutputError(f"{card}: is not a folder; --card takes the folder of the artifact")
    found = documents.load_all(files)
    if not found.reports and (junit_path or markdown or card):
        raise InputError(
            "only benchmarks were given, which have no verdict; --junit, --markdown and --card need the JSON of lconvert validate"
        )
    if output:
        from lconvert.validators.html import html

        _write(output, html(found.reports, found.benches))
    if junit_path:
        from lconvert.validators.junit import junit

        _write(junit_path, junit(found.reports))
    if markdown:
        from lconvert.validators.card import section

        several = len(found.reports) > 1
        _write(markdown, "\n\n".join(section(r, of_several=several) for r in found.reports) + "\n")
    if card:
        _card(card, found.reports)
    if mlflow:
        from lconvert.validators import trackers

        runs = trackers.mlflow(found.reports, found.benches, mlflow)
        click.echo(f"wrote {len(runs)} MLflow run(s) to {mlflow}: {', '.join(runs)}")
    if wandb:
        from lconvert.validators import trackers

        runs = trackers.wandb(found.reports, found.benches, wandb)
        click.echo(f"wrote {len(runs)} Weights & Biases run(s) to {wandb}: {', '.join(runs)}")
    codes = {r["exit_code"] for r in found.reports}
    return next((c for c in (1, 2, 3) if c in codes), 0) if fail_on_failed else 0


def _write(path: Path, text: str) -> None:
    save(path, text)
    click.echo(f"wrote {path}")


def _card(folder: Path, reports: Sequence[Mapping[str, Any]]) -> None:
    """One card for all artifacts in the folder, with the manifests out of the reports or from beside the artifacts."""
    from lconvert.validators import card, show

    parts = [(_manifest(folder, r), r) for r in reports]
    text = card.cards(parts, card.source_card(reports[0]["reference"]))
    click.echo(f"wrote {card.write(folder, text, show.name(reports[0]['candidate']), merged=True)}")


def _manifest(folder: Path, report: Mapping[str, Any]) -> Mapping[str, Any]:
    """What is known of how an artifact was made: its manifest, or the size and hash in the report."""
    from lconvert.plan import manifest_path
    from lconvert.validators import documents, show

    details = report["details"]
    if "manifest" in details:
        return dict(details["manifest"])
    beside = manifest_path(folder / show.name(report["candidate"]))
    if beside.is_file():
        return documents.manifest(beside)
    artifact = details.get("artifact", {})
    file = {"size": artifact.get("bytes"), "sha256": artifact.get("sha256")}
    plan = {"target": artifact.get("kind"), "options": {"ftype": artifact.get("file_type")}}
    return {"lconvert": report["lconvert"], "files": {show.name(report["candidate"]): file}, "plan": plan}
