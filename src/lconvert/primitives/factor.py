"""The triangular factor that sweeps over columns share (GPTQ, SparseGPT): U with H^-1 = U^T U, for a damped Hessian H.

Reversing rows and columns turns one Cholesky factor into the other: H = R R^T with R upper triangular, U = R^-1. That is one Cholesky
factorization and one triangular inverse, where the papers' code takes two factorizations and a full inverse.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from lconvert.errors import InputError
from lconvert.forward import packages

_RETRIES = 3


@dataclass(frozen=True)
class Factor:
    """upper: U (in, in) fp64. dead: bool (in,), channels without any input. damping: the one that was needed."""

    upper: Any
    dead: Any
    damping: float


def factor(h: Any, damping: float = 0.01, name: str = "weight") -> Factor:
    """Of a Hessian (in, in), a sum over tokens in any scale, with `damping` times its mean diagonal added; where it is not positive definite then,
    ten times as much (a thousandth at least), up to three times. Dead channels count as typical ones that nothing correlates with.

    InputError for NaN, and where no damping helps.
    """
    torch, _ = packages()
    if not bool(h.isfinite().all()):
        raise InputError(
            f"{name}: the Hessian of its inputs holds NaN or infinity; look at the calibration text, and at the layers before it"
        )
    diagonal = h.diagonal().to(torch.float64, copy=True)
    dead = diagonal <= 0
    mean = float(diagonal[~dead].mean()) if bool((~dead).any()) else 1.0
    diagonal[dead] = mean
    failed = torch.empty((), dtype=torch.int32, device=h.device)
    more = (max(damping, 1e-4) * 10**attempt for attempt in range(1, _RETRIES + 1))
    for now in (damping, *more):
        # h is symmetric, and transposed its columns are contiguous, as LAPACK wants them: all is done in place, with two fp64 matrices at most.
        lower = h.flip(0, 1).to(torch.float64).T
        lower.diagonal().copy_((diagonal + now * mean).flip(0))
        torch.linalg.cholesky_ex(lower, out=(lower, failed))
        if int(failed) == 0:
            upper = torch.eye(len(h), dtype=torch.float64, device=h.device).T
            torch.linalg.solve_triangular(lower, upper, upper=False, out=upper)
            del lower
            upper = upper.flip(0, 1)
            upper = upper.contiguous()
            if bool(upper.isfinite().all()):
                return Factor(upper, dead, now)
    raise InputError(
        f"{name}: the Hessian of its inputs is not positive definite even at {now:g} of its mean diagonal; raise the damping, or give more "
        "calibration text"
    )
