"""vLLM on the CPU: the real engine, in an environment of its own, against transformers.

The environment is the interpreter that LCONVERT_VLLM_PYTHON names, else .venv-vllm beside .venv
(`lconvert doctor --install vllm --yes` makes it). One worker serves all models of this file.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

import lconvert
from lconvert.errors import InputError
from lconvert.validators.logits import log_softmax
from lconvert.validators.runtimes import Runtime, open_runtime, remote, worker
from lconvert.validators.runtimes.remote import Remote, workers
from tests.conftest import DEMO, ROOT

pytest.importorskip("transformers", reason="transformers is not installed")

PYTHON = Path(os.environ.get("LCONVERT_VLLM_PYTHON") or ROOT / ".venv-vllm" / "bin" / "python")
pytestmark = pytest.mark.skipif(
    not PYTHON.exists(),
    reason=f"the vLLM environment is missing: neither LCONVERT_VLLM_PYTHON nor {PYTHON.relative_to(ROOT)}"
    if PYTHON.is_relative_to(ROOT)
    else f"the vLLM environment is missing: {PYTHON} (LCONVERT_VLLM_PYTHON)",
)
TEXT = (ROOT / "validators" / "text" / "excerpt.txt").read_text(encoding="utf-8")
CONTEXT = 256


@pytest.fixture(autouse=True, scope="module")
def one_worker() -> Iterator[None]:
    with workers():
        yield


def vllm(folder: Path, **options: object) -> Remote:
    found = open_runtime("vllm", folder, context=CONTEXT, threads=1, python=PYTHON, options=options)
    assert isinstance(found, Remote)
    return found


@pytest.fixture(scope="module")
def reference() -> Runtime:
    return open_runtime("transformers", DEMO, context=CONTEXT, threads=1)


@pytest.fixture(scope="module")
def demo_vllm() -> Iterator[Remote]:
    runtime = vllm(DEMO)
    yield runtime
    runtime.close()


@pytest.fixture(scope="module")
def ids(reference: Runtime) -> list[int]:
    return reference.tokenize(TEXT, special=False)[:CONTEXT]


def distance(p: np.ndarray, q: np.ndarray) -> tuple[float, float]:
    """Mean KL divergence, and the largest difference of log-probabilities."""
    a, b = log_softmax(p), log_softmax(q)
    return float((np.exp(a) * (a - b)).sum(-1).mean()), float(np.abs(a - b).max())


def test_dense_fp32_is_exact(demo_vllm: Remote, reference: Runtime, ids: list[int]) -> None:
    found = demo_vllm.logits(ids)  # the whole context: not even the last position is lost
    assert found.shape == (CONTEXT, 2048) and found.dtype == np.float32
    kld, worst = distance(reference.logits(ids), found)
    assert kld < 1e-10 and worst < 1e-4
    assert np.array_equal(demo_vllm.logits(ids[:1]), demo_vllm.logits(ids[:1]))
    assert distance(reference.logits(ids[:1]), demo_vllm.logits(ids[:1]))[1] < 1e-4


def test_continuations_and_ids(demo_vllm: Remote, reference: Runtime, ids: list[int]) -> None:
    for prompt in (ids[:1], ids[:40], [2042, 2043, 2043]):
        made = demo_vllm.generate(prompt, 24)
        assert made.ids == reference.generate(prompt, 24).ids and len(made.seconds) == 24
        assert made.seconds[0] > 0 and all(a < b for a, b in pairwise(made.seconds))
    for special in (True, False):
        text = "one <|eot_id|> two \N{SNOWMAN}  end"
        assert demo_vllm.tokenize(text, special=special) == reference.tokenize(text, special=special)


def test_limits_and_figures(demo_vllm: Remote, ids: list[int]) -> None:
    with pytest.raises(InputError, match="257 tokens do not fit the context of 256"):
        demo_vllm.logits([*ids, 1])
    with pytest.raises(InputError, match="257 tokens do not fit the context of 256"):
        demo_vllm.generate(ids[:250], 8)
    assert len(demo_vllm.generate(ids[:250], 7).ids) == 7
    with pytest.raises(InputError, match="vLLM refuses the prompt"):
        demo_vllm.logits([1, 5000])
    info = demo_vllm.info()
    assert (info["runtime"], info["dtype"], info["quantization"]) == ("vllm", "float32", "none")
    assert {"vllm", "torch", "device", "attention", "kv_cache", "threads", "python"} <= info.keys()
    assert 0 < demo_vllm.load_seconds < 300 and (demo_vllm.peak_memory() or 1 << 30) > 100 << 20


def test_prefill_in_chunks(reference: Runtime, ids: list[int]) -> None:
    runtime = vllm(DEMO, batch_tokens=100)
    assert runtime.info()["batch_tokens"] == "100"
    for n in (CONTEXT, 200, 101, 100):  # with and without a rest
        assert distance(reference.logits(ids[:n]), runtime.logits(ids[:n]))[1] < 1e-4
    runtime.close()


def test_as_it_is_served(reference: Runtime, ids: list[int]) -> None:
    runtime = open_runtime("vllm", DEMO, context=CONTEXT, threads=1, purpose="speed", python=PYTHON)
    assert runtime.info()["dtype"] == "bfloat16"
    assert 1e-7 < distance(reference.logits(ids), runtime.logits(ids))[0] < 1e-3
    runtime.close()


def test_a_folder_that_vllm_refuses(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"vLLM needs a Hugging Face folder"):
        vllm(tmp_path)
    for path in DEMO.iterdir():
        shutil.copy(path, tmp_path)
    config = json.loads((DEMO / "config.json").read_text())
    (tmp_path / "config.json").write_text(
        json.dumps(config | {"quantization_config": {"quant_method": "no"}})
    )
    with pytest.raises(InputError, match=r"vLLM does not load it \("):
        vllm(tmp_path)


def test_folders_with_names_of_packages_are_not_looked_into(tmp_path: Path) -> None:
    """vLLM asks another Python about a class that it has not seen before; this repository has a folder `kernels`, as a package that transformers
    would like to use is called."""
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").write_text("raise RuntimeError('imported')")
    code = (
        "import sys; from lconvert.validators.runtimes import open_runtime\n"
        "open_runtime('vllm', sys.argv[1], context=64, threads=1, python=sys.argv[2]).close()"
    )
    own = {"PYTHONPATH": str(ROOT / "src"), "VLLM_CACHE_ROOT": str(tmp_path / "cache")}
    command = [sys.executable, "-P", "-c", code, str(DEMO), str(PYTHON)]
    done = subprocess.run(
        command, cwd=tmp_path, env={**os.environ, **own}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert list((tmp_path / "cache").rglob("*LlamaForCausalLM*"))


def test_logits_are_vllms_own_log_probabilities(ids: list[int]) -> None:
    """The hidden states with the head applied outside, against the log-probabilities that the engine itself
    reports.
    """
    code = f"""
        import importlib.util, json, os, sys
        spec = importlib.util.spec_from_file_location("worker", {worker.__file__!r})
        w = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(w)
        w.importable({list(lconvert.__path__)!r})
        from lconvert.validators.runtimes import vllm as adapter
        adapter.prepare()
        import functools, numpy as np, vllm
        vllm.LLM = functools.partial(vllm.LLM, max_logprobs=-1)
        runtime = adapter.Vllm({str(DEMO)!r}, context=128, threads=1, batch_tokens=50)
        ids = {ids[:90]}
        x = runtime.logits(ids).astype(np.float64)
        x -= np.log(np.exp(x - x.max(-1, keepdims=True)).sum(-1, keepdims=True)) + x.max(-1, keepdims=True)
        sampling = vllm.SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=-1, logprobs=-1, detokenize=False)
        (out,) = runtime._llm.generate([{{"prompt_token_ids": ids}}], sampling, use_tqdm=False)
        rows = [*out.prompt_logprobs[1:], out.outputs[0].logprobs[0]]
        theirs = np.array([[row[i].logprob for i in range(x.shape[1])] for row in rows])
        print("\\nFOUND", json.dumps([len(rows), float(np.abs(np.exp(theirs) - np.exp(x)).max()), float(np.abs(theirs - x).max())]), flush=True)
        os._exit(0)
    """
    done = subprocess.run(
        [PYTHON, "-E", "-P", "-c", textwrap.dedent(code)],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert "FOUND" in done.stdout, done.stderr[-2000:]
    rows, probability, logarithm = json.loads(done.stdout.rpartition("FOUND")[2].splitlines()[0])
    assert rows == 90 and probability < 1e-6 and logarithm < 1e-5  # vLLM's logarithms are fp32


@pytest.mark.parametrize("name", ["wiki-phi3", "wiki-gemma3", "wiki-gpt2", "wiki-mixtral"])
def test_other_architectures(shared: Path, name: str) -> None:
    folder = shared / "models" / name
    expected, found = open_runtime("transformers", folder, threads=1), vllm(folder)
    ids = expected.tokenize(TEXT, special=False)[:200]
    kld, worst = distance(expected.logits(ids), found.logits(ids))
    assert kld < 1e-10 and worst < 1e-4
    found.close()


def test_a_quantized_folder(shared: Path) -> None:
    """Its kernels take no fp32, so that parity runs it in the checkpoint's dtype."""
    base = open_runtime("transformers", shared / "models" / "wiki-mistral", threads=1)
    runtime = vllm(shared / "checkpoints" / "gqm_gptq")
    info = runtime.info()
    assert info["quantization"] != "none" and info["dtype"] in ("float16", "bfloat16")
    ids = base.tokenize(TEXT, special=False)[:200]
    assert 1e-4 < distance(base.logits(ids), runtime.logits(ids))[0] < 0.2
    runtime.close()
    assert sum(name == "vllm" for _, name in remote._POOL) == 1, "one import of vLLM must serve every model"


def test_the_gate_holds_in_vllm() -> None:
    """A dense folder in fp32: largest difference of a log-probability below 1e-4, the gate of gates.yaml."""
    report = lconvert.validate(
        DEMO,
        DEMO,
        runtimes=["vllm"],
        python={"vllm": PYTHON},
        tiers=["logits"],
        max_windows=1,
        context=CONTEXT,
    )
    assert report.passed, [c for c in report.checks if c.passed is False]
    assert 0 < report.stats()["max_logprob_difference"] < 1e-4
    [check] = [c for c in report.checks if "delta log p" in c.name]
    assert check.limit == 1e-4 and check.passed
