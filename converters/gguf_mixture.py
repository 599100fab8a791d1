"""Which GGUF type every tensor gets: the decisions of llama-quantize, tensor by tensor, without a file.

The result is a pure function of the tensor names and shapes, a few numbers of the model and the options, so a plan
can be made before any weight is read. It follows llama_model_quantize of llama-cpp-python 0.3.36
(src/llama-quant.cpp, lines cited) including its counters: a tensor that an option overrides does not advance them,
and so moves the pattern of the layers after it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import prod
from typing import Any, NamedTuple

from lconvert.converters.gguf_mixture_rules import (
    ALIASES,
    BUMP_OF_70B,
    CASES,
    EXACT_NAMES,
    FALLBACK,
    FLAGS,
    FRAGMENTS,
    FTYPES,
    KEPT_FRAGMENTS,
    KEPT_FRAGMENTS_BY_ARCH,
    KEPT_NAMES,
    LAYERS_OF_70B,
    NEEDS_IMATRIX,
    NOT_OFFERED,
    OUTPUT_TYPE,
    Q8_FRAGMENTS_BY_ARCH,
    TOKEN_EMBD_TYPE,
    UNQUANTIZED,
    VERY_LOW,
    WEIGHT_TYPES,
    Category,
    Ftype,
    Place,
)
from lconvert.errors import InputError, OptionError, UnsupportedError
from lconvert.formats.gguf_values import Value
from lconvert.kernels.blocks import BLOCKS

__all__ = [
    "ALIASES", "FLAGS", "FTYPES", "WEIGHT_TYPES", "Category", "Choice", "Ftype", "Hyper", "Options", "TensorInfo",
    "category", "choose_types", "find_ftype", "hyper_from_metadata", "parse_tensor_type", "tensor_order",
]  # fmt: skip

_FFN = (Category.FFN_UP, Category.FFN_GATE, Category.FFN_DOWN)
_PER_LAYER_EMBD = "per_layer_token_embd.weight"
_INTEGERS = ("u8", "i8", "u16", "i16", "u32", "i32", "u64", "i64")
_BLOCK = re.compile(r"blk\.\s*([+-]?[0-9]+)")  # what sscanf("blk.%d.") accepts at the start of a name

# Architectures whose loader changes the layer count that the file states (src/models/<arch>.cpp).
_REWRITTEN_LAYERS = ("nanbeige", "granite-switch")

# Python's re and std::regex (ECMAScript) agree on what is left when these are refused.
_NOT_ECMASCRIPT = re.compile(
    r"\(\?(?![:=!])|(?<!\\)[*+?}]\+|(?<!\\)\[\^?\]|(?<!\\)\[[^\]]*\[[:.=]|(?<!\\)\{,"
    r"|\\[ACEGHIJKLMNOPQRTUVXYZaceghijklmopqyz]"
)


class TensorInfo(NamedTuple):
    """A tensor to decide on: GGUF name, shape in NumPy order (columns last) and the type it has now."""

    name: str
    shape: tuple[int, ...]
    type: str


class Choice(NamedTuple):
    """The type a tensor gets and why."""

    type: str
    reason: str


@dataclass(frozen=True)
class Hyper:
    """The numbers of a model that the rules read, as llama.cpp holds them after loading.

    `n_layer` counts all blocks, next-token-prediction blocks (`n_layer_nextn`) included; `n_head` and `n_head_kv`
    are those of layer 0 (MLA models store n_head_kv = 1); `n_expert` is 0 for dense models.
    """

    arch: str
    n_layer: int
    n_head: int
    n_head_kv: int
    n_expert: int = 0
    n_layer_nextn: int = 0

    @property
    def gqa(self) -> int:
        """Heads per value head (llama-hparams.cpp n_gqa)."""
        return self.n_head // self.n_head_kv if self.n_head_kv else 0

    @property
    def is_70b(self) -> bool:
        """Whether llama.cpp files the model under "70B", by layers and not by parameters."""
        if self.n_layer - self.n_layer_nextn != LAYERS_OF_70B.get(self.arch):
            return False
        if self.arch in ("llama", "llama-embed"):
            return self.n_expert != 8 and self.n_head != self.n_head_kv
        return True


@dataclass(frozen=True)
class Options:
    """llama-quantize's options that decide types; type names are those of kernels.blocks.BLOCKS.

    `tensor_types` holds (regular expression, type) pairs, searched in order; see `parse_tensor_type` for the
    command line form. `imatrix` holds the tensor names that have importance data, None when there is no importance
    matrix at all. Raises OptionError.
    """

    ftype: str
    pure: bool = False
    leave_output_tensor: bool = False
    output_tensor_type: str | None = None
    token_embedding_type: str | None = None
    tensor_types: tuple[tuple[str, str], ...] = ()
    imatrix: frozenset[str] | None = None

    def __post_init__(self) -> None:
        if self.ftype not in FTYPES:
            raise OptionError(f"file type {self.ftype!r}: {_unknown_ftype(self.ftype)}")
        named = [self.output_tensor_type, self.token_embedding_type, *(t for _, t in self.tensor_types)]
        for kind in named:
            if kind is not None and kind not in WEIGHT_TYPES:
                raise OptionError(
                    f"tensor type {kind!r} cannot hold weights; use one of {', '.join(sorted(WEIGHT_TYPES))}"
                )
        for pattern, _ in self.tensor_types:
            _compiled(pattern)

    @property
    def has_imatrix(self) -> bool:
        return self.imatrix is not None


def find_ftype(text: str) -> Ftype:
    """The file type called `text` in any case: a name (`Q4_K_M`), an alias (`q4_k`) or a flag (`--q4_k_m`).

    Raises OptionError, also for the file types of llama-quantize that lconvert cannot write.
    """
    name = text.removeprefix("--").upper()
    name = ALIASES.get(name, name)
    if name not in FTYPES:
        raise OptionError(f"file type {text!r}: {_unknown_ftype(name)}")
    return FTYPES[name]


def parse_tensor_type(text: str) -> tuple[str, str]:
    """`pattern=type` as of llama-quantize --tensor-type; the pattern is lower-cased (quantize.cpp:333-336)."""
    pattern, _, kind = text.partition("=")
    if not pattern or kind.upper() not in WEIGHT_TYPES:
        raise OptionError(f"--tensor-type {text!r}: expected pattern=type, for example attn_v=q8_0")
    lowered = pattern.translate({c: c + 32 for c in range(ord("A"), ord("Z") + 1)})
    _compiled(lowered)
    return lowered, kind.upper()


def hyper_from_metadata(metadata: Mapping[str, Value]) -> Hyper:
    """The rules' numbers from the metadata of a GGUF file (llama-model.cpp load_hparams).

    Raises InputError for a missing or ill-typed key and UnsupportedError for an architecture that llama.cpp gives
    another layer count than the file states.
    """
    named = metadata.get("general.architecture")
    if named is None or not isinstance(named.data, str):
        raise InputError("general.architecture is missing from the GGUF metadata")
    arch = named.data
    if arch in _REWRITTEN_LAYERS:
        raise UnsupportedError(f"llama.cpp changes the layer count of {arch} models; no mixture rule applies")

    def number(key: str, default: int | None) -> int:
        value = metadata.get(f"{arch}.{key}")
        data: Any = value.data if value else default
        if value and value.kind == "array" and value.item in _INTEGERS and len(data):
            return int(data[0])  # per layer; the rules look at layer 0
        if data is None or (value and value.kind not in _INTEGERS):
            what = "missing" if value is None else f"of kind {value.kind}"
            raise InputError(f"{arch}.{key} is {what} in the GGUF metadata, expected an integer")
        return int(data)

    heads = number("attention.head_count", 0)
    return Hyper(
        arch,
        number("block_count", None),
        heads,
        number("attention.head_count_kv", heads),
        number("expert_count", 0),
        number("nextn_predict_layers", 0),
    )


def tensor_order(names: Sequence[str]) -> list[str]:
    """The names in the order llama-quantize visits and writes them: tensors outside blocks first, then by block
    number, then byte-wise (llama-model-loader.h:55-65)."""
    return sorted(names, key=lambda name: (_layer(name, -1), name.encode()))


def category(name: str) -> Category:
    """What kind of tensor a GGUF name stands for (:119-154)."""
    found = (c for fragment, c in FRAGMENTS if fragment in name)
    return EXACT_NAMES.get(name) or next(found, Category.OTHER)


def choose_types(tensors: Sequence[TensorInfo], hyper: Hyper, options: Options) -> dict[str, Choice]:
    """The type of every tensor, in output order.

    Raises OptionError when an option asks for what a tensor's shape cannot hold or when importance data are needed
    and missing, InputError for duplicate names, UnsupportedError for expert models whose ffn tensors name no layer.
    """
    by_name = {t.name: t for t in tensors}
    if len(by_name) != len(tensors):
        twice = next(t.name for t in tensors if sum(u.name == t.name for u in tensors) > 1)
        raise InputError(f"tensor {twice} occurs more than once")
    counters = _Counters(hyper, by_name)
    choices: dict[str, Choice] = {}
    for name in tensor_order(list(by_name)):
        tensor = by_name[name]
        choice = kept = _kept(tensor, hyper, options)
        if choice is None:
            choice = _choose(tensor, hyper, options, counters)
        if kept is None:
            _check_imatrix(tensor, choice.type, options)
        choices[name] = choice
    return choices


class _Counters:
    """How many tensors of a category there are and how many a rule has seen so far (:927-941)."""

    def __init__(self, hyper: Hyper, names: Mapping[str, object]) -> None:
        values = sum(category(name) is Category.ATTN_V for name in names)
        self.total = {Category.ATTN_V: values} | dict.fromkeys(_FFN, hyper.n_layer)
        self.seen = dict.fromkeys(self.total, 0)
        self.tied = "output.weight" not in names

    def take(self, kind: Category) -> tuple[int, int]:
        """(index, total) of the next tensor of a category; (0, 0) for a category that is not counted."""
        if kind not in self.seen:
            return 0, 0
        self.seen[kind] += 1
        return self.seen[kind] - 1, self.total[kind]


def _kept(tensor: TensorInfo, hyper: Hyper, options: Options) -> Choice | None:
    """The tensor's own type when it is never quantized (tensor_allows_quantization, :287-383)."""
    name, fragments = tensor.name, KEPT_FRAGMENTS + KEPT_FRAGMENTS_BY_ARCH.get(hyper.arch, ())
    fragment = next((f for f in fragments if f in name), None)
    # "ends with weight" is an unsigned comparison there, which every name of 5 characters passes.
    ends = name.endswith("weight") or len(name) == 5
    rows = prod(tensor.shape[:-1])
    reasons = (
        (FTYPES[options.ftype].base is None, "copied"),
        (rows <= 1, "a vector"),
        (not ends, "not named weight"),
        (options.leave_output_tensor and name == "output.weight", "output left as it is"),
        (name in KEPT_NAMES, "positions or token types"),
        (fragment is not None, f"name has {fragment!r}"),
    )
    return next((Choice(tensor.type, f"kept: {text}") for holds, text in reasons if holds), None)


def _choose(tensor: TensorInfo, hyper: Hyper, options: Options, counters: _Counters) -> Choice:
    """The type of a tensor that may be quantized (llama_tensor_get_type, :716-773)."""
    base = FTYPES[options.ftype].base
    assert base is not None, "COPY keeps every tensor"
    kind = category(tensor.name)
    manual = next((t for pattern, t in options.tensor_types if _compiled(pattern).search(tensor.name)), None)
    if kind is Category.TOKEN_EMBD and options.token_embedding_type:
        # The per-layer table is large, so naming it overrides the option for embeddings (:721-737).
        if manual is None or tensor.name != _PER_LAYER_EMBD:
            return _fits(tensor, Choice(options.token_embedding_type, "token embedding option"))
    elif kind is Category.OUTPUT and options.output_tensor_type:
        return _fits(tensor, Choice(options.output_tensor_type, "output option"))
    if base in UNQUANTIZED:
        return Choice(base, "file type")
    if manual is not None:
        choice = Choice(manual, "tensor type option")
    elif options.pure:
        choice = Choice(base, "pure")
    else:
        choice = _mixture(tensor, kind, base, hyper, options, counters)
    return _fallback(tensor, choice)


def _mixture(
    tensor: TensorInfo, kind: Category, base: str, hyper: Hyper, options: Options, counters: _Counters
) -> Choice:
    """The file type's own rule for a tensor (llama_tensor_get_type_impl, :446-713)."""
    name, ftype = tensor.name, options.ftype
    if any(fragment in name for fragment in Q8_FRAGMENTS_BY_ARCH.get(hyper.arch, ())):
        return Choice("Q8_0", f"{hyper.arch} keeps this at Q8_0")
    if kind is Category.OUTPUT or (kind is Category.TOKEN_EMBD and counters.tied):
        return _output(tensor, base, hyper, options)
    if ftype == "MXFP4_MOE":
        # bailingmoe3 has 3-D attention tensors, so there only ffn tensors count as experts.
        expert = _experts(tensor) > 1 and (hyper.arch != "bailingmoe3" or kind in _FFN)
        return Choice("MXFP4", "experts") if expert else Choice("Q8_0", "not an expert")
    if kind is Category.TOKEN_EMBD:
        return Choice(TOKEN_EMBD_TYPE.get(ftype, base), "token embedding")
    i, n = counters.take(kind)
    if kind in _FFN and ftype not in VERY_LOW and hyper.n_expert > 1:
        i = _expert_layer(name, n)
    place = Place(i, n, hyper.arch == "falcon", hyper.gqa, hyper.n_expert, options.has_imatrix)
    cases = CASES[kind].get(ftype, ())
    when, found = next(((w.text, t) for w, t in cases if w.test(place)), ("", None))
    result = found or base
    reason = kind.value + (f": {when}" if when and found else "")
    if kind is Category.ATTN_V and hyper.is_70b and ftype not in VERY_LOW and result in BUMP_OF_70B:
        return Choice(BUMP_OF_70B[result], f"{kind.value}: 70B")
    return Choice(result, reason)


def _output(tensor: TensorInfo, base: str, hyper: Hyper, options: Options) -> Choice:
    """The rule for the output projection, or the embedding that serves as one (:490-511)."""
    reason = "output" if tensor.name == "output.weight" else "embedding tied to the output"
    if options.output_tensor_type:
        return Choice(options.output_tensor_type, f"{reason}: output option")
    if hyper.arch == "falcon" or tensor.shape[-1] % BLOCKS[base].elems:
        return Choice("Q8_0", reason)
    return Choice(OUTPUT_TYPE.get(options.ftype, "Q6_K"), reason)


def _fallback(tensor: TensorInfo, choice: Choice) -> Choice:
    """A type whose blocks divide the columns (tensor_type_fallback, :390-443)."""
    columns, block = tensor.shape[-1], BLOCKS[choice.type].elems
    if columns % block == 0:
        return choice
    if choice.type not in FALLBACK and block > 32:
        return _fits(tensor, choice)
    smaller = FALLBACK.get(choice.type, choice.type)
    result = "F16" if columns % BLOCKS[smaller].elems else smaller
    return Choice(result, f"{choice.reason}; {columns} columns are not whole blocks of {choice.type}")


def _fits(tensor: TensorInfo, choice: Choice) -> Choice:
    """A type that an option fixes, for which there is no fallback; llama.cpp aborts where this raises."""
    columns, block = tensor.shape[-1], BLOCKS[choice.type].elems
    if columns % block:
        raise OptionError(
            f"tensor {tensor.name} has {columns} columns, not a multiple of the {block} that {choice.type} "
            f"({choice.reason}) needs; choose another type for it"
        )
    return choice


def _check_imatrix(tensor: TensorInfo, target: str, options: Options) -> None:
    """Refuse a type that is noise without importance data (:852-876, :1129-1146, :1301-1307)."""
    if category(tensor.name) in (Category.OUTPUT, Category.TOKEN_EMBD):
        return
    if not (target in NEEDS_IMATRIX or (target == "Q2_K" and options.ftype == "Q2_K_S")):
        return
    if options.imatrix is None:
        raise OptionError(
            f"tensor {tensor.name} gets {target}, which needs an importance matrix; pass one with --imatrix "
            "or choose another file type"
        )
    if target != tensor.type and tensor.name not in options.imatrix:
        raise OptionError(
            f"the importance matrix has no entry for tensor {tensor.name}, which gets {target}; compute one that "
            "covers it or give the tensor another type"
        )


def _experts(tensor: TensorInfo) -> int:
    return tensor.shape[-3] if len(tensor.shape) > 2 else 1


def _layer(name: str, default: int) -> int:
    found = _BLOCK.match(name)
    return int(found[1]) if found else default


def _expert_layer(name: str, n_layer: int) -> int:
    """The layer in the name: expert models may split a layer's ffn, so counting does not give it (:456-470)."""
    layer = _layer(name, -1)
    if not 0 <= layer < n_layer:
        raise UnsupportedError(
            f"tensor {name} of an expert model names no layer below {n_layer}; llama.cpp's rules need one"
        )
    return layer


def _unknown_ftype(name: str) -> str:
    return NOT_OFFERED.get(name) or f"unknown; use one of {', '.join((*FTYPES, *ALIASES))}"


@lru_cache(maxsize=256)
def _compiled(pattern: str) -> re.Pattern[str]:
    """A --tensor-type pattern, restricted to what Python and llama.cpp's std::regex read alike."""
    if _NOT_ECMASCRIPT.search(pattern):
        raise OptionError(f"tensor type pattern {pattern!r} is not a plain ECMAScript regular expression")
    try:
        return re.compile(pattern, re.ASCII)
    except re.error as e:
        raise OptionError(f"tensor type pattern {pattern!r} is not a regular expression: {e}") from None
