"""A cache of fixed length for users: the flag, the runtime that writes it in place, `validate`, `eval` and `bench` on such a graph."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

for package in ("torch", "transformers", "onnx", "onnxruntime", "tokenizers"):
    pytest.importorskip(package, reason=f"{package} is not installed")

import onnxruntime

import lconvert
from lconvert.converters import onnx
from lconvert.errors import InputError
from lconvert.executor import execute
from lconvert.validators.runtimes import Runtime, open_runtime
from lconvert.validators.runtimes.onnx_cache import Fixed
from lconvert.validators.runtimes.onnxruntime import OnnxRuntime
from tests.conftest import DEMO, ROOT
from tests.test_cli import inside

IDS = [int(i) for i in np.random.default_rng(3).integers(0, 2000, 120)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("static") / "m"
    execute(onnx.plan(lconvert.read(DEMO), onnx.Options(static_cache=True)), out)
    return out


@pytest.fixture(scope="module")
def reference() -> Runtime:
    return open_runtime("transformers", DEMO, context=256, threads=1)


def opened(folder: Path, **options: Any) -> OnnxRuntime:
    return OnnxRuntime(folder, threads=1, **options)


@pytest.mark.parametrize("rows", [None, 1, 30])
def test_logits_and_tokens_are_those_of_transformers(
    rows: int | None, folder: Path, reference: Runtime
) -> None:
    runtime = opened(folder, context=len(IDS) + 8, batch_tokens=rows)
    assert np.abs(runtime.logits(IDS) - reference.logits(IDS)).max() < 1e-4
    assert runtime.generate(IDS, 8).ids == reference.generate(IDS, 8).ids
    assert runtime.info()["kv_cache"] == "of fixed length, in place"


def test_a_step_writes_its_own_rows_and_nothing_else(folder: Path) -> None:
    """In the memory that was allocated first; slots that are not taken keep what they had."""
    runtime = opened(folder, context=40)
    past = runtime.empty()
    assert isinstance(past, Fixed) and past.capacity == 40
    at = {name: array.ctypes.data for name, array in past.buffers.items()}
    before = {name: array.copy() for name, array in past.buffers.items()}
    for start, n in ((0, 30), (30, 1), (31, 9)):
        _, after = runtime._run(IDS[start : start + n], past, start)
        assert after is past and past.taken == start + n
        for name, array in past.buffers.items():
            assert array.ctypes.data == at[name]
            changed = (array != before[name]).any(axis=(0, 1, 3))
            assert np.flatnonzero(changed).tolist() == list(range(start, start + n)), name
            before[name] = array.copy()


def test_logits_of_a_run_outlive_the_next_one(folder: Path) -> None:
    runtime = opened(folder, context=40)
    past = runtime.empty()
    first, past = runtime._run(IDS[:20], past, 0)
    kept = first.copy()
    runtime._run(IDS[20:40], past, 20)
    assert np.array_equal(first, kept)


def test_one_position_over_the_end(folder: Path) -> None:
    runtime = opened(folder, context=40)
    with pytest.raises(InputError, match="41 tokens do not fit the context of 40"):
        runtime.logits(IDS[:41])
    with pytest.raises(InputError, match="41 tokens do not fit the context of 40"):
        runtime.generate(IDS[:40], 2)
    assert len(runtime.generate(IDS[:40], 1).ids) == 1
    past = runtime.empty(capacity=16)
    _, past = runtime._run(IDS[:16], past, 0)
    with pytest.raises(InputError, match="1 tokens after 16 do not fit the cache of 16 positions"):
        runtime._run(IDS[16:17], past, 16)


@pytest.mark.parametrize("static", [False, True])
def test_a_graph_for_fewer_positions_than_the_context(static: bool, tmp_path: Path) -> None:
    """Said before anything runs, and the last position works."""
    execute(onnx.plan(lconvert.read(DEMO), onnx.Options(static_cache=static, positions=64)), tmp_path / "m")
    runtime = opened(tmp_path / "m", context=512)
    assert runtime.logits(IDS[:64]).shape[0] == 64 and len(runtime.generate(IDS[:60], 5).ids) == 5
    with pytest.raises(InputError, match="65 tokens do not fit the context of 64"):
        runtime.logits(IDS[:65])
    with pytest.raises(InputError, match="65 tokens do not fit the context of 64"):
        runtime.generate(IDS[:60], 6)


def test_the_graph_itself_refuses_it(folder: Path) -> None:
    """Whatever runs it: nothing is written over the cache's beginning."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(folder / "model.onnx", options)
    feed = {
        i.name: np.zeros((1, i.shape[1], 16, i.shape[3]), np.float32)
        for i in session.get_inputs()
        if i.name.startswith("past")
    }
    feed |= {"input_ids": np.array([IDS[:2]]), "attention_mask": np.ones((1, 16), np.int64)}
    feed["position_ids"] = np.array([[15, 16]])
    for place, fits in ((14, True), (15, False)):
        feed["cache_position"] = np.array([place])
        if fits:
            assert np.isfinite(session.run(["logits"], feed)[0]).all()
        else:
            with pytest.raises(Exception, match="exceeds max_sequence_length"):
                session.run(["logits"], feed)


def test_a_graph_whose_capacity_is_a_number(folder: Path, reference: Runtime, tmp_path: Path) -> None:
    """As other exporters write them: (1, heads, 64, width)."""
    import onnx as package

    model = package.load(folder / "model.onnx")
    for port in (*model.graph.input, *model.graph.output):
        for d in port.type.tensor_type.shape.dim:
            if d.dim_param in ("capacity", "batch"):
                d.dim_value = 64 if d.dim_param == "capacity" else 1
    package.save(model, tmp_path / "model.onnx")
    runtime = opened(tmp_path / "model.onnx", context=256)
    assert np.abs(runtime.logits(IDS[:64]) - reference.logits(IDS[:64])).max() < 1e-4
    assert not runtime.pads
    with pytest.raises(InputError, match="65 tokens after 0 do not fit the cache of 64 positions"):
        runtime.logits(IDS[:65])


# --- the verbs ---------------------------------------------------------------------------------------------


def run(*args: object) -> tuple[int, str, str]:
    return inside([str(a) for a in args])


@pytest.mark.parametrize("more", [(), ("--int4", "--last-logit"), ("--dialect", "trt", "--fp16")])
def test_the_flag_writes_a_graph_that_is_proven(more: tuple[str, ...], tmp_path: Path) -> None:
    out = tmp_path / "m"
    code, _, err = run("hf-to-onnx", DEMO, "--static-cache", *more, "-o", out, "--no-validate")
    assert code == 0, err
    report = tmp_path / "r.json"
    code, text, err = run("validate", DEMO, out, "--windows", 1, "--threads", 1, "--report", report)
    assert code == 0, text + err
    found = json.loads(report.read_text(encoding="utf-8"))
    names = {c["name"]: c["passed"] for c in found["checks"]}
    assert names["step by step: KL divergence from the whole prompt"] is True
    assert names["padding on the left: KL divergence from each prompt alone"] is True


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (("--prefill-only",), "has no cache: --prefill-only or --static-cache"),
        (("--dialect", "genai"), "does not go with the genai dialect"),
    ],
)
def test_what_does_not_go_together(more: tuple[str, ...], words: str, tmp_path: Path) -> None:
    code, _, err = run("hf-to-onnx", DEMO, "--static-cache", *more, "-o", tmp_path / "m")
    assert code == 2 and words in err and not (tmp_path / "m").exists()


def test_eval_and_bench(folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("lm_eval", reason="lm_eval is not installed")
    report = tmp_path / "eval.json"
    task = ROOT / "examples" / "tasks"
    code, text, err = run(
        "eval", folder, "--reference", DEMO, "--task", task, "--limit", 3, "--threads", 1, "--report", report
    )
    assert code == 0, text + err
    code, text, err = run(
        "bench", folder, "--prompt", 24, "--tokens", 4, "--repetitions", 1, "--threads", 1, "--json"
    )
    assert code == 0, text + err
    (result,) = json.loads(text)["results"]
    assert not result.get("error") and result["decode_tokens_per_s"]


def test_a_width_that_the_graph_leaves_open_is_in_genai_config(tmp_path: Path, reference: Runtime) -> None:
    """As onnxruntime-genai 0.18 builds them: `kv_cache_dim`."""
    import onnx as package

    execute(onnx.plan(lconvert.read(DEMO), onnx.Options("genai")), tmp_path / "m")
    path = tmp_path / "m" / "model.onnx"
    proto = package.load(str(path), load_external_data=False)
    for port in proto.graph.input:
        if port.name.startswith("past_key_values."):
            port.type.tensor_type.shape.dim[3].dim_param = "kv_cache_dim"
    path.write_bytes(proto.SerializeToString())
    assert np.abs(opened(path.parent).logits(IDS) - reference.logits(IDS)).max() < 1e-4
    for broken in (b"{}", b'{"model": {"decoder": {"head_size": "64"}}}', b'{"model": [1]}'):
        (path.parent / "genai_config.json").write_bytes(broken)
        with pytest.raises(InputError, match=r"fixed heads and width, there or in genai_config.json"):
            opened(path.parent).logits(IDS)
