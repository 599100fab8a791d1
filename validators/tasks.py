"""lm-eval tasks on an artifact, through any runtime: one adapter from lm-eval's model interface to ours.

A score keeps what every document contributed to it, so that two artifacts are compared document by document: the error
of a difference is far smaller than that of either score, and answers that flip are counted even where they cancel out
("Accuracy is Not All You Need", Dutta et al. 2024).
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lconvert.errors import InputError, LconvertError
from lconvert.validators.runtimes import Runtime
from lconvert.validators.scoring import Scorer, Vocabulary
from lconvert.validators.task_files import load, package, replaced, sandboxed

Progress = Callable[[str], None]
_NEW_TOKENS = 256  # lm-eval's default for max_gen_toks


@dataclass(frozen=True)
class Choice:
    """One multiple-choice question: ln p of every choice, and which one is right."""

    logprobs: tuple[float, ...]
    right: int


@dataclass(frozen=True)
class TaskScore:
    """One metric of one task.

    stderr: from the jackknife over documents, std(influence) / sqrt(n), where influence is how much more than the
    average each document moves the value (for a mean, its own value minus the mean). better: +1 where higher is
    better, else -1. hits: per document whether it was right, empty for metrics that are not 0 or 1.
    choices: of multiple-choice tasks, for validators/calibration.py.
    """

    task: str
    metric: str
    backend: str
    value: float
    n: int
    better: int
    influence: tuple[float, ...]
    documents: tuple[str, ...]
    hits: tuple[bool, ...] = ()
    choices: tuple[Choice, ...] = ()

    @property
    def stderr(self) -> float | None:
        return _stderr(np.array(self.influence))

    def to_json(self) -> dict[str, Any]:
        """A row of the report's details.tasks."""
        return {
            "task": self.task,
            "metric": self.metric,
            "backend": self.backend,
            "value": self.value,
            "stderr": self.stderr,
            "n": self.n,
        }


@dataclass(frozen=True)
class Difference:
    """A candidate's score against the reference's on the same documents.

    difference: candidate minus reference. stderr: of the difference, paired by document. worse, better: answers that
    turned wrong and right; p: how likely so uneven a split is among equals (McNemar's exact test), None without flips.
    """

    reference: TaskScore
    candidate: TaskScore
    difference: float
    stderr: float | None
    worse: int | None = None
    better: int | None = None
    p: float | None = None

    @property
    def drop(self) -> float:
        """How much worse the candidate is, in the metric's own unit; negative where it is better."""
        return -self.candidate.better * self.difference

    def to_json(self) -> dict[str, Any]:
        row = self.candidate.to_json() | {
            "reference_backend": self.reference.backend,
            "reference_value": self.reference.value,
            "reference_stderr": self.reference.stderr,
            "difference": self.difference,
            "difference_stderr": self.stderr,
        }
        return row | {"worse": self.worse, "better": self.better, "p": self.p}


def run(
    tasks: Sequence[str | Path],
    runtime: Runtime,
    vocabulary: Vocabulary,
    *,
    context: int | None = None,
    limit: int | None = None,
    chat: bool = False,
    allow_code: bool = False,
    progress: Progress = lambda what: None,
) -> list[TaskScore]:
    """Every metric of every task. tasks: YAML files, folders of them, or names that lm-eval knows.

    context: the runtime's, if smaller than the model's. limit: documents per task. chat: prompts through the chat
    template. Raises InputError where a task or its data cannot be had, MissingPackageError without lm_eval.
    """
    lm_eval = package()
    backend = runtime.info()["runtime"]
    scorer = Scorer(runtime, vocabulary, context)
    with _silence(), sandboxed():
        loaded = load(tasks, allow_code=allow_code)
        model = adapter(scorer, progress)
        try:
            result = lm_eval.evaluate(
                model,
                {"tasks": loaded, "groups": {}, "group_map": {}},
                limit=limit,
                bootstrap_iters=0,
                apply_chat_template=chat,
                confirm_run_unsafe_code=allow_code,
            )
        except Exception as e:  # templates, filters and metrics of a task fail in their own ways
            if isinstance(e, LconvertError | OSError | MemoryError):
                raise
            why = " ".join(str(e).split())[:300]
            raise InputError(f"{', '.join(loaded)}: the task fails ({type(e).__name__}: {why})") from None
        return [
            score
            for name, task in loaded.items()
            for score in _scores(name, task, result["samples"][name], backend)
        ]


def adapter(scorer: Scorer, progress: Progress = lambda what: None) -> Any:
    """An `lm_eval.api.model.LM` on our runtime."""
    from lm_eval.api.model import LM

    class Adapter(LM):  # type: ignore[misc,unused-ignore]
        def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
            found = scorer.scores(
                [scorer.request(*r.args) for r in requests], _count(progress, len(requests))
            )
            return [(s.logprob, s.greedy) for s in found]

        def loglikelihood_rolling(self, requests: Sequence[Any]) -> list[float]:
            windows = [scorer.windows(*r.args) for r in requests]
            flat = [w for group in windows for w in group]
            scores = iter(scorer.scores(flat, _count(progress, len(flat))))
            return [sum(next(scores).logprob for _ in group) for group in windows]

        def generate_until(self, requests: Sequence[Any]) -> list[str]:
            tell, out = _count(progress, len(requests)), []
            for r in requests:
                prompt, options = r.args
                out.append(scorer.generate(prompt, *_greedy(options)))
                tell(len(out))
            return out

        @property
        def tokenizer_name(self) -> str:
            return ""

        def chat_template(self, chat_template: bool | str = False) -> str | None:
            return scorer.vocabulary.tokenizer.chat_template

        def apply_chat_template(
            self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
        ) -> str:
            return render(scorer.vocabulary, chat_history, add_generation_prompt)

    return Adapter()


def render(vocabulary: Vocabulary, messages: list[dict[str, str]], generation: bool) -> str:
    """Messages through the artifact's chat template, in Jinja's sandbox."""
    from jinja2 import TemplateError
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    template = vocabulary.tokenizer.chat_template
    if not template:
        raise InputError("the artifact has no chat template; leave --chat out")

    def refuse(message: str) -> None:
        raise TemplateError(message)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    names = {**vocabulary.names, "raise_exception": refuse, "add_generation_prompt": generation}
    try:
        text = environment.from_string(template).render(messages=messages, **names)
    except TemplateError as e:
        raise InputError(f"the artifact's chat template fails on the task's messages ({e})") from None
    if generation:
        return text
    # A message that the model is to continue must not be closed by what the template puts after it.
    last = messages[-1]["content"].strip()
    return text[: text.rindex(last) + len(last)] if last in text else text


def _greedy(options: Mapping[str, Any]) -> tuple[int, list[str]]:
    """(tokens at most, texts that end it) of a generation request; InputError where it asks for sampling."""
    names = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
    most = next((int(options[n]) for n in names if n in options), _NEW_TOKENS)
    until = options.get("until") or []
    if options.get("do_sample") or float(options.get("temperature") or 0) > 0:
        raise InputError("the task samples (do_sample or temperature); runtimes are compared on greedy text")
    return most, [until] if isinstance(until, str) else list(until)


def _count(progress: Progress, total: int) -> Callable[[int], None]:
    return lambda done: progress(f"{done} of {total} requests")


@contextmanager
def _silence() -> Iterator[None]:
    """No logging below errors and no progress bars from lm_eval and datasets."""
    import datasets
    import lm_eval.api.task

    def plain(items: Iterable[Any], **options: Any) -> Iterable[Any]:
        return items

    bars = datasets.utils.logging.is_progress_bar_enabled()
    loggers = [logging.getLogger(n) for n in ("lm_eval", "datasets", "huggingface_hub", "httpx")]
    levels = [logger.level for logger in loggers]
    with ExitStack() as stack:
        stack.enter_context(replaced(lm_eval.api.task, "tqdm", plain))
        for logger, level in zip(loggers, levels, strict=True):
            stack.callback(logger.setLevel, level)
            logger.setLevel(logging.CRITICAL)
        if bars:
            stack.callback(datasets.enable_progress_bars)
            datasets.disable_progress_bars()
        yield


def _scores(name: str, task: Any, samples: Sequence[Mapping[str, Any]], backend: str) -> Iterator[TaskScore]:
    """One score for every metric and filter of a task, from its documents' results."""
    filters = list(dict.fromkeys(s["filter"] for s in samples))
    for kind in filters:
        rows = [s for s in samples if s["filter"] == kind]
        documents = tuple(str(s["doc_hash"]) for s in rows)
        choices = tuple(_choices(rows)) if task.OUTPUT_TYPE == "multiple_choice" else ()
        for metric in rows[0]["metrics"]:
            items = [s[metric] for s in rows]
            value, influence = _jackknife(task.aggregation()[metric], items)
            binary = all(isinstance(x, int | float | np.number) and x in (0, 1) for x in items)
            yield TaskScore(
                task=name,
                metric=metric if len(filters) == 1 else f"{metric},{kind}",
                backend=backend,
                value=value,
                n=len(rows),
                better=1 if task.higher_is_better().get(metric, True) else -1,
                influence=tuple(influence.tolist()),
                documents=documents,
                hits=tuple(bool(x) for x in items) if binary else (),
                choices=choices,
            )


def _choices(rows: Iterable[Mapping[str, Any]]) -> Iterator[Choice]:
    """Questions with exactly one right choice. Tasks that score choices without their context as well list those
    after the others; they are left out."""
    for row in rows:
        texts = [str(a[1]) for a in row["arguments"] if a[0] == row["arguments"][0][0]]
        right = row["target"]
        if isinstance(right, str):
            found = [i for i, t in enumerate(texts) if t.strip() == right.strip()]
            right = found[0] if len(found) == 1 else None
        if isinstance(right, int | np.integer) and 0 <= right < len(texts):
            logprobs = tuple(float(r[0]) for r in row["filtered_resps"][: len(texts)])
            yield Choice(logprobs, int(right))


def _jackknife(
    aggregate: Callable[[list[Any]], float], items: list[Any]
) -> tuple[float, NDArray[np.float64]]:
    """The value, and (n-1) (value - value without document i) for every i."""
    n, value = len(items), float(aggregate(items))
    if n < 2:
        return value, np.zeros(n)
    if all(isinstance(x, int | float | np.number) for x in items):
        x = np.array(items, np.float64)
        if math.isclose(value, float(x.mean()), rel_tol=1e-12, abs_tol=1e-12):
            return value, x - x.mean()
    without = np.array([float(aggregate(items[:i] + items[i + 1 :])) for i in range(n)])
    return value, (n - 1) * (value - without)


def _stderr(influence: NDArray[np.float64]) -> float | None:
    n = len(influence)
    return float(np.std(influence, ddof=1)) / math.sqrt(n) if n > 1 else None


def compare(reference: Sequence[TaskScore], candidate: Sequence[TaskScore]) -> list[Difference]:
    """The candidate's scores against the reference's, which `run` made of the same tasks and limit."""
    ours = {(s.task, s.metric): s for s in reference}
    return [_difference(ours[s.task, s.metric], s) for s in candidate]


def _difference(reference: TaskScore, candidate: TaskScore) -> Difference:
    if reference.documents != candidate.documents:
        raise InputError(f"{candidate.task}: the reference and the candidate answered different documents")
    paired = np.array(candidate.influence) - np.array(reference.influence)
    difference = candidate.value - reference.value
    if not reference.hits or not candidate.hits:
        return Difference(reference, candidate, difference, _stderr(paired))
    pairs = list(zip(reference.hits, candidate.hits, strict=True))
    worse, better = pairs.count((True, False)), pairs.count((False, True))
    p = mcnemar(worse, better)
    if candidate.better < 0:
        worse, better = better, worse
    return Difference(reference, candidate, difference, _stderr(paired), worse, better, p)


def mcnemar(a: int, b: int) -> float | None:
    """Two-sided exact probability of a split as uneven as a : b among a + b fair coins."""
    n = a + b
    if not n:
        return None
    return min(1.0, 2 * sum(math.comb(n, k) for k in range(min(a, b) + 1)) / (1 << n))
