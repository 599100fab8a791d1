"""The folder in which a run keeps its finished layers: known by its record, of one run at a time, taken over by one that is the same.

A run is the same if what decides its result is: recipe, text, amount of text, seed, device, source and version.
"""

from __future__ import annotations

import contextlib
import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lconvert.errors import OptionError, OutputError

RECORD = "lconvert.work.json"
_SCHEMA = "lconvert.work/1"


def begin(folder: Path, run: Mapping[str, Any], *, resume: bool) -> None:
    """Make `folder` ready for `run`, plain data by what it is called in messages.

    resume: keep what the same run has left there, OptionError where it was another one; else it is removed. OutputError for a
    folder that holds other things.
    """
    found = _record(folder)
    if found is None and (folder.is_file() or (folder.is_dir() and any(folder.iterdir()))):
        raise OutputError(f"{folder}: is not a folder of finished layers; choose another one with --work")
    if found is not None and resume:
        for name, value in run.items():
            if found.get(name) != value:
                said = (
                    f"{name} {found.get(name)!r}, now it is {value!r}" if _short(value) else f"another {name}"
                )
                raise OptionError(f"{folder}: was begun with {said}; run without --resume to begin anew")
        return
    try:
        if found is not None:
            shutil.rmtree(folder)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / RECORD).write_text(json.dumps({"schema": _SCHEMA, **run}))
    except OSError as e:
        raise OutputError(f"{folder}: cannot be written ({e.strerror or e})") from None


def _short(value: Any) -> bool:
    """Whether a person makes something of it: no digest."""
    text = str(value)
    return isinstance(value, int | str) and len(text) < 40 and not re.fullmatch("[0-9a-f]{16,}", text)


def _record(folder: Path) -> dict[str, Any] | None:
    try:
        found = json.loads((folder / RECORD).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) and found.get("schema") == _SCHEMA else None


def holds_layers(folder: Path) -> bool:
    """Whether a run has left something that another can take over: a file `layer-*` of one of its passes."""
    return any(True for _ in folder.rglob("layer-*"))


def end(folder: Path) -> None:
    """Remove the folder of a run, which `begin` has made."""
    if _record(folder) is not None:
        with contextlib.suppress(OSError):  # the artifact is there; what is left is known by its record
            shutil.rmtree(folder)
