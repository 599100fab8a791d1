"""The IR as a folder: `model.lcir/` with lcir.json and tensors.safetensors. Written and read without loss.

lcir.json, schema "lcir/1":
  schema      "lcir/1"; another number is refused by name
  lconvert    version that wrote it
  arch        the Decoder's traits, field by field; `overrides` maps layer numbers to layers. An Encoder's have "kind": "encoder"
              beside them, a Convnet is its config.json (archs/convnet.py)
  config, tokenizer, generation, name, report    as in the Model
  entries     canonical name -> node
  node        {"tensor": NAME}                   a dense array, stored under NAME
              {"codes": NAME, "grid": {...}, "block": [...], "shape": [...], "scale": node,
               "zero": node?, "offset": node?, "g_idx": node?, "divisor": true?, "packed": 4?}    a QTensor
              an entry's node may also have "activation": spec and "transform": {"kind", "where", "param": node?}
  kv          {"k": spec, "v": spec, ...}?       the KV cache
  transforms  [{"kind", "where", "param": node?}]?    what was folded into the weights, in order
  spec        {"grid", "per", "dynamic", "group", "divisor", "scale": node?, "zero": node?}    an ActSpec
Codes of up to 4 bits are stored two to a byte, first code in the low half ("packed": 4), when rows are even.
Masks, outliers and low-rank parts are refused: no pass makes them yet.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import numpy as np
from numpy.typing import NDArray

from lconvert import __version__
from lconvert.archs import find
from lconvert.archs.common import F32_MAX, Keys, plausible
from lconvert.errors import InputError, UnsupportedError
from lconvert.formats import safetensors
from lconvert.formats.files import show
from lconvert.formats.json_object import read_object
from lconvert.formats.scheme import Stored
from lconvert.ir import (
    ActSpec,
    Attention,
    Convnet,
    Decoder,
    Encoder,
    Entry,
    Grid,
    KVSpec,
    Layer,
    Mlp,
    Model,
    Moe,
    QTensor,
    Rope,
    Tensor,
    Tokenizer,
    Traits,
    Transform,
    as_f32,
)
from lconvert.spec import check

SCHEMA = "lcir/1"
META, DATA = "lcir.json", "tensors.safetensors"
_LIMIT = 512 << 20  # bytes of lcir.json, which holds the tokenizer
_CODE_DTYPES = ("I8", "U8", "I16", "U16", "I32", "U32")


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


def _node(name: str, data: Tensor | QTensor, out: dict[str, Stored]) -> dict[str, Any]:
    if isinstance(data, Tensor):
        out[name] = Stored(data.dtype, data.shape, data.read)
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
        out[node["codes"]] = Stored("U8", shape, _packed(data.codes))
    else:
        out[node["codes"]] = Stored(data.codes.dtype, data.shape, data.codes.read)
    for side in ("scale", "zero", "offset", "g_idx"):
        value = getattr(data, side)
        if value is not None:
            node[side] = _node(f"{name}.{side}", value, out)
    return node | ({"divisor": True} if data.divisor else {})


def _spec(name: str, spec: ActSpec, out: dict[str, Stored]) -> dict[str, Any]:
    node: dict[str, Any] = {
        "grid": dataclasses.asdict(spec.grid),
        "per": spec.per,
        "dynamic": spec.dynamic,
        "group": spec.group,
        "divisor": spec.divisor,
    }
    for side in ("scale", "zero"):
        if (value := getattr(spec, side)) is not None:
            node[side] = _node(f"{name}.{side}", value, out)
    return node


def _extras(entry: Entry, out: dict[str, Stored]) -> dict[str, Any]:
    """What an entry has besides its numbers: how its input is quantized, and what is done to it first."""
    node: dict[str, Any] = {}
    if entry.activation is not None:
        node["activation"] = _spec(f"{entry.name}.activation", entry.activation, out)
    if (t := entry.transform) is not None:
        node["transform"] = _transform(f"{entry.name}.transform", t, out)
    return node


def _transform(name: str, t: Transform, out: dict[str, Stored]) -> dict[str, Any]:
    param = {} if t.param is None else {"param": _node(name, t.param, out)}
    return {"kind": t.kind, "where": t.where} | param


def _described(traits: Traits) -> dict[str, Any]:
    if isinstance(traits, Convnet):
        return find(traits.family).config(traits)
    out = dataclasses.asdict(traits)
    if isinstance(traits, Encoder):
        return {"kind": "encoder", **out}
    return out | {"overrides": {str(i): o for i, o in out["overrides"].items()}}


def describe_entries(entries: Mapping[str, Entry]) -> tuple[dict[str, Any], dict[str, Stored]]:
    """Nodes of entries by canonical name, and the arrays to store by name, in order."""
    stored: dict[str, Stored] = {}
    nodes: dict[str, Any] = {}
    for name, entry in entries.items():
        nodes[name] = _node(name, entry.data, stored) | _extras(entry, stored)
        nodes[name]["provenance"] = list(entry.provenance)
    return nodes, stored


def describe(model: Model) -> tuple[dict[str, Any], dict[str, Stored]]:
    """lcir.json's content and the arrays to store by name, in order."""
    if any(not t.folded for t in model.transforms):
        raise UnsupportedError(f"unfolded transforms of the whole model cannot be stored in {SCHEMA}")
    entries, stored = describe_entries(model.entries)
    kv = None
    if (c := model.kv) is not None:
        kv = {
            "k": _spec("kv.k", c.k, stored),
            "v": _spec("kv.v", c.v, stored),
            "residual_window": c.residual_window,
        }
        kv |= {"sinks": c.sinks, "pre_rope": c.pre_rope}
    arch = _described(model.arch)
    meta: dict[str, Any] = {
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
    if kv is not None:
        meta["kv"] = kv
    if model.transforms:
        numbered = enumerate(model.transforms)
        meta["transforms"] = [_transform(f"transforms.{i}", t, stored) for i, t in numbered]
    return meta, stored


# --- reading ---------------------------------------------------------------------------------------------


def _tuples(value: Any) -> Any:
    return tuple(_tuples(v) for v in value) if isinstance(value, list) else value


def _fits(value: Any, hint: Any) -> bool:
    """Whether a value from JSON (lists as tuples) is what a field's type says."""
    origin, args = get_origin(hint), get_args(hint)
    if origin is Literal:
        return isinstance(value, str) and value in args
    if origin in (Union, UnionType):
        return any(_fits(value, a) for a in args)
    if origin is tuple:
        return isinstance(value, tuple) and all(_fits(v, args[0]) for v in value)
    if origin is Mapping:
        if not isinstance(value, dict):
            return False
        return args[1] is Any or all(_fits(v, args[1]) for v in value.values())
    if hint is float:
        return type(value) in (int, float) and abs(value) <= F32_MAX
    if hint is int:
        return type(value) is int and abs(value) < 1 << 31
    return isinstance(value, hint)


def _build(kind: type[Any], data: Any, where: str, **ready: Any) -> Any:
    """A dataclass from its JSON form; `ready` fields are given as objects. Every field has its declared type."""
    if not isinstance(data, dict):
        raise InputError(f"{where}: {kind.__name__} is {show(data)}, expected an object")
    hints = get_type_hints(kind)
    fields = {k: _tuples(v) for k, v in data.items() if k not in ready}
    if unknown := sorted(fields.keys() - hints.keys()):
        raise InputError(f"{where}: {kind.__name__} has unknown fields {show(unknown)}")
    for name, value in fields.items():
        if not _fits(value, hints[name]):
            raise InputError(f"{where}: {kind.__name__}.{name} is {show(value)}, which is not of its type")
    try:
        return kind(**fields, **ready)
    except TypeError as e:
        raise InputError(f"{where}: {e}") from None


def _layer(data: Any, where: str) -> Layer:
    if not isinstance(data, dict) or not all(isinstance(data.get(k), dict) for k in ("attention", "mlp")):
        raise InputError(f"{where}: a layer is incomplete: it needs attention and mlp")
    attention, mlp = data["attention"], data["mlp"]
    rope = None if attention.get("rope") is None else _build(Rope, attention["rope"], where)
    built = _build(Attention, attention, where, rope=rope)
    layer = _build(
        Layer, data, where, attention=built, mlp=_build(Moe if "experts" in mlp else Mlp, mlp, where)
    )
    assert isinstance(layer, Layer)
    return layer


def _arch(data: Any, where: str) -> Traits:
    if isinstance(data, dict) and data.get("model_type") == "convnet":
        keys = Keys(data, f"{where}: arch")
        made = find("convnet").traits(keys)
        keys.finish()
        return made
    if not isinstance(data, dict) or "default" not in data:
        raise InputError(f"{where}: the traits are missing")
    if data.get("kind") == "encoder":
        given = {k: v for k, v in data.items() if k != "kind"}
        encoder = _build(Encoder, given, where, default=_layer(data["default"], where))
        assert isinstance(encoder, Encoder)
        return encoder
    listed = data.get("overrides", {})
    if not isinstance(listed, dict) or not all(i.isdecimal() and len(i) < 10 for i in listed):
        raise InputError(f"{where}: overrides must map layer numbers to layers")
    overrides = {int(i): _layer(layer, where) for i, layer in listed.items()}
    built = _build(Decoder, data, where, default=_layer(data["default"], where), overrides=overrides)
    assert isinstance(built, Decoder)
    return built


class _Reader:
    def __init__(
        self, where: str, file: safetensors.SafetensorsFile, change: Callable[[Tensor], Tensor] = lambda t: t
    ) -> None:
        self.where, self.file, self.left, self.change = where, file, set(file.tensors), change

    def tensor(self, name: Any) -> Tensor:
        if not isinstance(name, str) or name not in self.file.tensors:
            raise InputError(f"{self.where}: names the tensor {name!r}, which {DATA} does not hold")
        self.left.discard(name)
        return self.change(safetensors.tensor(self.file, name))

    def node(self, data: Any, depth: int = 0) -> Tensor | QTensor:
        if not isinstance(data, dict) or depth > 4:
            raise InputError(f"{self.where}: an entry is not a tensor node")
        if "tensor" in data:
            return self.tensor(data["tensor"])
        for key in ("grid", "shape", "block", "codes", "scale"):
            if key not in data:
                raise InputError(f"{self.where}: a quantized entry is incomplete: it has no {key}")
        grid = self.grid(data["grid"])
        shape, block = self.sizes(data["shape"]), self.sizes(data["block"])
        codes = self.tensor(data["codes"])
        scale = self.node(data["scale"], depth + 1)
        scale = _finite(scale) if isinstance(scale, Tensor) else scale
        sides = {k: self.node(data[k], depth + 1) for k in ("zero", "offset", "g_idx") if k in data}
        for k in ("zero", "g_idx"):
            if isinstance(sides.get(k), QTensor):
                raise InputError(f"{self.where}: {k} of a quantized entry is quantized itself")
        if data.get("packed") == 4:
            if codes.dtype != "U8" or not shape or (*shape[:-1], shape[-1] / 2) != codes.shape:
                raise InputError(f"{self.where}: packed codes {codes.shape} do not unpack to {shape}")
            codes = _unpacked(codes, shape, signed=grid.kind == "int" and grid.signed)
        elif codes.dtype not in _CODE_DTYPES:
            raise InputError(f"{self.where}: codes are stored as {codes.dtype}, expected integers")
        if isinstance(g_idx := sides.get("g_idx"), Tensor):
            groups = g_idx.load()
            if groups.dtype.kind not in "iu" or not scale.shape or groups.min(initial=0) < 0:
                raise InputError(f"{self.where}: {g_idx.origin} does not number groups")
            if groups.max(initial=0) >= scale.shape[-1]:
                raise InputError(
                    f"{self.where}: {g_idx.origin} names group {groups.max()} of {scale.shape[-1]}"
                )
        divisor = data.get("divisor") is True
        return QTensor(shape, _checked(codes, grid), grid, block, scale, divisor=divisor, **sides)  # type: ignore[arg-type]

    def plain(self, data: Any) -> Tensor:
        found = self.node(data)
        if not isinstance(found, Tensor) or found.dtype[0] not in "FBIU":
            raise InputError(f"{self.where}: {show(data)} is not a plain tensor of numbers")
        return found

    def spec(self, data: Any) -> ActSpec:
        """An ActSpec from its node."""
        sides = {k: self.plain(data[k]) for k in ("scale", "zero") if isinstance(data, dict) and k in data}
        given = {k: v for k, v in data.items() if k not in sides} if isinstance(data, dict) else data
        grid = self.grid(given.get("grid") if isinstance(given, dict) else None)
        spec = _build(ActSpec, given, self.where, grid=grid, **sides)
        assert isinstance(spec, ActSpec)
        return spec

    def transform(self, data: Any, *, folded: bool) -> Transform:
        """A transform; whether it is folded is said by where it stands, never by itself."""
        param = {"param": self.plain(data["param"])} if isinstance(data, dict) and "param" in data else {}
        if isinstance(data, dict) and "folded" in data:
            raise InputError(
                f"{self.where}: a stored transform never says whether it is folded, but one does"
            )
        made = _build(Transform, data, self.where, folded=folded, **param)
        assert isinstance(made, Transform)
        return made

    def kv(self, data: Any) -> KVSpec:
        if not isinstance(data, dict):
            raise InputError(f"{self.where}: kv is {show(data)}, expected an object")
        made = _build(KVSpec, data, self.where, k=self.spec(data.get("k")), v=self.spec(data.get("v")))
        assert isinstance(made, KVSpec)
        return made

    def sizes(self, data: Any) -> tuple[int, ...]:
        value = _tuples(data)
        if not _fits(value, tuple[int, ...]):
            raise InputError(f"{self.where}: {show(data)} is not a list of sizes")
        return tuple(value)

    def grid(self, data: Any) -> Grid:
        grid = _build(Grid, data, self.where)
        assert isinstance(grid, Grid)
        parts = (int(grid.signed), grid.exponent, grid.mantissa)
        whole = min(parts) >= 0 and 0 < grid.exponent <= 8 and sum(parts) == grid.bits
        if not 1 <= grid.bits <= 16 or (grid.kind == "float" and not whole):
            raise InputError(f"{self.where}: {show(data)} is not a grid")
        return grid


def _checked(codes: Tensor, grid: Grid) -> Tensor:
    """The codes; a slab with one that the grid does not have is an InputError."""
    low, high = 0, (len(grid.values) if grid.kind == "codebook" else 1 << grid.bits) - 1
    if grid.kind == "int" and grid.signed:
        low, high = -(1 << (grid.bits - 1)), (1 << (grid.bits - 1)) - 1

    def read(start: int, stop: int) -> NDArray[Any]:
        x = codes.read(start, stop)
        if x.size and not low <= int(x.min()) <= int(x.max()) <= high:
            raise InputError(f"{codes.origin}: holds codes outside {low}..{high}, the range of its grid")
        return x

    return dataclasses.replace(codes, read=read)


def _finite(scale: Tensor) -> Tensor:
    """The scales; a slab with NaN or infinity is an InputError."""
    if scale.dtype[0] not in "FB":
        return scale

    def read(start: int, stop: int) -> NDArray[Any]:
        x = scale.read(start, stop)
        if not np.isfinite(as_f32(x, scale.dtype)).all():
            raise InputError(f"{scale.origin}: holds NaN or infinite scales in rows {start}..{stop}")
        return x

    return dataclasses.replace(scale, read=read)


def _unpacked(stored: Tensor, shape: tuple[int, ...], signed: bool) -> Tensor:
    def read(start: int, stop: int) -> NDArray[Any]:
        x = stored.read(start, stop)
        out = np.empty((*x.shape[:-1], x.shape[-1] * 2), np.uint8)
        out[..., 0::2] = x & 15
        out[..., 1::2] = x >> 4
        return ((out ^ 8).view(np.int8) - np.int8(8)) if signed else out

    return Tensor(shape, "I8" if signed else "U8", read, stored.origin, stored.files)


def _entries(reader: _Reader, listed: Any, path: Path) -> dict[str, Entry]:
    if not isinstance(listed, dict):
        raise InputError(f"{path}: no entries")
    entries = {}
    for name, node in listed.items():
        data = reader.node(node)
        spec = reader.spec(node["activation"]) if "activation" in node else None
        transform = reader.transform(node["transform"], folded=False) if "transform" in node else None
        entries[name] = Entry(name, data, spec, transform, _texts(node, "provenance", path))
    return entries


def restore_entries(
    nodes: Any, file: safetensors.SafetensorsFile, change: Callable[[Tensor], Tensor]
) -> dict[str, Entry]:
    """Entries, lazily, from the nodes of `describe_entries` and the file that holds their arrays; `change` gets every one of these."""
    return _entries(_Reader(str(file.path), file, change), nodes, file.path)


def read(folder: Path) -> Model:
    """A Model from its folder. InputError for damage, UnsupportedError for another schema version."""
    path = folder / META
    meta = read_object(path, _LIMIT)
    if (schema := meta.get("schema")) != SCHEMA:
        raise UnsupportedError(
            f"{path}: schema {show(schema)}, this lconvert reads {SCHEMA!r}; use the version that wrote it "
            f"({show(meta.get('lconvert', 'unknown'))})"
        )
    reader = _Reader(str(path), safetensors.read_header(folder / DATA))
    entries = _entries(reader, meta.get("entries"), path)
    kv = reader.kv(meta["kv"]) if meta.get("kv") is not None else None
    listed = meta.get("transforms", [])
    if not isinstance(listed, list):
        raise InputError(f"{path}: transforms is {show(listed)}, expected a list")
    transforms = tuple(reader.transform(t, folded=True) for t in listed)
    if reader.left:
        raise InputError(f"{path}: {DATA} holds tensors that no entry uses: {sorted(reader.left)[:3]}")
    tokenizer = meta.get("tokenizer")
    arch = plausible(_arch(meta.get("arch"), str(path)), str(path), layers=len(entries), experts=len(entries))
    return check(
        Model(
            arch=arch,
            config=_mapping(meta, "config", path),
            entries=entries,
            tokenizer=None if tokenizer is None else _tokenizer(tokenizer, str(path)),
            transforms=transforms,
            generation=_mapping(meta, "generation", path),
            name=str(meta.get("name", folder.stem)),
            source=str(folder),
            report=_texts(meta, "report", path),
            kv=kv,
        )
    )


def _mapping(meta: Mapping[str, Any], key: str, path: Path) -> dict[str, Any]:
    value = meta.get(key, {})
    if not isinstance(value, dict):
        raise InputError(f"{path}: {key} must be an object")
    return value


def _texts(data: Mapping[str, Any], key: str, path: Path) -> tuple[str, ...]:
    value = _tuples(data.get(key, []))
    if not _fits(value, tuple[str, ...]):
        raise InputError(f"{path}: {key} must be a list of texts")
    return tuple(value)


def _tokenizer(data: Any, where: str) -> Tokenizer:
    if not isinstance(data, dict):
        raise InputError(f"{where}: the tokenizer must be an object")
    special = data.get("special", {})
    ids = {k: _tuples(v) for k, v in special.items()} if isinstance(special, dict) else special
    hints = get_type_hints(Tokenizer)
    given = data | {"special": ids}
    wrong = [k for k, v in given.items() if k not in hints or not _fits(v, hints[k])]
    if wrong or "json" not in data:
        raise InputError(f"{where}: the tokenizer's fields {show(wrong)} are unknown or not of their type")
    return Tokenizer(**given)


def stored_rows(s: Stored) -> tuple[int, int]:
    """(rows, bytes per row) of a stored array; a scalar or vector is one row per element."""
    from lconvert.ir import DTYPE_SIZE

    rows = s.shape[0] if s.shape else 1
    size = DTYPE_SIZE[s.dtype]
    for d in s.shape[1:]:
        size *= d
    return rows, size


def names(stored: Mapping[str, Stored]) -> Iterator[tuple[str, str, tuple[int, ...]]]:
    return ((name, s.dtype, s.shape) for name, s in stored.items())
