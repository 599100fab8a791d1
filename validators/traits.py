"""In which traits do two models compute differently? By name, with both values and the layers concerned.

What only represents the same function in another way is no difference: the norm offset (Gemma's 1 + w), the family's
name, parameters of a rope scaling that is not in use, a window as long as the context.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import fields
from typing import Any

from lconvert.archs.common import yarn_attention
from lconvert.converters.gguf_keys import longrope_attention
from lconvert.errors import InputError
from lconvert.ir import Attention, Decoder, Layer, Model, Moe, Rope, Traits

#: Fields of a Decoder that say how it is held, not what it computes, or that `_of_layer` looks into.
_ASIDE = ("family", "norm_offset", "default", "overrides")
#: Fields of a Rope that each scaling uses, besides theta, dim and layout.
_SCALING: Mapping[str, tuple[str, ...]] = {
    "none": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_context"),
    "yarn": ("factor", "beta_fast", "beta_slow", "original_context", "truncate"),
    "longrope": ("original_context", "short_factors", "long_factors"),
}


def same_shapes(source: Model, artifact: Model) -> None:
    """InputError where shapes say that `artifact` was not made from `source`."""
    a, b = ({name: entry.shape for name, entry in m.entries.items()} for m in (source, artifact))
    for name in sorted(a.keys() | b.keys()):
        if a.get(name) != b.get(name):
            raise InputError(
                f"{artifact.source}: is not made from {source.source}: {name} is {_shape(b.get(name))} here and "
                f"{_shape(a.get(name))} there"
            )


def _shape(shape: Sequence[int] | None) -> str:
    return "absent" if shape is None else "x".join(map(str, shape))


def differences(a: Traits, b: Traits) -> list[str]:
    """What `b` (the artifact) computes differently from `a` (the original), one line per trait.

    >>> import lconvert
    >>> from dataclasses import replace
    >>> d = lconvert.read("examples/demo_model").arch
    >>> differences(d, replace(d, norm_eps=1e-6))
    ['norm_eps: 1e-05 in the original, 1e-06 in the artifact']
    """
    if not (isinstance(a, Decoder) and isinstance(b, Decoder)):
        return _of_others(a, b)
    out = [_line(name, _show(x), _show(y)) for name, x, y in _unequal(_of_model(a), _of_model(b))]
    seen: dict[tuple[str, str, str], list[int]] = {}
    for i in range(min(a.layers, b.layers)):
        for name, x, y in _unequal(_of_layer(a.layer(i), a.context), _of_layer(b.layer(i), b.context)):
            seen.setdefault((name, _show(x), _show(y)), []).append(i)
    for (name, x, y), layers in seen.items():
        where = "" if len(layers) == a.layers else f"layer{'s' * (len(layers) > 1)} {_ranges(layers)}: "
        out.append(where + _line(name, x, y))
    return out


def _of_others(a: Traits, b: Traits) -> list[str]:
    """The same of encoders and convolutional networks: field by field."""
    if type(a) is not type(b):
        return [_line("kind", type(a).__name__.lower(), type(b).__name__.lower())]
    names = [f.name for f in fields(a)]
    return [
        _line(n, repr(getattr(a, n)), repr(getattr(b, n))) for n in names if getattr(a, n) != getattr(b, n)
    ]


def _line(name: str, x: str, y: str) -> str:
    return f"{name}: {x} in the original, {y} in the artifact"


def _of_model(d: Decoder) -> dict[str, Any]:
    return {f.name: getattr(d, f.name) for f in fields(d) if f.name not in _ASIDE}


def _of_layer(layer: Layer, context: int) -> dict[str, Any]:
    """Trait names, with dots, and values of one layer."""
    out: dict[str, Any] = {"block": layer.block}
    out |= _of_attention(layer.attention, context)
    part = "moe" if isinstance(layer.mlp, Moe) else "mlp"
    out["feed-forward"] = part
    return out | {f"{part}.{f.name}": getattr(layer.mlp, f.name) for f in fields(layer.mlp)}


def _of_attention(a: Attention, context: int) -> dict[str, Any]:
    out = {f"attention.{f.name}": getattr(a, f.name) for f in fields(a) if f.name != "rope"}
    if a.window is not None and a.window >= context:
        out["attention.window"] = None
    if a.rope is None:
        return out | {"rope": None}
    return out | {"rope": "rotary"} | {f"rope.{name}": value for name, value in _of_rope(a.rope, context)}


def _of_rope(rope: Rope, context: int) -> Iterator[tuple[str, Any]]:
    for name in ("theta", "dim", "layout", "scaling", *_SCALING[rope.scaling]):
        yield name, getattr(rope, name)
    if rope.scaling == "yarn":
        yield "attention_factor", yarn_attention(rope)
    if rope.scaling == "longrope":
        yield "attention_factor", longrope_attention(rope, context)


def _unequal(a: Mapping[str, Any], b: Mapping[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    """Traits with another value on the other side. One that only one side has follows from another that differs (the
    factor of a rope scaling, the number of experts), and that one is named."""
    for name in a:
        if name in b and not _same(a[name], b[name]):
            yield name, a[name], b[name]


def _same(x: Any, y: Any) -> bool:
    """Equal, numbers up to the rounding of a file that holds fp32."""
    if isinstance(x, tuple) and isinstance(y, tuple):
        return len(x) == len(y) and all(map(_same, x, y))
    if isinstance(x, float) and isinstance(y, int | float):
        return math.isclose(x, y, rel_tol=1e-6)
    return bool(x == y)


def _show(value: Any) -> str:
    if isinstance(value, tuple):
        return f"[{', '.join(f'{v:g}' for v in value[:4])}{', ...' if len(value) > 4 else ''}]"
    if isinstance(value, float):
        return f"{value:.9g}"
    return "none" if value is None else str(value)


def _ranges(numbers: Iterable[int]) -> str:
    """0, 1, 2, 5 as "0-2, 5"."""
    runs: list[list[int]] = []
    for n in numbers:
        if runs and runs[-1][1] == n - 1:
            runs[-1][1] = n
        else:
            runs.append([n, n])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)
