"""The logits tier: the artifact in its runtimes against the original model and against its own numbers.

cost: artifact against the original. fidelity: artifact against its own values evaluated in fp32. graph: for llama.cpp, the
same values as F32 blocks, which separates a wrong graph from kernels that round activations. stock: what llama.cpp's or, for graphs,
ONNX Runtime's own quantizer makes of the model at this size, which the artifact must not be worse than.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lconvert.converters import gguf
from lconvert.converters.onnx_source import Found
from lconvert.errors import InputError, RuntimeFailure, UnsupportedError
from lconvert.executor import execute
from lconvert.ir import Model, QTensor
from lconvert.validators import gates as gate_file
from lconvert.validators import (
    greedy,
    logit_gates,
    onnx_behaviour,
    onnx_engine,
    onnx_twin,
    rounded_forward,
    stock,
    stock_onnx,
    stored,
)
from lconvert.validators.evaluation_text import shown, window
from lconvert.validators.logits import Logits, LogitStats, compare, paired
from lconvert.validators.proof import Proof
from lconvert.validators.reference import Reference
from lconvert.validators.runtimes import Purpose, Runtime, llamacpp, open_runtime
from lconvert.validators.runtimes.config import settings
from lconvert.validators.runtimes.onnxruntime import OnnxRuntime

#: Largest temporary file for the check of the graph with F32 weights, and largest model given to the stock encoder.
_GRAPH_LIMIT = 8 << 30
_STOCK_LIMIT = 2 << 30


#: Runtimes whose speed costs accuracy, and by which setting: they are measured at both.
_SERVED = {"onnxruntime": "accuracy level 4"}


def run(proof: Proof) -> None:
    """All of the tier, for every runtime that was asked for."""
    context = window(proof)
    texts = shown(proof, context)
    reference = Reference(proof)
    try:
        for name in (*proof.runtimes, *onnx_engine.also(proof)):
            _run_in(proof, reference, name, texts, context)
    finally:
        proof.notes += reference.notes
        reference.close()


#: What vLLM says where the machine, not the artifact, lacks something: its CPU build has kernels for few schemes.
_NO_KERNEL = (
    "Failed to find a kernel", "is not supported", "not available", "not implemented", "expected at most 0 argument", "capability",
)  # fmt: skip

#: The same of formats that it does not load at all (ModelOpt's integers are TensorRT-LLM's, bitsandbytes is for training); a failure
#: where vLLM was asked for.
_NO_LOADER = ("only supports", "Unknown quantization method")


def _run_in(proof: Proof, reference: Reference, name: str, texts: list[list[int]], context: int) -> None:
    """One runtime's part. A vLLM without kernels for the scheme proves nothing; transformers runs it then, where it can."""
    work = _Comparison(proof, reference, name, texts, context)
    try:
        proof.guarded("logits", f"logits in {name}", work.run, runtime=name)
    except _NoKernel as e:
        where = (
            f"a GPU that has them (--python {name}=PATH there)"
            if name == "vllm"
            else "another provider or engine"
        )
        proof.not_proven.append(f"logits in {name}: {e}; it needs {where}")
        proof.missing_required |= name in proof.options.require
        if name == "onnxruntime" and proof.graph is not None:
            _restated(proof, reference, proof.graph, texts, context)
        if proof.substitute and not proof.options.runtimes:
            _instead(proof, reference, proof.substitute, texts, context)


def _instead(proof: Proof, reference: Reference, name: str, texts: list[list[int]], context: int) -> None:
    """A runtime that was not asked for: where it refuses the artifact, that says nothing about it."""
    work = _Comparison(proof, reference, name, texts, context)
    try:
        proof.guarded("logits", f"logits in {name}", work.run, runtime=name)
    except InputError as e:
        proof.not_proven.append(f"logits in {name}: {e}")


def _restated(proof: Proof, reference: Reference, found: Found, texts: list[list[int]], context: int) -> None:
    """The same graph in F32, which ONNX Runtime runs."""
    if onnx_twin.size(found) > onnx_twin.LIMIT:
        proof.not_proven.append("logits of the graph restated in F32: it would be written out once more")
        return
    with tempfile.TemporaryDirectory(prefix="lconvert-") as folder:
        proof.progress("restating the graph in F32")
        twin = onnx_twin.write(found, Path(folder))
        work = _Comparison(proof, reference, "onnxruntime", texts, context, twin)
        try:
            proof.guarded("logits", "logits of the graph restated in F32", work.run, runtime="onnxruntime")
        except _NoKernel as e:
            proof.not_proven.append(f"logits of the graph restated in F32: {e}")
            return
        except InputError as e:
            proof.add("logits", "graph restated in F32", str(e), "runs to the end", False)
            return
    proof.notes.append(
        "logits: ONNX Runtime ran the graph restated in F32 (the same nodes; half precision widened, FP4 weights as the values that onnx's "
        "reference evaluator gives them)"
    )


#: What ONNX Runtime says of types that its CPU provider does not multiply (BF16, FP4), and of TensorRT's own operators.
_NO_OPERATOR = re.compile(r"NOT_IMPLEMENTED|trt:\w+\S* is not a registered function/op")


class _NoKernel(Exception):
    """The runtime has no code for the artifact's scheme on this machine."""


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


@dataclass(frozen=True)
class _Rival:
    """Another quantizer's numbers for the same model. bits: per weight."""

    maker: str
    type: str
    bits: float
    logits: Logits


class _Comparison:
    """One runtime's part."""

    def __init__(
        self,
        proof: Proof,
        reference: Reference,
        name: str,
        texts: list[list[int]],
        context: int,
        twin: Path | None = None,
    ) -> None:
        self.proof, self.reference, self.name, self.texts = proof, reference, name, texts
        self.context, self.twin = context, twin
        self.ran = self.dtype = ""

    def run(self) -> None:
        p = self.proof
        p.progress(f"opening {self.name}")
        with ExitStack() as stack:
            try:
                candidate = self._opened(stack, self.name, self.twin or p.path)
            except InputError as e:
                self._explained(e)
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
            rival = self._rival(stack, made)
            if rival is not None:
                models["stock"] = rival.logits
                pairs.append(("reference", "stock"))
            total, done = len(self.texts), iter(range(1, len(self.texts) + 1))
            try:
                stats = compare(
                    models,
                    pairs,
                    self.texts,
                    progress=lambda: p.progress(f"window {next(done)} of {total} in {self.name}"),
                    decode=self._decoder(),
                )
            except RuntimeFailure as e:
                self._explained(e)
                raise
            self._runtimes(candidate)
            cost = stats["reference", "candidate"]
            self._cost(cost, None if rival is None else stats["reference", "stock"])
            if own is not None:
                self._fidelity(stats["own", "candidate"])
            if rival is not None:
                self._relative(cost, stats["reference", "stock"], rival)
            self._greedy(candidate)
            if isinstance(candidate, OnnxRuntime):
                onnx_behaviour.run(p, candidate, self.texts, self.ran)
            if self.name in _SERVED and self.twin is None:
                self._served(stack)
            if encoder is not None and p.options.curve:
                self._curve(stack, encoder, made, stats)
        if own is not None and p.kind == "gguf":
            self._graph(own)

    def _explained(self, e: Exception) -> None:
        """_NoKernel for a failure of vLLM, or of ONNX Runtime's CPU provider, that is the machine's."""
        text = str(e)
        if self.name == "onnxruntime" and self.proof.graph is not None and (hit := _NO_OPERATOR.search(text)):
            reason = text[hit.start() :].partition(". ")[0].partition("); ")[0].rstrip(")")
            raise _NoKernel(f"its CPU provider has no kernel for these types ({reason})") from None
        known = _NO_KERNEL if self.proof.options.runtimes else (*_NO_KERNEL, *_NO_LOADER)
        if self.name == "vllm" and self.proof.quantized and any(part in text for part in known):
            reason = next((line for line in text.splitlines() if any(p in line for p in known)), text)
            raise _NoKernel(f"no kernel for this scheme here ({' '.join(reason.split())[-300:]})") from None

    # --- the models

    def _opened(self, stack: ExitStack, name: str, path: Path, purpose: Purpose = "parity") -> Runtime:
        context = self.context + self.proof.options.greedy[1]
        runtime = opened(self.proof, name, path, context=context, purpose=purpose)
        stack.callback(runtime.close)
        return runtime

    def _own(self) -> Any:
        """The artifact's numbers in fp32, in the source's architecture (with the window that llama.cpp ignores)."""
        p = self.proof
        if p.artifact is None or self.name == "dequantized":
            return None
        if not (p.quantized or p.rounded or logit_gates.halves(p, self.name)):
            return None
        from lconvert.forward import Forward

        model = dequantized(p.source, p.artifact)
        return self._rounding(model) or Forward(model)

    def _rounding(self, model: Model) -> Any:
        """The same with inputs rounded as a graph does, None where they are not, or where transformers cannot be made to."""
        p = self.proof
        if p.graph is None or not rounded_forward.rounds(model):
            return None
        try:
            made = rounded_forward.RoundedForward(model)
        except UnsupportedError as e:
            p.notes.append(
                f"fidelity: with what rounding inputs costs, for the reference does not round them ({e})"
            )
            return None
        p.notes.append(
            "fidelity: the reference rounds inputs as the graph does; a value between two codes may fall to either"
        )
        return made

    def _decoder(self) -> Callable[[list[int]], str] | None:
        fast = self.proof.tokenizer
        return None if fast is None else lambda ids: str(fast.decode(ids, skip_special_tokens=False))

    def _runtimes(self, candidate: Runtime) -> None:
        found = self.proof.details.setdefault("runtimes", [])
        if not found:
            found.append({"role": "reference"} | self.reference.info())
            if not self.reference.independent:
                self.proof.notes.append(
                    "logits: the reference is the source's dequantized numbers, which lconvert read itself"
                    if self.proof.carries
                    else "logits: the reference is no Hugging Face folder, so lconvert read its weights itself"
                )
        info = candidate.info()
        self.ran = self.dtype = info.get("dtype", "")
        if (
            self.twin is not None and self.proof.graph is not None
        ):  # whose tables the graph's type has rounded
            self.dtype = {"F16": "float16", "BF16": "bfloat16"}.get(self.proof.graph.dtype, self.dtype)
        found.append({"role": "candidate"} | info)

    # --- what is measured

    def _record(self, measure: str, stats: LogitStats, against: str, artifact: str = "") -> None:
        row = {
            "measure": measure,
            "runtime": self.name,
            "reference": against,
            "artifact": artifact or self.proof.path.name + (" in F32" if self.twin is not None else ""),
            "stats": stats.to_json(),
        }
        self.proof.details.setdefault("logits", []).append(row)

    def _cost(self, stats: LogitStats, rival: LogitStats | None) -> None:
        p = self.proof
        self._record("cost", stats, p.source.name or "original")
        if p.quantized:
            bits = logit_gates.typical_bits(p)
            gate, usual = gate_file.cost_gate(p.gates, bits), gate_file.usual(p.gates, bits)
            if stats.kld_mean > usual:
                p.notes.append(
                    f"quality: a mean KLD of {stats.kld_mean:.2g} is more than models of 7 to 8 billion parameters lose at "
                    f"this width ({usual:g}); it is this model's, not the conversion's, if the tensors are as they should be"
                )
            if p.exactly_carried:
                gate = logit_gates.noise(p, self.name, self.dtype)
            elif p.kind == "hf" or p.graph is not None:  # both what the grid loses and what the runtime does
                gate += logit_gates.noise(p, self.name, self.dtype)
            if rival is not None and p.gates["cost_follows_stock"]:
                gate = max(gate, rival.kld_mean + self._margin(stats, rival))
            self._rows("cost", stats, gate)
        elif p.rounded:
            self._rows("cost", stats, float(p.gates["cost"][0]["kld_mean"]))
        elif self.twin is not None:
            self._rows("cost", stats, logit_gates.noise(p, self.name, self.dtype))
        else:
            self._rows("cost", stats, logit_gates.floor(p, self.name))
            self._logprob(stats)

    def _logprob(self, stats: LogitStats) -> None:
        """The largest difference of a log-probability, for runtimes whose floor was measured in it."""
        limit = self.proof.gates["float_logprob"].get(self.name)
        if limit is not None:
            value = stats.max_logprob_difference
            self._add("largest |delta log p|", f"{value:.2e}", f"<= {limit:.1e}", value, limit)

    def _fidelity(self, stats: LogitStats) -> None:
        self._record("fidelity", stats, "the artifact's numbers in fp32")
        self._rows("fidelity", stats, logit_gates.noise(self.proof, self.name, self.dtype))

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
        label = name if self.name == self.proof.default_runtime else f"{name} ({self.name})"
        label += " (restated in F32)" if self.twin is not None else ""
        if limit is None or measured is None:
            self.proof.add("logits", label, value, measured=measured)
        else:
            self.proof.at_most("logits", label, value, measured, limit, gate)

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
        assert p.header is not None
        bits = stored.gguf_bits(p.header) or 0.0
        name = stock.rival(p.source, stored.gguf_file_type(p.header), bits)
        if name is None:
            p.not_proven.append(f"relative to the stock encoder: it makes nothing of {bits:.2f} bits or less")
        return None if name is None else encoder.make(name)

    def _rival(self, stack: ExitStack, made: stock.Stock | None) -> _Rival | None:
        """What a quantized artifact must not be worse than: a file of llama.cpp's quantizer, or the numbers of ONNX Runtime's."""
        p = self.proof
        if made is not None:
            logits = self._opened(stack, "llama.cpp", made.path).logits
            return _Rival("llama.cpp", made.type, made.bits_per_weight, logits)
        if p.graph is None or p.artifact is None or self.name != "onnxruntime" or not p.quantized:
            return None
        found = stock_onnx.rival(p.source, p.artifact) if p.options.relative else "left out by choice"
        if isinstance(found, str):
            p.not_proven.append(f"relative to the stock encoder: {found}")
            return None
        from lconvert.forward import Forward

        bits = logit_gates.typical_bits(p)
        return _Rival("ONNX Runtime's quantizer", "same blocks", bits, Forward(found).logits)

    def _margin(self, ours: LogitStats, theirs: LogitStats) -> float:
        """By how much the mean KLD may be above another quantizer's on the same text."""
        rule = self.proof.gates["relative" if self.proof.graph is None else "relative_graph"]
        error = paired(ours, theirs)[1]
        return theirs.kld_mean * (float(rule["factor"]) - 1) + float(rule["errors"]) * error

    def _relative(self, ours: LogitStats, theirs: LogitStats, made: _Rival) -> None:
        p = self.proof
        self._record("stock", theirs, p.source.name or "original", f"{made.maker} {made.type}")
        difference, limit = paired(ours, theirs)[0], self._margin(ours, theirs)
        value = f"{ours.kld_mean:.3e} against {theirs.kld_mean:.3e} ({made.type}, {made.bits:.2f} bits)"
        if p.pruned:  # of the same bits a dense model keeps more, which is no fault of the artifact
            self._add("beside the stock encoder, which prunes nothing", value, measured=difference)
        else:
            gate = f"difference {difference:.1e} <= {limit:.1e}"
            self._add("no worse than the stock encoder", value, gate, difference, limit)
        p.details["artifact"]["stock"] = {"type": made.type, "bits_per_weight": made.bits}

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
        runtime = self._opened(stack, self.name, p.path, "speed")
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
        found = greedy.compare(self.reference, candidate, prompts, length)
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
        options = stock.options(p.artifact.decoder, "F32")
        with tempfile.TemporaryDirectory(prefix="lconvert-") as folder, ExitStack() as stack:
            wide = execute(gguf.plan(p.artifact, "f32.gguf", options), Path(folder)).paths[0]
            runtime = self._opened(stack, "llama.cpp", wide)
            models = {"own": own.logits, "wide": runtime.logits}
            stats = compare(models, [("own", "wide")], self.texts[:2])["own", "wide"]
        self._record("graph", stats, "the artifact's numbers in fp32", "the artifact's numbers as F32 blocks")
        gate = gate_file.float_gate(p.gates, p.source.decoder.default.mlp.activation, "llama.cpp")
        value = f"mean {stats.kld_mean:.2e}  max {stats.kld_max:.2e}"
        self._add("graph with F32 weights", value, f"mean <= {gate:.1e}", stats.kld_mean, gate)


def dequantized(source: Model, artifact: Model) -> Model:
    """The artifact's numbers in the source's architecture and configuration."""
    arch = replace(source.decoder, norm_offset=artifact.decoder.norm_offset)
    return replace(artifact, arch=arch, config=source.config)
