"""The layer-by-layer engine against transformers' own runs of the same models."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import lconvert
from lconvert.forward import Forward
from lconvert.ir import Entry, Model
from lconvert.primitives import sequential, text
from lconvert.primitives.job import Calibration, Job
from lconvert.primitives.sequential import Block, walk
from lconvert.primitives.statistics import Hessian, Moments, Together
from tests import arch_cases, case_models

WINDOWS, LENGTH = 3, 48


@pytest.fixture(autouse=True)
def shown(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """Random windows for random models, which have no tokenizer."""
    if "tokenized" in request.keywords:
        return

    def windows(model: Model, calibration: Calibration) -> text.Windows:
        rng = np.random.default_rng(calibration.seed)
        ids = rng.integers(0, model.decoder.vocab, (calibration.windows, calibration.context))
        return text.Windows(tuple(tuple(map(int, w)) for w in ids))

    monkeypatch.setattr(text, "windows", windows)


def job(**options: Any) -> Job:
    return Job(Calibration(text="random", windows=WINDOWS, context=LENGTH), **options)


def ids_of(model: Model, j: Job) -> list[list[int]]:
    return [list(w) for w in text.windows(model, j.calibration).ids]


class Watched:
    """transformers' own run: outputs of the layers, of the head, and inputs of the linear modules, by canonical name."""

    def __init__(self, model: Model, ids: list[list[int]]):
        forward = Forward(model)
        self.layers: list[list[torch.Tensor]] = [[] for _ in forward.layers]
        self.head: list[torch.Tensor] = []
        self.inputs: dict[str, list[torch.Tensor]] = {}

        def keep(into: list[torch.Tensor]) -> Any:
            return lambda m, args, out: into.append(out[0] if isinstance(out, tuple) else out)

        for into, layer in zip(self.layers, forward.layers, strict=True):
            layer.register_forward_hook(keep(into))
        forward.module.get_output_embeddings().register_forward_hook(keep(self.head))
        for module, roles in forward.linears():
            for role in roles:
                self.inputs[role] = []
            module.register_forward_pre_hook(self._hear(roles))
        for w in ids:
            forward.logits(w)

    def _hear(self, roles: tuple[str, ...]) -> Any:
        def hook(module: Any, args: tuple[Any, ...]) -> None:
            for role in roles:
                self.inputs[role].append(args[0].reshape(-1, args[0].shape[-1]))

        return hook


def close(a: torch.Tensor, b: torch.Tensor, tolerance: float = 1e-5) -> bool:
    return float((a - b).abs().max()) <= tolerance * float(b.abs().max())


CASES = [c.name for c in arch_cases.load()]


@pytest.mark.parametrize("name", CASES)
def test_layers_put_out_what_the_whole_model_does(name: str) -> None:
    model = lconvert.read(case_models.folder(name))
    theirs = Watched(model, ids_of(model, job()))
    seen: list[int] = []

    def visit(block: Block) -> Mapping[str, Entry]:
        want = theirs.head if block.is_head else theirs.layers[block.index]
        got = torch.cat(list(block.outputs()))
        assert close(got, torch.cat(want)), block.index
        watch = {
            role: Moments()
            for stage in block.stages
            for role in stage
            if ".experts." not in role and ".router" not in role
        }
        block.observe(watch)
        for role, found in watch.items():
            x = torch.cat(theirs.inputs[role])
            assert found.count == len(x) == WINDOWS * LENGTH
            assert close(found.squares, x.double().square().sum(0)), role
        seen.append(block.index)
        return {}

    out = walk(model, job(), visit, what="test", key="0")
    assert seen == list(range(model.decoder.layers + (not model.decoder.tied)))
    assert out.entries == model.entries and out.report == model.report


def first_of_each() -> list[str]:
    """One case per architecture, and those that store matrices in their own way."""
    seen: dict[str, str] = {}
    for case in arch_cases.load():
        seen.setdefault(case.model_type, case.name)
    return list(seen.values())


def rounded(model: Model, role: str) -> Entry:
    """The entry on a coarse symmetric grid."""
    from lconvert.passes import rtn

    options = rtn.Options(grid="int4", group=32, targets=role.replace(".", r"\."))
    return rtn.run(model, options).entries[role]


@pytest.mark.parametrize("name", first_of_each())
def test_weights_are_the_models_in_its_own_order(name: str) -> None:
    from lconvert.kernels.qtensor import effective

    model = lconvert.read(case_models.folder(name))
    new: dict[str, Entry] = {}

    def visit(block: Block) -> Mapping[str, Entry]:
        mine = (
            {}
            if block.is_head
            else {r: e for r, e in model.entries.items() if r.startswith(f"layers.{block.index}.")}
        )
        assert block.is_head or {r for r in mine if "correction" not in r} == set(block.roles())
        for role in block.roles():
            want = torch.from_numpy(effective(model.entries[role]))
            assert close(block.weight(role), want, 1e-6), role
        out = {}
        for stage in block.stages:
            for role in stage:
                block.set(role, torch.zeros_like(block.weight(role)))  # a trial, which is not returned
                assert not block.weight(role).any()
                if block.index == 0:
                    out[role] = rounded(model, role)
        new.update(out)
        return out

    out = walk(model, job(), visit, what="test", key="0")
    assert new and all(out.entries[r].data.grid == e.data.grid for r, e in new.items())
    want = model.with_entries(new)
    theirs = Watched(want, ids_of(model, job()))
    again = list[torch.Tensor]()

    def look(block: Block) -> Mapping[str, Entry]:
        if block.index == 1:
            again.append(torch.cat([b.hidden for b in block.batches()]))
        return {}

    walk(out, job(), look, what="test", key="0")
    if model.decoder.layers > 1:
        assert close(again[0], torch.cat(theirs.layers[0]))
