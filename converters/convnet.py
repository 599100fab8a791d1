"""A torch.nn.Sequential as a Model: what a small convolutional network is made of, and nothing else.

Conv2d, Linear, MaxPool2d, AvgPool2d, ReLU, Tanh, GELU (exact) and Flatten, with the options that archs/convnet.py has; Dropout and Identity
do nothing at inference and are left out. `converters.hf.plan` writes the Model as a folder, which `lconvert.read` reads.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from lconvert.archs import find
from lconvert.errors import UnsupportedError
from lconvert.ir import Conv, Convnet, Entry, Linear, Model, Plain, Pool, Step, dense
from lconvert.spec import check

#: Attributes of torch's modules that must have one value, by class.
_ONLY: Mapping[str, Mapping[str, tuple[Any, ...]]] = {
    "Conv2d": {"dilation": ((1, 1),), "groups": (1,), "padding_mode": ("zeros",)},
    "MaxPool2d": {
        "padding": (0, (0, 0)),
        "dilation": (1, (1, 1)),
        "ceil_mode": (False,),
        "return_indices": (False,),
    },
    "AvgPool2d": {"padding": (0, (0, 0)), "ceil_mode": (False,), "divisor_override": (None,)},
    "GELU": {"approximate": ("none",)},
    "Flatten": {"start_dim": (1,), "end_dim": (-1,)},
}


def _square(value: Any, what: str) -> int:
    """A size that torch holds as a number or as a pair of equal ones."""
    sides = value if isinstance(value, tuple) else (value, value)
    if len(set(sides)) != 1 or not isinstance(sides[0], int):
        raise UnsupportedError(f"{what} is {value}; only equal numbers for both axes have a step")
    return int(sides[0])


def _conv(m: Any, where: str) -> Step:
    stride, padding = _square(m.stride, f"{where}: stride"), _square(m.padding, f"{where}: padding")
    return Conv(m.out_channels, tuple(m.kernel_size), stride, padding, m.bias is not None)


def _pool(kind: Any) -> Callable[[Any, str], Step]:
    def made(m: Any, where: str) -> Step:
        size, stride = _square(m.kernel_size, f"{where}: kernel_size"), _square(m.stride, f"{where}: stride")
        if size != stride:
            raise UnsupportedError(
                f"{where}: squares of {size} every {stride}; only squares side by side have a step"
            )
        return Pool(kind, size)

    return made


def _plain(kind: Any) -> Callable[[Any, str], Step]:
    return lambda m, where: Plain(kind)


_STEPS: Mapping[str, Callable[[Any, str], Step]] = {
    "Conv2d": _conv,
    "Linear": lambda m, where: Linear(m.out_features, m.bias is not None),
    "MaxPool2d": _pool("max"),
    "AvgPool2d": _pool("average"),
    "ReLU": _plain("relu"),
    "Tanh": _plain("tanh"),
    "GELU": _plain("gelu"),
    "Flatten": _plain("flatten"),
}


def from_torch(module: Any, image: tuple[int, int, int], name: str = "convnet") -> Model:
    """The Model of a torch.nn.Sequential. image: (channels, height, width) of what it takes."""
    steps: list[Step] = []
    entries: dict[str, Entry] = {}
    for k, part in enumerate(module):
        kind, where = type(part).__name__, f"{name}: module {k} ({type(part).__name__})"
        if kind in ("Dropout", "Identity"):
            continue
        if kind not in _STEPS:
            raise UnsupportedError(f"{where} has no step; known are {', '.join(_STEPS)}")
        for attribute, allowed in _ONLY.get(kind, {}).items():
            if (value := getattr(part, attribute)) not in allowed:
                raise UnsupportedError(f"{where}: {attribute} is {value!r}, only {allowed[0]!r} has a step")
        for ending, parameter in part.named_parameters():
            role = f"steps.{len(steps)}{'' if ending == 'weight' else '.' + ending}"
            values = parameter.detach().cpu().float().numpy().copy()
            entries[role] = Entry(role, dense(values, origin=f"{where}.{ending}"))
        steps.append(_STEPS[kind](part, where))
    traits = Convnet("convnet", image, tuple(steps))
    return check(Model(traits, find("convnet").config(traits), entries, name=name, source=name))
