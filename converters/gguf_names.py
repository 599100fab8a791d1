"""Canonical roles <-> GGUF tensors: names, fused, stacked and transposed tensors, rotary row order, shifted norms.

`layout(arch, decoder)` lists every weight tensor of the GGUF file with the roles whose rows it holds. The plan
walks it forwards, the reader backwards.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from lconvert.archs.common import Arch
from lconvert.ir import Decoder, QTensor, Tensor, row_blocks
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
    "attn.sinks": "attn_sinks",
    "attn.q_a": "attn_q_a",
    "attn.q_a_norm": "attn_q_a_norm",
    "attn.q_b": "attn_q_b",
    "attn.kv_a": "attn_kv_a_mqa",
    "attn.kv_a_norm": "attn_kv_a_norm",
    "attn.k_b": "attn_k_b",
    "attn.v_b": "attn_v_b",
    "mlp.gate": "ffn_gate",
    "mlp.up": "ffn_up",
    "mlp.down": "ffn_down",
    "moe.router": "ffn_gate_inp",
    "moe.gate": "ffn_gate_exps",
    "moe.up": "ffn_up_exps",
    "moe.down": "ffn_down_exps",
    "moe.correction": "exp_probs_b",
    "moe.shared.gate": "ffn_gate_shexp",
    "moe.shared.up": "ffn_up_shexp",
    "moe.shared.down": "ffn_down_shexp",
}

NORM_ROLES = (
    "attn_norm",
    "attn_post_norm",
    "mlp_norm",
    "mlp_post_norm",
    "attn.q_norm",
    "attn.k_norm",
    "attn.q_a_norm",
    "attn.kv_a_norm",
    "norm",
)


@dataclass(frozen=True)
class GgufTensor:
    """One GGUF tensor: the rows of `roles`, one after another. `shape` is (out, in), or (experts or heads, out, in).

    head_dim > 0: rows of each head are in interleaved rotary order. shift: added to the values (norms).
    turned > 0: so many rows of its only role make a matrix of the stack, which the file holds transposed.
    """

    name: str
    shape: tuple[int, ...]
    roles: tuple[str, ...]
    head_dim: int = 0
    shift: float = 0.0
    turned: int = 0

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


def layout(arch: Arch, d: Decoder) -> Iterator[GgufTensor]:
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
        heads, turned = layer.attention.heads, 0
        if ".moe.experts." in members[0]:
            shape: tuple[int, ...] = (len(members), *first)
        elif local == "attn.k_b":  # llama.cpp multiplies queries with it, upstream's converter transposes it
            turned = first[0] // heads
            shape = (heads, first[1], turned)
        elif local == "attn.v_b":
            shape = (heads, first[0] // heads, first[1])
        else:
            shape = (sum(shapes[m][0] for m in members), *first[1:])
        shift = d.norm_offset if local in NORM_ROLES and name.endswith(".weight") else 0.0
        yield GgufTensor(name, shape, tuple(members), layer.attention.head_dim if turn else 0, shift, turned)


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


def transposed(t: Tensor, rows: int) -> Tensor:
    """Every `rows` rows of t, a matrix each, transposed, as a view: (n rows, cols) becomes (n cols, rows)."""
    cols = t.shape[1]

    def read(start: int, stop: int) -> Any:
        first, last = start // cols, -(-stop // cols)
        x = t.read(first * rows, last * rows).reshape(last - first, rows, cols).swapaxes(1, 2)
        return x.reshape(-1, rows)[start - first * cols : stop - first * cols]

    return replace(t, shape=(t.rows // rows * cols, rows), read=read)


def transposed_codes(q: QTensor, rows: int) -> QTensor | None:
    """`transposed` of a QTensor, its blocks turned as well, None where a block is not within one matrix."""
    if q.block == (-1, -1):
        return replace(q, shape=(q.rows // rows * q.shape[1], rows), codes=transposed(q.codes, rows))
    q = row_blocks(q) if q.block[0] == -1 or rows % q.block[0] else q
    height, cols = q.block[0], q.shape[1]
    width = cols if q.block[1] == -1 else q.block[1]
    plain = q.g_idx is None and q.mask is None and not q.outliers and q.low_rank is None
    if not plain or cols % width:
        return None
    sides: dict[str, Tensor | QTensor] = {}
    for name in ("scale", "zero", "offset"):
        side = getattr(q, name)
        if side is not None:
            turned = (transposed_codes if isinstance(side, QTensor) else transposed)(side, rows // height)
            if turned is None:
                return None
            sides[name] = turned
    codes = transposed(q.codes, rows)
    return replace(q, shape=codes.shape, codes=codes, block=(width, height), **sides)  # type: ignore[arg-type]
