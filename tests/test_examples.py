"""The examples run and do what they say."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

import lconvert
from lconvert.formats import gguf
from tests.conftest import DEMO, ROOT


def _load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / "examples" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_release_gate(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
    paths = _load("release_gate").release(DEMO, tmp_path)
    assert [p.name for p in paths] == ["demo_model-Q8_0.gguf", "demo_model-Q4_K_M.gguf"]
    assert capsys.readouterr().out.count("passed: True") == 2


def test_compress_once(tmp_path: Path) -> None:
    verdicts = _load("compress_once").compress(DEMO, tmp_path)
    assert set(verdicts) == {"exact", "widened"}  # widened: BF16 norms in F32
    types = {t.type for t in gguf.read(tmp_path / "model.gguf").tensors.values()}
    assert "Q4_0" in types
    assert lconvert.read(tmp_path / "model.lcir").arch == lconvert.read(DEMO).arch


def test_readme_example(tmp_path: Path) -> None:
    pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert blocks
    for block in blocks:
        subprocess.run([sys.executable, "-P", "-c", block], cwd=tmp_path, check=True)
    assert (tmp_path / "demo.gguf").exists()
