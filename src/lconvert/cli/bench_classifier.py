"""`lconvert bench` of encoders and networks of images: its options and its table."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click

from lconvert.cli.common import human, save, status, table
from lconvert.errors import OptionError


def applies(artifacts: Sequence[str]) -> bool:
    """Whether these are to be measured here."""
    from lconvert.validators import bench_classifier

    return bench_classifier.chosen(artifacts)


def run(
    artifacts: Sequence[str],
    *,
    batch: str,
    prompt: int | None,
    refused: Mapping[str, Any],
    as_json: bool,
    report: Path | None,
    **rest: Any,
) -> int:
    """Measure, print, keep. refused: options that have no meaning here, by their values."""
    from lconvert.validators import bench_classifier

    if wrong := [name for name, value in refused.items() if value]:
        raise OptionError(
            f"{wrong[0]} is for language models; encoders and networks of images have --batch and --prompt"
        )
    with status("measuring") as tell:
        found = bench_classifier.bench(
            artifacts, batches=_numbers(batch), length=prompt, progress=tell, **rest
        )
    content = json.dumps(found, indent=1) + "\n"
    if report:
        save(report, content)
    if as_json:
        click.echo(content, nl=False)
    else:
        _print(found)
    return 0


def _numbers(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise OptionError(f"--batch {text!r}: give whole numbers, such as 1,8") from None


def _rate(x: float) -> str:
    return f"{x:,.0f}" if x >= 100 else f"{x:.3g}"


def _print(found: Mapping[str, Any]) -> None:
    settings = found["settings"]
    what = "images" if settings["length"] is None else f"sequences of {settings['length']} tokens"
    rows = [
        (
            r["artifact"], r["runtime"], human(r["bytes"]), str(r["batch"]),
            "{} ({}-{})".format(*(_rate(r["examples_per_s"][k]) for k in ("median", "min", "max"))),
            f"{r['ratio']['median']:.2f}",
            f"{1e3 * r['latency_s']['p50']:.3g} / {1e3 * r['latency_s']['p99']:.3g}",
        )
        for r in found["results"]
    ]  # fmt: skip
    title = f"{what}: median (range) of {settings['repetitions']} repetitions; x: times {found['results'][0]['artifact']}"
    names = ("artifact", "runtime", "size", "batch", f"{what.partition(' ')[0]}/s", "x", "batch ms p50/p99")
    table(title, names, rows, range(2, 7))
