"""Zeros that pruning left arrive in every target where they were: dense, and under int4 and int8."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import lconvert
from lconvert.converters import checkpoint
from lconvert.executor import execute
from lconvert.ir import Entry, Model
from lconvert.kernels.qtensor import values
from lconvert.passes import rtn
from lconvert.primitives import zeros
from lconvert.primitives.zeros import Bits
from tests.conftest import DEMO


def matrix(entry: Entry) -> bool:
    return entry.name.startswith("layers.") and len(entry.shape) == 2


@pytest.fixture(scope="module")
def pruned() -> Model:
    """The demo model, the two least magnitudes of every four weights of its layers set to 0."""
    model = lconvert.read(DEMO)
    new = {}
    for name, entry in model.entries.items():
        if matrix(entry):
            cut = np.abs(values(entry.data)).reshape(-1, 4)
            keep = np.argsort(np.argsort(cut, axis=1, kind="stable"), axis=1) >= 2
            new[name] = Entry(name, zeros.masked(entry.data, Bits.of(keep.reshape(entry.shape))))  # type: ignore[arg-type]
    return model.with_entries(new)


def same_zeros(found: Model, wanted: Model) -> None:
    """The values of `wanted`, and 2:4 among them."""
    seen = 0
    for name, entry in found.entries.items():
        if matrix(entry):
            there, here = values(wanted.entries[name].data), values(entry.data)
            assert np.array_equal(here, there), name
            assert zeros.measured(entry.data).pattern == "2:4", name
            seen += 1
    assert seen == 21


@pytest.mark.parametrize(
    ("grid", "target"),
    [
        *((g, "compressed-tensors") for g in ("", "int4:32", "int8:-1", "uint4:32")),
        *((g, "gguf") for g in ("", "int4:32", "int8:-1")),
    ],
)
def test_exact_zeros_in_files(pruned: Model, tmp_path: Path, grid: str, target: str) -> None:
    name, _, group = grid.partition(":")
    model = rtn.run(pruned, rtn.Options(name, int(group))) if grid else pruned
    if target == "gguf":
        out = tmp_path / "m.gguf"
        options: dict[str, Any] = {} if grid else {"ftype": "BF16"}
        lconvert.convert(model, out, **options)
    else:
        out = tmp_path / "m"
        execute(
            checkpoint.plan(model, checkpoint.Options(format="compressed-tensors"), lconvert.read(DEMO)), out
        )
    same_zeros(lconvert.read(out), model)
