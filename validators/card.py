"""The model card beside an artifact: README.md with Hugging Face metadata, what the files are, how they were made, the proof.

Names, options and texts come out of files that somebody else made; they are escaped, so that none of them becomes a
link, HTML, or a line of the metadata. The metadata is written by a YAML library and holds only what is known: a licence, a
language and a base model are taken from the source and never guessed.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from lconvert.errors import OutputError
from lconvert.validators import show
from lconvert.validators.stored import bits_per_weight

#: what tells our cards from those that people wrote
MARKER = "<!-- written by lconvert; remove this line to keep your changes -->"

#: target of a plan -> library_name on the hub, tags, what runs it
_TARGETS: Mapping[str, tuple[str, tuple[str, ...], str]] = {
    "gguf": ("gguf", ("gguf", "llama.cpp"), "llama.cpp"),
    "hf": ("transformers", ("safetensors",), "vllm"),
    "onnx": ("onnxruntime", ("onnx",), "onnxruntime"),
    "vllm": ("transformers", ("safetensors", "vllm"), "vllm"),
    "tensorrt-llm": ("transformers", ("safetensors", "tensorrt-llm", "modelopt"), "tensorrt-llm"),
    "compressed-tensors": ("transformers", ("safetensors", "compressed-tensors"), "vllm"),
    "gptq": ("transformers", ("safetensors", "gptq"), "vllm"),
    "gptq_v2": ("transformers", ("safetensors", "gptq"), "vllm"),
    "awq": ("transformers", ("safetensors", "awq"), "vllm"),
    "fp8": ("transformers", ("safetensors", "fp8"), "vllm"),
    "modelopt": ("transformers", ("safetensors", "modelopt"), "tensorrt-llm"),
    "bitsandbytes": ("transformers", ("safetensors", "bitsandbytes"), "transformers"),
    "mxfp4": ("transformers", ("safetensors", "mxfp4"), "vllm"),
    "dense": ("transformers", ("safetensors",), "vllm"),
}
_FROM_SOURCE = ("license", "license_name", "license_link", "language")
_HUB = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}", re.ASCII)


def card(
    manifest: Mapping[str, Any],
    report: Mapping[str, Any] | None = None,
    source_card_text: str | None = None,
    *,
    artifact: str | None = None,
    source: str | None = None,
) -> str:
    """The card of one artifact.

    manifest: lconvert.manifest/1, as written beside it. report: lconvert.report/2 of it; without one the card says that
    nothing was proven. source_card_text: the source's README.md, for licence and language. artifact, source: their names
    where the artifact is a folder, and where no report names them.
    """
    return cards([(manifest, report)], source_card_text, artifact=artifact, source=source)


def cards(
    parts: Sequence[tuple[Mapping[str, Any], Mapping[str, Any] | None]],
    source_card_text: str | None = None,
    *,
    artifact: str | None = None,
    source: str | None = None,
) -> str:
    """One card for several artifacts of one model, which share a folder."""
    manifest, first = parts[0]
    reports = [r for _, r in parts if r is not None]
    target = str(manifest.get("plan", {}).get("target", ""))
    library, tags, runtime = _TARGETS.get(target, ("", (), ""))
    base = _base(manifest, first)
    known = _front_matter(source_card_text)
    meta: dict[str, Any] = {}
    if base:
        meta |= {"base_model": base, "base_model_relation": "quantized"}
    meta |= {k: known[k] for k in _FROM_SOURCE if k in known}
    if library:
        meta["library_name"] = library
    meta |= {
        "pipeline_tag": _task(manifest),
        "quantized_by": "lconvert",
        "tags": [*tags, *(["quantized"] if _quantized(parts) else []), "lconvert"],
    }
    front = yaml.safe_dump(meta, sort_keys=False, allow_unicode=True, default_flow_style=False)
    title = artifact or (
        _title(manifest, first) if len(parts) == 1 or not first else show.name(first["reference"])
    )
    licence = (
        ""
        if "license" in known
        else "The licence is the original's; its card does not name one in its metadata.\n\n"
    )
    body = [
        f"---\n{front}---",
        MARKER,
        f"# {show.markdown(title)}",
        f"{_origin(base, manifest, first, source)} {licence}".rstrip(),
        "## Files\n\n" + _files(parts),
        "## How to run it\n\n" + _run(runtime, manifest, artifact),
        "## How it was made\n\n" + "\n\n".join(_made(m) for m, _ in parts),
        *(section(r, of_several=len(reports) > 1) for r in reports),
    ]
    if not reports:
        body.append("## Proof\n\nNothing was validated: run `lconvert validate` and make this card again.")
    return "\n\n".join(body) + "\n"


def section(report: Mapping[str, Any], *, of_several: bool = False) -> str:
    """Only the proof, as Markdown for an existing card; `of_several` puts the artifact's name into the heading."""
    details, checks = report["details"], report["checks"]
    judged = [c for c in checks if c["passed"] is not None]
    failed = [c for c in judged if not c["passed"]]
    name = f" of {show.code(show.name(report['candidate']))}" if of_several else ""
    says = f"{len(judged) - len(failed)} of {len(judged)} gates hold"
    lines = [
        f"## Proof{name}: {show.verdict(report)}",
        f"`lconvert validate` (lconvert {show.markdown(report['lconvert'])}, {show.markdown(report['created'])}): {says}.",
    ]
    if failed:
        lines.append(
            "\n".join(
                f"- **{show.markdown(c['tier'])}: {show.markdown(c['name'])}** failed: "
                f"{show.markdown(show.figures(c['value']))}; gate {show.markdown(show.figures(c['gate']))}"
                for c in failed
            )
        )
    entries = details.get("logits", ())
    if entries:
        rows = [
            (
                show.markdown(_meaning(x)),
                _with(
                    show.number(x["stats"]["kld"]["mean"]), show.interval(x["stats"]["kld"].get("mean_ci"))
                ),
                show.number(x["stats"]["kld"].get("p99")),
                _with(
                    show.percent(x["stats"].get("same_top1")),
                    show.interval(x["stats"].get("same_top1_ci"), show.percent),
                ),
                show.fixed(x["stats"].get("ppl", {}).get("ratio"), 4),
            )
            for x in entries
        ]
        lines.append(
            _table(
                (
                    "comparison",
                    "mean KLD, nats (95 % CI)",
                    "99 % quantile",
                    "same top-1 (95 % CI)",
                    "perplexity ratio",
                ),
                rows,
                1,
            )
        )
    if says := _conditions(details):
        lines.append(says)
    rows = [
        (show.markdown(c["tier"]), show.markdown(c["name"]), show.markdown(show.figures(c["value"])), show.markdown(show.figures(c["gate"])),
         {True: "pass", False: "**FAIL**", None: ""}[c["passed"]])
        for c in checks
    ]  # fmt: skip
    lines.append(_table(("tier", "check", "measured", "gate", "result"), rows, 9))
    if report["not_proven"]:
        lines.append("**Not proven**\n\n" + "\n".join(f"- {show.markdown(n)}" for n in report["not_proven"]))
    return "\n\n".join(lines)


def write(folder: Path, text: str, name: str, *, merged: bool = False) -> Path:
    """Write the card of the artifact `name` as README.md, else as NAME.card.md beside it.

    A README.md is replaced only if lconvert wrote it, and about this artifact; `merged`: the card is about all of the folder.
    """
    own = folder / f"{name}.card.md"
    for path in (folder / "README.md", own):
        try:
            standing = path.read_text(encoding="utf-8", errors="replace") if path.exists() else None
            about_it = merged or path == own or (standing is not None and show.markdown(name) in standing)
            if standing is None or (MARKER in standing and about_it):
                path.write_text(text, encoding="utf-8")
                return path
        except OSError as e:
            raise OutputError(f"{path}: cannot be written ({e.strerror or e})") from None
    raise OutputError(f"{path}: exists and was not written by lconvert; move it or choose another folder")


def source_card(reference: str | Path) -> str | None:
    """The README.md of a source folder, or of the folder of a source file; None without one."""
    folder = Path(reference)
    path = (folder if folder.is_dir() else folder.parent) / "README.md"
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return None
    return None if MARKER in text and not folder.is_dir() else text


def _front_matter(text: str | None) -> dict[str, Any]:
    """The metadata of a card: plain texts and lists of them; nothing from a card that has none, or a damaged one."""
    found = re.match(r"\ufeff?---[ \t]*\r?\n(.{0,65536}?)\r?\n---[ \t]*(?:\r?\n|$)", text or "", re.DOTALL)
    try:
        data = yaml.safe_load(found[1]) if found else None
    except (yaml.YAMLError, ValueError, RecursionError):
        return {}
    out: dict[str, Any] = {}
    for key, value in data.items() if isinstance(data, dict) else ():
        parts = value if isinstance(value, list) else [value]
        if parts and all(isinstance(p, str) and len(p) < 500 and p.isprintable() for p in parts):
            out[str(key)] = value
    return out


def _quantized(parts: Sequence[tuple[Mapping[str, Any], Mapping[str, Any] | None]]) -> bool:
    kinds = {
        t["verdict"]["kind"]
        for m, _ in parts
        for f in m.get("plan", {}).get("files", ())
        for t in f["tensors"]
    }
    held = any(
        t.get("held") for m, _ in parts for f in m.get("plan", {}).get("files", ()) for t in f["tensors"]
    )
    return held or bool(kinds & {"quantized", "requantized"})


def _base(manifest: Mapping[str, Any], report: Mapping[str, Any] | None) -> str | None:
    """The hub name of the source, where it has one: from a cache path or a name; a folder's name is none."""
    named = [str(report["reference"])] if report else []
    for text in (*named, *map(str, manifest.get("sources", {}))):
        cached = re.search(
            r"(?:^|[/\\])models--([\w.-]+?)--([\w.-]+?)[/\\]snapshots[/\\]", text + "/", re.ASCII
        )
        if cached:
            return f"{cached[1]}/{cached[2]}"
    return next((t for t in named if _HUB.fullmatch(t) and not Path(t).exists()), None)


def _title(manifest: Mapping[str, Any], report: Mapping[str, Any] | None) -> str:
    files = list(manifest.get("files", {}))
    return show.name(report["candidate"]) if report else show.name(files[0]) if files else "Converted model"


def _origin(
    base: str | None, manifest: Mapping[str, Any], report: Mapping[str, Any] | None, source: str | None
) -> str:
    source = source or (report["reference"] if report else next(iter(manifest.get("sources", {})), None))
    if base:
        return f"Converted from [{show.markdown(base)}](https://huggingface.co/{base}) by lconvert."
    return (
        f"Converted from {show.code(show.name(source))} by lconvert." if source else "Converted by lconvert."
    )


def _files(parts: Sequence[tuple[Mapping[str, Any], Mapping[str, Any] | None]]) -> str:
    rows = []
    for manifest, report in parts:
        plan = manifest.get("plan", {})
        tensors = {f["name"]: f["tensors"] for f in plan.get("files", ())}
        kind = plan.get("options", {}).get("ftype") or plan.get("target") or ""
        for name, file in manifest.get("files", {}).items():
            listed = tensors.get(name, ())
            packed = any(t.get("held") for t in listed)  # their shapes are those of words, not of weights
            bits = None if packed else bits_per_weight((t["bytes"], t["shape"]) for t in listed)
            if bits is None and report is not None and (packed or len(manifest["files"]) == 1):
                bits = report["details"].get("artifact", {}).get("bits_per_weight")
            rows.append(
                (
                    show.code(name),
                    show.markdown(kind),
                    show.size(file.get("size")),
                    show.fixed(bits),
                    show.code(file.get("sha256")),
                )
            )
    return _table(("file", "type", "size", "bits per weight", "sha256"), rows, 2)


def _named(value: Any) -> Any:
    """A recipe or a text by its name."""
    return value["name"] if isinstance(value, Mapping) and "name" in value else value


def _made(manifest: Mapping[str, Any]) -> str:
    plan = manifest.get("plan", {})
    options = ", ".join(
        f"{show.code(k)} {show.code(_named(v))}" for k, v in plan.get("options", {}).items() if v is not None
    )
    counts: dict[tuple[str, str], int] = {}
    for file in plan.get("files", ()):
        for t in file["tensors"]:
            key = (str(t.get("held") or t["type"]), str(t["verdict"]["kind"]))
            counts[key] = counts.get(key, 0) + 1
    rows = [
        (show.code(type_), show.markdown(kind), show.count(n)) for (type_, kind), n in sorted(counts.items())
    ]
    sources = [
        f"- {show.code(show.name(name))}, {show.size(s.get('size'))}, sha256 {show.code(s.get('sha256'))}"
        for name, s in manifest.get("sources", {}).items()
    ]
    losses = [
        f"- {show.markdown(v.get('kind'))}: {show.markdown(v.get('reason'))}" for v in plan.get("losses", ())
    ]
    by = f"By lconvert {show.markdown(manifest.get('lconvert'))}" + (f", with {options}." if options else ".")
    parts = [by, _table(("stored type", "values", "tensors"), rows, 2) if rows else "", "\n".join(losses)]
    parts += ["From:\n\n" + "\n".join(sources)] if sources else []
    return "\n\n".join(p for p in parts if p)


#: What the graph of a task takes.
_INPUTS = {
    "text-generation": "ids, mask, positions, keys and values of the past",
    "text-classification": "ids, mask, types",
    "image-classification": "images",
}


def _task(manifest: Mapping[str, Any]) -> str:
    """The hub's name of what the model does."""
    found = manifest.get("plan", {}).get("options", {}).get("task")
    return found if found in _INPUTS else "text-generation"


def _run(runtime: str, manifest: Mapping[str, Any], artifact: str | None) -> str:
    """Commands for the runtime that the target is for."""
    files = list(manifest.get("files", {}))
    first = shlex.quote(show.visible(show.name(files[0]))) if files else "MODEL"
    if runtime == "llama.cpp":
        lines = [
            f"llama-cli -m ./{first} -p 'Once upon a time' -n 64",
            f"llama-server -m ./{first} --port 8080",
        ]
        return show.fence("\n".join(lines), "sh")
    if runtime == "vllm":
        return show.fence("vllm serve .   # in this folder", "sh")
    if runtime == "tensorrt-llm":
        return show.fence("trtllm-serve .   # in this folder", "sh")
    if runtime == "transformers":
        return show.fence("model = transformers.AutoModelForCausalLM.from_pretrained('.')", "python")
    if runtime == "onnxruntime":
        lines = [
            "import onnxruntime",
            f"session = onnxruntime.InferenceSession({show.visible(show.name(files[0]))!r})",
            f"print([i.name for i in session.get_inputs()])  # {_INPUTS.get(_task(manifest), 'its inputs')}",
        ]
        return show.fence("\n".join(lines), "python")
    name = shlex.quote(show.visible(artifact)) if artifact else first
    return "Convert it to a runtime's format: " + show.code(f"lconvert hf-to-gguf {name} -o model.gguf")


def _conditions(details: Mapping[str, Any]) -> str:
    settings = details.get("settings", {})
    text = settings.get("text", {}).get("name")
    runtimes = [
        " ".join(
            [
                str(r["runtime"]),
                *(str(v) for k, v in r.items() if k == r["runtime"] or k == "llama-cpp-python"),
            ]
        )
        for r in details.get("runtimes", ())
    ]
    parts = [
        f"text {show.markdown(text)}" if text else "",
        f"windows of {show.count(settings['context'])} tokens" if settings.get("context") else "",
        f"runtimes {show.markdown(', '.join(dict.fromkeys(runtimes)))}" if runtimes else "",
    ]
    kept = ", ".join(p for p in parts if p)
    return f"Measured on {kept}." if kept else ""


def _meaning(entry: Mapping[str, Any]) -> str:
    says = {"cost": "against the original (cost)", "fidelity": "against its own numbers in fp32 (fidelity)"}
    runtime = f", {entry['runtime']}" if entry.get("runtime") else ""
    return f"{says.get(entry['measure'], entry['measure'])}{runtime}"


def _with(value: str, pair: str) -> str:
    return f"{value} ({pair})" if pair else value


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]], first_number: int) -> str:
    """A Markdown table of escaped cells; columns from `first_number` on are aligned right."""
    rule = ["---:" if n >= first_number else "---" for n in range(len(columns))]
    return "\n".join("| " + " | ".join(row) + " |" for row in (columns, rule, *rows))
