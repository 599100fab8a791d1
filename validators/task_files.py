"""lm-eval tasks by YAML file, folder or name, loaded without running anybody's code and without waiting for a network.

A task file is data here: `!function` (which imports Python beside the file), metrics of the `evaluate` package (which
are downloaded programs) and data files that are pickles are refused unless code is allowed, and templates run in
Jinja's sandbox. Tasks by name are part of the installed lm_eval package and may use its code.
"""

from __future__ import annotations

import difflib
import os
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from lconvert.errors import InputError, MissingPackageError, OptionError

_ENDPOINT = "https://huggingface.co"
_PATIENCE = 5.0  # seconds until the hub counts as out of reach
_BUILDERS = ("json", "csv", "parquet", "text", "arrow")  # data set builders that need nothing but files
_PICKLES = ("pandas", "webdataset")  # builders that unpickle what they read


def package() -> Any:
    """lm_eval, which is an optional package."""
    try:
        import lm_eval
    except ImportError:
        raise MissingPackageError("lm_eval is not installed: pip install 'lconvert[eval]'") from None
    return lm_eval


def load(specs: Sequence[str | Path], *, allow_code: bool = False) -> dict[str, Any]:
    """Task name -> lm_eval Task. A spec is a YAML file, a folder of them, or the name of an lm-eval task or group.

    InputError for a file that is damaged or needs code, and for data that cannot be had; OptionError for an unknown
    name.
    """
    package()
    from lm_eval.tasks import TaskManager

    wanted: list[str | dict[str, Any]] = []
    for spec in specs:
        wanted += [str(spec)] if _is_name(spec) else [_config(f, allow_code) for f in _files(Path(spec))]
    indexed = any(isinstance(w, str) or "group" in w for w in wanted)
    manager = TaskManager(include_defaults=indexed)
    for name in (w for w in wanted if isinstance(w, str)):
        if name not in manager.task_index:
            close = difflib.get_close_matches(name, manager.task_index, 1)
            hint = f"did you mean {close[0]}?" if close else "`lm_eval ls tasks` lists them"
            raise OptionError(f"{name}: neither a task file nor an lm-eval task; {hint}")
    local = all(isinstance(w, dict) and _is_local(w) for w in wanted)
    with _offline(local):
        return {name: task for w in wanted for name, task in _build(manager, w, allow_code).items()}


def _build(manager: Any, wanted: str | dict[str, Any], allow_code: bool) -> Mapping[str, Any]:
    name = wanted if isinstance(wanted, str) else wanted.get("task", wanted.get("group"))
    try:
        tasks: Mapping[str, Any] = manager.load([wanted])["tasks"]
    except ConnectionError as e:
        raise InputError(
            f"task {name}: its data is neither in the local cache nor within reach ({e}); go online once, or "
            "use a task file whose data lies beside it"
        ) from None
    except Exception as e:  # noqa: BLE001 - a task is a program of many parts; all of them fail in their own way
        raise InputError(
            f"task {name}: lm_eval cannot load it ({type(e).__name__}: {' '.join(str(e).split())[:300]})"
        ) from None
    for key, task in tasks.items():
        if getattr(task, "UNSAFE_CODE", False) and not allow_code:
            raise InputError(f"task {key}: runs code that the model writes; --allow-task-code permits it")
    return tasks


def _is_name(spec: str | Path) -> bool:
    """A name has no folder and no ending, and no such folder is here."""
    text = str(spec)
    return not (text.endswith((".yaml", ".yml")) or os.sep in text or Path(text).is_dir())


def _files(path: Path) -> list[Path]:
    if not path.is_dir():
        return [path]
    found = sorted(p for p in path.iterdir() if p.suffix in (".yaml", ".yml"))
    tasks = [p for p in found if {"task", "group"} & _parse(p, False, lenient=True).keys()]
    if not tasks:
        raise InputError(f"{path}: holds no task file (a .yaml with the key task)")
    return tasks


def _config(path: Path, allow_code: bool) -> dict[str, Any]:
    """The task as data, its includes merged, its data files found beside it."""
    config = _parse(path, allow_code)
    if not {"task", "group"} & config.keys():
        raise InputError(f"{path}: no task file: it has neither the key task nor group")
    if not allow_code:
        _refuse_code(path, config)
    kwargs = config.get("dataset_kwargs")
    if isinstance(kwargs, dict):
        kwargs.pop("trust_remote_code", None)
        if "data_files" in kwargs:
            kwargs["data_files"] = _beside(path, kwargs["data_files"])
    return config


def _parse(
    path: Path, allow_code: bool, *, lenient: bool = False, seen: tuple[Path, ...] = ()
) -> dict[str, Any]:
    """A YAML mapping with its `include`s below it. lenient: `!function` is read as nothing instead of refused."""

    class Loader(yaml.SafeLoader):
        pass

    def function(loader: yaml.SafeLoader, node: yaml.Node) -> Any:
        if lenient:
            return None
        if not allow_code:
            raise InputError(
                f"{path}:{node.start_mark.line + 1}: !function runs a Python file beside the task; "
                "--allow-task-code permits it, for files that you trust"
            )
        from lm_eval.utils import import_function

        return import_function(loader, node, path)

    Loader.add_constructor("!function", function)
    if path in seen:
        raise InputError(f"{path}: includes itself")
    try:
        with open(path, encoding="utf-8") as f:
            found = yaml.load(f, Loader)
    except (OSError, UnicodeDecodeError) as e:
        raise InputError(f"{path}: cannot be read ({getattr(e, 'strerror', None) or e})") from None
    except yaml.YAMLError as e:
        raise InputError(f"{path}: no sound YAML ({' '.join(str(e).split())})") from None
    if not isinstance(found, dict):
        raise InputError(f"{path}: no task file: a mapping is expected")
    includes = found.pop("include", [])
    below: dict[str, Any] = {}
    for name in includes if isinstance(includes, list) else [includes]:
        below |= _parse(path.parent / str(name), allow_code, lenient=lenient, seen=(*seen, path))
    return below | found


def _refuse_code(path: Path, config: Mapping[str, Any]) -> None:
    from lm_eval.api.registry import get_metric_aggregation

    for metric in config.get("metric_list") or ():
        entry = metric if isinstance(metric, dict) else {"metric": metric}
        name = entry.get("metric")
        if not isinstance(name, str) or entry.get("hf_evaluate") or get_metric_aggregation(name) is None:
            raise InputError(
                f"{path}: the metric {name} is none of lm_eval's own and would be downloaded and run; "
                "--allow-task-code permits it"
            )
    if config.get("dataset_path") in _PICKLES:
        raise InputError(f"{path}: {config['dataset_path']} data may hold code; --allow-task-code permits it")


def _beside(path: Path, files: Any) -> Any:
    """The same files, with names that are relative to the task file made absolute."""
    if isinstance(files, dict):
        return {k: _beside(path, v) for k, v in files.items()}
    if isinstance(files, list):
        return [_beside(path, f) for f in files]
    if "://" in str(files) or Path(files).is_absolute():
        return files
    found = (path.parent / files).resolve()
    if "*" not in str(files) and not found.is_file():
        raise InputError(f"{path}: names the data file {files}, which is not beside it")
    return str(found)


def _is_local(config: Mapping[str, Any]) -> bool:
    files = str((config.get("dataset_kwargs") or {}).get("data_files", ""))
    return config.get("dataset_path") in _BUILDERS and bool(files) and "://" not in files


@contextmanager
def _offline(local: bool) -> Iterator[None]:
    """Where the hub is not needed or does not answer, its clients are told so: they retry for minutes otherwise."""
    import datasets
    import huggingface_hub.constants

    if not local and _reachable():
        yield
        return
    with (
        replaced(datasets.config, "HF_HUB_OFFLINE", True),
        replaced(huggingface_hub.constants, "HF_HUB_OFFLINE", True),
    ):
        yield


def _reachable() -> bool:
    request = urllib.request.Request(os.environ.get("HF_ENDPOINT") or _ENDPOINT, method="HEAD")
    try:
        urllib.request.urlopen(request, timeout=_PATIENCE).close()
    except urllib.error.HTTPError:
        return True  # it answers
    except (OSError, ValueError):
        return False
    return True


@contextmanager
def sandboxed() -> Iterator[None]:
    """lm_eval's templates in Jinja's sandbox: they come out of task files and data sets."""
    import lm_eval.utils
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    plain = lm_eval.utils.env
    boxed = ImmutableSandboxedEnvironment(undefined=plain.undefined, keep_trailing_newline=True)
    boxed.filters |= {k: f for k, f in plain.filters.items() if k not in boxed.filters}
    with replaced(lm_eval.utils, "env", boxed):
        yield


@contextmanager
def replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """An attribute of another package's module set for a while: what it offers no option for."""
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)
