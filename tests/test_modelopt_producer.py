"""nvidia-modelopt as a producer: what comes back from its own environment, and what is said where that does not work."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import lconvert
from lconvert.converters import modelopt_producer
from lconvert.converters.modelopt_producer import probe, produce
from lconvert.errors import MissingPackageError, OptionError, RuntimeFailure, UnsupportedError
from lconvert.ir import E4M3, Model, QTensor, int_grid
from lconvert.kernels.qtensor import effective
from lconvert.primitives.job import Calibration, Job
from tests.conftest import DEMO

VARIABLE = "LCONVERT_MODELOPT_PYTHON"


@pytest.fixture(scope="module")
def python() -> str:
    found = os.environ.get(VARIABLE)
    if not found:
        pytest.skip(f"nvidia-modelopt is not installed; set {VARIABLE} to an interpreter that has it")
    return found


@pytest.fixture
def text(tmp_path: Path) -> str:
    path = tmp_path / "calibration.txt"
    path.write_text(
        "It is a truth universally acknowledged, that a single man must be in want of a wife. " * 60
    )
    return str(path)


def job(tmp_path: Path, text: str = "", **more: object) -> Job:
    calibration = Calibration(text, windows=2, context=64)
    return Job(calibration, work=tmp_path / "work", threads=1, **more)  # type: ignore[arg-type]


# --- in a real environment


def close(model: Model, limit: float) -> list[QTensor]:
    """The weights in codes, each within a relative error of the original's; others are the original's own."""
    original, found = lconvert.read(DEMO), []
    for name, e in model.entries.items():
        want = effective(original.entries[name]).astype(np.float64)
        got = effective(e).astype(np.float64)
        if isinstance(e.data, QTensor):
            found.append(e.data)
            error = float(np.sqrt(np.square(got - want).sum() / np.square(want).sum()))
            assert 0 < error < limit, f"{name}: {error}"
        else:
            np.testing.assert_array_equal(got, want, err_msg=name)
    return found


def test_fp8(python: str, tmp_path: Path, text: str) -> None:
    seen: list[tuple[str, int, int]] = []
    model = produce(DEMO, "FP8_DEFAULT_CFG", job(tmp_path, text, progress=lambda *a: seen.append(a)), python)
    weights = close(model, 0.04)
    assert len(weights) == 21 and {q.grid for q in weights} == {E4M3}
    assert seen == [("ModelOpt", 1, 2), ("ModelOpt", 2, 2)]
    assert model.name == DEMO.name and model.tokenizer == lconvert.read(DEMO).tokenizer
    query = model.entries["layers.0.attn.q"]
    assert query.activation is not None and query.activation.scale is not None
    assert query.provenance[-1] == f"ModelOpt {probe(python)}, FP8_DEFAULT_CFG"
    assert "21 weights by nvidia-modelopt" in model.report[-1]
    assert "128 tokens of calibration.txt" in model.report[-1]


def test_what_needs_no_text_gets_none_and_is_taken_over(python: str, tmp_path: Path) -> None:
    first = produce(DEMO, "INT4_BLOCKWISE_WEIGHT_ONLY_CFG", job(tmp_path), python)
    assert {q.grid for q in close(first, 0.2)} == {int_grid(4, True)}
    (made,) = (tmp_path / "work").iterdir()
    stamp = (made / "about.json").stat().st_mtime_ns
    again = produce(DEMO, "INT4_BLOCKWISE_WEIGHT_ONLY_CFG", job(tmp_path, resume=True), python)
    assert (made / "about.json").stat().st_mtime_ns == stamp and again.entries.keys() == first.entries.keys()


def test_what_modelopt_itself_refuses(python: str, tmp_path: Path, text: str) -> None:
    with pytest.raises(
        OptionError, match=r"no configuration 'int4_awq'; did you mean INT4_AWQ_CFG\? it has FP8_"
    ):
        produce(DEMO, "int4_awq", job(tmp_path), python)
    with pytest.raises(
        OptionError, match=r"FP8_DEFAULT_CFG needs a calibration text; name one \(--calibrate"
    ):
        produce(DEMO, "FP8_DEFAULT_CFG", job(tmp_path), python)
    with pytest.raises(RuntimeFailure, match=r"ended with exit code 1; its last lines:\n(.*\n)*.*Error"):
        produce(DEMO, "NVFP4_AWQ_LITE_CFG", job(tmp_path, text), python)  # searches on a GPU only
    assert not list((tmp_path / "work").glob("*/about.json"))


# --- what needs none


def test_no_interpreter(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match=r"--python modelopt=PATH.*producers\.modelopt.*doctor --install"):
        produce(DEMO, "FP8_DEFAULT_CFG", job(tmp_path))
    with pytest.raises(OptionError, match=r"/gone/python: this interpreter does not exist"):
        produce(DEMO, "FP8_DEFAULT_CFG", job(tmp_path, interpreters={"modelopt": Path("/gone/python")}))


def test_an_interpreter_without_modelopt(tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", bare], check=True)
    python = bare / "bin" / "python"
    with pytest.raises(MissingPackageError, match=rf"{python}: nvidia-modelopt cannot be imported there"):
        produce(DEMO, "FP8_DEFAULT_CFG", job(tmp_path), python)
    with pytest.raises(MissingPackageError, match="No module named 'modelopt'"):
        probe(python)


def test_other_sources(tmp_path: Path) -> None:
    python = sys.executable
    gguf = lconvert.convert(DEMO, tmp_path / "m.gguf", ftype="Q4_0").paths[0]
    with pytest.raises(UnsupportedError, match=r"m\.gguf: ModelOpt reads Hugging Face folders only"):
        produce(gguf, "FP8_DEFAULT_CFG", job(tmp_path), python)
    folder = tmp_path / "quantized"
    shutil.copytree(DEMO, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(
        json.dumps({**config, "quantization_config": {"quant_method": "fp8"}})
    )
    with pytest.raises(UnsupportedError, match="quantized: is quantized already"):
        produce(folder, "FP8_DEFAULT_CFG", job(tmp_path), python)


@pytest.fixture
def pretended(tmp_path: Path) -> Callable[[str], Path]:
    """An interpreter that does what a line of shell says."""

    def make(line: str) -> Path:
        path = tmp_path / "python-of-modelopt"
        path.write_text(f"#!/bin/sh\n{line}\n")
        path.chmod(0o755)
        return path

    return make


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("exit 3", r"ModelOpt ended with exit code 3; it printed nothing"),
        ("echo first >&2; echo last >&2; exit 1", r"exit code 1; its last lines:\n  first\n  last"),
        ("kill -9 $$", r"ModelOpt was killed by signal 9"),
        ("""echo '{"done": 1, "total": 2}'""", r"ModelOpt ended with exit code 0"),
    ],
)
def test_its_process_fails(tmp_path: Path, pretended: Callable[[str], Path], line: str, said: str) -> None:
    with pytest.raises(RuntimeFailure, match=said):
        produce(DEMO, "FP8_DEFAULT_CFG", job(tmp_path), pretended(line))


def test_without_a_work_folder_nothing_stays(tmp_path: Path, pretended: Callable[[str], Path]) -> None:
    """The temporary folder goes with the process."""
    code = (
        "import sys\nfrom lconvert.converters import modelopt_producer as m\n"
        "from lconvert.errors import RuntimeFailure\n"
        "try: m.produce(sys.argv[1], 'X', python=sys.argv[2])\n"
        "except RuntimeFailure: print('failed')"
    )
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    command = [sys.executable, "-c", code, str(DEMO), str(pretended("exit 1"))]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout == "failed\n" and not list(tmp_path.glob("lconvert-modelopt-*"))
    assert Path(modelopt_producer.modelopt_worker.__file__).is_file()
