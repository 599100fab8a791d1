"""The `quantization_config` of compressed-tensors: what it says, and which of its groups a module belongs to.

Its own classes are quantization/quant_config.py `QuantizationConfig`, quant_scheme.py `QuantizationScheme` and
quant_args.py `QuantizationArgs`. Targets and exceptions are module names, `re:` patterns (matched from the start of the
name), or names of classes. Where several targets match, an exact name goes before a pattern, a pattern before a class,
and patterns in alphabetical order (utils/match.py `match_targets`, lifecycle/apply.py `_scheme_from_targets`).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from lconvert.errors import InputError, UnsupportedError
from lconvert.formats.config_values import name_list, refuse_unknown
from lconvert.formats.files import show
from lconvert.formats.module_rules import compiled

PACKED = "pack-quantized"
NVFP4 = "nvfp4-pack-quantized"
MXFP4 = "mxfp4-pack-quantized"
MXFP8 = "mxfp8-quantized"
DENSE = "dense"
MIXED = "mixed-precision"
#: One layout under three names: `weight` holds the codes themselves. Old files name the wrong one, so the arguments decide.
PLAIN = ("int-quantized", "float-quantized", "naive-quantized")
_GONE = {
    "marlin-24": "2:4 sparsity", "sparse-24-bitmask": "2:4 sparsity", "sparse-bitmask": "sparsity",
    "fakequant": "float weights that are quantized only while the model runs",
}  # fmt: skip

#: The release whose layouts these are: since 0.19 codes of 3, 5, 6 and 7 bits are one dense stream of bits.
LAYOUT_VERSION = "0.19.0"

_TOP = {
    "quant_method", "format", "config_groups", "ignore", "kv_cache_scheme", "quantization_status", "version",
    "global_compression_ratio", "sparsity_config", "transform_config", "run_compressed", "dequantize",
    "use_optimized_inference", "total_num_heads", "total_num_kv_heads",
}  # fmt: skip
_GROUP = {"targets", "weights", "input_activations", "output_activations", "format"}
_ARGS = {
    "num_bits", "type", "symmetric", "group_size", "strategy", "block_structure", "dynamic", "actorder", "scale_dtype",
    "zp_dtype", "observer", "observer_kwargs",
}  # fmt: skip
_STRATEGIES = ("tensor", "channel", "group", "block", "token", "tensor_group", "attn_head")

#: Last parts of names of embeddings, whose class is Embedding; all other matrices are taken for Linear.
_EMBEDDINGS = {"embed_tokens", "embed_in", "wte", "wpe", "word_embeddings", "embed_positions", "embedding"}

_SIZES = re.compile(r"[0-9]{1,9}x[0-9]{1,9}")


@dataclass(frozen=True)
class Args:
    """QuantizationArgs. reordered: actorder "group", columns belong to groups by a stored index."""

    bits: int
    kind: Literal["int", "float"]
    strategy: str
    symmetric: bool = True
    group: int | None = None
    block: tuple[int, int] | None = None
    dynamic: bool | Literal["local"] = False
    reordered: bool = False
    scale_dtype: str | None = None

    @property
    def blocks(self) -> tuple[int, int]:
        """The IR's block of a weight."""
        if self.strategy == "block" and self.block is not None:
            return self.block
        if self.group is not None and self.strategy in ("group", "tensor_group"):
            return (1, self.group)
        return (1, -1) if self.strategy == "channel" else (-1, -1)

    def __str__(self) -> str:
        size = f" {self.group}" if self.group else f" {self.block[0]}x{self.block[1]}" if self.block else ""
        return f"{self.kind}{self.bits} {'' if self.symmetric else 'asymmetric '}per {self.strategy}{size}"

    def to_json(self) -> dict[str, Any]:
        """The words of QuantizationArgs. No observer: nothing here was observed."""
        return {
            "num_bits": self.bits,
            "type": self.kind,
            "symmetric": self.symmetric,
            "strategy": self.strategy,
            "group_size": self.group,
            "block_structure": None if self.block is None else list(self.block),
            "dynamic": self.dynamic,
            "actorder": None,
            "scale_dtype": self.scale_dtype,
            "zp_dtype": None if self.symmetric else "torch.int8",
        }


@dataclass(frozen=True)
class Rule:
    """A group of the config without its targets."""

    format: str
    weights: Args
    inputs: Args | None = None


@dataclass(frozen=True)
class Matcher:
    """A list of targets or exceptions, ready to be asked."""

    exact: frozenset[str]
    patterns: tuple[tuple[str, re.Pattern[str]], ...]

    def find(self, module: str) -> str | None:
        """The entry that means this module, by precedence; None if none does."""
        if module in self.exact:
            return module
        for entry, pattern in self.patterns:
            if pattern.match(module):
                return entry
        kind = "Embedding" if module.rpartition(".")[2] in _EMBEDDINGS else "Linear"
        return kind if kind in self.exact else None


@dataclass(frozen=True)
class Config:
    """What a checkpoint's config says of its modules."""

    where: str
    rules: Mapping[str, Rule]
    targets: Matcher
    ignore: Matcher
    kv: Args | None
    report: tuple[str, ...] = ()

    def rule(self, module: str) -> tuple[Rule | None, str]:
        """The rule of a module and the target or exception that decided."""
        if (ignored := self.ignore.find(module)) is not None:
            return None, f"{self.where} ignores {show(ignored)}"
        target = self.targets.find(module)
        if target is None:
            return None, f"no target of {self.where} matches it"
        return self.rules[target], f"{self.where} quantizes {show(target)}"


# --- reading ---------------------------------------------------------------------------------------------


def read_config(where: str, config: Mapping[str, Any]) -> Config:
    """The config as data; InputError for what contradicts itself, UnsupportedError for what has no meaning here."""
    refuse_unknown(config, _TOP, f"{where}: quantization_config", "known are")
    report = []
    status = config.get("quantization_status")
    if status not in ("compressed", "frozen", None):
        raise UnsupportedError(
            f"{where}: quantization_status is {show(status)}: the weights are not yet compressed; save the model with "
            "save_compressed=True"
        )
    sparsity = config.get("sparsity_config") or {}
    if sparsity and not (isinstance(sparsity, dict) and sparsity.get("format") == "dense"):
        raise UnsupportedError(
            f"{where}: sparsity_config {show(sparsity)}: sparse layouts were removed from compressed-tensors and cannot be "
            "read; save the model dense with the release that wrote it"
        )
    if sparsity:
        report.append("sparsity_config: its format is dense, which changes no number")
    transforms = config.get("transform_config") or {}
    if transforms != {} and transforms != {"config_groups": {}}:
        raise UnsupportedError(
            f"{where}: transform_config {show(transforms)}: the model rotates activations while it runs, which cannot be "
            "carried; quantize it again with the transforms fused into the weights (or without them)"
        )
    top = config.get("format")
    if isinstance(top, str) and top in _GONE:
        raise UnsupportedError(
            f"{where}: format {show(top)} ({_GONE[top]}) cannot be read; save a dense or compressed model"
        )
    groups = config.get("config_groups") or {}
    if not isinstance(groups, dict):
        raise InputError(f"{where}: config_groups is {show(groups)}, expected an object")
    rules: dict[str, Rule] = {}
    for name, group in groups.items():
        targets, rule = _group(f"{where}: config_groups.{show(name)[1:-1]}", group, top)
        for target in targets:
            if rules.setdefault(target, rule) != rule:
                raise InputError(
                    f"{where}: the target {show(target)} is in two groups that differ; one must go"
                )
    kv = config.get("kv_cache_scheme")
    return Config(
        where,
        rules,
        _matcher(where, list(rules)),
        _matcher(where, name_list(config.get("ignore") or [], "ignore", where)),
        None if kv is None else read_args(f"{where}: kv_cache_scheme", kv),
        tuple(report),
    )


def _matcher(where: str, entries: Collection[str]) -> Matcher:
    listed = sorted(e for e in entries if e.startswith("re:"))
    patterns = compiled([(e.removeprefix("re:"), f"{where}: {show(e)}") for e in listed])
    exact = frozenset(e for e in entries if not e.startswith("re:"))
    return Matcher(exact, tuple(zip(listed, patterns, strict=True)))


def _group(where: str, group: Any, top: Any) -> tuple[tuple[str, ...], Rule]:
    if not isinstance(group, dict):
        raise UnsupportedError(
            f"{where}: is {show(group)}, not a scheme; names of presets are not resolved, spell it out"
        )
    refuse_unknown(group, _GROUP, f"{where}: the group", "known are")
    targets = name_list(group.get("targets"), "targets", where)
    if group.get("output_activations") is not None:
        raise UnsupportedError(
            f"{where}: output_activations cannot be carried; quantize inputs and weights only"
        )
    if group.get("weights") is None:
        raise UnsupportedError(
            f"{where}: quantizes activations of {show(targets)} but no weights, which cannot be carried; attention is "
            "quantized through kv_cache_scheme"
        )
    weights = read_args(f"{where}: weights", group["weights"])
    inputs = group.get("input_activations")
    args = None if inputs is None else read_args(f"{where}: input_activations", inputs)
    form = group.get("format") or top
    rule = Rule(form if isinstance(form, str) else "", weights, args)
    if (why := _contradiction(rule)) is not None:
        raise InputError(f"{where}: format {show(form)} with {weights} weights: {why}")
    return targets, rule


#: What weights each format holds, in words and as a check.
_HOLDS: Mapping[str, tuple[str, Callable[[Args], bool]]] = {
    PACKED: (
        "it packs 2 to 8 bit integers per group or channel (or, symmetric, per tensor)",
        lambda a: (
            a.kind == "int"
            and (a.strategy in ("group", "channel") or (a.strategy == "tensor" and a.symmetric))
        ),
    ),
    NVFP4: ("it holds 4-bit floats in groups of 16", lambda a: _is_float(a, 4, "tensor_group", 16)),
    MXFP4: ("it holds 4-bit floats in groups of 32", lambda a: _is_float(a, 4, "group", 32)),
    MXFP8: ("it holds 8-bit floats in groups of 32", lambda a: _is_float(a, 8, "group", 32)),
} | dict.fromkeys(
    PLAIN,
    (
        "it holds 2 to 8 bit integers and symmetric 8-bit floats per tensor, channel, group or block",
        lambda a: (
            (a.kind == "int" or (a.bits == 8 and a.symmetric))
            and a.strategy in ("tensor", "channel", "group", "block")
        ),
    ),
)


def _is_float(a: Args, bits: int, strategy: str, group: int) -> bool:
    return (a.kind, a.bits, a.strategy, a.group, a.symmetric) == ("float", bits, strategy, group, True)


def _contradiction(rule: Rule) -> str | None:
    """Why a format cannot hold such weights; None if it can."""
    a = rule.weights
    if rule.format not in _HOLDS:
        return f"no such format; known are {', '.join(_HOLDS)}"
    if a.dynamic:
        return "weights cannot be quantized dynamically"
    if a.kind == "int" and not 2 <= a.bits <= 8:
        return f"{a.bits} bits are outside 2 to 8"
    words, holds = _HOLDS[rule.format]
    return None if holds(a) else words


def read_args(where: str, found: Any) -> Args:
    """QuantizationArgs from JSON; a key that lconvert does not know is an error, since it may change the numbers."""
    if not isinstance(found, dict):
        raise InputError(f"{where}: is {show(found)}, expected an object")
    refuse_unknown(found, _ARGS, f"{where}: the scheme", "known are")

    def one(key: str, default: Any, *allowed: Any) -> Any:
        value = found.get(key)
        value = default if value is None else value.lower() if isinstance(value, str) else value
        if value is not None and not any(
            value is a or (type(value) is type(a) and value == a) for a in allowed
        ):
            raise InputError(
                f"{where}: {key} is {show(value)}, expected one of {', '.join(map(repr, allowed))}"
            )
        return value

    def whole(key: str, default: int | None) -> int | None:
        value = found.get(key, default)
        if value is not None and (type(value) is not int or abs(value) >= 1 << 31):
            raise InputError(f"{where}: {key} is {show(value)}, expected a whole number")
        return value

    bits, group = whole("num_bits", 8), whole("group_size", None)
    strategy = one("strategy", None, *_STRATEGIES)
    if strategy is None:
        strategy = "tensor" if group is None else "channel" if group == -1 else "group"
    if strategy in ("group", "tensor_group") and (group is None or group <= 0):
        raise InputError(f"{where}: strategy {strategy} needs a positive group_size, found {show(group)}")
    grouped = strategy in ("group", "tensor_group")
    scale_dtype = found.get("scale_dtype")
    return Args(
        bits or 0,
        one("type", "int", "int", "float"),
        strategy,
        one("symmetric", True, True, False),
        group if grouped else None,
        _block(where, found.get("block_structure")) if strategy == "block" else None,
        one("dynamic", False, True, False, "local"),
        one("actorder", None, "group", "weight", "dynamic", "static", True, False)
        in ("group", "dynamic", True),
        scale_dtype if isinstance(scale_dtype, str) else None,
    )


def _block(where: str, found: Any) -> tuple[int, int]:
    """[128, 128], or "128x128" in old files."""
    value = (
        [int(n) for n in found.split("x")] if isinstance(found, str) and _SIZES.fullmatch(found) else found
    )
    if (
        not isinstance(value, list)
        or len(value) != 2
        or any(type(n) is not int or not 0 < n < 1 << 31 for n in value)
    ):
        raise InputError(
            f"{where}: block_structure is {show(found)}, expected two positive numbers such as [128, 128]"
        )
    return value[0], value[1]
