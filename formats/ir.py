"""The IR as a folder: `model.lcir/` with lcir.json and tensors.safetensors. Written and read without loss.

lcir.json, schema "lcir/1":
  schema      "lcir/1"; another number is refused by name
  lconvert    version that wrote it
  arch        the Decoder's traits, field by field; `overrides` maps layer numbers to layers
  config, tokenizer, generation, name, report    as in the Model
  entries     canonical name -> node
  node        {"tensor": NAME}                   a dense array, stored under NAME
              {"codes": NAME, "grid": {...}, "block": [...], "shape": [...], "scale": node,
               "zero": node?, "offset": node?, "g_idx": node?, "packed": 4?}    a QTensor
Codes of up to 4 bits are stored two to a byte, first code in the low half ("packed": 4), when rows are even.
Activation specs, unfolded transforms, KV specs, masks, outliers and low-rank parts are refused: no pass makes them yet.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lconvert import __version__
from lconvert.errors import InputError, UnsupportedError
from lconvert.formats import safetensors
from lconvert.ir import (
    Attention,
    Decoder,
    Entry,
    Grid,
    Layer,
    Mlp,
    Model,
    Moe,
    QTensor,
    Rope,
    Tensor,
    Tokenizer,
)
from lconvert.spec import check

SCHEMA = "lcir/1"
META, DATA = "lcir.json", "tensors.safetensors"


@dataclasses.dataclass(frozen=True)
class Stored:
    """One array of tensors.safetensors: `read(start, stop)` gives rows of what is stored."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    read: Callable[[int, int], NDArray[Any]]


# --- writing ---------------------------------------------------------------------------------------------


def _packs(codes: Tensor, grid: Grid) -> bool:
    return (
        grid.bits <= 4 and codes.dtype in ("U8", "I8") and len(codes.shape) > 1 and codes.shape[-1] % 2 == 0
    )


def _packed(codes: Tensor) -> Callable[[int, int], NDArray[Any]]:
    def read(start: int, stop: int) -> NDArray[Any]:
        x = codes.read(start, stop).view(np.uint8)
        return np.ascontiguousarray((x[..., 0::2] & 15) | (x[..., 1::2] << 4))

    return read


def _node(name: str, data: Tensor | QTensor, out: list[Stored]) -> dict[str, Any]:
    if isinstance(data, Tensor):
        out.append(Stored(name, data.dtype, data.shape, data.read))
        return {"tensor": name}
    if data.mask is not None or data.outliers or data.low_rank is not None:
        raise UnsupportedError(f"{name}: masks, outliers and low-rank parts cannot be stored in {SCHEMA}")
    node: dict[str, Any] = {
        "codes": f"{name}.codes",
        "grid": dataclasses.asdict(data.grid),
        "block": list(data.block),
        "shape": list(data.shape),
    }
    if _packs(data.codes, data.grid):
        node["packed"] = 4
        shape = (*data.shape[:-1], data.shape[-1] // 2)
        out.append(Stored(node["codes"], "U8", shape, _packed(data.codes)))
    else:
        out.append(Stored(node["codes"], data.codes.dtype, data.shape, data.codes.read))
    for side in ("scale", "zero", "offset", "g_idx"):
        value = getattr(data, side)
        if value is not None:
            node[side] = _node(f"{name}.{side}", value, out)
    return node


def describe(model: Model) -> tuple[dict[str, Any], list[Stored]]:
    """lcir.json's content and the arrays to store, in order."""
    if model.kv is not None or any(not t.folded for t in model.transforms):
        raise UnsupportedError(f"KV specs and unfolded transforms cannot be stored in {SCHEMA}")
    stored: list[Stored] = []
    entries: dict[str, Any] = {}
    for name, entry in model.entries.items():
        if entry.activation is not None or entry.transform is not None:
            raise UnsupportedError(f"{name}: activation specs and transforms cannot be stored in {SCHEMA}")
        entries[name] = _node(name, entry.data, stored) | {"provenance": list(entry.provenance)}
    arch = dataclasses.asdict(model.arch)
    arch["overrides"] = {str(i): o for i, o in arch["overrides"].items()}
    meta = {
        "schema": SCHEMA,
        "lconvert": __version__,
        "arch": arch,
        "config": dict(model.config),
        "generation": dict(model.generation),
        "tokenizer": None if model.tokenizer is None else dataclasses.asdict(model.tokenizer),
        "name": model.name,
        "report": list(model.report),
        "entries": entries,
    }
    return meta, stored


# --- reading ---------------------------------------------------------------------------------------------


def _tuples(value: Any) -> Any:
    return tuple(_tuples(v) for v in value) if isinstance(value, list) else value


def _build(kind: type[Any], data: Any, where: str) -> Any:
    """A flat dataclass from its JSON form; unknown and missing fields are errors."""
    names = {f.name for f in dataclasses.fields(kind)}
    if not isinstance(data, dict) or set(data) - names:
        raise InputError(
            f"{where}: {kind.__name__} has unknown fields {sorted(set(data) - names) if data else data}"
        )
    try:
        return kind(**{k: _tuples(v) for k, v in data.items()})
    except TypeError as e:
        raise InputError(f"{where}: {e}") from None


def _layer(data: Any, where: str) -> Layer:
    try:
        attention, mlp = dict(data["attention"]), data["mlp"]
        rope = attention.pop("rope")
        built = _build(Attention, attention | {"rope": None}, where)
        built = dataclasses.replace(built, rope=None if rope is None else _build(Rope, rope, where))
        return Layer(built, _build(Moe if "experts" in mlp else Mlp, mlp, where), data["block"])
    except (KeyError, TypeError, ValueError) as e:
        raise InputError(f"{where}: a layer is incomplete ({e})") from None


def _arch(data: Any, where: str) -> Decoder:
    if not isinstance(data, dict) or "default" not in data:
        raise InputError(f"{where}: the traits are missing")
    own = dict(data)
    default = _layer(own.pop("default"), where)
    try:
        overrides = {int(i): _layer(layer, where) for i, layer in own.pop("overrides", {}).items()}
    except (AttributeError, ValueError):
        raise InputError(f"{where}: overrides must map layer numbers to layers") from None
    built = _build(Decoder, own | {"default": None}, where)
    assert isinstance(built, Decoder)
    return dataclasses.replace(built, default=default, overrides=overrides)


class _Reader:
    def __init__(self, where: str, file: safetensors.SafetensorsFile) -> None:
        self.where, self.file, self.left = where, file, set(file.tensors)

    def tensor(self, name: Any) -> Tensor:
        if not isinstance(name, str) or name not in self.file.tensors:
            raise InputError(f"{self.where}: names the tensor {name!r}, which {DATA} does not hold")
        self.left.discard(name)
        return safetensors.tensor(self.file, name)

    def node(self, data: Any, depth: int = 0) -> Tensor | QTensor:
        if not isinstance(data, dict) or depth > 4:
            raise InputError(f"{self.where}: an entry is not a tensor node")
        if "tensor" in data:
            return self.tensor(data["tensor"])
        try:
            grid = _build(Grid, data["grid"], self.where)
            shape, block = tuple(data["shape"]), tuple(data["block"])
            codes = self.tensor(data["codes"])
            scale = self.node(data["scale"], depth + 1)
        except (KeyError, TypeError) as e:
            raise InputError(f"{self.where}: a quantized entry is incomplete ({e})") from None
        sides = {k: self.node(data[k], depth + 1) for k in ("zero", "offset", "g_idx") if k in data}
        if data.get("packed") == 4:
            codes = _unpacked(codes, shape, signed=grid.kind == "int" and grid.signed)
        return QTensor(shape, codes, grid, block, scale, **sides)  # type: ignore[arg-type]


def _unpacked(stored: Tensor, shape: tuple[int, ...], signed: bool) -> Tensor:
    def read(start: int, stop: int) -> NDArray[Any]:
        x = stored.read(start, stop)
        out = np.empty((*x.shape[:-1], x.shape[-1] * 2), np.uint8)
        out[..., 0::2] = x & 15
        out[..., 1::2] = x >> 4
        return ((out ^ 8).view(np.int8) - np.int8(8)) if signed else out

    return Tensor(shape, "I8" if signed else "U8", read, stored.origin, stored.files)


def read(folder: Path) -> Model:
    """A Model from its folder. InputError for damage, UnsupportedError for another schema version."""
    path = folder / META
    try:
        meta = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as e:
        raise InputError(f"{path}: not readable as JSON ({e})") from None
    schema = meta.get("schema") if isinstance(meta, dict) else None
    if schema != SCHEMA:
        raise UnsupportedError(
            f"{path}: schema {schema!r}, this lconvert reads {SCHEMA!r}; use the version that wrote it "
            f"({meta.get('lconvert', 'unknown') if isinstance(meta, dict) else 'unknown'})"
        )
    reader = _Reader(str(path), safetensors.read_header(folder / DATA))
    entries = {}
    listed = meta.get("entries")
    if not isinstance(listed, dict):
        raise InputError(f"{path}: no entries")
    for name, node in listed.items():
        data = reader.node(node)
        entries[name] = Entry(name, data, provenance=_tuples(node.get("provenance", [])))
    if reader.left:
        raise InputError(f"{path}: {DATA} holds tensors that no entry uses: {sorted(reader.left)[:3]}")
    tokenizer = meta.get("tokenizer")
    return check(
        Model(
            arch=_arch(meta.get("arch"), str(path)),
            config=_mapping(meta, "config", path),
            entries=entries,
            tokenizer=None if tokenizer is None else _tokenizer(tokenizer, str(path)),
            generation=_mapping(meta, "generation", path),
            name=str(meta.get("name", folder.stem)),
            source=str(folder),
            report=_tuples(meta.get("report", [])),
        )
    )


def _mapping(meta: Mapping[str, Any], key: str, path: Path) -> dict[str, Any]:
    value = meta.get(key, {})
    if not isinstance(value, dict):
        raise InputError(f"{path}: {key} must be an object")
    return value


def _tokenizer(data: Any, where: str) -> Tokenizer:
    if not isinstance(data, dict):
        raise InputError(f"{where}: the tokenizer must be an object")
    special = {k: tuple(v) for k, v in data.get("special", {}).items()}
    plain = {k: v for k, v in data.items() if k != "special"}
    unknown = set(plain) - {f.name for f in dataclasses.fields(Tokenizer)}
    if unknown:
        raise InputError(f"{where}: the tokenizer has unknown fields {sorted(unknown)}")
    return Tokenizer(**plain, special=special)


def stored_rows(s: Stored) -> tuple[int, int]:
    """(rows, bytes per row) of a stored array; a scalar or vector is one row per element."""
    from lconvert.ir import DTYPE_SIZE

    rows = s.shape[0] if s.shape else 1
    size = DTYPE_SIZE[s.dtype]
    for d in s.shape[1:]:
        size *= d
    return rows, size


def names(stored: list[Stored]) -> Iterator[tuple[str, str, tuple[int, ...]]]:
    return ((s.name, s.dtype, s.shape) for s in stored)
