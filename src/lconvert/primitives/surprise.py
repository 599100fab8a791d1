"""Whether a model knows what it is calibrated on: how well it predicts the text, against what the text's own token frequencies predict.

Statistics of a text in a language that the model was never taught say little of its use. A tokenizer shows that where it has no pieces for the
text (text.py `doubts`); where it has, only the model does. It is measured on the uncompressed model, on the first windows alone, while
layers are in memory anyway: a few percent of one pass over the text.

The bar needs no number of its own: an adaptive code of order zero, in which a token costs by how often it has occurred before, a new one an
escape and a uniform choice of the vocabulary (J. Cleary and I. Witten, IEEE Trans. Commun. 32(4), 1984; escapes as in A. Moffat's method C, ibid. 38(11),
1990). It knows nothing of the language and learns from these few windows, so a model that does worse knows less than nothing of the text.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from lconvert.forward import packages
from lconvert.ir import Model
from lconvert.kernels.qtensor import effective

if TYPE_CHECKING:
    from lconvert.primitives.text import Windows

#: Tokens on which the model is asked at most, and the share of all windows.
_TOKENS, _SHARE = 1024, 16
#: Rows of the output matrix that are held at once.
_ROWS = 8192


def asked(shown: Windows) -> int:
    """How many of the first windows the model is asked about; 0 for a text of so few tokens that the code has learnt nothing."""
    if shown.tokens < 4 * _TOKENS:
        return 0
    return max(1, min(len(shown.ids) // _SHARE, _TOKENS // shown.length))


def by_frequency(windows: Sequence[Sequence[int]], vocabulary: int) -> float:
    """Nats per token of the adaptive code, over all windows one after another."""
    seen: Counter[int] = Counter()
    total, count = 0.0, 0
    for token in (t for w in windows for t in w):
        kinds = len(seen)
        if token in seen:
            share = seen[token] / (count + kinds)
        else:  # an escape, which the first token needs not
            share = (kinds / (count + kinds) if kinds else 1.0) / vocabulary
        total -= math.log(share)
        seen[token] += 1
        count += 1
    return total / count


def by_model(model: Model, normed: Any, windows: Sequence[Sequence[int]]) -> float:
    """Nats per token of the model's own predictions. normed (w, t, d): what the final norm makes of the last layer's outputs."""
    torch, _ = packages()
    d = model.decoder
    x = normed[:, :-1].reshape(-1, normed.shape[-1])
    wanted = torch.tensor([t for w in windows for t in w[1:]], device=x.device)
    head, bias = model.entries["embed" if d.tied else "head"], model.entries.get("head.bias")
    total, hit = None, torch.zeros(len(x), dtype=x.dtype, device=x.device)
    for a in range(0, head.shape[0], _ROWS):
        b = min(a + _ROWS, head.shape[0])
        logits = x @ x.new_tensor(effective(head, a, b)).T
        if bias is not None:
            logits += x.new_tensor(effective(bias)[a:b])
        logits *= d.logit_scale
        if d.final_softcap is not None:
            logits = d.final_softcap * torch.tanh(logits / d.final_softcap)
        part = logits.logsumexp(1)
        total = part if total is None else torch.logaddexp(total, part)
        here = (wanted >= a) & (wanted < b)
        hit[here] = logits[here, wanted[here] - a]
    return float((total - hit).mean(dtype=torch.float64))


def doubts(name: str, model: float, frequency: float) -> tuple[str, ...]:
    """What the report should say of a text `name`, of nats per token by the model and by the code."""
    if model <= frequency:
        return ()
    said = (
        f"calibration: the model predicts {name} worse than the frequencies of its tokens alone do (perplexity {math.exp(model):.0f} "
        f"against {math.exp(frequency):.0f}); the text may be of a language or kind that it was not trained on"
    )
    return (said,)
