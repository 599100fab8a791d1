"""ModelOpt's unified Hugging Face checkpoints, which TensorRT-LLM and vLLM load: reading and writing.

W is (N, K). `weight` and its scales per algorithm (producer: ModelOpt 0.47, torch/export/quant_utils.py
`to_quantized_weight`, `pack_int4_in_uint8`, `get_weight_scaling_factor(_2)` and unified_export_hf.py
`_export_quantized_weight`; consumers: vLLM layers/quantization/modelopt.py `K*.create_weights` and `resolve`,
TensorRT-LLM _torch/modules/linear.py `*LinearMethod`):

| algorithm                 | weight                      | weight_scale, all multiply       | input                           |
|---------------------------|-----------------------------|----------------------------------|---------------------------------|
| FP8                       | E4M3 (N, K)                 | F32 ()                           | FP8, static input_scale ()      |
| FP8_PER_CHANNEL_PER_TOKEN | E4M3 (N, K)                 | F32 (N,)                         | FP8 per token, dynamic          |
| FP8_PB_WO                 | E4M3 (N, K)                 | F32 (N/128, 1, K/128, 1) or 2-D  | FP8 per 128, dynamic, see below |
| W8A16                     | I8 (N, K)                   | F32 (N,)                         |                                 |
| W8A8_SQ_PER_CHANNEL       | I8 (N, K)                   | F32 (N,)                         | int8, static input_scale ()     |
| W4A16_AWQ                 | U8 (N/2, K)                 | F32 (N, K/g)                     |                                 |
| W4A8_AWQ                  | U8 (N/2, K)                 | F32 (N, K/g), weight_scale_2 ()  | FP8, static input_scale ()      |
| NVFP4, NVFP4_AWQ          | U8 (N, K/2)                 | E4M3 (N, K/16) * weight_scale_2  | NVFP4, static global input_scale |
| W4A16_NVFP4               | U8 (N, K/2)                 | E4M3 (N, K/16) * weight_scale_2  |                                 |
| W4A8_NVFP4_FP8            | U8 (N, K/2)                 | E4M3 (N, K/32) * weight_scale_2  | FP8, static input_scale ()      |
| mxfp4                     | U8 (N, K/2)                 | U8 E8M0 (N, K/32)                | not recorded                    |
| W4A8_MXFP4_FP8            | U8 (N, K/2)                 | U8 E8M0 (N, K/32)                | FP8 per tensor                  |
| MXFP8                     | E4M3 (N, K)                 | U8 E8M0 (N, K/32)                | MXFP8, dynamic                  |

- U8 (N/2, K) holds output rows 2i in the low and 2i + 1 in the high nibbles, int4 in two's complement; U8 (N, K/2)
  neighbouring E2M1 codes of a row, the first in the low nibble.
- `pre_quant_scale` (K,) multiplies the input of any of them first: y = W (x * pre_quant_scale). It stays an unfolded
  Transform. TensorRT-LLM requires it for W4A16_AWQ and W4A8_AWQ where a module is not fused (o_proj, down_proj), and
  does not look for it in most fused ones.
- The weights of W4A8_AWQ are int4 * weight_scale. weight_scale_2 = amax/448 is not part of them: it is the scale at
  which TensorRT-LLM (`W4A8_AWQ_LinearMethod.load_weights_vanilla`) rounds them to FP8 again before it multiplies.
- FP8_PB_WO is weight-only by name; both runtimes quantize its input to FP8 in groups of 128.
- All rows are checked against ModelOpt's own dequantization or packing of the same bytes; files of NVFP4_AWQ exist on GPUs
  only, theirs is NVFP4's row. What the runtimes make of `input_scale` and `pre_quant_scale` is self-checked.
- Excluded modules: `is_module_excluded_from_quantization` of TensorRT-LLM's models/modeling_utils.py, fnmatch of the
  name or any module above it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lconvert.errors import InputError, UnsupportedError
from lconvert.formats.files import show
from lconvert.formats.fp8 import exponents, float_codes, number
from lconvert.formats.json_object import read_object
from lconvert.formats.modelopt_config import (
    ALGORITHMS,
    FLOATS,
    INT8,
    KV,
    SIDE_FILE,
    Settings,
    agree,
    excluder,
    settings_of,
)
from lconvert.formats.modelopt_writer import Writer
from lconvert.formats.scheme import (
    Checkpoint,
    Part,
    Scheme,
    Weight,
    finite_scales,
    groups,
    listed,
    take,
    view,
)
from lconvert.ir import E2M1, E4M3, E8M0, Grid, KVSpec, QTensor, Tensor, Transform, as_f32
from lconvert.kernels.packing import unpack_nibbles, unpack_row_pairs

#: Where older releases list the layers of MIXED_PRECISION (TensorRT-LLM's _torch/model_config.py reads it as well).
LAYERS_FILE = "quant_cfg.json"

__all__ = ["ModelOpt", "Writer", "parse"]


def parse(checkpoint: Checkpoint) -> Scheme:
    """The scheme of config.json's quantization_config and hf_quant_config.json, which must agree."""
    settings = settings_of(checkpoint.config, checkpoint.where)
    side = checkpoint.folder / SIDE_FILE
    if str(side) != checkpoint.where and side.exists():
        settings = agree(settings, settings_of(read_object(side), str(side)))
    older = checkpoint.folder / LAYERS_FILE
    if settings.algo == "MIXED_PRECISION" and older.exists():
        settings = agree(settings, settings_of({"quantization": read_object(older)}, str(older)))
    if settings.algo == "MIXED_PRECISION" and not settings.layers:
        raise InputError(f"{settings.where}: MIXED_PRECISION without quantized_layers; restore {SIDE_FILE}")
    if settings.algo is None and settings.kv is None:
        raise InputError(
            f"{settings.where}: neither quant_algo nor a KV cache algorithm is stated; restore {SIDE_FILE}"
        )
    return ModelOpt(settings, excluder(settings.exclude or ()))


def positive(t: Tensor) -> Tensor:
    """`t`, every read of which must give finite numbers above zero."""

    def read(start: int, stop: int) -> NDArray[Any]:
        x = t.read(start, stop)
        wide = as_f32(x, t.dtype)
        bad = ~((wide > 0) & np.isfinite(wide))
        if bad.any():
            at = int(bad.reshape(-1).argmax())
            raise InputError(
                f"{t.origin}: the scale {wide.reshape(-1)[at]} at {start + at} is damaged, it must be positive; "
                "download the file again"
            )
        return x

    return replace(t, read=read)


def reshaped(t: Tensor, shape: tuple[int, ...]) -> Tensor:
    """The same rows in another shape of as many rows."""
    return view(t, shape, t.dtype, lambda a, b: t.read(a, b).reshape(b - a, *shape[1:]))


def _codes(module: str, parts: Mapping[str, Part], grid: Grid, rows: int, cols: int) -> Tensor:
    if grid == E4M3:
        return float_codes(take(module, parts, "weight", ("F8_E4M3",), (rows, cols)))
    if grid == INT8:
        return take(module, parts, "weight", ("I8",), (rows, cols)).data
    if grid == E2M1:
        if cols % 2:
            raise InputError(f"{module}: {cols} input features do not pair up in bytes")
        pairs = take(module, parts, "weight", ("U8",), (rows, cols // 2)).data
        return view(pairs, (rows, cols), "U8", lambda a, b: unpack_nibbles(pairs.read(a, b)))
    if rows % 2:
        raise InputError(f"{module}: {rows} output features do not pair up in bytes; two rows share one")
    packed = take(module, parts, "weight", ("U8",), (rows // 2, cols)).data

    def read(start: int, stop: int) -> NDArray[Any]:
        first = start // 2
        both = unpack_row_pairs(packed.read(first, max(first, -(-stop // 2))))
        return both[start - 2 * first : stop - 2 * first]

    return view(packed, (rows, cols), "I8", read)


def _scale(module: str, parts: Mapping[str, Part], block: tuple[int, int], rows: int, cols: int) -> Tensor:
    """The plain scales of weights, one per block, as a matrix."""
    shape = tuple(1 if b == -1 else -(-n // b) for n, b in zip((rows, cols), block, strict=True))
    if block == (-1, -1):
        return number(module, parts, "weight_scale", FLOATS, (1, 1))
    stored: tuple[int, ...] = shape
    found = parts["weight_scale"].shape if "weight_scale" in parts else ()
    if block == (1, -1) and len(found) == 1:
        stored = (rows,)
    elif block[0] > 1 and found in ((shape[0], 1, shape[1], 1), ()):
        stored = found  # () is what ModelOpt makes of a single block
    data = take(module, parts, "weight_scale", FLOATS, stored).data
    if data.size != shape[0] * shape[1]:
        raise InputError(
            f"{module}: its weight_scale is one number, but there are {shape} blocks; download the file again"
        )
    return finite_scales(reshaped(data, shape))


def _second(module: str, parts: Mapping[str, Part], grid: Grid, rows: int, width: int) -> QTensor:
    """Scales that are codes: E4M3 times a global scale, or powers of two."""
    if grid == E8M0:
        return exponents(take(module, parts, "weight_scale", ("U8", "F8_E8M0"), (rows, width)))
    codes = float_codes(take(module, parts, "weight_scale", ("F8_E4M3",), (rows, width)))

    def read(start: int, stop: int) -> NDArray[Any]:
        found = codes.read(start, stop)
        if (bad := found == 0x80).any():
            at = start + int(np.argwhere(bad)[0][0])
            raise InputError(f"{codes.origin}: a scale in row {at} is negative zero; download the file again")
        return found

    outer = number(module, parts, "weight_scale_2", FLOATS, (1, 1))
    return QTensor((rows, width), replace(codes, read=read), grid, (-1, -1), outer)


@dataclass(frozen=True)
class ModelOpt:
    """A ModelOpt configuration, understood."""

    settings: Settings
    excluded: Callable[[str], str | None]

    @property
    def method(self) -> str:
        s = self.settings
        group = f", group {s.group}" if s.algo and s.group else ""
        return f"ModelOpt {s.algo or f'KV cache {s.kv}'}{group}"

    @property
    def _names(self) -> set[str]:
        return {algo for algo, _ in (self.settings.layers or {}).values()} | {self.settings.algo or ""}

    @property
    def report(self) -> tuple[str, ...]:
        notes = {
            "MXFP4": "ModelOpt's mxfp4 does not record whether activations are quantized; read as weight-only",
            "W4A8_AWQ": "weight_scale_2 is no part of the weights (it scales TensorRT-LLM's rounding of them to FP8); a "
            "W4A8_AWQ artifact gets one of its own",
            "FP8_PB_WO": "FP8_PB_WO is weight-only by name; its input is quantized to FP8 per 128, as vLLM and "
            "TensorRT-LLM do",
        }
        return tuple(text for name, text in notes.items() if name in self._names)

    @property
    def kv(self) -> KVSpec | None:
        return None if self.settings.kv is None else KVSpec(KV[self.settings.kv], KV[self.settings.kv])

    def _of(self, module: str) -> tuple[str, int | None] | None:
        """Algorithm and group size of a module; layers may be listed by a module above them (experts)."""
        s = self.settings
        if s.algo is None:
            return None
        if s.algo != "MIXED_PRECISION":
            return s.algo, s.group
        layers, name = s.layers or {}, module
        while name:
            if name in layers:
                return layers[name]
            name = name.rpartition(".")[0]
        return None

    def weight(self, module: str, parts: Mapping[str, Part], shape: tuple[int, ...]) -> Weight | None:
        s, stored = self.settings, parts.get("weight")
        if stored is not None and parts.keys() == {"weight"} and stored.dtype in (*FLOATS, "F64"):
            if module not in (s.layers or {}):
                return None  # norms, embeddings and routers are not always listed as excluded
            raise InputError(
                f"{stored.where}: is stored as plain {stored.dtype}, but {s.where} lists it as quantized; the two do not "
                "belong together"
            )
        found, pattern = self._of(module), self.excluded(module)
        if found is None or pattern is not None:
            says = f"excludes it by {show(pattern)}" if pattern else "does not list it as quantized"
            raise InputError(
                f"{module}: is stored as {listed(parts)}, but {s.where} {says}; the two do not belong together"
            )
        if len(shape) != 2:
            raise UnsupportedError(f"{module}: {s.algo} weights of shape {shape} are not a matrix")
        return _read(module, parts, *found, shape[0], shape[1])


def _read(
    module: str, parts: Mapping[str, Part], name: str, group: int | None, rows: int, cols: int
) -> Weight:
    algo = ALGORITHMS[name]
    block, used = algo.block, {"weight", "weight_scale"}
    if block == (1, 0):
        columns = parts["weight_scale"].shape[1:] if "weight_scale" in parts else ()
        if group is None and len(columns) == 1 and columns[0] and cols % columns[0] == 0:
            group = cols // columns[0]
        if group is None:
            raise InputError(f"{module}: neither {SIDE_FILE} nor the scales tell the group size of {name}")
        block = (1, group)
    elif algo.second is not None and group not in (None, block[1]):
        raise UnsupportedError(f"{module}: {name} in groups of {group}; {name} has groups of {block[1]}")
    elif block[0] > 1 and group is not None:
        block = (group, group)
    if block[1] > 0 and block[0] == 1:
        groups(module, cols, block[1])
    codes = _codes(module, parts, algo.grid, rows, cols)
    scale: Tensor | QTensor
    if algo.second is not None:
        scale = _second(module, parts, algo.second, rows, cols // block[1])
        used |= {"weight_scale_2"} if algo.second == E4M3 else set()
    else:
        scale = _scale(module, parts, block, rows, cols)
    if name == "W4A8_AWQ":
        number(module, parts, "weight_scale_2", FLOATS, (1,)).load()
        used.add("weight_scale_2")
    activation, inert = algo.activation, frozenset[str]()
    if algo.input_scale == "inert":
        inert = frozenset({"input_scale"} & parts.keys())
    elif activation is not None and (algo.input_scale == "required" or "input_scale" in parts):
        activation = replace(activation, scale=number(module, parts, "input_scale", FLOATS, (1,)))
        used.add("input_scale")
    elif activation is not None:  # TensorRT-LLM then finds the scale for each input
        activation = replace(activation, dynamic=True)
    transform = None
    if "pre_quant_scale" in parts:
        param = take(module, parts, "pre_quant_scale", FLOATS, (cols,)).data
        transform = Transform("scale", "input", positive(param), folded=False)
        used.add("pre_quant_scale")
    q = QTensor((rows, cols), codes, algo.grid, block, scale)
    return Weight(q, frozenset(used), activation, transform, inert)
