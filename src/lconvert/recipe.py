"""Recipes: which passes run, in which order, with which options. YAML files and built-in presets.

schema: lconvert.recipe/1
passes:
  - rtn: {grid: int4, group: 128, search: mse}
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from lconvert import passes
from lconvert.errors import OptionError
from lconvert.ir import Model
from lconvert.primitives.job import Job

SCHEMA = "lconvert.recipe/1"

#: Name -> (what it is for, passes).
PRESETS: Mapping[str, tuple[str, list[dict[str, dict[str, Any]]]]] = {
    "int4-g128": ("4 bits symmetric, groups of 128: exact in Q4_0, GPTQ-style and ONNX int4", [{"rtn": {"grid": "int4"}}]),
    "int4-g32-mse": ("4 bits symmetric, groups of 32, scales by least squares",
                     [{"rtn": {"grid": "int4", "group": 32, "search": "mse"}}]),
    "uint4-g32": ("4 bits asymmetric, groups of 32: exact in Q4_1", [{"rtn": {"grid": "uint4", "group": 32}}]),
    "int8": ("8 bits symmetric, one scale per row: exact in Q8_0", [{"rtn": {"grid": "int8", "group": -1}}]),
    "q4_k": ("llama.cpp's Q4_K grid", [{"rtn": {"grid": "Q4_K"}}]),
    "mxfp4": ("OCP MXFP4, groups of 32", [{"rtn": {"grid": "MXFP4"}}]),
    "nvfp4": ("NVFP4 as ggml encodes it, groups of 16", [{"rtn": {"grid": "NVFP4"}}]),
}  # fmt: skip


@dataclass(frozen=True)
class Step:
    """One pass with its options (an instance of the pass module's `Options`)."""

    name: str
    options: Any


@dataclass(frozen=True)
class Recipe:
    name: str
    steps: tuple[Step, ...]

    def apply(self, model: Model, job: Job = Job()) -> Model:  # noqa: B008 - immutable
        """The model after every pass; each one checks its result."""
        for step in self.steps:
            model = passes.find(step.name).run(model, step.options, job)
        return model


def step(name: str, options: Mapping[str, Any]) -> Step:
    """One pass with its options, checked."""
    return _step(name, {name: dict(options)})


def _step(where: str, item: Any) -> Step:
    if not isinstance(item, dict) or len(item) != 1:
        raise OptionError(f"{where}: each pass is one mapping such as 'rtn: {{grid: int4}}', found {item!r}")
    ((name, given),) = item.items()
    kind = passes.find(name).Options
    known = {f.name for f in fields(kind)}
    given = given or {}
    if not isinstance(given, dict) or set(given) - known:
        wrong = sorted(set(given) - known) if isinstance(given, dict) else given
        raise OptionError(
            f"{where}: unknown option {wrong!r} of pass {name}; options: {', '.join(sorted(known))}"
        )
    try:
        return Step(name, kind(**given))
    except TypeError as e:
        raise OptionError(f"{where}: options of pass {name}: {e}") from None


def load(recipe: str | Path) -> Recipe:
    """A preset by name, or a YAML file."""
    text = str(recipe)
    if text in PRESETS:
        return Recipe(text, tuple(_step(text, item) for item in PRESETS[text][1]))
    path = Path(recipe)
    if not path.is_file():
        raise OptionError(f"{text}: neither a recipe file nor a preset; presets: {', '.join(PRESETS)}")
    import yaml

    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as e:
        raise OptionError(f"{path}: not readable as YAML ({e})") from None
    if not isinstance(data, dict) or data.get("schema") != SCHEMA:
        raise OptionError(f"{path}: expected 'schema: {SCHEMA}' at the top")
    if (
        set(data) - {"schema", "passes", "name"}
        or not isinstance(data.get("passes"), list)
        or not data["passes"]
    ):
        raise OptionError(f"{path}: expected a list of passes and nothing else")
    return Recipe(str(data.get("name", path.stem)), tuple(_step(str(path), item) for item in data["passes"]))
