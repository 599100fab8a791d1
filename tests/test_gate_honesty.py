"""A check that passes has looked, a runtime that is required is opened, and a report never replaces what it is about."""

from __future__ import annotations

import errno
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

import lconvert
from lconvert.cli import bench
from lconvert.cli import eval as evaluate
from lconvert.cli.validate import command, save
from lconvert.errors import InputError, LconvertError, OptionError, OutputError
from lconvert.validators import documents, folder_values
from lconvert.validators.report import Report
from tests.conftest import DEMO

for name in ("torch", "transformers", "llama_cpp", "gguf"):
    pytest.importorskip(name, reason=f"{name} is not installed")


def checks(report: Report) -> dict[str, bool | None]:
    return {c.name: c.passed for c in report.checks}


def weights(path: Path) -> Report:
    return lconvert.validate(DEMO, path, tiers=["structure", "tensors"])


# --- folders are read by another program as well ----------------------------------------------------------


@pytest.mark.parametrize("with_torch", [True, False])
def test_values_of_a_folder_are_read_independently(with_torch: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not with_torch:
        monkeypatch.setattr(folder_values, "find_spec", lambda name: None)
    count, differences, worst = folder_values.independent(DEMO)
    assert count == 29 and not differences
    assert worst == (0.0 if with_torch else None), "NumPy has no bfloat16"


def test_a_wrong_reading_of_a_folder_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    own = folder_values.container.tensor

    def shifted(file: folder_values.container.SafetensorsFile, name: str) -> lconvert.ir.Tensor:
        found = own(file, name)
        if name != "model.norm.weight":
            return found
        return lconvert.ir.Tensor(found.shape, found.dtype, lambda a, b: found.read(a, b) ^ 1)

    monkeypatch.setattr(folder_values.container, "tensor", shifted)
    _, _, worst = folder_values.independent(DEMO)
    assert worst is not None and worst > 0
    report = weights(DEMO)
    assert not checks(report)["independent reading of values"]


def test_codes_that_only_lconvert_reads_are_said_to_be_unproven(tmp_path: Path) -> None:
    from lconvert.cli import compress

    made = CliRunner().invoke(
        compress.command, [str(DEMO), "-o", str(tmp_path / "m.lcir"), "--recipe", "int4-g128"]
    )
    assert made.exit_code == 0, made.output
    report = weights(tmp_path / "m.lcir")
    assert report.passed
    assert any("only lconvert reads the codes of .lcir" in text for text in report.not_proven)


# --- manifests -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def split(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("split")
    out = lconvert.convert(DEMO, folder / "m.gguf", ftype="Q4_K_M", split_max_size=500_000)
    assert len(out.paths) > 2
    return folder


def test_the_manifest_covers_all_shards(split: Path, tmp_path: Path) -> None:
    first = shutil.copytree(split, tmp_path / "s") / min(p.name for p in split.glob("*.gguf"))
    report = weights(first)
    assert report.passed
    assert next(c.value for c in report.checks if c.name == "sha256 of the manifest").endswith("files")
    beside = first.with_name(first.name + ".manifest.json")
    manifest = json.loads(beside.read_text())
    last = max(manifest["files"])
    manifest["files"][last]["sha256"] = "0" * 64
    beside.write_text(json.dumps(manifest))
    report = weights(first)
    assert checks(report)["sha256 of the manifest"] is False
    assert any(last in note and "000000" in note for note in report.notes)


def test_the_manifest_covers_the_weights_of_a_folder(tmp_path: Path) -> None:
    from lconvert.cli import compress

    out = tmp_path / "m.lcir"
    assert CliRunner().invoke(compress.command, [str(DEMO), "-o", str(out)]).exit_code == 0
    assert checks(weights(out))["sha256 of the manifest"]
    beside = out / "lcir.json.manifest.json"
    manifest = json.loads(beside.read_text())
    manifest["files"]["tensors.safetensors"]["sha256"] = "0" * 64
    manifest["files"]["gone.bin"] = {"sha256": "1" * 64, "size": 1}
    beside.write_text(json.dumps(manifest))
    report = weights(out)
    assert checks(report)["sha256 of the manifest"] is False
    assert any("gone.bin is missing" in note for note in report.notes)
    for damaged in ("[]", "{", '{"files": []}', '{"files": {"a": 1}}'):
        beside.write_text(damaged)
        assert checks(weights(out))["sha256 of the manifest"] is False, damaged


def test_types_that_were_chosen_are_no_fault(tmp_path: Path) -> None:
    out = tmp_path / "m.gguf"
    lconvert.convert(DEMO, out, ftype="Q4_K_M", pure=True)
    report = lconvert.validate(DEMO, out, tiers=["structure"])
    assert report.passed and checks(report)["tensor types"] is None
    out.with_name("m.gguf.manifest.json").unlink()
    report = lconvert.validate(DEMO, out, tiers=["structure"])
    assert checks(report)["tensor types"] is False, "without a manifest nobody chose them"


# --- options that would be ignored ------------------------------------------------------------------------


def test_a_required_runtime_is_one_that_is_opened(split: Path) -> None:
    artifact = min(split.glob("*.gguf"))
    for required, tiers in (("vllm", ["tokens"]), ("llama.cpp", ["structure"]), ("lama.cpp", ["tokens"])):
        with pytest.raises(OptionError, match=f"^{required} is required, but this validation opens"):
            lconvert.validate(DEMO, artifact, tiers=tiers, require=[required])
    for required in ("llama.cpp", "llamacpp", "transformers"):
        assert lconvert.validate(DEMO, artifact, tiers=["tokens"], require=[required]).passed


def run(*args: object) -> None:
    command.main([str(a) for a in args], standalone_mode=False)


def test_an_interpreter_for_a_runtime_that_does_not_exist() -> None:
    with pytest.raises(OptionError, match="unknown runtime lama; runtimes: "):
        run(DEMO, DEMO, "--tier", "structure", "--python", "lama=python3")


def test_windows_are_reported_as_they_were(split: Path) -> None:
    report = lconvert.validate(
        DEMO,
        min(split.glob("*.gguf")),
        tiers=["logits"],
        context=100_000,
        max_windows=1,
        relative=False,
        greedy=(0, 0),
    )
    assert report.details["settings"]["context"] == 512 == report.stats()["tokens"]
    assert any("windows of 512 tokens" in note for note in report.notes)


# --- reports ---------------------------------------------------------------------------------------------


def test_reports_do_not_replace_models(split: Path, tmp_path: Path) -> None:
    shards = sorted(split.glob("*.gguf"))
    model = shutil.copytree(DEMO, tmp_path / "m")
    text = tmp_path / "text.txt"
    text.write_text("Some words.\n" * 100)
    before = {p: p.read_bytes() for p in (*shards, model / "config.json", model / "README.md", text)}
    for target, option in (
        (shards[0], "--report"),
        (shards[1], "--html"),
        (model / "config.json", "--report"),
        (model / "README.md", "--markdown"),
        (text, "--report"),
    ):
        with pytest.raises(OutputError, match="holds something else than a report"):
            run(model, shards[0], "--tier", "structure", "--text", text, option, target)
    with pytest.raises(OutputError, match="two reports would be written to one file"):
        run(model, shards[0], "--report", tmp_path / "r", "--html", tmp_path / "r")
    for verb in (
        [bench.command, shards[0], "--prompt", 8, "--tokens", 2, "--repetitions", 1],
        [evaluate.command, shards[0], "--needle"],
    ):
        with pytest.raises(OutputError, match="holds something else than a report"):
            verb[0].main([*map(str, verb[1:]), "--report", str(shards[0])], standalone_mode=False)
    assert before == {p: p.read_bytes() for p in before}
    for _ in range(2):  # an earlier report is replaced, wherever it is
        run(model, shards[0], "--tier", "structure", "--report", model / "report.json")


def damaged(report: Report, path: Path, **change: object) -> Path:
    path.write_text(json.dumps(report.to_json() | change))
    return path


def test_reports_that_contradict_themselves_are_damaged(split: Path, tmp_path: Path) -> None:
    report = lconvert.validate(DEMO, min(split.glob("*.gguf")), tiers=["structure"])
    bad = [c | {"passed": False} for c in report.to_json()["checks"]]
    path = damaged(report, tmp_path / "r.json", checks=bad)
    with pytest.raises(InputError, match="of its checks failed, and its verdict is not a failure"):
        documents.load(path)
    huge = json.dumps(report.to_json()).replace(
        f'"bytes": {report.details["artifact"]["bytes"]}', '"bytes": 1' + "0" * 400
    )
    path.write_text(huge)
    with pytest.raises(InputError, match="is not JSON"):
        documents.load(path)


def test_an_unusable_baseline_is_refused_before_the_work(split: Path, tmp_path: Path) -> None:
    artifact = min(split.glob("*.gguf"))
    report = lconvert.validate(DEMO, artifact, tiers=["structure"])
    steps: list[str] = []
    for change in (
        {"details": {}},
        {"details": {"settings": {"context": 512}}},
        {"schema": "lconvert.report/9"},
    ):
        with pytest.raises(LconvertError):
            lconvert.validate(
                DEMO, artifact, baseline=damaged(report, tmp_path / "b.json", **change), progress=steps.append
            )
    path = damaged(report, tmp_path / "b.json")
    with pytest.raises(OptionError, match="measured with another windows: 8 there, 3 here"):
        lconvert.validate(DEMO, artifact, max_windows=3, baseline=path, progress=steps.append)
    assert "tensors" not in steps


def test_a_full_disk_costs_the_cache_and_not_the_validation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import safetensors.numpy
    from safetensors import SafetensorError

    from lconvert.validators.logit_cache import CachedLogits

    def full(*args: object) -> None:
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(safetensors.numpy, "save_file", full)
    cache = CachedLogits(tmp_path, {"model": "m"}, lambda: lambda ids: np.ones((len(ids), 3), np.float32))
    assert cache([1, 2]).shape == (2, 3) == cache([1, 2]).shape
    assert cache.notes == [
        "reference logits were not cached: I/O error: No space left on device (os error 28)"
    ]
    assert not list(tmp_path.rglob("*.part"))


def test_a_report_that_cannot_be_written_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(self: Path, text: str, encoding: str) -> None:
        self.touch()
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OutputError, match=r"r\.json: cannot be written .No space left on device"):
        save(tmp_path / "r.json", "{}")
    assert not list(tmp_path.iterdir())


def test_what_was_left_out_is_said(split: Path) -> None:
    first = min(split.glob("*.gguf"))
    report = lconvert.validate(DEMO, first, tiers=["logits"], max_windows=1, relative=False, greedy=(0, 0))
    assert report.not_proven == ("relative to the stock encoder: left out by choice",)
