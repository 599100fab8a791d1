"""GGUF files as a source: metadata and tensors back to a Model.

Tensors are exact: block types become QTensors, rotary row order is undone, norms hold what the file stores (offset 0).
Traits come from the keys and from which tensors exist; what llama.cpp hard-codes per architecture is put back by
the architecture file. config.json is reconstructed from the traits, and the report says so.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from lconvert.archs import find
from lconvert.archs import names as arch_names
from lconvert.archs.common import Arch, plausible
from lconvert.converters import gguf_keys, gguf_latent, gguf_names, tokenizer_raise
from lconvert.converters.gguf_meta import Meta, readable, short, unused
from lconvert.errors import InputError, LconvertError, UnsupportedError
from lconvert.formats import gguf
from lconvert.formats.files import show
from lconvert.formats.gguf_blocks import SCHEMES, raised
from lconvert.ir import (
    NUMPY_DTYPE,
    Attention,
    Decoder,
    Entry,
    Layer,
    Mlp,
    Model,
    Moe,
    QTensor,
    Rope,
    Tensor,
    take_rows,
)
from lconvert.spec import check, roles

_FLOATS = ("F32", "F16", "BF16")


def _find_arch(file: gguf.GGUFFile, meta: Meta) -> Arch:
    experts = meta.number("expert_count", 0) > 0
    known = [arch for n in arch_names() if (arch := find(n)).gguf.arch]
    found = [a for a in known if a.gguf.arch == meta.arch]
    if not found:
        raise UnsupportedError(
            f"{file.path}: architecture {show(meta.arch)} is not supported; supported: "
            f"{', '.join(sorted({a.gguf.arch for a in known}))}"
        )
    sort = (experts, gguf_latent.sigmoid(meta))
    return next((a for a in found if (a.gguf.moe, a.gguf.sigmoid) == sort), found[0])


def _rope(file: gguf.GGUFFile, meta: Meta, head_dim: int, context: int) -> Rope | None:
    if meta.get("rope.freq_base") is None and meta.get("rope.dimension_count") is None:
        return None
    dim = meta.count("rope.dimension_count", head_dim)
    if dim > head_dim:
        raise meta.error("rope.dimension_count", f"at most the head's {head_dim}")
    rope = Rope(theta=meta.positive("rope.freq_base", 10000.0), dim=dim)
    kind = meta.text("rope.scaling.type")
    original = meta.count("rope.scaling.original_context_length", context)
    if "rope_freqs.weight" in file.tensors:
        return _llama3(file, rope)
    if kind == "linear":
        return replace(rope, scaling="linear", factor=meta.positive("rope.scaling.factor"))
    if kind == "yarn":
        factor = meta.positive("rope.scaling.factor")
        extra = meta.maybe("rope.scaling.attn_factor")
        own = 0.1 * math.log(factor) + 1 if factor > 1 else 1.0
        return replace(
            rope,
            scaling="yarn",
            factor=factor,
            original_context=original,
            beta_fast=meta.positive("rope.scaling.yarn_beta_fast", 32.0),
            beta_slow=meta.positive("rope.scaling.yarn_beta_slow", 1.0),
            attention_factor=None if extra is None else short(extra * own),
        )
    if kind == "longrope" or "rope_factors_long.weight" in file.tensors:
        if original < 2:
            raise meta.error("rope.scaling.original_context_length", "a length that longrope can scale")
        factors = {}
        for side in ("long", "short"):
            values = gguf_values(file, f"rope_factors_{side}.weight")
            if len(values) != dim // 2 or not (np.isfinite(values) & (values > 0)).all():
                raise InputError(
                    f"{file.path}: rope_factors_{side}.weight must hold {dim // 2} positive numbers"
                )
            factors[side] = tuple(short(v) for v in values.tolist())
        rope = replace(
            rope,
            scaling="longrope",
            original_context=original,
            factor=context / original,
            short_factors=factors["short"],
            long_factors=factors["long"],
        )
        attention = meta.positive("rope.scaling.attn_factor", 1.0)
        own = gguf_keys.longrope_attention(rope, context)
        same = math.isclose(attention, own, rel_tol=1e-6)
        return replace(rope, attention_factor=None if same else attention)
    if kind in (None, "none"):
        return rope
    raise UnsupportedError(f"{file.path}: rope scaling {show(kind)} is not supported")


def gguf_values(file: gguf.GGUFFile, name: str) -> Any:
    """A small F32 vector of the file."""
    info = file.tensors.get(name)
    if info is None or info.type != "F32":
        raise InputError(f"{file.path}: tensor {name} is missing or not F32")
    return gguf.raw(file, name).load().reshape(-1).view("<f4")


def _llama3(file: gguf.GGUFFile, rope: Rope) -> Rope:
    """Llama 3's scaling parameters from the divisors that were made from them."""
    stored = gguf_values(file, "rope_freqs.weight")
    if len(stored) != rope.dim // 2 or not (np.isfinite(stored) & (stored > 0)).all():
        raise InputError(f"{file.path}: rope_freqs.weight must hold {rope.dim // 2} positive numbers")
    factor = short(float(stored.max()))
    for original in (8192, *(1 << k for k in range(6, 18))):
        for low in (1.0, 2.0, 0.5):
            for high in (4.0, 2.0, 8.0, 16.0, 32.0):
                if high <= low:
                    continue
                tried = replace(
                    rope,
                    scaling="llama3",
                    factor=factor,
                    original_context=original,
                    low_freq_factor=low,
                    high_freq_factor=high,
                )
                made = gguf_keys.llama3_factors(tried)
                if made.shape == stored.shape and np.allclose(made, stored, rtol=3e-7, atol=0):
                    return tried
    raise UnsupportedError(f"{file.path}: rope_freqs.weight does not follow Llama 3's formula")


def _traits(file: gguf.GGUFFile, meta: Meta, arch: Arch) -> Decoder:
    t = file.tensors
    if "token_embd.weight" not in t:
        raise InputError(f"{file.path}: tensor token_embd.weight is missing")
    if len(t["token_embd.weight"].shape) != 2:
        raise InputError(
            f"{file.path}: token_embd.weight has shape {t['token_embd.weight'].shape}, not two axes"
        )
    vocab, hidden = t["token_embd.weight"].shape
    layers, context = meta.count("block_count"), meta.count("context_length")
    if layers > len(t):
        raise meta.error("block_count", f"at most the number of tensors, {len(t)}")
    heads = meta.count("attention.head_count")
    if heads > hidden:
        raise meta.error("attention.head_count", f"at most the width of the model, {hidden}")
    head_dim = meta.count("attention.key_length", hidden // heads)
    fused = arch.gguf.fused
    qkv = "attn_qkv" if "attn_qkv" in fused else "attn_q"
    norm = t.get("blk.0.attn_q_norm.weight")
    if norm and len(norm.shape) > 2:
        raise InputError(
            f"{file.path}: blk.0.attn_q_norm.weight has shape {norm.shape}, expected one or two axes"
        )
    shapes = {1: "head" if norm and norm.shape[0] == head_dim else "full", 2: "per_head"}
    attention = Attention(
        heads=heads,
        kv_heads=meta.count("attention.head_count_kv", heads),
        head_dim=head_dim,
        scale=meta.nonzero("attention.scale") or head_dim**-0.5,
        rope=_rope(file, meta, head_dim, context),
        window=None,
        softcap=meta.nonzero("attn_logit_softcapping"),
        qk_norm=shapes[len(norm.shape)] if norm else "none",  # type: ignore[arg-type]
        qkv_bias=f"blk.0.{qkv}.bias" in t,
        o_bias="blk.0.attn_output.bias" in t,
        clip_qkv=meta.nonzero("attention.clamp_kqv"),
        sinks="blk.0.attn_sinks.weight" in t,
    )
    mlp: Mlp | Moe
    if meta.number("expert_count", 0) > 0:
        size = meta.count("expert_feed_forward_length", meta.count("feed_forward_length"))
        mlp = Moe(meta.count("expert_count"), meta.count("expert_used_count"), size, "silu")
        mlp = replace(mlp, bias="blk.0.ffn_gate_inp.bias" in t)
    else:
        gated = "blk.0.ffn_gate.weight" in t or any("mlp.gate" in parts for parts in fused.values())
        up_bias = "blk.0.ffn_up.bias" in t
        mlp = Mlp("gated" if gated else "plain", "silu", meta.count("feed_forward_length"), up_bias)
    if gguf_latent.latent(meta):
        attention, mlp = gguf_latent.attention(file, meta, attention), gguf_latent.experts(file, meta, mlp)
    rms = meta.maybe("attention.layer_norm_rms_epsilon")
    positions = t.get("position_embd.weight")
    layer = Layer(attention, mlp, _block(file, meta))
    dense = _dense_layers(file, layer, layers)
    if gguf_latent.latent(meta):
        gguf_latent.leading(file, dense, layers)
    d = Decoder(
        family=arch.model_type,
        hidden=hidden,
        layers=layers,
        vocab=vocab,
        context=context,
        norm="rms" if rms is not None else "layer",
        norm_eps=rms if rms is not None else short(meta.number("attention.layer_norm_epsilon")),
        default=layer,
        overrides=dense,
        norm_bias="output_norm.bias" in t,
        tied="output.weight" not in t,
        head_bias="output.bias" in t,
        learned_positions=positions.shape[0] if positions else 0,
        embed_scale=short(meta.number("embedding_scale", 1.0)),
        residual_scale=short(meta.number("residual_scale", 1.0)),
        logit_scale=short(meta.number("logit_scale", 1.0)),
        final_softcap=meta.nonzero("final_logit_softcapping"),
    )
    has_window = meta.number("attention.sliding_window", 0) != 0
    window = meta.count("attention.sliding_window") if has_window else None
    pattern = _pattern(meta, layers)
    if window and pattern:
        local = meta.maybe("rope.freq_base_swa")
        rope = attention.rope
        inner = rope if rope is None or local is None else replace(rope, theta=local)
        sliding = replace(layer, attention=replace(attention, window=window, rope=inner))
        d = replace(d, overrides={i: sliding for i, on in enumerate(pattern) if on})
    elif window:
        d = replace(d, default=replace(layer, attention=replace(attention, window=window)))
    return arch.gguf.restore(d)


def _dense_layers(file: gguf.GGUFFile, layer: Layer, layers: int) -> dict[int, Layer]:
    """Layers with a plain MLP in a model that has experts."""
    if not isinstance(layer.mlp, Moe):
        return {}
    gates = {i: file.tensors.get(f"blk.{i}.ffn_gate.weight") for i in range(layers)}
    plain = {
        i: Mlp("gated", layer.mlp.activation, gate.shape[0]) for i, gate in gates.items() if gate is not None
    }
    return {i: replace(layer, mlp=mlp) for i, mlp in plain.items()}


def _pattern(meta: Meta, layers: int) -> list[Any] | None:
    """Which layers have the window: a list, or a period p of which the last layer has not (0: all have)."""
    key = "attention.sliding_window_pattern"
    found = meta.list_of(key, layers)
    if found is not None or meta.get(key) is None:
        return found
    p = int(meta.number(key))
    return [p == 0 or i % p < p - 1 for i in range(layers)]


def _block(file: gguf.GGUFFile, meta: Meta) -> Any:
    """The order of norms and residuals, from the norms that a layer has (spec.NORMS)."""
    t = file.tensors
    before, after = "blk.0.ffn_norm.weight" in t, "blk.0.post_ffw_norm.weight" in t
    if after:
        return "sandwich" if before else "post"
    if not before:
        return "parallel" if "blk.0.attn_norm_2.weight" in t else "parallel_shared"
    return "parallel" if meta.flag("use_parallel_residual") else "pre"


def _entry_data(file: gguf.GGUFFile, name: str, cols: int) -> Tensor | QTensor:
    """A stored tensor as rows of `cols`: floats as they are, blocks as a QTensor."""
    info = file.tensors[name]
    raw = gguf.raw(file, name)
    if info.type in SCHEMES:
        q = raised(info.type, raw)
        scale = name.removesuffix(".weight") + ".scale"
        return _with_global(q, file, scale) if info.type == "NVFP4" and scale in file.tensors else q
    if info.type not in _FLOATS:
        raise UnsupportedError(
            f"{file.path}: tensor {name} has type {info.type}, which cannot be read so far"
        )
    dtype = NUMPY_DTYPE[info.type]

    def read(start: int, stop: int) -> Any:
        return raw.read(start, stop).view(dtype).reshape(stop - start, cols)

    return Tensor((raw.shape[0], cols), info.type, read, raw.origin, raw.files)  # type: ignore[arg-type]


def _with_global(q: QTensor, file: gguf.GGUFFile, name: str) -> QTensor:
    """NVFP4 blocks with the per-tensor scale that stands beside them."""
    values = gguf_values(file, name)
    if len(values) != 1 or not isinstance(q.scale, QTensor):
        raise UnsupportedError(f"{file.path}: tensor {name} holds {len(values)} scales, expected one")
    held = values.reshape(1, 1).copy()
    outer = Tensor((1, 1), "F32", lambda a, b: held[a:b], f"{file.path}: {name}", q.files)
    return replace(q, scale=replace(q.scale, scale=outer))


def _rows_of(data: Tensor | QTensor, start: int, stop: int, head_dim: int) -> Tensor | QTensor:
    """Rows start..stop of a tensor whose blocks lie within a row, rotary order undone."""
    if isinstance(data, Tensor):
        part = take_rows(data, ((start, stop),))
        return gguf_names.interleave(part, head_dim, inverse=True) if head_dim else part

    def side(value: Tensor | QTensor | None) -> Any:
        if value is None or value.shape[0] == 1:  # a global scale belongs to every part
            return value
        return _rows_of(value, start, stop, head_dim)

    codes = side(data.codes)
    return replace(
        data,
        shape=(stop - start, *data.shape[1:]),
        codes=codes,
        scale=side(data.scale),
        zero=side(data.zero),
        offset=side(data.offset),
    )


def _upright(data: Tensor | QTensor, rows: int) -> Tensor | QTensor:
    """A stack of matrices of `rows` rows, transposed one by one: outputs are rows again."""
    if isinstance(data, Tensor):
        return gguf_names.transposed(data, rows)
    found = gguf_names.transposed_codes(data, rows)
    assert found is not None, "blocks of a file lie within its rows"
    return found


def _flat(t: Tensor) -> Tensor:
    """A (1, n) tensor as the vector it is."""
    return replace(t, shape=(t.shape[-1],), read=lambda a, b: t.read(0, 1).reshape(-1)[a:b])


def read(path: str | Path) -> Model:
    """A GGUF file (or the first of its shards) as a Model."""
    file = gguf.read(path)
    meta = Meta(file)
    arch = _find_arch(file, meta)
    routers = (t for name, t in file.tensors.items() if name.endswith(".ffn_gate_inp.weight"))
    experts = sum(t.shape[0] for t in routers)
    d = plausible(_traits(file, meta, arch), str(file.path), layers=len(file.tensors), experts=experts)
    inert = unused(meta, arch, d)
    shapes: Mapping[str, tuple[int, ...]] = roles(d)
    entries: dict[str, Entry] = {}
    left = set(file.tensors) - set(gguf_keys.rope_tensors(d))
    for stored in gguf_names.layout(arch, d):
        info = file.tensors.get(stored.name)
        if info is None:
            raise InputError(f"{file.path}: tensor {stored.name} is missing")
        if info.shape != stored.shape:
            raise InputError(
                f"{file.path}: tensor {stored.name} has shape {info.shape}, the metadata implies {stored.shape}"
            )
        left -= {stored.name}
        if info.type == "NVFP4":
            left -= {stored.name.removesuffix(".weight") + ".scale"}
        whole = _entry_data(file, stored.name, stored.cols)
        whole = _upright(whole, stored.shape[1]) if stored.turned else whole
        at = 0
        for role in stored.roles:
            n = shapes[role][0] if len(shapes[role]) > 1 or len(stored.shape) == 1 else 1
            if len(shapes[role]) == 1:
                if not isinstance(whole, Tensor):
                    raise UnsupportedError(
                        f"{file.path}: tensor {stored.name} is a vector in {info.type}, expected a float type"
                    )
                one = len(stored.shape) == 1  # else a row for each expert
                rows = take_rows(_flat(whole) if one else whole, ((at, at + n),))
                vector = rows if one else _flat(rows)
                part: Tensor | QTensor = (
                    gguf_names.interleave(vector, stored.head_dim, inverse=True)
                    if stored.head_dim
                    else vector
                )
            else:
                part = whole if stored.turned else _rows_of(whole, at, at + n, stored.head_dim)
            at += n
            entries[role] = Entry(role, part, provenance=(f"{file.path.name}:{stored.name}",))
    if left:
        raise UnsupportedError(
            f"{file.path}: unknown tensor {', '.join(show(n)[1:-1] for n in sorted(left)[:5])}; lconvert does not guess "
            "what it does"
        )
    _check_vocabulary(file, d)
    try:
        tokenizer, notes = tokenizer_raise.from_gguf(file.metadata)
    except LconvertError as e:
        raise type(e)(f"{file.path}: {e}") from None
    name = file.metadata.get("general.name")
    return check(
        Model(
            arch=d,
            config=arch.config(d) | _special_config(file),
            entries=entries,
            tokenizer=tokenizer,
            name=readable(name.data) if name is not None and isinstance(name.data, str) else file.path.stem,
            source=str(path),
            report=("config.json is reconstructed from GGUF metadata", *inert, *notes),
        )
    )


def _check_vocabulary(file: gguf.GGUFFile, d: Decoder) -> None:
    """One token, with a text of its own, for each row of the embedding: llama.cpp loads nothing else."""
    value = file.metadata.get("tokenizer.ggml.tokens")
    if value is None or value.item != "str":
        return  # none at all, or an error that tokenizer_raise names
    texts: Any = value.data
    if len(texts) != d.vocab:
        raise InputError(
            f"{file.path}: tokenizer.ggml.tokens holds {len(texts)} tokens, but the embedding has {d.vocab} rows"
        )
    seen: set[str] = set()
    for text in texts:
        if text in seen:
            raise InputError(f"{file.path}: in tokenizer.ggml.tokens two tokens have the text {show(text)}")
        seen.add(text)


def _special_config(file: gguf.GGUFFile) -> dict[str, int]:
    """BOS and EOS ids for the reconstructed config."""
    out = {}
    for side in ("bos", "eos"):
        value = file.metadata.get(f"tokenizer.ggml.{side}_token_id")
        if value is not None and isinstance(value.data, int):
            out[f"{side}_token_id"] = value.data
    return out
