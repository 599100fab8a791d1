"""Canonical traits <-> GGUF metadata (the "<arch>.*" keys), and the rope factors that llama.cpp reads as tensors.

Key names and their meaning: llama.cpp src/llama-arch.cpp (LLM_KV_NAMES) and src/llama-model.cpp load_hparams.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from lconvert.archs.common import Arch, yarn_attention, yarn_mscale
from lconvert.formats.gguf import Value, array, boolean, f32, string, u32
from lconvert.ir import Decoder, Moe, Rope

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

_MAKE: Mapping[str, Callable[[Any], Value]] = {
    "u32": u32,
    "f32": f32,
    "str": string,
    "bool": boolean,
    "bools": lambda items: array("bool", items),
}


def _rope_keys(rope: Rope, context: int) -> dict[str, Value]:
    out = {"rope.freq_base": f32(rope.theta), "rope.dimension_count": u32(rope.dim)}
    match rope.scaling:
        case "linear":
            out["rope.scaling.type"] = string("linear")
            out["rope.scaling.factor"] = f32(rope.factor)
        case "yarn":
            out["rope.scaling.type"] = string("yarn")
            out["rope.scaling.factor"] = f32(rope.factor)
            out["rope.scaling.original_context_length"] = u32(rope.original_context)
            out["rope.scaling.yarn_beta_fast"] = f32(rope.beta_fast)
            out["rope.scaling.yarn_beta_slow"] = f32(rope.beta_slow)
            # llama.cpp multiplies its own 0.1 ln(s) + 1 by this key (llama-context.cpp, yarn_attn_factor).
            own = yarn_mscale(rope.factor)
            wanted = yarn_attention(rope)
            if not math.isclose(own, wanted, rel_tol=1e-12):
                out["rope.scaling.attn_factor"] = f32(wanted / own)
        case "longrope":
            out["rope.scaling.type"] = string("longrope")
            out["rope.scaling.original_context_length"] = u32(rope.original_context)
            out["rope.scaling.attn_factor"] = f32(longrope_attention(rope, context))
    return out


def longrope_attention(rope: Rope, context: int) -> float:
    """LongRoPE's attention factor (transformers `_compute_longrope_parameters`)."""
    if rope.attention_factor is not None:
        return rope.attention_factor
    factor = rope.factor
    return 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(rope.original_context))


def rope_tensors(d: Decoder) -> dict[str, NDArray[np.float32]]:
    """Frequency divisors that llama.cpp reads as F32 tensors: Llama 3's and LongRoPE's."""
    import numpy as np

    rope = d.default.attention.rope
    if rope is None:
        return {}
    if rope.scaling == "longrope":
        return {
            "rope_factors_long.weight": np.array(rope.long_factors, np.float32),
            "rope_factors_short.weight": np.array(rope.short_factors, np.float32),
        }
    if rope.scaling != "llama3":
        return {}
    return {"rope_freqs.weight": llama3_factors(rope)}


def llama3_factors(rope: Rope) -> NDArray[np.float32]:
    """Divisor of every frequency (transformers `_compute_llama3_parameters`), every step in fp32 as there and in
    llama.cpp's converter; torch divides a number by a tensor as number * (1 / tensor)."""
    import numpy as np

    one = np.float32(1)
    exponent = np.arange(0, rope.dim, 2, dtype=np.float32) / np.float32(rope.dim)
    power = np.power(np.float64(rope.theta), exponent.astype(np.float64)).astype(
        np.float32
    )  # correctly rounded
    frequency = one / power
    wavelength = (one / frequency) * np.float32(2 * math.pi)
    low, high = rope.original_context / rope.low_freq_factor, rope.original_context / rope.high_freq_factor
    turns = (one / wavelength) * np.float32(rope.original_context)
    smooth = (turns - np.float32(rope.low_freq_factor)) / np.float32(
        rope.high_freq_factor - rope.low_freq_factor
    )
    with np.errstate(divide="ignore", invalid="ignore"):  # beside the range in which it is used
        between = one / ((one - smooth) / np.float32(rope.factor) + smooth)
    factor = np.where(wavelength > low, np.float32(rope.factor), between)
    return np.where(wavelength < high, one, factor).astype(np.float32)


def metadata(arch: Arch, d: Decoder) -> dict[str, Value]:
    """The "<arch>.*" keys for these traits, the architecture file's own ones included."""
    a, m = d.default.attention, d.default.mlp
    keys: dict[str, Value] = {
        "block_count": u32(d.layers),
        "context_length": u32(d.context),
        "embedding_length": u32(d.hidden),
        "feed_forward_length": u32(m.hidden),
        "attention.head_count": u32(a.heads),
        "attention.head_count_kv": u32(a.kv_heads),
        "attention.key_length": u32(a.head_dim),
        "attention.value_length": u32(a.head_dim),
        "vocab_size": u32(d.vocab),
    }
    eps = "attention.layer_norm_rms_epsilon" if d.norm == "rms" else "attention.layer_norm_epsilon"
    keys[eps] = f32(d.norm_eps)
    if a.rope is not None:
        keys |= _rope_keys(a.rope, d.context)
    if isinstance(m, Moe):
        keys["expert_count"] = u32(m.experts)
        keys["expert_used_count"] = u32(m.top_k)
    for key, value in arch.gguf.keys(d).items():
        if value is None:
            keys.pop(key, None)
        else:
            keys[key] = value[1] if isinstance(value[1], Value) else _MAKE[value[0]](value[1])
    return {f"{arch.gguf.arch}.{k}": v for k, v in keys.items()}
