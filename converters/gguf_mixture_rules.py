"""The tables behind llama-quantize's choice of a type per tensor: file types, categories, exceptions and cases.

All of it is llama.cpp's published behaviour as of llama-cpp-python 0.3.36; the lines named are those of
src/llama-quant.cpp unless another file is given. gguf_mixture.py applies the tables.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import Enum
from typing import NamedTuple

from lconvert.kernels.blocks import BLOCKS


class Ftype(NamedTuple):
    """A file type of llama-quantize. `number` is general.file_type (None: the source's own); `base` is the type
    of a tensor that no rule names (None: every tensor keeps its type)."""

    name: str
    number: int | None
    base: str | None
    description: str

    @property
    def flag(self) -> str:
        """The command line flag, `--q4_k_m` for Q4_K_M."""
        return "--" + self.name.lower()


# Numbers: include/llama.h enum llama_ftype. Base types: llama_ftype_get_default_type (:882-925).
FTYPES: dict[str, Ftype] = {
    f.name: f
    for f in (
        Ftype("F32", 0, "F32", "32-bit floats"),
        Ftype("F16", 1, "F16", "16-bit IEEE floats"),
        Ftype("BF16", 32, "BF16", "bfloat16"),
        Ftype("COPY", None, None, "every tensor keeps its type"),
        Ftype("Q4_0", 2, "Q4_0", "4.50 bits, scale per 32"),
        Ftype("Q4_1", 3, "Q4_1", "5.00 bits, scale and minimum per 32"),
        Ftype("Q5_0", 8, "Q5_0", "5.50 bits, scale per 32"),
        Ftype("Q5_1", 9, "Q5_1", "6.00 bits, scale and minimum per 32"),
        Ftype("Q8_0", 7, "Q8_0", "8.50 bits, scale per 32"),
        Ftype("Q2_K", 10, "Q2_K", "2.63 bits, Q3_K and Q4_K where it matters"),
        Ftype("Q2_K_S", 21, "Q2_K", "2.63 bits; needs an importance matrix"),
        Ftype("Q3_K_S", 11, "Q3_K", "3.44 bits"),
        Ftype("Q3_K_M", 12, "Q3_K", "3.44 bits, Q4_K and Q5_K where it matters"),
        Ftype("Q3_K_L", 13, "Q3_K", "3.44 bits, Q5_K where it matters"),
        Ftype("Q4_K_S", 14, "Q4_K", "4.50 bits, Q5_K in the first layers"),
        Ftype("Q4_K_M", 15, "Q4_K", "4.50 bits, Q6_K where it matters; the usual choice"),
        Ftype("Q5_K_S", 16, "Q5_K", "5.50 bits"),
        Ftype("Q5_K_M", 17, "Q5_K", "5.50 bits, Q6_K where it matters"),
        Ftype("Q6_K", 18, "Q6_K", "6.56 bits"),
        Ftype("IQ1_S", 24, "IQ1_S", "1.56 bits; needs an importance matrix"),
        Ftype("IQ1_M", 31, "IQ1_M", "1.75 bits; needs an importance matrix"),
        Ftype("IQ2_XXS", 19, "IQ2_XXS", "2.06 bits; needs an importance matrix"),
        Ftype("IQ2_XS", 20, "IQ2_XS", "2.31 bits; needs an importance matrix"),
        Ftype("IQ2_S", 28, "IQ2_XS", "2.31 bits with IQ3_S; needs an importance matrix"),
        Ftype("IQ2_M", 29, "IQ2_S", "2.56 bits with IQ3_S; needs an importance matrix"),
        Ftype("IQ3_XXS", 23, "IQ3_XXS", "3.06 bits; needs an importance matrix"),
        Ftype("IQ3_XS", 22, "IQ3_S", "3.44 bits with IQ3_XXS; needs an importance matrix"),
        Ftype("IQ3_S", 26, "IQ3_S", "3.44 bits"),
        Ftype("IQ3_M", 27, "IQ3_S", "3.44 bits, Q4_K where it matters"),
        Ftype("IQ4_NL", 25, "IQ4_NL", "4.50 bits, non-linear levels, scale per 32"),
        Ftype("IQ4_XS", 30, "IQ4_XS", "4.25 bits, non-linear levels"),
        Ftype("TQ1_0", 36, "TQ1_0", "1.69 bits, ternary"),
        Ftype("TQ2_0", 37, "TQ2_0", "2.06 bits, ternary"),
        Ftype("MXFP4_MOE", 38, "MXFP4", "experts MXFP4, the rest Q8_0"),
    )
}

# tools/quantize/quantize.cpp QUANT_OPTIONS
ALIASES: dict[str, str] = {"Q3_K": "Q3_K_M", "Q4_K": "Q4_K_M", "Q5_K": "Q5_K_M"}

FLAGS: dict[str, str] = {f.flag: f.name for f in FTYPES.values()} | {
    "--" + alias.lower(): name for alias, name in ALIASES.items()
}

NOT_OFFERED: dict[str, str] = {
    "Q1_0": "lconvert has no encoder for the 128-element block Q1_0",
    "Q2_0": "lconvert has no encoder for the 64-element block Q2_0",
    "NVFP4": "llama-quantize has no NVFP4 file type; choose NVFP4 per tensor",
}

# Types that hold weights of an arbitrary tensor; the integer types of a GGUF file hold tables.
WEIGHT_TYPES: frozenset[str] = frozenset(BLOCKS) - {"I8", "I16", "I32", "I64", "F64"}
UNQUANTIZED: frozenset[str] = frozenset({"F32", "F16", "BF16"})


class Category(Enum):
    """What a tensor is, by its name (:28-41)."""

    OUTPUT = "output"
    TOKEN_EMBD = "token_embd"
    ATTN_V = "attn_v"
    ATTN_K = "attn_k"
    ATTN_Q = "attn_q"
    ATTN_OUTPUT = "attn_output"
    FFN_UP = "ffn_up"
    FFN_GATE = "ffn_gate"
    FFN_DOWN = "ffn_down"
    OTHER = "other"


EXACT_NAMES: dict[str, Category] = {
    "output.weight": Category.OUTPUT,
    "token_embd.weight": Category.TOKEN_EMBD,
    "per_layer_token_embd.weight": Category.TOKEN_EMBD,
}

# The first fragment that a name contains decides (:119-154). Fused qkv and MLA's kv_b count as attn_v (:157-161).
FRAGMENTS: tuple[tuple[str, Category], ...] = (
    ("attn_qkv.weight", Category.ATTN_V),
    ("attn_kv_b.weight", Category.ATTN_V),
    ("attn_v.weight", Category.ATTN_V),
    ("attn_k.weight", Category.ATTN_K),
    ("attn_q.weight", Category.ATTN_Q),
    ("attn_output.weight", Category.ATTN_OUTPUT),
    ("ffn_up", Category.FFN_UP),
    ("ffn_gate", Category.FFN_GATE),
    ("ffn_down", Category.FFN_DOWN),
)

# Tensors whose name is one of these, or contains one of those, are never quantized (:299-381).
KEPT_NAMES: frozenset[str] = frozenset({"position_embd.weight", "token_types.weight"})
KEPT_FRAGMENTS: tuple[str, ...] = (
    "_norm.weight",
    "ffn_gate_inp.weight",
    "ffn_gate_tid2eid.weight",
    "altup",
    "laurel",
    "per_layer_model_proj",
    "ssm_conv1d",
    "shortconv.conv.weight",
    "indexer.k_proj.weight",
    "indexer.q_proj.weight",
    "time_mix_first.weight",
    "time_mix_w0.weight",
    "time_mix_w1.weight",
    "time_mix_w2.weight",
    "time_mix_v0.weight",
    "time_mix_v1.weight",
    "time_mix_v2.weight",
    "time_mix_a0.weight",
    "time_mix_a1.weight",
    "time_mix_a2.weight",
    "time_mix_g1.weight",
    "time_mix_g2.weight",
    "time_mix_decay_w1.weight",
    "time_mix_decay_w2.weight",
    "time_mix_lerp_fused.weight",
    "attn_rel_b.weight",
    ".position_embd",
    "sam.pos_embd",
    "sam.neck.",
    "sam.net_",
    ".rel_pos",
    ".patch_embd",
    ".patch_merger",
    "a.rvq.codebook",
    "mm.a.code_embd",
)
KEPT_FRAGMENTS_BY_ARCH: dict[str, tuple[str, ...]] = {
    "glm5-next": (
        "hc_",
        "indexer.attn_q_b",
        "indexer.attn_k",
        "indexer.proj",
        "indexer_compressor_gate",
        "indexer_compressor_ape",
        "ssm_f_a.weight",
        "ssm_f_b.weight",
        "ssm_g_a.weight",
        "ssm_g_b.weight",
        "ssm_beta.weight",
        "attn_kv_a_mqa.weight",
        "attn_k_b.weight",
        "attn_v_b.weight",
    ),
}

# Never below Q8_0 (:473-485).
Q8_FRAGMENTS_BY_ARCH: dict[str, tuple[str, ...]] = {"glm5-next": ("attn_q_a", "attn_q_b", "nextn.eh_proj")}

# Where the columns do not divide into blocks (:403-428); 32-element types have no smaller block, F16 follows.
FALLBACK: dict[str, str] = {
    "IQ1_S": "IQ4_NL",
    "IQ1_M": "IQ4_NL",
    "IQ2_XXS": "IQ4_NL",
    "IQ2_XS": "IQ4_NL",
    "IQ2_S": "IQ4_NL",
    "IQ3_XXS": "IQ4_NL",
    "IQ3_S": "IQ4_NL",
    "IQ4_XS": "IQ4_NL",
    "Q2_K": "Q4_0",
    "Q3_K": "Q4_0",
    "TQ1_0": "Q4_0",
    "TQ2_0": "Q4_0",
    "Q4_K": "Q5_0",
    "Q5_K": "Q5_1",
    "Q6_K": "Q8_0",
}

# Types that are noise without importance data (:852-876); Q2_K only within Q2_K_S.
NEEDS_IMATRIX: frozenset[str] = frozenset({"IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS"})

# Layers at which src/models/<arch>.cpp calls a model "70B", which the attn_v rule asks for (:593).
LAYERS_OF_70B: dict[str, int] = {
    "llama": 80,
    "llama-embed": 80,
    "qwen2": 80,
    "deci": 80,
    "olmo": 80,
    "jais2": 68,
}
BUMP_OF_70B: dict[str, str] = {"Q3_K": "Q5_K", "Q4_K": "Q5_K"}

# A tied embedding follows the output (:490-511); what is not listed gets Q6_K.
OUTPUT_TYPE: dict[str, str] = {
    "IQ1_S": "Q5_K",
    "IQ1_M": "Q5_K",
    "IQ2_XXS": "Q5_K",
    "IQ2_XS": "Q5_K",
    "IQ2_S": "Q5_K",
    "IQ2_M": "Q5_K",
    "IQ3_XXS": "Q5_K",
    "Q8_0": "Q8_0",
    "MXFP4_MOE": "Q8_0",
}

# An embedding of its own (:525-543); what is not listed gets the base type.
TOKEN_EMBD_TYPE: dict[str, str] = {
    "IQ1_S": "Q2_K",
    "IQ1_M": "Q2_K",
    "IQ2_XXS": "Q2_K",
    "IQ2_XS": "Q2_K",
    "IQ2_S": "IQ3_S",
    "IQ2_M": "IQ3_S",
    "IQ3_XXS": "IQ3_S",
    "TQ1_0": "Q4_K",
    "TQ2_0": "Q4_K",
}

# These file types have attention and ffn_down rules of their own, without the 70B bump (:544-565).
VERY_LOW: frozenset[str] = frozenset({"IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ2_M"})


class Place(NamedTuple):
    """What a case may look at: layer `i` of `n` (for attn_v the i-th of n such tensors) and the model's traits."""

    i: int
    n: int
    falcon: bool
    gqa: int
    n_expert: int
    imatrix: bool


class When(NamedTuple):
    """A condition and how to say it in a report."""

    text: str
    test: Callable[[Place], bool]


def more_bits(p: Place) -> bool:
    """The first and last eighth of the layers and every third between (use_more_bits, :452-454)."""
    return p.i < p.n // 8 or p.i >= 7 * p.n // 8 or (p.i - p.n // 8) % 3 == 2


ALWAYS = When("", lambda p: True)
FIRST_2 = When("first two", lambda p: p.i < 2)
FIRST_4 = When("first four", lambda p: p.i < 4)
FIRST_8TH = When("first eighth of the layers", lambda p: p.i < p.n // 8)
FIRST_16TH = When("first sixteenth of the layers", lambda p: p.i < p.n // 16)
MIDDLE = When("middle layers", lambda p: p.n // 8 <= p.i < 7 * p.n // 8)
MORE_BITS = When("first and last eighth, every third between", more_bits)
GQA_4 = When("4 or more heads share a value head", lambda p: p.gqa >= 4)
GQA_4_OR_4_EXPERTS = When(
    "4 or more heads per value head, or experts", lambda p: p.gqa >= 4 or p.n_expert >= 4
)
IMATRIX = When("with importance data", lambda p: p.imatrix)
NO_IMATRIX = When("without importance data", lambda p: not p.imatrix)
FALCON = When("falcon", lambda p: p.falcon)
FALCON_FIRST_16TH = When("falcon, first sixteenth of the layers", lambda p: p.falcon and p.i < p.n // 16)
FALCON_MORE_BITS = When(
    "falcon, first and last eighth, every third between", lambda p: p.falcon and more_bits(p)
)
EXPERTS_8 = When("8 experts", lambda p: p.n_expert == 8)
EXPERTS_8_MORE_BITS = When(
    "8 experts, first and last eighth, every third between", lambda p: p.n_expert == 8 and more_bits(p)
)

# The first case that holds decides; None is the base type, as is the end of the list.
Cases = tuple[tuple[When, str | None], ...]

_V: dict[str, Cases] = {  # :567-592
    "IQ1_S": ((GQA_4_OR_4_EXPERTS, "Q4_K"), (ALWAYS, "Q2_K")),
    "IQ1_M": ((GQA_4_OR_4_EXPERTS, "Q4_K"), (ALWAYS, "Q2_K")),
    "IQ2_XXS": ((GQA_4_OR_4_EXPERTS, "Q4_K"), (ALWAYS, "Q2_K")),
    "IQ2_XS": ((GQA_4_OR_4_EXPERTS, "Q4_K"), (ALWAYS, "Q2_K")),
    "IQ2_S": ((GQA_4_OR_4_EXPERTS, "Q4_K"), (ALWAYS, "IQ3_S")),
    "IQ2_M": ((GQA_4_OR_4_EXPERTS, "Q4_K"), (ALWAYS, "IQ3_S")),
    "IQ3_XXS": ((GQA_4, "Q4_K"), (NO_IMATRIX, "IQ3_S")),
    "IQ3_XS": ((GQA_4, "Q4_K"),),
    "IQ3_S": ((GQA_4, "Q4_K"),),
    "IQ3_M": ((ALWAYS, "Q4_K"),),
    "IQ4_NL": ((GQA_4, "Q5_K"),),
    "IQ4_XS": ((GQA_4, "Q5_K"),),
    "Q2_K": ((GQA_4, "Q4_K"), (ALWAYS, "Q3_K")),
    "Q2_K_S": ((GQA_4, "Q4_K"),),
    "Q3_K_M": ((FIRST_2, "Q5_K"), (ALWAYS, "Q4_K")),
    "Q3_K_L": ((ALWAYS, "Q5_K"),),
    "Q4_K_S": ((FIRST_4, "Q5_K"),),
    "Q4_K_M": ((MORE_BITS, "Q6_K"),),
    "Q5_K_M": ((MORE_BITS, "Q6_K"),),
}

_K: dict[str, Cases] = {"IQ3_XS": ((ALWAYS, "IQ3_XXS"),), "IQ3_XXS": ((ALWAYS, "IQ2_S"),)}  # :606-618

_DOWN: dict[str, Cases] = {  # :626-668
    "IQ1_S": ((FIRST_8TH, "Q2_K"),),
    "IQ1_M": ((FIRST_8TH, "Q2_K"),),
    "IQ2_XXS": ((FIRST_8TH, "Q2_K"),),
    "IQ2_XS": ((FIRST_8TH, "Q2_K"),),
    "IQ2_S": ((FIRST_8TH, "IQ3_S"),),
    "IQ2_M": ((FIRST_8TH, "IQ3_S"),),
    "IQ3_XXS": ((IMATRIX, None), (FIRST_8TH, "Q4_K"), (ALWAYS, "Q3_K")),
    "IQ3_M": ((FIRST_8TH, "Q4_K"), (EXPERTS_8_MORE_BITS, "Q4_K")),
    "IQ4_NL": ((IMATRIX, None), (FIRST_8TH, "Q5_K")),
    "IQ4_XS": ((IMATRIX, None), (FIRST_8TH, "Q5_K")),
    "Q2_K": ((ALWAYS, "Q3_K"),),
    "Q2_K_S": ((FIRST_8TH, "Q4_K"),),
    "Q3_K_M": ((FIRST_16TH, "Q5_K"), (MORE_BITS, "Q4_K"), (FALCON, "Q3_K"), (ALWAYS, "Q4_K")),
    "Q3_K_L": ((FALCON, "Q4_K"), (ALWAYS, "Q5_K")),
    "Q4_0": ((NO_IMATRIX, None), (FIRST_8TH, "Q4_1")),
    "Q5_0": ((NO_IMATRIX, None), (FIRST_8TH, "Q5_1")),
    "Q4_K_S": ((FALCON, None), (FIRST_8TH, "Q5_K")),
    "Q4_K_M": ((FALCON_FIRST_16TH, "Q6_K"), (FALCON_MORE_BITS, "Q5_K"), (MORE_BITS, "Q6_K")),
    "Q5_K_M": ((MORE_BITS, "Q6_K"),),
}

_E8_O: Cases = ((FALCON, None), (EXPERTS_8, "Q5_K"))
_ATTN_OUTPUT: dict[str, Cases] = {  # :558-565, :669-688
    "IQ1_S": ((EXPERTS_8, "Q5_K"), (ALWAYS, "IQ2_XXS")),
    "IQ1_M": ((EXPERTS_8, "Q5_K"), (ALWAYS, "IQ2_XXS")),
    "IQ2_XXS": ((EXPERTS_8, "Q5_K"),),
    "IQ2_XS": ((EXPERTS_8, "Q5_K"),),
    "IQ2_S": ((EXPERTS_8, "Q5_K"), (ALWAYS, "IQ3_S")),
    "IQ2_M": ((EXPERTS_8, "Q5_K"), (ALWAYS, "IQ3_S")),
    "IQ3_XXS": (*_E8_O, (ALWAYS, "IQ3_S")),
    "IQ3_XS": _E8_O,
    "IQ3_S": _E8_O,
    "IQ3_M": (*_E8_O, (ALWAYS, "Q4_K")),
    "IQ4_NL": _E8_O,
    "IQ4_XS": _E8_O,
    "Q2_K": (*_E8_O, (ALWAYS, "Q3_K")),
    "Q3_K_S": _E8_O,
    "Q3_K_M": (*_E8_O, (ALWAYS, "Q4_K")),
    "Q3_K_L": ((FALCON, "Q4_K"), (EXPERTS_8, None), (ALWAYS, "Q5_K")),
    "Q4_K_S": _E8_O,
    "Q4_K_M": _E8_O,
}

_MID: dict[str, Cases] = {"IQ3_XS": ((MIDDLE, "IQ3_XXS"),)}  # :697-712


def _with_8_experts(cases: dict[str, Cases], very_low: str | None) -> dict[str, Cases]:
    """Put the 8-expert case, which overrides the others, before each file type's own (:554, :599, :607)."""
    first = {name: very_low if name in VERY_LOW else "Q8_0" for name in FTYPES}
    return {
        name: (*(((EXPERTS_8, kind),) if kind else ()), *cases.get(name, ())) for name, kind in first.items()
    }


CASES: dict[Category, dict[str, Cases]] = {
    Category.ATTN_V: _with_8_experts(_V, None),
    Category.ATTN_K: _with_8_experts(_K, "Q4_K"),
    Category.ATTN_Q: _K,
    Category.ATTN_OUTPUT: _ATTN_OUTPUT,
    Category.FFN_DOWN: _DOWN,
    Category.FFN_GATE: _MID,
    Category.FFN_UP: _MID,
    Category.OTHER: {},
}
