"""`lconvert doctor`: what it finds, and the environment recipes that it prints and performs."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from lconvert.cli import doctor
from lconvert.cli.doctor import RECIPES, Recipe, command, commands, files, pip_sources, toml
from lconvert.errors import MissingPackageError, OptionError, OutputError, RuntimeFailure
from lconvert.validators.runtimes import RUNTIMES, config, remote


def run(*args: str) -> str:
    """Its stdout; lconvert's own errors come through."""
    result = CliRunner().invoke(command, list(args), catch_exceptions=False, standalone_mode=False)
    if result.exception:
        raise result.exception
    return result.stdout


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working folder, and no settings from elsewhere."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv(config.VARIABLE, raising=False)
    return tmp_path


# --- what is there


def test_packages(here: Path) -> None:
    state = json.loads(run("--json"))
    assert {"onnxruntime", "lm_eval", "matplotlib", "torch", "llama-cpp-python"} <= state["packages"].keys()
    assert state["packages"]["numpy"][0].isdigit() and state["runtimes"] == {}
    text = run()
    assert "onnxruntime" in text and "interpreter" not in text


def test_every_runtime_has_a_version_to_ask_for() -> None:
    assert doctor.DISTRIBUTIONS.keys() == RUNTIMES.keys() == config.OPTIONS.keys()


def test_runtimes_in_other_interpreters(here: Path) -> None:
    (here / "not-python").write_text("#!/bin/sh\necho hello\n")
    (here / "not-python").chmod(0o755)
    (here / config.FILE).write_text(
        f"[runtimes.transformers]\npython = {json.dumps(sys.executable)}\n"
        f'[runtimes.vllm]\npython = "gone/bin/python"\n'
        f"[runtimes.dequantized]\ntimeout = 5\n"
        f'[runtimes.onnxruntime]\npython = "./not-python"\n'
    )
    found = json.loads(run("--json"))["runtimes"]
    assert found.keys() == {"transformers", "vllm", "onnxruntime"}  # the fourth has no interpreter of its own
    here_too = found["transformers"]
    assert (
        here_too["ok"]
        and here_too["answer"].startswith("transformers ")
        and here_too["python"] == sys.executable
    )
    assert not found["vllm"]["ok"] and "this interpreter does not exist" in found["vllm"]["answer"]
    assert found["onnxruntime"]["answer"] == "is not a Python interpreter that works"
    text = run()
    assert "interpreter" in text and here_too["answer"] in text


def test_a_package_that_is_not_there(here: Path) -> None:
    ok, answer = doctor._ask(sys.executable, ("no-such-distribution",))
    assert not ok and answer.startswith("no-such-distribution is not installed there (Python 3.")


def test_mistakes(here: Path) -> None:
    for args, message in (
        (["--yes"], "--yes belongs to --install"),
        (["--into", "x"], "--into belongs to --install"),
        (["--install", "vllm", "--json"], "do not go together"),
    ):
        with pytest.raises(OptionError, match=message):
            run(*args)
    (here / config.FILE).write_text("[runtimes.vllm]\npyhton = 1\n")
    with pytest.raises(OptionError, match=r"unknown key runtimes\.vllm\.pyhton"):
        run("--json")


# --- where pip looks

LISTING = r"""
:env:.find-links='/wheels'
:env:.index-url='https://mirror.example/simple'
:env:.default-timeout='180'
global.cert='/etc/ca.crt'
global.extra-index-url='https://a.example/simple https://b.example/simple'
global.find-links='/wheels\n/more wheels'
global.index-url='https://wrong.example/simple'
install.extra-index-url='https://b.example/simple'
not a line
global.index-url=not a literal
"""


def test_pips_own_settings() -> None:
    assert pip_sources(LISTING) == {
        "index-url": ["https://mirror.example/simple"],
        "extra-index-url": ["https://a.example/simple", "https://b.example/simple"],
        "find-links": ["/wheels", "/more", "wheels"],
        "cert": ["/etc/ca.crt"],
    }
    assert pip_sources("") == {"index-url": [], "extra-index-url": [], "find-links": [], "cert": []}


def test_this_pips_settings_are_understood() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pip", "config", "list"], capture_output=True, text=True, check=True
    )
    found = pip_sources(done.stdout)
    for key in ("index-url", "extra-index-url", "find-links"):
        assert bool(found[key]) == (f".{key}=" in done.stdout)


# --- an environment


def test_commands() -> None:
    recipe = Recipe("runtime==1", ("torch==2",), ("sound", "images"))
    into = Path("my env")
    assert commands(recipe, into, pip_sources(LISTING)) == [
        [sys.executable, "-m", "venv", "my env"],
        ["my env/bin/python", "-m", "pip", "install", "--quiet", "uv"],
        [
            *shlex.split("'my env/bin/uv' pip install --python 'my env/bin/python'"),
            *shlex.split("--default-index https://mirror.example/simple"),
            *shlex.split("--index https://a.example/simple --index https://b.example/simple"),
            *shlex.split("--find-links /wheels --find-links /more --find-links wheels"),
            *shlex.split("--index-strategy unsafe-best-match"),
            *shlex.split("--constraint 'my env/constraint.txt' --override 'my env/override.txt' runtime==1"),
        ],
    ]
    assert files(recipe, into) == {
        into / "constraint.txt": "torch==2\n",
        into / "override.txt": 'sound ; sys_platform == "never"\nimages ; sys_platform == "never"\n',
    }
    plain = commands(Recipe("runtime"), into, {})
    assert plain[2] == ["my env/bin/uv", "pip", "install", "--python", "my env/bin/python", "runtime"]
    assert files(Recipe("runtime"), into) == {}


def test_the_recipe_is_a_shell_script(here: Path) -> None:
    """What is printed runs as it stands; here with programs that write down what they are asked."""
    text = run("--install", "vllm", "--into", "my env")
    script, _, lines = text.partition("# then in lconvert.toml:\n")
    log = here / "log"
    stub = f'#!/bin/sh\necho "$(basename "$0") $*" >> {shlex.quote(str(log))}\n'
    folder = here / "my env" / "bin"
    folder.mkdir(parents=True)
    for path in (folder / "python", folder / "uv", here / "python"):
        path.write_text(stub)
        path.chmod(0o755)
    script = script.replace(shlex.quote(sys.executable), str(here / "python"))
    subprocess.run(["sh", "-e", "-c", script], check=True, cwd=here)
    ran = log.read_text().splitlines()
    assert ran[0] == "python -m venv my env" and ran[1] == "python -m pip install --quiet uv"
    assert ran[2].startswith("uv pip install --python my env/bin/python ") and ran[2].endswith(
        f" {RECIPES['vllm']['cpu'].requirement}"
    )
    for path, wanted in files(RECIPES["vllm"]["cpu"], Path("my env")).items():
        assert path.read_text() == wanted
    (here / config.FILE).write_text(lines)
    assert config.settings("vllm").python == here / "my env" / "bin" / "python"


def test_the_default_place(here: Path) -> None:
    assert "-m venv .venv-vllm" in run("--install", "vllm")
    assert not (here / ".venv-vllm").exists(), "without --yes nothing is done"
    assert json.dumps(str(here / ".venv-vllm" / "bin" / "python")) in toml("vllm", Path(".venv-vllm"))


def test_a_place_that_is_taken(here: Path) -> None:
    (here / "full").mkdir()
    (here / "full" / "file").touch()
    for name in ("full", "full/file"):
        with pytest.raises(OutputError, match=f"{name}: exists and is not empty"):
            run("--install", "vllm", "--into", name, "--yes")


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Stand-ins for the commands of an installation, which would take gigabytes; the environment itself is
    real.
    """
    made: list[list[str]] = []

    def short(recipe: Recipe, into: Path, sources: object) -> list[list[str]]:
        made[:] = [[sys.executable, "-m", "venv", "--without-pip", str(into)], *made]
        return made

    monkeypatch.setattr(doctor, "commands", short)
    return made


def test_a_step_fails(here: Path, steps: list[list[str]]) -> None:
    steps.append([sys.executable, "-c", "raise SystemExit(4)"])
    with pytest.raises(RuntimeFailure, match=r"failed with exit code 4; .* env is incomplete: remove it"):
        run("--install", "vllm", "--into", "env", "--yes")
    assert (here / "env" / "constraint.txt").exists()


def test_it_is_tried_after_the_installation(here: Path, steps: list[list[str]]) -> None:
    kept = dict(remote._POOL)  # of tests before this one
    with pytest.raises(
        RuntimeFailure, match=r"was installed into env and does not work there: .*numpy"
    ) as caught:
        run("--install", "vllm", "--into", "env", "--yes")
    assert not isinstance(caught.value, MissingPackageError) and kept == remote._POOL


def test_it_works(here: Path, steps: list[list[str]]) -> None:
    """With a package of vLLM's name in the new environment, and NumPy."""
    fake = "import sys; open(sys.argv[1] + '/vllm.py', 'w').write('LLM = SamplingParams = None')"
    site = f"env/lib/python3.{sys.version_info.minor}/site-packages"
    link = "import numpy, os, sys; p = os.path.dirname(numpy.__file__); "
    link += "[os.symlink(p + e, sys.argv[1] + '/numpy' + e) for e in ('', '.libs') if os.path.exists(p + e)]"
    steps += [[sys.executable, "-c", code, site] for code in (fake, link)]
    out = run("--install", "vllm", "--into", "env", "--yes")
    assert out.startswith("vllm works in env. Add to lconvert.toml:\n\n[runtimes.vllm]\n")
    (here / config.FILE).write_text(out.partition("\n\n")[2])
    assert config.settings("vllm").python == here / "env" / "bin" / "python"
