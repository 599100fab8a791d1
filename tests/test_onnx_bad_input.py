"""Hostile ONNX files and hostile circumstances at the command line: one clear line on stderr, nothing left behind."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

onnx = pytest.importorskip("onnx", reason="onnx is not installed")
from onnx import TensorProto, helper

import lconvert
from lconvert.cli import cli, one_line
from lconvert.converters import onnx as exporter
from lconvert.converters import onnx_presets
from lconvert.errors import LconvertError
from lconvert.executor import execute
from tests.conftest import DEMO, ROOT

#: Every way into lconvert for an ONNX file. {f}: the file, {o}: an output that does not exist yet.
VERBS = {
    "inspect": ("inspect", "{f}"),
    "plan": ("plan", "{f}", "--to", "trt"),
    "build-engine": ("build-engine", "{f}", "-o", "{o}.plan", "--sm", "89"),
    "triton-repo": ("triton-repo", "{f}", "-o", "{o}"),
    "validate": ("validate", str(DEMO), "{f}", "--tier", "structure"),
    "hf-to-onnx": ("hf-to-onnx", "{f}", "-o", "{o}", "--no-validate"),
    "eval": ("eval", "{f}", "--needle", "--limit", "1"),
}
NEEDS = {"build-engine": "tensorrt_rtx", "eval": "onnxruntime"}


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("good") / "int4"
    model = onnx_presets.recipe("int4", "trt").apply(lconvert.read(DEMO))
    execute(exporter.plan(model, exporter.Options("trt")), folder)
    return folder


@pytest.fixture()
def folder(good: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(good, tmp_path / "m"))


# --- files -------------------------------------------------------------------------------------------------

Change = Callable[[Any, Path], None]
#: Replaced in the serialized graph by bytes that are no UTF-8.
_MARK, _NO_TEXT = b"XXQQXX", b"\xff\xfe\xfd\xfc\xfb\xfa"


def node(proto: Any, kind: str) -> Any:
    return next(n for n in proto.graph.node if n.op_type == kind)


def weight(proto: Any) -> Any:
    return next(t for t in proto.graph.initializer if t.external_data)


def outside(t: Any, location: str) -> None:
    t.name, t.data_type, t.data_location = "stolen", TensorProto.FLOAT, TensorProto.EXTERNAL
    t.dims.append(4)
    t.external_data.add(key="location", value=location)


def opset(version: int) -> Change:
    def change(proto: Any, folder: Path) -> None:
        proto.opset_import[0].version = version

    return change


def newer(proto: Any, folder: Path) -> None:
    proto.ir_version = 99


def in_a_constant(proto: Any, folder: Path) -> None:
    made = proto.graph.node.add(op_type="Constant", name="stolen")
    made.output.append("stolen")
    outside(made.attribute.add(name="value", type=onnx.AttributeProto.TENSOR).t, "../../../../etc/passwd")


def in_a_subgraph(proto: Any, folder: Path) -> None:
    made = proto.graph.node.add(op_type="If", name="branch", input=["attention_mask"], output=["stolen"])
    branch = made.attribute.add(name="then_branch", type=onnx.AttributeProto.GRAPH).g
    outside(branch.initializer.add(), "/etc/passwd")


def in_a_sparse_tensor(proto: Any, folder: Path) -> None:
    outside(proto.graph.sparse_initializer.add().values, "/etc/passwd")


def circle(proto: Any, folder: Path) -> None:
    node(proto, "MatMul").input[0] = "logits"


def itself(proto: Any, folder: Path) -> None:
    node(proto, "MatMul").input[0] = node(proto, "MatMul").output[0]


def twice(proto: Any, folder: Path) -> None:
    proto.graph.node.append(proto.graph.node[0])


def without_inputs(proto: Any, folder: Path) -> None:
    del node(proto, "DequantizeLinear").input[:]


def no_text(where: str) -> Change:
    def change(proto: Any, folder: Path) -> None:
        mark = _MARK.decode()
        match where:
            case "node":
                proto.graph.node[3].name = mark
            case "value":
                proto.graph.node[0].output[0] = mark
            case "initializer":
                proto.graph.initializer[0].name = mark
            case "metadata":
                proto.metadata_props.add(key=mark, value="x")
            case "location":
                weight(proto).external_data[0].value = mark

    return change


def size(value: int) -> Change:
    def change(proto: Any, folder: Path) -> None:
        for port in proto.graph.input:
            port.type.tensor_type.shape.dim[0].dim_value = value

    return change


def links(to: str) -> Change:
    def change(proto: Any, folder: Path) -> None:
        (folder / "model.onnx.data").rename(folder.parent / "outside")
        (folder / "model.onnx.data").symlink_to(to)

    return change


def pipe(proto: Any, folder: Path) -> None:
    (folder / "model.onnx.data").unlink()
    os.mkfifo(folder / "model.onnx.data")


def long_name(proto: Any, folder: Path) -> None:
    weight(proto).external_data[0].value = "a" * 5000


FILES: dict[str, tuple[Change, str]] = {
    "opset 99": (opset(99), "opset 99, above"),
    "opset -1": (opset(-1), "opset -1; the file is damaged"),
    "IR version 99": (newer, "IR version 99, above"),
    "data of a constant outside": (in_a_constant, "must be a file beside the model"),
    "data of a subgraph outside": (in_a_subgraph, "must be a file beside the model"),
    "data of a sparse tensor outside": (in_a_sparse_tensor, "must be a file beside the model"),
    "a circle": (circle, "'logits', which nothing before it makes"),
    "a node after itself": (itself, "which nothing before it makes"),
    "a value made twice": (twice, "which is there already"),
    "a node without inputs": (without_inputs, "has 0 inputs, 2 are the least"),
    "a node's name": (no_text("node"), "is not UTF-8"),
    "a value's name": (no_text("value"), "is not UTF-8"),
    "an initializer's name": (no_text("initializer"), "is not UTF-8"),
    "a key of the metadata": (no_text("metadata"), "is not UTF-8"),
    "a location": (no_text("location"), "is not UTF-8"),
    "an input of size -3": (size(-3), "has the impossible shape"),
    "a link outside": (links("../outside"), "a link that leads out of the folder"),
    "links in a circle": (links("model.onnx.data"), "a link that leads out of the folder"),
    "a pipe": (pipe, "which is missing"),
    "a long name": (long_name, "must be a file beside the model"),
}


def invoke(verb: str, file: Path, out: Path) -> Any:
    args = [a.format(f=file, o=out) for a in VERBS[verb]]
    return CliRunner().invoke(cli, args)


def refused(verb: str, folder: Path, words: str) -> None:
    """One intended error with these words, in time, and nothing new beside the input."""
    before = sorted(folder.parent.rglob("*"))
    start = time.process_time()
    result = invoke(verb, folder / "model.onnx", folder.parent / "out")
    assert isinstance(result.exception, LconvertError), (verb, result.exception, result.output)
    said = one_line(str(result.exception))
    assert words in said and len(said) < 1000 and "\n" not in said
    assert sorted(folder.parent.rglob("*")) == before and time.process_time() - start < 10


@pytest.mark.parametrize("what", FILES)
def test_hostile_files_at_every_verb(what: str, folder: Path) -> None:
    change, words = FILES[what]
    proto = onnx.load(folder / "model.onnx", load_external_data=False)
    change(proto, folder)
    data = proto.SerializeToString()
    (folder / "model.onnx").write_bytes(data.replace(_MARK, _NO_TEXT))
    for verb in VERBS:
        if verb in NEEDS:
            pytest.importorskip(NEEDS[verb], reason=f"{NEEDS[verb]} is not installed")
        refused(verb, folder, words)


def framed(field: int, data: bytes) -> bytes:
    """A message as a field of another (protobuf's encoding)."""
    size, out = len(data), bytes([field << 3 | 2])
    while size > 127:
        out, size = out + bytes([size & 127 | 128]), size >> 7
    return out + bytes([size]) + data


@pytest.mark.parametrize("depth", [40, 5000])
def test_subgraphs_in_subgraphs(depth: int, folder: Path) -> None:
    """Deeper than protobuf parses; it writes none either, so the bytes are put together here."""
    deep = b""
    for _ in range(depth):  # NodeProto.attribute, AttributeProto.g, GraphProto.node
        deep = framed(1, framed(5, framed(6, deep)))
    model = b"\x08\x0a" + framed(7, deep) + framed(8, b"\x10\x17")
    (folder / "model.onnx").write_bytes(model)
    for verb in VERBS:
        if verb not in NEEDS:
            refused(verb, folder, "is not an ONNX file, or is damaged")


@pytest.mark.parametrize("verb", VERBS)
def test_a_file_beyond_the_limit_of_protobuf(verb: str, folder: Path) -> None:
    """Sparse: 3 GB that take no room. It is refused before it is read."""
    if verb in NEEDS:
        pytest.importorskip(NEEDS[verb], reason=f"{NEEDS[verb]} is not installed")
    os.truncate(folder / "model.onnx", 3 << 30)
    refused(verb, folder, "2 GB or more in one file")


# --- blocks and scales -------------------------------------------------------------------------------------


def attribute(name: str, value: int) -> Change:
    def change(proto: Any, folder: Path) -> None:
        for a in node(proto, "DequantizeLinear").attribute:
            if a.name == name:
                a.i = value

    return change


def scales(value: float) -> Change:
    def change(proto: Any, folder: Path) -> None:
        t = next(t for t in proto.graph.initializer if t.name == "layers.0.attn.q.scale")
        half = helper.make_tensor(t.name, t.data_type, t.dims, [value] * (t.dims[0] * t.dims[1]))
        t.CopyFrom(half)

    return change


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (attribute("block_size", 7), "block_size 7, but 256 codes have 8 scales along axis 0"),
        (attribute("block_size", 0), "block_size 0, but"),
        (attribute("block_size", -1), "block_size -1, but"),
        (attribute("block_size", 1 << 62), "block_size 4611686018427387904, but"),
        (attribute("axis", 99), "axis 99 of 2 dimensions"),
        (scales(float("nan")), "no finite numbers"),
        (scales(float("inf")), "no finite numbers"),
    ],
)
def test_blocks_and_scales_that_tensorrt_would_take_without_a_word(
    change: Change, words: str, folder: Path
) -> None:
    """The builder goes by the shapes whatever block_size says; it must not come to that."""
    proto = onnx.load(folder / "model.onnx", load_external_data=False)
    change(proto, folder)
    (folder / "model.onnx").write_bytes(proto.SerializeToString())
    refused("plan", folder, words)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_scales_that_are_no_numbers_are_not_exported_again(value: float, folder: Path) -> None:
    proto = onnx.load(folder / "model.onnx", load_external_data=False)
    scales(value)(proto, folder)
    (folder / "model.onnx").write_bytes(proto.SerializeToString())
    refused("hf-to-onnx", folder, "its scale must be damaged")


# --- options and outputs -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--int4", "--int8"], "--int4 and --int8 contradict each other"),
        (["--fp32", "--fp16"], "--fp32 and --fp16 contradict each other"),
        (["--positions", str(10**18)], "the model has 512"),
    ],
)
def test_options_that_contradict(args: list[str], words: str, tmp_path: Path) -> None:
    result = CliRunner().invoke(cli, ["hf-to-onnx", str(DEMO), "-o", str(tmp_path / "x"), *args])
    assert isinstance(result.exception, LconvertError) and words in str(result.exception)
    assert not any(tmp_path.iterdir())


def test_the_source_is_not_replaced_by_its_own_graph(tmp_path: Path) -> None:
    source = Path(shutil.copytree(DEMO, tmp_path / "s"))
    before = {p: p.read_bytes() for p in source.iterdir()}
    result = CliRunner().invoke(cli, ["hf-to-onnx", str(source), "-o", str(source), "--force"])
    assert isinstance(result.exception, LconvertError) and "is also the source" in str(result.exception)
    assert {p: p.read_bytes() for p in source.iterdir()} == before


@pytest.mark.parametrize("what", ["file", "link"])
def test_an_output_that_is_no_folder(what: str, tmp_path: Path) -> None:
    out = tmp_path / "x"
    out.write_text("mine") if what == "file" else out.symlink_to("nowhere")
    result = CliRunner().invoke(cli, ["hf-to-onnx", str(DEMO), "-o", str(out), "--force", "--no-validate"])
    assert isinstance(result.exception, LconvertError) and "is no folder" in str(result.exception)
    assert out.is_symlink() or out.read_text() == "mine"


def test_what_a_killed_run_left_is_no_hindrance(good: Path, tmp_path: Path) -> None:
    """Half a graph under temporary names: the next run needs neither --force nor --resume."""
    out = tmp_path / "x"
    out.mkdir()
    for name in ("model.onnx.partial", "model.onnx.data.partial", "model.onnx.partial.json"):
        (out / name).write_bytes(b"half of it")
    args = ["hf-to-onnx", str(DEMO), "-o", str(out), "--dialect", "trt", "--int4", "--no-validate"]
    result = CliRunner().invoke(cli, [*args, "--no-card"])
    assert result.exit_code == 0, result.output
    assert (out / "model.onnx.data").read_bytes() == (good / "model.onnx.data").read_bytes()
    assert not list(out.glob("*partial*"))


# --- circumstances -----------------------------------------------------------------------------------------


def process(args: list[str], cwd: Path, *, code: str = "", limit: int | None = None) -> Any:
    """lconvert in a process of its own. code: run before it. limit: bytes of a file."""
    if limit is not None:
        code = f"import resource; resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit})); {code}"
    command = [sys.executable, "-c", f"{code}\nfrom lconvert.cli import main; main()", *args]
    (cwd / "tmp").mkdir()
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT / "src"),
        "TMPDIR": str(cwd / "tmp"),
        "COLUMNS": "200",
    }
    return subprocess.Popen(
        command, cwd=cwd, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )  # fmt: skip


def ended(p: Any) -> tuple[int, list[str]]:
    _, err = p.communicate(timeout=120)
    return p.returncode, err.splitlines()


def test_onnx_runtime_leaves_no_file_of_its_events(good: Path, tmp_path: Path) -> None:
    """Official builds write one among the temporary files when they are imported."""
    pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    code = "from lconvert.validators.runtimes.onnxruntime import package; package().SessionOptions()"
    rc, lines = ended(process(["--version"], tmp_path, code=code))
    assert rc == 0, lines
    assert [p.name for p in tmp_path.rglob("*")] == ["tmp"]


@pytest.mark.parametrize(
    ("version", "dtype", "words"),
    [
        (28, "F32", "export with an opset that it knows, or upgrade onnxruntime"),
        (0, "BF16", "has no kernel for these types: export with --fp32 or --fp16"),
    ],
)
def test_graphs_beyond_onnx_runtime(version: int, dtype: str, words: str, tmp_path: Path) -> None:
    """An opset that the package onnx knows and the runtime does not; a type that its CPU provider has no kernels for."""
    runtime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    if version and runtime.__version__ >= "1.32":
        pytest.skip("this onnxruntime may know opset 28")
    execute(exporter.plan(lconvert.read(DEMO), exporter.Options("ort", dtype)), tmp_path / "m")  # type: ignore[arg-type]
    path = tmp_path / "m" / "model.onnx"
    proto = onnx.load(path, load_external_data=False)
    proto.opset_import[0].version = version or proto.opset_import[0].version
    path.write_bytes(proto.SerializeToString())
    result = invoke("eval", path, tmp_path / "out")
    said = str(result.exception)
    assert isinstance(result.exception, LconvertError) and words in said and "onnxruntime_src" not in said


ABSENT = {
    "inspect": "onnx",
    "plan": "onnx",
    "triton-repo": "onnx",
    "validate": "onnx",
    "hf-to-onnx": "onnx",
    "eval": "onnxruntime",
}


@pytest.mark.parametrize("verb", ABSENT)
def test_packages_that_are_not_installed(verb: str, good: Path, tmp_path: Path) -> None:
    args = [a.format(f=good / "model.onnx", o=tmp_path / "out") for a in VERBS[verb]]
    rc, lines = ended(process(args, tmp_path, code=f"import sys; sys.modules['{ABSENT[verb]}'] = None"))
    assert rc == 3 and len(lines) == 1, lines
    assert "not installed" in lines[0] and "pip install 'lconvert[onnx]'" in lines[0]
    assert [p.name for p in tmp_path.rglob("*")] == ["tmp"]


def test_a_limit_on_the_size_of_files(good: Path, tmp_path: Path) -> None:
    """A graph keeps what was finished for --resume and says so; an engine and a repository leave nothing."""
    args = ["hf-to-onnx", str(DEMO), "-o", "x", "--dialect", "trt", "--int4", "--no-validate", "--no-card"]
    rc, lines = ended(process(args, tmp_path, limit=1 << 20))
    assert rc == 2 and len(lines) == 1 and "ulimit -f" in lines[0] and "--resume" in lines[0]
    assert all(".partial" in p.name for p in (tmp_path / "x").iterdir())
    (tmp_path / "tmp").rmdir()
    rc, lines = ended(process([*args, "--resume"], tmp_path))
    assert rc == 0, lines
    assert (tmp_path / "x" / "model.onnx.data").read_bytes() == (good / "model.onnx.data").read_bytes()


@pytest.mark.parametrize("verb", ["triton-repo", "build-engine"])
def test_a_limit_on_the_size_of_other_files(verb: str, good: Path, tmp_path: Path) -> None:
    args = [a.format(f=good / "model.onnx", o="out") for a in VERBS[verb]]
    if verb in NEEDS:
        pytest.importorskip(NEEDS[verb], reason=f"{NEEDS[verb]} is not installed")
        args += ["--sequence", "1:1:16", "--past", "0:8:32"]
    rc, lines = ended(process(args, tmp_path, limit=400 << 10))
    assert rc == 2 and len(lines) == 1 and "cannot be written (File too large)" in lines[0]
    assert [p.name for p in tmp_path.rglob("*")] == ["tmp"]


def test_ctrl_c_during_an_export(tmp_path: Path) -> None:
    """Half way through its weights: exit code 130 in one line, nothing under a final name, and --resume ends it."""
    slow = "import lconvert.executor as e, time; old = e._tasks; e._tasks = lambda *a: (time.sleep(0.05) or t for t in old(*a))"
    args = ["hf-to-onnx", str(DEMO), "-o", "x", "--int8", "--no-validate", "--no-card"]
    p = process(args, tmp_path, code=slow)
    data = tmp_path / "x" / "model.onnx.data.partial"
    until = time.monotonic() + 60
    while not (data.exists() and data.stat().st_size) and time.monotonic() < until:
        time.sleep(0.01)
    p.send_signal(signal.SIGINT)
    rc, lines = ended(p)
    assert rc == 130 and len(lines) == 1 and "interrupted" in lines[0] and "--resume" in lines[0]
    assert all(".partial" in f.name for f in (tmp_path / "x").iterdir())
    assert not any((tmp_path / "tmp").iterdir())
    (tmp_path / "tmp").rmdir()
    rc, lines = ended(process([*args, "--resume"], tmp_path))
    assert rc == 0 and not list((tmp_path / "x").glob("*partial*")), lines
