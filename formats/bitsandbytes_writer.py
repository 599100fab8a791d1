"""bitsandbytes' nf4 and fp4 as a target, and what reading them shares with it.

The layout is that of lconvert.formats.bitsandbytes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lconvert.errors import UnsupportedError
from lconvert.formats.config_values import names_module
from lconvert.formats.flat_blocks import collected, repeats, span
from lconvert.formats.int_groups import refuse_kv
from lconvert.formats.scheme import Held, Stored
from lconvert.ir import Grid, KVSpec, QTensor, Tensor
from lconvert.kernels.packing import pack_nibbles

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
#: The quant_state of a module, before its type.
STATE = "weight.quant_state.bitsandbytes__"


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
            codes = span(q.codes, 2 * start, min(2 * stop, n * k)).reshape(1, -1)
            return pack_nibbles(np.ascontiguousarray(codes), high_first=True).reshape(-1, 1)

        state: dict[str, Any] = {"quant_type": kind, "blocksize": block, "dtype": self.dtype, "shape": [n, k]}
        out = {
            "weight": Stored("U8", (-(-n * k // 2), 1), weight),
            "weight.quant_map": _small(np.asarray(TABLES[kind], np.float32)),
        }
        count = -(-n * k // block)
        if isinstance(q.scale, Tensor):
            out["weight.absmax"] = Stored("F32", (count,), partial(collected, q.scale, k, block))
        else:
            second = q.scale
            assert isinstance(second.scale, Tensor) and isinstance(second.offset, Tensor)
            outer = Stored("F32", (-(-count // 256),), partial(collected, _columns(second), k, 256 * block))
            out["weight.absmax"] = Stored("U8", (count,), partial(collected, second.codes, k, block))
            out["weight.nested_absmax"] = outer
            out["weight.nested_quant_map"] = _small(np.asarray(second.grid.values, np.float32))
            offset = -float(second.offset.read(0, 1).reshape(-1)[0])
            state |= {"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": offset}
        out[STATE + kind] = _small(np.frombuffer(json.dumps(state).encode(), np.uint8))
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
        if all(repeats(side, k, size) for side, size in sides):
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
