"""JSON objects out of files that nobody vouches for: bounded memory, no key twice, only text that UTF-8 can hold."""

from __future__ import annotations

import json
import re
from itertools import pairwise
from pathlib import Path
from typing import Any

from lconvert.errors import InputError
from lconvert.formats.files import reading, show

#: Bytes of a config-like file; the largest index of a published checkpoint takes a few MB.
LIMIT = 64 << 20
#: An empty list takes 2 bytes of JSON and 56 of memory: files that hold little else are refused.
_BYTES_PER_BRACKET, _SPARE_BRACKETS = 5, 4096
_HALF_PAIR = re.compile(rb"\\u[dD][89a-fA-F]")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    out = dict(pairs)
    if len(out) != len(pairs):
        keys = sorted(k for k, _ in pairs)
        raise ValueError(f"the key {show(next(a for a, b in pairwise(keys) if a == b))} is there twice")
    return out


def read_object(path: Path, limit: int = LIMIT) -> dict[str, Any]:
    """The object in a JSON file of at most `limit` bytes; InputError says what is wrong with it."""
    with reading(path) as (f, stamp):
        if stamp.size > limit:
            raise InputError(
                f"{path}: {stamp.size} bytes are too many for this JSON file, {limit} is the most"
            )
        raw = f.readall()
    if not raw.strip():
        raise InputError(f"{path}: the file is empty; download it again")
    if raw.count(b"[") + raw.count(b"{") > len(raw) // _BYTES_PER_BRACKET + _SPARE_BRACKETS:
        raise InputError(f"{path}: no sound JSON (too many lists and tables for its size); download it again")
    try:
        value = json.loads(raw, object_pairs_hook=_unique)
        if _HALF_PAIR.search(raw):
            json.dumps(value, ensure_ascii=False).encode()
    except RecursionError:
        raise InputError(f"{path}: no sound JSON (nested too deeply); download it again") from None
    except UnicodeEncodeError:
        raise InputError(
            f"{path}: a text is not Unicode, it holds half a surrogate pair; save the file again"
        ) from None
    except ValueError as e:
        raise InputError(f"{path}: no sound JSON ({e}); download it again") from None
    if not isinstance(value, dict):
        raise InputError(f"{path}: expected a JSON object, found {type(value).__name__}")
    return value
