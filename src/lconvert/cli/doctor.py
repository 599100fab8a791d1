"""`lconvert doctor`: which runtimes, packages and kernels are there."""

from __future__ import annotations

import json
import platform
import sys
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec

import click

from lconvert.cli.common import table

#: (module, distribution, what it is needed for, extra that installs it)
PACKAGES = (
    ("numpy", "numpy", "everything", ""),
    ("torch", "torch", "the reference model", "hf"),
    ("transformers", "transformers", "the reference model", "hf"),
    ("tokenizers", "tokenizers", "reference token ids", "hf"),
    ("llama_cpp", "llama-cpp-python", "parity in llama.cpp", "llamacpp"),
    ("gguf", "gguf", "independent reading of GGUF", "llamacpp"),
    ("huggingface_hub", "huggingface_hub", "hub names as sources", "hf"),
    ("sentencepiece", "sentencepiece", "tokenizer.model without tokenizer.json", ""),
)


@click.command("doctor")
@click.option("--json", "as_json", is_flag=True, help="Machine-readable output.")
def command(as_json: bool) -> int:
    """Show versions of the optional packages, and which kernels are in use.

    \b
    Examples:
      lconvert doctor
      LCONVERT_ISA=avx2 lconvert doctor
    """
    from lconvert import __version__, kernels

    rows = []
    for module, distribution, use, extra in PACKAGES:
        found = find_spec(module) is not None
        try:
            installed = version(distribution) if found else "not installed"
        except PackageNotFoundError:
            installed = "installed, version unknown"
        advice = "" if found or not extra else f"pip install 'lconvert[{extra}]'"
        rows.append((distribution, installed, use, advice))
    native = kernels.native_available()
    state = {
        "lconvert": __version__,
        "python": sys.version.split()[0],
        "machine": platform.machine(),
        "kernels": "compiled" if native else "NumPy reference (slow): no compiled kernels were found",
        "isa": kernels.isa(),
        "isas": list(kernels.isas()),
        "packages": {r[0]: r[1] for r in rows},
    }
    if as_json:
        click.echo(json.dumps(state, indent=1))
        return 0
    click.echo(f"lconvert {__version__}, Python {state['python']}, {state['machine']}")
    click.echo(f"kernels: {state['kernels']}, using {state['isa']} of {', '.join(kernels.isas())}\n")
    table("", ("package", "version", "needed for", "to install"), rows)
    return 0
