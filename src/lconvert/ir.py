"""The canonical model: what a checkpoint means, independent of every file format.

A `Model` is an architecture (canonical traits), a verbatim config, a tokenizer kept as data, and named
entries. An `Entry` holds a dense `Tensor` or a `QTensor`. Both are lazy and immutable: creating a Model
costs its headers, a pass returns a new Model that shares what it did not touch.

A QTensor means exact real numbers, per block:

    w = (grid(codes) - zero) * scale - offset

with scale and offset possibly QTensors themselves (K-quants, NVFP4, double quantization). Its canonical
fp32 evaluation takes the scale first, innermost level first, each product one fp32 rounding; then
(grid - zero) * scale; then - offset.

Everything here is ignorant of formats: no packing, no file layouts, no target names.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal, cast

from .errors import UnsupportedError

if TYPE_CHECKING:  # numpy is imported by whoever reads data, never by `lconvert --help`
    import numpy as np
    from numpy.typing import NDArray

Dtype = Literal["F32", "F16", "BF16", "F64", "I8", "U8", "I16", "U16", "I32", "U32", "I64", "BOOL"]

#: Bytes per element. BF16 data travels as its uint16 bit pattern.
DTYPE_SIZE: Mapping[str, int] = {
    "F64": 8, "I64": 8, "F32": 4, "I32": 4, "U32": 4, "F16": 2, "BF16": 2, "I16": 2, "U16": 2,
    "I8": 1, "U8": 1, "BOOL": 1,
}  # fmt: skip

NUMPY_DTYPE: Mapping[str, str] = {
    "F64": "<f8", "I64": "<i8", "F32": "<f4", "I32": "<i4", "U32": "<u4", "F16": "<f2", "BF16": "<u2",
    "I16": "<i2", "U16": "<u2", "I8": "i1", "U8": "u1", "BOOL": "?",
}  # fmt: skip


# --- tensors ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Tensor:
    """A lazy dense array of `shape`, stored as `dtype`; weights are (out, in).

    `read(start, stop)` returns rows start..stop of axis 0 as a C-contiguous array of NUMPY_DTYPE[dtype]
    (BF16: its uint16 bits). It may be called from several threads and must not keep what it returns.
    `origin` says where the bytes come from, for messages; `files` are the files behind it, each with the state in
    which its header was read: (path, (size, mtime in ns, inode)). `exact_in` are dtypes that its maker promises to represent
    every value, so that nobody need compute them to find out.
    """

    shape: tuple[int, ...]
    dtype: Dtype
    read: Callable[[int, int], NDArray[Any]] = field(repr=False, compare=False)
    origin: str = ""
    files: tuple[tuple[str, tuple[int, int, int]], ...] = field(default=(), repr=False, compare=False)
    exact_in: tuple[str, ...] = ()

    @property
    def size(self) -> int:
        n = 1
        for d in self.shape:
            n *= d
        return n

    @property
    def rows(self) -> int:
        """Length of axis 0; a scalar counts as one row."""
        return self.shape[0] if self.shape else 1

    def load(self) -> NDArray[Any]:
        """The whole array in its storage dtype."""
        return self.read(0, self.rows).reshape(self.shape)


def dense(array: NDArray[Any], dtype: Dtype | None = None, origin: str = "") -> Tensor:
    """A Tensor over an array in memory. `dtype` is needed only for BF16 held as uint16."""
    import numpy as np

    names = {np.dtype(v): k for k, v in NUMPY_DTYPE.items() if k != "BF16"}
    name = cast(Dtype, dtype or names[array.dtype])
    if np.dtype(NUMPY_DTYPE[name]) != array.dtype:
        raise ValueError(f"array of {array.dtype} cannot be held as {name}")
    fixed: NDArray[Any] = np.ascontiguousarray(array)
    fixed.setflags(write=False)
    flat = fixed if fixed.ndim else fixed.reshape(1)
    return Tensor(array.shape, name, lambda a, b: flat[a:b], origin)


def as_f32(array: NDArray[Any], dtype: str) -> NDArray[np.float32]:
    """Values of a storage array as float32 (exact for F16 and BF16; rounds F64)."""
    import numpy as np

    if dtype == "BF16":
        return (array.astype(np.uint32) << np.uint32(16)).view(np.float32)
    return array.astype(np.float32, copy=False)


def take_rows(t: Tensor, ranges: tuple[tuple[int, int], ...]) -> Tensor:
    """The rows of `t` in `ranges` (start, stop), one after another: a view, nothing is read."""
    import numpy as np

    if len(ranges) == 1 and ranges[0] == (0, t.rows):
        return t
    starts = [0]
    for a, b in ranges:
        starts.append(starts[-1] + b - a)

    def read(start: int, stop: int) -> NDArray[Any]:
        parts = []
        for (a, _), lo, hi in zip(ranges, starts, starts[1:], strict=False):
            first, last = max(start, lo), min(stop, hi)
            if first < last:
                parts.append(t.read(a + first - lo, a + last - lo))
        if len(parts) == 1:
            return parts[0]
        return np.concatenate(parts) if parts else t.read(0, 0)

    return replace(t, shape=(starts[-1], *t.shape[1:]), read=read)


def concat_rows(parts: tuple[Tensor, ...]) -> Tensor:
    """Tensors of one dtype and equal trailing shape stacked along axis 0: a view."""
    import numpy as np

    if len(parts) == 1:
        return parts[0]
    ends = [0]
    for p in parts:
        if p.dtype != parts[0].dtype or p.shape[1:] != parts[0].shape[1:]:
            raise ValueError(
                f"cannot stack {p.origin} {p.dtype}{p.shape} on {parts[0].dtype}{parts[0].shape}"
            )
        ends.append(ends[-1] + p.rows)

    def read(start: int, stop: int) -> NDArray[Any]:
        out = [
            p.read(max(start, lo) - lo, min(stop, hi) - lo)
            for p, lo, hi in zip(parts, ends, ends[1:], strict=False)
            if max(start, lo) < min(stop, hi)
        ]
        if len(out) == 1:
            return out[0]
        return np.concatenate(out) if out else parts[0].read(0, 0)

    origin = " + ".join(p.origin for p in parts)
    files = tuple(dict.fromkeys(f for p in parts for f in p.files))
    promised = tuple(d for d in parts[0].exact_in if all(d in p.exact_in for p in parts))
    return Tensor((ends[-1], *parts[0].shape[1:]), parts[0].dtype, read, origin, files, promised)


class _Last(threading.local):
    """The last slab of parts that this thread computed: one slot, whatever the number of tensors."""

    key: tuple[Any, int, int] | None = None
    parts: dict[str, Any]


_LAST = _Last()


#: Values that are computed together at most where a side tensor is asked for whole.
COMPUTED = 4 << 20


def parts(
    compute: Callable[[int, int], dict[str, NDArray[Any]]], cols: int | None = None
) -> Callable[[str], Callable[[int, int], Any]]:
    """Readers for arrays that are computed together, such as the codes and scales of one slab of rows.

    `parts(compute)("codes")` is a `read` for a Tensor. Codes and scales are read one after another for the same
    rows, so each thread keeps its last slab. cols: values per row that are computed, for slabs of bounded size: formats
    ask for all scales or zero points of a matrix at once.
    """

    def reader(name: str) -> Callable[[int, int], Any]:
        def read(start: int, stop: int) -> Any:
            step = stop - start if cols is None else max(1, COMPUTED // max(1, cols))
            if stop - start > step:
                import numpy as np

                return np.concatenate([read(a, min(a + step, stop)) for a in range(start, stop, step)])
            key = (compute, start, stop)
            if _LAST.key != key:
                found = compute(start, stop)
                _LAST.key, _LAST.parts = key, found
            return _LAST.parts[name]

        return read

    return reader


# --- quantized tensors -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Grid:
    """What a code means.

    int: codes are the integers themselves, `bits` wide, `signed` or not.
    float: codes are bit patterns of a small float with `exponent` and `mantissa` bits (E2M1, E4M3, E8M0).
    codebook: codes index `values`. Where `lattice` is set, groups of neighbouring codes are restricted to the
    points that the GGUF type of that name can store.
    """

    kind: Literal["int", "float", "codebook"]
    bits: int
    signed: bool = False
    exponent: int = 0
    mantissa: int = 0
    values: tuple[float, ...] = ()
    lattice: str = ""


def int_grid(bits: int, signed: bool) -> Grid:
    return Grid("int", bits, signed)


E2M1 = Grid("float", 4, True, exponent=2, mantissa=1)
E4M3 = Grid("float", 8, True, exponent=4, mantissa=3)
UE4M3 = Grid("float", 7, False, exponent=4, mantissa=3)
E8M0 = Grid("float", 8, False, exponent=8, mantissa=0)


@dataclass(frozen=True)
class QTensor:
    """Codes on a grid with block-wise scales; see the module docstring for the meaning.

    codes: one array element per weight, unpacked, in logical order, shape = `shape`.
    block: one entry per axis; -1 is the whole axis. (1, 32) is a group of 32 along the input dimension.
    scale, zero, offset: one value per block, shape = number of blocks along each axis. `scale` multiplies.
    A global (per-tensor) scale is the innermost scale with block (-1, -1).
    g_idx: block number of every input column, for act-order checkpoints. mask: kept weights (bool).
    outliers: sparse exact values. low_rank: (A, B) with B @ A added after dequantization.
    divisor: `scale` divides instead of multiplying (the global scale of compressed-tensors' NVFP4).
    """

    shape: tuple[int, ...]
    codes: Tensor
    grid: Grid
    block: tuple[int, ...]
    scale: Tensor | QTensor
    zero: Tensor | None = None
    offset: Tensor | QTensor | None = None
    g_idx: Tensor | None = None
    mask: Tensor | None = None
    outliers: Mapping[str, Tensor] | None = None
    low_rank: tuple[Tensor, Tensor] | None = None
    divisor: bool = False

    @property
    def rows(self) -> int:
        return self.shape[0]

    @property
    def size(self) -> int:
        return self.codes.size

    @property
    def origin(self) -> str:
        return self.codes.origin

    @property
    def files(self) -> tuple[tuple[str, tuple[int, int, int]], ...]:
        sides = (self.codes, self.scale, self.zero, self.offset, self.g_idx)
        return tuple(dict.fromkeys(f for t in sides if t is not None for f in t.files))


def _sides(q: QTensor, change: Callable[[Any], Any]) -> dict[str, Any]:
    """`change` of every side tensor that q has."""
    return {k: change(v) for k in ("scale", "zero", "offset") if (v := getattr(q, k)) is not None}


def row_blocks(q: QTensor) -> QTensor:
    """The same numbers with blocks one row high: side values of taller blocks are repeated, lazily."""
    import numpy as np

    height = q.shape[0] if q.block[0] == -1 else q.block[0]
    if height == 1:
        return replace(q, block=(1, *q.block[1:]))

    def expand(side: Any) -> Any:
        if isinstance(side, QTensor):
            inner = side if side.block[0] == -1 else row_blocks(side)
            changed = {} if side.block[0] == -1 else _sides(inner, expand)
            codes = expand(inner.codes)
            return replace(inner, shape=codes.shape, codes=codes, **changed)

        def read(start: int, stop: int) -> NDArray[Any]:
            first = start // height
            rows: NDArray[Any] = side.read(first, max(first, -(-stop // height)))
            return rows[np.arange(start, stop) // height - first]

        return replace(side, shape=(q.shape[0], *side.shape[1:]), read=read)

    return replace(q, block=(1, *q.block[1:]), **_sides(q, expand))


def take_quantized(q: QTensor, ranges: tuple[tuple[int, int], ...]) -> QTensor:
    """The rows of `q` in `ranges`: a view. Blocks that a range would cut are split into blocks of one row."""
    height = q.block[0]
    if ranges == ((0, q.rows),):
        return q
    ends = [b for _, b in ranges]
    if ends and ends[-1] == q.rows:
        ends.pop()  # the last block of q may be short, and stays the last
    if height > 1 and any(edge % height for edge in (*ends, *(a for a, _ in ranges))):
        q, height = row_blocks(q), 1
    codes = take_rows(q.codes, ranges)
    if height == -1:  # one block for all rows stays one block
        return replace(q, shape=codes.shape, codes=codes)
    blocks = tuple((a // height, -(-b // height)) for a, b in ranges)

    def take(side: Any) -> Any:
        return take_quantized(side, blocks) if isinstance(side, QTensor) else take_rows(side, blocks)

    return replace(q, shape=codes.shape, codes=codes, **_sides(q, take))


def concat_quantized(parts: tuple[QTensor, ...]) -> QTensor:
    """QTensors of one structure stacked along axis 0: a view.

    Blocks that span all rows become blocks of one row unless their values are equal, bit for bit.
    ValueError for parts that differ in grid, columns, block width or in which side values they have.
    """
    if len(parts) == 1:
        return parts[0]
    q = parts[0]
    for p in parts:
        same = (p.grid, p.block[1:], p.divisor, p.shape[1:]) == (q.grid, q.block[1:], q.divisor, q.shape[1:])
        extra = p.g_idx is not None or p.mask is not None or p.outliers or p.low_rank is not None
        if not same or extra or _sides(p, type) != _sides(q, type):
            raise ValueError(f"cannot stack {p.origin} on {q.origin}: they are quantized differently")
    heights = {p.block[0] for p in parts}
    if heights == {-1} and _equal_sides(parts):
        codes = concat_rows(tuple(p.codes for p in parts))
        return replace(q, shape=codes.shape, codes=codes)
    if len(heights) > 1 or heights == {-1} or any(p.rows % p.block[0] for p in parts[:-1]):
        parts = tuple(row_blocks(p) for p in parts)
        q = parts[0]

    def stack(name: str) -> Any:
        sides = tuple(getattr(p, name) for p in parts)
        return concat_quantized(sides) if isinstance(sides[0], QTensor) else concat_rows(sides)

    codes = concat_rows(tuple(p.codes for p in parts))
    return replace(q, shape=codes.shape, codes=codes, **{k: stack(k) for k in _sides(q, type)})


def _equal_sides(parts: tuple[QTensor, ...]) -> bool:
    """Whether side values, which are few, are the same numbers in the same storage."""

    def same(a: Any, b: Any) -> bool:
        if isinstance(a, QTensor) and isinstance(b, QTensor):
            if (a.grid, a.block, a.divisor) != (b.grid, b.block, b.divisor) or not same(a.codes, b.codes):
                return False
            return _sides(a, type) == _sides(b, type) and all(
                same(getattr(a, k), getattr(b, k)) for k in _sides(a, type)
            )
        if isinstance(a, Tensor) and isinstance(b, Tensor):
            return a.dtype == b.dtype and a.shape == b.shape and bool((a.load() == b.load()).all())
        return False

    q = parts[0]
    names = _sides(q, type)
    return all(
        _sides(p, type) == names and all(same(getattr(q, k), getattr(p, k)) for k in names) for p in parts[1:]
    )


@dataclass(frozen=True)
class ActSpec:
    """How activations entering a weight are quantized.

    scale multiplies codes (a scalar for per tensor, one value per layer for a KV cache); None where it is dynamic.
    group: width of a group along the features. A dynamic spec with a scale has it as the global one above those of its groups
    (NVFP4), or per token as their upper bound over the grid's largest value (fbgemm); `divisor`: it divides, as
    compressed-tensors has it.
    """

    grid: Grid
    per: Literal["tensor", "token", "group", "head"]
    dynamic: bool
    group: int | None = None
    scale: Tensor | None = None
    zero: Tensor | None = None
    divisor: bool = False


@dataclass(frozen=True)
class KVSpec:
    """How the key and value caches are quantized; static scales have shape (layers,)."""

    k: ActSpec
    v: ActSpec
    residual_window: int = 0
    sinks: int = 0
    pre_rope: bool = False


@dataclass(frozen=True)
class Transform:
    """An equivalence transform. Not `folded`: it is part of the function and belongs to its entry.

    kind scale, where input: the entry's input is multiplied by `param` (in,) first, y = W (x * param).
    """

    kind: Literal["scale", "rotate", "permute", "shift"]
    where: str
    param: Tensor | None = None
    folded: bool = True


@dataclass(frozen=True)
class Entry:
    """One canonical tensor. `provenance` lists, in order, what was done to it."""

    name: str
    data: Tensor | QTensor
    activation: ActSpec | None = None
    transform: Transform | None = None
    provenance: tuple[str, ...] = ()

    @property
    def shape(self) -> tuple[int, ...]:
        return self.data.shape


# --- architecture traits ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rope:
    """Rotary embedding. `dim` dimensions of each head turn; `layout` says which pairs:
    half = (i, i + dim/2) as in Llama's HF code, interleaved = (2i, 2i + 1) as in GPT-J and Cohere."""

    theta: float
    dim: int
    layout: Literal["half", "interleaved"] = "half"
    scaling: Literal["none", "linear", "yarn", "longrope", "llama3"] = "none"
    factor: float = 1.0
    original_context: int = 0
    low_freq_factor: float = 0.0  # llama3
    high_freq_factor: float = 0.0  # llama3
    beta_fast: float = 32.0  # yarn
    beta_slow: float = 1.0  # yarn
    attention_factor: float | None = None  # yarn, longrope; None: the formula's own
    mscale: float = 0.0  # yarn (DeepSeek)
    mscale_all_dim: float = 0.0  # yarn (DeepSeek)
    truncate: bool = True  # yarn: correction range rounded to whole dimensions
    short_factors: tuple[float, ...] = ()  # longrope, one per pair
    long_factors: tuple[float, ...] = ()


@dataclass(frozen=True)
class Mla:
    """Latent attention (DeepSeek): keys and values of all heads come out of one normed latent of `kv_rank` per token.

    q_rank: queries come out of a normed latent too, None: straight from the input. v_dim: width of a head's values.
    The last `rope.dim` of a head's `head_dim` dimensions turn; these of the keys are one vector for all heads, straight
    from the input. norm_eps: of the norms of both latents.
    """

    q_rank: int | None
    kv_rank: int
    v_dim: int
    norm_eps: float = 1e-6


@dataclass(frozen=True)
class Attention:
    """`scale` multiplies q.k; `window` counts the visible positions including the current one.

    With `mla`, qkv_bias belongs to the matrices that lead to the latents.
    """

    heads: int
    kv_heads: int
    head_dim: int
    scale: float
    rope: Rope | None
    window: int | None = None
    softcap: float | None = None
    qk_norm: Literal["none", "head", "per_head", "full"] = "none"  # head: one vector for all heads
    qkv_bias: bool = False
    o_bias: bool = False
    clip_qkv: float | None = None
    sinks: bool = False  # one logit per head that only takes its share of the softmax
    mla: Mla | None = None


@dataclass(frozen=True)
class Mlp:
    """gated: act(gate x) * up x; plain: act(up x)."""

    kind: Literal["gated", "plain"]
    activation: str  # silu, gelu (exact erf), gelu_tanh, relu, relu2
    hidden: int
    bias: bool = False


@dataclass(frozen=True)
class Moe:
    """Routed experts; each expert is a gated MLP. `normalize` divides the chosen weights by their sum.

    activation swiglu_oai: g sigmoid(1.702 g) (u + 1) with g = min(gate x, limit), u = clamp(up x, -limit, limit).
    bias: the router and all matrices of the experts have one.
    shared: width of a gated MLP that every token passes as well, its output added. correction: a vector added to the
    scores to choose experts, not to weigh them. groups > 1: experts compete in `groups` of equal size, and only those of
    the best `top_groups` can be chosen; a group counts what its best expert does (max) or its two best together (top2).
    """

    experts: int
    top_k: int
    hidden: int
    activation: str
    scoring: Literal["softmax", "sigmoid"] = "softmax"
    normalize: bool = True
    scale: float = 1.0
    bias: bool = False
    limit: float | None = None  # of swiglu_oai
    shared: int = 0
    correction: bool = False
    groups: int = 1
    top_groups: int = 1
    group_score: Literal["max", "top2"] = "top2"


@dataclass(frozen=True)
class Layer:
    """One decoder layer. `block` places the norms:

    pre: x += attn(n1(x)); x += mlp(n2(x))                 post: x += n1(attn(x)); x += n2(mlp(x))
    sandwich: x += n1b(attn(n1(x))); x += n2b(mlp(n2(x)))  parallel: x += attn(n1(x)) + mlp(n2(x))
    parallel_shared: x += attn(n1(x)) + mlp(n1(x))         after: x = n1(x + attn(x)); x = n2(x + mlp(x)) (encoders)
    """

    attention: Attention
    mlp: Mlp | Moe
    block: Literal["pre", "post", "sandwich", "parallel", "parallel_shared", "after"] = "pre"


@dataclass(frozen=True)
class Decoder:
    """A decoder-only transformer: `default` for every layer, `overrides` where one differs."""

    family: str  # the architecture file's model_type
    hidden: int
    layers: int
    vocab: int
    context: int
    norm: Literal["rms", "layer"]
    norm_eps: float
    default: Layer
    overrides: Mapping[int, Layer] = field(default_factory=dict)
    norm_offset: float = 0.0  # the function multiplies by (stored weight + offset)
    norm_bias: bool = False
    tied: bool = False
    head_bias: bool = False
    learned_positions: int = 0
    embed_scale: float = 1.0
    residual_scale: float = 1.0
    logit_scale: float = 1.0  # multiplies the logits
    final_softcap: float | None = None

    def layer(self, i: int) -> Layer:
        return self.overrides.get(i, self.default)

    def each(self) -> Iterator[tuple[int, Layer]]:
        return ((i, self.layer(i)) for i in range(self.layers))


@dataclass(frozen=True)
class Encoder:
    """A bidirectional transformer that classifies a sequence by its first token (BERT, DistilBERT).

    The sum of word, position and type embeddings is normed; every layer is `default`, whose norms come after the sums; the pooler
    (a square matrix and `pooler`, its activation) and the head act on the first token alone. Norms are layer norms with bias.
    """

    family: str  # the architecture file's model_type
    hidden: int
    layers: int
    vocab: int
    context: int  # rows of the position embeddings
    labels: int
    norm_eps: float
    default: Layer
    pooler: Literal["tanh", "relu"]
    token_types: int = 0  # rows of the type embeddings; 0: there are none

    norm_bias = True

    def each(self) -> Iterator[tuple[int, Layer]]:
        return ((i, self.default) for i in range(self.layers))


@dataclass(frozen=True)
class Conv:
    """A 2-D convolution: `out` channels, kernel (height, width), the same stride and zero padding on both sides of both axes."""

    out: int
    kernel: tuple[int, int]
    stride: int = 1
    padding: int = 0
    bias: bool = True


@dataclass(frozen=True)
class Linear:
    """A matrix on the features of an image that has been flattened."""

    out: int
    bias: bool = True


@dataclass(frozen=True)
class Pool:
    """The largest or the mean value of squares that do not overlap."""

    kind: Literal["max", "average"]
    size: int


@dataclass(frozen=True)
class Plain:
    """A step without weights or options: an activation, or flatten (channels, rows, columns in this order)."""

    kind: Literal["relu", "tanh", "gelu", "flatten"]


Step = Conv | Linear | Pool | Plain


@dataclass(frozen=True)
class Convnet:
    """A small convolutional network: one step after another, from images (channels, height, width) to logits."""

    family: str
    image: tuple[int, int, int]
    steps: tuple[Step, ...]

    def weighted(self) -> Iterator[tuple[int, Conv | Linear]]:
        return ((i, s) for i, s in enumerate(self.steps) if isinstance(s, Conv | Linear))


Traits = Decoder | Encoder | Convnet


# --- tokenizer and model ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Tokenizer:
    """A tokenizer as data, verbatim: nothing is interpreted before a target asks.

    json: tokenizer.json; config: tokenizer_config.json (both parsed); chat_template: the Jinja source;
    special: ids by role (bos, eos, pad, unk, eot ...) resolved from the config files, eos may name several.
    """

    json: Mapping[str, Any]
    config: Mapping[str, Any] = field(default_factory=dict)
    chat_template: str | None = None
    extra_templates: Mapping[str, str] = field(default_factory=dict)
    special: Mapping[str, tuple[int, ...]] = field(default_factory=dict)


@dataclass(frozen=True)
class Model:
    """The whole model. `report` collects what readers and passes have to say (inert keys, rebuilt files)."""

    arch: Traits
    config: Mapping[str, Any]
    entries: Mapping[str, Entry]
    tokenizer: Tokenizer | None = None
    transforms: tuple[Transform, ...] = ()
    kv: KVSpec | None = None
    generation: Mapping[str, Any] = field(default_factory=dict)
    name: str = ""
    source: str = ""
    report: tuple[str, ...] = ()

    @property
    def decoder(self) -> Decoder:
        """The traits of a decoder; UnsupportedError for a model that is none, from whatever only language models have."""
        if isinstance(self.arch, Decoder):
            return self.arch
        what = "an encoder" if isinstance(self.arch, Encoder) else "a convolutional network"
        raise UnsupportedError(
            f"{self.source or self.name or 'the model'}: {self.arch.family} is {what}, and this works on decoders (language models) "
            "only; what lconvert does with it is an ONNX graph, in floats or static int8"
        )

    def with_entries(self, new: Mapping[str, Entry], note: str = "") -> Model:
        """This model with some entries replaced."""
        report = (*self.report, note) if note else self.report
        return replace(self, entries={**self.entries, **new}, report=report)
