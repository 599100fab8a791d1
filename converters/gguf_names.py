"""Canonical roles <-> GGUF tensors: names, fused and stacked tensors, rotary row order, shifted norms.

`layout(arch, decoder)` lists every weight tensor of the GGUF file with the roles whose rows it holds. The plan
walks it forwards, the reader backwards.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from lconvert.archs.common import Arch
from lconvert.ir import Decoder, Tensor, take_rows
from lconvert.spec import roles

#: Local role -> GGUF name without "blk.{i}." (llama.cpp src/llama-arch.cpp, LLM_TENSOR_NAMES).
DEFAULT: Mapping[str, str] = {
    "embed": "token_embd",
    "pos_embed": "position_embd",
    "norm": "output_norm",
    "head": "output",
    "attn_norm": "attn_norm",
    "attn_post_norm": "post_attention_norm",
    "mlp_norm": "ffn_norm",
    "mlp_post_norm": "post_ffw_norm",
    "attn.q": "attn_q",
    "attn.k": "attn_k",
    "attn.v": "attn_v",
    "attn.o": "attn_output",
    "attn.q_norm": "attn_q_norm",
    "attn.k_norm": "attn_k_norm",
    "mlp.gate": "ffn_gate",
    "mlp.up": "ffn_up",
    "mlp.down": "ffn_down",
    "moe.router": "ffn_gate_inp",
    "moe.gate": "ffn_gate_exps",
    "moe.up": "ffn_up_exps",
    "moe.down": "ffn_down_exps",
}

NORM_ROLES = (
    "attn_norm",
    "attn_post_norm",
    "mlp_norm",
    "mlp_post_norm",
    "attn.q_norm",
    "attn.k_norm",
    "norm",
)


@dataclass(frozen=True)
class Stored:
    """One GGUF tensor: the rows of `roles`, one after another. `shape` is (out, in), or (experts, out, in).

    head_dim > 0: rows of each head are in interleaved rotary order. shift: added to the values (norms).
    """

    name: str
    shape: tuple[int, ...]
    roles: tuple[str, ...]
    head_dim: int = 0
    shift: float = 0.0

    @property
    def cols(self) -> int:
        return self.shape[-1]

    @property
    def rows(self) -> int:
        """Rows of `cols` values; a vector is one row."""
        n = 1
        for d in self.shape[:-1]:
            n *= d
        return n


def _local(role: str) -> tuple[str, str, str]:
    """'layers.3.moe.experts.1.up.bias' -> ('blk.3.', 'moe.up', '.bias')"""
    suffix = ".bias" if role.endswith(".bias") else ".weight"
    role = role.removesuffix(".bias")
    prefix = ""
    if role.startswith("layers."):
        _, i, role = role.split(".", 2)
        prefix = f"blk.{i}."
    if role.startswith("moe.experts."):
        role = "moe." + role.rsplit(".", 1)[1]
    return prefix, role, suffix


def layout(arch: Arch, d: Decoder) -> Iterator[Stored]:
    """Every tensor of the file except the ones generated from traits (rope factors), grouped by GGUF name."""
    g = arch.gguf
    table = {**DEFAULT, **g.names}
    table |= {part: fused for fused, parts in g.fused.items() for part in parts}
    shapes = roles(d)
    groups: dict[str, list[str]] = {}
    for role in shapes:
        prefix, local, suffix = _local(role)
        block = d.layer(int(prefix.split(".")[1])).block if prefix else ""
        base = g.block_names.get(block, {}).get(local, table[local])
        groups.setdefault(prefix + base + suffix, []).append(role)
    for name, members in groups.items():
        first = shapes[members[0]]
        _, local, _ = _local(members[0])
        layer = d.layer(int(name.split(".")[1])) if name.startswith("blk.") else d.default
        # Layers without rope too, as upstream's converter does: scores do not depend on the order of rows.
        turn = g.permute and local in ("attn.q", "attn.k")
        if local.startswith("moe.") and local != "moe.router":
            shape: tuple[int, ...] = (len(members), *first)
        else:
            shape = (sum(shapes[m][0] for m in members), *first[1:])
        shift = d.norm_offset if local in NORM_ROLES and name.endswith(".weight") else 0.0
        yield Stored(name, shape, tuple(members), layer.attention.head_dim if turn else 0, shift)


def interleave(t: Tensor, head_dim: int, *, inverse: bool = False) -> Tensor:
    """Rows of every head from the half order (i, i + d/2) to the interleaved one (2i, 2i + 1), as a view.

    llama.cpp rotates neighbouring rows for these architectures (LLAMA_ROPE_TYPE_NORM in llama_model_rope_type).
    """
    half = head_dim // 2

    def read(start: int, stop: int) -> Any:
        first, last = start // head_dim * head_dim, -(-stop // head_dim) * head_dim
        x = t.read(first, last)
        tail = x.shape[1:]
        split = (-1, half, 2, *tail) if inverse else (-1, 2, half, *tail)
        turned = x.reshape(split).swapaxes(1, 2).reshape(-1, *tail)
        return turned[start - first : stop - first]

    return replace(t, read=read)


def split_rows(
    whole: Tensor, stored: Stored, shapes: Mapping[str, tuple[int, ...]]
) -> Iterator[tuple[str, Tensor]]:
    """The canonical tensors inside one stored tensor (rows flattened): the inverse of stacking."""
    at = 0
    for role in stored.roles:
        n = shapes[role][0]
        part = take_rows(whole, ((at, at + n),))
        at += n
        yield role, interleave(part, stored.head_dim, inverse=True) if stored.head_dim else part
