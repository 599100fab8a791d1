"""What rounding costs: the probe against two whole models, estimates against exact sums and against what is measured."""

from __future__ import annotations

import importlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import lconvert
from lconvert.errors import OptionError
from lconvert.forward import Forward
from lconvert.ir import Model, dense
from lconvert.kernels.qtensor import values
from lconvert.primitives import sensitivity
from lconvert.primitives.probe import Probe
from lconvert.primitives.slots import matrices
from tests import random_models
from tests.arch_cases import Case
from tests.built_models import kld

_TINY = {
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "vocab_size": 24, "max_position_embeddings": 64,
}  # fmt: skip


def _windows(vocab: int, count: int = 2, length: int = 24) -> list[list[int]]:
    return np.random.default_rng(0).integers(0, vocab, (count, length)).tolist()


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Model:
    """Few enough weights for exact sums over all of them."""
    return lconvert.read(random_models.build(Case("tiny", "llama", _TINY), tmp_path_factory.mktemp("tiny")))


def _moved(model: Model, role: str, by: float = 0.05, seed: int = 1) -> np.ndarray:
    w = values(model.entries[role].data)
    return (w + by * w.std() * np.random.default_rng(seed).normal(size=w.shape)).astype(np.float32)


@pytest.mark.parametrize(
    "family", ["llama", "mixtral", "gpt2", "gemma3_text", "phi3", "qwen3_moe", "gpt_neox"]
)
def test_a_measurement_equals_two_whole_models(family: str, tmp_path: Path) -> None:
    """Layers before the change are not run again, and nothing of the change stays."""
    case = importlib.import_module(f"tests.arch_cases.{family}").CASES[0]
    model = lconvert.read(random_models.build(case, tmp_path / "m"))
    windows = _windows(model.decoder.vocab)
    probe = Probe(model, windows)
    reference = np.concatenate([Forward(model).logits(w) for w in windows])
    wanted = ("layers.0.attn.q", f"layers.{model.decoder.layers - 1}.attn.o", "embed", "head",
              *(r for r in model.entries if r.endswith(("0.mlp.down", "experts.1.up"))))  # fmt: skip
    assert probe.kld({}) == 0.0
    for role in (r for r in wanted if r in model.entries):
        changed = _moved(model, role)
        other = model.with_entries({role: replace(model.entries[role], data=dense(changed))})
        logits = np.concatenate([Forward(other).logits(w) for w in windows])
        assert probe.kld({role: changed}) == pytest.approx(kld(reference, logits).mean(), rel=0.02, abs=3e-8)
        assert probe.kld({}) == 0.0


def test_logits_that_are_not_kept_are_computed_again(tiny: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    windows, changed = _windows(24), {"layers.1.mlp.up": _moved(tiny, "layers.1.mlp.up")}
    kept = Probe(tiny, windows).kld(changed)
    monkeypatch.setattr("lconvert.primitives.probe._KEPT", 0)
    assert Probe(tiny, windows).kld(changed) == pytest.approx(kept, rel=1e-5)


def test_what_the_head_multiplies_is_the_last_norms_output(tiny: Model) -> None:
    windows = _windows(24)
    seen: list[np.ndarray] = []
    forward = Forward(tiny)
    forward.module.model.norm.register_forward_hook(lambda m, args, out: seen.append(out.numpy()[0]))
    for w in windows:
        forward.logits(w)
    found = Probe(tiny, windows).entering_head()
    np.testing.assert_allclose(found, np.square(np.concatenate(seen)).mean(0), rtol=1e-5)


def _whole(model: Model) -> Forward:
    """All weights in memory."""
    forward = Forward(model)
    for layer in forward.layers:
        layer._forward_pre_hooks.clear()
        layer._forward_hooks.clear()
        forward.fill(layer)
    return forward


def _inputs(model: Model, windows: list[list[int]]) -> dict[str, np.ndarray]:
    """Mean squares of what enters every linear module."""
    forward, seen = Forward(model), {}
    for module, roles in forward.linears():
        module.register_forward_pre_hook(
            lambda m, args, roles=roles: seen.setdefault(roles, []).append(args[0][0].square())
        )
    for w in windows:
        forward.logits(w)
    return {r: torch.cat(x).mean(0).numpy() for roles, x in seen.items() for r in roles}


def _exact_fisher(model: Model, window: list[int], name: str) -> np.ndarray:
    """sum over tokens and labels of p(y) (d ln p(y) / dw)^2, per token."""
    module = _whole(model).module
    parameter = dict(module.named_parameters())[name].requires_grad_(True)
    total = torch.zeros_like(parameter)
    for row in torch.log_softmax(module(torch.tensor([window])).logits, -1)[0]:
        for y in range(len(row)):
            (g,) = torch.autograd.grad(row[y], parameter, retain_graph=True)
            total += row[y].exp().detach() * g * g
    return (total / len(window)).numpy()


def test_fisher_is_the_expected_square_of_the_gradient(tiny: Model) -> None:
    """Labels drawn by the model, a window at a time: unbiased, so many draws come near the exact sum."""
    window = _windows(24, 1, 6)
    exact = _exact_fisher(tiny, window[0], "model.layers.0.self_attn.v_proj.weight")
    role = "layers.0.attn.v"
    drawn = sensitivity.fisher(Probe(tiny, window * 800), only=lambda r: r == role)[role].load()
    assert drawn.sum() == pytest.approx(exact.sum(), rel=0.1)
    assert np.corrcoef(drawn.ravel(), exact.ravel())[0, 1] > 0.97


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "mixtral", "gpt2"])
def test_gradients_layer_by_layer_are_those_of_a_whole_graph(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Squared gradients of every window, of tied matrices too, with logits all at once and some tokens at a time."""
    case = importlib.import_module(f"tests.arch_cases.{family}").CASES[0]
    model = lconvert.read(random_models.build(case, tmp_path / "m"))
    windows, forward = _windows(model.decoder.vocab, 3, 16), _whole(model)
    held = {n: p for n, p in forward.module.named_parameters() if p.dim() > 1}
    exact = {n: torch.zeros_like(p) for n, p in held.items()}
    for p in held.values():
        p.requires_grad_(True)
    for w in windows:
        logits = forward.module(torch.tensor([w])).logits[0, :-1]
        loss = torch.nn.functional.cross_entropy(logits, torch.tensor(w[1:]), reduction="sum")
        made = torch.autograd.grad(loss, list(held.values()), allow_unused=True)
        for total, g in zip(exact.values(), made, strict=True):
            total += 0 if g is None else g.square() / (3 * 16)
    monkeypatch.setattr(sensitivity, "_drawn_loss", lambda probe, seed: sensitivity._text_loss(probe))
    for most in (1 << 20, 4 * model.decoder.vocab * 5):
        monkeypatch.setattr("lconvert.primitives.probe._LOGITS", most)
        found = sensitivity.fisher(Probe(model, windows))
        wanted = {
            role: w
            for n, total in exact.items()
            for role, w in matrices(forward.bind(n, tuple(total.shape)), total).items()
        }
        assert set(found) == {r for r, e in model.entries.items() if len(e.shape) == 2}
        for role, diagonal in found.items():
            np.testing.assert_allclose(
                diagonal.load(), wanted[role], rtol=2e-3, atol=1e-5 * float(wanted[role].max())
            )


def test_the_hessian_does_not_depend_on_how_logits_are_cut(
    tiny: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    probe = Probe(tiny, _windows(24, 2, 12))
    whole = sensitivity.hessian_traces(probe, probes=2)
    monkeypatch.setattr("lconvert.primitives.probe._LOGITS", 4 * 24 * 5)
    assert sensitivity.hessian_traces(probe, probes=2) == pytest.approx(whole, rel=1e-3, abs=1e-4)


@pytest.mark.parametrize("role", ["layers.0.attn.v", "layers.1.mlp.down"])
def test_hutchinson_agrees_with_the_exact_trace(tiny: Model, role: str) -> None:
    """v^T H v with v one unit vector after another is the trace; random signs give it in the mean, within what their number allows."""
    (window,) = windows = _windows(24, 1, 12)
    probe, forward = Probe(tiny, windows), _whole(tiny)
    name = next(n for n, b in forward._binds.items() if n and b.parts[0][0] == role)
    parameter = dict(forward.module.named_parameters())[name].requires_grad_(True)
    logits = forward.module(torch.tensor([window])).logits[0]
    loss = torch.nn.functional.cross_entropy(logits[:-1], torch.tensor(window[1:]), reduction="sum") / 12
    (first,) = torch.autograd.grad(loss, parameter, create_graph=True)
    hessian = torch.stack(
        [torch.autograd.grad(g, parameter, retain_graph=True)[0].reshape(-1) for g in first.reshape(-1)]
    )
    drawn = [
        sensitivity.hessian_traces(probe, probes=1, seed=n, only=lambda r: r == role)[role]
        for n in range(300)
    ]
    off = hessian - hessian.diag().diag()
    expected = (
        float(2 * off.square().sum()) ** 0.5
    )  # of one probe: Hutchinson's variance, 2 sum of squares off the diagonal
    assert np.std(drawn, ddof=1) == pytest.approx(expected, rel=0.15)
    assert np.mean(drawn) == pytest.approx(float(hessian.trace()), abs=3 * expected / 300**0.5)
    many = sensitivity.hessian_traces(probe, probes=20, seed=7)
    assert set(many) == {r for r, e in tiny.entries.items() if len(e.shape) == 2}


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "mixtral", "gpt2"])
@pytest.mark.parametrize("method", ["imatrix", "fisher"])
def test_estimates_are_near_what_is_measured(family: str, method: str, tmp_path: Path) -> None:
    """Small random errors in every kind of matrix; the sum over kinds is within 40%, each kind within a factor of 3.

    All experts are chosen: a change that turns a token to another expert is a jump, of which no gradient knows."""
    case = importlib.import_module(f"tests.arch_cases.{family}").CASES[0]
    if "num_local_experts" in case.config:
        case = replace(case, config=case.config | {"num_experts_per_tok": case.config["num_local_experts"]})
    model = lconvert.read(random_models.build(case, tmp_path / "m"))
    windows = _windows(model.decoder.vocab, 12, 32)
    probe = Probe(model, windows)
    cost = sensitivity.costs(method, probe, _inputs(model, windows))
    kinds = ("attn.q", "attn.v", "attn.o", "mlp.up", "mlp.down", "experts.0.up", "experts.0.down")
    roles = [r for r in model.entries if r.startswith("layers.1.") and r.endswith(kinds)]
    roles += [r for r in ("embed", "head") if r in model.entries]
    estimated, measured = [], []
    for role in roles:
        changed = {role: _moved(model, role, 0.02)}
        estimated.append(cost({role: values(model.entries[role].data)}, changed))
        measured.append(probe.kld(changed))
    print(
        family, method, [f"{r} {e:.2e} {m:.2e}" for r, e, m in zip(roles, estimated, measured, strict=True)]
    )
    assert sum(estimated) == pytest.approx(sum(measured), rel=0.4)
    for role, e, m in zip(roles, estimated, measured, strict=True):
        assert m < 3e-7 or 1 / 3 < e / m < 3, role


def test_one_seed_one_result(tiny: Model) -> None:
    probe = Probe(tiny, _windows(24))
    role = "layers.0.mlp.gate"
    args = {role: values(tiny.entries[role].data)}, {role: _moved(tiny, role)}
    inputs = _inputs(tiny, _windows(24))
    for method in ("imatrix", "fisher", "hessian"):
        first, again, other = (sensitivity.costs(method, probe, inputs, seed)(*args) for seed in (3, 3, 4))
        assert first == again != other


def test_mistakes(tiny: Model) -> None:
    with pytest.raises(OptionError, match=r"sensitivity 'guess'; choose imatrix, fisher, hessian, kld"):
        sensitivity.costs("guess", Probe(tiny, _windows(24)), {})
    with pytest.raises(OptionError, match="a calibration text of at least one token"):
        Probe(tiny, [])
