"""Sound tiny models of every architecture, and seeded ways to damage what they consist of.

The damage is to what a model says (config, tokenizer, index, metadata), not to its container: that is
test_fuzz_headers'. Everything here takes a random.Random and returns a new value.
"""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from lconvert.archs import find
from lconvert.archs.common import Keys
from lconvert.errors import LconvertError
from lconvert.formats import gguf
from lconvert.formats import gguf_values as values
from tests.arch_cases import load
from tests.checkpoints import random_tensors, write_tensors

#: Sizes that make every architecture's case small; the rest of a case's config stays.
_TINY = {
    "hidden_size": 64, "n_embd": 64, "intermediate_size": 96, "ffn_hidden_size": 96, "moe_intermediate_size": 96,
    "n_inner": 96, "vocab_size": 300, "head_dim": 32,
}  # fmt: skip


def configs() -> dict[str, dict[str, Any]]:
    """A complete config of every case of every architecture, by the case's name."""
    out = {}
    for case in load():
        kept = (
            {"hidden_size", "head_dim"} if "short_factor" in str(case.config) else set()
        )  # one factor per pair
        config = {k: _TINY[k] if k in _TINY and v and k not in kept else v for k, v in case.config.items()}
        config["model_type"] = case.model_type
        arch = find(case.model_type)
        if case.model_type not in ("gpt2", "falcon", "gemma2", "gemma3_text", "starcoder2"):
            config.setdefault("hidden_act", "gelu" if case.model_type == "gpt_neox" else "silu")
        out[case.name] = arch.config(arch.traits(Keys(dict(config)))) | config
    return out


def tokenizer() -> dict[str, Any]:
    """A byte-level BPE tokenizer.json of 262 tokens in the manner of GPT-2."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    letters = [chr(b) if b in plain else chr(256 + b - sum(p < b for p in plain)) for b in range(256)]
    merges = [["t", "h"], ["th", "e"], [letters[32], "the"], ["a", "n"]]
    vocab = {c: i for i, c in enumerate([*letters, *(a + b for a, b in merges)])}
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    added = [
        {"id": 260 + i, "content": t, **flags, "special": True} for i, t in enumerate(("<|a|>", "<|z|>"))
    ]
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    return {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": added, "normalizer": None,
        "pre_tokenizer": level, "post_processor": level, "decoder": level,
        "model": {
            "type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
            "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "ignore_merges": False,
            "vocab": vocab, "merges": merges,
        },
    }  # fmt: skip


def write_model(folder: Path, config: dict[str, Any]) -> Path:
    """A whole checkpoint with a tokenizer."""
    folder.mkdir(parents=True)
    write_tensors(folder / "model.safetensors", random_tensors(config))
    named = {"bos_token": "<|a|>", "eos_token": "<|z|>", "chat_template": "{{ messages }}"}
    files = {
        "config.json": config,
        "tokenizer.json": tokenizer(),
        "tokenizer_config.json": named,
        "generation_config.json": {"bos_token_id": 260, "eos_token_id": [261]},
    }
    for name, data in files.items():
        (folder / name).write_text(json.dumps(data))
    return folder


# --- JSON ------------------------------------------------------------------------------------------------

#: What nobody expects under any key.
JUNK: list[Any] = [
    0, 1, -1, 2, 3, 7, 0.5, 10**6, 10**9, 2**31, 2**32, 2**63, 2**64, 10**30, 10**400, 1e308, -1e308, 1e-308,
    float("nan"), float("inf"), True, False, None, "", "x", "0", "\ud800", "\x1b[31m", "a" * 100, "../../etc/passwd",
    [], [1], [[]], ["x"], [None], [True, False], [0] * 5, [[["x"]]], {}, {"a": 1}, {"x": {"y": {"z": [1]}}},
    {"rope_type": "default"}, "default", "llama3", "yarn", "linear", "longrope", "gelu", "silu", "full_attention",
    ["full_attention", "sliding_attention"], ["sliding_attention"],
]  # fmt: skip
#: Keys that some architecture gives a meaning.
_KEYS = (
    "zzz", "", "rope_scaling", "rope_parameters", "quantization_config", "auto_map", "sliding_window", "layer_types",
    "head_dim", "partial_rotary_factor", "num_local_experts", "text_config", "architectures", "tie_word_embeddings",
)  # fmt: skip


def places(data: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    yield at
    if isinstance(data, dict):
        for key in [*data][:40] + [*data][-3:]:
            yield from places(data[key], (*at, key))
    elif isinstance(data, list):
        for i in range(min(4, len(data))):
            yield from places(data[i], (*at, i))


def damaged_json(r: random.Random, data: Any) -> str:
    """The text of a JSON document in which one to three things are wrong."""
    data = copy.deepcopy(data)
    for _ in range(r.choice([1, 1, 1, 2, 3])):
        found = [p for p in places(data) if p]
        if not found:
            break
        *way, last = r.choice(found)
        parent = data
        for key in way:
            parent = parent[key]
        old, new, kind = parent[last], copy.deepcopy(r.choice(JUNK)), r.random()
        if kind < 0.6:
            parent[last] = new
        elif kind < 0.75:
            del parent[last]
        elif kind < 0.82:
            parent[last] = [old]
        elif kind < 0.92 and isinstance(parent, dict):
            parent[r.choice(_KEYS)] = new
        elif type(old) in (int, float):
            parent[last] = r.choice([old * 2, old - 1, old + 1, -old, old * 1000003, str(old)])
        elif isinstance(parent, list):
            parent += parent
    text = json.dumps(data)
    if r.random() < 0.1:
        at = r.randrange(len(text) + 1)
        text = r.choice(
            [text[:at], text[:at] + r.choice('{}[]",:0') + text[at:], "", "[" * 100_000, "[]," * 99_999]
        )
    return text


# --- GGUF ------------------------------------------------------------------------------------------------

_NUMBERS = [
    0, 1, 2, 3, 31, 32, 33, 64, 255, 10**6, 10**9, 2**31 - 1, 2**32 - 1, 2**63 - 1, 2**64 - 1, -1, -(2**31), 0.5,
    1e38, 1e308, float("nan"), float("inf"),
]  # fmt: skip
_WORDS = [
    "", "x", "llama", "gpt2", "default", "yarn", "longrope", "linear", "none", "\udcff", "a\nb", "../x", "no_vocab",
    "t5", "phi-3", "falcon",
]  # fmt: skip
#: Keys of an architecture that a sound file may lack.
_MORE = (
    "attention.sliding_window", "attention.sliding_window_pattern", "attention.scale", "attention.clamp_kqv",
    "attention.causal", "expert_count", "expert_used_count", "expert_shared_count", "rope.scaling.type",
    "rope.scaling.factor", "rope.scaling.original_context_length", "rope.scaling.attn_factor", "rope.freq_base_swa",
    "embedding_scale", "use_parallel_residual", "pooling_type",
)  # fmt: skip
_NAMES = ("x.weight", "rope_freqs.weight", "rope_factors_long.weight", "position_embd.weight", "blk.0.attn_q_norm.weight",
          "blk.0.ffn_gate_inp.weight", "output.bias")  # fmt: skip


def _value(r: random.Random, old: gguf.Value | None) -> gguf.Value:
    """A metadata value that can be stored; ValueError for one that cannot."""
    kind = r.choice([*values._FORMAT, "str", "array", *([old.kind] * 3 if old else [])])
    if kind == "array":
        if old is not None and old.kind == "array" and r.random() < 0.6:
            items, item = list(old.data), old.item  # type: ignore[arg-type]
            at = r.randrange(len(items)) if items else 0
            changed = [items[:at], items + items, [*items[:at], *items[:1], *items[at + 1 :]]]
            return gguf.array(item or "u8", r.choice(changed))
        item, n = r.choice(["u8", "i32", "f32", "str", "bool", "u32"]), r.choice([0, 1, 2, 3, 300, 5000])
        return gguf.array(item, ["x"] * n if item == "str" else np.array([r.choice([0, 1])] * n))  # type: ignore[arg-type]
    if kind in ("str", "bool"):
        return gguf.string(r.choice(_WORDS)) if kind == "str" else gguf.boolean(r.random() < 0.5)
    x = r.choice(_NUMBERS)
    made: gguf.Value = getattr(values, kind)(x if kind[0] == "f" else int(x) if abs(x) < 1e300 else 0)
    return made


def damaged_gguf(r: random.Random, file: gguf.GGUFFile) -> bytes | None:
    """A GGUF file with wrong metadata or tensor descriptions; None where the container cannot even say it."""
    keys, prefix = dict(file.metadata), f"{file.metadata['general.architecture'].data}."
    tensors = {
        t.name: (t.type, t.shape, gguf.raw(file, t.name).load().tobytes()) for t in file.tensors.values()
    }
    for _ in range(r.choice([1, 1, 2, 3])):
        key = r.choice([*keys]) if r.random() < 0.9 else prefix + r.choice(_MORE)
        if r.random() < 0.2:
            keys.pop(key, None)
        else:
            try:
                keys[key] = _value(r, keys.get(key))
                values.encode(keys[key])
            except (ValueError, OverflowError, TypeError):
                return None
    if r.random() < 0.25:
        name = r.choice([*tensors])
        type_, shape, data = tensors.pop(name)
        change = r.choice(["gone", "name", "shape", "type"])
        if change == "name":
            tensors[r.choice(_NAMES)] = (type_, shape, data)
        elif change == "shape":
            tensors[name] = (
                type_,
                r.choice([shape[::-1], (1, *shape), (*shape, 1), shape[:1] or (1,)]),
                data,
            )
        elif change == "type":
            tensors[name] = (r.choice(["Q8_0", "Q4_K", "F16", "F64", "I8", "IQ1_S"]), shape, data)
    try:
        head, offsets, total = gguf.header(keys, [(n, t, s) for n, (t, s, _) in tensors.items()])
    except LconvertError:
        return None
    out = bytearray(max(total, len(head)))
    out[: len(head)] = head
    for at, (_, _, data) in zip(offsets, tensors.values(), strict=True):
        out[at : at + len(data)] = data[: max(0, total - at)]
    return bytes(out[:total])
