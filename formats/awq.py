"""AWQ checkpoints of 4 bits: reading gemm and gemv, writing gemm.

A module of logical shape (N, K) with groups of g inputs, G = K / g, holds in the gemm version

    qweight I32 (K, N / 8)  packed along N: nibble j of a word is output [0, 2, 4, 6, 1, 3, 5, 7][j] of its eight
    qzeros  I32 (G, N / 8)  zero points in the same order, stored as they are
    scales  F16 or BF16 (G, N)

and in the gemv version

    qweight I32 (N, K / 8)  packed along K, lowest nibble first
    qzeros  I32 (N, W)      the same along G; W is G / 8 rounded up, to a multiple of 4 (g 32) or 2 (g 64)
    scales  F16 (N, 8 * W)  the columns from G on are padding

and means w = (code - zero) * scale (AutoAWQ awq/modules/linear/gemm.py and gemv.py, awq/utils/packing_utils.py; vLLM
auto_awq.py `_convert_awq_to_standard_format`). The scales that AWQ searched for are already in weights and norms.
`zero_point: false` is GPTQModel's word for symmetric: the zero points are stored all the same, and are all 8.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lconvert.errors import InputError, UnsupportedError
from lconvert.formats.config_values import flag, inert, name_list, whole
from lconvert.formats.files import show
from lconvert.formats.int_groups import (
    HEADS,
    Spec,
    agree,
    contradiction,
    group_size,
    grouping,
    int_problem,
    refuse_kv,
    tiles,
)
from lconvert.formats.module_rules import Rule, first, rules
from lconvert.formats.scheme import Checkpoint, Held, Part, Stored, Weight, finite_scales, groups, take, view
from lconvert.ir import KVSpec, QTensor, Tensor, int_grid
from lconvert.kernels import packing

_MIDDLE = 8
_LAYOUTS: Mapping[str, str] = {
    "gemv_fast": "its words are interleaved for one kernel",
    "llm-awq": "its words are interleaved for one kernel",
    "marlin": "its words are shuffled for one kernel",
    "bitblas": "its words are shuffled for one kernel",
}
#: Keys that say what the numbers mean, with AutoAWQ's names for them; the side file must agree on them.
_MEANING = (
    ("bits", "w_bit"),
    ("group_size", "q_group_size"),
    ("zero_point",),
    ("version", "format", "checkpoint_format"),
)
_READ = {
    *(name for names in _MEANING for name in names),
    *("quant_method", "method", "lm_head", "modules_to_not_convert", "dynamic", "pack_dtype"),
}


@dataclass(frozen=True)
class Awq:
    """The scheme. skipped: parts of the names of modules that are not quantized."""

    spec: Spec
    version: str
    skipped: tuple[str, ...] = ()
    rules: tuple[Rule, ...] = ()
    lm_head: bool = False
    report: tuple[str, ...] = ()
    kv: KVSpec | None = None

    @property
    def method(self) -> str:
        return (
            f"awq {self.version} 4 bit, {grouping(self.spec.group)}{'' if self.spec.sym else ', asymmetric'}"
        )

    def weight(self, module: str, parts: Mapping[str, Part], shape: tuple[int, ...]) -> Weight | None:
        if not parts.keys() & {"qweight", "qzeros", "scales"}:
            return None
        rule = first(self.rules, module)
        excluded = any(name in module for name in self.skipped) or (
            rule is not None and rule.overrides is None
        )
        if excluded or (module.rpartition(".")[2] in HEADS and not self.lm_head):
            raise contradiction(module)
        if rule is not None and rule.overrides:
            raise UnsupportedError(
                f"{rule.where}: AWQ has one layout for all modules; its loaders ignore this rule"
            )
        return raised(module, parts, shape, self.spec, self.version)


def parse(checkpoint: Checkpoint) -> Awq:
    """The scheme of `quantization_config`, with AutoAWQ's own names (w_bit, q_group_size) or transformers'."""
    config, where = checkpoint.config, checkpoint.where
    agree(checkpoint, _MEANING)
    stated = [config[k] for k in ("version", "format", "checkpoint_format") if config.get(k) is not None]
    names = {show(v.lower() if isinstance(v, str) else v).strip("'") for v in stated} or {"gemm"}
    if len(names) > 1:
        raise InputError(
            f"{where}: version, format and checkpoint_format differ: {', '.join(sorted(names))}; keep the right one"
        )
    version = names.pop()
    if version not in ("gemm", "gemv"):
        why = _LAYOUTS.get(version, "known are gemm and gemv")
        raise UnsupportedError(
            f"{where}: AWQ version {show(version)} cannot be read: {why}; save the model as gemm"
        )
    width = whole(config, ("bits", "w_bit"), where)
    words = show(config.get("pack_dtype") or "int32").strip("'")
    if width != 4 or words != "int32":
        raise UnsupportedError(
            f"{where}: AWQ of {width} bits in {words} words; only 4 bits in int32 can be read"
        )
    skipped = name_list(config.get("modules_to_not_convert") or [], "modules_to_not_convert", where)
    group = group_size(whole(config, ("group_size", "q_group_size"), where), where)
    return Awq(
        spec=Spec(4, group, sym=not flag(config, "zero_point", where, True)),
        version=version,
        skipped=skipped,
        rules=rules(config.get("dynamic"), where),
        lm_head=flag(config, "lm_head", where, False),
        report=inert(config, _READ),
    )


# --- reading one module ----------------------------------------------------------------------------------

Rows = Callable[[int, int], NDArray[Any]]


def raised(
    module: str, parts: Mapping[str, Part], shape: tuple[int, ...], spec: Spec, version: str
) -> Weight:
    """The stored tensors of a module of logical shape (N, K) as a QTensor; codes and side values are read on demand.

    Asymmetric: unsigned codes and zero points U8 (N, G). Symmetric: signed codes without zero points, each of which is
    checked when its scale is read.
    """
    n, k = shape
    if n % 8 or k % 8:
        raise InputError(
            f"{module}: AWQ words hold 8 codes, which {n} x {k} does not divide into; config.json is wrong"
        )
    count = groups(module, k, spec.group)
    layout = _gemm if version == "gemm" else _gemv
    qweight, qzeros, scales, codes, zeros, scale = layout(module, parts, (n, k), count)

    def signed(start: int, stop: int) -> NDArray[Any]:
        return (codes(start, stop) - np.uint8(_MIDDLE)).view(np.int8)

    def checked(start: int, stop: int) -> NDArray[Any]:
        found = zeros(start, stop)
        if (found != _MIDDLE).any():
            row, group = (int(i) for i in np.argwhere(found != _MIDDLE)[0])
            raise InputError(
                f"{qzeros.where}: row {start + row}, group {group} has zero point {found[row, group]}, symmetric ones have "
                f"{_MIDDLE}; set zero_point to true in quantization_config if the zero points are meant"
            )
        return scale(start, stop)

    q = QTensor(
        shape=(n, k),
        codes=view(qweight.data, (n, k), "I8" if spec.sym else "U8", signed if spec.sym else codes),
        grid=int_grid(4, signed=spec.sym),
        block=(1, spec.group),
        scale=finite_scales(view(scales.data, (n, count), scales.dtype, checked if spec.sym else scale)),
        zero=None if spec.sym else view(qzeros.data, (n, count), "U8", zeros),
    )
    return Weight(q, frozenset({"qweight", "qzeros", "scales"}))


def _gemm(
    module: str, parts: Mapping[str, Part], shape: tuple[int, int], count: int
) -> tuple[Part, Part, Part, Rows, Rows, Rows]:
    n, k = shape
    qweight = take(module, parts, "qweight", ("I32",), (k, n // 8))
    qzeros = take(module, parts, "qzeros", ("I32",), (count, n // 8))
    scales = take(module, parts, "scales", ("F16", "BF16", "F32"), (count, n))

    def along_rows(part: Part) -> Rows:
        def read(start: int, stop: int) -> NDArray[Any]:
            origin = start // 8
            found = packing.unpack_awq(part.columns(origin, max(-(-stop // 8), origin)))
            return found[start - 8 * origin : stop - 8 * origin]

        return read

    def scale(start: int, stop: int) -> NDArray[Any]:
        return np.ascontiguousarray(scales.columns(start, stop).T)

    return qweight, qzeros, scales, along_rows(qweight), along_rows(qzeros), scale


def _gemv(
    module: str, parts: Mapping[str, Part], shape: tuple[int, int], count: int
) -> tuple[Part, Part, Part, Rows, Rows, Rows]:
    n, k = shape
    words = _gemv_words(module, k // count, count)
    qweight = take(module, parts, "qweight", ("I32",), (n, k // 8))
    qzeros = take(module, parts, "qzeros", ("I32",), (n, words))
    scales = take(module, parts, "scales", ("F16", "BF16", "F32"), (n, 8 * words))

    def codes(start: int, stop: int) -> NDArray[Any]:
        return packing.unpack_rows(qweight.data.read(start, stop), 4, k)

    def zeros(start: int, stop: int) -> NDArray[Any]:
        return np.ascontiguousarray(
            packing.unpack_rows(qzeros.data.read(start, stop), 4, 8 * words)[:, :count]
        )

    def scale(start: int, stop: int) -> NDArray[Any]:
        return np.ascontiguousarray(scales.data.read(start, stop)[:, :count])

    return qweight, qzeros, scales, codes, zeros, scale


def _gemv_words(module: str, group: int, count: int) -> int:
    """Words of zero points per row (AutoAWQ gemv.py `calculate_zeros_width`)."""
    step = {32: 4, 64: 2}.get(group, 1 if group >= 128 else 0)
    if not step:
        raise UnsupportedError(
            f"{module}: AWQ gemv is defined for groups of 32, 64 and 128 or more inputs, not {group}"
        )
    words = -(-count // 8)
    return -(-words // step) * step


# --- writing ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Writer:
    """AWQ gemm as a target."""

    kv_names: tuple[str, str] = field(default=("{attn}.k_scale", "{attn}.v_scale"), init=False)

    def problem(self, held: Held) -> str | None:
        """Why AWQ cannot hold these numbers as they are; reads the zero points."""
        q = held.weight
        if (why := int_problem(held, "AWQ", (4,))) is not None or q is None:
            return why
        if q.g_idx is not None:
            return "AWQ has no g_idx, its groups are neighbouring inputs"
        if q.shape[0] % 8:
            return f"AWQ words hold 8 rows each, {q.shape[0]} rows do not divide evenly"
        if q.zero is not None and (zero := q.zero.load()).size and zero.max() > 15:
            return f"AWQ holds zero points of 0 to 15, the largest here is {zero.max()}"
        return None

    def store(self, held: Held) -> dict[str, Stored]:
        q = held.weight
        assert q is not None and isinstance(q.scale, Tensor)
        scale, n, k = q.scale, q.shape[0], q.shape[1]
        count = scale.shape[1]

        def qweight(start: int, stop: int) -> NDArray[Any]:
            words = np.empty((k, n // 8), np.uint32)
            for a, b in tiles(n, k):
                codes = q.codes.read(a, b)
                unsigned = codes.view(np.uint8) + np.uint8(_MIDDLE) if q.grid.signed else codes
                words[:, a // 8 : b // 8] = packing.pack_awq(unsigned)
            return words[start:stop].view(np.int32)

        def qzeros(start: int, stop: int) -> NDArray[Any]:
            zero = np.full((n, count), _MIDDLE, np.uint8) if q.zero is None else q.zero.load()
            return packing.pack_awq(zero)[start:stop].view(np.int32)

        def scales(start: int, stop: int) -> NDArray[Any]:
            return np.ascontiguousarray(scale.load().T[start:stop])

        return {
            "qweight": Stored("I32", (k, n // 8), qweight, whole=True),
            "qzeros": Stored("I32", (count, n // 8), qzeros, whole=True),
            "scales": Stored(scale.dtype, (count, n), scales, whole=True),
        }

    def config(self, modules: Mapping[str, Held], kv: KVSpec | None) -> dict[str, Any]:
        """One group size for all; zero_point is false only where all modules are symmetric.

        UnsupportedError where groups differ, or where the name of a plain module is part of a quantized one's: loaders
        skip by substrings.
        """
        refuse_kv("AWQ", kv)
        quantized = {name: held.weight for name, held in modules.items() if held.weight is not None}
        plain = [name for name in modules if name not in quantized]
        sizes = {q.block[1]: name for name, q in quantized.items()}
        if len(sizes) != 1:
            found = ", ".join(f"{grouping(g)} ({name})" for g, name in sizes.items()) or "no quantized module"
            raise UnsupportedError(
                f"AWQ has one group size for all modules, this model has {found}; write compressed-tensors"
            )
        for name in plain:
            if hidden := next((other for other in quantized if name in other), None):
                raise UnsupportedError(
                    f"AWQ's loaders would skip {hidden} along with the plain {name}, whose name it contains; write compressed-tensors"
                )
        return {
            "quant_method": "awq",
            "version": "gemm",
            "bits": 4,
            "group_size": next(iter(sizes)),
            "zero_point": any(q.zero is not None for q in quantized.values()),
            "lm_head": any(name in HEADS for name in quantized),
            "modules_to_not_convert": plain or None,
        }

    def side_files(self, config: Mapping[str, Any]) -> dict[str, Any]:
        return {}
