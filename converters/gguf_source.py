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
from lconvert.archs.common import Arch
from lconvert.converters import gguf_keys, gguf_names, tokenizer_raise
from lconvert.errors import InputError, UnsupportedError
from lconvert.formats import gguf
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


class _Meta:
    """Typed access to the "<arch>.*" keys of a file."""

    def __init__(self, file: gguf.GGUFFile) -> None:
        self.file = file
        self.arch = self._text("general.architecture")

    def _text(self, key: str) -> str:
        value = self.file.metadata.get(key)
        if value is None or not isinstance(value.data, str):
            raise InputError(f"{self.file.path}: the required key {key!r} is missing or not a string")
        return value.data

    def get(self, key: str, default: Any = None) -> Any:
        value = self.file.metadata.get(f"{self.arch}.{key}")
        return default if value is None else value.data

    def number(self, key: str, default: float | None = None) -> float:
        value = self.get(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise InputError(f"{self.file.path}: key {self.arch}.{key} is {value!r}, expected a number")
        return value

    def count(self, key: str, default: int | None = None) -> int:
        value = self.number(key, default)
        if value != int(value) or not 0 < value < 2**31:
            raise InputError(
                f"{self.file.path}: key {self.arch}.{key} is {value!r}, expected a positive integer"
            )
        return int(value)

    def list_of(self, key: str, n: int) -> list[Any] | None:
        """A per-layer array, or None where the key is absent or a single value."""
        value = self.get(key)
        if not isinstance(value, np.ndarray):
            return None
        if len(value) != n:
            raise InputError(f"{self.file.path}: key {self.arch}.{key} has {len(value)} items for {n} layers")
        return list(value.tolist())


def _find_arch(file: gguf.GGUFFile, meta: _Meta) -> Arch:
    experts = meta.get("expert_count", 0) > 0
    known = [find(n) for n in arch_names()]
    found = [a for a in known if a.gguf.arch == meta.arch]
    if not found:
        raise UnsupportedError(
            f"{file.path}: architecture {meta.arch!r} is not supported; supported: "
            f"{', '.join(sorted({a.gguf.arch for a in known}))}"
        )
    return next((a for a in found if a.gguf.moe == experts), found[0])


def _rope(file: gguf.GGUFFile, meta: _Meta, head_dim: int, context: int) -> Rope | None:
    if meta.get("rope.freq_base") is None and meta.get("rope.dimension_count") is None:
        return None
    dim = meta.count("rope.dimension_count", head_dim)
    rope = Rope(theta=short(meta.number("rope.freq_base", 10000.0)), dim=dim)
    kind = meta.get("rope.scaling.type")
    original = meta.count("rope.scaling.original_context_length", context)
    if "rope_freqs.weight" in file.tensors:
        return _llama3(file, rope)
    if kind == "linear":
        return replace(rope, scaling="linear", factor=short(meta.number("rope.scaling.factor")))
    if kind == "yarn":
        factor = short(meta.number("rope.scaling.factor"))
        extra = meta.get("rope.scaling.attn_factor")
        own = 0.1 * math.log(factor) + 1 if factor > 1 else 1.0
        return replace(
            rope,
            scaling="yarn",
            factor=factor,
            original_context=original,
            beta_fast=short(meta.number("rope.scaling.yarn_beta_fast", 32.0)),
            beta_slow=short(meta.number("rope.scaling.yarn_beta_slow", 1.0)),
            attention_factor=None if extra is None else short(extra * own),
        )
    if kind == "longrope" or "rope_factors_long.weight" in file.tensors:
        factors = {}
        for side in ("long", "short"):
            values = gguf_values(file, f"rope_factors_{side}.weight")
            factors[side] = tuple(short(v) for v in values.tolist())
        rope = replace(
            rope,
            scaling="longrope",
            original_context=original,
            factor=context / original,
            short_factors=factors["short"],
            long_factors=factors["long"],
        )
        attention = meta.number("rope.scaling.attn_factor", 1.0)
        own = gguf_keys.longrope_attention(rope, context)
        same = math.isclose(attention, own, rel_tol=1e-6)
        return replace(rope, attention_factor=None if same else short(attention))
    if kind in (None, "none"):
        return rope
    raise UnsupportedError(f"{file.path}: rope scaling {kind!r} is not supported")


def short(x: float) -> float:
    """The shortest decimal that is this fp32 number: 1e-5 was written, 9.99999974e-06 came back."""
    return float(str(np.float32(x)))


def gguf_values(file: gguf.GGUFFile, name: str) -> Any:
    """A small F32 vector of the file."""
    info = file.tensors.get(name)
    if info is None or info.type != "F32":
        raise InputError(f"{file.path}: tensor {name} is missing or not F32")
    return gguf.raw(file, name).load().reshape(-1).view("<f4")


def _llama3(file: gguf.GGUFFile, rope: Rope) -> Rope:
    """Llama 3's scaling parameters from the divisors that were made from them."""
    stored = gguf_values(file, "rope_freqs.weight")
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


def _traits(file: gguf.GGUFFile, meta: _Meta, arch: Arch) -> Decoder:
    t = file.tensors
    if "token_embd.weight" not in t:
        raise InputError(f"{file.path}: tensor token_embd.weight is missing")
    vocab, hidden = t["token_embd.weight"].shape
    layers, context = meta.count("block_count"), meta.count("context_length")
    heads = meta.count("attention.head_count")
    head_dim = meta.count("attention.key_length", hidden // heads)
    fused = arch.gguf.fused
    qkv = "attn_qkv" if "attn_qkv" in fused else "attn_q"
    norm = t.get("blk.0.attn_q_norm.weight")
    shapes = {1: "head" if norm and norm.shape[0] == head_dim else "full", 2: "per_head"}
    attention = Attention(
        heads=heads,
        kv_heads=meta.count("attention.head_count_kv", heads),
        head_dim=head_dim,
        scale=short(meta.number("attention.scale")) if meta.get("attention.scale") else head_dim**-0.5,
        rope=_rope(file, meta, head_dim, context),
        window=None,
        softcap=_optional(meta, "attn_logit_softcapping"),
        qk_norm=shapes[len(norm.shape)] if norm else "none",  # type: ignore[arg-type]
        qkv_bias=f"blk.0.{qkv}.bias" in t,
        o_bias="blk.0.attn_output.bias" in t,
        clip_qkv=_optional(meta, "attention.clamp_kqv"),
    )
    mlp: Mlp | Moe
    if meta.get("expert_count", 0) > 0:
        size = meta.count("expert_feed_forward_length", meta.count("feed_forward_length"))
        mlp = Moe(meta.count("expert_count"), meta.count("expert_used_count"), size, "silu")
    else:
        gated = "blk.0.ffn_gate.weight" in t or any("mlp.gate" in parts for parts in fused.values())
        up_bias = "blk.0.ffn_up.bias" in t
        mlp = Mlp("gated" if gated else "plain", "silu", meta.count("feed_forward_length"), up_bias)
    rms = meta.get("attention.layer_norm_rms_epsilon")
    positions = t.get("position_embd.weight")
    layer = Layer(attention, mlp, _block(file, meta))
    d = Decoder(
        family=arch.model_type,
        hidden=hidden,
        layers=layers,
        vocab=vocab,
        context=context,
        norm="rms" if rms is not None else "layer",
        norm_eps=short(rms if rms is not None else meta.number("attention.layer_norm_epsilon")),
        default=layer,
        overrides=_dense_layers(file, layer, layers),
        norm_bias="output_norm.bias" in t,
        tied="output.weight" not in t,
        head_bias="output.bias" in t,
        learned_positions=positions.shape[0] if positions else 0,
        embed_scale=short(meta.number("embedding_scale", 1.0)),
        residual_scale=short(meta.number("residual_scale", 1.0)),
        logit_scale=short(meta.number("logit_scale", 1.0)),
        final_softcap=_optional(meta, "final_logit_softcapping"),
    )
    window, pattern = (
        meta.get("attention.sliding_window"),
        meta.list_of("attention.sliding_window_pattern", layers),
    )
    if window and pattern:
        local = meta.get("rope.freq_base_swa")
        rope = attention.rope
        inner = rope if rope is None or local is None else replace(rope, theta=short(local))
        sliding = replace(layer, attention=replace(attention, window=int(window), rope=inner))
        d = replace(d, overrides={i: sliding for i, on in enumerate(pattern) if on})
    elif window:
        d = replace(d, default=replace(layer, attention=replace(attention, window=int(window))))
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


def _block(file: gguf.GGUFFile, meta: _Meta) -> Any:
    """The order of norms and residuals, from the norms that a layer has (spec.NORMS)."""
    t = file.tensors
    before, after = "blk.0.ffn_norm.weight" in t, "blk.0.post_ffw_norm.weight" in t
    if after:
        return "sandwich" if before else "post"
    if not before:
        return "parallel" if "blk.0.attn_norm_2.weight" in t else "parallel_shared"
    return "parallel" if meta.get("use_parallel_residual") else "pre"


def _optional(meta: _Meta, key: str) -> float | None:
    value = meta.get(key)
    return None if not value else short(meta.number(key))


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


def _flat(t: Tensor) -> Tensor:
    """A (1, n) tensor as the vector it is."""
    return replace(t, shape=(t.shape[-1],), read=lambda a, b: t.read(0, 1).reshape(-1)[a:b])


def read(path: str | Path) -> Model:
    """A GGUF file (or the first of its shards) as a Model."""
    file = gguf.read(path)
    meta = _Meta(file)
    arch = _find_arch(file, meta)
    d = _traits(file, meta, arch)
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
        left -= {stored.name, stored.name.removesuffix(".weight") + ".scale"}
        whole = _entry_data(file, stored.name, stored.cols)
        at = 0
        for role in stored.roles:
            n = shapes[role][0] if len(shapes[role]) > 1 or len(stored.shape) == 1 else 1
            if len(stored.shape) == 1:
                assert isinstance(whole, Tensor)
                vector = take_rows(_flat(whole), ((at, at + n),))
                part: Tensor | QTensor = (
                    gguf_names.interleave(vector, stored.head_dim, inverse=True)
                    if stored.head_dim
                    else vector
                )
            else:
                part = _rows_of(whole, at, at + n, stored.head_dim)
            at += n
            entries[role] = Entry(role, part, provenance=(f"{file.path.name}:{stored.name}",))
    if left:
        raise UnsupportedError(
            f"{file.path}: unknown tensor {', '.join(sorted(left)[:5])}; lconvert does not guess"
        )
    tokenizer, notes = tokenizer_raise.from_gguf(file.metadata)
    name = file.metadata.get("general.name")
    return check(
        Model(
            arch=d,
            config=arch.config(d) | _special_config(file),
            entries=entries,
            tokenizer=tokenizer,
            name=name.data if name is not None and isinstance(name.data, str) else file.path.stem,
            source=str(path),
            report=("config.json is reconstructed from GGUF metadata", *notes),
        )
    )


def _special_config(file: gguf.GGUFFile) -> dict[str, int]:
    """BOS and EOS ids for the reconstructed config."""
    out = {}
    for side in ("bos", "eos"):
        value = file.metadata.get(f"tokenizer.ggml.{side}_token_id")
        if value is not None and isinstance(value.data, int):
            out[f"{side}_token_id"] = value.data
    return out
