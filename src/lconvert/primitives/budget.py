"""How much memory a walk takes, and what gives way where it is too much: first the size of batches, then activations go to a file."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from lconvert.errors import OptionError
from lconvert.forward import Forward
from lconvert.ir import Decoder, Mlp, Moe
from lconvert.primitives.activations import BYTES
from lconvert.primitives.job import Job

if TYPE_CHECKING:
    from lconvert.primitives.text import Windows

#: Tokens that run at once. More are slower on a CPU: what one operation makes of them has left the caches before the next reads it.
_TOKENS = {"cpu": 1024, "cuda": 8192}
#: What their attention scores may take.
_SCORES = 256 << 20
#: What inputs of mlp.down may take, which are the widest there are and save half a pass through an MLP.
_WIDE = 2 << 30


@dataclass(frozen=True)
class Plan:
    """batch: windows that run at once. spill: activations lie in a file. keep_mlp: what enters mlp.down is kept for a while (replay.py), as what
    enters attn.o always is. notes: for the report."""

    batch: int
    spill: bool
    keep_mlp: bool = False
    notes: tuple[str, ...] = ()


def plan(
    forward: Forward,
    d: Decoder,
    shown: Windows,
    job: Job,
    *,
    reference: bool,
    statistics: int,
    head: bool = False,
) -> Plan:
    """OptionError where one layer, its statistics and one window do not fit into `job.memory`. head: whether the output matrix is changed, too."""
    sizes = [[p.numel() * 4 for p in layer.parameters()] for layer in forward.layers]
    if head:
        sizes.append([4 * d.vocab * d.hidden])
    layer = max(map(sum, sizes))
    weights = layer * (2 if reference else 1) + 2 * max(max(s) for s in sizes)
    one = _window(d, shown.length)
    scores = max(d.layer(i).attention.heads for i in range(d.layers)) * shown.length**2 * 4
    batch = max(
        1, min(_TOKENS[job.device.partition(":")[0]] // shown.length, len(shown.ids), _SCORES // scores)
    )
    streams = len(shown.ids) * shown.length * (2 if reference else 1)
    states = streams * (d.hidden * BYTES[job.activations] + _attended(d) * 4)
    wide = (
        streams * 4 * max((m.hidden for _, layer in d.each() if isinstance(m := layer.mlp, Mlp)), default=0)
    )
    if job.memory is None:
        return Plan(batch, False, wide <= _WIDE)
    while batch > 1 and weights + statistics + batch * one > job.memory:
        batch //= 2
    fixed = weights + statistics + batch * one
    if fixed > job.memory:
        raise OptionError(
            f"--memory {_gb(job.memory)}: calibration needs {_gb(fixed)}: {_gb(weights)} for a layer{' or the head' if head else ''}, {_gb(statistics)} for its "
            f"statistics and {_gb(one)} for a window of {shown.length} tokens; allow more memory, or lower the context of the calibration"
        )
    if fixed + states <= job.memory:
        return Plan(batch, False, wide <= min(_WIDE, job.memory - fixed - states))
    return Plan(batch, True)


def _attended(d: Decoder) -> int:
    """Features of a token that enter attn.o, in the layer where they are most."""
    each = (layer.attention for _, layer in d.each())
    return max(a.heads * (a.head_dim if a.mla is None else a.mla.v_dim) for a in each)


def _window(d: Decoder, length: int) -> int:
    """Bytes of what is alive at once while one window runs through a layer: scores and their softmax, or the MLP's parts."""
    widest = 0
    for _, layer in d.each():
        m = layer.mlp
        hidden = m.hidden * m.top_k + m.shared if isinstance(m, Moe) else m.hidden
        attention = 3 * layer.attention.heads * length**2
        widest = max(widest, attention, 3 * hidden * length)
    return 4 * (widest + 6 * d.hidden * length)


def trained(d: Decoder, length: int, *, head: bool) -> int:
    """Bytes that one window leaves behind in a layer, or in the head, for its gradients."""
    if head:
        return 4 * 4 * length * d.vocab
    widest = 0
    for _, layer in d.each():
        m, a = layer.mlp, layer.attention
        hidden = m.hidden * m.top_k + m.shared if isinstance(m, Moe) else m.hidden
        widest = max(widest, 3 * a.heads * length**2 + (24 * d.hidden + 8 * hidden) * length)
    return 4 * widest


def _gb(size: int) -> str:
    return f"{size / 1e9:.2f} GB" if size >= 1e8 else f"{size / 1e6:.1f} MB"
