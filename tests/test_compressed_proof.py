"""Artifacts of methods that replaced weights: every value is proven by the digests of the manifest, and any other value has a name.

Faults are planted in the bytes of the written files, and the manifest's hash of the file is made anew: a writer that packs wrongly hashes
what it wrote.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import pytest

import lconvert
from lconvert.converters import gguf as gguf_target
from lconvert.converters import gguf_mixture, targets
from lconvert.executor import execute
from lconvert.formats import gguf, onnx_reader, safetensors
from lconvert.ir import Model
from lconvert.passes import rotate
from lconvert.plan import manifest_path
from lconvert.primitives.job import Calibration, Job
from lconvert.recipe import Recipe, step
from lconvert.validators import quantized_tier
from lconvert.validators.report import Report
from tests import arch_cases, case_models
from tests.conftest import DEMO, ROOT

JOB = Job(Calibration(str(ROOT / "validators" / "text" / "excerpt.txt"), windows=2, context=64))
#: Passes by method; options that make a run short.
METHODS: dict[str, tuple[tuple[str, dict[str, Any]], ...]] = {
    "awq": (("awq", {"grid": "uint4", "group": 32, "ratios": 2, "clip": "none"}),),
    "magnitude": (
        ("sparse", {"method": "magnitude", "sparsity": 0.5}),
        ("rtn", {"grid": "int4", "group": 32}),
    ),
}
TARGETS = ("gguf", "vllm", "onnx")
CHECK = "equal to the compressed model"


@pytest.fixture(autouse=True)
def without_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    """Importing compressed_tensors takes longer than all the rest."""
    monkeypatch.setattr(quantized_tier, "package_python", lambda proof: None)


@cache
def compressed(method: str) -> Model:
    steps = tuple(step(name, options) for name, options in METHODS[method])
    return Recipe(method, steps).apply(lconvert.read(DEMO), JOB)


@pytest.fixture(scope="module")
def artifacts(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], Path]:
    """A folder for each method and target, with the artifact in it."""
    for name in ("gguf", "onnx", "safetensors", "torch"):
        pytest.importorskip(name, reason=f"{name} is not installed")
    out = {}
    for method in METHODS:
        for target in TARGETS:
            folder = tmp_path_factory.mktemp(f"{method}-{target}")
            out[method, target] = folder
            plan = targets.plan(compressed(method), target, path(folder, target).name)
            execute(plan, folder if target == "gguf" else path(folder, target))
    return out


def path(folder: Path, target: str) -> Path:
    return folder / {"gguf": "m.gguf", "vllm": "m", "onnx": "m"}[target]


def check(out: Path, source: Path = DEMO, **options: Any) -> Report:
    return lconvert.validate(source, out, tiers=("structure", "tensors"), threads=1, **options)


def failed(report: Report) -> set[str]:
    return {c.name for c in report.checks if c.passed is False}


# --- where things are in a file ------------------------------------------------------------------------------


class Place(NamedTuple):
    """Bytes of a tensor in a file."""

    file: Path
    start: int
    size: int


class Matrix(NamedTuple):
    """Where the codes of a matrix are, where one of its scales, and all that belongs to it."""

    codes: Place
    scale: Place
    whole: tuple[Place, ...]


def in_gguf(folder: Path, role: str) -> Matrix:
    """Q4_0 and Q4_1: blocks that begin with a scale of two bytes."""
    names = {"layers.0.mlp.gate": "blk.0.ffn_gate.weight", "layers.0.mlp.up": "blk.0.ffn_up.weight"}
    t = gguf.read(folder / "m.gguf").tensors[names[role]]
    size = {"Q4_0": 18, "Q4_1": 20}[t.type]
    place = Place(folder / "m.gguf", t.offset, t.nbytes)
    block = place.start + 5 * size
    return Matrix(Place(place.file, block + size - 16, 16), Place(place.file, block, 2), (place,))


def in_folder(folder: Path, role: str) -> Matrix:
    file = safetensors.read_header(folder / "m" / "model.safetensors")
    module = f"model.layers.0.mlp.{role.rpartition('.')[2]}_proj.weight"
    found = {
        name.removeprefix(module): Place(file.path, t.start, t.stop - t.start)
        for name, t in file.tensors.items()
        if name.startswith(module)
    }
    whole = tuple(place for name, place in sorted(found.items()) if name != "_shape")
    return Matrix(found["_packed"], found["_scale"], whole)


def in_graph(folder: Path, role: str) -> Matrix:
    tensors = onnx_reader.read(folder / "m" / "model.onnx").tensors
    found = {
        name: Place(t.path, t.offset, t.nbytes)
        for name, t in tensors.items()
        if name.startswith(role) and t.path is not None
    }
    return Matrix(found[role], found[f"{role}.scale"], tuple(found[name] for name in sorted(found)))


FIND: dict[str, Callable[[Path, str], Matrix]] = {"gguf": in_gguf, "vllm": in_folder, "onnx": in_graph}


def change(place: Place, new: bytes) -> None:
    with place.file.open("r+b") as f:
        f.seek(place.start)
        f.write(new)


def read(place: Place) -> bytes:
    return place.file.read_bytes()[place.start : place.start + place.size]


def one_code(at: Callable[[str], Matrix]) -> None:
    old = read(at("layers.0.mlp.up").codes)
    change(at("layers.0.mlp.up").codes, bytes([old[0] ^ 1]))


def one_scale(at: Callable[[str], Matrix]) -> None:
    """The lowest bit that its type's 8 significant ones have: a step of 1/256 in a short float, less in a wider one."""
    scale = at("layers.0.mlp.up").scale
    change(scale, bytes([read(scale)[0] ^ 1]))


def swapped(at: Callable[[str], Matrix]) -> None:
    pairs = list(zip(at("layers.0.mlp.gate").whole, at("layers.0.mlp.up").whole, strict=True))
    for a, b in pairs:
        first, second = read(a), read(b)
        change(a, second)
        change(b, first)


FAULTS: dict[Callable[[Callable[[str], Matrix]], None], str] = {
    one_code: "layers.0.mlp.up has other values",
    one_scale: "layers.0.mlp.up has other values",
    swapped: "layers.0.mlp.up has the values of layers.0.mlp.gate",
}


def hashed_again(out: Path) -> None:
    """The manifest of an artifact with the hashes of its files as they are now."""
    [beside] = [*out.parent.glob("*.manifest.json"), *out.glob("*.manifest.json")]
    data = json.loads(beside.read_text())
    for name in data["files"]:
        data["files"][name]["sha256"] = hashlib.sha256((beside.parent / name).read_bytes()).hexdigest()
    beside.write_text(json.dumps(data))


# --- proofs --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("method", METHODS)
def test_every_value_is_proven(artifacts: dict[tuple[str, str], Path], method: str, target: str) -> None:
    report = check(path(artifacts[method, target], target))
    assert not failed(report), report.notes
    count = len(lconvert.read(DEMO).entries)
    assert (
        next(c.value for c in report.checks if c.name == CHECK) == f"{count} of {count} tensors, every value"
    )
    assert not [line for line in report.not_proven if line.startswith("tensors: what") or "replaced" in line]
    assert {r["compressed"] for r in report.details["tensors"]["table"]} == {True}


@pytest.mark.parametrize("case", ["gemma3_text-", "gpt2-", "mixtral-", "deepseek_v2-", "phi3-"])
def test_digests_do_not_depend_on_how_an_architecture_is_stored(case: str, tmp_path: Path) -> None:
    """Norms with an offset, Conv1D, stacked experts, latent attention, fused matrices."""
    source = case_models.folder(next(n for n in arch_cases.some(1) if n.startswith(case)))
    steps = tuple(step(name, options) for name, options in METHODS["magnitude"])
    model = Recipe("magnitude", steps).apply(lconvert.read(source))
    for target in TARGETS:
        out = path(tmp_path, target)
        execute(targets.plan(model, target, out.name), tmp_path if target == "gguf" else out, force=True)
        report = check(out, source)
        assert not failed(report), report.notes
        assert {r["compressed"] for r in report.details["tensors"]["table"]} == {True}
        shutil.rmtree(tmp_path)


@pytest.mark.parametrize("fault", FAULTS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("method", METHODS)
def test_other_values_have_a_name(
    artifacts: dict[tuple[str, str], Path], tmp_path: Path, method: str, target: str, fault: Any
) -> None:
    shutil.copytree(artifacts[method, target], tmp_path / "bad")
    fault(lambda role: FIND[target](tmp_path / "bad", role))
    out = path(tmp_path / "bad", target)
    hashed_again(out)
    report = check(out)
    assert failed(report) == {CHECK}, "nothing else knows what a method wanted"
    assert f"{CHECK}: {FAULTS[fault]}" in report.notes
    wrong = {r["name"] for r in report.details["tensors"]["table"] if r["compressed"] is False}
    assert wrong == {"layers.0.mlp.up", *(["layers.0.mlp.gate"] if fault is swapped else [])}


def test_without_digests_nothing_is_claimed(artifacts: dict[tuple[str, str], Path], tmp_path: Path) -> None:
    """A manifest of an older version: as far as is known, the method replaced everything."""
    folder = tmp_path / "old"
    shutil.copytree(artifacts["awq", "gguf"], folder)
    beside = manifest_path(folder / "m.gguf")
    data = json.loads(beside.read_text())
    assert data.pop("compressed")["rounded"] == {}
    beside.write_text(json.dumps(data))
    report = check(folder / "m.gguf")
    assert CHECK not in {c.name for c in report.checks}
    assert any("which awq replaced by others" in line for line in report.not_proven)


def test_what_the_target_rounds_is_judged_by_what_was_left(tmp_path: Path) -> None:
    """AWQ leaves the embedding alone, so that its stock blocks are proven by the source; rotations do not."""
    pytest.importorskip("gguf", reason="gguf is not installed")
    types = gguf_target.Options(gguf_mixture.Options(ftype="Q4_1"))
    rotated = rotate.run(lconvert.read(DEMO), rotate.Options())
    left, turned = tmp_path / "left" / "m.gguf", tmp_path / "turned" / "m.gguf"
    execute(gguf_target.plan(compressed("awq"), left.name, types), left.parent)
    execute(gguf_target.plan(rotated, turned.name, types), turned.parent)
    report = check(left)
    assert not failed(report), report.notes
    assert next(c.value for c in report.checks if c.name == "blocks of the stock encoder").startswith(
        "1 of 1"
    )
    rows = {r["name"]: r for r in report.details["tensors"]["table"]}
    assert rows["embed"]["compressed"] is False and rows["layers.0.mlp.up"]["compressed"] is True
    t = gguf.read(left).tensors["token_embd.weight"]
    code = Place(left, t.offset + 7, 1)
    change(code, bytes([read(code)[0] ^ 1]))
    hashed_again(left)
    assert "blocks of the stock encoder" in failed(check(left))
    report = check(turned)
    assert not failed(report), report.notes
    assert any("of embed, head" in line and "rotate had replaced" in line for line in report.not_proven)
