"""What the verbs that write share about methods: their options, the run that these make, and what the manifest says of it."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click

from lconvert.cli.common import fail_fast_files, fail_fast_output, parse_size, steps_bar
from lconvert.converters import methods
from lconvert.errors import InputError, LconvertError, OptionError, UnsupportedError

if TYPE_CHECKING:
    from lconvert.ir import Model
    from lconvert.plan import Plan
    from lconvert.primitives.job import Calibration, Job
    from lconvert.recipe import Recipe

_ARRAYS = (".npz", ".npy")


@dataclass(frozen=True)
class How:
    """What the options of a verb say about methods and calibration; None: nothing."""

    method: str | None
    calibration: Path | None
    calibration_windows: int | None
    calibration_context: int | None
    seed: int | None
    device: str
    work: Path | None
    memory: str | None
    activations: Literal["f32", "bf16"]
    pythons: tuple[str, ...] = ()
    #: `modelopt:CONFIG`, the producer that makes the source, where --method names one; `method` is None then.
    produced: str | None = None

    @property
    def text(self) -> str:
        return str(self.calibration or "")

    def check(self) -> None:
        """What is wrong before any model is read."""
        if self.method is not None:
            methods.find(self.method)
        if not re.fullmatch(r"cpu|cuda(:\d+)?", self.device):
            raise OptionError(f"--device {self.device!r}: expected cpu, cuda or cuda:N")
        if self.pythons and self.produced is None:
            raise OptionError("--python names the interpreter of a producer; add --method modelopt:CONFIG")
        self.bytes()
        if self.calibration is not None:
            _check_text(self.calibration)

    def bytes(self) -> int | None:
        """What calibration may take."""
        return parse_size(self.memory, "--memory")

    @property
    def amount(self) -> dict[str, Any]:
        """How much of the text the command line wants: `windows` and `context`, where it says so."""
        said = {"windows": self.calibration_windows, "context": self.calibration_context}
        return {k: v for k, v in said.items() if v is not None}

    def calibrated(self, recipe: Recipe) -> Calibration:
        """The recipe's calibration, with what the command line says instead."""
        text: dict[str, Any] = {"text": self.text} if self.text else {}
        seed: dict[str, Any] = {} if self.seed is None else {"seed": self.seed}
        return replace(recipe.calibration, **text, **self.amount, **seed)


def options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Adds the options; the command gets them as `how`, checked."""

    @functools.wraps(command)
    def gathered(**given: Any) -> Any:
        how = How(**{f.name: given.pop(f.name) for f in fields(How) if f.name != "produced"})
        if how.method is not None and methods.produces(how.method):
            how = replace(how, method=None, produced=how.method)
        how.check()
        return command(how=how, **given)

    names = ", ".join(methods.METHODS)
    added = (
        click.option("--method", metavar="NAME", help=f"How weights are rounded: {names} [default: rtn]; modelopt:CONFIG runs NVIDIA's ModelOpt, as modelopt:INT4_AWQ_CFG."),
        click.option("--calibrate", "--calibration", "calibration", metavar="TEXT", type=click.Path(path_type=Path),
                     help="Calibration text; arrays (.npz, .npy) for networks of images."),
        click.option("--calibration-windows", type=click.IntRange(1), metavar="N", help="Windows of it [default: the recipe's, or 128]."),
        click.option("--calibration-context", type=click.IntRange(1), metavar="N", help="Tokens per window [default: the recipe's, or 512]."),
        click.option("--seed", type=click.IntRange(0), metavar="N", help="Orders what is random [default: 0]."),
        click.option("--device", default="cpu", show_default=True, metavar="NAME", help="Where layers run: cpu, cuda, cuda:N."),
        click.option("--work", type=click.Path(path_type=Path), metavar="DIR",
                     help="Keep finished layers here, for --resume [default: OUTPUT.work, while it runs]."),
        click.option("--memory", metavar="SIZE", help="Memory that calibration may take, such as 8G [default: what it needs]."),
        click.option("--activations", type=click.Choice(["f32", "bf16"]), default="f32", show_default=True,
                     help="What activations are kept in between layers: bf16 takes half the room."),
        click.option("--python", "pythons", multiple=True, metavar="modelopt=PATH", help="Interpreter that has ModelOpt [default: lconvert.toml's]."),
    )  # fmt: skip
    for option in reversed(added):
        gathered = option(gathered)
    return gathered


def _check_text(path: Path) -> None:
    """InputError for a file that is not there, or neither a text nor arrays."""
    fail_fast_files(read=[path])
    if path.suffix.lower() in _ARRAYS:
        return
    try:
        content = path.read_bytes()
    except OSError as e:
        raise InputError(f"{path}: cannot be read ({e.strerror or e})") from None
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as e:
        raise InputError(
            f"{path}: is no UTF-8 text (byte {e.start}); a calibration text is plain text"
        ) from None
    if "\0" in text:
        raise InputError(
            f"{path}: is no text (byte {text.index(chr(0))} is 0); a calibration text is plain text"
        )
    if not text.strip():
        raise InputError(f"{path}: is empty; a calibration text needs some paragraphs")


@contextmanager
def run(
    how: How, recipe: Recipe, model: Model, output: Path, *, resume: bool, threads: int | None
) -> Iterator[Job]:
    """The job of a recipe, with a folder for finished layers while it lasts. The folder is kept where the run ends badly and another
    can take it over, and where it was named."""
    from lconvert import passes
    from lconvert.primitives import workplace
    from lconvert.primitives.job import Job

    calibration = how.calibrated(recipe)
    check_device(how.device)
    job = Job(
        calibration,
        how.device,
        how.activations,
        memory=how.bytes(),
        resume=resume,
        threads=threads,
    )
    folder = how.work or output.with_name(output.name + ".work")
    if not any(passes.calibrates(s.name, s.options) for s in recipe.steps):
        if resume and workplace.holds_layers(folder):  # of a recipe that calibrates, so of another one
            workplace.begin(folder, _identity(recipe, job, model), resume=True)
        yield job
        return
    if calibration.text:
        _check_text(Path(calibration.text))  # the recipe's own
    workplace.begin(folder, _identity(recipe, job, model), resume=resume)
    try:
        yield replace(job, work=folder)
    except BaseException as e:
        if not workplace.holds_layers(folder):
            workplace.end(folder)
        elif isinstance(e, KeyboardInterrupt | LconvertError):
            kept = f"finished layers are kept in {folder} for --resume"
            raise type(e)("; ".join([*map(str, e.args), kept])) from None
        raise
    if how.work is None or not workplace.holds_layers(folder):
        workplace.end(folder)


def possible(
    recipe: Recipe, model: Model, folder: Path, force: bool, planned: Callable[[Model], Plan]
) -> None:
    """Before the long part of a recipe: what would refuse its result, or be in its way. Nothing for recipes that have no long part."""
    from lconvert import passes
    from lconvert.plan import refusals

    outline = methods.outline(recipe)
    if outline == recipe or any(passes.calibrates(s.name, s.options) for s in outline.steps):
        return
    try:
        plan = planned(outline.apply(model))
    except OptionError as e:  # what the outline rounds to nearest, the recipe does otherwise
        rounder = next((s.name for s in recipe.steps if "rounds" in passes.stages(s.name, s.options)), "rtn")
        raise OptionError(re.sub("^rtn: ", f"{rounder}: ", str(e))) from None
    if refused := refusals(plan):
        raise UnsupportedError("; ".join(refused[:3]))
    for file in plan.files:
        fail_fast_output(folder / file.name, force)


def applied(recipe: Recipe, model: Model, job: Job) -> Model:
    """The model after the passes, which say how far they are."""
    with steps_bar() as tell:
        return recipe.apply(model, replace(job, progress=tell))


def recorded(plan: Plan, recipe: Recipe, job: Job, model: Model) -> Plan:
    """The plan whose options, and so the manifest, say by which recipe and on which text the model was made."""
    if not recipe.steps:
        return plan
    said: dict[str, Any] = {"recipe": recipe.to_json()}
    if job.calibration.text and job.work is not None:
        said["calibration"] = described(job, model)
    return replace(plan, options={**plan.options, **said})


def outlined(plan: Plan, recipe: Recipe) -> Plan:
    """The plan of a recipe's outline, with a note where that is not the recipe."""
    from lconvert import passes

    left = [
        s.name
        for s in recipe.steps
        if (s.name != "rtn" or passes.calibrates(s.name, s.options))
        and {"rounds", "transforms", "masks"} & set(passes.stages(s.name, s.options))
    ]
    note = f"planned without {' and '.join(left)}: sizes and types are those of the run, values are rounded to nearest"
    return replace(plan, notes=(*plan.notes, note)) if left and methods.outline(recipe) != recipe else plan


def described(job: Job, model: Model) -> dict[str, Any]:
    """The calibration of a run, for the manifest: its text, how much of it, and what activations were kept in."""
    import hashlib

    from lconvert.ir import Decoder

    c = job.calibration
    content = Path(c.text).read_bytes()
    out = {"name": Path(c.text).name, "sha256": hashlib.sha256(content).hexdigest(), "windows": c.windows, "context": c.context, "seed": c.seed, "activations": job.activations}  # fmt: skip
    if isinstance(model.arch, Decoder):
        from lconvert.primitives.text import windows

        out["tokens"] = windows(model, c).tokens
    return out


def _identity(recipe: Recipe, job: Job, model: Model) -> dict[str, Any]:
    """What decides the layers of a run, by name."""
    import hashlib

    from lconvert import __version__
    from lconvert.plan import sources
    from lconvert.primitives.job import identity

    c = job.calibration
    text = hashlib.sha256(Path(c.text).read_bytes()).hexdigest() if c.text else ""
    return {
        "lconvert": __version__,
        "source": identity([(s.path, s.stamp) for s in sources(model)]),
        "recipe": recipe.to_json()["passes"],
        "text": text,
        "windows": c.windows,
        "context": c.context,
        "seed": c.seed,
        "device": job.device,
        "activations": job.activations,
    }


def check_device(device: str) -> None:
    """OptionError for a device that this machine does not have."""
    if device == "cpu":
        return
    from lconvert.forward import packages

    torch, _ = packages()
    index = int(device.partition(":")[2] or 0)
    if torch.cuda.device_count() <= index:
        found = f"{torch.cuda.device_count()} GPUs" if torch.cuda.is_available() else "no GPU"
        raise OptionError(f"--device {device}: torch sees {found}; choose another, or cpu")
