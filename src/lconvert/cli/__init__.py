"""The command line: one file per verb, loaded when the verb is used, so that --help is instant."""

from __future__ import annotations

import importlib
import io
import os
import sys
from collections.abc import Mapping
from typing import Any, NoReturn

import click

from lconvert import __version__
from lconvert.errors import LconvertError

#: Verb -> what it does; the module of the same name (with _ for -) holds the command as `command`.
VERBS: Mapping[str, str] = {
    "hf-to-gguf": "Convert a checkpoint to GGUF (llama.cpp) and prove it.",
    "gguf-to-hf": "Convert a GGUF file back to a Hugging Face folder.",
    "hf-to-vllm": "Convert any source to a folder that vLLM serves.",
    "hf-to-onnx": "Convert any source to an ONNX decoder for ONNX Runtime or TensorRT.",
    "hf-to-trtllm": "Convert any source to a folder that TensorRT-LLM serves.",
    "build-engine": "Build a TensorRT engine from an ONNX file or any source.",
    "triton-repo": "Write a model repository for Triton Inference Server.",
    "convert": "Convert any source to any target, exactly or not at all.",
    "plan": "Show what a consumer's graph would hold, and which of its rules it breaks.",
    "carry": "Show what each target would hold of a source, and why not more.",
    "compress": "Write a model in lconvert's own format (.lcir), compressed by a recipe.",
    "imatrix": "Measure an importance matrix on a text, in llama.cpp's format.",
    "validate": "Prove that an artifact is its source: structure, tensors, tokens, logits, layers.",
    "bench": "Measure size, memory and speed of artifacts, or of a server under load.",
    "eval": "Score tasks, calibration and long contexts on an artifact and its source.",
    "report": "Make a page, JUnit XML or a model card of validations and benchmarks.",
    "inspect": "Show what a model folder or file holds.",
    "formats": "List sources, targets and tensor types.",
    "recipes": "List the built-in recipes.",
    "doctor": "Show which runtimes, packages and kernels are available.",
}


class _Interrupted(LconvertError):
    exit_code = 130


class _Closed(Exception):
    """The reader of stdout has seen enough (`| head`)."""


class _Verbs(click.Group):
    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(VERBS)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        if name not in VERBS:
            return None
        module = importlib.import_module(f"{__name__}.{name.replace('-', '_')}")
        command = module.command
        assert isinstance(command, click.Command)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(VERBS.items()))

    def invoke(self, ctx: click.Context) -> Any:
        """Ctrl-C and a closed pipe, before click makes an empty line and exit code 1 of them."""
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as e:
            raise _Interrupted("; ".join(["interrupted", *map(str, e.args)])) from None
        except BrokenPipeError:
            raise _Closed() from None

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        try:
            return super().resolve_command(ctx, args)
        except click.UsageError as e:
            import difflib

            close = difflib.get_close_matches(args[0], VERBS, 1)
            hint = f" Did you mean {close[0]}?" if close else f" Commands: {', '.join(VERBS)}."
            raise click.UsageError(f"{e.message}{hint}", ctx) from None


@click.command(
    cls=_Verbs,
    invoke_without_command=True,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
)
@click.version_option(__version__, prog_name="lconvert")
@click.pass_context
def cli(ctx: click.Context) -> None:
    """One compressed model, every runtime, proved equal.

    \b
    Examples:
      lconvert hf-to-gguf ./my-model --q4_k_m
      lconvert inspect ./my-model
      lconvert validate ./my-model my-model-Q4_K_M.gguf --text heldout.txt
    """
    if ctx.invoked_subcommand is None:
        click.echo(ctx.get_help())


def one_line(text: str) -> str:
    """A message as one printable line of bounded length, whatever a file put into it."""
    plain = "".join(c if c.isprintable() else repr(c)[1:-1] for c in " ".join(text.split()))
    return plain if len(plain) <= _MESSAGE else plain[: _MESSAGE - 3] + "..."


_MESSAGE = 2000


def _fail(message: str, code: int) -> NoReturn:
    click.echo(f"lconvert: {one_line(message)}", err=True)
    sys.exit(code)


def _usage(e: click.ClickException) -> str:
    """Click's message, and where to look."""
    command = e.ctx.command_path if isinstance(e, click.UsageError) and e.ctx else "lconvert"
    return f"error: {e.format_message().rstrip('.')}; see {command} --help"


def main() -> None:
    """Entry point: intended errors become one line on stderr and an exit code."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(
            errors="backslashreplace"
        )  # names out of files, on a terminal that lacks letters
    try:
        code = cli(prog_name="lconvert", standalone_mode=False)
        sys.stdout.flush()
        sys.exit(code if isinstance(code, int) else 0)
    except click.exceptions.Exit as e:
        sys.exit(e.exit_code)
    except (click.Abort, KeyboardInterrupt):
        _fail("interrupted", 130)
    except _Interrupted as e:
        _fail(str(e), e.exit_code)
    except click.ClickException as e:
        _fail(_usage(e), 2)
    except LconvertError as e:
        _fail(f"error: {e}", e.exit_code)
    except (_Closed, BrokenPipeError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or the last flush complains
        sys.exit(0)
    except OSError as e:
        where = f"{e.filename}: " if e.filename else ""
        _fail(f"error: {where}{e.strerror or e}", 2)
