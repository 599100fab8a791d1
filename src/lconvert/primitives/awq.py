"""AWQ's two searches: factors that make weights with strong inputs large before they are rounded, and clipping.

J. Lin et al., arXiv 2306.00978. Columns of W that strong inputs meet lose less when they are larger among those they share scales with:

    W x = (W s) (x / s)        s_j = m_j^r        or by the weights too, "duo",        s_j = m_j^r / a_j^(1 - r)

m_j: mean |x_j| over the calibration text. a_j: mean over all readers' rows of |w_j| as a share of the largest |w| of its group (as AutoAWQ and
llm-compressor have it). Factors are divided by the root of the largest times the smallest. The ratio r is searched: what counts is
the error of the readers' outputs with weights as they will be deployed, scales on the storage's own grid,

    sum over readers of  tr (E H E^T)        E = W - Q(W s) / s        H = sum x x^T

which is the squared error over all tokens of the text, exactly, without running one of them again. (The paper's code runs the block once
per ratio.) Factors of 1 are tried as well, so the search never loses to plain rounding.

Clipping lowers the largest magnitude of a group, where the group's own error e H_g e^T (H_g: its columns' part of H) becomes less. What is
rounded then gets the scales that serve e H e^T of the whole row best, codes as they are (DeploymentGrid.rescaled), which the paper does not do.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lconvert.forward import packages
from lconvert.primitives import grids
from lconvert.primitives.grids import DeploymentGrid
from lconvert.primitives.placement import Placed
from lconvert.primitives.statistics import importance

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

#: Rows of a matrix that a search looks at, evenly spread; they stand for all.
ROWS = 128
#: Factors are at most this, and at least its reciprocal.
_FAR = 1e4


@dataclass(frozen=True)
class Try:
    """Factors (channels,) fp64 of one ratio; duo: by the weights too. Ratio 0 without is ones."""

    ratio: float
    duo: bool
    factors: NDArray[np.float64]

    def __str__(self) -> str:
        if not self.duo:
            return f"x^{self.ratio:.2g}" if self.ratio else "1"
        return f"x^{self.ratio:.2g}/w^{1 - self.ratio:.2g}"


def shares(w: Any, group: int) -> Any:
    """(cols,): mean over the rows of w (rows, cols) of |w| as a share of the largest in its group of columns; 0 for groups of zeros."""
    x = w.abs().reshape(w.shape[0], -1, group)
    top = x.amax(-1, keepdim=True)
    return (x / top.where(top > 0, top.new_ones(()))).reshape(w.shape).mean(0, dtype=packages()[0].float64)


def tries(
    inputs: NDArray[np.float64], weights: NDArray[np.float64], ratios: int, duo: Sequence[bool]
) -> list[Try]:
    """What is searched: ones, then the ratios 1/n .. 1, and from 0 on those by the weights too. inputs, weights (channels,): means of magnitudes.

    Channels without any input or weight keep the factor 1.
    """
    import numpy as np

    dead = (inputs <= 0) | (weights <= 0)
    x, w = np.where(dead, 1, inputs), np.where(dead, 1, weights)
    found = [Try(0.0, False, np.ones(len(x)))]
    if dead.all():
        return found
    for by_weights in duo:
        for k in range(0 if by_weights else 1, ratios + 1):
            r = k / ratios
            s = x**r / (w ** (1 - r) if by_weights else 1)
            s /= np.sqrt(s[~dead].max() * s[~dead].min())
            found.append(Try(r, by_weights, np.where(dead, 1, s.clip(1 / _FAR, _FAR))))
    return found


def losses(
    weights: Mapping[str, Any], h: Any, factors: Sequence[Any], placed: Mapping[str, Placed], rows: int = ROWS
) -> Any:
    """tr (E H E^T) of readers of one input for every (cols,) of `factors`: (tries,) fp64, on the cpu. weights, placed: role -> (rows, cols) and its
    grid. Of matrices with more, `rows` evenly spread ones stand for all. fp4's global scale covers all readers, as where they are fused."""
    torch, _ = packages()
    d, cols = importance(h.diagonal()), len(h)
    peak = torch.stack([w.abs().amax(0) for w in weights.values()]).amax(0)
    parts = []
    for grid in dict.fromkeys(placed[role] for role in weights):  # readers on one grid are fitted in one go
        whole = [w for role, w in weights.items() if placed[role] == grid]
        taken = [w[:: max(1, len(w) // rows)] for w in whole]
        count = [torch.full((len(t),), len(w) / len(t)) for w, t in zip(whole, taken, strict=True)]
        parts.append((grid, torch.cat(taken), torch.cat(count).to(h.device, torch.float64)))
    out = torch.zeros(len(factors), dtype=torch.float64)
    for i, s in enumerate(factors):
        s = s.to(h.device, torch.float32)
        for grid, w, count in parts:
            g = grids.find(grid, cols, peak=float((peak * s).max()))
            error = w - g.values(*g.nearest(w * s, d / (s * s))) / s
            out[i] += float((((error @ h) * error).sum(-1, dtype=torch.float64) * count).sum())
    return out


def clipped(w: Any, h: Any, g: DeploymentGrid, steps: int, least: float = 0.5) -> Any:
    """w (rows, cols) with every span of columns clipped at one of `steps` shares, 1 down to above `least`, of its groups' largest magnitudes: the
    one with which it is rounded best, 1 where none is better."""
    torch, _ = packages()
    d = importance(h.diagonal())
    rows, cols = w.shape
    own = torch.stack([h[a : a + g.span, a : a + g.span] for a in range(0, cols, g.span)])
    groups = w.reshape(rows, -1, g.group)
    top = groups.abs().amax(-1, keepdim=True)

    def cost(target: Any) -> Any:
        error = (w - g.values(*g.nearest(target, d))).reshape(rows, -1, g.span).transpose(0, 1)
        return ((error @ own) * error).sum(-1).T

    out, best = w, cost(w)
    for k in range(1, steps):
        share = 1 - (1 - least) * k / steps
        target = groups.clamp(-share * top, share * top).reshape(w.shape)
        now = cost(target)
        better = now < best
        best = now.where(better, best)
        out = target.where(better.repeat_interleave(g.span, 1), out)
    return out
