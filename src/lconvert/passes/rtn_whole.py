"""Round to nearest for what is no matrix in groups: one int8 scale for a whole tensor, and convolutions, a scale per output channel.

A convolution (out, in, height, width) is rounded as the matrix of its output channels.
"""

from __future__ import annotations

from dataclasses import replace
from math import prod
from typing import TYPE_CHECKING, Any

from lconvert.errors import OptionError
from lconvert.ir import QTensor, Tensor, as_f32, int_grid
from lconvert.passes.rtn_float import Peak

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from lconvert.passes.rtn import Options


def quantized(t: Tensor, options: Options) -> QTensor:
    """A dense tensor of 2 or 4 dimensions on an integer grid, lazily."""
    from lconvert.passes import rtn

    rows, inner = t.shape[0], t.shape[1:]
    flat = replace(
        t,
        shape=(rows, prod(inner)),
        read=lambda a, b: t.read(a, b).reshape(b - a, -1),
    )
    if options.group == "tensor":
        return _whole(flat, t.shape)
    if options.group != -1 or not options.grid.lstrip("u").startswith("int"):
        raise OptionError(
            f"{t.origin}: a convolution takes int8 and other integer grids with a scale per output channel (group -1) or tensor, "
            f"not {options.grid} with group {options.group}"
        )
    q = rtn.quantized(flat, options)
    codes, scale = q.codes, q.scale
    assert isinstance(scale, Tensor)
    ones = tuple(1 for _ in inner)
    return replace(
        q,
        shape=t.shape,
        codes=_shaped(codes, inner),
        block=(1, *(-1 for _ in inner)),
        scale=_shaped(scale, ones),
        zero=None if q.zero is None else _shaped(q.zero, ones),
    )


def _shaped(t: Tensor, inner: tuple[int, ...]) -> Tensor:
    """A matrix whose rows have a shape of their own."""
    return replace(t, shape=(t.rows, *inner), read=lambda a, b: t.read(a, b).reshape(b - a, *inner))


def _whole(t: Tensor, shape: tuple[int, ...]) -> QTensor:
    """Codes clamp(rint(x / s), -128, 127) with one scale s = max|x| / 127, on 8 significant bits."""
    import numpy as np

    from lconvert.kernels.reference.rounding import short_scale, storable

    peak = Peak((t,))

    def scale() -> NDArray[np.float32]:
        return storable(short_scale(np.array([peak.value() / 127], np.float32), 8))

    def codes(start: int, stop: int) -> NDArray[Any]:
        s = scale()
        x = as_f32(t.read(start, stop), t.dtype)
        found = np.rint(x / s) if s[0] > 0 else np.zeros_like(x)
        return np.clip(found, -128, 127).astype(np.int8).reshape(stop - start, *shape[1:])

    one = tuple(1 for _ in shape)
    side = Tensor(one, "F32", lambda a, b: scale().reshape(one)[a:b], t.origin, t.files, exact_in=("BF16",))
    held = Tensor(shape, "I8", codes, t.origin, t.files)
    return QTensor(shape, held, int_grid(8, True), tuple(-1 for _ in shape), side)
