"""What a quantized checkpoint format is to the reader of Hugging Face folders, and what it is made of.

A format module (gptq, awq, compressed_tensors ...) has `parse(Checkpoint) -> Scheme`: it reads the
`quantization_config` and any side file, and then turns the stored tensors of one linear module at a time into
the IR's QTensor. `find` picks the module by `quant_method`. Nothing here knows a model: modules are names and shapes.

Writers are the other direction: a `Writer` says why it cannot hold a QTensor as it stands, lays it out, and states it in
the words of the format's config.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from numpy.typing import NDArray

from lconvert.errors import InputError, UnsupportedError
from lconvert.formats.files import show
from lconvert.ir import ActSpec, KVSpec, QTensor, Tensor, Transform


@dataclass(frozen=True)
class Part:
    """One stored tensor of a module.

    dtype: its safetensors type. data: its rows, lazily; 8-bit floats come as their bytes (U8). columns(start, stop): all
    rows of these columns of a matrix, for formats that pack along the first axis. where: file and name, for messages.
    """

    dtype: str
    data: Tensor
    columns: Callable[[int, int], NDArray[Any]]
    where: str

    @property
    def shape(self) -> tuple[int, ...]:
        return self.data.shape


@dataclass(frozen=True)
class Checkpoint:
    """What a format may look at besides the tensors of one module.

    where: the file that holds `config` (the quantization_config, verbatim). metadata: of all safetensors headers.
    names: every tensor name of the checkpoint.
    """

    where: str
    config: Mapping[str, Any]
    folder: Path
    metadata: Mapping[str, str] = field(default_factory=dict)
    names: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Weight:
    """The weight of one module: its numbers, how its input is quantized, what is done to the input first.

    used: the suffixes of all tensors that went into it; a stored tensor that is in none is an error of the reader.
    inert: suffixes of tensors that are there and change nothing (zero points of a symmetric format that equal the grid's
    middle are *used*, not inert).
    """

    data: Tensor | QTensor
    used: frozenset[str]
    activation: ActSpec | None = None
    transform: Transform | None = None
    inert: frozenset[str] = frozenset()


class Scheme(Protocol):
    """A quantization config, understood."""

    @property
    def method(self) -> str:
        """Short name for messages and provenance, such as "gptq 4 bit, group 32"."""

    @property
    def report(self) -> tuple[str, ...]:
        """What the reader should tell: inert keys of the config, assumptions."""

    @property
    def kv(self) -> KVSpec | None:
        """The KV cache's quantization without its scales, which the reader collects; None where there is none."""

    def weight(self, module: str, parts: Mapping[str, Part], shape: tuple[int, ...]) -> Weight | None:
        """The weight of `module` (such as model.layers.0.mlp.up_proj), of logical shape (out, in).

        parts: every stored tensor below the module by its suffix ("qweight", "weight.absmax", "bias"). None: the
        module is not quantized and holds a plain `weight`. Raises InputError for tensors that contradict the
        config, UnsupportedError for what has no exact meaning in the IR.
        """


#: quant_method -> the format module that reads it.
METHODS: Mapping[str, str] = {
    "gptq": "gptq",
    "awq": "awq",
    "auto-round": "autoround",
    "intel/auto-round": "autoround",
    "compressed-tensors": "compressed_tensors",
    "modelopt": "modelopt",
    "modelopt_fp4": "modelopt",
    "fp8": "fp8",
    "fbgemm_fp8": "fp8",
    "mxfp4": "mxfp4_blocks",
    "bitsandbytes": "bitsandbytes",
    "hqq": "hqq",
    "torchao": "torchao",
    "quark": "quark",
    "bitnet": "bitnet",
}

#: Methods whose layout no library here can verify, and what their users can do.
REFUSED: Mapping[str, str] = {
    "aqlm": "additive codebooks of vectors have no exact grid in the IR",
    "quip": "its weights are codebook entries behind a Hadamard transform",
    "exl2": "its layout is private to ExLlamaV2",
    "exl3": "its trellis codes are private to ExLlamaV3",
    "vptq": "its weights are vector codebooks",
    "spqr": "its outliers and bilevel statistics have no verified layout",
    "higgs": "its weights are vector codebooks behind a Hadamard transform",
    "eetq": "its int8 weights are interleaved for one GPU kernel",
    "quanto": "its tensors are stored without a documented layout",
}


def find(checkpoint: Checkpoint) -> Scheme:
    """The scheme of a checkpoint by its `quant_method`; UnsupportedError names the methods there are."""
    method = checkpoint.config.get("quant_method")
    if not isinstance(method, str):
        raise InputError(
            f"{checkpoint.where}: quantization_config has no quant_method; add the one that wrote the model"
        )
    if method in REFUSED:
        raise UnsupportedError(
            f"{checkpoint.where}: quant_method {show(method)} cannot be read: {REFUSED[method]}. Dequantize it with the tool "
            "that wrote it and give the plain checkpoint"
        )
    if method not in METHODS:
        known = ", ".join(dict.fromkeys(METHODS))
        raise UnsupportedError(f"{checkpoint.where}: unknown quant_method {show(method)}; known are {known}")
    module = importlib.import_module(f"lconvert.formats.{METHODS[method]}")
    scheme: Scheme = module.parse(checkpoint)
    return scheme


# --- what format modules share ---------------------------------------------------------------------------


def take(
    module: str, parts: Mapping[str, Part], suffix: str, dtypes: Iterable[str], shape: tuple[int, ...]
) -> Part:
    """The stored tensor `module.suffix`, which must have one of `dtypes` and `shape` (-1 is any length)."""
    part = parts.get(suffix)
    if part is None:
        raise InputError(
            f"{module}: the tensor {suffix} is missing; the checkpoint is incomplete, download it again"
        )
    wanted = tuple(dtypes)
    if part.dtype not in wanted:
        raise InputError(f"{part.where}: is stored as {part.dtype}, expected {' or '.join(wanted)}")
    fits = len(part.shape) == len(shape) and all(b in (-1, a) for a, b in zip(part.shape, shape, strict=True))
    if not fits:
        raise InputError(
            f"{part.where}: has shape {part.shape}, but the configuration implies {shape}; config.json and the weights do "
            "not belong together"
        )
    return part


def listed(parts: Iterable[str]) -> str:
    """The suffixes of stored tensors as they may appear in a message, whatever a file calls them and however many there are."""
    names = sorted(parts)
    more = f" and {len(names) - 8} more" if len(names) > 8 else ""
    return ", ".join(show(n)[1:-1] for n in names[:8]) + more


def groups(module: str, cols: int, size: int) -> int:
    """Number of groups of `size` along `cols` inputs (-1: one); InputError where they do not divide."""
    if size == -1:
        return 1
    if size <= 0 or cols % size:
        raise InputError(f"{module}: {cols} input features do not divide into groups of {size}")
    return cols // size


def finite_scales(scale: Tensor) -> Tensor:
    """The scales, every read of which is checked: NaN, infinities and negative zero are damage, not numbers."""
    import numpy as np

    from lconvert.ir import as_f32

    def read(start: int, stop: int) -> NDArray[Any]:
        found = scale.read(start, stop)
        x = as_f32(found, scale.dtype)
        bad = ~np.isfinite(x) | ((x == 0) & np.signbit(x))
        if bad.any():
            row = int(np.nonzero(bad.reshape(x.shape[0], -1).any(axis=1))[0][0])
            value = x.reshape(x.shape[0], -1)[row][bad.reshape(x.shape[0], -1)[row]][0]
            raise InputError(
                f"{scale.origin}: the scale {value} in row {start + row} is damaged; download the file again"
            )
        return found

    return Tensor(scale.shape, scale.dtype, read, scale.origin, scale.files)


def view(
    like: Tensor, shape: tuple[int, ...], dtype: str, read: Callable[[int, int], NDArray[Any]]
) -> Tensor:
    """A Tensor computed out of `like`: its origin and files, another shape and reader."""
    return Tensor(shape, dtype, read, like.origin, like.files)  # type: ignore[arg-type]


@dataclass(frozen=True)
class Stored:
    """One tensor to be written: safetensors type, shape, and rows on demand.

    whole: the rows depend on all of the weight (packed along the first axis), so they are made in one piece.
    """

    dtype: str
    shape: tuple[int, ...]
    read: Callable[[int, int], NDArray[Any]] = field(repr=False, compare=False)
    whole: bool = False


@dataclass(frozen=True)
class Held:
    """What a module of the artifact holds: a quantized weight with its activations, or nothing quantized (None)."""

    weight: QTensor | None
    activation: ActSpec | None = None
    transform: Transform | None = None


class Writer(Protocol):
    """The other direction: one format as a target. Which QTensors it is given is the converter's business."""

    @property
    def kv_names(self) -> tuple[str, str]:
        """Names of the KV cache's scales with {attn} for the attention module: "{attn}.k_scale", "{attn}.v_scale"."""

    def problem(self, held: Held) -> str | None:
        """Why the format cannot hold exactly these codes and side values, in words; None if it can."""

    def store(self, held: Held) -> dict[str, Stored]:
        """The tensors of one module by suffix. Only for what has no `problem`."""

    def config(self, modules: Mapping[str, Held], kv: KVSpec | None) -> dict[str, Any]:
        """The quantization_config of config.json: every linear module of the model by name, the plain ones with None."""

    def side_files(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """Further JSON files that loaders look for, by name (quantize_config.json, hf_quant_config.json)."""
