"""The tensors of a folder as the safetensors package reads them, against lconvert's own reading of the same files."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from lconvert.errors import MissingPackageError
from lconvert.formats import safetensors as container
from lconvert.ir import NUMPY_DTYPE, Tensor

_SLAB = 1 << 22  # values compared at a time


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
                    elif info.dtype not in NUMPY_DTYPE or (framework == "numpy" and info.dtype == "BF16"):
                        compared = False
                    else:
                        worst = max(worst, _difference(part, container.tensor(own, name)))
        except Exception as e:  # noqa: BLE001 - its errors have no common class
            differences.append(f"{path.name}: the safetensors package refuses it ({e})")
    return count, differences, worst if compared else None


def _difference(part: Any, own: Tensor) -> float:
    """max |theirs - ours| of one tensor, slab by slab; `part` is a slice of the package."""
    if not own.shape:
        return 0.0  # the package slices no scalars, of which no model weight is one
    worst = 0.0
    step = max(1, _SLAB // max(1, own.size // max(1, own.shape[0])))
    for start in range(0, own.shape[0], step):
        stop = min(start + step, own.shape[0])
        theirs = part[start:stop]
        theirs = np.asarray(theirs.double() if hasattr(theirs, "double") else theirs, dtype=np.float64)
        ours = own.read(start, stop)
        if own.dtype == "BF16":
            ours = (ours.astype(np.uint32) << 16).view(np.float32)
        with np.errstate(invalid="ignore"):  # infinities: counted where values are
            difference = np.abs(theirs - ours)
        worst = max(worst, float(np.nan_to_num(difference, nan=np.inf).max(initial=0.0)))
    return worst
