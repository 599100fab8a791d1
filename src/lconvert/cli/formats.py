"""`lconvert formats`: sources, targets, architectures, file types and tensor types."""

from __future__ import annotations

import json

import click

from lconvert.cli.common import table

SOURCES = (
    ("Hugging Face folder", "safetensors in F32, F16 or BF16; config.json; tokenizer.json"),
    (".gguf", "F32, F16, BF16 and every block type below that has a reader; sharded files too"),
    (".lcir", "lconvert's own folder format"),
)
TARGETS = (
    ("GGUF", "lconvert hf-to-gguf", "llama.cpp"),
    ("Hugging Face folder", "lconvert gguf-to-hf", "transformers (dense weights)"),
    (".lcir", "lconvert compress", "every lconvert converter"),
)


@click.command("formats")
@click.option("--json", "as_json", is_flag=True, help="Machine-readable output.")
def command(as_json: bool) -> int:
    """List what lconvert reads and writes.

    \b
    Examples:
      lconvert formats
      lconvert formats --json
    """
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
