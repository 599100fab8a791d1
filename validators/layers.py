"""Where does an artifact go wrong? Hidden states after every decoder layer, the original's against the artifact's.

Two errors per layer. *Cumulative*: the artifact's hidden state against the original's, which grows from the first
mistake on. *Own*: the artifact's layer on the original's input, against what the layer adds to that input, so that no
layer is blamed for what came before it. What an own error may be is not guessed: the original's weights, rounded
plainly to the artifact's storage types, go the same way, and a layer is broken where the artifact's error is beyond that.
The artifact runs with its own traits, as its file states them.
"""

from __future__ import annotations

import gc
import tempfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lconvert import kernels
from lconvert.archs import find
from lconvert.archs.common import Loss
from lconvert.archs.llamacpp import map_layers
from lconvert.errors import InputError
from lconvert.formats.gguf_blocks import native_type
from lconvert.forward import Forward
from lconvert.ir import Entry, Model, QTensor, Tensor
from lconvert.kernels.blocks import BLOCKS
from lconvert.kernels.qtensor import values
from lconvert.validators.tensors import SLOW, finite, norm_shift
from lconvert.validators.tensors import compare as compare_weights
from lconvert.validators.traits import differences, same_shapes

#: Positions at the end of the text for which logits are compared: bounds memory at large vocabularies.
HEAD_POSITIONS = 64
#: A layer is broken when its own error is more than so many times that of plain rounding to the same types. Measured on
#: good artifacts: 1.000 without importance weights, at most 1.054 with them (every type, nine trained models) ...
LIMIT = 1.25
#: ... and more than this. Measured with F32 weights: exactly 0 in 84 models of 16 architectures; F16 ones 3e-6.
FLOOR = 2e-5


@dataclass(frozen=True)
class LayerError:
    """`layer` is a number, "embed" (what enters layer 0) or "head" (final norm and logits of the last positions).

    relative_error: |h_a - h_o| / |h_o| of each token's vector, root mean square over tokens; logits are centred first.
    cosine: mean over tokens. max_difference: of any element. input_relative_error: relative_error of the layer's input.
    own_error: the same layer on the original's input, relative to what the original's layer adds to its input (embed
    and head: to the vector itself). explained_error: own error of the original's weights rounded to the artifact's types.
    tensors: in a broken layer, the tensors whose weights are further from the original's than their type explains.
    """

    layer: int | str
    relative_error: float
    cosine: float
    max_difference: float
    input_relative_error: float
    own_error: float
    explained_error: float
    broken: bool
    tensors: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        return {**vars(self), "tensors": list(self.tensors)}


@dataclass(frozen=True)
class LayerReport:
    """Layers in the order in which they act, "embed" first and "head" last; differences: traits that are not the same."""

    reference: str
    tokens: int
    layers: tuple[LayerError, ...]
    differences: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def broken(self) -> tuple[int | str, ...]:
        return tuple(x.layer for x in self.layers if x.broken)

    @property
    def first_broken(self) -> int | str | None:
        return next(iter(self.broken), None)

    def to_json(self) -> dict[str, Any]:
        return {
            "reference": self.reference,
            "tokens": self.tokens,
            "layers": [x.to_json() for x in self.layers],
            "first_broken": self.first_broken,
            "broken": list(self.broken),
            "differences": list(self.differences),
            "notes": list(self.notes),
        }


def compare(
    original: Model,
    artifact: Model,
    ids: list[int],
    progress: Callable[[], None] = lambda: None,
) -> LayerReport:
    """Both models on one text of `ids`, layer by layer in fp32.

    Memory: the embedding, the head and one decoder layer in fp32, its activations and the logits of HEAD_POSITIONS
    tokens; the original's hidden states, 4 * (layers + 1) * tokens * hidden bytes, lie in a temporary file. The text is cut to the length within
    which the artifact is exact (`Loss.limit`). Raises InputError for models of different shape.
    """
    same_shapes(original, artifact)
    losses = find(original.arch.family).gguf.losses(original.decoder) if _is_gguf(artifact) else ()
    candidate = _runnable(original, artifact, losses)
    ids = ids[: min((loss.limit for loss in losses if loss.limit), default=None)]
    if not ids:
        raise InputError("no tokens to compare layers on")
    expected = original.with_entries(dict(_rounded(original, artifact)))
    with tempfile.TemporaryDirectory(prefix="lconvert-") as folder:
        shape = (original.decoder.layers + 1, len(ids), original.decoder.hidden)
        states = np.lib.format.open_memmap(Path(folder, "states.npy"), "w+", np.float32, shape)
        logits = _record(Forward(original), ids, states, progress)
        gc.collect()  # a Forward and its hooks refer to each other; its embedding and head would stay
        found = _replay(Forward(candidate), ids, states, logits, progress)
        gc.collect()
        explained = _replay(Forward(expected), ids, states, logits, progress)
        del states
    layers = []
    before = 0.0
    for (name, cumulative, own), (_, _, plain) in zip(found, explained, strict=True):
        broken = not own.relative <= max(LIMIT * plain.relative, FLOOR)
        tensors = tuple(_suspects(original, artifact, expected, name)) if broken else ()
        layers.append(
            LayerError(
                layer=name,
                relative_error=cumulative.relative,
                cosine=cumulative.cosine,
                max_difference=cumulative.largest,
                input_relative_error=before,
                own_error=own.relative,
                explained_error=plain.relative,
                broken=broken,
                tensors=tensors,
            )
        )
        before = cumulative.relative
    return LayerReport(
        reference=str(original.source),
        tokens=len(ids),
        layers=tuple(layers),
        differences=tuple(_unaccepted(differences(original.decoder, artifact.decoder), losses)),
        notes=tuple(f"{loss.name}: {loss.reason}" for loss in losses),
    )


def _runnable(original: Model, artifact: Model, losses: tuple[Loss, ...]) -> Model:
    """The artifact in its own traits; but an approximation with a known cost (the tanh GELU for the exact one) is run
    as the original's, or every layer would be named for it."""
    if all(loss.cost is None for loss in losses):
        return artifact
    activation = original.decoder.default.mlp.activation
    arch = map_layers(artifact.decoder, lambda x: replace(x, mlp=replace(x.mlp, activation=activation)))
    return replace(artifact, arch=arch, config=find(arch.family).config(arch))


#: The trait in which a model that was converted with a loss differs.
_TRAIT_OF: Mapping[str, str] = {"sliding_window": "attention.window", "gelu_erf": "mlp.activation"}


def _unaccepted(found: list[str], losses: tuple[Loss, ...]) -> Iterator[str]:
    """Differences but those of losses that are bounded: exact up to a context, or with a known cost."""
    bounded = [_TRAIT_OF.get(x.name, "") for x in losses if x.limit is not None or x.cost is not None]
    for line in found:
        if not any(trait and f"{trait}: " in line for trait in bounded):
            yield line


def _is_gguf(model: Model) -> bool:
    return str(model.source).endswith(".gguf")


# --- running ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Error:
    relative: float
    cosine: float
    largest: float


def _first(output: Any) -> Any:
    """The hidden states among a layer's outputs."""
    return output[0] if isinstance(output, tuple) else output


def _record(
    forward: Forward, ids: list[int], states: NDArray[np.float32], progress: Callable[[], None]
) -> NDArray[np.float32]:
    """Fill `states` with what enters layer 0 and what leaves each layer; returns the last positions' logits."""

    def keep(i: int) -> Callable[..., None]:
        def hook(layer: Any, args: Any, output: Any) -> None:
            if i == 0:
                states[0] = args[0][0].float().numpy()
            states[i + 1] = _first(output)[0].float().numpy()
            progress()

        return hook

    handles = [layer.register_forward_hook(keep(i)) for i, layer in enumerate(forward.layers)]
    logits: NDArray[np.float32] = _head(forward, ids)[0]
    for handle in handles:
        handle.remove()
    return logits


def _replay(
    forward: Forward,
    ids: list[int],
    states: NDArray[np.float32],
    logits: NDArray[np.float32],
    progress: Callable[[], None],
) -> list[tuple[int | str, _Error, _Error]]:
    """(layer, cumulative, own) errors of a model against recorded states.

    While a layer's weights are there, it runs a second time on the recorded input. After the last layer the recorded
    states join as a second text, so that one pass through the head gives both of its errors.
    """
    import torch

    found: list[tuple[int | str, _Error, _Error]] = []
    last = len(forward.layers) - 1

    def judge(i: int) -> Callable[..., Any]:
        def hook(layer: Any, args: Any, kwargs: Any, output: Any) -> Any:
            if i == 0:
                entered = _error(args[0][0].float().numpy(), states[0])
                found.append(("embed", entered, entered))
            given = torch.from_numpy(np.array(states[i]))[None]
            alone = _first(layer.forward(given, *args[1:], **kwargs))[0].float().numpy()
            through = _first(output)
            own = _error(alone, states[i + 1], states[i + 1] - states[i])
            found.append((i, _error(through[0].float().numpy(), states[i + 1]), own))
            progress()
            if i < last:
                return None
            both = torch.cat([through, torch.from_numpy(np.array(states[i + 1]))[None]])
            return (both, *output[1:]) if isinstance(output, tuple) else both

        return hook

    for i, layer in enumerate(forward.layers):  # before Forward's own hook, which drops the weights
        layer.register_forward_hook(judge(i), prepend=True, with_kwargs=True)
    through, alone = _head(forward, ids)
    found.append(("head", _error(through, logits), _error(alone, logits)))
    return found


def _head(forward: Forward, ids: list[int]) -> NDArray[np.float32]:
    """Centred fp32 logits (texts, last positions, vocabulary) of one pass."""
    import torch

    with torch.no_grad():
        out = forward.module(torch.tensor([ids]), use_cache=False, logits_to_keep=HEAD_POSITIONS).logits
    logits: NDArray[np.float32] = out.float().numpy()
    logits -= logits.mean(axis=-1, keepdims=True)
    return logits


def _error(
    found: NDArray[np.float32], wanted: NDArray[np.float32], scale: NDArray[np.float32] | None = None
) -> _Error:
    """Of (tokens, width) against `wanted`, relative to `scale` (default: `wanted`), token by token."""
    a, b = found.astype(np.float64), np.asarray(wanted, np.float64)
    wrong = np.linalg.norm(a - b, axis=-1)
    norm = np.linalg.norm(b, axis=-1)
    size = norm if scale is None else np.linalg.norm(np.asarray(scale, np.float64), axis=-1)
    ratio = np.divide(wrong, size, out=np.where(wrong > 0, np.inf, 0.0), where=size > 0)
    lengths = np.linalg.norm(a, axis=-1) * norm
    dots = (a * b).sum(axis=-1)
    cosine = np.divide(dots, lengths, out=np.where(wrong > 0, 0.0, 1.0), where=lengths > 0)
    return _Error(
        relative=finite(np.sqrt(np.mean(ratio**2))),
        cosine=finite(cosine.mean()),
        largest=finite(np.abs(a - b).max()),
    )


# --- what storage types explain --------------------------------------------------------------------------

#: A type of b bits per weight moves weights by about this times 2^-b of their size (measured: 1.4 to 2.3): noise of this
#: size takes the place of types whose encoders need minutes for a large model.
_NOISE = 2.0

Read = Callable[[int, int], NDArray[np.float32]]


def _type(data: Tensor | QTensor) -> str:
    if isinstance(data, QTensor):
        return native_type(data) or ""
    return data.dtype


def _rounded(original: Model, artifact: Model) -> Iterator[tuple[str, Entry]]:
    """The original's entries, rounded without calibration to the types in which the artifact stores them."""
    for role, entry in artifact.entries.items():
        source, type_ = original.entries[role], _type(entry.data)
        if type_ in ("F32", _type(source.data)):
            continue
        if type_ in BLOCKS and type_ not in SLOW:
            read = _plain(source.data, type_)
        else:
            assert isinstance(entry.data, QTensor)
            bits = BLOCKS[type_].bits_per_weight if type_ else entry.data.grid.bits
            read = _noisy(source.data, bits, role)
        yield role, replace(source, data=Tensor(source.shape, "F32", read, source.data.origin))


def _plain(data: Tensor | QTensor, type_: str) -> Read:
    """Rows through ggml's own encoder of a type, without importance weights."""

    def read(start: int, stop: int) -> NDArray[np.float32]:
        rows = values(data, start, stop)
        x = rows.reshape(1, -1) if rows.ndim == 1 else rows
        return kernels.dequantize(type_, kernels.quantize(type_, x), x.shape[1]).reshape(rows.shape)

    return read


def _noisy(data: Tensor | QTensor, bits: float, role: str) -> Read:
    """Rows with as much noise as a type of so many bits per weight makes; the same noise every time."""

    def read(start: int, stop: int) -> NDArray[np.float32]:
        rows = values(data, start, stop)
        rng = np.random.default_rng([zlib.crc32(role.encode()), start])
        size = np.sqrt(np.mean(np.square(rows), axis=-1, keepdims=True))
        noise: NDArray[np.float32] = rng.standard_normal(rows.shape, np.float32)
        noise *= np.float32(_NOISE * 2.0**-bits) * size
        return rows + noise

    return read


_PARTS: Mapping[int | str, tuple[str, ...]] = {
    "embed": ("embed", "pos_embed"),
    "head": ("norm", "norm.bias", "head", "head.bias"),
}


def _suspects(original: Model, artifact: Model, expected: Model, layer: int | str) -> Iterator[str]:
    """Roles of a layer whose weights differ by more than the same rounding of the original's does."""
    tied = ("embed",) if layer == "head" and original.decoder.tied else ()
    for role, entry in artifact.entries.items():
        if role not in (*_PARTS.get(layer, ()), *tied) and not role.startswith(f"layers.{layer}."):
            continue
        source = original.entries[role].data
        shift = norm_shift(role, artifact, original)
        found = compare_weights(role, entry.data, source, shift).relative_error
        plain = compare_weights(role, expected.entries[role].data, source).relative_error
        if found is None or plain is None or not found <= max(LIMIT * plain, FLOOR):
            yield role
