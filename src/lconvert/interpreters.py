"""Interpreters of other environments: packages that want other versions than ours run there."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from lconvert.errors import OptionError


def interpreter(python: str | Path) -> str:
    """The path of an interpreter given by path or by name; OptionError where there is none.

    Links are kept: an environment's interpreter is a link to the one that it was made from.
    """
    wanted = os.path.expanduser(python)
    found = shutil.which(wanted) or shutil.which(os.path.abspath(wanted))
    if found is None:
        what = "is not executable" if Path(python).expanduser().exists() else "does not exist"
        raise OptionError(
            f"{python}: this interpreter {what}; give the path of a Python, such as venv/bin/python"
        )
    return os.path.abspath(found)
