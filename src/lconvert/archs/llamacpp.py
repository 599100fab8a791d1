"""What llama.cpp's graphs take for granted: a model that differs is named a loss instead of converted wrongly.

Each architecture of llama.cpp is one C++ graph (src/models/*.cpp) with an activation, an order of norms, a scale and a
set of biases fixed in code. `graph(...)` states these as data; the result compares them with a model's traits.
`restored(...)` puts them back when a GGUF is read, where the file does not say them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal

from lconvert.ir import Decoder, Layer, Moe

from .common import Loss

_MODELS = "https://github.com/ggml-org/llama.cpp/blob/master/src/models/"
#: ggml_rope_yarn_corr_dims, whatever the graph.
_YARN = "https://github.com/ggml-org/llama.cpp/blob/master/ggml/src/ggml.c"

#: required: the tensors must be there; absent: the graph has no place for them; optional: either way.
Presence = Literal["required", "absent", "optional"]

#: Bound on the mean KLD that a model with exact (erf) GELU pays in a graph that computes the tanh approximation, ggml's
#: half-precision GELU table included. Measured: 1.0e-7 on a trained GPT-2, up to 2.0e-7 on random models.
ERF_COST = 1e-6


def head_dim_scale(d: Decoder, layer: Layer) -> float:
    out: float = layer.attention.head_dim**-0.5
    return out


@dataclass(frozen=True)
class Graph:
    """One graph of llama.cpp. `file` is its source below src/models.

    window: it masks by a sliding window. partial_rope: it can turn a part of a head only. square: it assumes that all
    heads together are as wide as the model. scale: the attention scale it uses. ropes: rope scalings it applies.
    softcap: it caps attention scores. embed_scale: what it multiplies embeddings by, None where a key says it.
    normalizes: it divides the weights of the chosen experts by their sum. routed: keys say how it scores, scales and groups
    experts. head: the output matrix is the embedding, its own tensor, or either.
    """

    file: str
    activation: str = "silu"
    blocks: tuple[str, ...] = ("pre",)
    qkv_bias: Presence = "absent"
    o_bias: Presence = "absent"
    mlp_bias: Presence = "absent"
    window: bool = False
    partial_rope: bool = True
    square: bool = False
    scale: Callable[[Decoder, Layer], float] = head_dim_scale
    ropes: tuple[str, ...] = ("none", "linear", "yarn")
    softcap: bool = False
    embed_scale: Callable[[Decoder], float] | None = None
    normalizes: bool = False
    routed: bool = False
    head: Literal["tied", "own", "either"] = "either"


def graph(file: str, **fixed: Any) -> Callable[[Decoder], tuple[Loss, ...]]:
    """A `Gguf.losses` function for the graph in src/models/`file`; `fixed` are the fields of Graph."""
    g = Graph(file, **fixed)

    def losses(d: Decoder) -> tuple[Loss, ...]:
        layers = dict.fromkeys(layer for _, layer in d.each())
        found = {loss.name: loss for layer in layers for loss in _layer(g, d, layer)}
        if g.head == ("own" if d.tied else "tied"):
            reason = (
                "needs an output matrix of its own" if d.tied else "uses the embedding as the output matrix"
            )
            found["head"] = Loss("head", f"llama.cpp's graph {reason}", link=_MODELS + file)
        if g.embed_scale is not None and not math.isclose(d.embed_scale, g.embed_scale(d), rel_tol=1e-6):
            reason = f"multiplies embeddings by {g.embed_scale(d):.6g}, the model by {d.embed_scale:.6g}"
            found["embed_scale"] = Loss("embed_scale", f"llama.cpp's graph {reason}", link=_MODELS + file)
        return tuple(found.values())

    return losses


def _layer(g: Graph, d: Decoder, layer: Layer) -> Iterator[Loss]:
    a, m, link = layer.attention, layer.mlp, _MODELS + g.file

    def loss(name: str, reason: str, limit: int | None = None, cost: float | None = None) -> Loss:
        return Loss(name, f"llama.cpp's graph {reason}", limit, link, cost)

    if m.activation != g.activation:
        if {m.activation, g.activation} == {"gelu", "gelu_tanh"}:
            yield loss(
                "gelu_erf", "computes GELU by its tanh approximation; the model's is exact", cost=ERF_COST
            )
        else:
            yield loss("activation", f"uses {g.activation}; the model's activation is {m.activation}")
    if layer.block not in g.blocks:
        yield loss(
            "block", f"places norms and residuals as {' or '.join(g.blocks)}; the model's are {layer.block}"
        )
    if isinstance(m, Moe):
        if g.normalizes and not m.normalize:
            yield loss(
                "expert_weights", "divides the weights of the chosen experts by their sum; the model does not"
            )
        if (m.scoring, m.scale) != ("softmax", 1.0) and not g.routed:
            yield loss(
                "expert_scoring", f"weighs experts by a softmax; the model by {m.scoring} times {m.scale}"
            )
    mlp_bias = () if isinstance(m, Moe) else (("mlp", m.bias, g.mlp_bias),)
    for part, has, want in (("qkv", a.qkv_bias, g.qkv_bias), ("output", a.o_bias, g.o_bias), *mlp_bias):
        if has and want == "absent":
            yield loss("biases", f"has no {part} bias; the model has one")
        if not has and want == "required":
            yield loss("biases", f"needs a {part} bias; the model has none")
    if a.window is not None and a.window < d.context and not g.window:
        yield loss("sliding_window", f"has no sliding window; the model's is {a.window}", limit=a.window)
    if not math.isclose(a.scale, g.scale(d, layer), rel_tol=1e-6):
        yield loss(
            "attention_scale", f"scales attention by {g.scale(d, layer):.6g}, the model by {a.scale:.6g}"
        )
    if a.softcap is not None and not g.softcap:
        yield loss("attention_softcap", f"does not cap attention scores; the model caps them at {a.softcap}")
    if g.square and a.heads * a.head_dim != d.hidden:
        yield loss("head_dim", f"wants {a.heads} heads to fill {d.hidden}; the model's are {a.head_dim} wide")
    rope = a.rope
    if rope is None:
        return
    if rope.dim != a.head_dim and not g.partial_rope:
        yield loss(
            "partial_rope", f"turns whole heads of {a.head_dim}; the model turns {rope.dim} dimensions"
        )
    if rope.scaling not in g.ropes:
        yield loss("rope_scaling", f"does not apply {rope.scaling} rope scaling")
    elif rope.scaling == "yarn":
        if (rope.beta_fast, rope.beta_slow) != (32.0, 1.0):
            yield loss(
                "yarn_betas", f"uses 32 and 1; the model's are {rope.beta_fast:g} and {rope.beta_slow:g}"
            )
        if not rope.truncate:
            # Random models with gpt-oss' own rope pay a mean KLD of 4e-4 to 4e-2, by how often other experts are chosen.
            reason = "llama.cpp rounds the range of dimensions in which YaRN blends frequencies, the model does not"
            yield Loss("yarn_truncate", reason, link=_YARN)
    elif rope.scaling == "longrope" and rope.original_context < d.context:
        yield loss(
            "longrope_switch",
            "takes the long factors as soon as its context is larger than the original one, transformers when the "
            "text is",
            limit=rope.original_context,
        )


def map_layers(d: Decoder, change: Callable[[Layer], Layer]) -> Decoder:
    """The decoder with every kind of layer changed."""
    return replace(d, default=change(d.default), overrides={i: change(x) for i, x in d.overrides.items()})


def restored(activation: str, **fields: Any) -> Callable[[Decoder], Decoder]:
    """A `Gguf.restore` function: the graph's activation in every layer, and `fields` of the Decoder."""

    def restore(d: Decoder) -> Decoder:
        d = map_layers(d, lambda layer: replace(layer, mlp=replace(layer.mlp, activation=activation)))
        return replace(d, **fields)

    return restore
