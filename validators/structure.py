"""Does the artifact say what the source says? Traits, vocabulary, special ids, and the hash its manifest recorded.

Both sides are brought into one form first: the keys that a GGUF of these traits (this tokenizer) would hold. What a file
leaves to the runtime's defaults, or writes in another width, is then no difference.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lconvert.archs import find
from lconvert.converters import gguf, gguf_keys, gguf_mixture, tokenizer_gguf
from lconvert.errors import LconvertError
from lconvert.formats.gguf import GGUFFile
from lconvert.formats.gguf_values import Value
from lconvert.ir import Decoder, Model, Tokenizer
from lconvert.kernels.blocks import BLOCKS
from lconvert.plan import manifest_path
from lconvert.validators import stored
from lconvert.validators.runtimes.hf import reference_tokenizer
from lconvert.validators.tokens import first_difference

#: Keys about all tokens; the others are about special ones.
_VOCABULARY = ("tokens", "token_type", "scores", "merges", "model", "pre")
_SHOWN = 60


def gguf_traits(source: Decoder, artifact: Decoder) -> list[str]:
    """Traits that the GGUF states otherwise than the source, "key: found, expected ..."."""
    ours, theirs = (gguf_keys.metadata(find(d.family), d) for d in (source, artifact))
    out = [f"{key}: {found}" for key, found in _differences(ours, theirs)]
    factors, stored = gguf_keys.rope_tensors(source), gguf_keys.rope_tensors(artifact)
    for name in sorted(factors.keys() | stored.keys()):
        a, b = factors.get(name), stored.get(name)
        if a is None or b is None or not np.array_equal(a, b):
            out.append(f"{name}: the rotary factors are not the source's")
    return out


def gguf_vocabulary(source: Tokenizer, artifact: Tokenizer | None, d: Decoder) -> dict[str, list[str]]:
    """Differences of vocabulary and of special ids, as lists of sentences under "vocabulary" and "special ids"."""
    if artifact is None:
        return {"vocabulary": ["the file holds no tokenizer"], "special ids": []}
    expected = tokenizer_gguf.lower(source, d.vocab, d.family).keys
    try:
        found = tokenizer_gguf.lower(artifact, d.vocab, d.family).keys
    except LconvertError as e:
        return {"vocabulary": [str(e)], "special ids": []}
    out: dict[str, list[str]] = {"vocabulary": [], "special ids": []}
    for key, text in _differences(_functional(expected), _functional(found)):
        name = key.removeprefix("tokenizer.ggml.")
        out["vocabulary" if name in _VOCABULARY else "special ids"].append(f"{name}: {text}")
    return out


#: llama.cpp's token types by what they do to a text: control and user-defined tokens are both cut out of it.
_TYPES = {3: 4}
#: Keys that chat.py compares.
_CHAT = "tokenizer.chat_template"


def _functional(keys: Mapping[str, Value]) -> dict[str, Value]:
    """The keys with token types that act alike made equal, without chat templates."""
    out = {}
    for key, value in keys.items():
        name = key.removeprefix("tokenizer.ggml.")
        if name == "token_type":
            types = np.array(value.data)
            for a, b in _TYPES.items():
                types = np.where(types == a, b, types)
            value = Value(value.kind, types, value.item)
        if not key.startswith(_CHAT):
            out[key] = value
    return out


def _differences(expected: Mapping[str, Value], found: Mapping[str, Value]) -> list[tuple[str, str]]:
    out = []
    for key in sorted(expected.keys() | found.keys()):
        a, b = (None if (v := side.get(key)) is None else v.data for side in (expected, found))
        if not _equal(a, b):
            out.append((key, _told(a, b)))
    return out


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, int | float) and isinstance(b, int | float):
        return a == b or math.isclose(a, b, rel_tol=1e-6)
    if (a is None or b is None) and not (a or b):  # a flag that is off may be left out
        return isinstance(a, bool | None) and isinstance(b, bool | None)
    if a is None or b is None or isinstance(a, str) or isinstance(b, str):
        return bool(a == b)
    return len(a) == len(b) and list(a) == list(b)


def _told(a: Any, b: Any) -> str:
    """A difference in one line; of arrays the first place where they differ."""
    if _is_array(a) and _is_array(b):
        if len(a) != len(b):
            return f"{len(b)} items, expected {len(a)}"
        at = first_difference(a, b)
        count = sum(x != y for x, y in zip(a, b, strict=True))
        return f"{count} differ, the first at {at}: {_short(b[at])}, expected {_short(a[at])}"
    return f"{_short(b)}, expected {_short(a)}"


def _is_array(x: Any) -> bool:
    return isinstance(x, Sequence | np.ndarray) and not isinstance(x, str)


def _short(x: Any) -> str:
    if x is None:
        return "absent"
    if _is_array(x):
        return f"an array of {len(x)}"
    text = (
        f"{x:.9g}"
        if isinstance(x, float | np.floating)
        else repr(x.item() if isinstance(x, np.generic) else x)
    )
    return text if len(text) <= _SHOWN else text[: _SHOWN - 3] + "..."


def _changed(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    return [(key, a.get(key), b.get(key)) for key in sorted(a.keys() | b.keys()) if a.get(key) != b.get(key)]


def same_tokenizer(source: Tokenizer, artifact: Tokenizer | None) -> dict[str, list[str]]:
    """A Hugging Face folder's tokenizer against the source's: files' content, special ids."""
    if artifact is None:
        return {"vocabulary": ["the folder holds no tokenizer"], "special ids": []}
    a, b = (reference_tokenizer(t).get_vocab(with_added_tokens=True) for t in (source, artifact))
    vocabulary = [f"token {_short(name)}: {_short(y)}, expected {_short(x)}" for name, x, y in _changed(a, b)]
    a, b = (_merges(t) for t in (source, artifact))
    if a != b:
        vocabulary.append(f"merges: {_told(a, b)}")
    special = [
        f"{name}: {_short(b)}, expected {_short(a)}"
        for name, a, b in _changed(source.special, artifact.special)
    ]
    for name in _SETTINGS:
        a, b = source.config.get(name), artifact.config.get(name)
        if a != b:
            special.append(f"tokenizer_config.json, {name}: {_short(b)}, expected {_short(a)}")
    return {"vocabulary": vocabulary, "special ids": special}


#: Settings of a tokenizer that change what a prompt becomes.
_SETTINGS = ("model_max_length", "add_bos_token", "add_eos_token", "padding_side", "truncation_side")


def same_ids(source: Mapping[str, Any], artifact: Mapping[str, Any]) -> list[str]:
    """Special ids in two config.json, which generation falls back to."""
    names = [f"{name}_token_id" for name in ("bos", "eos", "pad", "unk", "sep", "decoder_start")]
    return [
        f"config.json, {name}: {_short(artifact.get(name))}, expected {_short(source.get(name))}"
        for name in names
        if source.get(name) != artifact.get(name)
    ]


def _merges(t: Tokenizer) -> list[str]:
    """The merges in the older of their two notations."""
    found = t.json.get("model", {}).get("merges") or []
    return [m if isinstance(m, str) else " ".join(m) for m in found]


def manifest_hashes(files: Sequence[Path], sha256: Callable[[Path], str]) -> dict[str, tuple[str, str]]:
    """(found, wanted) sha256 by file name, of all files that a manifest beside one of `files` lists; {} without one.

    Where there is no hash to compare, found or wanted says why in words.
    """
    out: dict[str, tuple[str, str]] = {}
    for path in files:
        beside = manifest_path(path)
        if not beside.is_file():
            continue
        try:
            listed = {
                str(name): str(f["sha256"]) for name, f in json.loads(beside.read_text())["files"].items()
            }
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
            listed = {path.name: "unreadable"}
        here = {f.name: f for f in files if f.parent == path.parent}
        for name, wanted in ({path.name: "of another file"} | listed).items():
            out[name] = (sha256(here[name]) if name in here else "missing", wanted)
    return out


def gguf_claims(file: GGUFFile, model: Model) -> tuple[list[str], list[str]]:
    """What the keys say wrongly of the tensors beside them; and the tensors that have fewer bits than llama.cpp's
    mixture of the name in general.file_type gives them."""
    arch = find(model.arch.family).gguf.arch
    rows = file.metadata.get(f"{arch}.vocab_size")
    out = []
    if rows is not None and rows.data != model.decoder.vocab:
        out.append(f"{arch}.vocab_size is {_short(rows.data)}, the embedding has {model.decoder.vocab} rows")
    value, claimed = file.metadata.get("general.file_type"), stored.gguf_file_type(file)
    if claimed is None:
        if value is not None:
            out.append(f"general.file_type is {_short(value.data)}, which llama.cpp does not have")
        return out, []
    mixture = _mixture(file, model, claimed)
    matrices = [n for n, t in file.tensors.items() if len(t.shape) > 1]
    types = {file.tensors[n].type for n in matrices}
    if types and not types & {mixture[n] for n in matrices if n in mixture}:
        out.append(f"general.file_type says {claimed}; the tensors are {', '.join(sorted(types))}")
    fewer = []
    for name, choice in mixture.items():
        type_ = file.tensors[name].type
        if BLOCKS[type_].bits_per_weight < BLOCKS[choice].bits_per_weight:
            fewer.append(f"{name} is {type_}, {claimed} makes it {choice}")
    return out, fewer


def _mixture(file: GGUFFile, model: Model, claimed: str) -> dict[str, str]:
    """The type of every tensor of the file by llama.cpp's rules."""
    names = list(file.tensors)
    weighed = frozenset(names) if "quantize.imatrix.file" in file.metadata else None
    infos = [gguf_mixture.TensorInfo(n, file.tensors[n].shape, _float(file, n)) for n in names]
    options = gguf_mixture.Options(claimed, imatrix=weighed)
    try:
        chosen = gguf_mixture.choose_types(infos, gguf.hyper(find(model.arch.family), model), options)
    except LconvertError:  # such as a type that needs an importance matrix which the file does not name
        return {}
    return {n: c.type for n, c in chosen.items()}


def _float(file: GGUFFile, name: str) -> str:
    """The type before quantization: what is F32 in the file was F32."""
    return "F32" if file.tensors[name].type == "F32" else "BF16"
