"""`lconvert hf-to-onnx`: every flag, every dialect, every kind of source; and what `validate` says of the folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("onnx", reason="onnx is not installed")

import lconvert
from lconvert.cli import VERBS
from lconvert.converters import onnx, onnx_presets
from lconvert.errors import OptionError, UnsupportedError
from lconvert.executor import execute
from lconvert.validators.report import Report
from tests import case_models
from tests.conftest import DEMO, ROOT
from tests.test_cli import inside

PEERS = ROOT / "tests" / "fixtures" / "peers"
_FILES = {
    "model.onnx",
    "model.onnx.data",
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
}


def run(*args: object) -> tuple[int, str, str]:
    return inside(["hf-to-onnx", *map(str, args)])


@pytest.fixture(scope="module")
def calibration(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text((ROOT / "README.md").read_text(encoding="utf-8")[:2000], encoding="utf-8")
    return path


@pytest.mark.parametrize("dialect", ["ort", "trt", "genai"])
@pytest.mark.parametrize("flag", ["", *onnx_presets.PRESETS])
def test_every_flag_writes_a_folder(flag: str, dialect: str, tmp_path: Path, calibration: Path) -> None:
    out = tmp_path / "out"
    args: list[object] = [DEMO, "-o", out, "--dialect", dialect, "--no-validate", "--json"]
    if flag:
        args.append(f"--{flag}")
    if (dialect, flag) in onnx_presets.REFUSED:
        code, _, err = run(*args)
        assert code == 2 and onnx_presets.REFUSED[dialect, flag] in err and not out.exists()
        return
    if flag and onnx_presets.PRESETS[flag].calibrated:
        code, _, err = run(*args)
        assert code == 2 and "--calibrate" in err and not out.exists()
        pytest.importorskip("transformers", reason="transformers is not installed")
        args += ["--calibration", calibration]
    code, text, err = run(*args)
    assert code == 0, err
    assert {f.name for f in out.iterdir()} >= {*_FILES, "README.md", "model.onnx.manifest.json"}
    found = json.loads(text)
    assert len(found["files"]) == 7 + (dialect == "genai") and str(out) in found["launch"]
    kinds = {t["verdict"]["kind"] for f in found["manifest"]["plan"]["files"] for t in f["tensors"]}
    assert ("quantized" in kinds) == bool(flag)


def test_the_head_and_the_embedding_follow_the_flag(tmp_path: Path) -> None:
    """An embedding gets 8 bits: its rows are looked up in bytes, and here it is the head as well."""
    model = onnx_presets.recipe("int4", "ort").apply(lconvert.read(DEMO))
    items = {i.name: i for i in onnx.plan(model, original=lconvert.read(DEMO)).items()}
    assert items["head"].type == items["embed.table"].type == "INT8"
    assert items["layers.0.attn.q"].type == "INT4"
    assert items["head"].verdict.kind == items["embed.table"].verdict.kind == "quantized"
    result = execute(onnx.plan(model, original=lconvert.read(DEMO)), tmp_path / "m")
    errors = {i.name: i.verdict.error for i in result.plan.items() if i.verdict.kind == "quantized"}
    assert errors["head"] == pytest.approx(errors["embed.table"]) and errors["head"] < 0.01  # type: ignore[operator]
    assert 0.05 < errors["layers.0.attn.q"] < 0.15
    own = lconvert.read(case_models.folder("cohere-untied"))
    items = {i.name: i for i in onnx.plan(onnx_presets.recipe("int4", "ort").apply(own)).items()}
    assert items["head"].type == "INT4" and items["embed.table"].type == "INT8"
    model = onnx_presets.recipe("int4", "trt").apply(lconvert.read(DEMO))
    items = {i.name: i for i in onnx.plan(model, onnx.Options("trt")).items()}
    assert items["embed"].type == "FLOAT16" and items["layers.0.attn.q"].type == "INT4"


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--block-size", 64], "add --int4 or --int8"),
        (["--block-size", 64, "--fp8"], "does not apply to --fp8"),
        (["--block-size", 24, "--int4"], "powers of two"),
        (["--dialect", "trt", "--fp32"], "F16 and BF16 only"),
        (["--dialect", "onnx"], "is not one of"),
        (["--positions", 0], "x>=1"),
        (["--calibration", "missing.txt", "--w8a8"], "no such file"),
    ],
)
def test_wrong_options(args: list[object], words: str, tmp_path: Path) -> None:
    code, _, err = run(DEMO, "-o", tmp_path / "out", *args)
    assert code == 2 and words in err, err
    assert not (tmp_path / "out").exists()


def test_block_sizes(tmp_path: Path) -> None:
    for size in (16, 64, 128):
        model = onnx_presets.recipe("int4", "ort", block=size).apply(lconvert.read(DEMO))
        held = {i.held for i in onnx.plan(model).items() if i.name == "layers.0.attn.q"}
        assert held == {f"INT4, blocks of {size}"}
    with pytest.raises(OptionError, match="FP4"):
        onnx_presets.recipe("nvfp4", "ort")


def test_a_folder_that_exists(tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert run(DEMO, "-o", out, "--no-validate", "--no-card")[0] == 0
    before = (out / "model.onnx").read_bytes()
    code, _, err = run(DEMO, "-o", out, "--int4", "--no-validate")
    assert code == 2 and "--force" in err and (out / "model.onnx").read_bytes() == before
    assert run(DEMO, "-o", out, "--int4", "--no-validate", "--force")[0] == 0


def test_a_dry_run_writes_nothing(tmp_path: Path) -> None:
    code, text, _ = run(DEMO, "-o", tmp_path / "out", "--int4", "--dry-run")
    assert code == 0 and "INT4, blocks of 32" in text and not (tmp_path / "out").exists()


# --- proofs ------------------------------------------------------------------------------------------------


def proven(source: Path, out: Path, *tiers: str, **options: Any) -> Report:
    return lconvert.validate(source, out, tiers=tiers, threads=1, **options)


def failed(report: Report) -> list[str]:
    return [f"{c.name}: {c.value}" for c in report.checks if c.passed is False]


def value(report: Report, name: str) -> str:
    return next(c.value for c in report.checks if c.name == name)


@pytest.mark.parametrize("peer", sorted(p.name for p in PEERS.iterdir() if (p / "config.json").is_file()))
def test_integers_of_other_tools_are_carried(peer: str, tmp_path: Path) -> None:
    """Every quantized checkpoint of the fixtures, in a graph whose numbers are compared with the checkpoint's."""
    pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    pytest.importorskip("tokenizers", reason="tokenizers is not installed")
    model = lconvert.read(PEERS / peer)
    try:
        plan = onnx.plan(model)
    except UnsupportedError as e:
        assert "no ONNX graph yet" in str(e)
        return
    execute(plan, tmp_path / "m")
    report = proven(PEERS / peer, tmp_path / "m", "structure", "tensors")
    settings = "activations and KV cache"
    assert not [f for f in failed(report) if not f.startswith(settings)], failed(report)


@pytest.mark.parametrize(
    "peer",
    [
        "llmcompressor-fp8-dynamic-kv",
        "llmcompressor-nvfp4",
        "modelopt-w4a8-awq",
        "llmcompressor-w8a8-static-asym",
    ],
)
def test_graphs_that_round_inputs_are_proven(peer: str, tmp_path: Path) -> None:
    """Against a reference that rounds them as well they are exact; against one that does not, their gate is that of rounding."""
    for name in ("onnxruntime", "torch", "transformers"):
        pytest.importorskip(name, reason=f"{name} is not installed")
    execute(onnx.plan(lconvert.read(PEERS / peer)), tmp_path / "m")
    options = {"context": 32, "max_windows": 1, "greedy": (1, 4), "cache": tmp_path / "logits"}
    report = proven(PEERS / peer, tmp_path / "m", "structure", "tensors", "logits", **options)
    assert not failed(report), failed(report)
    assert value(report, "activations and KV cache") == "as the source says"
    measured = {c.name: c.measured for c in report.checks}
    fidelity, cost = (measured[f"{what}: KL divergence"] for what in ("fidelity", "cost"))
    assert fidelity is not None and cost is not None and fidelity < 1e-5 < cost
    assert any("the reference rounds inputs" in n for n in report.notes)


def test_shapes_of_graphs_are_proven(tmp_path: Path) -> None:
    """Without a cache, with the last logits alone, with fewer positions."""
    for name in ("onnxruntime", "torch", "transformers"):
        pytest.importorskip(name, reason=f"{name} is not installed")
    model = lconvert.read(DEMO)
    options = {"context": 48, "max_windows": 2, "greedy": (1, 4), "cache": tmp_path / "logits"}
    for i, chosen in enumerate(
        ({"last_logit": True}, {"prefill_only": True, "last_logit": True}, {"positions": 64})
    ):
        out = tmp_path / str(i)
        execute(onnx.plan(model, onnx.Options(**chosen)), out)  # type: ignore[arg-type]
        report = proven(DEMO, out, "structure", "tensors", "logits", **options)
        assert not failed(report), failed(report)
        stepped = [c for c in report.checks if c.name.startswith(("step by step", "padding"))]
        assert len(stepped) == (0 if "prefill_only" in chosen else 2)
    assert any("64 of the model's 512 positions" in n for n in report.notes)


def test_what_the_cpu_cannot_run_is_not_proven(tmp_path: Path) -> None:
    """The weights are, and the exit code is no failure of the artifact."""
    for name in ("onnxruntime", "torch", "transformers"):
        pytest.importorskip(name, reason=f"{name} is not installed")
    model = onnx_presets.recipe("nvfp4", "trt").apply(lconvert.read(DEMO))
    execute(onnx.plan(model, onnx.Options("trt", "BF16")), tmp_path / "m")
    report = proven(DEMO, tmp_path / "m", "structure", "tensors", "logits", max_windows=1)
    assert report.exit_code == 0 and not failed(report)
    assert any("no kernel for these types" in line for line in report.not_proven)


def test_the_verb_is_listed() -> None:
    assert "hf-to-onnx" in VERBS
