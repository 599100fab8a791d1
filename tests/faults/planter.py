"""Opens an artifact with `gguf` or `safetensors` alone, lets a function spoil it, and writes it somewhere else.

Nothing of lconvert is imported here or in faults.py: a planter that shared its code would share its mistakes.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Types
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file

#: Names of stored dtypes, and as what NumPy sees them: bf16 and fp8 as their bits.
_VIEWS = {
    torch.bfloat16: ("BF16", torch.uint16),
    torch.float8_e4m3fn: ("F8_E4M3", torch.uint8),
    torch.float8_e5m2: ("F8_E5M2", torch.uint8),
    torch.float16: ("F16", torch.float16),
    torch.float32: ("F32", torch.float32),
    torch.int8: ("I8", torch.int8),
    torch.uint8: ("U8", torch.uint8),
    torch.int32: ("I32", torch.int32),
    torch.int64: ("I64", torch.int64),
}


@dataclass
class Key:
    """A metadata value with the type that the file gives it."""

    value: Any
    type: gguf.GGUFValueType
    of: gguf.GGUFValueType | None = None


@dataclass
class Stored:
    """A tensor: numbers for F32 and F16, else bytes with whole blocks along the last axis; slowest axis first."""

    data: NDArray[Any]
    type: Types


@dataclass
class Gguf:
    """All of a GGUF file."""

    arch: str
    keys: dict[str, Key]
    tensors: dict[str, Stored]

    def set(self, name: str, value: Any) -> None:
        """Give a key that the file has another value; a leading dot stands for the architecture's name."""
        self.keys[self.name(name)].value = value

    def name(self, name: str) -> str:
        return self.arch + name if name.startswith(".") else name


@dataclass
class Folder:
    """All of a Hugging Face folder: JSON files by name, tensors as (dtype, array)."""

    json: dict[str, Any]
    tensors: dict[str, tuple[str, NDArray[Any]]]

    @property
    def config(self) -> Any:
        return self.json["config.json"]


#: (good artifact, place for the bad one, another good artifact or None)
Plant = Callable[[Path, Path, Path | None], None]


@dataclass(frozen=True)
class Fault:
    """One fault in one artifact.

    tier: the first tier that must fail, in their order. says: part of the name of a failed check or, where the file is
    refused, of the message. donor: (model, type) of another good artifact that the fault takes something from.
    manifest: (model, type) of the artifact whose manifest lies beside the bad one; without one, the gates alone decide.
    silent: what the runtime computes is not changed, so that the logits cannot tell.
    """

    name: str
    model: str
    type: str
    tier: str
    plant: Plant
    says: str = ""
    donor: tuple[str, str] | None = None
    manifest: tuple[str, str] | None = None
    silent: bool = False

    @property
    def id(self) -> str:
        return f"{self.name} [{self.model} {self.type}]"


def load(path: Path) -> Gguf:
    reader = gguf.GGUFReader(str(path))
    keys = {
        name: Key(field.contents(), field.types[0], field.types[-1] if len(field.types) > 1 else None)
        for name, field in reader.fields.items()
        if not name.startswith("GGUF.")
    }
    tensors = {t.name: Stored(np.array(t.data), t.tensor_type) for t in reader.tensors}
    return Gguf(keys.pop("general.architecture").value, keys, tensors)


def save(file: Gguf, path: Path) -> None:
    writer = gguf.GGUFWriter(str(path), file.arch)
    for name, key in file.keys.items():
        writer.add_key_value(name, key.value, key.type, key.of)
    for name, tensor in file.tensors.items():
        writer.add_tensor(name, tensor.data, raw_dtype=tensor.type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def open_folder(path: Path) -> Folder:
    files = {p.name: json.loads(p.read_text(encoding="utf-8")) for p in sorted(path.glob("*.json"))}
    tensors = {}
    for name, tensor in load_file(path / "model.safetensors").items():
        dtype, view = _VIEWS[tensor.dtype]
        tensors[name] = (dtype, tensor.view(view).numpy().copy())
    return Folder(files, tensors)


def save_folder(folder: Folder, source: Path, target: Path) -> None:
    """Everything of `source` but the weights and the JSON files that were changed comes along byte by byte."""
    shutil.copytree(source, target)
    for name, content in folder.json.items():
        if content != json.loads((source / name).read_text(encoding="utf-8")):
            (target / name).write_text(json.dumps(content), encoding="utf-8")
    own = {dtype: torch_type for torch_type, (dtype, _) in _VIEWS.items()}
    made = {
        n: torch.from_numpy(np.asarray(a, order="C")).view(own[d]) for n, (d, a) in folder.tensors.items()
    }
    save_file(made, target / "model.safetensors", {"format": "pt"})


# --- kinds of change -------------------------------------------------------------------------------------


def in_gguf(*changes: Callable[[Gguf], None]) -> Plant:
    """A change of keys or tensors."""

    def plant(good: Path, bad: Path, donor: Path | None) -> None:
        file = load(good)
        for change in changes:
            change(file)
        save(file, bad)

    return plant


def from_donor(change: Callable[[Gguf, Gguf], None]) -> Plant:
    """A change that takes something from another artifact."""

    def plant(good: Path, bad: Path, donor: Path | None) -> None:
        assert donor is not None
        file = load(good)
        change(file, load(donor))
        save(file, bad)

    return plant


def in_folder(change: Callable[[Folder], None]) -> Plant:
    """A change of a folder's JSON files or tensors."""

    def plant(good: Path, bad: Path, donor: Path | None) -> None:
        folder = open_folder(good)
        change(folder)
        save_folder(folder, good, bad)

    return plant


def from_folder(change: Callable[[Folder, Folder], None]) -> Plant:
    """A change that takes something from another folder."""

    def plant(good: Path, bad: Path, donor: Path | None) -> None:
        assert donor is not None
        folder = open_folder(good)
        change(folder, open_folder(donor))
        save_folder(folder, good, bad)

    return plant


def in_bytes(change: Callable[[bytearray], bytearray | None]) -> Plant:
    """A change of the file as a string of bytes."""

    def plant(good: Path, bad: Path, donor: Path | None) -> None:
        raw = bytearray(good.read_bytes())
        bad.write_bytes(change(raw) or raw)

    return plant


def padding(good: Path, bad: Path, donor: Path | None) -> None:
    """The zero before the first tensor's data, which is there for alignment, becomes another byte."""
    reader = gguf.GGUFReader(str(good))
    last = max((t.field for t in reader.tensors), key=lambda f: f.offset)
    start = int(reader.data_offset)
    assert last.offset + sum(p.nbytes for p in last.parts) < start, "no padding in this file"
    raw = bytearray(good.read_bytes())
    raw[start - 1] = 0xAA
    bad.write_bytes(raw)


def in_weights(change: Callable[[bytearray], bytearray]) -> Plant:
    """A change of a folder's file of weights as a string of bytes."""

    def plant(good: Path, bad: Path, donor: Path | None) -> None:
        shutil.copytree(good, bad)
        weights = bad / "model.safetensors"
        weights.write_bytes(change(bytearray(weights.read_bytes())))

    return plant


def bit(tensor: str, block: int, byte: int, mask: int) -> Plant:
    """Flip the bits `mask` of one byte of one block (for F32 and F16: of one number) where it lies in the file."""

    def plant(good: Path, bad: Path, donor: Path | None) -> None:
        stored = next(t for t in gguf.GGUFReader(str(good)).tensors if t.name == tensor)
        size = gguf.GGML_QUANT_SIZES[stored.tensor_type][1]
        shutil.copyfile(good, bad)
        with open(bad, "r+b") as f:
            at = int(stored.data_offset) + block * size + byte
            f.seek(at)
            old = f.read(1)[0]
            f.seek(at)
            f.write(bytes([old ^ mask]))

    return plant
