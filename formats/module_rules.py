"""Rules of quantization configs that name modules by regular expressions: reading hostile ones, writing plain ones.

GPTQModel's `dynamic` maps "+:REGEX" or "REGEX" to keys that differ for the matching modules, "-:REGEX" to whatever for
modules that are not quantized (GPTQModel quantization/config.py `dynamic_get`; vLLM gptq_utils.py `get_dynamic_override`).
Both match at the start of the name; the first rule that matches counts, exclusions before the others.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import comb
from typing import Any

from lconvert.errors import InputError, UnsupportedError
from lconvert.formats.files import show

#: Steps that matching one name with all expressions of a file may take in the worst case (at 40 ns for the slowest kind),
#: and the length of name for which they are estimated; numbers in names have at most so many digits.
_STEPS, _NAME, _DIGITS = 4_000_000, 64, 5
#: What compiling an expression counts for, and how many letters all of a file may have.
_EACH, _LETTERS = 1000, 4 << 20
#: Shell patterns of a file, and the letters of one: fnmatch compiles each, which takes 0.1 ms.
_GLOBS, _GLOB_LETTERS = 10_000, 1024
#: vLLM looks rules up by the names of its fused modules (packed_modules_mapping of its models).
_FUSED: Mapping[str, tuple[str, ...]] = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "gate_up_proj": ("gate_proj", "up_proj"),
}


@dataclass(frozen=True)
class Rule:
    """Keys that are stated for the modules that `pattern` matches; None: they are not quantized."""

    pattern: re.Pattern[str]
    overrides: Mapping[str, Any] | None
    where: str


def rules(dynamic: Any, where: str) -> tuple[Rule, ...]:
    """The rules of GPTQModel's `dynamic`, exclusions first."""
    if dynamic is None:
        return ()
    if not isinstance(dynamic, dict):
        raise InputError(f"{where}: dynamic is {show(dynamic)}, expected an object of rules")
    found: list[tuple[str, str, Mapping[str, Any] | None]] = []
    for text, keys in dynamic.items():
        at = f"{where}: dynamic rule {show(text)}"
        if text.startswith("-:"):
            found.append((text[2:], at, None))
        elif isinstance(keys, dict):
            found.append((text.removeprefix("+:"), at, keys))
        else:
            raise InputError(f"{at} is {show(keys)}, expected an object of keys; correct the file")
    patterns = compiled([(text, at) for text, at, _ in found])
    out = [Rule(pattern, keys, at) for pattern, (_, at, keys) in zip(patterns, found, strict=True)]
    return tuple(sorted(out, key=lambda rule: rule.overrides is not None))


def first(rules: Iterable[Rule], module: str) -> Rule | None:
    """The rule that counts for a module."""
    return next((rule for rule in rules if rule.pattern.match(module)), None)


def compiled(expressions: Sequence[tuple[str, str]]) -> list[re.Pattern[str]]:
    """All regular expressions of a file, each with words on where it is. UnsupportedError where matching one, or all of them
    together, could take minutes or forever."""
    out: list[re.Pattern[str]] = []
    steps, letters = 0.0, 0
    for text, where in expressions:
        letters += len(text)
        if letters > _LETTERS:
            raise UnsupportedError(
                f"{where}: the expressions of this file have more than {_LETTERS} letters; name the modules"
            )
        cost = _cost(text)
        steps += cost + _EACH
        if steps > _STEPS:
            what = "this expression" if cost > _STEPS else f"this and the {len(out)} expressions before it"
            raise UnsupportedError(
                f"{where}: {what} may take too long to match (repeated groups, or many * and +); name the modules"
            )
        try:
            with warnings.catch_warnings(action="ignore"):  # what another Python might read in a class
                out.append(re.compile(text))
        except (re.error, OverflowError, RecursionError) as e:
            raise InputError(f"{where}: no valid regular expression ({e}); correct the file") from None
    return out


def check_globs(patterns: Sequence[str], where: str) -> None:
    """UnsupportedError for so many or so long shell patterns that a small file would keep fnmatch busy."""
    if len(patterns) > _GLOBS or any(len(p) > _GLOB_LETTERS for p in patterns):
        raise UnsupportedError(
            f"{where}: {len(patterns)} patterns, the longest of {max(map(len, patterns))} letters, take too long to match; at "
            f"most {_GLOBS} of {_GLOB_LETTERS} letters are read"
        )


_TOKEN = re.compile(r"\\.|\[\^?\]?(?:\\.|[^\]\\]){0,200}\]|\(\?|\{[^{}]*\}|[\s\S]")
_ANY_DIGIT = ("\\d", "[0-9]")


def _cost(text: str) -> float:
    """A bound on the steps of a backtracking matcher: ways to share the name among repeats, times alternatives taken.

    A repeated group may take exponentially many, so its cost is infinite.
    """
    total, repeats, product = 0.0, 0, 1.0
    groups: list[int] = []
    previous = ""
    for match in _TOKEN.finditer(text):
        token = match[0]
        if token == "[":  # of no class, or of one that is too long to be told
            return float("inf")
        if token in ("(", "(?"):
            groups.append(1)
        elif token == ")" and groups:
            product *= groups.pop()
        elif token == "|" and groups:
            groups[-1] += 1
        elif token == "|":
            total, repeats, product = total + comb(_NAME + repeats, repeats) * product, 0, 1.0
        elif token in ("*", "+") or token[0] == "{":
            if previous == ")":
                return float("inf")
            if previous in _ANY_DIGIT and token in ("*", "+"):
                product *= _DIGITS
            else:
                repeats += previous not in ("*", "+")
        elif token == "?":
            product *= 1 if previous in ("*", "+") or previous[:1] == "{" else 2
        previous = token
    return total + comb(_NAME + repeats, repeats) * product


def pattern_of(modules: Iterable[str], sign: str) -> str:
    """A rule for exactly these modules, and for the fused ones whose members are all among them."""
    names = dict.fromkeys(modules)
    fused = [
        f"{parent}.{fused}"
        for parent in dict.fromkeys(name.rpartition(".")[0] for name in names)
        for fused, members in _FUSED.items()
        if all(f"{parent}.{member}" in names for member in members)
    ]
    return f"{sign}:^(?:{'|'.join(re.escape(name) for name in (*names, *fused))})$"
