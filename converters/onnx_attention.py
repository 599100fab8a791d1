"""Attention in an ONNX graph: positions, masks, the cache, and every kind of attention of a decoder.

Keys and values are concatenated outside of the operator Attention, which then has one output: TensorRT's parser takes no other
(NVIDIA/TensorRT issue 4738), and ONNX Runtime runs it as fast. What the operator cannot say is written out: soft caps before the
mask, sinks.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from lconvert.converters import onnx_activations as activations
from lconvert.converters import onnx_static, onnx_trt, regrid, rotary
from lconvert.converters.onnx_builder import Builder
from lconvert.ir import ActSpec, Attention, Mla, Rope, dense

# --- positions and masks -----------------------------------------------------------------------------------


def lengths(b: Builder) -> tuple[str, str]:
    """Scalars: positions before these tokens, and all of them."""
    g = b.graph

    def past() -> str:
        total = g.op("Squeeze", g.op("Shape", "attention_mask", start=1, end=2))
        now = g.op("Squeeze", g.op("Shape", "input_ids", start=1, end=2))
        return str(g.op("Sub", total, now, name="past"))

    def total() -> str:
        return str(g.op("Squeeze", g.op("Shape", "attention_mask", start=1, end=2), name="total"))

    return g.once("past", past), g.once("total", total)


def mask(b: Builder, window: int | None) -> str:
    """What each token sees, as booleans (batch, 1, sequence, total): what came before, in the window, and is no padding.

    A token always sees itself: rows of padding stay finite.
    """
    g = b.graph

    def places() -> tuple[str, str]:
        past, total = lengths(b)
        one = g.constant(1)
        columns = g.op("Unsqueeze", g.op("Range", g.constant(0), total, one), g.constant([0]))
        return g.op("Unsqueeze", g.op("Range", past, total, one), g.constant([1])), columns

    def made() -> str:
        rows, columns = onnx_static.rows_and_columns(b) if b.shape.static else places()
        seen = g.op("LessOrEqual", columns, rows)
        if window is not None:
            near = g.op("Less", g.op("Sub", rows, columns), g.constant(window))
            seen = g.op("And", seen, near)
        real = g.op("Unsqueeze", g.op("Cast", "attention_mask", to=9), g.constant([1, 2]))
        itself = g.op("Equal", columns, rows)
        return str(
            g.op("Or", g.op("And", seen, real), itself, name="mask" if window is None else f"mask.{window}")
        )

    return g.once(("mask", window), made)


def angles(b: Builder, rope: Rope) -> tuple[str, str]:
    """cos and sin of the tokens' positions, (batch, sequence, dim / 2)."""
    g = b.graph
    positions = b.shape.positions or b.model.decoder.context

    def of(which: int, long: bool) -> str:
        name = f"rotary.{('cos', 'sin')[which]}{'.long' if long else ''}"
        return str(
            g.op(
                "Gather",
                b.table(name + suffix(b, rope), tables(rope, positions, long)[which]),
                "position_ids",
            )
        )

    def made(which: int) -> str:
        if rope.scaling != "longrope":
            return of(which, False)

        def longer() -> str:
            last = g.op("ReduceMax", "position_ids", keepdims=0)
            return str(g.op("GreaterOrEqual", last, g.constant(rope.original_context), name="long"))

        return str(
            g.op(
                "Where",
                g.once(("long", rope.original_context), longer),
                of(which, True),
                of(which, False),
            )
        )

    return g.once(("cos", rope), lambda: made(0)), g.once(("sin", rope), lambda: made(1))


def turned(b: Builder, x: str, rope: Rope | None, width: int) -> str:
    """x (batch, heads, sequence, width) with its first rope.dim dimensions turned."""
    if rope is None:
        return x
    if b.dialect.tensorrt and rope.layout == "interleaved":
        x, turning = onnx_trt.halves(b, x, rope, width)
    else:
        turning = rope
    cos, sin = angles(b, rope)
    return str(
        b.graph.op(
            "RotaryEmbedding",
            x,
            cos,
            sin,
            interleaved=int(turning.layout == "interleaved"),
            rotary_embedding_dim=rope.dim if rope.dim != width else None,
        )
    )


def suffix(b: Builder, rope: Rope) -> str:
    """Tables of a second rope get a number."""
    ropes = list(
        dict.fromkeys(layer.attention.rope for _, layer in b.model.decoder.each() if layer.attention.rope)
    )
    return f".{ropes.index(rope)}" if len(ropes) > 1 else ""


def tables(rope: Rope, positions: int, long: bool) -> Any:
    return rotary.tables(rope, positions, long=long)


# --- attention ---------------------------------------------------------------------------------------------


def attention(b: Builder, x: str, i: int, a: Attention) -> str:
    """Attention of one layer; x is (batch, sequence, hidden)."""
    g, prefix = b.graph, f"layers.{i}.attn."
    if a.mla is not None:
        q, k, v = latent(b, x, prefix, a, a.mla)
    else:
        q, k, v = heads(b, x, prefix, a)
    k, v = cached(b, k, v, i, a)
    if a.sinks:
        out = with_sinks(b, q, k, v, a, b.vector(prefix + "sinks"))
    else:
        out = attend(b, q, k, v, a)
    width = a.heads * (a.head_dim if a.mla is None else a.mla.v_dim)
    out = g.op("Reshape", g.op("Transpose", out, perm=[0, 2, 1, 3]), g.constant([0, 0, width]))
    return b.linear(out, prefix + "o")


def heads(b: Builder, x: str, prefix: str, a: Attention) -> tuple[str, str, str]:
    """Queries, keys and values (batch, heads, sequence, width), turned."""
    g = b.graph
    parts = {}
    for side, heads in (("q", a.heads), ("k", a.kv_heads), ("v", a.kv_heads)):
        y = b.linear(x, prefix + side)
        if a.clip_qkv is not None:
            y = g.op("Clip", y, b.number(-a.clip_qkv), b.number(a.clip_qkv))
        normed = a.qk_norm != "none" and side != "v"
        if normed and a.qk_norm == "full":
            y = b.head_norm(y, f"{prefix}{side}_norm", a)
        y = g.op("Reshape", y, g.constant([0, 0, heads, a.head_dim]), name=f"{side}.heads")
        if normed and a.qk_norm != "full":
            y = b.head_norm(y, f"{prefix}{side}_norm", a)
        y = g.op("Transpose", y, perm=[0, 2, 1, 3], name=f"{side}.transpose")
        parts[side] = y if side == "v" else turned(b, y, a.rope, a.head_dim)
    return parts["q"], parts["k"], parts["v"]


def latent(b: Builder, x: str, prefix: str, a: Attention, m: Mla) -> tuple[str, str, str]:
    """Latent attention with keys and values written out for every head: the same numbers, and a cache that any Attention takes."""
    g = b.graph
    assert a.rope is not None
    turning, still = a.rope.dim, a.head_dim - a.rope.dim

    def split(y: str, count: int, width: int) -> str:
        y = g.op("Reshape", y, g.constant([0, 0, count, width]))
        return str(g.op("Transpose", y, perm=[0, 2, 1, 3]))

    def normed(y: str, role: str) -> str:
        with g.scope(role.rpartition(".")[2]):
            return b.normed(y, role, m.norm_eps, "rms")

    if m.q_rank is None:
        q = b.linear(x, prefix + "q")
    else:
        q = b.linear(normed(b.linear(x, prefix + "q_a"), prefix + "q_a_norm"), prefix + "q_b")
    q_still, q_turning = g.op(
        "Split", split(q, a.heads, a.head_dim), g.constant([still, turning]), axis=3, outputs=2
    )
    q = g.op("Concat", q_still, turned(b, q_turning, a.rope, turning), axis=3, name="q.heads")
    both, key = g.op(
        "Split", b.linear(x, prefix + "kv_a"), g.constant([m.kv_rank, turning]), axis=2, outputs=2
    )
    inner = normed(both, prefix + "kv_a_norm")
    k_still = split(b.linear(inner, prefix + "k_b"), a.heads, still)
    shared = turned(b, split(key, 1, turning), a.rope, turning)
    shared = g.op("Expand", shared, g.constant([1, a.heads, 1, 1]))
    k = g.op("Concat", k_still, shared, axis=3, name="k.heads")
    return str(q), str(k), split(b.linear(inner, prefix + "v_b"), a.heads, m.v_dim)


def cached(b: Builder, k: str, v: str, i: int, a: Attention) -> tuple[str, str]:
    """Keys and values with those of the past before them, rounded where the model's cache is: what is kept is what attention sees."""
    k, v = rounded_cache(b, k, v, i, a)
    if not b.shape.cache:
        return k, v
    out = []
    for side, new in (("key", k), ("value", v)):
        width = a.mla.v_dim if a.mla is not None and side == "value" else a.head_dim
        before, after = (onnx_static.capacity(b),) * 2 if b.shape.static else ("past", "total")
        past = b.graph.input(
            f"past_key_values.{i}.{side}", b.number_type, ("batch", a.kv_heads, before, width)
        )
        name = f"present.{i}.{side}"
        if b.shape.static:
            out.append(onnx_static.written(b, past, new, name))
        else:
            out.append(b.graph.op("Concat", past, new, axis=2, name=side, output=name))
        b.graph.output(name, b.number_type, ("batch", a.kv_heads, after, width))
    return out[0], out[1]


def rounded_cache(b: Builder, k: str, v: str, i: int, a: Attention) -> tuple[str, str]:
    """Keys and values as a quantized cache holds them; in the graph's dtype, so that nothing but their values changes."""
    spec = b.model.kv
    if spec is None:
        return k, v
    whole = not (spec.residual_window or spec.sinks or spec.pre_rope or a.mla is not None)
    if not whole:
        b.leave("the cache", "is not rounded: its latents, windows or order of rounding have no graph")
        return k, v
    out = []
    for x, spec_of, name in ((k, spec.k, "keys"), (v, spec.v, "values")):
        side = of_layer(spec_of, i, b.model.decoder.layers)
        why = onnx_trt.cache_reason(side) if b.dialect.tensorrt and b.shape.rounding else ""
        if why:
            b.leave(name, f"stay in {b.dtype}, not rounded to {activations.text(side)}: {why}")
            out.append(x)
            continue
        with b.ranked(4):
            made = b.rounded(x, side, name)
        if made != x:
            b.notes[f"{name} are rounded to {activations.text(side)} and held in {b.dtype}"] = None
        out.append(made)
    return out[0], out[1]


def of_layer(a: ActSpec, i: int, layers: int) -> ActSpec:
    """A spec whose scales are one per layer, for layer i."""
    if a.scale is None or a.scale.size != layers:
        return a
    return replace(a, scale=dense(regrid.numbers(a.scale).reshape(-1)[i : i + 1]))


def attend(b: Builder, q: str, k: str, v: str, a: Attention) -> str:
    """softmax(q k^T scale + mask) v, heads of keys shared by groups of queries."""
    if a.softcap is None and (not b.dialect.tensorrt or onnx_trt.fused(a)):
        return str(b.graph.op("Attention", q, k, v, mask(b, a.window), scale=a.scale))
    return str(b.graph.op("MatMul", b.graph.op("Softmax", _scores(b, q, k, a), axis=-1), repeated(b, v, a)))


def with_sinks(b: Builder, q: str, k: str, v: str, a: Attention, sinks: str) -> str:
    """Attention with a logit per head that takes its share of the softmax and attends to nothing."""
    g = b.graph
    scores = _scores(b, q, k, a)
    column = g.op("Reshape", sinks, g.constant([1, a.heads, 1, 1]))
    shape = g.op("Concat", g.op("Shape", scores, end=3), g.constant([1]), axis=0)
    shares = g.op("Softmax", g.op("Concat", scores, g.op("Expand", column, shape), axis=-1), axis=-1)
    real = g.op("Slice", shares, g.constant([0]), g.constant([-1]), g.constant([-1]))
    return str(g.op("MatMul", real, repeated(b, v, a)))


_LEAST = {"F32": -3.4028234663852886e38, "F16": -65504.0, "BF16": -3.3895313892515355e38}


def _scores(b: Builder, q: str, k: str, a: Attention) -> str:
    """Masked scores out of plain operators, the cap before the mask: Attention-23 caps after it, which would let masked positions
    through at -cap."""
    g = b.graph
    scores = g.op("MatMul", q, g.op("Transpose", repeated(b, k, a), perm=[0, 1, 3, 2]))
    scores = g.op("Mul", scores, b.number(a.scale))
    if a.softcap is not None:
        scores = cap(b, scores, a.softcap)
    return str(g.op("Where", mask(b, a.window), scores, b.number(_LEAST[b.dtype])))


def repeated(b: Builder, t: str, a: Attention) -> str:
    """Every head of keys or values as often as queries share it."""
    times = a.heads // a.kv_heads
    if times == 1:
        return t
    g = b.graph
    wide = g.op("Unsqueeze", t, g.constant([2]))
    wide = g.op("Expand", wide, g.constant([1, 1, times, 1, 1]))
    return str(g.op("Reshape", wide, g.constant([0, a.heads, -1, a.head_dim])))


def cap(b: Builder, x: str, limit: float) -> str:
    """limit * tanh(x / limit)."""
    g = b.graph
    return str(g.op("Mul", g.op("Tanh", g.op("Div", x, b.number(limit))), b.number(limit)))
