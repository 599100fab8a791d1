"""`lconvert formats`: sources, targets, architectures, file types and tensor types."""

from __future__ import annotations

import json

import click

from lconvert.cli.common import status, table

SOURCES = (
    ("Hugging Face folder", "safetensors in F32, F16 or BF16; config.json; tokenizer.json"),
    (
        "quantized folder",
        "GPTQ, AWQ, AutoRound, compressed-tensors, FP8, ModelOpt, MXFP4, bitsandbytes, HQQ, torchao, Quark, BitNet",
    ),
    (".gguf", "F32, F16, BF16 and every block type below that has a reader; sharded files too"),
    (".lcir", "lconvert's own folder format"),
)
TARGETS = (
    ("GGUF", "lconvert hf-to-gguf", "llama.cpp"),
    ("Hugging Face folder", "lconvert gguf-to-hf", "transformers (dense weights)"),
    ("compressed-tensors, GPTQ, AWQ", "lconvert hf-to-vllm", "vLLM"),
    ("ModelOpt", "lconvert hf-to-trtllm", "TensorRT-LLM, vLLM"),
    ("ONNX", "lconvert hf-to-onnx", "ONNX Runtime, TensorRT"),
    ("bitsandbytes", "lconvert convert --to bitsandbytes", "transformers, QLoRA"),
    ("MXFP4 experts (gpt-oss)", "lconvert hf-to-vllm", "vLLM, TensorRT-LLM, transformers"),
    ("ONNX", "lconvert convert --to onnx", "ONNX Runtime"),
    (".lcir", "lconvert compress", "every lconvert converter"),
)


def _matrix(as_json: bool) -> int:
    from lconvert.converters import matrix
    from lconvert.converters.targets import OFFERED

    with status("planning"):
        found = matrix.table(n for n in OFFERED if n not in ("ir", "dense"))
    if as_json:
        out = {kind: {t: v.to_json() for t, v in row.items()} for kind, row in found.items()}
        click.echo(json.dumps(out, indent=1))
        return 0
    names = list(next(iter(found.values())))
    table("", ("source", *names), [(kind, *(row[t].kind for t in names)) for kind, row in found.items()])
    click.echo(
        "\nPlain weights are rounded or kept, as their dtype says; `lconvert carry SOURCE` has the reasons for a model."
    )
    return 0


@click.command("formats")
@click.option("--matrix", is_flag=True, help="The table of what each kind of source meets at each target.")
@click.option("--json", "as_json", is_flag=True, help="Machine-readable output.")
def command(matrix: bool, as_json: bool) -> int:
    """List what lconvert reads and writes.

    \b
    Examples:
      lconvert formats
      lconvert formats --matrix
      lconvert formats --json
    """
    if matrix:
        return _matrix(as_json)
    from lconvert.archs import names
    from lconvert.converters.gguf_mixture_rules import FTYPES
    from lconvert.kernels.blocks import BLOCKS
    from lconvert.kernels.reference import FAMILY

    types = [b for b in BLOCKS.values() if b.name in FAMILY]
    if as_json:
        out = {
            "sources": [s[0] for s in SOURCES],
            "targets": [t[0] for t in TARGETS],
            "architectures": names(),
            "file_types": {f.name: {"flag": f.flag, "about": f.description} for f in FTYPES.values()},
            "tensor_types": {b.name: {"block": b.elems, "bits_per_weight": b.bits_per_weight} for b in types},
        }
        click.echo(json.dumps(out, indent=1))
        return 0
    table("Sources", ("source", "what is read"), SOURCES)
    click.echo()
    table("Targets", ("target", "command", "for"), TARGETS)
    click.echo(f"\nArchitectures (model_type): {', '.join(names())}\n")
    table("GGUF file types", ("flag", "about"), [(f.flag, f.description) for f in FTYPES.values()])
    click.echo()
    rows = [(b.name, b.elems, f"{b.bits_per_weight:.4g}") for b in types]
    table("GGUF tensor types", ("type", "block", "bits per weight"), rows, right=(1, 2))
    return 0
