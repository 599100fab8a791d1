"""The "<arch>.*" keys of a GGUF file that nobody vouches for: typed access, and which of them nothing asked for."""

from __future__ import annotations

import math
from collections.abc import Sequence, Sized
from typing import Any

import numpy as np

from lconvert.archs.common import F32_MAX, Arch
from lconvert.converters import gguf_keys
from lconvert.errors import InputError, UnsupportedError
from lconvert.formats import gguf
from lconvert.formats.files import show
from lconvert.ir import Decoder


def short(x: float) -> float:
    """The shortest decimal that is this fp32 number: 1e-5 was written, 9.99999974e-06 came back."""
    return float(str(np.float32(x)))


def readable(text: str) -> str:
    """A name as UTF-8 text; bytes that are none become question marks."""
    return text.encode(errors="replace").decode()


class Meta:
    """Typed access to the "<arch>.*" keys of a file. `seen` are the keys that were asked for."""

    def __init__(self, file: gguf.GGUFFile) -> None:
        self.file = file
        self.seen: set[str] = set()
        arch = file.metadata.get("general.architecture")
        if arch is None or not isinstance(arch.data, str):
            raise InputError(
                f"{file.path}: the required key 'general.architecture' is missing or not a string"
            )
        self.arch = arch.data

    def error(self, key: str, wanted: str) -> InputError:
        value = self.get(key)
        found = f"an array of {len(value)}" if isinstance(value, Sized) else show(value)
        found = show(value) if isinstance(value, str) else found
        return InputError(f"{self.file.path}: key {self.arch}.{key} is {found}, expected {wanted}")

    def get(self, key: str) -> Any:
        """The value, None where the key is absent."""
        self.seen.add(key)
        value = self.file.metadata.get(f"{self.arch}.{key}")
        return None if value is None else value.data

    def number(self, key: str, default: float | None = None) -> float:
        value = self.get(key)
        if value is None:
            if default is None:
                raise InputError(f"{self.file.path}: the required key '{self.arch}.{key}' is missing")
            return default
        if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= F32_MAX:
            raise self.error(key, "a number")
        return value

    def maybe(self, key: str) -> float | None:
        """A number, None where the key is absent."""
        return None if self.get(key) is None else short(self.number(key))

    def nonzero(self, key: str) -> float | None:
        """A number that zero turns off."""
        return self.maybe(key) or None

    def positive(self, key: str, default: float | None = None) -> float:
        value = short(self.number(key, default))
        if value <= 0:
            raise self.error(key, "a positive number")
        return value

    def count(self, key: str, default: int | None = None) -> int:
        value = self.number(key, default)
        if value != int(value) or not 0 < value < 2**31:
            raise self.error(key, "a positive integer")
        return int(value)

    def flag(self, key: str) -> bool:
        value = self.get(key)
        if not isinstance(value, bool | None):
            raise self.error(key, "true or false")
        return bool(value)

    def text(self, key: str) -> str | None:
        value = self.get(key)
        if not isinstance(value, str | None):
            raise self.error(key, "a string")
        return value

    def list_of(self, key: str, n: int) -> list[Any] | None:
        """A per-layer array, or None where the key is absent or a single value."""
        value = self.get(key)
        if not isinstance(value, np.ndarray):
            return None
        if len(value) != n:
            raise InputError(f"{self.file.path}: key {self.arch}.{key} has {len(value)} items for {n} layers")
        return list(value.tolist())


#: Keys that llama.cpp writes or reads without any effect on the function.
_INERT = ("vocab_size", "rope.scaling.finetuned", "tensor_data_layout")


def unused(meta: Meta, arch: Arch, d: Decoder) -> tuple[str, ...]:
    """A note on the keys of the architecture that nothing asked for.

    Such a key must say what the traits imply, be known to do nothing, or turn something off; otherwise it may change
    the function, and UnsupportedError names it.
    """
    implied = gguf_keys.metadata(arch, d)
    inert = []
    for key, value in meta.file.metadata.items():
        name = key.removeprefix(meta.arch + ".")
        if name == key or name in meta.seen or _agree(value, implied.get(key)):
            continue
        off = not isinstance(value.data, Sized) and not value.data and name != "attention.causal"
        if name not in _INERT and not off:
            said = f", the tensors and other keys imply {show(implied[key].data)}" if key in implied else ""
            raise UnsupportedError(
                f"{meta.file.path}: key {show(key)[1:-1]} is {show(value.data)}{said}; it may change what the model "
                "computes, so lconvert does not guess"
            )
        inert.append(key)
    return (f"inert keys: {', '.join(map(readable, inert))}",) if inert else ()


def _agree(a: gguf.Value, b: gguf.Value | None) -> bool:
    """Equal values, whatever the width in which they are stored."""
    if b is None:
        return False
    x, y = a.data, b.data
    if isinstance(x, int | float) and isinstance(y, int | float):
        return math.isclose(x, y, rel_tol=1e-6)
    if isinstance(x, Sequence | np.ndarray) and isinstance(y, Sequence | np.ndarray):
        return list(x) == list(y)
    return False
