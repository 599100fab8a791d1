"""The command line: one file per verb, loaded when the verb is used, so that --help is instant."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Mapping

import click

from lconvert import __version__
from lconvert.errors import LconvertError

#: Verb -> what it does; the module of the same name (with _ for -) holds the command as `command`.
VERBS: Mapping[str, str] = {
    "hf-to-gguf": "Convert a checkpoint to GGUF (llama.cpp) and prove it.",
    "gguf-to-hf": "Convert a GGUF file back to a Hugging Face folder.",
    "compress": "Write a model in lconvert's own format (.lcir), compressed by a recipe.",
    "validate": "Compare an artifact with its source: structure, tensors, tokens, logits.",
    "inspect": "Show what a model folder or file holds.",
    "formats": "List sources, targets and tensor types.",
    "recipes": "List the built-in recipes.",
    "doctor": "Show which runtimes, packages and kernels are available.",
}


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


@click.command(cls=_Verbs, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, prog_name="lconvert")
def cli() -> None:
    """One compressed model, every runtime, proved equal.

    \b
    Examples:
      lconvert hf-to-gguf ./my-model --q4_k_m
      lconvert inspect ./my-model
      lconvert validate ./my-model my-model-Q4_K_M.gguf --text heldout.txt
    """


def main() -> None:
    """Entry point: intended errors become one line on stderr and an exit code."""
    try:
        code = cli(standalone_mode=False)
        sys.exit(code if isinstance(code, int) else 0)
    except click.exceptions.Exit as e:
        sys.exit(e.exit_code)
    except click.Abort:
        click.echo("lconvert: interrupted; nothing was written under the final name", err=True)
        sys.exit(130)
    except KeyboardInterrupt:
        click.echo("lconvert: interrupted; nothing was written under the final name", err=True)
        sys.exit(130)
    except click.ClickException as e:
        e.show()
        sys.exit(2)
    except LconvertError as e:
        click.echo(f"lconvert: error: {e}", err=True)
        sys.exit(e.exit_code)
    except BrokenPipeError:
        sys.stderr.close()
        sys.exit(0)
