"""Does the artifact hold the numbers of a source that is quantized itself?

`expected` restates the source as the artifact's kind of file has to (scales of inputs folded, act-order absorbed): the same
function, whose entries the artifact's must equal. `judge` says of every entry how it is held: exact, rounded (a scale in a narrower
type, or the reciprocal of a global one), requantized (on another grid, every code the nearest), or differs. Where a manifest
promises exactness nothing else counts. `settings` compares what no value shows: how activations and caches are quantized.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lconvert.converters import act_order, fold, gguf, gguf_carry
from lconvert.converters.regrid import holds, numbers
from lconvert.formats.gguf_blocks import native_type
from lconvert.ir import ActSpec, Decoder, Model, QTensor, Tensor, Transform, as_f32
from lconvert.kernels.qtensor import values
from lconvert.plan import KINDS
from lconvert.validators import codes
from lconvert.validators.slabs import slabs
from lconvert.validators.tensors import TensorRow

#: What a scale rounded to 16 bits moves a value by, relatively: half a unit in the last place of BF16, and the product's rounding.
ROUNDED = 2.0**-8 * 1.01
#: The same where a global scale became its reciprocal in fp32, and values were multiplied in another order.
_RECIPROCAL = 2.0**-21


def is_quantized(model: Model) -> bool:
    """Whether a model states any quantization: of weights, of activations or of its caches."""
    entries = model.entries.values()
    return model.kv is not None or any(isinstance(e.data, QTensor) or e.activation for e in entries)


def expected(source: Model, artifact: Model, kind: str) -> Model:
    """The source restated for this kind of artifact: gguf, lcir, onnx or hf. What the artifact still states stays as it is."""
    if not is_quantized(source):
        return source
    if kind == "gguf":
        return gguf.without_extras(source)[0]
    if kind == "onnx" or not isinstance(source.arch, Decoder):
        # scales of inputs are in the graph, or in plain values; so are orders of columns
        return _materialized(source, artifact)
    entries = artifact.entries.values()
    if not any(isinstance(e.data, QTensor) for e in entries):
        return fold.materialized(source)[0]
    model = source if any(_unfolded(e.transform) for e in entries) else fold.transforms(source).model
    model = _materialized(model, artifact)
    ordered = any(isinstance(e.data, QTensor) and e.data.g_idx is not None for e in entries)
    return model if ordered else act_order.absorb(model)[0]


def _unfolded(t: Transform | None) -> bool:
    """Whether something is done to an input; a scale of ones, which TensorRT-LLM wants to see, does nothing."""
    return t is not None and not t.folded and (t.param is None or not bool((_number(t.param) == 1).all()))


def _materialized(model: Model, artifact: Model) -> Model:
    """Scales of inputs that the artifact has no longer multiplied into the values."""
    left = {
        role: e
        for role, e in model.entries.items()
        if _unfolded(e.transform) and not _unfolded(artifact.entries[role].transform)
    }
    return model.with_entries(fold.materialized(replace(model, entries=left))[0].entries) if left else model


# --- values ------------------------------------------------------------------------------------------------


def promised(manifest: Mapping[str, Any]) -> dict[str, str]:
    """The worst verdict of the tensors that hold a canonical role, by role, as the manifest recorded it."""
    out: dict[str, str] = {}
    for file in manifest.get("plan", {}).get("files", ()):
        for item in file.get("tensors", ()):
            kind = str(item.get("verdict", {}).get("kind"))
            for role in item.get("sources", ()):
                if kind in KINDS:
                    out[role] = max(out.get(role, "exact"), kind, key=KINDS.index)
    return out


def judged(
    table: Sequence[TensorRow], artifact: Model, source: Model, wanted: Model, promises: Mapping[str, str]
) -> tuple[TensorRow, ...]:
    """The table with `carried` for every entry that is quantized in the source. wanted: the source as `expected` restates it."""
    return tuple(
        replace(row, carried=_judge(row, artifact, wanted, promises.get(row.name)))
        if isinstance(source.entries[row.name].data, QTensor)
        else row
        for row in table
    )


def _judge(row: TensorRow, artifact: Model, wanted: Model, promise: str | None) -> str:
    data, original = artifact.entries[row.name].data, wanted.entries[row.name].data
    if row.exact:
        return "exact"
    if isinstance(data, Tensor):  # dequantized: the values, rounded to nearest
        return "rounded" if row.kept and promise not in ("exact", "widened") else "differs"
    if promise in ("exact", "widened"):
        return "differs"
    if isinstance(original, Tensor):  # its values times the scale of its input, which are on no grid
        return "requantized" if _nearest(row, data, original) else "differs"
    may = promise == "rounded" or (promise is None and _narrower(data, original))
    if may and _close(data, original):
        return "rounded"
    if promise == "rounded":
        return "differs"
    return "requantized" if _another_grid(data, original) and _nearest(row, data, original) else "differs"


def _narrower(data: QTensor, original: QTensor) -> bool:
    """Whether the artifact's scales fit a short type that the source's do not, so that these had to be rounded."""
    a, b = data.scale, original.scale
    if isinstance(a, QTensor) and isinstance(b, QTensor):
        if a.divisor != b.divisor:
            return True  # `_close` allows the reciprocal its last bits
        a, b = a.scale, b.scale
    if isinstance(a, QTensor) or isinstance(b, QTensor):
        return True  # several levels made into one, or one into several
    return any(
        a.dtype in (short, "F32") and holds(a, short) and not holds(b, short) for short in ("BF16", "F16")
    )


def _close(data: QTensor, original: QTensor) -> bool:
    turned = isinstance(data.scale, QTensor) and isinstance(original.scale, QTensor)
    turned = turned and data.scale.divisor != original.scale.divisor  # type: ignore[union-attr]
    limit = _RECIPROCAL if turned else ROUNDED
    for start, stop in slabs(data.shape):
        a, b = values(data, start, stop), values(original, start, stop)
        if not (np.abs(a.astype(np.float64) - b) <= limit * np.abs(b)).all():
            return False
    return True


def _another_grid(data: QTensor, original: QTensor) -> bool:
    """Whether the artifact's grid is not the source's: what has the same one, or a block type that holds it, has no reason to differ."""
    if (type_ := native_type(data)) is not None and type_ == gguf_carry.exact_type(original):
        return False
    return original.g_idx is not None or _form(data) != _form(original)


def _form(q: QTensor) -> tuple[Any, ...]:
    shape = tuple(n if b == -1 else b for n, b in zip(q.shape, q.block, strict=True))
    return (q.grid.kind, q.grid.bits, q.zero is None, isinstance(q.scale, QTensor), shape)


def _nearest(row: TensorRow, data: QTensor, original: Tensor | QTensor) -> bool:
    """Whether rounding again explains the codes; GGUF's types have gates of their own on the errors of blocks."""
    if row.block_error is not None:
        return True
    return codes.fit(data, original).wild == 0


# --- activations, caches, scales of inputs -----------------------------------------------------------------


def settings(source: Model, artifact: Model, again: Collection[str] = ()) -> Iterator[str]:
    """What the artifact states otherwise than the source about activations, caches and scales of inputs. again: entries that are
    on another grid, whose inputs may be treated as it wants."""
    for role, entry in source.entries.items():
        other = artifact.entries[role]
        if role in again:
            continue
        if (found := differences(entry.activation, other.activation)) is not None:
            yield f"{role}: {found}"
        a, b = entry.transform, other.transform
        if _unfolded(a) != _unfolded(b) or (_unfolded(a) and not _same_param(a, b)):
            yield f"{role}: the scale of its input (pre_quant_scale) is not the source's"
    if (source.kv is None) != (artifact.kv is None):
        yield f"KV cache: {_states(artifact.kv)} here, {_states(source.kv)} in the source"
    elif source.kv is not None and artifact.kv is not None:
        for side in ("k", "v"):
            found = differences(getattr(source.kv, side), getattr(artifact.kv, side))
            if found is not None:
                yield f"KV cache, {side}: {found}"


def unstated(source: Model, artifact: Model) -> list[str]:
    """What of the source's activations and caches an artifact leaves out whose format has no place for it."""
    out = []
    if any(e.activation for e in source.entries.values()) and not any(
        e.activation for e in artifact.entries.values()
    ):
        out.append(
            "how the source quantizes activations is not part of this format: they stay in the runtime's precision"
        )
    if source.kv is not None and artifact.kv is None:
        out.append("the quantization of the source's KV cache is not part of this format")
    return out


def _states(x: object) -> str:
    return "not quantized" if x is None else "quantized"


def _same_param(a: Transform | None, b: Transform | None) -> bool:
    if a is None or b is None or a.param is None or b.param is None or (a.kind, a.where) != (b.kind, b.where):
        return False
    return np.array_equal(_number(a.param), _number(b.param))


def _number(t: Tensor) -> NDArray[np.float32]:
    return as_f32(t.load(), t.dtype).reshape(-1)


def differences(a: ActSpec | None, b: ActSpec | None) -> str | None:
    """How b differs from a, in words."""
    if a is None or b is None:
        return None if a is b else f"its input is {_states(b)} here, {_states(a)} in the source"
    for name in ("grid", "per", "dynamic", "group"):
        wanted, found = getattr(a, name), getattr(b, name)
        if wanted != found:
            return f"{name} of its input's quantization is {found}, expected {wanted}"
    if not _same_scale(a, b):
        return "the scale of its input is not the source's"
    x, y = (np.zeros(1, np.float32) if z is None else numbers(z).reshape(-1) for z in (a.zero, b.zero))
    if not np.array_equal(x, y):
        return "the zero point of its input is not the source's"
    return None


def _same_scale(a: ActSpec, b: ActSpec) -> bool:
    """Equal multipliers; a divisor against a multiplier up to the rounding of a reciprocal. Static ones that are absent are 1."""
    if a.scale is None or b.scale is None:
        if a.dynamic:
            return a.scale is b.scale
        given = a.scale or b.scale
        return given is None or bool((numbers(given) == 1).all())
    x, y = (numbers(s.scale).reshape(-1).astype(np.float64) for s in (a, b) if s.scale is not None)
    if a.divisor != b.divisor:
        return x.shape == y.shape and bool(np.allclose(x * y, 1, rtol=2.0**-23, atol=0))
    return x.shape == y.shape and bool((x == y).all())
