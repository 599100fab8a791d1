"""`lconvert plan`: what a consumer's graph would hold of a source, and which of its rules it breaks; nothing is written."""

from __future__ import annotations

import json
from typing import Any

import click

from lconvert.cli.build_engine import capabilities, dtype_option, graph_of, graph_plan
from lconvert.cli.common import table


@click.command("plan")
@click.argument("source")
@click.option(
    "--to",
    "target",
    type=click.Choice(["trt"]),
    default="trt",
    show_default=True,
    help="The consumer: trt is TensorRT.",
)
@dtype_option
@click.option("--sm", default="", metavar="LIST", help="Compute capabilities to build for, such as 89,120.")
@click.option("--json", "as_json", is_flag=True, help="Machine-readable output on stdout.")
def command(source: str, target: str, dtype: str, sm: str, as_json: bool) -> int:
    """Show the verdict of every tensor of SOURCE (any source, or an .onnx file) and every rule of TensorRT's that it breaks.

    Reads headers and scales; needs the package onnx, not TensorRT. Exit code 0 if TensorRT would take it, 2 if not.

    \b
    Examples:
      lconvert plan ./model-GPTQ --to trt
      lconvert plan model.onnx --to trt --sm 89,120 --json
    """
    from lconvert.converters import trt_rules
    from lconvert.formats import onnx_reader

    sms = capabilities(sm)
    tensors: list[Any] = []
    notes: tuple[str, ...] = ()
    if (path := graph_of(source)) is not None:
        model = onnx_reader.read(path)
    else:
        plan = graph_plan(source, dtype)
        model, tensors, notes = trt_rules.planned(plan), list(plan.items()), plan.notes
    found = trt_rules.check(model, sms)
    if as_json:
        rows = [{"tensor": i.name, "shape": list(i.shape), "type": i.type, "held": i.held, "verdict": i.verdict.kind, "reason": i.verdict.reason} for i in tensors]  # fmt: skip
        out = {"source": source, "target": target, "rules": len(trt_rules.RULES), "findings": [vars(f) for f in found], "tensors": rows, "notes": list(notes)}  # fmt: skip
        click.echo(json.dumps(out, indent=1))
        return 2 if found else 0
    if tensors:
        cells = [(i.name, "x".join(map(str, i.shape)), i.type, str(i.verdict), i.held) for i in tensors]
        table(f"{source} to TensorRT", ("tensor", "shape", "type", "verdict", "held as"), cells)
    for note in notes:
        click.echo(f"note: {note}")
    for f in found:
        click.echo(f"refused: {f}")
    click.echo(
        f"{len(found)} of {len(trt_rules.RULES)} rules' findings" if found else f"no rule of {len(trt_rules.RULES)} is broken"
    )  # fmt: skip
    return 2 if found else 0
