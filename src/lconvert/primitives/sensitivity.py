"""What rounding a matrix costs the model: the loss of every (matrix, option), estimated or measured.

With delta = rounded - original, in nats per token where not said otherwise:

    imatrix  1/2 sum_ij h_j s_i delta_ij^2   h_j the mean square of input j, s_i of the gradient at output i: the Kronecker-factored
                                             Fisher matrix (arXiv 1503.05671) by its diagonals. One backward pass per batch, no memory
                                             for gradients of weights.
    fisher   1/2 sum_ij F_ij delta_ij^2      F the diagonal of the Fisher matrix, E[g^2] (FisherKV, SqueezeLLM arXiv 2306.07629, 4.1).
                                             Gradients and their squares in memory: 8 bytes per weight on top of the model.
    hessian  1/2 tr(H)/n ||delta||^2         H the Hessian of the text's loss over a matrix of n weights, its trace by Hutchinson's
                                             estimator with Rademacher vectors, E[v^T H v] (HAWQ-V2, arXiv 1911.03852, 3.2). Two
                                             backward passes per batch and probe, the graph of the first in memory: small models.
    kld      mean KL(p || q), measured       each matrix rounded alone in the otherwise original model (probe.py): options x matrices x
                                             half a forward pass on average.

Labels of imatrix and fisher are drawn from the model's own predictions, independently for every token: the expected square of a
window's gradient is then the sum over its tokens, so one backward pass per window suffices, and the Fisher matrix is the Hessian of the KL
divergence itself at the original weights (Martens, arXiv 1412.1193, 5).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from lconvert.errors import OptionError
from lconvert.primitives.job import Progress

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from lconvert.primitives.probe import Changed, Probe

HEAD = "head"
METHODS = ("imatrix", "fisher", "hessian", "kld")


def _added(
    one: Callable[[str, NDArray[np.float32], NDArray[np.float32]], float],
) -> Callable[[Changed, Changed], float]:
    """The sum over matrices of what one costs: one(role, original, difference)."""
    return lambda original, rounded: sum(one(role, w, rounded[role] - w) for role, w in original.items())


def costs(
    method: str,
    probe: Probe,
    inputs: Mapping[str, NDArray[np.float32]],
    seed: int = 0,
    *,
    probes: int = 8,
    tell: Progress | None = None,
) -> Callable[[Changed, Changed], float]:
    """What a change of some matrices costs by `method`, (out, in) fp32 by role: cost(original, rounded). All that needs the model run is done
    here, once. inputs: mean squares of what meets the columns of each matrix, of which `imatrix` is made; a matrix without is costed by its
    outputs alone. probes: Rademacher vectors of `hessian`."""
    if method not in METHODS:
        raise OptionError(f"sensitivity {method!r}; choose {', '.join(METHODS)}")
    say = tell or (lambda what, done, total: None)
    if method == "kld":
        return lambda original, rounded: probe.kld(rounded)
    if method == "hessian":
        traces = hessian_traces(probe, probes, seed, tell=say)

        def curvature(role: str, w: NDArray[np.float32], delta: NDArray[np.float32]) -> float:
            mean = max(0.0, traces[role]) / w.size  # an estimate may be below zero, a loss of rounding is not
            return 0.5 * mean * _squares(delta)

        return _added(curvature)
    if method == "fisher":
        diagonal = fisher(probe, seed, tell=say)
        return _added(lambda role, w, delta: 0.5 * _weighted(delta, diagonal[role]))
    outputs = output_gradients(probe, seed, tell=say)
    stacked = fisher(probe, seed, tell=say, only=lambda role: role not in outputs and ".experts." in role)
    multiplying = probe.entering_head() if probe.model.decoder.tied else None

    def factored(role: str, w: NDArray[np.float32], delta: NDArray[np.float32]) -> float:
        if role in stacked:
            return 0.5 * _weighted(delta, stacked[role])
        if role != "embed":
            return 0.5 * _factored(delta, inputs.get(role), outputs[role])
        looked_up = _factored(delta, None, outputs[role])
        multiplied = 0.0 if multiplying is None else _factored(delta, multiplying, outputs[HEAD])
        return 0.5 * (looked_up + multiplied)

    return _added(factored)


def _squares(delta: NDArray[np.float32]) -> float:
    import numpy as np

    return float(np.square(delta, dtype=np.float64).sum())


def _weighted(delta: NDArray[np.float32], by: NDArray[np.float32]) -> float:
    import numpy as np

    return float((np.square(delta, dtype=np.float64) * by).sum())


def _factored(
    delta: NDArray[np.float32], h: NDArray[np.float32] | None, s: NDArray[np.float32] | None
) -> float:
    import numpy as np

    square = np.square(delta, dtype=np.float64)
    rows = square.sum(1) if h is None else square @ h.astype(np.float64)
    return float(rows.sum() if s is None else rows @ s.astype(np.float64))


# --- gradients ---------------------------------------------------------------------------------------------


def _drawn_loss(probe: Probe, ids: Any, generator: Any) -> Any:
    """Sum over tokens of -ln p(y), y drawn from p."""
    torch = probe.torch
    logp = torch.log_softmax(probe.logits(ids).float(), -1).flatten(0, -2)
    drawn = torch.multinomial(logp.detach().exp().cpu(), 1, generator=generator).to(logp.device)
    return -logp.gather(1, drawn).sum()


def _text_loss(probe: Probe, ids: Any) -> Any:
    """Sum over tokens of -ln p(next token of the text)."""
    logits = probe.logits(ids).float()[:, :-1]
    return probe.torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="sum"
    )


def fisher(
    probe: Probe,
    seed: int = 0,
    *,
    only: Callable[[str], bool] = lambda role: True,
    tell: Progress | None = None,
) -> dict[str, NDArray[np.float32]]:
    """The Fisher matrix's diagonal per token, (out, in) by role. only: the roles that are wanted."""
    torch = probe.torch
    held = [(n, p, kept) for n, p, roles in probe.matrices() if (kept := [r for r in roles if only(r)])]
    if not held:
        return {}
    generator = torch.Generator().manual_seed(seed)
    sums = [torch.zeros_like(p) for _, p, _ in held]
    windows = list(probe.windows())
    with _requiring(p for _, p, _ in held):
        for n, ids in enumerate(windows):
            loss = _drawn_loss(probe, ids, generator)
            for total, g in zip(
                sums, torch.autograd.grad(loss, [p for _, p, _ in held], allow_unused=True), strict=True
            ):
                if g is not None:
                    total.addcmul_(g, g)
            if tell is not None:
                tell("squared gradients", n + 1, len(windows))
    return {
        role: probe.part(name, total / probe.tokens, role)
        for (name, _, roles), total in zip(held, sums, strict=True)
        for role in roles
        if len(probe.model.entries[role].shape) == 2
    }


def output_gradients(
    probe: Probe, seed: int = 0, *, tell: Progress | None = None
) -> dict[str, NDArray[np.float32]]:
    """Mean square of the gradient at every output of a matrix by role, (out,).

    Of the embedding: per row, as often as the text looks it up, the mean over features. A tied head's use of the same rows is HEAD.
    """
    import numpy as np

    torch = probe.torch
    generator = torch.Generator().manual_seed(seed)
    sums: dict[str, Any] = {}
    windows = list(probe.windows())

    def add(roles: tuple[str, ...], square: Any) -> None:
        at = 0
        for role in roles:
            rows = probe.model.entries[role].shape[0] if role in probe.model.entries else len(square)
            part = square[at : at + rows]
            sums[role] = sums[role] + part if role in sums else part
            at += rows

    def watch(roles: tuple[str, ...]) -> Any:
        def hook(module: Any, args: Any, out: Any) -> None:
            out.register_hook(lambda g: add(roles, g.reshape(-1, g.shape[-1]).double().square().sum(0)))

        return hook

    embedding = probe.module.get_input_embeddings()
    rows = torch.zeros(embedding.weight.shape[0], dtype=torch.float64, device=embedding.weight.device)

    def entering(module: Any, args: Any, out: Any) -> Any:
        ids = args[0].flatten()
        out = out.detach().requires_grad_()

        def gradient(g: Any) -> None:
            rows.index_add_(0, ids, g.reshape(len(ids), -1).double().square().mean(1))

        out.register_hook(gradient)
        return out

    hooks = [m.register_forward_hook(watch(roles)) for m, roles in probe.forward.linears()]
    if probe.model.decoder.tied:
        hooks.append(probe.module.get_output_embeddings().register_forward_hook(watch((HEAD,))))
    hooks.append(embedding.register_forward_hook(entering))
    try:
        for n, ids in enumerate(windows):
            _drawn_loss(probe, ids, generator).backward()
            if tell is not None:
                tell("gradients at outputs", n + 1, len(windows))
    finally:
        for hook in hooks:
            hook.remove()
    sums["embed"] = rows * float(getattr(embedding, "embed_scale", 1.0)) ** 2  # Gemma's lookup multiplies
    return {role: np.asarray((s / probe.tokens).float().cpu().numpy()) for role, s in sums.items()}


def hessian_traces(
    probe: Probe,
    probes: int = 8,
    seed: int = 0,
    *,
    only: Callable[[str], bool] = lambda role: True,
    tell: Progress | None = None,
) -> dict[str, float]:
    """tr(H) per matrix of the text's loss per token: the mean of v^T H v over `probes` Rademacher vectors v.

    One v for all matrices: the products between two of them are zero in the mean. only: the roles that are wanted.
    """
    torch = probe.torch
    held = [(name, p, kept) for name, p, roles in probe.matrices() if (kept := [r for r in roles if only(r)])]
    generator = torch.Generator().manual_seed(seed)
    found: dict[str, float] = {}
    with _requiring(p for _, p, _ in held):
        for k in range(probes):
            signs = [(torch.randint(0, 2, p.shape, generator=generator).to(p) * 2 - 1) for _, p, _ in held]
            for ids in probe.windows():
                first = torch.autograd.grad(
                    _text_loss(probe, ids), [p for _, p, _ in held], create_graph=True, allow_unused=True
                )
                inner = sum((g * v).sum() for g, v in zip(first, signs, strict=True) if g is not None)
                second = torch.autograd.grad(inner, [p for _, p, _ in held], allow_unused=True)
                for (name, _, roles), v, hv in zip(held, signs, second, strict=True):
                    if hv is None:
                        continue
                    product = v * hv
                    for role in roles:
                        if len(probe.model.entries[role].shape) == 2:
                            share = float(probe.part(name, product, role).sum(dtype="float64"))
                            found[role] = found.get(role, 0.0) + share / (probes * probe.tokens)
                del first, inner, second
            if tell is not None:
                tell("Hessian trace", k + 1, probes)
    return found


class _requiring:
    """Gradients for some parameters, while it lasts."""

    def __init__(self, parameters: Any) -> None:
        self.parameters = list(parameters)

    def __enter__(self) -> None:
        for p in self.parameters:
            p.requires_grad_(True)

    def __exit__(self, *_: object) -> None:
        for p in self.parameters:
            p.requires_grad_(False)
