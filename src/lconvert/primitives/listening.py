"""Hooks on one layer: the inputs of its matrices while it runs, those of fused experts worked out from the router's choice.

transformers holds all experts of a layer in one module, which is called with (hidden (tokens, in), chosen experts (tokens, k), weights). An expert's
gate and up see the rows of the tokens that chose it, down sees activation(gate x) * up x of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from lconvert.forward import Forward, packages
from lconvert.ir import Decoder, Moe
from lconvert.primitives.slots import Slot


class Enough(Exception):
    """Everything that was asked for has been heard."""


#: role, its input (tokens, in) in fp32.
Deliver = Callable[[str, Any], None]


def modules(forward: Forward, part: Any, roles: set[str]) -> dict[Any, tuple[str, ...]]:
    """The modules under `part` that hold matrices of `roles`, and which: linear ones and routers; experts stand together."""
    found: dict[Any, tuple[str, ...]] = {}
    for full, name, parameter in forward.parameters(part):
        if parameter.dim() < 2:
            continue
        bind = forward.bind(full, tuple(parameter.shape))
        held = tuple(role for role, _ in bind.parts if role in roles)
        if held:
            owner = part.get_submodule(name.rpartition(".")[0])
            found[owner] = found.get(owner, ()) + held
    return found


@contextmanager
def listening(
    owners: Mapping[Any, tuple[str, ...]], heard: Callable[[Any, Any, Any], None]
) -> Iterator[None]:
    """While inside, `heard(module, input (tokens, in) fp32, further arguments)` is called for each of `owners` that runs."""

    def hook(module: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        given = (*args, *kwargs.values())
        heard(module, given[0].detach().reshape(-1, given[0].shape[-1]).float(), given[1:])

    hooks = [m.register_forward_pre_hook(hook, with_kwargs=True) for m in owners]
    try:
        yield
    finally:
        for h in hooks:
            h.remove()


def expert_of(role: str) -> tuple[int, str] | None:
    """(expert, gate|up|down) of a role; None for what is no expert's."""
    parts = role.split(".")
    return (int(parts[4]), parts[5]) if parts[2:4] == ["moe", "experts"] else None


def rows_of(chosen: Any, expert: int) -> Any:
    """Numbers of the tokens (tokens, k) that chose an expert, ascending."""
    return (chosen == expert).any(-1).nonzero().flatten()


def down_input(x: Any, layer: int, expert: int, slots: Mapping[str, Slot], d: Decoder) -> Any:
    """(tokens, hidden) of an expert, for tokens x (tokens, in)."""
    m = d.layer(layer).mlp
    assert isinstance(m, Moe)
    at = f"layers.{layer}.moe.experts.{expert}."

    def apply(kind: str) -> Any:
        y = x @ slots[at + kind].get().T
        return y + slots[f"{at}{kind}.bias"].get() if m.bias else y

    return gated(apply("gate"), apply("up"), m)


def gated(gate: Any, up: Any, m: Moe) -> Any:
    torch, _ = packages()
    f = torch.nn.functional
    if m.activation == "swiglu_oai":
        assert m.limit is not None
        gate, up = gate.clamp(max=m.limit), up.clamp(-m.limit, m.limit)
        return (up + 1) * gate * torch.sigmoid(1.702 * gate)
    acts = {
        "silu": f.silu,
        "gelu": f.gelu,
        "gelu_tanh": lambda x: f.gelu(x, approximate="tanh"),
        "relu": f.relu,
        "relu2": lambda x: f.relu(x).square(),
    }
    return acts[m.activation](gate) * up
