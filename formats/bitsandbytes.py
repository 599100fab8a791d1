"""bitsandbytes checkpoints, as transformers saves them: reading nf4, fp4 and LLM.int8, writing nf4 and fp4.

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
from dataclasses import dataclass, field, replace
from functools import partial
from math import gcd
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lconvert.errors import InputError, UnsupportedError
from lconvert.formats.files import show
from lconvert.formats.int_groups import flag, refuse_kv
from lconvert.formats.scheme import Checkpoint, Held, Part, Stored, Weight, finite_scales, listed, take, view
from lconvert.ir import Grid, KVSpec, QTensor, Tensor, as_f32, int_grid
from lconvert.kernels.packing import pack_nibbles, unpack_nibbles

#: The tables of bitsandbytes' functional.py `get_4bit_type`; fp4 is divided by its largest value, 12.
_FP4_TWELFTHS = (0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0)
TABLES: Mapping[str, tuple[float, ...]] = {
    "nf4": (
        -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
        -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
        0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
    ),
    "fp4": tuple(
        float(np.float32(sign * v) / np.float32(12)) + 0.0 for sign in (1, -1) for v in _FP4_TWELFTHS
    ),
}  # fmt: skip
#: Block sizes that `dequantize_4bit` accepts, those first that all versions do.
SIZES = (64, 128, 256, 512, 1024, 2048, 4096, 32)
FLOATS = ("F32", "F16", "BF16")
_STATE = "weight.quant_state.bitsandbytes__"
#: Bytes of a quant_state; bitsandbytes writes fewer than 200.
_STATE_LIMIT = 4096
_ROWS = 64  # of scales that are compared at a time
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
    if unknown := sorted(config.keys() - _KEYS):
        raise InputError(
            f"{where}: quantization_config has the unknown key {show(unknown[0])}; bitsandbytes' are {', '.join(sorted(_KEYS))}"
        )
    four, eight = (
        flag(config, f"load_in_{n}bit", where, flag(config, f"_load_in_{n}bit", where, False)) for n in (4, 8)
    )
    if four == eight:
        raise InputError(
            f"{where}: {'both' if four else 'neither'} of load_in_4bit and load_in_8bit {'are' if four else 'is'} true; set the "
            "one that the weights were quantized with"
        )
    skipped = config.get("llm_int8_skip_modules")
    if skipped is not None and (
        not isinstance(skipped, list) or not all(isinstance(n, str) and n for n in skipped)
    ):
        raise InputError(
            f"{where}: llm_int8_skip_modules is {show(skipped)}, expected a list of module names"
        )
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
    return BitsAndBytes(where, 4 if four else 8, kind, float(threshold), tuple(skipped or ()))


def names_module(listed: str, module: str) -> bool:
    """Whether transformers skips `module` for a name in such a list (quantizers_utils.py `should_convert_module`).

    It also takes names as regular expressions, which here only match themselves.
    """
    return f"{module}.".startswith(f"{listed}.") or module.endswith(listed)


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

    used = {"weight", "weight.absmax", "weight.quant_map", _STATE + kind}
    width = gcd(k, block)
    count = -(-n * k // block)
    scale: Tensor | QTensor
    if "weight.nested_absmax" not in parts:
        absmax = take(module, parts, "weight.absmax", FLOATS, (count,))
        scale = flat_blocks(finite_scales(absmax.data), n, k, block)
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
    codes = flat_blocks(absmax.data, n, k, block)
    scale = flat_blocks(finite_scales(second.data), n, k, outer)
    minus = np.float32(-state["nested_offset"])
    offset = view(
        second.data, scale.shape, "F32", lambda a, b: np.full((b - a, *scale.shape[1:]), minus, np.float32)
    )
    grid = Grid("codebook", 8, values=tuple(map(float, table)))
    q = QTensor(codes.shape, codes, grid, (1, gcd(k, outer) // gcd(k, block)), scale, offset=offset)
    return q, {"weight.nested_absmax", "weight.nested_quant_map"}


def flat_blocks(side: Tensor, n: int, k: int, block: int) -> Tensor:
    """One value per `block` of the flattened (n, k) weight as one per row and gcd(k, block) inputs."""
    width = gcd(k, block)
    columns = np.arange(k // width, dtype=np.int64) * width

    def read(start: int, stop: int) -> NDArray[Any]:
        at = (np.arange(start, stop, dtype=np.int64)[:, None] * k + columns) // block
        if not at.size:
            return np.empty(at.shape, side.read(0, 0).dtype)
        first = int(at[0, 0])
        found: NDArray[Any] = side.read(first, int(at[-1, -1]) + 1)[at - first]
        return found

    return view(side, (n, k // width), side.dtype, read)


def _table(module: str, parts: Mapping[str, Part], suffix: str, size: int) -> NDArray[np.float32]:
    part = take(module, parts, suffix, ("F32",), (size,))
    table: NDArray[np.float32] = np.asarray(part.data.load(), np.float32)
    if not np.isfinite(table).all():
        raise InputError(f"{part.where}: holds values that are not finite; download the file again")
    return table


def _state(module: str, parts: Mapping[str, Part], shape: tuple[int, int]) -> tuple[str, dict[str, Any]]:
    """The type and the checked JSON of the quant_state."""
    kinds = [s.removeprefix(_STATE) for s in parts if s.startswith(_STATE)]
    if len(kinds) != 1 or kinds[0] not in TABLES:
        found = show(sorted(kinds)) if kinds else f"none, only {listed(parts) or 'nothing'}"
        raise InputError(
            f"{module}: a 4-bit module has one tensor {_STATE}nf4 or {_STATE}fp4, found {found}; config.json and the weights do "
            "not belong together"
        )
    part = take(module, parts, _STATE + kinds[0], ("U8",), (-1,))
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


# --- writing -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Writer:
    """4-bit bitsandbytes as a target. dtype: in which the runtime dequantizes, best the model's."""

    dtype: str = "bfloat16"
    kv_names: tuple[str, str] = field(default=("{attn}.k_scale", "{attn}.v_scale"), init=False)

    def problem(self, held: Held) -> str | None:
        q = held.weight
        if q is None:
            return None
        if held.activation is not None:
            return "bitsandbytes' 4 bits quantize weights only, this module quantizes its input as well"
        if held.transform is not None and not held.transform.folded:
            return f"bitsandbytes has no place for an unfolded {held.transform.kind} of the {held.transform.where}"
        if _kind(q) is None:
            return "bitsandbytes holds the 16 values of nf4 or fp4 only"
        if q.zero is not None or q.offset is not None or q.g_idx is not None or q.divisor:
            return (
                "bitsandbytes' 4 bits have multiplying scales only, no zero points, offsets or column orders"
            )
        if q.mask is not None or q.outliers or q.low_rank is not None:
            return "bitsandbytes has no place for masks, outliers or low-rank corrections"
        if len(q.shape) != 2 or q.block[0] != 1:
            return f"bitsandbytes needs groups along the inputs of each row, not blocks of {q.block}"
        if isinstance(q.scale, QTensor):
            if (why := _nested_problem(q.scale)) is not None:
                return why
        elif q.scale.dtype != "F32":
            return f"bitsandbytes holds scales in F32, these are {q.scale.dtype}; widen them, which is exact"
        if _blocksize(q) is None and isinstance(q.scale, QTensor):
            return "bitsandbytes quantizes scales in runs of 256 over the flattened weight, these runs lie elsewhere"
        if _blocksize(q) is None:
            return (
                f"bitsandbytes has blocks of 32, 64, 128 ... 4096 values, these groups are {_width(q)} wide"
            )
        return None

    def store(self, held: Held) -> dict[str, Stored]:
        q = held.weight
        if q is None:
            return {}
        kind, block, (n, k) = _kind(q), _blocksize(q), q.shape
        assert kind is not None and block is not None

        def weight(start: int, stop: int) -> NDArray[Any]:
            codes = _span(q.codes, 2 * start, min(2 * stop, n * k)).reshape(1, -1)
            return pack_nibbles(np.ascontiguousarray(codes), high_first=True).reshape(-1, 1)

        state: dict[str, Any] = {"quant_type": kind, "blocksize": block, "dtype": self.dtype, "shape": [n, k]}
        out = {
            "weight": Stored("U8", (-(-n * k // 2), 1), weight),
            "weight.quant_map": _small(np.asarray(TABLES[kind], np.float32)),
        }
        count = -(-n * k // block)
        if isinstance(q.scale, Tensor):
            out["weight.absmax"] = Stored("F32", (count,), partial(_flat, q.scale, k, block))
        else:
            second = q.scale
            assert isinstance(second.scale, Tensor) and isinstance(second.offset, Tensor)
            outer = Stored("F32", (-(-count // 256),), partial(_flat, _columns(second), k, 256 * block))
            out["weight.absmax"] = Stored("U8", (count,), partial(_flat, second.codes, k, block))
            out["weight.nested_absmax"] = outer
            out["weight.nested_quant_map"] = _small(np.asarray(second.grid.values, np.float32))
            offset = -float(second.offset.read(0, 1).reshape(-1)[0])
            state |= {"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": offset}
        out[_STATE + kind] = _small(np.frombuffer(json.dumps(state).encode(), np.uint8))
        return out

    def config(self, modules: Mapping[str, Held], kv: KVSpec | None) -> dict[str, Any]:
        """transformers' BitsAndBytesConfig. UnsupportedError where modules differ in type, or plain ones hide others."""
        refuse_kv("bitsandbytes", kv)
        quantized = {name: held.weight for name, held in modules.items() if held.weight is not None}
        plain = [name for name in modules if name not in quantized]
        kinds = {_kind(q) for q in quantized.values()}
        if len(kinds) != 1:
            found = " and ".join(sorted(map(str, kinds))) or "no quantized module"
            raise UnsupportedError(f"bitsandbytes has one type for all modules, this model has {found}")
        for name in plain:
            if hidden := next((m for m in quantized if names_module(name, m)), None):
                raise UnsupportedError(
                    f"transformers would skip {hidden} along with the plain {name}; write compressed-tensors instead"
                )
        return {
            "quant_method": "bitsandbytes",
            "load_in_4bit": True,
            "load_in_8bit": False,
            "bnb_4bit_quant_type": kinds.pop(),
            "bnb_4bit_use_double_quant": any(isinstance(q.scale, QTensor) for q in quantized.values()),
            "bnb_4bit_compute_dtype": self.dtype,
            "bnb_4bit_quant_storage": "uint8",
            "llm_int8_enable_fp32_cpu_offload": False,
            "llm_int8_has_fp16_weight": False,
            "llm_int8_skip_modules": plain,
            "llm_int8_threshold": 6.0,
        }

    def side_files(self, config: Mapping[str, Any]) -> dict[str, Any]:
        return {}


def _small(array: NDArray[Any]) -> Stored:
    names = {"float32": "F32", "uint8": "U8"}
    return Stored(names[array.dtype.name], array.shape, lambda a, b: array[a:b], whole=True)


def _kind(q: QTensor) -> str | None:
    """The type whose table a grid is."""
    return next((k for k, v in TABLES.items() if q.grid == Grid("codebook", 4, values=v)), None)


def _width(q: QTensor) -> int:
    return q.shape[1] if q.block[1] == -1 else q.block[1]


def _nested_problem(s: QTensor) -> str | None:
    """Why quantized scales are not those of double quantization."""
    words = "bitsandbytes quantizes scales to 8 bits on a table, with one F32 scale per 256 and one offset for all"
    if (
        s.grid.kind != "codebook"
        or s.grid.lattice
        or len(s.grid.values) != 256
        or s.zero is not None
        or s.divisor
    ):
        return words
    if not isinstance(s.scale, Tensor) or not isinstance(s.offset, Tensor) or s.block[0] != 1:
        return words
    if (s.scale.dtype, s.offset.dtype) != ("F32", "F32"):
        return words
    offset = s.offset.load()
    return None if bool((offset == offset.reshape(-1)[0]).all()) else words


def _blocksize(q: QTensor) -> int | None:
    """The block size of the flattened weight to which the groups of `q` belong; None if there is none.

    Looks at the scales where groups are parts of blocks, as they are where rows hold no whole blocks.
    """
    width, k = _width(q), q.shape[1]
    for block in SIZES:
        if block % width or k % width:
            continue
        if isinstance(q.scale, Tensor):
            sides = [(q.scale, block)]
        else:
            sides = [(q.scale.codes, block), (_columns(q.scale), 256 * block)]
        if all(_repeats(side, k, size) for side, size in sides):
            return block
    return None


def _columns(s: QTensor) -> Tensor:
    """The inner scale of double quantization, one value per scale."""
    assert isinstance(s.scale, Tensor)
    inner, cols = s.scale, s.shape[1]
    width = cols if s.block[1] == -1 else s.block[1]
    return replace(
        inner, shape=s.shape, read=lambda a, b: np.repeat(inner.read(a, b), width, axis=1)[:, :cols]
    )


def _repeats(side: Tensor, k: int, block: int) -> bool:
    """Whether values (n, groups) are equal, bit for bit, within every `block` of the flattened weight."""
    groups = side.shape[1]
    times, last = block // (k // groups), None
    if times == 1:
        return True
    for start in range(
        0, side.rows, _ROWS
    ):  # mostly over after the first rows, which need not be whole blocks
        found = side.read(start, min(start + _ROWS, side.rows)).reshape(-1)
        bits = found.view(f"u{found.itemsize}")
        before = np.concatenate((bits[:1] if last is None else last, bits[:-1]))
        inside = np.arange(start * groups, start * groups + bits.size) % times != 0
        if bool((bits != before)[inside].any()):
            return False
        last = bits[-1:]
    return True


def _span(t: Tensor, first: int, last: int) -> NDArray[Any]:
    """Values first..last of the flattened matrix."""
    k = t.shape[1]
    row = first // k
    found: NDArray[Any] = t.read(row, max(row, -(-last // k))).reshape(-1)
    return found[first - row * k : last - row * k]


def _flat(side: Tensor, k: int, block: int, start: int, stop: int) -> NDArray[Any]:
    """Values start..stop of those per `block` of the flattened weight."""
    times = block // (k // side.shape[1])
    return np.ascontiguousarray(_span(side, start * times, min(stop * times, side.size))[::times])
