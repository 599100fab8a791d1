"""One of the cases of `arch_cases` by name, as a folder that transformers wrote."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from tempfile import mkdtemp

from tests import arch_cases, random_models


@cache
def folder(name: str) -> Path:
    """The saved model of the case; made once per process and removed at its end."""
    import atexit
    import shutil

    case = next(c for c in arch_cases.load() if c.name == name)
    root = Path(mkdtemp(prefix="lconvert-case-"))
    atexit.register(shutil.rmtree, root, ignore_errors=True)
    return random_models.build(case, root / name)
