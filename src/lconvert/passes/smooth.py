"""SmoothQuant: outliers of activations are moved into the weights, so that both are easy to round (arXiv 2211.10438, 4).

    s_j = max|X_j|^alpha / max|W_j|^(1 - alpha)        x_j / s_j into the norm before, column j of every matrix after it times s_j

max|X_j|: of channel j over a calibration text; max|W_j|: over all matrices that read the channel, the router and every expert too.
alpha says how much of the difficulty goes to the weights: the paper takes 0.5 (OPT, BLOOM), 0.75 (GLM-130B); its authors' code takes 0.8 to
0.85 for Llama, Mistral and Mixtral. What follows rounds: W8A8 with activations per token (O1), dynamic (O2) or static (O3) per tensor.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lconvert.errors import OptionError, few
from lconvert.ir import Model
from lconvert.kernels.qtensor import effective
from lconvert.primitives import importance, text
from lconvert.primitives.folding import plain, scaled
from lconvert.primitives.job import Job
from lconvert.primitives.sites import Site, cached, sites
from lconvert.spec import check

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


_NORMS = r"layers\.\d+\.(attn|mlp)_norm"
_SLAB = 1 << 22  # values of a matrix that are read at once


@dataclass(frozen=True)
class Options:
    """alpha: 0 (all of the difficulty stays with activations) to 1 (all goes to the weights). sites: regular expression on the
    names of what makes an activation (norms; `layers.0.attn.v` before o and `layers.0.mlp.up` before down can be had as well).
    least: smallest factor."""

    alpha: float = 0.5
    sites: str = _NORMS
    least: float = 1e-5

    def __post_init__(self) -> None:
        for name, low, high in (("alpha", 0.0, 1.0), ("least", 1e-12, 1.0)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
                raise OptionError(f"smooth: {name} {value!r}; expected a number from {low:g} to {high:g}")
        try:
            re.compile(self.sites)
        except re.error as e:
            raise OptionError(f"smooth: {self.sites!r} is not a regular expression ({e})") from None


def run(model: Model, options: Options, job: Job = Job()) -> Model:  # noqa: B008 - immutable
    """The same function with the factors of every chosen site folded."""
    chosen = [s for s in sites(model.decoder) if re.fullmatch(options.sites, s.name) and not cached(model, s)]
    if not chosen:
        raise OptionError(
            f"smooth: nothing in {model.decoder.family} that factors can move through matches sites {options.sites!r}"
        )
    for name in (name for site in chosen for name in (site.name, *site.consumers)):
        plain(model, name, "scaled")  # refused before the text is run
    seen, notes = peaks(model, chosen, job)
    factors, dead = {}, list[str]()
    for site in chosen:
        if site.name not in seen:
            continue
        x, w = seen[site.name], heaviest(model, site)
        factors[site.name], count = smoothing(x, w, options)
        dead += [f"{count} of {len(x)} at {site.name}"] if count else []
    if not factors:
        raise OptionError(f"smooth: of no site that matches {options.sites!r} an activation was seen")
    out = scaled(model, factors, f"smooth alpha {options.alpha:g}")
    said = [f"smooth: {len(factors)} activations, alpha {options.alpha:g}"]
    if unseen := [s.name for s in chosen if s.name not in seen]:
        said.append(f"smooth: {few(unseen)}: no activation was seen, left as they are")
    if dead:
        said.append(f"smooth: channels without activations or weights keep the factor 1: {few(dead)}")
    for line in (*text.unsaid(notes, model), *said):
        out = out.with_entries({}, line)
    return check(out)


def smoothing(x: NDArray[Any], w: NDArray[Any], options: Options) -> tuple[NDArray[np.float64], int]:
    """Factors (channels,) from the largest magnitudes of activations and weights, and how many channels are dead (factor 1)."""
    import numpy as np

    x, w = x.astype(np.float64), w.astype(np.float64)
    dead = (x == 0) | (w == 0)
    s = np.where(dead, 1, x) ** options.alpha / np.where(dead, 1, w) ** (1 - options.alpha)
    return np.where(dead, 1, np.maximum(s, options.least)), int(dead.sum())


def heaviest(model: Model, site: Site) -> NDArray[np.float32]:
    """(channels,): the largest magnitude with which any consumer reads each channel."""
    import numpy as np

    top = np.zeros(site.channels, np.float32)
    for name in site.consumers:
        entry = model.entries[name]
        rows, cols = entry.shape
        step = max(1, _SLAB // cols)
        for a in range(0, rows, step):
            columns = np.abs(effective(entry, a, min(a + step, rows))).max(axis=0)
            np.maximum(top, site.seen(columns).max(axis=1), out=top)
    return top


def peaks(
    model: Model, chosen: Iterable[Site], job: Job
) -> tuple[dict[str, NDArray[np.float32]], tuple[str, ...]]:
    """Site name -> (channels,), the largest magnitudes over the calibration text, none for an expert that no token chose; and what the report
    should say of the text."""
    job.text("smooth")
    measured = importance.measure(model, job)
    found = measured.moments
    return {
        site.name: site.seen(found[site.consumers[0]].peak.cpu().numpy()).max(axis=1)
        for site in chosen
        if found[site.consumers[0]].count
    }, measured.notes
