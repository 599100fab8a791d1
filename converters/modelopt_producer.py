"""nvidia-modelopt as a producer: it compresses a checkpoint in its own environment, and what it exports is read like any other.

`modelopt_worker.py` runs there. ModelOpt's configurations are its own (`modelopt.torch.quantization.config.choices`): INT4_AWQ_CFG,
NVFP4_DEFAULT_CFG, FP8_DEFAULT_CFG, INT8_SMOOTHQUANT_CFG ...; those that its export to Hugging Face folders knows work.
"""

from __future__ import annotations

import atexit
import difflib
import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from lconvert.converters import hf, modelopt_worker
from lconvert.errors import MissingPackageError, OptionError, RuntimeFailure, UnsupportedError
from lconvert.interpreters import interpreter
from lconvert.ir import Model, QTensor
from lconvert.primitives.job import Job, identity
from lconvert.primitives.text import windows

#: Its name in job.interpreters, in --python and in lconvert.toml.
NAME = "modelopt"
_LINES = 12  # of what it printed, in an error message
#: What its export leaves out of a folder.
_BESIDE = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "generation_config.json",
)


def produce(
    source: str | Path,
    config: str,
    job: Job = Job(),  # noqa: B008 - immutable
    python: str | Path | None = None,
) -> Model:
    """The checkpoint `source` (a Hugging Face folder or hub name, not quantized) compressed by ModelOpt's `config`.

    job: its calibration text, device, threads and progress are used, `interpreters["modelopt"]` says which Python has ModelOpt, and
    the export stays in `work`, where a later run with `resume` finds it; without `work` it is removed when this process ends.
    python: another interpreter than the job's. Raises OptionError for a configuration that ModelOpt does not have and for a missing
    text or interpreter, MissingPackageError where ModelOpt is not installed, RuntimeFailure with its last lines where it fails.
    """
    found = python or job.interpreters.get(NAME)
    if found is None:
        raise OptionError(
            "modelopt: nvidia-modelopt runs in an environment of its own; name its interpreter (--python modelopt=PATH, or "
            "[producers.modelopt] in lconvert.toml). `lconvert doctor --install modelopt` makes one"
        )
    command = [interpreter(found), "-I", modelopt_worker.__file__]
    folder = _folder(source)
    original = hf.read(folder)
    text = job.calibration.text
    ids = [list(w) for w in windows(original, job.calibration).ids] if text else None
    weights = [
        (f.name, f.stat().st_size, f.stat().st_mtime_ns) for f in sorted(folder.iterdir()) if f.is_file()
    ]
    work = job.work or _temporary()
    place = (
        work
        / f"{NAME}-{identity(config, str(folder.resolve()), weights, ids, job.calibration.seed, job.device)}"
    )
    about = place / "about.json"
    if not (job.resume and about.is_file()):
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir(parents=True)
        request = {
            "source": str(folder.resolve()),
            "config": config,
            "ids": ids,
            "seed": job.calibration.seed,
        }
        request |= {"device": job.device, "out": str((place / "checkpoint").resolve())}
        (place / "request.json").write_text(json.dumps(request), encoding="utf-8")
        answer = _run([*command, str(place / "request.json")], job)
        _judge(command[0], config, answer)
        for name in _BESIDE:
            if (folder / name).is_file() and not (place / "checkpoint" / name).exists():
                shutil.copyfile(folder / name, place / "checkpoint" / name)
        about.write_text(json.dumps(answer), encoding="utf-8")
    version = json.loads(about.read_text(encoding="utf-8"))["version"]
    return _marked(hf.read(place / "checkpoint"), original.name, config, version, job, ids)


def probe(python: str | Path) -> str:
    """ModelOpt's version in an interpreter; raises what `produce` would."""
    command = [interpreter(python), "-I", modelopt_worker.__file__]
    answer = _run(command, Job())
    _judge(command[0], "", answer)
    return str(answer["version"])


def _folder(source: str | Path) -> Path:
    """The source's folder; UnsupportedError for what ModelOpt does not read."""
    path = Path(source).expanduser()
    if path.is_file() or (path / "lcir.json").exists():
        raise UnsupportedError(
            f"{source}: ModelOpt reads Hugging Face folders only; convert it to one first (lconvert gguf-to-hf)"
        )
    folder = hf.resolve(str(source))
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return folder  # its reader says what is wrong with it
    if isinstance(config, dict) and config.get("quantization_config"):
        raise UnsupportedError(
            f"{source}: is quantized already; ModelOpt starts from a checkpoint that is not"
        )
    return folder


def _temporary() -> Path:
    """A folder for as long as this process runs: models read their weights when they are used."""
    made = tempfile.mkdtemp(prefix="lconvert-modelopt-")
    atexit.register(shutil.rmtree, made, ignore_errors=True)
    return Path(made)


def _run(command: list[str], job: Job) -> dict[str, Any]:
    """The worker's last answer; RuntimeFailure with its last lines where it ended without one."""
    threads = {"OMP_NUM_THREADS": str(job.threads)} if job.threads else {}
    answer: dict[str, Any] = {}
    with tempfile.TemporaryFile(prefix="lconvert-") as log:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=log,
            env={**os.environ, "TOKENIZERS_PARALLELISM": "false", **threads},
            start_new_session=True,  # Ctrl-C is for this process, which ends the other
        )
        assert process.stdout is not None
        try:
            for line in process.stdout:
                answer = json.loads(line)
                if "done" in answer:
                    job.tell("ModelOpt", answer["done"], answer["total"])
            status = process.wait()
        finally:
            process.kill()
            process.wait()
            process.stdout.close()
        if status or not answer or "done" in answer:
            log.seek(0)
            said = [x.rstrip() for x in log.read().decode("utf-8", "replace").splitlines() if x.strip()]
            tail = "\n  ".join(["; its last lines:", *said[-_LINES:]]) if said else "; it printed nothing"
            how = f"was killed by signal {-status}" if status < 0 else f"ended with exit code {status}"
            raise RuntimeFailure(f"{command[0]}: ModelOpt {how}{tail}")
    return answer


def _judge(python: str, config: str, answer: Mapping[str, Any]) -> None:
    """Raises for an answer that is a refusal."""
    if "missing" in answer:
        raise MissingPackageError(
            f"{python}: nvidia-modelopt cannot be imported there ({answer['missing']}); "
            "`lconvert doctor --install modelopt` makes an environment that has it"
        )
    if "configs" in answer:
        known = answer["configs"]
        near = difflib.get_close_matches(config.upper(), known, 1)
        hint = f"did you mean {near[0]}? " if near else ""
        raise OptionError(
            f"modelopt: ModelOpt has no configuration {config!r}; {hint}it has {', '.join(known)}"
        )
    if "uncalibrated" in answer:
        raise OptionError(f"modelopt: {config} needs a calibration text; name one (--calibrate TEXT)")


def _marked(
    model: Model, name: str, config: str, version: str, job: Job, ids: list[list[int]] | None
) -> Model:
    """The model that was read, with where it comes from."""
    note = f"ModelOpt {version}, {config}"
    new = {
        role: replace(e, provenance=(*e.provenance, note))
        for role, e in model.entries.items()
        if isinstance(e.data, QTensor)
    }
    seen = f", {sum(map(len, ids))} tokens of {Path(job.calibration.text).name}" if ids else ""
    line = f"modelopt: {len(new)} weights by nvidia-modelopt {version}, {config}{seen}"
    return replace(model.with_entries(new, line), name=name)
