"""The GGUF storage types: ggml id, elements per block and bytes per block.

Numbers from ggml/include/ggml.h (enum ggml_type) and ggml/src/ggml-common.h (block structs) of llama.cpp as
shipped with llama-cpp-python 0.3.36.
"""

from __future__ import annotations

from typing import NamedTuple


class BlockType(NamedTuple):
    """`elems` consecutive values along the input dimension are stored in `nbytes` bytes."""

    name: str
    ggml_id: int
    elems: int
    nbytes: int

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.nbytes / self.elems

    def row_bytes(self, cols: int) -> int:
        """Bytes of a row of `cols` values; cols must be a multiple of `elems`."""
        return cols // self.elems * self.nbytes


BLOCKS: dict[str, BlockType] = {
    t.name: t
    for t in (
        BlockType("F32", 0, 1, 4),
        BlockType("F16", 1, 1, 2),
        BlockType("Q4_0", 2, 32, 18),
        BlockType("Q4_1", 3, 32, 20),
        BlockType("Q5_0", 6, 32, 22),
        BlockType("Q5_1", 7, 32, 24),
        BlockType("Q8_0", 8, 32, 34),
        BlockType("Q2_K", 10, 256, 84),
        BlockType("Q3_K", 11, 256, 110),
        BlockType("Q4_K", 12, 256, 144),
        BlockType("Q5_K", 13, 256, 176),
        BlockType("Q6_K", 14, 256, 210),
        BlockType("IQ2_XXS", 16, 256, 66),
        BlockType("IQ2_XS", 17, 256, 74),
        BlockType("IQ3_XXS", 18, 256, 98),
        BlockType("IQ1_S", 19, 256, 50),
        BlockType("IQ4_NL", 20, 32, 18),
        BlockType("IQ3_S", 21, 256, 110),
        BlockType("IQ2_S", 22, 256, 82),
        BlockType("IQ4_XS", 23, 256, 136),
        BlockType("I8", 24, 1, 1),
        BlockType("I16", 25, 1, 2),
        BlockType("I32", 26, 1, 4),
        BlockType("I64", 27, 1, 8),
        BlockType("F64", 28, 1, 8),
        BlockType("IQ1_M", 29, 256, 56),
        BlockType("BF16", 30, 1, 2),
        BlockType("TQ1_0", 34, 256, 54),
        BlockType("TQ2_0", 35, 256, 66),
        BlockType("MXFP4", 39, 32, 17),
        BlockType("NVFP4", 40, 64, 36),
    )
}

BY_ID: dict[int, BlockType] = {t.ggml_id: t for t in BLOCKS.values()}
