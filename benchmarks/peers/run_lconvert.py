"""Our own methods, run as the peers are. See driver.py; the interpreter is one that has lconvert.

A recipe is one by name (`lconvert recipes`), or its passes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from driver import Case, Task, main

import lconvert
from lconvert import recipe as recipes
from lconvert.converters import lcir
from lconvert.executor import execute
from lconvert.forward import Forward
from lconvert.primitives.job import Calibration, Job

Passes = list[dict[str, dict[str, Any]]]


def case(recipe: str | Passes) -> Case:
    def run(task: Task) -> None:
        windows, context = task.ids.shape
        model = lconvert.read(str(task.model))
        Forward(
            model, lazily=True
        )  # imports the model's classes: the peers have theirs before the clock runs, too
        job = Job(Calibration(task.text, windows, context))
        if isinstance(recipe, str):
            steps = recipes.load(recipe).steps
        else:
            steps = tuple(recipes.step(name, options) for item in recipe for name, options in item.items())
        with task.clock.running():
            model = recipes.Recipe("", steps).apply(model, job)
        execute(lcir.plan(model, {}), task.folder)

    return Case(run, {"recipe": recipe})


def rtn(grid: str, group: int | str, search: str = "minmax") -> Passes:
    return [{"rtn": {"grid": grid, "group": group, "search": search}}]


CASES: Mapping[str, Case] = {
    "rtn-w4g128": case(rtn("int4", 128)),
    "rtn-w4g32": case(rtn("int4", 32)),
    "rtn-w3g128": case(rtn("int3", 128)),
    "rtn-mse-w4g128": case(rtn("int4", 128, "mse")),
    "rtn-mse-w4g32": case(rtn("int4", 32, "mse")),
    "rtn-mse-w3g128": case(rtn("int3", 128, "mse")),
    **{
        f"rtn-{code}-importance{'-signed' * signed}": case([{"rtn": {"grid": grid, "group": group, "search": "importance", "signed": signed}}])
        for code, grid, group in (("w4g128", "int4", 128), ("w4g32", "int4", 32), ("w3g128", "int3", 128))
        for signed in (False, True)
    },
    "w8a8": case([{"rtn": {"grid": "int8", "group": -1}}, {"activations": {"grid": "int8"}}]),
    "sparsegpt-2of4-w4g128": case("sparsegpt-2of4-w4g128"),
    **{
        name: case(name)
        for name in (
            "fp8-dynamic", "fp8-static", "nvfp4", "mxfp4", "nvfp4-w4a4", "mxfp4-w4a4", "nf4", "gptq-w4g128", "gptq-w4g32", "gptq-w3g128", "gptaq-w4g128",
            "gptq-nvfp4", "gptq-mxfp4", "gptq-q4_k", "autoround-w4g128", "autoround-w4g32", "autoround-q4_k", "smoothquant-w8a8", "sparsegpt-50", "sparsegpt-2of4", "wanda-2of4", "magnitude-50",
        )
    },
    "awq-w4g128": case([{"awq": {"grid": "int4", "group": 128}}]),
    "awq-w4g128-asym": case("awq-w4g128"),
    "gptq-w4g128-asym": case([{"gptq": {"grid": "uint4", "group": 128}}]),
    "gptaq-w4g128-asym": case([{"gptq": {"grid": "uint4", "group": 128, "asymmetric": True}}]),
    "gptaq-w4g32": case([{"gptq": {"grid": "int4", "group": 32, "asymmetric": True}}]),
    "gptaq-w3g128": case([{"gptq": {"grid": "int3", "group": 128, "asymmetric": True}}]),
    **{
        f"autoround-{code}-signed": case([{"autoround": {"grid": grid, "group": group, "signed": True}}])
        for code, grid, group in (("w4g128", "int4", 128), ("w4g32", "int4", 32), ("w3g128", "int3", 128), ("w2g32", "int2", 32))
    },
    "autoround-w3g128": case([{"autoround": {"grid": "int3", "group": 128}}]),
    "autoround-w2g32": case([{"autoround": {"grid": "int2", "group": 32}}]),
    "gptq-q3_k": case([{"gptq": {"grid": "Q3_K"}}]),
    "gptq-q2_k": case([{"gptq": {"grid": "Q2_K"}}]),
    "wanda-50": case([{"sparse": {"method": "wanda"}}]),
    "magnitude-2of4": case([{"sparse": {"method": "magnitude", "pattern": "2:4"}}]),
}  # fmt: skip

if __name__ == "__main__":
    main("lconvert", ("lconvert",), CASES)
