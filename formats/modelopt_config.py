"""ModelOpt's quantization algorithms and the two files that name them.

config.json's quantization_config and hf_quant_config.json say the same in two shapes (TensorRT-LLM's
`read_modelopt_quant_config` normalizes both): nested {"quantization": {quant_algo, kv_cache_quant_algo, group_size,
exclude_modules, quantized_layers ...}}, or flat {quant_algo, kv_cache_scheme, ignore, config_groups ...}.
The layouts behind the names are in lconvert.formats.modelopt.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fnmatch import translate
from typing import Any, Literal

from lconvert.errors import InputError, UnsupportedError
from lconvert.formats.files import show
from lconvert.formats.module_rules import check_globs
from lconvert.ir import E2M1, E4M3, E8M0, ActSpec, Grid, int_grid

SIDE_FILE = "hf_quant_config.json"
FLOATS = ("F32", "F16", "BF16")
INT4, INT8 = int_grid(4, True), int_grid(8, True)


@dataclass(frozen=True)
class Algorithm:
    """What a quant_algo means.

    block: (1, 0) is a group whose width the configuration tells. second: grid of scales that are codes themselves.
    activation: without its scale. input_scale: whether that is stored. smooth: ModelOpt scales its inputs.
    """

    grid: Grid
    block: tuple[int, int]
    second: Grid | None = None
    activation: ActSpec | None = None
    input_scale: Literal["required", "optional", "inert", "none"] = "none"
    smooth: bool = False


FP8 = ActSpec(E4M3, "tensor", dynamic=False)
NVFP4 = ActSpec(E2M1, "group", dynamic=True, group=16)

ALGORITHMS: Mapping[str, Algorithm] = {
    "FP8": Algorithm(E4M3, (-1, -1), None, FP8, "optional"),
    "FP8_PER_CHANNEL_PER_TOKEN": Algorithm(E4M3, (1, -1), None, ActSpec(E4M3, "token", True), "inert"),
    "FP8_PB_WO": Algorithm(E4M3, (128, 128), None, ActSpec(E4M3, "group", True, 128), "inert"),
    "W8A16": Algorithm(INT8, (1, -1)),
    "W8A8_SQ_PER_CHANNEL": Algorithm(INT8, (1, -1), None, ActSpec(INT8, "tensor", False), "required", True),
    "W4A16_AWQ": Algorithm(INT4, (1, 0), smooth=True),
    "W4A8_AWQ": Algorithm(INT4, (1, 0), None, FP8, "required", True),
    "NVFP4": Algorithm(E2M1, (1, 16), E4M3, NVFP4, "optional"),
    "NVFP4_AWQ": Algorithm(E2M1, (1, 16), E4M3, NVFP4, "optional", True),
    "W4A16_NVFP4": Algorithm(E2M1, (1, 16), E4M3, None, "inert"),
    "W4A8_NVFP4_FP8": Algorithm(E2M1, (1, 32), E4M3, FP8, "required"),
    "MXFP4": Algorithm(E2M1, (1, 32), E8M0),
    "W4A8_MXFP4_FP8": Algorithm(E2M1, (1, 32), E8M0, FP8, "optional"),
    "MXFP8": Algorithm(E4M3, (1, 32), E8M0, ActSpec(E4M3, "group", True, 32), "inert"),
}

#: Other spellings: vLLM's and TensorRT-LLM's name of FP8_PB_WO, and what ModelOpt writes for weights quantized for real.
_ALIASES = {"FP8_BLOCK_SCALES": "FP8_PB_WO", "FP8_PB_REAL": "FP8_PB_WO"}

#: Who loads what. vLLM: `LINEAR_ALGOS` of modelopt.py; TensorRT-LLM: `get_quant_method` of _torch/modules/linear.py.
SERVED: Mapping[str, frozenset[str]] = {
    "vllm": frozenset(
        {"FP8", "FP8_PER_CHANNEL_PER_TOKEN", "FP8_PB_WO", "NVFP4", "W4A16_NVFP4", "MXFP8", "MIXED_PRECISION"}
    ),
    "tensorrt-llm": frozenset(
        {
            "FP8",
            "FP8_PER_CHANNEL_PER_TOKEN",
            "FP8_PB_WO",
            "W8A16",
            "W4A16_AWQ",
            "W4A8_AWQ",
            "NVFP4",
            "NVFP4_AWQ",
        }
        | {"W4A8_NVFP4_FP8", "W4A8_MXFP4_FP8", "MIXED_PRECISION"}
    ),
}

#: KV cache algorithms. Static FP8 and INT8 scales multiply; NVFP4 has blocks of 16 and the scale is its global one.
KV: Mapping[str, ActSpec] = {"FP8": FP8, "INT8": ActSpec(INT8, "tensor", False), "NVFP4": NVFP4}


# --- the configuration -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Settings:
    """One configuration file, in either of its two shapes. None: not stated."""

    where: str
    algo: str | None = None
    kv: str | None = None
    group: int | None = None
    exclude: tuple[str, ...] | None = None
    layers: Mapping[str, tuple[str, int | None]] | None = None


#: Keys that say nothing about numbers, or what is read off the tensors instead.
_INERT = {
    "quant_method",
    "producer",
    "pre_quant_scale",
    "config_groups",
    "version",
    "lora_rank",
    "quantization",
}
_READ = {"quant_algo", "group_size", "has_zero_point", "quantized_layers"}
_FLAT, _NESTED = {"ignore", "kv_cache_scheme"}, {"exclude_modules", "kv_cache_quant_algo"}


def _algo(where: str, value: Any) -> str | None:
    if value is None:
        return None
    name = str(value).upper()
    name = _ALIASES.get(name, name)
    if name == "NVFP4_SVD":
        raise UnsupportedError(
            f"{where}: NVFP4_SVD adds a low-rank product (svdquant_lora_a, svdquant_lora_b) to every weight, which "
            "lconvert does not hold; export the model with NVFP4 or NVFP4_AWQ"
        )
    if name not in ALGORITHMS and name != "MIXED_PRECISION":
        raise UnsupportedError(
            f"{where}: unknown quant_algo {show(value)}; known are {', '.join(ALGORITHMS)}, MIXED_PRECISION"
        )
    return name


def _size(where: str, value: Any) -> int | None:
    if value is None or value == 0:
        return None
    if type(value) is not int or not 0 < value < 1 << 31:
        raise InputError(f"{where}: group_size {show(value)} must be a positive whole number")
    return value


def _kv_algo(where: str, value: Any) -> str | None:
    if isinstance(value, Mapping):
        known = {("float", 8): "FP8", ("float", 4): "NVFP4", ("int", 8): "INT8"}
        bits = value.get("num_bits")
        name = known.get((str(value.get("type")), bits if type(bits) is int else 0))
        if name is None or value.get("dynamic"):
            raise UnsupportedError(
                f"{where}: unknown kv_cache_scheme {show(value)}; known are {', '.join(KV)}"
            )
        return name
    if value is None:
        return None
    name = str(value).upper()
    if name == "NVFP4_AFFINE":
        raise UnsupportedError(
            f"{where}: the KV cache is NVFP4_AFFINE, with k_bias and v_bias, which no target holds; calibrate it with FP8"
        )
    if name not in KV:
        raise UnsupportedError(
            f"{where}: unknown KV cache algorithm {show(value)}; known are {', '.join(KV)}"
        )
    return name


def settings_of(raw: Mapping[str, Any], where: str) -> Settings:
    """Either shape: {"quantization": {...}} of hf_quant_config.json, or flat as in config.json."""
    nested = "quantization" in raw
    inner = raw["quantization"] if nested else raw
    if not isinstance(inner, Mapping):
        raise InputError(f"{where}: quantization is {show(inner)}, expected an object")
    exclude_key, kv_key = (
        ("exclude_modules", "kv_cache_quant_algo") if nested else ("ignore", "kv_cache_scheme")
    )
    known = _INERT | _READ | (_NESTED if nested else _FLAT | _NESTED)
    for key, value in inner.items():
        if key not in known and value not in (None, False, [], {}):
            raise UnsupportedError(
                f"{where}: the key {show(key)} = {show(value)} is not one that ModelOpt documents; lconvert does not guess "
                "what it changes"
            )
    if inner.get("has_zero_point"):
        raise UnsupportedError(
            f"{where}: has_zero_point is set, but ModelOpt stores no zero points; nothing can read this"
        )
    exclude = inner.get(exclude_key, inner.get("exclude_modules"))
    if exclude is not None and not (isinstance(exclude, list) and all(isinstance(e, str) for e in exclude)):
        raise InputError(f"{where}: {exclude_key} is {show(exclude)}, expected a list of names")
    check_globs([e for e in exclude or () if set(e) & set("*?[")], f"{where}: {exclude_key}")
    algo = _algo(where, inner.get("quant_algo"))
    group = _size(where, inner.get("group_size"))
    if not nested and isinstance(inner.get("config_groups"), Mapping):
        found = [g for g in inner["config_groups"].values() if isinstance(g, Mapping)]
        if algo == "NVFP4" and found and all(g.get("input_activations") is None for g in found):
            algo = "W4A16_NVFP4"  # what vLLM makes of it (`ModelOptNvFp4Config._from_config`)
        if (
            group is None
            and algo != "MIXED_PRECISION"
            and len(found) == 1
            and isinstance(found[0].get("weights"), Mapping)
        ):
            group = _size(where, found[0]["weights"].get("group_size"))
    layers = inner.get("quantized_layers")
    if layers is not None and not isinstance(layers, Mapping):
        raise InputError(f"{where}: quantized_layers is {show(layers)}, expected an object")
    return Settings(
        where,
        algo,
        _kv_algo(where, inner.get(kv_key, inner.get("kv_cache_quant_algo"))),
        group,
        None if exclude is None else tuple(exclude),
        None if not layers else {name: _layer(where, name, entry) for name, entry in layers.items()},
    )


def _layer(where: str, name: str, entry: Any) -> tuple[str, int | None]:
    at = f"{where}: quantized_layers {show(name)}"
    algo = _algo(at, entry.get("quant_algo")) if isinstance(entry, Mapping) else None
    if algo is None or algo == "MIXED_PRECISION":
        raise InputError(f"{at}: {show(entry)} names no quant_algo; add the one of this layer")
    return algo, _size(at, entry.get("group_size"))


def agree(a: Settings, b: Settings) -> Settings:
    """One of two descriptions; InputError where they contradict each other."""

    def pick(key: str, name: str, same: Callable[[Any], Any] = lambda v: v) -> Any:
        x, y = getattr(a, key), getattr(b, key)
        if x is not None and y is not None and same(x) != same(y):
            raise InputError(
                f"{a.where} and {b.where} contradict each other: {name} is {show(x)} in the first and {show(y)} in the "
                "second; keep the one that belongs to the weights"
            )
        return y if x is None else x

    return Settings(
        a.where,
        pick("algo", "quant_algo"),
        pick("kv", "the KV cache's algorithm"),
        pick("group", "group_size"),
        pick("exclude", "the list of excluded modules", frozenset),
        pick("layers", "quantized_layers", dict),
    )


def excluder(patterns: tuple[str, ...]) -> Callable[[str], str | None]:
    """The pattern that excludes a module or any module above it; a trailing ".*" means the module itself, too."""
    literal = {p.removesuffix(".*"): p for p in patterns}
    wild = [(re.compile(translate(p)), p) for p in patterns if any(c in p for c in "*?[")]

    def excluded(module: str) -> str | None:
        parts = module.split(".")
        names = [".".join(parts[: i + 1]) for i in range(len(parts))]
        for name in names:
            if name in literal:
                return literal[name]
        return next((p for expression, p in wild if any(expression.match(n) for n in names)), None)

    return excluded
