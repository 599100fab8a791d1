"""What every method that rounds by the inputs of matrices has in common: what it refuses, and what becomes of experts without inputs."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import lconvert
from lconvert import passes
from lconvert.converters.methods import METHODS
from lconvert.errors import OptionError
from lconvert.ir import QTensor, Transform, dense
from lconvert.primitives import text
from lconvert.primitives.job import Calibration, Job
from tests import arch_cases, case_models
from tests.conftest import DEMO, ROOT
from tests.test_cli import inside

TEXT = ROOT / "validators" / "text" / "excerpt.txt"
JOB = Job(Calibration(str(TEXT), windows=4, context=64))
#: Options that make a run short.
QUICK: dict[str, dict[str, Any]] = {
    "gptq": {},
    "awq": {"ratios": 2, "clip": "none"},
    "autoround": {"iterations": 6, "batch": 2, "precision": "f32"},
    "rtn": {"search": "importance"},
}


@pytest.mark.parametrize("name", QUICK)
def test_what_is_refused(name: str) -> None:
    found, model = passes.find(name), lconvert.read(DEMO)
    for options, job, message in (
        ({"group": 32, "targets": ".*"}, JOB, "embed is a table that is looked up"),
        ({"group": 32, "targets": "nothing"}, JOB, "no dense matrix matches"),
        ({"group": 32}, Job(), "needs a calibration text"),
        ({"group": 48}, JOB, r"layers\.0\.\S+: rows of \d+ values do not divide into groups of 48"),
        ({"group": 32}, replace(JOB, memory=1 << 20), "--memory"),
    ):
        with pytest.raises(OptionError, match=message):
            found.run(model, found.Options(**QUICK[name], **options), job)


@pytest.mark.parametrize("name", QUICK)
def test_an_input_with_a_scale_of_its_own_is_refused(name: str) -> None:
    """The layer computes with the product; rounding that and keeping the scale would count it twice."""
    model, role = lconvert.read(DEMO), "layers.1.mlp.down"
    entry = model.entries[role]
    scale = Transform("scale", "input", dense(np.full(entry.shape[1], 2.0, np.float32)), folded=False)
    found = passes.find(name)
    with pytest.raises(OptionError, match=rf"{name}: {role}: its input has a scale that is not folded"):
        found.run(
            model.with_entries({role: replace(entry, transform=scale)}),
            found.Options(group=32, **QUICK[name]),
            JOB,
        )


@pytest.mark.parametrize("name", ["gptq", "autoround", "rtn"])
def test_experts_that_no_token_chose_are_rounded_by_themselves(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = text.Windows(((5, 6),))  # two tokens, of which each chooses two experts of four in each layer
    monkeypatch.setattr(text, "windows", lambda model, calibration: one)
    model = lconvert.read(case_models.folder(next(n for n in arch_cases.some(1) if n.startswith("mixtral"))))
    router = "layers.0.moe.router"
    rows = np.zeros(model.entries[router].shape, np.float32)
    rows[:2] = np.array([[1], [2]])  # with a negative sum of inputs the other two win
    model = model.with_entries({router: replace(model.entries[router], data=dense(rows))})
    found = passes.find(name)
    done = found.run(model, found.Options("int4", 32, **QUICK[name]), JOB)
    experts = [n for n in done.entries if ".experts." in n]
    assert experts and all(isinstance(done.entries[n].data, QTensor) for n in experts)
    said = {
        line.split(": ")[1] for line in done.report if "no token of the calibration text came here" in line
    }
    assert said and said == {n for n in experts if "no input seen" in done.entries[n].provenance[-1]}
    rounded = {"rtn": "importance"}.get(name, "loss")
    assert any(rounded in done.entries[n].provenance[-1] for n in experts)


@pytest.mark.parametrize("name", ["gptaq", "awq", "autoround", "quarot", "sparsegpt", "magnitude", "rtn"])
def test_what_a_method_makes_passes_its_proof(name: str, tmp_path: Path) -> None:
    """Weights that a method replaced are no faults: they are held against what it made, and what the model predicts against the original."""
    pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
    out = tmp_path / "m.gguf"
    given = ["--calibrate", TEXT, "--calibration-windows", 16, "--calibration-context", 128]
    args = ["hf-to-gguf", DEMO, "--q6_k", "--method", name, *(given if METHODS[name].text else []), "-o", out]
    code, _, err = inside([*map(str, args), "--no-validate", "--no-card"])
    assert code == 0, err
    pruned = name in ("sparsegpt", "magnitude")
    report = lconvert.validate(
        DEMO, out, tiers=["structure", "tensors", "logits"], max_windows=1, relative=name == "sparsegpt"
    )
    failed = [c.name for c in report.checks if c.passed is False]
    # half of the weights of so small a model cost more than gates allow, and that is said
    assert failed == (["cost: KL divergence"] if pruned else []), failed
    equal = [c.value for c in report.checks if c.name == "equal to the compressed model"]
    assert bool(equal) == (name != "rtn") and not any("replaced by" in line for line in report.not_proven)
    unproven = [line for line in report.not_proven if "what the target rounded" in line]
    assert ["of embed, head, which rotate and gptq" in line for line in unproven] == [True] * (
        name == "quarot"
    )
    assert any(c.name == "beside the stock encoder, which prunes nothing" for c in report.checks) == (
        name == "sparsegpt"
    )
    assert report.stats("fidelity")["kld"]["mean"] < 0.01
