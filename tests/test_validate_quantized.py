"""`lconvert validate` on quantized folders and on sources that are quantized themselves: good ones pass, faults have names.

Faults are planted with the safetensors package alone. Peer-written checkpoints (tests/fixtures/peers) and their own
dequantization are the oracle of the second decoder.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import lconvert
from lconvert.converters import targets
from lconvert.errors import InputError
from lconvert.executor import execute
from lconvert.ir import QTensor
from lconvert.validators import carried, codes, logit_tier, proof, quantized_tier, second_reading
from lconvert.validators.gates import folder_gate, shipped
from lconvert.validators.proof import quantization_config
from lconvert.validators.report import Report
from tests.conftest import DEMO, ROOT

torch = pytest.importorskip("torch", reason="torch is not installed")
pytest.importorskip("transformers", reason="transformers is not installed")
from safetensors.torch import load_file, save_file

PEERS = ROOT / "tests" / "fixtures" / "peers"
PYTHON = Path(os.environ.get("LCONVERT_VLLM_PYTHON") or ROOT / ".venv-vllm" / "bin" / "python")
Tensors = dict[str, Any]


def made(preset: str, folder: Path, **options: Any) -> Path:
    """The demo model by a preset of hf-to-vllm."""
    model = lconvert.read(DEMO)
    recipe = targets.recipe(preset, targets.VLLM, **options)
    target = targets.for_vllm(targets.VLLM[preset].format)
    return written(recipe.apply(model), target, folder / preset, original=model)


def written(model: Any, target: str, out: Path, **options: Any) -> Path:
    kind = targets.TARGETS[target].kind
    execute(targets.plan(model, target, out.name, **options), out.parent if kind == "gguf" else out)
    return out


def check(source: Path, out: Path, *tiers: str, **options: Any) -> Report:
    return lconvert.validate(source, out, tiers=tiers or ("structure", "tensors"), threads=1, **options)


def failed(report: Report) -> set[str]:
    return {c.name for c in report.checks if c.passed is False}


def value(report: Report, name: str) -> str:
    return next(c.value for c in report.checks if c.name == name)


@pytest.fixture(autouse=True)
def without_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    """Importing compressed_tensors takes longer than all the rest: tests that are about it name it again."""
    monkeypatch.setattr(quantized_tier, "package_python", lambda proof: None)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A GPTQ folder of int4 in groups of 32."""
    return made("gptq", tmp_path_factory.mktemp("source"), group=32)


@pytest.fixture(scope="module")
def packed(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same numbers as compressed-tensors."""
    return written(lconvert.read(source), "vllm", tmp_path_factory.mktemp("packed") / "out")


def spoiled(good: Path, to: Path, change: Callable[[Tensors], None], *, manifest: bool = False) -> Path:
    """A copy of a folder with other tensors. manifest: keep the one that promises exactness, with the hash of the new file."""
    shutil.copytree(good, to, copy_function=shutil.copy)
    tensors = load_file(to / "model.safetensors")
    change(tensors)
    save_file({k: t.contiguous() for k, t in tensors.items()}, to / "model.safetensors", {"format": "pt"})
    beside = next(to.glob("*.manifest.json"))
    if not manifest:
        beside.unlink()
        return to
    data = json.loads(beside.read_text())
    digest = sha256((to / "model.safetensors").read_bytes()).hexdigest()
    data["files"]["model.safetensors"]["sha256"] = digest
    beside.write_text(json.dumps(data))
    return to


# --- a quantized source --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "target", ["vllm", "compressed-tensors", "gptq", "gptq_v2", "awq", "modelopt", "gguf", "ir", "dense"]
)
def test_a_carried_source_passes_with_and_without_its_manifest(
    source: Path, tmp_path: Path, target: str
) -> None:
    name = {"gguf": "out.gguf", "ir": "out.lcir"}.get(target, "out")
    out = written(lconvert.read(source), target, tmp_path / name)
    held = "rounded" if target == "dense" else "exact"
    for _ in range(2):
        report = check(source, out)
        assert report.passed, failed(report)
        count = sum(isinstance(e.data, QTensor) for e in lconvert.read(source).entries.values())
        assert value(report, "carried") == f"{count} {held} of {count} quantized"
        rows = report.details["tensors"]["table"]
        assert {r["carried"] for r in rows} == {held, None}
        for beside in tmp_path.rglob("*.manifest.json"):
            beside.unlink()


def test_a_source_that_is_rounded_again_is_judged_by_its_grid(source: Path, tmp_path: Path) -> None:
    model = lconvert.read(source)
    out = written(model, "fp8", tmp_path / "out", allow_requantize=True)
    report = check(source, out)
    assert report.passed and "requantized" in value(report, "carried")
    assert any(n.startswith("requantized: layers.0.") for n in report.notes)

    def weaker(tensors: Tensors) -> None:
        name = next(n for n in tensors if n.endswith("up_proj.weight_scale_inv"))
        tensors[name][0, 0] *= 1.5

    report = check(source, spoiled(out, tmp_path / "bad", weaker))
    assert "carried" in failed(report)


FAULTS: dict[str, Callable[[Tensors], None]] = {}


def fault(change: Callable[[Tensors], None]) -> Callable[[Tensors], None]:
    FAULTS[change.__name__] = change
    return change


def _one(tensors: Tensors, suffix: str) -> str:
    return next(n for n in sorted(tensors) if n.endswith(suffix))


@fault
def nibbles_in_another_order(tensors: Tensors) -> None:
    name = _one(tensors, "down_proj.weight_packed")
    words = tensors[name].numpy().view(np.uint32)
    tensors[name] = torch.from_numpy(((words & 0x0F0F0F0F) << 4 | (words >> 4) & 0x0F0F0F0F).view(np.int32))


@fault
def one_code_changed(tensors: Tensors) -> None:
    tensors[_one(tensors, "q_proj.weight_packed")][3, 2] ^= 1


@fault
def neighbouring_scales_swapped(tensors: Tensors) -> None:
    scale = tensors[_one(tensors, "up_proj.weight_scale")]
    scale[5, :2] = scale[5, :2].flip(0).clone()


@fault
def groups_in_another_order(tensors: Tensors) -> None:
    name = _one(tensors, "gate_proj.weight_scale")
    tensors[name] = tensors[name].flip(1)


@pytest.mark.parametrize("name", FAULTS)
@pytest.mark.parametrize("manifest", [False, True])
def test_packing_faults_are_not_carried(
    packed: Path, source: Path, tmp_path: Path, name: str, manifest: bool
) -> None:
    report = check(source, spoiled(packed, tmp_path / "bad", FAULTS[name], manifest=manifest))
    assert failed(report) >= {"carried"}
    assert any(n.startswith("carried: layers.0.") for n in report.notes)


def test_zero_points_off_by_one_are_found_from_a_dense_source_too(tmp_path: Path) -> None:
    """Every zero point of an asymmetric folder: the read values are consistent, but a whole step away."""
    out = made("w4a16-asym", tmp_path, group=32)
    assert check(DEMO, out).passed

    def off(tensors: Tensors) -> None:
        for name in tensors:
            if name.endswith("zero_point"):
                tensors[name] += 1  # of the first row of every eight

    report = check(DEMO, spoiled(out, tmp_path / "bad", off))
    assert "bias of the worst block in steps" in " ".join(failed(report))


def test_a_cache_scale_that_changed_is_a_difference(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("The quick brown fox jumps over the lazy dog. " * 60)
    first = made("fp8", tmp_path, calibration=str(text), kv=True)
    out = written(lconvert.read(first), "vllm", tmp_path / "out")
    report = check(first, out)
    assert report.passed and value(report, "activations and KV cache") == "as the source says"

    def other(tensors: Tensors) -> None:
        tensors[_one(tensors, "k_scale")] *= 2

    report = check(first, spoiled(out, tmp_path / "bad", other))
    assert failed(report) == {"activations and KV cache"}
    assert "activations and KV cache: KV cache, k: the scale of its input is not the source's" in report.notes


def test_inputs_that_are_no_longer_quantized_are_a_difference(tmp_path: Path) -> None:
    first = made("w8a8", tmp_path)
    out = written(lconvert.read(first), "vllm", tmp_path / "out")
    path = out / "config.json"
    config = json.loads(path.read_text())
    for group in config["quantization_config"]["config_groups"].values():
        group["input_activations"] = None
    path.write_text(json.dumps(config))
    next(out.glob("*.manifest.json")).unlink()
    report = check(first, out)
    assert failed(report) == {"activations and KV cache", "config and tensors"}
    assert any("its input is not quantized here, quantized in the source" in n for n in report.notes)
    # A GGUF file has no place for it: a remark, and no difference.
    report = check(first, written(lconvert.read(first), "gguf", tmp_path / "out.gguf"))
    assert report.passed and any("how the source quantizes activations" in n for n in report.notes)


def test_act_order_and_scales_of_inputs_are_compared_after_they_moved(tmp_path: Path) -> None:
    for name in ("gptqmodel-gptq-4-g32-desc", "modelopt-int4-awq"):
        first = PEERS / name
        for target in ("gguf", "ir"):
            out = tmp_path / f"{name}.{target.replace('ir', 'lcir')}"
            plan = targets.plan(lconvert.read(first), target, out.name, allow_requantize=True)
            execute(plan, tmp_path if target == "gguf" else out)
            report = check(first, out)
            assert "carried" not in failed(report), (name, target, report.notes)


# --- structure ---------------------------------------------------------------------------------------------


def test_fused_modules_with_different_global_scales_are_named(tmp_path: Path) -> None:
    out = made("nvfp4a16", tmp_path)
    assert check(DEMO, out).passed

    def untied(tensors: Tensors) -> None:
        tensors[_one(tensors, "k_proj.weight_global_scale")] *= 1.1

    report = check(DEMO, spoiled(out, tmp_path / "bad", untied))
    assert "fused modules" in failed(report)
    assert any("layers.0.attn.q/k/v: its parts have different global scales" in n for n in report.notes)


def test_scales_that_the_models_dtype_would_round_fail(packed: Path, source: Path, tmp_path: Path) -> None:
    def fine(tensors: Tensors) -> None:
        for name in tensors:
            if name.endswith("weight_scale"):
                tensors[name] = (tensors[name].to(torch.float16) * 1.001).to(torch.float16)

    bad = spoiled(packed, tmp_path / "bad", fine)
    path = bad / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"dtype": "bfloat16"}))
    report = check(source, bad)
    assert "scales in the model's dtype" in failed(report)
    assert any("scales in F16 that BF16, the model's dtype, would round" in n for n in report.notes)


# --- the second decoder --------------------------------------------------------------------------------------


#: Layouts that the second decoder does not know: their validation says "not proven".
_UNKNOWN = ("autoround-own", "tao-hqq", "tao-torchao", "transformers-bitnet", "transformers-gpt-oss")


@pytest.mark.parametrize(
    "folder",
    sorted(p for p in PEERS.glob("*") if (p / "oracle.json").is_file() and not p.name.startswith(_UNKNOWN)),
    ids=lambda p: p.name,
)
def test_the_second_decoder_reads_what_peers_wrote_as_they_do(folder: Path) -> None:
    """Where it knows the layout. Scales of inputs are not part of the peer's matrix."""
    wanted = json.loads((folder / "oracle.json").read_text())["tensors"]
    found = dict(second_reading.modules(folder, quantization_config(folder)))
    known = {m: x for m, x in found.items() if x is not None and m in wanted}
    assert known
    parts = second_reading.read(folder)
    for module, x in known.items():
        close = 0.0
        if "pre_quant_scale" in parts[module]:  # not part of the peer's matrix
            x, close = x / second_reading.floats(parts[module]["pre_quant_scale"]), 2.0**-22
        elif "SCB" in parts[module]:  # bitsandbytes multiplies by a rounded 1 / 127
            close = 2.0**-22
        sample = np.array(wanted[module]["sample"], np.float32)
        flat = x.reshape(-1)[np.arange(len(sample)) * 7919 % x.size]
        assert np.allclose(flat, sample, rtol=close, atol=0), module


def test_two_wrongs_of_one_reader_do_not_make_a_right(
    packed: Path, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A reader that adds one to every code is found, although source and artifact agree in it."""
    from lconvert.kernels import packing

    honest = packing.unpack_rows

    def wrong(*args: Any, **options: Any) -> Any:
        return np.clip(honest(*args, **options) + 1, -8, 7).astype(np.int8)

    monkeypatch.setattr(packing, "unpack_rows", wrong)
    report = check(packed, packed)
    assert "independent dequantization, bit by bit" in failed(report)


@pytest.mark.skipif(
    not PYTHON.exists(), reason="vLLM's environment, which has compressed_tensors, is missing"
)
def test_compressed_tensors_itself_reads_the_same_numbers(
    packed: Path, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quantized_tier, "package_python", lambda proof: str(PYTHON))
    report = check(source, packed)
    assert report.passed and "by compressed-tensors" in value(report, "independent dequantization")
    assert value(report, "config class of compressed-tensors").startswith("accepts it")


def test_without_the_package_its_reading_is_not_proven(packed: Path, source: Path) -> None:
    report = check(source, packed)
    assert any("decompression by the package compressed-tensors" in n for n in report.not_proven)


def test_a_broken_interpreter_proves_nothing(
    packed: Path, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = tmp_path / "python"
    fake.write_text("#!/bin/sh\necho lost >&2\nexit 3\n")
    fake.chmod(0o755)
    monkeypatch.setattr(quantized_tier, "package_python", lambda proof: str(fake))
    report = check(source, packed)
    assert any("compressed-tensors" in n and "lost" in n for n in report.not_proven)


# --- codes, gates, logits ------------------------------------------------------------------------------------


def test_rounding_to_nearest_leaves_nearest_codes_on_every_grid(tmp_path: Path) -> None:
    model = lconvert.read(DEMO)
    for preset in ("w4a16", "w4a16-asym", "w8a16", "fp8", "nvfp4a16", "mxfp4"):
        recipe = targets.recipe(preset, targets.VLLM)
        for name, entry in recipe.apply(model).entries.items():
            if isinstance(entry.data, QTensor) and name.startswith("layers.0"):
                fit = codes.fit(entry.data, model.entries[name].data)
                assert fit.wild == 0 and fit.bias <= 0.5 and fit.steps <= 0.55, (preset, name, fit)


def test_the_gate_of_folders_adds_up_what_it_rounds() -> None:
    table = shipped()["fidelity_folder"]
    assert folder_gate(shipped(), "float32", (), 1e-11) == 1e-11
    assert folder_gate(shipped(), "float16", ("int_weights",), 0) == table["float16"]
    both = folder_gate(shipped(), "bfloat16", ("fp8_inputs", "fp8_cache"), 0)
    assert both == table["bfloat16"] + table["fp8_inputs"] + table["fp8_cache"]


def test_the_reference_of_a_quantized_source_is_its_dequantized_numbers(source: Path, tmp_path: Path) -> None:
    pytest.importorskip("llama_cpp", reason="llama_cpp is not installed")
    out = written(lconvert.read(source), "gguf", tmp_path / "out.gguf")
    report = check(
        source, out, "structure", "tensors", "logits", max_windows=1, context=128, cache=False, greedy=(0, 0)
    )
    assert report.passed, failed(report)
    assert report.details["runtimes"][0]["runtime"] == "dequantized"
    assert any("the source's dequantized numbers" in n for n in report.notes)
    assert "relative to the stock encoder: the source is quantized itself" in report.not_proven


def test_a_quantized_folder_without_its_runtime_is_not_proven(
    packed: Path, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(proof, "find_spec", lambda name: None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    report = check(source, packed, "tensors", "logits", max_windows=1, context=64, cache=False)
    assert report.passed and report.details["settings"]["runtimes"] == ["vllm"]
    assert any("doctor --install vllm" in n for n in report.not_proven)


def test_a_machine_without_kernels_proves_nothing(
    packed: Path, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuses(*args: Any, **options: Any) -> Any:
        raise InputError(
            "m: vLLM does not load it (ValueError: Failed to find a kernel that can implement it)"
        )

    monkeypatch.setattr(logit_tier, "opened", refuses)
    monkeypatch.setattr(proof.Proof, "substitute", None)
    options: dict[str, Any] = {"max_windows": 1, "context": 64, "cache": False, "python": {"vllm": PYTHON}}
    report = check(source, packed, "tensors", "logits", **options)
    assert report.passed
    assert any("logits in vllm: no kernel for this scheme here" in n for n in report.not_proven)
    assert check(source, packed, "logits", require=["vllm"], **options).exit_code == 3


def test_what_a_dense_model_states_is_not_quantized() -> None:
    assert not carried.is_quantized(lconvert.read(DEMO))
