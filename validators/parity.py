"""`validate`: is this artifact the model it came from? Tiers: structure, tensors, tokens, logits, and layers on demand.

Two references, never mixed: *cost* compares with the original model, *fidelity* with the artifact's own numbers
evaluated in fp32 (`lconvert.forward`). Gates are in gates.yaml; the exit code is 0 pass, 1 a gate failed, 3 a
required runtime is missing.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from lconvert.archs import find
from lconvert.converters import read
from lconvert.errors import InputError, OptionError
from lconvert.ir import Decoder, Encoder, Model
from lconvert.passes import examples
from lconvert.passes.rotate import untied
from lconvert.validators import baseline as earlier
from lconvert.validators import (
    classifier_data,
    classifier_tier,
    documents,
    evaluation_text,
    layers,
    logit_tier,
    onnx_tier,
    stored,
    token_tier,
    weight_tiers,
)
from lconvert.validators import gates as gate_file
from lconvert.validators.logit_cache import default_folder, model_hash
from lconvert.validators.proof import Options, Proof
from lconvert.validators.report import OPTIONAL_TIERS, TIERS, Check, Report
from lconvert.validators.runtimes import RUNTIMES, graph, kind
from lconvert.validators.traits import same_shapes

__all__ = ["TIERS", "Check", "Report", "validate"]


def validate(
    reference: str | Path,
    candidate: str | Path,
    *,
    text: Path | None = None,
    tiers: Sequence[str] = TIERS,
    context: int = 512,
    max_windows: int | None = 8,
    threads: int | None = None,
    gates: Path | None = None,
    require: Sequence[str] = (),
    runtimes: Sequence[str] = (),
    python: Mapping[str, Path] | None = None,
    timeout: float | None = None,
    cache: Path | Literal[False] | None = None,
    relative: bool = True,
    curve: bool = False,
    greedy: tuple[int, int] = (4, 32),
    baseline: Path | None = None,
    manifest: Mapping[str, Any] | None = None,
    progress: Callable[[str], None] = lambda what: None,
) -> Report:
    """Compare the artifact `candidate` (GGUF, ONNX, .lcir, or a Hugging Face folder) with the model `reference`.

    text: evaluation text (default: a built-in public-domain excerpt). context: tokens per window, reduced to the
    context in which the artifact is exact. max_windows: None for the whole text. require: runtimes
    whose absence is exit code 3 instead of a line under "not proven". runtimes: those to run it in (default: the one
    that the format is for); python: interpreters by runtime; timeout: seconds per call there. cache: folder of
    reference logits (None: the user's cache folder, False: none). relative: also compare with llama.cpp's own
    quantizer; curve: measure all its types. greedy: (prompts, tokens). baseline: an earlier JSON report not to fall behind.

    Raises InputError where the two are not the same model or the text is unusable, OptionError for wrong options.
    """
    unknown = set(tiers) - {*TIERS, *OPTIONAL_TIERS}
    if unknown:
        known = ", ".join((*TIERS, *OPTIONAL_TIERS))
        raise OptionError(f"unknown tier {', '.join(sorted(unknown))}; tiers: {known}")
    thresholds = gate_file.load(gates) if gates else gate_file.shipped()
    path = graph(Path(candidate))
    what = kind(path)
    for name in runtimes:
        if name not in RUNTIMES:
            raise OptionError(f"unknown runtime {name}; runtimes: {', '.join(RUNTIMES)}")
        if what not in RUNTIMES[name][2]:
            raise OptionError(f"{path}: {name} loads {' and '.join(RUNTIMES[name][2])} artifacts, not {what}")
    old = None if baseline is None else earlier.load(baseline)
    progress("reading")
    onnx = onnx_tier.read(path) if what == "onnx" else None
    artifact = read(path) if what != "onnx" else onnx.model if onnx else None
    source = read(reference)
    moved = _moved(path, manifest)
    if "rotate" in moved:
        source = _with_its_head(source, artifact)
    proof = Proof(
        source=source,
        artifact=artifact,
        graph=onnx,
        path=path,
        kind=what,
        gates=thresholds,
        options=Options(
            text=text,
            tiers=tuple(tiers),
            context=context,
            max_windows=max_windows,
            threads=threads,
            require=tuple(require),
            runtimes=tuple(runtimes),
            python=python or {},
            timeout=timeout,
            cache=None if cache is False else cache or default_folder(),
            relative=relative,
            curve=curve,
            greedy=greedy,
        ),
        progress=progress,
        pruned="sparse" in moved,
    )
    _requirable(require, tiers, proof.runtimes, what)
    if proof.artifact is not None:
        _same_model(source, path, proof.artifact)
    decoder = isinstance(source.arch, Decoder)
    _describe(proof, reference)
    if manifest:
        proof.details["manifest"] = dict(manifest)
    if old is not None:
        earlier.comparable(old, proof.details["settings"])
    found = weight_tiers.run(proof)
    if "tokens" in tiers and (decoder or source.tokenizer is not None):
        proof.guarded("tokens", "tokens", lambda: token_tier.run(proof), runtime=_default(proof))
    if "layers" in tiers:
        proof.guarded("layers", "layers", lambda: _layers(proof))
    if "logits" in tiers and found is not None and any(r.non_finite for r in found.table):
        proof.not_proven.append("logits: tensors hold NaN or infinite values")
    elif "logits" in tiers:
        logits = logit_tier.run if decoder else classifier_tier.run
        proof.guarded("logits", "logits", lambda: logits(proof))
    if left := [t for t in TIERS if t not in tiers]:
        proof.notes.append(f"not asked for: {', '.join(left)}")
    if old is not None:
        proof.checks += earlier.regressions(old, proof)
    return Report(
        reference=str(reference),
        candidate=str(path),
        checks=tuple(proof.checks),
        not_proven=tuple(proof.not_proven),
        notes=tuple(dict.fromkeys(proof.notes)),
        details=proof.details,
        missing_required=proof.missing_required,
    )


def _requirable(require: Sequence[str], tiers: Sequence[str], runtimes: Sequence[str], what: str) -> None:
    """OptionError for a required runtime that this validation would never open: its absence could not be noticed."""
    used = set(runtimes) if "logits" in tiers else set()
    used |= {"llama.cpp"} if "tokens" in tiers and what == "gguf" else set()
    used |= {"transformers"} if {"tokens", "logits", "layers"} & set(tiers) else set()
    for name in require:
        if name not in used | {u.replace(".", "") for u in used}:
            known = f"this validation opens {', '.join(sorted(used)) or 'none'}"
            raise OptionError(f"{name} is required, but {known}; choose it (--runtime) or do not require it")


def _moved(path: Path, manifest: Mapping[str, Any] | None) -> list[str]:
    """Passes that changed what the weights are, by the manifest, the given one or the one beside an artifact."""
    given = manifest or documents.beside(sorted(path.iterdir()) if path.is_dir() else [path]) or {}
    return weight_tiers.methods(given.get("plan", {}))[0]


def _with_its_head(source: Model, artifact: Model | None) -> Model:
    """The source, with a head of its own beside the embedding where the artifact has one (rotations need that): the same function."""
    ours, theirs = source.arch, None if artifact is None else artifact.arch
    separate = isinstance(ours, Decoder) and isinstance(theirs, Decoder) and ours.tied and not theirs.tied
    return untied(source) if separate else source


def _same_model(source: Model, path: Path, artifact: Model) -> None:
    """InputError where families or shapes say that one was not made from the other."""
    families = [source.arch.family, artifact.arch.family]
    if families[0] != families[1] and len({find(f).gguf.arch for f in families}) > 1:
        raise InputError(f"{path}: holds a {families[1]} model, the reference is {families[0]}")
    same_shapes(source, artifact)


def _default(proof: Proof) -> str:
    return proof.runtimes[0]


def _describe(proof: Proof, reference: str | Path) -> None:
    """What is compared with what, for the report."""
    source, options, arch = proof.source, proof.options, proof.source.arch
    words = arch if isinstance(arch, Decoder | Encoder) else None  # a network of images has none of these
    given = options.text is not None and examples.is_arrays(options.text)
    text = options.text.read_bytes() if given and options.text is not None else proof.corpus.encode()
    proof.details |= {
        "reference": {
            "path": str(reference),
            "family": arch.family,
            "parameters": sum(e.data.size for e in source.entries.values()),
            "layers": words.layers if words else None,
            "vocabulary": words.vocab if words else None,
            "context": words.context if words else None,
            "sha256": proof.source_hash,
        },
        "artifact": {
            "path": str(proof.path),
            "kind": proof.kind,
            "bytes": stored.size(proof.files),
            "parameters": None
            if proof.artifact is None
            else sum(e.data.size for e in proof.artifact.entries.values()),
            "bits_per_weight": None,
            "file_type": None if proof.header is None else stored.gguf_file_type(proof.header),
            "sha256": model_hash(proof.path, proof.sha256),
        },
        "settings": {
            "text": {
                "name": "built-in excerpt" if options.text is None else options.text.name,
                "sha256": hashlib.sha256(text).hexdigest(),
                "bytes": len(text),
            },
            "context": evaluation_text.window(proof)
            if isinstance(arch, Decoder)
            else classifier_data.context(proof),
            "windows": options.max_windows,
            "threads": options.threads,
            "tiers": list(options.tiers),
            "runtimes": list(proof.runtimes),
        },
    }


# --- layers


def _layers(proof: Proof) -> None:
    """Hidden states after every layer, so that the first broken one has a name."""
    if not isinstance(proof.source.arch, Decoder):
        proof.not_proven.append("layers: only those of decoders are compared one by one")
        return
    if proof.artifact is None:
        proof.not_proven.append("layers: only graphs that lconvert wrote are read into the IR")
        return
    proof.progress("layers")
    ids = evaluation_text.token_ids(proof)[: min(proof.options.context, 256)]
    found = layers.compare(proof.expected, proof.artifact, ids, lambda: proof.progress("layers"))
    proof.details["layers"] = found.to_json()
    worst = max(found.layers, key=lambda x: x.own_error)
    value = f"largest own error {worst.own_error:.2e} in {worst.layer}"
    if found.broken:
        value = f"first broken: {found.first_broken}; broken: {_listed(found.broken)}"
    proof.add("layers", "own error of every layer", value, "as its weights explain", not found.broken)
    proof.notes += [f"layers: {d}" for d in found.differences]
    for layer in found.layers:
        if layer.broken and layer.tensors:
            proof.notes.append(f"layer {layer.layer}: look at {_listed(layer.tensors)}")


def _listed(names: Iterable[object]) -> str:
    return ", ".join(map(str, list(names)[:8]))
