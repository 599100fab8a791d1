"""Orthogonal matrices that spread outliers over all channels: Hadamard matrices with random signs, or a random rotation.

    x -> x R,   R = diag(signs) H / sqrt(n)   with H H^T = n I, every element of H +1 or -1

as in QuaRot (arXiv 2404.00456, 3) and QuIP# (arXiv 2402.04396, 3). H is a Kronecker product of Sylvester's matrices of order 2^k and
one of order m from Paley's constructions (J. Math. Phys. 12, 1933), over fields of prime order p:

    I   m = p + 1, p = 3 mod 4          12, 20, 24, 44, 48, 60, 68, 72, 80, 84, 104, 108, 180 ...
    II  m = 2 (p + 1), p = 1 mod 4      12, 28, 36, 60, 76, 84, 108, 124, 148 ...

which is every hidden size and head size of common models: 2880 = 16 * 180, 3584 = 128 * 28, 5376 = 64 * 84.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import isqrt
from typing import TYPE_CHECKING, Any, Literal

from lconvert.errors import OptionError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

Kind = Literal["hadamard", "orthogonal"]
_FACTOR = 64  # order of Sylvester's factors: products of small matrices are faster than butterflies


@dataclass(frozen=True)
class Rotation:
    """x (.., size) -> x R in fp64. param: the signs (size,) of a Hadamard matrix, or R itself (size, size)."""

    size: int
    param: NDArray[Any]
    apply: Callable[[NDArray[np.float64]], NDArray[np.float64]]

    def __call__(self, x: NDArray[np.float64]) -> NDArray[np.float64]:
        return self.apply(x)

    def runs(self, x: NDArray[np.float64]) -> NDArray[np.float64]:
        """Every run of `size` along the last axis turned by itself: the columns of a matrix that reads several heads."""
        return self.apply(x.reshape(*x.shape[:-1], -1, self.size)).reshape(x.shape)


def rotation(size: int, kind: Kind, *seed: int) -> Rotation:
    """A rotation of `size` channels; equal numbers in `seed` give equal ones.

    OptionError for a size without a Hadamard matrix in reach; any has a random orthogonal one (QR of normal numbers, signs fixed so
    that it is uniformly distributed, Mezzadri, arXiv math-ph/0609050)."""
    import numpy as np

    rng = np.random.default_rng(seed)
    if kind == "orthogonal":
        q, r = np.linalg.qr(rng.normal(size=(size, size)))
        matrix = q * np.sign(np.diag(r))
        return Rotation(size, matrix, lambda x: x @ matrix)
    parts = _factors(size)
    if parts is None:
        raise OptionError(
            f"rotate: no Hadamard matrix of order {size} is constructed here; take random: orthogonal for {size} channels"
        )
    signs = rng.choice(np.array([-1.0, 1.0]), size)
    factors = [part.astype(np.float64) for part in parts]
    return Rotation(size, signs, lambda x: _product(x * (signs / np.sqrt(size)), factors))


def hadamard(size: int) -> NDArray[np.int8] | None:
    """H (size, size) of +1 and -1, or None where this module constructs none."""
    import numpy as np

    parts = _factors(size)
    if parts is None:
        return None
    out = np.ones((1, 1), np.int8)
    for part in parts:
        out = np.kron(out, part)
    return out


def _product(x: NDArray[np.float64], factors: list[NDArray[np.float64]]) -> NDArray[np.float64]:
    """x (.., n) times the Kronecker product of `factors`, one factor at a time."""
    import numpy as np

    shape, after = x.shape, x.shape[-1]
    for part in factors:
        after //= len(part)
        if after == 1:  # one product of matrices, not one for each row
            x = x.reshape(-1, len(part)) @ part
        else:
            x = np.matmul(part.T, x.reshape(-1, len(part), after))
    return x.reshape(shape)


def _factors(size: int) -> list[NDArray[np.int8]] | None:
    """Hadamard matrices whose Kronecker product has order `size`, Sylvester's first."""
    twos = (size & -size).bit_length() - 1
    odd = size >> twos
    for used in range(twos + 1):
        last = _paley(odd << used)
        if last is not None:
            return [part for part in (*_sylvester(twos - used), last) if len(part) > 1]
    return None


def _sylvester(power: int) -> list[NDArray[np.int8]]:
    """Matrices whose product has order 2^power, none of them above _FACTOR."""
    import numpy as np

    two = np.array([[1, 1], [1, -1]], np.int8)
    out = []
    while power:
        step = min(power, _FACTOR.bit_length() - 1)
        part = np.ones((1, 1), np.int8)
        for _ in range(step):
            part = np.kron(part, two)
        out.append(part)
        power -= step
    return out


def _paley(m: int) -> NDArray[np.int8] | None:
    """A matrix of order m that is not a Kronecker product of others, or of order 1."""
    import numpy as np

    if m == 1:
        return np.ones((1, 1), np.int8)
    if m % 4:
        return None
    eye = np.eye
    if _prime(m - 1):  # m - 1 = 3 mod 4: S is skew, and H = I + S
        s = _bordered(m - 1)
        s[1:, 0] = -1
        return s + eye(m, dtype=np.int8)
    p = m // 2 - 1
    if p % 4 == 1 and _prime(p):  # S is symmetric
        s = _bordered(p)
        two, other = np.array([[1, 1], [1, -1]], np.int8), np.array([[1, -1], [-1, -1]], np.int8)
        return np.kron(s, two) + np.kron(eye(p + 1, dtype=np.int8), other)
    return None


def _bordered(p: int) -> NDArray[np.int8]:
    """(p + 1, p + 1): whether j - i is a square modulo the prime p (+1) or not (-1), 0 where i = j, bordered with ones."""
    import numpy as np

    character = np.full(p, -1, np.int8)
    character[np.arange(1, p) ** 2 % p] = 1
    character[0] = 0
    at = np.arange(p)
    out = np.ones((p + 1, p + 1), np.int8)
    out[0, 0] = 0
    out[1:, 1:] = character[(at[None, :] - at[:, None]) % p]
    return out


def _prime(n: int) -> bool:
    return n > 1 and all(n % k for k in range(2, isqrt(n) + 1))
