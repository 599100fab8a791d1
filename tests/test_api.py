"""The Python interface: its examples run, its types hold, its errors are the documented ones."""

from __future__ import annotations

import doctest
import importlib
import inspect
import pkgutil
import typing
from pathlib import Path
from types import ModuleType

import pytest
from mypy import api as mypy

import lconvert
from lconvert import api
from lconvert.errors import InputError, LconvertError, OptionError, OutputError
from lconvert.executor import Result
from lconvert.ir import Model
from lconvert.plan import Plan
from tests.conftest import DEMO, ROOT


def modules() -> list[str]:
    names = [m.name for m in pkgutil.walk_packages(lconvert.__path__, "lconvert.")]
    return ["lconvert", *(n for n in names if not n.endswith(("__main__", "_native")))]


def _examples(module: ModuleType) -> list[doctest.DocTest]:
    return [t for t in doctest.DocTestFinder().find(module) if t.examples]


@pytest.mark.parametrize(
    "name", [n for n in modules() if ">>>" in (inspect.getsource(importlib.import_module(n)))]
)
def test_examples_in_docstrings(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a reader would type them in the checkout; what they write goes to another folder."""
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    monkeypatch.chdir(tmp_path)
    tests = _examples(importlib.import_module(name))
    assert tests
    for test in tests:
        assert not any(e.options.get(doctest.SKIP) for e in test.examples), f"{test.name} skips an example"
        runner = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE)
        said: list[str] = []
        runner.run(test, out=said.append)
        assert not runner.failures, "".join(said)


def test_the_api_has_examples_and_they_can_fail() -> None:
    (test,) = [t for t in _examples(api) if t.name == "lconvert.api"]
    assert len(test.examples) >= 6
    wrong = doctest.DocTestParser().get_doctest(">>> 1 + 1\n3\n", {}, "wrong", None, 0)
    runner = doctest.DocTestRunner()
    runner.run(wrong, out=lambda text: None)
    assert runner.failures == 1


def test_public_names() -> None:
    assert set(api.__all__) | {"__version__"} == set(lconvert.__all__)
    for name in api.__all__:
        assert getattr(lconvert, name) is getattr(api, name)
        assert (getattr(api, name).__doc__ or "").strip(), name
    with pytest.raises(AttributeError, match="has no attribute 'nope'"):
        _ = lconvert.nope


def test_types_are_shipped_and_seen_by_users(tmp_path: Path) -> None:
    assert (Path(lconvert.__file__).parent / "py.typed").exists()
    user = tmp_path / "user.py"
    user.write_text(
        "import lconvert\n"
        "reveal_type(lconvert.read('m'))\n"
        "reveal_type(lconvert.plan_gguf(lconvert.read('m'), 'm.gguf', ftype='Q8_0'))\n"
        "reveal_type(lconvert.convert('m', 'm.gguf').paths)\n"
        "reveal_type(lconvert.validate('m', 'm.gguf').passed)\n"
        "lconvert.convert(3, 'm.gguf')\n"
        "lconvert.plan_gguf(lconvert.read('m'), 'm.gguf', ftipe='Q8_0')\n"
    )
    out, err, _ = mypy.run(
        ["--strict", "--follow-imports=silent", f"--cache-dir={ROOT / '.mypy_cache'}", str(user)]
    )
    assert not err
    for revealed in (
        "lconvert.ir.Model",
        "lconvert.plan.Plan",
        "tuple[pathlib.Path, ...]",
        "builtins.bool|bool",
    ):
        assert any(f'Revealed type is "{r}"' in out for r in revealed.split("|")), out
    assert (
        "user.py:6: error: Argument 1" in out
        and 'user.py:7: error: Unexpected keyword argument "ftipe"' in out
    )


@pytest.mark.parametrize("name", ["read", "plan_gguf", "convert", "validate"])
def test_every_parameter_has_a_type(name: str) -> None:
    function = getattr(api, name)
    scope = {"Model": Model, "Imatrix": object, "Report": object}
    hints = typing.get_type_hints(function, localns=scope)
    assert set(hints) == {*inspect.signature(function).parameters, "return"}


def test_what_is_returned(tmp_path: Path) -> None:
    model = lconvert.read(DEMO)
    assert isinstance(model, Model)
    plan = lconvert.plan_gguf(model, tmp_path / "m.gguf", ftype="Q8_0")
    assert isinstance(plan, Plan) and not list(tmp_path.iterdir()), "a plan writes nothing"
    seen: list[int] = []
    result = lconvert.convert(
        str(DEMO), str(tmp_path / "m.gguf"), ftype="Q8_0", progress=lambda n, f: seen.append(n)
    )
    assert isinstance(result, Result) and sum(seen) == plan.size == (tmp_path / "m.gguf").stat().st_size
    assert result.plan.fingerprint() == plan.fingerprint()


def test_errors_are_of_the_documented_classes(tmp_path: Path) -> None:
    (tmp_path / "there.gguf").touch()
    for kind, call in (
        (InputError, lambda: lconvert.read(tmp_path / "nothing")),
        (InputError, lambda: lconvert.read(tmp_path / "there.gguf")),
        (OptionError, lambda: lconvert.convert(DEMO, tmp_path / "m.bin")),
        (OptionError, lambda: lconvert.convert(DEMO, tmp_path / "m.gguf", ftype="Q9")),
        (OutputError, lambda: lconvert.convert(DEMO, tmp_path / "there.gguf")),
        (TypeError, lambda: lconvert.convert(DEMO, tmp_path / "m.gguf", ftipe="Q8_0")),
    ):
        with pytest.raises(kind) as caught:
            call()
        assert issubclass(kind, LconvertError) == isinstance(caught.value, LconvertError)
    assert [p.name for p in tmp_path.iterdir()] == ["there.gguf"]
