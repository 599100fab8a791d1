"""Reports in other forms: schema, JUnit, model card, trackers and the verb `report`.

The fixtures are what `lconvert validate --layers` (one with `--curve`) and `lconvert bench` wrote for the demo model's Q4_K_M;
in the failing one, the scales of a few blocks were damaged by hand.
"""

from __future__ import annotations

import copy
import json
import random
import re
import sys
import time
from collections.abc import Iterable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import yaml
from click.testing import CliRunner
from markdown_it import MarkdownIt
from markdown_it.token import Token

import lconvert
from lconvert.cli.report import command
from lconvert.errors import InputError, LconvertError, MissingPackageError, OutputError
from lconvert.plan import manifest_path
from lconvert.validators import card, documents, show, trackers
from lconvert.validators.junit import junit
from tests.conftest import DEMO, ROOT

FIXTURES = ROOT / "tests" / "fixtures"
SCHEMAS = {name: documents.schema(name) for name in documents.SCHEMAS}
HOSTILE = "a|b`c`](http://e.vil)<img src=x onerror=alert(1)>\n---\n# *h* _i_ \x1b[31m\u202e"


@pytest.fixture
def passed() -> dict[str, Any]:
    return documents.load(FIXTURES / "report-pass.json")


@pytest.fixture
def failed() -> dict[str, Any]:
    return documents.load(FIXTURES / "report-fail.json")


@pytest.fixture
def bench() -> dict[str, Any]:
    return documents.load(FIXTURES / "bench.json")


# --- schema ---------------------------------------------------------------------------------------------------


def variants(data: Any, seed: int, count: int, changes: int = 3) -> Iterator[Any]:
    """Copies of plain data with one to `changes` values replaced, emptied or removed."""
    rng = random.Random(seed)
    other: tuple[Any, ...] = (None, 0, -1, 1e300, 1e-300, 0.5, "", "x", [], {}, True, [None], {"a": 1})
    for _ in range(count):
        out = copy.deepcopy(data)
        for _ in range(rng.randint(1, changes)):
            at, key = out, rng.choice(list(out))
            while isinstance(at[key], dict | list) and at[key] and rng.random() < 0.85:
                at = at[key]
                key = rng.choice(list(at) if isinstance(at, dict) else range(len(at)))
            if rng.random() < 0.25:
                del at[key]
            else:
                at[key] = copy.deepcopy(rng.choice(other))
            if not out:
                break
        yield out


@pytest.mark.parametrize("name", ["report-pass", "report-fail", "bench"])
def test_our_schema_check_agrees_with_jsonschema(name: str) -> None:
    jsonschema = pytest.importorskip("jsonschema", reason="jsonschema is not installed")
    data = json.loads((FIXTURES / f"{name}.json").read_text())
    schema = SCHEMAS["lconvert.bench" if name == "bench" else "lconvert.report"]
    jsonschema.Draft202012Validator.check_schema(schema)
    oracle = jsonschema.Draft202012Validator(schema)
    assert oracle.is_valid(data)
    verdicts = []
    for variant in variants(data, 1, 150):
        wrong = list(documents.problems(variant, schema))
        assert bool(wrong) != oracle.is_valid(variant), (
            wrong,
            [e.message for e in oracle.iter_errors(variant)],
        )
        verdicts.append(bool(wrong))
    assert 30 < sum(verdicts) < 145


def test_the_schemas_use_only_what_we_check() -> None:
    known = {
        *documents._KEYWORDS,
        "$schema",
        "$id",
        "$ref",
        "$defs",
        "title",
        "description",
        "maximum",
        "maxItems",
    }

    def walk(rule: Any) -> Iterator[str]:
        if isinstance(rule, dict):
            for key, value in rule.items():
                yield key
                for inner in value.values() if key in ("properties", "$defs") else [value]:
                    yield from walk(inner)
        elif isinstance(rule, list):
            for inner in rule:
                yield from walk(inner)

    for schema in SCHEMAS.values():
        words = set(walk({k: v for k, v in schema.items() if k not in ("required", "enum")}))
        assert words - {"required", "enum"} <= known | {"enum"}


def keys(schema: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """(path, description) of every key that a schema names, `[]` for entries and `*` for free keys."""

    def walk(rule: dict[str, Any], path: str) -> Iterator[tuple[str, str]]:
        for name, inner in rule.get("properties", {}).items():
            yield f"{path}{name}", inner.get("description", "")
            if "$ref" not in inner:
                yield from walk(inner, f"{path}{name}.")
        if isinstance(inner := rule.get("items"), dict):
            yield from walk(inner, path.removesuffix(".") + "[].")

    yield from walk(schema, "")
    for name, rule in schema["$defs"].items():
        yield from walk(rule, f"{name}: ")


@pytest.mark.parametrize("name", list(documents.SCHEMAS))
def test_every_key_is_documented(name: str) -> None:
    text = (ROOT / "docs" / "report.md").read_text()
    rows = [f"| `{path}` | {show_row(description)} |" for path, description in keys(SCHEMAS[name])]
    missing = [row for row in rows if row not in text]
    assert not missing, "docs/report.md lacks:\n" + "\n".join(missing)


def show_row(description: str) -> str:
    return description.replace("|", "\\|")


def test_a_fresh_report_obeys_the_schema(tmp_path: Path) -> None:
    made = lconvert.convert(DEMO, tmp_path / "m.gguf", ftype="Q8_0").paths[0]
    report = lconvert.validate(DEMO, made, tiers=["structure", "tensors"])
    documents.check(json.loads(documents.dumps(report.to_json())), "report")


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("nothing", "is not JSON"),
        ("[1, 2]", "no schema; expected what lconvert validate or lconvert bench writes"),
        ('{"schema": "other/1"}', "schema 'other/1'; expected"),
        ('{"schema": "lconvert.report/1"}', "old form without the figures; run lconvert validate again"),
        ('{"schema": "lconvert.report/3"}', "comes from a newer lconvert; this one reads lconvert.report/2"),
        ('{"schema": "lconvert.bench/1"}', r"is damaged: \$.lconvert is missing; docs/report.md"),
        ('{"schema": "lconvert.report/2", "x": NaN}', "is not JSON .NaN is not a JSON number"),
        ("[" * 100_000, "is not JSON"),
    ],
)
def test_wrong_files_are_told_apart(tmp_path: Path, content: str, says: str) -> None:
    path = tmp_path / "r.json"
    path.write_text(content)
    with pytest.raises(InputError, match=says):
        documents.load(path)


def test_a_wrong_key_is_named(passed: dict[str, Any]) -> None:
    passed["details"]["logits"][0]["stats"]["kld"]["mean"] = "small"
    with pytest.raises(
        InputError, match=r"\$.details.logits\[0\].stats.kld.mean is 'small', expected number or null"
    ):
        documents.check(passed, "r.json")


def test_figures_that_are_not_finite_are_null() -> None:
    text = documents.dumps({"a": [float("nan"), (float("inf"), 1.5)], "b": {"c": -float("inf")}})
    assert json.loads(text) == {"a": [None, [None, 1.5]], "b": {"c": None}}


def test_validate_and_eval_of_one_artifact_are_one_report(
    passed: dict[str, Any], failed: dict[str, Any]
) -> None:
    evaluation = {
        **passed,
        "reference": "",
        "passed": False,
        "exit_code": 1,
        "checks": [{"tier": "tasks", "name": "t", "value": "0", "gate": "1", "passed": False}],
        "details": {"tasks": [{"task": "t", "metric": "acc", "value": 0.5}], "settings": {}, "runtimes": []},
    }
    both = documents.merged([passed, failed, evaluation])
    assert [r["candidate"] for r in both] == [passed["candidate"], failed["candidate"]]
    assert both[0]["exit_code"] == 1 and not both[0]["passed"] and both[0]["reference"] == passed["reference"]
    assert both[0]["checks"] == passed["checks"] + evaluation["checks"] and "tasks" in both[0]["details"]
    documents.check(both[0], "merged")
    assert len(documents.merged([passed, passed])) == 2


# --- JUnit ----------------------------------------------------------------------------------------------------

#: element -> (attributes that it must have, attributes that it may have, children); junit-10.xsd of Jenkins' xunit plugin
JUNIT: dict[str, tuple[set[str], set[str], set[str]]] = {
    "testsuites": (set(), {"name", "time", "tests", "failures", "errors", "skipped"}, {"testsuite"}),
    "testsuite": (
        {"name", "tests", "failures", "errors", "time"},
        {"skipped", "timestamp", "hostname", "id"},
        {"properties", "testcase"},
    ),
    "properties": (set(), set(), {"property"}),
    "property": ({"name", "value"}, set(), set()),
    "testcase": ({"name", "classname", "time"}, set(), {"failure", "skipped"}),
    "failure": ({"message", "type"}, set(), set()),
    "skipped": ({"message"}, set(), set()),
}


def obeys_junit(element: ElementTree.Element) -> None:
    needed, allowed, children = JUNIT[element.tag]
    assert needed <= set(element.keys()) <= needed | allowed, element.tag
    for child in element:
        assert child.tag in children
        obeys_junit(child)
    if element.tag == "testsuite":
        assert [c.tag for c in element][:1] == ["properties"] and len(element.findall("properties")) == 1
        assert int(element.get("tests", "")) == len(element.findall("testcase"))
        assert int(element.get("failures", "")) == len(element.findall("testcase/failure"))
        assert int(element.get("skipped", "")) == len(element.findall("testcase/skipped"))
        assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d", element.get("timestamp", ""))
    if element.tag == "testsuites":
        for count in ("tests", "failures", "skipped"):
            assert int(element.get(count, "")) == sum(int(s.get(count, "")) for s in element)


def test_junit_of_several_reports(passed: dict[str, Any], failed: dict[str, Any]) -> None:
    passed["not_proven"] = ["logits: vllm is not installed", "something else"]
    root = ElementTree.fromstring(junit([passed, failed, passed]))
    obeys_junit(root)
    suites = {s.get("name"): s for s in root}
    assert len(suites) == len(root), "every suite has a name of its own"
    assert {
        f"{a}: tensors"
        for a in ("demo_model-Q4_K_M.gguf", "faulty-Q4_K_M.gguf", "demo_model-Q4_K_M.gguf (2)")
    } <= set(suites)
    wrong = [f.get("message", "") for f in suites["faulty-Q4_K_M.gguf: tensors"].iter("failure")]
    assert len(wrong) == 2 and any("measured 1.58 in layers.2.attn.k; gate <= 0.9" in m for m in wrong)
    assert suites["demo_model-Q4_K_M.gguf: logits"].findall(
        "testcase/skipped[@message='logits: vllm is not installed']"
    )
    assert suites["demo_model-Q4_K_M.gguf: not proven"].get("skipped") == "1"
    properties = {
        p.get("name"): p.get("value") for p in suites["faulty-Q4_K_M.gguf: logits"].iter("property")
    }
    assert (
        properties["lconvert"] == failed["lconvert"]
        and properties["cost: same top-1"] == "91.85% of 2048 tokens"
    )
    judged = sum(c["passed"] is not None for r in (passed, failed, passed) for c in r["checks"])
    assert int(root.get("tests", "")) == judged + 4


def test_junit_holds_any_text(failed: dict[str, Any]) -> None:
    for check in failed["checks"]:
        check |= {"name": f"\x00\x1b[0m <&> \"'{HOSTILE}\ufffe\ud800"}
    failed["candidate"] = HOSTILE
    text = junit([failed])
    obeys_junit(ElementTree.fromstring(text.encode()))
    assert "\\x00" in text and "\\x1b" in text and "\\xd800" in text


# --- model card -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    path = tmp_path_factory.mktemp("card") / "demo_model-Q4_K_M.gguf"
    lconvert.convert(DEMO, path, ftype="Q4_K_M")
    found: dict[str, Any] = json.loads(manifest_path(path).read_text())
    return found


def front(text: str) -> dict[str, Any]:
    assert text.startswith("---\n")
    head, _, rest = text[4:].partition("\n---\n")
    assert card.MARKER in rest
    found: dict[str, Any] = yaml.safe_load(head)
    return found


def test_card(manifest: dict[str, Any], passed: dict[str, Any]) -> None:
    source = "---\nlicense: apache-2.0\nlanguage:\n- en\ndatasets: secret\n---\n# Source"
    text = card.card(manifest, passed, source)
    meta = front(text)
    assert meta == {
        "license": "apache-2.0",
        "language": ["en"],
        "library_name": "gguf",
        "pipeline_tag": "text-generation",
        "quantized_by": "lconvert",
        "tags": ["gguf", "llama.cpp", "quantized", "lconvert"],
    }
    sha256 = manifest["files"]["demo_model-Q4_K_M.gguf"]["sha256"]
    assert f"| `demo_model-Q4_K_M.gguf` | Q4_K_M | 1.54 MB | 5.12 | `{sha256}` |" in text
    assert "with `ftype` `Q4_K_M`" in text and "| `Q4_K` | quantized | 19 |" in text
    assert (
        "## Proof: PASS" in text
        and "| against the original (cost), llama.cpp | 0.00879 (0.00798 … 0.00958) |" in text
    )
    assert "llama-cli -m ./demo_model-Q4_K_M.gguf" in text and "`model.safetensors`" in text


def test_card_names_the_base_model_only_where_it_is_known(
    manifest: dict[str, Any], passed: dict[str, Any]
) -> None:
    cached = "/home/u/.cache/huggingface/hub/models--org--Some-Model/snapshots/abc/model.safetensors"
    text = card.card({**manifest, "sources": {cached: {"sha256": "0", "size": 1}}})
    assert front(text)["base_model"] == "org/Some-Model"
    assert front(text)["base_model_relation"] == "quantized"
    assert (
        "[org/Some-Model](https://huggingface.co/org/Some-Model)" in text and "Nothing was validated" in text
    )
    named = {**passed, "reference": "org/Other"}
    assert front(card.card(manifest, named))["base_model"] == "org/Other"
    assert "base_model" not in front(card.card(manifest, {**passed, "reference": "models/x/y"}))


def test_card_of_several_artifacts(
    manifest: dict[str, Any], passed: dict[str, Any], failed: dict[str, Any]
) -> None:
    other = {**manifest, "files": {"faulty-Q4_K_M.gguf": {"sha256": "0" * 64, "size": 5}}}
    text = card.cards([(manifest, passed), (other, failed)])
    assert "# demo_model\n" in text and text.count(" | Q4_K_M | ") == 2
    assert (
        "## Proof of `demo_model-Q4_K_M.gguf`: PASS" in text
        and "## Proof of `faulty-Q4_K_M.gguf`: FAIL" in text
    )


def test_card_of_a_failed_artifact_says_so(manifest: dict[str, Any], failed: dict[str, Any]) -> None:
    failed["not_proven"] = ["logits: vllm is not installed"]
    text = card.section(failed)
    assert text.startswith("## Proof: FAIL\n") and "**tensors: Q4_K: worst block** failed: 1.58" in text
    assert "20 of 24 gates hold" in text and "- logits: vllm is not installed" in text
    assert text in card.card(manifest, failed)


def test_nothing_foreign_acts_in_a_card(manifest: dict[str, Any], failed: dict[str, Any]) -> None:
    for check in failed["checks"]:
        check |= {"tier": HOSTILE, "name": HOSTILE, "value": HOSTILE, "gate": HOSTILE}
    failed |= {"candidate": HOSTILE, "reference": HOSTILE, "not_proven": [HOSTILE], "lconvert": HOSTILE}
    manifest = copy.deepcopy(manifest)
    manifest["files"] = {HOSTILE: {"sha256": HOSTILE, "size": 1}}
    manifest["sources"] = {HOSTILE: {"sha256": None, "size": 1}}
    manifest["plan"]["options"] = {HOSTILE: HOSTILE}
    manifest["plan"]["losses"] = [{"kind": "rounded", "reason": HOSTILE}]
    text = card.card(manifest, failed, f"---\nlicense: {json.dumps(HOSTILE)}\nlanguage: [en]\n---\n")
    assert "license" not in front(text) and front(text)["language"] == ["en"]
    assert "\x1b" not in text and "\u202e" not in text
    tokens = list(flat(MarkdownIt("commonmark").enable("table").parse(text.split("---\n", 2)[2])))
    kinds = [t.type for t in tokens]
    assert [t.content.strip() for t in tokens if t.type.startswith("html")] == [card.MARKER]
    assert not {"link_open", "image", "em_open", "hr", "blockquote_open", "ordered_list_open"} & set(kinds)
    assert kinds.count("heading_open") == 5 and kinds.count("fence") == 1 and kinds.count("code_block") == 0
    plain = [t.content for t in tokens if t.type in ("text", "code_inline")]
    assert sum("a|b`c`](http://e.vil)<img" in p for p in plain) > 10, "it stands there as it is"
    rows = [n for n, k in enumerate(kinds) if k == "tr_open"]
    cells = [
        kinds[a:b].count("td_open") + kinds[a:b].count("th_open") for a, b in pairwise([*rows, len(kinds)])
    ]
    assert set(cells) == {3, 5}


def flat(tokens: Iterable[Token]) -> Iterator[Token]:
    """Markdown tokens with those inside of others, texts of one line joined."""
    for token in tokens:
        if token.children is None:
            yield token
            continue
        text = ""
        for child in token.children:
            if child.type in ("text", "text_special"):
                text += child.content
            else:
                yield child
        yield Token("text", "", 0, content=text)


@pytest.mark.parametrize(
    "source",
    [
        None,
        "",
        "# no front matter",
        "---\nlicense: [\n---\n",
        "---\nlicense: {a: 1}\n---\n",
        "---\n- 1\n---\n",
        "---",
    ],
)
def test_card_survives_any_source_card(manifest: dict[str, Any], source: str | None) -> None:
    text = card.card(manifest, None, source)
    assert "license" not in front(text) and "does not name one" in text


def test_a_card_of_somebody_else_is_never_overwritten(tmp_path: Path) -> None:
    ours = f"---\n---\n{card.MARKER}\n"
    assert card.write(tmp_path, ours, "m.gguf").name == "README.md"
    assert card.write(tmp_path, ours + "new", "m.gguf").read_text().endswith("new")
    (tmp_path / "README.md").write_text("mine")
    assert card.write(tmp_path, ours, "m.gguf").name == "m.gguf.card.md"
    assert (tmp_path / "README.md").read_text() == "mine"
    (tmp_path / "m.gguf.card.md").write_text("mine too")
    with pytest.raises(OutputError, match=r"m.gguf.card.md: exists and was not written by lconvert"):
        card.write(tmp_path, ours, "m.gguf")


# --- figures for people ---------------------------------------------------------------------------------------


def test_figures_are_written_with_sensible_precision() -> None:
    assert [show.number(x) for x in (0, 0.013449, 12.345, 1.2e-10, 0.0001, None, float("nan"))] == [
        "0", "0.0134", "12.3", "1.20e−10", "0.000100", "–", "–",
    ]  # fmt: skip
    assert [show.percent(x) for x in (1.0, 0.99999, 0.5)] == ["100.00 %", "99.99 %", "50.00 %"]
    assert [show.size(x) for x in (0, 999, 1538656, 4e9)] == ["0 B", "999 B", "1.54 MB", "4.00 GB"]
    assert [show.seconds(x) for x in (2e-6, 0.0418, 3.0)] == ["2.00 µs", "41.8 ms", "3.00 s"]
    assert show.interval([0.9158, 0.9334], show.percent) == "91.58 … 93.34 %"
    assert show.count(33718) == "33\u202f718" and show.visible("a\nb\x00") == "a↵b\\x00"


# --- trackers -------------------------------------------------------------------------------------------------


def test_metrics_are_flat_finite_and_named(passed: dict[str, Any], bench: dict[str, Any]) -> None:
    found = trackers.metrics(passed)
    assert found["cost/kld_mean"] == passed["details"]["logits"][0]["stats"]["kld"]["mean"]
    assert found["gates/failed"] == 0 and found["artifact/bits_per_weight"] == pytest.approx(5.11875)
    assert {
        "fidelity/kld_p99",
        "graph/kld_max",
        "tensors/relative_error/Q4_K",
        "layers/relative_error/0",
    } <= set(found)
    again = copy.deepcopy(passed["details"]["logits"][0]) | {"runtime": "vllm"}
    passed["details"]["logits"].append(again)
    assert trackers.metrics(passed)["cost/vllm/kld_mean"] == found["cost/kld_mean"]
    fast = trackers.bench_metrics(bench)
    assert fast["bench/demo_model-Q4_K_M/llama.cpp/decode_tokens_per_s"] > 0
    for name, value in (found | fast).items():
        assert re.fullmatch(r"[A-Za-z0-9_.\-/]+", name) and isinstance(value, float)
    hostile = {
        **passed,
        "candidate": HOSTILE,
        "details": {"tasks": [{"task": HOSTILE, "metric": "m", "value": 1.0}]},
    }
    assert all(re.fullmatch(r"[A-Za-z0-9_.\-/]+", n) for n in trackers.metrics(hostile))


def test_mlflow(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failed: dict[str, Any], bench: dict[str, Any]
) -> None:
    pytest.importorskip("mlflow", reason="mlflow is not installed (pip install mlflow-skinny)")
    from mlflow.tracking import MlflowClient

    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    uri = (tmp_path / "mlruns").as_uri()
    ids = trackers.mlflow([failed], [bench], uri)
    client = MlflowClient(tracking_uri=uri)
    run = client.get_run(ids[0])
    assert len(ids) == 2 and run.info.status == "FINISHED"
    assert run.data.metrics == pytest.approx(trackers.metrics(failed))
    assert run.data.params["candidate"] == failed["candidate"] and run.data.tags["verdict"] == "FAIL"
    assert {f.path for f in client.list_artifacts(ids[0])} == {"report.json", "report.html"}
    assert client.get_run(ids[1]).data.metrics == pytest.approx(trackers.bench_metrics(bench))
    with pytest.raises(OutputError, match="MLflow does not take the figures"):
        trackers.mlflow([failed], [], "nonsense://x")


def test_wandb_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failed: dict[str, Any]) -> None:
    pytest.importorskip("wandb", reason="wandb is not installed (pip install wandb)")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    (run,) = trackers.wandb([failed], [], "gate", folder=tmp_path)
    (written,) = tmp_path.rglob(f"run-{run}.wandb")
    for _ in range(60):  # another process writes it, after the run has ended on a busy machine
        if b"cost/kld_mean" in written.read_bytes():
            return
        time.sleep(0.5)
    pytest.fail(f"{written} has {written.stat().st_size} bytes and no figure")


@pytest.mark.parametrize("package", ["mlflow", "wandb"])
def test_a_missing_tracker_is_named(
    package: str, monkeypatch: pytest.MonkeyPatch, failed: dict[str, Any]
) -> None:
    for name in [m for m in sys.modules if m.split(".")[0] == package]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MissingPackageError, match=f"{package} is not installed: pip install {package}"):
        getattr(trackers, package)([failed], [], "x")


# --- the verb -------------------------------------------------------------------------------------------------


def run(*args: str | Path) -> tuple[int, str]:
    """Exit code and output, as `lconvert report` gives them; an intended failure is its exit code and message."""
    result = CliRunner().invoke(command, [str(a) for a in args], standalone_mode=False)
    if isinstance(result.exception, LconvertError):
        return result.exception.exit_code, str(result.exception)
    if result.exception is not None:
        raise result.exception
    return int(result.return_value), result.output


def test_report_writes_all_forms(tmp_path: Path) -> None:
    good, bad = FIXTURES / "report-pass.json", FIXTURES / "report-fail.json"
    out = {k: tmp_path / k for k in ("r.html", "j.xml", "m.md")}
    args = (
        good,
        bad,
        FIXTURES / "bench.json",
        "-o",
        out["r.html"],
        "--junit",
        out["j.xml"],
        "--markdown",
        out["m.md"],
    )
    code, said = run(*args, "--card", tmp_path)
    assert code == 0 and said.split() == [
        w for p in (*out.values(), tmp_path / "README.md") for w in ("wrote", str(p))
    ]
    assert (
        "3 artifacts" not in out["r.html"].read_text()
        and "2 artifacts, 1 failed" in out["r.html"].read_text()
    )
    obeys_junit(ElementTree.fromstring(out["j.xml"].read_text()))
    assert out["m.md"].read_text().count("## Proof of `") == 2
    assert front((tmp_path / "README.md").read_text())["library_name"] == "gguf"


def test_a_card_reads_the_manifest_beside_the_artifact(tmp_path: Path, manifest: dict[str, Any]) -> None:
    beside = manifest_path(tmp_path / "demo_model-Q4_K_M.gguf")
    beside.write_text(json.dumps(manifest))
    assert run(FIXTURES / "report-pass.json", "--card", tmp_path)[0] == 0
    assert "with `ftype` `Q4_K_M`" in (tmp_path / "README.md").read_text()
    for damaged in ("{", "[]", '{"schema": "lconvert.manifest/1", "files": []}'):
        beside.write_text(damaged)
        code, said = run(FIXTURES / "report-pass.json", "--card", tmp_path)
        assert code == 2 and "is not a manifest of lconvert; convert again" in said


def test_report_exit_codes(tmp_path: Path, passed: dict[str, Any]) -> None:
    out = tmp_path / "j.xml"
    passed |= {"exit_code": 3}
    (tmp_path / "part.json").write_text(json.dumps(passed))
    good, bad, part = FIXTURES / "report-pass.json", FIXTURES / "report-fail.json", tmp_path / "part.json"
    for files, code in (((good,), 0), ((good, part), 3), ((part, bad), 1)):
        assert run(*files, "--junit", out)[0] == 0
        assert run(*files, "--junit", out, "--fail-on-failed")[0] == code


@pytest.mark.parametrize(
    ("args", "says"),
    [
        ((FIXTURES / "bench.json",), "nothing to write"),
        ((FIXTURES / "bench.json", "--junit", "j.xml"), "only benchmarks were given"),
        (("absent.json", "-o", "r.html"), "absent.json: no such file"),
        ((FIXTURES / "report-pass.json", "--card", "absent"), "absent: is not a folder"),
        (("own.json", "-o", "own.json"), "own.json: is one of the reports"),
        (("own.json", "-o", "absent/r.html"), "its folder does not exist"),
    ],
)
def test_report_refuses(
    args: tuple[str | Path, ...], says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own.json").write_bytes((FIXTURES / "report-pass.json").read_bytes())
    code, message = run(*args)
    assert code == 2 and says in message
