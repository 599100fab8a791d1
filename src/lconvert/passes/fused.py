"""Which matrices serving runtimes load into one: q/k/v, gate/up, the two low-rank inputs of MLA, and gate/up of each expert.

Keys and values out of MLA's latent are one matrix in every Hugging Face folder.
"""

from __future__ import annotations

from collections.abc import Iterator

from lconvert.ir import Decoder, Moe

#: Roles of one layer whose rows a runtime stacks.
FUSED = (
    ("attn.q", "attn.k", "attn.v"),
    ("mlp.gate", "mlp.up"),
    ("moe.shared.gate", "moe.shared.up"),
    ("attn.q_a", "attn.kv_a"),
    ("attn.k_b", "attn.v_b"),
)


def groups(d: Decoder) -> Iterator[tuple[str, ...]]:
    """Canonical roles that share one matrix; some may not exist in a layer."""
    for i, layer in d.each():
        for group in FUSED:
            yield tuple(f"layers.{i}.{role}" for role in group)
        if isinstance(layer.mlp, Moe):
            for e in range(layer.mlp.experts):
                yield tuple(f"layers.{i}.moe.experts.{e}.{kind}" for kind in ("gate", "up"))
