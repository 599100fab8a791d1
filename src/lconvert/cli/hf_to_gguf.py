"""`lconvert hf-to-gguf`: a checkpoint to GGUF in one pass, then the proof."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from lconvert.cli import calibrating, producing
from lconvert.cli.calibrating import How
from lconvert.cli.common import (
    fail_fast_files,
    fail_fast_output,
    file_stem,
    must_end,
    no_card_option,
    parse_size,
    print_plan,
    progress_bar,
    save,
    status,
    threads_option,
    write_card,
)

#: llama-quantize's file types as flags; converters/gguf_mixture_rules.py has what each means.
FILE_TYPES = [
    "Q4_K_M",
    "Q4_K_S",
    "Q4_K",
    "Q5_K_M",
    "Q5_K_S",
    "Q5_K",
    "Q6_K",
    "Q8_0",
    "Q3_K_M",
    "Q3_K_S",
    "Q3_K_L",
    "Q3_K",
    "Q2_K",
    "Q2_K_S",
    "Q4_0",
    "Q4_1",
    "Q5_0",
    "Q5_1",
    "IQ4_NL",
    "IQ4_XS",
    "IQ3_M",
    "IQ3_S",
    "IQ3_XS",
    "IQ3_XXS",
    "IQ2_M",
    "IQ2_S",
    "IQ2_XS",
    "IQ2_XXS",
    "IQ1_M",
    "IQ1_S",
    "TQ1_0",
    "TQ2_0",
    "MXFP4_MOE",
    "F32",
    "F16",
    "BF16",
    "COPY",
]


def _type_flags(f: Any) -> Any:
    for name in reversed(FILE_TYPES):
        f = click.option(f"--{name.lower()}", "flags", flag_value=name, hidden=True, multiple=True)(f)
    return f


@click.command("hf-to-gguf", context_settings={"max_content_width": 110})
@click.argument("source")
@click.option(
    "-o", "--output", type=click.Path(path_type=Path), help="Output file [default: NAME-TYPE.gguf here]."
)
@click.option("--type", "type_", metavar="NAME", help="File type; --q4_k_m is short for --type Q4_K_M.")
@click.option(
    "--tensor-type", "tensor_types", metavar="REGEX=TYPE", multiple=True, help="Type of matching tensors."
)
@click.option("--output-tensor-type", metavar="TYPE", help="Type of output.weight.")
@click.option("--token-embedding-type", metavar="TYPE", help="Type of token_embd.weight.")
@click.option("--pure", is_flag=True, help="No mixture: every quantizable tensor gets the base type.")
@click.option("--leave-output-tensor", is_flag=True, help="Keep output.weight as it is.")
@click.option("--imatrix", type=click.Path(path_type=Path), help="Importance matrix (.dat or .gguf).")
@click.option(
    "--split-max-size", metavar="SIZE", help="Write shards of at most SIZE (e.g. 4G) of tensor data."
)
@click.option("--allow-requantize", is_flag=True, help="Round tensors that are already quantized again.")
@click.option(
    "--allow-trait-loss", "allow_loss", metavar="NAME", multiple=True, help="Accept a trait llama.cpp lacks."
)
@click.option("--name", help="general.name in the file [default: the folder's name].")
@click.option("--dry-run", is_flag=True, help="Show the plan; write nothing.")
@click.option("--json", "as_json", is_flag=True, help="Machine-readable output on stdout.")
@click.option("--force", is_flag=True, help="Replace an existing output.")
@click.option("--resume", is_flag=True, help="Continue a run that was killed.")
@click.option("--no-validate", is_flag=True, help="Skip the proof (never imports torch or transformers).")
@click.option(
    "--text", type=click.Path(path_type=Path), help="Text for the proof [default: a built-in excerpt]."
)
@click.option("--report", type=click.Path(path_type=Path), help="Write the proof as JSON here.")
@calibrating.options
@no_card_option
@threads_option
@_type_flags
def command(
    source: str,
    output: Path | None,
    type_: str | None,
    flags: tuple[str, ...],
    tensor_types: tuple[str, ...],
    split_max_size: str | None,
    dry_run: bool,
    as_json: bool,
    force: bool,
    resume: bool,
    no_validate: bool,
    no_card: bool,
    text: Path | None,
    report: Path | None,
    threads: int | None,
    how: How,
    **options: Any,
) -> int:
    """Convert SOURCE (a Hugging Face folder or hub name, a GGUF file, an .lcir folder) to GGUF.

    The type is a flag named after llama-quantize's file types: --q4_k_m --q5_k_m --q6_k --q8_0 --q4_0 --q3_k_m --q2_k
    --iq4_xs --mxfp4_moe --f16 --bf16 --f32 ... (all of them: lconvert formats). Without one, every tensor keeps the
    type it has. Bytes equal what llama.cpp's own converter and quantizer write, where no other --method is asked for, which
    rounds onto the blocks of the same types. Ends with a proof in llama.cpp against the source unless --no-validate.

    \b
    Examples:
      lconvert hf-to-gguf ./my-model --q4_k_m
      lconvert hf-to-gguf ./my-model --q4_k_m -o out/model.gguf --imatrix imatrix.gguf
      lconvert hf-to-gguf ./my-model --type IQ4_XS --tensor-type 'attn_v=q8_0'
      lconvert hf-to-gguf ./my-model --q8_0 --split-max-size 4G --no-validate
      lconvert hf-to-gguf ./my-model --method modelopt:NVFP4_DEFAULT_CFG --calibrate text.txt
      lconvert hf-to-gguf ./my-model --q4_k_m --dry-run --json
    """
    import lconvert
    from lconvert import api
    from lconvert.converters import gguf, gguf_grids, gguf_mixture, methods
    from lconvert.errors import LconvertError, OptionError
    from lconvert.executor import execute
    from lconvert.recipe import Recipe

    chosen = {*flags, *([type_.upper()] if type_ else [])}
    if len(chosen) > 1:
        raise OptionError(f"several file types were given: {', '.join(sorted(chosen))}; choose one")
    ftype = gguf_mixture.find_ftype(chosen.pop()).name if chosen else None
    fail_fast_files(read=[text, options["imatrix"]], written=[report])
    out = output or Path(f"{file_stem(lconvert.read(source).name)}-{ftype or 'COPY'}.gguf")
    must_end(out, ".gguf")
    if not dry_run:
        fail_fast_output(out, force)
    lowering = api.gguf_options(
        ftype=ftype,
        tensor_types=[gguf_mixture.parse_tensor_type(t) for t in tensor_types],
        split_max_size=parse_size(split_max_size, "--split-max-size"),
        **options,
    )
    base = gguf_mixture.FTYPES[ftype].base if ftype else None
    producing.alone(how, f"--type {ftype}" if base not in (None, "F32", "F16", "BF16") else None)
    run: dict[str, Any] = {"dry_run": dry_run, "force": force, "resume": resume, "threads": threads}
    with producing.source(how, source, out, **run) as made:
        model = made.model
        recipe = gguf_grids.recipe(how.method, model, lowering, how.text) if how.method else Recipe("", ())
        if dry_run:
            found = gguf.plan(methods.outline(recipe).apply(model), out.name, lowering)
            return print_plan(calibrating.outlined(found, recipe), as_json)
        calibrating.possible(recipe, model, out.parent, force, lambda m: gguf.plan(m, out.name, lowering))
        with calibrating.run(how, recipe, model, out, resume=resume, threads=threads) as job:
            rounded = calibrating.applied(recipe, model, job)
            plan = made.recorded(
                calibrating.recorded(gguf.plan(rounded, out.name, lowering), recipe, job, model)
            )
            with progress_bar("converting", plan.size) as tell:
                result = execute(plan, out.parent, threads=threads, force=force, resume=resume, progress=tell)
        if no_validate:
            if not no_card:
                write_card(source, result)
            _summary(result, None, as_json)
            return 0
        from lconvert.validators import documents, parity

        try:
            with status("validating") as tell:
                proof = parity.validate(
                    made.path,
                    result.paths[0],
                    text=text,
                    threads=threads,
                    manifest=result.manifest,
                    progress=tell,
                )
        except LconvertError as e:
            raise type(e)(f"{result.paths[0]} is written but not proven: {e}") from None
    data = proof.to_json()
    if report:
        save(report, documents.dumps(data))
    if not no_card:
        write_card(source, result, data)
    _summary(result, proof, as_json)
    return proof.exit_code


def _summary(result: Any, proof: Any, as_json: bool) -> None:
    if as_json:
        out: dict[str, Any] = {"files": [str(p) for p in result.paths], "manifest": dict(result.manifest)}
        out["report"] = list(result.plan.notes)
        out["validation"] = proof.to_json() if proof else None
        click.echo(json.dumps(out, indent=1))
        return
    from lconvert.cli.common import print_report, print_result

    print_result(result)
    if proof:
        print_report(proof)
