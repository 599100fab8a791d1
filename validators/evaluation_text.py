"""What both models are shown: windows of the evaluation text, as far as the model and the artifact go."""

from __future__ import annotations

import numpy as np

from lconvert.archs import find
from lconvert.archs.common import Loss
from lconvert.errors import InputError
from lconvert.validators import onnx_tier
from lconvert.validators.logits import LEAST, windows
from lconvert.validators.proof import Proof
from lconvert.validators.runtimes.hf import encode

#: Tokens below which neighbours are too few for intervals (8 blocks of the bootstrap).
_FEW = 256


def window(proof: Proof) -> int:
    """Tokens per window: as asked for, as the model has, and as far as the artifact is exact."""
    limits = [loss.limit for loss in _losses(proof) if loss.limit]
    if proof.graph is not None:
        limits.append(onnx_tier.positions(proof.graph))
    return min(proof.options.context, proof.source.decoder.context, *limits)


def shown(proof: Proof, context: int) -> list[list[int]]:
    """Token ids of the windows, and what is to be said of them. InputError where they are too few to prove anything."""
    _limits(proof, context)
    texts = windows(token_ids(proof), context, _bos(proof), proof.options.max_windows)
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
    return texts


def _losses(proof: Proof) -> tuple[Loss, ...]:
    """What the artifact's format lacks of the source's traits."""
    d = proof.source.decoder
    return find(d.family).gguf.losses(d) if proof.kind == "gguf" else ()


def _limits(proof: Proof, context: int) -> None:
    """What the artifact lacks, and why windows are shorter than asked for."""
    if context < proof.options.context:
        proof.notes.append(f"logits: windows of {context} tokens, as far as the model and the artifact go")
    for loss in _losses(proof):
        limit = f"exact up to {loss.limit} tokens and validated within that" if loss.limit else "accepted"
        proof.notes.append(f"{loss.name}: {loss.reason}; {limit}")


def token_ids(proof: Proof) -> list[int]:
    """Ids of the evaluation text."""
    if proof.tokenizer is None:
        proof.notes.append("no tokenizer: logits are compared on random token ids")
        return [int(i) for i in np.random.default_rng(0).integers(0, proof.source.decoder.vocab, 4096)]
    return encode(proof.tokenizer, proof.corpus, special=True)


def _bos(proof: Proof) -> int | None:
    tokenizer = proof.source.tokenizer
    found = tokenizer.special.get("bos", ()) if tokenizer is not None else ()
    return found[0] if found else None
