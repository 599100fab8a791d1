"""Recipes: what the shipped ones say, and what is wrong with others, said before any model is read."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, get_type_hints

import pytest

import lconvert
from lconvert import passes, recipe, recipe_check
from lconvert.errors import OptionError
from lconvert.ir import QTensor
from lconvert.passes import rtn
from lconvert.primitives.job import Calibration, Job
from lconvert.recipe import load, parse
from tests.conftest import DEMO, ROOT
from tests.test_cli import inside

HEAD = "schema: lconvert.recipe/1\n"


def parsed(text: str) -> recipe.Recipe:
    return parse("r.yaml", HEAD + text, Path("."))


# --- the shipped ones ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", recipe.names())
def test_every_shipped_recipe_loads(name: str) -> None:
    found = load(name)
    assert found.name == name and 10 < len(found.about) <= 100 and found.steps
    text = (recipe.FOLDER / f"{name}.yaml").read_text()
    assert text.startswith(f"{HEAD}about: ") and len(text.splitlines()) <= 20
    assert found.calibration.text == "", "a text is the user's"


@pytest.mark.parametrize("name", recipe.names())
def test_a_recipe_says_the_same_again(name: str) -> None:
    """What manifests record is enough to make the recipe."""
    found = load(name)
    again = json.loads(json.dumps(found.to_json()))
    assert parsed(f"passes: {json.dumps(again['passes'])}").steps == found.steps


def test_recipes_lists_them_all() -> None:
    code, out, err = inside(["recipes"])
    assert (code, err) == (0, "") and len(recipe.names()) >= 10
    listed = {line.split()[0] for line in out.splitlines() if line}
    assert set(recipe.names()) | set(passes.PASSES) <= listed
    code, out, _ = inside(["recipes", "--json"])
    data = json.loads(out)
    assert sorted(data["recipes"]) == recipe.names() and list(data["passes"]) == list(passes.PASSES)
    assert all(set(r) == {"about", "calibration", "passes"} for r in data["recipes"].values())


def test_recipes_are_part_of_the_package() -> None:
    """scikit-build-core packs whatever is in the folder and not excluded by a pattern."""
    import tomllib

    built = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["scikit-build"]
    assert built["wheel"]["packages"] == ["src/lconvert"]
    patterns = [
        *built["wheel"]["exclude"],
        *built["sdist"]["exclude"],
        *(ROOT / ".gitignore").read_text().split(),
    ]
    assert not [p for p in patterns if "yaml" in p or "recipes" in p]
    assert Path(recipe.__file__).parent / "recipes" == recipe.FOLDER


def test_every_pass_has_a_stage_and_options_that_can_be_checked() -> None:
    assert list(passes.STAGES) == list(passes.PASSES)
    for name in passes.PASSES:
        kind = passes.find(name).Options
        for hint in get_type_hints(kind).values():
            assert recipe_check._expected(hint)
        defaults = {f.name: getattr(kind(), f.name) for f in dataclasses.fields(kind)}
        assert recipe_check.options("r", name, defaults) == kind()


def test_the_calibration_of_a_recipe(tmp_path: Path) -> None:
    path = tmp_path / "own.yaml"
    path.write_text(f"{HEAD}calibration: {{text: t.txt, windows: 3, context: 16, seed: 5}}\npasses: [rtn]\n")
    found = load(path)
    assert found.name == "own" and found.calibration == Calibration(str(tmp_path / "t.txt"), 3, 16, 5)
    assert load("int8").calibration == Calibration()


def test_the_run_of_a_recipe_is_its_own_where_none_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Job] = []
    monkeypatch.setattr(rtn, "run", lambda model, options, job: seen.append(job) or model)
    found = parsed("calibration: {windows: 3}\npasses: [rtn]")
    model = lconvert.read(DEMO)
    found.apply(model)
    found.apply(model, Job(Calibration(windows=7)))
    assert [j.calibration.windows for j in seen] == [3, 7]


def test_passes_that_share_the_weights_between_them() -> None:
    found = parsed(
        "passes:\n"
        "  - rtn: {grid: int8, group: -1, targets: '.*attn.*'}\n"
        "  - rtn: {grid: int4, group: 32, ignore: '.*attn.*'}\n"
        "  - activations: {targets: '.*attn.*'}\n"
        "  - activations: {grid: fp8, ignore: '.*attn.*'}\n"
        "  - kv\n"
    )
    model = found.apply(lconvert.read(DEMO))
    bits = {n: e.data.grid.bits for n, e in model.entries.items() if isinstance(e.data, QTensor)}
    assert {b for n, b in bits.items() if ".attn." in n} == {8}
    assert {b for n, b in bits.items() if ".mlp." in n} == {4}


# --- what is wrong with a file ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "expected a list of passes, such as '- rtn: {grid: int4}'"),
        ("passes: []", "expected a list of passes"),
        ("passes: {rtn: {}}", "expected a list of passes"),
        ("passes: [3]", "each pass is one mapping such as 'rtn: {grid: int4}', found 3"),
        ("passes: [{rtn: {}, kv: {}}]", "each pass is one mapping"),
        ("passes: [rtm]", "unknown pass 'rtm'; did you mean rtn? passes: rtn, "),
        ("passes: [{7: {}}]", "unknown pass 7; passes: rtn"),
        ("passes: [{rtn: [1]}]", "rtn: options are a mapping such as {grid: int4}, found [1]"),
        ("passes: [{rtn: {groups: 3}}]", "rtn: unknown option 'groups'; did you mean group? options: grid, group, "),
        ("passes: [{rtn: {group: x}}]", "rtn: group x; expected a positive number, or -1 for a whole row"),
        ("passes: [{rtn: {group: 1.5}}]", "rtn: group 1.5: expected a whole number or a text"),
        ("passes: [{rtn: {group: true}}]", "rtn: group True: expected a whole number or a text"),
        ("passes: [{rtn: {grid: 4}}]", "rtn: grid 4: expected a text"),
        ("passes: [{rtn: {grid: null}}]", "rtn: grid None: expected a text"),
        ("passes: [{sparse: {pattern: 2:4}}]", "sparse: pattern 124: expected a text, in quotes"),
        ("passes: [{rtn: {grid: int9}}]", "rtn: grid 'int9'; did you mean int8? choose int2..int8"),
        ("passes: [{rtn: {grid: q4k}}]", "rtn: grid 'q4k'; did you mean Q4_K? choose int2..int8"),
        ("passes: [{rtn: {grid: best}}]", "rtn: grid 'best'; choose int2..int8"),
        ("pases: [rtn]", "unknown key 'pases'; did you mean passes? a recipe has schema, "),
        ("passes: [{rtn: {search: best}}]", "rtn: search 'best': expected one of minmax, signed-max, mse"),
        ("passes: [{rtn: {targets: '('}}]", "rtn: '(' is not a regular expression"),
        ("passes: [{rtn: {grids: [a]}}]", "rtn: grids ['a']: expected a mapping from a text to a text"),
        ("passes: [{rtn: {grids: {head: 8}}}]", "rtn: grids {'head': 8}: expected a mapping from a text to a text"),
        ("passes: [{kv: {windows: many}}]", "kv: windows 'many': expected a whole number"),
        ("passes: [{activations: {dynamic: maybe}}]", "activations: dynamic 'maybe': expected true or false"),
        ("passes: [{activations: {group: -2}}]", "activations: group -2; groups are dynamic"),
        ("passes: [rtn]\nsteps: 3", "unknown key 'steps'; a recipe has schema, name, about, calibration, passes"),
        ("passes: [rtn]\nname: 3", "name 3: expected a text"),
        ("passes: [rtn]\nabout: [a]", "about ['a']: expected a text"),
        ("passes: [rtn]\npasses: [kv]", "not readable as YAML (line 3: the key 'passes' occurs twice)"),
        ("passes:\n  - rtn: {grid: int4, grid: int8}", "(line 3: the key 'grid' occurs twice)"),
        ("passes: [{[a]: 3}]", "(line 2: a key is no text)"),
        ("a: &a [1]\npasses: [*a]", "(line 3: recipes have no anchors and aliases)"),
        ("passes: [", "not readable as YAML (line "),
        ("passes: [!!python/object:os.system {}]", "not readable as YAML (line 2: could not determine a constructor"),
        ("passes: " + "[" * 2000, "not readable as YAML ("),
        ("passes: [rtn]\ncalibration: 128", "calibration 128: expected a mapping of text, windows, context, seed"),
        ("passes: [rtn]\ncalibration: {window: 1}", "calibration: unknown key 'window'; did you mean windows? keys: text, windows"),
        ("passes: [rtn]\ncalibration: {tokens: 1}", "calibration: unknown key 'tokens'; keys: text, windows, context, seed"),
        ("passes: [rtn]\ncalibration: {windows: 0}", "calibration: windows 0; expected a whole number from 1 on"),
        ("passes: [rtn]\ncalibration: {context: 1.5}", "calibration: context 1.5; expected a whole number"),
        ("passes: [rtn]\ncalibration: {seed: -1}", "calibration: seed -1; expected a whole number from 0 on"),
        ("passes: [rtn]\ncalibration: {text: 3}", "calibration: text 3: expected the path of a text"),
    ],
    ids=lambda x: re.sub(r"\W+", " ", x)[:40] if isinstance(x, str) else "",
)  # fmt: skip
def test_a_wrong_recipe(text: str, message: str) -> None:
    with pytest.raises(OptionError) as e:
        parsed(text)
    assert str(e.value).startswith("r.yaml: ") and message in str(e.value)


@pytest.mark.parametrize("text", ["", "schema: lconvert.recipe/2\npasses: [rtn]", "[1]", "just words"])
def test_another_schema(text: str) -> None:
    with pytest.raises(OptionError, match=r"r.yaml: expected 'schema: lconvert.recipe/1' at the top"):
        parse("r.yaml", text, Path("."))


def test_a_recipe_that_is_no_file(tmp_path: Path) -> None:
    with pytest.raises(
        OptionError, match=r"int5: neither a recipe file nor a recipe's name; did you mean int8\? names: "
    ):
        load("int5")
    with pytest.raises(OptionError, match="neither a recipe file nor"):
        load(tmp_path)
    (binary := tmp_path / "b.yaml").write_bytes(b"\xff\xfe\0")
    with pytest.raises(OptionError, match=r"b\.yaml: cannot be read as UTF-8 text"):
        load(binary)
    (control := tmp_path / "c.yaml").write_bytes(b"a: \x01")
    with pytest.raises(OptionError, match=r"c\.yaml: not readable as YAML"):
        load(control)
    with (large := tmp_path / "l.yaml").open("wb") as f:
        f.truncate(3 << 20)
    with pytest.raises(OptionError, match=r"l\.yaml: 3 MB; a recipe is a short text"):
        load(large)


# --- passes that contradict each other -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("steps", "message"),
    [
        ("rtn, rtn", "rtn rounds layers.0.attn.q, as rtn before it does; leave one out, or part them with targets and ignore"),
        ("{rtn: {targets: '.*down'}}, {rtn: {targets: 'layers.5.*'}}", "rtn rounds layers.5.mlp.down, as rtn"),
        ("{rtn: {targets: head}}, {rtn: {grids: {head: int8}}}", "rtn rounds head, as rtn"),
        ("static, rtn", "rtn rounds layers.0.attn.q, as static before it does"),
        ("rtn, {static: {ignore: ''}}", "static rounds layers.0.attn.q, as rtn before it does"),
        ("activations, rtn", "activations is about inputs of rounded weights, but rtn comes after it; put activations last"),
        ("rtn, activations, {activations: {grid: fp8}}", "activations says how inputs are quantized of layers.0.attn.q, as"),
        ("static, activations", "activations says how inputs are quantized of layers.0.attn.q, as static before it does"),
        ("kv, rtn, kv", "kv quantizes the cache, as a kv before it; leave one out"),
        ("rtn, rotate", "rotate changes dense weights, but rtn in front of it has rounded them; put rotate first"),
        ("gptq, sparse", "sparse re-fits the weights that it keeps, but gptq in front of it has rounded them; put sparse first, or prune by magnitude"),
        ("gptq, {sparse: {method: magnitude, steps: 2}}", "sparse re-fits the weights that it keeps, but gptq"),
        ("sparse, smooth, rotate, gptq", "rotate leaves nothing of the zeros that sparse in front of it has made, or of their pattern; put rotate first"),
        ("{sparse: {pattern: '2:4'}}, permute, gptq", "permute leaves nothing of the zeros that sparse"),
    ],
)  # fmt: skip
def test_contradictory_passes(steps: str, message: str) -> None:
    with pytest.raises(OptionError) as e:
        parsed(f"passes: [{steps}]")
    assert str(e.value).startswith("r.yaml: ") and message in str(e.value)


@pytest.mark.parametrize(
    "steps", ["kv", "activations", "kv, rtn, activations", "gptq, {sparse: {method: wanda}}", "sparse, gptq",
              "sparse, permute, gptq", "{sparse: {pattern: '2:4'}}, smooth, awq", "rotate, permute, sparse",
              "{gptq: {ignore: '.*down'}}, {sparse: {targets: '.*down'}}", "{rtn: {grids: {'.*down': none}}}, {rtn: {targets: '.*down'}}"]
)  # fmt: skip
def test_passes_that_go_together(steps: str) -> None:
    assert parsed(f"passes: [{steps}]").steps


@dataclasses.dataclass(frozen=True)
class Options:
    """Of a pass that changes dense weights, with a field of every type that recipes know."""

    damping: float = 0.01
    order: Literal["weight", "group"] | None = None
    parts: tuple[str, ...] = ()
    limit: int | None = None
    per: Mapping[str, float] = dataclasses.field(default_factory=dict)


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys
    import types

    module = types.ModuleType("lconvert.passes.turn")
    vars(module).update(Options=Options)
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(passes, "PASSES", {**passes.PASSES, "turn": "a test's"})
    monkeypatch.setattr(passes, "STAGES", {**passes.STAGES, "turn": ("transforms",)})


def test_a_transform_needs_dense_weights(fake: None) -> None:
    assert parsed("passes: [turn, turn, rtn]").steps
    with pytest.raises(OptionError) as e:
        parsed("passes: [rtn, turn]")
    assert (
        str(e.value)
        == "r.yaml: turn changes dense weights, but rtn in front of it has rounded them; put turn first"
    )


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("{damping: x}", "turn: damping 'x': expected a number"),
        ("{damping: .nan}", "turn: damping nan: expected a number"),
        ("{damping: yes}", "turn: damping True: expected a number"),
        ("{order: up}", "turn: order 'up': expected one of weight, group or null"),
        ("{limit: 1.0}", "turn: limit 1.0: expected a whole number or null"),
        ("{parts: a}", "turn: parts 'a': expected a list, each item a text"),
        ("{parts: [1]}", "turn: parts [1]: expected a list, each item a text"),
        ("{per: {a: b}}", "turn: per {'a': 'b'}: expected a mapping from a text to a number"),
    ],
)
def test_types_of_options(fake: None, given: str, message: str) -> None:
    with pytest.raises(OptionError) as e:
        parsed(f"passes: [turn: {given}]")
    assert str(e.value) == f"r.yaml: {message}"


def test_numbers_and_lists_are_taken_as_they_are_meant(fake: None) -> None:
    """YAML 1.1 has 1e-5 as a text, and no tuples."""
    given: dict[str, Any] = {
        "damping": 1e-5,
        "order": None,
        "parts": ("a", "b"),
        "limit": None,
        "per": {"a": 2.0},
    }
    text = "{damping: 1e-5, order: null, parts: [a, b], limit: null, per: {a: 2}}"
    found = parsed(f"passes: [turn: {text}]").steps[0].options
    assert found == Options(**given) and type(found.per["a"]) is float
