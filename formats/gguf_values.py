"""GGUF metadata values: what they are, their bytes, and reading them from a file that may lie.

A string is a u64 length and that many bytes. Strings may hold any bytes (vocabularies do): they are decoded as UTF-8
with surrogateescape, so that encoding them again gives the same bytes. An array is u32 kind of its items, u64 length,
items. Arrays of arrays, which llama.cpp does not read either, are refused. (llama.cpp: ggml/include/gguf.h)
"""

from __future__ import annotations

import struct
from array import array as machine_array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Any, Literal, NoReturn, overload

import numpy as np
from numpy.typing import NDArray

from lconvert.errors import InputError, LconvertError, UnsupportedError
from lconvert.formats.files import fill, show

Kind = Literal["u8", "i8", "u16", "i16", "u32", "i32", "f32", "bool", "str", "array", "u64", "i64", "f64"]

HEADER_LIMIT = 128 << 20  # a vocabulary of 256k tokens with its merges takes about 20 MB
COUNT_LIMIT = 1 << 18  # keys or tensors of one file
KEY_LIMIT = 65535  # bytes of a key or tensor name

_ID: Mapping[Kind, int] = {
    "u8": 0, "i8": 1, "u16": 2, "i16": 3, "u32": 4, "i32": 5, "f32": 6, "bool": 7, "str": 8, "array": 9,
    "u64": 10, "i64": 11, "f64": 12,
}  # fmt: skip
_KIND: Mapping[int, Kind] = {i: k for k, i in _ID.items()}
_FORMAT: Mapping[Kind, str] = {
    "u8": "<B", "i8": "<b", "u16": "<H", "i16": "<h", "u32": "<I", "i32": "<i", "f32": "<f", "bool": "<?",
    "u64": "<Q", "i64": "<q", "f64": "<d",
}  # fmt: skip
_STRUCT = {k: struct.Struct(f) for k, f in _FORMAT.items()}
_DTYPE: Mapping[Kind, np.dtype[Any]] = {k: np.dtype(f) for k, f in _FORMAT.items()}
U32, U64 = _STRUCT["u32"], _STRUCT["u64"]


# --- metadata values -------------------------------------------------------------------------------------


class Strings(Sequence[str]):
    """The items of a string array, decoded when asked for: a vocabulary costs its bytes, not its objects."""

    __slots__ = ("_ends", "encoded")

    def __init__(self, encoded: bytes, ends: NDArray[np.int64]) -> None:
        """`encoded` as in the file, item i with its length before it ending at ends[i]."""
        self.encoded = encoded
        self._ends = ends

    def __len__(self) -> int:
        return len(self._ends)

    @overload
    def __getitem__(self, i: int) -> str: ...
    @overload
    def __getitem__(self, i: slice) -> list[str]: ...
    def __getitem__(self, i: int | slice) -> str | list[str]:
        if isinstance(i, slice):
            return [self[j] for j in range(*i.indices(len(self)))]
        n = len(self)
        i = i + n if i < 0 else i
        if not 0 <= i < n:
            raise IndexError(i)
        start = int(self._ends[i - 1]) if i else 0
        return _decode(self.encoded[start + 8 : int(self._ends[i])])

    def __iter__(self) -> Iterator[str]:
        start = 0
        for end in self._ends.tolist():
            yield _decode(self.encoded[start + 8 : end])
            start = end

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Sequence) or isinstance(other, str):
            return NotImplemented
        return len(self) == len(other) and all(a == b for a, b in zip(self, other, strict=True))

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"Strings({len(self)})"


@dataclass(frozen=True, eq=False)
class Value:
    """A metadata value and how it is stored. Two are equal when they are stored as the same bytes.

    An array has the kind of its items in `item`; its `data` is a one-dimensional NumPy array, or for strings a
    sequence of str (`Strings` when read from a file).
    """

    kind: Kind
    data: int | float | bool | str | NDArray[Any] | Sequence[str]
    item: Kind | None = None

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Value) and encode(self) == encode(other)

    def __hash__(self) -> int:
        return hash(encode(self))


def u8(x: int) -> Value:
    return Value("u8", x)


def i8(x: int) -> Value:
    return Value("i8", x)


def u16(x: int) -> Value:
    return Value("u16", x)


def i16(x: int) -> Value:
    return Value("i16", x)


def u32(x: int) -> Value:
    return Value("u32", x)


def i32(x: int) -> Value:
    return Value("i32", x)


def u64(x: int) -> Value:
    return Value("u64", x)


def i64(x: int) -> Value:
    return Value("i64", x)


def f32(x: float) -> Value:
    return Value("f32", x)


def f64(x: float) -> Value:
    return Value("f64", x)


def boolean(x: bool) -> Value:
    return Value("bool", x)


def string(x: str) -> Value:
    return Value("str", x)


def array(item: Kind, data: Sequence[Any] | NDArray[Any]) -> Value:
    """An array of `item`s; whether they fit is checked when they are written."""
    if item == "str":
        return Value("array", data, item)
    a = np.asarray(data)
    if a.dtype.kind == "f" and item not in ("f32", "f64"):  # NumPy makes floats of [0, 2**63]
        a = np.asarray(data, dtype=object)
    return Value("array", a, item)


def _decode(raw: bytes) -> str:
    return raw.decode("utf-8", "surrogateescape")


def counted(text: str) -> bytes:
    raw = text.encode("utf-8", "surrogateescape")
    return U64.pack(len(raw)) + raw


def encode(value: Value) -> bytes:
    """Kind and value as stored. ValueError (UnicodeEncodeError included) if the data are not of the kind."""
    data: Any = value.data
    head = U32.pack(_ID[value.kind])
    if value.kind == "str":
        return head + counted(data)
    if value.kind != "array":
        return head + _scalar(value.kind, data)
    if value.item is None or value.item == "array":
        raise ValueError(f"an array of {value.item or 'nothing'} cannot be stored")
    if value.item != "str":
        body = _numbers(value.item, data).tobytes()
    elif isinstance(data, Strings):
        body = data.encoded
    else:
        body = b"".join(map(counted, data))
    return head + U32.pack(_ID[value.item]) + U64.pack(len(data)) + body


def _scalar(kind: Kind, x: Any) -> bytes:
    if (kind == "bool") != isinstance(x, bool | np.bool_):
        raise ValueError(f"{show(x)} is no {kind}")
    try:
        return _STRUCT[kind].pack(x)
    except (struct.error, OverflowError):
        raise ValueError(f"{show(x)} is no {kind}") from None


def _numbers(item: Kind, data: Any) -> NDArray[Any]:
    """`data` as items of that kind: floats may be rounded, everything else must fit exactly."""
    a, want = np.asarray(data), _DTYPE[item]
    if a.ndim != 1:
        raise ValueError(f"an array of shape {a.shape} is not one-dimensional")
    if a.size == 0 or a.dtype == want:
        return a.astype(want)
    if a.dtype.kind == "O":
        return np.frombuffer(b"".join(_scalar(item, x) for x in a.tolist()), want)
    if want.kind == "f" and a.dtype.kind in "fiu":
        with np.errstate(over="ignore"):
            out = a.astype(want)
        wrong = np.isinf(out) & np.isfinite(a)
    elif want.kind in "iu" and a.dtype.kind in "iu":
        out = a.astype(want)
        wrong = (out != a) | ((out < 0) != (a < 0))
    else:
        raise ValueError(f"{a.dtype} items cannot be stored as {item}")
    if wrong.any():
        at = int(np.argmax(wrong))
        raise ValueError(f"item {at}, {a[at]}, is no {item}")
    return out


# --- reading ---------------------------------------------------------------------------------------------


class Cursor:
    """The header, read from the file as far as it is needed; `where` says in errors what is being read."""

    def __init__(self, f: FileIO, path: Path, size: int) -> None:
        self._file, self.path, self.size = f, path, size
        self.limit = min(size, HEADER_LIMIT)
        self.data = bytearray()
        self.pos = 0
        self.where = "the start"

    def need(self, stop: int) -> None:
        """Makes data[:stop] available."""
        have = len(self.data)
        if stop <= have:
            return
        if stop > self.limit:
            self.refuse_size(stop - self.pos)
        more = bytearray(min(self.limit, max(stop, 2 * have, 1 << 16)) - have)
        got = fill(self._file, have, more)
        self.data += more[:got]
        if len(self.data) < stop:  # the file shrank while it was read
            self.limit = self.size = len(self.data)
            self.refuse_size(stop - self.pos)

    def refuse_size(self, wanted: int) -> NoReturn:
        if self.limit < self.size:
            raise InputError(
                f"{self.path}: {self.where} takes {wanted} bytes from byte {self.pos}, beyond the {HEADER_LIMIT} "
                "that a header may have; this is no sound model file"
            )
        raise InputError(
            f"{self.path}: the file ends inside {self.where}, which takes {wanted} bytes from byte {self.pos} of "
            f"{self.size}; it is cut short or damaged, download it again"
        )

    def number(self, s: struct.Struct) -> Any:
        start = self.pos
        self.need(start + s.size)
        self.pos = start + s.size
        return s.unpack_from(self.data, start)[0]

    def bytes(self, n: int) -> bytes:
        start = self.pos
        self.need(start + n)
        self.pos = start + n
        return bytes(self.data[start : self.pos])

    def name(self, what: str) -> str:
        """A key or tensor name: short, UTF-8."""
        n = self.number(U64)
        if not 0 < n <= KEY_LIMIT:
            raise self.error(f"a name of {n} bytes, allowed are 1 to {KEY_LIMIT}")
        raw = self.bytes(n)
        try:
            return raw.decode()
        except UnicodeDecodeError:
            raise self.error(f"the {what} {show(raw)} is not UTF-8") from None

    def count(self, what: str, least: int) -> int:
        """A number of things that take at least `least` bytes each."""
        n: int = self.number(U64)
        if n > COUNT_LIMIT or n * least > self.limit - self.pos:
            raise self.error(
                f"{n} {what} do not fit into the {self.size - self.pos} bytes that follow (and {COUNT_LIMIT} is "
                "the most)"
            )
        return n

    def error(self, found: str, kind: type[LconvertError] = InputError) -> LconvertError:
        advice = "; the file is damaged, download it again" if kind is InputError else ""
        return kind(f"{self.path}: {self.where}: {found}{advice}")


def read_value(c: Cursor) -> Value:
    number = c.number(U32)
    kind = _KIND.get(number)
    if kind is None:
        raise c.error(f"unknown kind {number} of value")
    if kind == "str":
        return Value(kind, _decode(c.bytes(c.number(U64))))
    if kind == "bool":
        byte = c.number(_STRUCT["u8"])
        if byte > 1:
            raise c.error(f"a bool is 0 or 1, found {byte}")
        return Value(kind, bool(byte))
    if kind != "array":
        return Value(kind, c.number(_STRUCT[kind]))
    number = c.number(U32)
    item = _KIND.get(number)
    if item is None:
        raise c.error(f"unknown kind {number} of array items")
    if item == "array":
        raise c.error("an array of arrays, which llama.cpp does not read either", UnsupportedError)
    n: int = c.number(U64)
    width = 8 if item == "str" else _DTYPE[item].itemsize
    if n * width > c.limit - c.pos:
        c.where += f", {n} items of {item}"
        c.refuse_size(n * width)
    if item == "str":
        return Value(kind, _read_strings(c, n), item)
    raw = c.bytes(n * width)
    if item == "bool" and raw and (worst := max(raw)) > 1:
        raise c.error(f"a bool is 0 or 1, found {worst}")
    return Value(kind, np.frombuffer(raw, _DTYPE[item]), item)


def _read_strings(c: Cursor, n: int) -> Strings:
    # One pass over the lengths. The loop runs once per token, so it works on locals.
    ends = machine_array("q")
    start = pos = c.pos
    data, have, unpack, add = c.data, len(c.data), U64.unpack_from, ends.append
    for _ in range(n):
        if pos + 8 > have:
            c.pos = pos
            c.need(pos + 8)
            have = len(data)
        pos += 8 + unpack(data, pos)[0]
        if pos > have:
            if pos > c.limit:
                c.where += f", item {len(ends) + 1} of {n}"
                c.pos = start + (ends[-1] if ends else 0)
                c.refuse_size(pos - c.pos)
            c.need(pos)
            have = len(data)
        add(pos - start)
    c.pos = pos
    return Strings(bytes(data[start:pos]), np.frombuffer(ends, np.int64))
