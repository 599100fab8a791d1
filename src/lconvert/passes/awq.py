"""AWQ on any deployment grid, layer by layer: factors searched at every place that takes them, then clipping and rounding.

primitives/awq.py has the method, primitives/sites.py the places, primitives/grids.py the grids, primitives/sequential.py the run. In each layer:
inputs are looked at with its weights as they came, behind the compressed layers before it; factors are searched at all its places, which do
not hear of each other, and folded; then matrices are clipped and rounded stage after stage, each with the inputs that the rounded
ones before it make. Attention's queries and keys are not clipped (arXiv 2306.00978: their product makes clipping them
costly), unless asked for.

One pass does both, as both want the same grid, and the next layer's search wants this one rounded. `rounder` says what comes after the
search: nearest (the paper's), gptq (passes/gptq.py, with weights that are easier to round), or none: a transform alone, for whatever pass
rounds onto the same grid next.

Factors of norms are taken such that the norm stays exact in bfloat16: what serves it in 16 bits adds no error.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import TYPE_CHECKING, Literal

from lconvert.errors import OptionError, UnsupportedError, few
from lconvert.forward import packages
from lconvert.ir import Entry, Model, QTensor, Tensor
from lconvert.kernels.qtensor import effective
from lconvert.passes import gptq
from lconvert.primitives import awq as method
from lconvert.primitives import folding, grids
from lconvert.primitives.gptq import objective
from lconvert.primitives.grids import DeploymentGrid
from lconvert.primitives.job import Job, identity
from lconvert.primitives.placement import Placed, Placement, with_inputs
from lconvert.primitives.sequential import Block, walk
from lconvert.primitives.sites import Site, cached, sites, unfoldable
from lconvert.primitives.slots import cut, waves
from lconvert.primitives.statistics import UNSEEN, Hessian, Moments, importance, unfed
from lconvert.spec import check

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from lconvert.passes import Stage

_DUO: Mapping[str, tuple[bool, ...]] = {"inputs": (False,), "duo": (True,), "both": (False, True)}
#: Shares of the largest magnitude that clipping tries.
_STEPS = 20
#: Matrices that the paper does not clip.
_KEPT = r".*\.(q|k|q_a|q_b|kv_a|k_b)"


@dataclass(frozen=True)
class Options(Placement):
    """rounder: nearest, gptq, or none, which leaves the scaled weights dense. ratios: how many are tried. scaling: factors by inputs, by inputs and
    weights (duo), or both are tried. clip: most, all (queries and keys too) or none, with the rounder nearest. sites: regular expression on
    the names of what makes an activation (layers.0.attn_norm, layers.0.attn.v, layers.0.mlp_norm, layers.0.mlp.up, norm)."""

    rounder: Literal["nearest", "gptq", "none"] = "nearest"
    ratios: int = 20
    scaling: Literal["both", "inputs", "duo"] = "both"
    clip: Literal["most", "all", "none"] = "most"
    sites: str = ".*"

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, known in (
            ("rounder", ("nearest", "gptq", "none")),
            ("scaling", tuple(_DUO)),
            ("clip", ("most", "all", "none")),
        ):
            if getattr(self, name) not in known:
                raise OptionError(f"awq: {name} {getattr(self, name)!r}; choose {', '.join(known)}")
        if isinstance(self.ratios, bool) or not isinstance(self.ratios, int) or not 1 <= self.ratios <= 1000:
            raise OptionError(f"awq: ratios {self.ratios!r}; expected a whole number from 1 to 1000")
        try:
            re.compile(self.sites)
        except re.error as e:
            raise OptionError(f"awq: {self.sites!r} is not a regular expression ({e})") from None

    def clips(self, role: str) -> bool:
        return self.clip == "all" or (self.clip == "most" and not re.fullmatch(_KEPT, role))


def stages(options: Options) -> tuple[Stage, ...]:
    """Without a rounder it transforms alone."""
    return ("transforms",) if options.rounder == "none" else ("transforms", "rounds")


def run(model: Model, options: Options, job: Job = Job()) -> Model:  # noqa: B008 - immutable
    """The same function up to rounding: every matching dense matrix of the layers, and the head, scaled and on its grid."""
    wanted = with_inputs("awq", options, model)
    for name, placed in wanted.items():
        grids.find(placed, model.entries[name].shape[1], peak=1.0, what=name)  # refused before a text is run
    places, reasons = _places(model, options, wanted)
    most = gptq.held(job)
    threads = job.threads or os.cpu_count() or 1

    def visit(block: Block) -> Mapping[str, Entry]:
        here = [s for s in places if _index(s, model) == block.index]
        chosen = _searched(model, block, here, wanted, options, most)
        moved = _folded(model, chosen)
        new = {name: e for name, e in moved.entries.items() if e is not model.entries[name]}
        torch, _ = packages()
        for name, entry in new.items():
            block.set(name, torch.from_numpy(effective(entry).copy()))
        if options.rounder == "none":
            return new
        mine = {role: wanted[role] for stage in block.stages for role in stage if role in wanted}
        made = gptq.deployed(moved, mine)
        if options.rounder == "gptq":
            placement = {f.name: getattr(options, f.name) for f in fields(Placement)}
            return new | gptq.rounded(moved, block, made, gptq.Options(**placement), threads, most)
        said = {reader: str(one) for site, one in chosen.values() for reader in site.consumers}
        return new | _nearest(moved, block, made, said, options, most)

    out = walk(
        model,
        job,
        visit,
        what="awq",
        key=identity("awq", asdict(options)),
        statistics=gptq.need(model, wanted),
        head="head" in wanted,
    )
    onto = f"for {gptq.named(wanted)}" if options.rounder == "none" else f"to {gptq.named(wanted)}"
    for line in (*reasons, f"awq: {len(wanted)} matrices {onto}"):
        out = out.with_entries({}, line)
    return check(out)


# --- before the run --------------------------------------------------------------------------------------


def _places(model: Model, options: Options, wanted: Mapping[str, Placed]) -> tuple[list[Site], list[str]]:
    """Where factors are searched, and lines about the matrices whose inputs take none."""
    found: list[Site] = []
    held: dict[str, list[str]] = {}
    for site in sites(model.decoder):
        readers = [c for c in site.consumers if c in wanted]
        if not readers or not re.fullmatch(options.sites, site.name):
            continue
        if why := _stands(model, site):
            held.setdefault(why, []).extend(readers)
        else:
            found.append(site)
    for consumers, why in unfoldable(model.decoder):
        if readers := [c for c in consumers if c in wanted]:
            held.setdefault(why, []).extend(readers)
    return found, [f"awq: {few(names)}: not scaled; {why}" for why, names in held.items()]


def _stands(model: Model, site: Site) -> str:
    """Why a site of this model takes no factor; empty where it does."""
    if cached(model, site):
        return "the cache of values has a scale that was measured on them as they are"
    try:
        for name in (site.name, *site.consumers):
            folding.plain(model, name, "scaled")
    except UnsupportedError as e:
        return str(e)
    return ""


def _index(site: Site, model: Model) -> int:
    """The block that a site is in: a layer, or the head behind them."""
    return int(site.name.split(".")[1]) if site.name.startswith("layers.") else model.decoder.layers


# --- the search ------------------------------------------------------------------------------------------


def _searched(
    model: Model, block: Block, here: list[Site], wanted: Mapping[str, Placed], options: Options, most: int
) -> dict[str, tuple[Site, method.Try]]:
    """The best factors by site; none for activations that no token made."""
    torch, _ = packages()
    seen = {site.name: Moments() for site in here}
    block.observe({site.consumers[0]: seen[site.name] for site in here})
    tried = {s.name: _tries(s, seen[s.name], block, wanted, options) for s in here if seen[s.name].count}
    total = {name: torch.zeros(len(t), dtype=torch.float64) for name, t in tried.items()}
    home = {reader: s for s in here if s.name in tried for reader in s.consumers if reader in wanted}

    searched = [mine for stage in block.stages if (mine := tuple(role for role in stage if role in home))]
    # as many as fit, as none changes before all are known
    for together in cut(searched, lambda role: 4 * model.entries[role].shape[1] ** 2, most):
        hessians = [(roles, Hessian()) for roles in together]
        block.observe({role: h for roles, h in hessians for role in roles})
        for roles, h in hessians:
            if not h.count:
                continue
            site = home[roles[0]]
            columns = [torch.from_numpy(site.columns(one.factors)) for one in tried[site.name]]
            weights = {role: block.weight(role) for role in roles}
            total[site.name] += method.losses(weights, h.sum, columns, wanted)
    best = {
        site.name: (site, tried[site.name][int(total[site.name].argmin())])
        for site in here
        if site.name in tried
    }
    if best:
        before, after = (sum(float(pick(total[n])) for n in best) for pick in (lambda t: t[0], torch.min))
        moved = sum(one.ratio > 0 or one.duo for _, one in best.values())
        duo = sum(one.duo for _, one in best.values())
        block.say(
            f"awq: block {block.index}: {moved} of {len(here)} inputs scaled, {duo} of them by the weights too; squared error of the "
            f"outputs {after / before if before else 1:.3f} of that without"
        )
    for site in here:
        if site.name not in tried:
            block.say(f"awq: {site.name}: no token of the calibration text came here; not scaled")
    return best


def _tries(
    site: Site, seen: Moments, block: Block, wanted: Mapping[str, Placed], options: Options
) -> list[method.Try]:
    inputs = (seen.magnitudes / seen.count).cpu().numpy()
    total, rows = 0.0, 0
    for reader in site.consumers:
        if reader in wanted:
            w = block.weight(reader)
            group = grids.find(wanted[reader], w.shape[1], peak=1.0, what=reader).group
            total, rows = total + method.shares(w, group) * w.shape[0], rows + w.shape[0]
    weights = (total / rows).cpu().numpy()  # type: ignore[attr-defined]
    return method.tries(
        site.seen(inputs).mean(axis=1), site.seen(weights).mean(axis=1), options.ratios, _DUO[options.scaling]
    )


def _folded(model: Model, chosen: Mapping[str, tuple[Site, method.Try]]) -> Model:
    """The same function with the factors in their places."""
    factors = {
        name: _exact(model, site, one.factors)
        for name, (site, one) in chosen.items()
        if one.duo or one.ratio > 0
    }
    return folding.scaled(model, factors, "awq: scaled") if factors else model


def _exact(model: Model, site: Site, factors: NDArray[np.float64]) -> NDArray[np.float64]:
    """Factors next to these with which a norm's stored weights are bfloat16 numbers; those of rows as they are."""
    import numpy as np

    if site.kind == "rows":
        return factors
    torch, _ = packages()
    w, offset = folding.norm_weight(model, site.name), model.decoder.norm_offset
    stored = torch.from_numpy(w / factors - offset).to(torch.bfloat16).double().numpy() + offset
    near = w / np.where(stored == 0, 1, stored)
    good = (stored != 0) & (near > 0) & (np.abs(near / factors - 1) < 0.01)
    return np.where(good, near, factors)


# --- rounding to nearest ---------------------------------------------------------------------------------


def _nearest(
    model: Model,
    block: Block,
    made: Mapping[str, DeploymentGrid],
    said: Mapping[str, str],
    options: Options,
    most: int,
) -> dict[str, Entry]:
    """Entries of a block, clipped and rounded; it computes with them from then on."""
    new: dict[str, Entry] = {}
    for wave in waves(block.stages, made, lambda role: 4 * model.entries[role].shape[1] ** 2, most):
        hessians = [(roles, Hessian()) for roles in wave]
        block.observe({role: h for roles, h in hessians for role in roles})
        for roles, h in hessians:
            if h.count and (line := unfed(h.sum.diagonal())):
                block.say(f"awq: {', '.join(roles)}: {line}")
            for role in roles:
                new[role] = _placed(model.entries[role], block, h, made[role], said.get(role, "1"), options)
    return new


def _placed(
    entry: Entry, block: Block, h: Hessian, g: DeploymentGrid, factors: str, options: Options
) -> Entry:
    assert isinstance(entry.data, Tensor)
    w = block.weight(entry.name)
    if not h.count:
        position, sides = g.nearest(w)
        note = "no input seen"
        block.say(f"awq: {entry.name}: {UNSEEN}")
    else:
        target = method.clipped(w, h.sum, g, _STEPS) if options.clips(entry.name) else w
        position, sides = g.nearest(target, importance(h.sum.diagonal()))
        sides = g.rescaled(w, position, sides, h.sum)
        whole = float(objective(w, w * 0, h.sum).sum())
        lost = float(objective(w, g.values(position, sides), h.sum).sum())
        clipped = float((target != w).float().mean())
        note = f"factors {factors}, {clipped:.1%} clipped, loss {lost / max(whole, 1e-300):.3e}"
    block.set(entry.name, g.values(position, sides))
    q: QTensor = g.qtensor(position, sides, entry.data)
    return replace(entry, data=q, provenance=(*entry.provenance, f"awq {g.placed}, {note}"))
