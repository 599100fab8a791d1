"""What is wrong with a recipe before any model is read: options of wrong types, stages that contradict each other.

The types are those of the fields of a pass's `Options`; ranges are its own business. Where a pass may stand follows from its stages
(passes.STAGES): a transform needs dense weights, a weight is rounded once, inputs are quantized of rounded weights. What turns
channels together, or puts them in another order, would undo a mask in front of it.
"""

from __future__ import annotations

import math
import re
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import fields
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from lconvert import passes
from lconvert.errors import LconvertError, OptionError, meant
from lconvert.primitives.masks import UNSTRUCTURED
from lconvert.primitives.placement import Placement


def options(where: str, name: str, given: Mapping[str, Any]) -> Any:
    """The `Options` of pass `name` out of plain data; OptionError names `where`, the pass and the option."""
    kind = passes.find(name).Options
    known = [f.name for f in fields(kind)]
    for key in given:
        if key not in known:
            hint = meant(key, known)
            raise OptionError(f"{where}: {name}: unknown option {key!r}; {hint}options: {', '.join(known)}")
    hints = get_type_hints(kind)
    taken = {}
    for key, value in given.items():
        fits, taken[key] = _taken(value, hints[key])
        if not fits:
            quotes = (
                ", in quotes" if hints[key] is str and isinstance(value, int | float) else ""
            )  # 2:4 is 124
            raise OptionError(f"{where}: {name}: {key} {value!r}: expected {_expected(hints[key])}{quotes}")
    try:
        return kind(**taken)
    except LconvertError as e:
        text = str(e)
        raise OptionError(f"{where}: {text if text.startswith(f'{name}: ') else f'{name}: {text}'}") from None


# --- types -----------------------------------------------------------------------------------------------

_WORDS: Mapping[Any, str] = {
    bool: "true or false", int: "a whole number", float: "a number", str: "a text", type(None): "null",
}  # fmt: skip


def _taken(value: Any, hint: Any) -> tuple[bool, Any]:
    """Whether plain data is of an annotated type, and the value as that type has it."""
    origin, inner = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        found = [taken for fits, taken in (_taken(value, h) for h in inner) if fits]
        return bool(found), found[0] if found else value
    if origin is Literal:
        return any(type(value) is type(x) and value == x for x in inner), value
    if hint is float:
        number = isinstance(value, int | float) and not isinstance(value, bool)
        return number and math.isfinite(value), float(value) if number else value
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool), value
    if origin is not None and issubclass(origin, Mapping):
        if not isinstance(value, dict):
            return False, value
        pairs = [(_taken(k, inner[0]), _taken(v, inner[1])) for k, v in value.items()]
        return all(k[0] and v[0] for k, v in pairs), {k[1]: v[1] for k, v in pairs}
    if origin is not None and issubclass(origin, Sequence):
        if not isinstance(value, list | tuple):
            return False, value
        items = [_taken(v, inner[0]) for v in value]
        return all(fits for fits, _ in items), tuple(taken for _, taken in items)
    return isinstance(value, hint), value


def _expected(hint: Any) -> str:
    origin, inner = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return " or ".join(map(_expected, inner))
    if origin is Literal:
        return f"one of {', '.join(map(str, inner))}"
    if origin is not None and issubclass(origin, Mapping):
        return f"a mapping from {_expected(inner[0])} to {_expected(inner[1])}"
    if origin is not None and issubclass(origin, Sequence):
        return f"a list, each item {_expected(inner[0])}"
    return _WORDS[hint]


# --- stages ----------------------------------------------------------------------------------------------

_LAYERS = 128
_LOCAL = (
    *(f"attn.{n}" for n in ("q", "k", "v", "o", "q_a", "q_b", "kv_a", "k_b", "v_b")),
    *(f"mlp.{n}" for n in ("gate", "up", "down")),
    *(f"moe.{part}.{n}" for part in ("shared", "experts.0", "experts.1") for n in ("gate", "up", "down")),
)


def _names() -> Iterator[str]:
    """Canonical names as decoders have them: what two passes both mean is looked for among these."""
    yield from (f"layers.{i}.{local}" for i in range(_LAYERS) for local in _LOCAL)
    yield from ("head", "embed", "pos_embed", "stages.0.0.conv1", "features.0")


def _meant(options: Any) -> Callable[[str], bool]:
    """Whether a pass takes the weight of a name."""
    if isinstance(options, Placement):
        return lambda name: options.of(name) is not None
    targets, ignore = re.compile(getattr(options, "targets", ".*")), getattr(options, "ignore", "")
    return lambda name: bool(targets.fullmatch(name)) and not (ignore and re.fullmatch(ignore, name))


#: Transforms, and whether one undoes what a pass with these options has masked: turned weights are sums of kept and pruned ones, and
#: columns in another order are other groups of M. Factors of columns and rows leave zeros where they are.
_UNDOES: Mapping[str, Callable[[Any], bool]] = {
    "rotate": lambda options: True,
    "permute": lambda options: getattr(options, "pattern", UNSTRUCTURED) != UNSTRUCTURED,
}


def stages(where: str, steps: Sequence[tuple[str, Any]]) -> None:
    """OptionError where passes (name, options) contradict each other in this order."""
    kinds = [passes.stages(name, options) for name, options in steps]
    rounding = [i for i, kind in enumerate(kinds) if "rounds" in kind]
    for i, (name, options) in enumerate(steps):
        if "transforms" in kinds[i] and rounding and rounding[0] < i:
            raise OptionError(
                f"{where}: {name} changes dense weights, but {steps[rounding[0]][0]} in front of it has rounded them; "
                f"put {name} first"
            )
        if undone := _unmasked(name, steps[:i], kinds):
            raise OptionError(
                f"{where}: {name} leaves nothing of the zeros that {undone} in front of it has made, or of their pattern; put {name} first"
            )
        if getattr(options, "refits", False) and (done := _both(steps[:i], kinds, options)):
            raise OptionError(
                f"{where}: {name} re-fits the weights that it keeps, but {done} in front of it has rounded them; put {name} first, or prune by "
                "magnitude or wanda in one step"
            )
        if kinds[i] == ("inputs",) and rounding and rounding[0] > i:
            raise OptionError(
                f"{where}: {name} is about inputs of rounded weights, but {steps[rounding[0]][0]} comes after it; "
                f"put {name} last"
            )
    for stage, done in (
        ("rounds", "rounds"),
        ("inputs", "says how inputs are quantized of"),
        ("cache", "quantizes"),
    ):
        _once(where, [steps[i] for i, kind in enumerate(kinds) if stage in kind], done)


def _unmasked(name: str, earlier: Sequence[tuple[str, Any]], kinds: Sequence[tuple[str, ...]]) -> str:
    """The pass whose mask pass `name` undoes; "" for none."""
    undoes = _UNDOES.get(name, lambda options: False)
    masking = (step for step, kind in zip(earlier, kinds, strict=False) if "masks" in kind)
    return next((first for first, options in masking if undoes(options)), "")


def _both(earlier: Sequence[tuple[str, Any]], kinds: Sequence[tuple[str, ...]], options: Any) -> str:
    """The pass that has rounded a weight which `options` mean too; "" for none."""
    mine = _meant(options)
    for (name, before), kind in zip(earlier, kinds, strict=False):
        theirs = _meant(before)
        if "rounds" in kind and any(mine(n) and theirs(n) for n in _names()):
            return name
    return ""


def _once(where: str, steps: Sequence[tuple[str, Any]], does: str) -> None:
    """OptionError where a pass is about what one before it has settled."""
    for i, (name, options) in enumerate(steps[1:], 1):
        later = _meant(options)
        for first, before in steps[:i]:
            if passes.STAGES[first] == ("cache",):
                raise OptionError(f"{where}: {name} {does} the cache, as a {first} before it; leave one out")
            earlier = _meant(before)
            both = next((n for n in _names() if earlier(n) and later(n)), None)
            if both is not None:
                raise OptionError(
                    f"{where}: {name} {does} {both}, as {first} before it does; leave one out, or part them with "
                    "targets and ignore"
                )
