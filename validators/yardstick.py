"""How far a compressed model is from its source: both in fp32 through transformers' layers, on the same windows of a text.

Rounded inputs (W8A8, FP8, FP4) are rounded here too, by the formulas of rounded_forward.py.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lconvert.errors import InputError
from lconvert.forward import Forward, packages
from lconvert.ir import Model
from lconvert.primitives.placement import MATRICES
from lconvert.validators import stored
from lconvert.validators.logits import compare, windows
from lconvert.validators.rounded_forward import RoundedForward, rounds

_BATCH = 8


def text_windows(model: Model, text: Path, limit: int, context: int | None = None) -> list[list[int]]:
    """The first `limit` windows of a text, BOS first; context: tokens of one, by default all that the model takes."""
    from tokenizers import Tokenizer

    if model.tokenizer is None:
        raise InputError(f"{model.source}: has no tokenizer, so no text can be shown to it")
    tokenizer = Tokenizer.from_str(json.dumps(model.tokenizer.json))
    ids = tokenizer.encode(text.read_text(encoding="utf-8"), add_special_tokens=False).ids
    bos = next(iter(model.tokenizer.special.get("bos", ())), None)
    return windows(ids, min(context or model.decoder.context, model.decoder.context), bos, limit)


class Yardstick:
    """The logits of `source` on `texts`, windows of token ids of one length, kept in memory: 4 bytes per token and piece of vocabulary."""

    def __init__(self, source: Model, texts: Sequence[list[int]]) -> None:
        self.texts = list(texts)
        self._logits = _logits(Forward(source), self.texts)

    def __call__(self, candidate: Model) -> dict[str, Any]:
        """KLD (mean with its 95% interval, 99.9% quantile), same top-1 and perplexities; bits per weight and share of zeros of its matrices."""
        got = _logits(RoundedForward(candidate) if rounds(candidate) else Forward(candidate), self.texts)
        models = {"source": lambda ids: self._logits[tuple(ids)], "candidate": lambda ids: got[tuple(ids)]}
        found = compare(models, [("source", "candidate")], self.texts)["source", "candidate"].data
        return {
            "kld_mean": found["kld"]["mean"],
            "kld_ci": found["kld"]["mean_ci"],
            "kld_p999": found["kld"]["p999"],
            "same_top1": found["same_top1"],
            "ppl": found["ppl"]["candidate"],
            "ppl_source": found["ppl"]["reference"],
            **_matrices(candidate),
        }


def _logits(forward: Forward, texts: Sequence[list[int]]) -> dict[tuple[int, ...], Any]:
    """Of every window; several at a time, because the weights are put together anew for each call. A dynamic scale of a whole
    input would span a batch, so rounded inputs go alone."""
    torch, _ = packages()
    step = 1 if isinstance(forward, RoundedForward) else _BATCH
    found: dict[tuple[int, ...], Any] = {}
    with torch.no_grad():
        for i in range(0, len(texts), step):
            batch = texts[i : i + step]
            logits = forward.module(torch.tensor(batch), use_cache=False).logits.float().numpy()
            found |= {tuple(ids): x for ids, x in zip(batch, logits, strict=True)}
    return found


def _matrices(model: Model) -> dict[str, Any]:
    """Bits per weight of the decoder layers' matrices, and the share of zeros in them."""
    import numpy as np

    from lconvert.kernels.qtensor import effective

    chosen = [e for name, e in model.entries.items() if re.fullmatch(MATRICES, name)]
    bits = stored.bits_per_weight((stored.nbytes(e.data), e.shape) for e in chosen)
    zeros = sum(int(np.count_nonzero(effective(e) == 0)) for e in chosen)
    return {"bits_per_weight": bits, "zeros": zeros / sum(e.data.size for e in chosen)}
