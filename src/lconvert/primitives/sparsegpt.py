"""SparseGPT (arXiv 2301.00774): choose a mask and re-fit the survivors in one sweep over the input columns.

For a matrix W (out, in) and H = X^T X of its inputs, with H^-1 = U^T U and U upper triangular, column j is fixed to v_j (0 where it is
pruned, its rounded value where survivors are quantized too), and what that costs is made up for by the columns after it:

    e = (w_j - v_j) / U_jj          W[:, k] -= e U_jk   for all k > j

After column j the columns behind it are the least-squares optimum given the columns up to j (optimal brain surgeon with the order of
columns fixed): with all pruned columns first, the result is the optimum for its mask.

The mask is chosen as the sweep goes, from the updated weights, by w^2 / U_jj^2: for unstructured sparsity per block of 128 columns, over all
rows together (algorithm 1 of the paper), for N:M per group of M columns. Updates are collected per block and applied to the columns
behind it at once.

The factor is primitives/factor.py's. A channel
that calibration never drove (H_jj = 0) has nothing to say: its weights are pruned first, and those that stay keep their values.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lconvert.errors import InputError
from lconvert.primitives.factor import Factor
from lconvert.primitives.masks import Pattern, count, fits, kept, least

#: Columns whose updates are applied together, and among which an unstructured mask is chosen (the paper's B and Bs).
BLOCK = 128
DAMPING = 0.01

#: (values of column j as they are now, j) -> values that the column can hold.
Round = Callable[[Any, int], Any]


def sweep(
    w: Any,
    f: Factor,
    pattern: Pattern,
    sparsity: float,
    *,
    mask: Any = None,
    within: Any = None,
    rounded: Round | None = None,
    block: int = BLOCK,
    name: str = "weight",
) -> tuple[Any, Any]:
    """(values (out, in) with exact zeros, mask): w pruned to a sparsity, survivors re-fitted.

    mask: the mask, if another criterion chose it; only survivors are re-fitted then. within: weights that an earlier step
    kept, the others stay pruned. rounded: what survivors are rounded to, column by column in order, its errors made up for like those
    of pruning. Counts are exact, per group of M, or per block of columns so that they add up to those of the tensor or row.
    """
    torch = _torch()
    rows, cols = w.shape
    fits(pattern, cols, name)
    if pattern.of:
        block = max(pattern.of, block - block % pattern.of)
    left = w.t().contiguous()  # columns of the weight are contiguous: (in, out)
    upper = f.upper.to(left.dtype)
    cost = (f.upper.diagonal() ** -2 * ~f.dead).to(left.dtype)
    chosen = torch.ones_like(left, dtype=torch.bool) if mask is None else mask.t().contiguous()
    values = torch.empty_like(left)

    def choose(part: Any, a: int, b: int) -> None:
        """The mask of columns a to b, which `part` holds as they are now."""
        score = (part**2 * cost[a:b, None]).t().contiguous()
        if within is not None:
            score = torch.where(within[:, a:b], score, -1.0)
        if pattern.of:
            chosen[a:b] = kept(score, pattern, sparsity, name).t()
            return
        height = rows if pattern.per == "tensor" else 1
        number = count(sparsity, height * b) - count(sparsity, height * a)
        flat = score.reshape(1, -1) if pattern.per == "tensor" else score
        chosen[a:b] = ~least(flat, number).reshape(rows, b - a).t()

    for a in range(0, cols, block):
        b = min(a + block, cols)
        part, u = left[a:b], upper[a:b, a:b]
        errors = torch.empty_like(part)
        if mask is None and not pattern.of:
            choose(part, a, b)
        for j in range(b - a):
            if mask is None and pattern.of and j % pattern.of == 0:
                choose(part[j : j + pattern.of], a + j, a + j + pattern.of)
            now = part[j]
            value = torch.where(chosen[a + j], now if rounded is None else rounded(now, a + j), 0.0)
            errors[j] = (now - value) / u[j, j]
            values[a + j] = value
            part[j + 1 :].addr_(u[j, j + 1 :], errors[j], alpha=-1)
        left[b:].addmm_(upper[a:b, b:].t(), errors, alpha=-1)
    if not bool(values.isfinite().all()):
        raise InputError(f"{name}: re-fitting its weights overflowed; raise the damping")
    return values.t().contiguous(), chosen.t().contiguous()


def loss(w: Any, v: Any, h: Any) -> float:
    """||(W - V) X||^2 = tr((W - V) H (W - V)^T), in fp64."""
    torch = _torch()
    d = (w - v).to(torch.float64)
    return float(((d @ h.to(torch.float64)) * d).sum())


def _torch() -> Any:
    from lconvert.forward import packages

    return packages()[0]
