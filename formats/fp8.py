"""FP8 checkpoints without a tool's name: DeepSeek's blocks, one scale per tensor, and FBGEMM's one per row.

`fp8`, block: `weight` E4M3 (N, K), `weight_scale_inv` F32 (or E8M0) (ceil(N / 128), ceil(K / 128)), which multiplies
despite its name (transformers integrations/finegrained_fp8.py `Fp8Dequantize`; vLLM layers/quantization/fp8.py
`Fp8LinearMethod`); activations are quantized per token in groups of 128 when the model runs. Without
`weight_block_size`: one number, `weight_scale` and, where it is static, `input_scale` (AutoFP8, vLLM), or
`weight_scale_inv` and `activation_scale` (transformers `FP8Linear`); all of them multiply.

`fbgemm_fp8`: `weight_scale` F32 (N, 1); activations per token, their scales bounded: the largest magnitude of a token is
taken as min(it, activation_scale_ub) (transformers integrations/fbgemm_fp8.py `FbgemmFp8Linear`, vLLM
layers/quantization/input_quant_fp8.py). The bound is part of the function: it is `ActSpec.scale` of a dynamic per-token
ActSpec, the largest scale there can be (bound / 448, in F64, so that the bound comes back exactly).

Which modules are quantized is told by the type of `weight`; a list of exceptions that contradicts it is an error.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lconvert.errors import InputError, UnsupportedError
from lconvert.formats.config_values import name_list, refuse_unknown
from lconvert.formats.files import show
from lconvert.formats.gguf_blocks import one
from lconvert.formats.scheme import Checkpoint, Held, Part, Stored, Weight, finite_scales, take, view
from lconvert.ir import E4M3, E8M0, ActSpec, KVSpec, QTensor, Tensor, as_f32, dense
from lconvert.spec import blocks

FLOATS = ("F32", "F16", "BF16")
#: The largest E4M3 number.
LARGEST = 448.0
_F32_MAX = float(np.finfo(np.float32).max)
BLOCK = (128, 128)

_KEYS = {
    "fp8": {
        "quant_method", "fmt", "activation_scheme", "weight_block_size", "modules_to_not_convert", "ignored_layers",
        "dequantize", "scale_fmt", "kv_cache_scheme", "modules_to_convert", "expert_dtype",
    },
    "fbgemm_fp8": {"quant_method", "activation_scale_ub", "modules_to_not_convert"},
}  # fmt: skip
_KV_SCALES = (".k_scale", ".v_scale", ".kv_scale", "k_proj.output_scale", "v_proj.output_scale")


# --- 8-bit floats, also for compressed-tensors -------------------------------------------------------------


def float_codes(part: Part) -> Tensor:
    """The bytes of stored E4M3 numbers; reading a NaN among them is an InputError."""

    def read(start: int, stop: int) -> NDArray[Any]:
        found = part.data.read(start, stop)
        if (bad := (found & 0x7F) == 0x7F).any():
            at = start + int(np.nonzero(bad.reshape(len(found), -1).any(axis=1))[0][0])
            raise InputError(f"{part.where}: row {at} holds a NaN; download the file again")
        return found

    return view(part.data, part.shape, "U8", read)


def exponents(part: Part) -> QTensor:
    """Stored E8M0 scales, 2^(byte - 127), as a QTensor; reading a NaN (255) among them is an InputError."""

    def read(start: int, stop: int) -> NDArray[Any]:
        found = part.data.read(start, stop)
        if (bad := found == 255).any():
            at = start + int(np.nonzero(bad.reshape(len(found), -1).any(axis=1))[0][0])
            raise InputError(f"{part.where}: a scale in row {at} is NaN; download the file again")
        return found

    codes = view(part.data, part.shape, "U8", read)
    return QTensor(part.shape, codes, E8M0, (-1, -1), one(codes))


def number(
    module: str, parts: Mapping[str, Part], suffix: str, dtypes: tuple[str, ...], shape: tuple[int, ...]
) -> Tensor:
    """A stored scale of a whole tensor, of shape () or (1,), as `shape`; reading it checks that it is positive."""
    wanted = (1,) if suffix in parts and parts[suffix].shape == (1,) else ()
    part = take(module, parts, suffix, dtypes, wanted)

    def read(start: int, stop: int) -> NDArray[Any]:
        found = part.data.load().reshape(shape)
        value = float(as_f32(found, part.dtype).reshape(-1)[0])
        if not 0 < value < float("inf"):
            raise InputError(
                f"{part.where}: the scale {value} is damaged, it must be positive; download the file again"
            )
        return found[start:stop]

    return view(part.data, shape, part.dtype, read)


def plain_or_error(module: str, parts: Mapping[str, Part], why: str) -> None:
    """InputError unless the module holds a float `weight` and nothing else; `why` says who says that it should."""
    for suffix, part in sorted(parts.items(), key=lambda p: len(p[0])):  # the weight itself tells most
        if suffix != "weight" or part.dtype not in FLOATS:
            raise InputError(
                f"{part.where}: stored as {part.dtype}, but {why}; config.json and the weights do not belong together"
            )


# --- reading -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Fp8:
    """The scheme. block: of the weights, (-1, -1) one scale per tensor, (1, -1) one per row.

    activation: without its static scales; plain: names of `modules_to_not_convert`.
    """

    where: str
    method: str
    block: tuple[int, int]
    activation: ActSpec
    plain: tuple[str, ...]
    bound: float | None = None
    kv: KVSpec | None = None
    report: tuple[str, ...] = ()

    def weight(self, module: str, parts: Mapping[str, Part], shape: tuple[int, ...]) -> Weight | None:
        listed = next((n for n in self.plain if _covers(n, module)), None)
        eight = any(p.dtype.startswith("F8_") for s, p in parts.items() if s == "weight")
        if listed is not None:
            plain_or_error(module, parts, f"{self.where} lists {show(listed)} as not quantized")
            return None
        if not eight:
            plain_or_error(
                module, parts, f"its weight is no 8-bit float, so that {self.method} has no place for it"
            )
            return None
        data = float_codes(take(module, parts, "weight", ("F8_E4M3",), shape))
        found = [s for s in ("weight_scale_inv", "weight_scale") if s in parts]
        if len(found) > 1:
            raise InputError(f"{module}: has both {' and '.join(found)}; only one of them can be its scale")
        name = (
            found[0]
            if found
            else ("weight_scale_inv" if self.block not in ((-1, -1), (1, -1)) else "weight_scale")
        )
        q = QTensor(shape, data, E4M3, self.block, self._scale(module, parts, name, shape))
        activation, used = self._activation(module, parts)
        return Weight(q, frozenset({"weight", name, *used}), activation)

    def _scale(
        self, module: str, parts: Mapping[str, Part], name: str, shape: tuple[int, ...]
    ) -> Tensor | QTensor:
        if self.block == (-1, -1):
            return number(module, parts, name, FLOATS, (1, 1))
        part = take(module, parts, name, (*FLOATS, "F8_E8M0"), blocks(shape, self.block))
        return exponents(part) if part.dtype == "F8_E8M0" else finite_scales(part.data)

    def _activation(self, module: str, parts: Mapping[str, Part]) -> tuple[ActSpec, set[str]]:
        spec = self.activation
        if self.bound is not None:
            scale = dense(
                np.array([self.bound / LARGEST], np.float64), origin=f"{self.where}: activation_scale_ub"
            )
            if "input_scale_ub" not in parts:
                return ActSpec(spec.grid, spec.per, True, scale=scale), set()
            stored = number(module, parts, "input_scale_ub", ("F32",), (1,)).load()[0]
            if stored != np.float32(self.bound):
                raise InputError(
                    f"{parts['input_scale_ub'].where}: is {stored}, activation_scale_ub in {self.where} is {self.bound}; "
                    "config.json and the weights do not belong together"
                )
            return ActSpec(spec.grid, spec.per, True, scale=scale), {"input_scale_ub"}
        if spec.dynamic:
            return spec, set()
        name = "activation_scale" if "activation_scale" in parts else "input_scale"
        return ActSpec(spec.grid, spec.per, False, scale=number(module, parts, name, FLOATS, (1,))), {name}


def _covers(listed: str, module: str) -> bool:
    """Whether a name of modules_to_not_convert means this module: itself, a part of its path from either end."""
    return f".{module}.".startswith(f".{listed}.") or f".{module}.".endswith(f".{listed}.")


def parse(checkpoint: Checkpoint) -> Fp8:
    """The scheme of `quantization_config` with quant_method fp8 or fbgemm_fp8."""
    config, where = checkpoint.config, checkpoint.where
    method = str(config["quant_method"])
    refuse_unknown(config, _KEYS[method], f"{where}: quantization_config", f"for {method} known are")
    plain = name_list(config.get("modules_to_not_convert") or [], "modules_to_not_convert", where)
    plain = plain or name_list(config.get("ignored_layers") or [], "ignored_layers", where)
    if method == "fbgemm_fp8":
        bound = config.get("activation_scale_ub")
        if isinstance(bound, bool) or not isinstance(bound, int | float) or not 0 < bound <= _F32_MAX:
            raise InputError(f"{where}: activation_scale_ub is {show(bound)}, expected a positive number")
        note = f"activations: a token's largest magnitude counts as at most {bound}"
        token = ActSpec(E4M3, "token", True)
        return Fp8(
            where, "fbgemm_fp8, one scale per row", (1, -1), token, plain, float(bound), report=(note,)
        )
    for key, only in (
        ("fmt", ("e4m3", None)),
        ("expert_dtype", ("fp8", None)),
        ("modules_to_convert", ([], None)),
    ):
        if config.get(key) not in only:
            raise UnsupportedError(
                f"{where}: {key} is {show(config[key])}, which lconvert cannot read; only {only[0]!r} is"
            )
    block, activation = _structure(where, config)
    report = []
    if config.get("scale_fmt") == "ue8m0":
        report.append(
            "scale_fmt ue8m0: runtimes that follow it round the scales of activations up to powers of two"
        )
    words = f"block {block[0]}x{block[1]}" if block != (-1, -1) else "one scale per tensor"
    kv = _kv(checkpoint)
    return Fp8(where, f"fp8, {words}", block, activation, plain, kv=kv, report=tuple(report))


def _structure(where: str, config: Mapping[str, Any]) -> tuple[tuple[int, int], ActSpec]:
    """Block of the weights and the activations that belong to it."""
    scheme = config.get("activation_scheme", "dynamic")
    if scheme not in ("dynamic", "static"):
        raise InputError(f"{where}: activation_scheme is {show(scheme)}, expected 'dynamic' or 'static'")
    size = config.get("weight_block_size")
    if size is None:
        return (-1, -1), ActSpec(E4M3, "tensor", scheme == "dynamic")
    if (
        not isinstance(size, list)
        or len(size) != 2
        or any(type(n) is not int or not 0 < n < 1 << 31 for n in size)
    ):
        raise InputError(
            f"{where}: weight_block_size is {show(size)}, expected two positive numbers such as [128, 128]"
        )
    if scheme == "static":
        raise UnsupportedError(f"{where}: static activations with blocks of weights; no runtime reads that")
    return (size[0], size[1]), ActSpec(E4M3, "group", True, group=size[1])


def _kv(checkpoint: Checkpoint) -> KVSpec | None:
    """AutoFP8 stores scales of the KV cache and says "kv_cache_scheme": "static"; either is taken for both."""
    value = checkpoint.config.get("kv_cache_scheme")
    if value not in (None, "static"):
        raise UnsupportedError(
            f"{checkpoint.where}: kv_cache_scheme is {show(value)}; for fp8 only 'static' can be read"
        )
    if value is None and not any(n.endswith(_KV_SCALES) for n in checkpoint.names):
        return None
    spec = ActSpec(E4M3, "tensor", False)
    return KVSpec(spec, spec)


# --- writing -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Writer:
    """Block FP8 with DeepSeek's names, for vLLM and transformers.

    Takes E4M3 weights with plain scales per block of one size in the whole model, and activations quantized per token in
    groups as wide as a block: the format has no words for anything else.
    """

    kv_names: tuple[str, str] = ("{attn}.k_scale", "{attn}.v_scale")

    def problem(self, held: Held) -> str | None:
        q = held.weight
        if q is None:
            return None
        if q.grid != E4M3 or q.zero is not None or q.offset is not None or q.divisor:
            return "block FP8 holds E4M3 numbers with multiplying scales only"
        if q.g_idx is not None or q.mask is not None or q.outliers or q.low_rank is not None:
            return "block FP8 has no place for column orders, masks, outliers or low-rank corrections"
        if held.transform is not None:
            return "its input is scaled first (pre_quant_scale), which block FP8 cannot say"
        if len(q.block) != 2 or min(q.block) < 2:
            return f"blocks {q.block} are no squares of weights such as {BLOCK}"
        if not isinstance(q.scale, Tensor) or q.scale.dtype not in FLOATS:
            return "vLLM reads these scales as F32 only; widen the exponents to F32, which is exact"
        a = held.activation
        if (
            a is None
            or (a.grid, a.per, a.dynamic, a.group) != (E4M3, "group", True, q.block[1])
            or a.scale is not None
        ):
            return f"block FP8 always quantizes activations per token in groups of {q.block[1]}"
        return None

    def store(self, held: Held) -> dict[str, Stored]:
        q = held.weight
        if q is None:
            return {}
        assert isinstance(q.scale, Tensor)
        return {
            "weight": Stored("F8_E4M3", q.shape, q.codes.read),
            "weight_scale_inv": Stored(q.scale.dtype, q.scale.shape, q.scale.read),
        }

    def config(self, modules: Mapping[str, Held], kv: KVSpec | None) -> dict[str, Any]:
        """UnsupportedError for blocks of several sizes, and for a quantized KV cache."""
        if kv is not None:
            raise UnsupportedError(
                "fp8 folders do not say how the KV cache is quantized; write compressed-tensors instead"
            )
        sizes = {h.weight.block for h in modules.values() if h.weight is not None}
        if len(sizes) != 1:
            raise UnsupportedError(
                f"fp8 folders have one block size, found {sorted(sizes) or 'no quantized module'}"
            )
        return {
            "quant_method": "fp8",
            "fmt": "e4m3",
            "activation_scheme": "dynamic",
            "weight_block_size": list(sizes.pop()),
            "modules_to_not_convert": [n for n, h in modules.items() if h.weight is None],
        }

    def side_files(self, config: Mapping[str, Any]) -> dict[str, Any]:
        return {}
