"""A small convolutional network as a folder of our own: config.json lists its steps, model.safetensors has its weights.

    {"model_type": "convnet", "image": [1, 8, 8], "steps": [
       {"conv": 8, "kernel": [3, 3], "stride": 1, "padding": 1, "bias": true}, {"relu": true}, {"max": 2},
       {"flatten": true}, {"linear": 10, "bias": true}]}

Steps are conv (channels out), linear (features out), max and average (the size of the pooled squares), relu, tanh, gelu (exact)
and flatten; stride, padding and bias have the values above where they are not given. Tensors are called as in a torch.nn.Sequential
of these steps: "0.weight", "0.bias".
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from lconvert.errors import InputError, UnsupportedError
from lconvert.ir import Conv, Convnet, Linear, Plain, Pool, Step
from lconvert.spec import impossible

from .common import NO_GGUF, Arch, Keys, show

_MOST = 1000  # steps; nobody writes more by hand


def _pair(keys: Keys, key: str) -> tuple[int, int]:
    value = keys.items(key, int)
    if value is None or len(value) != 2 or not all(0 < n <= 1 << 12 for n in value):
        raise InputError(f"{keys.where}: {key} is {show(value)}, expected [height, width]")
    return value[0], value[1]


def _conv(k: Keys) -> Step:
    padding = k.int("padding", 0)
    return Conv(k.size("conv"), _pair(k, "kernel"), k.size("stride", 1), padding, k.flag("bias", True))


def _plain(kind: Any) -> Callable[[Keys], Step]:
    def made(k: Keys) -> Step:
        k.must(kind, True)
        return Plain(kind)

    return made


#: The key that names a step -> what is made of its keys.
_STEPS: Mapping[str, Callable[[Keys], Step]] = {
    "conv": _conv,
    "linear": lambda k: Linear(k.size("linear"), k.flag("bias", True)),
    "max": lambda k: Pool("max", k.size("max")),
    "average": lambda k: Pool("average", k.size("average")),
    **{kind: _plain(kind) for kind in ("relu", "tanh", "gelu", "flatten")},
}


def _step(data: Mapping[str, Any], where: str) -> Step:
    kinds = [k for k in _STEPS if k in data]
    if len(kinds) != 1:
        raise UnsupportedError(f"{where} is {show(data)}; a step is one of {', '.join(_STEPS)}")
    keys = Keys(data, where)
    made = _STEPS[kinds[0]](keys)
    keys.finish()
    return made


def _traits(keys: Keys) -> Convnet:
    image, steps = keys.items("image", int), keys.items("steps", dict)
    if image is None or len(image) != 3 or not all(0 < n <= 1 << 16 for n in image):
        raise InputError(f"{keys.where}: image is {show(image)}, expected [channels, height, width]")
    if not steps or len(steps) > _MOST:
        raise InputError(f"{keys.where}: steps must be a list of 1 to {_MOST} objects")
    made = tuple(_step(s, f"{keys.where}: steps[{i}]") for i, s in enumerate(steps))
    out = Convnet("convnet", (image[0], image[1], image[2]), made)
    if found := impossible(out):
        raise InputError(f"{keys.where}: {found[0]}")
    return out


def _written(step: Step) -> dict[str, Any]:
    match step:
        case Conv():
            more = {"stride": step.stride, "padding": step.padding, "bias": step.bias}
            return {"conv": step.out, "kernel": list(step.kernel), **more}
        case Linear():
            return {"linear": step.out, "bias": step.bias}
        case Pool():
            return {step.kind: step.size}
    return {step.kind: True}


def _config(c: Convnet) -> dict[str, Any]:
    return {"model_type": "convnet", "image": list(c.image), "steps": [_written(s) for s in c.steps]}


ARCH = Arch(
    model_type="convnet",
    hf_class="Convnet",
    traits=_traits,
    config=_config,
    names=(),
    gguf=NO_GGUF,
)
