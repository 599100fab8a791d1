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


def encode(model: Model, text: Path) -> list[int]:
    from tokenizers import Tokenizer

    assert model.tokenizer is not None
    tokenizer = Tokenizer.from_str(json.dumps(model.tokenizer.json))
    ids: list[int] = tokenizer.encode(text.read_text(encoding="utf-8"), add_special_tokens=False).ids
    return ids


class Yardstick:
    """The source's logits on `windows` windows of a text, BOS first, kept in memory."""

    def __init__(self, source: Path, text: Path, windows: int) -> None:
        model = lconvert.read(str(source))
        assert model.tokenizer is not None
        bos = next(iter(model.tokenizer.special.get("bos", ())), None)
        self.texts = split(encode(model, text), model.decoder.context, bos, windows)
        forward = Forward(model)
        self._logits = {tuple(ids): forward.logits(ids) for ids in self.texts}

    def __call__(self, candidate: Path) -> dict[str, Any]:
        model = lconvert.read(str(candidate))
        forward = RoundedForward(model) if rounds(model) else Forward(model)
        models = {"source": lambda ids: self._logits[tuple(ids)], "candidate": forward.logits}
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
