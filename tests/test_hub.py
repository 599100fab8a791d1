"""Hub names as sources: only weights, config and tokenizer are asked for; every failure is one clear error."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import lconvert
from lconvert.errors import InputError, MissingPackageError
from tests.conftest import DEMO


def _hub(monkeypatch: pytest.MonkeyPatch, download: Any) -> None:
    module = ModuleType("huggingface_hub")
    module.snapshot_download = download  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "huggingface_hub", module)


def test_a_hub_name_is_downloaded_without_code_or_pickles(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {}

    def download(name: str, **options: Any) -> str:
        asked.update(options, name=name)
        return str(DEMO)

    _hub(monkeypatch, download)
    model = lconvert.read("somebody/some-model")
    assert model.arch == lconvert.read(DEMO).arch
    assert asked["name"] == "somebody/some-model"
    patterns = asked["allow_patterns"]
    assert "*.safetensors" in patterns and "*.json" in patterns
    assert not any(p.endswith((".py", ".bin", ".pt", ".pkl")) or p == "*" for p in patterns)


def test_a_hub_failure_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def download(name: str, **options: Any) -> str:
        raise ConnectionError("no route")

    _hub(monkeypatch, download)
    with pytest.raises(
        InputError, match=r"some/model: no such folder, and not to be had from the hub \(no route\)"
    ):
        lconvert.read("some/model")


def test_without_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(MissingPackageError, match=r"pip install 'lconvert\[hf\]'"):
        lconvert.read("some/model")


def test_a_local_folder_wins_and_a_wrong_path_is_not_asked_for(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def download(name: str, **options: Any) -> str:
        raise AssertionError("the hub was asked")

    _hub(monkeypatch, download)
    with pytest.raises(InputError, match="no such file or folder"):
        lconvert.read(tmp_path / "missing" / "deeper" / "model")
    (tmp_path / "org" / "model").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=r"config\.json"):
        lconvert.read("org/model")
