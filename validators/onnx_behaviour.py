"""A decoder's graph against itself, in the ways in which generation uses it: what a prompt says at once it must say token by token, out of
a long past, and in a batch beside longer prompts with padding on the left, or on the right where onnxruntime-genai has it.

The comparison of logits runs whole windows, which no mistake in the cache, in positions after a past or in the mask of padding shows.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lconvert.errors import InputError
from lconvert.validators import logit_gates
from lconvert.validators.logits import log_softmax
from lconvert.validators.proof import Proof
from lconvert.validators.runtimes.onnxruntime import OnnxRuntime

#: Tokens that are run one by one at the beginning and at the end of a prompt.
_SINGLE = 8
#: Lengths of the prompts of a batch, and the steps after them.
_BATCH, _STEPS = (5, 24, 13), 4


def run(proof: Proof, runtime: OnnxRuntime, texts: list[list[int]], dtype: str) -> None:
    """Both checks, for graphs that have the inputs for them."""
    if not runtime.caches:
        proof.notes.append("logits: the graph keeps no keys and values, so there are no steps to compare")
        return
    gate = logit_gates.noise(proof, "onnxruntime", dtype)
    proof.progress("step by step")
    ids = texts[0][: _length(proof, len(texts[0]))]

    def steps() -> float:
        logits, where = stepped(runtime, ids)
        return _mean(runtime.logits(ids)[where], logits)

    name = "step by step: KL divergence from the whole prompt"
    _judge(proof, name, f"over {len(ids)} tokens", steps, gate)
    genai = proof.graph is not None and proof.graph.file.metadata.get("dialect") == "genai"
    if genai:
        proof.not_proven.append(
            "logits: onnxruntime-genai's own loop; the graph was run in plain ONNX Runtime"
        )
    if not runtime.pads and not (genai and runtime.batches):
        proof.not_proven.append(
            "logits: padding on the left; the graph takes no attention_mask, no position_ids or no batch"
        )
        return
    side = "right" if genai else "left"
    proof.progress(f"padding on the {side}")
    name = f"padding on the {side}: KL divergence from each prompt alone"
    prompts = [ids[:n] for n in _BATCH]
    _judge(proof, name, f"in a batch of {len(_BATCH)}", lambda: padded(runtime, prompts, right=genai), gate)


def _judge(proof: Proof, name: str, of: str, measure: Callable[[], float], gate: float) -> None:
    """A gate on a mean divergence; a graph that the runtime cannot run in this way fails it."""
    try:
        value = measure()
    except InputError as e:
        proof.add("logits", name, str(e), "runs to the end", False)
        return
    proof.at_most("logits", name, f"mean {value:.2e} {of}", value, gate, f"mean <= {gate:.1e}")


def _length(proof: Proof, most: int) -> int:
    """As many tokens as do not change the factors of longrope on the way, which depend on the longest position of a run."""
    ropes = (layer.attention.rope for _, layer in proof.source.decoder.each())
    limits = [r.original_context for r in ropes if r is not None and r.scaling == "longrope"]
    return min([most, *limits])


def stepped(runtime: OnnxRuntime, ids: list[int]) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Logits of a prompt: its first tokens one by one, the middle in two parts, the last ones one by one. Besides, the positions of
    which there are logits."""
    single = min(_SINGLE, len(ids) // 3)
    middle = len(ids) - 2 * single
    parts = [*[1] * single, middle // 2, middle - middle // 2, *[1] * single]
    past, out, at = runtime.empty(capacity=len(ids)), [], 0  # a cache of fixed length is full at the end
    where: list[NDArray[np.int64]] = []
    for n in filter(None, parts):
        positions = np.arange(at, at + n)[None]
        logits, past = runtime.forward(np.array([ids[at : at + n]]), np.ones((1, at + n)), positions, past)
        out.append(logits[0])
        at += n
        where.append(np.arange(at - len(logits[0]), at))
    return np.concatenate(out), np.concatenate(where)


def padded(runtime: OnnxRuntime, prompts: list[list[int]], *, right: bool = False) -> float:
    """Mean KL divergence of a batch from its prompts one by one, the steps after them included. Rows of padding must be finite.

    right: the padding is behind the prompts, as onnxruntime-genai has it (GroupQueryAttention takes no other)."""
    width, more = max(map(len, prompts)), prompts[-1][:_STEPS]

    def filled(rows: list[list[int]]) -> NDArray[np.int64]:
        return np.array([r + [0] * (width - len(r)) if right else [0] * (width - len(r)) + r for r in rows])

    mask = filled([[1] * len(p) for p in prompts])
    past = runtime.empty(len(prompts))
    logits, past = runtime.forward(filled(prompts), mask, np.maximum(mask.cumsum(1) - 1, 0), past)
    if not np.isfinite(logits).all():
        return float("inf")
    found: list[list[Any]] = [
        [row[: len(p)] if right else row[-min(len(p), len(row)) :]]
        for row, p in zip(logits, prompts, strict=True)
    ]
    for token in more:
        mask = np.concatenate([mask, np.ones((len(prompts), 1), int)], 1)
        logits, past = runtime.forward(
            np.full((len(prompts), 1), token), mask, mask.sum(1)[:, None] - 1, past
        )
        for row, own in zip(logits, found, strict=True):
            own.append(row)
    pairs = zip(prompts, found, strict=True)
    return max(
        _mean(runtime.logits([*p, *more])[len(p) - len(own[0]) :], np.concatenate(own)) for p, own in pairs
    )


def _mean(p: NDArray[np.float32], q: NDArray[np.float32]) -> float:
    """Mean KL(p || q) of the positions; infinite where numbers are not finite."""
    if not (np.isfinite(p).all() and np.isfinite(q).all()):
        return float("inf")
    total = 0.0
    for x, y in zip(p, q, strict=True):
        a, b = log_softmax(x[None]), log_softmax(y[None])
        total += float((np.exp(a) * (a - b)).sum())
    return total / len(p)
