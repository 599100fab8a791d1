"""What a fault does to a quantized folder: changes of words, codes, scales, zero points and of what config.json says of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from .planter import Folder

Array = NDArray[Any]
Change = Callable[[Array], Array]
OnFolder = Callable[[Folder], None]

#: Which code of eight has the lowest bits of a word, the next ones, ...: as they come, and as AutoAWQ packs them.
PLAIN, AWQ = (0, 1, 2, 3, 4, 5, 6, 7), (0, 2, 4, 6, 1, 3, 5, 7)
REVERSED = PLAIN[::-1]

#: Modules by what their names contain.
Q, K, V, O, GATE, UP, DOWN = (
    f"layers.1.{m}_proj" for m in ("self_attn.q", "self_attn.k", "self_attn.v", "self_attn.o", "mlp.gate", "mlp.up", "mlp.down")
)  # fmt: skip


# --- words -----------------------------------------------------------------------------------------------


def unpacked(words: Array, axis: int, order: Sequence[int] = PLAIN) -> Array:
    """Codes of 4 bits, eight of each word along `axis`."""
    w = np.moveaxis(words.view(np.uint32), axis, -1)
    codes = np.empty((*w.shape, 8), np.uint8)
    for place, code in enumerate(order):
        codes[..., code] = w >> np.uint32(4 * place) & np.uint32(15)
    return np.moveaxis(codes.reshape(*w.shape[:-1], -1), -1, axis)


def packed(codes: Array, axis: int, order: Sequence[int] = PLAIN) -> Array:
    c = np.moveaxis(codes, axis, -1)
    c = c.reshape(*c.shape[:-1], -1, 8).astype(np.uint32)
    words = np.zeros(c.shape[:-1], np.uint32)
    for place, code in enumerate(order):
        words |= c[..., code] << np.uint32(4 * place)
    return np.ascontiguousarray(np.moveaxis(words, -1, axis)).view(np.int32)


def in_codes(change: Change, axis: int = 1, order: Sequence[int] = PLAIN) -> Change:
    """The codes of packed words changed."""
    return lambda words: packed(change(unpacked(words, axis, order)), axis, order)


def repacked(axis: int, wrong: Sequence[int], right: Sequence[int] = PLAIN) -> Change:
    """Codes packed in another order within their words."""
    return lambda words: packed(unpacked(words, axis, right), axis, wrong)


def other_axis(axis: int) -> Change:
    """Square codes packed along the other axis, in words that are then put into the shape which is expected."""
    return lambda words: packed(unpacked(words, axis), 1 - axis).reshape(words.shape)


def halves(x: Array) -> Array:
    """The two nibbles of every byte in each other's place."""
    return (x >> 4 | x << 4).astype(np.uint8)


def split(block: int) -> Change:
    """Bytes that hold the neighbours 2j and 2j+1, made to hold j and j + half of their block, as llama.cpp's do."""

    def change(x: Array) -> Array:
        codes = np.stack([x & 15, x >> 4], -1).reshape(-1, block)
        both = codes[:, : block // 2] | codes[:, block // 2 :] << 4
        return both.astype(np.uint8).reshape(x.shape)

    return change


def neighbours(scales: int, size: int) -> Change:
    """The opposite for blocks of a GGUF file with `scales` bytes before (or after) their codes: split to neighbours."""

    def change(x: Array) -> Array:
        b = x.reshape(-1, size).copy()
        codes = np.concatenate([b[:, scales:] & 15, b[:, scales:] >> 4], 1)
        b[:, scales:] = codes[:, 0::2] | codes[:, 1::2] << 4
        return b.reshape(x.shape)

    return change


# --- numbers ---------------------------------------------------------------------------------------------


def numbers(change: Change) -> Change:
    """Changes of scales as fp32 numbers, whether they are stored as bf16 bits, F16 or F32."""

    def apply(x: Array) -> Array:
        if x.dtype != np.uint16:
            return change(x.astype(np.float32)).astype(x.dtype)
        wide = change((x.astype(np.uint32) << 16).view(np.float32)).astype(np.float32)
        bits: Array = torch.from_numpy(np.ascontiguousarray(wide)).bfloat16().view(torch.uint16).numpy()
        return bits.reshape(x.shape)

    return apply


def at(index: Any, change: Callable[[Any], Any]) -> Change:
    """One element (or some) changed as a number."""

    def apply(x: Array) -> Array:
        x[index] = change(x[index])
        return x

    return numbers(apply)


def bits_at(index: Any, change: Callable[[Any], Any]) -> Change:
    """The same of what is stored."""

    def apply(x: Array) -> Array:
        before = x[index].copy()
        x[index] = change(x[index])
        assert not np.array_equal(before, x[index])
        return x

    return apply


def swapped(a: Any, b: Any) -> Change:
    """What is at index a and at index b, in each other's place."""

    def change(x: Array) -> Array:
        assert not np.array_equal(x[a], x[b])
        x[a], x[b] = x[b].copy(), x[a].copy()
        return x

    return change


def reversed_along(axis: int) -> Change:
    return lambda x: np.flip(x, axis)


def crossed(x: Array) -> Array:
    """The numbers of the transposed matrix in the shape which is expected."""
    return np.ascontiguousarray(x.T).reshape(x.shape)


def as_e5m2(x: Array) -> Array:
    """FP8 numbers as E5M2 stores them, where E4M3 is expected."""
    values = torch.from_numpy(x).view(torch.float8_e4m3fn).float()
    return np.asarray(values.to(torch.float8_e5m2).view(torch.uint8))


# --- tensors of a folder ---------------------------------------------------------------------------------


def of(change: Change, *ends: str) -> OnFolder:
    """Tensors whose name ends in one of `ends`, as they are stored, changed."""

    def apply(folder: Folder) -> None:
        hit = [n for n in folder.tensors if n.endswith(ends)]
        assert hit, f"no tensor {ends}"
        for name in hit:
            dtype, array = folder.tensors[name]
            folder.tensors[name] = (dtype, np.asarray(change(array.copy()), order="C"))

    return apply


def both(*changes: OnFolder) -> OnFolder:
    def apply(folder: Folder) -> None:
        for change in changes:
            change(folder)

    return apply


def drop(*names: str) -> OnFolder:
    """Every tensor whose name contains one of `names`."""

    def change(folder: Folder) -> None:
        gone = [n for n in folder.tensors if any(part in n for part in names)]
        assert gone, names
        for name in gone:
            del folder.tensors[name]

    return change


def add(name: str, dtype: str, array: Array) -> OnFolder:
    def change(folder: Folder) -> None:
        assert name not in folder.tensors
        folder.tensors[name] = (dtype, array)

    return change


def rename_tensors(old: str, new: str) -> OnFolder:
    def change(folder: Folder) -> None:
        assert any(old in n for n in folder.tensors)
        folder.tensors = {n.replace(old, new): t for n, t in folder.tensors.items()}

    return change


def exchange(left: str, right: str) -> OnFolder:
    """All tensors of two modules in each other's place."""

    def change(folder: Folder) -> None:
        mine = {n: t for n, t in folder.tensors.items() if left in n or right in n}
        assert mine
        for name, tensor in mine.items():
            other = name.replace(left, right) if left in name else name.replace(right, left)
            folder.tensors[other] = tensor

    return change


def copied(source: str, target: str) -> OnFolder:
    """The tensors of one module also in the place of another."""

    def change(folder: Folder) -> None:
        found = {n: t for n, t in folder.tensors.items() if source in n}
        assert found
        folder.tensors |= {n.replace(source, target): (d, x.copy()) for n, (d, x) in found.items()}

    return change


def from_source(*names: str) -> Callable[[Folder, Folder], None]:
    """Tensors as the donor has them; those of a module that is quantized here and plain there are replaced."""

    def change(folder: Folder, donor: Folder) -> None:
        for name in names:
            found = {n: t for n, t in donor.tensors.items() if name in n}
            assert found, name
            folder.tensors = {n: t for n, t in folder.tensors.items() if name not in n} | found

    return change


def column_groups(change: Change) -> OnFolder:
    """Of every g_idx that is not in order."""

    def apply(folder: Folder) -> None:
        hit = 0
        for name, (dtype, x) in list(folder.tensors.items()):
            if name.endswith("g_idx") and (np.diff(x) < 0).any():
                folder.tensors[name] = (dtype, change(x))
                hit += 1
        assert hit

    return apply


# --- what config.json says -------------------------------------------------------------------------------


def said(**values: Any) -> OnFolder:
    """Keys of quantization_config (and of quantize_config.json, which repeats GPTQ's)."""

    def change(folder: Folder) -> None:
        for part in (folder.config["quantization_config"], folder.json.get("quantize_config.json", {})):
            for name, value in values.items():
                assert part.get(name, ()) != value or part is not folder.config["quantization_config"], name
                part[name] = value

    return change


def group_says(part: str = "weights", **values: Any) -> OnFolder:
    """Keys of a part of compressed-tensors' config group; of the group itself for part ""."""

    def change(folder: Folder) -> None:
        (group,) = folder.config["quantization_config"]["config_groups"].values()
        where = group[part] if part else group
        for name, value in values.items():
            assert where.get(name, ()) != value, name
            where[name] = value

    return change


def file_says(file: str, *path: str, value: Any) -> OnFolder:
    """One value deep in another JSON file."""

    def change(folder: Folder) -> None:
        where = folder.json[file]
        for name in path[:-1]:
            where = where[name]
        assert where.get(path[-1], ()) != value, path
        where[path[-1]] = value

    return change
