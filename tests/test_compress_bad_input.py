"""`lconvert compress` on damaged models and with wrong options: one line that says what, where and what to do, and nothing half written."""

from __future__ import annotations

import json
import re
import shutil
import warnings
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import lconvert
from lconvert import passes
from lconvert import recipe as recipes
from lconvert.converters import lcir
from lconvert.errors import InputError, OptionError
from lconvert.executor import execute
from lconvert.ir import Model, dense
from lconvert.kernels.qtensor import effective
from lconvert.passes import allocate, smooth
from lconvert.primitives.job import Calibration, Job
from tests.conftest import DEMO, ROOT
from tests.test_cli import inside

TEXT = ROOT / "validators" / "text" / "excerpt.txt"
JOB = Job(Calibration(str(TEXT), windows=4, context=64))
SHORT = ["--calibrate", str(TEXT), "--calibration-windows", "4", "--calibration-context", "64"]
DOWN, NORM = "layers.0.mlp.down", "layers.0.attn_norm"


def changed(role: str, change: Callable[[Any], None]) -> Model:
    """The demo model with other values in one entry."""
    model = lconvert.read(DEMO)
    values = np.array(effective(model.entries[role]))
    change(values)
    entry = model.entries[role]
    return model.with_entries({role: replace(entry, data=replace(dense(values), origin=entry.data.origin))})


def nan(values: Any) -> None:
    values[3, 5] = np.nan


def refused(*args: object) -> str:
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a warning would be a second line
        code, _, err = inside([*map(str, args)])
    assert code == 2 and err.startswith("lconvert: error: ") and err.count("\n") == 1, err
    return err.removeprefix("lconvert: error: ").strip()


# --- weights that are no numbers -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def damaged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo model's folder with a NaN in layer 0."""
    from safetensors.torch import load_file, save_file

    folder = tmp_path_factory.mktemp("damaged") / "m"
    shutil.copytree(DEMO, folder)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.0.mlp.down_proj.weight"][3, 5] = float("nan")
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.mark.parametrize(
    "recipe",
    ["gptq-w4g32", "awq-w4g128", "autoround-w4g32", "smoothquant-w8a8", "quarot-w4g128", "sparsegpt-50", "wanda-2of4",
     "magnitude-50", "int4-g128", "nvfp4", "nf4", "hqq-w4g64", "fp8-static"],
)  # fmt: skip
def test_weights_that_are_no_numbers_are_named(damaged: Path, recipe: str, tmp_path: Path) -> None:
    said = refused("compress", damaged, "-o", tmp_path / "m.lcir", "--recipe", recipe, *SHORT)
    assert re.search(
        r"model\.layers\.0\.mlp\.down_proj\.weight: .*(NaN|nan)|layers\.0\.mlp\.down: its weights hold NaN",
        said,
    )
    assert not list(tmp_path.iterdir()), "layer 0 is the first, so nothing is worth keeping"


def test_a_budget_for_weights_that_are_no_numbers(damaged: Path, tmp_path: Path) -> None:
    said = refused("compress", damaged, "-o", tmp_path / "m.lcir", "--target", "gguf", "--bpw", 5, *SHORT)
    assert (
        "model.layers.0.mlp.down_proj.weight: layers.0.mlp.down holds NaN or infinite values, first in row 3"
        in said
    )
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["rotate", "smooth", "awq"])
def test_norms_that_are_no_numbers(name: str) -> None:
    def infinite(values: Any) -> None:
        values[3] = np.inf

    found = passes.find(name)
    with pytest.raises(
        InputError, match=r"input_layernorm\.weight: layers\.0\.attn_norm holds NaN or infinite"
    ):
        found.run(changed(NORM, infinite), found.Options(), JOB)


@pytest.mark.parametrize("grid", ["int4", "Q4_K", "uint4"])
def test_weights_whose_scales_are_too_large(grid: str) -> None:
    def large(values: Any) -> None:
        values[:, ::2] = 1e30

    found, role = passes.find("gptq"), "layers.0.attn.q"
    with pytest.raises(
        InputError, match=rf"q_proj\.weight: {grid}\S* has no scale for it in F16; its weights are too large"
    ):
        found.run(changed(role, large), found.Options(grid, 32, targets=role), JOB)


# --- channels that nothing comes through -----------------------------------------------------------------

ONE = {"targets": r"layers\.0\.attn\.q"}


@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        ("gptq", {"group": 32, **ONE}, "their weights are rounded to nearest"),
        ("awq", {"group": 32, "ratios": 2, "clip": "none", **ONE}, "their weights are rounded to nearest"),
        (
            "autoround",
            {"group": 32, "iterations": 2, "batch": 1, **ONE},
            "their weights are rounded to nearest",
        ),
        ("sparse", {"method": "sparsegpt", **ONE}, "their weights go first"),
        ("sparse", {"method": "wanda", **ONE}, "their weights go first"),
    ],
    ids=["gptq", "awq", "autoround", "sparsegpt", "wanda"],
)
def test_dead_channels_are_reported(name: str, options: Mapping[str, Any], said: str) -> None:
    def dead(values: Any) -> None:
        values[10:20] = 0

    found = passes.find(name)
    done = found.run(changed(NORM, dead), found.Options(**options), JOB)
    lines = [line for line in done.report if "10 of 256 inputs are always zero; " + said in line]
    assert len(lines) == 1 and "layers.0.attn.q" in lines[0]
    assert np.isfinite(effective(done.entries["layers.0.attn.q"])).all()


def test_static_scales_of_inputs_that_are_always_zero() -> None:
    def all_dead(values: Any) -> None:
        values[:] = 0

    done = recipes.load("fp8-static").apply(changed(NORM, all_dead), JOB)
    (line,) = [x for x in done.report if "inputs are always zero" in x]
    assert (
        line.startswith("activations: layers.0.attn.q, layers.0.attn.k, layers.0.attn.v")
        and "their scale is 1" in line
    )


def test_fewer_tokens_than_inputs_are_reported() -> None:
    found = passes.find("gptq")
    few = Job(Calibration(str(TEXT), windows=1, context=64))
    done = found.run(lconvert.read(DEMO), found.Options(group=32, **ONE), few)
    (line,) = [x for x in done.report if "fewer tokens than inputs" in x]
    assert line.startswith("gptq: layers.0.attn.q: ")
    enough = found.run(lconvert.read(DEMO), found.Options(group=32, **ONE), JOB)
    assert not any("fewer tokens" in x for x in enough.report)


# --- texts -----------------------------------------------------------------------------------------------


def test_what_a_text_is_not_is_said_once_by_every_pass(tmp_path: Path) -> None:
    (tmp_path / "hi.txt").write_text("नदी के किनारे " * 2000, encoding="utf-8")
    job = Job(Calibration(str(tmp_path / "hi.txt"), windows=2, context=64))
    done = smooth.run(lconvert.read(DEMO), smooth.Options(), job)
    done = passes.find("kv").run(done, passes.find("kv").Options(), job)
    done = passes.find("gptq").run(done, passes.find("gptq").Options(group=32, **ONE), job)
    assert sum(line.startswith("calibration: ") for line in done.report) == 1


# --- options ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--recipe", "gptq-w4g12"], "did you mean gptq-w4g128? names: "),
        (["--method", "gptqq", *SHORT], "method 'gptqq'; did you mean gptq? choose rtn, "),
        (["--recipe", "RECIPE"], "gptq: no dense matrix matches targets 'none'; targets are a regular expression for whole names such as layers.0.attn.q"),
        (["--recipe", "int8", "--memory", "lots"], "--memory 'lots': expected a number of bytes with K, M, G or T, such as 4G"),
        (["--recipe", "gptq-w4g32", *SHORT, "--memory", "0.5M"], "--memory 0.5 MB: calibration needs "),
        (["--target", "gguf", "--size", "huge", *SHORT], "--size 'huge': expected a number of bytes"),
        (["--target", "gguf", "--bpw", "inf", *SHORT], "bpw inf; expected a positive number"),
        (["--target", "gguf", "--bpw", "nan", *SHORT], "bpw nan; expected a positive number"),
        (["--target", "gguf", "--max-kld", "0", *SHORT], "max_kld 0.0; expected a positive number"),
        (["--target", "gguf", "--bpw", "0.5", *SHORT], "0.5 bits per weight is too small for this model: the smallest possible is "),
        (["--target", "gguf", "--size", "1", *SHORT], "1 bytes is too small for this model"),
        (["--target", "gguf", "--bpw", "5", "--memory", "1M", *SHORT], "--memory 1.0 MB: an allocation holds a layer in fp32, or the head and logits, 2.4 MB"),
        (["--target", "vllm", "--bpw", "9", "--types", "Q4_K", *SHORT], "vllm does not run Q4_K; it has int4:128, "),
        (["--target", "gguf", "--bpw", "5", "--types", ",", *SHORT], "--types ',': names no type"),
        (["--target", "gguf", "--bpw", "5", "--only", "foo", *SHORT], "has a choice for gguf and matches only 'foo'"),
        (["--target", "gguf", "--bpw", "5", "--device", "cuda:99", *SHORT], "--device cuda:99: torch sees "),
    ],
    ids=lambda x: " ".join(map(str, x[:4])) if isinstance(x, list) else "",
)  # fmt: skip
def test_options_are_refused_before_the_long_part(
    args: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lconvert.primitives import importance, probe

    monkeypatch.setattr(importance, "measure", lambda *a: pytest.fail("a text was run"))
    monkeypatch.setattr(probe.Probe, "__init__", lambda *a: pytest.fail("a model was loaded"))
    (tmp_path / "r.yaml").write_text("schema: lconvert.recipe/1\npasses: [{gptq: {targets: none}}]\n")
    args = [str(tmp_path / "r.yaml") if a == "RECIPE" else a for a in args]
    assert message in refused("compress", DEMO, "-o", tmp_path / "m.lcir", *args)
    assert [p.name for p in tmp_path.iterdir()] == ["r.yaml"]


@pytest.mark.parametrize(
    ("text", "size"),
    [("4G", 4 * 10**9), ("1.5G", 15 * 10**8), ("500kb", 500000), ("2T", 2 * 10**12), ("7", 7)],
)
def test_sizes(text: str, size: int) -> None:
    from lconvert.cli.common import parse_size

    assert parse_size(text) == size
    for wrong in ("0", "-1G", "1.5.2G", "G", "4 GiB", "", "１G"):
        with pytest.raises(OptionError, match="expected a number of bytes"):
            parse_size(wrong)


def test_budgets_beyond_all_types() -> None:
    """More than the widest types take is no mistake, and is said; where all stay as they are, there is nothing to round."""
    given = {"types": ("Q4_K", "Q6_K"), "only": r"layers\.0\.mlp\..*", "windows": 2, "context": 64}
    done = allocate.run(lconvert.read(DEMO), allocate.Options("gguf", bpw=40, **given), JOB)  # type: ignore[arg-type]
    assert any("the budget is more than the widest types take" in line for line in done.report)
    kept = allocate.run(lconvert.read(DEMO), allocate.Options("vllm", grids={".*": "none"}), JOB)
    assert kept.report[-1] == "allocate: every tensor stays as it is"
    with pytest.raises(
        OptionError, match="no dense matrix matches the grids: nothing; they were chosen for another"
    ):
        allocate.run(lconvert.read(DEMO), allocate.Options("gguf", grids={"nothing": "Q4_K"}), JOB)


def test_a_model_that_is_quantized_already(tmp_path: Path) -> None:
    rounded = recipes.load("int4-g128")
    execute(lcir.plan(rounded.apply(lconvert.read(DEMO)), {}), tmp_path / "q.lcir")
    said = refused(
        "compress", tmp_path / "q.lcir", "-o", tmp_path / "m.lcir", "--recipe", "gptq-w4g32", *SHORT
    )
    assert "all are quantized already, so give the model as it was before" in said


# --- what is left behind ---------------------------------------------------------------------------------


def test_fallbacks_are_in_the_report_and_the_json(tmp_path: Path) -> None:
    out = tmp_path / "m.lcir"
    args = ["compress", DEMO, "-o", out, "--recipe", "gptq-w4g32", "--calibrate", TEXT, "--calibration-windows", 1,
            "--calibration-context", 64, "--json", "--no-card"]  # fmt: skip
    code, said, err = inside([*map(str, args)])
    assert (code, err) == (0, "")
    lines = [line for line in json.loads(said)["report"] if "fewer tokens than inputs" in line]
    assert len(lines) == 3, "one for every layer"
    assert [x for x in lconvert.read(out).report if "fewer tokens than inputs" in x] == lines
