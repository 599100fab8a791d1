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
from lconvert.formats import gguf as container
from lconvert.ir import Model
from lconvert.validators import chat, layers, logit_tier, structure, tensors, tokens, traits
from lconvert.validators import gates as gate_file
from lconvert.validators.baseline import regressions
from lconvert.validators.logit_cache import default_folder, model_hash
from lconvert.validators.proof import Options, Proof
from lconvert.validators.report import OPTIONAL_TIERS, TIERS, Check, Report
from lconvert.validators.runtimes import DEFAULT, RUNTIMES, kind

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
    path = Path(candidate)
    what = kind(path)
    for name in runtimes:
        if name not in RUNTIMES:
            raise OptionError(f"unknown runtime {name}; runtimes: {', '.join(RUNTIMES)}")
        if what not in RUNTIMES[name][2]:
            raise OptionError(f"{path}: {name} loads {' and '.join(RUNTIMES[name][2])} artifacts, not {what}")
    progress("reading")
    source = read(reference)
    proof = Proof(
        source=source,
        artifact=None if what == "onnx" else read(path),
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
    )
    if proof.artifact is not None:
        _same_model(reference, source, path, proof.artifact)
    corpus = proof.read_text()
    _describe(proof, reference, corpus, manifest)
    found = _tensors(proof)
    if "tokens" in tiers:
        proof.guarded("tokens", "tokens", lambda: _tokens(proof, corpus), runtime=_default(proof))
    if "layers" in tiers:
        proof.guarded("layers", "layers", lambda: _layers(proof, corpus))
    if "logits" in tiers:
        proof.guarded("logits", "logits", lambda: logit_tier.run(proof, corpus, found))
    if baseline is not None:
        for check in regressions(baseline, proof):
            proof.checks.append(check)
    return Report(
        reference=str(reference),
        candidate=str(path),
        checks=tuple(proof.checks),
        not_proven=tuple(proof.not_proven),
        notes=tuple(dict.fromkeys(proof.notes)),
        details=proof.details,
        missing_required=proof.missing_required,
    )


def _same_model(reference: str | Path, source: Model, path: Path, artifact: Model) -> None:
    """InputError where families or shapes say that one was not made from the other."""
    families = [source.arch.family, artifact.arch.family]
    if families[0] != families[1] and len({find(f).gguf.arch for f in families}) > 1:
        raise InputError(f"{path}: holds a {families[1]} model, the reference is {families[0]}")
    shapes = [{name: entry.shape for name, entry in m.entries.items()} for m in (source, artifact)]
    for name in sorted(shapes[0].keys() | shapes[1].keys()):
        if shapes[0].get(name) != shapes[1].get(name):
            raise InputError(
                f"{path}: is not made from {reference}: {name} is {_shape(shapes[1].get(name))} here and "
                f"{_shape(shapes[0].get(name))} there"
            )


def _shape(shape: Sequence[int] | None) -> str:
    return "absent" if shape is None else "x".join(map(str, shape))


def _default(proof: Proof) -> str:
    return proof.options.runtimes[0] if proof.options.runtimes else DEFAULT[proof.kind]


def _describe(proof: Proof, reference: str | Path, corpus: str, manifest: Mapping[str, Any] | None) -> None:
    """What is compared with what, for the report."""
    source, options = proof.source, proof.options
    d = source.arch
    files = _files(proof.path)
    proof.details |= {
        "reference": {
            "path": str(reference),
            "family": d.family,
            "parameters": sum(e.data.size for e in source.entries.values()),
            "layers": d.layers,
            "vocabulary": d.vocab,
            "context": d.context,
            "sha256": model_hash(source.source) if Path(source.source).exists() else None,
        },
        "artifact": {
            "path": str(proof.path),
            "kind": proof.kind,
            "bytes": sum(f.stat().st_size for f in files),
            "parameters": None
            if proof.artifact is None
            else sum(e.data.size for e in proof.artifact.entries.values()),
            "bits_per_weight": None,
            "file_type": _file_type(proof),
            "sha256": model_hash(proof.path),
        },
        "settings": {
            "text": {
                "name": "built-in excerpt" if options.text is None else options.text.name,
                "sha256": hashlib.sha256(corpus.encode()).hexdigest(),
                "bytes": len(corpus.encode()),
            },
            "context": options.context,
            "windows": options.max_windows,
            "threads": options.threads,
            "tiers": list(options.tiers),
            "runtimes": list(options.runtimes or (DEFAULT[proof.kind],)),
        },
    }
    if manifest:
        proof.details["manifest"] = dict(manifest)


def _files(path: Path) -> list[Path]:
    """The artifact's files: all shards of a split one, the weights of a folder, external data beside a graph."""
    if path.is_dir():
        return sorted(p for p in path.rglob("*") if p.is_file())
    if path.suffix == ".gguf":
        return list(container.read(path).paths)
    return sorted({path, *path.parent.glob(f"{path.name}*data")})


def _file_type(proof: Proof) -> str | None:
    if proof.kind != "gguf":
        return None
    from lconvert.converters.gguf_mixture_rules import FTYPES

    value = container.read(proof.path).metadata.get("general.file_type")
    return next((n for n, f in FTYPES.items() if value is not None and f.number == value.data), None)


# --- structure and tensors


def _tensors(proof: Proof) -> tensors.TensorCheck | None:
    """Both tiers; the table of tensors, None where they were left out or the format has none yet."""
    wanted = {"structure", "tensors"} & set(proof.options.tiers)
    if not wanted:
        return None
    if proof.artifact is None:
        proof.not_proven.append("structure and tensors: ONNX graphs are not read into the IR")
        return None
    proof.progress("tensors")
    found = None
    if proof.kind == "gguf":
        found = tensors.check_gguf(proof.path, proof.artifact, proof.source)
    else:
        found = tensors.check_folder(proof.path, proof.artifact, proof.source)
    proof.details["tensors"] = found.to_json()
    proof.details["artifact"]["bits_per_weight"] = found.bits_per_weight
    if "structure" in wanted:
        _structure(proof, found)
    if "tensors" in wanted:
        _values(proof, found)
    return found


def _structure(proof: Proof, found: tensors.TensorCheck) -> None:
    assert proof.artifact is not None
    types = ", ".join(f"{n} {t}" for t, n in sorted(found.types.items()))
    proof.count("structure", "independent reader", found.structure, f"{found.tensors} tensors: {types}")
    source, artifact = proof.source.arch, proof.artifact.arch
    compared = structure.gguf_traits if proof.kind == "gguf" else traits.differences
    proof.count("structure", "traits", compared(source, artifact), "as the source says")
    for file in _files(proof.path):
        pair = structure.manifest_hash(file)
        if pair is not None:
            proof.add("structure", "sha256 of the manifest", pair[0][:16], pair[1][:16], pair[0] == pair[1])
    if proof.kind == "gguf":
        _claims(proof)


def _claims(proof: Proof) -> None:
    """What the file's metadata says of its own tensors."""
    assert proof.artifact is not None
    file = container.read(proof.path)
    proof.count(
        "structure", "metadata", structure.gguf_claims(file, proof.artifact), "agrees with the tensors"
    )
    fewer = structure.fewer_bits(file, proof.artifact)
    chosen = proof.details.get("manifest", {}).get("options", {})
    if any(chosen.get(key) for key in _CHOSEN):
        proof.notes += [f"by choice: {text}" for text in fewer[:5]]
        return
    limit = float(proof.gates["mixture"]["fewer_bits"])
    value = f"{len(fewer)} have fewer bits" if fewer else "as llama.cpp's mixture of this name"
    proof.add(
        "structure",
        "tensor types",
        value,
        f"{limit:g} with fewer bits",
        len(fewer) <= limit,
        measured=len(fewer),
        limit=limit,
    )
    proof.notes += [f"tensor types: {text}" for text in fewer[:5]]


#: options of a conversion that choose types other than the mixture's
_CHOSEN = ("tensor_types", "output_tensor_type", "token_embedding_type", "pure")


def _values(proof: Proof, found: tensors.TensorCheck) -> None:
    """The tensors tier: exact where promised, close everywhere else."""
    worst = found.max_difference
    proof.add(
        "tensors",
        "independent dequantization",
        f"max |difference| {worst:g}",
        "0",
        worst == 0,
        measured=worst,
        limit=0,
    )
    broken = found.broken_promises
    value = f"{found.exact} of {len(found.table)}"
    proof.add(
        "tensors", "equal to the source", value, "all floats", not broken, measured=len(broken), limit=0
    )
    proof.notes += [f"not equal to the source: {name}" for name in broken[:5]]
    bad = [f"{r.name} holds {r.non_finite}" for r in found.table if r.non_finite]
    if bad:
        proof.count("tensors", "NaN or infinite values", bad, "")
    _stock_blocks(proof, found)
    limit = float(proof.gates["relative_error"])
    wrong = found.by_type(lambda r: r.relative_error if r.block_error is not None else None)
    if wrong:
        error, role = max(wrong.values())
        name = "RMS error of the worst tensor"
        value = f"{error:.3g} of its RMS in {role}"
        proof.add("tensors", name, value, f"<= {limit:g}", error <= limit, measured=error, limit=limit)
    for title, column, limits in (
        ("worst block", lambda r: r.block_error, proof.gates["block_error"]),
        ("worst block against the stock encoder's", lambda r: r.error_ratio, proof.gates["error_ratio"]),
    ):
        for type_, (error, role) in found.by_type(column).items():
            gate = float(limits.get(type_, limits["default"]))
            value = f"{error:.3g} in {role}"
            proof.add(
                "tensors",
                f"{type_}: {title}",
                value,
                f"<= {gate:g}",
                error <= gate,
                measured=error,
                limit=gate,
            )
    for type_, (error, role) in found.by_type(lambda r: r.relative_error).items():
        if error:
            proof.notes.append(
                f"relative error of {type_} tensors against the source: up to {error:.3e} ({role})"
            )


def _stock_blocks(proof: Proof, found: tensors.TensorCheck) -> None:
    """Where most blocks are those of llama.cpp's encoder, all of them must be, or no further from the source."""
    compared = [r for r in found.table if r.stock_blocks is not None]
    if not compared:
        return
    same = sum(r.stock_blocks == 1 for r in compared)
    damaged = [f"{r.name} has {r.damaged} damaged blocks" for r in compared if r.damaged]
    proof.count(
        "tensors",
        "blocks of the stock encoder",
        damaged,
        f"{same} of {len(compared)} tensors block for block"
        + ("" if same == len(compared) else ", the others by another method"),
    )
    judged = [r for r in compared if r.nearest is not None]
    if judged:
        stray = [f"{r.name} has {r.stray} codes that are not the nearest" for r in judged if r.stray]
        lowest = min(r.nearest for r in judged if r.nearest is not None)
        proof.count(
            "tensors", "nearest codes", stray, f"{100 * lowest:.2f}% or more in {len(judged)} tensors"
        )


# --- tokens


def _tokens(proof: Proof, corpus: str) -> None:
    from lconvert.validators.runtimes.hf import encode, reference_tokenizer

    source, artifact = proof.source, proof.artifact
    if source.tokenizer is None:
        proof.not_proven.append("tokens: the source has no tokenizer")
        return
    if artifact is None:
        proof.not_proven.append("tokens: an ONNX file holds no tokenizer")
        return
    proof.progress("tokens")
    found = (
        structure.gguf_vocabulary(source.tokenizer, artifact.tokenizer, source.arch)
        if proof.kind == "gguf"
        else structure.same_tokenizer(source.tokenizer, artifact.tokenizer)
    )
    for name, wrong in found.items():
        proof.count("tokens", name, wrong, "as in the source")
    reference = reference_tokenizer(source.tokenizer)
    if proof.kind == "gguf":
        runtime = logit_tier.opened(proof, "llama.cpp", proof.path, vocab_only=True)
        try:
            result = tokens.compare(source.tokenizer, reference, runtime.tokenize, corpus)
        finally:
            runtime.close()
    elif artifact.tokenizer is None:
        return
    else:
        other = reference_tokenizer(artifact.tokenizer)

        def tokenize(text: str, *, special: bool) -> Sequence[int]:
            return encode(other, text, special=special)

        result = tokens.compare(source.tokenizer, reference, tokenize, corpus, limited=False)
    differs = tokens.autotokenizer_differs(Path(source.source), corpus.splitlines()[:200])
    if differs:
        proof.notes.append(differs)
    proof.details["tokens"] = result.to_json()
    for name, count, differences in result.rows():
        value = f"{differences} of {count} texts differ"
        proof.add("tokens", name, value, "0", differences == 0, measured=differences, limit=0)
    proof.notes += result.examples()
    proof.guarded("tokens", "chat templates", lambda: _chat(proof))


def _chat(proof: Proof) -> None:
    """Conversations rendered by the templates of both sides, and the tokens that end an answer."""
    assert proof.artifact is not None
    proof.progress("chat templates")
    found = chat.compare(proof.source, proof.artifact)
    proof.details["chat"] = found.to_json()
    for name, value, passed in found.rows():
        proof.add("tokens", name, value, "0" if "differ" in value else "the source's", passed)
    proof.notes += [f"chat template: {d}" for d in found.differences[:3]]
    proof.notes += [f"chat template: {text}" for text in (*found.notes, *found.skipped)]


# --- layers


def _layers(proof: Proof, corpus: str) -> None:
    """Hidden states after every layer, so that the first broken one has a name."""
    if proof.artifact is None:
        proof.not_proven.append("layers: ONNX graphs are not read into the IR")
        return
    proof.progress("layers")
    ids = logit_tier.token_ids(proof, corpus)[: min(proof.options.context, 256)]
    found = layers.compare(proof.source, proof.artifact, ids, lambda: proof.progress("layers"))
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
