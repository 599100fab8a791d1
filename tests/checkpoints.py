"""Small synthetic Hugging Face checkpoints written without transformers, for tests of the plumbing."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lconvert.archs import find
from lconvert.archs.common import Keys, binds
from lconvert.formats import safetensors

LLAMA: Mapping[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "vocab_size": 320,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
}


def bf16(x: NDArray[np.float32]) -> NDArray[np.uint16]:
    """Round to nearest even; finite values only."""
    bits = x.view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def write_tensors(path: Path, tensors: Mapping[str, tuple[str, NDArray[Any]]]) -> None:
    """A safetensors file of (dtype, array); BF16 arrays hold their bits."""
    head, offsets = safetensors.header_bytes(
        [(n, d, a.shape) for n, (d, a) in tensors.items()], {"format": "pt"}
    )
    end = max(at + a.nbytes for at, (_, a) in zip(offsets, tensors.values(), strict=True))
    out = np.zeros(end, np.uint8)
    out[: len(head)] = np.frombuffer(head, np.uint8)
    for at, (_, a) in zip(offsets, tensors.values(), strict=True):
        out[at : at + a.nbytes] = np.ascontiguousarray(a).reshape(-1).view(np.uint8)
    path.write_bytes(out.tobytes())


def random_tensors(
    config: Mapping[str, Any], dtype: str = "BF16", seed: int = 0
) -> dict[str, tuple[str, Any]]:
    """Every tensor that a config implies, normally distributed; norms around 1."""
    arch = find(config["model_type"])
    decoder = arch.traits(Keys(config))
    rng = np.random.default_rng(seed)
    out: dict[str, tuple[str, Any]] = {}
    for bind in binds(arch.names, decoder):
        x = rng.standard_normal(bind.shape, dtype=np.float32)
        x = 1 + x * np.float32(0.1) if "norm" in bind.hf else x * np.float32(0.02)
        cast = {"BF16": bf16, "F16": lambda a: a.astype(np.float16), "F32": lambda a: a}[dtype]
        out[bind.hf] = (dtype, cast(x.astype(np.float32)))
    return out


def write_llama(folder: Path, dtype: str = "BF16", seed: int = 0, **changes: Any) -> Path:
    """A Llama checkpoint with random weights and no tokenizer."""
    folder.mkdir(parents=True, exist_ok=True)
    config = dict(LLAMA) | changes
    (folder / "config.json").write_text(json.dumps(config))
    write_tensors(folder / "model.safetensors", random_tensors(config, dtype, seed))
    return folder
