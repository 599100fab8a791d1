"""What hf-to-vllm, hf-to-trtllm and convert share: a model, passes on it, a plan, its execution and what is printed."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lconvert.cli import calibrating, producing
from lconvert.cli.calibrating import How
from lconvert.cli.common import (
    fail_fast_files,
    fail_fast_output,
    file_stem,
    no_card_option,
    print_plan,
    print_result,
    progress_bar,
    save,
    status,
    threads_option,
    write_card,
)
from lconvert.converters import methods, targets
from lconvert.errors import OptionError, OutputError

if TYPE_CHECKING:
    from lconvert.ir import Model
    from lconvert.plan import Plan
    from lconvert.recipe import Recipe


def options(command: Callable[..., Any]) -> Callable[..., Any]:
    """The options of every verb that writes an artifact from any source."""
    first = (
        calibrating.options,
        click.option("--dtype", type=click.Choice(["bf16", "f16", "f32"]), help="The model's dtype [default: its own, or one that holds all scales]."),
        click.option("--allow-requantize", is_flag=True, help="Round again what the target cannot hold exactly."),
    )  # fmt: skip
    return decorated(output_options(command), first)


def output_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """How an artifact is written and proven, whatever its format."""
    return decorated(
        command,
        (
            click.option("--dry-run", is_flag=True, help="Show the plan; write nothing."),
            click.option("--json", "as_json", is_flag=True, help="Machine-readable output on stdout."),
            click.option("--force", is_flag=True, help="Replace existing files."),
            click.option("--resume", is_flag=True, help="Continue a run that was killed."),
            click.option("--no-validate", is_flag=True, help="Skip the proof (never imports torch or transformers)."),
            click.option("--text", type=click.Path(path_type=Path), help="Text for the proof [default: a built-in excerpt]."),
            click.option("--report", type=click.Path(path_type=Path), help="Write the proof as JSON here."),
            no_card_option,
            threads_option,
        ),
    )  # fmt: skip


def decorated(command: Callable[..., Any], arguments: Sequence[Callable[..., Any]]) -> Callable[..., Any]:
    """The command with options that its help lists in this order."""
    for argument in reversed(arguments):
        command = argument(command)
    return command


def alone(context: click.Context, option: click.Parameter, chosen: tuple[str, ...]) -> str | None:
    """The flag that was given of those with one name; OptionError for two. A callback of options with multiple=True."""
    different = tuple(dict.fromkeys(chosen))
    if len(different) > 1:
        raise OptionError(f"--{' and --'.join(different)} contradict each other; give one")
    return different[0] if different else None


def one_of(parameter: str, about: Mapping[str, str]) -> list[Callable[..., Any]]:
    """A flag for every name, which exclude each other: the one that is given is the parameter's value. about: their help."""
    return [
        click.option(f"--{name}", parameter, flag_value=name, type=str, help=f"{text}.", multiple=True, callback=alone)
        for name, text in about.items()
    ]  # fmt: skip


def flags(
    table: Mapping[str, targets.Preset], *, group: str
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """The arguments of a verb that may quantize on the way: one flag per preset of `table`, and `options`.

    group: the help of --group.
    """
    arguments: tuple[Callable[..., Any], ...] = (
        click.argument("source"),
        click.option("-o", "--output", type=click.Path(path_type=Path), help="Output folder [default: NAME-FLAG]."),
        *one_of("preset", {name: p.about for name, p in table.items()}),
        click.option("--group", type=int, help=group),
        click.option("--kv-fp8", is_flag=True, help="Store scales for an FP8 KV cache."),
        options,
    )  # fmt: skip

    return lambda command: decorated(command, arguments)


def run_preset(
    source: str,
    output: Path | None,
    target: str,
    table: Mapping[str, targets.Preset],
    *,
    preset: str | None,
    group: int | None,
    kv_fp8: bool,
    how: How,
    ending: str,
    served: str = "",
    **rest: Any,
) -> int:
    """`run` with the passes of a flag. ending: of the default output without one."""
    recipe = None
    if preset or kv_fp8:
        method = how.method or ""
        recipe = targets.recipe(
            preset or "dense", table, calibration=how.text, group=group, kv=kv_fp8, method=method
        )
    out = output or Path(f"{file_stem(Path(source).name)}-{preset or ending}")
    return run(source, out, target, recipe, how=how, served=served, **rest)


def natural(preset: str | None, how: How, presets: Mapping[str, str]) -> str | None:
    """The flag that is meant: the one that was given, or what a method rounds where none was. presets: by the methods' schemes."""
    if preset is None and how.method is not None:
        scheme = methods.find(how.method).scheme
        if scheme not in presets:
            raise OptionError(
                f"--method {how.method}: no flag of this verb has zero points; use a recipe (--recipe here or with lconvert compress)"
            )
        return presets[scheme]
    return preset


def run(
    source: str,
    output: Path,
    target: str,
    recipe: Any,
    *,
    served: str = "",
    dtype: str | None,
    allow_requantize: bool,
    **rest: Any,
) -> int:
    """`write` of a target by name. `recipe` is a Recipe or None; `served` the target whose runtime serves it, if another."""

    def plan(model: Model, original: Model) -> Plan:
        wide = dtype.upper() if dtype else None
        return targets.plan(
            model, target, output.name, original=original, dtype=wide, allow_requantize=allow_requantize
        )

    line = targets.launch(served or target, str(output))
    folder = targets.TARGETS[target].kind != "gguf"
    return write(source, output, recipe, plan, folder=folder, hint=line and f"serve it: {line}", **rest)


def write(
    source: str,
    output: Path,
    recipe: Recipe | None,
    planned: Callable[[Model, Model], Plan],
    *,
    how: How,
    folder: bool,
    hint: str | Callable[[Model], str],
    dry_run: bool,
    as_json: bool,
    force: bool,
    resume: bool,
    no_validate: bool,
    text: Path | None,
    report: Path | None,
    no_card: bool,
    threads: int | None,
) -> int:
    """Read, pass, plan, write, prove, print. planned: the plan of the model after passes, and of the one before. folder: whether
    the artifact is one. hint: what to do with it, "does: command"; a function of the model where that depends on it."""
    from lconvert.errors import LconvertError
    from lconvert.executor import execute
    from lconvert.primitives.job import Job
    from lconvert.recipe import Recipe

    fail_fast_files(read=[text], written=[report])
    if not dry_run and not folder:
        fail_fast_output(output, force)
    if folder and output.is_dir() and Path(source).is_dir() and output.samefile(source):
        raise OutputError(f"{output}: is also the source; choose another output folder")
    producing.alone(how, recipe.name if recipe is not None and recipe.steps else None)
    run: dict[str, Any] = {"dry_run": dry_run, "force": force, "resume": resume, "threads": threads}
    with producing.source(how, source, output, **run) as made:
        original = made.model
        recipe = recipe.of(original) if recipe is not None else Recipe("", ())
        if how.method is not None:
            methods.something_to_round(how.method, recipe, original)
        if dry_run:
            with status("preparing"):
                outline = methods.outline(recipe)
                found = planned(outline.apply(original, Job(how.calibrated(recipe))), original)
            return print_plan(calibrating.outlined(found, recipe), as_json)
        where = output if folder else output.parent
        calibrating.possible(recipe, original, where, force, lambda m: planned(m, original))
        with calibrating.run(how, recipe, original, output, resume=resume, threads=threads) as job:
            model = calibrating.applied(recipe, original, job)
            with status("preparing"):
                plan = made.recorded(calibrating.recorded(planned(model, original), recipe, job, original))
            with progress_bar("writing", plan.size) as tell:
                result = execute(plan, where, threads=threads, force=force, resume=resume, progress=tell)
        hint = hint(model) if callable(hint) else hint
        proof = None
        if not no_validate:
            from lconvert.validators import parity

            try:
                with status("validating") as step:
                    proof = parity.validate(
                        made.path, output, text=text, threads=threads, manifest=result.manifest, progress=step
                    )
            except LconvertError as e:
                raise type(e)(f"{output} is written but not proven: {e}") from None
            except KeyboardInterrupt:
                raise KeyboardInterrupt(f"{output} is written but not proven") from None
    data = proof.to_json() if proof else None
    if report and data:
        from lconvert.validators import documents

        save(report, documents.dumps(data))
    if not no_card:
        write_card(source, result, data, folder=output if folder else None)
    if as_json:
        out: dict[str, Any] = {"files": [str(p) for p in result.paths], "manifest": dict(result.manifest)}
        out["report"] = list(result.plan.notes)
        click.echo(json.dumps(out | {"validation": data, "launch": hint.partition(": ")[2]}, indent=1))
    else:
        print_result(result)
        if proof:
            from lconvert.cli.common import print_report

            print_report(proof)
        if hint:
            click.echo(hint)
    return proof.exit_code if proof else 0
