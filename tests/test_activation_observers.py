"""Static scales that leave the largest inputs out: against inputs that hooks gather from transformers' own model."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

for package in ("torch", "transformers"):
    pytest.importorskip(package, reason=f"{package} is not installed")
import torch
import transformers

import lconvert
from lconvert.errors import OptionError
from lconvert.ir import Model, Transform, dense
from lconvert.kernels.qtensor import effective
from lconvert.kernels.reference.rounding import short_scale
from lconvert.passes import activations, rtn
from lconvert.passes.observers import OBSERVERS, Histogram
from lconvert.primitives import importance
from lconvert.primitives import text as text_windows
from lconvert.primitives.job import Calibration, Job
from lconvert.primitives.statistics import Magnitudes
from lconvert.primitives.text import Windows, windows
from tests import case_models
from tests.conftest import DEMO, ROOT

LARGEST = {"int8": 127, "fp8": 448}
CHOICES = [
    ("int8", "percentile"),
    ("int8", "entropy"),
    ("int8", "mse"),
    ("fp8", "percentile"),
    ("fp8", "mse"),
]


def quantized() -> Model:
    return rtn.run(lconvert.read(DEMO), rtn.Options("int8", -1))


@pytest.fixture(scope="module")
def calibration(tmp_path_factory: pytest.TempPathFactory) -> Calibration:
    path = tmp_path_factory.mktemp("text") / "calib.txt"
    path.write_text((ROOT / "README.md").read_text(encoding="utf-8")[:3000], encoding="utf-8")
    return Calibration(str(path), windows=4, context=64)


@pytest.fixture(scope="module")
def seen(calibration: Calibration) -> dict[str, Any]:
    """All values that enter each linear module of a layer, by role, in transformers' model with the int8 weights."""
    model, theirs = (
        quantized(),
        transformers.AutoModelForCausalLM.from_pretrained(
            DEMO, dtype=torch.float32, attn_implementation="eager", local_files_only=True
        ).eval(),
    )
    found: dict[str, list[Any]] = {}

    def hook(role: str) -> Any:
        return lambda module, args: found.setdefault(role, []).append(args[0].numpy().ravel())

    with torch.no_grad():
        for name, module in theirs.named_modules():
            if isinstance(module, torch.nn.Linear) and "layers." in name:
                _, layer, part, leaf = name.rsplit(".", 3)
                block = {"self_attn": "attn", "mlp": "mlp"}[part]
                role = f"layers.{layer}.{block}.{leaf.removesuffix('_proj')}"
                module.weight.copy_(torch.from_numpy(effective(model.entries[role])))
                module.register_forward_pre_hook(hook(role))
        for ids in windows(model, calibration).ids:
            theirs(torch.tensor([list(ids)]), use_cache=False)
    assert len(found) == 21
    return {role: np.concatenate(parts) for role, parts in found.items()}


def scales(model: Model) -> dict[str, float]:
    found = {name: e.activation for name, e in model.entries.items()}
    return {n: float(np.asarray(a.scale.load())[0]) for n, a in found.items() if a is not None and a.scale}


def observed(calibration: Calibration, grid: str, observer: str) -> dict[str, float]:
    options = activations.Options(grid, dynamic=False, observer=observer)
    return scales(activations.run(quantized(), options, Job(calibration)))


def shortened(scale: float) -> float:
    return float(short_scale(np.float32([scale]), 8)[0])


def rounded(x: Any, scale: float, grid: str) -> Any:
    """As the runtime computes with it, by torch."""
    t = torch.from_numpy(x) / scale
    if grid == "int8":
        return (t.round().clamp(-128, 127) * scale).numpy()
    return (t.clamp(-448, 448).to(torch.float8_e4m3fn).float() * scale).numpy()


def squared_error(x: Any, scale: float, grid: str) -> float:
    return float(np.square(rounded(x, scale, grid).astype(np.float64) - x).sum())


@pytest.mark.parametrize("grid", LARGEST)
def test_minmax_is_what_it_was(calibration: Calibration, grid: str) -> None:
    found = observed(calibration, grid, "minmax")
    moments = importance.measure(quantized(), Job(calibration)).moments
    assert found == {r: shortened(float(moments[r].peak.max()) / LARGEST[grid]) for r in found}
    assert len(found) == 21
    default = activations.run(quantized(), activations.Options(grid, dynamic=False), Job(calibration))
    assert scales(default) == found
    assert default.entries["layers.0.attn.q"].provenance[-1] == f"inputs {grid}, static"


@pytest.mark.parametrize(("grid", "observer"), CHOICES)
def test_a_scale_is_the_observers_of_all_inputs(
    calibration: Calibration, seen: dict[str, Any], grid: str, observer: str
) -> None:
    found = observed(calibration, grid, observer)
    whole = observed(calibration, grid, "minmax")
    assert found.keys() == seen.keys()
    for role, x in seen.items():
        size, peak = np.abs(x).astype(np.float64), float(np.abs(x).max())
        width = 2.0 ** math.frexp(peak)[1] / 4096
        bins = math.floor(peak / width) + 1
        counts = np.histogram(size, bins, (0, bins * width))[0]
        if (grid, observer) == ("fp8", "mse"):
            shares = [bins * width * (1 - i / 100) for i in range(81)]
            want = min(shares, key=lambda s: squared_error(x, shortened(s / 448), grid))
        else:
            _, want = OBSERVERS[observer](Histogram(counts, 0.0, bins * width), True)
        if observer == "percentile":
            covered = np.sort(size)[math.ceil(0.9999 * len(size)) - 1]
            assert want == pytest.approx(covered, abs=width)
        top = found[role] * LARGEST[grid]
        if (grid, observer) == (
            "fp8",
            "mse",
        ):  # many ranges are nearly as good: middles of bins may choose another
            best = squared_error(x, shortened(want / 448), grid)
            assert squared_error(x, found[role], grid) <= 1.01 * best, role
        else:
            assert top == pytest.approx(min(want, peak), rel=2.0**-8, abs=width), role
        assert found[role] <= whole[role]
    assert any(found[r] < whole[r] for r in found), "what was left out"
    assert found["layers.1.attn.q"] == found["layers.1.attn.k"] == found["layers.1.attn.v"]


@pytest.mark.parametrize("grid", LARGEST)
def test_least_squares_lose_no_more_than_minmax(
    calibration: Calibration, seen: dict[str, Any], grid: str
) -> None:
    found, whole = observed(calibration, grid, "mse"), observed(calibration, grid, "minmax")
    ours = {r: squared_error(x, found[r], grid) for r, x in seen.items()}
    theirs = {r: squared_error(x, whole[r], grid) for r, x in seen.items()}
    assert all(ours[r] <= theirs[r] for r in seen), {r: ours[r] / theirs[r] for r in seen}
    assert sum(ours.values()) < sum(theirs.values())


def test_the_layers_experts_lend_their_range(monkeypatch: pytest.MonkeyPatch) -> None:
    model = rtn.run(lconvert.read(case_models.folder("mixtral-experts")), rtn.Options("int8", -1))
    monkeypatch.setattr(text_windows, "windows", lambda model, calibration: Windows(((5, 6),)))
    job = Job(Calibration("two tokens"))
    out = activations.run(model, activations.Options(dynamic=False, observer="mse"), job)
    seen, *_ = importance.watched(model, job, Magnitudes)
    unseen = [r for r, m in seen.items() if not m.count]
    found = scales(out)
    for role in unseen:
        layer, kind = role.split(".experts.")[0], role.rsplit(".", 1)[1]
        assert found[role] == max(found[r] for r in seen if r.startswith(layer) and r.endswith("." + kind))
    assert unseen and any("no token of the text chose " + unseen[0] in line for line in out.report)


@pytest.mark.parametrize("observer", sorted(OBSERVERS))
def test_inputs_that_are_always_zero(
    calibration: Calibration, observer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = quantized()
    norm = model.entries["layers.1.mlp_norm"]
    model = model.with_entries({norm.name: replace(norm, data=dense(np.zeros(norm.shape, np.float32)))})
    out = activations.run(model, activations.Options(dynamic=False, observer=observer), Job(calibration))
    assert scales(out)["layers.1.mlp.up"] == 1
    assert any("layers.1.mlp.up" in line and "their scale is 1" in line for line in out.report)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"observer": "median", "dynamic": False}, "'median'; choose minmax, percentile, entropy, mse"),
        ({"observer": "mse"}, "observer mse with dynamic; the runtime finds such scales"),
        ({"observer": "mse", "per": "tensor"}, "observer mse with dynamic"),
        ({"observer": "percentile", "grid": "fp4"}, "observer percentile with fp4; its groups cover"),
        ({"observer": "entropy", "grid": "fp8", "dynamic": False}, "with fp8; it compares codes of equal steps"),
    ],
)  # fmt: skip
def test_refusals(options: Any, said: str) -> None:
    with pytest.raises(OptionError, match=said):
        activations.Options(**options)


def test_inputs_that_are_scaled_by_channel_have_minmax_alone(calibration: Calibration) -> None:
    model, name = quantized(), "layers.1.mlp.down"
    entry = model.entries[name]
    factors = dense(np.full(entry.shape[1], 2, np.float32))
    model = model.with_entries({name: replace(entry, transform=Transform("scale", "input", factors, False))})
    with pytest.raises(OptionError, match=rf"observer mse: the inputs of {name} are scaled by channel"):
        activations.run(model, activations.Options(dynamic=False, observer="mse"), Job(calibration))
    options = activations.Options(dynamic=False, observer="mse", ignore=name)
    assert name not in scales(activations.run(model, options, Job(calibration)))
