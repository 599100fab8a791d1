"""What stored quantized weights mean, written down a second time: whole arrays, one formula per layout, no packing code of lconvert.

`decoded` gives the matrix of every quantized module of a `Folder`. It assumes that the folder is sound in structure; numbers may
be anything. The order of roundings is the canonical one (lconvert.ir).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tests.hostile_quantized import Folder
from tests.int_checkpoints import AWQ_NIBBLE

F32 = NDArray[np.float32]
Parts = Mapping[str, tuple[str, Any]]


def decoded(folder: Folder) -> dict[str, F32]:
    """The fp32 weight (out, in) of every quantized module by its name, as far as `LAYOUTS` knows the method."""
    modules: dict[str, dict[str, tuple[str, Any]]] = {}
    for name, tensor in folder.tensors.items():
        for part in ("_proj.", "lm_head.", "embed_tokens."):
            if part in name:
                head, _, rest = name.partition(part)
                modules.setdefault(head + part[:-1], {})[rest] = tensor
    read = LAYOUTS[folder.quantization["quant_method"]]
    return {
        module: read(folder, module, parts)
        for module, parts in modules.items()
        if set(parts) - {"weight", "bias"} or ("weight" in parts and parts["weight"][0] in ("I8", "U8"))
    }


# --- numbers -----------------------------------------------------------------------------------------------


def floats(tensor: tuple[str, Any]) -> F32:
    dtype, a = tensor
    out: F32
    if dtype == "BF16":
        out = (a.astype(np.uint32) << 16).view(np.float32)
    elif dtype == "F8_E4M3":
        out = small(a, 4, 3)
    elif dtype in ("U8", "F8_E8M0"):
        out = np.ldexp(np.float32(1), a.astype(np.int32) - 127).astype(np.float32)
    else:
        out = a.astype(np.float32)
    return out


def small(codes: Any, exponent: int, mantissa: int) -> F32:
    """Small floats without infinities, a value at a time in Python's floats."""
    table = []
    for code in range(1 << (1 + exponent + mantissa)):
        e, m = code >> mantissa & ((1 << exponent) - 1), code & ((1 << mantissa) - 1)
        bias = (1 << (exponent - 1)) - 1
        x = (m / (1 << mantissa) + (e > 0)) * 2.0 ** (max(e, 1) - bias)
        table.append(-x if code >> (exponent + mantissa) else x)
    return np.array(table, np.float32)[codes]


def bits(words: Any, width: int, count: int) -> NDArray[np.int64]:
    """`count` numbers out of the bits of each row of words, lowest bits first."""
    raw = np.unpackbits(np.ascontiguousarray(words).view(np.uint8), axis=-1, bitorder="little")
    raw = raw[:, : count * width].reshape(len(raw), count, width).astype(np.int64)
    found: NDArray[np.int64] = (raw << np.arange(width)).sum(-1)
    return found


def pairs(a: Any) -> NDArray[np.int64]:
    """Two numbers of a byte, the low half first."""
    return np.stack([a & 15, a >> 4], -1).reshape(len(a), -1).astype(np.int64)


def spread(side: Any, shape: tuple[int, ...]) -> Any:
    """One value per block of a matrix repeated over the block: all of an axis, a power of two, or 128 with a short one at its end."""
    side = np.asarray(side)
    side = side.reshape((1, 1) if side.size == 1 else (-1, 1) if side.ndim == 1 else side.shape)
    for axis, n in enumerate(shape):
        count = side.shape[axis]
        block = n if count == 1 else n // count if (n // count).bit_count() == 1 and n % count == 0 else 128
        side = np.repeat(side, block, axis)[(slice(None),) * axis + (slice(n),)]
    return side


def product(codes: Any, scale: Any) -> F32:
    out: F32 = codes.astype(np.float32) * spread(scale, codes.shape).astype(np.float32)
    return out


# --- layouts -----------------------------------------------------------------------------------------------


def _gptq(folder: Folder, module: str, p: Parts, version: int | None = None) -> F32:
    q = folder.quantization
    width = int(q["bits"])
    if "gptqmodel-gptq-mixed" in folder.name and ".mlp." in module:
        width = 8
    version = version or (2 if q.get("checkpoint_format", q.get("format")) == "gptq_v2" else 1)
    scales = floats(p["scales"])
    groups, n = scales.shape
    k = p["qweight"][1].shape[0] * 32 // width
    codes = bits(p["qweight"][1].T, width, k)
    zeros = bits(p["qzeros"][1], width, n) + (version == 1)
    index = p["g_idx"][1] if "g_idx" in p else np.arange(k) // (k // groups)
    out: F32 = (codes - zeros.T[:, index]).astype(np.float32) * scales.T[:, index]
    return out


def _awq_numbers(words: Any) -> NDArray[np.int64]:
    found = bits(words, 4, words.shape[1] * 8)
    order = [8 * (i // 8) + AWQ_NIBBLE[i % 8] for i in range(found.shape[1])]
    return found[:, order]


def _awq(folder: Folder, module: str, p: Parts) -> F32:
    scales = floats(p["scales"])
    if folder.quantization.get("version") == "gemv":
        n, k = len(scales), p["qweight"][1].shape[1] * 8
        count = k // folder.quantization["group_size"]
        codes, zeros = bits(p["qweight"][1], 4, k), bits(p["qzeros"][1], 4, scales.shape[1])
        return product(codes - spread(zeros[:, :count], (n, k)), scales[:, :count])
    codes, zeros = _awq_numbers(p["qweight"][1]).T, _awq_numbers(p["qzeros"][1]).T
    return product(codes - spread(zeros, codes.shape), scales.T)


def _autoround(folder: Folder, module: str, p: Parts) -> F32:
    form = folder.quantization["packing_format"]
    if "awq" in form:
        return _awq(folder, module, p)
    return _gptq(folder, module, p, 1 if "gptq" in form else 2)


def _compressed(folder: Folder, module: str, p: Parts) -> F32:
    if "weight_global_scale" in p:
        scale = floats(p["weight_scale"]) / floats(p["weight_global_scale"]).reshape(1, 1)
        return product(small(pairs(p["weight_packed"][1]), 2, 1), scale)
    if "weight_shape" in p:
        n, k = p["weight_shape"][1]
        width = (
            -(-p["weight_packed"][1].shape[1] * 32 // k)
            if k % 32
            else p["weight_packed"][1].shape[1] * 32 // k
        )
        codes = bits(p["weight_packed"][1], int(width), int(k)) - (1 << (int(width) - 1))
        if "weight_zero_point" in p:
            zeros = bits(p["weight_zero_point"][1].T, int(width), int(n)).T - (1 << (int(width) - 1))
            codes = codes - spread(zeros, codes.shape)
        return product(codes, floats(p["weight_scale"]))
    if "weight_packed" in p:
        return product(small(pairs(p["weight_packed"][1]), 2, 1), floats(p["weight_scale"]))
    dtype, a = p["weight"]
    codes = small(a, 4, 3) if dtype == "F8_E4M3" else a
    return product(codes, floats(p["weight_scale"]))


def _modelopt(folder: Folder, module: str, p: Parts) -> F32:
    dtype, a = p["weight"]
    scale = floats(p["weight_scale"])
    if scale.ndim == 4:
        scale = scale[:, 0, :, 0]
    if dtype == "F8_E4M3":
        w = product(small(a, 4, 3), scale)
    elif dtype == "I8":
        w = product(a, scale)
    elif p["weight_scale"][0] == "F32":  # int4, two rows to a byte
        rows = np.stack([a & 15, a >> 4], 1).reshape(-1, a.shape[1]).astype(np.int64)
        w = product((rows ^ 8) - 8, scale)
    else:
        w = product(
            small(pairs(a), 2, 1),
            scale * floats(p["weight_scale_2"]).reshape(1, 1) if "weight_scale_2" in p else scale,
        )
    return w * floats(p["pre_quant_scale"]) if "pre_quant_scale" in p else w


def _fp8(folder: Folder, module: str, p: Parts) -> F32:
    return product(small(p["weight"][1], 4, 3), floats(p.get("weight_scale_inv") or p["weight_scale"]))


def _bitsandbytes(folder: Folder, module: str, p: Parts) -> F32:
    if "SCB" in p:
        return product(p["weight"][1], floats(p["SCB"]) / np.float32(127))
    state = json.loads(next(a for s, (_, a) in p.items() if "quant_state" in s).tobytes())
    packed = p["weight"][1].reshape(-1)
    codes = np.stack([packed >> 4, packed & 15], -1).reshape(-1)
    absmax = p["weight.absmax"]
    scale = floats(absmax) if absmax[0] == "F32" else None
    if scale is None:
        outer = np.repeat(floats(p["weight.nested_absmax"]), state["nested_blocksize"])[: absmax[1].size]
        scale = p["weight.nested_quant_map"][1][absmax[1]] * outer + np.float32(state["nested_offset"])
    w = p["weight.quant_map"][1][codes] * np.repeat(scale, state["blocksize"])[: codes.size]
    out: F32 = w.reshape(state["shape"]).astype(np.float32)
    return out


def _hqq(folder: Folder, module: str, p: Parts) -> F32:
    width, axis = int(p["nbits"][1]), int(p["axis"][1])
    words, (n, k) = p["W_q"][1], p["shape"][1]
    per, step = (10, 3) if width == 3 else (8 // width, width)
    rows = np.concatenate([words >> (step * (per - 1 - i)) & ((1 << step) - 1) for i in range(per)])
    group = int(p["group_size"][1])
    rows = rows[: n * k // group] if axis == 1 else rows
    w = (rows.astype(np.float32) - floats(p["zero"])) * floats(p["scale"])
    out: F32 = w.reshape(n, k)
    return out


def _torchao(folder: Folder, module: str, p: Parts) -> F32:
    dtype, a = p["_weight_qdata"]
    codes = small(a, 4, 3) if dtype == "F8_E4M3" else a.astype(np.int64)
    if "_weight_zero_point" in p:
        codes = codes - spread(p["_weight_zero_point"][1], codes.shape)
    return product(codes, floats(p["_weight_scale"]))


def _quark(folder: Folder, module: str, p: Parts) -> F32:
    dtype, a = p["weight"]
    scale = floats(p["weight_scale"])
    if dtype == "I32":
        codes = _awq_numbers(a).T
        return product(codes - spread(_awq_numbers(p["weight_zero_point"][1]).T, codes.shape), scale.T)
    if dtype == "U8":
        return product(small(pairs(a), 2, 1), scale)
    return product(small(a, 4, 3) if dtype == "F8_E4M3" else a, scale)


def _bitnet(folder: Folder, module: str, p: Parts) -> F32:
    packed = p["weight"][1]
    codes = np.concatenate([packed >> (2 * i) & 3 for i in range(4)]).astype(np.float32) - np.float32(1)
    scale = floats(p["weight_scale"]).reshape(1, 1)
    divides = folder.quantization.get("linear_class", "bitlinear") == "bitlinear"
    out: F32 = codes / scale if divides else codes * scale
    return out


LAYOUTS: Mapping[str, Callable[[Folder, str, Parts], F32]] = {
    "gptq": _gptq, "awq": _awq, "auto-round": _autoround, "compressed-tensors": _compressed, "modelopt": _modelopt,
    "modelopt_fp4": _modelopt, "fp8": _fp8, "fbgemm_fp8": _fp8, "bitsandbytes": _bitsandbytes, "hqq": _hqq, "torchao": _torchao,
    "quark": _quark, "bitnet": _bitnet,
}  # fmt: skip
