"""The tensors of a folder as the safetensors package reads them, against lconvert's own reading of the same files."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lconvert.errors import MissingPackageError
from lconvert.formats import safetensors as container
from lconvert.ir import NUMPY_DTYPE, Tensor, as_f32
from lconvert.validators.slabs import largest_difference


def independent(folder: Path) -> tuple[int, list[str], float | None]:
    """(tensors in all files, what the package sees differently, max |difference| of the stored values).

    The difference is None where not all values could be compared: NumPy has no bfloat16, so these need torch. NaN counts
    as infinite. Raises MissingPackageError without safetensors.
    """
    try:
        from safetensors import safe_open
    except ImportError:
        raise MissingPackageError("safetensors is not installed: pip install 'lconvert[hf]'") from None
    framework = "pt" if find_spec("torch") else "numpy"
    count, differences, worst = 0, [], 0.0
    compared = True
    for path in sorted(folder.glob("*.safetensors")):
        own = container.read_header(path)
        count += len(own.tensors)
        try:
            with safe_open(path, framework) as file:
                if set(file.keys()) != set(own.tensors):
                    differences.append(f"{path.name}: other tensor names")
                    continue
                for name, info in own.tensors.items():
                    part = file.get_slice(name)
                    seen = (part.get_dtype(), tuple(part.get_shape()))
                    if seen != (info.dtype, info.shape):
                        differences.append(
                            f"{name}: the independent reader sees {seen}, lconvert {(info.dtype, info.shape)}"
                        )
                    elif info.dtype.startswith("F8_") and framework == "pt":
                        worst = max(worst, _bytes(part, container.raw(own, name)))
                    elif info.dtype not in NUMPY_DTYPE or (framework == "numpy" and info.dtype == "BF16"):
                        compared = False
                    else:
                        worst = max(worst, _difference(part, container.tensor(own, name)))
        except Exception as e:  # noqa: BLE001 - its errors have no common class
            differences.append(f"{path.name}: the safetensors package refuses it ({e})")
    return count, differences, worst if compared else None


def _difference(part: Any, own: Tensor) -> float:
    """max |theirs - ours| of one tensor; `part` is a slice of the package."""
    if not own.shape:
        return 0.0  # the package slices no scalars, of which no model weight is one

    def ours(start: int, stop: int) -> NDArray[Any]:
        rows = own.read(start, stop)
        return as_f32(rows, "BF16") if own.dtype == "BF16" else rows

    def theirs(start: int, stop: int) -> NDArray[Any]:
        rows = part[start:stop]
        return np.asarray(rows.double() if hasattr(rows, "double") else rows, dtype=np.float64)

    return largest_difference(own.shape, ours, theirs)


def _bytes(part: Any, own: Tensor) -> float:
    """The same of 8-bit floats, as bytes."""
    import torch

    def theirs(start: int, stop: int) -> NDArray[Any]:
        return np.asarray(part[start:stop].view(torch.uint8), dtype=np.float64)

    return largest_difference(own.shape, lambda a, b: own.read(a, b).reshape(b - a, *own.shape[1:]), theirs)
