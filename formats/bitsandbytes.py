"""bitsandbytes checkpoints, as transformers saves them: reading nf4, fp4 and LLM.int8.

4 bits, W (N, K) flattened row by row and cut into blocks of B, wherever rows end (bitsandbytes functional.py `QuantState`,
`dequantize_4bit`; backends/default/ops.py `_dequantize_4bit_compute`):

    weight                                  U8 (N * K / 2, 1)  two codes a byte, the first in the high nibble
    weight.absmax                           F32 (N * K / B,)   a block's scale
    weight.quant_map                        F32 (16,)          what a code means
    weight.quant_state.bitsandbytes__TYPE   U8 (...)           JSON: quant_type, blocksize, dtype, shape

and with double quantization absmax is U8, and a scale is nested_quant_map[absmax] * nested_absmax + nested_offset, with

    weight.nested_quant_map   F32 (256,)             weight.nested_absmax   F32 (absmax / nested_blocksize,)
    nested_blocksize, nested_offset, nested_dtype    in the JSON

Where rows do not hold whole blocks, the scales are repeated for blocks that both rows and stored blocks are made of. The
runtime takes the table of quant_type, whatever quant_map says, so a file where the two differ is refused.

8 bits (nn/modules.py `Linear8bitLt`): weight I8 (N, K), SCB F32 (N,), weight_format U8 () = 0 (rows); w = code * SCB / 127.
bitsandbytes evaluates (code * SCB) * fl(1/127) in fp32; here it is code * fl(SCB / 127), which in the checkpoints tested
differs by one unit in the last place where it differs. The activations' int8 and their outlier columns (llm_int8_threshold) happen at run time.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import gcd
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lconvert.errors import InputError, UnsupportedError
from lconvert.formats.bitsandbytes_writer import SIZES, STATE, TABLES, Writer
from lconvert.formats.config_values import flag, name_list, names_module, refuse_unknown
from lconvert.formats.files import show
from lconvert.formats.flat_blocks import spread
from lconvert.formats.scheme import Checkpoint, Part, Weight, finite_scales, listed, take, view
from lconvert.ir import Grid, KVSpec, QTensor, Tensor, as_f32, int_grid
from lconvert.kernels.packing import unpack_nibbles

__all__ = ["BitsAndBytes", "Writer", "parse"]

FLOATS = ("F32", "F16", "BF16")
#: Bytes of a quant_state; bitsandbytes writes fewer than 200.
_STATE_LIMIT = 4096
_DTYPES = ("bfloat16", "float16", "float32")
_KEYS = {
    *("quant_method", "load_in_4bit", "load_in_8bit", "_load_in_4bit", "_load_in_8bit"),
    *("bnb_4bit_compute_dtype", "bnb_4bit_quant_storage", "bnb_4bit_quant_type", "bnb_4bit_use_double_quant"),
    *("llm_int8_enable_fp32_cpu_offload", "llm_int8_has_fp16_weight", "llm_int8_skip_modules"),
    "llm_int8_threshold",
}


def parse(checkpoint: Checkpoint) -> BitsAndBytes:
    """The scheme of a `quant_method: bitsandbytes`; transformers' BitsAndBytesConfig names the keys."""
    config, where = checkpoint.config, checkpoint.where
    refuse_unknown(config, _KEYS, f"{where}: quantization_config", "bitsandbytes' are")
    four, eight = (
        flag(config, f"load_in_{n}bit", where, flag(config, f"_load_in_{n}bit", where, False)) for n in (4, 8)
    )
    if four == eight:
        raise InputError(
            f"{where}: {'both' if four else 'neither'} of load_in_4bit and load_in_8bit {'are' if four else 'is'} true; set the "
            "one that the weights were quantized with"
        )
    skipped = config.get("llm_int8_skip_modules")
    plain = () if skipped is None else name_list(skipped, "llm_int8_skip_modules", where)
    storage = config.get("bnb_4bit_quant_storage")
    if four and storage not in (None, "uint8"):
        raise UnsupportedError(
            f"{where}: bnb_4bit_quant_storage {show(storage)} stores the codes as numbers of another type; save the model with "
            "bnb_4bit_quant_storage uint8"
        )
    if eight and flag(config, "llm_int8_has_fp16_weight", where, False):
        raise UnsupportedError(
            f"{where}: llm_int8_has_fp16_weight keeps the weights in 16 bits and quantizes them at run time; load the model "
            "without a quantization_config"
        )
    threshold = config.get("llm_int8_threshold", 6.0)
    if type(threshold) not in (int, float) or not 0 <= threshold < 3.4e38:
        raise InputError(f"{where}: llm_int8_threshold is {show(threshold)}, expected a number")
    kind = config.get("bnb_4bit_quant_type") if four else None
    if kind not in (None, *TABLES):
        raise UnsupportedError(f"{where}: bnb_4bit_quant_type {show(kind)} is unknown; known are nf4 and fp4")
    return BitsAndBytes(where, 4 if four else 8, kind, float(threshold), plain)


@dataclass(frozen=True)
class BitsAndBytes:
    """The scheme. kind: nf4 or fp4, where stated. threshold: inputs of LLM.int8 beyond it stay in 16 bits. skipped: `llm_int8_skip_modules`."""

    where: str
    bits: int
    kind: str | None = None
    threshold: float = 6.0
    skipped: tuple[str, ...] = ()
    kv: KVSpec | None = None

    @property
    def method(self) -> str:
        return "bitsandbytes 4 bit" if self.bits == 4 else "bitsandbytes LLM.int8"

    @property
    def report(self) -> tuple[str, ...]:
        if self.bits == 4:
            return ()
        return (
            "only the weights of LLM.int8 are read; at run time it quantizes inputs per token, save features beyond "
            + f"llm_int8_threshold {self.threshold:g}",
        )

    def weight(self, module: str, parts: Mapping[str, Part], shape: tuple[int, ...]) -> Weight | None:
        stored = parts.get("weight")
        if parts.keys() == {"weight"} and stored is not None and stored.dtype in (*FLOATS, "F64"):
            return None
        if any(names_module(n, module) for n in self.skipped):
            raise InputError(
                f"{module}: is stored quantized ({listed(parts)}), but {self.where} has it among "
                "llm_int8_skip_modules; correct the list: loaders would leave this module without weights"
            )
        if len(shape) != 2:
            raise UnsupportedError(f"{module}: bitsandbytes weights of shape {shape} are not a matrix")
        n, k = shape
        if self.bits == 8:
            return _eight(module, parts, n, k)
        kind, state = _state(module, parts, (n, k))
        if self.kind not in (None, kind):
            raise InputError(
                f"{module}: is stored as {kind}, but {self.where} has bnb_4bit_quant_type {self.kind}; config.json and the "
                "weights do not belong together"
            )
        return _four(module, parts, n, k, kind, state)


# --- 8 bits ------------------------------------------------------------------------------------------------


def _eight(module: str, parts: Mapping[str, Part], n: int, k: int) -> Weight:
    codes = take(module, parts, "weight", ("I8",), (n, k))
    peaks = take(module, parts, "SCB", ("F32", "F16", "BF16"), (n,))
    used = {"weight", "SCB"}
    if "weight_format" in parts:
        found = int(take(module, parts, "weight_format", ("U8",), ()).data.load())
        if found != 0:
            raise UnsupportedError(
                f"{parts['weight_format'].where}: {found} is a layout for one GPU's kernel; save the model with bitsandbytes 0.45 "
                "or later, which stores rows (0)"
            )
        used.add("weight_format")
    checked = finite_scales(peaks.data)

    def scale(start: int, stop: int) -> NDArray[Any]:
        return (as_f32(checked.read(start, stop), peaks.dtype) / np.float32(127)).reshape(-1, 1)

    q = QTensor((n, k), codes.data, int_grid(8, True), (1, -1), view(peaks.data, (n, 1), "F32", scale))
    return Weight(q, frozenset(used))


# --- 4 bits ------------------------------------------------------------------------------------------------


def _four(
    module: str, parts: Mapping[str, Part], n: int, k: int, kind: str, state: Mapping[str, Any]
) -> Weight:
    packed = take(module, parts, "weight", ("U8",), (-(-n * k // 2), 1))
    block = state["blocksize"]
    table = _table(module, parts, "weight.quant_map", 16)
    if not np.allclose(table, TABLES[kind], rtol=0, atol=1e-6):
        raise UnsupportedError(
            f"{parts['weight.quant_map'].where}: is not the table of {kind}, which bitsandbytes uses whatever is stored here; "
            "quantize the model again"
        )

    def codes(start: int, stop: int) -> NDArray[Any]:
        first, last = start * k, stop * k
        found = unpack_nibbles(packed.data.read(first // 2, -(-last // 2)).reshape(1, -1), high_first=True)
        return found.reshape(-1)[first % 2 : first % 2 + last - first].reshape(stop - start, k)

    used = {"weight", "weight.absmax", "weight.quant_map", STATE + kind}
    width = gcd(k, block)
    count = -(-n * k // block)
    scale: Tensor | QTensor
    if "weight.nested_absmax" not in parts:
        absmax = take(module, parts, "weight.absmax", FLOATS, (count,))
        scale = spread(finite_scales(absmax.data), n, k, block)
    else:
        scale, more = _nested(module, parts, state, n, k, count)
        used |= more
    grid = Grid("codebook", 4, values=tuple(map(float, table)))
    q = QTensor((n, k), view(packed.data, (n, k), "U8", codes), grid, (1, width), scale)
    return Weight(q, frozenset(used))


def _nested(
    module: str, parts: Mapping[str, Part], state: Mapping[str, Any], n: int, k: int, count: int
) -> tuple[QTensor, set[str]]:
    """The scales of double quantization, per blocks of gcd(K, B) inputs, and the tensors they are made of."""
    block, outer = state["blocksize"], state["nested_blocksize"] * state["blocksize"]
    absmax = take(module, parts, "weight.absmax", ("U8",), (count,))
    table = _table(module, parts, "weight.nested_quant_map", 256)
    second = take(module, parts, "weight.nested_absmax", ("F32",), (-(-count // state["nested_blocksize"]),))
    codes = spread(absmax.data, n, k, block)
    scale = spread(finite_scales(second.data), n, k, outer)
    minus = np.float32(-state["nested_offset"])
    offset = view(
        second.data, scale.shape, "F32", lambda a, b: np.full((b - a, *scale.shape[1:]), minus, np.float32)
    )
    grid = Grid("codebook", 8, values=tuple(map(float, table)))
    q = QTensor(codes.shape, codes, grid, (1, gcd(k, outer) // gcd(k, block)), scale, offset=offset)
    return q, {"weight.nested_absmax", "weight.nested_quant_map"}


def _table(module: str, parts: Mapping[str, Part], suffix: str, size: int) -> NDArray[np.float32]:
    part = take(module, parts, suffix, ("F32",), (size,))
    table: NDArray[np.float32] = np.asarray(part.data.load(), np.float32)
    if not np.isfinite(table).all():
        raise InputError(f"{part.where}: holds values that are not finite; download the file again")
    return table


def _state(module: str, parts: Mapping[str, Part], shape: tuple[int, int]) -> tuple[str, dict[str, Any]]:
    """The type and the checked JSON of the quant_state."""
    kinds = [s.removeprefix(STATE) for s in parts if s.startswith(STATE)]
    if len(kinds) != 1 or kinds[0] not in TABLES:
        found = show(sorted(kinds)) if kinds else f"none, only {listed(parts) or 'nothing'}"
        raise InputError(
            f"{module}: a 4-bit module has one tensor {STATE}nf4 or {STATE}fp4, found {found}; config.json and the weights do "
            "not belong together"
        )
    part = take(module, parts, STATE + kinds[0], ("U8",), (-1,))
    if part.shape[0] > _STATE_LIMIT:
        raise InputError(
            f"{part.where}: {part.shape[0]} bytes are too many for a quant_state, {_STATE_LIMIT} is the most"
        )
    try:
        state = json.loads(part.data.load().tobytes())
    except (ValueError, RecursionError):
        raise InputError(f"{part.where}: holds no sound JSON; download the file again") from None
    if not isinstance(state, dict):
        raise InputError(f"{part.where}: expected a JSON object, found {show(state)}")
    nested = "weight.nested_absmax" in parts
    rules: dict[str, tuple[str, Callable[[Any], bool]]] = {
        "quant_type": (repr(kinds[0]), lambda v: v == kinds[0]),
        "blocksize": (
            f"one of {', '.join(map(str, sorted(SIZES)))}",
            lambda v: type(v) is int and v in SIZES,
        ),
        "dtype": (f"one of {', '.join(_DTYPES)}", lambda v: isinstance(v, str) and v in _DTYPES),
        "shape": (
            f"{list(shape)}, as config.json implies",
            lambda v: isinstance(v, list) and v == list(shape),
        ),
    }
    if nested:
        rules |= {
            "nested_blocksize": ("256", lambda v: type(v) is int and v == 256),
            "nested_dtype": ("float32", lambda v: isinstance(v, str) and v == "float32"),
            "nested_offset": ("a finite number", _is_offset),
        }
    if unknown := sorted(state.keys() - rules.keys()):
        why = "" if nested else "; without weight.nested_absmax it cannot be doubly quantized"
        raise InputError(
            f"{part.where}: has the unknown key {show(unknown[0])}{why}; download the file again"
        )
    for key, (expected, holds) in rules.items():
        if key not in state or not holds(state[key]):
            raise InputError(
                f"{part.where}: {key} is {show(state[key]) if key in state else 'missing'}, expected {expected}"
            )
    return kinds[0], state


def _is_offset(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) < 3.4e38
