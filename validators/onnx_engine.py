"""A graph for TensorRT against TensorRT's rules, its parser and its builder, and what only a GPU could show.

TensorRT-RTX parses and builds ahead of time, without a GPU; that is said as it is: no engine was run, and RTX is not TensorRT 11. Where a
GPU and a package are, the logits tier runs the engine as well (validators/runtimes/tensorrt.py).
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from lconvert.converters import tensorrt, trt_rules
from lconvert.converters.onnx_source import Found
from lconvert.errors import UnsupportedError
from lconvert.formats import onnx_reader
from lconvert.validators import stored
from lconvert.validators.proof import Proof
from lconvert.validators.runtimes import cuda

#: Largest graph that is built as well as parsed, in bytes and in nodes: some seconds.
_BYTES, _NODES = 1 << 28, 4000
RUNTIME = "tensorrt"


def concerns(proof: Proof) -> bool:
    return proof.graph is not None and proof.graph.file.metadata.get("dialect") == "trt"


def also(proof: Proof) -> tuple[str, ...]:
    """The runtime of the graph's engine, where a GPU can run it; else a statement that none did."""
    if not concerns(proof) or RUNTIME in proof.runtimes:
        return ()
    if cuda.count():
        return (RUNTIME,)
    proof.not_proven.append(
        "logits in TensorRT: no NVIDIA GPU is here, so no engine was run; only a GPU shows the engine's numbers"
    )
    return ()


def run(proof: Proof, found: Found) -> None:
    """The rules, then parser and builder of the package that is installed."""
    if not concerns(proof):
        return
    model = onnx_reader.read(found.file.path)
    sms = tensorrt.targets(model)
    broken = [str(f) for f in trt_rules.check(model, sms)]
    proof.count("structure", "TensorRT's rules", broken, f"none of {len(trt_rules.RULES)} is broken")
    if not broken:
        proof.guarded("structure", "TensorRT's parser and builder", lambda: _engine(proof, found, sms))


def _engine(proof: Proof, found: Found, sms: tuple[int, ...]) -> None:
    """Parsed, and built where that takes seconds. Ahead of time, unless full TensorRT alone is installed."""
    backend, trt = tensorrt.ahead_of_time()
    label = backend.label.format(version=trt.__version__)
    targets = ", ".join(f"SM{sm}" for sm in sms) if backend.name == "tensorrt_rtx" else "this host's GPU"
    small = (
        stored.size(found.file.files) <= _BYTES
        and len(found.file.proto.graph.node) <= _NODES
        and (backend.name == "tensorrt_rtx" or cuda.count() > 0)
    )
    gate = "parses and builds" if small else "parses"
    proof.progress(f"{trt.__name__}: {'building' if small else 'parsing'}")
    name = f"{trt.__name__} takes it"
    try:
        if small:
            value = _built(proof, found, backend.name, sms if backend.name == "tensorrt_rtx" else ())
        else:
            value = f"{sum(tensorrt.parse(found.file.path, backend.name).values())} layers"
    except UnsupportedError as e:
        proof.add("structure", name, str(e), gate, False)
        return
    proof.add("structure", name, f"{value} ({label}; for {targets})" if small else value, gate, True)
    if not small:
        proof.not_proven.append(
            f"structure: an engine of {trt.__name__}, which would take long to build; lconvert build-engine does it"
        )
    proof.notes.append(
        f"{label}: the parser and builder took the graph; no engine was run"
        + ("; this is no validation of TensorRT 11" if backend.name == "tensorrt_rtx" else "")
    )


def _built(proof: Proof, found: Found, backend: str, sms: tuple[int, ...]) -> str:
    held = tensorrt.positions(onnx_reader.read(found.file.path)) or 64
    sequence = max(1, min(16, held // 2))
    past = max(0, min(32, held - sequence))
    options = tensorrt.Options(
        backend, (1, 1, 2), (1, 1, sequence), (0, past // 2, past), sms
    )  # fmt: skip
    with tempfile.TemporaryDirectory(prefix="lconvert-") as folder:
        report, _ = tensorrt.build(found.file.path, Path(folder) / "model.plan", options)
    proof.details["engine"] = report.to_json()
    mb = report.sizes["plan"] / 1e6
    return f"{sum(report.layers.values())} layers, {mb:.2f} MB in {report.seconds['build']:.1f} s"
