"""Types under a budget: sizes against the plans of real artifacts, fused groups, the recipe that repeats a result, the command line."""

from __future__ import annotations

import importlib
import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import yaml
from click.testing import CliRunner

import lconvert
from lconvert import passes, recipe
from lconvert.cli import compress
from lconvert.converters import targets
from lconvert.errors import OptionError
from lconvert.ir import Model, QTensor
from lconvert.kernels.qtensor import values
from lconvert.passes import allocate, deployable
from lconvert.plan import refusals
from lconvert.primitives import allocator
from lconvert.primitives.job import Calibration, Job
from lconvert.primitives.placement import patterns
from tests import random_models
from tests.conftest import DEMO

PLANNED = {"gguf": "gguf", "vllm": "vllm", "onnx": "onnx", "trt": "tensorrt-llm"}


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "calibration.txt"
    path.write_text(
        "It is a truth universally acknowledged, that a single man in possession of a good fortune. " * 20
    )
    return path


@pytest.fixture(scope="module")
def demo() -> Model:
    return lconvert.read(DEMO)


@pytest.fixture(scope="module")
def search(demo: Model, text: Path) -> allocate.Search:
    """Few types of the 8 kinds that gguf has, so that this file stays quick."""
    options = allocate.Options("gguf", bpw=5.0, types=("Q3_K", "Q4_K", "Q6_K"), windows=2, context=64)
    return allocate.Search(demo, options, Job(Calibration(str(text))))


def _mixed(model: Model, target: str) -> tuple[Model, int]:
    """Types of a target taken in turn, and the bytes that the size model gives the result."""
    menu = deployable.menu(model, target)
    round_ = allocate.Rounding(model, {})
    entries, size = {}, menu.fixed
    for n, choice in enumerate(menu.choices):
        name = list(choice.sizes)[n % len(choice.sizes)]
        size += choice.sizes[name]
        entries |= {r: round_.entry(r, name) for r in choice.roles if name != "none"}
    return model.with_entries(entries), size


@pytest.mark.parametrize("target", ["gguf", "vllm", "onnx", "trt"])
def test_predicted_bytes_are_those_of_the_artifact(demo: Model, target: str) -> None:
    """Every type of the target in one artifact, which its planner accepts. GGUF and vLLM to the byte; graphs have tables besides."""
    model, size = _mixed(demo, target)
    plan = targets.plan(model, PLANNED[target], "m.gguf" if target == "gguf" else "m", original=demo)
    assert refusals(plan) == []
    held = sum(-(-i.nbytes // 32) * 32 if target == "gguf" else i.nbytes for i in plan.items())
    if target in ("gguf", "vllm"):
        assert held == size
    else:
        assert held == pytest.approx(size, rel=0.03)


@pytest.mark.parametrize(
    ("family", "target", "together"),
    [
        ("llama", "vllm", ("layers.0.attn.q", "layers.0.attn.k", "layers.0.attn.v")),
        ("mixtral", "gguf", tuple(f"layers.1.moe.experts.{e}.up" for e in range(4))),
        ("mixtral", "vllm", ("layers.1.moe.experts.2.gate", "layers.1.moe.experts.2.up")),
        ("phi3", "gguf", ("layers.0.attn.q", "layers.0.attn.k", "layers.0.attn.v")),
    ],
)
def test_what_a_runtime_loads_as_one_has_one_type(
    family: str, target: str, together: tuple[str, ...], tmp_path: Path
) -> None:
    case = importlib.import_module(f"tests.arch_cases.{family}").CASES[0]
    model = lconvert.read(random_models.build(case, tmp_path / "m"))
    types = ("Q8_0", "Q4_0") if target == "gguf" else ("int8:-1", "none")
    groups = {c.roles for c in deployable.menu(model, target, types).choices}
    assert together in groups


def test_rows_that_blocks_of_256_do_not_divide_get_blocks_of_32(tmp_path: Path) -> None:
    case = importlib.import_module("tests.arch_cases.llama").CASES[0]
    narrower = replace(case, config=case.config | {"intermediate_size": 96})
    model = lconvert.read(random_models.build(narrower, tmp_path / "m"))
    narrow = {
        c.name: set(c.sizes)
        for c in deployable.menu(model, "gguf").choices
        if model.entries[c.name].shape[1] % 256
    }
    assert narrow
    assert all("Q4_0" in n and not any("_K" in t for t in n) for n in narrow.values())
    with pytest.raises(OptionError, match=r"rows of \d+ values fit none of Q4_K; allow another type"):
        deployable.menu(model, "gguf", ("Q4_K",))


def test_the_budget_is_kept_and_nothing_better_fits(search: allocate.Search) -> None:
    found = search.outcome()
    assert found.bpw <= 5.0 < found.bpw + 0.2
    front = allocator.front(search.items)
    assert found.allocation.loss <= min(a.loss for a in front if a.size <= found.allocation.size)
    assert 0.3 < found.allocation.loss / found.measured < 3
    made = search.model_of(found)
    file = lconvert.plan_gguf(made, "m.gguf")
    assert sum(-(-i.nbytes // 32) * 32 for i in file.items()) == found.size
    assert all(v.verdict.kind in ("exact", "widened") for v in file.items())


def test_measured_values_are_those_of_the_file(search: allocate.Search) -> None:
    for type_ in ("Q3_K", "Q4_K", "Q6_K"):
        q = search.rounding.tensor("layers.1.mlp.down", type_)
        assert abs(values(q) - search.rounding.values("layers.1.mlp.down", type_)).max() < 1e-6


def test_max_kld_is_what_is_measured(search: allocate.Search) -> None:
    bound = (search.outcome(search.budget()).measured + search.measure_all("Q3_K")) / 2
    best, measured = search.below(bound)
    assert measured <= bound
    assert measured == pytest.approx(search.measure(best), rel=1e-6)
    assert best.size < search.budget()
    with pytest.raises(OptionError, match=r"a KLD of 1e-09 is out of reach: the widest types measure 0\.0"):
        search.below(1e-9)


def test_refinement_never_loses(search: allocate.Search) -> None:
    from lconvert.primitives import evolve

    start = allocator.within(search.items, search.budget())
    found = evolve.refine(
        search.items, start, search.budget(), search.measure, generations=1, offspring=2, seed=1
    )
    assert found.allocation.size <= search.budget()
    assert found.measured <= found.before
    again = evolve.refine(
        search.items, start, search.budget(), search.measure, generations=1, offspring=2, seed=1
    )
    assert again == found


@pytest.mark.parametrize("driver", ["evolve", "optuna"])
def test_refinement_finds_what_single_losses_hide(driver: str) -> None:
    """Two items whose losses are small alone and large together: only a measurement of both shows it."""
    from lconvert.primitives import evolve
    from lconvert.primitives.allocator import Allocation, Item, Option

    if driver == "optuna":
        pytest.importorskip("optuna", reason="optuna is not installed")
    options = (Option("s", 1, 1.0), Option("l", 2, 0.0))
    items = [Item(n, (n,), options) for n in "abcd"]

    def measure(a: Allocation) -> float:
        low = [n for n, o in a.names().items() if o == "s"]
        return len(low) + (10.0 if {"a", "b"} <= set(low) or {"c", "d"} <= set(low) else 0.0)

    start = Allocation(dict(zip("abcd", (options[0], options[0], options[1], options[1]), strict=True)))
    assert allocator.within(items, 6).loss == 2
    found = evolve.refine(items, start, 6, measure, generations=20, driver=driver)
    assert (found.before, found.measured) == (12.0, 2.0)


def test_a_recipe_repeats_the_choice(
    search: allocate.Search, demo: Model, text: Path, tmp_path: Path
) -> None:
    from lconvert.cli import allocating

    found = search.outcome()
    path = tmp_path / "r.yaml"
    path.write_text(allocating.recipe(search, found).to_yaml())
    assert yaml.safe_load(path.read_text())["schema"] == "lconvert.recipe/1"
    loaded = recipe.load(path)
    once = search.model_of(found)
    again = loaded.apply(demo, Job(Calibration(str(text))))
    plain = loaded.apply(demo)
    for role, entry in once.entries.items():
        assert type(again.entries[role].data) is type(entry.data)
        if isinstance(entry.data, QTensor):
            assert plain.entries[role].data.grid == entry.data.grid  # type: ignore[union-attr]
            np.testing.assert_array_equal(values(again.entries[role].data), values(entry.data))
    assert "allocate" in passes.PASSES


def test_grids_of_experts_name_all_of_a_layer(tmp_path: Path) -> None:
    case = importlib.import_module("tests.arch_cases.mixtral").CASES[0]
    model = lconvert.read(random_models.build(case, tmp_path / "m"))
    found = patterns({f"layers.{i}.moe.experts.{e}.up": "Q4_0" for i in (0, 2) for e in range(4)}, 3)
    assert found == {r"layers\.(0|2)\.moe\.experts\.\d+\.up": "Q4_0"}
    mixed = {"layers.0.moe.experts.0.up": "int4:32", "layers.0.moe.experts.1.up": "int8:-1", "embed": "Q6_K"}
    made = patterns(mixed, model.decoder.layers)
    for role, type_ in mixed.items():
        assert [t for p, t in made.items() if re.fullmatch(p, role)] == [type_]
    assert model.decoder.layers >= 2


def test_command_line(text: Path, tmp_path: Path) -> None:
    out, saved, front = tmp_path / "m.lcir", tmp_path / "r.yaml", tmp_path / "front.json"
    arguments = [
        str(DEMO),
        "--target",
        "gguf",
        "--size",
        "1400K",
        "--calibrate",
        str(text),
        "--types",
        "Q4_K,Q6_K",
        "--calibration-windows",
        "3",
    ]
    result = CliRunner().invoke(
        compress.command,
        [*arguments, "-o", str(out), "--recipe-out", str(saved), "--pareto", str(front)],
        standalone_mode=False,
    )
    assert result.exception is None, result.output
    assert "measured KLD of the whole on the calibration text, rounded to nearest: " in result.output
    assert re.search(r"Q4_K +\d+ ", result.output) and "chosen" in result.output
    lowered = lconvert.plan_gguf(lconvert.read(out), "m.gguf")
    assert 1_300_000 < lowered.size <= 1_400_000
    rows = json.loads(front.read_text())["front"]
    assert [r["size"] for r in rows] == sorted(r["size"] for r in rows)
    (made,) = recipe.load(saved).steps
    assert made.name == "allocate" and (made.options.windows, made.options.context) == (3, 256)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--target", "gguf"], r"--target needs one of --bpw, --size and --max-kld; found none of them"),
        (["--target", "gguf", "--bpw", "4", "--size", "1M"], r"found --bpw and --size"),
        (["--bpw", "4"], r"choose among a target's types; add --target"),
        (["--target", "gguf", "--bpw", "4", "--recipe", "int8"], r"--recipe and --target both say"),
        (
            ["--target", "gguf", "--bpw", "4"],
            r"allocate: needs a calibration text; name one \(--calibrate TEXT\)",
        ),
        (["--target", "gguf", "--bpw", "4", "--pareto", "x.pdf"], r"x\.pdf: the front is written as \.svg"),
    ],
)
def test_mistakes_on_the_command_line(arguments: list[str], message: str, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match=message):
        CliRunner().invoke(
            compress.command, [str(DEMO), "-o", str(tmp_path / "m.lcir"), *arguments], standalone_mode=False, catch_exceptions=False
        )  # fmt: skip


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"bpw": 4.0, "size": 9}, "found bpw and size"),
        ({"bpw": -1.0}, r"bpw -1\.0; expected a positive number"),
        ({"bpw": 4.0, "target": "coreml"}, "target 'coreml'; choose gguf, vllm, onnx, trt"),
        ({"bpw": 4.0, "sensitivity": "guess"}, "sensitivity 'guess'; choose imatrix"),
        ({"bpw": 4.0, "grids": {"head": "Q6_K"}}, "grids say every type, so bpw has no effect"),
        ({"max_kld": 0.1, "refine": 2}, "refine lowers the KLD of a size"),
    ],
)
def test_options_that_contradict(given: dict[str, object], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        allocate.Options(**given)  # type: ignore[arg-type]


def test_no_budget(demo: Model) -> None:
    with pytest.raises(OptionError, match="needs one of bpw, size and max_kld, found none"):
        allocate.run(demo, allocate.Options())


def test_a_budget_below_everything_says_the_smallest(search: allocate.Search) -> None:
    small = allocate.Options("gguf", bpw=2.0, types=("Q3_K", "Q4_K", "Q6_K"), windows=2, context=64)
    kept, search.options = search.options, small
    try:
        with pytest.raises(
            OptionError, match=r"2\.0 bits per weight is too small .* \(3\.4\d+ bits per weight\)"
        ):
            search.budget()
    finally:
        search.options = kept
