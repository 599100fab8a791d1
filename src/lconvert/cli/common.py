"""What the verbs share: tables, progress, sizes. Output goes through rich only when a person is reading."""

from __future__ import annotations

import errno
import json
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click

from lconvert.errors import InputError, OptionError, OutputError

threads_option = click.option(
    "--threads", type=click.IntRange(1, 1024), help="Worker threads [default: CPUs this process may use]."
)


no_card_option = click.option(
    "--no-card", is_flag=True, help="Do not write a model card (README.md) beside the artifact."
)


def write_card(
    source: str, result: Any, report: Mapping[str, Any] | None = None, folder: Path | None = None
) -> None:
    """The model card of a result: beside a file, or in `folder` where that is the artifact."""
    from lconvert.validators import card

    path: Path = result.paths[0]
    name = path.name if folder is None else folder.resolve().name
    text = card.card(
        result.manifest, report, card.source_card(source), artifact=name, source=Path(source).resolve().name
    )
    card.write(folder or path.parent, text, name, merged=folder is not None)


def parse_size(text: str | None, option: str = "size") -> int | None:
    """'4G', '1.5G', '500M', '1000000' as bytes (decimal multiples, as llama.cpp's splitter). option: whose value it is, for messages."""
    if text is None:
        return None
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([KMGT]?)B?", text.strip().upper(), re.ASCII)
    size = round(float(found[1]) * {"": 1, "K": 1e3, "M": 1e6, "G": 1e9, "T": 1e12}[found[2]]) if found else 0
    if not size:
        raise OptionError(f"{option} {text!r}: expected a number of bytes with K, M, G or T, such as 4G")
    return size


def must_end(out: Path, suffix: str) -> None:
    """Of outputs whose name says what they are to whoever opens them."""
    if out.suffix != suffix:
        raise OptionError(f"{out}: the output must end in {suffix}")


def fail_fast_output(out: Path, force: bool) -> None:
    """The checks on the target that need no work first."""
    if out.exists() and not force:
        raise OutputError(f"{out}: exists; --force replaces it")


def fail_fast_files(*, read: Sequence[Path | None] = (), written: Sequence[Path | None] = ()) -> None:
    """Files that are needed only after the long part: named wrongly, they are refused before it."""
    for path in read:
        if path is not None and not path.is_file():
            raise InputError(f"{path}: {'is a folder' if path.is_dir() else 'no such file'}; check the path")
    for path in written:
        if path is not None and (path.is_dir() or not path.parent.is_dir()):
            what = "is a folder" if path.is_dir() else "its folder does not exist"
            raise OutputError(f"{path}: {what}; name a file in an existing folder")
        if path is not None and not os.access(path.parent, os.W_OK):
            raise OutputError(f"{path}: its folder is read-only; choose another one")


def keep_inputs(models: Sequence[Path], read: Sequence[Path], written: Sequence[Path]) -> None:
    """OutputError where a report would replace what is validated or read, or another report of this run."""
    if len({p.absolute() for p in written}) < len(written):
        raise OutputError("two reports would be written to one file; give each a name of its own")
    for path in (p for p in written if p.exists()):
        same = any(p.exists() and p.samefile(path) for p in (*models, *read))
        shard = any(m.suffix == path.suffix and m.parent.resolve() == path.parent.resolve() for m in models)
        inside = any(m.is_dir() and path.resolve().is_relative_to(m.resolve()) for m in models)
        ours = path.suffix in (".html", ".xml") or b"lconvert" in path.read_bytes()[:2000]
        if same or shard or (inside and not ours):
            raise OutputError(f"{path}: holds something else than a report; choose another output")


def save(path: Path, text: str) -> None:
    """Write a report; OutputError, and nothing half written, where the disk is full or the folder is read-only."""
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as e:
        if e.errno == errno.ENOSPC:
            path.unlink(missing_ok=True)
        raise OutputError(f"{path}: cannot be written ({e.strerror or e})") from None


def interpreters(given: Sequence[str]) -> dict[str, Path]:
    """--python values by runtime or producer; "" is for the runtimes that are not named."""
    from lconvert.validators.runtimes import RUNTIMES
    from lconvert.validators.runtimes.config import PRODUCERS

    out = {}
    for text in given:
        name, equals, path = text.partition("=")
        if equals and name not in (*RUNTIMES, *PRODUCERS):
            raise OptionError(
                f"--python {text}: unknown runtime {name}; runtimes: {', '.join((*RUNTIMES, *PRODUCERS))}"
            )
        out[name if equals else ""] = Path(path if equals else text).expanduser()
    return out


def file_stem(name: str) -> str:
    """A model's name, which comes out of a file, as part of a file name."""
    return re.sub(r"[^\w.+-]+", "-", name)[:80].strip(".-") or "model"


def human(n: float) -> str:
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if abs(n) < 1000 or unit == "TB":
            return f"{n:.0f} {unit}" if unit == "B" else f"{n:.1f} {unit}"
        n /= 1000
    raise AssertionError


def table(
    title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]], right: Sequence[int] = ()
) -> None:
    """A table on stdout: rich for a terminal, tab-separated lines for a pipe."""
    if sys.stdout.isatty():
        from rich.console import Console
        from rich.table import Table

        t = Table(title=title, title_justify="left", title_style="bold", header_style="bold", pad_edge=False)
        for i, c in enumerate(columns):
            t.add_column(c, justify="right" if i in right else "left", overflow="fold")
        for row in rows:
            t.add_row(*(str(x).replace("[", "\\[") for x in row))
        Console().print(t)
        return
    widths = [max(len(str(x)) for x in col) for col in zip(columns, *rows, strict=True)]
    if title:
        click.echo(title)
    for row in (columns, *rows):
        cells = [
            str(x).rjust(w) if i in right else str(x).ljust(w)
            for i, (x, w) in enumerate(zip(row, widths, strict=True))
        ]
        click.echo("  ".join(cells).rstrip())


@contextmanager
def progress_bar(what: str, total: int) -> Iterator[Callable[[int, str], None] | None]:
    """A progress bar on stderr, silent when stderr is not a terminal."""
    if not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    columns = (TextColumn(what), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(what, total=total)
        yield lambda n, name: bar.advance(task, n)


@contextmanager
def steps_bar() -> Iterator[Callable[[str, int, int], None] | None]:
    """A progress bar on stderr for what has steps of one size, with the time left; a new line for each `what`."""
    if not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        tasks: dict[str, Any] = {}

        def tell(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = bar.add_task(what, total=total)
            bar.update(tasks[what], completed=done, total=total)

        yield tell


@contextmanager
def status(what: str) -> Iterator[Callable[[str], None]]:
    """A spinner on stderr that says which step is under way, silent when stderr is not a terminal."""
    if not sys.stderr.isatty():
        yield lambda step: None
        return
    from rich.console import Console

    with Console(stderr=True).status(what) as spinner:
        yield lambda step: spinner.update(f"{what}: {step}")


def print_plan(plan: Any, as_json: bool) -> int:
    """The plan for --dry-run; returns the exit code, which is 2 for a plan that would be refused."""
    from lconvert.plan import refusals

    code = 2 if refusals(plan) else 0
    if as_json:
        click.echo(json.dumps(plan.to_json(), indent=1))
        return code
    for file in plan.files:
        rows = [
            (i.name, "x".join(map(str, i.shape)), i.type, human(i.nbytes), str(i.verdict), i.rule or i.held)
            for i in file.items
        ]
        table(
            f"{file.name}  {human(file.size)}",
            ("tensor", "shape", "type", "size", "verdict", "rule"),
            rows,
            right=(3,),
        )
    _notes(plan)
    return code


def _notes(plan: Any) -> None:
    for verdict in plan.losses:
        click.echo(f"model: {verdict.kind}: {verdict.reason}")
    for note in plan.notes:
        click.echo(f"note: {note}")


def print_result(result: Any) -> None:
    """What was written, by type, with the measured error of the roundings."""
    groups: dict[tuple[str, str], list[Any]] = {}
    for i in result.plan.items():
        groups.setdefault((i.held or i.type, i.verdict.kind), []).append(i)
    rows = []
    for (type_, kind), items in sorted(groups.items()):
        errors = [i.verdict.error for i in items if i.verdict.error is not None]
        error = f"{min(errors):.2e} .. {max(errors):.2e}" if errors else ""
        rows.append((type_, kind, len(items), human(sum(i.nbytes for i in items)), error))
    for path in result.paths:
        entry = result.manifest["files"][path.name]
        click.echo(f"wrote {path}  {human(entry['size'])}  sha256 {entry['sha256']}")
    table("", ("type", "verdict", "tensors", "size", "relative error"), rows, right=(2, 3))
    _notes(result.plan)


def print_report(report: Any) -> None:
    """The proof as a table, and what was not proven."""
    words = {True: "pass", False: "FAIL", None: ""}
    rows = [(c.tier, c.name, c.value, c.gate, words[c.passed]) for c in report.checks]
    table(
        f"{report.candidate} against {report.reference}",
        ("tier", "check", "measured", "gate", "result"),
        rows,
    )
    for line in report.not_proven:
        click.echo(f"not proven: {line}")
    for line in report.notes:
        click.echo(f"note: {line}")
    if not any(c.passed is not None for c in report.checks):
        click.echo("nothing was judged")
    click.echo({0: "PASS", 1: "FAIL", 3: "INCOMPLETE: a required runtime is missing"}[report.exit_code])
