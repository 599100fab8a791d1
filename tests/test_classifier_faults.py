"""Planted faults of graphs that classify: each fails the tier that it is about, and no good artifact is accused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

for package in ("torch", "transformers", "onnx", "onnxruntime"):
    pytest.importorskip(package, reason=f"{package} is not installed")
import torch
from torch import nn

import lconvert
from lconvert.converters import convnet, hf, onnx
from lconvert.errors import InputError, UnsupportedError
from lconvert.executor import execute
from lconvert.passes import static
from lconvert.passes.examples import arrays
from lconvert.validators.report import TIERS
from tests.faults.classifier_graphs import FAULTS
from tests.faults.graphs import GraphFault, plant
from tests.small_classifiers import bert, sentences

_IMAGE = (2, 12, 11)
GOOD = [
    *dict.fromkeys((f.model, f.type) for f in FAULTS),
    ("distilbert", "fp32"), ("distilbert", "w8a8"), ("distilbert", "trt"), ("bert", "trt"), ("bert", "tensor"), ("bert", "weights"),
    ("cnn", "trt"), ("cnn", "tensor"), ("cnn", "weights"), ("cnn", "average"),
]  # fmt: skip
_STATIC = {
    "w8a8": static.Options(),
    "average": static.Options(),
    "tensor": static.Options("tensor", observer="mse"),
    "trt": static.Options(symmetric=True),
}


def _cnn(folder: Path, pool: Any) -> None:
    torch.manual_seed(1)
    steps = [
        nn.Conv2d(2, 6, 3, padding=1),
        nn.ReLU(),
        pool(2),
        nn.Conv2d(6, 8, (3, 2), stride=2),
        nn.ReLU(),
        nn.Flatten(),
    ]
    body = nn.Sequential(*steps).eval()
    width = body(torch.zeros(1, *_IMAGE)).shape[1]
    module = nn.Sequential(*steps, nn.Linear(width, 20), nn.Tanh(), nn.Linear(20, 5)).eval()
    execute(hf.plan(convnet.from_torch(module, _IMAGE)), folder)


class Artifacts:
    """Sources, what they are shown, and good artifacts, made once."""

    def __init__(self, root: Path):
        self.root = root
        self.made: dict[tuple[str, str], tuple[Path, Path, Path]] = {}

    def get(self, model: str, type_: str) -> tuple[Path, Path, Path]:
        """(source, file of examples, folder of the graph)."""
        if (model, type_) not in self.made:
            self.made[model, type_] = self._make(model, type_)
        return self.made[model, type_]

    def _make(self, model: str, type_: str) -> tuple[Path, Path, Path]:
        from lconvert.converters import onnx_presets

        folder = self.root / f"{model}-{type_}"
        if model == "cnn":
            _cnn(folder / "m", nn.AvgPool2d if type_ == "average" else nn.MaxPool2d)
            x = np.random.default_rng(3).random((48, *_IMAGE), dtype=np.float32)
            shown = {"images": np.sqrt(x)}
        else:
            wide = (
                {"dim": 64, "n_heads": 2}
                if model == "distilbert"
                else {"hidden_size": 64, "num_attention_heads": 2}
            )
            bert(
                model, folder / "m", **(wide if type_ == "trt" else {})
            )  # TensorRT's heads are 32 wide at least
            shown = sentences(model, tuple(range(2, 40, 2)) + (40,) * 5)
        np.savez(folder / "examples.npz", **shown)
        read = lconvert.read(folder / "m")
        if type_ in _STATIC:
            read = static.run(read, _STATIC[type_], examples=arrays(read, folder / "examples.npz").batches())
        if type_ == "weights":
            read = onnx_presets.recipe("int8", "ort").apply(read)
        execute(onnx.plan(read, onnx.Options("trt" if type_ == "trt" else "ort")), folder / "o")
        return folder / "m", folder / "examples.npz", folder / "o"


@pytest.fixture(scope="module")
def artifacts(tmp_path_factory: pytest.TempPathFactory) -> Artifacts:
    return Artifacts(tmp_path_factory.mktemp("graphs"))


def judged(
    source: Path, shown: Path, folder: Path, tiers: tuple[str, ...]
) -> tuple[list[tuple[str, str]], str]:
    """Failed (tier, check), and the message where the artifact is refused."""
    try:
        report = lconvert.validate(source, folder, tiers=tiers, text=shown, threads=1, cache=False)
    except (InputError, UnsupportedError) as e:
        return [], str(e)
    assert report.checks and all(np.isfinite(c.measured) for c in report.checks if c.measured is not None)
    return [(c.tier, f"{c.name}: {c.value}") for c in report.checks if c.passed is False], ""


@pytest.mark.parametrize("fault", FAULTS, ids=lambda f: str(f.id))
def test_every_fault_is_caught_in_its_tier(fault: GraphFault, artifacts: Artifacts, tmp_path: Path) -> None:
    source, shown, good = artifacts.get(fault.model, fault.type)
    tiers = tuple(t for t in TIERS[: TIERS.index(fault.tier) + 1] if t != "tokens")
    failed, refused = judged(source, shown, plant(fault, good, tmp_path / "bad"), tiers)
    tier = "structure" if refused else next((t for t in TIERS if t in {t for t, _ in failed}), "survived")
    assert tier == fault.tier, (failed, refused)
    assert fault.says in refused or any(fault.says in name for _, name in failed), (failed, refused)


@pytest.mark.parametrize(("model", "type_"), GOOD, ids=lambda x: str(x))
def test_no_good_artifact_is_accused(model: str, type_: str, artifacts: Artifacts) -> None:
    source, shown, good = artifacts.get(model, type_)
    failed, refused = judged(source, shown, good, tuple(TIERS))
    assert not failed and not refused, (failed, refused)


def test_the_planter_knows_nothing_of_lconvert() -> None:
    text = Path(__file__).with_name("faults").joinpath("classifier_graphs.py").read_text()
    assert "import lconvert" not in text and "from lconvert" not in text
    assert len({f.id for f in FAULTS}) == len(FAULTS) >= 35
