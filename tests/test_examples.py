"""The examples run and do what they say."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any
from xml.etree import ElementTree

import pytest
import yaml

import lconvert
from lconvert.formats import gguf
from tests.conftest import DEMO, ROOT


def _load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / "examples" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = sys.modules[name] = importlib.util.module_from_spec(spec)  # where dataclasses look for it
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


def test_one_model_three_runtimes(tmp_path: Path) -> None:
    """Compressed tensors arrive as they are, and every runtime measures the same cost but for its own arithmetic."""
    for name in ("llama_cpp", "onnx", "onnxruntime", "torch", "transformers"):
        pytest.importorskip(name, reason=f"{name} is not installed")
    example = _load("one_model_three_runtimes")
    folder = example.compressed(DEMO, example.TEXT, tmp_path / "model.lcir", windows=16, context=128)
    given = os.environ.get("LCONVERT_VLLM_PYTHON") or str(ROOT / ".venv-vllm" / "bin" / "python")
    rows = example.carry(DEMO, folder, tmp_path, {"vllm": Path(given)}, max_windows=2)
    assert [r.target for r in rows] == ["gguf", "vllm", "onnx"]
    for row in rows:
        assert set(row.verdicts) <= {"exact", "widened"} and sum(row.verdicts.values()) >= 21, row
        assert row.equal == "29 of 29 tensors, every value: pass"
    proven = [r for r in rows if r.cost is not None]
    assert len(proven) == 3 or (os.environ.get("LCONVERT_WITHOUT_VLLM") and len(proven) == 2)
    exact = next(r for r in proven if r.target == "onnx")
    assert exact.fidelity < 1e-9 and all(r.passed for r in proven)
    for row in proven:
        # a KL divergence is a squared distance: what a runtime adds to the model's own is at most this
        assert abs(row.cost**0.5 - exact.cost**0.5) <= 1.2 * row.fidelity**0.5 + 1e-6, row


@pytest.fixture(scope="module")
def ablations(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, dict[tuple[str, Any], Any]]]:
    """The quick run on the demo model: its folder, and by ablation the rows by (series, x), of which numbers are rounded."""
    for name in ("matplotlib", "tokenizers", "torch", "transformers", "scipy"):
        pytest.importorskip(name, reason=f"{name} is not installed")
    out = tmp_path_factory.mktemp("ablations")
    example = _load("ablations")
    found = example.run(example.prepare(DEMO, out, quick=True), out)
    assert list(found) == list(example.ABLATIONS)

    def place(x: Any) -> Any:
        return x if isinstance(x, str) else round(x)

    return out, {name: {(r["series"], place(r["x"])): r for r in rows} for name, rows in found.items()}


def _klds(rows: dict[tuple[str, Any], Any]) -> dict[tuple[str, Any], float]:
    return {key: r["kld_mean"] for key, r in rows.items()}


def test_ablations_of_calibration(ablations: Any) -> None:
    size = _klds(ablations[1]["calibration-size"])
    for series in ("GPTQ", "GPTAQ"):
        assert size[series, "16"] < 1.05 * size[series, "1"], "more text does not hurt"
        assert size[series, "16"] < size["RTN, which needs none", "1"]
    kinds = _klds(ablations[1]["domain"])
    for series in ("int3 weights (GPTQ)", "half zeros (SparseGPT)"):
        assert kinds[series, "text of the same kind"] < kinds[series, "random tokens"]
        assert kinds[series, "text of the same kind"] < kinds[series, "none: RTN, magnitude, dynamic"]


def test_ablations_of_grids(ablations: Any) -> None:
    groups = _klds(ablations[1]["group-size"])
    for series in {s for s, _ in groups}:
        assert groups[series, "32"] < groups[series, "row"]
    for group in ("32", "row"):
        assert groups["GPTQ", group] < groups["RTN, scales by least squares", group] < groups["RTN", group]
    shared = _klds(ablations[1]["granularity"])
    tensor, row = "one per tensor", "one per row or token"
    for what in {x for s, x in shared if s == row}:
        # a float's steps grow with its values, so that a scale for fewer of them gains little
        assert shared[row, what] < (1.1 if "fp8" in what else 0.9) * shared[tensor, what], what
    assert shared["one per 128 of a row", "int8 weights"] < shared[row, "int8 weights"]


def test_ablations_of_exceptions(ablations: Any) -> None:
    channels = _klds(ablations[1]["outlier-channels"])
    for series in ("largest inputs", "largest weights"):
        assert channels[series, 4] < channels[series, 0]
    assert channels["largest inputs", 4] < channels["at random", 4]
    kept: dict[str, list[tuple[int, float]]] = {}
    for r in ablations[1]["outlier-matrices"].values():
        kept.setdefault(r["series"], []).append((r["kept"], r["kld_mean"]))
    for rows in kept.values():
        assert min(rows)[0] == 0 and max(rows)[1] < min(rows)[1], "the more are kept, the better"


def test_allocation_beats_one_type_for_all(ablations: Any) -> None:
    rows = list(ablations[1]["allocation"].values())
    uniform = [r for r in rows if "type" in r]
    allocated = [r for r in rows if "type" not in r]
    assert len(uniform) == len(allocated) == 2
    for one, other in zip(uniform, allocated, strict=True):
        assert other["bits_per_weight"] <= one["bits_per_weight"] and other["kld_mean"] <= one["kld_mean"]
    assert any(other["kld_mean"] < one["kld_mean"] for one, other in zip(uniform, allocated, strict=True))


def test_ablations_of_zeros(ablations: Any) -> None:
    rows = ablations[1]["sparsity"]
    pruned = _klds(rows)
    for series in {s for s, _ in rows}:
        assert pruned[series, 0] < 1e-12 and abs(rows[series, 50]["zeros"] - 0.5) < 0.01
    assert max(pruned["SparseGPT", 50], pruned["magnitude, 8 steps", 50]) < pruned["magnitude", 50]
    assert pruned["SparseGPT", 50] < pruned["Wanda", 50]
    for (series, x), kld in _klds(ablations[1]["patterns"]).items():
        assert x == "2:4" and kld > pruned[series, 50], "a pattern leaves less to choose"
    parts = {s: r for (s, _), r in ablations[1]["places"].items()}
    assert parts["attention"]["zeros"] + parts["MLP"]["zeros"] == pytest.approx(
        parts["both"]["zeros"], abs=0.01
    )
    assert max(parts["attention"]["kld_mean"], parts["MLP"]["kld_mean"]) < parts["both"]["kld_mean"]
    orders = {s: r for (s, _), r in ablations[1]["order"].items()}
    for r in orders.values():
        assert r["zeros"] > 0.49 and r["bits_per_weight"] < 4.2
    assert min(orders, key=lambda s: orders[s]["kld_mean"]) == "SparseGPT, then GPTQ"


def test_ablations_are_drawn_and_written_down(ablations: Any) -> None:
    out, found = ablations
    for name, rows in found.items():
        written = json.loads((out / f"{name}.json").read_text())
        assert len(written["rows"]) == len(rows) and written["model"] == DEMO.name
        for r in written["rows"]:
            low, high = r["kld_ci"]
            assert low <= r["kld_mean"] <= high and r["ppl"] > 1 and 0 < r["bits_per_weight"] <= 32
        drawing = ElementTree.parse(out / f"{name}.svg").getroot()
        texts = {e.text for e in drawing.iter("{http://www.w3.org/2000/svg}text")}
        assert "mean KL divergence, nats" in texts
        assert {r["series"] for r in written["rows"]} <= texts, "every series is in the legend"


@pytest.mark.parametrize(
    "chosen",
    [{}, {"static_cache": True}, {"prefill_only": True}, {"last_logit": True}, {"dialect": "genai"}],
    ids=str,
)
def test_onnx_generate(chosen: dict[str, Any], tmp_path: Path) -> None:
    """The script's text is the greedy one of the source in transformers, whatever keeps keys and values."""
    for name in ("onnx", "onnxruntime", "tokenizers", "torch", "transformers"):
        pytest.importorskip(name, reason=f"{name} is not installed")
    from lconvert.converters import onnx
    from lconvert.executor import execute
    from lconvert.validators.runtimes import open_runtime
    from lconvert.validators.runtimes.hf import file_tokenizer

    execute(onnx.plan(lconvert.read(DEMO), onnx.Options(**chosen)), tmp_path / "m")
    text = _load("onnx_generate").generate(tmp_path / "m", "Once upon a time", 12)
    tokenizer = file_tokenizer(DEMO / "tokenizer.json")
    ids = tokenizer.encode("Once upon a time").ids
    reference = open_runtime("transformers", DEMO)
    assert text == tokenizer.decode([*ids, *reference.generate(ids, 12).ids])
    reference.close()
    script = [
        sys.executable,
        ROOT / "examples" / "onnx_generate.py",
        tmp_path / "m",
        "Once upon a time",
        "12",
    ]
    assert subprocess.run(script, capture_output=True, text=True, check=True).stdout.strip() == text.strip()


CI = ROOT / "examples" / "ci"


def _release(model: Path, out: Path, **env: str) -> subprocess.CompletedProcess[str]:
    call = f"{sys.executable} -P -m lconvert"
    settings = {
        "MODEL": str(model),
        "OUT": str(out),
        "LCONVERT": call,
        "WINDOWS": "1",
        "TYPES": "Q8_0",
        **env,
    }
    return subprocess.run(
        ["sh", CI / "release.sh"], env=os.environ | settings, capture_output=True, text=True, check=False
    )


def test_ci_script_publishes_everything_and_its_exit_code_is_the_verdict(tmp_path: Path) -> None:
    done = _release(DEMO, tmp_path / "out", TYPES="Q8_0 Q4_K_M")
    assert done.returncode == 0, done.stderr
    out = tmp_path / "out"
    names = sorted(p.name for p in (out / "reports").iterdir())
    assert names == [
        "demo_model-Q4_K_M.json",
        "demo_model-Q8_0.json",
        "junit.xml",
        "report.html",
        "summary.md",
    ]
    suites = ElementTree.parse(out / "reports" / "junit.xml").getroot()
    cases = [c.get("name") for c in suites.iter("testcase")]
    assert len(cases) > 30 and not list(suites.iter("failure"))
    assert "quantized_by: lconvert" in (out / "README.md").read_text()
    assert "demo_model-Q8_0.gguf" in (out / "reports" / "summary.md").read_text()
    # A later build that became worse than the last release fails.
    baseline = json.loads((out / "reports" / "demo_model-Q8_0.json").read_text())
    for row in baseline["details"]["logits"]:
        row["stats"]["kld"]["mean"] /= 2
    (tmp_path / "demo_model-Q8_0.json").write_text(json.dumps(baseline))
    done = _release(DEMO, out, BASELINES=str(tmp_path))
    assert done.returncode == 1, done.stdout
    assert "baseline" in (out / "reports" / "junit.xml").read_text(), "what failed is published"


def test_ci_script_stops_at_wrong_input(tmp_path: Path) -> None:
    done = _release(tmp_path / "missing", tmp_path / "out")
    assert done.returncode == 2 and "missing" in done.stderr
    done = _release(DEMO, tmp_path / "out", TEXT=str(tmp_path / "none.txt"))
    assert done.returncode == 2 and "none.txt: no such file" in done.stderr
    assert not (tmp_path / "out" / "reports" / "report.html").exists()


def test_ci_workflow_calls_what_exists() -> None:
    """As far as a workflow can be checked without its runner: it parses, and files and variables are the script's."""
    workflow = yaml.safe_load((CI / "github-actions.yml").read_text())
    steps = workflow["jobs"]["convert"]["steps"]
    script = (CI / "release.sh").read_text()
    [prove] = [s for s in steps if s.get("run") == "sh release.sh"]
    for variable in set(prove["env"]) - {"LCONVERT_CACHE"}:
        assert f"{variable}=${{{variable}" in script, variable
    published = [s["with"][k] for s in steps for k in ("path", "report_paths") if k in s.get("with", {})]
    assert {"release/reports", "release/reports/junit.xml"} <= set(published)
    assert all("uses" in s or "run" in s for s in steps)


def test_readme_example(tmp_path: Path) -> None:
    pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert blocks
    for block in blocks:
        subprocess.run([sys.executable, "-P", "-c", block], cwd=tmp_path, check=True)
    assert (tmp_path / "demo.gguf").exists()


def _engine(model: Path, out: Path, **env: str) -> subprocess.CompletedProcess[str]:
    settings = {"MODEL": str(model), "OUT": str(out), "LCONVERT": f"{sys.executable} -P -m lconvert", "PYTHON": f"{sys.executable} -P", **env}  # fmt: skip
    return subprocess.run(["sh", CI / "build_engines.sh"], env=os.environ | settings, capture_output=True, text=True, check=False)  # fmt: skip


def test_engines_in_ci_are_gated_and_cached(tmp_path: Path) -> None:
    """NVFP4 for Blackwell: gated in ONNX Runtime after dequantization, built, and not built again; refused for Ada."""
    for package in ("onnxruntime", "tensorrt_rtx"):
        pytest.importorskip(package, reason=f"{package} is not installed")
    out = tmp_path / "engines"
    done = _engine(DEMO, out, PRESET="nvfp4a16", SMS="120")
    assert done.returncode == 0, done.stderr
    report = json.loads((out / "parity.json").read_text())
    assert report["passed"] and report["dequantized_first"] and "no GPU" in report["not_run"]
    assert json.loads((out / "model.plan.manifest.json").read_text())["built_for"] == ["SM120"]
    assert "cached" in _engine(DEMO, out, PRESET="nvfp4a16", SMS="120").stdout
    ada = _engine(DEMO, tmp_path / "ada", PRESET="nvfp4a16", SMS="89")
    assert ada.returncode == 2 and not (tmp_path / "ada" / "model.plan").exists()
    assert "fp4-target" in (tmp_path / "ada" / "plan.json").read_text()


def test_the_engine_workflow_calls_what_is_there() -> None:
    job = yaml.safe_load((CI / "build_engines.yml").read_text())["jobs"]["engines"]
    build = next(s for s in job["steps"] if s.get("name") == "Build and gate")
    named = set(re.findall(r"\$\{(\w+):[?-]", (CI / "build_engines.sh").read_text()))
    assert build["run"] == "sh build_engines.sh" and set(build["env"]) <= named
    assert len(job["strategy"]["matrix"]["include"]) > 1
