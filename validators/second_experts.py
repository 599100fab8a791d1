"""A second decoding of gpt-oss's packed experts, nibble by nibble: neither the reader of `formats` nor the kernels have a part in it.

Numbers come out matrix by matrix, so that memory is bounded by an expert. Layout: openai/gpt-oss gpt_oss/torch/weights.py,
transformers integrations/mxfp4.py: byte i of a block has column 2i in its low half, gate and up take turns row by row.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lconvert.validators import second_reading

#: E2M1 in the order of its codes.
_E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)
_STACK = re.compile(r"model\.layers\.(\d+)\.mlp\.experts")
#: The tensors of a layer, and the canonical names of the matrices whose rows take turns in them.
_PARTS = {"gate_up_proj": ("gate", "up"), "down_proj": ("down",)}


def matrices(folder: Path) -> Iterator[tuple[str, NDArray[np.float32]]]:
    """Canonical name and fp32 values (out, in) of every packed expert of a folder."""
    for module, tensors in second_reading.read(folder).items():
        found = _STACK.fullmatch(module)
        if found is None:
            continue
        for name, roles in _PARTS.items():
            if f"{name}_blocks" not in tensors or f"{name}_scales" not in tensors:
                continue
            blocks, scales = tensors[f"{name}_blocks"][1], tensors[f"{name}_scales"][1]
            for expert in range(blocks.shape[0]):
                whole = _values(blocks[expert], scales[expert])
                for turn, role in enumerate(roles):
                    yield f"layers.{found[1]}.moe.experts.{expert}.{role}", whole[turn :: len(roles)]


def _values(blocks: NDArray[Any], scales: NDArray[Any]) -> NDArray[np.float32]:
    """Blocks (N, K/32, 16) and exponents (N, K/32) as (N, K)."""
    out = np.empty((*blocks.shape[:2], 32), np.float32)
    out[..., 0::2], out[..., 1::2] = _E2M1[blocks & 15], _E2M1[blocks >> 4]
    exponents = np.where(scales == 255, np.nan, np.ldexp(np.float64(1), scales.astype(np.int32) - 127))
    with np.errstate(over="ignore"):
        numbers: NDArray[np.float32] = (out * exponents[..., None]).astype(np.float32)
    return numbers.reshape(blocks.shape[0], -1)
