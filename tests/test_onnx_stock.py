"""Graphs with integer weights against ONNX Runtime's own quantizer."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("onnx", reason="onnx is not installed")
pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
pytest.importorskip("transformers", reason="transformers is not installed")

import lconvert
from lconvert.converters import onnx, onnx_presets
from lconvert.executor import execute
from lconvert.ir import QTensor, dense
from lconvert.passes import rtn
from lconvert.validators import parity, stock_onnx
from tests.conftest import DEMO

WEIGHTS = r".*\.(q|k|v|o|gate|up|down)"


def validated(model: lconvert.ir.Model, out: Path) -> dict[str, bool | None]:
    execute(onnx.plan(model, original=lconvert.read(DEMO)), out)
    report = parity.validate(DEMO, out, tiers=["logits"], max_windows=4)
    assert {r["measure"] for r in report.details["logits"]} >= {"cost", "fidelity", "stock"}
    return {c.name: c.passed for c in report.checks}


def test_int4_loses_no_more_than_the_runtimes_own_quantizer(tmp_path: Path) -> None:
    found = validated(onnx_presets.recipe("int4", "ort").apply(lconvert.read(DEMO)), tmp_path / "m")
    assert found["no worse than the stock encoder"] is True


def test_a_coarser_choice_of_scales_is_seen(tmp_path: Path) -> None:
    """max|x| / 7 leaves one of the sixteen codes unused: every graph is right, and the model is worse than it need be."""
    model = rtn.run(lconvert.read(DEMO), rtn.Options(grid="int4", group=32, targets=WEIGHTS))
    found = validated(model, tmp_path / "m")
    assert found["fidelity: KL divergence"] is True
    assert found["no worse than the stock encoder"] is False


@pytest.mark.parametrize(
    ("group", "grid"), [(32, "int4"), (32, "uint4"), (64, "uint8"), (16, "int2"), (-1, "int8")]
)
def test_the_rival_has_the_artifacts_blocks(group: int, grid: str) -> None:
    """Rounded to as many steps: the error of each matrix is near to that of ours, and its values are few."""
    source = lconvert.read(DEMO)
    made = rtn.run(source, rtn.Options(grid=grid, group=group, targets=WEIGHTS))
    rival = stock_onnx.rival(source, made)
    assert not isinstance(rival, str)
    for name, entry in made.entries.items():
        if isinstance(entry.data, QTensor):
            x = rival.entries[name].data.load()  # type: ignore[union-attr]
            blocks = x.reshape(-1, x.shape[1] if group == -1 else group)
            counts = [len(np.unique(b)) for b in blocks[:50]]
            assert max(counts) <= 1 << entry.data.grid.bits
        else:
            assert rival.entries[name] is source.entries[name]


@pytest.mark.parametrize(
    ("grid", "group", "reason"), [("int5", 32, "no such grid"), ("int4", 8, "no such grid"), ("fp8", -1, "no such grid")]
)  # fmt: skip
def test_what_the_peer_does_not_have_is_said(grid: str, group: int, reason: str) -> None:
    source = lconvert.read(DEMO)
    made = rtn.run(source, rtn.Options(grid=grid, group=group, targets=WEIGHTS))
    assert reason in str(stock_onnx.rival(source, made))
    assert "quantized itself" in str(stock_onnx.rival(made, made))
    bare = replace(source.entries["norm"], data=dense(np.ones(2, np.float32)))
    assert "no weight" in str(stock_onnx.rival(source, source.with_entries({"norm": bare}, "")))
