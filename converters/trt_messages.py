"""What TensorRT's builder says, as errors that a person can act on."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

#: What is in a message -> what it means and what to do.
MEANINGS: tuple[tuple[str, str], ...] = (
    (r"HW-specific datatypes: (\w+)", "{0} needs newer hardware than it is built for; leave the older ones out of --sm (fp4: 120; fp8: 89 on; int4, bf16: 80 on)"),
    (r"Attention operation was not supported", "its attention is in F32 or in a form without a kernel; export with --fp16 or --bf16"),
    (r"graph_jit.*CUDA_SUCCESS|sm_vers_\.size", "engines that can be refitted or stripped need an NVIDIA driver while they are built; build on a GPU host, or without --strip-plan and --refit"),
    (r"libnvinfer_lean", "a version-compatible engine needs the lean runtime, which is not installed"),
    (r"generateForCurrent|cudaDeviceProfile", "building for this host's GPU needs NVIDIA's driver; name what to build for, such as --sm 89"),
    (r"ssa\.cpp", "the builder's compiler failed on dynamic shapes; this is its own error: try other profiles, or --prefill-only"),
    (r"[Pp]rofile|kMIN|kMAX|kOPT", "the optimization profile does not fit the graph's inputs; change --batch, --sequence or --past"),
    (r"out of memory|OutOfMemory|bad_alloc", "not enough memory; lower --workspace or build on a larger machine"),
    (r"Plugin not found", "an operator that is a plugin; export with the trt dialect"),
)  # fmt: skip
NOISE = re.compile(
    r"catchCudaError|CUDA driver version is insufficient|Int64 binding|lazy loading", re.IGNORECASE
)


@dataclass(frozen=True)
class Message:
    """severity: error, warning or info."""

    severity: str
    text: str


def explain(messages: Sequence[Message], otherwise: str) -> str:
    """The builder's errors as one line: what they mean, and its own words, shortened."""
    errors = [m.text for m in messages if m.severity == "error"]
    for pattern, meaning in MEANINGS:
        for text in errors:
            if hit := re.search(pattern, text):
                return f"{meaning.format(*hit.groups())} [{short(text)}]"
    real = [e for e in errors if not NOISE.search(e)]
    return short((real or errors or [otherwise])[-1])


def short(text: str) -> str:
    plain = re.sub(r"\s+", " ", re.sub(r"In \w+ at /\S+", "", text))
    plain = re.sub(r"^I\w+::\w+: ", "", plain).strip()
    return plain if len(plain) <= 240 else plain[:240] + "..."


def logger(trt: Any) -> tuple[Any, list[Message]]:
    kept: list[Message] = []
    levels = {"INTERNAL_ERROR": "error", "ERROR": "error", "WARNING": "warning"}

    class Logger(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Any, text: str) -> None:
            level = levels.get(str(severity).rpartition(".")[2], "info")
            if level != "info" or len(kept) < 10_000:
                kept.append(Message(level, text))

    return Logger(), kept
