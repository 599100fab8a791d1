"""`lconvert build-engine`: a TensorRT engine of an ONNX file, or of any source by way of one."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lconvert.cli.common import human, parse_size, status, table
from lconvert.errors import OptionError

if TYPE_CHECKING:
    from lconvert.plan import Plan


def capabilities(
    text: str, what: str = "--sm", such: str = "compute capabilities such as 89,120"
) -> tuple[int, ...]:
    """'89,120' as compute capabilities, or what else an option lists."""
    parts = [p.strip() for p in text.split(",") if p.strip()]
    if not all(p.isascii() and p.isdigit() and len(p) <= 4 for p in parts):
        raise OptionError(f"{what} {text!r}: expected {such}")
    return tuple(dict.fromkeys(map(int, parts)))


_DTYPES = {"fp16": "F16", "bf16": "BF16"}
dtype_option = click.option(
    "--dtype",
    type=click.Choice(list(_DTYPES)),
    default="fp16",
    show_default=True,
    help="Of the graph, if SOURCE has none yet.",
)


def graph_of(source: str) -> Path | None:
    """The .onnx file that a source is, or that lies in it; None for a model whose graph is yet to be made."""
    path = Path(source)
    inside = path / "model.onnx"
    return path if path.suffix == ".onnx" else inside if inside.is_file() else None


def graph_plan(source: str, dtype: str) -> Plan:
    """The plan of the graph that an engine is built from."""
    import lconvert
    from lconvert.converters import onnx

    return onnx.plan(lconvert.read(source), onnx.Options("trt", _DTYPES[dtype]))


@click.command("build-engine")
@click.argument("source")
@click.option(
    "-o", "--output", type=click.Path(path_type=Path), required=True, help="The engine, such as model.plan."
)
@click.option(
    "--backend",
    type=click.Choice(["auto", "tensorrt", "tensorrt_rtx"]),
    default="auto",
    show_default=True,
    help="tensorrt needs a GPU; tensorrt_rtx builds ahead of time without one.",
)
@dtype_option
@click.option("--batch", default="1:1:1", show_default=True, metavar="MIN:OPT:MAX", help="Sequences at once.")
@click.option(
    "--sequence",
    metavar="MIN:OPT:MAX",
    help="Tokens of one call [default: 1:1:512, or half of a smaller context].",
)
@click.option(
    "--past",
    metavar="MIN:OPT:MAX",
    help="Tokens in the cache [default: 0:512:1024, or what a smaller context leaves].",
)
@click.option(
    "--sm",
    default="",
    metavar="LIST",
    help="Compute capabilities, such as 89,120 [default: 80,86,89,120; 120 for FP4].",
)
@click.option(
    "--hardware",
    type=click.Choice(["none", "ampere+", "same"]),
    default="none",
    show_default=True,
    help="Hardware compatibility of the engine.",
)
@click.option("--version-compatible", is_flag=True, help="An engine that later versions load too.")
@click.option(
    "--timing-cache",
    type=click.Path(path_type=Path),
    help="File with tactics of earlier builds, read and updated (tensorrt).",
)
@click.option("--strip-plan", is_flag=True, help="Leave the weights out, to be put back by a refit.")
@click.option(
    "--refit",
    type=click.Choice(["none", "identical", "all", "individual"]),
    default="none",
    show_default=True,
    help="Which weights may be put back or replaced.",
)
@click.option("--weight-streaming", is_flag=True, help="Weights may stay in host memory.")
@click.option("--sparse", is_flag=True, help="Look for 2:4 sparse weights.")
@click.option("--workspace", metavar="SIZE", help="Limit of the builder's scratch memory, such as 4G.")
@click.option("--level", type=click.IntRange(0, 5), help="Optimization level of the builder.")
@click.option(
    "--keep-onnx", type=click.Path(path_type=Path), help="Keep the graph of a source in this folder."
)
@click.option("--json", "as_json", is_flag=True, help="Machine-readable output on stdout.")
@click.option("--force", is_flag=True, help="Replace an existing engine.")
def command(source: str, output: Path, backend: str, dtype: str, batch: str, sequence: str | None, past: str | None, sm: str, hardware: str, version_compatible: bool, timing_cache: Path | None, strip_plan: bool, refit: str, weight_streaming: bool, sparse: bool, workspace: str | None, level: int | None, keep_onnx: Path | None, as_json: bool, force: bool) -> int:  # fmt: skip
    """Build the TensorRT engine of SOURCE: an .onnx file or a folder with model.onnx, or a checkpoint, GGUF file or .lcir folder.

    The graph is checked against TensorRT's rules first (lconvert plan shows them). With tensorrt_rtx no GPU is needed, and the
    engine is not run: the report says so. Beside the engine stands a manifest with its hash, options and the hash of the graph.

    \b
    Examples:
      lconvert build-engine model.onnx -o model.plan --sm 89,120
      lconvert build-engine ./model-GPTQ -o model.plan --batch 1:1:4 --sequence 1:1:2048 --past 0:512:4096
      lconvert build-engine model.onnx -o model.plan --backend tensorrt --timing-cache tactics.bin
    """
    from lconvert.converters import tensorrt

    tensorrt.refuse_output(output, force)
    options = tensorrt.Options(
        backend, tensorrt.span(batch), *spans(sequence, past, _context(source)), capabilities(sm),
        str(timing_cache or ""), version_compatible, hardware, strip_plan, refit, weight_streaming, sparse,
        parse_size(workspace, "--workspace"), level,
    )  # fmt: skip
    tensorrt.load(backend)
    with tempfile.TemporaryDirectory(prefix="lconvert-") as scratch, status("building") as step:
        path, told = graph_of(source), dict[str, Any]()
        if path is None:
            path, told = _exported(source, dtype, keep_onnx or Path(scratch) / "onnx", options)
        told["run"] = _not_run()
        report, manifest = tensorrt.build(path, output, options, force=force, told=told, progress=step)
    if as_json:
        click.echo(json.dumps({"engine": str(output), **manifest}, indent=1))
        return 0
    click.echo(f"wrote {output}  {human(report.sizes['plan'])}  sha256 {manifest['engine']['sha256']}")
    click.echo(f"{report.label}; for {', '.join(manifest['built_for'])}")
    click.echo(manifest["run"])
    rows = [(*name.split(), count) for name, count in report.layers.items()]
    table("layers of the network", ("layer", "precision", "number"), rows, right=(2,))
    click.echo(
        f"graph {human(report.sizes['onnx'])}, parsed in {report.seconds['parse']:.2f} s, built in {report.seconds['build']:.2f} s"
    )
    for note in report.notes:
        click.echo(f"note: {note}")
    return 0


def _not_run() -> str:
    """That the engine was not run, and what would run it."""
    from lconvert.validators.runtimes import cuda

    if not cuda.count():
        return "not run: no NVIDIA GPU is here; numbers and speed of the engine are unknown"
    return f"not run: lconvert validate MODEL model.onnx compares its logits on {cuda.name()}, SM{cuda.capability()}"


def _context(source: str) -> int | None:
    """Positions that the model has, None where the graph does not say."""
    if (path := graph_of(source)) is not None:
        from lconvert.converters.tensorrt import positions
        from lconvert.formats import onnx_reader

        return positions(onnx_reader.read(path))
    import lconvert

    arch = lconvert.read(source).arch
    return getattr(arch, "context", None)


def spans(sequence: str | None, past: str | None, context: int | None) -> tuple[Any, Any]:
    """The profile's ranges; what is not given fits into the context."""
    from lconvert.converters.tensorrt import span

    context = context or 1536
    seq = span(sequence) if sequence else (1, 1, max(1, min(512, context // 2)))
    room = max(0, min(1024, context - seq[2]))
    return seq, span(past) if past else (0, room // 2, room)


def _exported(source: str, dtype: str, folder: Path, options: Any) -> tuple[Path, dict[str, Any]]:
    """The graph of any source, and what the manifest says of it."""
    from lconvert.converters import onnx, trt_rules
    from lconvert.executor import execute

    plan = graph_plan(source, dtype)
    trt_rules.require(trt_rules.planned(plan), options.sms)
    result = execute(plan, folder)
    verdicts = [i.verdict.kind for i in result.plan.items()]
    counts = {k: verdicts.count(k) for k in dict.fromkeys(verdicts)}
    return folder / onnx.MODEL, {"source": source, "verdicts": counts}
