"""Does the artifact hold the numbers of the compressed model, where a method has replaced the source's?

The manifest keeps a digest of every entry's values, taken from the compressed model before anything was written (lconvert.fingerprint).
What a target holds as it is must have the same: one code, one scale or two tensors changed places are another digest. What the target
has rounded once more is judged by the source where the method left the source's values there, and is not proven elsewhere.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lconvert.converters import replaced
from lconvert.fingerprint import Values
from lconvert.ir import Decoder
from lconvert.validators.proof import Proof


@dataclass(frozen=True)
class Found:
    """same: by role, whether the artifact has the compressed model's values. wrong: what must have them and has not, in words. unchanged:
    entries that the target rounded, and no pass changed; unproven: those that both have changed."""

    same: Mapping[str, bool]
    wrong: tuple[str, ...]
    unchanged: frozenset[str]
    unproven: tuple[str, ...]


def compare(proof: Proof, manifest: Mapping[str, Any]) -> Found | None:
    """The artifact's entries against the digests of its manifest; None where that has none."""
    noted = manifest.get("compressed")
    if not noted or proof.artifact is None:
        return None
    held: Mapping[str, str] = noted.get("held", {})
    expected = {**held, **noted.get("rounded", {})}
    model = proof.artifact
    # the norms of a graph are what they multiply by
    offset = model.arch.norm_offset if isinstance(model.arch, Decoder) and proof.graph is None else 0.0
    seen = {
        role: Values(model.entries[role].data, replaced.shift(role, offset)).digest()
        for role in expected
        if role in model.entries
    }
    same = {role: seen.get(role) == digest for role, digest in expected.items()}
    rounded = {role for role, equal in same.items() if not equal and role not in held}
    original = replaced.all_values(proof.expected)
    unchanged = {r for r in rounded if r in original and original[r].digest() == expected[r]}
    owners = {digest: role for role, digest in expected.items()}
    wrong = []
    for role in (r for r in held if not same[r]):
        if role not in seen:
            wrong.append(f"{role} is not there")
        elif (owner := owners.get(seen[role])) is not None:
            wrong.append(f"{role} has the values of {owner}")
        else:
            wrong.append(f"{role} has other values")
    return Found(
        same=same,
        wrong=tuple(wrong),
        unchanged=frozenset(unchanged),
        unproven=tuple(sorted(rounded - unchanged)),
    )
