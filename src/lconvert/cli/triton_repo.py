"""`lconvert triton-repo`: artifacts as a model repository of Triton Inference Server."""

from __future__ import annotations

from pathlib import Path

import click

from lconvert.cli.build_engine import capabilities
from lconvert.cli.common import table


@click.command("triton-repo")
@click.argument("artifacts", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option(
    "-o", "--output", type=click.Path(path_type=Path), required=True, help="The repository, a folder."
)
@click.option(
    "--instances", type=click.IntRange(1, 1024), default=1, show_default=True, help="Copies of each model."
)
@click.option(
    "--gpus",
    default="",
    metavar="LIST",
    help="GPUs that instances run on, such as 0,1 [default: CPU; tensorrt: all].",
)
@click.option(
    "--max-batch",
    type=click.IntRange(0, 65536),
    default=0,
    show_default=True,
    help="Largest batch that Triton forms (onnxruntime, tensorrt); 0: none.",
)
@click.option(
    "--delay",
    type=click.IntRange(0, 10**7),
    default=0,
    show_default=True,
    help="Microseconds that a batch waits for more.",
)
@click.option(
    "--context",
    type=click.IntRange(1, 1 << 24),
    default=2048,
    show_default=True,
    help="Tokens for vLLM and llama.cpp.",
)
@click.option("--link", is_flag=True, help="Link the artifacts instead of copying them.")
@click.option("--force", is_flag=True, help="Replace a repository that this command made.")
def command(artifacts: tuple[Path, ...], output: Path, instances: int, gpus: str, max_batch: int, delay: int, context: int, link: bool, force: bool) -> int:  # fmt: skip
    """Write ARTIFACTS as a model repository: .onnx files (onnxruntime), .plan engines (tensorrt), folders that vLLM serves,
    GGUF files (llama.cpp in the python back end). Every config.pbtxt is checked against Triton's schema where the package
    tritonclient is installed.

    \b
    Examples:
      lconvert triton-repo model.plan -o model_repository --gpus 0
      lconvert triton-repo exported/model.onnx model-Q4_K_M.gguf -o model_repository --instances 2
    """
    from lconvert.converters import triton

    options = triton.Options(
        instances,
        capabilities(gpus, "--gpus", "numbers of GPUs such as 0,1"),
        max_batch,
        delay,
        context,
        link,
    )
    models = triton.write(artifacts, output, options, force=force)
    table(str(output), ("model", "back end"), [(m.name, m.backend) for m in models])
    click.echo(f"how to start it: {output / triton.README}")
    if triton.schema() is None:
        click.echo("note: not checked against model_config.proto: pip install tritonclient")
    return 0
