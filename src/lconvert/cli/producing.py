"""`--method modelopt:CONFIG`: the source of a verb is what a producer makes of the one that was named, carried as any checkpoint is."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lconvert.cli import calibrating
from lconvert.cli.calibrating import How
from lconvert.cli.common import fail_fast_output, interpreters, steps_bar
from lconvert.errors import OptionError

if TYPE_CHECKING:
    from lconvert.ir import Model
    from lconvert.plan import Plan


@dataclass(frozen=True)
class Source:
    """model: what is carried. path: where it can be read again. said: of its making, for the manifest; nothing for a source as it was named."""

    model: Model
    path: str
    said: Mapping[str, Any] = field(default_factory=dict)

    def recorded(self, plan: Plan) -> Plan:
        """The plan whose options, and so the manifest, say what made the source."""
        return replace(plan, options={**plan.options, **self.said}) if self.said else plan


def alone(how: How, flag: str | None) -> None:
    """OptionError where a flag or a recipe says how to quantize and a producer does so too. flag: what messages call it."""
    if how.produced is not None and flag is not None:
        raise OptionError(
            f"--method {how.produced} and {flag} both say how the model is quantized; leave one of them out"
        )


@contextmanager
def source(
    how: How, named: str, output: Path, *, dry_run: bool, force: bool, resume: bool, threads: int | None
) -> Iterator[Source]:
    """The source of a run: the one that was named, or what a producer makes of it.

    Its checkpoint lies in OUTPUT.work while the run lasts, and stays there for --resume where the run ends badly after it was made; a
    folder that --work names is kept.
    """
    import lconvert

    if how.produced is None:
        yield Source(lconvert.read(named), named)
        return
    from lconvert import __version__
    from lconvert.converters import modelopt_producer as producer
    from lconvert.primitives import workplace
    from lconvert.primitives.job import Job
    from lconvert.recipe import Recipe

    if dry_run:
        raise OptionError(
            f"--dry-run: what {how.produced} makes is known once it has run; write an .lcir folder with lconvert compress, and "
            "plan from that"
        )
    if not output.is_dir():
        fail_fast_output(output, force)
    calibrating.check_device(how.device)
    folder = how.work or output.with_name(output.name + ".work")
    calibration = how.calibrated(Recipe("", ()))
    job = Job(
        calibration,
        how.device,
        memory=how.bytes(),
        resume=resume,
        threads=threads,
        interpreters=_interpreters(how),
    )
    config = how.produced.partition(":")[2]
    workplace.begin(folder, {"lconvert": __version__, "producer": how.produced}, resume=resume)
    try:
        with steps_bar() as tell:
            made = producer.produce(named, config, replace(job, work=folder, progress=tell))
        said: dict[str, Any] = {"producer": _described(how.produced, named, made)}
        if calibration.text:
            said["calibration"] = calibrating.described(replace(job, work=folder), made)
        yield Source(made, made.source, said)
    except BaseException:
        if not any(folder.glob(f"{producer.NAME}-*/about.json")):
            workplace.end(folder)
        raise
    if how.work is None:
        workplace.end(folder)


def _interpreters(how: How) -> dict[str, Path]:
    """The interpreters of producers: the command line's before lconvert.toml's."""
    from lconvert.validators.runtimes.config import PRODUCERS, producers

    given = interpreters(how.pythons)
    for name in given:
        if name not in PRODUCERS:
            raise OptionError(f"--python: expected {PRODUCERS[0]}=PATH, the interpreter of a producer")
    return {**producers(), **given}


def _described(what: str, named: str, made: Model) -> dict[str, Any]:
    """What a producer was given: its configuration, and the source with the sha256 of its files."""
    from lconvert.converters import hf

    folder = hf.resolve(named)
    files = {}
    for path in sorted(p for p in folder.iterdir() if p.suffix in (".safetensors", ".bin", ".json")):
        with contextlib.suppress(OSError), path.open("rb") as f:
            files[path.name] = hashlib.file_digest(f, "sha256").hexdigest()
    line = next(r for r in made.report if r.startswith(what.partition(":")[0]))
    return {"method": what, "source": folder.resolve().name, "files": files, "report": line}
