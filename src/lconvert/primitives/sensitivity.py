"""What rounding a matrix costs the model: the loss of every (matrix, option), estimated or measured.

With delta = rounded - original, in nats per token where not said otherwise:

    imatrix  1/2 sum_ij h_j s_i delta_ij^2   h_j the mean square of input j, s_i of the gradient at output i: the Kronecker-factored
                                             Fisher matrix (arXiv 1503.05671) by its diagonals. One backward pass per window, no memory
                                             for gradients of weights.
    fisher   1/2 sum_ij F_ij delta_ij^2      F the diagonal of the Fisher matrix, E[g^2] (FisherKV, SqueezeLLM arXiv 2306.07629, 4.1).
                                             Gradients and their squares in memory: 8 bytes per weight of a layer; on disk 4 of the model.
    hessian  1/2 tr(H)/n ||delta||^2         H the Hessian of the text's loss over a matrix of n weights, its trace by Hutchinson's
                                             estimator with Rademacher vectors, E[v^T H v] (HAWQ-V2, arXiv 1911.03852, 3.2). Per
                                             window and probe a forward pass with tangents, and two backward passes through each layer.
    kld      mean KL(p || q), measured       each matrix rounded alone in the otherwise original model (probe.py): options x matrices x
                                             half a forward pass on average.

Labels of imatrix and fisher are drawn from the model's own predictions, independently for every token: the expected square of a
window's gradient is then the sum over its tokens, so one backward pass per window suffices, and the Fisher matrix is the Hessian of the KL
divergence itself at the original weights (Martens, arXiv 1412.1193, 5).

One layer is in memory at a time (probe.py, backwards.py). H v layer by layer: with y(x, w) a part, g the gradient at y, and dots for derivatives along v,

    forwards    y. = (dy/dx) x. + (dy/dw) v
    backwards   (g., h.) = d/d(x, w) [ <d<g, y>/dx, x.> + <d<g, y>/dw, v> + <g., y> ],     tr(H) = E <v, h.>
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from lconvert.errors import OptionError
from lconvert.ir import Tensor, as_f32
from lconvert.primitives.backwards import EMBEDDING, Backwards, Held, Loss, put, requiring
from lconvert.primitives.job import Progress
from lconvert.primitives.slots import matrices

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from lconvert.primitives.probe import Changed, Probe

HEAD = "head"
METHODS = ("imatrix", "fisher", "hessian", "kld")
_SLAB = 1 << 22  # values of a matrix that are compared together


def _added(one: Callable[[str, NDArray[np.float32], slice], float]) -> Callable[[Changed, Changed], float]:
    """The sum over matrices, some rows at a time, of what differences cost: one(role, difference, its rows)."""

    def cost(original: Changed, rounded: Changed) -> float:
        total = 0.0
        for role, w in original.items():
            step = max(1, _SLAB // w.shape[1])
            for a in range(0, w.shape[0], step):
                b = min(a + step, w.shape[0])
                total += one(role, _rows(rounded[role], a, b) - _rows(w, a, b), slice(a, b))
        return total

    return cost


def _rows(w: NDArray[np.float32] | Tensor, start: int, stop: int) -> NDArray[np.float32]:
    return as_f32(w.read(start, stop), w.dtype) if isinstance(w, Tensor) else w[start:stop]


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

        def curvature(role: str, delta: NDArray[np.float32], rows: slice) -> float:
            size = math.prod(probe.model.entries[role].shape)
            mean = max(0.0, traces[role]) / size  # an estimate may be below zero, a loss of rounding is not
            return 0.5 * mean * _squares(delta)

        return _added(curvature)
    if method == "fisher":
        diagonal = fisher(probe, seed, tell=say)
        return _added(lambda role, delta, rows: 0.5 * _weighted(delta, diagonal[role], rows))
    outputs = output_gradients(probe, seed, tell=say)
    stacked = fisher(probe, seed, tell=say, only=lambda role: role not in outputs and ".experts." in role)
    multiplying = probe.entering_head() if probe.model.decoder.tied else None

    def factored(role: str, delta: NDArray[np.float32], rows: slice) -> float:
        if role in stacked:
            return 0.5 * _weighted(delta, stacked[role], rows)
        if role != "embed":
            return 0.5 * _factored(delta, inputs.get(role), outputs[role][rows])
        looked_up = _factored(delta, None, outputs[role][rows])
        multiplied = 0.0 if multiplying is None else _factored(delta, multiplying, outputs[HEAD][rows])
        return 0.5 * (looked_up + multiplied)

    return _added(factored)


def _squares(delta: NDArray[np.float32]) -> float:
    import numpy as np

    return float(np.square(delta, dtype=np.float64).sum())


def _weighted(delta: NDArray[np.float32], by: Tensor, rows: slice) -> float:
    import numpy as np

    return float((np.square(delta, dtype=np.float64) * by.read(rows.start, rows.stop)).sum())


def _factored(delta: NDArray[np.float32], h: NDArray[np.float32] | None, s: NDArray[np.float32]) -> float:
    import numpy as np

    square = np.square(delta, dtype=np.float64)
    rows = square.sum(1) if h is None else square @ h.astype(np.float64)
    return float(rows @ s.astype(np.float64))


# --- gradients ---------------------------------------------------------------------------------------------


def _drawn_loss(probe: Probe, seed: int) -> Loss:
    """Sum over tokens of -ln p(y), y drawn from p."""
    torch = probe.torch
    generator = torch.Generator().manual_seed(seed)

    def loss(logits: Any, ids: list[int], start: int, stop: int) -> Any:
        logp = torch.log_softmax(logits, -1)
        drawn = torch.multinomial(logp.detach().exp().cpu(), 1, generator=generator).to(logp.device)
        return -logp.gather(1, drawn).sum()

    return loss


def _text_loss(probe: Probe) -> Loss:
    """Sum over tokens of -ln p(next token of the text)."""
    torch = probe.torch

    def loss(logits: Any, ids: list[int], start: int, stop: int) -> Any:
        following = torch.tensor(ids[start + 1 : stop + 1], dtype=torch.long, device=logits.device)
        return torch.nn.functional.cross_entropy(logits[: len(following)], following, reduction="sum")

    return loss


def _wanted(probe: Probe, only: Callable[[str], bool]) -> list[str]:
    return [r for r, e in probe.model.entries.items() if len(e.shape) == 2 and only(r)]


def _lowest(roles: list[str]) -> int:
    """The part nearest to the tokens that holds one of the roles; the head counts as the last layer."""
    places = [int(r.split(".")[1]) for r in roles if r.startswith("layers.")]
    return EMBEDDING if {"embed", "pos_embed"} & set(roles) else min(places, default=0)


def fisher(
    probe: Probe,
    seed: int = 0,
    *,
    only: Callable[[str], bool] = lambda role: True,
    tell: Progress | None = None,
) -> dict[str, Tensor]:
    """The Fisher matrix's diagonal per token, (out, in) by role, on disk. only: the roles that are wanted."""
    torch, found = probe.torch, dict[str, Tensor]()
    if not (wanted := _wanted(probe, only)):
        return found
    back = Backwards(probe, _drawn_loss(probe, seed))
    shared = _Shared(probe) if probe.model.decoder.tied and "embed" in wanted else None
    for i in back.parts(_lowest(wanted)):
        held = back.held(i, only)
        sums = [torch.zeros(h.shape, device=h.parameter.device) for h in held]
        with requiring(held) as parameters:
            for window in back.windows:
                slopes: list[Any] = []
                whole: list[Any] = [None] * len(held)
                for step in back.steps(i, window):
                    inner = [] if i == EMBEDDING else [step.x]
                    if not inner and not held:
                        continue
                    made = torch.autograd.grad(step.y, [*inner, *parameters], step.dy, allow_unused=True)
                    slopes += made[: len(inner)]
                    whole = [a if b is None else b if a is None else a + b for a, b in zip(whole, made[len(inner) :], strict=True)]  # fmt: skip
                if slopes:
                    back.hand(window, slopes)
                for h, total, g in zip(held, sums, whole, strict=True):
                    if g is None:
                        continue
                    if h.rows is None:
                        total.addcmul_(g, g)
                    else:
                        total[h.rows] += g * g
                    if shared is not None and "embed" in h.roles:
                        shared.add(window, h, total, g)
        for h, total in zip(held, sums, strict=True):
            for role, part in matrices(h.bind, total / probe.tokens).items():
                if role in h.roles:
                    before = found[role].load() if role in found else 0
                    found[role] = probe.shelf.keep(tuple(part.shape), [part.cpu().numpy() + before])
        if tell is not None:
            tell("squared gradients", probe.layers - i + 1, probe.layers + 2)
    return found


class _Shared:
    """The square of a tied matrix's gradient is that of a sum: (head + lookup)^2 = head^2 + lookup^2 + 2 head lookup, the last in the rows of a
    window's tokens alone, where the head's part is kept."""

    def __init__(self, probe: Probe) -> None:
        self._probe = probe
        self._kept = [probe.room(b, 1) for b in probe.batches]
        tokens = probe.skeleton.tokens
        self._at = {t: n for n, t in enumerate(tokens)}

    def add(self, window: tuple[int, int], held: Held, total: Any, gradient: Any) -> None:
        torch, (n, w) = self._probe.torch, window
        ids = sorted(set(self._probe.batches[n][w]))
        if held.rows is None:
            rows = torch.zeros(1, len(self._probe.batches[n][w]), gradient.shape[1])
            rows[0, : len(ids)] = gradient[ids].cpu()
            put(self._kept, window, [rows])
            return
        mine = gradient[[self._at[t] for t in ids]]
        total[ids] += 2 * mine * self._kept[n].get(w, w + 1)[0, : len(ids)].to(mine.device)


def output_gradients(
    probe: Probe, seed: int = 0, *, tell: Progress | None = None
) -> dict[str, NDArray[np.float32]]:
    """Mean square of the gradient at every output of a matrix by role, (out,).

    Of the embedding: per row, as often as the text looks it up, the mean over features. A tied head's use of the same rows is HEAD.
    """
    import numpy as np

    torch, sums = probe.torch, dict[str, Any]()

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

    back = Backwards(probe, _drawn_loss(probe, seed))
    embedding = probe.forward.module.get_input_embeddings()
    rows = torch.zeros(probe.model.decoder.vocab, dtype=torch.float64)
    hooks = [m.register_forward_hook(watch(roles)) for m, roles in probe.forward.linears()]
    if probe.model.decoder.tied:
        hooks.append(probe.forward.module.get_output_embeddings().register_forward_hook(watch((HEAD,))))
    try:
        for i in back.parts():
            held = back.held(i, lambda role: role == "embed") if i == EMBEDDING else []
            with requiring(held):
                for n, w in back.windows:
                    slopes = [
                        torch.autograd.grad(step.y, step.x, step.dy)[0] for step in back.steps(i, (n, w))
                    ]
                    if i == EMBEDDING:
                        ids = torch.tensor(probe.batches[n][w])
                        rows.index_add_(0, ids, slopes[0].reshape(len(ids), -1).double().square().mean(1))
                    else:
                        back.hand((n, w), slopes)
            if tell is not None:
                tell("gradients at outputs", probe.layers - i + 1, probe.layers + 2)
    finally:
        for hook in hooks:
            hook.remove()
    sums["embed"] = rows * float(getattr(embedding, "embed_scale", 1.0)) ** 2  # Gemma's lookup multiplies
    return {role: np.asarray((s / probe.tokens).float().cpu().numpy()) for role, s in sums.items()}


# --- second derivatives --------------------------------------------------------------------------------------


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
    found: dict[str, float] = {}
    if not (wanted := _wanted(probe, only)):
        return found
    generator = probe.torch.Generator().manual_seed(seed)
    for k in range(probes):
        for role, share in _Product(probe, only, generator, _lowest(wanted)).shares():
            found[role] = found.get(role, 0.0) + share / (probes * probe.tokens)
        if tell is not None:
            tell("Hessian trace", k + 1, probes)
    return found


class _Product:
    """v^T H v of one vector of random signs, by role. least: the lowest part that has some."""

    def __init__(self, probe: Probe, only: Callable[[str], bool], generator: Any, least: int) -> None:
        self.probe, self.torch, self.only, self.least = probe, probe.torch, only, least
        self.back = Backwards(probe, _text_loss(probe))
        self._generator = generator
        self._states: dict[int, Any] = {}  # of the generator, before it draws a part's signs
        self._along = [
            probe.room(b, probe.layers + 1) for b in probe.batches
        ]  # x. of every layer and the head
        self._slopes = [probe.room(b, 1) for b in probe.batches]  # g.

    def shares(self) -> Iterator[tuple[str, float]]:
        """(role, its part), of a shared matrix in two parts."""
        for i in range(self.least, self.probe.layers):
            self._forwards(i)
        self._states[self.probe.layers] = self._generator.get_state()
        after = self._states[self.probe.layers]
        for i in self.back.parts(self.least):
            held = self.back.held(i, self.only)
            signs = self._signs(i, held)
            if i == self.probe.layers and not self.probe.model.decoder.tied:
                after = self._generator.get_state()
            with requiring(held) as parameters:
                for window in self.back.windows:
                    for h, v, second in self._backwards(i, window, held, parameters, signs):
                        for role, part in matrices(h.bind, v * second).items():
                            if role in h.roles:
                                yield role, float(part.double().sum())
        self._generator.set_state(after)

    def _signs(self, i: int, held: list[Held]) -> list[Any]:
        """The vector's part of these matrices: the same whenever it is asked for. A tied head's is the embedding's."""
        torch = self.torch
        tied = i == self.probe.layers and self.probe.model.decoder.tied
        if i not in self._states:
            self._states[i] = self._generator.get_state()
        self._generator.set_state(self._states[EMBEDDING if tied and held else i])
        return [torch.randint(0, 2, h.shape, generator=self._generator).to(h.parameter) * 2 - 1 for h in held]

    def _forwards(self, i: int) -> None:
        """x. of the next part out of that of part i."""
        torch, back = self.torch, self.back
        with back.part(i):
            held = back.held(i, self.only)
            signs = self._own(held, self._signs(i, held))
            with requiring(held) as parameters:
                for n, w in back.windows:
                    if i == EMBEDDING:
                        y = self.probe.skeleton.entering([self.probe.batches[n][w]], slopes=True)
                        inner, along = parameters, signs
                    else:
                        x = back.entering(i, (n, w)).requires_grad_()
                        y = self.probe.run(self.probe.forward.layers[i], i, x)
                        inner, along = [x, *parameters], [self._tangent(i, n, w), *signs]
                    u = torch.zeros_like(y).requires_grad_()
                    first = torch.autograd.grad(y, inner, u, create_graph=True, allow_unused=True)
                    total = _inner(first, along)
                    (out,) = torch.autograd.grad(total, u)
                    at = (i + 1) * len(self.probe.batches[n]) + w
                    self._along[n].put(at, out.detach())

    def _backwards(
        self, i: int, window: tuple[int, int], held: list[Held], parameters: list[Any], signs: list[Any]
    ) -> Iterator[tuple[Held, Any, Any]]:
        """(matrix, its signs, H v there) of every step of a window; hands both gradients on."""
        torch, (n, w) = self.torch, window
        own = self._own(held, signs)
        slopes: list[Any] = []
        tangents: list[Any] = []
        for step in self.back.steps(i, window):
            inner = parameters if i == EMBEDDING else [step.x, *parameters]
            along = own if i == EMBEDDING else [self._tangent(i, n, w, step.rows), *own]
            first = torch.autograd.grad(step.y, inner, step.dy, create_graph=True, allow_unused=True)
            total = _inner(first, along)
            if step.dy is not None:
                total = total + (self._slopes[n].get(w, w + 1).to(step.y.device) * step.y).sum()
            second = torch.autograd.grad(total, inner, allow_unused=True)
            if i != EMBEDDING:
                slopes.append(first[0].detach())
                tangents.append(torch.zeros_like(step.x) if second[0] is None else second[0])
            for h, v, g in zip(held, own, second[len(inner) - len(held) :], strict=True):
                if g is not None:
                    yield h, v, g
        if slopes:
            self.back.hand(window, slopes)
            put(self._slopes, window, tangents)

    @staticmethod
    def _own(held: list[Held], signs: list[Any]) -> list[Any]:
        """Signs of the rows that parameters have."""
        return [v if h.rows is None else v[h.rows] for h, v in zip(held, signs, strict=True)]

    def _tangent(self, i: int, n: int, w: int, rows: slice = slice(None)) -> Any:
        """x. of a window at part i, (1, t, d), or of some of its tokens (t, d); zero at the lowest part."""
        at = i * len(self.probe.batches[n]) + w
        found = self._along[n].get(at, at + 1).to(self.probe.device)
        return found if i < self.probe.layers else found[0, rows]


def _inner(first: Sequence[Any], second: Sequence[Any]) -> Any:
    """The sum of the products of what is there of both."""
    return sum((a * b).sum() for a, b in zip(first, second, strict=True) if a is not None)
