"""Hugging Face folders as a source and a target: config.json + safetensors <-> the canonical Model.

Reading costs the headers. No code of the checkpoint is ever run, and pickle files are refused. Coverage is
proved: every tensor and every config key is consumed or listed by name as inert; anything left is an error.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lconvert import kernels
from lconvert.archs import configured, find
from lconvert.archs.common import Bind, binds, plausible
from lconvert.converters import hf_experts, hf_quantized, replaced
from lconvert.converters.tokenizer_hf import read_tokenizer
from lconvert.errors import InputError, MissingPackageError, UnsupportedError
from lconvert.formats import safetensors
from lconvert.formats.files import show
from lconvert.formats.json_object import read_object
from lconvert.forward import hf_tensor
from lconvert.ir import (
    DTYPE_SIZE,
    NUMPY_DTYPE,
    Convnet,
    Decoder,
    Entry,
    Model,
    QTensor,
    Tensor,
    as_f32,
    concat_rows,
    take_quantized,
    take_rows,
)
from lconvert.plan import FilePlan, Item, Plan, Slab, Verdict, sources
from lconvert.spec import check

if TYPE_CHECKING:
    from numpy.typing import NDArray

_FLOATS = ("F32", "F16", "BF16")
#: Endings of files, which no hub name has.
_FILES = (".gguf", ".lcir", ".safetensors", ".bin", ".pt", ".pth", ".json")


def resolve(source: str) -> Path:
    """A local path, or a hub name downloaded (weights, config, tokenizer only) through huggingface_hub."""
    path = Path(source).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        raise InputError(f"{source}: neither a folder nor a model file")
    if not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", source) or path.suffix in _FILES:
        raise InputError(f"{source}: no such file or folder; check the path")
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise MissingPackageError(
            f"{source}: not a local path; to download it from the Hugging Face hub: pip install 'lconvert[hf]'"
        ) from None
    try:
        wanted = ["*.json", "*.safetensors", "*.jinja", "tokenizer.model"]
        return Path(snapshot_download(source, allow_patterns=wanted))
    except Exception as e:  # noqa: BLE001 - the hub client raises dozens of types; the reason is in the text
        reason = " ".join(str(e).split())
        raise InputError(f"{source}: no such folder, and not to be had from the hub ({reason})") from None


def _shards(folder: Path) -> list[Path]:
    """The safetensors files that make up the checkpoint."""
    index = folder / "model.safetensors.index.json"
    single = folder / "model.safetensors"
    if index.exists():
        weight_map = read_object(index).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise InputError(f"{index}: no weight_map; download the index again")
        if wrong := [v for v in weight_map.values() if not isinstance(v, str)]:
            raise InputError(f"{index}: names {show(wrong[0])} instead of a file; download the index again")
        names = sorted(set(weight_map.values()))
        present = {p.name for p in folder.iterdir()}
        for name in names:
            if Path(name).name != name or name in ("", ".", ".."):
                raise InputError(f"{index}: names a file outside the folder: {show(name)}")
            if name not in present:
                raise InputError(
                    f"{folder}: shard {show(name)} is missing (the index names {len(names)} shards); download it"
                )
        return [folder / name for name in names]
    if single.exists():
        return [single]
    found = sorted(folder.glob("*.safetensors"))
    if len(found) == 1:
        return found
    if found:
        raise InputError(f"{folder}: several safetensors files but no model.safetensors.index.json")
    pickles = sorted(p.name for p in folder.iterdir() if p.suffix in (".bin", ".pt", ".pth", ".ckpt"))
    if pickles:
        raise UnsupportedError(
            f"{folder}: {pickles[0]} is a pickle file, which can run code when it is opened; convert it to safetensors "
            "first (in transformers: AutoModelForCausalLM.from_pretrained(...).save_pretrained(OUT))"
        )
    raise InputError(f"{folder}: no safetensors file found")


def _tensors(folder: Path) -> dict[str, tuple[safetensors.SafetensorsFile, safetensors.TensorInfo]]:
    out: dict[str, tuple[safetensors.SafetensorsFile, safetensors.TensorInfo]] = {}
    for path in _shards(folder):
        file = safetensors.read_header(path)
        for name, info in file.tensors.items():
            if name in out:
                raise InputError(f"{path}: tensor {show(name)} is also in {out[name][0].path.name}")
            out[name] = (file, info)
    index = folder / "model.safetensors.index.json"
    if index.exists():
        listed = read_object(index)["weight_map"]
        missing = sorted(set(listed) - set(out))
        if missing:
            raise InputError(
                f"{folder}: the index lists {show(missing[0])} but no shard holds it ({len(missing)} missing)"
            )
    return out


def _load(
    bind: Bind, file: safetensors.SafetensorsFile, info: safetensors.TensorInfo
) -> Iterator[tuple[str, Tensor]]:
    """The canonical tensors inside one source tensor."""
    if tuple(info.shape) != bind.shape:
        raise InputError(
            f"{file.path}: tensor {info.name} has shape {tuple(info.shape)}, the configuration implies {bind.shape}"
        )
    if info.dtype not in _FLOATS:
        raise UnsupportedError(
            f"{file.path}: tensor {info.name} is stored as {info.dtype}; only {', '.join(_FLOATS)} checkpoints "
            "can be read so far"
        )
    if bind.experts:
        whole = hf_experts.dense(bind, file, info.name)
    else:
        whole = (safetensors.transposed if bind.transpose else safetensors.tensor)(file, info.name)
    for role, ranges in bind.parts:
        yield role, take_rows(whole, ranges) if bind.row is None else _as_row(whole)


def _as_row(vector: Tensor) -> Tensor:
    """A vector of n as (1, n)."""
    return replace(vector, shape=(1, *vector.shape), read=lambda a, b: vector.load()[None][a:b])


def read(source: str | Path) -> Model:
    """A Hugging Face folder (or hub name) as a Model; see the module docstring for what is guaranteed."""
    folder = resolve(str(source))
    config = read_object(folder / "config.json")
    tensors = _tensors(folder)
    scheme = hf_quantized.scheme(folder, config, tensors)
    config = {k: v for k, v in config.items() if k not in hf_quantized.CONFIG_KEYS}
    arch, decoder, keys, inert = configured(config, str(folder / "config.json"))
    # Only the class with a head (of a language model, of a classifier) is the function that is converted and proved.
    classes = keys.items("architectures", str) or [arch.hf_class]
    if arch.hf_class not in classes:
        raise UnsupportedError(f"{keys.where}: architectures is {show(classes)}, expected {arch.hf_class}")

    stacked = sum(
        info.shape[0] for _, info in tensors.values() if len(info.shape) > 2 and info.stop > info.start
    )
    plausible(decoder, keys.where, layers=len(tensors), experts=len(tensors) + stacked)
    pieces: dict[str, list[tuple[Entry, str]]] = {}
    report = [f"inert config keys: {', '.join(inert)}"] if inert else []
    listed = list(binds(arch.names, decoder))
    modules = None
    if scheme is not None:
        names = (n.removesuffix(".weight") for b in listed for n in (b.hf, b.other) if n.endswith(".weight"))
        own = {b.hf for b in listed if not b.hf.endswith((".weight", ".bias"))}
        modules = hf_quantized.Modules(scheme, names, tensors, own)
        report += [f"quantized: {scheme.method}", *scheme.report]
    for bind in listed:
        if modules is not None and (quantized := _quantized(modules, bind, tensors)):
            for entry, where in quantized:
                pieces.setdefault(entry.name, []).append((entry, where))
            continue
        found = tensors.pop(bind.hf, None) or tensors.pop(bind.other, None)
        if found is None:
            raise InputError(f"{folder}: tensor {bind.hf} {bind.shape} is missing")
        for role, tensor in _load(bind, *found):
            where = f"{found[0].path.name}:{found[1].name}"
            pieces.setdefault(role, []).append((Entry(role, tensor), where))
    entries = {role: _entry(role, *zip(*found, strict=True)) for role, found in pieces.items()}
    layers = 0 if isinstance(decoder, Convnet) else decoder.layers
    kv = None if scheme is None else hf_quantized.kv(scheme, layers, tensors)
    left = sorted(tensors)
    if isinstance(decoder, Decoder) and decoder.tied and "lm_head.weight" in tensors:
        _same_as_embedding(folder, tensors["lm_head.weight"], entries["embed"])
        left.remove("lm_head.weight")
        report.append("inert tensor: lm_head.weight (tied, equal to the embedding)")
    for pattern in arch.inert_tensors:
        hit = dict.fromkeys(n for n in left if re.fullmatch(pattern, n))
        report += [f"inert tensor: {n}" for n in hit]
        left = [n for n in left if n not in hit]
    beyond = _beyond(left, layers, arch.extra_layers(config))
    counts = Counter(beyond.values()).items()
    report += [f"inert tensors: model.layers.{i}.* ({n}, multi-token prediction)" for i, n in counts]
    left = [n for n in left if n not in beyond]
    if left:
        more = f" and {len(left) - 5} more" if len(left) > 5 else ""
        raise UnsupportedError(
            f"{folder}: unknown tensor {', '.join(show(n)[1:-1] for n in left[:5])}{more}; lconvert does not guess what it does"
        )

    generation = folder / "generation_config.json"
    return check(
        Model(
            arch=decoder,
            config=config,
            entries=entries,
            tokenizer=read_tokenizer(folder),
            generation=read_object(generation) if generation.exists() else {},
            name=folder.resolve().name,
            source=str(folder),
            report=tuple(report),
            kv=kv,
        )
    )


def _beyond(names: list[str], layers: int, extra: int) -> dict[str, int]:
    """Tensors of the `extra` layers after the last, with their layer."""
    found = {n: re.match(r"model\.layers\.(\d{1,6})\.", n) for n in names}
    numbers = {n: int(m[1]) for n, m in found.items() if m is not None}
    return {n: i for n, i in numbers.items() if layers <= i < layers + extra}


def _quantized(modules: hf_quantized.Modules, bind: Bind, tensors: Any) -> list[tuple[Entry, str]]:
    """The entries inside one module if it is quantized; none if it holds a plain tensor."""
    stack = hf_experts.mxfp4(bind, tensors) if bind.experts and modules.scheme.method == "mxfp4" else None
    if stack is not None:
        return [
            (Entry(role, take_quantized(stack, ranges)), f"{bind.hf} (mxfp4)") for role, ranges in bind.parts
        ]
    shape = bind.shape[::-1] if bind.transpose else bind.shape
    for name in (bind.hf, bind.other):
        module = name.removesuffix(".weight")
        if module == name or len(shape) != 2 or bind.row is not None:
            continue
        found = modules.weight(module, shape, tensors)
        if found is None:
            continue
        out = []
        for role, ranges in bind.parts:
            data = found.data
            rows = take_quantized(data, ranges) if isinstance(data, QTensor) else take_rows(data, ranges)
            entry = Entry(role, rows, activation=found.activation, transform=found.transform)
            out.append((entry, f"{module} ({modules.scheme.method})"))
        return out
    return []


def _entry(role: str, parts: tuple[Entry, ...], where: tuple[str, ...]) -> Entry:
    """One canonical entry out of those that hold its rows."""
    if len(parts) == 1:
        return replace(parts[0], provenance=where)
    data = [p.data for p in parts]
    kinds = {d.dtype if isinstance(d, Tensor) else "quantized" for d in data}
    if len(kinds) > 1 or kinds == {"quantized"}:
        raise UnsupportedError(
            f"{data[0].origin}: stored as {min(kinds)}, its neighbours as {', '.join(sorted(kinds))}"
        )
    return Entry(role, concat_rows(tuple(d for d in data if isinstance(d, Tensor))), provenance=where)


def _same_as_embedding(
    folder: Path, head: tuple[safetensors.SafetensorsFile, safetensors.TensorInfo], embed: Entry
) -> None:
    """A head that is stored although the config ties it must not differ, or one of the two is wrong."""
    file, info = head
    stored, assumed = safetensors.tensor(file, info.name), embed.data
    same = stored.shape == assumed.shape and isinstance(assumed, Tensor) and stored.dtype == assumed.dtype
    step = 4096
    for start in range(0, stored.rows if same else 0, step):
        stop = min(start + step, stored.rows)
        if not (stored.read(start, stop) == assumed.read(start, stop)).all():  # type: ignore[union-attr]
            same = False
            break
    if not same:
        raise InputError(
            f"{folder}: lm_head.weight differs from the embedding although tie_word_embeddings is true; transformers "
            "would drop it. Set tie_word_embeddings to false if the head is meant"
        )


# --- the other direction ---------------------------------------------------------------------------------

#: What config.json calls a dtype of ours.
TORCH_NAMES: Mapping[str, str] = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}


def stated_dtype(config: Mapping[str, Any]) -> str | None:
    """The dtype of ours that a config.json names; None where it names none, or another."""
    name = str(config.get("dtype") or config.get("torch_dtype")).removeprefix("torch.")
    return next((d for d, torch in TORCH_NAMES.items() if torch == name), None)


#: Roles that transformers and vLLM hold in F32 whatever the model's dtype: they decide which experts are chosen.
_WIDE = ".moe.correction.bias"


def to_hf(model: Model, dtype: str | None = None) -> Iterator[Item]:
    """Every Hugging Face tensor of a model, without its offset: the inverse of reading.

    dtype: storage type of all tensors; None keeps a dense tensor's own and stores dequantized ones as F32. What every
    class keeps in F32 (_WIDE) is stored as it is. Rows of a plain matrix are copied; everything else is made in one piece.
    """
    arch = find(model.arch.family)
    for bind in binds(arch.names, model.arch):
        parts = [model.entries[role].data for role, _ in bind.parts]
        own = {p.dtype if isinstance(p, Tensor) else "F32" for p in parts}
        wide = own == {"F32"} and bind.parts[0][0].endswith(_WIDE)
        stored = "F32" if wide else dtype or (own.pop() if len(own) == 1 else "F32")
        if all(isinstance(p, Tensor) and p.dtype == stored for p in parts):
            verdict = Verdict("exact")
        elif stored == "F32":
            verdict = Verdict("widened", "dequantized")
        else:
            verdict = Verdict("rounded", f"to {stored}")
        roles = tuple(role for role, _ in bind.parts)
        copied = _copied(model, bind, stored)
        rows = 1 if copied is None else copied.rows
        produce = partial(_made, model, bind, stored) if copied is None else partial(_rows, copied)
        size = prod(bind.shape) * DTYPE_SIZE[stored] // rows
        yield Item(bind.hf, stored, bind.shape, 0, rows, size, size, roles, verdict, produce)


def _copied(model: Model, bind: Bind, dtype: str) -> Tensor | None:
    """The matrix whose rows are those of a Hugging Face tensor bit for bit; None where something is done to them."""
    (role, ranges), *others = bind.parts
    entry, t = model.entries[role], model.entries[role].data
    if not isinstance(t, Tensor) or (t.dtype, t.shape) != (dtype, bind.shape) or ranges != ((0, t.rows),):
        return None
    changed = others or bind.transpose or bind.experts or "norm" in role or entry.transform is not None
    return None if changed or len(t.shape) != 2 or not t.rows else t


def _rows(t: Tensor, start: int, stop: int) -> Slab:
    """Some rows as they are; damaged ones of 16 bits are refused, as where they are rounded."""
    x = t.read(start, stop)
    if t.dtype == "F32":
        return Slab(x)
    try:
        return Slab(kernels.quantize(t.dtype, x, t.dtype))
    except InputError as e:
        raise InputError(f"{t.origin}: {e} (rows counted from {start})") from None


def _made(model: Model, bind: Bind, dtype: str, start: int, stop: int) -> Slab:
    """A whole Hugging Face tensor in its storage type, with the error of every 16th value where it was rounded."""
    x = hf_tensor(model, bind)
    flat = kernels.quantize(dtype, x.reshape(x.shape[0], -1))  # which refuses what is not finite
    if dtype == "F32":
        return Slab(x)
    out: NDArray[Any] = flat.view(NUMPY_DTYPE[dtype]).reshape(x.shape)
    exact = x.reshape(-1)[::16].astype(np.float64)
    error = as_f32(out.reshape(-1)[::16], dtype) - exact
    return Slab(out, float(np.square(error).sum()), float(np.square(exact).sum()))


def config(model: Model, dtype: str) -> dict[str, Any]:
    """config.json of the model in a dtype of ours ("BF16" ...)."""
    out = dict(model.config) | {"dtype": TORCH_NAMES[dtype]}
    out.pop("torch_dtype", None)
    return out


def text_files(model: Model, config: dict[str, Any]) -> list[FilePlan]:
    """config.json and what else a folder holds besides its weights: generation config, tokenizer, chat template."""
    files = [("config.json", config)]
    if model.generation:
        files.append(("generation_config.json", dict(model.generation)))
    if model.tokenizer is not None:
        files.append(("tokenizer.json", dict(model.tokenizer.json)))
        files.append(("tokenizer_config.json", dict(model.tokenizer.config)))
    plans = [text_file(name, json.dumps(data, indent=1, ensure_ascii=False) + "\n") for name, data in files]
    if model.tokenizer is not None and model.tokenizer.chat_template:
        plans.append(text_file("chat_template.jinja", model.tokenizer.chat_template))
    return plans


def plan(model: Model, dtype: str | None = None) -> Plan:
    """A Hugging Face folder (config, weights, tokenizer) that transformers loads. Execute it into the folder."""
    items = list(to_hf(model, dtype))
    kinds = {i.type for i in items if not i.sources[0].endswith(_WIDE)}
    stated = config(model, kinds.pop() if len(kinds) == 1 else "F32")
    options = {"dtype": dtype}
    return Plan(
        "hf",
        files(model, stated, items),
        sources(model),
        options,
        notes=model.report,
        values=replaced.values(model),
    )


def files(model: Model, config: dict[str, Any], items: Sequence[Item]) -> tuple[FilePlan, ...]:
    """The files of a Hugging Face folder. items: its tensors without offsets; refused ones (type "-") are listed last."""
    real = [i for i in items if i.type != "-"]
    head, offsets = safetensors.header_bytes([(i.name, i.type, i.shape) for i in real], {"format": "pt"})
    placed = [replace(i, offset=at) for i, at in zip(real, offsets, strict=True)]
    placed.sort(key=lambda i: i.offset)
    end = max((i.offset + i.nbytes for i in placed), default=len(head))
    weights = FilePlan("model.safetensors", head, (*placed, *(i for i in items if i.type == "-")), end)
    first, *rest = text_files(model, config)
    return (first, weights, *rest)


def text_file(name: str, text: str) -> FilePlan:
    data = text.encode()
    return FilePlan(name, data, (), len(data))
