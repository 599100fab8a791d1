"""`lconvert carry`: what each target would hold of a source, before anything is written."""

from __future__ import annotations

import json

import click

from lconvert.cli.common import table
from lconvert.converters.targets import OFFERED


@click.command("carry")
@click.argument("source")
@click.option("--to", "target", type=click.Choice(OFFERED), help="Only this target, with every reason.")
@click.option("--json", "as_json", is_flag=True, help="Machine-readable output on stdout.")
def command(source: str, target: str | None, as_json: bool) -> int:
    """Show, per class of tensors, which targets hold the numbers of SOURCE exactly, and why others do not.

    Reads headers, scales and zero points, no weights. Exit code 0 even where a target refuses.

    \b
    Examples:
      lconvert carry ./model-GPTQ
      lconvert carry ./model-GPTQ --to gguf
      lconvert carry model-Q4_K_M.gguf --json
    """
    import lconvert
    from lconvert.converters import matrix

    model = lconvert.read(source)
    verdicts = {t: matrix.verdicts(model, t) for t in ([target] if target else OFFERED)}
    if as_json:
        out = {t: [v.to_json() for v in found] for t, found in verdicts.items()}
        click.echo(json.dumps({"source": source, "targets": out}, indent=1))
        return 0
    for line in model.report:
        if line.startswith("quantized:"):
            click.echo(line)
    if target:
        lines = [(v.tensors, v.count, v.held, v.kind, v.reason) for v in verdicts[target]]
        table(
            f"{source} to {target}", ("tensors", "number", "held as", "verdict", "reason"), lines, right=(1,)
        )
        return 0
    classes = list(dict.fromkeys(v.tensors for found in verdicts.values() for v in found))
    by = {t: {v.tensors: v.kind for v in found} for t, found in verdicts.items()}
    rows = [(t, *(by[t].get(c, "") for c in classes)) for t in verdicts]
    table(source, ("target", *classes), rows)
    reasons = dict.fromkeys(
        (t, v.reason)
        for t, found in verdicts.items()
        for v in found
        if v.kind not in ("exact", "widened") and v.reason
    )
    for t, reason in reasons:
        click.echo(f"{t}: {reason}")
    return 0
