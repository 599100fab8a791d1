"""A cache of fixed length: keys and values are written into it by TensorScatter instead of being concatenated.

Inputs differ from those of a growing cache: `past_key_values.N.*` have room for `capacity` positions, `cache_position` (batch,) says
how many of them are taken, and `attention_mask` covers the capacity. ONNX Runtime writes in place where an output is bound to its
input's memory, at any capacity; TensorRT makes KV_CACHE_UPDATE of TensorScatter and wants the capacity to be a number
(kVCacheUpdateLayer.cpp). TensorScatter: onnx/docs/Operators.md, opset 24.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lconvert.converters.onnx_builder import Builder

CAPACITY = "capacity"
POSITION = "cache_position"


def capacity(b: Builder) -> str | int:
    """Positions that there is room for: free, or for TensorRT as many as the graph is for."""
    return b.shape.positions or b.model.decoder.context if b.dialect.tensorrt else CAPACITY


def rows_and_columns(b: Builder) -> tuple[str, str]:
    """Positions in the cache of the tokens (batch, 1, sequence, 1), and of its slots (capacity,)."""
    g, one = b.graph, b.graph.constant(1)
    now = g.op("Squeeze", g.op("Shape", "input_ids", start=1, end=2))
    steps = g.op("Range", g.constant(0), now, one)
    rows = g.op("Add", g.op("Unsqueeze", POSITION, g.constant([1])), steps)
    size = g.op("Squeeze", g.op("Shape", "attention_mask", start=1, end=2))
    return g.op("Unsqueeze", rows, g.constant([1, 3])), g.op("Range", g.constant(0), size, one)


def written(b: Builder, past: str, new: str, name: str) -> str:
    """The cache with the new keys or values (batch, heads, sequence, width) behind what it has."""
    return str(b.graph.op("TensorScatter", past, new, POSITION, axis=2, mode="linear", output=name))
