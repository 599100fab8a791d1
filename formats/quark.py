"""AMD Quark's own checkpoints (`quant_method: quark`): int8, FP8, MXFP4, MXFP8 and groups of 4 bits.

W is (N, K), scales multiply. Per kind of weight (producer: quark/torch/utils/pack.py `create_pack_method` and
quark/torch/export/nn/modules/realquantizer.py; consumer: vLLM layers/quantization/quark/quark.py and schemes/):

| dtype, qscheme                      | weight        | weight_scale                                  |
|-------------------------------------|---------------|-----------------------------------------------|
| int8, per_tensor or per_channel     | I8 (N, K)     | () or (N,); weight_zero_point, which must be 0 |
| fp8_e4m3, per_tensor or per_channel | E4M3 (N, K)   | () or (N,)                                    |
| fp8_e4m3, per_block                 | E4M3 (N, K)   | (N/n, K/k)                                    |
| fp8_e4m3, per_group 32, e8m0        | E4M3 (N, K)   | U8 (N, K/32)                                  |
| fp4, per_group 32, e8m0             | U8 (N, K/2), first in the low nibble | U8 (N, K/32)           |
| int4 or uint4, per_group            | I32 (K, N/8), AWQ's nibble order ("reorder") or plain ("order") | (K/g, N); zeros I32 (K/g, N/8) |

The int8, FP8 and MXFP8 rows are self-checked, codes times scale; MXFP4's codes and the words of 4 bits are checked
against Quark's own packing. int4 is two's complement. A module's quantization is that of the first pattern of
`layer_quant_config` that matches its name, else `global_quant_config` (vLLM `_find_matched_config`). Quantized outputs
of k_proj and v_proj are the KV cache (`kv_cache_group`). Weights of several levels (NVFP4, int4 on FP8), other types and
rotations are refused.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lconvert.errors import InputError, UnsupportedError
from lconvert.formats.files import show
from lconvert.formats.fp8 import exponents, float_codes, number
from lconvert.formats.module_rules import check_globs, compiled
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
from lconvert.ir import E2M1, E4M3, ActSpec, KVSpec, QTensor, Tensor, int_grid
from lconvert.kernels.packing import unpack_awq, unpack_nibbles
from lconvert.kernels.reference.packing import AWQ_ORDER

FLOATS = ("F32", "F16", "BF16")
_INT8 = int_grid(8, True)
#: Algorithms whose result is in the weights alone.
_FOLDED = {"awq", "gptq", "gptaq", "smooth", "smoothquant", "autosmoothquant", "qronos"}
_KINDS = {
    ("int8", "per_tensor"), ("int8", "per_channel"), ("fp8_e4m3", "per_tensor"), ("fp8_e4m3", "per_channel"),
    ("fp8_e4m3", "per_block"), ("fp8_e4m3", "per_group"), ("fp4", "per_group"), ("int4", "per_group"),
    ("uint4", "per_group"),
}  # fmt: skip

Spec = Mapping[str, Any]


def parse(checkpoint: Checkpoint) -> Scheme:
    """The scheme of a Quark config; UnsupportedError for what needs more than the weights to be exact."""
    config, where = checkpoint.config, checkpoint.where
    export = _object(config.get("export"), f"{where}: export")
    if export.get("weight_format", "real_quantized") != "real_quantized":
        raise UnsupportedError(
            f"{where}: weight_format {show(export['weight_format'])}: the weights are not stored as codes; export the model "
            'with weight_format "real_quantized"'
        )
    method = export.get("pack_method", "reorder")
    if method not in ("reorder", "order"):
        raise InputError(f"{where}: pack_method {show(method)} must be reorder or order")
    algorithms = config.get("algo_config") or []
    for entry in algorithms if isinstance(algorithms, list) else [algorithms]:
        name = str(entry.get("name") if isinstance(entry, Mapping) else entry).lower()
        if name not in _FOLDED:
            raise UnsupportedError(
                f"{where}: algo_config names {show(name)}, which may change the model beside its weights; known to be "
                f"folded are {', '.join(sorted(_FOLDED))}"
            )
    if config.get("layer_type_quant_config"):
        raise UnsupportedError(
            f"{where}: layer_type_quant_config goes by Python classes; name the layers instead"
        )
    if config.get("softmax_quant_spec"):
        raise UnsupportedError(f"{where}: softmax_quant_spec: a quantized softmax is in no target")
    exclude = config.get("exclude") or []
    if not isinstance(exclude, list) or not all(isinstance(e, str) for e in exclude):
        raise InputError(f"{where}: exclude is {show(exclude)}, expected a list of names")
    layers = _object(config.get("layer_quant_config"), f"{where}: layer_quant_config")
    cached = export.get("kv_cache_group") or []
    if not isinstance(cached, list) or not all(isinstance(c, str) for c in cached):
        raise InputError(f"{where}: kv_cache_group is {show(cached)}, expected a list of names")
    check_globs([*layers, *cached], f"{where}: layer_quant_config and kv_cache_group")
    return Quark(
        where,
        method == "reorder",
        _object(config.get("global_quant_config"), f"{where}: global_quant_config"),
        {name: _object(spec, f"{where}: layer_quant_config {show(name)}") for name, spec in layers.items()},
        frozenset(exclude),
        _matchers(exclude, f"{where}: exclude"),
        _kv(where, cached, layers),
        tuple(cached),
    )


def _object(value: Any, where: str) -> Mapping[str, Any]:
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise InputError(f"{where} is {show(value)}, expected an object")
    return value


def _matchers(patterns: list[str], where: str) -> tuple[Callable[[str], object], ...]:
    """Those of `patterns` that are no plain names, as functions of a module's name."""
    expressions = [(p[3:], f"{where} {show(p)}") for p in patterns if p.startswith("re:")]
    globs = [p for p in patterns if not p.startswith("re:") and set(p) & set("*?[")]
    check_globs(globs, where)
    return (*(e.match for e in compiled(expressions)), *(partial(_like, p) for p in globs))


def _like(pattern: str, name: str) -> bool:
    return fnmatchcase(name, pattern)


def _one(spec: Any, where: str) -> Spec | None:
    """A specification, which may come as a list of one."""
    if isinstance(spec, list) and len(spec) > 1:
        raise UnsupportedError(
            f"{where}: {len(spec)} levels of quantization, of which lconvert can verify none"
        )
    if isinstance(spec, list):
        spec = spec[0] if spec else None
    return None if spec is None else _object(spec, where)


def _kv(where: str, cached: list[str], layers: Mapping[str, Any]) -> KVSpec | None:
    if not cached:
        return None
    names = [n for n in layers if any(fnmatchcase(n, c) for c in cached)]
    specs = [
        _one(_object(layers[n], where).get("output_tensors"), f"{where}: {n}: output_tensors") for n in names
    ]
    spec = specs[0] if specs else None
    same = all(s == spec for s in specs)
    if not same or spec is None or (spec.get("dtype"), spec.get("qscheme")) != ("fp8_e4m3", "per_tensor"):
        raise UnsupportedError(
            f"{where}: kv_cache_group {show(cached)}: only one FP8 scale per tensor is known for the cache"
        )
    side = ActSpec(E4M3, "tensor", dynamic=bool(spec.get("is_dynamic")))
    return KVSpec(side, side)


@dataclass(frozen=True)
class Quark:
    """A Quark config, understood.

    reorder: 4-bit words are in AWQ's order. names, patterns: excluded modules. cached: patterns of the KV cache's layers.
    """

    where: str
    reorder: bool
    everywhere: Spec
    layers: Mapping[str, Spec]
    names: frozenset[str]
    patterns: tuple[Callable[[str], object], ...]
    kv: KVSpec | None
    cached: tuple[str, ...]
    report: tuple[str, ...] = ()

    @property
    def method(self) -> str:
        spec = _one(self.everywhere.get("weight"), self.where)
        named = [show(spec[k]).strip("'") for k in ("dtype", "qscheme") if k in spec] if spec else []
        return " ".join(["Quark", *named])

    def _spec(self, module: str) -> Spec:
        return next(
            (s for p, s in self.layers.items() if module == p or fnmatchcase(module, p)), self.everywhere
        )

    def weight(self, module: str, parts: Mapping[str, Part], shape: tuple[int, ...]) -> Weight | None:
        stored = parts.get("weight")
        if stored is not None and parts.keys() == {"weight"} and stored.dtype in FLOATS:
            return None
        spec = self._spec(module)
        quantized = _one(spec.get("weight"), f"{self.where}: weight of {module}")
        if quantized is None or module in self.names or any(match(module) for match in self.patterns):
            raise InputError(
                f"{module}: is stored as {listed(parts)}, but {self.where} does not quantize it; the two do not "
                "belong together"
            )
        outputs = [k for k in ("output_tensors", "bias") if spec.get(k)]
        if outputs and not any(fnmatchcase(module, c) for c in self.cached):
            raise UnsupportedError(f"{module}: its {outputs[0]} are quantized, which no target holds")
        if len(shape) != 2:
            raise UnsupportedError(f"{module}: Quark weights of shape {shape} are not a matrix")
        q, used = self._read(module, parts, quantized, shape[0], shape[1])
        activation = _activation(
            module, parts, _one(spec.get("input_tensors"), f"{self.where}: input of {module}"), used
        )
        return Weight(q, frozenset(used), activation)

    def _read(
        self, module: str, parts: Mapping[str, Part], spec: Spec, rows: int, cols: int
    ) -> tuple[QTensor, set[str]]:
        kind = (str(spec.get("dtype")), str(spec.get("qscheme")))
        if kind not in _KINDS or spec.get("is_dynamic"):
            raise UnsupportedError(
                f"{module}: weights of {show(kind[0])}, {show(kind[1])} are not verified by public code; known are "
                + ", ".join(f"{d} {q}" for d, q in sorted(_KINDS))
            )
        used = {"weight", "weight_scale"}
        if kind[0] in ("int4", "uint4"):
            return _words(module, parts, spec, self.reorder, rows, cols)
        if kind[1] == "per_group":
            if (spec.get("group_size"), spec.get("scale_format")) != (32, "e8m0"):
                raise UnsupportedError(
                    f"{module}: {kind[0]} in groups of {show(spec.get('group_size'))} with scales "
                    f"{show(spec.get('scale_format'))}; known are groups of 32 with e8m0"
                )
            width = groups(module, cols, 32)
            scale = exponents(take(module, parts, "weight_scale", ("U8", "F8_E8M0"), (rows, width)))
            if kind[0] == "fp8_e4m3":
                codes = float_codes(take(module, parts, "weight", ("F8_E4M3",), (rows, cols)))
                return QTensor((rows, cols), codes, E4M3, (1, 32), scale), used
            pairs = take(module, parts, "weight", ("U8",), (rows, cols // 2)).data
            codes = view(pairs, (rows, cols), "U8", lambda a, b: unpack_nibbles(pairs.read(a, b)))
            return QTensor((rows, cols), codes, E2M1, (1, 32), scale), used
        block = _block(module, spec)
        plain = _scale(module, parts, block, rows, cols)
        if kind[0] == "fp8_e4m3":
            codes = float_codes(take(module, parts, "weight", ("F8_E4M3",), (rows, cols)))
            return QTensor((rows, cols), codes, E4M3, block, plain), used
        if spec.get("symmetric") is False:
            raise UnsupportedError(
                f"{module}: int8 weights with zero points, which vLLM ignores; quantize symmetrically"
            )
        used |= _zeros(module, parts, "weight_zero_point")
        return QTensor(
            (rows, cols), take(module, parts, "weight", ("I8",), (rows, cols)).data, _INT8, block, plain
        ), used


def _block(module: str, spec: Spec) -> tuple[int, int]:
    if spec["qscheme"] == "per_tensor":
        return (-1, -1)
    if spec["qscheme"] == "per_channel":
        if spec.get("ch_axis", 0) != 0:
            raise UnsupportedError(
                f"{module}: a scale per input channel (ch_axis {show(spec['ch_axis'])}) is in no target"
            )
        return (1, -1)
    size = spec.get("block_size")
    if (
        not isinstance(size, list)
        or len(size) != 2
        or not all(type(n) is int and 0 < n < 1 << 31 for n in size)
    ):
        raise InputError(f"{module}: block_size {show(size)} must be two positive whole numbers")
    if spec.get("scale_type") == "float8_e8m0fnu":
        raise UnsupportedError(
            f"{module}: blocks of {size} with e8m0 scales are not verified; export them as floats"
        )
    return (size[0], size[1])


def _scale(module: str, parts: Mapping[str, Part], block: tuple[int, int], rows: int, cols: int) -> Tensor:
    if block == (-1, -1):
        return number(module, parts, "weight_scale", FLOATS, (1, 1))
    shape = tuple(1 if b == -1 else -(-n // b) for n, b in zip((rows, cols), block, strict=True))
    flat = "weight_scale" in parts and len(parts["weight_scale"].shape) == 1 and block == (1, -1)
    data = take(module, parts, "weight_scale", FLOATS, (rows,) if flat else shape).data
    return finite_scales(
        view(data, shape, data.dtype, lambda a, b: data.read(a, b).reshape(b - a, *shape[1:]))
    )


def _zeros(module: str, parts: Mapping[str, Part], suffix: str) -> set[str]:
    """Zero points of a symmetric quantization: absent, or all of them 0."""
    if suffix not in parts:
        return set()
    if parts[suffix].data.load().any():
        raise InputError(
            f"{parts[suffix].where}: a zero point is not 0, but the configuration says symmetric"
        )
    return {suffix}


def _words(
    module: str, parts: Mapping[str, Part], spec: Spec, reorder: bool, rows: int, cols: int
) -> tuple[QTensor, set[str]]:
    """Weights of 4 bits, packed along the outputs."""
    signed = bool(spec["dtype"] == "int4")
    if spec.get("symmetric") is not signed:
        raise UnsupportedError(
            f"{module}: {spec['dtype']} with symmetric {show(spec.get('symmetric'))} is not verified"
        )
    size = spec.get("group_size")
    if type(size) is not int or size >= 1 << 31 or rows % 8:
        raise InputError(
            f"{module}: group_size {show(size)}, {rows} outputs: 8 outputs share a word and K is in groups"
        )
    count = groups(module, cols, size)
    scales = take(module, parts, "weight_scale", FLOATS, (count, rows))
    scale = view(
        scales.data, (rows, count), scales.dtype, lambda a, b: np.ascontiguousarray(scales.columns(a, b).T)
    )
    weight = take(module, parts, "weight", ("I32",), (cols, rows // 8))
    codes = _nibbles(weight, reorder, signed)
    used, zero = {"weight", "weight_scale"}, None
    if signed:
        used |= _zeros(module, parts, "weight_zero_point")
    else:
        zero = _nibbles(
            take(module, parts, "weight_zero_point", ("I32",), (count, rows // 8)), reorder, False
        )
        used.add("weight_zero_point")
    grid, block = int_grid(4, signed), (1, -1 if size == -1 else size)
    return QTensor((rows, cols), codes, grid, block, finite_scales(scale), zero), used


def _nibbles(part: Part, reorder: bool, signed: bool) -> Tensor:
    """Words (k, n/8) as rows (n, k)."""

    def read(start: int, stop: int) -> NDArray[Any]:
        first = start // 8
        found: NDArray[Any] = unpack_awq(np.ascontiguousarray(part.columns(first, max(first, -(-stop // 8)))))
        if not reorder:
            found = found.reshape(-1, 8, part.shape[0])[:, list(AWQ_ORDER)].reshape(-1, part.shape[0])
        found = found[start - 8 * first : stop - 8 * first]
        return ((found ^ np.uint8(8)) - np.uint8(8)).view(np.int8) if signed else np.ascontiguousarray(found)

    return view(part.data, (8 * part.shape[1], part.shape[0]), "I8" if signed else "U8", read)


def _activation(module: str, parts: Mapping[str, Part], spec: Spec | None, used: set[str]) -> ActSpec | None:
    """How the input is quantized; the suffixes of its tensors are added to `used`."""
    if spec is None:
        return None
    dtype, qscheme, dynamic = str(spec.get("dtype")), str(spec.get("qscheme")), bool(spec.get("is_dynamic"))
    grid = {"fp8_e4m3": E4M3, "int8": _INT8, "fp4": E2M1}.get(dtype)
    symmetric = spec.get("symmetric") is not False
    size = spec.get("group_size")
    if grid is not None and dynamic and symmetric:
        if qscheme == "per_tensor" and dtype != "fp4":
            return ActSpec(grid, "tensor", dynamic=True)
        if qscheme == "per_channel" and dtype != "fp4":
            return ActSpec(grid, "token", dynamic=True)
        if (
            qscheme == "per_group"
            and type(size) is int
            and (grid == E4M3 or spec.get("scale_format") == "e8m0")
        ):
            return ActSpec(grid, "group", dynamic=True, group=size)
    if grid is None or dynamic or qscheme != "per_tensor" or dtype == "fp4":
        raise UnsupportedError(
            f"{module}: inputs of {show(dtype)}, {show(qscheme)}, dynamic {dynamic}, symmetric {symmetric} are not verified "
            "by public code"
        )
    used.add("input_scale")
    static = ActSpec(grid, "tensor", dynamic=False, scale=number(module, parts, "input_scale", FLOATS, (1,)))
    if symmetric:
        used |= _zeros(module, parts, "input_zero_point")
        return static
    stored = parts.get("input_zero_point")
    one = (1,) if stored is not None and stored.shape == (1,) else ()
    zero = take(module, parts, "input_zero_point", ("I8", "I32"), one).data
    used.add("input_zero_point")
    return replace(static, zero=view(zero, (1,), zero.dtype, lambda a, b: zero.read(a, b).reshape(b - a)))
