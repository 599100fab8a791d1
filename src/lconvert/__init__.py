"""lconvert: one compressed model, every runtime, proved equal.

The verbs of the command line as a small API: `read`, `convert`, `validate`. Importing this package imports
neither NumPy nor torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .api import convert, plan_gguf, read, validate

__version__ = "0.1.0"
__all__ = ["__version__", "convert", "plan_gguf", "read", "validate"]


def __getattr__(name: str) -> Any:
    if name in ("convert", "plan_gguf", "read", "validate"):
        from . import api

        return getattr(api, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
