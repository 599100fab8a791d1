"""Methods by name, for `--method`: what takes the place of round-to-nearest in the passes of a flag or a recipe.

A flag says which grid every weight gets (`rtn` with its placement); a method says how it gets there. Its rounder takes the same placement,
its other passes come first: transforms, then masks. Embeddings are looked up and not multiplied, so no calibration says anything of
them: they stay with rtn.

Imports without NumPy: the help of verbs is made of this table.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

from lconvert import passes
from lconvert.errors import OptionError, meant
from lconvert.ir import Model, QTensor
from lconvert.primitives.job import Calibration
from lconvert.primitives.placement import NONE, NOTHING, TABLES, Placement
from lconvert.recipe import Recipe, Step, step


@dataclass(frozen=True)
class Method:
    """rounder: the pass that rounds, told `options` beside the placement. first: passes in front of all others. text: whether a
    calibration text is needed. scheme: what is rounded where no flag says so: weights alone (w4), with zero points (w4z), or inputs too (w8a8)."""

    about: str
    rounder: str = "rtn"
    options: Mapping[str, Any] = field(default_factory=dict)
    first: tuple[tuple[str, Mapping[str, Any]], ...] = ()
    text: bool = True
    scheme: str = "w4"


METHODS: Mapping[str, Method] = {
    "rtn": Method("round to nearest", text=False),
    "gptq": Method("GPTQ", "gptq"),
    "gptaq": Method("GPTQ that aims at the uncompressed model's outputs", "gptq", {"asymmetric": True}),
    "hqq": Method("HQQ's zero points", "hqq", text=False, scheme="w4z"),
    "awq": Method("AWQ: factors between layers, clipping, then to nearest", "awq"),
    "autoround": Method("AutoRound", "autoround"),
    "smoothquant": Method("SmoothQuant, then to nearest", first=(("smooth", {"alpha": 0.8}),), scheme="w8a8"),
    "quarot": Method("QuaRot's rotations folded into the weights, then GPTQ", "gptq", first=(("rotate", {}),)),
    "sparsegpt": Method("half of the weights zero by SparseGPT, in the sweep of GPTQ", "gptq", {"prune": 0.5}),
    "wanda": Method("half of the weights zero by Wanda, then GPTQ", "gptq", first=(("sparse", {"method": "wanda", "sparsity": 0.5}),)),
    "magnitude": Method("the smaller half of the weights zero, then to nearest", first=(("sparse", {"method": "magnitude", "sparsity": 0.5}),), text=False),
}  # fmt: skip
#: What flags and recipes do without a method.
PLAIN = "rtn"
#: Tools that compress a checkpoint by themselves, named as PRODUCER:CONFIG.
PRODUCERS = ("modelopt",)


def find(name: str) -> Method:
    if name not in METHODS:
        hint = meant(name, (*METHODS, *PRODUCERS))
        raise OptionError(f"method {name!r}; {hint}choose {', '.join(METHODS)} or modelopt:CONFIG")
    return METHODS[name]


def produces(name: str) -> bool:
    """Whether a method is a producer's; OptionError where its configuration is not named."""
    producer, _, config = name.partition(":")
    if producer not in PRODUCERS:
        return False
    if not config:
        raise OptionError(
            f"--method {name}: add one of its configurations, such as {producer}:INT4_AWQ_CFG or {producer}:FP8_DEFAULT_CFG"
        )
    return True


def without_preset(target: str, name: str) -> Recipe:
    """What a method does to a model where no flag and no recipe says what is rounded: 4 bits in groups of 128."""
    grid = "uint4" if find(name).scheme == "w4z" else "int4"
    return Recipe(target, (step("rtn", {"grid": grid, "group": 128}),))


def applied(name: str, recipe: Recipe, text: str) -> Recipe:
    """`recipe` with a method in the place of round-to-nearest. text: the calibration text, "" for none.

    OptionError where the recipe rounds by another method or not at all, and where a text is missing.
    """
    method = find(name)
    if method.text and not (text or recipe.calibration.text):
        raise OptionError(f"--method {name} needs a calibration text; add --calibrate TEXT")
    rounding = [s.name for s in recipe.steps if "rounds" in passes.stages(s.name, s.options)]
    other = next((r for r in rounding if r not in _PLAINLY), None)
    if other is not None:
        raise OptionError(f"--method {name}: {recipe.name} rounds by {other} already; leave one of them out")
    if not rounding:
        raise OptionError(f"--method {name}: {recipe.name} rounds no weights; choose something that does")
    if name == PLAIN:
        return recipe
    steps = [step(p, o) for p, o in method.first]
    for s in recipe.steps:
        steps += _PLAINLY[s.name](s, method) if s.name in _PLAINLY else [s]
    calibration = (
        replace(recipe.calibration, windows=Calibration().windows) if method.text else recipe.calibration
    )
    return replace(recipe, steps=tuple(steps), calibration=calibration)


def _restated(rtn: Step, method: Method) -> list[Step]:
    """A rounding pass by another method; what it has no inputs for stays with rtn."""
    if method.rounder == "rtn":
        return [rtn]
    placed: dict[str, Any] = {f.name: getattr(rtn.options, f.name) for f in fields(Placement)}
    tables = [name for name in TABLES if rtn.options.of(name) is not None]
    if not tables:
        return [step(method.rounder, {**placed, **method.options})]
    placed["grids"] = dict.fromkeys(tables, NONE) | {
        k: v for k, v in placed["grids"].items() if k not in tables
    }
    left = replace(rtn.options, targets="|".join(tables), ignore="", grids=_of(tables, rtn.options))
    return [step(method.rounder, {**placed, **method.options}), replace(rtn, options=left)]


def _reallocated(allocate: Step, method: Method) -> list[Step]:
    """An allocation whose types another method rounds to; tables and lattices stay with importance-weighted searches."""
    if not allocate.options.grids:
        raise OptionError(
            "a method rounds to types that are known before; run lconvert compress --target with --recipe-out first, and give that recipe"
        )
    left = {
        pattern: type_
        for pattern, type_ in allocate.options.grids.items()
        if any(re.fullmatch(pattern, t) for t in TABLES) or _lattice(type_)
    }
    mine = {k: v for k, v in allocate.options.grids.items() if k not in left}
    steps = [step(method.rounder, {"targets": NOTHING, "grids": mine, **method.options})]
    return [*steps, replace(allocate, options=replace(allocate.options, grids=left))] if left else steps


def _lattice(type_: str) -> bool:
    """Whether the codes of a block type are not chosen one by one."""
    from lconvert.formats.gguf_blocks import SCHEMES

    scheme = SCHEMES.get(type_)
    return scheme is not None and bool(scheme.grid.lattice)


#: Passes that round to nearest, and how another method does what they say.
_PLAINLY: Mapping[str, Callable[[Step, Method], list[Step]]] = {
    "rtn": _restated,
    "allocate": _reallocated,
}


def _of(names: list[str], options: Placement) -> dict[str, str]:
    """The grids of some names, one by one."""
    return {n: str(placed) for n in names if (placed := options.of(n)) is not None}


def something_to_round(name: str, recipe: Recipe, model: Model) -> None:
    """OptionError where a model is quantized already and the method finds nothing to round."""
    rounding = [s.options for s in recipe.steps if "rounds" in passes.stages(s.name, s.options)]
    if any(not isinstance(o, Placement) or any(True for _ in o.chosen(model)) for o in rounding):
        return
    quantized = sum(isinstance(e.data, QTensor) for e in model.entries.values())
    what = f"{quantized} matrices are quantized already" if quantized else "no dense matrix matches"
    raise OptionError(
        f"--method {name}: {model.source}: {what}, so there is nothing to round; give the model as it was before, or leave "
        "out --method to carry what it has"
    )


def outline(recipe: Recipe) -> Recipe:
    """The recipe without what takes time, for plans: rounded to nearest on the same grids, so sizes and types are those of the run."""
    steps = []
    for s in recipe.steps:
        stages = passes.stages(s.name, s.options)
        plainly = s.name == "rtn" and not passes.calibrates(s.name, s.options)
        if "rounds" in stages and isinstance(s.options, Placement) and not plainly:
            steps.append(step("rtn", {f.name: getattr(s.options, f.name) for f in fields(Placement)}))
        elif not {"transforms", "masks"} & set(stages):
            steps.append(s)
    return replace(recipe, steps=tuple(steps))
