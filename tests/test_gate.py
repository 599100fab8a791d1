"""The release gate as a whole: every kind of artifact, bad input, lost runtimes, caches, baselines, the stock encoder."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import yaml

import lconvert
from lconvert.errors import InputError, OptionError
from lconvert.formats import gguf
from lconvert.ir import Tensor
from lconvert.validators import gates, stock
from lconvert.validators.logit_cache import CachedLogits, model_hash
from lconvert.validators.logits import compare, log_softmax, paired, wilson
from lconvert.validators.report import Report
from lconvert.validators.runtimes.remote import workers
from lconvert.validators.stored import files, gguf_file_type, size
from tests.conftest import DEMO

for name in ("torch", "transformers", "llama_cpp", "gguf"):
    pytest.importorskip(name, reason=f"{name} is not installed")


def failed(report: Report) -> set[tuple[str, str]]:
    return {(c.tier, c.name) for c in report.checks if c.passed is False}


# --- kinds of artifacts and runtimes ---------------------------------------------------------------------


def test_a_hugging_face_folder_is_an_artifact(tmp_path: Path) -> None:
    report = lconvert.validate(
        DEMO, DEMO, max_windows=1, tiers=["structure", "tensors", "tokens", "logits", "layers"]
    )
    assert report.passed and report.stats()["kld"]["max"] == 0
    assert report.details["layers"]["first_broken"] is None
    # One weight of one layer is not the source's: named by tensor and by layer.
    import safetensors.numpy
    import torch
    from safetensors.torch import load_file, save_file

    assert safetensors.numpy is not None
    shutil.copytree(DEMO, tmp_path / "m", copy_function=shutil.copy)
    path = tmp_path / "m" / "model.safetensors"
    tensors = load_file(path)
    tensors["model.layers.1.mlp.up_proj.weight"][3] *= torch.tensor(1.25).to(torch.bfloat16)
    save_file(tensors, path, {"format": "pt"})
    report = lconvert.validate(
        DEMO, tmp_path / "m", max_windows=1, tiers=["structure", "tensors", "tokens", "logits", "layers"]
    )
    assert {tier for tier, _ in failed(report)} == {"tensors", "logits", "layers"}
    assert "not equal to the source: layers.1.mlp.up" in report.notes
    assert report.details["layers"]["first_broken"] == 1
    assert any("look at" in n and "layers.1.mlp.up" in n for n in report.notes)


def test_an_lcir_folder_is_an_artifact(tmp_path: Path) -> None:
    command = [sys.executable, "-P", "-m", "lconvert", "compress", str(DEMO), "--recipe", "int4-g128"]
    subprocess.run([*command, "-o", str(tmp_path / "m.lcir")], check=True, capture_output=True)
    report = lconvert.validate(DEMO, tmp_path / "m.lcir", max_windows=1)
    assert report.passed, failed(report)
    assert 1e-4 < report.stats()["kld"]["mean"] < 0.5
    assert report.details["runtimes"][1]["runtime"].startswith("dequantized")


def test_two_runtimes_in_one_report(artifacts: Path) -> None:
    report = lconvert.validate(
        DEMO, artifacts / "Q8_0.gguf", max_windows=1, runtimes=["llama.cpp", "dequantized"], relative=False
    )
    assert report.passed
    # Without llama.cpp's 8-bit activations, the file's own numbers are nearer to the original.
    assert (
        report.stats("cost", "dequantized")["kld"]["mean"] < report.stats("cost", "llama.cpp")["kld"]["mean"]
    )
    with pytest.raises(KeyError, match="stock was not measured"):
        report.stats("stock")


def test_an_onnx_file_is_an_artifact(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    from tests.onnx_decoder import llama

    report = lconvert.validate(DEMO, llama(DEMO, tmp_path / "m.onnx"), max_windows=2)
    assert report.passed and report.stats()["kld"]["mean"] <= 1e-11
    levels = {r["role"]: r.get("accuracy_level") for r in report.details["runtimes"]}
    assert levels == {"reference": None, "candidate": "1", "served": "4"}
    assert report.stats("served")["tokens"] == 1024
    assert "tokens: the ONNX file has no tokenizer beside it that belongs to it" in report.not_proven
    # A graph that was made with another rotary base.
    shutil.copytree(DEMO, tmp_path / "other", copy_function=shutil.copy)
    config = json.loads((DEMO / "config.json").read_text())
    config["rope_parameters"]["rope_theta"] = 500.0
    (tmp_path / "other" / "config.json").write_text(json.dumps(config))
    wrong = llama(tmp_path / "other", tmp_path / "wrong.onnx")
    report = lconvert.validate(DEMO, wrong, max_windows=1)
    assert ("logits", "cost: KL divergence") in failed(report)
    (tmp_path / "no.onnx").write_bytes(b"no graph")
    with pytest.raises(InputError, match="is not an ONNX file"):
        lconvert.validate(DEMO, tmp_path / "no.onnx", max_windows=1)


# --- bad input -------------------------------------------------------------------------------------------


def test_texts_that_prove_nothing(artifacts: Path, tmp_path: Path) -> None:
    path = artifacts / "F32.gguf"
    with pytest.raises(InputError, match=r"none\.txt: cannot be read as UTF-8 text \(No such file"):
        lconvert.validate(DEMO, path, text=tmp_path / "none.txt")
    (tmp_path / "empty.txt").write_text(" \n")
    with pytest.raises(InputError, match=r"empty\.txt: is empty; an evaluation text needs some paragraphs"):
        lconvert.validate(DEMO, path, text=tmp_path / "empty.txt")
    (tmp_path / "word.txt").write_text("Hello.")
    with pytest.raises(InputError, match=r"^. tokens to compare prove nothing; give a longer text"):
        lconvert.validate(DEMO, path, text=tmp_path / "word.txt")
    (tmp_path / "short.txt").write_text("It was the best of times, it was the worst of times. " * 4)
    report = lconvert.validate(DEMO, path, text=tmp_path / "short.txt")
    assert report.passed
    assert any("the text is shorter than one window" in n for n in report.notes)


def test_an_artifact_of_another_model(artifacts: Path, tmp_path: Path) -> None:
    model = lconvert.read(DEMO)
    entries = dict(model.entries)
    embed = entries["embed"].data
    assert isinstance(embed, Tensor)
    from dataclasses import replace

    small = replace(embed, shape=(embed.shape[0] - 8, embed.shape[1]))
    entries["embed"] = replace(entries["embed"], data=small)  # the demo model's head is the embedding
    other = replace(
        model, entries=entries, arch=replace(model.arch, vocab=small.shape[0]), tokenizer=None, config={}
    )
    lconvert.convert(other, tmp_path / "other.gguf", ftype="F32")
    with pytest.raises(InputError, match=r"is not made from .*: embed is 2040x\d+ here and 2048x\d+ there"):
        lconvert.validate(DEMO, tmp_path / "other.gguf")


def test_a_cut_file_is_named(artifacts: Path, tmp_path: Path) -> None:
    data = (artifacts / "Q8_0.gguf").read_bytes()
    (tmp_path / "cut.gguf").write_bytes(data[: len(data) * 2 // 3])
    with pytest.raises(InputError, match=r"cut\.gguf"):
        lconvert.validate(DEMO, tmp_path / "cut.gguf")


def test_numbers_that_are_none_fail_the_tensors_tier(artifacts: Path, tmp_path: Path) -> None:
    path = tmp_path / "nan.gguf"
    shutil.copy(artifacts / "F32.gguf", path)
    info = gguf.read(path).tensors["blk.1.ffn_norm.weight"]
    with open(path, "r+b") as f:
        f.seek(info.offset)
        f.write(np.array([np.nan], "<f4").tobytes())
    report = lconvert.validate(DEMO, path, max_windows=1)
    assert ("tensors", "NaN or infinite values") in failed(report) and report.exit_code == 1
    assert "logits: tensors hold NaN or infinite values" in report.not_proven


# --- runtimes that are lost ------------------------------------------------------------------------------


def _kill_workers() -> None:
    """SIGKILL to every process below this one that runs a model."""
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit() or int(entry.name) == os.getpid():
            continue
        try:
            command = (entry / "cmdline").read_bytes()
            parents = {int(entry.name)}
            at = int((entry / "stat").read_text().rsplit(")", 1)[1].split()[1])
            while at > 1:
                parents.add(at)
                at = int(Path(f"/proc/{at}/stat").read_text().rsplit(")", 1)[1].split()[1])
        except (OSError, IndexError):
            continue
        if b"worker.py" in command and os.getpid() in parents:
            os.kill(int(entry.name), signal.SIGKILL)


@pytest.mark.skipif(
    not Path("/proc/self/stat").exists(), reason="no /proc on this system: shared idea of processes missing"
)
def test_a_runtime_that_dies_in_the_middle_is_a_failed_check(artifacts: Path) -> None:
    def progress(step: str) -> None:
        if step.startswith("window 1 of"):
            _kill_workers()

    with workers():
        report = lconvert.validate(
            DEMO,
            artifacts / "F32.gguf",
            tiers=["structure", "logits"],
            max_windows=3,
            python={"llama.cpp": Path(sys.executable)},
            progress=progress,
        )
    [check] = [c for c in report.checks if c.passed is False]
    assert check.tier == "logits" and check.name == "logits in llama.cpp"
    assert "during logits the process died" in check.value
    assert report.exit_code == 1


def test_an_interpreter_without_the_runtime(artifacts: Path, tmp_path: Path) -> None:
    import venv

    venv.create(tmp_path / "bare", with_pip=False)
    bare = {"llama.cpp": tmp_path / "bare" / "bin" / "python"}
    report = lconvert.validate(DEMO, artifacts / "F32.gguf", tiers=["structure", "logits"], python=bare)
    assert report.passed and len(report.not_proven) == 1 and str(bare["llama.cpp"]) in report.not_proven[0]
    report = lconvert.validate(
        DEMO, artifacts / "F32.gguf", tiers=["structure", "logits"], python=bare, require=["llama.cpp"]
    )
    assert report.exit_code == 3


# --- reference logits on disk ----------------------------------------------------------------------------


def test_cached_logits_are_exact_and_damage_is_noticed(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    logits = rng.standard_normal((5, 33)).astype(np.float32)
    calls = []

    def compute(ids: list[int]) -> np.ndarray:
        calls.append(ids)
        return logits

    def cached(**key: object) -> CachedLogits:
        return CachedLogits(tmp_path, {"model": "a", **key}, lambda: compute)

    assert np.array_equal(cached()([1, 2, 3]), logits) and len(calls) == 1
    again = cached()
    assert np.array_equal(again([1, 2, 3]), logits) and len(calls) == 1 and again.hits == 1
    cached(settings="other")([1, 2, 3])
    assert len(calls) == 2, "other settings are another key"
    for file in tmp_path.rglob("*.safetensors"):
        data = bytearray(file.read_bytes())
        data[-1] ^= 1
        file.write_bytes(data)
    damaged = cached()
    assert np.array_equal(damaged([1, 2, 3]), logits) and len(calls) == 3
    assert "were damaged (its checksum is wrong) and computed again" in damaged.notes[0]
    for file in tmp_path.rglob("*.safetensors"):
        file.write_bytes(b"")
    assert np.array_equal(cached()([1, 2, 3]), logits) and len(calls) == 4
    small = CachedLogits(tmp_path, {"model": "b"}, lambda: compute, limit=100)
    small([1])
    assert small.notes == ["reference logits beyond 0.0 GB were not cached"]
    off = CachedLogits(None, {}, lambda: compute)
    assert np.array_equal(off([1]), logits) and off.hits == 0


def test_the_second_validation_does_not_load_the_reference(
    artifacts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = lconvert.validate(DEMO, artifacts / "Q8_0.gguf", max_windows=1, tiers=["logits"], cache=tmp_path)
    from lconvert.validators.runtimes import hf

    def refuse(self: object, *args: object, **options: object) -> None:
        raise AssertionError("the reference was loaded")

    monkeypatch.setattr(hf.Transformers, "__init__", refuse)
    second = lconvert.validate(DEMO, artifacts / "Q8_0.gguf", max_windows=1, tiers=["logits"], cache=tmp_path)
    assert first.stats() == second.stats()
    assert second.details["runtimes"][0]["logits"] == "from the cache"
    assert second.details["runtimes"][0]["runtime"] == "transformers"


def test_a_cached_reference_of_another_format_is_called_what_it_was(artifacts: Path, tmp_path: Path) -> None:
    """A GGUF as reference: its weights are lconvert's reading, also when the logits come from the cache."""
    for cached in (False, True):
        report = lconvert.validate(
            artifacts / "F32.gguf", artifacts / "Q8_0.gguf", max_windows=1, tiers=["logits"], cache=tmp_path,
            relative=False, greedy=(0, 0),
        )  # fmt: skip
        info = report.details["runtimes"][0]
        assert (info["role"], info["runtime"], "logits" in info) == ("reference", "dequantized", cached)


def test_model_hash_changes_with_any_weight(tmp_path: Path) -> None:
    shutil.copytree(DEMO, tmp_path / "m", copy_function=shutil.copy)
    before = model_hash(tmp_path / "m")
    assert before == model_hash(DEMO)
    (tmp_path / "m" / "notes.md").write_text("not part of the model")
    assert model_hash(tmp_path / "m") == before
    path = tmp_path / "m" / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    assert model_hash(tmp_path / "m") != before


def test_the_files_of_an_artifact_are_those_with_weights(artifacts: Path, tmp_path: Path) -> None:
    """A card or a report that is written into the folder does not make a model larger."""
    folder = shutil.copytree(DEMO, tmp_path / "m", copy_function=shutil.copy)
    (folder / "notes.md").write_text("not part of the model")
    assert files(folder) == [folder / "model.safetensors"]
    report = lconvert.validate(DEMO, folder, tiers=["structure"])
    assert report.details["artifact"]["bytes"] == size(files(folder)) == size([DEMO / "model.safetensors"])
    for name in ("m.onnx", "m.onnx.data", "m.onnx_data", "m.onnx-old.data"):
        (tmp_path / name).write_bytes(b"x")
    assert [p.name for p in files(tmp_path / "m.onnx")] == ["m.onnx", "m.onnx.data", "m.onnx_data"]


# --- baselines -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def baseline(artifacts: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    path = tmp_path_factory.mktemp("baseline") / "old.json"
    report = lconvert.validate(DEMO, artifacts / "Q8_0.gguf", max_windows=2)
    path.write_text(json.dumps(report.to_json()))
    yield path


def test_an_unchanged_artifact_holds_its_baseline(artifacts: Path, baseline: Path) -> None:
    report = lconvert.validate(DEMO, artifacts / "Q8_0.gguf", max_windows=2, baseline=baseline)
    assert report.passed and sum(c.tier == "baseline" for c in report.checks) > 5


def test_regressions_fail(artifacts: Path, baseline: Path, tmp_path: Path) -> None:
    """Q4_K_M passes its own gates and is worse than the Q8_0 of the last release."""
    report = lconvert.validate(DEMO, artifacts / "Q4_K_M.gguf", max_windows=2, baseline=baseline)
    assert {t for t, _ in failed(report)} == {"baseline"}
    assert ("baseline", "cost (llama.cpp): mean KLD") in failed(report)
    # A check that is gone is a regression too.
    report = lconvert.validate(
        DEMO, artifacts / "Q8_0.gguf", max_windows=2, baseline=baseline, tiers=["structure", "logits"]
    )
    assert failed(report) == {("baseline", "checks that passed")}
    assert any(n.startswith("passed in the baseline, does not now: tensors") for n in report.notes)


def test_unusable_baselines(artifacts: Path, baseline: Path, tmp_path: Path) -> None:
    def run(path: Path) -> None:
        lconvert.validate(DEMO, artifacts / "Q8_0.gguf", max_windows=2, tiers=["structure"], baseline=path)

    with pytest.raises(InputError, match=r"none\.json: cannot be read"):
        run(tmp_path / "none.json")
    (tmp_path / "x.json").write_text("{")
    with pytest.raises(InputError, match=r"x\.json: is not JSON"):
        run(tmp_path / "x.json")
    (tmp_path / "x.json").write_text('{"schema": "lconvert.report/1"}')
    with pytest.raises(InputError, match=r"lconvert.report/1 is an old form .* run lconvert validate again"):
        run(tmp_path / "x.json")
    data = json.loads(baseline.read_text())
    (tmp_path / "x.json").write_text(json.dumps({k: v for k, v in data.items() if k != "details"}))
    with pytest.raises(InputError, match=r"is damaged: \$\.details is missing"):
        run(tmp_path / "x.json")
    data["details"]["settings"]["context"] = 64
    (tmp_path / "x.json").write_text(json.dumps(data))
    with pytest.raises(
        OptionError, match="the baseline was measured with another context: 64 there, 512 here"
    ):
        run(tmp_path / "x.json")


# --- the stock encoder -----------------------------------------------------------------------------------


def test_stock_files_are_llama_cpps_own(artifacts: Path, tmp_path: Path) -> None:
    made = stock.StockEncoder(lconvert.read(DEMO), tmp_path).make("Q4_K_M")
    ours = gguf.read(artifacts / "Q4_K_M.gguf")
    theirs = gguf.read(made.path)
    assert gguf_file_type(theirs) == "Q4_K_M"
    for name, info in theirs.tensors.items():
        assert info.type == ours.tensors[name].type
        assert np.array_equal(gguf.raw(theirs, name).load(), gguf.raw(ours, name).load()), name


def test_the_rival_is_of_the_same_size_or_smaller() -> None:
    model = lconvert.read(DEMO)
    bits = {t: stock._planned_bits(model, t) for t in stock.CURVE}
    assert stock.rival(model, "Q4_K_M", bits["Q4_K_M"]) == "Q4_K_M"
    assert stock.rival(model, None, bits["Q6_K"] + 0.3) == "Q6_K"
    assert stock.rival(model, "Q4_K_M", bits["Q5_K_M"] + 0.1) == "Q5_K_M", "its name says less than its size"
    assert stock.rival(model, "IQ2_M", bits["Q4_K_M"]) == "Q4_K_M", "which it needs an importance matrix for"
    assert stock.rival(model, None, 1.5) is None


def test_worse_than_the_stock_encoder_fails(artifacts: Path, tmp_path: Path) -> None:
    """A Q4_K_M that was made from Q4_0: within the absolute gates, and worse than it has to be."""
    from dataclasses import replace

    lconvert.convert(DEMO, tmp_path / "q4_0.gguf", ftype="Q4_0")
    twice = lconvert.read(tmp_path / "q4_0.gguf")
    lconvert.convert(twice, tmp_path / "twice.gguf", ftype="Q4_K_M", allow_requantize=True)
    Path(tmp_path / "twice.gguf.manifest.json").unlink()
    report = lconvert.validate(DEMO, tmp_path / "twice.gguf", max_windows=4, tiers=["logits"])
    assert failed(report) == {("logits", "no worse than the stock encoder")}
    assert replace is not None


def test_a_curve_of_stock_types(artifacts: Path) -> None:
    report = lconvert.validate(DEMO, artifacts / "Q8_0.gguf", max_windows=1, tiers=["logits"], curve=True)
    rows = report.details["curve"]
    assert [r["type"] for r in rows] == list(stock.CURVE)
    assert rows[0]["kld_mean"] == report.stats("stock")["kld"]["mean"] == report.stats()["kld"]["mean"]
    klds = {r["type"]: r["kld_mean"] for r in rows}
    assert klds["Q8_0"] < klds["Q6_K"] < klds["Q5_K_M"] < klds["Q4_K_M"] < klds["Q3_K_M"] < klds["Q2_K"]


# --- statistics and gates --------------------------------------------------------------------------------


def _models(rows: int, vocabulary: int, noise: float) -> tuple[np.ndarray, np.ndarray, list[int]]:
    rng = np.random.default_rng(7)
    p = rng.standard_normal((rows, vocabulary)).astype(np.float32) * 3
    q = p + noise * rng.standard_normal((rows, vocabulary)).astype(np.float32)
    return p, q, [int(i) for i in rng.integers(0, vocabulary, rows)]


def test_statistics_equal_a_direct_computation(monkeypatch: pytest.MonkeyPatch) -> None:
    from lconvert.validators import logits

    p, q, ids = _models(300, 70, 0.3)
    monkeypatch.setattr(logits, "_ELEMENTS", 70 * 37)  # slabs that do not divide the window
    stats = compare({"p": lambda x: p, "q": lambda x: q}, [("p", "q")], [ids])["p", "q"].data
    a, b = log_softmax(p), log_softmax(q)
    kld = (np.exp(a) * (a - b)).sum(1)
    assert np.isclose(stats["kld"]["p99"], np.quantile(kld, 0.99))
    assert np.isclose(stats["max_logprob_difference"], np.abs(a - b).max())
    targets, rows = np.array(ids[1:]), np.arange(299)
    right = [x[:-1].argmax(1) == targets for x in (a, b)]
    assert stats["flips"] == (right[0] != right[1]).mean() and stats["scored"] == 299
    dp = np.exp(b[rows, targets]) - np.exp(a[rows, targets])
    assert np.isclose(stats["p_correct"]["rms_delta"], np.sqrt((dp**2).mean()))
    ratio = (a[rows, targets] - b[rows, targets]).mean()
    assert np.isclose(stats["ppl"]["log_ratio"], ratio) and np.isclose(stats["ppl"]["ratio"], np.exp(ratio))
    worst = stats["worst"][0]
    assert worst["position"] == kld.argmax() and np.isclose(worst["kld"], kld.max())
    assert [int(t) for t, _ in worst["reference_top"]] == list(np.argsort(-a[kld.argmax()])[:3])
    assert sum(stats["histogram"]["counts"]) == 300
    means = [
        np.average(
            [r["kld_mean"] for r in stats["positions"]],
            weights=[r["end"] - r["start"] for r in stats["positions"]],
        )
    ]
    assert np.isclose(means[0], kld.mean())


def test_intervals_hold_the_truth() -> None:
    """95% intervals of the mean over independent tokens hold the true mean about 95 times in 100."""
    rng = np.random.default_rng(3)
    hits = 0
    for _ in range(60):
        p = rng.standard_normal((256, 12)).astype(np.float32)
        q = p + 0.5 * rng.standard_normal((256, 12)).astype(np.float32)
        stats = compare({"p": lambda x, p=p: p, "q": lambda x, q=q: q}, [("p", "q")], [[0] * 256])["p", "q"]
        low, high = stats.data["kld"]["mean_ci"]
        assert low < stats.kld_mean < high
        hits += low <= _TRUE_MEAN <= high
    assert hits >= 48
    assert wilson(0, 0) == [0.0, 1.0] and wilson(50, 100)[0] < 0.5 < wilson(50, 100)[1]


def _true_mean() -> float:
    rng = np.random.default_rng(4)
    p = rng.standard_normal((200_000, 12))
    a, b = log_softmax(p), log_softmax(p + 0.5 * rng.standard_normal(p.shape))
    return float((np.exp(a) * (a - b)).sum(1).mean())


_TRUE_MEAN = _true_mean()


def test_paired_differences_are_sharper_than_single_ones() -> None:
    p, q, ids = _models(512, 40, 0.2)
    worse = q + np.float32(0.02) * np.random.default_rng(1).standard_normal(q.shape).astype(np.float32)
    models = {"p": lambda x: p, "q": lambda x: q, "r": lambda x: worse}
    stats = compare(models, [("p", "q"), ("p", "r")], [ids])
    difference, error = paired(stats["p", "r"], stats["p", "q"])
    assert np.isclose(difference, stats["p", "r"].kld_mean - stats["p", "q"].kld_mean)
    low, high = stats["p", "q"].data["kld"]["mean_ci"]
    assert 0 < error < (high - low) / 4


def test_memory_does_not_grow_with_the_text() -> None:
    """Peak of traced allocations over 4 and over 16 windows of a large vocabulary."""
    import tracemalloc

    p = np.random.default_rng(0).standard_normal((64, 32_000)).astype(np.float32)
    peaks = []
    for windows in (4, 16):
        tracemalloc.start()
        compare({"p": lambda x: p, "q": lambda x: p}, [("p", "q")], [[1] * 64] * windows)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < peaks[0] * 1.02 + 1e6


def test_every_gate_says_which_measurement_set_it() -> None:
    text = (Path(gates.__file__).with_name("gates.yaml")).read_text()
    data = yaml.safe_load(text)
    assert data["schema"] == "lconvert.gates/2"
    sections = text.split("\n\n")[1:]
    for section in sections:
        assert section.lstrip().startswith("#"), section
    measured = [s for s in sections if "easured" in s]
    assert len(measured) >= 7


def test_gates_of_a_user_are_laid_over_the_shipped_ones(tmp_path: Path) -> None:
    (tmp_path / "g.yaml").write_text(
        "schema: lconvert.gates/2\nfidelity:\n  llama.cpp: [{bits: 9, kld_mean: 1e-3}]\n"
    )
    found = gates.load(tmp_path / "g.yaml")
    assert (
        gates.fidelity_gate(found, "llama.cpp", 2.6) == gates.fidelity_gate(found, "llama.cpp", 8.5) == 1e-3
    )
    shipped = gates.shipped()
    assert gates.fidelity_gate(found, "vllm", 4.0) == gates.fidelity_gate(shipped, "vllm", 4.0)
    assert gates.fidelity_gate(shipped, "llama.cpp", 2.6) > gates.fidelity_gate(shipped, "llama.cpp", 2.8)
    (tmp_path / "g.yaml").write_text("schema: lconvert.gates/2\nfidelity: 3\n")
    with pytest.raises(OptionError, match="gate fidelity is not what the shipped"):
        gates.load(tmp_path / "g.yaml")
