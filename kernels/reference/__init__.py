"""The specification of every storage type, in NumPy.

One module per family; each holds four tables keyed by type name:

- `QUANTIZE[type](x (n, cols) f32, weights (cols,) f32 | None) -> (n, row_bytes) uint8`
- `DEQUANTIZE[type](blocks (n, row_bytes) uint8, cols) -> (n, cols) f32`
- `UNPACK[type](blocks (n, row_bytes) uint8) -> {part name: array}`
- `PACK[type](parts) -> (n, row_bytes) uint8`

`x` is finite and contiguous, and cols is a multiple of the block length: `lconvert.kernels` has checked that. The
modules are vectorised over blocks and keep the reference's order of operations inside a block, so they give the
same bytes as the compiled kernels and as ggml on x86-64. They serve when no compiled kernel is there, and as the
oracle that needs no third-party library.
"""

from __future__ import annotations

from importlib import import_module
from types import ModuleType

FAMILY: dict[str, str] = {
    **dict.fromkeys(("F32", "F16", "BF16"), "float"),
    **dict.fromkeys(("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"), "legacy"),
    **dict.fromkeys(("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"), "kquants"),
    **dict.fromkeys(("IQ4_NL", "IQ4_XS"), "iq4"),
    **dict.fromkeys(("TQ1_0", "TQ2_0"), "ternary"),
    **dict.fromkeys(("MXFP4", "NVFP4"), "fp4"),
    **dict.fromkeys(("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S"), "iq"),
}

# Types whose search makes no sense without importance weights (`ggml.c` ggml_quantize_requires_imatrix).
NEEDS_WEIGHTS = frozenset({"IQ2_XXS", "IQ2_XS", "IQ1_S"})


def family(type: str) -> ModuleType:
    """The module that specifies `type`. KeyError for a name that no family has."""
    return import_module(f"{__name__}.{FAMILY[type]}")
