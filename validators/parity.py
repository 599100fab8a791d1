"""`validate`: is this artifact the model it came from? Tiers: structure, tensors, tokens, logits.

Two references, never mixed: *cost* compares with the original model, *fidelity* with the artifact's own numbers
evaluated in fp32 (`lconvert.forward`). Gates are in gates.yaml; the exit code is 0 pass, 1 a gate failed, 3 a
required runtime is missing.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from lconvert import __version__
from lconvert.archs import find
from lconvert.converters import read
from lconvert.errors import InputError, MissingPackageError, OptionError
from lconvert.ir import Model, QTensor
from lconvert.plan import manifest_path
from lconvert.validators import gates as gate_file
from lconvert.validators.logits import LEAST, LogitStats, compare, windows
from lconvert.validators.tensors import TensorCheck, check_gguf, typical_bits

#: Largest temporary file for the check of the graph with F32 weights.
_GRAPH_LIMIT = 8 << 30

TIERS = ("structure", "tensors", "tokens", "logits")


@dataclass(frozen=True)
class Check:
    """One line of the proof; `passed` is None for a figure that no gate judges."""

    tier: str
    name: str
    value: str
    gate: str
    passed: bool | None


@dataclass(frozen=True)
class Report:
    """The whole proof; `details` holds the full statistics."""

    reference: str
    candidate: str
    checks: tuple[Check, ...]
    not_proven: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    details: Mapping[str, Any] = field(default_factory=dict)
    missing_required: bool = False

    @property
    def passed(self) -> bool:
        judged = [c.passed for c in self.checks if c.passed is not None]
        return bool(judged) and all(judged)

    @property
    def exit_code(self) -> int:
        if not self.passed:
            return 1
        return 3 if self.missing_required else 0

    def to_json(self) -> dict[str, Any]:
        return {
            "schema": "lconvert.report/1",
            "lconvert": __version__,
            "reference": self.reference,
            "candidate": self.candidate,
            "passed": self.passed,
            "exit_code": self.exit_code,
            "checks": [asdict(c) for c in self.checks],
            "not_proven": list(self.not_proven),
            "notes": list(self.notes),
            "details": dict(self.details),
        }


def builtin_text() -> str:
    """The public-domain excerpt that proofs use when no text is given."""
    return (Path(__file__).with_name("text") / "excerpt.txt").read_text(encoding="utf-8")


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
    manifest: Mapping[str, Any] | None = None,
    progress: Callable[[str], None] = lambda what: None,
) -> Report:
    """Compare the GGUF `candidate` with the model `reference` that it was made from.

    text: evaluation text (default: a built-in public-domain excerpt). context: tokens per window, reduced to the
    context in which the artifact is exact. max_windows: None for the whole text. require: runtimes ("llamacpp")
    whose absence is exit code 3 instead of a line under "not proven".
    """
    unknown = set(tiers) - set(TIERS)
    if unknown:
        raise OptionError(f"unknown tier {', '.join(sorted(unknown))}; tiers: {', '.join(TIERS)}")
    thresholds = gate_file.load(gates) if gates else gate_file.shipped()
    path = Path(candidate)
    if path.suffix != ".gguf":
        raise OptionError(f"{path}: only GGUF artifacts can be validated so far")
    progress("reading")
    source, artifact = read(reference), read(path)
    if (
        source.arch.family != artifact.arch.family
        and find(source.arch.family).gguf.arch != find(artifact.arch.family).gguf.arch
    ):
        raise InputError(
            f"{path}: holds a {artifact.arch.family} model, the reference is {source.arch.family}"
        )
    shapes = [{name: entry.shape for name, entry in m.entries.items()} for m in (source, artifact)]
    for name in sorted(shapes[0].keys() | shapes[1].keys()):
        if shapes[0].get(name) != shapes[1].get(name):
            raise InputError(
                f"{path}: is not made from {reference}: {name} is {shapes[1].get(name)} here and "
                f"{shapes[0].get(name)} there"
            )
    run = _Run(source, artifact, path, thresholds, progress)
    corpus = run.read_text(text)
    if "structure" in tiers or "tensors" in tiers:
        run.tensors(tiers)
    if "tokens" in tiers:
        run.guarded("tokens", lambda: run.tokens(corpus), require)
    if "logits" in tiers:
        run.guarded("logits", lambda: run.logits(corpus, context, max_windows, threads), require)
    return Report(
        reference=str(reference),
        candidate=str(path),
        checks=tuple(run.checks),
        not_proven=tuple(run.not_proven),
        notes=tuple(run.notes),
        details=run.details | ({"manifest": dict(manifest)} if manifest else {}),
        missing_required=run.missing_required,
    )


class _Run:
    """The state of one validation: both models, and the checks so far."""

    def __init__(
        self,
        source: Model,
        artifact: Model,
        path: Path,
        gates: dict[str, Any],
        progress: Callable[[str], None],
    ) -> None:
        self.source, self.artifact, self.path, self.gates, self.progress = (
            source,
            artifact,
            path,
            gates,
            progress,
        )
        self.checks: list[Check] = []
        self.not_proven: list[str] = []
        self.notes: list[str] = []
        self.details: dict[str, Any] = {}
        self.missing_required = False

    def add(self, tier: str, name: str, value: str, gate: str, passed: bool | None) -> None:
        self.checks.append(Check(tier, name, value, gate, passed))

    def guarded(self, tier: str, work: Callable[[], None], require: Sequence[str]) -> None:
        """A missing package leaves a plain statement of what was not proven."""
        try:
            work()
        except MissingPackageError as e:
            self.not_proven.append(f"{tier}: {e}")
            if require:
                self.missing_required = True

    def read_text(self, text: Path | None) -> str:
        if text is None:
            return builtin_text()
        try:
            return text.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as e:
            raise InputError(f"{text}: cannot be read as UTF-8 text ({e})") from None

    # --- structure and tensors

    def tensors(self, tiers: Sequence[str]) -> None:
        self.progress("tensors")
        found: TensorCheck = check_gguf(self.path, self.artifact, self.source)
        self.details["tensors"] = asdict(found)
        if "structure" in tiers:
            types = ", ".join(f"{n} {t}" for t, n in sorted(found.types.items()))
            self.add(
                "structure",
                "independent reader",
                f"{found.tensors} tensors: {types}",
                "same",
                not found.structure,
            )
            self.notes += found.structure[:5]
            self.manifest()
        if "tensors" in tiers:
            difference = f"max |difference| {found.max_difference:g}"
            self.add("tensors", "independent dequantization", difference, "0", found.max_difference == 0)
            total = len(self.artifact.entries)
            self.add(
                "tensors",
                "equal to the source",
                f"{found.exact} of {total}",
                "all floats",
                not found.worst_exact,
            )
            limits = self.gates["block_error"]
            for type_, (error, role) in found.block_error.items():
                gate = float(limits.get(type_, limits["default"]))
                self.add(
                    "tensors",
                    f"{type_}: worst block",
                    f"{error:.3g} in {role}",
                    f"<= {gate:g}",
                    error <= gate,
                )
            self.notes += [f"not equal to the source: {name}" for name in found.worst_exact[:5]]
            for type_, error in found.relative_error.items():
                self.notes.append(f"relative error of {type_} tensors against the source: {error:.3e}")

    def manifest(self) -> None:
        """The file's hash against the manifest that was written with it, where there is one."""
        beside = manifest_path(self.path)
        if not beside.is_file():
            return
        try:
            wanted = json.loads(beside.read_text())["files"][self.path.name]["sha256"]
        except (OSError, ValueError, KeyError, TypeError):
            self.notes.append(f"{beside}: not readable as a manifest")
            return
        with open(self.path, "rb") as f:
            found = hashlib.file_digest(f, "sha256").hexdigest()
        self.add("structure", "sha256 of the manifest", found[:16], f"{str(wanted)[:16]}", found == wanted)

    # --- tokens

    def tokens(self, corpus: str) -> None:
        from lconvert.validators import tokens
        from lconvert.validators.runtimes.hf import reference_tokenizer
        from lconvert.validators.runtimes.llamacpp import LlamaCpp

        if self.source.tokenizer is None:
            self.not_proven.append("tokens: the source has no tokenizer")
            return
        self.progress("tokens")
        reference = reference_tokenizer(self.source.tokenizer)
        runtime = LlamaCpp(self.path, vocab_only=True)
        try:
            result = tokens.compare(self.source.tokenizer, reference, runtime.tokenize, corpus)
        finally:
            runtime.close()
        differs = tokens.autotokenizer_differs(Path(self.source.source), corpus.splitlines()[:200])
        if differs:
            self.notes.append(differs)
        self.details["tokens"] = result.to_json()
        for name, count, differences in result.rows():
            self.add("tokens", name, f"{differences} of {count} texts differ", "0", differences == 0)
        self.notes += result.examples()

    # --- logits

    def logits(self, corpus: str, context: int, max_windows: int | None, threads: int | None) -> None:
        from lconvert.forward import Forward
        from lconvert.validators.runtimes.hf import Transformers
        from lconvert.validators.runtimes.llamacpp import LlamaCpp

        context = min(context, self.source.arch.context)
        for loss in find(self.source.arch.family).gguf.losses(self.source.arch):
            limit = f"exact up to {loss.limit} tokens and validated within that" if loss.limit else "accepted"
            self.notes.append(f"{loss.name}: {loss.reason}; {limit}")
            context = min(context, loss.limit or context)
        texts = windows(self.ids(corpus), context, self.bos(), max_windows)
        if (n := sum(map(len, texts))) < LEAST:
            raise InputError(f"the text has only {n} tokens, which prove nothing; give a longer one (--text)")
        self.progress("llama.cpp")
        candidate = LlamaCpp(self.path, context=context, threads=threads)
        try:
            self.progress("reference model")
            if (Path(self.source.source) / "config.json").is_file():
                reference: Any = Transformers(self.source.source, threads=threads)
                against = reference.info()
            else:
                reference = Forward(self.source)
                against = {"runtime": "transformers, weights read by lconvert"}
                self.notes.append(
                    "logits: the reference is no Hugging Face folder, so lconvert read its weights itself"
                )
            self.details["runtimes"] = [against, candidate.info()]
            stats = compare(reference.logits, candidate.logits, texts, lambda: self.progress("logits"))
            self.cost(stats)
            quantized = any(isinstance(e.data, QTensor) for e in self.artifact.entries.values())
            if quantized:
                own = Forward(self.dequantized())
                self.fidelity(compare(own.logits, candidate.logits, texts, lambda: self.progress("fidelity")))
        finally:
            candidate.close()
        if quantized:
            self.graph(own, texts[:2], context, threads)

    def graph(self, own: Any, texts: list[list[int]], context: int, threads: int | None) -> None:
        """The artifact's numbers as F32 blocks in the same graph: what is wrong there is no kernel's rounding."""
        from lconvert.converters import gguf, gguf_mixture
        from lconvert.plan import execute
        from lconvert.validators.runtimes.llamacpp import LlamaCpp

        size = 4 * sum(e.data.size for e in self.artifact.entries.values())
        if size > _GRAPH_LIMIT:
            self.not_proven.append(
                f"logits: the graph with F32 weights, because they would take {size / 1e9:.0f} GB"
            )
            return
        self.progress("graph")
        losses = tuple(loss.name for loss in find(self.artifact.arch.family).gguf.losses(self.artifact.arch))
        options = gguf.Options(gguf_mixture.Options("F32"), allow_loss=losses)
        with tempfile.TemporaryDirectory(prefix="lconvert-") as folder:
            wide = execute(gguf.plan(self.artifact, "f32.gguf", options), Path(folder)).paths[0]
            runtime = LlamaCpp(wide, context=context, threads=threads)
            try:
                stats = compare(own.logits, runtime.logits, texts, lambda: self.progress("graph"))
            finally:
                runtime.close()
        self.details["graph"] = stats.to_json()
        gate = gate_file.float_gate(self.gates, self.source.arch.default.mlp.activation)
        value = f"mean {stats.kld_mean:.2e}  max {stats.kld_max:.2e}"
        self.add("logits", "graph with F32 weights", value, f"mean <= {gate:.1e}", stats.kld_mean <= gate)

    def dequantized(self) -> Model:
        """The artifact's numbers in the source's architecture (for example with the window llama.cpp ignores)."""
        from dataclasses import replace

        arch = replace(self.source.arch, norm_offset=self.artifact.arch.norm_offset)
        return replace(self.artifact, arch=arch, config=self.source.config)

    def ids(self, corpus: str) -> list[int]:
        if self.source.tokenizer is None:
            import numpy as np

            self.notes.append("no tokenizer: logits are compared on random token ids")
            return [int(i) for i in np.random.default_rng(0).integers(0, self.source.arch.vocab, 4096)]
        from lconvert.validators.runtimes.hf import reference_tokenizer

        ids = reference_tokenizer(self.source.tokenizer).encode(corpus, add_special_tokens=False).ids
        return list(ids)

    def bos(self) -> int | None:
        if self.source.tokenizer is None:
            return None
        found = self.source.tokenizer.special.get("bos", ())
        return found[0] if found else None

    def cost(self, stats: LogitStats) -> None:
        quantized = any(isinstance(e.data, QTensor) for e in self.artifact.entries.values())
        rounded = any(
            not isinstance(e.data, QTensor) and e.data.dtype not in ("F32", _dtype(self.source, n))
            for n, e in self.artifact.entries.items()
        )
        if quantized:
            gate = gate_file.cost_gate(self.gates, typical_bits(self.path))
        elif rounded:
            gate = float(self.gates["cost"][0]["kld_mean"])
        else:
            gate = gate_file.float_gate(self.gates, self.source.arch.default.mlp.activation)
        self.details["cost"] = stats.to_json()
        self._logit_rows("cost", stats, gate)

    def fidelity(self, stats: LogitStats) -> None:
        self.details["fidelity"] = stats.to_json()
        self._logit_rows("fidelity", stats, float(self.gates["fidelity"]["kld_mean"]))

    def _logit_rows(self, what: str, s: LogitStats, gate: float) -> None:
        value = f"mean {s.kld_mean:.2e}  median {s.kld_median:.2e}  99% {s.kld_p99:.2e}  max {s.kld_max:.2e}"
        self.add("logits", f"{what}: KL divergence", value, f"mean <= {gate:.1e}", s.kld_mean <= gate)
        same = f"{100 * s.same_top1:.2f}% of {s.tokens} tokens"
        self.add("logits", f"{what}: same top-1", same, "", None)
        ppl = f"{s.ppl_candidate:.4f} / {s.ppl_reference:.4f} = {s.ppl_ratio:.5f}"
        self.add("logits", f"{what}: perplexity", ppl, "", None)


def _dtype(model: Model, role: str) -> str:
    data = model.entries[role].data
    return "" if isinstance(data, QTensor) else data.dtype
