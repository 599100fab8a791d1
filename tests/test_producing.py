"""`--method modelopt:CONFIG` on the verbs: what a producer makes is carried as any checkpoint is, and what contradicts it is refused.

The producer here is an interpreter that hands over a checkpoint which was made beforehand, in ModelOpt's own layout; its real
counterpart is in test_modelopt_producer.py and, where it is installed, in the last test.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import lconvert
from lconvert.ir import QTensor
from lconvert.kernels.qtensor import effective
from tests.conftest import DEMO, ROOT
from tests.test_cli import inside

CONFIG = "modelopt:INT4_AWQ_CFG"

_WORKER = """
import json, pathlib, shutil, sys
if len(sys.argv) < 4:
    print(json.dumps({"version": "9.9"})); raise SystemExit
request = json.loads(pathlib.Path(sys.argv[3]).read_text())
log = pathlib.Path(__file__).with_name("asked.json")
log.write_text(json.dumps([*json.loads(log.read_text()), request] if log.exists() else [request]))
if request["config"] != "INT4_AWQ_CFG":
    print(json.dumps({"configs": ["FP8_DEFAULT_CFG", "INT4_AWQ_CFG"]}))
elif not request["ids"]:
    print(json.dumps({"uncalibrated": True}))
else:
    print(json.dumps({"done": 1, "total": 1}))
    shutil.copytree(pathlib.Path(__file__).with_name("made"), request["out"])
    print(json.dumps({"version": "9.9"}))
"""


@pytest.fixture(scope="module")
def fake(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An interpreter that answers as the worker does in ModelOpt's environment."""
    folder = tmp_path_factory.mktemp("modelopt")
    made = folder / "made"
    code, _, err = inside(
        ["convert", str(DEMO), "--to", "modelopt", "--recipe", "int4-g128", "-o", str(made), "--no-validate"]
    )
    assert code == 0, err
    for name in ("README.md", *[p.name for p in made.glob("*manifest*")]):
        (made / name).unlink()
    (folder / "worker.py").write_text(_WORKER)
    python = folder / "python"
    python.write_text(f'#!/bin/sh\nexec {sys.executable} {folder / "worker.py"} "$@"\n')
    python.chmod(0o755)
    return python


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "calib.txt"
    path.write_text((ROOT / "README.md").read_text(encoding="utf-8")[:3000], encoding="utf-8")
    return path


def asked(fake: Path) -> list[dict[str, Any]]:
    log = fake.with_name("asked.json")
    found = json.loads(log.read_text()) if log.exists() else []
    log.unlink(missing_ok=True)
    return list(found)


def run(*args: object) -> tuple[int, str, str]:
    return inside([*map(str, args)])


@pytest.mark.parametrize(
    ("verb", "flags", "out"),
    [
        ("compress", [], "m.lcir"),
        ("hf-to-gguf", [], "m.gguf"),
        ("hf-to-vllm", [], "served"),
        ("hf-to-trtllm", [], "served"),
        ("hf-to-onnx", [], "graph"),
        ("convert", ["--to", "gptq"], "gptq"),
    ],
)
def test_what_it_makes_reaches_every_target(fake: Path, text: Path, tmp_path: Path, verb: str, flags: list[str], out: str) -> None:  # fmt: skip
    asked(fake)
    proof = [] if verb == "compress" else ["--no-validate"]
    given = ["--calibrate", text, "--calibration-context", 16, "--calibration-windows", 2]
    code, said, err = run(verb, DEMO, *flags, "--method", CONFIG, "--python", f"modelopt={fake}", *given, "-o", tmp_path / out, *proof, "--json")  # fmt: skip
    assert (code, err) == (0, ""), err
    (request,) = asked(fake)
    assert [len(w) for w in request["ids"]] == [16, 16] and Path(request["source"]) == DEMO.resolve()
    data = json.loads(said)
    options = data["manifest"]["plan"]["options"]
    assert options["producer"]["method"] == CONFIG and options["producer"]["source"] == DEMO.name
    assert "nvidia-modelopt 9.9, INT4_AWQ_CFG" in options["producer"]["report"]
    assert set(options["producer"]["files"]) >= {"config.json", "model.safetensors"}
    assert options["calibration"]["name"] == "calib.txt" and options["calibration"]["tokens"] == 32
    assert not (tmp_path / f"{out}.work").exists()
    verdicts = {t["verdict"]["kind"] for t in data["manifest"]["plan"]["files"][0]["tensors"]}
    assert verdicts <= {"exact", "widened"}
    if verb != "hf-to-onnx":
        made, got = lconvert.read(fake.with_name("made")), lconvert.read(tmp_path / out)
        for name, entry in made.entries.items():
            if isinstance(entry.data, QTensor):
                np.testing.assert_array_equal(effective(got.entries[name]), effective(entry), err_msg=name)


def test_the_proof_is_against_what_was_made(fake: Path, text: Path, tmp_path: Path) -> None:
    pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
    code, said, err = run("hf-to-gguf", DEMO, "--method", CONFIG, "--python", f"modelopt={fake}", "--calibrate", text, "-o", tmp_path / "m.gguf", "--json")  # fmt: skip
    assert (code, err) == (0, ""), err
    proof = json.loads(said)["validation"]
    assert "m.gguf.work" in json.dumps(proof["reference"])
    assert all(c["passed"] is not False for c in proof["checks"])


def test_what_was_made_is_taken_over(fake: Path, text: Path, tmp_path: Path) -> None:
    """A run that ends badly after it keeps the checkpoint for --resume; so does a folder that --work names."""
    asked(fake)
    work = tmp_path / "work"
    args = ["--method", CONFIG, "--python", f"modelopt={fake}", "--calibrate", text, "--work", work, "--no-validate"]  # fmt: skip
    code, _, err = run("hf-to-vllm", DEMO, *args, "-o", tmp_path / "a")
    assert code == 0, err
    code, _, err = run("hf-to-gguf", DEMO, *args, "-o", tmp_path / "b.gguf", "--resume")
    assert code == 0 and len(asked(fake)) == 1, err
    code, _, err = run(
        "convert", DEMO, "--to", "bitsandbytes", *args[:-3], "--no-validate", "-o", tmp_path / "c"
    )
    assert code == 2 and (tmp_path / "c.work").is_dir(), err
    code, _, err = run(
        "convert", DEMO, "--to", "gptq", *args[:-3], "--no-validate", "--work", tmp_path / "c.work", "--resume",
        "-o", tmp_path / "d",
    )  # fmt: skip
    assert code == 0 and len(asked(fake)) == 1, err


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["hf-to-vllm", "--method", "modelopt"], "--method modelopt: add one of its configurations, such as modelopt:INT4_AWQ_CFG or"),
        (["hf-to-vllm", "--method", "modelopt:"], "--method modelopt:: add one of its configurations"),
        (["hf-to-vllm", "--method", "modelo:X"], "method 'modelo:X'; did you mean modelopt? choose rtn, "),
        (["hf-to-vllm", "--w4a16", "--method", CONFIG], f"--method {CONFIG} and --w4a16 both say how the model is quantized; leave one of them out"),
        (["hf-to-vllm", "--kv-fp8", "--method", CONFIG, "--calibrate", "TEXT"], "both say how the model is quantized"),
        (["hf-to-onnx", "--int4", "--method", CONFIG], f"--method {CONFIG} and --int4 both say"),
        (["hf-to-onnx", "--recipe", "int4-g128", "--method", CONFIG], "int4-g128 both say"),
        (["compress", "--recipe", "int4-g128", "--method", CONFIG], f"--method {CONFIG} and --recipe int4-g128 both say"),
        (["convert", "--to", "gguf", "--recipe", "int4-g128", "--method", CONFIG], "int4-g128 both say"),
        (["hf-to-gguf", "--q4_k_m", "--method", CONFIG], f"--method {CONFIG} and --type Q4_K_M both say"),
        (["hf-to-vllm", "--dry-run", "--method", CONFIG], f"--dry-run: what {CONFIG} makes is known once it has run; write an .lcir folder with"),
        (["hf-to-vllm", "--method", CONFIG, "--calibrate", "TEXT"],
         "nvidia-modelopt runs in an environment of its own; name its interpreter (--python modelopt=PATH, or [producers.modelopt] in lconvert.toml)"),
        (["hf-to-vllm", "--method", CONFIG, "--python", "FAKE"], f"{CONFIG.partition(':')[2]} needs a calibration text; name one (--calibrate"),
        (["hf-to-vllm", "--method", "modelopt:int4_awq", "--python", "FAKE"], "no configuration 'int4_awq'; did you mean INT4_AWQ_CFG? it has FP8_DEFAULT_CFG, INT4_AWQ_CFG"),
        (["hf-to-vllm", "--python", "FAKE"], "--python names the interpreter of a producer; add --method modelopt:CONFIG"),
        (["hf-to-vllm", "--method", CONFIG, "--python", "vllm=python3"], "--python: expected modelopt=PATH, the interpreter of a producer"),
        (["hf-to-vllm", "--method", CONFIG, "--python", "modelopt=/gone"], "/gone: this interpreter does not exist"),
        (["hf-to-vllm", "--method", CONFIG, "--device", "cuda:77"], "--device cuda:77: torch sees "),
    ],
    ids=lambda x: " ".join(map(str, x)) if isinstance(x, list) else "",
)  # fmt: skip
def test_refused(fake: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, args: list[str], message: str) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("LCONVERT_CONFIG", raising=False)
    before = sorted(tmp_path.iterdir())
    out = {"compress": "m.lcir", "hf-to-gguf": "m.gguf"}.get(args[0], "m.gguf" if "gguf" in args else "out")
    said = [str(text) if a == "TEXT" else f"modelopt={fake}" if a == "FAKE" else a for a in args]
    code, _, err = run(said[0], DEMO, *said[1:], "-o", out)
    assert code == 2 and message in err and err.count("\n") == 1, err
    assert sorted(tmp_path.iterdir()) == before


def test_the_interpreter_of_lconvert_toml(fake: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    config = tmp_path / "lconvert.toml"
    config.write_text(f'[producers.modelopt]\npython = "{fake}"\n')
    monkeypatch.setenv("LCONVERT_CONFIG", str(config))
    code, _, err = run("compress", DEMO, "--method", CONFIG, "--calibrate", text, "-o", tmp_path / "m.lcir")
    assert code == 0, err
    (tmp_path / "n.lcir").mkdir()
    (tmp_path / "n.lcir" / "lcir.json").write_text("{}")
    asked(fake)
    shutil.rmtree(tmp_path / "m.lcir")
    (tmp_path / "m.gguf").write_bytes(b"")
    code, _, err = run("hf-to-gguf", DEMO, "--method", CONFIG, "--calibrate", text, "-o", tmp_path / "m.gguf")
    assert code == 2 and "m.gguf: exists; --force replaces it" in err and not asked(fake)


def test_with_modelopt_itself(text: Path, tmp_path: Path) -> None:
    python = os.environ.get("LCONVERT_MODELOPT_PYTHON")
    if not python:
        pytest.skip(
            "nvidia-modelopt is not installed; set LCONVERT_MODELOPT_PYTHON to an interpreter that has it"
        )
    given = ["--calibrate", text, "--calibration-context", 64, "--calibration-windows", 2]
    code, said, err = run("hf-to-gguf", DEMO, "--method", "modelopt:MXFP4_DEFAULT_CFG", "--python", f"modelopt={python}", *given, "-o", tmp_path / "m.gguf", "--no-validate", "--json")  # fmt: skip
    assert code == 0, err
    tensors = json.loads(said)["manifest"]["plan"]["files"][0]["tensors"]
    kinds = {(t["type"], t["verdict"]["kind"]) for t in tensors}
    assert ("MXFP4", "exact") in kinds and {k for _, k in kinds} <= {"exact", "widened"}
