"""AutoRound checkpoints: GPTQ's or AWQ's tensors under a config of its own.

`packing_format` says which (AutoRound inference/backend.py GPTQ_FORMAT "zp+-1", GPTQ_FORMAT_NO_ZP, AWQ_FORMAT;
export_to_autoround/export.py `dynamic_import_quant_linear_for_packing`): auto_round:auto_gptq is GPTQ v1, auto_round and
auto_round:gptqmodel store the zero points as they are (v2), auto_round:auto_awq is AWQ gemm. There is no g_idx, or a plain one.
`extra_config` states other bits, groups or `sym` for modules by name, by the end of the name or by a regular expression
that is searched for (vLLM layers/quantization/inc/config_parser.py); 16 bits mean that a module is not quantized.
Releases before 0.5 wrote quant_method "intel/auto-round" and the packing under `backend`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lconvert.errors import InputError, UnsupportedError
from lconvert.formats import awq, gptq
from lconvert.formats.config_values import flag, inert, whole
from lconvert.formats.files import show
from lconvert.formats.int_groups import Spec, contradiction, group_size, grouping
from lconvert.formats.module_rules import Rule, compiled
from lconvert.formats.scheme import Checkpoint, Part, Weight
from lconvert.ir import KVSpec

#: What follows "auto_round:" -> layout.
_LAYOUTS: Mapping[str, str] = {
    "auto_gptq": "gptq",
    "gptq": "gptq",
    "auto_gptq:exllamav2": "gptq",
    "gptq:exllamav2": "gptq",
    "": "gptq_v2",
    "gptqmodel": "gptq_v2",
    "exllamav2": "gptq_v2",
    "auto_awq": "awq",
    "awq": "awq",
}
_SPECIAL = frozenset("*+?^$()[]{}|\\")
_READ = {
    *("quant_method", "bits", "group_size", "sym", "packing_format", "backend", "extra_config"),
    *("data_type", "act_bits", "rotation_config"),
}


@dataclass(frozen=True)
class AutoRound:
    """The scheme. named: overrides by module name; rules: overrides by expression."""

    base: Spec
    layout: str
    named: Mapping[str, Mapping[str, Any]]
    rules: tuple[Rule, ...]
    where: str
    report: tuple[str, ...] = ()
    kv: KVSpec | None = None

    @property
    def method(self) -> str:
        s = self.base
        return f"autoround ({self.layout}) {s.bits} bit, {grouping(s.group)}{'' if s.sym else ', asymmetric'}"

    def weight(self, module: str, parts: Mapping[str, Part], shape: tuple[int, ...]) -> Weight | None:
        if not parts.keys() & {"qweight", "qzeros", "scales", "g_idx"}:
            return None
        spec = _overridden(
            self.base, self._extra(module), f"{self.where}: extra_config of {module}", self.layout
        )
        if spec is None:
            raise contradiction(module)
        if self.layout == "awq":
            return awq.raised(module, parts, shape, spec, "gemm")
        return gptq.raised(module, parts, shape, spec, gptq.VERSIONS[self.layout])

    def _extra(self, module: str) -> Mapping[str, Any]:
        if module in self.named:
            return self.named[module]
        for name, keys in self.named.items():
            if module.endswith(f".{name}"):
                return keys
        found = next((rule for rule in self.rules if rule.pattern.search(module)), None)
        return found.overrides or {} if found is not None else {}


def parse(checkpoint: Checkpoint) -> AutoRound:
    """The scheme of `quantization_config` of an integer weight-only model."""
    config, where = checkpoint.config, checkpoint.where
    layout = _layout(config, where)
    _integers(config, where)
    if config.get("rotation_config"):
        raise UnsupportedError(
            f"{where}: rotation_config rotates activations at run time, which lconvert cannot carry"
        )
    base = _overridden(None, config, where, layout)
    if base is None:
        raise InputError(f"{where}: bits {config['bits']}: nothing is quantized; remove quantization_config")
    extra = config.get("extra_config") or {}
    if not isinstance(extra, dict) or not all(isinstance(keys, dict) for keys in extra.values()):
        raise InputError(f"{where}: extra_config is {show(extra)}, expected an object of objects by module")
    named = {name: keys for name, keys in extra.items() if not _SPECIAL & set(name)}
    rest = [(text, f"{where}: extra_config {show(text)}") for text in extra if text not in named]
    rules = [Rule(pattern, extra[text], at) for pattern, (text, at) in zip(compiled(rest), rest, strict=True)]
    return AutoRound(base, layout, named, tuple(rules), where, inert(config, _READ))


def _layout(config: Mapping[str, Any], where: str) -> str:
    key = "packing_format" if config.get("packing_format") is not None else "backend"
    value = config.get(key, "auto_round:auto_gptq")
    if key == "backend" and value == "auto":  # a choice for run time, not a layout
        value = "auto_round:auto_gptq"
    head, _, rest = value.partition(":") if isinstance(value, str) else ("", "", "")
    if head not in ("auto_round", "autoround") or rest not in _LAYOUTS:
        known = ", ".join(f"auto_round:{name}" if name else "auto_round" for name in _LAYOUTS)
        raise UnsupportedError(
            f"{where}: {key} {show(value)} cannot be read, known are {known}; export the model as auto_round"
        )
    return _LAYOUTS[rest]


def _integers(config: Mapping[str, Any], where: str) -> None:
    if config.get("data_type") not in (None, "int"):
        raise UnsupportedError(
            f"{where}: data_type {show(config['data_type'])} of AutoRound cannot be read, only int"
        )
    act = config.get("act_bits")
    if act is not None and (type(act) is not int or act < 16):
        raise UnsupportedError(
            f"{where}: act_bits {show(act)}: quantized activations of AutoRound cannot be read"
        )


def _overridden(base: Spec | None, keys: Mapping[str, Any], where: str, layout: str) -> Spec | None:
    """`base` with what `keys` state; None for 16 bits and more. Without a base bits and group_size are required."""
    _integers(keys, where)
    width = base.bits if base is not None and "bits" not in keys else whole(keys, ("bits",), where)
    if width >= 16:
        return None
    if layout == "awq" and width != 4:
        raise UnsupportedError(f"{where}: AWQ of {width} bits cannot be read, only 4")
    group = (
        base.group if base is not None and "group_size" not in keys else whole(keys, ("group_size",), where)
    )
    sym = flag(keys, "sym", where, True if base is None else base.sym)
    return Spec(gptq.bits(width, where), group_size(group, where), sym)
