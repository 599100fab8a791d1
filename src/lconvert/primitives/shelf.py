"""Matrices that a run comes back to, as files in a temporary folder: memory holds none of them, whatever the size of the model.

They are fp32, read by rows, and not mapped: mapped pages count as the process's memory. The folder lives as long as the shelf and what was
read from it.
"""

from __future__ import annotations

import shutil
import tempfile
import weakref
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from lconvert.errors import OutputError
from lconvert.ir import Tensor

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


class Shelf:
    """A temporary folder."""

    def __init__(self) -> None:
        try:
            self.path = Path(tempfile.mkdtemp(prefix="lconvert-"))
        except OSError as e:
            raise OutputError(f"no temporary folder can be made ({e.strerror}); set TMPDIR to one") from None
        weakref.finalize(self, shutil.rmtree, self.path, ignore_errors=True)
        self._count = 0

    def file(self) -> Path:
        """A name that is not taken."""
        self._count += 1
        return self.path / f"{self._count}"

    def keep(self, shape: tuple[int, ...], slabs: Iterable[NDArray[np.float32]]) -> Tensor:
        """Rows of an array, one slab after another, as a lazy tensor of `shape`."""
        import numpy as np

        path = self.file()
        try:
            with open(path, "wb") as f:
                f.writelines(np.ascontiguousarray(slab, np.float32).data for slab in slabs)
        except OSError as e:
            raise OutputError(
                f"{path}: cannot be written ({e.strerror}); free some space, or set TMPDIR to a larger folder"
            ) from None
        return Tensor(shape, "F32", _Read(self, path, shape[1]), f"{path}")


@dataclass(frozen=True)
class _Read:
    """Reads rows of `cols` values, and keeps the folder alive meanwhile."""

    shelf: Shelf = field(repr=False)
    path: Path
    cols: int

    def __call__(self, start: int, stop: int) -> NDArray[np.float32]:
        import numpy as np

        count = (stop - start) * self.cols
        found = np.fromfile(self.path, np.float32, count, offset=4 * start * self.cols)
        return found.reshape(stop - start, self.cols)
