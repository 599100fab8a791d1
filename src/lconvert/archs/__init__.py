"""Architectures by model_type: the file name is the registry, ALIASES names the exceptions.

`find("llama")` imports archs/llama.py and returns its `ARCH`. A missing file is the only "unsupported";
an error inside an architecture file propagates.
"""

from __future__ import annotations

import importlib
import pkgutil
import re
from collections.abc import Mapping
from typing import Any

from lconvert.errors import InputError, UnsupportedError
from lconvert.ir import Traits

from .common import Arch, Keys

#: config.json's model_type -> file name, where they differ.
ALIASES: Mapping[str, str] = {}

_HELPERS = {"common", "llamacpp"}


def names() -> list[str]:
    """Every supported model_type."""
    files = {m.name for m in pkgutil.iter_modules(__path__)} - _HELPERS
    return sorted((files - set(ALIASES.values())) | set(ALIASES))


def find(model_type: str) -> Arch:
    """The architecture of a config.json's model_type."""
    module = ALIASES.get(model_type, model_type)
    if not re.fullmatch(r"\w+", model_type) or model_type not in names():
        raise UnsupportedError(
            f"model_type {model_type!r} is not supported; supported: {', '.join(names())} "
            "(CONTRIBUTING.md shows how to add one)"
        )
    arch = importlib.import_module(f"{__name__}.{module}").ARCH
    assert isinstance(arch, Arch)
    return arch


def configured(config: Mapping[str, Any], where: str) -> tuple[Arch, Traits, Keys, tuple[str, ...]]:
    """The architecture of a config.json's content, its traits, the keys for more questions, and the names of inert ones.

    where: the file, for messages. UnsupportedError for a key that nothing knows.
    """
    model_type = config.get("model_type")
    if not isinstance(model_type, str):
        raise InputError(f"{where}: the required key 'model_type' is missing")
    arch = find(model_type)
    keys = Keys(config, where)
    traits = arch.traits(keys)
    return arch, traits, keys, keys.finish()
