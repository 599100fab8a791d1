"""The figures of reports and benchmarks in an experiment tracker: MLflow or Weights & Biases.

Both get the same flat names, so that runs of different artifacts can be compared: `cost/kld_mean`, `fidelity/kld_p99`,
`tensors/bits_per_weight`, `gates/failed`, `bench/LABEL/decode_tokens_per_s` (docs/report.md lists them). A report is a run;
a benchmark document is a run. The JSON and the HTML go with it as artifacts.
"""

from __future__ import annotations

import math
import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from lconvert.errors import MissingPackageError, OutputError
from lconvert.validators import documents, show
from lconvert.validators.html import html

_EXPERIMENT = "lconvert"
_LONGEST = 500  # characters of a parameter, which both trackers take
_BATCH = 500  # metrics that MLflow takes at once

#: name of a metric below its measure -> path into STATS
_STATS: Mapping[str, tuple[str, ...]] = {
    **{f"kld_{k}": ("kld", k) for k in ("mean", "median", "p90", "p99", "p999", "max")},
    "same_top1": ("same_top1",),
    "flips": ("flips",),
    "ppl_reference": ("ppl", "reference"),
    "ppl_candidate": ("ppl", "candidate"),
    "ppl_ratio": ("ppl", "ratio"),
    "ppl_log_ratio": ("ppl", "log_ratio"),
    "p_correct_rms_delta": ("p_correct", "rms_delta"),
    "max_logit_difference": ("max_logit_difference",),
    "max_logprob_difference": ("max_logprob_difference",),
    "drift_ratio": ("drift", "ratio"),
}

#: name of a metric -> path into a report's details
_DETAILS: Mapping[str, tuple[str, ...]] = {
    "artifact/bytes": ("artifact", "bytes"),
    "artifact/bits_per_weight": ("artifact", "bits_per_weight"),
    "tensors/exact": ("tensors", "exact"),
    "tensors/max_difference": ("tensors", "max_difference"),
    "chat/different": ("chat", "different"),
    "greedy/agreement": ("greedy", "agreement"),
    "calibration/reference_ece": ("calibration", "reference", "ece"),
    "calibration/candidate_ece": ("calibration", "candidate", "ece"),
    "calibration/reference_brier": ("calibration", "reference", "brier"),
    "calibration/candidate_brier": ("calibration", "candidate", "brier"),
}


def metrics(report: Mapping[str, Any]) -> dict[str, float]:
    """The finite figures of a report (lconvert.report/2) under their flat names."""
    details, checks = report["details"], report["checks"]
    found: dict[str, Any] = {
        "gates/judged": sum(c["passed"] is not None for c in checks),
        "gates/failed": sum(c["passed"] is False for c in checks),
        "gates/not_proven": len(report["not_proven"]),
    }
    found |= {name: _at(details, path) for name, path in _DETAILS.items()}
    seen: set[str] = set()
    for entry in details.get("logits", ()):
        measure = _part(entry["measure"])
        place = f"{measure}/{_part(entry.get('runtime') or 'other')}" if measure in seen else measure
        seen.add(measure)
        found |= {f"{place}/{name}": _at(entry["stats"], path) for name, path in _STATS.items()}
    for type_, error in details.get("tensors", {}).get("relative_error", {}).items():
        found[f"tensors/relative_error/{_part(type_)}"] = error
    for count in details.get("tokens", {}).get("counts", ()):
        found[f"tokens/different/{_part(count['name'])}"] = count["different"]
    for layer in details.get("layers", {}).get("layers", ()):
        found[f"layers/relative_error/{_part(layer['layer'])}"] = layer["relative_error"]
    for task in details.get("tasks", ()):
        where = _part(task.get("backend") or "other")
        found[f"tasks/{_part(task['task'])}/{_part(task['metric'])}/{where}"] = task["value"]
    return dict(_finite(found))


def bench_metrics(bench: Mapping[str, Any]) -> dict[str, float]:
    """The finite figures of a benchmark (lconvert.bench/1): `bench/LABEL/FIGURE`, medians, and `_p99` beside them."""
    found: dict[str, Any] = {}
    for result in bench["results"]:
        place = f"bench/{_part(result['label'])}/{_part(result['runtime'])}"
        for key, value in result.items():
            if isinstance(value, Mapping):
                middle = next((value[k] for k in ("median", "p50", "mean") if value.get(k) is not None), None)
                found |= {f"{place}/{key}": middle, f"{place}/{key}_p99": value.get("p99")}
                found[f"{place}/{key}_per_s"] = value.get("requests_per_s")
            else:
                found[f"{place}/{key}"] = value
    return dict(_finite(found))


def parameters(report: Mapping[str, Any]) -> dict[str, str]:
    """What was compared and how, as texts."""
    details = report["details"]
    settings, artifact = details.get("settings", {}), details.get("artifact", {})
    found: dict[str, Any] = {
        "reference": report["reference"],
        "candidate": report["candidate"],
        "reference_sha256": details.get("reference", {}).get("sha256"),
        "candidate_sha256": artifact.get("sha256"),
        "file_type": artifact.get("file_type"),
        "text": settings.get("text", {}).get("name"),
        "context": settings.get("context"),
        "windows": settings.get("windows"),
    }
    for r in details.get("runtimes", ()):
        found[f"runtime_{_part(r.get('role') or 'candidate')}"] = r["runtime"]
    return {k: show.visible(v)[:_LONGEST] for k, v in found.items() if v is not None}


def tags(document: Mapping[str, Any]) -> dict[str, str]:
    """Verdict, schema and version; the verdict only of a report."""
    out = {
        "lconvert": str(document["lconvert"]),
        "schema": str(document["schema"]),
        "measured": str(document["created"]),
    }
    return out | ({"verdict": show.verdict(document)} if "exit_code" in document else {})


def mlflow(
    reports: Sequence[Mapping[str, Any]],
    benches: Sequence[Mapping[str, Any]],
    uri: str,
    *,
    experiment: str = _EXPERIMENT,
) -> list[str]:
    """One MLflow run per document in the tracking store `uri` (a server's address, sqlite:///FILE, or a folder's file: URI).

    Returns the run ids. MissingPackageError without mlflow (mlflow-skinny is enough); OutputError where the store refuses.
    """
    try:
        from mlflow.entities import Metric, Param, RunTag
        from mlflow.exceptions import MlflowException
        from mlflow.tracking import MlflowClient
    except ImportError:
        raise MissingPackageError("mlflow is not installed: pip install mlflow-skinny") from None
    ids = []
    try:
        client = MlflowClient(tracking_uri=uri)
        known = client.get_experiment_by_name(experiment)
        place = known.experiment_id if known else client.create_experiment(experiment)
        for name, document, figures, texts in _runs(reports, benches):
            run = client.create_run(place, run_name=name).info.run_id
            when = int(_seconds(document["created"]) * 1000)
            rows = [Metric(k, v, when, 0) for k, v in figures.items()]
            for start in range(0, len(rows), _BATCH):
                client.log_batch(run, metrics=rows[start : start + _BATCH])
            client.log_batch(
                run,
                params=[Param(k, v) for k, v in texts.items()],
                tags=[RunTag(k, v) for k, v in tags(document).items()],
            )
            with tempfile.TemporaryDirectory(prefix="lconvert-") as folder:
                for path in _files(document, Path(folder)):
                    client.log_artifact(run, str(path))
            client.set_terminated(run)
            ids.append(run)
    except (MlflowException, OSError) as e:
        raise OutputError(f"{uri}: MLflow does not take the figures ({_reason(e)})") from None
    return ids


def wandb(
    reports: Sequence[Mapping[str, Any]],
    benches: Sequence[Mapping[str, Any]],
    project: str,
    *,
    folder: Path | None = None,
) -> list[str]:
    """One Weights & Biases run per document in `project`; with WANDB_MODE=offline it is written below `folder` for later.

    Returns the run ids. MissingPackageError without wandb; OutputError where it refuses (no account, no network).
    """
    try:
        import wandb as package
        from wandb.errors import Error
    except ImportError:
        raise MissingPackageError("wandb is not installed: pip install wandb") from None
    ids = []
    try:
        for name, document, figures, texts in _runs(reports, benches):
            run = package.init(
                project=project, name=name, config={**texts, **tags(document)}, dir=folder, job_type="lconvert", reinit="finish_previous",
            )  # fmt: skip
            run.summary.update(figures)
            with tempfile.TemporaryDirectory(prefix="lconvert-") as temporary:
                kept = package.Artifact(_part(name) or "report", type="lconvert")
                for path in _files(document, Path(temporary)):
                    kept.add_file(str(path), policy="mutable")
                run.log_artifact(kept)
                run.finish(exit_code=0)
            ids.append(str(run.id))
    except (Error, OSError) as e:
        raise OutputError(f"{project}: Weights & Biases does not take the figures ({_reason(e)})") from None
    return ids


def _runs(
    reports: Sequence[Mapping[str, Any]], benches: Sequence[Mapping[str, Any]]
) -> Iterator[tuple[str, Mapping[str, Any], dict[str, float], dict[str, str]]]:
    """(name, document, metrics, parameters) of each run."""
    for r in reports:
        yield show.name(r["candidate"])[:_LONGEST], r, metrics(r), parameters(r)
    for b in benches:
        machine = {
            f"machine_{k}": show.visible(v)[:_LONGEST] for k, v in b["machine"].items() if v is not None
        }
        yield "bench", b, bench_metrics(b), machine


def _files(document: Mapping[str, Any], folder: Path) -> list[Path]:
    """The document as JSON and as a page, in `folder`."""
    kind = "report" if "checks" in document else "bench"
    page = html([document], []) if kind == "report" else html([], [document])
    out = {folder / f"{kind}.json": documents.dumps(document), folder / f"{kind}.html": page}
    for path, text in out.items():
        path.write_text(text, encoding="utf-8")
    return list(out)


def _at(data: Any, path: Sequence[str]) -> Any:
    for key in path:
        data = data.get(key) if isinstance(data, Mapping) else None
    return data


def _finite(found: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    for name, value in found.items():
        if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
            yield name, float(value)


def _part(text: Any) -> str:
    """A text as one part of a metric's name: what both trackers take, and no slash."""
    return re.sub(r"[^A-Za-z0-9_.\-]+", "_", str(text)).strip("._")[:100] or "other"


def _seconds(created: str) -> float:
    from datetime import datetime

    try:
        return datetime.fromisoformat(created).timestamp()
    except ValueError:
        return 0.0


def _reason(e: BaseException) -> str:
    return " ".join(str(e).split())[:300]
