"""What rounding an input to an ActSpec means, in torch and NumPy, and a transformers model whose linears do it: what graphs are held to.

Formulas are those of vLLM's kernels (see converters/onnx_activations.py), E4M3 is torch's cast, E2M1 a search in its table.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lconvert.errors import UnsupportedError
from lconvert.forward import Forward, packages
from lconvert.ir import E4M3, E8M0, ActSpec, Entry, Model, QTensor, Tensor, as_f32, dense
from lconvert.validators.carried import differences

Array = NDArray[Any]

_FP4 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)


def number(t: Tensor) -> Array:
    """All of it, flat."""
    return as_f32(t.load(), t.dtype).reshape(-1)


def fp8(x: Array) -> Array:
    """torch's cast, saturating."""
    torch = packages()[0]
    t = torch.from_numpy(np.ascontiguousarray(x)).clamp(-448, 448)
    out: Array = t.to(torch.float8_e4m3fn).to(torch.float32).numpy()
    return out


def fp4(x: Array) -> Array:
    """Nearest value of E2M1; of two equally near ones the one whose code is even."""
    distance = np.abs(np.abs(x)[..., None] - _FP4)
    least = distance.min(-1, keepdims=True)
    even_first = np.array([0, 2, 4, 6, 1, 3, 5, 7])
    at = even_first[np.argmax((distance == least)[..., even_first], -1)]
    return np.asarray(np.copysign(_FP4[at], x), np.float32)


def _power_of_two(top: Array, a: ActSpec) -> Array:
    """MXFP8: smallest with top <= 448 s (vLLM utils/mxfp8_utils.py); MXFP4: smallest with top < 7 s, by bits of the exponent."""
    mantissa, exponent = np.frexp(np.maximum(top, np.float32(1e-30)))
    if a.grid == E4M3:  # 448 = 0.875 * 2^9
        return np.asarray(np.ldexp(np.float32(1), exponent - 9 + (mantissa > 0.875)), np.float32)
    return np.asarray(np.ldexp(np.float32(1), exponent - 3 + (mantissa >= 0.875)), np.float32)


def rounded(x: Array, a: ActSpec, powers: bool = False) -> Array:
    """x (..., features) as its codes say it."""
    one = np.float32
    if a.per == "group" and a.dynamic:
        k = x.shape[-1]
        size = a.group or k
        lack = -k % size
        wide = np.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, lack)]).reshape(*x.shape[:-1], -1, size)
        return _rounded(wide, a, powers).reshape(*x.shape[:-1], -1)[..., :k].astype(one)
    return _rounded(x, a, powers).astype(one)


def _rounded(x: Array, a: ActSpec, powers: bool) -> Array:
    one, static = np.float32, None if a.scale is None else number(a.scale)[0]
    if static is not None and a.divisor and not a.dynamic:
        static = one(1) / static
    axis = None if a.per == "tensor" else -1
    top = np.abs(x).max(axis=axis, keepdims=True)
    if a.grid.kind == "int":
        return _integers(x, a, top, static, axis)
    cast = fp8 if a.grid == E4M3 else fp4
    if not a.dynamic:
        return np.asarray(cast(x / static) * static)
    if powers:
        s = _power_of_two(top, a)
        return np.asarray(cast(x / s) * s)
    s = top / one(448 if a.grid == E4M3 else 6)
    if a.grid == E4M3:
        s = np.maximum(s, one(1 / (448 * 512)))
        s = s if static is None else np.minimum(s, static)
    elif static is not None:
        small = fp8(s * static if a.divisor else s / static)
        small = np.where(small == 0, one(1), small)
        s = small / static if a.divisor else small * static
    else:
        s = np.maximum(s, one(1e-30))
    return np.asarray(cast(x / s) * s)


def _integers(x: Array, a: ActSpec, top: Array, static: Any, axis: Any) -> Array:
    one, bits = np.float32, a.grid.bits
    low, high = (-(1 << (bits - 1)), (1 << (bits - 1)) - 1) if a.grid.signed else (0, (1 << bits) - 1)
    zero = one(0) if a.zero is None else number(a.zero)[0]
    if not a.dynamic:
        s = static
    elif a.grid.signed:
        s = np.maximum(top / one(high), one(1e-30))
    else:
        most, least = np.maximum(x.max(axis, keepdims=True), 0), np.minimum(x.min(axis, keepdims=True), 0)
        s = np.maximum((most - least) / one(high), one(1e-30))
        zero = np.rint(-(least / s))
    return np.asarray((np.clip(np.rint(x / s) + zero, low, high) - zero) * s)


def powers_of(e: Entry) -> bool:
    """Whether the scales of an entry's inputs are powers of two: where those of its weights are, in whatever type."""
    a, q = e.activation, e.data
    if a is None or a.per != "group" or not a.dynamic or a.scale is not None or not isinstance(q, QTensor):
        return False
    if isinstance(q.scale, QTensor):
        return q.scale.grid == E8M0
    scales = number(q.scale)
    return bool((np.frexp(scales[scales != 0])[0] == 0.5).all())


def rounds(model: Model) -> bool:
    """Whether inputs or the cache of a model are rounded."""
    return model.kv is not None or any(
        e.activation is not None and isinstance(e.data, QTensor) for e in model.entries.values()
    )


def _alike(model: Model, roles: Sequence[str]) -> Entry:
    """One entry for all of these, whose inputs are rounded in one way."""
    first, *others = [model.entries[r] for r in roles]
    for e in others:
        scaled = [x.transform is not None and not x.transform.folded for x in (first, e)]
        if differences(first.activation, e.activation) is not None or scaled[0] != scaled[1]:
            raise UnsupportedError(
                f"{model.source}: {first.name} and {e.name} are one product in transformers, and round their inputs differently"
            )
    return first


class RoundedForward(Forward):
    """transformers with weights out of a Model whose linears round their inputs, and whose cache is rounded where `kv` says so."""

    def __init__(self, model: Model) -> None:
        super().__init__(model)
        left = {
            n for n, e in model.entries.items() if e.activation is not None and isinstance(e.data, QTensor)
        }
        for module, roles in self.linears():
            some = left.intersection(roles)
            left -= some
            if some:
                e = _alike(model, roles)
                assert e.activation is not None
                module.register_forward_pre_hook(self._hook(e.activation, e, powers_of(e)))
        if experts := sorted(n for n in left if ".experts." in n):
            self._experts(_alike(model, experts))
            left -= set(experts)
        if left:
            raise UnsupportedError(f"{model.source}: transformers has no module of its own for {min(left)}")
        if model.kv is not None:
            self._cache(model)

    def _experts(self, e: Entry) -> None:
        """Inside the modules that hold all experts of a layer as one tensor every product rounds its input."""
        if e.activation is None or (e.transform is not None and not e.transform.folded):
            raise UnsupportedError("inputs of experts are scaled as well as rounded")
        torch = self._torch
        a, powers, functional = e.activation, powers_of(e), torch.nn.functional
        own = functional.linear

        def linear(x: Any, w: Any, bias: Any = None) -> Any:
            return own(torch.from_numpy(rounded(x.numpy(), a, powers)), w, bias)

        self.module.config._experts_implementation = "eager"
        for module in self.module.modules():
            if type(module).__name__.endswith("Experts"):
                module.register_forward_pre_hook(lambda *_: setattr(functional, "linear", linear))
                module.register_forward_hook(lambda *_: setattr(functional, "linear", own), always_call=True)

    def _hook(self, a: ActSpec, e: Entry, powers: bool) -> Any:
        torch, param = self._torch, None
        if e.transform is not None and not e.transform.folded and e.transform.param is not None:
            param = torch.from_numpy(as_f32(e.transform.param.load(), e.transform.param.dtype).copy())

        def hook(module: Any, args: Any) -> Any:
            x = args[0] if param is None else args[0] * param
            y = torch.from_numpy(rounded(x.numpy(), a, powers))
            return (y if param is None else y / param,)

        return hook

    def _cache(self, model: Model) -> None:
        """Rounds what attention is handed as keys and values, after they were turned."""
        assert model.kv is not None
        code = sys.modules[type(self.module).__module__]
        own = getattr(code, "eager_attention_forward", None)
        if own is None or model.kv.pre_rope or model.kv.residual_window or model.kv.sinks:
            raise UnsupportedError(
                f"{model.source}: keys and values of {model.arch.family} cannot be reached"
            )
        torch, kv = self._torch, model.kv

        def spec(a: ActSpec, layer: int) -> ActSpec:
            n = None if a.scale is None else number(a.scale)
            return a if n is None or n.size == 1 else replace(a, scale=dense(n[layer : layer + 1]))

        def attend(module: Any, q: Any, k: Any, v: Any, mask: Any, **more: Any) -> Any:
            k = torch.from_numpy(rounded(k.numpy(), spec(kv.k, module.layer_idx)))
            v = torch.from_numpy(rounded(v.numpy(), spec(kv.v, module.layer_idx)))
            return own(module, q, k, v, mask, **more)

        self._code, self._own, self._attend = code, own, attend

    def logits(self, ids: list[int]) -> Any:
        if not hasattr(self, "_attend"):
            return super().logits(ids)
        setattr(self._code, "eager_attention_forward", self._attend)  # noqa: B010 - a module's own name
        try:
            return super().logits(ids)
        finally:
            setattr(self._code, "eager_attention_forward", self._own)  # noqa: B010 - as above
