"""Report and bench files: read, checked against their JSON schema, and written. docs/report.md explains every key.

The schemas use a small part of JSON Schema draft 2020-12 (`_KEYWORDS`), which `problems` evaluates itself, so that reading
a report needs no further package; the tests hold it against the jsonschema package.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from lconvert.errors import InputError
from lconvert.plan import manifest_path

#: name of a schema without its number -> (the number this version reads, its file)
SCHEMAS: Mapping[str, tuple[int, str]] = {
    "lconvert.report": (2, "report-2.schema.json"),
    "lconvert.bench": (1, "bench-1.schema.json"),
}

#: what every report says of itself, so that it does not keep two of them apart
_COMMON = {"reference", "artifact", "settings", "runtimes", "manifest"}
_LARGEST = 256 << 20  # bytes of a file that are worth parsing
_TYPES: Mapping[str, tuple[type, ...]] = {
    "object": (dict,),
    "array": (list,),
    "string": (str,),
    "number": (int, float),
    "integer": (int,),
    "boolean": (bool,),
    "null": (type(None),),
}


@dataclass(frozen=True)
class Documents:
    """The files of one `lconvert report`, in the order given."""

    reports: tuple[dict[str, Any], ...]
    benches: tuple[dict[str, Any], ...]


@cache
def schema(name: str) -> dict[str, Any]:
    """The JSON schema of "lconvert.report" or "lconvert.bench"."""
    path = Path(__file__).with_name("schemas") / SCHEMAS[name][1]
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found


def load(path: Path) -> dict[str, Any]:
    """A report or bench file; InputError says what else it is, or which key is wrong."""
    try:
        if path.stat().st_size > _LARGEST:
            raise InputError(f"{path}: {path.stat().st_size / 1e6:.0f} MB are no report of lconvert")
        data = json.loads(path.read_text(encoding="utf-8"), parse_constant=_constant, parse_int=_integer)
    except OSError as e:
        raise InputError(f"{path}: cannot be read ({e.strerror or e})") from None
    except (ValueError, RecursionError) as e:
        raise InputError(f"{path}: is not JSON ({e})") from None
    check(data, str(path))
    assert isinstance(data, dict)
    return data


def load_all(paths: Sequence[Path]) -> Documents:
    """Report and bench files, told apart by their schema; reports on one artifact that say different things are one."""
    found = [load(p) for p in paths]
    kinds = {name: [d for d in found if d["schema"].startswith(name + "/")] for name in SCHEMAS}
    return Documents(merged(kinds["lconvert.report"]), tuple(kinds["lconvert.bench"]))


def merged(reports: Sequence[dict[str, Any]]) -> tuple[dict[str, Any], ...]:
    """Reports of the same artifact put together where none of their sections collide: `validate` and `eval`.

    Two validations of one artifact stay two. The verdict of the whole is the worst of the parts.
    """
    out: list[dict[str, Any]] = []
    for report in reports:
        fitting = (
            n for n, r in enumerate(out) if r["candidate"] == report["candidate"] and _disjoint(r, report)
        )
        n = next(fitting, None)
        if n is None:
            out.append(report)
        else:
            out[n] = _together(out[n], report)
    return tuple(out)


def _disjoint(a: Mapping[str, Any], b: Mapping[str, Any]) -> bool:
    return not (a["details"].keys() & b["details"].keys()) - _COMMON


def _together(a: Mapping[str, Any], b: Mapping[str, Any]) -> dict[str, Any]:
    first, second = a["details"], b["details"]
    runtimes = [*first.get("runtimes", ()), *second.get("runtimes", ())]
    details = {**second, **first}
    if runtimes:
        details["runtimes"] = [r for n, r in enumerate(runtimes) if r not in runtimes[:n]]
    codes = (a["exit_code"], b["exit_code"])
    joined = {k: [*a[k], *b[k]] for k in ("checks", "not_proven", "notes")}
    return {
        **a,
        **joined,
        "reference": a["reference"] or b["reference"],
        "passed": a["passed"] and b["passed"],
        "exit_code": next(c for c in (1, 2, 3, 0) if c in codes),
        "details": details,
    }


def check(data: Any, where: str) -> None:
    """InputError unless `data` is a report or bench document that this version understands."""
    given = data.get("schema") if isinstance(data, dict) else None
    name, _, number = given.rpartition("/") if isinstance(given, str) else ("", "", "")
    if name not in SCHEMAS or not re.fullmatch(r"\d{1,9}", number):
        what = f"schema {given!r}" if isinstance(given, str) else "no schema"
        raise InputError(
            f"{where}: {what}; expected what lconvert validate or lconvert bench writes as JSON "
            f"({', '.join(f'{n}/{v}' for n, (v, _) in SCHEMAS.items())})"
        )
    version = SCHEMAS[name][0]
    if int(number) > version:
        raise InputError(
            f"{where}: {given} comes from a newer lconvert; this one reads {name}/{version}: upgrade it"
        )
    if int(number) < version:
        verb = name.removeprefix("lconvert.").replace("report", "validate")
        raise InputError(f"{where}: {given} is an old form without the figures; run lconvert {verb} again")
    wrong = next(problems(data, schema(name)), None)
    if wrong:
        raise InputError(f"{where}: is damaged: {wrong}; docs/report.md describes {given}")
    failed = sum(c["passed"] is False for c in data.get("checks", ()))
    if failed and (data["passed"] or data["exit_code"] != 1):
        raise InputError(
            f"{where}: is damaged: {failed} of its checks failed, and its verdict is not a failure"
        )


def manifest(path: Path) -> dict[str, Any]:
    """The manifest that was written beside an artifact; InputError for anything else."""
    root = schema("lconvert.report")
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        sound = data["schema"] == "lconvert.manifest/1" and not any(
            problems(data, root["$defs"]["manifest"], root)
        )
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        sound = False
    if not sound:
        raise InputError(f"{path}: is not a manifest of lconvert; convert again or move it away")
    return dict(data)


def beside(files: Iterable[Path]) -> dict[str, Any] | None:
    """The manifest beside the first of an artifact's files that has one; None where there is none, or none of lconvert's."""
    found = next((path for path in map(manifest_path, files) if path.is_file()), None)
    try:
        return None if found is None else manifest(found)
    except InputError:
        return None


def finite(data: Any) -> Any:
    """A copy of plain data in which every number that is not finite is None, as the schemas want."""
    if isinstance(data, Mapping):
        return {str(k): finite(v) for k, v in data.items()}
    if isinstance(data, list | tuple):
        return [finite(v) for v in data]
    return None if isinstance(data, float) and not math.isfinite(data) else data


def dumps(data: Mapping[str, Any]) -> str:
    """The JSON text of a document: never NaN or Infinity, which are not JSON."""
    return json.dumps(finite(data), indent=1, allow_nan=False) + "\n"


def _constant(name: str) -> Any:
    raise ValueError(f"{name} is not a JSON number")


def _integer(digits: str) -> int:
    if len(digits) > 300:  # beyond what a float holds
        raise ValueError(f"a number of {len(digits)} digits")
    return int(digits)


# --- the part of JSON Schema that our schemas use ------------------------------------------------------------


def problems(
    data: Any, rule: Mapping[str, Any], root: Mapping[str, Any] | None = None, at: str = "$"
) -> Iterator[str]:
    """What is wrong with `data` under the schema `rule`: "$.details.curve[2]: ..." one by one, first things first."""
    root = rule if root is None else root
    if "$ref" in rule:
        target: Any = root
        for part in rule["$ref"].removeprefix("#/").split("/"):
            target = target[part]
        yield from problems(data, target, root, at)
    for word, test in _KEYWORDS.items():
        if word in rule:
            found = list(test(data, rule, root, at))
            yield from found
            if found and word in ("type", "const"):
                return


def _type(data: Any, rule: Mapping[str, Any], root: Mapping[str, Any], at: str) -> Iterator[str]:
    wanted = [rule["type"]] if isinstance(rule["type"], str) else rule["type"]
    fits = any(
        isinstance(data, _TYPES[t]) and (t == "boolean" or not isinstance(data, bool)) for t in wanted
    ) or ("integer" in wanted and isinstance(data, float) and data.is_integer())
    if not fits:
        yield f"{at} is {_short(data)}, expected {' or '.join(wanted)}"


def _const(data: Any, rule: Mapping[str, Any], root: Mapping[str, Any], at: str) -> Iterator[str]:
    if data != rule["const"]:
        yield f"{at} is {_short(data)}, expected {rule['const']!r}"


def _enum(data: Any, rule: Mapping[str, Any], root: Mapping[str, Any], at: str) -> Iterator[str]:
    if isinstance(data, bool) or data not in rule["enum"]:
        yield f"{at} is {_short(data)}, expected one of {rule['enum']}"


def _bounds(data: Any, rule: Mapping[str, Any], root: Mapping[str, Any], at: str) -> Iterator[str]:
    if isinstance(data, int | float) and not isinstance(data, bool):
        low, high = rule.get("minimum", -math.inf), rule.get("maximum", math.inf)
        if not low <= data <= high:
            yield f"{at} is {_short(data)}, expected {low} .. {high}"


def _required(data: Any, rule: Mapping[str, Any], root: Mapping[str, Any], at: str) -> Iterator[str]:
    missing = [k for k in rule["required"] if k not in data] if isinstance(data, dict) else []
    yield from (f"{at}.{k} is missing" for k in missing)


def _properties(data: Any, rule: Mapping[str, Any], root: Mapping[str, Any], at: str) -> Iterator[str]:
    if isinstance(data, dict):
        for name, inner in rule["properties"].items():
            if name in data:
                yield from problems(data[name], inner, root, f"{at}.{name}")


def _additional(data: Any, rule: Mapping[str, Any], root: Mapping[str, Any], at: str) -> Iterator[str]:
    if isinstance(data, dict):
        inner = rule["additionalProperties"]
        for name in [k for k in data if k not in rule.get("properties", {})]:
            if inner is False:
                yield f"{at}.{_short(name)} is not a key of this schema"
            elif isinstance(inner, dict):
                yield from problems(data[name], inner, root, f"{at}.{name}")


def _items(data: Any, rule: Mapping[str, Any], root: Mapping[str, Any], at: str) -> Iterator[str]:
    if isinstance(data, list):
        for n, value in enumerate(data):
            yield from problems(value, rule["items"], root, f"{at}[{n}]")


def _prefix(data: Any, rule: Mapping[str, Any], root: Mapping[str, Any], at: str) -> Iterator[str]:
    if isinstance(data, list):
        for n, (value, inner) in enumerate(zip(data, rule["prefixItems"], strict=False)):
            yield from problems(value, inner, root, f"{at}[{n}]")


def _length(data: Any, rule: Mapping[str, Any], root: Mapping[str, Any], at: str) -> Iterator[str]:
    if isinstance(data, list) and not rule["minItems"] <= len(data) <= rule.get("maxItems", math.inf):
        yield f"{at} has {len(data)} entries, expected {rule['minItems']}"


def _any_of(data: Any, rule: Mapping[str, Any], root: Mapping[str, Any], at: str) -> Iterator[str]:
    tries = [list(problems(data, inner, root, at)) for inner in rule["anyOf"]]
    if all(tries):
        yield tries[0][0]


_Test = Callable[[Any, Mapping[str, Any], Mapping[str, Any], str], Iterator[str]]
_KEYWORDS: Mapping[str, _Test] = {
    "type": _type,
    "const": _const,
    "enum": _enum,
    "minimum": _bounds,
    "required": _required,
    "properties": _properties,
    "additionalProperties": _additional,
    "items": _items,
    "prefixItems": _prefix,
    "minItems": _length,
    "anyOf": _any_of,
}


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
