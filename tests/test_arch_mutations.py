"""The gate notices: every trait and every kind of tensor of an architecture is spoiled in turn.

A mutation changes the Model that is lowered, never the reference. It is noticed if converting refuses it, if
llama.cpp refuses the file, or if the KLD against transformers is ten times the gate. What no gate can notice, because
the function does not depend on it, is in UNNOTICED with the reason; the test asserts that this list is exact.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import lconvert
from lconvert.archs import find
from lconvert.archs.llamacpp import map_layers
from lconvert.converters import gguf_names
from lconvert.errors import LconvertError
from lconvert.ir import Attention, Decoder, Entry, Layer, Model, Moe, Rope, Tensor, as_f32, dense
from lconvert.spec import roles
from tests import arch_cases
from tests.arch_cases import Case

for package in ("llama_cpp", "torch", "transformers"):
    pytest.importorskip(package, reason=f"{package} is not installed")
from tests.built_models import Built, kld

#: (case, mutation) -> why llama.cpp computes the same.
UNNOTICED: Mapping[tuple[str, str], str] = {
    (
        "gpt2-tied",
        "without attn.k.bias",
    ): "adds the same to all scores of a query, which a softmax does not see",
    ("phi3-long", "rope.short_factors"): "used only by contexts up to the original one",
    ("phi3-short", "rope.long_factors"): "used only by contexts beyond the original one",
}

TOKENS = 120
_SCALINGS = {
    "llama-linear", "llama-llama3", "llama-yarn", "phi3-long", "phi3-short", "gemma3_text-linear", "deepseek_v2-yarn",
}  # fmt: skip


def _cases() -> list[Case]:
    """The first case of each architecture, and those with a rope scaling of their own."""
    out: dict[str, Case] = {}
    for case in arch_cases.load():
        out.setdefault(case.model_type, replace(case, tokens=TOKENS))
        if case.name in _SCALINGS:
            out[case.name] = replace(case, tokens=TOKENS)
    return list(out.values())


Mutant = tuple[str, Model]


# --- traits ----------------------------------------------------------------------------------------------

DECODER: Mapping[str, Callable[[Decoder], Any]] = {
    "norm_eps": lambda d: d.norm_eps * 10,
    "norm_offset": lambda d: 0.0,
    "embed_scale": lambda d: 1.0,
    "residual_scale": lambda d: 1.0,
    "logit_scale": lambda d: 1.0,
    "final_softcap": lambda d: None,
}
ATTENTION: Mapping[str, Callable[[Attention], Any]] = {
    "scale": lambda a: a.scale * 1.1,
    "window": lambda a: None if a.window is None else a.window - 1,
    "softcap": lambda a: None,
    "clip_qkv": lambda a: None,
}
ROPE: Mapping[str, Callable[[Rope], Any]] = {
    "theta": lambda r: r.theta * 1.5,
    "dim": lambda r: r.dim // 2,
    "scaling": lambda r: "none",
    "factor": lambda r: r.factor * 1.5,
    "original_context": lambda r: r.original_context * 2,
    "low_freq_factor": lambda r: r.low_freq_factor * 1.5,
    "high_freq_factor": lambda r: r.high_freq_factor * 1.5,
    "beta_fast": lambda r: r.beta_fast / 2,
    "beta_slow": lambda r: r.beta_slow * 2,
    "attention_factor": lambda r: 0.9,
    "truncate": lambda r: not r.truncate,
    "short_factors": lambda r: r.short_factors[::-1],
    "long_factors": lambda r: r.long_factors[::-1],
}
_USED = {
    "none": {"theta", "dim"},
    "linear": {"theta", "dim", "scaling", "factor"},
    "llama3": {"theta", "scaling", "factor", "original_context", "low_freq_factor", "high_freq_factor"},
    "yarn": {
        "theta",
        "scaling",
        "factor",
        "original_context",
        "beta_fast",
        "beta_slow",
        "attention_factor",
        "truncate",
    },
    "longrope": {"theta", "scaling", "short_factors", "long_factors", "attention_factor", "original_context"},
}
MOE: Mapping[str, Callable[[Moe], Any]] = {
    "top_k": lambda m: m.top_k - 1,
    "normalize": lambda m: not m.normalize,
    "scale": lambda m: m.scale * 1.1,
    "scoring": lambda m: "softmax" if m.scoring == "sigmoid" else "sigmoid",
    "top_groups": lambda m: m.groups if m.top_k > m.experts // m.groups else max(1, m.top_groups - 1),
    "group_score": lambda m: "top2" if m.groups == 1 else "max",
    "limit": lambda m: m.limit and m.limit / 2,
}


def _changed(table: Mapping[str, Callable[[Any], Any]], x: Any) -> Iterator[tuple[str, Any]]:
    for field, value in table.items():
        new = value(x)
        if new != getattr(x, field):
            yield field, replace(x, **{field: new})


def _attentions(d: Decoder) -> Iterator[tuple[str, Decoder]]:
    a = d.default.attention
    fields = {
        f for layer in (d.default, *d.overrides.values()) for f, _ in _changed(ATTENTION, layer.attention)
    }
    for field in sorted(fields):

        def spoil(layer: Layer, field: str = field) -> Layer:
            found = dict(_changed(ATTENTION, layer.attention))
            return replace(layer, attention=found.get(field, layer.attention))

        yield field, map_layers(d, spoil)
    if a.rope is not None:
        for field, rope in _changed(ROPE, a.rope):
            if field in _USED[a.rope.scaling]:
                old = a.rope

                def turn(layer: Layer, old: Rope = old, rope: Rope = rope) -> Layer:
                    own = layer.attention
                    return replace(layer, attention=replace(own, rope=rope)) if own.rope == old else layer

                yield f"rope.{field}", map_layers(d, turn)


def _latent_eps(layer: Layer) -> Layer:
    a = layer.attention
    assert a.mla is not None
    return replace(layer, attention=replace(a, mla=replace(a.mla, norm_eps=1e-3)))


def _traits(d: Decoder) -> Iterator[tuple[str, Decoder]]:
    """Every trait with a value that another model could have, and that this one does not."""
    yield from _changed(DECODER, d)
    yield from _attentions(d)
    if isinstance(d.default.mlp, Moe):
        for field, moe in _changed(MOE, d.default.mlp):

            def route(layer: Layer, moe: Moe = moe) -> Layer:
                return replace(layer, mlp=moe) if isinstance(layer.mlp, Moe) else layer

            yield f"moe.{field}", map_layers(d, route)
    if d.default.attention.mla is not None:
        yield "latent norm_eps", map_layers(d, _latent_eps)
    other = "silu" if d.default.mlp.activation != "silu" else "relu"
    yield "activation", map_layers(d, lambda x: replace(x, mlp=replace(x.mlp, activation=other)))
    if d.default.block in ("pre", "parallel"):
        block = "pre" if d.default.block == "parallel" else "parallel"
        yield "block", map_layers(d, lambda layer: replace(layer, block=block))
    if d.overrides:
        full, local = d.default, next(iter(d.overrides.values()))
        moved = {(i + 1) % d.layers: layer for i, layer in d.overrides.items()}
        yield "which layers differ", replace(d, overrides=moved)
        if full.attention.rope != local.attention.rope:
            rope = full.attention.rope
            same = replace(local, attention=replace(local.attention, rope=rope))
            yield "local rope", replace(d, overrides=dict.fromkeys(d.overrides, same))
        if local.attention.window is None:
            return
        wide = replace(local, attention=replace(local.attention, window=d.context))
        yield "no window", replace(d, overrides=dict.fromkeys(d.overrides, wide))


# --- tensors ---------------------------------------------------------------------------------------------


def _values(entry: Entry) -> np.ndarray:
    assert isinstance(entry.data, Tensor)
    return as_f32(entry.data.load(), entry.data.dtype)


def _with(model: Model, new: Mapping[str, np.ndarray]) -> Model:
    return model.with_entries(
        {k: replace(model.entries[k], data=dense(v.astype(np.float32))) for k, v in new.items()}
    )


def _kinds(d: Decoder) -> dict[str, list[str]]:
    """Kind of tensor -> its entries in the last layer (or outside of all layers)."""
    out: dict[str, list[str]] = {}
    for role in roles(d):
        parts = role.split(".")
        if parts[0] == "layers":
            if int(parts[1]) == d.layers - 1:
                kind = ".".join(p for p in parts[2:] if not p.isdigit())
                out.setdefault(kind, []).append(role)
        else:
            out[role] = [role]
    return out


def _removed(model: Model) -> Iterator[Mutant]:
    """Each kind of tensor gone: biases and matrices zero, norms one, embeddings shifted by a row."""
    d = model.arch
    for kind, names in _kinds(d).items():
        new = {}
        for name in names:
            x = _values(model.entries[name])
            if kind in ("embed", "pos_embed", "head"):
                new[name] = np.roll(x, 1, axis=0)
            elif "norm" in kind and not kind.endswith(".bias"):
                new[name] = np.ones_like(x) - np.float32(d.norm_offset)
            else:
                new[name] = np.zeros_like(x)
        yield f"without {kind}", _with(model, new)


def _swapped(model: Model) -> Iterator[Mutant]:
    """Two tensors of one shape in each other's place, in every layer."""
    d, have = model.arch, set(_kinds(model.arch))
    pairs = [("attn.q", "attn.k"), ("attn.k", "attn.v"), ("mlp.gate", "mlp.up"), ("attn_norm", "mlp_norm")]
    pairs += [
        ("attn_norm", "attn_post_norm"),
        ("attn_post_norm", "mlp_post_norm"),
        ("attn.q_norm", "attn.k_norm"),
    ]
    pairs += [("moe.experts.gate", "moe.experts.up"), ("moe.shared.gate", "moe.shared.up")]
    for left, right in pairs:
        new = {}
        for name in roles(d) if {left, right} <= have else ():
            for one, two in ((left, right), (right, left)):
                if name.startswith("layers.") and _kind(name) == one:
                    new[name] = _values(model.entries[_partner(name, one, two)])
        if new and all(roles(d)[k] == v.shape for k, v in new.items()):
            yield f"{left} for {right}", _with(model, new)
    if d.tied is False and "head" in have:
        yield "embed for head", _with(model, {"head": _values(model.entries["embed"])})
    experts = {n: n.replace(".0.gate", ".1.gate") for n in roles(d) if ".experts.0.gate" in n}
    if experts:
        both = experts | {b: a for a, b in experts.items()}
        yield "order of experts", _with(model, {a: _values(model.entries[b]) for a, b in both.items()})


def _kind(name: str) -> str:
    return ".".join(p for p in name.split(".")[2:] if not p.isdigit())


def _partner(name: str, one: str, two: str) -> str:
    return (
        name.removesuffix(one.rsplit(".", 1)[-1]) + two.rsplit(".", 1)[-1]
        if "." in one
        else name.replace(one, two)
    )


def _reordered(model: Model) -> Iterator[Mutant]:
    """Rows of queries and keys in the other rotary order, and heads shifted by one."""
    d = model.arch
    a = d.default.attention
    ends = ("attn.q", "attn.k", "attn.q.bias", "attn.k.bias", "attn.q_b")
    sides = [n for n in roles(d) if n.endswith(ends)]
    if a.rope is not None:
        turned = {
            n: gguf_names.interleave(dense(_values(model.entries[n])), a.head_dim).load() for n in sides
        }
        yield "rotary order", _with(model, turned)
    if a.kv_heads > 1:
        heads = [n for n in sides if "attn.q" in n]
        rolled = {n: np.roll(_values(model.entries[n]), a.head_dim, axis=0) for n in heads}
        yield "order of heads", _with(model, rolled)


def mutants(model: Model) -> Iterator[Mutant]:
    for name, d in _traits(model.arch):
        if roles(d) == roles(model.arch):
            yield name, replace(model, arch=d)
    yield from _removed(model)
    yield from _swapped(model)
    yield from _reordered(model)


# --- the test --------------------------------------------------------------------------------------------


def effect(case: Case, b: Built, mutant: Model, path: Path) -> float:
    """Mean KLD of the mutant in llama.cpp against the true model in transformers; infinite where it is refused."""
    true = {loss.name for loss in b.losses}
    losses = find(case.model_type).gguf.losses(mutant.arch)
    if any(loss.name not in true and loss.cost is None for loss in losses):
        return np.inf
    try:
        lconvert.convert(mutant, path, ftype="F32", allow_loss=case.losses, force=True)
        got = b.in_llama_cpp(case, path)
    except LconvertError:
        return np.inf
    return float(np.nan_to_num(kld(b.reference, got)[: case.exact].mean(), nan=np.inf))


@pytest.mark.parametrize("case", _cases(), ids=lambda c: c.name)
def test_mutations(case: Case, tmp_path: Path) -> None:
    b = Built(case, tmp_path)
    model = _with(b.model, {n: _values(e) for n, e in b.model.entries.items()})
    assert effect(case, b, model, tmp_path / "true.gguf") <= case.floor
    found = {name: effect(case, b, m, tmp_path / "mutant.gguf") for name, m in mutants(model)}
    unnoticed = {(case.name, name) for name, kl in found.items() if kl < 10 * case.floor}
    known = {key for key in UNNOTICED if key[0] == case.name}
    shown = ", ".join(f"{name} {kl:.1e}" for name, kl in found.items() if kl < 1000 * case.floor)
    assert unnoticed == known, shown
    assert all(found[name] <= case.floor for _, name in known), "known to have no effect at all"
