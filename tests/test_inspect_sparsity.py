"""`lconvert inspect --sparsity`: zeros and patterns as they were made, of dense and of quantized weights, as text and as JSON."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

import lconvert
from lconvert import recipe
from lconvert.converters import lcir
from lconvert.executor import execute
from lconvert.kernels.qtensor import effective
from lconvert.primitives.masks import parse
from tests.conftest import DEMO
from tests.test_cli import inside


def pruned(out: Path, pattern: str, grid: str = "") -> Path:
    """The demo model with matrices of its first MLP pruned by magnitude, and rounded where a grid is named."""
    keep = parse(pattern)
    given = {"method": "magnitude", "targets": r"layers\.0\.mlp\..*"}
    given |= {"pattern": pattern} if keep.of else {"sparsity": 0.5}
    steps = [recipe.step("sparse", given)]
    steps += [recipe.step("rtn", {"grid": grid, "group": 32})] if grid else []
    model = recipe.Recipe("r", tuple(steps)).apply(lconvert.read(DEMO))
    execute(lcir.plan(model, {}), out, threads=1)
    return out


def shown(*args: object) -> str:
    code, out, err = inside(["inspect", *map(str, args)])
    assert (code, err) == (0, ""), err
    return out


@pytest.mark.parametrize(
    ("pattern", "grid"), [*((p, g) for p in ("2:4", "4:8", "") for g in ("", "int4")), ("2:4", "Q4_K")]
)
def test_zeros_and_patterns(tmp_path: Path, pattern: str, grid: str) -> None:
    path = pruned(tmp_path / "m.lcir", pattern or "unstructured", grid)
    data = json.loads(shown(path, "--sparsity", "--json"))
    model = lconvert.read(path)
    for t in data["tensors"]:
        want = float((effective(model.entries[t["name"]]) == 0).mean())
        assert t["zeros"] == pytest.approx(want, abs=1e-12), t["name"]
        if grid == "Q4_K" or not t["name"].startswith("layers.0.mlp."):
            assert t["pattern"] == "", t["name"]
        else:
            assert t["pattern"] == pattern and t["zeros"] >= 0.49, t["name"]
    for kind, total in data["totals"].items():
        of = [t for t in data["tensors"] if t["type"] == kind]
        zeros = sum(t["zeros"] * np.prod(t["shape"]) for t in of)
        assert total["zeros"] == pytest.approx(zeros / total["weights"])


def test_as_text(tmp_path: Path) -> None:
    path = pruned(tmp_path / "m.lcir", "2:4")
    lines = {line.split()[0]: line.split() for line in shown(path, "--sparsity").splitlines() if line.strip()}
    assert lines["role"][-2:] == ["zeros", "pattern"]
    assert lines["layers.0.mlp.up"][-2:] == ["50.00%", "2:4"]
    assert lines["layers.0.attn.q"][-1].endswith("%") and lines["type"][-1] == "zeros"
    assert "pattern" not in shown(path)


def test_without_the_flag_nothing_is_read() -> None:
    data = json.loads(shown(DEMO, "--json"))
    assert all("zeros" not in t for t in [*data["tensors"], *data["totals"].values()])
