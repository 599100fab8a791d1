"""What a runtime must offer to be validated. One file per runtime; heavy packages are imported inside it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


class Runtime(Protocol):
    """A model loaded in some runtime."""

    def tokenize(self, text: str, *, special: bool) -> list[int]:
        """Ids of a text without BOS or EOS; `special`: control tokens in the text become their ids."""
        ...

    def logits(self, ids: list[int]) -> NDArray[np.float32]:
        """fp32 logits (len(ids), vocab) of one forward pass from an empty context."""
        ...

    def info(self) -> dict[str, str]:
        """Versions and kernels, for the report."""
        ...

    def close(self) -> None: ...
