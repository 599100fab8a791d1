"""GPTQ checkpoints, v1 and v2: reading and writing them.

A module of logical shape (N, K) with groups of g inputs, G = K / g, holds

    qweight I32 (K * bits / 32, N)  every column a bit stream of K codes, lowest bits first; 3-bit codes cross words
    qzeros  I32 (G, N * bits / 32)  every row such a stream of N zero points: zero - 1 in v1, zero in v2
    scales  F16 or BF16 (G, N)
    g_idx   I32 (K,)                group of every input; i // g unless the columns were reordered (desc_act)

and means w = (code - zero) * scale (GPTQModel nn_modules/qlinear/__init__.py `pack_original`, `dequantize_weight`; v1 and
v2: utils/model.py `convert_gptq_v1_to_v2_format_module`). A symmetric module's zero points are 2^(bits - 1); vLLM's
auto_gptq.py does not look at them. AutoGPTQ and everything before GPTQModel wrote v1 and no `checkpoint_format`.

A v1 zero point stored as 2^bits - 1 is a zero of 0 that wrapped: GPTQModel adds 1 to whole words, which carries into the
neighbour, its `model_dequant.py` adds modulo 2^bits and AutoRound's torch kernel reads 2^bits. It is refused.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lconvert.errors import InputError, UnsupportedError
from lconvert.formats.config_values import flag, inert, whole
from lconvert.formats.files import show
from lconvert.formats.int_groups import (
    HEADS,
    SIDE_FILE,
    Spec,
    agree,
    contradiction,
    group_size,
    grouping,
    int_problem,
    refuse_kv,
    tiles,
)
from lconvert.formats.module_rules import Rule, first, pattern_of, rules
from lconvert.formats.scheme import Checkpoint, Held, Part, Stored, Weight, finite_scales, groups, take, view
from lconvert.ir import KVSpec, QTensor, Tensor, dense, int_grid
from lconvert.kernels import packing

BITS = (2, 3, 4, 8)
#: checkpoint_format -> version; without the key it is 1.
VERSIONS: Mapping[str, int] = {"gptq": 1, "gptq_v2": 2}
#: Other layouts under the name of gptq, and what is known of them.
_LAYOUTS: Mapping[str, str] = {
    "gptq_p": "its planar words split every code into bit planes; save it with format='gptq_v2' (2, 3, 4 or 8 bits)",
    "marlin": "its words are shuffled for one GPU kernel; give the GPTQ checkpoint that it was made from",
    "bitblas": "its words are shuffled for one GPU kernel; give the GPTQ checkpoint that it was made from",
}
#: Keys that change the function if they are set (GPTQModel quantization/config.py).
_CHANGING: Mapping[str, str] = {
    "activation": "quantizes activations",
    "adapter": "adds a low-rank correction",
    "rotation": "rotates the weights",
}
#: Keys that say what the numbers mean; the side file must agree on them.
_MEANING = (("bits",), ("group_size",), ("sym",), ("desc_act",), ("checkpoint_format", "format"))
_READ = {
    *(name for names in _MEANING for name in names),
    *(
        *_CHANGING,
        "quant_method",
        "method",
        "pack_dtype",
        "lm_head",
        "dynamic",
        "modules_in_block_to_quantize",
    ),
}


@dataclass(frozen=True)
class Gptq:
    """The scheme. only: if not empty, quantized modules have one of these in their names. lm_head: the head is one."""

    base: Spec
    version: int
    rules: tuple[Rule, ...] = ()
    only: tuple[str, ...] = ()
    lm_head: bool = False
    report: tuple[str, ...] = ()
    kv: KVSpec | None = None

    @property
    def method(self) -> str:
        s = self.base
        name = "gptq" if self.version == 1 else "gptq_v2"
        order = ", act-order" if s.desc_act else ""
        return f"{name} {s.bits} bit, {grouping(s.group)}{'' if s.sym else ', asymmetric'}{order}"

    def spec(self, module: str) -> Spec | None:
        """What the config says about a module; None: it is not quantized."""
        found = first(self.rules, module)
        if found is not None and found.overrides is None:
            return None
        if self.only and not any(name in module for name in self.only):
            return None
        if module.rpartition(".")[2] in HEADS and not self.lm_head and found is None:
            return None
        return self.base if found is None else override(self.base, found)

    def weight(self, module: str, parts: Mapping[str, Part], shape: tuple[int, ...]) -> Weight | None:
        if not parts.keys() & {"qweight", "qzeros", "scales", "g_idx"}:
            return None
        spec = self.spec(module)
        if spec is None:
            raise contradiction(module)
        return raised(module, parts, shape, spec, self.version)


# --- the config ------------------------------------------------------------------------------------------


def parse(checkpoint: Checkpoint) -> Gptq:
    """The scheme of `quantization_config`, or of AutoGPTQ's quantize_config.json; see the module docstring."""
    config, where = checkpoint.config, checkpoint.where
    version = _version(config, where)
    agree(checkpoint, _MEANING)
    for key, what in _CHANGING.items():
        if config.get(key):
            raise UnsupportedError(
                f"{where}: {key} of quantization_config {what}, which lconvert cannot read"
            )
    base = Spec(
        bits(whole(config, ("bits",), where), where),
        group_size(whole(config, ("group_size",), where), where),
        flag(config, "sym", where, True),
        flag(config, "desc_act", where, False),
    )
    return Gptq(
        base=base,
        version=version,
        rules=rules(config.get("dynamic"), where),
        only=tuple(_names(config.get("modules_in_block_to_quantize"), where)),
        lm_head=flag(config, "lm_head", where, False),
        report=inert(config, _READ),
    )


def _version(config: Mapping[str, Any], where: str) -> int:
    if config.get("is_marlin_format"):
        raise UnsupportedError(f"{where}: is_marlin_format: {_LAYOUTS['marlin']}")
    stated = {k: config[k] for k in ("checkpoint_format", "format") if config.get(k) is not None}
    for key, value in stated.items():
        name = value.lower() if isinstance(value, str) else ""
        if name in _LAYOUTS:
            raise UnsupportedError(f"{where}: {key} {name} cannot be read: {_LAYOUTS[name]}")
        if name not in VERSIONS:
            raise UnsupportedError(
                f"{where}: unknown {key} {show(value)} of gptq; known are {', '.join(VERSIONS)}"
            )
    if len({v.lower() for v in stated.values()}) > 1:
        raise InputError(
            f"{where}: checkpoint_format and format differ: {show(stated)}; remove the wrong one"
        )
    if config.get("method") not in (None, "gptq"):
        raise UnsupportedError(f"{where}: method {show(config['method'])} under quant_method gptq is unknown")
    if config.get("pack_dtype") not in (None, "int32"):
        raise UnsupportedError(
            f"{where}: pack_dtype {show(config['pack_dtype'])}: only int32 words can be read"
        )
    return VERSIONS[next(iter(stated.values()), "gptq").lower()]


def bits(value: int, where: str) -> int:
    if value not in BITS:
        raise UnsupportedError(
            f"{where}: {value} bits: GPTQ's layout is known for {', '.join(map(str, BITS))} bits"
        )
    return value


def override(base: Spec, rule: Rule) -> Spec:
    """The spec of a module for which a rule states some keys."""
    given, where = rule.overrides or {}, rule.where
    for key in ("method", "format", "checkpoint_format", "pack_dtype", *_CHANGING):
        if given.get(key):
            raise UnsupportedError(f"{where}: {key} {show(given[key])} for some modules only cannot be read")
    return Spec(
        bits(whole(given, ("bits",), where), where) if "bits" in given else base.bits,
        group_size(whole(given, ("group_size",), where), where) if "group_size" in given else base.group,
        flag(given, "sym", where, base.sym),
        flag(given, "desc_act", where, base.desc_act),
    )


def _names(value: Any, where: str) -> Iterable[str]:
    """The names in a list of them, or in the lists in it (modules_in_block_to_quantize)."""
    if value is None:
        return ()
    items = value if isinstance(value, list) else [None]
    names: list[Any] = [name for item in items for name in (item if isinstance(item, list) else [item])]
    if not all(isinstance(name, str) for name in names):
        raise InputError(f"{where}: modules_in_block_to_quantize is {show(value)}, expected lists of names")
    return names


# --- reading one module ----------------------------------------------------------------------------------


def raised(
    module: str, parts: Mapping[str, Part], shape: tuple[int, ...], spec: Spec, version: int
) -> Weight:
    """The stored tensors of a module of logical shape (N, K) as a QTensor; codes and side values are read on demand.

    Symmetric: signed codes without zero points, each of which is checked when its scale is read. Asymmetric: unsigned
    codes and zero points U8 (N, G). g_idx is kept only where it is not i // group.
    """
    n, k = shape
    if n * spec.bits % 32 or k * spec.bits % 32:
        raise InputError(
            f"{module}: {n} x {k} codes of {spec.bits} bits do not fill whole 32-bit words; config.json is wrong"
        )
    count = groups(module, k, spec.group)
    qweight = take(module, parts, "qweight", ("I32",), (k * spec.bits // 32, n))
    qzeros = take(module, parts, "qzeros", ("I32",), (count, n * spec.bits // 32))
    scales = take(module, parts, "scales", ("F16", "BF16", "F32"), (count, n))
    g_idx = _group_index(module, parts, k, count, spec)

    def codes(start: int, stop: int) -> NDArray[Any]:
        return packing.unpack_columns(qweight.columns(start, stop), spec.bits, k, signed=spec.sym)

    def zeros(start: int, stop: int) -> NDArray[Any]:
        stored = _stored_zeros(qzeros, spec.bits, start, stop)
        return _asymmetric(stored, qzeros.where, start, spec.bits, version)

    def scale(start: int, stop: int) -> NDArray[Any]:
        if spec.sym:
            _symmetric(_stored_zeros(qzeros, spec.bits, start, stop), qzeros.where, start, spec.bits, version)
        return np.ascontiguousarray(scales.columns(start, stop).T)

    q = QTensor(
        shape=(n, k),
        codes=view(qweight.data, (n, k), "I8" if spec.sym else "U8", codes),
        grid=int_grid(spec.bits, signed=spec.sym),
        block=(1, spec.group),
        scale=finite_scales(view(scales.data, (n, count), scales.dtype, scale)),
        zero=None if spec.sym else view(qzeros.data, (n, count), "U8", zeros),
        g_idx=g_idx,
    )
    return Weight(q, frozenset({"qweight", "qzeros", "scales"} | parts.keys() & {"g_idx"}))


def _group_index(module: str, parts: Mapping[str, Part], k: int, count: int, spec: Spec) -> Tensor | None:
    """g_idx where it orders the columns; None where it is the plain order or absent."""
    if "g_idx" not in parts:
        if spec.desc_act and count > 1:
            raise InputError(
                f"{module}: desc_act is true but g_idx is missing; the checkpoint is incomplete, download it again"
            )
        return None
    part = take(module, parts, "g_idx", ("I32",), (k,))
    index = part.data.load()
    outside = (index < 0) | (index >= count)
    if outside.any():
        at = int(outside.argmax())
        raise InputError(
            f"{part.where}: input {at} belongs to group {index[at]}, but there are {count}; the file is damaged"
        )
    if (index == np.arange(k) // (k // count)).all():
        return None
    if not spec.desc_act:
        raise InputError(
            f"{part.where}: orders its columns although desc_act is false: vLLM would ignore it, GPTQModel would not. Set "
            "desc_act to true in quantization_config if the order is meant"
        )
    return part.data


def _stored_zeros(qzeros: Part, bits: int, start: int, stop: int) -> NDArray[np.uint8]:
    """Zero points of rows start..stop of the weight as stored, (stop - start, G): the words that hold 32 at a time."""
    origin = start // 32
    end = min(-(-stop // 32) * bits, qzeros.shape[1])
    words = qzeros.columns(origin * bits, max(end, origin * bits))
    found = packing.unpack_rows(words, bits, words.shape[1] * 32 // bits)
    return np.ascontiguousarray(found[:, start - 32 * origin : stop - 32 * origin].T)


def _asymmetric(
    stored: NDArray[np.uint8], where: str, start: int, bits: int, version: int
) -> NDArray[np.uint8]:
    if version == 2:
        return stored
    top = (1 << bits) - 1
    wrapped = stored == top
    if wrapped.any():
        row, group = (int(i) for i in np.argwhere(wrapped)[0])
        raise InputError(
            f"{where}: the zero point of row {start + row}, group {group} is stored as {top}: v1 stores it minus 1, so this is a "
            "0 that wrapped, and loaders read it as 0, as "
            f"{top + 1} or carry into its neighbour. Save the model again with checkpoint_format gptq_v2, or symmetric"
        )
    return stored + np.uint8(1)


def _symmetric(stored: NDArray[np.uint8], where: str, start: int, bits: int, version: int) -> None:
    middle = 1 << (bits - 1)
    wrong = stored != middle - (version == 1)
    if not wrong.any():
        return
    row, group = (int(i) for i in np.argwhere(wrong)[0])
    value = int(stored[row, group])
    found = f"{where}: row {start + row}, group {group} has zero point {value + (version == 1)}, symmetric ones have {middle}"
    if (stored == middle - (version == 2)).all():
        other = next(name for name, v in VERSIONS.items() if v != version)
        raise InputError(f"{found}; they are those of checkpoint_format {other}: correct quantization_config")
    raise InputError(f"{found}; set sym to false in quantization_config if the zero points are meant")


# --- writing ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Writer:
    """GPTQ as a target. version 1 is what every loader reads; only version 2 holds a zero point of 0."""

    version: int = 1

    @property
    def kv_names(self) -> tuple[str, str]:
        return ("{attn}.k_scale", "{attn}.v_scale")

    def problem(self, held: Held) -> str | None:
        """Why GPTQ cannot hold these numbers as they are; reads the zero points."""
        q = held.weight
        if (why := int_problem(held, "GPTQ", BITS)) is not None or q is None:
            return why
        n, k = q.shape
        if n * q.grid.bits % 32 or k * q.grid.bits % 32:
            return f"{n} x {k} codes of {q.grid.bits} bits do not fill whole 32-bit words"
        if q.zero is not None:
            zero, top = q.zero.load(), (1 << q.grid.bits) - 1
            if zero.size and zero.max() > top:
                return f"GPTQ holds zero points of 0 to {top}, the largest here is {zero.max()}"
            if self.version == 1 and zero.size and zero.min() == 0:
                return "GPTQ v1 cannot hold a zero point of 0 (it stores zero - 1); gptq_v2 can"
        return None

    def store(self, held: Held) -> dict[str, Stored]:
        q = held.weight
        assert q is not None and isinstance(q.scale, Tensor)
        scale, n, k, width = q.scale, q.shape[0], q.shape[1], q.grid.bits
        count = scale.shape[1]
        group = k // count

        def qweight(start: int, stop: int) -> NDArray[Any]:
            words = np.empty((k * width // 32, n), np.uint32)
            for a, b in tiles(n, k):
                words[:, a:b] = packing.pack_columns(q.codes.read(a, b), width, signed=q.grid.signed)
            return words[start:stop].view(np.int32)

        def qzeros(start: int, stop: int) -> NDArray[Any]:
            zero = np.full((n, count), 1 << (width - 1), np.uint8) if q.zero is None else q.zero.load()
            stored = zero - np.uint8(self.version == 1)
            return packing.pack_rows(np.ascontiguousarray(stored.T), width)[start:stop].view(np.int32)

        def scales(start: int, stop: int) -> NDArray[Any]:
            return np.ascontiguousarray(scale.load().T[start:stop])

        index = q.g_idx or dense((np.arange(k) // group).astype(np.int32))
        return {
            "qweight": Stored("I32", (k * width // 32, n), qweight, whole=True),
            "qzeros": Stored("I32", (count, n * width // 32), qzeros, whole=True),
            "scales": Stored(scale.dtype, (count, n), scales, whole=True),
            "g_idx": Stored("I32", (k,), index.read),
        }

    def config(self, modules: Mapping[str, Held], kv: KVSpec | None) -> dict[str, Any]:
        """The commonest spec for all modules, and `dynamic` rules for those that are plain or have another."""
        refuse_kv("GPTQ", kv)
        specs = {name: _spec(held.weight) for name, held in modules.items() if held.weight is not None}
        if not specs:
            raise UnsupportedError(
                "no linear module is quantized, so there is nothing to write as GPTQ; write a dense folder"
            )
        base = Counter(specs.values()).most_common(1)[0][0]
        plain = [name for name in modules if name not in specs and name not in HEADS]
        dynamic: dict[str, dict[str, Any]] = {pattern_of(plain, "-"): {}} if plain else {}
        for other in dict.fromkeys(s for s in specs.values() if s != base):
            names = [name for name, s in specs.items() if s == other]
            keys = {"bits": other.bits, "group_size": other.group, "sym": other.sym}
            dynamic[pattern_of(names, "+")] = keys
        config = {
            "quant_method": "gptq",
            "checkpoint_format": next(name for name, v in VERSIONS.items() if v == self.version),
            "bits": base.bits,
            "group_size": base.group,
            "sym": base.sym,
            "desc_act": any(h.weight is not None and h.weight.g_idx is not None for h in modules.values()),
            "lm_head": any(name in HEADS for name in specs),
            "pack_dtype": "int32",
        }
        return config | ({"dynamic": dynamic} if dynamic else {})

    def side_files(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """AutoGPTQ and older GPTQModels read the config from a file of its own."""
        return {SIDE_FILE: dict(config)}


def _spec(q: QTensor) -> Spec:
    return Spec(q.grid.bits, q.block[1], q.zero is None)
