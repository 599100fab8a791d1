"""Finished layers of a run in a folder, so that memory stays bounded and a run that was killed goes on where it stopped.

    WORK/KEY/run.json                 {"schema": "lconvert-run/1", "what", "done"}: done once the last layer is there
    WORK/KEY/layer-00012.safetensors  the new entries of layer 12, in the IR's own nodes (formats/ir.py) under the metadata key `entries`,
                                      with the lines that it adds to the report and a SHA-256 of its data

A file appears under its name when it is complete (written beside it, synced, renamed). KEY is a digest of everything that decides the
result, so a folder is never taken for another run's.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
import weakref
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from lconvert.errors import InputError, LconvertError, OptionError, OutputError
from lconvert.formats import ir as nodes
from lconvert.formats import safetensors
from lconvert.formats.scheme import Stored
from lconvert.ir import Entry, Tensor

_SCHEMA = "lconvert-run/1"
_SLAB = 64 << 20  # bytes that are read at once


@dataclass(frozen=True)
class Done:
    """One finished layer: its new entries, read lazily, and its lines for the report."""

    entries: Mapping[str, Entry]
    report: tuple[str, ...]


class Folder:
    """Where the layers of one run are kept. A temporary one lives as long as an entry that was read from it."""

    def __init__(self, work: Path | None, key: str, what: str, *, resume: bool) -> None:
        try:
            if work is None:
                self.path = Path(tempfile.mkdtemp(prefix="lconvert-layers-"))
                weakref.finalize(self, shutil.rmtree, self.path, ignore_errors=True)
            else:
                self.path = work / key
                self._enter(work, key, what, resume)
            self._what = what
            self._state(done=False)
        except OSError as e:
            raise OutputError(
                f"{work}: finished layers cannot be kept here ({e.strerror or e}); choose another work folder"
            ) from None

    def _enter(self, work: Path, key: str, what: str, resume: bool) -> None:
        if not resume:
            shutil.rmtree(self.path, ignore_errors=True)
        elif not self.path.is_dir():
            for other in sorted(work.iterdir()) if work.is_dir() else []:
                if (state := _state(other)) and not state["done"]:
                    raise OptionError(
                        f"{work}: holds an unfinished run of {state['what']} with other options or memory, or of another model or text "
                        f"(run {other.name}, this one is {key}); resume with the options that it was started with, name another work "
                        "folder, or start without resuming"
                    )
        self.path.mkdir(parents=True, exist_ok=True)

    def _state(self, *, done: bool) -> None:
        part = self.path / "run.json.part"
        part.write_text(json.dumps({"schema": _SCHEMA, "what": self._what, "done": done}) + "\n")
        os.replace(part, self.path / "run.json")

    def finish(self) -> None:
        """All layers are there."""
        self._state(done=True)

    def file(self, layer: int) -> Path:
        return self.path / f"layer-{layer:05d}.safetensors"

    def spill(self, name: str) -> Path:
        """A file for what only this run needs; `clear` removes it."""
        return self.path / f"{name}.spill"

    def clear(self) -> None:
        for path in self.path.glob("*.spill"):
            path.unlink(missing_ok=True)

    def save(self, layer: int, entries: Mapping[str, Entry], report: tuple[str, ...]) -> Done:
        """Store a layer and return it as it was stored. Equal entries make equal bytes."""
        listed, stored = nodes.describe_entries(entries)
        digest = hashlib.sha256()
        for name in sorted(stored):
            for slab in _slabs(stored[name]):
                digest.update(slab)
        meta = {
            "schema": _SCHEMA,
            "entries": json.dumps(listed, sort_keys=True),
            "report": json.dumps(list(report)),
            "sha256": digest.hexdigest(),
        }
        head, starts = safetensors.header_bytes(list(nodes.names(stored)), meta)
        path = self.file(layer)
        part = path.with_suffix(".part")
        try:
            with open(part, "wb") as f:
                f.write(head)
                for name, start in zip(stored, starts, strict=True):
                    f.seek(start)
                    for slab in _slabs(stored[name]):
                        f.write(slab)
                f.flush()
                os.fsync(f.fileno())
            os.replace(part, path)
        except OSError as e:
            raise OutputError(
                f"{path}: a finished layer cannot be written ({e.strerror or e}); free some space, then resume"
            ) from None
        return self.load(layer)

    def load(self, layer: int) -> Done:
        """A stored layer. InputError for a file that is damaged."""
        file = safetensors.read_header(self.file(layer))
        if file.metadata.get("schema") != _SCHEMA:
            raise InputError(f"{file.path}: no finished layer of this version of lconvert")
        try:
            listed, report = (json.loads(file.metadata[k]) for k in ("entries", "report"))
        except (KeyError, ValueError):
            raise InputError(f"{file.path}: the finished layer is damaged") from None
        entries = nodes.restore_entries(listed, file, lambda t: replace(t, read=_Read(t, self)))
        return Done(entries, tuple(map(str, report)))

    def found(self, layer: int) -> tuple[Done | None, str]:
        """A layer of an earlier run, its data checked; None and why it is of no use where it is damaged, None and "" where there is none."""
        path = self.file(layer)
        if not path.is_file():
            return None, ""
        try:
            file = safetensors.read_header(path)
            digest = hashlib.sha256()
            for name in sorted(file.tensors):
                t = safetensors.tensor(file, name)
                for slab in _slabs(t):
                    digest.update(slab)
            if digest.hexdigest() != file.metadata.get("sha256"):
                raise InputError(f"{path}: its data are not what was written")
            return self.load(layer), ""
        except LconvertError as e:
            path.unlink(missing_ok=True)
            return None, str(e)


@dataclass(frozen=True)
class _Read:
    """Reads a stored tensor, and keeps the folder alive meanwhile."""

    tensor: Tensor
    folder: Folder = field(repr=False)

    def __call__(self, start: int, stop: int) -> Any:
        return self.tensor.read(start, stop)


def _state(folder: Path) -> dict[str, Any] | None:
    try:
        found = json.loads((folder / "run.json").read_text())
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) and found.get("schema") == _SCHEMA else None


def _slabs(stored: Tensor | Stored) -> Iterator[bytes]:
    """The bytes of an array, some rows at a time."""
    import numpy as np

    shape = stored.shape or (1,)
    probe = stored.read(0, 1)
    rows = max(1, _SLAB // max(1, probe.nbytes))
    for a in range(0, shape[0], rows):
        yield np.ascontiguousarray(stored.read(a, min(a + rows, shape[0]))).tobytes()
