"""The logits tier: the artifact in its runtimes against the original model and against its own numbers.

cost: artifact against the original. fidelity: artifact against its own values evaluated in fp32. graph: for llama.cpp, the
same values as F32 blocks, which separates a wrong graph from kernels that round activations. stock: what llama.cpp's own
quantizer makes of the model at this size, which the artifact must not be worse than.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from lconvert.archs import find
from lconvert.converters import gguf, gguf_mixture
from lconvert.errors import InputError
from lconvert.ir import Model, QTensor
from lconvert.plan import execute
from lconvert.validators import gates as gate_file
from lconvert.validators import greedy, stock
from lconvert.validators.logits import LEAST, Logits, LogitStats, compare, paired, windows
from lconvert.validators.proof import Proof, files
from lconvert.validators.reference import Reference
from lconvert.validators.runtimes import DEFAULT, Purpose, Runtime, llamacpp, open_runtime
from lconvert.validators.runtimes.config import settings
from lconvert.validators.tensors import typical_bits

#: Largest temporary file for the check of the graph with F32 weights, and largest model given to the stock encoder.
_GRAPH_LIMIT = 8 << 30
_STOCK_LIMIT = 2 << 30


#: Tokens below which neighbours are too few for intervals (8 blocks of the bootstrap).
_FEW = 256
#: Runtimes whose speed costs accuracy, and by which setting: they are measured at both.
_SERVED = {"onnxruntime": "accuracy level 4"}


def run(proof: Proof, corpus: str) -> None:
    """All of the tier, for every runtime that was asked for."""
    context = window(proof)
    _limits(proof, context)
    texts = windows(token_ids(proof, corpus), context, _bos(proof), proof.options.max_windows)
    if (n := sum(map(len, texts))) < LEAST:
        raise InputError(
            f"{n} tokens to compare prove nothing; give a longer text (--text), more windows or longer ones"
        )
    if n < _FEW:
        proof.notes.append(
            f"logits: {n} tokens are few; intervals and the gate against the stock encoder need {_FEW}"
        )
    if len(texts) == 1 and len(texts[0]) < context:
        proof.notes.append(
            f"logits: the text is shorter than one window: {len(texts[0])} of {context} tokens"
        )
    reference = Reference(proof)
    names = proof.options.runtimes or (DEFAULT[proof.kind],)
    try:
        for name in names:
            work = _Comparison(proof, reference, name, texts, context)
            proof.guarded("logits", f"logits in {name}", work.run, runtime=name)
    finally:
        proof.notes += reference.notes
        reference.close()


def window(proof: Proof) -> int:
    """Tokens per window: as asked for, as the model has, and as far as the artifact is exact."""
    d = proof.source.arch
    losses = find(d.family).gguf.losses(d) if proof.kind == "gguf" else ()
    return min(proof.options.context, d.context, *(loss.limit for loss in losses if loss.limit))


def _limits(proof: Proof, context: int) -> None:
    """What the artifact lacks, and why windows are shorter than asked for."""
    d = proof.source.arch
    if context < proof.options.context:
        proof.notes.append(f"logits: windows of {context} tokens, as far as the model and the artifact go")
    for loss in find(d.family).gguf.losses(d) if proof.kind == "gguf" else ():
        limit = f"exact up to {loss.limit} tokens and validated within that" if loss.limit else "accepted"
        proof.notes.append(f"{loss.name}: {loss.reason}; {limit}")


def token_ids(proof: Proof, corpus: str) -> list[int]:
    if proof.source.tokenizer is None:
        proof.notes.append("no tokenizer: logits are compared on random token ids")
        return [int(i) for i in np.random.default_rng(0).integers(0, proof.source.arch.vocab, 4096)]
    from lconvert.validators.runtimes.hf import reference_tokenizer

    return list(reference_tokenizer(proof.source.tokenizer).encode(corpus, add_special_tokens=False).ids)


def _bos(proof: Proof) -> int | None:
    tokenizer = proof.source.tokenizer
    found = tokenizer.special.get("bos", ()) if tokenizer is not None else ()
    return found[0] if found else None


def opened(
    proof: Proof,
    name: str,
    path: Path,
    *,
    context: int = 512,
    vocab_only: bool = False,
    purpose: Purpose = "parity",
) -> Runtime:
    """A runtime by the options and by lconvert.toml, in another interpreter where one is configured."""
    configured = settings(name)
    python = proof.options.python.get(name) or configured.python
    if vocab_only and python is None:
        return llamacpp.LlamaCpp(path, vocab_only=True)
    return open_runtime(
        name,
        path,
        context=context,
        threads=proof.options.threads,
        purpose=purpose,
        python=python,
        timeout=proof.options.timeout or configured.timeout,
        options=configured.options,
    )


class _Comparison:
    """One runtime's part."""

    def __init__(
        self,
        proof: Proof,
        reference: Reference,
        name: str,
        texts: list[list[int]],
        context: int,
    ) -> None:
        self.proof, self.reference, self.name, self.texts = proof, reference, name, texts
        self.context = context

    def run(self) -> None:
        p = self.proof
        p.progress(f"opening {self.name}")
        with ExitStack() as stack:
            try:
                candidate = self._opened(stack, self.name, p.path)
            except InputError as e:
                p.add("structure", f"{self.name} loads it", str(e), "loads", False)
                return
            own = self._own()
            encoder = self._encoder(stack)
            models: dict[str, Logits] = {"reference": self.reference.logits, "candidate": candidate.logits}
            pairs = [("reference", "candidate")]
            if own is not None:
                models["own"] = own.logits
                pairs.append(("own", "candidate"))
            made = None if encoder is None else self._stock(encoder)
            if made is not None:
                models["stock"] = self._opened(stack, "llama.cpp", made.path).logits
                pairs.append(("reference", "stock"))
            total, done = len(self.texts), iter(range(1, len(self.texts) + 1))
            stats = compare(
                models,
                pairs,
                self.texts,
                progress=lambda: p.progress(f"window {next(done)} of {total} in {self.name}"),
                decode=self._decoder(),
            )
            self._runtimes(candidate)
            cost = stats["reference", "candidate"]
            self._cost(cost, None if made is None else stats["reference", "stock"])
            if own is not None:
                self._fidelity(stats["own", "candidate"])
            if made is not None:
                self._relative(cost, stats["reference", "stock"], made)
            self._greedy(candidate)
            if self.name in _SERVED:
                self._served(stack)
            if encoder is not None and p.options.curve:
                self._curve(stack, encoder, made, stats)
        if own is not None and p.kind == "gguf":
            self._graph(own)

    # --- the models

    def _opened(self, stack: ExitStack, name: str, path: Path) -> Runtime:
        runtime = opened(self.proof, name, path, context=self.context + self.proof.options.greedy[1])
        stack.callback(runtime.close)
        return runtime

    def _own(self) -> Any:
        """The artifact's numbers in fp32, in the source's architecture (with the window that llama.cpp ignores)."""
        p = self.proof
        if p.artifact is None or self.name == "dequantized" or not (p.quantized or p.rounded):
            return None
        from lconvert.forward import Forward

        return Forward(dequantized(p.source, p.artifact))

    def _decoder(self) -> Callable[[list[int]], str] | None:
        if self.proof.source.tokenizer is None:
            return None
        from lconvert.validators.runtimes.hf import reference_tokenizer

        tokenizer = reference_tokenizer(self.proof.source.tokenizer)

        def decode(ids: list[int]) -> str:
            return str(tokenizer.decode(ids, skip_special_tokens=False))

        return decode

    def _runtimes(self, candidate: Runtime) -> None:
        found = self.proof.details.setdefault("runtimes", [])
        if not found:
            found.append({"role": "reference"} | self.reference.info())
            if not self.reference.independent:
                self.proof.notes.append(
                    "logits: the reference is no Hugging Face folder, so lconvert read its weights itself"
                )
        found.append({"role": "candidate"} | candidate.info())

    # --- what is measured

    def _record(self, measure: str, stats: LogitStats, against: str, artifact: str = "") -> None:
        row = {
            "measure": measure,
            "runtime": self.name,
            "reference": against,
            "artifact": artifact or self.proof.path.name,
            "stats": stats.to_json(),
        }
        self.proof.details.setdefault("logits", []).append(row)

    def _cost(self, stats: LogitStats, rival: LogitStats | None) -> None:
        p = self.proof
        self._record("cost", stats, p.source.name or "original")
        if p.quantized:
            bits = self._typical_bits()
            gate, usual = gate_file.cost_gate(p.gates, bits), gate_file.usual(p.gates, bits)
            if stats.kld_mean > usual:
                p.notes.append(
                    f"quality: a mean KLD of {stats.kld_mean:.2g} is more than models of 7 to 8 billion parameters lose at "
                    f"this width ({usual:g}); it is this model's, not the conversion's, if the tensors are as they should be"
                )
            if rival is not None and p.gates["cost_follows_stock"]:
                gate = max(gate, rival.kld_mean * float(p.gates["relative"]["factor"]))
            self._rows("cost", stats, gate)
        elif p.rounded:
            self._rows("cost", stats, float(p.gates["cost"][0]["kld_mean"]))
        else:
            self._rows("cost", stats, self._floor())
            self._logprob(stats)

    def _typical_bits(self) -> float:
        """Bits per weight of the layers; by the file's size, where tensors are not read."""
        if self.proof.artifact is not None:
            return typical_bits(self.proof.artifact)
        size = sum(f.stat().st_size for f in files(self.proof.path))
        return 8 * size / max(1, sum(e.data.size for e in self.proof.source.entries.values()))

    def _floor(self) -> float:
        return gate_file.float_gate(
            self.proof.gates, self.proof.source.arch.default.mlp.activation, self.name
        )

    def _logprob(self, stats: LogitStats) -> None:
        """The largest difference of a log-probability, for runtimes whose floor was measured in it."""
        limit = self.proof.gates["float_logprob"].get(self.name)
        if limit is not None:
            value = stats.max_logprob_difference
            self._add("largest |delta log p|", f"{value:.2e}", f"<= {limit:.1e}", value, limit)

    def _fidelity(self, stats: LogitStats) -> None:
        self._record("fidelity", stats, "the artifact's numbers in fp32")
        self._rows(
            "fidelity", stats, gate_file.fidelity_gate(self.proof.gates, self.name, self._typical_bits())
        )

    def _rows(self, what: str, s: LogitStats, gate: float) -> None:
        k = s.data["kld"]
        value = f"mean {k['mean']:.2e}  median {k['median']:.2e}  99% {k['p99']:.2e}  max {k['max']:.2e}"
        self._add(f"{what}: KL divergence", value, f"mean <= {gate:.1e}", k["mean"], gate)
        same = f"{100 * s.same_top1:.2f}% of {s.tokens} tokens"
        self._add(f"{what}: same top-1", same, measured=s.same_top1)
        ppl = s.data["ppl"]
        if ppl["reference"] is not None:
            value = f"{ppl['candidate']:.4f} / {ppl['reference']:.4f} = {ppl['ratio']:.5f}"
            self._add(f"{what}: perplexity", value, measured=ppl["ratio"])

    def _add(
        self, name: str, value: str, gate: str = "", measured: float | None = None, limit: float | None = None
    ) -> None:
        default = self.name == DEFAULT[self.proof.kind]
        passed = None if limit is None or measured is None else measured <= limit
        label = name if default else f"{name} ({self.name})"
        self.proof.add("logits", label, value, gate, passed, measured=measured, limit=limit)

    # --- against the stock encoder

    def _encoder(self, stack: ExitStack) -> stock.StockEncoder | None:
        p = self.proof
        if p.kind != "gguf" or not p.quantized:
            return None
        if not p.options.relative:
            p.not_proven.append("relative to the stock encoder: left out by choice")
            if not p.options.curve:
                return None
        if any(isinstance(e.data, QTensor) for e in p.source.entries.values()):
            p.not_proven.append("relative to the stock encoder: the source is quantized itself")
            return None
        size = stock.StockEncoder.size(p.source)
        if size > _STOCK_LIMIT and not p.options.curve:
            p.not_proven.append(
                f"relative to the stock encoder: it would have to quantize {size / 1e9:.0f} GB; --curve does it"
            )
            return None
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="lconvert-"))
        return stock.StockEncoder(p.source, Path(folder), p.options.threads)

    def _stock(self, encoder: stock.StockEncoder) -> stock.Stock | None:
        """The stock file to compare with: the artifact's own mixture, else the largest that is no larger than it."""
        p = self.proof
        if not p.options.relative:
            return None
        p.progress("stock encoder")
        bits = stock.bits_per_weight(p.path)
        name = stock.rival(p.source, stock.file_type(p.path), bits)
        if name is None:
            p.not_proven.append(f"relative to the stock encoder: it makes nothing of {bits:.2f} bits or less")
        return None if name is None else encoder.make(name)

    def _relative(self, ours: LogitStats, theirs: LogitStats, made: stock.Stock) -> None:
        p = self.proof
        self._record("stock", theirs, p.source.name or "original", f"llama.cpp {made.type}")
        difference, error = paired(ours, theirs)
        rule = p.gates["relative"]
        limit = theirs.kld_mean * (float(rule["factor"]) - 1) + float(rule["errors"]) * error
        value = f"{ours.kld_mean:.3e} against {theirs.kld_mean:.3e} ({made.type}, {made.bits_per_weight:.2f} bits)"
        gate = f"difference {difference:.1e} <= {limit:.1e}"
        self._add("no worse than the stock encoder", value, gate, difference, limit)
        p.details["artifact"]["stock"] = {"type": made.type, "bits_per_weight": made.bits_per_weight}

    def _curve(
        self, stack: ExitStack, encoder: stock.StockEncoder, made: stock.Stock | None, stats: Any
    ) -> None:
        """Quality against size of the stock types."""
        rows = []
        for name in stock.CURVE:
            self.proof.progress(f"stock {name}")
            if made is not None and made.type == name:
                found, kld = made, stats["reference", "stock"].kld_mean
            else:
                found = encoder.make(name)
                with ExitStack() as one:
                    runtime = self._opened(one, "llama.cpp", found.path)
                    models = {"reference": self.reference.logits, "stock": runtime.logits}
                    kld = compare(models, [("reference", "stock")], self.texts)["reference", "stock"].kld_mean
            rows.append(
                {
                    "type": name,
                    "bytes": found.bytes,
                    "bits_per_weight": found.bits_per_weight,
                    "kld_mean": kld,
                    "stock": True,
                }
            )
        self.proof.details["curve"] = rows

    # --- as served, greedy continuation, and the graph

    def _served(self, stack: ExitStack) -> None:
        """The cost at the settings that one would serve with; no gate judges it."""
        p = self.proof
        p.progress(f"{self.name} as served")
        context = self.context + p.options.greedy[1]
        runtime = opened(p, self.name, p.path, context=context, purpose="speed")
        stack.callback(runtime.close)
        models = {"reference": self.reference.logits, "served": runtime.logits}
        stats = compare(models, [("reference", "served")], self.texts[:2])["reference", "served"]
        p.details["runtimes"].append({"role": "served"} | runtime.info())
        self._record("served", stats, p.source.name or "original")
        name = f"as served: KL divergence ({_SERVED[self.name]})"
        self._add(name, f"mean {stats.kld_mean:.2e}", measured=stats.kld_mean)

    def _greedy(self, candidate: Runtime) -> None:
        p = self.proof
        count, length = p.options.greedy
        if (
            not count or not length or self.name == "dequantized"
        ):  # which nobody serves, and which has no cache
            return
        p.progress("greedy continuation")
        prompts = [ids[: max(1, min(32, len(ids) - 1))] for ids in self.texts[:count]]
        found = greedy.compare(self.reference, candidate, prompts, length)  # type: ignore[arg-type]
        p.details.setdefault("greedy", found.to_json() | {"runtime": self.name})
        value = f"{100 * found.agreement:.1f}% of {found.tokens} tokens until the texts part"
        exact = not (p.quantized or p.rounded)
        wrong = [d for d in found.differences if not d.tie]
        if wrong:
            value += f", at logit gaps up to {max(abs(d.margin) for d in wrong):.2g}"
        if exact and p.artifact is not None:
            self._add("greedy continuation", value, "no difference but ties", len(wrong), 0)
        else:
            self._add("greedy continuation", value, measured=found.agreement)

    def _graph(self, own: Any) -> None:
        """The artifact's numbers as F32 blocks in the same graph: what is wrong there is no kernel's rounding."""
        p = self.proof
        assert p.artifact is not None
        size = 4 * sum(e.data.size for e in p.artifact.entries.values())
        if size > _GRAPH_LIMIT:
            p.not_proven.append(
                f"logits: the graph with F32 weights, because they would take {size / 1e9:.0f} GB"
            )
            return
        p.progress("graph")
        losses = tuple(loss.name for loss in find(p.artifact.arch.family).gguf.losses(p.artifact.arch))
        options = gguf.Options(gguf_mixture.Options("F32"), allow_loss=losses)
        with tempfile.TemporaryDirectory(prefix="lconvert-") as folder, ExitStack() as stack:
            wide = execute(gguf.plan(p.artifact, "f32.gguf", options), Path(folder)).paths[0]
            runtime = self._opened(stack, "llama.cpp", wide)
            models = {"own": own.logits, "wide": runtime.logits}
            stats = compare(models, [("own", "wide")], self.texts[:2])["own", "wide"]
        self._record("graph", stats, "the artifact's numbers in fp32", "the artifact's numbers as F32 blocks")
        gate = gate_file.float_gate(p.gates, p.source.arch.default.mlp.activation, "llama.cpp")
        value = f"mean {stats.kld_mean:.2e}  max {stats.kld_max:.2e}"
        self._add("graph with F32 weights", value, f"mean <= {gate:.1e}", stats.kld_mean, gate)


def dequantized(source: Model, artifact: Model) -> Model:
    """The artifact's numbers in the source's architecture and configuration."""
    arch = replace(source.arch, norm_offset=artifact.arch.norm_offset)
    return replace(artifact, arch=arch, config=source.config)
