"""Recipes: which passes run, in which order, with which options, calibrated on how much text. YAML files; those in recipes/ have names.

    schema: lconvert.recipe/1
    about: one line
    calibration: {windows: 128, context: 2048}
    passes:
      - rtn: {grid: int4, group: 128, search: mse}

calibration: windows, context, seed and text as primitives/job.py has them; the command line goes before it. A text's path is relative to the
recipe's folder. passes: each one a mapping of its name to its options, which are the fields of its `Options`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, Field, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from lconvert import passes, recipe_check
from lconvert.errors import OptionError, meant
from lconvert.ir import Model
from lconvert.primitives.job import Calibration, Job

SCHEMA = "lconvert.recipe/1"
FOLDER = Path(__file__).with_name("recipes")
_LARGEST = 1 << 20  # bytes; an allocation of some thousand tensors takes a tenth
_KEYS = ("schema", "name", "about", "calibration", "passes")


@dataclass(frozen=True)
class Step:
    """One pass with its options (an instance of the pass module's `Options`)."""

    name: str
    options: Any

    def to_json(self) -> dict[str, dict[str, Any]]:
        """As a recipe says it: what differs from the defaults."""
        found = {f.name: getattr(self.options, f.name) for f in fields(self.options)}
        said = {f.name: found[f.name] for f in fields(self.options) if found[f.name] != _default(f)}
        return {self.name: {k: dict(v) if isinstance(v, Mapping) else v for k, v in said.items()}}


def _default(of: Field[Any]) -> Any:
    return of.default_factory() if of.default_factory is not MISSING else of.default


@dataclass(frozen=True)
class Recipe:
    """calibration: how much of which text the passes see where nobody says otherwise."""

    name: str
    steps: tuple[Step, ...]
    about: str = ""
    calibration: Calibration = field(default_factory=Calibration)

    def of(self, model: Model) -> Recipe:
        """The recipe for this model; those that flags stand for differ by the kind of model."""
        return self

    def apply(self, model: Model, job: Job | None = None) -> Model:
        """The model after every pass; each one checks its result. job: the run; by default one with the recipe's calibration."""
        recipe = self.of(model)
        job = job or Job(recipe.calibration)
        for step in recipe.steps:
            model = passes.find(step.name).run(model, step.options, job)
        return model

    def to_json(self) -> dict[str, Any]:
        """The recipe as plain data, for manifests."""
        return {"name": self.name, "passes": [s.to_json() for s in self.steps]}

    def to_yaml(self) -> str:
        """The recipe as a file that `load` reads; its calibration text is for the command line to name."""
        import yaml

        c = self.calibration
        sizes = {"windows": c.windows, "context": c.context, "seed": c.seed}
        said = {k: v for k, v in sizes.items() if v != getattr(Calibration(), k)}
        data = {"schema": SCHEMA, "about": self.about, "calibration": said, **self.to_json()}
        return yaml.safe_dump({k: v for k, v in data.items() if v}, sort_keys=False, width=1000)


def step(name: str, options: Mapping[str, Any]) -> Step:
    """One pass with its options, checked."""
    return Step(name, recipe_check.options("recipe", name, options))


def names() -> list[str]:
    """The recipes that have a name."""
    return sorted(p.stem for p in FOLDER.glob("*.yaml"))


def load(recipe: str | Path) -> Recipe:
    """A recipe by name, or out of a YAML file. OptionError says where it is wrong, and what is expected."""
    text, path = str(recipe), Path(recipe)
    if text in names():
        return parse(text, (FOLDER / f"{text}.yaml").read_text(encoding="utf-8"), FOLDER)
    if not path.is_file():
        raise OptionError(
            f"{text}: neither a recipe file nor a recipe's name; {meant(text, names())}names: {', '.join(names())}"
        )
    try:
        if path.stat().st_size > _LARGEST:
            raise OptionError(f"{path}: {path.stat().st_size / 1e6:.0f} MB; a recipe is a short text")
        content = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as e:
        raise OptionError(f"{path}: cannot be read as UTF-8 text ({e})") from None
    return parse(str(path), content, path.parent)


def parse(where: str, content: str, folder: Path) -> Recipe:
    """A recipe out of YAML text. where: what messages call it. folder: where the paths of texts begin."""
    data = _yaml(where, content)
    if not isinstance(data, dict) or data.get("schema") != SCHEMA:
        raise OptionError(f"{where}: expected 'schema: {SCHEMA}' at the top")
    if unknown := [k for k in data if k not in _KEYS]:
        hint = meant(unknown[0], _KEYS)
        raise OptionError(f"{where}: unknown key {unknown[0]!r}; {hint}a recipe has {', '.join(_KEYS)}")
    for key in ("name", "about"):
        if not isinstance(data.get(key, ""), str):
            raise OptionError(f"{where}: {key} {data[key]!r}: expected a text")
    items = data.get("passes")
    if not isinstance(items, list) or not items:
        raise OptionError(f"{where}: expected a list of passes, such as '- rtn: {{grid: int4}}'")
    steps = tuple(_step(where, item) for item in items)
    recipe_check.stages(where, [(s.name, s.options) for s in steps])
    calibration = _calibration(where, data.get("calibration", {}), folder)
    return Recipe(data.get("name", Path(where).stem), steps, data.get("about", ""), calibration)


def _step(where: str, item: Any) -> Step:
    if isinstance(item, str):
        item = {item: {}}
    if not isinstance(item, dict) or len(item) != 1:
        raise OptionError(f"{where}: each pass is one mapping such as 'rtn: {{grid: int4}}', found {item!r}")
    ((name, given),) = item.items()
    if name not in passes.PASSES:
        hint = meant(name, passes.PASSES)
        raise OptionError(f"{where}: unknown pass {name!r}; {hint}passes: {', '.join(passes.PASSES)}")
    given = {} if given is None else given
    if not isinstance(given, dict):
        raise OptionError(f"{where}: {name}: options are a mapping such as {{grid: int4}}, found {given!r}")
    return Step(name, recipe_check.options(where, name, given))


def _calibration(where: str, given: Any, folder: Path) -> Calibration:
    known = [f.name for f in fields(Calibration)]
    if not isinstance(given, dict):
        raise OptionError(f"{where}: calibration {given!r}: expected a mapping of {', '.join(known)}")
    if unknown := [k for k in given if k not in known]:
        hint = meant(unknown[0], known)
        raise OptionError(f"{where}: calibration: unknown key {unknown[0]!r}; {hint}keys: {', '.join(known)}")
    text = given.get("text", "")
    if not isinstance(text, str):
        raise OptionError(f"{where}: calibration: text {text!r}: expected the path of a text")
    try:
        found = Calibration(**given)
    except OptionError as e:
        raise OptionError(f"{where}: {e}") from None
    return replace(found, text=str(folder / text)) if text else found


def _yaml(where: str, content: str) -> Any:
    """Plain data. Keys that occur twice and anchors are refused; 1e-5 is a number, as everywhere but in YAML 1.1."""
    import re

    import yaml

    class Loader(yaml.SafeLoader):
        def compose_node(self, parent: Any, index: Any) -> Any:
            if self.check_event(yaml.AliasEvent):
                mark = self.peek_event().start_mark  # type: ignore[no-untyped-call]
                raise yaml.composer.ComposerError(None, None, "recipes have no anchors and aliases", mark)
            return super().compose_node(parent, index)

        def construct_mapping(self, node: Any, deep: bool = False) -> Any:
            seen: set[str] = set()
            for key, _ in node.value:
                if key.value in seen if isinstance(key.value, str) else True:
                    what = (
                        f"the key {key.value!r} occurs twice"
                        if isinstance(key.value, str)
                        else "a key is no text"
                    )
                    raise yaml.constructor.ConstructorError(None, None, what, key.start_mark)
                seen.add(key.value)
            return super().construct_mapping(node, deep)

    Loader.add_implicit_resolver(
        "tag:yaml.org,2002:float", re.compile(r"[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
    )
    try:
        return yaml.load(content, Loader)
    except yaml.MarkedYAMLError as e:
        line = f"line {e.problem_mark.line + 1}: " if e.problem_mark else ""
        raise OptionError(f"{where}: not readable as YAML ({line}{e.problem})") from None
    except (yaml.YAMLError, RecursionError, ValueError) as e:
        raise OptionError(f"{where}: not readable as YAML ({' '.join(str(e).split())})") from None
