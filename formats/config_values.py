"""Values of a `quantization_config` that several formats state alike: numbers, flags, names of modules, keys.

A config comes out of a file that nobody vouches for: a value of another type than its key's is an InputError that names the
key, and so is a key that a format does not know, where it could change what the tensors mean.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from lconvert.errors import InputError
from lconvert.formats.files import show


def whole(config: Mapping[str, Any], names: tuple[str, ...], where: str) -> int:
    """The whole number under one of `names`."""
    for name in names:
        if name in config:
            if type(config[name]) is not int or abs(config[name]) >= 1 << 31:
                raise InputError(
                    f"{where}: {name} of quantization_config is {show(config[name])}, expected a whole number"
                )
            return int(config[name])
    raise InputError(
        f"{where}: quantization_config lacks {names[0]}; the file is incomplete, download it again"
    )


def flag(config: Mapping[str, Any], name: str, where: str, default: bool) -> bool:
    value = config.get(name)
    if value is not None and type(value) is not bool:
        raise InputError(f"{where}: {name} of quantization_config is {show(value)}, expected true or false")
    return default if value is None else value


def name_list(value: Any, key: str, where: str) -> tuple[str, ...]:
    """The names that `key` lists, none of them empty."""
    if not isinstance(value, list) or not all(isinstance(name, str) and name for name in value):
        raise InputError(f"{where}: {key} is {show(value)}, expected a list of names")
    return tuple(value)


def names_module(listed: str, module: str) -> bool:
    """Whether transformers skips `module` for a name in such a list (quantizers_utils.py `should_convert_module`).

    It also takes names as regular expressions, which here only match themselves.
    """
    return f"{module}.".startswith(f"{listed}.") or module.endswith(listed)


def refuse_unknown(config: Mapping[str, Any], known: Collection[str], where: str, words: str) -> None:
    """words: what the message calls the known keys, such as "HQQ's are"."""
    if unknown := sorted(config.keys() - known):
        raise InputError(
            f"{where} has the unknown key {show(unknown[0])}; {words} {', '.join(sorted(known))}"
        )


def inert(config: Mapping[str, Any], read: Collection[str]) -> tuple[str, ...]:
    """The line of a report that names the keys outside `read`, if there are any."""
    found = sorted(show(key)[1:-1] for key in config.keys() - read)
    return (f"inert keys of quantization_config: {', '.join(found)}",) if found else ()
