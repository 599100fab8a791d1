"""Latent attention and routed experts out of the keys of a `deepseek2` GGUF, which llama.cpp reads for this graph alone.

The file states attention as llama.cpp computes it, one key of kv_lora_rank + rope dimensions for all heads; the sizes of
the heads themselves stand in the keys that end in _mla (src/models/deepseek2.cpp load_arch_hparams).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from lconvert.archs.common import yarn_mscale
from lconvert.converters.gguf_meta import Meta
from lconvert.errors import InputError, UnsupportedError
from lconvert.formats import gguf
from lconvert.ir import Attention, Mla, Mlp, Moe, Rope

#: llama.cpp's numbers of scoring functions (llama-hparams.h llama_expert_gating_func_type); 0 is "not stated".
_SCORING = {0: "softmax", 1: "softmax", 2: "sigmoid"}


def latent(meta: Meta) -> bool:
    """Whether the file's attention is latent, as its graph takes for granted."""
    return meta.arch == "deepseek2"


def sigmoid(meta: Meta) -> bool:
    """Whether the file's experts are chosen by a sigmoid. The key is left for whoever reads the traits."""
    value = meta.file.metadata.get(f"{meta.arch}.expert_gating_func")
    return value is not None and isinstance(value.data, int) and value.data == 2


def attention(file: gguf.GGUFFile, meta: Meta, a: Attention) -> Attention:
    """`a`, made from the keys that all architectures have, as the latent attention that it is."""
    kv_rank = meta.count("attention.kv_lora_rank")
    if meta.get("attention.key_length_mla") is None:
        raise UnsupportedError(
            f"{file.path}: keys and values are one tensor attn_kv_b, as llama.cpp's converter wrote them before April "
            "2025; convert the model again from its source"
        )
    head_dim, v_dim = meta.count("attention.key_length_mla"), meta.count("attention.value_length_mla")
    if a.rope is None or a.rope.dim >= head_dim:
        raise meta.error("rope.dimension_count", f"fewer than the head's {head_dim}")
    for key, found, wanted in (
        ("attention.key_length", a.head_dim, kv_rank + a.rope.dim),
        ("attention.head_count_kv", a.kv_heads, 1),
    ):
        if found != wanted:
            raise meta.error(key, f"{wanted}, as latent attention has it")
    rank = meta.number("attention.q_lora_rank", 0)
    rope = _yarn(meta, a.rope)
    m = yarn_mscale(rope.factor, rope.mscale_all_dim) if rope.mscale_all_dim else 1.0
    return replace(
        a,
        kv_heads=a.heads,
        head_dim=head_dim,
        scale=head_dim**-0.5 * m * m,
        rope=rope,
        qkv_bias="blk.0.attn_kv_a_mqa.bias" in file.tensors,
        mla=Mla(meta.count("attention.q_lora_rank") if rank else None, kv_rank, v_dim),
    )


def _yarn(meta: Meta, rope: Rope) -> Rope:
    """With a log multiplier, llama.cpp multiplies cos and sin by attn_factor, which is 1 where the key is absent."""
    multiplier = meta.nonzero("rope.scaling.yarn_log_multiplier")
    if rope.scaling != "yarn" or multiplier is None:
        return rope
    if multiplier < 0:
        raise meta.error("rope.scaling.yarn_log_multiplier", "a positive number")
    m = float(f"{multiplier / 0.1:.7g}")
    factor = meta.maybe("rope.scaling.attn_factor")
    return replace(rope, attention_factor=None if factor == 1 else factor, mscale=m, mscale_all_dim=m)


def experts(file: gguf.GGUFFile, meta: Meta, m: Mlp | Moe) -> Moe:
    """`m`, made from the keys that all architectures have, with what this graph reads besides."""
    if not isinstance(m, Moe):
        raise UnsupportedError(f"{file.path}: a {meta.arch} model without experts is not supported")
    number = meta.number("expert_gating_func", 0)
    if number not in _SCORING:
        raise UnsupportedError(f"{file.path}: expert_gating_func {number:g} is not supported, only 1 and 2")
    groups = meta.count("expert_group_count") if meta.number("expert_group_count", 0) > 1 else 1
    best = meta.count("expert_group_used_count", groups)
    return replace(
        m,
        scoring="sigmoid" if _SCORING[int(number)] == "sigmoid" else "softmax",
        normalize=meta.flag("expert_weights_norm"),
        scale=meta.positive("expert_weights_scale", 1.0),
        shared=meta.count("expert_shared_count") * m.hidden,
        correction=any(name.endswith(".exp_probs_b.bias") for name in file.tensors),
        groups=groups if best < groups else 1,
        top_groups=best if best < groups else 1,
    )


def leading(file: gguf.GGUFFile, dense: Mapping[int, object], layers: int) -> None:
    """Layers without experts must be the first ones, and not all."""
    if sorted(dense) != list(range(len(dense))) or len(dense) == layers:
        raise InputError(
            f"{file.path}: layers {sorted(dense)} of {layers} have no experts; only the first ones may have none"
        )
