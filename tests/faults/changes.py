"""What a fault does to an open artifact: functions that make a change of a `planter.Gguf` or `planter.Folder`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Types
from numpy.typing import NDArray

from .planter import Folder, Gguf, Key, Stored

# --- rows, heads, blocks ---------------------------------------------------------------------------------


def woven(rows: int, heads: int) -> NDArray[np.int64]:
    """Order of rows that turns the two halves of every head into neighbouring pairs."""
    return np.arange(rows).reshape(heads, 2, -1).swapaxes(1, 2).reshape(-1)


def unwoven(rows: int, heads: int) -> NDArray[np.int64]:
    return np.arange(rows).reshape(heads, -1, 2).swapaxes(1, 2).reshape(-1)


def permute_heads(order: Callable[[int, int], NDArray[np.int64]]) -> Callable[[Gguf], None]:
    """Queries and keys with the rows of every head in another order."""

    def change(file: Gguf) -> None:
        for name, tensor in file.tensors.items():
            for side, heads in (("attn_q", "head_count"), ("attn_k", "head_count_kv")):
                if f".{side}." in name:
                    count = file.keys[f"{file.arch}.attention.{heads}"].value
                    tensor.data = tensor.data[order(len(tensor.data), count)]

    return change


def swap(left: str, right: str) -> Callable[[Gguf], None]:
    """Two tensors in each other's place; {} counts the layers."""

    def change(file: Gguf) -> None:
        for n in range(int(file.keys[f"{file.arch}.block_count"].value)):
            a, b = left.format(n), right.format(n)
            file.tensors[a], file.tensors[b] = file.tensors[b], file.tensors[a]
            if "{}" not in left:
                return

    return change


def map_data(change: Callable[[NDArray[Any]], NDArray[Any]], *names: str) -> Callable[[Gguf], None]:
    """Tensors whose name contains one of `names`, stored as they are, changed."""

    def apply(file: Gguf) -> None:
        hit = [t for n, t in file.tensors.items() if any(part in n for part in names)]
        assert hit, f"no tensor {names}"
        for tensor in hit:
            tensor.data = np.ascontiguousarray(change(tensor.data))

    return apply


def map_values(
    change: Callable[[NDArray[np.float32]], NDArray[np.float32]], *names: str
) -> Callable[[Gguf], None]:
    """Tensors changed as numbers and stored in their type again."""

    def apply(file: Gguf) -> None:
        hit = [t for n, t in file.tensors.items() if any(part in n for part in names)]
        assert hit, f"no tensor {names}"
        for tensor in hit:
            x = change(gguf.quants.dequantize(tensor.data, tensor.type).copy())
            tensor.data = gguf.quants.quantize(np.ascontiguousarray(x), tensor.type)

    return apply


def key(name: str, value: Any) -> Callable[[Gguf], None]:
    return lambda file: file.set(name, value)


def changed(name: str, change: Callable[[Any], Any]) -> Callable[[Gguf], None]:
    return lambda file: file.set(name, change(file.keys[file.name(name)].value))


def new_key(name: str, value: Any, type_: gguf.GGUFValueType) -> Callable[[Gguf], None]:
    def change(file: Gguf) -> None:
        file.keys[file.name(name)] = Key(value, type_)

    return change


def without(*names: str) -> Callable[[Gguf], None]:
    """Keys or tensors that are missing."""

    def change(file: Gguf) -> None:
        for name in names:
            full = file.name(name)
            assert (file.keys.pop(full, None) is None) != (file.tensors.pop(full, None) is None), full

    return change


def blocks(name: str, size: int, change: Callable[[NDArray[np.uint8]], None]) -> Callable[[Gguf], None]:
    """The blocks (block, bytes) of one tensor changed in place."""

    def apply(file: Gguf) -> None:
        change(file.tensors[name].data.reshape(-1, size))

    return apply


def swap_blocks(name: str, size: int, a: int, b: int) -> Callable[[Gguf], None]:
    def change(data: NDArray[np.uint8]) -> None:
        data[[a, b]] = data[[b, a]]

    return blocks(name, size, change)


def copy_scale(name: str, size: int, at: slice, a: int, b: int) -> Callable[[Gguf], None]:
    """Block a gets the scale bytes of block b."""

    def change(data: NDArray[np.uint8]) -> None:
        assert not np.array_equal(data[a, at], data[b, at])
        data[a, at] = data[b, at]

    return blocks(name, size, change)


def reverse_blocks(size: int) -> Callable[[NDArray[Any]], NDArray[Any]]:
    """The blocks of every row in reverse order."""
    return lambda x: x.reshape(*x.shape[:-1], -1, size)[..., ::-1, :].reshape(x.shape)


def set_number(name: str, at: int, value: float) -> Callable[[Gguf], None]:
    def change(file: Gguf) -> None:
        file.tensors[name].data.reshape(-1)[at] = value

    return change


def as_type(name: str, type_: Types, through: Types | None = None) -> Callable[[Gguf], None]:
    """A tensor in another type, perhaps by way of a third: rounded twice."""

    def change(file: Gguf) -> None:
        tensor = file.tensors[name]
        x = gguf.quants.dequantize(tensor.data, tensor.type)
        if through is not None:
            x = gguf.quants.dequantize(gguf.quants.quantize(x, through), through)
        file.tensors[name] = Stored(gguf.quants.quantize(x, type_), type_)

    return change


def relabel(name: str, type_: Types) -> Callable[[Gguf], None]:
    """The same bytes under another type of the same size."""

    def change(file: Gguf) -> None:
        file.tensors[name] = Stored(file.tensors[name].data.view(np.uint8), type_)

    return change


def take(*names: str) -> Callable[[Gguf, Gguf], None]:
    """Tensors whose name contains one of `names`, norms excepted, from the donor."""

    def change(file: Gguf, donor: Gguf) -> None:
        for name in file.tensors:
            if "norm" not in name and any(part in name for part in names):
                file.tensors[name] = donor.tensors[name]

    return change


def layers(order: tuple[int, ...]) -> Callable[[Gguf], None]:
    """Layer n is what was layer order[n]."""

    def change(file: Gguf) -> None:
        old = dict(file.tensors)
        for n, source in enumerate(order):
            for name in old:
                if name.startswith(f"blk.{n}."):
                    file.tensors[name] = old[name.replace(f"blk.{n}.", f"blk.{source}.")]

    return change


def parts(*sizes: int, order: tuple[int, ...]) -> Callable[[NDArray[Any]], NDArray[Any]]:
    """Stretches of rows in another order (a fused projection put together wrongly)."""

    def change(x: NDArray[Any]) -> NDArray[Any]:
        pieces = np.split(x, np.cumsum(sizes)[:-1])
        return np.concatenate([pieces[i] for i in order])

    return change


def roll(by: int) -> Callable[[NDArray[Any]], NDArray[Any]]:
    return lambda x: np.roll(x, by, axis=0)


def transposed(x: NDArray[Any]) -> NDArray[Any]:
    assert x.shape[0] == x.shape[1]
    return x.T


# --- tokenizer and container -----------------------------------------------------------------------------


def item(name: str, at: int, value: Any) -> Callable[[Gguf], None]:
    """One element of a list."""

    def change(file: Gguf) -> None:
        assert file.keys[name].value[at] != value
        file.keys[name].value[at] = value

    return change


def swapped_items(name: str, a: int, b: int) -> Callable[[Gguf], None]:
    def change(file: Gguf) -> None:
        x = file.keys[name].value
        x[a], x[b] = x[b], x[a]

    return change


def stale_head(file: Gguf) -> None:
    """A tied model with a head of its own: a copy of the embedding from before its last update."""
    embed = file.tensors["token_embd.weight"]
    x = gguf.quants.dequantize(embed.data, embed.type)
    noise = np.random.default_rng(5).standard_normal(x.shape, dtype=np.float32)
    file.tensors["output.weight"] = Stored(x + 0.001 * noise, Types.F32)


def shifted_offset(raw: bytearray) -> None:
    """The second tensor's offset in the header, 32 bytes too far."""
    needle = b"blk.0.attn_k.weight"
    at = raw.index(needle) + len(needle)
    dims = int.from_bytes(raw[at : at + 4], "little")
    at += 4 + 8 * dims + 4
    offset = int.from_bytes(raw[at : at + 8], "little")
    raw[at : at + 8] = (offset + 32).to_bytes(8, "little")


def swapped_shape(raw: bytearray) -> None:
    """The two dimensions of a matrix in the header in the other order."""
    needle = b"blk.0.attn_k.weight"
    at = raw.index(needle) + len(needle) + 4
    raw[at : at + 16] = raw[at + 8 : at + 16] + raw[at : at + 8]


def reordered(file: Gguf) -> None:
    file.keys = dict(reversed(file.keys.items()))
    file.tensors = dict(reversed(file.tensors.items()))


def rename(file: Gguf, arch: str) -> None:
    """The same file under the name of another architecture."""
    file.keys = {
        n.replace(f"{file.arch}.", f"{arch}.", 1) if n.startswith(f"{file.arch}.") else n: k
        for n, k in file.keys.items()
    }
    file.arch = arch


# --- folders ---------------------------------------------------------------------------------------------


def config(**values: Any) -> Callable[[Folder], None]:
    def change(folder: Folder) -> None:
        for name, value in values.items():
            assert folder.config.get(name, ()) != value, name
            folder.config[name] = value

    return change


def rope(**values: Any) -> Callable[[Folder], None]:
    return lambda folder: folder.config["rope_parameters"].update(values)


def swap_in_folder(left: str, right: str) -> Callable[[Folder], None]:
    def change(folder: Folder) -> None:
        for n in range(int(folder.config["num_hidden_layers"])):
            a, b = left.format(n), right.format(n)
            folder.tensors[a], folder.tensors[b] = folder.tensors[b], folder.tensors[a]

    return change


def map_folder(change: Callable[[NDArray[Any]], NDArray[Any]], *names: str) -> Callable[[Folder], None]:
    def apply(folder: Folder) -> None:
        hit = [n for n in folder.tensors if any(part in n for part in names)]
        assert hit, f"no tensor {names}"
        for name in hit:
            dtype, array = folder.tensors[name]
            folder.tensors[name] = (dtype, np.asarray(change(array), order="C"))

    return apply


def lowest_bit(x: NDArray[Any]) -> NDArray[Any]:
    """Of one bf16 number."""
    x.reshape(-1)[500] ^= 1
    return x


def mislabelled(folder: Folder) -> None:
    """The bits of bf16 numbers under the name of f16."""
    name = "model.layers.1.mlp.down_proj.weight"
    folder.tensors[name] = ("F16", folder.tensors[name][1].view(np.float16))


def swapped_merges(folder: Folder) -> None:
    merges = folder.json["tokenizer.json"]["model"]["merges"]
    merges[8], merges[30] = merges[30], merges[8]


def plain_added_token(folder: Folder) -> None:
    """An added token that is missing from the list of added tokens."""
    folder.json["tokenizer.json"]["added_tokens"] = [
        t for t in folder.json["tokenizer.json"]["added_tokens"] if t["content"] != "<|turn|>"
    ]


def other_eos(folder: Folder) -> None:
    folder.json["tokenizer_config.json"]["eos_token"] = "<|pad|>"


def without_post_processor(folder: Folder) -> None:
    """Nothing is put around a text any more."""
    folder.json["tokenizer.json"]["post_processor"] = None


def added_tokens(**values: Any) -> Callable[[Folder], None]:
    """Fields of all added tokens."""

    def change(folder: Folder) -> None:
        for token in folder.json["tokenizer.json"]["added_tokens"]:
            token.update(values)

    return change


def other_split(folder: Folder) -> None:
    """GPT-2's way to split a text."""
    folder.json["tokenizer.json"]["pre_tokenizer"] = {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": True,
        "use_regex": True,
    }


def other_end(folder: Folder) -> None:
    """Generation stops at another token than the model was trained to end with."""
    folder.json["generation_config.json"]["eos_token_id"] = 2044


def other_template(folder: Folder) -> None:
    settings = folder.json["tokenizer_config.json"]
    settings["chat_template"] = settings["chat_template"].replace("<|end|>", "")
