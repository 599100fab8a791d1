"""Reference logits on disk, exactly as they were computed (fp32, full vocabulary): repeated validations skip the forward.

One folder per key (model content, text, windows, runtime versions and settings), one safetensors file per window with its
own sha256. What is damaged is computed again and said so; nothing is written beyond the size limit.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lconvert.errors import MissingPackageError

#: Bytes that one reference may take on disk.
LIMIT = 4 << 30


def default_folder() -> Path:
    """$LCONVERT_CACHE, else lconvert below the user's cache folder."""
    given = os.environ.get("LCONVERT_CACHE")
    if given:
        return Path(given)
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "lconvert"


def file_hash(path: Path) -> str:
    """sha256 of a file."""
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def model_hash(path: str | Path, sha256: Callable[[Path], str] = file_hash) -> str:
    """sha256 of a file; of a folder, over the names and hashes of its weights and JSON files."""
    root = Path(path)
    if root.is_file():
        return sha256(root)
    total = hashlib.sha256()
    for file in sorted(p for p in root.iterdir() if p.suffix in _MODEL_FILES):
        total.update(f"{file.name}\0{sha256(file)}\0".encode(errors="surrogateescape"))
    return total.hexdigest()


_MODEL_FILES = (".safetensors", ".json", ".model", ".txt", ".jinja")


class CachedLogits:
    """The logits of `compute`, from disk where they are. Windows are told apart by their ids.

    key: everything that determines the logits beside the ids; it is hashed, and kept readable beside the files.
    open: makes the function that computes them, called at the first miss only. `notes` says what went wrong.
    """

    def __init__(
        self,
        folder: Path | None,
        key: Mapping[str, Any],
        open: Callable[[], Callable[[list[int]], NDArray[np.float32]]],
        limit: int = LIMIT,
    ) -> None:
        name = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:32]
        self._folder = None if folder is None else folder / "logits" / name
        self._key, self._open, self._limit = dict(key), open, limit
        self._compute: Callable[[list[int]], NDArray[np.float32]] | None = None
        self.notes: list[str] = []
        self.hits = 0

    def __call__(self, ids: list[int]) -> NDArray[np.float32]:
        path = self._path(ids)
        found = None if path is None else self._load(path)
        if found is not None:
            self.hits += 1
            return found
        if self._compute is None:
            self._compute = self._open()
        out = self._compute(ids)
        if path is not None:
            self._store(path, out)
        return out

    def continuation(self, ids: list[int], n: int, generate: Callable[[], Sequence[int]]) -> tuple[int, ...]:
        """The `n` greedy tokens after `ids`, by `generate` where they are not stored."""
        path = self._path([*ids, n])
        path = None if path is None else path.with_suffix(".json")
        if path is not None and path.is_file():
            try:
                found = json.loads(path.read_text())
                if len(found) == n and all(type(i) is int for i in found):
                    return tuple(found)
            except (OSError, ValueError, TypeError):
                pass
            self.notes.append(f"the cached continuation {path} was damaged and computed again")
        out = tuple(generate())
        if path is not None:
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(json.dumps(out))
            except OSError as e:
                self.notes.append(f"a greedy continuation was not cached: {e.strerror or e}")
        return out

    def _path(self, ids: list[int]) -> Path | None:
        if self._folder is None:
            return None
        return self._folder / f"{hashlib.sha256(np.array(ids, '<i8').tobytes()).hexdigest()[:32]}.safetensors"

    def _load(self, path: Path) -> NDArray[np.float32] | None:
        if not path.is_file():
            return None
        try:
            from safetensors import safe_open

            with safe_open(path, "numpy") as f:
                wanted = (f.metadata() or {}).get("sha256")
                logits: NDArray[np.float32] = f.get_tensor("logits")
            if wanted == _digest(logits):
                return logits
            reason = "its checksum is wrong"
        except ImportError:
            raise _missing() from None
        except Exception as e:  # noqa: BLE001 - safetensors has its own error class for each kind of damage
            reason = f"{type(e).__name__}: {e}"
        self.notes.append(f"cached reference logits {path} were damaged ({reason}) and computed again")
        path.unlink(missing_ok=True)
        return None

    def _store(self, path: Path, logits: NDArray[np.float32]) -> None:
        """Atomically; a full disk or a folder without permission costs the cache, not the validation."""
        try:
            from safetensors import SafetensorError
            from safetensors.numpy import save_file
        except ImportError:
            raise _missing() from None
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            used = sum(p.stat().st_size for p in path.parent.glob("*.safetensors"))
            if used + logits.nbytes > self._limit:
                self._folder = None
                self.notes.append(f"reference logits beyond {self._limit / 1e9:.1f} GB were not cached")
                return
            (path.parent / "key.json").write_text(json.dumps(self._key, indent=1, sort_keys=True) + "\n")
            handle, temporary = tempfile.mkstemp(dir=path.parent, suffix=".part")
            os.close(handle)
            try:
                save_file({"logits": logits}, temporary, {"sha256": _digest(logits)})
                os.replace(temporary, path)
            finally:
                Path(temporary).unlink(missing_ok=True)
        except (OSError, SafetensorError) as e:  # the package has a class of its own for a full disk
            self._folder = None
            self.notes.append(f"reference logits were not cached: {getattr(e, 'strerror', None) or e}")


def _digest(x: NDArray[np.float32]) -> str:
    total = hashlib.sha256(f"{x.dtype}{x.shape}".encode())
    total.update(np.ascontiguousarray(x).view(np.uint8).data)
    return total.hexdigest()


def _missing() -> MissingPackageError:
    return MissingPackageError("safetensors is not installed: pip install 'lconvert[hf]'")
