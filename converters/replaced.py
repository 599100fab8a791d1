"""What passes have done to the weights of a model, as its report says: which replaced them, and what they are now.

A manifest keeps both for whoever proves the artifact: it names the passes, and holds a digest of every entry's values (fingerprint.py).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from lconvert.fingerprint import Values
from lconvert.ir import Decoder, Model
from lconvert.passes import STAGES

#: Passes that round every weight for itself.
_PLAINLY = ("rtn", "allocate", "static")


def named(lines: Iterable[str]) -> list[str]:
    """The passes that lines of a report tell of, each once."""
    return [name for name in dict.fromkeys(line.partition(": ")[0] for line in lines) if name in STAGES]


def moved(passes: Iterable[str]) -> list[str]:
    """Those that changed what the weights are: transforms and masks."""
    return [name for name in passes if {"transforms", "masks"} & set(STAGES[name])]


def compensated(passes: Iterable[str]) -> list[str]:
    """Those that rounded so that errors make up for each other, which no weight by itself can tell from a fault."""
    return [name for name in passes if "rounds" in STAGES[name] and name not in _PLAINLY]


def values(model: Model) -> Mapping[str, Values]:
    """`all_values` where passes replaced weights by others than the nearest; nothing of other models, whose source says what they hold."""
    passes = named(model.report)
    return all_values(model) if moved(passes) or compensated(passes) else {}


def all_values(model: Model) -> Mapping[str, Values]:
    """What the entries hold. Norms of decoders are what they multiply by. Entries whose input has a scale that is not folded are left
    out: targets move it."""
    offset = model.arch.norm_offset if isinstance(model.arch, Decoder) else 0.0
    return {
        role: Values(entry.data, shift(role, offset))
        for role, entry in model.entries.items()
        if entry.transform is None or entry.transform.folded
    }


def shift(role: str, offset: float) -> float:
    """What a norm multiplies by, less what is stored of it; other entries are what they are."""
    return offset if "norm" in role and not role.endswith(".bias") else 0.0
