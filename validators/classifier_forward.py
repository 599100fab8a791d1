"""What an encoder or a convolutional network computes, in NumPy, by the traits alone: the reference that graphs of them are held to.

Nothing here comes out of the graph's builder, of torch or of transformers, so that a mistake in one of them is one that this does not
share. Inputs may be rounded as entries say (`rounded`), where a graph rounds them: in front of a product, and for convolutions
in front of the pooling before it, which acts on codes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lconvert.errors import UnsupportedError
from lconvert.ir import Conv, Convnet, Encoder, Linear, Model, Pool, QTensor
from lconvert.kernels.qtensor import effective
from lconvert.passes.histograms import watched
from lconvert.validators.rounded_forward import powers_of
from lconvert.validators.rounded_forward import rounded as as_codes

Array = NDArray[np.float32]
#: What sees the input of each product before it is rounded: (role, values).
Seen = Callable[[str, Array], None]

_ERF_STEPS, _ERF_END = 4096, 6  # per unit; erf(6) is 1 in double precision


@cache
def _erf_table() -> NDArray[np.float64]:
    return np.array([math.erf(i / _ERF_STEPS) for i in range(_ERF_END * _ERF_STEPS + 2)])


def erf(x: NDArray[Any]) -> NDArray[np.float64]:
    """By linear interpolation in a table, within 8e-9, an eighth of fp32's last place at 1."""
    at, table = np.minimum(np.abs(x, dtype=np.float64), _ERF_END) * _ERF_STEPS, _erf_table()
    i = at.astype(np.int32)
    low = table[i]
    return np.asarray(np.copysign(low + (table[i + 1] - low) * (at - i), x), np.float64)


def _gelu_tanh(x: Array) -> Array:
    inner = math.sqrt(2 / math.pi) * (x + np.float32(0.044715) * x**3)
    return np.asarray(np.float32(0.5) * x * (1 + np.tanh(inner)), np.float32)


ACTIVATIONS: Mapping[str, Callable[[Array], Array]] = {
    "relu": lambda x: np.maximum(x, np.float32(0)),
    "relu2": lambda x: np.square(np.maximum(x, np.float32(0))),
    "tanh": lambda x: np.tanh(x),
    "silu": lambda x: (x / (1 + np.exp(-x.astype(np.float64)))).astype(np.float32),
    "gelu": lambda x: (x * 0.5 * (1 + erf(x / math.sqrt(2)))).astype(np.float32),
    "gelu_tanh": _gelu_tanh,
}


class Network:
    """A model with its weights in fp32. rounded: inputs are, where entries say so. seen: what looks at them before that."""

    def __init__(self, model: Model, *, rounded: bool = False, seen: Seen | None = None) -> None:
        self._model, self._rounded, self._seen = model, rounded, seen
        self._weights: dict[str, Array] = {}

    def logits(self, feed: Mapping[str, Any]) -> Array:
        """(batch, labels) for arrays by the names of the model's inputs."""
        arch = self._model.arch
        if isinstance(arch, Encoder):
            return self._encoder(arch, feed)
        if isinstance(arch, Convnet):
            return self._convnet(arch, np.asarray(feed["images"], np.float32))
        raise UnsupportedError(
            f"{self._model.source}: {arch.family} is a decoder, which gives logits of tokens"
        )

    def _w(self, role: str) -> Array:
        if role not in self._weights:
            self._weights[role] = effective(self._model.entries[role])
        return self._weights[role]

    def _entering(self, role: str, x: Array) -> Array:
        """The input of a product as its entry wants it."""
        entry = self._model.entries[role]
        a = entry.activation
        if a is None or not isinstance(entry.data, QTensor):
            return x
        if self._seen is not None:
            self._seen(role, x)
        return np.asarray(as_codes(x, a, powers_of(entry)), np.float32) if self._rounded else x

    def _linear(self, role: str, x: Array) -> Array:
        y = self._entering(role, x) @ self._w(role).T
        return y + self._w(role + ".bias") if role + ".bias" in self._model.entries else y

    # --- encoders ------------------------------------------------------------------------------------------

    def _norm(self, e: Encoder, role: str, x: Array) -> Array:
        wide = x.astype(np.float64)
        middle = wide - wide.mean(-1, keepdims=True)
        scaled = middle / np.sqrt(np.square(middle).mean(-1, keepdims=True) + e.norm_eps)
        return np.asarray(scaled * self._w(role) + self._w(role + ".bias"), np.float32)

    def _encoder(self, e: Encoder, feed: Mapping[str, Any]) -> Array:
        ids = np.asarray(feed["input_ids"])
        real = np.asarray(feed.get("attention_mask", np.ones_like(ids)), bool)
        x = self._w("embed")[ids] + self._w("pos_embed")[: ids.shape[1]]
        if e.token_types:
            x = x + self._w("type_embed")[np.asarray(feed.get("token_type_ids", np.zeros_like(ids)))]
        x = self._norm(e, "embed_norm", x)
        for i, layer in e.each():
            at, act = f"layers.{i}.", ACTIVATIONS[layer.mlp.activation]
            a = layer.attention
            q, k, v = (
                self._linear(f"{at}attn.{s}", x)
                .reshape(*ids.shape, a.heads, a.head_dim)
                .transpose(0, 2, 1, 3)
                for s in "qkv"
            )
            out = self._linear(f"{at}attn.o", _attend(q, k, v, real, a.scale).reshape(x.shape))
            x = self._norm(e, f"{at}attn_post_norm", x + out)
            out = self._linear(f"{at}mlp.down", act(self._linear(f"{at}mlp.up", x)))
            x = self._norm(e, f"{at}mlp_post_norm", x + out)
        return self._linear("head", ACTIVATIONS[e.pooler](self._linear("pooler", x[:, 0])))

    # --- convolutional networks ----------------------------------------------------------------------------

    def _convnet(self, c: Convnet, x: Array) -> Array:
        coded = {k: f"steps.{i}" for i, _ in c.weighted() for k in range(watched(c, i), i + 1)}
        for i, step in enumerate(c.steps):
            if i in coded and not isinstance(step, Linear):  # _linear does it itself
                x = self._entering(coded[i], x)
            match step:
                case Conv():
                    x = _convolved(x, self._w(f"steps.{i}"), step)
                    if step.bias:
                        x = x + self._w(f"steps.{i}.bias")[:, None, None]
                case Linear():
                    x = self._linear(f"steps.{i}", x)
                case Pool():
                    x = _pooled(x, step)
                case _:
                    x = x.reshape(len(x), -1) if step.kind == "flatten" else ACTIVATIONS[step.kind](x)
        return x


def _attend(q: Array, k: Array, v: Array, real: NDArray[np.bool_], scale: float) -> Array:
    """(batch, tokens, heads, width): every token looks at all that are no padding."""
    scores = (q @ k.swapaxes(-1, -2)) * np.float32(scale)
    scores = np.where(real[:, None, None, :], scores, np.float32(-np.inf))
    scores = np.exp(scores - scores.max(-1, keepdims=True))
    out: Array = ((scores / scores.sum(-1, keepdims=True)) @ v).transpose(0, 2, 1, 3)
    return out


def _convolved(x: Array, w: Array, step: Conv) -> Array:
    p, s = step.padding, step.stride
    wide = np.pad(x, ((0, 0), (0, 0), (p, p), (p, p)))
    windows = np.lib.stride_tricks.sliding_window_view(wide, step.kernel, axis=(2, 3))[:, :, ::s, ::s]
    return np.tensordot(windows, w, ((1, 4, 5), (1, 2, 3))).transpose(0, 3, 1, 2)


def _pooled(x: Array, step: Pool) -> Array:
    n, rows, columns = step.size, x.shape[2] // step.size, x.shape[3] // step.size
    cells = x[:, :, : rows * n, : columns * n].reshape(*x.shape[:2], rows, n, columns, n)
    return np.asarray(cells.max((3, 5)) if step.kind == "max" else cells.mean((3, 5), dtype=np.float32))
