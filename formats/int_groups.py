"""What GPTQ, AWQ and AutoRound checkpoints share: the values of their configs and the structure of their weights.

All three hold weight-only matrices of integers with one scale, and perhaps a whole zero point, per row and group of inputs.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from lconvert.errors import InputError, UnsupportedError
from lconvert.formats.files import show
from lconvert.formats.json_object import read_object
from lconvert.formats.scheme import Checkpoint, Held
from lconvert.ir import KVSpec, Tensor

#: Names of the language-model head, which `lm_head` is about.
HEADS = ("lm_head", "embed_out")
SIDE_FILE = "quantize_config.json"
_TILE = 4 << 20


@dataclass(frozen=True)
class Spec:
    """How one module is quantized. group: inputs per group, -1 for all."""

    bits: int
    group: int
    sym: bool
    desc_act: bool = False


def contradiction(module: str) -> InputError:
    return InputError(
        f"{module}: is stored quantized, but quantization_config excludes it (lm_head, dynamic, modules_...); correct the "
        "config: loaders would leave this module without weights"
    )


def grouping(group: int) -> str:
    return "one group per row" if group == -1 else f"group {group}"


# --- values of a config ---


def whole(config: Mapping[str, Any], names: tuple[str, ...], where: str) -> int:
    """The whole number under one of `names`."""
    for name in names:
        if name in config:
            if type(config[name]) is not int or abs(config[name]) >= 1 << 31:
                raise InputError(
                    f"{where}: {name} of quantization_config is {show(config[name])}, expected a whole number"
                )
            return int(config[name])
    raise InputError(
        f"{where}: quantization_config lacks {names[0]}; the file is incomplete, download it again"
    )


def flag(config: Mapping[str, Any], name: str, where: str, default: bool) -> bool:
    value = config.get(name)
    if value is not None and type(value) is not bool:
        raise InputError(f"{where}: {name} of quantization_config is {show(value)}, expected true or false")
    return default if value is None else value


def agree(checkpoint: Checkpoint, keys: Iterable[tuple[str, ...]]) -> None:
    """Loaders differ in whether they read config.json or quantize_config.json: both must say the same of `keys`, of each of
    which the names are given."""
    path = checkpoint.folder / SIDE_FILE
    if str(path) == checkpoint.where or not path.exists():
        return
    side = read_object(path)
    for names in keys:
        a, b = (next((c[n] for n in names if c.get(n) is not None), None) for c in (checkpoint.config, side))
        if a is not None and b is not None and a != b:
            raise InputError(
                f"{checkpoint.where}: {names[0]} is {show(a)} but {path.name} says {show(b)}; one of the two belongs to another "
                "model, remove it"
            )


def group_size(value: int, where: str) -> int:
    if value != -1 and value <= 0:
        raise InputError(f"{where}: group_size {value} must be positive, or -1 for one group per row")
    return value


# --- what can be written ---


def int_problem(held: Held, name: str, widths: tuple[int, ...]) -> str | None:
    """Why a module is no weight-only matrix of integers in groups of columns, as GPTQ and AWQ hold them."""
    q = held.weight
    if q is None:
        return None
    if held.activation is not None:
        return f"{name} quantizes weights only, this module quantizes its input as well"
    if held.transform is not None and not held.transform.folded:
        return f"{name} has no place for an unfolded {held.transform.kind} of the {held.transform.where}"
    if q.grid.kind != "int" or q.grid.bits not in widths:
        return f"{name} holds integers of {', '.join(map(str, widths))} bits, not a {q.grid.bits}-bit {q.grid.kind} grid"
    if q.offset is not None or q.mask is not None or q.outliers or q.low_rank is not None or q.divisor:
        return f"{name} holds codes, scales and zero points only"
    if len(q.shape) != 2 or q.block[0] != 1 or (q.block[1] != -1 and q.block[1] <= 0):
        return f"{name} needs groups along the inputs of each row, not blocks of {q.block}"
    n, k = q.shape
    if q.block[1] != -1 and k % q.block[1]:
        return f"{k} inputs do not divide into groups of {q.block[1]}"
    count = 1 if q.block[1] == -1 else k // q.block[1]
    if not isinstance(q.scale, Tensor) or q.scale.dtype not in ("F16", "BF16"):
        kind = q.scale.dtype if isinstance(q.scale, Tensor) else "themselves quantized"
        return f"{name} holds scales in F16 or BF16, these are {kind}"
    if q.scale.shape != (n, count):
        return f"scales of shape {q.scale.shape} are not one per row and group, {(n, count)}"
    if q.grid.signed != (q.zero is None):
        what = "symmetric codes have no zero points" if q.grid.signed else "asymmetric codes need zero points"
        return f"{name}: {what}"
    if q.zero is not None and (q.zero.dtype != "U8" or q.zero.shape != (n, count)):
        return f"{name} holds zero points as whole numbers, one per row and group, these are {q.zero.dtype} {q.zero.shape}"
    return None


def tiles(rows: int, cols: int) -> Iterator[tuple[int, int]]:
    """Ranges of rows, multiples of 8, whose codes fit a cache: packing along rows then needs no array of all codes."""
    step = max(8, _TILE // max(1, cols) // 8 * 8)
    return ((a, min(a + step, rows)) for a in range(0, rows, step))


def refuse_kv(name: str, kv: KVSpec | None) -> None:
    if kv is not None:
        raise UnsupportedError(
            f"{name} has no words for a quantized KV cache; write compressed-tensors, or drop it"
        )
