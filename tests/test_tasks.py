"""lm-eval tasks through our runtimes: the adapter against lm-eval's own, runtime against runtime, and what is refused."""

from __future__ import annotations

import json
import math
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result

import lconvert
from lconvert.cli.eval import command
from lconvert.errors import InputError, LconvertError, OptionError
from lconvert.validators import task_files, tasks
from lconvert.validators.runtimes import Runtime, open_runtime
from lconvert.validators.scoring import Request, Score, Scorer, Vocabulary, cut, score
from lconvert.validators.tasks import TaskScore, compare, mcnemar, run
from tests.conftest import DEMO, ROOT

pytest.importorskip("lm_eval", reason="lm_eval is not installed")
TASKS = ROOT / "examples" / "tasks"
LIMIT = 24  # documents of a task
EXACT = 1e-4  # nats by which a request may differ from lm-eval's own back end
SINGLE = 2e-7  # and relatively: lm-eval adds up in fp32, whose steps are 1.2e-4 at a thousand nats


@pytest.fixture(scope="module")
def vocabulary() -> Vocabulary:
    return Vocabulary.of(DEMO)


@pytest.fixture(scope="module")
def demo() -> Iterator[Runtime]:
    runtime = open_runtime("transformers", DEMO, threads=1)
    yield runtime
    runtime.close()


@pytest.fixture(scope="module")
def scorer(demo: Runtime, vocabulary: Vocabulary) -> Scorer:
    return Scorer(demo, vocabulary)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo model as GGUF files."""
    out = tmp_path_factory.mktemp("gguf")
    for ftype in ("F32", "Q8_0", "Q4_K_M"):
        lconvert.convert(DEMO, out / f"{ftype}.gguf", ftype=ftype)
    return out


@pytest.fixture(scope="module")
def reference(demo: Runtime, vocabulary: Vocabulary) -> dict[tuple[str, str], TaskScore]:
    """The shipped tasks through transformers."""
    return {(s.task, s.metric): s for s in run([TASKS], demo, vocabulary, limit=LIMIT)}


@pytest.fixture(scope="module")
def hflm() -> Any:
    """lm-eval's own back end on the same folder."""
    pytest.importorskip(
        "accelerate", reason="accelerate, which lm-eval's own back end needs, is not installed"
    )
    import torch
    from lm_eval.models.huggingface import HFLM

    torch.set_num_threads(1)
    return HFLM(
        pretrained=str(DEMO),
        device="cpu",
        dtype="float32",
        batch_size=1,
        attn_implementation="eager",
        logits_cache=False,  # it exchanges the answers of requests whose ids are equal
    )


def instances(kind: str, arguments: list[tuple[Any, ...]]) -> list[Any]:
    from lm_eval.api.instance import Instance

    return [Instance(request_type=kind, doc={}, arguments=a, idx=i) for i, a in enumerate(arguments)]  # type: ignore[arg-type]


LONG = " ".join(f"{n} ladies and {n + 1} gentlemen were at the ball in Bath," for n in range(60))

PAIRS = [
    ("Sir Walter Elliot, of Kellynch Hall,", " in Somersetshire"),
    ("Sir Walter Elliot, of Kellynch Hall, ", "in Somersetshire"),
    ("Sir Walter Elliot, of Kellynch Hall,  \n", "in Somersetshire"),
    ("", "It is a truth universally acknowledged"),
    ("", "<|begin_of_text|>It is a truth"),
    ("<|begin_of_text|>It is a", " truth"),
    ("It is a", " truth"),
    ("It is a", " lie"),
    ("It is a", " truth universally acknowledged"),
    ("She was <|eot_id|> in", " the room"),
    ("un", "happy"),
    ("naïve café — “", "Œuvre” 🦙"),
    (LONG, " and then they danced"),
    (LONG, " and then"),
    ("Emma", LONG[:800]),
    ("she could not", " have"),
    ("the", "\n\n"),
]


def test_loglikelihoods_are_those_of_lm_eval(scorer: Scorer, hflm: Any) -> None:
    pairs = [*PAIRS, ("Mrs. Bennet was", scorer.generate("Mrs. Bennet was", 2, []))]
    requests = instances("loglikelihood", pairs)
    ours = tasks.adapter(scorer).loglikelihood(requests)
    theirs = hflm.loglikelihood(requests, disable_tqdm=True)
    for pair, a, b in zip(pairs, ours, theirs, strict=True):
        assert a[0] == pytest.approx(b[0], rel=SINGLE, abs=EXACT), pair
        assert a[1] == b[1], pair
    assert {greedy for _, greedy in ours} == {False, True}


def test_rolling_loglikelihoods_are_those_of_lm_eval(scorer: Scorer, hflm: Any) -> None:
    """Texts of one window, of exactly one, and of several with a last window that is filled up."""
    texts = ["Emma", "It is a truth universally acknowledged, that a single man", LONG, LONG * 2, "\n"]
    texts += [row["text"] for row in rows("prose")[:5]]
    requests = instances("loglikelihood_rolling", [(t,) for t in texts])
    ours = tasks.adapter(scorer).loglikelihood_rolling(requests)
    theirs = hflm.loglikelihood_rolling(requests, disable_tqdm=True)
    assert max(scorer.count(t) for t in texts) > 2 * scorer.context
    for text, a, b in zip(texts, ours, theirs, strict=True):
        assert a == pytest.approx(b, rel=SINGLE, abs=EXACT), text[:40]


def test_generations_are_those_of_lm_eval(scorer: Scorer, hflm: Any) -> None:
    options: list[tuple[str, dict[str, Any]]] = [
        ("It is a truth universally", {"until": ["\n"], "max_gen_toks": 30}),
        ("It is a truth universally", {"until": [",", "."], "max_gen_toks": 30}),
        ("Mrs. Bennet was", {"until": "and", "max_gen_toks": 40, "do_sample": False}),
        (LONG, {"until": ["\n"], "max_gen_toks": 20}),
        ("<|begin_of_text|>She", {"until": [], "max_gen_toks": 5}),
        ("She ", {"until": ["zzz"], "max_new_tokens": 17, "temperature": 0.0}),
    ]
    ours = tasks.adapter(scorer).generate_until(instances("generate_until", options))
    theirs = hflm.generate_until(instances("generate_until", options), disable_tqdm=True)
    assert ours == theirs
    assert all(ours)


def rows(name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (TASKS / f"{name}.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("name", ["endings", "next_word", "prose"])
def test_scores_are_those_of_lm_eval(name: str, reference: dict[Any, TaskScore], hflm: Any) -> None:
    """Whole tasks: requests one by one, the values, and the standard errors that lm-eval has in closed form."""
    import lm_eval

    task = task_files.load([TASKS / f"{name}.yaml"])
    result = lm_eval.evaluate(
        hflm, {"tasks": task, "groups": {}, "group_map": {}}, limit=LIMIT, bootstrap_iters=1
    )
    figures = {k.split(",")[0]: v for k, v in result["results"][name].items() if "," in k}
    mine = {metric: s for (n, metric), s in reference.items() if n == name}
    assert mine
    for metric, s in mine.items():
        assert s.value == pytest.approx(figures[metric], rel=1e-5)
        if name != "prose":
            assert s.stderr == pytest.approx(figures[f"{metric}_stderr"])
    for sample, choice in zip(result["samples"][name], next(iter(mine.values())).choices, strict=False):
        assert choice.right == sample["target"]
        np.testing.assert_allclose(choice.logprobs, [r[0] for r in sample["filtered_resps"]], atol=EXACT)


def test_the_shipped_tasks_tell_models_from_chance(
    reference: dict[Any, TaskScore], demo: Runtime, vocabulary: Vocabulary
) -> None:
    endings = reference["endings", "acc"]
    assert endings.value - 3 * (endings.stderr or 1) > 0.25
    (found,) = run([TASKS / "next_word.yaml"], demo, vocabulary)
    answers = [r["word"] for r in rows("next_word")]
    assert found.n == len(answers)
    assert found.value - 3 * (found.stderr or 1) > max(answers.count(w) for w in answers) / found.n
    assert 1.5 < reference["prose", "bits_per_byte"].value < 2.0


def test_the_shipped_data_are_what_the_script_makes(tmp_path: Path) -> None:
    import runpy

    main = runpy.run_path(str(TASKS / "make_data.py"))["main"]
    main(str(ROOT / "validators" / "text" / "excerpt.txt"), str(tmp_path))
    for name in ("endings", "next_word", "prose"):
        assert (tmp_path / f"{name}.jsonl").read_bytes() == (TASKS / f"{name}.jsonl").read_bytes()


# --- the same task through other runtimes


def same(reference: dict[Any, TaskScore], found: list[TaskScore], closer: float) -> None:
    """Within the standard error of one score, and far closer: `closer` is the largest difference itself."""
    for d in compare([reference[s.task, s.metric] for s in found], found):
        limit = d.reference.stderr
        assert limit is not None and abs(d.difference) <= limit, d.candidate.metric
        assert abs(d.difference) <= closer * abs(d.reference.value), d.candidate.metric


@pytest.mark.parametrize(("ftype", "closer"), [("F32", 1e-5), ("Q8_0", 0.04)])
def test_llama_cpp_scores_the_same(
    ftype: str, closer: float, folder: Path, reference: dict[Any, TaskScore]
) -> None:
    path = folder / f"{ftype}.gguf"
    runtime = open_runtime("llama.cpp", path, threads=1)
    try:
        found = run([TASKS], runtime, Vocabulary.of(path), limit=LIMIT)
    finally:
        runtime.close()
    assert {s.backend for s in found} == {"llama.cpp"}
    assert len(found) == len(reference)
    same(reference, found, closer)


def test_the_dequantized_artifact_scores_the_same(
    folder: Path, reference: dict[Any, TaskScore], demo: Runtime, vocabulary: Vocabulary
) -> None:
    path = folder / "Q8_0.gguf"
    runtime = open_runtime("dequantized", path, threads=1)
    try:
        found = run([TASKS / "endings.yaml", TASKS / "prose.yaml"], runtime, Vocabulary.of(path), limit=LIMIT)
    finally:
        runtime.close()
    same(reference, found, 0.02)


def test_vllm_scores_the_same(reference: dict[Any, TaskScore], vocabulary: Vocabulary) -> None:
    python = os.environ.get("LCONVERT_VLLM_PYTHON") or ROOT / ".venv-vllm" / "bin" / "python"
    if not Path(python).is_file():
        pytest.skip("vLLM's environment is missing: LCONVERT_VLLM_PYTHON and .venv-vllm name none")
    runtime = open_runtime("vllm", DEMO, threads=1, python=python, timeout=300)
    try:
        found = run([TASKS], runtime, vocabulary, limit=LIMIT)
    finally:
        runtime.close()
    assert {s.backend for s in found} == {"vllm"}
    assert len(found) == len(reference)
    same(reference, found, 1e-4)


# --- scoring


class Toy:
    """Logits by a rule: after token t comes t+1 with 0.9 of 10; counts its forward passes."""

    def __init__(self) -> None:
        self.passes: list[list[int]] = []

    def __call__(self, ids: list[int]) -> np.ndarray:
        self.passes.append(ids)
        p = np.full((len(ids), 10), 0.1 / 9, np.float32)
        p[np.arange(len(ids)), (np.array(ids) + 1) % 10] = 0.9
        return np.log(p)


def test_score_by_hand() -> None:
    right, wrong = math.log(0.9), math.log(0.1 / 9)
    found = score(Toy(), [Request((1,), (2, 3)), Request((1, 2), (3, 3)), Request((5,), ())], 100)
    assert found[0] == Score(pytest.approx(2 * right), True)
    assert found[1] == Score(pytest.approx(right + wrong), False)
    assert found[2] == Score(0.0, True)


def test_requests_that_begin_alike_share_a_pass() -> None:
    toy = Toy()
    requests = [
        Request((1, 2), (3,)),
        Request((1, 2), (7,)),
        Request((1, 2, 3), (4, 5, 6)),
        Request((1,), (2, 3)),
        Request((2,), (3, 4)),
    ]
    found = score(toy, requests, 100)
    assert toy.passes == [[2, 3], [1, 2, 3, 4, 5]]
    assert found == [score(Toy(), [r], 100)[0] for r in requests]


def test_long_contexts_lose_their_beginning() -> None:
    toy = Toy()
    score(toy, [Request(tuple(range(9)), (9,))], 4)
    assert toy.passes == [[5, 6, 7, 8]]
    with pytest.raises(InputError, match="has 5 tokens, more than the context of 4"):
        score(toy, [Request((1,), (2, 3, 4, 5, 6))], 4)


def test_tokens_outside_of_the_vocabulary() -> None:
    with pytest.raises(InputError, match="token 12 of the text is outside of the runtime's vocabulary of 10"):
        score(Toy(), [Request((1,), (12,))], 4)


def test_windows_score_every_token_once(scorer: Scorer) -> None:
    small = Scorer(scorer.runtime, scorer.vocabulary, 32)
    for text in ("", "Emma", LONG[:120], LONG[:600]):
        ids = small.encode(text)
        found = small.windows(text)
        assert [t for w in found for t in w.continuation] == ids
        assert all(len(w.context) + len(w.continuation) <= 33 for w in found)
        assert all(len(w.context) + len(w.continuation) == 33 for w in found[1:])


def test_generation_needs_room(scorer: Scorer) -> None:
    with pytest.raises(InputError, match="512 tokens are to be generated in a context of 512"):
        scorer.generate("Emma", 512, [])


def test_cut() -> None:
    assert cut("one, two. three", [".", ","]) == "one"
    assert cut("one", ["", "x"]) == "one"


def test_an_artifact_without_a_tokenizer(tmp_path: Path) -> None:
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).symlink_to(DEMO / name)
    with pytest.raises(InputError, match="has no tokenizer, so no text can be scored with it"):
        Vocabulary.of(tmp_path)


# --- statistics


def made(values: list[float], **options: Any) -> TaskScore:
    x = np.array(values)
    binary = all(v in (0, 1) for v in values)
    defaults: dict[str, Any] = {
        "task": "t",
        "metric": "acc",
        "backend": "b",
        "value": float(x.mean()),
        "n": len(x),
        "better": 1,
        "influence": tuple((x - x.mean()).tolist()),
        "documents": tuple(str(i) for i in range(len(x))),
        "hits": tuple(v == 1 for v in values) if binary else (),
    }
    return TaskScore(**defaults | options)


def test_paired_difference_by_hand() -> None:
    a, b = made([1, 1, 1, 0, 0, 1]), made([1, 0, 1, 1, 0, 0])
    (d,) = compare([a], [b])
    difference = np.array([0, -1, 0, 1, 0, -1])
    assert d.difference == pytest.approx(difference.mean())
    assert d.stderr == pytest.approx(difference.std(ddof=1) / math.sqrt(6))
    assert (d.worse, d.better, d.p) == (2, 1, 1.0)
    assert d.drop == pytest.approx(1 / 6)


def test_lower_may_be_better() -> None:
    (d,) = compare([made([3.0, 4.0], better=-1)], [made([3.5, 4.5], better=-1)])
    assert (d.drop, d.worse, d.p) == (0.5, None, None)
    assert d.stderr == pytest.approx(0)


def test_mcnemar_by_hand() -> None:
    assert mcnemar(0, 0) is None
    assert mcnemar(0, 5) == 2 / 32
    assert mcnemar(5, 1) == mcnemar(1, 5) == pytest.approx(2 * (1 + 6) / 64)
    assert mcnemar(3, 3) == 1.0
    assert mcnemar(2000, 2000) == 1.0


def test_other_documents_are_not_compared() -> None:
    with pytest.raises(InputError, match="t: the reference and the candidate answered different documents"):
        compare([made([1, 0])], [made([1, 0], documents=("x", "y"))])


def test_the_jackknife_is_the_closed_form_for_ratios() -> None:
    """bits_per_byte is a ratio of sums; its delta-method error must come out."""
    from lm_eval.api.metrics import bits_per_byte

    rng = np.random.default_rng(1)
    weight = rng.integers(50, 500, 400).astype(float)
    loglik = -weight * rng.normal(1.2, 0.1, 400)
    items = list(zip(loglik.tolist(), weight.tolist(), strict=True))
    value, influence = tasks._jackknife(bits_per_byte, items)
    ratio = loglik.sum() / weight.sum()
    assert value == pytest.approx(-ratio / math.log(2))
    linear = -(loglik - ratio * weight) / weight.mean() / math.log(2)
    assert tasks._stderr(influence) == pytest.approx(linear.std(ddof=1) / 20, rel=0.01)


# --- task files


def task_file(folder: Path, text: str, name: str = "t.yaml") -> Path:
    base = (TASKS / "endings.yaml").read_text().replace("endings.jsonl", str(TASKS / "endings.jsonl"))
    path = folder / name
    path.write_text(base + text)
    return path


REFUSED = {
    "process_docs: !function code.run\n": "!function runs a Python file beside the task; --allow-task-code permits it",
    "metric_list: [{metric: seqeval}]\n": "the metric seqeval is none of lm_eval's own and would be downloaded and run",
    "metric_list: [{metric: acc, hf_evaluate: true}]\n": "the metric acc is none of lm_eval's own",
    "dataset_path: pandas\n": "pandas data may hold code",
    "dataset_kwargs: {data_files: {test: nothing.jsonl}}\n": "names the data file nothing.jsonl, which is not beside it",
    "include: t.yaml\n": "includes itself",
    "include: other.yaml\n": "other.yaml: cannot be read",
    "x: [\n": "no sound YAML",
}


@pytest.mark.parametrize("text", REFUSED)
def test_refused_task_files(text: str, tmp_path: Path) -> None:
    with pytest.raises(InputError) as e:
        task_files.load([task_file(tmp_path, text)])
    assert REFUSED[text] in str(e.value)
    assert str(tmp_path) in str(e.value)


def test_code_runs_when_it_is_allowed(tmp_path: Path, demo: Runtime, vocabulary: Vocabulary) -> None:
    (tmp_path / "code.py").write_text("def run(docs):\n    return docs.select(range(3))\n")
    path = task_file(tmp_path, "process_docs: !function code.run\n")
    found = run([path], demo, vocabulary, allow_code=True)
    assert {s.n for s in found} == {3}


def test_templates_run_in_a_sandbox(tmp_path: Path, demo: Runtime, vocabulary: Vocabulary) -> None:
    flag = tmp_path / "flag"
    attack = "{{ cycler.__init__.__globals__.os.system('touch " + str(flag) + "') }}"
    path = task_file(tmp_path, f'doc_to_text: "{attack}"\n')
    with pytest.raises(InputError, match=r"endings: .*\(SecurityError: "):
        run([path], demo, vocabulary, limit=1)
    assert not flag.exists()


def test_no_task_in_a_file_or_folder(tmp_path: Path) -> None:
    path = tmp_path / "t.yaml"
    with pytest.raises(InputError, match=r"t\.yaml: cannot be read \(No such file"):
        task_files.load([path])
    path.write_text("- 1\n")
    with pytest.raises(InputError, match="a mapping is expected"):
        task_files.load([path])
    path.write_text("output_type: multiple_choice\n")
    with pytest.raises(InputError, match="neither the key task nor group"):
        task_files.load([path])
    with pytest.raises(InputError, match="holds no task file"):
        task_files.load([tmp_path])


def test_an_include_is_merged_and_is_no_task_of_its_own(tmp_path: Path) -> None:
    text = (TASKS / "endings.yaml").read_text().replace("endings.jsonl", str(TASKS / "endings.jsonl"))
    (tmp_path / "base.yaml").write_text(text.replace("task: endings\n", ""))
    (tmp_path / "mine.yaml").write_text("include: base.yaml\ntask: mine\n")
    assert list(task_files.load([tmp_path])) == ["mine"]


def test_unknown_name() -> None:
    with pytest.raises(
        OptionError, match=r"hellaswagg: neither a task file nor an lm-eval task; did you mean hellaswag"
    ):
        task_files.load(["hellaswagg"])


def test_data_out_of_reach_is_said_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    path = task_file(tmp_path, "dataset_path: lconvert/no-such-data\ndataset_kwargs: {}\n")
    start = time.monotonic()
    with pytest.raises(InputError, match="endings: its data is neither in the local cache nor within reach"):
        task_files.load([path])
    assert time.monotonic() - start < 20


def test_sampling_is_refused(scorer: Scorer) -> None:
    request = instances("generate_until", [("Emma", {"until": [], "do_sample": True})])
    with pytest.raises(InputError, match="the task samples"):
        tasks.adapter(scorer).generate_until(request)


def test_chat_prompts_are_those_of_transformers(vocabulary: Vocabulary) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(DEMO)
    talk = [{"role": "user", "content": "Where is Bath?"}, {"role": "assistant", "content": "In Somerset."}]
    for messages, generation in ((talk[:1], True), (talk, False)):
        expected = tokenizer.apply_chat_template(
            messages,
            tokenize=False,
            add_generation_prompt=generation,
            continue_final_message=not generation,
        )
        assert tasks.render(vocabulary, messages, generation) == expected


def test_a_task_through_the_chat_template(demo: Runtime, vocabulary: Vocabulary) -> None:
    seen: list[str] = []

    class Watching:
        def __getattr__(self, name: str) -> Any:
            return getattr(demo, name)

        def tokenize(self, text: str, *, special: bool) -> list[int]:
            seen.append(text)
            return demo.tokenize(text, special=special)

    run([TASKS / "endings.yaml"], Watching(), vocabulary, limit=1, chat=True)
    assert all(t.startswith("<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\n") for t in seen)


# --- the command


def invoke(*arguments: str | Path) -> Result:
    return CliRunner().invoke(command, [str(a) for a in arguments], standalone_mode=False)


def test_command_with_a_reference(folder: Path, tmp_path: Path) -> None:
    report = tmp_path / "r.json"
    arguments = [
        folder / "Q4_K_M.gguf",
        "--reference",
        DEMO,
        "--task",
        TASKS / "endings.yaml",
        "--limit",
        "30",
    ]
    done = invoke(*arguments, "--threads", "1", "--max-drop", "0.2", "--report", report)
    assert done.return_value == 0, done.output
    assert done.output.splitlines()[0] == f"{folder / 'Q4_K_M.gguf'} against {DEMO}"
    assert done.output.splitlines()[-1] == "PASS"
    content = json.loads(report.read_text())
    row = content["details"]["tasks"][0]
    assert {
        "task",
        "metric",
        "backend",
        "value",
        "stderr",
        "reference_value",
        "reference_stderr",
    } <= row.keys()
    assert (row["n"], row["backend"], row["reference_backend"]) == (30, "llama.cpp", "transformers")
    found = content["details"]["calibration"]
    assert sum(b["count"] for b in found["reference"]["bins"]) == found["candidate"]["n"] == 30
    assert content["exit_code"] == 0


def test_command_fails_on_a_drop(folder: Path, tmp_path: Path) -> None:
    """A model whose wrong artifact is certain to be worse: its perplexity may not rise by anything."""
    arguments = [
        folder / "Q4_K_M.gguf",
        "--reference",
        DEMO,
        "--task",
        TASKS / "prose.yaml",
        "--threads",
        "1",
    ]
    done = invoke(*arguments, "--max-drop", "bits_per_byte=0")
    assert done.return_value == 1, done.output
    assert "FAIL prose: bits_per_byte: worse by 0.00" in done.output
    assert "no worse than 0 is allowed" in done.output
    assert done.output.splitlines()[-1] == "FAIL"


def test_command_alone(folder: Path) -> None:
    done = invoke(folder / "F32.gguf", "--task", TASKS / "next_word.yaml", "--limit", "5", "--json")
    assert done.return_value == 0, done.output
    (row,) = json.loads(done.output)["details"]["tasks"]
    assert (row["task"], row["metric"], row["n"]) == ("next_word", "exact_match", 5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "nothing to do: name a task, or ask for the needle search"),
        (("--task", "x.yaml", "--max-drop", "0.1"), "a largest drop needs a reference"),
        (("--task", "x.yaml", "--max-drop", "acc=-1"), "--max-drop acc=-1: expected a drop such as 0.02"),
        (("--task", "x.yaml", "--reference", "nowhere"), "nowhere: no such file or folder"),
    ],
)
def test_command_refuses(arguments: tuple[str, ...], message: str) -> None:
    done = invoke(DEMO, *arguments)
    assert isinstance(done.exception, LconvertError)
    assert message in str(done.exception)


def test_a_limit_for_a_metric_that_no_task_has(folder: Path) -> None:
    arguments = [
        "--reference",
        DEMO,
        "--task",
        TASKS / "endings.yaml",
        "--limit",
        "2",
        "--max-drop",
        "f1=0.1",
    ]
    done = invoke(folder / "F32.gguf", *arguments)
    assert done.return_value == 1
    assert done.output.splitlines()[-2:] == [
        "FAIL f1: no task has this metric, no worse than 0.1 is allowed",
        "FAIL",
    ]


@pytest.mark.parametrize("name", ["gguf", "hf", "onnx"])
def test_vocabulary_of_every_kind(name: str, folder: Path, vocabulary: Vocabulary, tmp_path: Path) -> None:
    for file in ("config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        shutil.copy(DEMO / file, tmp_path / file)
    path = {"gguf": folder / "F32.gguf", "hf": DEMO, "onnx": tmp_path / "model.onnx"}[name]
    found = Vocabulary.of(path)
    assert (found.prefix, found.suffix, found.start, found.context) == ((2042,), (), 2042, 512)
    assert found.end <= vocabulary.end and 2043 in found.end
    assert found.names["eos_token"] == "<|end_of_text|>"
    assert found.decode([2042, 1408, 364, 258]) == "It is a"


def test_an_onnx_file_without_its_folder(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"config\.json beside it must say how many tokens"):
        Vocabulary.of(tmp_path / "model.onnx")
