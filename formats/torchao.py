"""torchao's tensor subclasses in safetensors, as transformers saves them: int8, intx and float8 weights.

The header's metadata describes every tensor (torchao prototype/safetensors/safetensors_support.py
`flatten_tensor_state_dict`): `P.weight` -> JSON {"_type", "_data": attributes, "_tensor_data_names"}, and a subclass is stored
as P._weight_qdata, P._weight_scale ... W is (N, K), `block_size` [height, width] of its blocks, scales multiply:

    Int8Tensor                 qdata I8, scale, zero_point I8 (optional); act_quant_kwargs: inputs int8 per token or tensor
    IntxUnpackedToInt8Tensor   qdata I8 within target_dtype int1 ... int8, scale, zero_point I8; activation_quantization
    Float8Tensor               qdata E4M3, scale; act_quant_kwargs: inputs float8 per token or tensor

w = (qdata - zero_point) * scale (quantization/quant_primitives.py `dequantize_affine`, `_dequantize_affine_float8`). Zero points
that are all 0 are no zero points; others come with unsigned codes, both plus 2^(bits - 1).

The config says what was asked for; what each tensor became is told by the metadata alone.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lconvert.errors import InputError, UnsupportedError
from lconvert.formats.config_values import name_list, names_module, refuse_unknown
from lconvert.formats.files import show
from lconvert.formats.fp8 import float_codes
from lconvert.formats.scheme import Checkpoint, Part, Weight, finite_scales, listed, take, view
from lconvert.ir import E4M3, ActSpec, Grid, KVSpec, QTensor, Tensor, int_grid
from lconvert.spec import blocks

FLOATS = ("F32", "F16", "BF16")
_PREFIX = "_weight_"
#: Bytes of one description; torchao writes a few hundred.
_LIMIT = 8192
_KEYS = {
    *("quant_method", "quant_type", "quant_type_kwargs", "modules_to_not_convert"),
    *("include_input_output_embeddings", "untie_embedding_weights"),
}
_ROWS = 4096  # of zero points that are looked at together


def parse(checkpoint: Checkpoint) -> TorchAo:
    """The scheme of a `quant_method: torchao`; transformers' TorchAoConfig names the keys."""
    config, where = checkpoint.config, checkpoint.where
    refuse_unknown(config, _KEYS, f"{where}: quantization_config", "torchao's are")
    skipped = name_list(config.get("modules_to_not_convert") or [], "modules_to_not_convert", where)
    return TorchAo(where, checkpoint.metadata, skipped)


@dataclass(frozen=True)
class TorchAo:
    """The scheme. metadata: of all safetensors headers."""

    where: str
    metadata: Mapping[str, str]
    skipped: tuple[str, ...] = ()
    report: tuple[str, ...] = ()
    kv: KVSpec | None = None
    method: str = "torchao"

    def weight(self, module: str, parts: Mapping[str, Part], shape: tuple[int, ...]) -> Weight | None:
        key = f"{module}.weight"
        at = f"{module}: the description {key} in the safetensors header"
        stored, quantized = parts.get("weight"), sorted(s for s in parts if s.startswith(_PREFIX))
        plain = stored is not None and parts.keys() == {"weight"} and stored.dtype in (*FLOATS, "F64")
        if key not in self.metadata:
            if plain:
                return None
            raise InputError(
                f"{at} is missing, and {listed(parts)} mean nothing without it; another tool has dropped it: "
                "download the file again"
            )
        found = _description(self.metadata[key], at)
        kind = found["_type"]
        if kind == "Tensor" and plain:
            return None
        if kind == "Tensor" or not quantized:
            raise InputError(
                f"{at} is of a {show(kind)[1:-1]}, but {listed(parts)} are stored; the header and the tensors do not belong "
                "together"
            )
        if kind not in _READERS:
            raise UnsupportedError(
                f"{at} is of the type {show(kind)}, whose layout belongs to a kernel; known are {', '.join(_READERS)}. Save "
                "the model with one of them, or dequantized"
            )
        if any(names_module(n, module) for n in self.skipped):
            raise InputError(
                f"{module}: is quantized, but {self.where} has it among modules_to_not_convert; correct the list"
            )
        if len(shape) != 2:
            raise UnsupportedError(f"{module}: torchao weights of shape {shape} are not a matrix")
        names = found.get("_tensor_data_names")
        if not isinstance(names, list) or {f"{_PREFIX}{n}" for n in map(str, names)} != set(quantized):
            raise InputError(
                f"{at} names the tensors {show(names)}, stored are {listed(quantized)}; the header and the tensors do not "
                "belong together"
            )
        data = found.get("_data")
        if not isinstance(data, dict):
            raise InputError(f"{at}: _data is {show(data)}, expected an object")
        return _READERS[kind](Source(module, parts, (shape[0], shape[1]), data, at))


def _description(text: str, at: str) -> dict[str, Any]:
    if len(text) > _LIMIT:
        raise InputError(f"{at} has {len(text)} bytes, {_LIMIT} is the most; download the file again")
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        raise InputError(f"{at} is no sound JSON; download the file again") from None
    if not isinstance(found, dict) or not isinstance(found.get("_type"), str):
        raise InputError(f"{at} is {show(found)}, expected an object with a _type")
    return found


# --- one tensor ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Source:
    """One subclassed weight of `shape`: its stored tensors, its attributes, and words for messages."""

    module: str
    parts: Mapping[str, Part]
    shape: tuple[int, int]
    data: Mapping[str, Any]
    at: str

    def known(self, *names: str) -> None:
        if unknown := sorted(self.data.keys() - {*names, "block_size", "dtype"}):
            raise UnsupportedError(
                f"{self.at}: the attribute {show(unknown[0])} is unknown; save it with torchao 0.18"
            )

    def part(self, name: str, dtypes: tuple[str, ...], shape: tuple[int, ...]) -> Part:
        return take(self.module, self.parts, f"{_PREFIX}{name}", dtypes, shape)

    def has(self, name: str) -> bool:
        return f"{_PREFIX}{name}" in self.parts

    def block(self) -> tuple[int, int]:
        """Height and width of a block, -1 for all."""
        size, (n, k) = self.data.get("block_size"), self.shape
        if (
            not isinstance(size, list)
            or len(size) != 2
            or any(type(b) is not int or not 0 < b < 1 << 31 for b in size)
        ):
            raise InputError(
                f"{self.at}: block_size is {show(size)}, expected two positive numbers such as [1, 32]"
            )
        if n % size[0] or k % size[1]:
            raise InputError(f"{self.at}: blocks of {size} do not divide {n} x {k}; the header is damaged")
        return (1 if size[0] == 1 else -1 if size[0] == n else size[0], -1 if size[1] == k else size[1])

    def side(self, name: str, dtypes: tuple[str, ...], block: tuple[int, int]) -> Tensor:
        """One value per block; one for the whole matrix may be stored as a scalar."""
        shape = blocks(self.shape, block)
        stored = self.parts.get(f"{_PREFIX}{name}")
        alone = shape == (1, 1) and stored is not None and stored.shape in ((), (1,))
        part = self.part(name, dtypes, stored.shape if alone and stored is not None else shape)
        return view(
            part.data, shape, part.dtype, lambda a, b: part.data.read(a, b).reshape(b - a, *shape[1:])
        )

    def used(self) -> frozenset[str]:
        return frozenset(s for s in self.parts if s.startswith(_PREFIX))

    def typed(self, name: str, value: Any, kinds: tuple[str, ...]) -> tuple[str, Any]:
        """The type and content of a nested object of a description."""
        kind = value.get("_type") if isinstance(value, dict) else None
        if kind not in kinds:
            raise UnsupportedError(f"{self.at}: {name} is {show(value)}; known is {' or '.join(kinds)}")
        return str(kind), value.get("_data")


def _per(source: Source, kwargs: Mapping[str, Any]) -> str:
    kind, data = source.typed("granularity", kwargs.get("granularity"), ("PerRow", "PerTensor"))
    if kind == "PerRow" and (data or {}) not in ({}, {"dim": -1}):
        raise UnsupportedError(
            f"{source.at}: rows along {show(data)} of the input; only its last dimension is read"
        )
    return "token" if kind == "PerRow" else "tensor"


def _inputs(source: Source, kind: str, fields: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The content of act_quant_kwargs, None for weights alone. fields: known keys, None or the only value that is read."""
    value = source.data.get("act_quant_kwargs")
    if value is None:
        return None
    _, data = source.typed("act_quant_kwargs", value, (kind,))
    if not isinstance(data, dict):
        raise InputError(f"{source.at}: act_quant_kwargs holds {show(data)}, expected an object")
    for key, found in data.items():
        if key not in fields or (fields[key] is not None and found not in fields[key]):
            raise UnsupportedError(
                f"{source.at}: act_quant_kwargs has {show(key)} = {show(found)}, which is not read"
            )
    return data


def _int8(source: Source) -> Weight:
    source.known("act_quant_kwargs", "reduce_range")
    if extra := sorted(source.used() - {f"{_PREFIX}{n}" for n in ("qdata", "scale", "zero_point")}):
        raise UnsupportedError(
            f"{source.parts[extra[0]].where}: static or scaled inputs of an Int8Tensor are not read; quantize inputs dynamically"
        )
    mapping = [{"_type": "MappingType", "_data": way} for way in ("SYMMETRIC", "ASYMMETRIC")]
    fields = {"granularity": None, "mapping_type": mapping, "reduce_range": (False,)}
    kwargs, activation = _inputs(source, "QuantizeTensorToInt8Kwargs", fields), None
    if kwargs is not None:
        signed = kwargs.get("mapping_type", mapping[0]) == mapping[0]
        activation = ActSpec(int_grid(8, signed), _per(source, kwargs), dynamic=True)  # type: ignore[arg-type]
    return Weight(_integers(source, 8), source.used(), activation)


def _intx(source: Source) -> Weight:
    source.known("target_dtype", "activation_quantization")
    _, target = source.typed("target_dtype", source.data.get("target_dtype"), ("torch.dtype",))
    widths = {f"int{b}": b for b in range(1, 9)}
    if not isinstance(target, str) or target not in widths:
        raise UnsupportedError(f"{source.at}: target_dtype is {show(target)}; known are int1 to int8")
    inputs, activation = source.data.get("activation_quantization"), None
    if isinstance(inputs, dict):
        inputs = inputs.get("_data")
    if inputs is not None:
        if str(inputs).lower() != "int8_asym_per_token":
            raise UnsupportedError(
                f"{source.at}: activation_quantization {show(inputs)}; known is int8_asym_per_token"
            )
        activation = ActSpec(int_grid(8, False), "token", dynamic=True)
    return Weight(_integers(source, widths[target]), source.used(), activation)


def _float8(source: Source) -> Weight:
    source.known("act_quant_kwargs", "mm_config", "kernel_preference")
    stored = source.parts.get(f"{_PREFIX}qdata")
    if stored is not None and stored.dtype == "F8_E5M2":
        raise UnsupportedError(
            f"{stored.where}: E5M2 weights have no place in runtimes; quantize to float8_e4m3fn"
        )
    fields = {
        "granularity": None, "mm_config": None, "kernel_preference": None, "hp_value_lb": (None,), "hp_value_ub": (None,),
        "float8_dtype": ({"_type": "torch.dtype", "_data": "float8_e4m3fn"},),
    }  # fmt: skip
    kwargs, activation = _inputs(source, "QuantizeTensorToFloat8Kwargs", fields), None
    if kwargs is not None:
        activation = ActSpec(E4M3, _per(source, kwargs), dynamic=True)  # type: ignore[arg-type]
    block = source.block()
    codes = float_codes(source.part("qdata", ("F8_E4M3",), source.shape))
    scale = finite_scales(source.side("scale", FLOATS, block))
    return Weight(QTensor(source.shape, codes, E4M3, block, scale), source.used(), activation)


_READERS: Mapping[str, Callable[[Source], Weight]] = {
    "Int8Tensor": _int8,
    "IntxUnpackedToInt8Tensor": _intx,
    "Float8Tensor": _float8,
}


def _integers(source: Source, bits: int) -> QTensor:
    """qdata, scale and zero_point as a QTensor; every read sees that codes and zero points are numbers of `bits`."""
    block, half = source.block(), 1 << (bits - 1)
    qdata = source.part("qdata", ("I8",), source.shape)
    scale = finite_scales(source.side("scale", FLOATS, block))
    zero = source.side("zero_point", ("I8",), block) if source.has("zero_point") else None
    if zero is not None and not _any(zero):
        zero = None

    def checked(t: Tensor, what: str, shift: int) -> Tensor:
        def read(start: int, stop: int) -> NDArray[Any]:
            found = t.read(start, stop)
            if found.size and not -half <= int(found.min()) <= int(found.max()) < half:
                worst = found.min() if found.min() < -half else found.max()
                raise InputError(
                    f"{t.origin}: holds the {what} {worst}, which is no int{bits}; download the file again"
                )
            return (found.view(np.uint8) + np.uint8(shift)) if shift else found

        return view(t, t.shape, "U8" if shift else "I8", read)

    shift = 0 if zero is None else half
    grid: Grid = int_grid(bits, zero is None)
    sides = None if zero is None else checked(zero, "zero point", shift)
    return QTensor(source.shape, checked(qdata.data, "code", shift), grid, block, scale, zero=sides)


def _any(t: Tensor) -> bool:
    return any(t.read(a, min(a + _ROWS, t.rows)).any() for a in range(0, t.rows, _ROWS))
