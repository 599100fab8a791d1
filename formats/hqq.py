"""HQQ checkpoints as transformers 4 saved them: the state of hqq's `HQQLinear` under the name of every linear module.

W (N, K) flattened and cut into groups of g (hqq core/quantize.py `Quantizer.quantize`, `dequantize`): with axis 1 a group is g
neighbours, a row of the grouped matrix (N * K / g, g); with axis 0 a column of (g, N * K / g), so that a group holds every
(N * K / g)-th value. A value is (code - zero) * scale, where zero is any number.

    W_q           the grouped matrix, rows packed as `_PACKINGS` says: with R rows and p codes to a word, word row i holds the
                  rows i, i + R/p, i + 2R/p ..., the first in the highest bits (core/bitpack.py); 3 bits leave 2 of 32 unused
    scale, zero   one per group in the compute dtype, (N * K / g, 1) with axis 1, (1, N * K / g) with axis 0
    nbits, group_size, axis I32 (), shape I64 (2,), packing and dtypes as texts of bytes, flags U8 ()

The groups of axis 0 run across rows, which no block of the IR does: there every weight gets a scale and zero of its own, read
from the stored ones on demand. Exact, but a target in small groups would store them all.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import gcd
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lconvert.errors import InputError, UnsupportedError
from lconvert.formats.config_values import name_list, names_module, refuse_unknown
from lconvert.formats.files import show
from lconvert.formats.flat_blocks import spread
from lconvert.formats.scheme import Checkpoint, Part, Weight, finite_scales, listed, take, view
from lconvert.ir import KVSpec, QTensor, Tensor, as_f32, int_grid

FLOATS = ("F32", "F16", "BF16")


@dataclass(frozen=True)
class Packing:
    """dtype of the words, bits of a code, codes to a word."""

    dtype: str
    bits: int
    count: int


_PACKINGS: Mapping[str, Packing] = {
    "8bit_u8": Packing("U8", 8, 1),
    "4bit_u8": Packing("U8", 4, 2),
    "3bit_32": Packing("I32", 3, 10),
    "2bit_u8": Packing("U8", 2, 4),
    "1bit_u8": Packing("U8", 1, 8),
}
_OF_BITS = {8: "8bit_u8", 6: "8bit_u8", 5: "8bit_u8", 4: "4bit_u8", 3: "3bit_32", 2: "2bit_u8", 1: "1bit_u8"}
#: Tensors of a module that say how, and not what: numbers, texts and flags that the codes do not depend on.
_INERT = (
    "compute_dtype",
    "unpack_view_dtype",
    "encoded_state_dict",
    "stores_quant_config",
    "optimize",
    "round_zero",
)
_USED = frozenset({"W_q", "scale", "zero", "nbits", "group_size", "axis", "shape", "packing", "channel_wise"})
#: Flags that must be off, and what they would mean.
_FLAGS: Mapping[str, str] = {
    "view_as_float": "the codes are stored under the name of a float type",
    "quant_scale": "the scales are quantized themselves",
    "quant_zero": "the zero points are quantized themselves",
    "offload_meta": "scales and zero points are stored as one tensor",
}
_KEYS = {"quant_method", "quant_config", "dynamic_config", "skip_modules"}
_COMPARED = ("nbits", "group_size", "axis")
_TEXT_LIMIT = 64


def parse(checkpoint: Checkpoint) -> Hqq:
    """The scheme of a `quant_method: hqq`; transformers' HqqConfig names the keys."""
    config, where = checkpoint.config, checkpoint.where
    refuse_unknown(config, _KEYS, f"{where}: quantization_config", "HQQ's are")
    skipped = name_list(config.get("skip_modules") or [], "skip_modules", where)
    stated = config.get("quant_config") or {}
    if not isinstance(stated, dict):
        raise InputError(f"{where}: quant_config is {show(stated)}, expected an object")
    listed = {"": stated} if "weight_quant_params" in stated else stated
    rules = {tag: _params(tag, listed[tag], where) for tag in listed}
    return Hqq(where, rules, skipped)


def _params(tag: str, value: Any, where: str) -> Mapping[str, Any]:
    """The numbers that a quant_config states for the modules whose names end in `tag`."""
    at = f"{where}: quant_config{f' of {show(tag)}' if tag else ''}"
    params = value.get("weight_quant_params") if isinstance(value, dict) else None
    if not isinstance(params, dict):
        raise InputError(f"{at}: weight_quant_params is {show(params)}, expected an object")
    for key in ("scale_quant_params", "zero_quant_params"):
        if value.get(key) is not None:
            raise UnsupportedError(
                f"{at}: {key} quantizes scales or zero points; quantize the model without it"
            )
    for key in _COMPARED:
        found = params.get(key)
        if found is not None and (type(found) not in (int, float) or not 0 <= found < 1 << 31):
            raise InputError(f"{at}: {key} is {show(found)}, expected a number")
    return {k: params[k] for k in _COMPARED if params.get(k) is not None}


@dataclass(frozen=True)
class Hqq:
    """The scheme. rules: what config.json states, by the end of a module's name."""

    where: str
    rules: Mapping[str, Mapping[str, Any]]
    skipped: tuple[str, ...] = ()
    kv: KVSpec | None = None

    @property
    def method(self) -> str:
        found = sorted({f"{r.get('nbits')} bit, group {r.get('group_size')}" for r in self.rules.values()})
        return f"hqq {' and '.join(found[:3])}".strip()

    @property
    def report(self) -> tuple[str, ...]:
        if all(r.get("axis") == 1 for r in self.rules.values()):
            return ()
        return (
            "HQQ's groups of axis 0 run across rows: every weight of such a module has a scale of its own",
        )

    def weight(self, module: str, parts: Mapping[str, Part], shape: tuple[int, ...]) -> Weight | None:
        if "W_q" not in parts:
            if parts.keys() == {"weight"} and parts["weight"].dtype in (*FLOATS, "F64"):
                return None
            raise InputError(
                f"{module}: the tensor W_q is missing, there are {listed(parts)}; download it again"
            )
        if any(names_module(n, module) for n in self.skipped):
            raise InputError(
                f"{module}: is stored quantized, but {self.where} has it among skip_modules; correct the list"
            )
        if len(shape) != 2:
            raise UnsupportedError(f"{module}: HQQ weights of shape {shape} are not a matrix")
        return _raised(module, parts, (shape[0], shape[1]), self._stated(module), self.where)

    def _stated(self, module: str) -> Mapping[str, Any]:
        return next((r for tag, r in self.rules.items() if not tag or names_module(tag, module)), {})


def _raised(
    module: str, parts: Mapping[str, Part], shape: tuple[int, int], stated: Mapping[str, Any], where: str
) -> Weight:
    n, k = shape
    for name, meaning in _FLAGS.items():
        if name in parts and _number(module, parts, name, "U8"):
            raise UnsupportedError(f"{parts[name].where}: is set: {meaning}; save the model without it")
    if "channel_wise" in parts and not _number(module, parts, "channel_wise", "U8"):
        raise UnsupportedError(
            f"{parts['channel_wise'].where}: is off: one scale for the whole matrix; quantize by channel"
        )
    bits, group, axis = (_number(module, parts, name, "I32") for name in _COMPARED)
    found = {"nbits": bits, "group_size": group, "axis": axis}
    for key, value in stated.items():
        if found[key] != value:
            raise InputError(
                f"{parts[key].where}: is {found[key]}, but {where} has {key} {show(value)}; config.json and the weights do not "
                "belong together"
            )
    if bits not in _OF_BITS or axis not in (0, 1):
        raise UnsupportedError(
            f"{module}: HQQ of {bits} bits along axis {axis}; known are 1 to 6 and 8 bits, axis 0 and 1"
        )
    if group <= 0 or n * k % group:
        raise InputError(
            f"{module}: {n} x {k} weights do not divide into groups of {group}; the file is damaged"
        )
    if (packing := _text(module, parts, "packing")) != _OF_BITS[bits]:
        raise InputError(
            f"{parts['packing'].where}: is {show(packing)}, but {bits} bits are packed as {_OF_BITS[bits]}; download it again"
        )
    own = take(module, parts, "shape", ("I64",), (2,)).data.load().tolist()
    if own != [n, k]:
        raise InputError(
            f"{parts['shape'].where}: is {own}, but config.json implies {[n, k]}; they do not belong together"
        )
    count = n * k // group
    codes = _codes(module, parts, shape, (group, count) if axis == 0 else (count, group), bits)
    sides = []
    for name in ("scale", "zero"):
        part = take(module, parts, name, FLOATS, (1, count) if axis == 0 else (count, 1))
        flat = view(part.data, (count,), part.dtype, _flat_read(part.data))
        flat = finite_scales(flat) if name == "scale" else _finite(flat)
        sides.append(_strided(flat, shape) if axis == 0 else spread(flat, n, k, group))
    block = (1, 1) if axis == 0 else (1, gcd(k, group))
    q = QTensor(shape, codes, int_grid(bits, False), block, sides[0], zero=sides[1])
    return Weight(q, _USED & parts.keys(), inert=frozenset({*_INERT, *_FLAGS} & parts.keys()))


def _number(module: str, parts: Mapping[str, Part], name: str, dtype: str) -> int:
    return int(take(module, parts, name, (dtype,), ()).data.load())


def _text(module: str, parts: Mapping[str, Part], name: str) -> str:
    part = take(module, parts, name, ("U8",), (-1,))
    if part.shape[0] > _TEXT_LIMIT:
        raise InputError(
            f"{part.where}: a text of {part.shape[0]} bytes, {_TEXT_LIMIT} is the most; download the file again"
        )
    return part.data.load().tobytes().decode("latin-1")


def _codes(
    module: str, parts: Mapping[str, Part], shape: tuple[int, int], grouped: tuple[int, int], bits: int
) -> Tensor:
    """Codes of the (n, k) weight out of the packed rows of the grouped matrix."""
    p = _PACKINGS[_OF_BITS[bits]]
    (n, k), (rows, width) = shape, grouped
    if rows % p.count and bits != 3:
        raise InputError(
            f"{module}: {rows} grouped rows do not pack {p.count} to a word; the file is damaged"
        )
    step = -(-rows // p.count)
    words = take(module, parts, "W_q", (p.dtype,), (step, width))

    def read(start: int, stop: int) -> NDArray[Any]:
        first, last = start * k // width, -(-stop * k // width)
        out = np.empty((max(last - first, 0), width), np.uint8)
        for i in range(p.count):
            a, b = max(first, i * step), min(last, (i + 1) * step, rows)
            if a < b:
                found = words.data.read(a - i * step, b - i * step) >> (p.bits * (p.count - 1 - i))
                out[a - first : b - first] = found & ((1 << p.bits) - 1)
        if bits < p.bits and out.size and int(out.max()) >> bits:
            raise InputError(
                f"{words.where}: holds the code {int(out.max())}, which is no {bits}-bit number; download it again"
            )
        return out.reshape(-1)[start * k - first * width :][: (stop - start) * k].reshape(stop - start, k)

    return view(words.data, (n, k), "U8", read)


def _flat_read(t: Tensor) -> Callable[[int, int], NDArray[Any]]:
    """Elements of a matrix of one row or one column."""
    if t.shape[0] == 1:
        return lambda a, b: t.load().reshape(-1)[a:b]
    return lambda a, b: t.read(a, b).reshape(-1)


def _finite(t: Tensor) -> Tensor:
    def read(start: int, stop: int) -> NDArray[Any]:
        found = t.read(start, stop)
        if not np.isfinite(as_f32(found, t.dtype)).all():
            raise InputError(f"{t.origin}: holds zero points that are not finite; download the file again")
        return found

    return view(t, t.shape, t.dtype, read)


def _strided(side: Tensor, shape: tuple[int, int]) -> Tensor:
    """The value of every weight where element i of the flattened weight belongs to group i mod (number of groups)."""
    k, count = shape[1], side.shape[0]

    def read(start: int, stop: int) -> NDArray[Any]:
        at = np.arange(start * k, stop * k, dtype=np.int64) % count
        found: NDArray[Any] = side.load()[at].reshape(stop - start, k)
        return found

    return view(side, shape, side.dtype, read)
