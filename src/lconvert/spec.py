"""What a legal Model is. `check(model)` runs after reading and after every pass and names what is illegal.

`roles` derives every canonical name and its shape from the traits alone, so readers, writers and this check
share one definition of what an architecture consists of.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from math import prod

from .errors import SpecError
from .ir import (
    Attention,
    Conv,
    Convnet,
    Decoder,
    Encoder,
    Layer,
    Mla,
    Model,
    Moe,
    Plain,
    Pool,
    QTensor,
    Tensor,
    Traits,
    Transform,
)

#: Norms of a layer by block kind, in the order in which they act.
NORMS: Mapping[str, tuple[str, ...]] = {
    "pre": ("attn_norm", "mlp_norm"),
    "post": ("attn_post_norm", "mlp_post_norm"),
    "sandwich": ("attn_norm", "attn_post_norm", "mlp_norm", "mlp_post_norm"),
    "parallel": ("attn_norm", "mlp_norm"),
    "parallel_shared": ("attn_norm",),
    "after": ("attn_post_norm", "mlp_post_norm"),
}

FLOATS = ("F32", "F16", "BF16")


def _layer_roles(d: Decoder | Encoder, layer: Layer) -> Iterator[tuple[str, tuple[int, ...]]]:
    a, h = layer.attention, d.hidden
    for norm in NORMS[layer.block]:
        yield norm, (h,)
        if d.norm_bias:
            yield norm + ".bias", (h,)
    q, kv = a.heads * a.head_dim, a.kv_heads * a.head_dim
    plain = (
        ("attn.q", q, h, a.qkv_bias),
        ("attn.k", kv, h, a.qkv_bias),
        ("attn.v", kv, h, a.qkv_bias),
        ("attn.o", h, q, a.o_bias),
    )
    for name, rows, cols, bias in plain if a.mla is None else _latent(a, a.mla, h):
        yield name, (rows, cols)
        if bias:
            yield name + ".bias", (rows,)
    for side, heads in (("q", a.heads), ("k", a.kv_heads)):
        if a.qk_norm != "none":
            shapes = {"head": (a.head_dim,), "per_head": (heads, a.head_dim), "full": (heads * a.head_dim,)}
            yield f"attn.{side}_norm", shapes[a.qk_norm]
    if a.sinks:
        yield "attn.sinks", (a.heads,)
    if a.mla is not None:
        if a.mla.q_rank is not None:
            yield "attn.q_a_norm", (a.mla.q_rank,)
        yield "attn.kv_a_norm", (a.mla.kv_rank,)
    m = layer.mlp
    if isinstance(m, Moe):
        yield "moe.router", (m.experts, h)
        if m.bias:
            yield "moe.router.bias", (m.experts,)
        if m.correction:
            yield "moe.correction.bias", (m.experts,)
        if m.shared:
            yield "moe.shared.gate", (m.shared, h)
            yield "moe.shared.up", (m.shared, h)
            yield "moe.shared.down", (h, m.shared)
        for e in range(m.experts):
            for part, rows, cols in (("gate", m.hidden, h), ("up", m.hidden, h), ("down", h, m.hidden)):
                yield f"moe.experts.{e}.{part}", (rows, cols)
                if m.bias:
                    yield f"moe.experts.{e}.{part}.bias", (rows,)
        return
    parts = (("mlp.gate", m.hidden, h), ("mlp.up", m.hidden, h), ("mlp.down", h, m.hidden))
    for name, rows, cols in parts if m.kind == "gated" else parts[1:]:
        yield name, (rows, cols)
        if m.bias:
            yield name + ".bias", (rows,)


def _latent(a: Attention, m: Mla, hidden: int) -> Iterator[tuple[str, int, int, bool]]:
    """(role, rows, columns, bias) of the matrices of latent attention, of kv_b's rows keys and values apart."""
    q, turning = a.heads * a.head_dim, a.rope.dim if a.rope else 0
    if m.q_rank is None:
        yield "attn.q", q, hidden, False
    else:
        yield "attn.q_a", m.q_rank, hidden, a.qkv_bias
        yield "attn.q_b", q, m.q_rank, False
    yield "attn.kv_a", m.kv_rank + turning, hidden, a.qkv_bias
    yield "attn.k_b", a.heads * (a.head_dim - turning), m.kv_rank, False
    yield "attn.v_b", a.heads * m.v_dim, m.kv_rank, False
    yield "attn.o", hidden, a.heads * m.v_dim, a.o_bias


def _encoder_roles(e: Encoder) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield "embed", (e.vocab, e.hidden)
    yield "pos_embed", (e.context, e.hidden)
    if e.token_types:
        yield "type_embed", (e.token_types, e.hidden)
    yield "embed_norm", (e.hidden,)
    yield "embed_norm.bias", (e.hidden,)
    for i, layer in e.each():
        yield from ((f"layers.{i}.{name}", shape) for name, shape in _layer_roles(e, layer))
    for name, rows in (("pooler", e.hidden), ("head", e.labels)):
        yield name, (rows, e.hidden)
        yield name + ".bias", (rows,)


def shapes(c: Convnet) -> list[tuple[int, ...]]:
    """What enters every step, and last what comes out: (channels, height, width), or (features,) once it is flat.

    SpecError for a step that cannot act on what it gets.
    """
    out: list[tuple[int, ...]] = [c.image]
    for i, step in enumerate(c.steps):
        now = out[-1]
        flat = len(now) == 1
        if isinstance(step, Plain):
            out.append((prod(now),) if step.kind == "flatten" else now)
            continue
        if flat != (not isinstance(step, Conv | Pool)):
            raise SpecError(
                f"step {i}: a {type(step).__name__.lower()} cannot act on {'features' if flat else 'images; flatten them first'}"
            )
        if isinstance(step, Conv):
            sides = tuple(
                (n + 2 * step.padding - k) // step.stride + 1
                for n, k in zip(now[1:], step.kernel, strict=True)
            )
            out.append((step.out, *sides))
        elif isinstance(step, Pool):
            out.append((now[0], *(n // step.size for n in now[1:])))
        else:
            out.append((step.out,))
        if min(out[-1]) <= 0:
            raise SpecError(f"step {i}: {step} leaves nothing of {now}")
    return out


def _convnet_roles(c: Convnet) -> Iterator[tuple[str, tuple[int, ...]]]:
    entering = shapes(c)
    for i, step in c.weighted():
        yield (
            f"steps.{i}",
            (step.out, entering[i][0], *(step.kernel if isinstance(step, Conv) else ())),
        )
        if step.bias:
            yield f"steps.{i}.bias", (step.out,)


def roles(d: Traits) -> dict[str, tuple[int, ...]]:
    """Canonical name -> shape of every entry that a model with these traits has."""
    if isinstance(d, Encoder):
        return dict(_encoder_roles(d))
    if isinstance(d, Convnet):
        return dict(_convnet_roles(d))
    out: dict[str, tuple[int, ...]] = {"embed": (d.vocab, d.hidden)}
    if d.learned_positions:
        out["pos_embed"] = (d.learned_positions, d.hidden)
    for i, layer in d.each():
        out.update((f"layers.{i}.{name}", shape) for name, shape in _layer_roles(d, layer))
    out["norm"] = (d.hidden,)
    if d.norm_bias:
        out["norm.bias"] = (d.hidden,)
    if not d.tied:
        out["head"] = (d.vocab, d.hidden)
    if d.head_bias:
        out["head.bias"] = (d.vocab,)
    return out


def blocks(shape: tuple[int, ...], block: tuple[int, ...]) -> tuple[int, ...]:
    """Number of blocks along each axis; the last block of an axis may be short."""
    return tuple(1 if b == -1 else -(-n // b) for n, b in zip(shape, block, strict=True))


def _check_quantized(name: str, q: QTensor) -> Iterator[str]:
    if q.codes.shape != q.shape:
        yield f"{name}: codes have shape {q.codes.shape}, the tensor {q.shape}"
    if len(q.block) != len(q.shape) or any(b == 0 or b < -1 for b in q.block):
        yield f"{name}: block {q.block} does not describe a tensor of shape {q.shape}"
        return
    count = blocks(q.shape, q.block)
    if q.g_idx is not None:
        if q.g_idx.shape != (q.shape[-1],):
            yield f"{name}: g_idx has shape {q.g_idx.shape}, expected ({q.shape[-1]},)"
        return  # with act-order the number of groups is the source's own
    for side, value in (("scale", q.scale), ("zero", q.zero), ("offset", q.offset)):
        if value is not None and value.shape != count:
            yield f"{name}: {side} has shape {value.shape}, expected one value per block {count}"
        if isinstance(value, QTensor):
            yield from _check_quantized(f"{name} ({side})", value)
        elif isinstance(value, Tensor) and side != "zero" and value.dtype not in (*FLOATS, "F64"):
            yield f"{name}: {side} is stored as {value.dtype}, expected a float type"
    if q.grid.kind == "codebook" and not q.grid.values:
        yield f"{name}: a codebook grid without values"


def _check_encoder(e: Encoder) -> Iterator[str]:
    for key in ("hidden", "layers", "vocab", "context", "labels"):
        if getattr(e, key) <= 0:
            yield f"traits: {key} is {getattr(e, key)}, must be positive"
    a = e.default.attention
    if e.default.block != "after" or isinstance(e.default.mlp, Moe):
        yield "traits: an encoder's layers are dense and normed after the sums"
    if (a.heads, a.rope, a.window, a.mla) != (
        a.kv_heads,
        None,
        None,
        None,
    ) or a.heads * a.head_dim != e.hidden:
        yield "traits: an encoder's attention is full, without rotary positions, and its heads share the hidden size"


def _check_convnet(c: Convnet) -> Iterator[str]:
    for i, step in enumerate(c.steps):
        numbers = [step.out, step.stride, *step.kernel] if isinstance(step, Conv) else []
        numbers += [step.size] if isinstance(step, Pool) else []
        if min(numbers, default=1) <= 0 or (isinstance(step, Conv) and step.padding < 0):
            yield f"traits: step {i} is {step}, whose sizes are impossible"
            return
    try:
        if not c.steps or len(shapes(c)[-1]) != 1:
            yield "traits: a convolutional network ends in features, after flatten"
    except SpecError as e:
        yield f"traits: {e}"


def impossible(d: Traits) -> list[str]:
    """What is wrong with traits by themselves, in words."""
    return list(_check_traits(d))


def _check_traits(d: Traits) -> Iterator[str]:
    if isinstance(d, Encoder):
        yield from _check_encoder(d)
        return
    if isinstance(d, Convnet):
        yield from _check_convnet(d)
        return
    for key in ("hidden", "layers", "vocab", "context"):
        if getattr(d, key) <= 0:
            yield f"traits: {key} is {getattr(d, key)}, must be positive"
    for i in d.overrides:
        if not 0 <= i < d.layers:
            yield f"traits: an override for layer {i}, but there are {d.layers} layers"
    seen: list[Layer] = []
    for i, layer in d.each():
        if layer in seen:
            continue
        seen.append(layer)
        if layer.block == "after":
            yield f"layer {i}: norms after the sums are for encoders"
        a = layer.attention
        if a.kv_heads <= 0 or a.heads % a.kv_heads:
            yield f"layer {i}: {a.heads} heads are not a multiple of {a.kv_heads} key-value heads"
        if a.rope is not None and (a.rope.dim <= 0 or a.rope.dim % 2 or a.rope.dim > a.head_dim):
            yield f"layer {i}: {a.rope.dim} rotary dimensions do not fit a head of {a.head_dim}"
        if a.mla is not None and (a.rope is None or a.rope.dim >= a.head_dim or a.kv_heads != a.heads):
            yield f"layer {i}: latent attention needs dimensions that turn, others that do not, and a key for every head"
        if isinstance(layer.mlp, Moe):
            yield from _check_groups(i, layer.mlp)
        if isinstance(layer.mlp, Moe) and not 0 < layer.mlp.top_k <= layer.mlp.experts:
            yield f"layer {i}: top-{layer.mlp.top_k} of {layer.mlp.experts} experts is impossible"


def _check_groups(i: int, m: Moe) -> Iterator[str]:
    if m.groups == m.top_groups == 1:
        return
    if m.groups < 1 or m.experts % m.groups or not 0 < m.top_groups <= m.groups:
        yield f"layer {i}: {m.experts} experts, the best {m.top_groups} of {m.groups} groups: impossible"
        return
    size = m.experts // m.groups
    if m.group_score == "top2" and size < 2:
        yield f"layer {i}: groups of {size} experts have no two best ones"
    if m.top_k > m.top_groups * size:
        yield f"layer {i}: top-{m.top_k} of {m.top_groups} groups of {size} experts is impossible"


def _fits_input(t: Transform, shape: tuple[int, ...]) -> bool:
    return t.where != "input" or t.param is None or t.param.shape == shape[-1:]


def _check_cache(model: Model) -> Iterator[str]:
    if model.kv is None:
        return
    if not isinstance(model.arch, Decoder):
        yield "kv: only decoders have a cache of keys and values"
        return
    for side, spec in (("k", model.kv.k), ("v", model.kv.v)):
        if spec.scale is not None and spec.scale.shape != (model.decoder.layers,):
            yield f"kv: {side} has scales of shape {spec.scale.shape}, expected one for each of {model.decoder.layers} layers"


def problems(model: Model) -> list[str]:
    """Everything that makes this Model illegal, in words; empty when it is legal."""
    d = model.arch
    found = impossible(d)
    if found:
        return found
    want = roles(d)
    found += [f"missing entry {name} {want[name]}" for name in want.keys() - model.entries.keys()]
    found += [f"unknown entry {name}" for name in model.entries.keys() - want.keys()]
    for name, entry in model.entries.items():
        data = entry.data
        if entry.name != name:
            found.append(f"{name}: the entry calls itself {entry.name}")
        if name in want and data.shape != want[name]:
            found.append(
                f"{name}: shape {data.shape}, but the configuration implies {want[name]} ({data.origin})"
            )
        if isinstance(data, QTensor):
            found += _check_quantized(name, data)
        elif data.dtype not in FLOATS:
            found.append(
                f"{name}: stored as {data.dtype}, expected one of {', '.join(FLOATS)} ({data.origin})"
            )
        if entry.transform is not None and entry.transform.folded:
            found.append(f"{name}: a folded transform belongs to the model, not to the entry")
        if entry.transform is not None and not _fits_input(entry.transform, data.shape):
            found.append(
                f"{name}: the transform of its input has not one value for each of {data.shape[-1]} inputs"
            )
    found += _check_cache(model)
    return sorted(found)


def check(model: Model) -> Model:
    """The model itself if it is legal; otherwise SpecError with the first problems and their number."""
    found = problems(model)
    if found:
        more = f" (and {len(found) - 5} more)" if len(found) > 5 else ""
        raise SpecError(f"{model.source or 'model'}: " + "; ".join(found[:5]) + more)
    return model
