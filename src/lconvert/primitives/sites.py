"""Where a scale per channel can move between what makes an activation and the matrices that take it, without changing the function.

    y = W (x * s)   with   x = made / s        s (channels,), none of them zero

x is made by a norm (its weight and bias are divided) or by the rows of a matrix (they and its bias are divided). It holds only where
nothing but the listed consumers reads x, and where what lies between producer and consumers lets a factor pass:

    norm                    q, k, v; gate, up (or plain up); with experts the router and every expert and shared expert too
    norm of a latent        q_b; k_b and v_b (latent attention)
    v (v_b)                 o: attention sums values, so a factor per channel passes; query heads that share a value head share it
    up                      down: of gated MLPs act(gate x) * up x, linear in up
    last norm               head, where it is a matrix of its own

SmoothQuant (arXiv 2211.10438, 4), AWQ (arXiv 2306.00978, 3.2) and folding a checkpoint's unfolded scales all take their places from
here; rotations take the places of norms.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from lconvert.ir import Attention, Decoder, Layer, Mlp, Model

if TYPE_CHECKING:
    from numpy.typing import NDArray


@dataclass(frozen=True)
class Site:
    """One activation. name: the canonical name of what makes it, `kind` says what that is.

    consumers: every matrix that reads it. channels: how many it has. Columns of a consumer are runs of `run` channels, each run
    `repeats` times in a row: the query heads of one value head; 1 elsewhere."""

    name: str
    kind: Literal["norm", "rows"]
    consumers: tuple[str, ...]
    channels: int
    repeats: int = 1
    run: int = 1

    def columns(self, factors: NDArray[Any]) -> NDArray[Any]:
        """(channels,) as the consumers' columns have them (channels * repeats,)."""
        import numpy as np

        if self.repeats == 1:
            return factors
        return np.repeat(factors.reshape(-1, 1, self.run), self.repeats, axis=1).reshape(-1)

    def seen(self, columns: NDArray[Any]) -> NDArray[Any]:
        """(channels, repeats): values of the consumers' columns, gathered by channel."""
        by_run = columns.reshape(-1, self.repeats, self.run)
        return by_run.swapaxes(1, 2).reshape(-1, self.repeats)


@dataclass(frozen=True)
class Unfoldable:
    """Matrices whose input takes no factor, and why."""

    consumers: tuple[str, ...]
    reason: str


def sites(d: Decoder) -> list[Site]:
    """Every place of a decoder, layer by layer, the last norm at the end."""
    return [p for p in _places(d) if isinstance(p, Site)]


def unfoldable(d: Decoder) -> list[tuple[tuple[str, ...], str]]:
    """Matrices without such a place before them, with the reason in words."""
    return [(p.consumers, p.reason) for p in _places(d) if isinstance(p, Unfoldable)]


def cached(model: Model, site: Site) -> bool:
    """Whether what passes through `site` is cached with a scale that was measured on it as it is."""
    return model.kv is not None and model.kv.v.scale is not None and site.name.endswith((".attn.v", ".v_b"))


def attention_inputs(a: Attention) -> tuple[str, ...]:
    """The matrices that read the input of attention."""
    if a.mla is None:
        return ("attn.q", "attn.k", "attn.v")
    return ("attn.q" if a.mla.q_rank is None else "attn.q_a", "attn.kv_a")


def mlp_inputs(layer: Layer) -> tuple[str, ...]:
    """The matrices that read the input of the MLP; of experts all, and the router."""
    m = layer.mlp
    if isinstance(m, Mlp):
        return ("mlp.gate", "mlp.up") if m.kind == "gated" else ("mlp.up",)
    shared = ("moe.shared.gate", "moe.shared.up") if m.shared else ()
    routed = (f"moe.experts.{e}.{kind}" for e in range(m.experts) for kind in ("gate", "up"))
    return ("moe.router", *shared, *routed)


def mlps(d: Decoder) -> Iterator[str]:
    """Names of MLPs, of experts each."""
    for i, layer in d.each():
        yield from _mlps(f"layers.{i}.", layer)


def adding(d: Decoder) -> Iterator[str]:
    """Matrices that add to the residual stream."""
    for i, layer in d.each():
        yield f"layers.{i}.attn.o"
        yield from (f"{part}.down" for part in _mlps(f"layers.{i}.", layer))


def _mlps(at: str, layer: Layer) -> Iterator[str]:
    m = layer.mlp
    if isinstance(m, Mlp):
        yield at + "mlp"
        return
    if m.shared:
        yield at + "moe.shared"
    yield from (f"{at}moe.experts.{e}" for e in range(m.experts))


def _places(d: Decoder) -> Iterator[Site | Unfoldable]:
    for i, layer in d.each():
        at = f"layers.{i}."
        yield from _inputs(at, layer, d.hidden)
        yield from _attention(at, layer.attention)
        yield from _mlp(at, layer)
    if d.tied:
        yield Unfoldable((), "the head is the embedding, which takes no factor of the last norm")
    else:
        yield Site("norm", "norm", ("head",), d.hidden)


def _inputs(at: str, layer: Layer, hidden: int) -> Iterator[Site | Unfoldable]:
    first = tuple(at + role for role in attention_inputs(layer.attention))
    second = tuple(at + role for role in mlp_inputs(layer))
    if layer.block in ("post", "after"):
        reason = "norms come after attention and MLP: what enters {} is the residual stream, which every layer reads"
        yield Unfoldable(first, reason.format("attention"))
        yield Unfoldable(second, reason.format("the MLP"))
    elif layer.block == "parallel_shared":
        yield Site(at + "attn_norm", "norm", first + second, hidden)
    else:
        yield Site(at + "attn_norm", "norm", first, hidden)
        yield Site(at + "mlp_norm", "norm", second, hidden)


def _attention(at: str, a: Attention) -> Iterator[Site | Unfoldable]:
    at += "attn."
    consumer = (at + "o",)
    if a.clip_qkv is not None:
        yield Unfoldable(consumer, "values are clipped before attention sums them")
    elif a.mla is None:
        group = a.heads // a.kv_heads
        yield Site(at + "v", "rows", consumer, a.kv_heads * a.head_dim, group, a.head_dim)
    else:
        if a.mla.q_rank is not None:
            yield Site(at + "q_a_norm", "norm", (at + "q_b",), a.mla.q_rank)
        yield Site(at + "kv_a_norm", "norm", (at + "k_b", at + "v_b"), a.mla.kv_rank)
        yield Site(at + "v_b", "rows", consumer, a.heads * a.mla.v_dim, 1, a.mla.v_dim)


def _mlp(at: str, layer: Layer) -> Iterator[Site | Unfoldable]:
    m = layer.mlp
    if isinstance(m, Mlp):
        if m.kind == "gated":
            yield Site(at + "mlp.up", "rows", (at + "mlp.down",), m.hidden)
        else:
            yield Unfoldable((at + "mlp.down",), f"{m.activation} comes between up and down")
        return
    parts = [f"{at}moe.experts.{e}" for e in range(m.experts)]
    if m.activation == "swiglu_oai":
        yield Unfoldable(tuple(p + ".down" for p in parts), "swiglu_oai clamps up and adds 1 to it")
        return
    if m.shared:
        yield Site(f"{at}moe.shared.up", "rows", (f"{at}moe.shared.down",), m.shared)
    for p in parts:
        yield Site(p + ".up", "rows", (p + ".down",), m.hidden)
