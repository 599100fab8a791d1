"""What architecture files are made of: config keys that must be consumed, name templates, target quirks.

An architecture file is an `Arch`: two functions (config -> traits, traits -> config), a table of tensor names
and, for each target, what is peculiar there, as data.
"""

from __future__ import annotations

import dataclasses
import math
import reprlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

from lconvert.errors import InputError, UnsupportedError
from lconvert.ir import Convnet, Decoder, Encoder, Moe, Rope, Traits
from lconvert.spec import roles

# --- config keys -----------------------------------------------------------------------------------------

#: Keys of any config.json that do not change the function at inference.
INERT = frozenset(
    [
        "_name_or_path",
        "_attn_implementation",
        "architectures",
        "auto_map",
        "attention_dropout",
        "attn_pdrop",
        "resid_pdrop",
        "embd_pdrop",
        "attention_probs_dropout_prob",
        "hidden_dropout",
        "hidden_dropout_prob",
        "residual_dropout",
        "embedding_dropout",
        "classifier_dropout",
        "dropout",
        "ffn_dropout",
        "resid_dropout",
        "attention_dropout_prob",
        "bos_token_id",
        "eos_token_id",
        "pad_token_id",
        "sep_token_id",
        "decoder_start_token_id",
        "dtype",
        "torch_dtype",
        "transformers_version",
        "initializer_range",
        "use_cache",
        "model_type",
        "output_attentions",
        "output_hidden_states",
        "output_router_logits",
        "router_aux_loss_coef",
        "router_jitter_noise",
        "return_dict",
        "use_return_dict",
        "torchscript",
        "id2label",
        "label2id",
        "num_labels",
        "problem_type",
        "finetuning_task",
        "task_specific_params",
        "prefix",
        "chunk_size_feed_forward",
        "tokenizer_class",
        "unsloth_version",
        "unsloth_fixed",
        "summary_activation",
        "summary_first_dropout",
        "summary_proj_to_labels",
        "summary_type",
        "summary_use_proj",
        "gradient_checkpointing",
        "name_or_path",
        "use_flash_attn",
        "max_length",
        "min_length",
        "do_sample",
        "early_stopping",
        "num_beams",
        "num_beam_groups",
        "diversity_penalty",
        "temperature",
        "top_k",
        "top_p",
        "typical_p",
        "repetition_penalty",
        "length_penalty",
        "no_repeat_ngram_size",
        "encoder_no_repeat_ngram_size",
        "bad_words_ids",
        "num_return_sequences",
        "output_scores",
        "return_dict_in_generate",
        "forced_bos_token_id",
        "forced_eos_token_id",
        "remove_invalid_values",
        "exponential_decay_length_penalty",
        "suppress_tokens",
        "begin_suppress_tokens",
        "pruned_heads",
        "tf_legacy_loss",
        "use_bfloat16",
        "mlp_dropout",
        "is_decoder",
        "is_encoder_decoder",
        "cross_attention_hidden_size",
    ]
)

_MISSING: Any = object()

#: Numbers of a config are used in fp32; this also excludes NaN and infinities, which Python's JSON accepts.
F32_MAX = 3.4028234663852886e38
#: More layers or experts than any model has, few enough to list them.
_MOST: Mapping[str, int] = dict.fromkeys(
    ("num_hidden_layers", "n_layer", "num_experts", "num_local_experts", "n_routed_experts"), 1 << 14
)

_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = _SHORT.maxlong = 80
show = _SHORT.repr  # a value out of a config, short enough for a message


class Keys:
    """A config being consumed. Every key must be read or be known inert; `finish` refuses what is left.

    `used_inert` names the inert keys that were present, for the report.
    """

    def __init__(self, config: Mapping[str, Any], where: str = "config.json") -> None:
        self._config = config
        self._seen: set[str] = set()
        self.where = where

    def has(self, name: str) -> bool:
        """Present with a value; the key is not consumed."""
        return self._config.get(name) is not None

    def get(self, name: str, default: Any = _MISSING) -> Any:
        self._seen.add(name)
        value = self._config.get(name)
        if value is None:
            if default is _MISSING:
                raise InputError(f"{self.where}: the required key {name!r} is missing")
            return default
        return value

    def _number(self, name: str, default: Any) -> Any:
        value = self.get(name, default)
        if value is default:
            return value
        if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= F32_MAX:
            raise InputError(f"{self.where}: {name} is {show(value)}, expected a number")
        return value

    def int(self, name: str, default: Any = _MISSING) -> Any:
        value = self._number(name, default)
        if value is not default and (value != int(value) or abs(value) > 2**31):
            raise InputError(f"{self.where}: {name} is {show(value)}, expected a 32-bit integer")
        return value if value is None else int(value)

    def size(self, name: str, default: Any = _MISSING) -> Any:
        """A positive integer (a dimension or a count)."""
        value = self.int(name, default)
        if value is not None and value <= 0:
            raise InputError(f"{self.where}: {name} is {value}, expected a positive integer")
        if value is not None and value > _MOST.get(name, value):
            raise InputError(f"{self.where}: {name} is {value}; no model has more than {_MOST[name]}")
        return value

    def positive(self, name: str, default: Any = _MISSING) -> Any:
        """A number above zero."""
        value = self.float(name, default)
        if value is not None and value <= 0:
            raise InputError(f"{self.where}: {name} is {value}, expected a positive number")
        return value

    def table(self, name: str) -> dict[str, Any]:
        """An object; empty where the key is absent."""
        value = self.get(name, {})
        if not isinstance(value, dict):
            raise InputError(f"{self.where}: {name} is {show(value)}, expected an object")
        return value

    def items(self, name: str, kind: type[Any]) -> list[Any] | None:
        """A list whose items are all of one type; None where the key is absent."""
        value = self.get(name, None)
        if value is not None and not (isinstance(value, list) and all(type(v) is kind for v in value)):
            raise InputError(f"{self.where}: {name} is {show(value)}, expected a list of {kind.__name__}")
        return value

    def head_dim(self, hidden: Any, heads: Any) -> Any:
        """The size of a head that no key states: `hidden` must divide evenly among `heads`."""
        if hidden < heads or hidden % heads:
            raise InputError(f"{self.where}: a hidden size of {hidden} does not divide into {heads} heads")
        return hidden // heads

    def window(self, name: str, absent: Any) -> Any:
        """A sliding window; null means none, while an absent key takes the class default `absent`."""
        return self.size(name, None) if name in self._config else absent

    def nullable(self, name: str, absent: Any) -> Any:
        """A number that null turns off, while an absent key takes the class default `absent`."""
        return self.float(name, None) if name in self._config else absent

    def float(self, name: str, default: Any = _MISSING) -> Any:
        value = self._number(name, default)
        return value if value is None else float(value)

    def flag(self, name: str, default: bool) -> bool:
        value = self.get(name, default)
        if not isinstance(value, bool):
            raise InputError(f"{self.where}: {name} is {show(value)}, expected true or false")
        return value

    def must(self, name: str, *allowed: Any, default: Any = _MISSING) -> Any:
        """A key whose other values would change the function in a way that is not implemented."""
        value = self.get(name, allowed[0] if default is _MISSING else default)
        if value not in allowed:
            options = " or ".join(repr(a) for a in allowed)
            raise UnsupportedError(f"{self.where}: {name} = {show(value)} is not supported, only {options}")
        return value

    def inert(self, *names: str) -> None:
        """Keys that this architecture has and that do not change the function at inference."""
        self._seen.update(names)

    def finish(self) -> tuple[str, ...]:
        """Names of the inert keys that were present; an unknown key is an error."""
        left = [
            k for k, v in self._config.items() if k not in self._seen and k not in INERT and v is not None
        ]
        if left:
            more = f" and {len(left) - 8} more" if len(left) > 8 else ""
            raise UnsupportedError(
                f"{self.where}: unknown key {', '.join(map(show, sorted(left)[:8]))}{more}; it may change what the "
                "model computes, so lconvert does not guess"
            )
        return tuple(sorted(k for k in self._config if k in INERT and k not in self._seen))


ACTIVATIONS: Mapping[str, str] = {
    "silu": "silu", "swish": "silu", "gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh", "relu": "relu", "relu2": "relu2",
}  # fmt: skip


def activation(keys: Keys, *names: str) -> str:
    """Canonical activation under the first of `names` that is present."""
    present = [n for n in names if keys.has(n)] or [names[0]]
    keys.inert(*names)
    value = keys.get(present[0])
    if not isinstance(value, str) or value not in ACTIVATIONS:
        raise UnsupportedError(f"{keys.where}: {present[0]} = {show(value)} is an unknown activation")
    return ACTIVATIONS[value]


def hf_activation(name: str) -> str:
    return {"gelu_tanh": "gelu_pytorch_tanh"}.get(name, name)


def rope_parameters(keys: Keys, layer_type: str | None = None) -> dict[str, Any]:
    """rope_type, rope_theta and the rest, from transformers 5's `rope_parameters` or from the older
    `rope_theta` + `rope_scaling`. `layer_type` picks one of transformers 5's per-layer-type dicts."""
    nested = keys.table("rope_parameters")
    scaling = keys.table("rope_scaling")
    theta = keys.float("rope_theta", None)
    partial = keys.float("partial_rotary_factor", None)
    if nested and scaling and scaling != nested:
        raise InputError(f"{keys.where}: rope_parameters and rope_scaling are both given and differ")
    rope = dict(scaling)
    if keys.has("rope_parameters"):
        one = layer_type is not None and layer_type in nested
        rope = dict(Keys(nested, f"{keys.where}: rope_parameters").table(str(layer_type)) if one else nested)
    kind = rope.pop("type", None)
    rope.setdefault("rope_type", kind or "default")
    if theta is not None:
        rope.setdefault("rope_theta", theta)
    if partial is not None:
        rope.setdefault("partial_rotary_factor", partial)
    return rope


def parse_rope(
    keys: Keys,
    rope: Mapping[str, Any],
    head_dim: int,
    *,
    context: int,
    layout: Literal["half", "interleaved"] = "half",
    theta: float = 10000.0,
    allowed: tuple[str, ...] = ("default", "linear", "yarn", "llama3"),
) -> Rope:
    """A Rope from `rope_parameters`; unknown types and unknown keys are errors."""
    r = Keys(rope, f"{keys.where}: rope_parameters")
    kind = r.get("rope_type")
    if kind == "su":
        kind = "longrope"
    if kind not in allowed:
        raise UnsupportedError(f"{keys.where}: rope_type {show(kind)} is not supported for this architecture")
    dim = int(head_dim * r.float("partial_rotary_factor", 1.0))
    out = Rope(theta=r.positive("rope_theta", theta), dim=dim, layout=layout)
    original = r.size("original_max_position_embeddings", keys.size("original_max_position_embeddings", None))
    match kind:
        case "linear":
            out = dataclasses.replace(out, scaling="linear", factor=r.positive("factor"))
        case "llama3":
            out = dataclasses.replace(
                out,
                scaling="llama3",
                factor=r.positive("factor"),
                low_freq_factor=r.positive("low_freq_factor"),
                high_freq_factor=r.positive("high_freq_factor"),
                original_context=original or context,
            )
            if out.low_freq_factor >= out.high_freq_factor:
                raise InputError(f"{r.where}: low_freq_factor must be less than high_freq_factor")
        case "yarn":
            out = dataclasses.replace(
                out,
                scaling="yarn",
                factor=r.positive("factor"),
                original_context=original or context,
                beta_fast=r.positive("beta_fast", 32.0),
                beta_slow=r.positive("beta_slow", 1.0),
                attention_factor=r.positive("attention_factor", None),
                mscale=r.float("mscale", 0.0),
                mscale_all_dim=r.float("mscale_all_dim", 0.0),
                truncate=r.flag("truncate", True),
            )
            if out.mscale < 0 or out.mscale_all_dim < 0:
                raise InputError(f"{r.where}: mscale and mscale_all_dim must not be negative")
        case "longrope":
            factors = {}
            for name in ("short_factor", "long_factor"):
                value = r.get(name)
                ok = isinstance(value, list) and all(type(v) in (int, float) for v in value)
                if not ok or len(value) != dim // 2 or not all(0 < v <= F32_MAX for v in value):
                    raise InputError(f"{r.where}: {name} must be a list of {dim // 2} positive numbers")
                factors[name] = tuple(float(v) for v in value)
            base = original or context
            if base < 2:
                raise InputError(
                    f"{r.where}: original_max_position_embeddings is {base}, too short for longrope"
                )
            out = dataclasses.replace(
                out,
                scaling="longrope",
                factor=r.positive("factor", context / base),
                original_context=base,
                attention_factor=r.positive("attention_factor", None),
                short_factors=factors["short_factor"],
                long_factors=factors["long_factor"],
            )
    r.finish()
    return out


def hf_rope(rope: Rope, head_dim: int, context: int) -> dict[str, Any]:
    """`rope_parameters` of transformers 5 for a Rope: the inverse of parse_rope."""
    out: dict[str, Any] = {"rope_theta": rope.theta, "rope_type": rope.scaling}
    if rope.dim != head_dim:
        out["partial_rotary_factor"] = rope.dim / head_dim
    match rope.scaling:
        case "none":
            out["rope_type"] = "default"
        case "linear":
            out["factor"] = rope.factor
        case "llama3":
            out |= {"factor": rope.factor, "low_freq_factor": rope.low_freq_factor}
            out["high_freq_factor"] = rope.high_freq_factor
        case "yarn":
            out |= {"factor": rope.factor, "beta_fast": rope.beta_fast, "beta_slow": rope.beta_slow}
            out |= {"mscale": rope.mscale} if rope.mscale else {}
            out |= {"mscale_all_dim": rope.mscale_all_dim} if rope.mscale_all_dim else {}
            out |= {} if rope.truncate else {"truncate": False}
        case "longrope":
            out |= {"short_factor": list(rope.short_factors), "long_factor": list(rope.long_factors)}
            out["factor"] = rope.factor
    if rope.original_context:
        out["original_max_position_embeddings"] = rope.original_context
    if rope.attention_factor is not None:
        out["attention_factor"] = rope.attention_factor
    return out


def yarn_mscale(factor: float, m: float = 1.0) -> float:
    """0.1 m ln(factor) + 1, what YaRN multiplies by where a context is stretched."""
    return 0.1 * m * math.log(factor) + 1.0 if factor > 1 else 1.0


def yarn_attention(rope: Rope) -> float:
    """What YaRN multiplies cos and sin by (transformers modeling_rope_utils `_compute_yarn_parameters`)."""
    if rope.attention_factor is not None:
        return rope.attention_factor
    if rope.mscale and rope.mscale_all_dim:
        return yarn_mscale(rope.factor, rope.mscale) / yarn_mscale(rope.factor, rope.mscale_all_dim)
    return yarn_mscale(rope.factor)


# --- tensor names ----------------------------------------------------------------------------------------


Layout = Literal["stacked", "grouped", "alternating"]


@dataclass(frozen=True)
class Name:
    """One tensor of the source and the canonical roles that its rows hold.

    `hf` and `roles` may contain {i} (layer) and {e} (expert); {h} in `hf` alone makes a tensor of every row of a role
    (norms of heads); {e} in `roles` alone makes one tensor (expert, out, in) of all experts. `layout` of a fused tensor:
    stacked = one part after the other; grouped = per key-value group: its query heads, then its key head, then its value
    head; alternating = a row of each part in turn (stacks of experts only). `transpose`: stored as (in, out). `block`:
    only in layers of this kind. `other`: a second spelling that checkpoints or classes use. A bias is found by replacing
    .weight with `bias`.
    """

    hf: str
    roles: tuple[str, ...]
    layout: Layout = "stacked"
    transpose: bool = False
    block: str = ""
    other: str = ""
    bias: str = ".bias"


def name(
    hf: str,
    *canonical: str,
    layout: Layout = "stacked",
    transpose: bool = False,
    block: str = "",
    other: str = "",
    bias: str = ".bias",
) -> Name:
    return Name(hf, canonical, layout, transpose, block, other, bias)


@dataclass(frozen=True)
class Bind:
    """A concrete source tensor: which of its rows are which role. `ranges` are (start, stop) row ranges.

    `row`: the tensor is this row of its only role. `experts`: it stacks so many matrices (or vectors), whose rows count on
    from one to the next. `alternating`: in each of them rows of so many parts take turns, and ranges count them part by
    part (0: they do not).
    """

    hf: str
    parts: tuple[tuple[str, tuple[tuple[int, int], ...]], ...]
    shape: tuple[int, ...]
    transpose: bool = False
    other: str = ""
    row: int | None = None
    experts: int = 0
    alternating: int = 0

    @property
    def stored(self) -> tuple[int, ...]:
        """The shape with rows first, as a matrix or a vector: experts one after another, transposition undone."""
        shape = self.shape[:-2] + self.shape[:-3:-1] if self.transpose else self.shape
        return (shape[0] * shape[1], *shape[2:]) if self.experts else shape


def _ranges(
    shapes: Mapping[str, tuple[int, ...]], parts: tuple[str, ...], layout: str, groups: int
) -> list[tuple[str, tuple[tuple[int, int], ...]]]:
    """Rows of a fused tensor that belong to each part."""
    rows = [shapes[p][0] for p in parts]
    repeat = groups if layout == "grouped" else 1
    out: dict[str, list[tuple[int, int]]] = {p: [] for p in parts}
    at = 0
    for _ in range(repeat):
        for part, n in zip(parts, rows, strict=True):
            out[part].append((at, at + n // repeat))
            at += n // repeat
    return [(p, tuple(r)) for p, r in out.items()]


def binds(names: tuple[Name, ...], d: Traits) -> Iterator[Bind]:
    """Every source tensor that a model with these traits consists of, weights and biases."""
    shapes = roles(d)
    if isinstance(d, Convnet):  # whose tensors are called as in a torch.nn.Sequential
        for role, shape in shapes.items():
            own = role.removeprefix("steps.")
            name = own if own.endswith(".bias") else own + ".weight"
            yield Bind(name, ((role, ((0, shape[0]),)),), shape)
        return

    def each_row(n: Name, role: str, i: int) -> Iterator[Bind]:
        for h in range(shapes[role][0] if role in shapes else 0):
            cols = shapes[role][1]
            yield Bind(n.hf.format(i=i, h=h), ((role, ((0, cols),)),), (cols,), row=h)

    def one(
        n: Name, parts: tuple[str, ...], groups: int, i: int = 0, e: int = 0, stack: int = 0
    ) -> Iterator[Bind]:
        assert stack or n.layout != "alternating", f"{n.hf}: only stacks of experts have parts in turns"
        hf, other = n.hf.format(i=i, e=e), n.other.format(i=i, e=e)
        for suffix in ("", ".bias"):
            found = tuple(p + suffix for p in parts if p + suffix in shapes)
            if not found:
                continue
            total = (sum(shapes[p][0] for p in found), *shapes[found[0]][1:])
            transposed = n.transpose and not suffix
            rows = tuple(_ranges(shapes, found, n.layout, groups))
            names = (x.removesuffix(".weight") + n.bias if suffix and x else x for x in (hf, other))
            bind = Bind(next(names), rows, total[::-1] if transposed else total, transposed, next(names))
            if stack:
                alternating = len(n.roles) if n.layout == "alternating" else 0
                shape = (stack, total[0] // stack, *total[1:])
                shape = (shape[0], *shape[:0:-1]) if transposed else shape
                bind = dataclasses.replace(bind, shape=shape, experts=stack, alternating=alternating)
            yield bind

    for n in names:
        if "{i}" not in n.hf:
            yield from one(n, n.roles, 1)
            continue
        for i, layer in d.each():
            if n.block not in ("", layer.block):
                continue
            if "{h}" in n.hf:
                yield from each_row(n, n.roles[0].format(i=i), i)
                continue
            experts = range(layer.mlp.experts) if isinstance(layer.mlp, Moe) else range(0)
            if "{e}" in n.roles[0] and "{e}" not in n.hf:
                every = tuple(r.format(i=i, e=e) for e in experts for r in n.roles)
                yield from one(n, every, 1, i, stack=len(experts))
                continue
            for e in experts if "{e}" in n.hf else range(1):
                parts = tuple(r.format(i=i, e=e) for r in n.roles)
                yield from one(n, parts, layer.attention.kv_heads, i, e)


_Some = TypeVar("_Some", Decoder, Encoder, Convnet, Traits)


def plausible(d: _Some, where: str, *, layers: int, experts: int) -> _Some:
    """The traits, unless they claim more layers or experts in all than the source's tensors can hold.

    Everything that lists roles costs their number: this comes first, so that a lying count costs nothing.
    """
    if isinstance(d, Convnet):
        return d
    if d.layers > layers:
        raise InputError(f"{where}: {d.layers} layers are claimed, but there are only {layers} tensors")
    claimed = sum(layer.mlp.experts for _, layer in d.each() if isinstance(layer.mlp, Moe))
    if claimed > experts:
        raise InputError(
            f"{where}: {claimed} experts in all are claimed, but the tensors hold {experts} at most"
        )
    heads = sum(layer.attention.kv_heads for _, layer in d.each())
    if heads > 1 << 20:
        raise InputError(f"{where}: {heads} key-value heads in all are claimed, which no model has")
    return d


# --- targets ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Loss:
    """A trait that a target's graph ignores or hard-codes: a model-level verdict.

    `limit`: the context up to which the artifact is exact all the same; None if there is none.
    `link`: the consumer's source line that says so. `cost`: for a small approximation, a bound on the mean KLD that it
    was measured to cost; it is recorded, where a loss with neither limit nor cost is refused.
    """

    name: str
    reason: str
    limit: int | None = None
    link: str = ""
    cost: float | None = None


def _no_keys(d: Decoder) -> dict[str, Any]:
    return {}


def _no_losses(d: Decoder) -> tuple[Loss, ...]:
    return ()


def _no_layers(config: Mapping[str, Any]) -> int:
    return 0


def _same(d: Decoder) -> Decoder:
    return d


@dataclass(frozen=True)
class Gguf:
    """llama.cpp's view of an architecture.

    arch: general.architecture. permute: q and k rows go from the half to the interleaved rotary layout.
    Norms are stored as what they multiply by (Gemma's + 1 done). names: canonical role template -> GGUF name template where
    it differs from the default; block_names: the same for layers of one block kind; fused: GGUF name -> canonical roles
    whose rows it stacks.
    keys: extra metadata without the "<arch>." prefix, as {key: (kind, value)}; None removes a default key.
    losses: what its graph cannot do. restore: the traits that are hard-coded in its graph, put back when a GGUF is
    read; it gets a Decoder made from keys and tensors alone (pre-norm, SiLU, half rotary layout where not stored).
    moe: the architecture file that stands for GGUFs of this name that have experts; sigmoid: that choose them by a sigmoid.
    scales: the graph multiplies by the ".scale" tensors of NVFP4 matrices; where not, only a scale of 1 can be carried.
    """

    arch: str
    permute: bool = False
    names: Mapping[str, str] = field(default_factory=dict)
    block_names: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    fused: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    keys: Callable[[Decoder], Mapping[str, tuple[str, Any] | None]] = _no_keys
    losses: Callable[[Decoder], tuple[Loss, ...]] = _no_losses
    restore: Callable[[Decoder], Decoder] = _same
    moe: bool = False
    sigmoid: bool = False
    scales: bool = True


#: Of encoders and convolutional networks: no file of llama.cpp is read or written for them.
NO_GGUF = Gguf("")


@dataclass(frozen=True)
class Arch:
    """An architecture: config and names both ways, and the targets' quirks.

    extra_layers: how many layers for multi-token prediction a checkpoint of this config may hold after the last one; their
    tensors are inert, as transformers does not load them.
    """

    model_type: str
    hf_class: str
    traits: Callable[[Keys], Traits]
    config: Callable[[Any], dict[str, Any]]
    names: tuple[Name, ...]
    gguf: Gguf
    traits_offset: float = 0.0  # norm offset of the Hugging Face class
    inert_tensors: tuple[str, ...] = ()  # regular expressions of source tensors that are derived or unused
    extra_layers: Callable[[Mapping[str, Any]], int] = _no_layers
