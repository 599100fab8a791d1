"""The layer-by-layer engine against transformers' own runs of the same models."""

from __future__ import annotations

import gc
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import lconvert
from lconvert.errors import InputError, OptionError
from lconvert.forward import Forward
from lconvert.ir import Entry, Model, dense
from lconvert.kernels.qtensor import effective, values
from lconvert.primitives import budget, text
from lconvert.primitives.job import Calibration, Job
from lconvert.primitives.sequential import Block, walk
from lconvert.primitives.statistics import Cross, Hessian, Moments, Together
from tests import arch_cases, case_models

WINDOWS, LENGTH = 3, 48


@pytest.fixture(autouse=True)
def shown(monkeypatch: pytest.MonkeyPatch) -> None:
    """Random windows for random models, which have no tokenizer."""

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


@pytest.mark.parametrize("name", arch_cases.some(2))
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


def rounded(model: Model, role: str) -> Entry:
    """The entry on a coarse symmetric grid."""
    from lconvert.passes import rtn

    options = rtn.Options(grid="int4", group=32, targets=role.replace(".", r"\."))
    return rtn.run(model, options).entries[role]


@pytest.mark.parametrize("name", arch_cases.some(1))
def test_weights_are_the_models_in_its_own_order(name: str) -> None:
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


# --- experts ---------------------------------------------------------------------------------------------

ROUTED = ["mixtral-plain", "qwen3_moe-plain", "deepseek_v2-plain", "deepseek_v3-plain", "gpt_oss-plain"]
ROUTED = [n for n in CASES if n.split("-")[0] in {r.split("-")[0] for r in ROUTED}]


class Chosen:
    """Every expert's tokens and the inputs of its down matrix, one expert and one token after another, from transformers' calls."""

    def __init__(self, model: Model, ids: list[list[int]], layer: int):
        self.inputs: dict[tuple[int, str], list[torch.Tensor]] = {}
        forward, moe = Forward(model), model.decoder.layer(layer).mlp
        name = f"layers.{layer}.moe.experts."

        def weight(role: str) -> torch.Tensor:
            return torch.from_numpy(effective(model.entries[name + role]))

        def hook(module: Any, args: tuple[Any, ...]) -> None:
            hidden, index, _ = args
            for e in range(moe.experts):
                for token in range(len(hidden)):
                    if e not in index[token].tolist():
                        continue
                    x = hidden[token]
                    g, u = weight(f"{e}.gate") @ x, weight(f"{e}.up") @ x
                    if moe.bias:
                        g, u = g + weight(f"{e}.gate.bias"), u + weight(f"{e}.up.bias")
                    if moe.activation == "swiglu_oai":
                        g, u = g.clamp(max=moe.limit), u.clamp(-moe.limit, moe.limit)
                        y = (u + 1) * g * torch.sigmoid(1.702 * g)
                    else:
                        y = torch.nn.functional.silu(g) * u
                    self.inputs.setdefault((e, "up"), []).append(x)
                    self.inputs.setdefault((e, "down"), []).append(y)

        experts = next(m for n, m in forward.layers[layer].named_modules() if n.endswith("experts"))
        experts.register_forward_pre_hook(hook)
        for w in ids:
            forward.logits(w)


@pytest.mark.parametrize("name", sorted({n.split("-")[0]: n for n in reversed(ROUTED)}.values()))
def test_experts_see_the_tokens_that_chose_them(name: str) -> None:
    model = lconvert.read(case_models.folder(name))
    j = replace(job(), calibration=Calibration("random", windows=2, context=12))
    layer = max(i for i, x in model.decoder.each() if hasattr(x.mlp, "experts"))
    theirs = Chosen(model, ids_of(model, j), layer)
    counts = list[int]()

    def visit(block: Block) -> Mapping[str, Entry]:
        if block.index == layer:
            watch = {r: Moments() for stage in block.stages for r in stage if ".experts." in r}
            block.observe(watch)
            for role, found in watch.items():
                _, _, _, _, e, kind = role.split(".")
                rows = theirs.inputs.get((int(e), "down" if kind == "down" else "up"), [])
                assert found.count == len(rows), role
                counts.append(found.count)
                if rows:
                    assert close(found.squares, torch.stack(rows).double().square().sum(0), 1e-4), role
        return {}

    walk(model, j, visit, what="test", key="0")
    assert sum(counts) == 24 * 3 * model.decoder.layer(layer).mlp.top_k


def test_an_expert_that_no_token_chooses_has_seen_nothing() -> None:
    """One token, and experts whose scores are multiples of one number: the best two are both of one sign."""
    model = lconvert.read(case_models.folder(next(n for n in ROUTED if n.startswith("mixtral"))))
    experts = model.decoder.layer(0).mlp.experts
    found: dict[str, Moments] = {}

    def visit(block: Block) -> Mapping[str, Entry]:
        if block.index == 0:
            scores = torch.zeros(experts, model.decoder.hidden)
            scores[0], scores[1], scores[2], scores[3] = 1.0, 2.0, -1.0, -2.0
            block.set("layers.0.moe.router", scores)
            found.update({r: Moments() for stage in block.stages for r in stage if ".experts." in r})
            block.observe(found)
        return {}

    walk(model, Job(Calibration(text="random", windows=1, context=1)), visit, what="test", key="0")
    counts = [found[f"layers.0.moe.experts.{e}.up"].count for e in range(experts)]
    assert counts[:4] in ([1, 1, 0, 0], [0, 0, 1, 1]) and sum(counts) == 2
    unseen = counts.index(0)
    assert found[f"layers.0.moe.experts.{unseen}.down"].squares is None


# --- the stream of the uncompressed model ----------------------------------------------------------------

LLAMA = next(n for n in CASES if n.startswith("llama-"))
MIXTRAL = next(n for n in CASES if n.startswith("mixtral-"))


@pytest.mark.parametrize("name", [LLAMA, MIXTRAL])
def test_the_reference_is_the_uncompressed_model(name: str) -> None:
    model = lconvert.read(case_models.folder(name))
    plain = {}

    def watched(block: Block) -> dict[str, Hessian]:
        roles = [s[0] for s in block.stages if ".experts." not in s[0] or ".experts.1." in s[0]]
        return {r: Hessian() for r in roles}

    def look(block: Block) -> Mapping[str, Entry]:
        found = watched(block)
        block.observe(found)
        plain.update(found)
        return {}

    walk(model, job(), look, what="test", key="0")
    checked = []

    def visit(block: Block) -> Mapping[str, Entry]:
        mine, cross = watched(block), {}
        for role in mine:
            cross[role] = Cross()
        block.observe({r: Together(mine[r], cross[r]) for r in mine}, reference=True)
        for role in mine:
            assert mine[role].count == cross[role].count
            if block.index == 0 and "attn.q" in role:
                assert not cross[role].sum.any(), "nothing is compressed before it"
            if block.index == 1 and role.endswith("attn.q"):
                assert cross[role].sum.abs().max() > 1e-3 * mine[role].sum.abs().max()
                both = torch.cat([b.reference for b in block.batches()])
                assert close(both, torch.cat(theirs.layers[0]))
                checked.append(role)
        if block.is_head:
            return {}
        return {r: rounded(model, r) for s in block.stages for r in s if "router" not in r}

    theirs = Watched(model, ids_of(model, job()))
    walk(model, job(), visit, what="test", key="0", reference=True)
    assert checked


def test_roles_that_share_an_accumulator_feed_it_once() -> None:
    model = lconvert.read(case_models.folder(LLAMA))

    def visit(block: Block) -> Mapping[str, Entry]:
        shared, apart = Hessian(), Hessian()
        stage = block.stages[0]
        block.observe(dict.fromkeys(stage, shared))
        block.observe({stage[0]: apart})
        assert shared.count == apart.count == block.tokens and torch.equal(shared.sum, apart.sum)
        x = torch.cat([b.hidden for b in block.batches()])
        assert x.shape == (*block.windows, model.decoder.hidden)
        return {}

    walk(model, job(), visit, what="test", key="0")


# --- finished layers -------------------------------------------------------------------------------------


def compress(
    model: Model, j: Job, key: str = "k", stop: int | None = None, seen: list[int] | None = None
) -> Model:
    """Every matrix to a grid, with a report; KeyboardInterrupt in layer `stop`."""

    def visit(block: Block) -> Mapping[str, Entry]:
        if seen is not None:
            seen.append(block.index)
        if block.index == stop:
            raise KeyboardInterrupt
        moments = Moments()
        block.observe({block.stages[-1][0]: moments})
        block.say(
            f"block {block.index}: {float(moments.squares.sum())!r}"
        )  # shows what its inputs were, to the last bit
        return {r: replace(rounded(model, r), provenance=("rounded",)) for s in block.stages for r in s}

    return walk(model, j, visit, what="rounding", key=key)


def same(a: Model, b: Model) -> bool:
    """Whether two models are the same to the byte, report included."""
    if a.report != b.report or a.entries.keys() != b.entries.keys():
        return False
    for name, x in a.entries.items():
        y = b.entries[name]
        if type(x.data) is not type(y.data) or x.provenance != y.provenance:
            return False
        parts = [(x.data, y.data)] if not hasattr(x.data, "codes") else [(x.data.codes, y.data.codes)]  # type: ignore[union-attr]
        if any(p.load().tobytes() != q.load().tobytes() for p, q in parts):
            return False
        if values(x.data).tobytes() != values(y.data).tobytes():
            return False
    return True


def test_a_killed_run_goes_on_to_the_same_bytes(tmp_path: Path) -> None:
    model = lconvert.read(case_models.folder(LLAMA))
    whole = compress(model, job())
    blocks = model.decoder.layers + (not model.decoder.tied)
    assert sum("block" in line for line in whole.report) == blocks
    for stop in range(blocks):
        j = job(work=tmp_path / str(stop))
        with pytest.raises(KeyboardInterrupt):
            compress(model, j, stop=stop)
        seen: list[int] = []
        assert same(compress(model, replace(j, resume=True), seen=seen), whole)
        assert seen == list(range(stop, blocks))
        again: list[int] = []
        assert same(compress(model, replace(j, resume=True), seen=again), whole) and not again
        files = sorted(p.name for p in next((tmp_path / str(stop)).iterdir()).iterdir())
        assert files == [*(f"layer-{i:05d}.safetensors" for i in range(blocks)), "run.json"]


def test_a_folder_of_other_options_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = lconvert.read(case_models.folder(LLAMA))
    j = job(work=tmp_path, resume=True)
    with pytest.raises(KeyboardInterrupt):
        compress(model, j, stop=1)  # nothing to resume is no error
    with pytest.raises(OptionError, match="holds an unfinished run of rounding with other options"):
        compress(model, j, key="other")
    with (
        monkeypatch.context() as m
    ):  # fewer windows at once, as where memory is short: sums come out different
        m.setattr(budget, "_TOKENS", {"cpu": LENGTH})
        with pytest.raises(OptionError, match="with other options or memory, or of another model"):
            compress(model, j)
    compress(model, j)
    compress(model, j, key="other")  # a finished run is another pass's of the same recipe


def test_a_damaged_layer_is_computed_again(tmp_path: Path) -> None:
    model = lconvert.read(case_models.folder(LLAMA))
    j = job(work=tmp_path)
    compress(model, j)
    whole = compress(model, job())
    path = next(tmp_path.glob("*/layer-00001.safetensors"))
    good = path.read_bytes()
    for bad in (good[:-3], good[:-1] + bytes([good[-1] ^ 1]), b""):
        path.write_bytes(bad)
        seen: list[int] = []
        again = compress(model, replace(j, resume=True), seen=seen)
        assert seen == [1] and path.read_bytes() == good
        said = [line for line in again.report if "was computed again" in line]
        assert len(said) == 1 and said[0].startswith(
            "rounding: layer 1 was computed again, as the finished one"
        )
        assert same(
            replace(again, report=tuple(x for x in again.report if x not in said)),
            replace(whole, report=whole.report),
        )


def test_temporary_layers_live_as_long_as_an_entry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import tempfile

    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    out = compress(lconvert.read(case_models.folder(LLAMA)), job())
    one = out.entries["layers.0.attn.q"]
    del out
    gc.collect()
    assert values(one.data).any() and list(tmp_path.iterdir())
    del one
    gc.collect()
    assert not list(tmp_path.iterdir())


# --- memory, numbers, devices ----------------------------------------------------------------------------


def test_hidden_states_go_to_a_file_where_memory_is_short(tmp_path: Path) -> None:
    model = lconvert.read(case_models.folder(LLAMA))
    whole = compress(model, job())
    with pytest.raises(
        OptionError, match=r"--memory 0\.1 MB: calibration needs .* for a layer, .* lower the context"
    ):
        compress(model, job(memory=100_000))
    low, high = 100_000, 1 << 30
    while high - low > 10_000:  # the least memory that is enough
        middle = (low + high) // 2
        try:
            shown = text.windows(model, job().calibration)
            budget.plan(
                Forward(model, lazily=True),
                model.decoder,
                shown,
                job(memory=middle),
                reference=False,
                statistics=0,
            )
            high = middle
        except OptionError:
            low = middle
    with pytest.raises(
        OptionError, match="for a layer or the head"
    ):  # a head that is changed is in memory like a layer
        wide = replace(model.decoder, vocab=64 * model.decoder.vocab)
        budget.plan(
            Forward(model, lazily=True),
            wide,
            shown,
            job(memory=high),
            reference=False,
            statistics=0,
            head=True,
        )
    spilled: list[Path] = []

    def visit(block: Block) -> Mapping[str, Entry]:
        spilled.extend(tmp_path.glob("*/*.spill"))
        return {r: replace(rounded(model, r), provenance=("rounded",)) for s in block.stages for r in s}

    out = walk(model, job(memory=high, work=tmp_path), visit, what="rounding", key="k")
    assert spilled and not list(tmp_path.glob("*/*.spill"))
    assert same(replace(out, report=()), replace(whole, report=()))


def test_states_of_half_the_size_are_nearly_the_same() -> None:
    model = lconvert.read(case_models.folder(LLAMA))
    sums: dict[str, list[float]] = {}
    for kept in ("f32", "bf16"):

        def visit(block: Block, kept: str = kept) -> Mapping[str, Entry]:
            found = Moments()
            block.observe({block.stages[-1][0]: found})
            sums.setdefault(kept, []).append(float(found.squares.sum()))
            return {}

        walk(model, job(activations=kept), visit, what="test", key="0")
    assert sums["f32"] != sums["bf16"] and sums["bf16"] == pytest.approx(sums["f32"], rel=0.02)


@pytest.mark.parametrize(
    ("role", "named"), [("layers.1.mlp.up", "layers.1.mlp.down"), ("layers.0.attn.v", "layers.0.attn.o")]
)
def test_numbers_that_are_none_are_reported_where_they_begin(role: str, named: str) -> None:
    model = lconvert.read(case_models.folder(LLAMA))
    bad = np.array(effective(model.entries[role]))
    bad[3] = 3e38  # a number, whose products are none
    broken = model.with_entries({role: replace(model.entries[role], data=dense(bad))})
    with pytest.raises(InputError, match=f"the input of {named} holds NaN or infinite values"):
        walk(broken, job(), lambda block: {}, what="test", key="0")

    def look(block: Block) -> Mapping[str, Entry]:
        block.observe({s[0]: Moments() for s in block.stages})
        return {}

    with pytest.raises(InputError, match=f"the input of {named} holds NaN or infinite values"):
        walk(broken, job(), look, what="test", key="0")
    bad = bad.copy()
    bad[3, 5] = np.nan
    broken = model.with_entries({role: replace(model.entries[role], data=dense(bad))})
    with pytest.raises(InputError, match=f"{role} holds NaN or infinite values, first in row 3"):
        walk(broken, job(), look, what="test", key="0")


def test_devices_and_names_that_are_not_there() -> None:
    model = lconvert.read(case_models.folder(LLAMA))
    if not torch.cuda.is_available():
        with pytest.raises(OptionError, match="--device cuda: no GPU"):
            walk(model, job(device="cuda"), lambda block: {}, what="test", key="0")
    with pytest.raises(OptionError, match="--device gpu7: no such device"):
        walk(model, job(device="gpu7"), lambda block: {}, what="test", key="0")
    with pytest.raises(ValueError, match="is no entry of block 0"):
        walk(model, job(), lambda block: {"norm": model.entries["norm"]}, what="test", key="0")
    with pytest.raises(ValueError, match="needs walk\\(reference=True\\)"):
        walk(
            model,
            job(),
            lambda b: b.observe({b.stages[0][0]: Hessian()}, reference=True) or {},
            what="test",
            key="0",
        )  # type: ignore[func-returns-value]


def test_progress_counts_blocks() -> None:
    told: list[tuple[str, int, int]] = []
    model = lconvert.read(case_models.folder(LLAMA))
    walk(model, job(progress=lambda *a: told.append(a)), lambda block: {}, what="looking", key="0")
    total = model.decoder.layers + (not model.decoder.tied)
    assert told == [("looking", i + 1, total) for i in range(total)]


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral", "gemma3_text", "phi3"])
def test_parts_that_are_done_are_not_computed_again(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Attention runs once per layer and window, and a second time for the one batch on which its module is watched; results are the same bits."""
    name = next(c.name for c in arch_cases.load() if c.model_type == family)
    model = lconvert.read(case_models.folder(name))
    runs, found = [0], []
    attend = torch.nn.functional.scaled_dot_product_attention

    def counted(*args: Any, **kwargs: Any) -> Any:
        runs[0] += 1
        return attend(*args, **kwargs)

    def visit(block: Block) -> Mapping[str, Entry]:
        before = runs[0]
        moments = {}
        for stage in block.stages:
            watch = {role: Moments() for role in stage}
            block.observe(watch)
            moments |= watch
        out = torch.cat(list(block.outputs()))
        found.append((out, {r: m.squares for r, m in moments.items()}, runs[0] - before))
        return {}

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", counted)
    walk(model, job(), visit, what="test", key="0")
    replayed, found = found, []
    monkeypatch.setattr("lconvert.primitives.sequential._ENDS", {})
    walk(model, job(), visit, what="test", key="0")
    for (out, squares, few), (wanted, wanted_squares, many) in zip(replayed, found, strict=True):
        assert torch.equal(out, wanted)
        for role, x in wanted_squares.items():
            assert squares[role] is None if x is None else torch.equal(squares[role], x), role
        assert (few, many >= 4) == (2, True) or many == 0  # the head


def test_what_was_kept_is_forgotten_when_something_before_it_changes() -> None:
    name = next(c.name for c in arch_cases.load() if c.model_type == "llama")
    model = lconvert.read(case_models.folder(name))

    def visit(block: Block) -> Mapping[str, Entry]:
        if block.is_head:
            return {}
        at = f"layers.{block.index}."
        for role in ("attn.q", "attn.o", "mlp.up", "mlp.down", "attn_norm", "mlp_norm"):
            for _ in range(3):  # kept, watched, played back
                list(block.outputs())
            block.set(at + role, block.weight(at + role) * 1.25)
            got = torch.cat(list(block.outputs()))
            with torch.no_grad():
                wanted = torch.cat([block.module(b.hidden, **b.kwargs) for b in block.batches()])
            assert torch.equal(got, wanted), role
        return {}

    walk(model, job(), visit, what="test", key="0")
