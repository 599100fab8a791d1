"""What `lconvert compress --target` does: a type per matrix under a budget, the recipe that repeats it, the Pareto table and plot."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lconvert.cli.common import fail_fast_files, human, parse_size, save, status, table
from lconvert.cli.exporting import decorated
from lconvert.errors import OptionError

if TYPE_CHECKING:
    from lconvert.ir import Model
    from lconvert.passes.allocate import Options, Outcome, Search
    from lconvert.primitives.allocator import Allocation
    from lconvert.primitives.job import Job
    from lconvert.recipe import Recipe

#: Targets of passes/deployable.py by the names of converters/targets.py.
_PLANNED: Mapping[str, str] = {"gguf": "gguf", "vllm": "vllm", "onnx": "onnx", "trt": "tensorrt-llm"}
_SHOWN = 12  # rows of the Pareto table
_TRIES = 4  # of a budget, where headers depend on what was chosen
_PLOTS = (".svg", ".png", ".json")


@dataclass(frozen=True)
class Request:
    """The options of the command line, as given."""

    target: str | None = None
    bpw: float | None = None
    size: str | None = None
    max_kld: float | None = None
    sensitivity: str = "imatrix"
    types: tuple[str, ...] = ()
    only: str = ""
    refine: int = 0
    driver: str = "evolve"
    recipe_out: Path | None = None
    pareto: Path | None = None

    @property
    def wanted(self) -> bool:
        return self.target is not None


def options(command: Callable[..., Any]) -> Callable[..., Any]:
    """The options of an allocation; the command takes them as keywords named after Request's fields."""
    existing = click.Path(path_type=Path)
    return decorated(
        command,
        (
            click.option("--target", type=click.Choice(list(_PLANNED)), help="Choose a type per matrix among those that this target runs."),
            click.option("--bpw", type=float, help="Budget: bits per weight, over all tensors."),
            click.option("--size", metavar="SIZE", help="Budget: bytes of the artifact, such as 6G."),
            click.option("--max-kld", type=float, help="Instead of a budget: the smallest size that measures at most this mean KLD."),
            click.option("--sensitivity", type=click.Choice(["imatrix", "fisher", "hessian", "kld"]), default="imatrix", show_default=True, help="How a type's cost is found."),
            click.option("--types", metavar="LIST", default="", help="Types to choose from, separated by commas [default: the target's]."),
            click.option("--only", metavar="REGEX", default="", help="Matrices that get a choice, by canonical name."),
            click.option("--refine", type=click.IntRange(0), default=0, help="Generations of refinement on measured KLD."),
            click.option("--driver", type=click.Choice(["evolve", "optuna"]), default="evolve", help="What refines."),
            click.option("--recipe-out", type=existing, help="Write the choice as a recipe file here."),
            click.option("--pareto", type=existing, help="Write the front of sizes against KLD here (.svg, .png or .json)."),
        ),
    )  # fmt: skip


def request(given: dict[str, Any]) -> Request:
    """The options of an allocation, taken out of a command's keywords. OptionError where they lack --target or contradict it."""
    said = str(given.pop("types"))
    types = tuple(t for t in said.split(",") if t)
    if said and not types:
        raise OptionError(f"--types {said!r}: names no type; expected some of them, such as Q4_K,Q6_K")
    names = [f for f in Request.__dataclass_fields__ if f != "types"]
    found = Request(types=types, **{name: given.pop(name) for name in names})
    if found.wanted:
        budgets = [
            f"--{n.replace('_', '-')}" for n in ("bpw", "size", "max_kld") if getattr(found, n) is not None
        ]
        if len(budgets) != 1:
            raise OptionError(
                f"--target needs one of --bpw, --size and --max-kld; found {' and '.join(budgets) or 'none of them'}"
            )
        if found.pareto is not None and found.pareto.suffix not in _PLOTS:
            raise OptionError(f"{found.pareto}: the front is written as {', '.join(_PLOTS)}")
    elif found != Request(sensitivity=found.sensitivity, driver=found.driver):
        raise OptionError(
            "--bpw, --size, --max-kld and what belongs to them choose among a target's types; add --target"
        )
    return found


def run(
    model: Model,
    wanted: Request,
    job: Job,
    method: str | None,
    said: Mapping[str, Any],
    *,
    quiet: bool = False,
) -> Recipe:
    """The recipe that rounds to the types that were chosen, by `method`; prints what was, and writes the recipe and the front. said: how many
    windows and tokens in each (`windows`, `context`) the command line wants, where it does."""
    from lconvert.converters import methods
    from lconvert.passes.allocate import Options, Search
    from lconvert.primitives import allocator

    assert wanted.target is not None
    fail_fast_files(written=[wanted.recipe_out, wanted.pareto])
    options = Options(
        target=wanted.target,
        bpw=wanted.bpw,
        size=parse_size(wanted.size, "--size"),
        max_kld=wanted.max_kld,
        sensitivity=wanted.sensitivity,
        types=wanted.types,
        only=wanted.only,
        refine=wanted.refine,
        driver=wanted.driver,
        **said,
        overhead=_overhead(model, wanted) if wanted.size else 0,
    )
    with status("allocating") as say:
        told = replace(job, progress=lambda what, done, total: say(f"{what} {done}/{total}"))
        search = Search(model, options, told)
        found = _fitting(search, options, wanted)
    points = allocator.front(search.items) if wanted.pareto is not None or not quiet else []
    if not quiet:
        show(search, found, points)
    made = recipe(search, found)
    if method is not None:
        made = methods.applied(method, made, job.calibration.text)
    if wanted.recipe_out is not None:
        save(wanted.recipe_out, _about(search, found) + made.to_yaml())
    if wanted.pareto is not None:
        front(search, found, points, wanted.pareto)
    return made


def _overhead(model: Model, wanted: Request) -> int:
    """Bytes of an artifact besides tensors, of the model as it is."""
    from lconvert.converters import targets
    from lconvert.passes.deployable import menu
    from lconvert.primitives.placement import NONE

    assert wanted.target is not None
    dense = menu(model, wanted.target, (NONE,), wanted.only)
    tensors = dense.fixed + sum(c.sizes[NONE] for c in dense.choices)
    return max(0, targets.plan(model, _PLANNED[wanted.target], _name(wanted.target)).size - tensors)


def _fitting(search: Search, options: Options, wanted: Request) -> Outcome:
    """The outcome; where --size counts, planned and tightened until the artifact keeps it."""
    from lconvert.converters import targets

    found = search.outcome()
    if options.size is None:
        return found
    budget = search.budget()
    for _ in range(_TRIES):
        made = search.model_of(found)
        planned = targets.plan(made, _PLANNED[options.target], _name(options.target), original=search.model)
        if planned.size <= options.size:
            return found
        budget -= planned.size - options.size
        found = search.outcome(budget)
    raise OptionError(
        f"--size {wanted.size}: the headers of the artifact leave no room for the smallest types; raise it"
    )


def _name(target: str) -> str:
    return "model.gguf" if target == "gguf" else "model"


# --- what is told ------------------------------------------------------------------------------------------


def show(search: Search, found: Outcome, optima: Sequence[Allocation]) -> None:
    """The front as a table, the choice among it, and how many weights each type got."""
    chosen = (found.size, found.allocation.loss, "chosen")
    points = [(a.size + search.menu.fixed, a.loss, "") for a in optima]
    step = max(1, len(points) // _SHOWN)
    rows = sorted([*points[::step], chosen])
    unit = "nats, predicted" if search.options.sensitivity != "kld" else "nats, each matrix alone"
    table(
        "",
        ("size", "bits per weight", f"KLD ({unit})", ""),
        [(human(s), f"{8 * s / search.menu.weights:.3f}", f"{loss:.5f}", mark) for s, loss, mark in rows],
        right=(0, 1, 2),
    )
    by_type: dict[str, list[str]] = {}
    for item, type_ in found.allocation.names().items():
        by_type.setdefault(type_, []).append(item)
    table(
        "",
        ("type", "tensors", "such as"),
        [(t, len(n), n[0]) for t, n in sorted(by_type.items())],
        right=(1,),
    )
    click.echo(
        f"measured KLD of the whole on the calibration text, rounded to nearest: {found.measured:.5f} nats; tensors {human(found.size)}, "
        f"{found.bpw:.3f} bits per weight"
    )
    for note in found.notes:
        click.echo(f"note: {note}")


def recipe(search: Search, found: Outcome) -> Recipe:
    """The choice as a recipe, which rounds to nearest with importances where a text is given."""
    from lconvert.recipe import Recipe, step

    o = search.options
    chosen = {"target": o.target, "grids": found.grids, "windows": o.windows, "context": o.context}
    return Recipe("allocated", (step("allocate", chosen),))


def _about(search: Search, found: Outcome) -> str:
    return (
        f"# {found.bpw:.3f} bits per weight, {found.size} bytes of tensors; mean KLD {found.measured:.5f} on the calibration text, rounded\n"
        f"# to nearest with importances. Chosen by {search.options.sensitivity} among the types of {search.options.target}.\n"
    )


def front(search: Search, found: Outcome, optima: Sequence[Allocation], path: Path) -> None:
    """The front as data or as a plot: predicted losses, and the measured KLD of every point."""
    rows: list[dict[str, Any]] = []
    for best in optima:
        size = best.size + search.menu.fixed
        rows.append(
            {
                "size": size,
                "bits_per_weight": 8 * size / search.menu.weights,
                "predicted": best.loss,
                "kld_mean": search.measure(best),
                "types": best.names(),
            }
        )
    chosen = {"size": found.size, "bits_per_weight": found.bpw, "predicted": found.allocation.loss, "kld_mean": found.measured, "types": found.allocation.names()}  # fmt: skip
    if path.suffix == ".json":
        save(path, json.dumps({"target": search.options.target, "front": rows, "chosen": chosen}, indent=1))
        return
    from lconvert.validators import plots

    predicted = [{**r, "kld_mean": r["predicted"]} for r in rows if r["predicted"] > 0]
    plots.save(plots.frontiers([("measured", rows), ("predicted", predicted), ("chosen", [chosen])]), path)
