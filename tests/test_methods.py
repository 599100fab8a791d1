"""`--method`: the same grids by another rounder, in every target; what is refused before anything is computed; resuming."""

from __future__ import annotations

import dataclasses
import io
import json
import re
import sys
import types
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import lconvert
from lconvert import api, passes, recipe
from lconvert.cli import calibrating
from lconvert.cli.common import steps_bar
from lconvert.converters import gguf, gguf_grids, methods, onnx_presets, targets
from lconvert.converters.kinds import plain
from lconvert.errors import OptionError, OutputError
from lconvert.executor import execute
from lconvert.ir import Model, QTensor
from lconvert.passes import rtn
from lconvert.primitives import workplace
from lconvert.primitives.job import Job
from lconvert.primitives.placement import NOTHING, Placement, patterns
from tests import arch_cases, case_models
from tests.conftest import DEMO, ROOT
from tests.test_cli import inside


@dataclasses.dataclass(frozen=True)
class Options(Placement):
    """Of a rounder for these tests."""

    damping: float = 0.01


@dataclasses.dataclass(frozen=True)
class Turned:
    """Of a transform for these tests."""

    way: str = "left"


class Slow:
    """Passes as calibrated ones are: `slow` rounds to nearest and keeps a file per layer, `turned` changes nothing."""

    def __init__(self) -> None:
        self.jobs: list[Job] = []
        self.seen: list[Any] = []
        self.fail_after: int | None = None
        self.fails: BaseException = KeyboardInterrupt()

    def run(self, model: Model, options: Options, job: Job) -> Model:
        job.text("slow")
        self.jobs.append(job)
        self.seen.append(options)
        assert job.work is not None
        for i in range(model.decoder.layers):
            layer = job.work / f"layer-{i}"
            if not (job.resume and layer.exists()):
                if i == self.fail_after:
                    raise self.fails
                layer.parent.mkdir(exist_ok=True)
                layer.write_text("done")
            job.tell("slow", i + 1, model.decoder.layers)
        shared = {f.name: getattr(options, f.name) for f in dataclasses.fields(Placement)}
        return rtn.run(model, rtn.Options(**shared))

    def turn(self, model: Model, options: Turned, job: Job) -> Model:
        self.seen.append(options)
        return replace(model, report=(*model.report, f"turned {options.way}"))


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> Iterator[Slow]:
    found = Slow()
    for name, members in (
        ("slow", {"Options": Options, "run": found.run}),
        ("turned", {"Options": Turned, "run": found.turn}),
    ):
        module = types.ModuleType(f"lconvert.passes.{name}")
        vars(module).update(members)
        monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(passes, "PASSES", {**passes.PASSES, "slow": "a test's", "turned": "a test's"})
    monkeypatch.setattr(passes, "STAGES", {**passes.STAGES, "slow": ("rounds",), "turned": ("transforms",)})
    made = {
        "slow": methods.Method("a test's", "slow", {"damping": 0.5}, (("turned", {"way": "right"}),)),
        "w8": methods.Method("a test's", "rtn", {}, (("turned", {}),), text=False, scheme="w8a8"),
    }
    monkeypatch.setattr(methods, "METHODS", {**methods.METHODS, **made})
    yield found


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "calib.txt"
    path.write_text((ROOT / "README.md").read_text(encoding="utf-8")[:4000], encoding="utf-8")
    return path


def ok(*args: object) -> str:
    code, out, err = inside([*map(str, args)])
    assert (code, err) == (0, ""), err
    return out


def fails(*args: object) -> str:
    code, _, err = inside([*map(str, args)])
    assert code == 2 and err.startswith("lconvert: error: ") and err.count("\n") == 1, err
    return err.removeprefix("lconvert: error: ").strip()


# --- the mixture of a file type as grids -----------------------------------------------------------------

#: The plainest case of every architecture that hf-to-gguf takes without a flag.
CASES = list({c.model_type: c for c in reversed(arch_cases.load()) if not c.refused and c.loads}.values())


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.model_type)
@pytest.mark.parametrize("ftype", ["Q4_K_M", "Q4_0"])
def test_rounding_beforehand_writes_the_bytes_of_the_stock_file(
    case: Any, ftype: str, tmp_path: Path
) -> None:
    """ggml's blocks made by the pass and carried are those that are made when the file is written, tensor for tensor."""
    pytest.importorskip("transformers", reason="transformers is not installed")
    model = lconvert.read(case_models.folder(case.name))
    lowering = api.gguf_options(ftype=ftype, allow_loss=case.losses)
    grids = patterns(gguf_grids.types(model, lowering), model.decoder.layers)
    rounded = rtn.run(model, rtn.Options(targets=NOTHING, grids=grids))
    stock, ours = (gguf.plan(m, "m.gguf", lowering) for m in (model, rounded))
    before, after = ({i.name: i for i in p.items()} for p in (stock, ours))
    assert {n: i.type for n, i in before.items()} == {n: i.type for n, i in after.items()}
    changed = [n for n, i in after.items() if i.verdict != before[n].verdict]
    assert changed and all(before[n].verdict.kind == "quantized" for n in changed)
    assert {after[n].verdict.kind for n in changed} == {"exact"}
    left = {n.split(".")[-2] for n, i in after.items() if i.verdict.kind == "quantized"}
    assert left <= {"token_embd", "attn_k_b", "position_embd"}
    a, b = (execute(p, tmp_path / n, threads=2).paths[0].read_bytes() for p, n in ((stock, "a"), (ours, "b")))
    assert a == b


def test_a_mixture_is_few_patterns() -> None:
    model = lconvert.read(DEMO)
    found = gguf_grids.types(model, api.gguf_options(ftype="Q4_K_M"))
    grids = patterns(found, model.decoder.layers)
    assert len(grids) < 12
    options = Placement(targets=NOTHING, grids=grids)
    for role, entry in model.entries.items():
        placed = options.of(role)
        assert (placed.grid if placed else None) == found.get(role), role
        assert (role in found) == (len(entry.data.shape) == 2 and role != "embed")
    assert {"Q4_K", "Q6_K"} == set(found.values())


def test_experts_of_a_layer_share_a_pattern() -> None:
    roles = {f"layers.{i}.moe.experts.{e}.down": "Q4_K" if i else "Q6_K" for i in range(3) for e in range(8)}
    grids = patterns(roles | {"head": "Q6_K"}, 3)
    assert grids == {
        "head": "Q6_K",
        r"layers\.0\.moe\.experts\.\d+\.down": "Q6_K",
        r"layers\.(1|2)\.moe\.experts\.\d+\.down": "Q4_K",
    }
    options = Placement(targets=NOTHING, grids=grids)
    assert {r: options.of(r).grid for r in roles} == roles  # type: ignore[union-attr]


@pytest.mark.parametrize("ftype", ["F16", "F32", "BF16"])
def test_a_file_type_without_grids(slow: Slow, text: Path, ftype: str, tmp_path: Path) -> None:
    said = fails(
        "hf-to-gguf",
        DEMO,
        "--type",
        ftype,
        "--method",
        "slow",
        "--calibrate",
        text,
        "-o",
        tmp_path / "m.gguf",
    )
    assert (
        said
        == f"--method slow: {ftype} has no grid that it rounds onto; leave out --method, or choose a type such as --q4_k_m"
    )


def test_lattices_stay_with_llama_cpp(tmp_path: Path) -> None:
    model = plain()
    importances = {
        s.name: np.ones(s.cols, np.float32) for s, _ in gguf.chosen(model, api.gguf_options(ftype="Q4_0"))
    }
    lowering = api.gguf_options(ftype="IQ3_S", imatrix=importances)
    assert "IQ3_S" not in gguf_grids.types(model, lowering).values()


# --- the verbs -------------------------------------------------------------------------------------------


def test_hf_to_gguf(slow: Slow, text: Path, tmp_path: Path) -> None:
    out = tmp_path / "m.gguf"
    data = json.loads(ok("hf-to-gguf", DEMO, "--q4_k_m", "--method", "slow", "--calibrate", text, "-o", out, "--no-validate", "--json"))  # fmt: skip
    ok(
        "hf-to-gguf",
        DEMO,
        "--q4_k_m",
        "--method",
        "rtn",
        "-o",
        tmp_path / "stock.gguf",
        "--no-validate",
        "--name",
        "demo_model",
    )
    assert out.read_bytes() == (tmp_path / "stock.gguf").read_bytes()
    kinds = {(t["type"], t["verdict"]["kind"]) for t in data["manifest"]["plan"]["files"][0]["tensors"]}
    assert kinds == {("F32", "widened"), ("Q4_K", "exact"), ("Q6_K", "exact"), ("Q6_K", "quantized")}
    said = data["manifest"]["plan"]["options"]
    assert [next(iter(p)) for p in said["recipe"]["passes"]] == ["turned", "slow"]
    assert said["recipe"]["passes"][1]["slow"]["damping"] == 0.5 and said["recipe"]["name"] == "Q4_K_M"
    assert said["calibration"]["name"] == "calib.txt" and said["calibration"]["tokens"] > 500
    assert said["calibration"]["activations"] == "f32"
    assert "turned right" in data["report"]
    assert not (tmp_path / "m.gguf.work").exists(), "finished layers go when the artifact is there"
    assert "`recipe` `Q4_K_M`, `calibration` `calib.txt`" in (tmp_path / "README.md").read_text()


@pytest.mark.parametrize(
    ("verb", "flags", "grid", "group"),
    [
        ("hf-to-vllm", [], "int4", 128),
        ("hf-to-vllm", ["--w4a16-asym", "--group", "64"], "uint4", 64),
        ("hf-to-vllm", ["--nvfp4a16"], "fp4", 128),
        ("hf-to-trtllm", [], "int4", 128),
        ("hf-to-onnx", [], "int4", 32),
        ("hf-to-onnx", ["--int8"], "int8", -1),
        ("convert", ["--to", "vllm"], "int4", 128),
        ("convert", ["--to", "gguf", "--recipe", "int4-g32-mse"], "int4", 32),
        ("compress", [], "int4", 128),
        ("compress", ["--recipe", "q4_k"], "Q4_K", 128),
    ],
)  # fmt: skip
def test_a_method_keeps_the_placement(slow: Slow, text: Path, tmp_path: Path, verb: str, flags: list[str], grid: str, group: int) -> None:  # fmt: skip
    out = tmp_path / {"compress": "m.lcir"}.get(verb, "m.gguf" if "gguf" in flags else "out")
    args = [verb, DEMO, *flags, "--method", "slow", "--calibrate", text, "-o", out, "--json"]
    data = json.loads(ok(*args, *([] if verb == "compress" else ["--no-validate"])))
    options = slow.seen[1]
    assert slow.seen[0] == Turned("right") and (options.grid, options.group) == (grid, group)
    steps = [next(iter(s)) for s in data["manifest"]["plan"]["options"]["recipe"]["passes"]]
    # The table of embeddings, which the graph of hf-to-onnx has quantized, is looked up: no text says anything of it.
    assert steps == ["turned", "slow", *(["rtn"] if verb == "hf-to-onnx" else [])]
    assert slow.jobs[0].calibration.windows == 128 and slow.jobs[0].calibration.text == str(text)
    assert not list(tmp_path.glob("*.work"))
    if verb == "compress":
        assert data["recipe"]["passes"][1]["slow"] and data["calibration"]["name"] == "calib.txt"


def test_embeddings_of_a_graph_stay_with_rtn(slow: Slow) -> None:
    made = onnx_presets.recipe("int4", "ort", method="slow", calibration="t")
    model = lconvert.read(DEMO)
    by = {s.name: {e.name for e, _ in s.options.chosen(model)} for s in made.of(model).steps[1:]}
    assert by["rtn"] == {"embed"} and "layers.0.attn.q" in by["slow"] and "embed" not in by["slow"]
    table = made.of(model).steps[2].options
    assert (table.of("embed").grid, table.search) == ("int8", "signed-max")


def test_inputs_are_natural_to_a_method(slow: Slow, tmp_path: Path) -> None:
    out = ok("hf-to-vllm", DEMO, "--method", "w8", "-o", tmp_path / "o", "--no-validate", "--json")
    steps = json.loads(out)["manifest"]["plan"]["options"]["recipe"]["passes"]
    assert steps == [{"turned": {}}, {"rtn": {"grid": "int8", "group": -1}}, {"activations": {}}]


def test_what_the_command_line_says_of_a_run(slow: Slow, text: Path, tmp_path: Path) -> None:
    said = ["--calibration-windows", 3, "--calibration-context", 16, "--seed", 9, "--memory", "2G", "--threads", 2, "--work", tmp_path / "w", "--activations", "bf16"]  # fmt: skip
    ok("compress", DEMO, "-o", tmp_path / "m.lcir", "--method", "slow", "--calibration", text, *said)
    job = slow.jobs[0]
    assert (job.calibration.windows, job.calibration.context, job.calibration.seed) == (3, 16, 9)
    assert (job.memory, job.threads, job.work, job.resume) == (2 * 10**9, 2, tmp_path / "w", False)
    assert job.activations == "bf16"
    assert (tmp_path / "w" / "layer-0").exists(), "a folder that was named is kept"
    own = tmp_path / "r.yaml"
    own.write_text("schema: lconvert.recipe/1\ncalibration: {windows: 5, context: 24}\npasses: [slow]\n")
    ok(
        "compress",
        DEMO,
        "-o",
        tmp_path / "n.lcir",
        "--recipe",
        own,
        "--calibrate",
        text,
        "--calibration-context",
        8,
    )
    assert (slow.jobs[1].calibration.windows, slow.jobs[1].calibration.context) == (5, 8)


def test_a_dry_run_calibrates_nothing(slow: Slow, text: Path, tmp_path: Path) -> None:
    for verb, out in (
        ("hf-to-gguf", "m.gguf"),
        ("hf-to-vllm", "o"),
        ("compress", "m.lcir"),
        ("hf-to-onnx", "o"),
    ):
        flags = ["--q4_k_m"] if verb == "hf-to-gguf" else []
        args = [
            verb,
            DEMO,
            *flags,
            "--method",
            "slow",
            "--calibrate",
            text,
            "-o",
            tmp_path / out,
            "--dry-run",
        ]
        said = ok(*args)
        assert (
            "note: planned without turned and slow: sizes and types are those of the run, values are rounded"
            in said
        )
    assert not slow.seen and not list(tmp_path.iterdir())


# --- what is refused before anything is computed ---------------------------------------------------------


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["hf-to-vllm", DEMO, "--method", "best"], "method 'best'; choose rtn, "),
        (["hf-to-vllm", DEMO, "--method", "slow"], "--method slow needs a calibration text; add --calibrate TEXT"),
        (["hf-to-gguf", DEMO, "--q4_0", "--method", "slow"], "--method slow needs a calibration text; add --calibrate TEXT"),
        (["hf-to-gguf", DEMO, "--method", "slow", "--calibrate", "TEXT"],
         "--method slow rounds onto the grids of a file type; add one, such as --q4_k_m, or write an .lcir folder with lconvert compress"),
        (["hf-to-vllm", DEMO, "--dense", "--method", "slow", "--calibrate", "TEXT"], "--method slow: --dense rounds no weights; choose something that does"),
        (["compress", DEMO, "--recipe", "R", "--method", "slow", "--calibrate", "TEXT"], "--method slow: R rounds by slow already; leave one of them out"),
        (["compress", DEMO, "--recipe", "K", "--method", "slow", "--calibrate", "TEXT"], "--method slow: K rounds no weights; choose something that does"),
        (["hf-to-onnx", DEMO, "--recipe", "R", "--method", "slow", "--calibrate", "TEXT"], "rounds by slow already"),
        (["compress", DEMO, "--recipe", "T"], "gone.txt: no such file; check the path"),
        (["compress", DEMO, "--recipe", "R"], "slow: needs a calibration text; name one (--calibrate TEXT)"),
        (["hf-to-vllm", DEMO, "--calibrate", "missing.txt"], "missing.txt: no such file; check the path"),
        (["hf-to-gguf", DEMO, "--q4_0", "--calibrate", "."], ".: is a folder; check the path"),
        (["compress", DEMO, "--calibrate", "BINARY"], "BINARY: is no UTF-8 text (byte 1); a calibration text is plain text"),
        (["compress", DEMO, "--calibrate", "ZERO"], "ZERO: is no text (byte 1 is 0); a calibration text is plain text"),
        (["compress", DEMO, "--calibrate", "EMPTY"], "EMPTY: is empty; a calibration text needs some paragraphs"),
        (["compress", DEMO, "--calibration-windows", "0"], "Invalid value for '--calibration-windows': 0 is not in the range x>=1"),
        (["compress", DEMO, "--seed", "-1"], "Invalid value for '--seed'"),
        (["compress", DEMO, "--device", "tpu"], "--device 'tpu': expected cpu, cuda or cuda:N"),
        (["compress", DEMO, "--device", "cuda:99", "--method", "slow", "--calibrate", "TEXT"], "--device cuda:99: torch sees "),
        (["compress", DEMO, "--memory", "lots"], "--memory 'lots': expected a number of bytes"),
        (["hf-to-vllm", "Q", "--method", "slow", "--calibrate", "TEXT"],
         "--method slow: Q: 21 matrices are quantized already, so there is nothing to round; give the model as it was before, or"),
        (["hf-to-gguf", "Q", "--q4_0", "--method", "slow", "--calibrate", "TEXT"], "21 matrices are quantized already, so there is nothing to round"),
        (["compress", DEMO, "--method", "slow", "--calibrate", "TEXT", "--work", "BINARY"], "BINARY: is not a folder of finished layers; choose another one with --work"),
        (["compress", DEMO, "--method", "slow", "--calibrate", "TEXT", "--work", "."], ".: is not a folder of finished layers; choose another one with --work"),
    ],
    ids=lambda x: " ".join(map(str, x[2:5])) if isinstance(x, list) else "",
)  # fmt: skip
def test_refused(slow: Slow, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, args: list[Any], message: str) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    (tmp_path / "BINARY").write_bytes(b"a\xff")
    (tmp_path / "ZERO").write_bytes(b"a\0b")
    (tmp_path / "EMPTY").write_bytes(b" \n")
    (tmp_path / "R").write_text("schema: lconvert.recipe/1\npasses: [slow]\n")
    (tmp_path / "K").write_text("schema: lconvert.recipe/1\npasses: [kv]\n")
    (tmp_path / "T").write_text("schema: lconvert.recipe/1\ncalibration: {text: gone.txt}\npasses: [slow]\n")
    if "Q" in args:
        ok("hf-to-vllm", DEMO, "--w4a16", "-o", "Q", "--no-validate", "--no-card")
    before = sorted(tmp_path.iterdir())
    out = "m.lcir" if args[0] == "compress" else "m.gguf" if args[0] == "hf-to-gguf" else "out"
    said = fails(*(text if a == "TEXT" else a for a in args), "-o", out)
    assert message in said
    assert not slow.jobs and sorted(tmp_path.iterdir()) == before


def test_what_is_in_the_way_is_said_before_the_long_part(slow: Slow, text: Path, tmp_path: Path) -> None:
    (tmp_path / "o").mkdir()
    (tmp_path / "o" / "config.json").write_text("{}")
    args = ["hf-to-vllm", DEMO, "--method", "slow", "--calibrate", text, "-o", tmp_path / "o"]
    assert fails(*args).endswith("o/config.json: exists; --force replaces it")
    out = ["--group", 20, "--force"]
    assert "20" in fails(*args, *out) and not slow.jobs


def test_methods_are_for_language_models(slow: Slow, text: Path, tmp_path: Path) -> None:
    pytest.importorskip("transformers", reason="transformers is not installed")
    from tests.small_classifiers import bert

    bert("bert", tmp_path / "bert")
    said = fails(
        "hf-to-onnx",
        tmp_path / "bert",
        "--int8",
        "--method",
        "slow",
        "--calibrate",
        text,
        "-o",
        tmp_path / "o",
    )
    assert said == f"--method slow: {tmp_path / 'bert'} is a bert; methods are for language models"
    ok("hf-to-onnx", tmp_path / "bert", "--int8", "--method", "rtn", "-o", tmp_path / "o", "--no-validate")
    static = recipe.Recipe("static", (recipe.step("static", {}),))
    methods.something_to_round("rtn", static, lconvert.read(tmp_path / "bert"))


# --- finished layers -------------------------------------------------------------------------------------


def test_a_run_is_continued_where_it_was_interrupted(slow: Slow, text: Path, tmp_path: Path) -> None:
    out = tmp_path / "m.lcir"
    args = ["compress", str(DEMO), "-o", str(out), "--method", "slow", "--calibrate", str(text)]
    slow.fail_after = 2
    code, _, err = inside(args)
    assert (code, err) == (
        130,
        f"lconvert: interrupted; finished layers are kept in {out}.work for --resume\n",
    )
    work = tmp_path / "m.lcir.work"
    assert (
        sorted(p.name for p in work.iterdir()) == ["layer-0", "layer-1", workplace.RECORD]
        and not out.exists()
    )
    for change, what in (
        (["--calibration-windows", "64"], "windows 128, now it is 64"),
        (["--seed", "1"], "seed 0, now it is 1"),
        (["--activations", "bf16"], "activations 'f32', now it is 'bf16'"),
        (["--recipe", "q4_k"], "another recipe"),
    ):
        said = fails(*args, "--resume", *change)
        assert said == f"{work}: was begun with {what}; run without --resume to begin anew"
    plain = ["compress", DEMO, "-o", out, "--recipe", "q4_k", "--resume"]
    assert fails(*plain).startswith(f"{work}: was begun with another recipe")  # which takes no text itself
    stamps = {p.name: p.stat().st_mtime_ns for p in work.iterdir()}
    slow.fail_after = None
    slow.fails = AssertionError("never")
    seen: dict[str, int] = {}
    real = slow.turn

    def look(model: Model, options: Turned, job: Job) -> Model:
        seen.update({p.name: p.stat().st_mtime_ns for p in work.iterdir()})
        return real(model, options, job)

    sys.modules["lconvert.passes.turned"].run = look  # type: ignore[attr-defined]
    ok(*args, "--resume")
    assert seen == stamps and not work.exists() and out.is_dir()


def slowly(folder: Path, text: Path) -> list[str]:
    """Arguments of a run of the slow pass."""
    output = str(folder / "m.lcir")
    return ["compress", str(DEMO), "-o", output, "--method", "slow", "--calibrate", str(text)]


def test_a_run_that_is_not_continued_begins_anew(slow: Slow, text: Path, tmp_path: Path) -> None:
    args = slowly(tmp_path, text)
    slow.fail_after = 2
    assert inside(args)[0] == 130
    slow.fail_after = 1
    assert inside(args)[0] == 130
    assert sorted(p.name for p in (tmp_path / "m.lcir.work").iterdir()) == ["layer-0", workplace.RECORD]


def test_an_interrupt_before_the_first_layer_leaves_nothing(slow: Slow, text: Path, tmp_path: Path) -> None:
    slow.fail_after = 0
    args = slowly(tmp_path, text)
    assert inside(args) == (130, "", "lconvert: interrupted\n") and not list(tmp_path.iterdir())


def test_a_pass_that_fails_leaves_its_finished_layers(slow: Slow, text: Path, tmp_path: Path) -> None:
    slow.fail_after, slow.fails = 1, OptionError("memory is not enough")
    kept = f"finished layers are kept in {tmp_path / 'm.lcir.work'} for --resume"
    assert fails(*slowly(tmp_path, text)) == f"memory is not enough; {kept}"
    assert workplace.holds_layers(tmp_path / "m.lcir.work")


def test_a_recipe_without_a_text_makes_no_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workplace, "begin", lambda *a, **k: pytest.fail("a folder was made"))
    ok("compress", DEMO, "-o", tmp_path / "m.lcir", "--recipe", "int8")
    assert [p.name for p in tmp_path.iterdir()] == ["m.lcir"]


def test_progress_has_a_line_for_each_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    shown = Terminal()
    monkeypatch.setattr(sys, "stderr", shown)
    monkeypatch.setenv("TERM", "xterm-256color")
    with steps_bar() as tell:
        assert tell is not None
        tell("smooth", 3, 3)
        tell("gptq", 2, 3)
    assert "smooth" in shown.getvalue() and "3/3" in shown.getvalue() and "gptq" in shown.getvalue()
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    with steps_bar() as tell:
        assert tell is None, "silent in a pipe"


def test_workplaces(tmp_path: Path) -> None:
    folder = tmp_path / "w"
    workplace.begin(folder, {"seed": 1}, resume=True)  # nothing to continue is no mistake
    (folder / "layer-7").write_text("x")
    workplace.begin(folder, {"seed": 1}, resume=True)
    assert workplace.holds_layers(folder)
    workplace.begin(folder, {"seed": 2}, resume=False)
    assert not workplace.holds_layers(folder)
    (folder / workplace.RECORD).write_text('{"schema": 3')
    with pytest.raises(OutputError, match="is not a folder of finished layers"):
        workplace.begin(folder, {"seed": 2}, resume=True)
    workplace.end(folder)
    assert folder.exists(), "what is not ours stays"
    (blocked := tmp_path / "f").write_text("")
    with pytest.raises(OutputError, match="cannot be written"):
        workplace.begin(blocked / "w", {}, resume=False)


# --- the table -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", methods.METHODS)
def test_every_method_makes_a_recipe_of_every_preset(name: str) -> None:
    for table in (targets.VLLM, targets.TENSORRT_LLM):
        for preset, p in table.items():
            if any(s == "rtn" for s, _ in p.steps):
                made = targets.recipe(preset, table, calibration="t.txt", method=name)
                assert made.steps and made.name == f"--{preset}"


def test_the_help_names_the_methods() -> None:
    for verb in ("hf-to-gguf", "hf-to-vllm", "hf-to-trtllm", "hf-to-onnx", "convert", "compress"):
        _, out, _ = inside([verb, "--help"])
        words = " ".join(out.split())
        assert f"How weights are rounded: {', '.join(methods.METHODS)}" in words and "--calibrate" in words


def test_the_page_lists_them_all() -> None:
    page = (ROOT / "docs" / "compression.md").read_text()
    rows = [line.split("|")[1] for line in page.splitlines() if line.startswith("| `")]
    first = [name for row in rows for name in re.findall("`([^`]+)`", row)]
    assert {*methods.METHODS, *recipe.names()} <= {*first}
    assert {n.split()[0] for n in first if not n.startswith("--")} <= {*methods.METHODS, *recipe.names()}
    example = page.split("```yaml\n")[1].split("```")[0]
    made = recipe.parse("page.yaml", example, ROOT).apply(lconvert.read(DEMO))
    bits = {n: e.data.grid.bits for n, e in made.entries.items() if isinstance(e.data, QTensor)}
    assert {b for n, b in bits.items() if n.endswith("down")} == {8} and "layers.0.attn.k" not in bits


def test_rtn_is_what_a_recipe_does_anyway() -> None:
    made = recipe.load("q4_k")
    assert methods.applied("rtn", made, "") is made and methods.outline(made) == made
    held = [e for e in made.apply(lconvert.read(DEMO)).entries.values() if isinstance(e.data, QTensor)]
    assert len(held) == 21
    assert calibrating.How.__dataclass_fields__.keys() >= {"method", "work", "memory"}
