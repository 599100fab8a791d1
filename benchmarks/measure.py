"""How far a compressed model is from its source: both in fp32 through transformers' layers, on the same windows of a text.

Rounded inputs (W8A8, FP8, FP4) are rounded here too, by the formulas of validators/rounded_forward.py.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import lconvert
from lconvert.forward import Forward
from lconvert.ir import Model
from lconvert.primitives.placement import MATRICES
from lconvert.validators import stored
from lconvert.validators.logits import compare
from lconvert.validators.logits import windows as split
from lconvert.validators.rounded_forward import RoundedForward, rounds

_BATCH = 8


def encode(model: Model, text: Path) -> list[int]:
    from tokenizers import Tokenizer

    assert model.tokenizer is not None
    tokenizer = Tokenizer.from_str(json.dumps(model.tokenizer.json))
    ids: list[int] = tokenizer.encode(text.read_text(encoding="utf-8"), add_special_tokens=False).ids
    return ids


def _logits(forward: Forward, texts: list[list[int]]) -> dict[tuple[int, ...], Any]:
    """Of every window; several at a time, because the weights are put together anew for each call. A dynamic scale of a whole
    input would span a batch, so rounded inputs go alone."""
    import torch

    step = 1 if isinstance(forward, RoundedForward) else _BATCH
    found = {}
    with torch.no_grad():
        for i in range(0, len(texts), step):
            batch = texts[i : i + step]
            logits = forward.module(torch.tensor(batch), use_cache=False).logits.float().numpy()
            found |= {tuple(ids): x for ids, x in zip(batch, logits, strict=True)}
    return found


class Yardstick:
    """The source's logits on `windows` windows of a text, BOS first, kept in memory."""

    def __init__(self, source: Path, text: Path, windows: int) -> None:
        model = lconvert.read(str(source))
        assert model.tokenizer is not None
        bos = next(iter(model.tokenizer.special.get("bos", ())), None)
        self.texts = split(encode(model, text), model.decoder.context, bos, windows)
        self._logits = _logits(Forward(model), self.texts)

    def __call__(self, candidate: Path) -> dict[str, Any]:
        model = lconvert.read(str(candidate))
        forward = RoundedForward(model) if rounds(model) else Forward(model)
        got = _logits(forward, self.texts)
        models = {"source": lambda ids: self._logits[tuple(ids)], "candidate": lambda ids: got[tuple(ids)]}
        found = compare(models, [("source", "candidate")], self.texts)["source", "candidate"].data
        return {
            "kld_mean": found["kld"]["mean"],
            "kld_ci": found["kld"]["mean_ci"],
            "kld_p999": found["kld"]["p999"],
            "same_top1": found["same_top1"],
            "ppl": found["ppl"]["candidate"],
            "ppl_source": found["ppl"]["reference"],
            "bytes": stored.stored(candidate)[0],
            **_matrices(model),
        }


def _matrices(model: Model) -> dict[str, Any]:
    """Bits per weight of the decoder layers' matrices, and the share of zeros in them."""
    import numpy as np

    from lconvert.kernels.qtensor import effective

    chosen = [e for name, e in model.entries.items() if re.fullmatch(MATRICES, name)]
    bits = stored.bits_per_weight((stored.nbytes(e.data), e.shape) for e in chosen)
    zeros = sum(int(np.count_nonzero(effective(e) == 0)) for e in chosen)
    return {"bits_per_weight": bits, "zeros": zeros / sum(e.data.size for e in chosen)}
