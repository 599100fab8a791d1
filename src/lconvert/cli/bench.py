"""`lconvert bench`: size, memory and speed of artifacts, side by side, or of a server under load."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lconvert.cli.common import (
    fail_fast_files,
    human,
    interpreters,
    keep_inputs,
    save,
    status,
    table,
    threads_option,
)
from lconvert.errors import OptionError

if TYPE_CHECKING:
    from lconvert.validators.bench import Entry


@click.command("bench")
@click.argument("artifacts", nargs=-1, metavar="[ARTIFACT[@RUNTIME]]...")
@click.option("--runtime", help="Runtime of artifacts that name none [default: by the kind of artifact].")
@click.option(
    "--python",
    "pythons",
    multiple=True,
    metavar="[NAME=]PATH",
    help="Interpreter that has the runtime NAME, or all [default: this one, or lconvert.toml].",
)
@click.option(
    "--prompt", type=click.IntRange(1), help="Prompt tokens [default: 512, less where a context is smaller]."
)
@click.option("--tokens", type=click.IntRange(2), default=64, show_default=True, help="Output tokens.")
@click.option("--repetitions", type=click.IntRange(1), default=5, show_default=True, help="Turns of each.")
@click.option(
    "--warmup", type=click.IntRange(0), default=1, show_default=True, help="Requests before a turn."
)
@click.option("--slo", metavar="LIMITS", help="Limits of a good request in seconds: ttft=0.5,tpot=0.05.")
@click.option("--baseline-label", metavar="LABEL", help="Compare with this one [default: the first].")
@click.option("--purpose", type=click.Choice(["speed", "parity"]), default="speed", show_default=True)
@click.option("--seed", type=int, default=0, show_default=True, help="Of the choice of prompts.")
@click.option(
    "--timeout", type=click.FloatRange(min=0, min_open=True), help="Seconds that a request may take."
)
@click.option("--server", metavar="URL", help="Measure an OpenAI-compatible server under load instead.")
@click.option(
    "--serve", metavar="NAME", help="Start this server (llama.cpp, vllm) for each artifact, measure it."
)
@click.option("--concurrency", default="1,2,4", show_default=True, help="Users at a time, with a server.")
@click.option("--requests", type=click.IntRange(1), help="Per concurrency [default: 4 per user, at least 8].")
@click.option("--model", help="The server's name of the model [default: the first that it lists].")
@click.option("--header", "headers", multiple=True, metavar="'NAME: VALUE'", help="Sent to the server.")
@click.option(
    "--batch", default="1,8", show_default=True, help="Examples at a time, of encoders and image networks."
)
@click.option("--json", "as_json", is_flag=True, help="Machine-readable results on stdout.")
@click.option("--report", type=click.Path(path_type=Path), help="Write the JSON here as well.")
@click.option(
    "--plots", type=click.Path(path_type=Path), help="Write prefill.svg and decode.svg into this folder."
)
@threads_option
def command(
    artifacts: tuple[str, ...],
    runtime: str | None,
    pythons: tuple[str, ...],
    prompt: int | None,
    tokens: int,
    repetitions: int,
    warmup: int,
    slo: str | None,
    baseline_label: str | None,
    purpose: str,
    seed: int,
    timeout: float | None,
    server: str | None,
    serve: str | None,
    concurrency: str,
    requests: int | None,
    model: str | None,
    headers: tuple[str, ...],
    batch: str,
    as_json: bool,
    report: Path | None,
    plots: Path | None,
    threads: int | None,
) -> int:
    """Measure size, load time, memory, prefill and decode speed, TTFT, ITL, latency of artifacts.

    Of encoders and networks of images: examples per second by --batch, of --prompt tokens [default: 128].

    Artifacts take turns, each in a process of its own, so that noise of the machine hurts all alike; ratios are
    taken within a turn. Exit codes: 0 measured, 1 something failed, 2 usage, 3 a runtime is missing.

    \b
    Examples:
      lconvert bench model-Q8_0.gguf model-Q4_K_M.gguf
      lconvert bench model-F32.gguf ./my-model@transformers --prompt 256 --slo ttft=0.5,tpot=0.05
      lconvert bench ./my-model@vllm --python vllm=~/vllm-env/bin/python --report speed.json --plots .
      lconvert bench --server http://localhost:8000 --concurrency 1,4,16
      lconvert bench model-Q4_K_M.gguf --serve llama.cpp --concurrency 1,2
      lconvert bench ./my-bert ./my-bert-onnx-w8a8 --batch 1,16 --prompt 64
    """
    from lconvert.cli import bench_classifier
    from lconvert.validators import bench, documents
    from lconvert.validators.latency import Slo

    fail_fast_files(written=[report])
    keep_inputs([Path(_entry(text, runtime).path) for text in artifacts], (), [report] if report else ())
    python = interpreters(pythons)
    if plots is not None and not plots.is_dir():
        raise OptionError(f"--plots {plots}: is not a folder; make it first")
    limits = Slo.parse(slo) if slo else None
    if server and (artifacts or serve):
        raise OptionError("--server measures a server that runs already; leave out ARTIFACT and --serve")
    if not (artifacts or server):
        raise OptionError("nothing to measure: name an ARTIFACT or a --server")
    entries = [_entry(text, runtime) for text in artifacts]
    paths = [str(e.path) for e in entries]
    if bench_classifier.applies(paths):
        return bench_classifier.run(
            paths,
            batch=batch,
            prompt=prompt,
            repetitions=repetitions,
            threads=threads,
            seed=seed,
            refused={
                "a runtime": any(e.runtime for e in entries),
                "--slo": slo,
                "--serve": serve,
                "--plots": plots,
                "--python": pythons,
            },
            as_json=as_json,
            report=report,
        )
    if prompt is None:
        prompt = _fitting(artifacts, tokens)
    load: dict[str, Any] = {"prompt_tokens": prompt, "output_tokens": tokens, "slo": limits, "seed": seed}
    with status("measuring") as tell:
        load |= {"progress": tell, **({"timeout": timeout} if timeout else {})}
        if server or serve:
            load |= {"concurrencies": _numbers(concurrency), "requests": requests, "model": model}
            load |= {"headers": _headers(headers)}
            found = _under_load(server, serve, artifacts, python, threads, load)
        else:
            found = bench.bench(
                [_entry(text, runtime) for text in artifacts],
                python=python,
                repetitions=repetitions,
                warmup=warmup,
                threads=threads,
                purpose="speed" if purpose == "speed" else "parity",
                baseline=baseline_label,
                **load,
            )
    content = documents.dumps(found)
    if report:
        save(report, content)
    if plots:
        _draw(found, plots)
    if as_json:
        click.echo(content, nl=False)
    else:
        _print(found)
    return _exit_code(found)


def _fitting(artifacts: tuple[str, ...], tokens: int) -> int:
    """512 prompt tokens, or what the smallest context leaves beside the output."""
    import lconvert
    from lconvert.errors import LconvertError

    contexts = []
    for text in artifacts:
        try:
            contexts.append(lconvert.read(_entry(text, None).path).decoder.context)
        except LconvertError:  # the runtime will say what is wrong with it
            continue
    return max(1, min([512, *(c - tokens for c in contexts)]))


def _entry(text: str, runtime: str | None) -> Entry:
    """ARTIFACT or ARTIFACT@RUNTIME; a path may hold an @ itself when what follows it is no runtime."""
    from lconvert.validators.bench import Entry
    from lconvert.validators.runtimes import RUNTIMES

    path, at, name = text.rpartition("@")
    if at and name in RUNTIMES:
        return Entry(path, name)
    if at and not Path(text).exists() and Path(path).exists():
        raise OptionError(f"{text}: unknown runtime {name}; runtimes: {', '.join(RUNTIMES)}")
    return Entry(text, runtime)


def _numbers(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise OptionError(f"--concurrency {text!r}: give whole numbers, such as 1,2,4") from None


def _headers(lines: tuple[str, ...]) -> dict[str, str]:
    pairs = [line.partition(":") for line in lines]
    if not all(colon and name.strip() for name, colon, _ in pairs):
        raise OptionError("--header: give it as 'Name: value'")
    return {name.strip(): value.strip() for name, _, value in pairs}


def _under_load(
    server: str | None,
    serve: str | None,
    artifacts: tuple[str, ...],
    pythons: Mapping[str, Path],
    threads: int | None,
    load: Mapping[str, Any],
) -> dict[str, Any]:
    """The server at an address, or one that is started for each artifact in turn."""
    from lconvert.validators import bench
    from lconvert.validators.bench_server import sweep
    from lconvert.validators.runtimes import config
    from lconvert.validators.serving import serving

    settings = {
        "prompt_tokens": load["prompt_tokens"],
        "output_tokens": load["output_tokens"],
        "slo": load["slo"] and load["slo"].to_json(),
        "seed": load["seed"],
        "threads": threads,
    }
    if server:
        return bench.document([], settings, sweep(server, **load))
    rows: list[dict[str, Any]] = []
    python = pythons.get(str(serve)) or pythons.get("") or config.settings(str(serve)).python
    context = 2 * load["prompt_tokens"] + load["output_tokens"]  # a prompt is cut by its length as text
    for artifact in artifacts:
        with serving(str(serve), artifact, context=context, threads=threads, python=python) as url:
            rows += [{"artifact": artifact, "server": serve, **row} for row in sweep(url, **load)]
    return bench.document([], settings, rows)


def _draw(found: Mapping[str, Any], folder: Path) -> None:
    from lconvert.validators import plots

    for name in ("prefill", "decode"):
        rows = [(r["label"], r[f"{name}_tokens_per_s"] or {}) for r in found["results"]]
        plots.save(plots.bars(rows, f"{name}, tokens/s"), folder / f"{name}.svg")


def _number(value: float | None) -> str:
    """Three digits; whole numbers stay whole."""
    return "" if value is None else f"{value:.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def _spread(figure: Mapping[str, Any] | None, factor: float = 1.0) -> str:
    """The median, and the range of the repetitions."""
    if not figure:
        return ""
    middle, low, high = (_number(factor * figure[k]) for k in ("median", "min", "max"))
    return f"{middle} ({low}-{high})"


def _print(found: Mapping[str, Any]) -> None:
    """One row per artifact: medians with the range of the repetitions, ratios to the baseline; failures below."""
    results = found["results"]
    if results:
        settings = found["settings"]
        sizes = [
            (
                r["label"],
                r["runtime"],
                human(r["bytes"]),
                _fixed(r["bits_per_weight"]),
                human(r["peak_memory_bytes"]) if r["peak_memory_bytes"] else "",
                human(r["baseline_memory_bytes"]) if r["baseline_memory_bytes"] else "",
                _spread(r["load_s"], 1e3),
            )
            for r in results
        ]
        table(
            "",
            ("artifact", "runtime", "size", "bits", "memory", "of it packages", "load ms"),
            sizes,
            range(2, 7),
        )
        table(
            f"\n{settings['prompt_tokens']} prompt tokens, {settings['output_tokens']} output tokens: median (range) of "
            f"{settings['repetitions']} repetitions; x: times {settings['baseline']}",
            (
                "artifact",
                "prefill tok/s",
                "x",
                "decode tok/s",
                "x",
                "TTFT ms",
                "gaps p50/p99 ms",
                "latency ms",
            ),
            [_speed(r) for r in results],
            range(1, 8),
        )
        for line in (line for r in results for line in _remarks(r)):
            click.echo(line)
    if found["server"]:
        _print_sweep(found)


def _speed(r: Mapping[str, Any]) -> tuple[str, ...]:
    ratio = r["ratio"] or {}
    prefill, decode = (ratio.get(f"{name}_tokens_per_s") for name in ("prefill", "decode"))
    return (
        r["label"],
        _spread(r["prefill_tokens_per_s"]),
        _fixed(prefill and prefill["median"]),
        _spread(r["decode_tokens_per_s"]),
        _fixed(decode and decode["median"]),
        _spread(r["ttft_s"], 1e3),
        _milliseconds(r["itl_s"]),
        _spread(r["latency_s"], 1e3),
    )


def _remarks(r: Mapping[str, Any]) -> Iterator[str]:
    if r["error"]:
        yield f"{r['label']} in {r['runtime']}: failed: {r['error']}"
    if good := r["goodput"]:
        share = f"{100 * good['share']:.0f}% of them meet the SLO"
        yield f"{r['label']}: goodput {_number(good['requests_per_s'])} requests/s, {share}"
    if r["gpu"]:
        yield f"{r['label']}: {_number(r['gpu']['joules_per_token']['median'])} J per output token, prompt included"


def _fixed(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def _milliseconds(figure: Mapping[str, Any] | None) -> str:
    return f"{_number(1e3 * figure['p50'])} / {_number(1e3 * figure['p99'])}" if figure else ""


def _print_sweep(found: Mapping[str, Any]) -> None:
    """One row per server and concurrency; failed requests below."""
    rows = [
        (
            r.get("artifact", r["model"]),
            r["concurrency"],
            f"{r['completed']} of {r['requests']}",
            _number(r["output_tokens_per_s"]),
            _number(r["output_tokens_per_s_per_user"]),
            _number(r["requests_per_s"]),
            _milliseconds(r["ttft_s"]),
            _milliseconds(r["tpot_s"]),
            _milliseconds(r["latency_s"]),
            _number(r["goodput"]["requests_per_s"]) if r["goodput"] else "",
        )
        for r in found["server"]
    ]
    columns = (
        "model",
        "users",
        "answered",
        "tok/s",
        "of a user",
        "requests/s",
        "TTFT ms",
        "TPOT ms",
        "latency ms",
    )
    settings = found["settings"]
    table(
        f"about {settings['prompt_tokens']} prompt tokens, {settings['output_tokens']} output tokens; times are p50 / p99",
        (*columns, "goodput"),
        rows,
        right=range(1, 10),
    )
    for r in found["server"]:
        for reason, n in r["errors"].items():
            click.echo(f"{r['concurrency']} users: {n} requests failed: {reason}")
        if r["shorter"]:
            click.echo(
                f"{r['concurrency']} users: {r['shorter']} answers ended before {settings['output_tokens']} tokens"
            )


def _exit_code(found: Mapping[str, Any]) -> int:
    """3 where every artifact lacks its runtime, 1 where something failed, else 0."""
    codes = [r["exit_code"] for r in found["results"]]
    if codes and all(c == 3 for c in codes):
        return 3
    return 1 if any(codes) or any(r["errors"] for r in found["server"]) else 0
