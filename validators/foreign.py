"""A script of lconvert's in another interpreter, which has packages that this one lacks.

It sees neither this environment's modules (-E, -P, no PYTHON* variables) nor those of the folder that lconvert was started in.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

#: Seconds that importing a runtime and asking it may take.
TIMEOUT = 600.0


def started(python: str, script: str, *paths: str | Path) -> dict[str, Any]:
    """Arguments of subprocess.Popen or run. paths: the script's arguments, made absolute."""
    return {
        "args": [python, "-E", "-P", script, *map(os.path.abspath, paths)],
        "env": {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")},
        "cwd": Path(__file__).parent / "text",
    }


def failure(python: str, stderr: bytes) -> str:
    """Why the script ended badly: the last line that it wrote."""
    lines = stderr.decode("utf-8", "replace").strip().splitlines()
    return f"{python}: {lines[-1] if lines else 'the process failed'}"
