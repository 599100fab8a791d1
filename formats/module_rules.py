"""Rules of quantization configs that name modules by regular expressions: reading hostile ones, writing plain ones.

GPTQModel's `dynamic` maps "+:REGEX" or "REGEX" to keys that differ for the matching modules, "-:REGEX" to whatever for
modules that are not quantized (GPTQModel quantization/config.py `dynamic_get`; vLLM gptq_utils.py `get_dynamic_override`).
Both match at the start of the name; the first rule that matches counts, exclusions before the others.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import comb
from typing import Any

from lconvert.errors import InputError, UnsupportedError
from lconvert.formats.files import show

#: Steps that matching one name may take in the worst case, and the length of name for which they are estimated.
_STEPS, _NAME = 20_000_000, 64
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
    out = []
    for text, keys in dynamic.items():
        at = f"{where}: dynamic rule {show(text)}"
        if text.startswith("-:"):
            out.append(Rule(compiled(text[2:], at), None, at))
        elif isinstance(keys, dict):
            out.append(Rule(compiled(text.removeprefix("+:"), at), keys, at))
        else:
            raise InputError(f"{at} is {show(keys)}, expected an object of keys; correct the file")
    return tuple(sorted(out, key=lambda rule: rule.overrides is not None))


def first(rules: Iterable[Rule], module: str) -> Rule | None:
    """The rule that counts for a module."""
    return next((rule for rule in rules if rule.pattern.match(module)), None)


def compiled(text: str, where: str) -> re.Pattern[str]:
    """A regular expression out of a file: UnsupportedError where matching it could take minutes or forever."""
    if _cost(text) > _STEPS:
        raise UnsupportedError(
            f"{where}: this expression may take too long to match (repeated groups, or many * and +); name the modules"
        )
    try:
        return re.compile(text)
    except (re.error, OverflowError, RecursionError) as e:
        raise InputError(f"{where}: no valid regular expression ({e}); correct the file") from None


def _cost(text: str) -> float:
    """A bound on the steps of a backtracking matcher: ways to share the name among repeats, times alternatives taken.

    A repeated group may take exponentially many, so its cost is infinite.
    """
    total, repeats, product = 0.0, 0, 1.0
    groups: list[int] = []
    previous = ""
    for token in re.findall(r"\\.|\[\^?\]?(?:\\.|[^\]\\]){0,200}\]|\(\?|\{[^{}]*\}|[\s\S]", text):
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
