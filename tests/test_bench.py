"""`lconvert bench`: definitions against numbers worked out by hand, turns and ratios, real artifacts, and what fails."""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
import types
import venv
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

import lconvert
from lconvert.cli import bench as verb
from lconvert.cli import compress
from lconvert.errors import InputError, LconvertError, MissingPackageError, OptionError, RuntimeFailure
from lconvert.formats import gguf
from lconvert.ir import QTensor
from lconvert.validators import bench as module
from lconvert.validators import documents, machine
from lconvert.validators.bench import Entry, bench, prompt
from lconvert.validators.latency import Request, Slo, goodput, percentiles, spread, timings
from lconvert.validators.runtimes import Generation, remote
from lconvert.validators.stored import stored
from tests.conftest import DEMO

pytest.importorskip("llama_cpp", reason="llama_cpp is not installed")


# --- definitions


def test_definitions_on_a_request_worked_out_by_hand() -> None:
    r = Request((0.5, 0.6, 0.8, 0.9), 4)
    assert (r.ttft, r.latency) == (0.5, 0.9)
    assert r.itl == pytest.approx(0.4 / 3)  # (0.9 - 0.5) / (4 - 1): three gaps, the first token is in none
    assert r.gaps == pytest.approx((0.1, 0.2, 0.1))


def test_a_chunk_of_several_tokens_counts_all_of_them() -> None:
    assert Request((0.5, 0.7), 5).itl == pytest.approx(0.2 / 4)
    assert Request((0.5, 0.7), 5, last=0.9).itl == pytest.approx(0.4 / 4)


def test_a_request_of_one_token_has_no_itl() -> None:
    r = Request((0.3,), 1)
    assert r.itl is None and r.latency == r.ttft == 0.3
    assert timings([r])["itl_s"] is None and timings([r])["tpot_s"] is None
    assert Slo(ttft=0.5, tpot=0.01).met(r)


def test_goodput_counts_requests_that_meet_every_limit() -> None:
    fast, late, slow = Request((0.1, 0.2), 2), Request((0.9, 1.0), 2), Request((0.1, 1.1), 2)
    slo = Slo(ttft=0.5, tpot=0.5)
    assert [slo.met(r) for r in (fast, late, slow)] == [True, False, False]
    assert goodput([fast, late, slow], 4.0, slo) == {
        "slo": {"ttft_s": 0.5, "tpot_s": 0.5},
        "requests_per_s": 0.25,
        "share": pytest.approx(1 / 3),
    }
    assert goodput([fast], 2.0, slo, sent=4)["share"] == 0.25, "failed requests are not good ones"
    assert Slo(ttft=0.5).met(slow) and Slo(tpot=0.5).met(late)


@pytest.mark.parametrize(
    "text", ["", "ttft", "ttft=fast", "itl=0.1", "ttft=0", "tpot=-1", "ttft=inf", "ttft=nan"]
)
def test_a_slo_that_says_nothing_is_refused(text: str) -> None:
    with pytest.raises(OptionError, match="SLO"):
        Slo.parse(text)
    assert Slo.parse(" ttft=0.5, tpot=0.05") == Slo(0.5, 0.05)


def test_spread_and_percentiles() -> None:
    s = spread([1.0, 9.0, 2.0, 3.0, 2.5])
    assert s is not None
    assert (s["median"], s["min"], s["max"], s["mad"]) == (2.5, 1.0, 9.0, 0.5)
    assert 1.0 <= s["ci"][0] <= 2.5 <= s["ci"][1] <= 9.0
    assert s["runs"] == [1.0, 9.0, 2.0, 3.0, 2.5]
    p = percentiles(list(range(101)))
    assert p == {"n": 101, "mean": 50.0, "p50": 50.0, "p90": 90.0, "p99": 99.0, "max": 100.0}
    assert spread([]) is None and percentiles([]) is None


def test_the_interval_of_the_median_covers_it() -> None:
    """Of 200 experiments with 15 repetitions each, about 95% of the intervals hold the true median."""
    rng = np.random.default_rng(1)
    held = 0
    for i in range(200):
        s = spread(rng.lognormal(0, 0.5, 15).tolist(), seed=i)
        assert s is not None
        held += s["ci"][0] <= 1.0 <= s["ci"][1]
    assert 0.88 * 200 <= held <= 0.99 * 200


# --- turns


class Recorder:
    """A stand-in for `remote.Remote` that records what it is asked; `slow` multiplies its times."""

    log: list[tuple[str, str, tuple[int, ...], int]]
    slow: Callable[[str, int], float]
    options_of: dict[str, dict[str, Any]]  # by runtime

    def __init__(self, name: str, path: str | Path, **options: Any) -> None:
        self.label, self.load_seconds, self.baseline_memory = Path(path).stem, 0.25, 100
        self.options_of[name] = options
        self.log.append((self.label, "open", (), 0))
        self.opened = sum(entry[:2] == (self.label, "open") for entry in self.log)

    def tokenize(self, text: str, *, special: bool) -> list[int]:
        return list(range(1000))

    def generate(self, ids: list[int], n: int) -> Generation:
        self.log.append((self.label, "generate", tuple(ids), n))
        factor = self.slow(self.label, self.opened)
        return Generation(tuple(range(n)), tuple(factor * (0.1 + 0.01 * i) for i in range(n)))

    def info(self) -> dict[str, str]:
        return {"runtime": "recorder"}

    def peak_memory(self) -> int | None:
        return 1000 + self.opened

    def close(self) -> None:
        self.log.append((self.label, "close", (), 0))


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> type[Recorder]:
    class Fresh(Recorder):
        log = []  # noqa: RUF012 - one per test
        options_of = {}  # noqa: RUF012
        slow = staticmethod(lambda label, turn: 1.0)

    monkeypatch.setattr(remote, "Remote", Fresh)
    return Fresh


def _entries(artifacts: Path, *names: str) -> list[Entry]:
    return [Entry(artifacts / f"{n}.gguf") for n in names]


def test_artifacts_take_turns_in_an_order_that_rotates(artifacts: Path, recorder: type[Recorder]) -> None:
    found = bench(
        _entries(artifacts, "F32", "Q8_0", "Q4_K_M"), repetitions=3, prompt_tokens=8, output_tokens=4
    )
    opened = [label for label, what, *_ in recorder.log if what == "open"]
    assert opened == ["F32", "Q8_0", "Q4_K_M", "Q8_0", "Q4_K_M", "F32", "Q4_K_M", "F32", "Q8_0"]
    inside = 0
    for _, what, *_ in recorder.log:
        inside += {"open": 1, "close": -1}.get(what, 0)
        assert inside in (0, 1), "two models are open at the same time"
    assert all(len(r["load_s"]["runs"]) == 3 for r in found["results"])


def test_prompts_are_new_for_every_request_and_the_same_for_every_artifact(
    artifacts: Path, recorder: type[Recorder]
) -> None:
    bench(_entries(artifacts, "F32", "Q8_0"), repetitions=3, warmup=2, prompt_tokens=50, output_tokens=4)
    asked = {
        name: [(ids, n) for label, what, ids, n in recorder.log if (label, what) == (name, "generate")]
        for name in ("F32", "Q8_0")
    }
    assert asked["F32"] == asked["Q8_0"]
    prompts = [ids for ids, _ in asked["F32"]]
    assert len(prompts) == len(set(prompts)) == 3 * 4
    assert len({p[0] for p in prompts}) == len(prompts), "a shared beginning is what prefix caches reuse"
    assert all(len(p) == 50 for p in prompts)
    assert [n for _, n in asked["F32"]] == [4, 4, 1, 4] * 3, (
        "warm-up, prefill alone, then the measured request"
    )


def test_prompts_longer_than_the_text_go_round() -> None:
    assert prompt([1, 2, 3], 0.34, 7) == [2, 3, 1, 2, 3, 1, 2]


def test_figures_are_those_of_the_definitions(artifacts: Path, recorder: type[Recorder]) -> None:
    found = bench(
        _entries(artifacts, "F32"),
        repetitions=2,
        prompt_tokens=50,
        output_tokens=5,
        slo=Slo(ttft=0.2, tpot=0.02),
    )
    (r,) = found["results"]
    assert r["prefill_tokens_per_s"]["median"] == pytest.approx(50 / 0.1)
    assert r["decode_tokens_per_s"]["median"] == pytest.approx(1 / 0.01)
    assert r["output_tokens_per_s"]["median"] == pytest.approx(5 / 0.14)
    assert r["ttft_s"]["median"] == r["ttft_s"]["p99"] == pytest.approx(0.1)
    assert r["itl_s"]["mean"] == r["tpot_s"]["median"] == pytest.approx(0.01)
    assert r["itl_s"]["n"] == 2 * 4
    assert r["latency_s"]["p50"] == pytest.approx(0.14)
    assert r["load_s"]["median"] == 0.25
    assert (r["peak_memory_bytes"], r["baseline_memory_bytes"]) == (1002, 100)
    assert r["goodput"]["requests_per_s"] == pytest.approx(1 / 0.14) and r["goodput"]["share"] == 1.0
    assert r["gpu"] is None and r["error"] is None and r["exit_code"] == 0


def test_ratios_within_a_repetition_survive_a_noisy_machine(
    artifacts: Path, recorder: type[Recorder]
) -> None:
    """Every repetition is slower than the last by another factor; one artifact always takes twice the time."""
    noise = {1: 1.0, 2: 7.0, 3: 2.5, 4: 0.3}
    recorder.slow = staticmethod(lambda label, turn: noise[turn] * (2.0 if label == "Q8_0" else 1.0))
    found = bench(_entries(artifacts, "F32", "Q8_0"), repetitions=4, prompt_tokens=8, output_tokens=4)
    base, other = found["results"]
    decode = base["decode_tokens_per_s"]
    assert decode["max"] / decode["min"] > 20
    assert base["ratio"]["decode_tokens_per_s"]["runs"] == [1.0] * 4
    assert other["ratio"]["to"] == "F32"
    for name, ratio in (
        ("decode_tokens_per_s", 0.5),
        ("prefill_tokens_per_s", 0.5),
        ("ttft_s", 2.0),
        ("latency_s", 2.0),
    ):
        assert other["ratio"][name]["runs"] == pytest.approx([ratio] * 4)
        assert other["ratio"][name]["mad"] == pytest.approx(0, abs=1e-12)


def test_the_baseline_can_be_another_one(artifacts: Path, recorder: type[Recorder]) -> None:
    recorder.slow = staticmethod(lambda label, turn: 2.0 if label == "Q8_0" else 1.0)
    found = bench(
        _entries(artifacts, "F32", "Q8_0"), repetitions=1, prompt_tokens=8, output_tokens=4, baseline="Q8_0"
    )
    assert found["settings"]["baseline"] == "Q8_0"
    assert found["results"][0]["ratio"]["decode_tokens_per_s"]["median"] == pytest.approx(2.0)
    with pytest.raises(OptionError, match="no artifact has the label 'Q4'; labels: F32, Q8_0"):
        bench(_entries(artifacts, "F32", "Q8_0"), baseline="Q4")


def test_an_artifact_that_fails_leaves_the_others_their_figures(
    artifacts: Path, recorder: type[Recorder]
) -> None:
    def slow(label: str, turn: int) -> float:
        if label == "Q8_0" and turn == 2:
            raise RuntimeFailure("gone")
        return 1.0

    recorder.slow = staticmethod(slow)
    found = bench(_entries(artifacts, "Q8_0", "F32"), repetitions=3, prompt_tokens=8, output_tokens=4)
    bad, good = found["results"]
    assert (bad["error"], bad["exit_code"]) == ("gone", 1)
    assert len(bad["load_s"]["runs"]) == 1 and len(good["load_s"]["runs"]) == 3
    assert len(good["ratio"]["latency_s"]["runs"]) == 1, "only the repetition that both have"
    assert recorder.log[-1][1] == "close" and sum(e[:2] == ("Q8_0", "open") for e in recorder.log) == 2


@pytest.mark.parametrize(
    ("seconds", "message"),
    [
        ((0.1, 0.2), "made 2 tokens where 4 were asked for"),
        ((0.1, 0.3, 0.2, 0.4), "times that do not increase"),
    ],
)
def test_a_runtime_that_breaks_its_promise_is_an_error(
    artifacts: Path,
    recorder: type[Recorder],
    monkeypatch: pytest.MonkeyPatch,
    seconds: tuple[float, ...],
    message: str,
) -> None:
    def generate(self: Recorder, ids: list[int], n: int) -> Generation:
        return Generation((), (0.1,) if n == 1 else seconds)

    monkeypatch.setattr(recorder, "generate", generate)
    (r,) = bench(_entries(artifacts, "F32"), prompt_tokens=8, output_tokens=4)["results"]
    assert message in r["error"]


# --- arguments


def test_labels_tell_entries_apart(artifacts: Path, recorder: type[Recorder]) -> None:
    entries = [
        Entry(DEMO),
        Entry(DEMO, "dequantized"),
        Entry(DEMO),
        Entry(artifacts / "F32.gguf", label="mine"),
    ]
    found = bench(entries, repetitions=1, prompt_tokens=8, output_tokens=4)
    labels = [r["label"] for r in found["results"]]
    assert labels == [
        "demo_model transformers",
        "demo_model dequantized",
        "demo_model transformers #2",
        "mine",
    ]


@pytest.mark.parametrize(
    ("entry", "error", "message"),
    [
        (Entry("nowhere.gguf"), InputError, "no such file or folder"),
        (Entry(DEMO, "openvino"), OptionError, "unknown runtime openvino; runtimes: llama.cpp"),
        (
            Entry(DEMO, "llama.cpp"),
            OptionError,
            "llama.cpp does not load hf artifacts; these do: transformers",
        ),
    ],
)
def test_wrong_arguments_are_refused_before_anything_runs(
    entry: Entry, error: type[LconvertError], message: str, recorder: type[Recorder]
) -> None:
    with pytest.raises(error, match=message):
        bench([Entry(DEMO), entry])
    assert not recorder.log


def test_impossible_settings_are_refused() -> None:
    with pytest.raises(OptionError, match="nothing to measure"):
        bench([])
    for wrong in ({"output_tokens": 1}, {"prompt_tokens": 0}, {"repetitions": 0}, {"warmup": -1}):
        with pytest.raises(OptionError, match="at least"):
            bench([Entry(DEMO)], **wrong)


# --- real artifacts in real runtimes


@pytest.fixture(scope="module")
def measured(artifacts: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Two GGUF files, the folder in transformers, and a damaged file, in one run."""
    pytest.importorskip("transformers", reason="transformers is not installed")
    damaged = tmp_path_factory.mktemp("damaged") / "damaged.gguf"
    damaged.write_bytes((artifacts / "F32.gguf").read_bytes()[:-100_000])
    return bench(
        [*_entries(artifacts, "F32", "Q8_0"), Entry(damaged), Entry(DEMO)],
        prompt_tokens=64,
        output_tokens=8,
        repetitions=2,
        threads=1,
        purpose="parity",
        slo=Slo(ttft=60, tpot=60),
    )


def test_real_artifacts_have_every_figure(measured: dict[str, Any]) -> None:
    json.dumps(measured)
    assert list(documents.problems(measured, documents.schema("lconvert.bench"))) == []
    full, q8, _, folder = measured["results"]
    for r in (full, q8, folder):
        assert r["error"] is None
        assert 0 < r["itl_s"]["p50"] <= r["itl_s"]["p99"] <= r["itl_s"]["max"]
        assert r["ttft_s"]["median"] < r["latency_s"]["p50"]
        assert r["itl_s"]["n"] == 2 * 7
        assert r["goodput"]["share"] == 1.0
        assert len(r["decode_tokens_per_s"]["runs"]) == 2
        assert r["ratio"]["to"] == "F32"
    assert full["info"]["runtime"] == "llama.cpp" and folder["info"]["runtime"] == "transformers"
    assert measured["machine"]["cores"] >= 1 and measured["machine"]["cpu"]


def test_a_damaged_artifact_is_an_error_of_its_own(measured: dict[str, Any]) -> None:
    damaged = measured["results"][2]
    assert "llama.cpp cannot load it" in damaged["error"] and damaged["exit_code"] == 2
    assert damaged["decode_tokens_per_s"] is None and damaged["ratio"] is None
    assert damaged["bytes"] == Path(damaged["artifact"]).stat().st_size


@pytest.mark.skipif(sys.platform != "linux", reason="resident sizes are read from /proc")
def test_memory_is_the_model_on_top_of_the_packages(measured: dict[str, Any]) -> None:
    """llama.cpp maps the file: what a forward pass reads of it is resident."""
    for r in measured["results"][:2]:
        model = r["peak_memory_bytes"] - r["baseline_memory_bytes"]
        assert 0.9 * r["bytes"] < model < r["bytes"] + 64e6, (r["label"], model)
    folder = measured["results"][3]
    assert folder["peak_memory_bytes"] > folder["baseline_memory_bytes"] > 100e6, "torch alone is larger"


def test_sizes_and_bits_per_weight(artifacts: Path, tmp_path: Path) -> None:
    for name in ("F32", "Q8_0", "Q4_K_M"):
        path = artifacts / f"{name}.gguf"
        size, bits = stored(path)
        wide = [t for t in gguf.read(path).tensors.values() if len(t.shape) > 1]
        assert size == path.stat().st_size
        assert bits == 8 * sum(t.nbytes for t in wide) / sum(int(np.prod(t.shape)) for t in wide)
        assert {"F32": 32, "Q8_0": 8.5, "Q4_K_M": pytest.approx(5.1, abs=0.2)}[name] == bits
    assert stored(DEMO) == ((DEMO / "model.safetensors").stat().st_size, 16.0)
    graph = tmp_path / "model.onnx"
    graph.write_bytes(b"1234")
    (tmp_path / "model.onnx.data").write_bytes(b"56789")
    (tmp_path / "model.onnx_other").write_bytes(b"x")
    assert stored(graph) == (9, None)
    unknown = tmp_path / "unknown"
    shutil.copytree(DEMO, unknown)
    config = json.loads((DEMO / "config.json").read_text())
    (unknown / "config.json").write_text(
        json.dumps(config | {"model_type": "new", "architectures": ["NewLM"]})
    )
    assert stored(unknown) == (stored(DEMO)[0], None)


def test_bits_of_a_compressed_model_count_its_scales(tmp_path: Path) -> None:
    """int4 in groups of 128 with fp16 scales, and an embedding that stays: counted from the file's own header."""
    out = tmp_path / "m.lcir"
    done = CliRunner().invoke(
        compress.command, [str(DEMO), "-o", str(out), "--recipe", "int4-g128"], standalone_mode=False
    )
    assert done.exception is None
    size, bits = stored(out)
    assert size == (out / "tensors.safetensors").stat().st_size
    wide = [e.data for e in lconvert.read(out).entries.values() if len(e.shape) > 1]
    kinds = [(t.size, 4 + 16 / 128 if isinstance(t, QTensor) else 16) for t in wide]
    assert {b for _, b in kinds} == {4.125, 16}
    assert bits == pytest.approx(sum(n * b for n, b in kinds) / sum(n for n, _ in kinds))


def test_an_interpreter_without_the_runtime_is_named(artifacts: Path, tmp_path: Path) -> None:
    venv.create(tmp_path / "bare", with_pip=False)
    bare = tmp_path / "bare" / "bin" / "python"
    found = bench(
        [Entry(artifacts / "F32.gguf", python=str(bare)), Entry(artifacts / "F32.gguf", label="here")],
        prompt_tokens=8,
        output_tokens=4,
        repetitions=1,
        purpose="parity",
    )
    missing, here = found["results"]
    assert "is not installed" in missing["error"] and str(bare) in missing["error"]
    assert missing["exit_code"] == MissingPackageError.exit_code == 3
    assert here["error"] is None


# --- the machine


def _stand_in(watts: float, used: int, fails: bool = False) -> types.ModuleType:
    """A module with the functions of NVML that are used: two boards, `watts` each."""
    nvml = types.ModuleType("pynvml")

    class NVMLError(Exception):
        pass

    def power(handle: int) -> int:
        if fails:
            raise NVMLError("not supported")
        return int(1000 * watts)

    for name, function in {
        "NVMLError": NVMLError,
        "nvmlInit": lambda: None,
        "nvmlDeviceGetCount": lambda: 2,
        "nvmlDeviceGetHandleByIndex": lambda i: i,
        "nvmlDeviceGetName": lambda handle: b"Board",
        "nvmlDeviceGetMemoryInfo": lambda handle: types.SimpleNamespace(total=10 * used, used=used),
        "nvmlDeviceGetPowerUsage": power,
        "nvmlSystemGetDriverVersion": lambda: "1.2",
    }.items():
        setattr(nvml, name, function)
    return nvml


def test_gpu_power_becomes_energy(monkeypatch: pytest.MonkeyPatch) -> None:
    """Against a stand-in for NVML: 2 x 100 W over a known time."""
    monkeypatch.setitem(sys.modules, "pynvml", _stand_in(100.0, 1 << 20))
    start = time.perf_counter()
    with machine.GpuMeter(period=0.01) as meter:
        time.sleep(0.2)
    took = time.perf_counter() - start
    assert meter.energy_j == pytest.approx(200 * took, rel=0.2)
    assert meter.memory_bytes == 2 << 20
    assert machine.describe()["gpu"] == {"names": ["Board"] * 2, "memory": [10 << 20] * 2, "driver": "1.2"}


def test_a_gpu_without_a_power_sensor_has_no_energy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", _stand_in(100.0, 1, fails=True))
    with machine.GpuMeter() as meter:
        pass
    assert meter.energy_j is None and meter.memory_bytes is None


def test_without_nvml_there_are_no_gpu_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)
    with machine.GpuMeter() as meter:
        pass
    assert meter.energy_j is None and machine.describe()["gpu"] is None


def test_energy_is_in_the_result(
    artifacts: Path, recorder: type[Recorder], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", _stand_in(50.0, 7))
    (r,) = bench(_entries(artifacts, "F32"), repetitions=2, prompt_tokens=8, output_tokens=4)["results"]
    assert r["gpu"]["memory_bytes"] == 14
    energy, per_token = r["gpu"]["energy_j"]["median"], r["gpu"]["joules_per_token"]["median"]
    assert energy > 0 and per_token == pytest.approx(energy / 4)


def test_the_machine_is_described() -> None:
    found = machine.describe()
    assert found["cpu"] and found["cores"] >= 1
    if sys.platform == "linux":
        assert 1 << 28 < found["memory_available"] <= found["memory"]
        assert found["cores"] == len(os.sched_getaffinity(0))


# --- the command


def _run(*args: str) -> tuple[int, str]:
    """Exit code and output of `lconvert bench`; lconvert's errors are raised."""
    result = CliRunner().invoke(verb.command, list(args), standalone_mode=False)
    if result.exception:
        raise result.exception
    return int(result.return_value or 0), result.output


def test_the_table_has_a_row_for_each(artifacts: Path, recorder: type[Recorder], tmp_path: Path) -> None:
    recorder.slow = staticmethod(lambda label, turn: 2.0 if label == "Q8_0" else 1.0)
    args = (
        str(artifacts / "F32.gguf"),
        f"{artifacts / 'Q8_0.gguf'}@llama.cpp",
        "--prompt",
        "8",
        "--tokens",
        "4",
    )
    code, out = _run(*args, "--slo", "ttft=1,tpot=0.015", "--report", str(tmp_path / "r.json"))
    assert code == 0
    lines = [line.split() for line in out.splitlines()]
    sizes = [line for line in lines if line and line[0] == "Q8_0"]
    assert sizes[0][1:6] == ["llama.cpp", "2.5", "MB", "8.50", "1.0"]
    assert "0.50" in sizes[1] and "(50-50)" in sizes[1]
    assert "F32: goodput 7.69 requests/s, 100% of them meet the SLO" in out
    assert "Q8_0: goodput 0 requests/s, 0% of them meet the SLO" in out
    assert json.loads((tmp_path / "r.json").read_text())["schema"] == module.SCHEMA
    code, out = _run(*args, "--json")
    assert [r["label"] for r in json.loads(out)["results"]] == ["F32", "Q8_0"]


def test_plots_are_written(artifacts: Path, recorder: type[Recorder], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    _run(str(artifacts / "F32.gguf"), "--prompt", "8", "--tokens", "4", "--plots", str(tmp_path))
    assert {p.name for p in tmp_path.iterdir()} == {"prefill.svg", "decode.svg"}
    assert "<svg" in (tmp_path / "decode.svg").read_text()


def test_exit_codes(artifacts: Path, recorder: type[Recorder], monkeypatch: pytest.MonkeyPatch) -> None:
    errors: dict[str, LconvertError] = {}

    def slow(label: str, turn: int) -> float:
        if label in errors:
            raise errors[label]
        return 1.0

    recorder.slow = staticmethod(slow)
    both = (str(artifacts / "F32.gguf"), str(artifacts / "Q8_0.gguf"), "--prompt", "8", "--tokens", "4")
    errors["F32"] = MissingPackageError("not here")
    code, out = _run(*both)
    assert code == 1 and "F32 in llama.cpp: failed: not here" in out
    assert _run(both[0], *both[2:])[0] == 3
    errors["Q8_0"] = MissingPackageError("not here either")
    assert _run(*both)[0] == 3


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ((), "name an ARTIFACT or a --server"),
        ((str(DEMO), "--server", "http://localhost:1"), "leave out ARTIFACT"),
        ((str(DEMO), "--slo", "fast"), "SLO 'fast'"),
        ((f"{DEMO}@openvino",), "unknown runtime openvino"),
        ((str(DEMO), "--plots", "/nowhere"), "is not a folder"),
        ((str(DEMO), "--python", "vlm=python"), "unknown runtime vlm"),
        ((str(DEMO), "--serve", "llama.cpp", "--concurrency", "few"), "whole numbers"),
        ((str(DEMO), "--serve", "llama.cpp", "--header", "x"), "Name: value"),
        ((str(DEMO), "--serve", "triton"), "unknown server triton; servers: llama.cpp, vllm"),
        ((str(DEMO), "--serve", "llama.cpp"), "llama.cpp serves gguf artifacts, this is hf"),
    ],
)
def test_wrong_options_say_what_to_give(args: tuple[str, ...], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        _run(*args)


def test_interpreters_go_by_runtime(
    artifacts: Path, recorder: type[Recorder], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "lconvert.toml").write_text(
        '[runtimes.vllm]\npython = "/configured/python"\ntimeout = 7\noptions = { dtype = "float32" }\n'
    )
    monkeypatch.chdir(tmp_path)
    args = (
        str(artifacts / "F32.gguf"),
        str(DEMO),
        f"{DEMO}@vllm",
        "--prompt",
        "8",
        "--tokens",
        "4",
        "--json",
    )

    def used(*more: str) -> list[str | None]:
        return [r["python"] for r in json.loads(_run(*args, "--repetitions", "1", *more)[1])["results"]]

    assert used() == [None, None, "/configured/python"]
    assert used("--python", "vllm=/a/python") == [None, None, "/a/python"]
    assert used("--python", "/b/python", "--python", "vllm=/a/python") == [
        "/b/python",
        "/b/python",
        "/a/python",
    ]
    assert recorder.options_of["vllm"]["timeout"] == 7 and recorder.options_of["vllm"]["options"] == {
        "dtype": "float32"
    }


def test_a_path_with_an_at_sign_is_a_path(tmp_path: Path, recorder: type[Recorder], artifacts: Path) -> None:
    path = tmp_path / "me@home.gguf"
    shutil.copyfile(artifacts / "F32.gguf", path)
    _, out = _run(str(path), "--prompt", "8", "--tokens", "4", "--json")
    (r,) = json.loads(out)["results"]
    assert (r["label"], r["artifact"], r["runtime"]) == ("me@home", str(path), "llama.cpp")
