"""A second decoding of quantized folders, bit by bit in NumPy: neither the readers of `formats` nor the kernels have a part in it.

Files are opened by the safetensors package, bits taken apart one by one, numbers put together in fp32 in the order of the IR
(scales first, innermost level first, then (code - zero) * scale). It is lconvert's all the same: what both
readings misunderstand alike, they do not show. Layouts: the producers' and consumers' files that the modules of `formats` name.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lconvert.ir import as_f32

Array = NDArray[Any]
Floats = NDArray[np.float32]
#: Tensors of one module by suffix, each with its safetensors type; 8-bit floats as bytes, BF16 as bits.
Parts = Mapping[str, tuple[str, Array]]
Config = Mapping[str, Any]

_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
_TYPES = {
    "F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2", "I64": "<i8", "I32": "<i4", "I16": "<i2", "I8": "i1", "U8": "u1",
    "F8_E4M3": "u1", "F8_E8M0": "u1", "U16": "<u2", "U32": "<u4", "BOOL": "?",
}  # fmt: skip


def read(folder: Path) -> dict[str, dict[str, tuple[str, Array]]]:
    """Every stored tensor as module -> suffix -> (type, array): the container taken apart by hand, without any package."""
    out: dict[str, dict[str, tuple[str, Array]]] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(size))
        body = np.memmap(path, np.uint8, "r", offset=8 + size)
        for name, info in header.items():
            if name == "__metadata__":
                continue
            first, last = info["data_offsets"]
            module, _, suffix = name.rpartition(".")
            if module.endswith(".weight"):  # bitsandbytes: MODULE.weight.absmax
                module = module.removesuffix(".weight")
            elif ".weight.quant_state." in name:
                module, _, suffix = name.partition(".weight.")
            if info["dtype"] in _TYPES:
                data = np.asarray(body[first:last]).view(_TYPES[info["dtype"]]).reshape(info["shape"])
                out.setdefault(module, {})[suffix] = (info["dtype"], data)
    return out


def modules(folder: Path, config: Config) -> Iterator[tuple[str, Floats | None]]:
    """Every module that holds codes, with its matrix (out, in) in fp32; None where this decoder does not know its layout."""
    decode = _DECODERS.get(str(config.get("quant_method")))
    for module, parts in read(folder).items():
        if _quantized(parts):
            try:
                yield module, None if decode is None else decode(parts, config)
            except _Unknown:
                yield module, None


class _Unknown(Exception):
    """A layout that is not decoded here."""


_CODES = ("qweight", "weight_packed")


def _quantized(parts: Parts) -> bool:
    if any(name in parts for name in _CODES):
        return True
    return "weight" in parts and parts["weight"][0] in ("I8", "U8", "F8_E4M3")


# --- bits ----------------------------------------------------------------------------------------------------


def _bits(words: Array, axis: int) -> NDArray[np.uint8]:
    """Every bit of 8- or 32-bit words along an axis, lowest first."""
    moved = np.ascontiguousarray(np.moveaxis(words, axis, -1))
    flat = np.unpackbits(moved.view(np.uint8), axis=-1, bitorder="little")
    return np.moveaxis(flat, -1, axis)


def _numbers(bits: NDArray[np.uint8], width: int, axis: int) -> NDArray[np.int64]:
    """Consecutive groups of `width` bits as integers."""
    moved = np.moveaxis(bits, axis, -1)
    count = moved.shape[-1] // width
    grouped = moved[..., : count * width].reshape(*moved.shape[:-1], count, width).astype(np.int64)
    return np.moveaxis((grouped << np.arange(width)).sum(-1), -1, axis)


def _codes(words: Array, width: int, axis: int, count: int) -> NDArray[np.int64]:
    """Codes of `width` bits along an axis; words that hold 32 // width codes each where that is what their number says."""
    n, per = words.shape[axis], 32 // width
    padded = words.dtype.itemsize == 4 and n == -(-count // per) and n != -(-count * width // 32)
    if padded:  # the last bits of every word are unused
        moved = np.moveaxis(words, axis, -1)
        each = _numbers(_bits(moved[..., None], -1)[..., : per * width], width, -1)
        return np.moveaxis(each.reshape(*moved.shape[:-1], -1)[..., :count], -1, axis)
    return np.take(_numbers(_bits(words, axis), width, axis), np.arange(count), axis=axis)


def floats(part: tuple[str, Array]) -> Floats:
    """A stored tensor of any float type, with its type, in fp32."""
    type_, data = part
    if type_ == "F8_E4M3":
        return _e4m3(data)
    if type_ in ("F8_E8M0", "U8"):
        return np.ldexp(np.float32(1), data.astype(np.int32) - 127).astype(np.float32)
    return np.asarray(as_f32(data, type_), np.float32)


def _e4m3(codes: Array) -> Floats:
    c = codes.astype(np.int32)
    exponent, mantissa = (c >> 3) & 15, c & 7
    size = np.where(
        exponent > 0, np.ldexp(1 + mantissa / 8, exponent - 7), np.ldexp(mantissa / 8, np.full_like(c, -6))
    )
    size = np.where((c & 127) == 127, np.nan, size)
    return np.asarray(np.where(c & 128, -size, size), np.float32)


def _e2m1(nibbles: Array) -> Floats:
    size = np.array(_E2M1, np.float32)[nibbles & 7]
    return np.asarray(np.where(nibbles & 8, -size, size), np.float32)


def _spread(side: Array, shape: tuple[int, ...], block: tuple[int, int] = (128, 128)) -> Array:
    """One value per tensor, row, group or block repeated over a matrix; blocks are cut off at its ends."""
    flat: Any = side if side.ndim == 2 and side.size > 1 else side.reshape(-1, 1)
    side, (rows, cols), (high, wide) = flat, shape, flat.shape
    if high in (1, rows) and wide in (1, cols):
        return side
    if high == rows:
        return side[:, np.arange(cols) // -(-cols // wide)]
    return side[np.arange(rows)[:, None] // block[0], np.arange(cols)[None] // block[1]]


def _blocks(config: Config) -> tuple[int, int]:
    """The shape of 2-D blocks that a config names, 128 x 128 by default."""
    groups = (config.get("config_groups") or {}).values()
    named = [(g.get("weights") or {}).get("block_structure") for g in groups]
    found = next((b for b in (config.get("weight_block_size"), *named) if b), (128, 128))
    return int(found[0]), int(found[1])


# --- methods -------------------------------------------------------------------------------------------------


def _gptq(parts: Parts, config: Config) -> Floats:
    layout = str(config.get("checkpoint_format") or config.get("format") or "gptq")
    if layout not in ("gptq", "gptq_v2"):
        raise _Unknown
    words, scales = parts["qweight"][1], floats(parts["scales"])
    k = parts["g_idx"][1].size if "g_idx" in parts else None
    groups, n = scales.shape
    if k is None:
        k = 32 * words.shape[0] // int(config["bits"])
    width = 32 * words.shape[0] // k
    if 32 * words.shape[0] != width * k:
        raise _Unknown
    codes = _codes(words, width, 0, k)
    zeros = _codes(parts["qzeros"][1], width, 1, n)
    zeros = zeros if layout == "gptq_v2" else (zeros + 1) & ((1 << width) - 1)
    group = parts["g_idx"][1] if "g_idx" in parts else np.arange(k) // (k // groups)
    codes, zeros = codes.astype(np.float32), zeros.astype(np.float32)
    return np.ascontiguousarray(((codes - zeros[group]) * scales[group]).T)


def _awq(parts: Parts, config: Config) -> Floats:
    if str(config.get("version") or config.get("checkpoint_format") or "gemm").lower() != "gemm":
        raise _Unknown
    scales = floats(parts["scales"])
    groups, n = scales.shape

    def ordered(words: Array) -> Floats:
        nibbles = _codes(words, 4, 1, n).reshape(words.shape[0], -1, 8)
        out = np.empty_like(nibbles)
        out[..., list(_AWQ_ORDER)] = nibbles
        return out.reshape(words.shape[0], -1).astype(np.float32)

    codes, zeros = ordered(parts["qweight"][1]), ordered(parts["qzeros"][1])
    group = np.arange(codes.shape[0]) // (codes.shape[0] // groups)
    return np.ascontiguousarray(((codes - zeros[group]) * scales[group]).T)


def _compressed(parts: Parts, config: Config) -> Floats:
    if "weight_packed" not in parts:
        return _plain(parts, config)
    type_, packed = parts["weight_packed"]
    if type_ == "U8":
        return _fp4(packed, parts, parts.get("weight_global_scale"), divisor=True)
    rows, cols = (int(i) for i in parts["weight_shape"][1])
    width = _width(packed.shape[1], cols, config, parts)
    half = 1 << (width - 1)
    codes = (_codes(packed, width, 1, cols) - half).astype(np.float32)
    scale = floats(parts["weight_scale"])
    if "weight_zero_point" in parts:
        codes = codes - _grouped(_zero_points(parts["weight_zero_point"], width, rows) - half, parts, cols)
    return np.asarray(codes * _grouped(scale, parts, cols), np.float32)


def _grouped(side: Array, parts: Parts, cols: int) -> Array:
    """One value per group for every column, by weight_g_idx where it orders them."""
    side = side.reshape(-1, side.shape[-1]).astype(np.float32)
    if "weight_g_idx" in parts and (parts["weight_g_idx"][1] >= 0).all():
        return side[:, parts["weight_g_idx"][1]]
    return side[:, np.arange(cols) // -(-cols // side.shape[1])]


def _zero_points(part: tuple[str, Array], width: int, rows: int) -> NDArray[np.int64]:
    if part[0] == "I32":
        return _codes(part[1], width, 0, rows)
    return part[1].astype(np.int64) + (1 << (width - 1))


def _width(words: int, cols: int, config: Config, parts: Parts) -> int:
    """Bits of a code: the width that the number of words allows and some group of the config names."""
    groups = config.get("config_groups") or {}
    named = {int(g["weights"]["num_bits"]) for g in groups.values() if g.get("weights")}
    fits = [b for b in sorted(named) if words in (-(-cols * b // 32), -(-cols // (32 // b)))]
    if len(fits) != 1:
        raise _Unknown
    return fits[0]


def _plain(parts: Parts, config: Config) -> Floats:
    """`weight` holds the codes themselves: integers or E4M3, with scales per tensor, row, group or block."""
    type_, weight = parts["weight"]
    if weight.ndim != 2:
        raise _Unknown
    codes = _e4m3(weight) if type_ == "F8_E4M3" else weight.astype(np.float32)
    name = next((s for s in ("weight_scale", "weight_scale_inv") if s in parts), None)
    if name is None:
        raise _Unknown
    scale = floats(parts[name])
    if scale.ndim == 4:
        scale = scale.reshape(scale.shape[0], scale.shape[2])
    if "weight_zero_point" in parts:
        codes = codes - _spread(parts["weight_zero_point"][1].astype(np.float32), weight.shape)
    return np.asarray(codes * _spread(scale, weight.shape, _blocks(config)), np.float32)


def _fp4(packed: Array, parts: Parts, overall: Any, *, divisor: bool) -> Floats:
    nibbles = _numbers(_bits(packed, 1), 4, 1)
    scale = floats(parts["weight_scale"])
    if overall is not None:
        by = floats(overall).reshape(-1)[0]
        scale = scale / by if divisor else scale * by
    return np.asarray(_e2m1(nibbles) * _spread(scale, nibbles.shape), np.float32)


def _modelopt(parts: Parts, config: Config) -> Floats:
    type_, weight = parts["weight"]
    if type_ != "U8":
        found = _plain(parts, config)
    else:
        rows = parts["weight_scale"][1].shape[0]
        if weight.shape[0] == rows:
            found = _fp4(weight, parts, parts.get("weight_scale_2"), divisor=False)
        else:  # two rows share a byte, the even one in its low half
            pairs = _numbers(_bits(weight[..., None], 2), 4, 2)
            signed = np.where(pairs > 7, pairs - 16, pairs).transpose(0, 2, 1).reshape(rows, -1)
            scale = _spread(floats(parts["weight_scale"]), signed.shape)
            found = np.asarray(signed.astype(np.float32) * scale, np.float32)
    if "pre_quant_scale" in parts:
        found = found * floats(parts["pre_quant_scale"])
    return found


def _bitsandbytes(parts: Parts, config: Config) -> Floats:
    """4 bits: the first code of a byte in its high half, blocks over the flattened matrix; 8 bits: rows times SCB / 127."""
    if "SCB" in parts:
        codes, top = parts["weight"][1].astype(np.float32), floats(parts["SCB"]).reshape(-1, 1)
        return np.asarray(codes * (top / np.float32(127)), np.float32)
    state = next((v[1] for k, v in parts.items() if k.startswith("quant_state.")), None)
    if state is None:
        raise _Unknown
    about = json.loads(bytes(state))
    pairs = parts["weight"][1].reshape(-1)
    codes = np.stack([pairs >> 4, pairs & 15], axis=1).reshape(-1)
    if "nested_absmax" in parts:
        outer = np.repeat(floats(parts["nested_absmax"]), about["nested_blocksize"])
        inner = floats(parts["nested_quant_map"])[parts["absmax"][1]]
        scale = inner * outer[: inner.size] + np.float32(about["nested_offset"])
    else:
        scale = floats(parts["absmax"])
    numbers = floats(parts["quant_map"])[codes]
    return np.asarray(
        (numbers * np.repeat(scale, about["blocksize"])[: numbers.size]).reshape(about["shape"]), np.float32
    )


_DECODERS: Mapping[str, Callable[[Parts, Config], Floats]] = {
    "gptq": _gptq,
    "awq": _awq,
    "compressed-tensors": _compressed,
    "modelopt": _modelopt,
    "modelopt_fp4": _modelopt,
    "fp8": _plain,
    "fbgemm_fp8": _plain,
    "bitsandbytes": _bitsandbytes,
}
