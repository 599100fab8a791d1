"""`lconvert.toml`: which interpreter has which runtime, and which has a producer (a tool that compresses for us).

    [runtimes.vllm]
    python = ".venv-vllm/bin/python"   # relative to this file
    timeout = 600                      # seconds that one call may take
    options = { kv_cache_gib = 4 }     # what this runtime alone understands
    wheel = "vllm-cuda"                # vllm only: an unpacked wheel of another build, whose config classes are asked too

    [producers.modelopt]
    python = ".venv-modelopt/bin/python"

Read from the file that LCONVERT_CONFIG names, else from the current folder. Unknown keys are errors: a
misspelt one would be ignored for ever.
"""

from __future__ import annotations

import os
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lconvert.errors import OptionError
from lconvert.validators.runtimes import RUNTIMES

FILE = "lconvert.toml"
#: Tools that compress in an interpreter of their own.
PRODUCERS = ("modelopt",)
VARIABLE = "LCONVERT_CONFIG"

#: runtime -> option -> the types of its value
OPTIONS: Mapping[str, Mapping[str, tuple[type, ...]]] = {
    "llama.cpp": {"repack": (bool,)},
    "transformers": {"dtype": (str,)},
    "dequantized": {},
    "onnxruntime": {"accuracy_level": (int,), "batch_tokens": (int,)},
    "tensorrt": {"batch_tokens": (int,)},
    "vllm": {"dtype": (str,), "kv_cache_gib": (int, float), "batch_tokens": (int,)},
}


@dataclass(frozen=True)
class RuntimeSettings:
    """Where a runtime lives. python: None for this interpreter. The first three are arguments of `open_runtime`;
    wheel: a folder with another build's packages (`validators.vllm_config`).
    """

    python: Path | None = None
    timeout: float = 600.0
    options: Mapping[str, Any] = field(default_factory=dict)
    wheel: Path | None = None


def settings(name: str) -> RuntimeSettings:
    """The settings of a runtime; the defaults where there is no file or it does not name the runtime."""
    return load().get(name, RuntimeSettings())


def load(path: Path | None = None) -> dict[str, RuntimeSettings]:
    """Every runtime that the file names. path: another file than the one that `LCONVERT_CONFIG` or the folder
    gives.

    Raises OptionError for a file that cannot be read, is no TOML, or holds an unknown key or a wrong value.
    """
    found, data = _read(path)
    runtimes = _table(found, "runtimes", data.get("runtimes", {}))
    _known(found, "runtimes.", runtimes, tuple(RUNTIMES))
    return {name: _settings(found, name, value) for name, value in runtimes.items()}


def producers(path: Path | None = None) -> dict[str, Path]:
    """The interpreter of every producer that the file names one for; `path` and errors as of `load`."""
    found, data = _read(path)
    table = _table(found, "producers", data.get("producers", {}))
    _known(found, "producers.", table, PRODUCERS)
    out = {}
    for name, value in table.items():
        _known(found, f"producers.{name}.", _table(found, f"producers.{name}", value), ("python",))
        if (python := _interpreter(found, f"producers.{name}", value)) is not None:
            out[name] = python
    return out


def _read(path: Path | None) -> tuple[Path, dict[str, Any]]:
    """The file and what it says; nothing where nobody named it and it is not there."""
    wanted = path or (Path(os.environ[VARIABLE]) if os.environ.get(VARIABLE) else None)
    found = wanted or Path(FILE)
    if wanted is None and not found.is_file():
        return found, {}
    try:
        data = tomllib.loads(found.read_text(encoding="utf-8"))
    except OSError as e:
        source = "" if path else f" ({VARIABLE} names it)"
        raise OptionError(f"{found}: cannot be read{source}: {e.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as e:
        raise OptionError(f"{found}: is not TOML: {e}") from None
    _known(found, "", data, ("runtimes", "producers"))
    return found, data


def _interpreter(file: Path, key: str, table: Mapping[str, Any]) -> Path | None:
    python = table.get("python")
    if python is not None and (not isinstance(python, str) or not python):
        raise OptionError(f"{file}: {key}.python is {python!r}; expected the path of an interpreter")
    return _python(file, python) if python else None


def _settings(file: Path, name: str, value: Any) -> RuntimeSettings:
    key = f"runtimes.{name}"
    table = _table(file, key, value)
    _known(file, f"{key}.", table, ("python", "timeout", "options", *(["wheel"] if name == "vllm" else [])))
    where, timeout, wheel = _interpreter(file, key, table), table.get("timeout", 600), table.get("wheel")
    if not isinstance(timeout, int | float) or isinstance(timeout, bool) or not 0 < timeout < float("inf"):
        raise OptionError(f"{file}: {key}.timeout is {timeout!r}; expected a number of seconds above 0")
    options = _table(file, f"{key}.options", table.get("options", {}))
    _known(file, f"{key}.options.", options, tuple(OPTIONS[name]))
    for option, given in options.items():
        types = OPTIONS[name][option]
        if not isinstance(given, types) or (isinstance(given, bool) and bool not in types):
            expected = " or ".join(t.__name__ for t in types)
            raise OptionError(f"{file}: {key}.options.{option} is {given!r}; expected {expected}")
    if wheel is not None and not (isinstance(wheel, str) and _beside(file, wheel).is_dir()):
        raise OptionError(f"{file}: {key}.wheel is {wheel!r}; expected the folder of an unpacked wheel")
    return RuntimeSettings(where, float(timeout), options, _beside(file, wheel) if wheel else None)


def _python(file: Path, python: str) -> Path:
    """A path is relative to the file; a bare name, such as python3.12, is looked up on PATH when it is
    used.
    """
    if not os.path.dirname(python):
        return Path(python)
    return _beside(file, python)


def _beside(file: Path, path: str) -> Path:
    return Path(os.path.abspath(file.parent / Path(path).expanduser()))


def _table(file: Path, key: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise OptionError(f"{file}: {key} is {value!r}; expected a table")
    return value


def _known(file: Path, prefix: str, table: Mapping[str, Any], keys: tuple[str, ...]) -> None:
    for key in table:
        if key not in keys:
            shown = ", ".join(keys) or "none"
            hint = f'; write [runtimes."{keys[0]}"]' if key == "llama" else ""
            raise OptionError(f"{file}: unknown key {prefix}{key}; known: {shown}{hint}")
