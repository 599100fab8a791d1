"""What a target can store each matrix as, and how many bytes each choice takes: the options of an allocation.

Types that llama.cpp, vLLM, TensorRT-LLM and ONNX Runtime run; a group of matrices that a runtime loads as one is one item. Sizes are those of
the tensors as converters/ writes them; headers and configuration are the caller's to add.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from lconvert.archs import find
from lconvert.errors import OptionError
from lconvert.ir import DTYPE_SIZE, Decoder, Model, QTensor, Tensor
from lconvert.kernels.blocks import BLOCKS
from lconvert.passes.fused import groups
from lconvert.primitives.placement import MATRICES, NONE, Placed, check, own_blocks, parse


@dataclass(frozen=True)
class Target:
    """types: options by default, as NAME or NAME:GROUP, and `none` for a matrix as it is. roles: regular expression of matrices that have
    a choice. narrow: types instead where rows do not divide into blocks of 256. dense: bytes of a value that is kept, None: the source's. extra: bytes of a quantized matrix besides codes and scales.
    scale: bytes of a scale. fused: the groups that share a type."""

    about: str
    types: tuple[str, ...]
    roles: str
    narrow: tuple[str, ...] = ()
    dense: int | None = None
    extra: int = 0
    scale: int = 2
    fused: Callable[[Decoder], Iterator[tuple[str, ...]]] = lambda d: iter(())


def _stacks(d: Decoder) -> Iterator[tuple[str, ...]]:
    """What is one tensor of a GGUF file: the experts of a layer by kind, and what llama.cpp's graph of the family fuses."""
    from lconvert.spec import roles

    gguf = find(d.family).gguf
    names = list(roles(d))
    for i, _ in d.each():
        for kind in ("gate", "up", "down"):
            yield tuple(n for n in names if re.fullmatch(rf"layers\.{i}\.moe\.experts\.\d+\.{kind}", n))
        for parts in gguf.fused.values():
            yield tuple(f"layers.{i}.{p}" for p in parts)


#: MLA's keys are transposed in GGUF files, where no block type holds them.
_GGUF = rf"(?!.*\.k_b$)({MATRICES}|embed|head)"

TARGETS: Mapping[str, Target] = {
    "gguf": Target(
        "block types of llama.cpp",
        ("Q2_K", "Q3_K", "IQ3_S", "IQ4_XS", "Q4_K", "Q5_K", "Q6_K", "Q8_0"),
        _GGUF,
        narrow=("IQ4_NL", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"),
        fused=_stacks,
    ),
    "vllm": Target(
        "compressed-tensors for vLLM: weights alone, activations as they are",
        ("int4:128", "int4:32", "int8:-1", "fp8:-1", NONE),
        MATRICES,
        extra=16,  # weight_shape of packed integers, two I64
        fused=groups,
    ),
    "onnx": Target(
        "ONNX Runtime's MatMulNBits and dequantized int8",
        ("int4:32", "int4:128", "int8:-1", NONE),
        rf"({MATRICES}|head)",
        dense=4,
        scale=4,
    ),
    "trt": Target(
        "ModelOpt for TensorRT-LLM: weights alone",
        ("int4:128", "fp4", NONE),
        MATRICES,
        scale=4,
        fused=groups,
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Choice:
    """What shares a type: its name, its matrices, and the bytes under each type that it can have."""

    name: str
    roles: tuple[str, ...]
    sizes: Mapping[str, int]


@dataclass(frozen=True)
class Menu:
    """All choices of a model for a target; `fixed`: bytes of everything else; `weights`: how many numbers the model has."""

    target: str
    choices: tuple[Choice, ...]
    fixed: int
    weights: int


def find_target(name: str) -> Target:
    if name not in TARGETS:
        raise OptionError(f"allocate: target {name!r}; choose {', '.join(TARGETS)}")
    return TARGETS[name]


def menu(model: Model, target: str, types: tuple[str, ...] = (), only: str = "") -> Menu:
    """types: instead of the target's own. only: regular expression of the matrices that get a choice. OptionError where there is none."""
    t, d = find_target(target), model.decoder
    wanted = tuple(n.upper() if n.upper() in BLOCKS else n for n in types) or t.types
    for name in wanted:
        if name != NONE:
            placed = parse("allocate", name, -1)
            check("allocate", placed)
            if placed.grid in BLOCKS and target != "gguf":
                raise OptionError(f"allocate: {target} does not run {name}; it has {', '.join(t.types)}")
    chosen = [
        r
        for r, e in model.entries.items()
        if isinstance(e.data, Tensor)
        and len(e.shape) == 2
        and re.fullmatch(t.roles, r)
        and (not only or re.fullmatch(only, r))
    ]
    together = {role: group for group in t.fused(d) for role in group}
    choices: dict[str, Choice] = {}
    for role in chosen:
        members = tuple(r for r in together.get(role, (role,)) if r in chosen)
        if members[0] in choices:
            continue
        sizes = {}
        cols = model.entries[role].shape[1]
        for name in t.narrow if t.narrow and not types and cols % 256 else wanted:
            parts = [_bytes(model, r, name, t, target) for r in members]
            if all(p is not None for p in parts):
                sizes[name] = _padded(sum(p for p in parts if p is not None), target)
        if not sizes:
            raise OptionError(
                f"{role}: rows of {cols} values fit none of {', '.join(wanted)}; allow another type (such as none)"
            )
        choices[members[0]] = Choice(members[0], members, sizes)
    if not choices:
        among = f" and matches only {only!r}" if only else ""
        raise OptionError(
            f"allocate: no dense matrix of this model has a choice for {target}{among}; lconvert inspect lists what it has"
        )
    inside = {r for c in choices.values() for r in c.roles}
    fixed = sum(_kept(model, r, t, target) for r in model.entries if r not in inside)
    return Menu(target, tuple(choices.values()), fixed, sum(e.data.size for e in model.entries.values()))


def _padded(size: int, target: str) -> int:
    """Tensors of a GGUF file start at multiples of 32."""
    return -(-size // 32) * 32 if target == "gguf" else size


def _kept(model: Model, role: str, t: Target, target: str) -> int:
    """Bytes of an entry that has no choice; of one that is quantized already, of its parts as they are held."""
    data = model.entries[role].data
    if isinstance(data, QTensor):
        bits = data.grid.bits
        sides = (data.scale.size if data.scale is not None else 0) * t.scale
        return _padded(data.size * bits // 8 + sides, target)
    vector = len(data.shape) == 1 or "norm" in role or role.endswith(".router") or role == "pos_embed"
    wide = 4 if target == "gguf" and vector else t.dense or DTYPE_SIZE[data.dtype]
    return _padded(data.size * wide, target)


def _bytes(model: Model, role: str, name: str, t: Target, target: str) -> int | None:
    """Bytes of a matrix as `name`; None where its rows do not divide."""
    data = model.entries[role].data
    assert isinstance(data, Tensor)
    rows, cols = data.shape
    if name == NONE:
        return data.size * (t.dense or DTYPE_SIZE[data.dtype])
    placed = parse("allocate", name, -1)
    if placed.grid in BLOCKS:
        block = BLOCKS[placed.grid]
        return None if cols % block.elems else rows * block.row_bytes(cols)
    return _portable(placed, rows, cols, t)


def _portable(placed: Placed, rows: int, cols: int, t: Target) -> int | None:
    if placed.grid == "fp4":  # two codes a byte, E4M3 per 16, one global scale
        return None if cols % 16 else rows * (cols // 2 + cols // 16) + 4
    if own_blocks(placed.grid) or isinstance(placed.group, str):
        return None
    group = cols if placed.group == -1 else placed.group
    if cols % group:
        return None
    if placed.grid == "fp8":  # its scales are fp32 everywhere
        return rows * cols + rows * 4
    scales = rows * (cols // group) * t.scale
    bits = int(placed.grid[-1])
    if t.extra:  # compressed-tensors: 32-bit words along rows
        return rows * (-(-cols // (32 // bits)) * 4) + scales + t.extra
    return -(-rows * cols * bits // 8) + scales
