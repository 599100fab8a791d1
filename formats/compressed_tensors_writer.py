"""compressed-tensors, the format of llm-compressor and vLLM: writing it. Layouts are in `compressed_tensors`.

What vLLM 0.32 and compressed-tensors read decides what can be written as it stands:

- Codes of 3, 5, 6 and 7 bits are dense streams of bits. vLLM 0.32 reads those (`CompressedTensorsWNA16`:
  ceil(K * bits / 32) words) and so does compressed-tensors since 0.19; 0.17, which vLLM pins and transformers uses beside
  it, still expects padded words and cannot load such a folder. 2, 4 and 8 bits are the same either way.
- Scales of packed integers get the model's type in vLLM, so F32 scales would be rounded there; F16 and BF16 are kept, and
  the model must be served in their type. int-quantized and FP8 scales are F32 parameters in vLLM: any float is exact.
- Weights beside quantized integer activations must be symmetric, per tensor or channel; packed ones per channel or group.
- FP8 blocks may be cut at the edges. vLLM and compressed-tensors since 0.19 read them so; before, decompression computes
  the size of a block from the number of scales and gets other numbers (`quantization/lifecycle/forward.py` dequantize).
- vLLM quantizes activations of MX weights where the hardware can, whatever the config says.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lconvert.errors import UnsupportedError
from lconvert.formats.compressed_tensors_config import (
    DENSE,
    LAYOUT_VERSION,
    MIXED,
    MXFP4,
    MXFP8,
    NVFP4,
    PACKED,
    Args,
    Rule,
)
from lconvert.formats.scheme import Held, Stored
from lconvert.ir import E2M1, E4M3, E8M0, ActSpec, KVSpec, QTensor, Tensor, as_f32
from lconvert.kernels import packing

INT, FLOAT, NAIVE = "int-quantized", "float-quantized", "naive-quantized"
_FLOATS = ("F32", "F16", "BF16")
_E4M3, _UINT8 = "torch.float8_e4m3fn", "torch.uint8"


@dataclass(frozen=True)
class Writer:
    """compressed-tensors as a target. Modules that a runtime fuses must have equal schemes; the caller sees to it."""

    kv_names: tuple[str, str] = ("{attn}.k_scale", "{attn}.v_scale")

    def problem(self, held: Held) -> str | None:
        try:
            if held.weight is not None:
                _rule(held.weight, held)
        except UnsupportedError as e:
            return str(e)
        return None

    def store(self, held: Held) -> dict[str, Stored]:
        if held.weight is None:
            return {}
        rule = _rule(held.weight, held)
        return _STORE[rule.format](held.weight, rule.weights) | _stored_activation(held.activation)

    def config(self, modules: Mapping[str, Held], kv: KVSpec | None) -> dict[str, Any]:
        """UnsupportedError for a KV cache that vLLM cannot hold."""
        found: dict[Rule, list[str]] = {}
        for name, held in modules.items():
            if held.weight is not None:
                found.setdefault(_rule(held.weight, held), []).append(name)
        formats = {rule.format for rule in found}
        return {
            "quant_method": "compressed-tensors",
            "format": DENSE if not formats else MIXED if len(formats) > 1 else formats.pop(),
            "quantization_status": "compressed",
            "config_groups": {
                f"group_{i}": {
                    "targets": _targets(names) if len(found) == 1 else names,
                    "weights": rule.weights.to_json(),
                    "input_activations": None if rule.inputs is None else rule.inputs.to_json(),
                    "output_activations": None,
                    "format": rule.format,
                }
                for i, (rule, names) in enumerate(found.items())
            },
            "ignore": [name for name, held in modules.items() if held.weight is None],
            "kv_cache_scheme": None if kv is None else _kv(kv).to_json(),
            "global_compression_ratio": None,
            "sparsity_config": {},
            "transform_config": {},
            "version": LAYOUT_VERSION,
        }

    def side_files(self, config: Mapping[str, Any]) -> dict[str, Any]:
        return {}


def _targets(names: list[str]) -> list[str]:
    """The class, and the names outside the layers: vLLM's heads and embeddings are no subclasses of its Linear."""
    outside = [n for n in names if not any(part.isdigit() for part in n.split("."))]
    return ["Linear", *outside] if len(outside) < len(names) else names


def _kv(kv: KVSpec) -> Args:
    plain = not (kv.residual_window or kv.sinks or kv.pre_rope)
    same = all((s.grid, s.per, s.dynamic) == (E4M3, "tensor", False) and s.zero is None for s in (kv.k, kv.v))
    if not plain or not same:
        raise UnsupportedError("vLLM's KV cache is FP8 with one static scale per layer, or not quantized")
    return Args(8, "float", "tensor")


# --- which format, and why not ---------------------------------------------------------------------------


def _rule(q: QTensor, held: Held) -> Rule:
    """The scheme that says what this weight is; UnsupportedError with the reason where there is none."""
    if held.transform is not None:
        raise UnsupportedError(
            "its input is scaled first (pre_quant_scale), which compressed-tensors cannot say"
        )
    if q.g_idx is not None:
        raise UnsupportedError(
            "its columns are reordered (g_idx), which vLLM 0.32 and compressed-tensors 0.19 refuse"
        )
    if q.mask is not None or q.outliers or q.low_rank is not None or q.offset is not None or q.divisor:
        raise UnsupportedError(
            "compressed-tensors has no place for masks, outliers, low-rank corrections and offsets"
        )
    if len(q.shape) != 2:
        raise UnsupportedError(f"a tensor of shape {q.shape} is no matrix")
    if q.grid.kind == "int":
        return _integer_rule(q, held.activation)
    if q.grid == E4M3:
        return (
            _mx_rule(q, held.activation, 8) if isinstance(q.scale, QTensor) else _fp8_rule(q, held.activation)
        )
    if q.grid == E2M1:
        return _mx_rule(q, held.activation, 4) if q.block == (1, 32) else _nvfp4_rule(q, held.activation)
    raise UnsupportedError(f"its grid ({q.grid.kind}, {q.grid.bits} bits) is none of compressed-tensors'")


def _integer_rule(q: QTensor, a: ActSpec | None) -> Rule:
    bits, scale = q.grid.bits, _plain_scale(q, _FLOATS)
    symmetric = q.grid.signed
    if not 2 <= bits <= 8:
        raise UnsupportedError(f"integers of {bits} bits; 2 to 8 can be written")
    if symmetric == (q.zero is not None) or (q.zero is not None and q.zero.dtype != "U8"):
        raise UnsupportedError("unsigned integers need zero points of type U8, signed ones have none")
    weights = replace(_strategy(q), bits=bits, kind="int", symmetric=symmetric)
    if a is None:
        if weights.strategy not in ("group", "channel"):
            raise UnsupportedError(
                f"packed integers have scales per group or channel, not per {weights.strategy}; repeat them"
            )
        if scale.dtype == "F32":
            raise UnsupportedError(
                "vLLM rounds the scales of packed integers to the model's type; F32 must become F16 or BF16"
            )
        return Rule(PACKED, weights)
    if bits != 8 or not symmetric or weights.strategy not in ("tensor", "channel"):
        raise UnsupportedError(
            f"beside quantized activations vLLM takes symmetric int8 per tensor or channel, not {weights}"
        )
    if a.grid.kind != "int" or a.grid.bits != 8:
        raise UnsupportedError("beside int8 weights activations must be int8")
    if (a.per, a.dynamic) not in (("token", True), ("tensor", False)):
        raise UnsupportedError("int8 activations are static per tensor or dynamic per token")
    inputs = Args(8, "int", a.per, symmetric=a.grid.signed, dynamic=a.dynamic)
    _stored_activation(a)
    return Rule(INT, weights, inputs)


def _fp8_rule(q: QTensor, a: ActSpec | None) -> Rule:
    _plain_scale(q, _FLOATS)
    if q.zero is not None:
        raise UnsupportedError("floats have no zero points")
    weights = replace(_strategy(q), bits=8, kind="float")
    if weights.strategy == "group":
        raise UnsupportedError(f"vLLM has no FP8 weights in groups of {weights.group} with float scales")
    if a is None:
        return Rule(NAIVE, weights)
    if weights.block is not None:
        wanted = (a.per, a.dynamic, a.group) == ("group", True, weights.block[1])
        words = f"dynamic in groups of {weights.block[1]}"
    else:
        wanted = (a.per, a.dynamic) in (("token", True), ("tensor", False))
        words = "static per tensor or dynamic per token"
    if a.grid != E4M3 or a.zero is not None or not wanted:
        raise UnsupportedError(f"beside {weights} weights activations must be FP8, {words}")
    if a.group == 32:
        raise UnsupportedError("inputs in groups of 32 are MXFP8, whose scales are exponents")
    _stored_activation(a)
    return Rule(FLOAT, weights, Args(8, "float", a.per, group=a.group, dynamic=a.dynamic))


def _nvfp4_rule(q: QTensor, a: ActSpec | None) -> Rule:
    s = q.scale
    if (
        q.block != (1, 16)
        or q.zero is not None
        or not isinstance(s, QTensor)
        or (s.grid, s.block) != (E4M3, (-1, -1))
    ):
        raise UnsupportedError(
            f"4-bit floats have FP8 scales per 16 columns (NVFP4) or exponents per 32 (MXFP4), not {q.block}"
        )
    if not isinstance(s.scale, Tensor) or s.scale.dtype != "F32" or not s.divisor or s.zero is not None:
        raise UnsupportedError(
            "the global scale must be an F32 that divides; the reciprocal is exact only for powers of two"
        )
    weights = Args(4, "float", "tensor_group", group=16, scale_dtype=_E4M3)
    if a is None:
        return Rule(NVFP4, weights)
    if (a.grid, a.per, a.group, a.dynamic) != (E2M1, "group", 16, True) or a.scale is None:
        raise UnsupportedError("beside NVFP4 weights activations must be NVFP4 with a global scale")
    _stored_activation(a)
    return Rule(NVFP4, weights, replace(weights, dynamic="local"))


def _mx_rule(q: QTensor, a: ActSpec | None, bits: int) -> Rule:
    s = q.scale
    if (
        q.block != (1, 32)
        or q.zero is not None
        or not isinstance(s, QTensor)
        or (s.grid, s.block) != (E8M0, (-1, -1))
    ):
        raise UnsupportedError("MX floats have exponents as scales per 32 columns")
    if (
        not isinstance(s.scale, Tensor)
        or s.zero is not None
        or float(as_f32(s.scale.load(), s.scale.dtype).reshape(-1)[0]) != 1
    ):
        raise UnsupportedError("MX floats have no scale beside their exponents")
    weights = Args(bits, "float", "group", group=32, scale_dtype=_UINT8)
    if a is None:
        return Rule(MXFP4 if bits == 4 else MXFP8, weights)
    wanted = a.grid == E4M3 or (bits == 4 and a.grid == E2M1)
    if not wanted or (a.per, a.group, a.dynamic) != ("group", 32, True):
        raise UnsupportedError(f"beside MXFP{bits} weights activations must be MX floats in groups of 32")
    _stored_activation(a)
    return Rule(MXFP4 if bits == 4 else MXFP8, weights, replace(weights, bits=a.grid.bits, dynamic=True))


def _plain_scale(q: QTensor, dtypes: tuple[str, ...]) -> Tensor:
    if not isinstance(q.scale, Tensor) or q.scale.dtype not in dtypes:
        raise UnsupportedError(f"its scales must be plain numbers of type {' or '.join(dtypes)}")
    return q.scale


def _strategy(q: QTensor) -> Args:
    """Strategy, group and block of a weight; its bits and kind are filled in by the caller."""
    match q.block:
        case (-1, -1):
            return Args(8, "int", "tensor")
        case (1, -1):
            return Args(8, "int", "channel")
        case (1, size) if q.shape[1] % size == 0:
            return Args(8, "int", "group", group=size)
        case (height, width) if height > 1 and width > 1:
            return Args(8, "int", "block", block=(height, width))
    raise UnsupportedError(f"blocks {q.block} of a weight of shape {q.shape} are none of compressed-tensors'")


# --- tensors ---------------------------------------------------------------------------------------------


def _stored_scale(q: QTensor) -> dict[str, Stored]:
    s = q.scale
    assert isinstance(s, Tensor)
    if q.block == (-1, -1):
        return {"weight_scale": Stored(s.dtype, (1,), lambda a, b: s.load().reshape(1)[a:b])}
    return {"weight_scale": Stored(s.dtype, s.shape, s.read)}


def _store_packed(q: QTensor, args: Args) -> dict[str, Stored]:
    rows, cols = q.shape

    def words(start: int, stop: int) -> NDArray[Any]:
        return packing.pack_rows(q.codes.read(start, stop), args.bits, signed=args.symmetric).view(np.int32)

    shape = np.array(q.shape, np.int64)
    out = {
        "weight_packed": Stored("I32", (rows, packing.words_for(cols, args.bits)), words),
        "weight_shape": Stored("I64", (2,), lambda a, b: shape[a:b]),
    } | _stored_scale(q)
    if (zero := q.zero) is None:
        return out

    def zeros(start: int, stop: int) -> NDArray[Any]:
        packed = packing.pack_columns(np.ascontiguousarray(zero.load().T), args.bits)
        return packed.view(np.int32)[start:stop]

    shape_of_zero = (packing.words_for(rows, args.bits), zero.shape[1])
    return out | {"weight_zero_point": Stored("I32", shape_of_zero, zeros, whole=True)}


def _store_plain(q: QTensor, args: Args) -> dict[str, Stored]:
    kind = "I8" if args.kind == "int" else "F8_E4M3"
    return {"weight": Stored(kind, q.shape, q.codes.read)} | _stored_scale(q)


def _stored_nibbles(q: QTensor) -> dict[str, Stored]:
    def read(start: int, stop: int) -> NDArray[Any]:
        return packing.pack_nibbles(q.codes.read(start, stop))

    return {"weight_packed": Stored("U8", (q.shape[0], q.shape[1] // 2), read)}


def _store_nvfp4(q: QTensor, args: Args) -> dict[str, Stored]:
    s = q.scale
    assert isinstance(s, QTensor) and isinstance(s.scale, Tensor)
    overall = s.scale
    return _stored_nibbles(q) | {
        "weight_scale": Stored("F8_E4M3", s.shape, s.codes.read),
        "weight_global_scale": Stored("F32", (1,), lambda a, b: overall.load().reshape(1)[a:b]),
    }


def _store_mx(q: QTensor, args: Args) -> dict[str, Stored]:
    s = q.scale
    assert isinstance(s, QTensor)
    weight = _stored_nibbles(q) if args.bits == 4 else {"weight": Stored("F8_E4M3", q.shape, q.codes.read)}
    return weight | {"weight_scale": Stored("U8", s.shape, s.codes.read)}


_STORE: Mapping[str, Callable[[QTensor, Args], dict[str, Stored]]] = {
    PACKED: _store_packed,
    INT: _store_plain,
    FLOAT: _store_plain,
    NAIVE: _store_plain,
    NVFP4: _store_nvfp4,
    MXFP4: _store_mx,
    MXFP8: _store_mx,
}


def _stored_activation(a: ActSpec | None) -> dict[str, Stored]:
    """Stored numbers of activations; UnsupportedError for those that the format has no exact place for."""
    if a is None or (a.dynamic and a.scale is None):
        return {}
    nvfp4 = a.dynamic and (a.grid, a.per, a.group) == (E2M1, "group", 16)
    if a.dynamic and not nvfp4:
        raise UnsupportedError(
            "the scales of its activations are bounded (activation_scale_ub), which cannot be said"
        )
    s = a.scale
    if s is None or s.size != 1 or s.dtype not in _FLOATS:
        raise UnsupportedError(f"its activations need one scale of type {' or '.join(_FLOATS)}")
    if nvfp4:
        overall = _divisor(a, s)
        return {"input_global_scale": Stored("F32", (1,), lambda start, stop: overall[start:stop])}
    if a.divisor or (a.grid.kind == "int" and not a.grid.signed) != (a.zero is not None):
        raise UnsupportedError(
            "scales of activations multiply; unsigned ones have a zero point, others have none"
        )
    out = {"input_scale": Stored(s.dtype, (1,), lambda start, stop: s.load().reshape(1)[start:stop])}
    if (zero := a.zero) is not None:
        half = 1 << (a.grid.bits - 1)

        def stored(start: int, stop: int) -> NDArray[Any]:
            return (zero.load().reshape(1).astype(np.int16) - half).astype(np.int8)[start:stop]

        out["input_zero_point"] = Stored("I8", (1,), stored)
    return out


def _divisor(a: ActSpec, scale: Tensor) -> NDArray[np.float32]:
    """The global scale that divides; one that multiplies is turned over where that is exact, for powers of two."""
    value = as_f32(scale.load(), scale.dtype).reshape(1)
    if a.divisor:
        return value
    if np.frexp(value)[0] != 0.5:
        raise UnsupportedError(
            "the global scale of NVFP4 activations divides here; the reciprocal of one that multiplies is exact only for "
            "powers of two"
        )
    return np.float32(1) / value
