"""Tasks, calibration and the needle search on an artifact and on its reference: `lconvert eval`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from lconvert.errors import OptionError
from lconvert.validators import calibration, needle, task_files, tasks
from lconvert.validators.report import Check, Report
from lconvert.validators.runtimes import DEFAULT, kind, open_runtime
from lconvert.validators.scoring import Scorer, Vocabulary
from lconvert.validators.tasks import Difference, TaskScore

_CONTEXT = 4096  # tokens, where the model allows more and nothing else is asked for

Progress = Callable[[str], None]


@dataclass(frozen=True)
class Where:
    """A model and how to run it. runtime: None for the one that its kind is for; python: see `open_runtime`."""

    path: Path
    runtime: str | None = None
    python: str | Path | None = None


@dataclass(frozen=True)
class Work:
    """What to ask of a model. haystack: text for the needle search, None for none."""

    tasks: Sequence[str | Path] = ()
    limit: int | None = None
    chat: bool = False
    allow_code: bool = False
    haystack: str | None = None


@dataclass(frozen=True)
class Answers:
    """What one model answered."""

    scores: Sequence[TaskScore]
    readings: Sequence[needle.Reading]
    info: Mapping[str, str]


def evaluate(
    artifact: Where,
    work: Work,
    *,
    reference: Where | None = None,
    context: int | None = None,
    threads: int | None = None,
    max_drop: Mapping[str, float] | None = None,
    progress: Progress = lambda what: None,
) -> Report:
    """Score the artifact, and the reference on the same documents; gates where `max_drop` sets them.

    max_drop: metric -> how much worse than the reference it may be, in its own unit; "" stands for every metric that
    counts right answers. context: tokens [default: both models', at most 4096].
    """
    limits = dict(max_drop or {})
    if limits and reference is None:
        raise OptionError("a largest drop needs a reference to drop from")
    if not work.tasks and work.haystack is None:
        raise OptionError("nothing to do: name a task, or ask for the needle search")
    if work.tasks:
        task_files.package()
    sides = [w for w in (reference, artifact) if w is not None]
    vocabularies = [Vocabulary.of(w.path) for w in sides]
    size = min(context or _CONTEXT, *(v.context for v in vocabularies))
    end = frozenset[int]().union(*(v.end for v in vocabularies))  # formats differ in how many ids they keep
    prompts: list[needle.Prompt] = []
    answers = []
    for where, vocabulary in zip(sides, vocabularies, strict=True):
        with _opened(where, replace(vocabulary, end=end), size, threads) as scorer:
            tell = partial(_prefixed, progress, where.path.name)
            scores = run(work, scorer, tell)
            if work.haystack is not None and not prompts:
                prompts = needle.prompts(work.haystack, scorer.count, size)
            answers.append(Answers(scores, needle.read(scorer, prompts, tell), scorer.runtime.info()))
    return _report(artifact, reference, answers, prompts, limits, size, work.limit)


def _prefixed(progress: Progress, name: str, what: str) -> None:
    progress(f"{name}: {what}")


def run(work: Work, scorer: Scorer, progress: Progress) -> list[TaskScore]:
    """The tasks' scores of one model."""
    if not work.tasks:
        return []
    return tasks.run(
        work.tasks,
        scorer.runtime,
        scorer.vocabulary,
        context=scorer.context,
        limit=work.limit,
        chat=work.chat,
        allow_code=work.allow_code,
        progress=progress,
    )


@contextmanager
def _opened(where: Where, vocabulary: Vocabulary, context: int, threads: int | None) -> Iterator[Scorer]:
    runtime = open_runtime(
        where.runtime or DEFAULT[kind(where.path)],
        where.path,
        context=context,
        threads=threads,
        python=where.python,
    )
    try:
        yield Scorer(runtime, vocabulary, context)
    finally:
        runtime.close()


def _report(
    artifact: Where,
    reference: Where | None,
    answers: Sequence[Answers],
    prompts: Sequence[needle.Prompt],
    limits: Mapping[str, float],
    context: int,
    limit: int | None,
) -> Report:
    ours, candidate = (answers[0] if reference else None), answers[-1]
    roles = ("reference", "candidate") if ours else ("candidate",)
    details: dict[str, Any] = {
        "settings": {"context": context, "limit": limit},
        "runtimes": [{"role": role, **a.info} for role, a in zip(roles, answers, strict=True)],
    }
    checks = [Check("tasks", "answered", f"{len(candidate.scores) + len(prompts)}", "all", True)]
    differences = tasks.compare(ours.scores, candidate.scores) if ours else []
    rows = [d.to_json() for d in differences] or [s.to_json() for s in candidate.scores]
    if rows:
        details["tasks"] = rows
    checks += [_check(d, limits) for d in differences]
    for metric in sorted(limits.keys() - {"", *(d.candidate.metric for d in differences)}):
        checks.append(
            Check("tasks", metric, "no task has this metric", f"no worse than {limits[metric]:g}", False)
        )
    labelled = {role: _choices(a.scores) for role, a in zip(roles, answers, strict=True)}
    if all(labelled.values()):
        found = {role: calibration.of_choices(choices) for role, choices in labelled.items()}
        details["calibration"] = {role: c.to_json() for role, c in found.items()}
        for role, c in found.items():
            checks.append(Check("calibration", f"{role}: ECE", f"{c.ece:.4f}", "", None, c.ece))
            checks.append(Check("calibration", f"{role}: Brier score", f"{c.brier:.4f}", "", None, c.brier))
    if prompts and ours:
        seen = needle.found(prompts, ours.readings, candidate.readings)
        details["needle"] = seen.to_json()
        checks.append(_share("agreement", seen.agreement))
        checks.append(_share("same text", seen.same_text))
        checks.append(_share("found by the candidate", seen.candidate))
        checks.append(_share("found by the reference", seen.reference))
    elif prompts:
        seen = needle.found(prompts, candidate.readings)
        details["needle"] = seen.to_json()
        checks.append(_share("found", seen.reference))
    return Report(
        str(reference.path) if reference else "", str(artifact.path), tuple(checks), details=details
    )


def _share(name: str, value: float | None) -> Check:
    return Check("needle", name, "" if value is None else f"{100 * value:.1f}%", "", None, value)


def _choices(scores: Sequence[TaskScore]) -> list[tasks.Choice]:
    """The labelled questions of all tasks, each task's once."""
    by_task = {s.task: s.choices for s in scores}
    return [c for choices in by_task.values() for c in choices]


def _check(d: Difference, limits: Mapping[str, float]) -> Check:
    """The difference against its limit, if it has one."""
    score = d.candidate
    limit = limits.get(score.metric, limits.get("") if score.hits else None)
    value = f"{d.difference:+.4g}" + ("" if d.stderr is None else f" ± {d.stderr:.2g}")
    return Check(
        "tasks",
        f"{score.task}: {score.metric}",
        value,
        "" if limit is None else f"no worse than {limit:g}",
        None if limit is None else d.drop <= limit,
        d.drop,
        limit,
    )
