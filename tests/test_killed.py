"""A calibration that the system kills goes on where it was, to the same bytes."""

from __future__ import annotations

import hashlib
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.conftest import DEMO, ROOT

pytest.importorskip("transformers", reason="transformers is not installed")


def command(folder: Path, *more: str) -> list[str]:
    text = [
        "--calibrate",
        str(ROOT / "README.md"),
        "--calibration-windows",
        "4",
        "--calibration-context",
        "128",
    ]
    return [
        *(sys.executable, "-P", "-m", "lconvert", "compress", str(DEMO), "-o", str(folder / "m.lcir")),
        *("--recipe", "gptaq-w4g128", "--no-card", *text, *more),
    ]


def digests(folder: Path) -> dict[str, str]:
    """Of all but the manifest, which says when it was written."""
    files = (p for p in folder.iterdir() if "manifest" not in p.name)
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def test_a_killed_calibration_goes_on_to_the_same_bytes(tmp_path: Path) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    for folder in (whole, cut):
        folder.mkdir()
    subprocess.run(command(whole), check=True, capture_output=True)
    work = cut / "m.lcir.work"
    with subprocess.Popen(command(cut), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as run:
        while not list(work.glob("*/layer-00001*")):
            assert run.poll() is None, "it ended before it could be killed"
            time.sleep(0.001)
        run.send_signal(signal.SIGKILL)
    assert run.returncode == -signal.SIGKILL and not (cut / "m.lcir").exists()
    kept = {p.name: p.stat().st_mtime_ns for p in work.glob("*/layer-*.safetensors")}
    assert kept
    again = subprocess.run([*command(cut), "--resume", "--work", str(work)], check=True, capture_output=True)
    assert b"computed again" not in again.stdout
    now = {p.name: p.stat().st_mtime_ns for p in work.glob("*/layer-*.safetensors")}
    assert kept.items() < now.items(), "finished layers were taken over, the others made"
    assert digests(cut / "m.lcir") == digests(whole / "m.lcir")
