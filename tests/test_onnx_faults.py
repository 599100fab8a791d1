"""Planted faults of ONNX graphs: each fails the tier that it is about, and no good artifact is accused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

for package in ("torch", "transformers", "onnx", "onnxruntime", "tokenizers"):
    pytest.importorskip(package, reason=f"{package} is not installed")

import lconvert
from lconvert.converters import onnx, onnx_presets, targets
from lconvert.errors import InputError, UnsupportedError
from lconvert.executor import execute
from lconvert.recipe import Recipe, step
from lconvert.validators.report import TIERS
from tests import case_models
from tests.conftest import DEMO
from tests.faults.graphs import FAULTS, GraphFault, plant

#: Flags of hf-to-onnx, and what stands for other kinds of artifacts.
_STEPS = {"uint4": {"grid": "uint4", "group": 32}, "gptq": {"grid": "int4", "group": 32}}
GOOD = [
    *dict.fromkeys((f.model, f.type) for f in FAULTS),
    ("demo", "int8"),
    ("mistral-window", "fp32 static"),
    ("gemma2-alternating", "int8"),
    ("gpt2-tied", "int8"),
    ("mixtral-experts", "int8"),
]


class Artifacts:
    """Sources and good artifacts, made once."""

    def __init__(self, root: Path):
        self.root = root
        self.made: dict[tuple[str, str], tuple[Path, Path]] = {}

    def get(self, model: str, type_: str) -> tuple[Path, Path]:
        """(source, folder of the graph)."""
        if (model, type_) not in self.made:
            self.made[model, type_] = self._make(model, type_)
        return self.made[model, type_]

    def _make(self, model: str, type_: str) -> tuple[Path, Path]:
        source = DEMO if model == "demo" else case_models.folder(CASES.get(model, model))
        read = lconvert.read(source)
        out = self.root / f"{model}-{type_}"
        type_, *shape = type_.split()
        dialect = "genai" if "genai" in shape else "ort"
        options = onnx.Options(dialect, static_cache="static" in shape, last_logit="last" in shape)
        if type_ == "gptq":  # quantized before: its integers are carried
            folder = self.root / f"{model}-source"
            execute(targets.plan(Recipe("", (step("rtn", _STEPS[type_]),)).apply(read), "gptq", "x"), folder)
            source, read = folder, lconvert.read(folder)
        elif type_ in _STEPS:
            read = Recipe("", (step("rtn", _STEPS[type_]),)).apply(read)
        elif type_ != "fp32":
            read = onnx_presets.recipe(type_, dialect).apply(read)
        execute(onnx.plan(read, options), out)
        return source, out


#: Names of cases by what the table of faults calls them.
CASES = {"llama-untied": "llama-gqa"}


@pytest.fixture(scope="module")
def artifacts(tmp_path_factory: pytest.TempPathFactory) -> Artifacts:
    return Artifacts(tmp_path_factory.mktemp("graphs"))


def judged(
    source: Path, folder: Path, root: Path, tiers: tuple[str, ...]
) -> tuple[list[tuple[str, str]], str]:
    """Failed (tier, check), and the message where the artifact is refused."""
    options: dict[str, Any] = {"context": 128, "max_windows": 2, "greedy": (2, 8), "threads": 1}
    try:
        report = lconvert.validate(source, folder, tiers=tiers, cache=root / "logits", **options)
    except (InputError, UnsupportedError) as e:
        return [], str(e)
    return [(c.tier, c.name) for c in report.checks if c.passed is False], ""


@pytest.mark.parametrize("fault", FAULTS, ids=lambda f: str(f.id))
def test_every_fault_is_caught_in_its_tier(fault: GraphFault, artifacts: Artifacts, tmp_path: Path) -> None:
    source, good = artifacts.get(fault.model, fault.type)
    tiers = tuple(t for t in TIERS[: TIERS.index(fault.tier) + 1] if t != "tokens")
    failed, refused = judged(source, plant(fault, good, tmp_path / "bad"), artifacts.root, tiers)
    tier = "structure" if refused else next((t for t in TIERS if t in {t for t, _ in failed}), "survived")
    assert tier == fault.tier, (failed, refused)
    assert fault.says in refused or any(fault.says in name for _, name in failed), (failed, refused)


@pytest.mark.parametrize(("model", "type_"), GOOD, ids=lambda x: str(x))
def test_no_good_artifact_is_accused(model: str, type_: str, artifacts: Artifacts) -> None:
    source, good = artifacts.get(model, type_)
    failed, refused = judged(source, good, artifacts.root, tuple(TIERS))
    if model != "demo" and not type_.startswith(
        "fp32"
    ):  # what 8 bits cost a model of random weights is no fault of the graph
        failed = [(tier, name) for tier, name in failed if name != "cost: KL divergence"]
    assert not failed and not refused, (failed, refused)


def test_the_planter_knows_nothing_of_lconvert() -> None:
    text = Path(__file__).with_name("faults").joinpath("graphs.py").read_text()
    assert "import lconvert" not in text and "from lconvert" not in text
    assert len({f.id for f in FAULTS}) == len(FAULTS) >= 45
