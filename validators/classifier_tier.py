"""The logits of an encoder or a convolutional network: the artifact in its runtime against the original and against its own numbers.

    reference  transformers or torch against the evaluation in NumPy (classifier_forward.py), so that neither is believed alone
    graph      the artifact with its inputs not rounded against its own weights in NumPy: where mask, positions and order of nodes show
    alone      the same graph: each sequence without padding against the padded batch, each image against its batch
    fidelity   as it is, against an evaluation that rounds the same way
    cost       as it is, against the original: what int8 costs its user
    served     the same at the settings that one would serve with

Differences are over the root mean square of the logits, so that their unit does not matter.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lconvert.errors import InputError, MissingPackageError
from lconvert.forward import Forward, explained, packages, sequential
from lconvert.ir import Convnet, Encoder, Model, QTensor
from lconvert.passes import examples
from lconvert.validators import classifier_data
from lconvert.validators.classifier_data import Data
from lconvert.validators.classifier_forward import Network
from lconvert.validators.proof import Proof
from lconvert.validators.rounded_forward import number, rounds
from lconvert.validators.runtimes.onnx_classifier import OnnxClassifier

Array = NDArray[np.float32]
Run = Callable[[Mapping[str, Any]], Array]
_BATCH = 4
#: What ONNX Runtime says of types that its CPU provider does not multiply.
_NO_OPERATOR = "NOT_IMPLEMENTED"
#: Examples that are run once more alone.
_ALONE = 16


def run(proof: Proof) -> None:
    """The whole tier."""
    if proof.artifact is None:
        proof.not_proven.append("logits: only graphs that lconvert wrote are read into the IR")
        return
    found = classifier_data.data(proof)
    proof.notes.append(f"logits: compared on {found.what}")
    if proof.kind == "onnx":
        proof.guarded("logits", "logits in onnxruntime", lambda: _opened(proof, found), "onnxruntime")
    else:
        proof.notes.append(
            "logits: no graph, so the artifact's numbers are evaluated by lconvert itself, in NumPy"
        )
        own = Network(proof.artifact, rounded=True)
        _Comparison(proof, proof.artifact, own.logits, None, None).run(found)


def _opened(proof: Proof, found: Data) -> None:
    """The graph in its sessions. Types that the CPU has no kernels for are no fault of the artifact."""
    artifact = proof.artifact
    assert artifact is not None
    threads, path = proof.options.threads, proof.path
    try:
        candidate = OnnxClassifier(path, threads=threads)
        plain = OnnxClassifier(path, threads=threads, rounding=False) if _static(artifact) else None
        served = OnnxClassifier(path, threads=threads, purpose="speed")
    except InputError as e:
        if _NO_OPERATOR not in str(e):
            proof.add("structure", "onnxruntime loads it", str(e), "loads", False)
            return
        proof.not_proven.append(
            f"logits in onnxruntime: its CPU provider has no kernel for these types ({e})"
        )
        proof.missing_required |= "onnxruntime" in proof.options.require
        return
    proof.details.setdefault("runtimes", []).append({"role": "candidate", **candidate.info()})
    if plain is None and not rounds(artifact):
        plain = candidate
    try:
        _Comparison(
            proof, artifact, candidate.logits, None if plain is None else plain.logits, served.logits
        ).run(found)
    except InputError as e:
        proof.add("logits", "onnxruntime runs it", str(e), "runs to the end", False)


def _static(model: Model) -> bool:
    """Whether inputs are rounded, and all of them by scales that are known."""
    found = [
        e.activation
        for e in model.entries.values()
        if e.activation is not None and isinstance(e.data, QTensor)
    ]
    return bool(found) and all(a is not None and not a.dynamic for a in found)


class _Comparison:
    """candidate: the artifact as it is; plain: the same without rounding, where that can be had; served: at other settings."""

    def __init__(
        self, proof: Proof, artifact: Model, candidate: Run, plain: Run | None, served: Run | None
    ) -> None:
        self.proof, self.artifact = proof, artifact
        self.candidate, self.plain, self.served = candidate, plain, served

    def run(self, found: Data) -> None:
        p = self.proof
        batches = [_trimmed(b) for b in found.shown.batches(_BATCH)]
        p.progress("reference")
        reference = _over(Network(p.source).logits, batches)
        unit = max(float(np.sqrt(np.square(reference, dtype=np.float64).mean())), 1e-30)
        self._reference(batches, reference, unit)
        p.progress("the artifact")
        got = _over(self.candidate, batches)
        if not np.isfinite(got).all():
            p.add("logits", "finite logits", f"{int((~np.isfinite(got)).sum())} are not", "all", False)
            return
        self._graph(batches, unit)
        self._cost(found, reference, got, unit)
        if rounds(self.artifact):
            self._rounded(found, batches, got, reference, unit)
        if self.served is not None and p.quantized:
            other = _over(self.served, batches)
            value = f"{_rms(other, reference, unit):.3g} of their RMS, {_same(other, reference):.2%} the same class"
            p.add("logits", "served: error of the logits", value, measured=_rms(other, reference, unit))

    def _dtype(self) -> str:
        return "F32" if self.proof.graph is None else self.proof.graph.dtype

    def _largest(self, name: str, found: Array, wanted: Array, unit: float, gate: str, what: str) -> None:
        """A gate on the largest difference of any logit."""
        value = float(np.nan_to_num(np.abs(found - wanted), nan=np.inf).max()) / unit
        limit = float(self.proof.gates["classifier_difference"][gate])
        self.proof.at_most("logits", name, f"{value:.2e} of their RMS {what}", value, limit)

    def _reference(self, batches: list[Any], reference: Array, unit: float) -> None:
        """Somebody else's evaluation of the original."""
        p = self.proof
        try:
            name, run = _theirs(p)
        except MissingPackageError as e:
            p.not_proven.append(f"logits: the evaluation in NumPy against another one ({e})")
            return
        what = f"between {name} and NumPy"
        self._largest(
            "reference: largest difference", _over(run, batches), reference, unit, "reference", what
        )

    def _graph(self, batches: list[Any], unit: float) -> None:
        if self.plain is None:
            if self.proof.graph is not None:
                self.proof.not_proven.append(
                    "logits: the graph without rounding; it finds scales of inputs while it runs"
                )
            return
        got = _over(self.plain, batches)
        own = _over(Network(self.artifact).logits, batches)
        what = "from its own weights" + (", inputs not rounded" if rounds(self.artifact) else "")
        self._largest("graph: largest difference", got, own, unit, self._dtype(), what)
        one = [
            {k: v[i : i + 1] for k, v in b.items()}
            for b in batches
            for i in range(len(next(iter(b.values()))))
        ]
        some = one[:: max(1, len(one) // _ALONE)]
        alone, batch = _over(self.plain, [_trimmed(x) for x in some]), got[:: max(1, len(one) // _ALONE)]
        kind = "padding on the right" if isinstance(self.proof.source.arch, Encoder) else "batch"
        what = f"from each of {len(some)} alone"
        self._largest(f"{kind}: largest difference", batch, alone, unit, self._dtype(), what)

    def _cost(self, found: Data, reference: Array, got: Array, unit: float) -> None:
        p, error = self.proof, _rms(got, reference, unit)
        value = f"{error:.3g} of their RMS, largest difference {np.abs(got - reference).max():.3g}"
        exact = not p.quantized and not rounds(self.artifact)
        if exact:
            limit = float(p.gates["classifier_difference"][self._dtype()])
            p.at_most("logits", "cost: error of the logits", value, error, limit)
        elif found.real:
            gate = "cost" if _bits(self.artifact) >= 8 else "cost_narrow"
            p.at_most(
                "logits",
                "cost: error of the logits",
                value,
                error,
                float(p.gates["classifier_rounded"][gate]),
            )
        else:
            p.add("logits", "cost: error of the logits", value, measured=error)
            p.not_proven.append(
                f"logits: what rounding costs on real data, of which {found.what} say little: give --text FILE, {examples.wanted(p.source)}"
            )
        p.add(
            "logits",
            "cost: same class",
            f"{_same(got, reference):.2%} of {len(got)}",
            measured=_same(got, reference),
        )
        labels = found.shown.labels
        if labels is not None:
            before, after = (float((x.argmax(1) == labels).mean()) for x in (reference, got))
            value = f"{after:.2%} of {len(labels)}, the original {before:.2%}"
            lost = float(p.gates["classifier_rounded"]["accuracy_lost"])
            p.at_most("logits", "cost: accuracy", value, before - after, lost, f"at most {lost:.0%} lost")

    def _rounded(self, found: Data, batches: list[Any], got: Array, reference: Array, unit: float) -> None:
        """Fidelity, and whether the inputs lie within what their codes can say."""
        p, ends = self.proof, _ends(self.artifact)
        beyond: dict[str, list[int]] = {role: [0, 0] for role in ends}

        def see(role: str, x: Array) -> None:
            if role in ends:
                low, high = ends[role]
                beyond[role][0] += int(((x < low) | (x > high)).sum())
                beyond[role][1] += x.size

        own = _over(Network(self.artifact, rounded=True, seen=see).logits, batches)
        gates = p.gates["classifier_rounded"]
        floor = float(p.gates["classifier_difference"][self._dtype()])
        limit = float(gates["fidelity"]) * _rms(own, reference, unit) + floor
        error = _rms(got, own, unit)
        value = f"{error:.2e} of their RMS from an evaluation that rounds the same"
        if p.graph is not None:  # without one it is this evaluation
            p.at_most("logits", "fidelity: error of the logits", value, error, limit)
        shares = {role: out / max(1, n) for role, (out, n) in beyond.items()}
        if not shares:
            return
        worst = max(shares, key=lambda r: shares[r])
        value = f"{shares[worst]:.2%} of those of {worst}"
        if found.real:
            p.at_most("logits", "inputs beyond their codes", value, shares[worst], float(gates["beyond"]))
        else:
            p.add("logits", "inputs beyond their codes", value, measured=shares[worst])


def _ends(model: Model) -> dict[str, tuple[float, float]]:
    """The smallest and largest value that the codes of an input stand for, by role; half a step more is still rounded to them."""
    out = {}
    for role, e in model.entries.items():
        a = e.activation
        if (
            a is None
            or a.dynamic
            or a.scale is None
            or a.grid.kind != "int"
            or not isinstance(e.data, QTensor)
        ):
            continue
        scale, zero = float(number(a.scale)[0]), 0.0 if a.zero is None else float(number(a.zero)[0])
        low, high = (
            (-(1 << a.grid.bits - 1), (1 << a.grid.bits - 1) - 1)
            if a.grid.signed
            else (0, (1 << a.grid.bits) - 1)
        )
        out[role] = ((low - zero - 0.5) * scale, (high - zero + 0.5) * scale)
    return out


def _bits(model: Model) -> int:
    """Of the narrowest weights."""
    return min((e.data.grid.bits for e in model.entries.values() if isinstance(e.data, QTensor)), default=32)


def _theirs(proof: Proof) -> tuple[str, Run]:
    """transformers on the source's own folder where that is a plain one, else on our reading; torch for convolutions."""
    torch, transformers = packages()
    source = proof.source
    if isinstance(source.arch, Convnet):
        module = sequential(source)

        def images(feed: Mapping[str, Any]) -> Array:
            with torch.no_grad():
                return np.asarray(module(torch.from_numpy(np.array(feed["images"]))).numpy(), np.float32)

        return "torch", images
    if not (Path(source.source) / "config.json").is_file() or proof.carries:
        return "transformers", Forward(source).classify
    transformers.utils.logging.disable_progress_bar()
    with explained(source.source):
        own = transformers.AutoModelForSequenceClassification.from_pretrained(
            source.source, dtype=torch.float32, attn_implementation="eager", local_files_only=True
        ).eval()

    def sequences(feed: Mapping[str, Any]) -> Array:
        with torch.no_grad():
            return np.asarray(
                own(**{k: torch.from_numpy(np.array(v)) for k, v in feed.items()}).logits.numpy(), np.float32
            )

    return "transformers", sequences


def _over(run: Run, batches: list[Any]) -> Array:
    return np.concatenate([run(b) for b in batches])


def _trimmed(feed: Mapping[str, Any]) -> dict[str, Any]:
    """Without columns that are padding in every row."""
    mask = feed.get("attention_mask")
    if mask is None:
        return dict(feed)
    width = int(np.flatnonzero(np.asarray(mask).any(axis=0)).max()) + 1
    return {k: v[:, :width] for k, v in feed.items()}


def _rms(found: Array, wanted: Array, unit: float) -> float:
    return float(np.sqrt(np.square(found.astype(np.float64) - wanted).mean())) / unit


def _same(found: Array, wanted: Array) -> float:
    return float((found.argmax(1) == wanted.argmax(1)).mean())
