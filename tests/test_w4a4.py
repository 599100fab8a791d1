"""MXFP4 inputs beside MXFP4 weights: what they are, what takes them, what refuses them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import lconvert
from lconvert import recipe as recipes
from lconvert.converters import targets
from lconvert.converters.kinds import matrices
from lconvert.errors import OptionError
from lconvert.executor import execute
from lconvert.ir import E2M1, Model
from lconvert.kernels.qtensor import dequantize
from lconvert.passes import activations, rtn
from lconvert.validators import yardstick
from tests.conftest import DEMO

pytest.importorskip("torch", reason="torch is not installed")


def made(recipe: str) -> Model:
    return recipes.Recipe("", recipes.load(recipe).steps).apply(lconvert.read(DEMO))


@pytest.mark.parametrize("target", ["vllm", "compressed-tensors"])
def test_mxfp4_inputs_come_back_as_they_went(target: str, tmp_path: Path) -> None:
    model = made("mxfp4-w4a4")
    plan = targets.plan(model, target, "m")
    kinds = {str(i.verdict.kind) for i in plan.items() if i.sources[0].startswith("layers.") and i.held}
    assert kinds == {"exact"}
    execute(plan, tmp_path / "m")
    groups = json.loads((tmp_path / "m" / "config.json").read_text())["quantization_config"]["config_groups"]
    (inputs,) = {json.dumps(g["input_activations"], sort_keys=True) for g in groups.values()}
    # What compressed-tensors' own preset MXFP4 says (quantization/quant_scheme.py).
    wanted = {"num_bits": 4, "type": "float", "strategy": "group", "group_size": 32, "dynamic": True}
    assert wanted.items() <= json.loads(inputs).items()
    back = lconvert.read(tmp_path / "m")
    for name, e in matrices(model).items():
        a, b = e.activation, back.entries[name].activation
        assert a is not None and a == b, name
        assert (a.grid, a.per, a.dynamic, a.group, a.scale) == (E2M1, "group", True, 32, None)
        assert np.array_equal(dequantize(e.data), dequantize(back.entries[name].data))  # type: ignore[arg-type]


def test_rounded_inputs_cost_something() -> None:
    source = lconvert.read(DEMO)
    measure = yardstick.Yardstick(source, [np.random.default_rng(3).integers(3, 250, 32).tolist()])
    alone, with_inputs = (measure(made(r))["kld_mean"] for r in ("mxfp4", "mxfp4-w4a4"))
    assert with_inputs > 1.2 * alone > 0


@pytest.mark.parametrize("grid", ["fp4", "int4", "NVFP4"])
def test_other_weights_have_no_mxfp4_inputs(grid: str) -> None:
    group: Any = {} if grid != "int4" else {"group": 32}
    model = rtn.run(lconvert.read(DEMO), rtn.Options(grid=grid, **group))
    with pytest.raises(OptionError, match=r"layers\.\S+ is no MXFP4 matrix"):
        activations.run(model, activations.Options("mxfp4"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"grid": "mxfp4", "dynamic": False}, "the runtime finds its exponents"),
        ({"grid": "mxfp4", "group": 16}, "group 16 with mxfp4, whose groups are of 32"),
        ({"grid": "fp4", "group": 32}, "group 32 with fp4, whose groups are of 16"),
        ({"grid": "mxfp4", "per": "token"}, "per token with groups"),
        ({"grid": "mxfp4", "observer": "mse"}, "its groups cover their largest magnitudes"),
    ],
)
def test_options_that_contradict_the_format(options: Any, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        activations.Options(**options)
