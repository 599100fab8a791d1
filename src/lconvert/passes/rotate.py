"""Rotations folded into the weights, so that outliers are spread over all channels before anything is rounded (QuaRot, arXiv 2404.00456, 3.1).

    R1   the residual stream h -> h R: embedding and everything that adds to the stream turn what they make, everything that reads it
         turns it back. RMS norms commute with R once their weights are moved into the matrices that follow.
    R2   the values of each head: v turns them, o turns them back. Per layer; attention only sums values.

The function stays, nothing is left to do at run time, and every target takes the result. `block` turns runs of 16 .. 128 channels each by itself,
which is MR-GPTQ's transform for microscaled floats (arXiv 2509.23202) as far as it folds: the inputs of q, k, v, gate, up and the head through R1,
of o through R2. What enters down has passed the gate's nonlinearity and would have to be turned at run time, so it is left as it is. A tied head becomes a matrix of its own: it
holds the last norm's weight, which the embedding does not.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, get_args

from lconvert.errors import OptionError, UnsupportedError
from lconvert.ir import Decoder, Entry, Model, Transform, dense
from lconvert.primitives import masks
from lconvert.primitives.folding import Change, changed, norm_weight, noted, plain, times
from lconvert.primitives.hadamard import Kind, Rotation, rotation
from lconvert.primitives.job import Job
from lconvert.primitives.sites import Site, adding, cached, sites, unfoldable
from lconvert.spec import check

if TYPE_CHECKING:
    from lconvert.primitives.folding import Linear

#: Blocks whose norms act on what is added to the residual stream.
_WEIGHED = ("post", "sandwich")


@dataclass(frozen=True)
class Options:
    """r1: turn the residual stream; r2: turn the values of each head. random: hadamard (a Hadamard matrix with random signs) or
    orthogonal (any size, uniformly random). block: turn every run of so many neighbouring channels by itself, 0 for all of them
    together. The run's seed chooses signs and rotations."""

    r1: bool = True
    r2: bool = True
    random: Kind = "hadamard"
    block: int = 0

    def __post_init__(self) -> None:
        if (
            isinstance(self.block, bool)
            or not isinstance(self.block, int)
            or self.block < 0
            or self.block == 1
        ):
            raise OptionError(
                f"rotate: block {self.block!r}; expected channels that turn together, such as 32, or 0 for all"
            )
        if self.random not in get_args(Kind):
            raise OptionError(f"rotate: random {self.random!r}; choose {', '.join(get_args(Kind))}")
        if not (self.r1 or self.r2):
            raise OptionError("rotate: neither r1 nor r2 is asked for")


def calibrated(options: Options) -> bool:
    """Rotations are the same whatever the text."""
    return False


def obstacles(model: Model, options: Options) -> list[str]:
    """Why `model` cannot take these rotations, in words; empty where it can."""
    d, found = model.decoder, []
    if options.r1:
        found += [f"r1: {reason}" for reason in _fixed_channels(d)]
    if options.r2:
        found += [f"r2: {reason}" for reason in _fixed_values(model)]
    return found


def _fixed_channels(d: Decoder) -> list[str]:
    """What ties the residual stream to its channels."""
    found = []
    if d.norm != "rms":
        found.append(f"{d.family}'s norms subtract the mean of all channels, which a rotation does not keep")
    elif d.norm_bias:
        found.append(f"{d.family}'s norms add a bias, which not every matrix after them can take")
    if any(layer.block in _WEIGHED for _, layer in d.each()):
        found.append(
            f"{d.family}'s norms after attention and MLP weigh single channels of the residual stream, whose channels turn together"
        )
    return found


def _fixed_values(model: Model) -> list[str]:
    d = model.decoder
    found = [reason for consumers, reason in unfoldable(d) if consumers and consumers[0].endswith(".attn.o")]
    if any(cached(model, site) for site in _heads(d)):
        found.append("the cache of values has a scale that was measured on them as they are")
    return list(dict.fromkeys(found))


def run(model: Model, options: Options, job: Job = Job()) -> Model:  # noqa: B008 - immutable
    """The same function with rotated weights: dense, F32, computed lazily in fp64. UnsupportedError where the architecture or zeros of a
    pruned model stand in the way: turned weights are sums of kept and pruned ones."""
    if line := masks.said(model):
        raise UnsupportedError(
            f"rotate: leaves nothing of the model's zeros ({line}); rotate first, prune then"
        )
    if found := obstacles(model, options):
        parts = {line[:2] for line in found}
        rest = "r2" if options.r2 and "r2" not in parts else "r1" if options.r1 and "r1" not in parts else ""
        hint = f"; {rest} alone is possible ({'r1' if rest == 'r2' else 'r2'}: false)" if rest else ""
        raise UnsupportedError(f"rotate: {'; '.join(found)}{hint}")
    seed = job.calibration.seed
    done = _Changes(untied(model) if options.r1 else model)
    transforms = []
    if options.r1:
        turn = _turn(model.decoder.hidden, options, "residual stream", seed, 0)
        done.residual(turn)
        transforms.append(_record("residual", turn))
    if options.r2:
        for i, site in enumerate(_heads(model.decoder), start=1):
            turn = _turn(site.run, options, site.name, seed, i)
            done.values(site, turn)
            transforms.append(_record(site.name, turn))
    what = [
        name for name, on in (("the residual stream", options.r1), ("values of each head", options.r2)) if on
    ]
    blocks = f" in blocks of {options.block}" if options.block else ""
    said = f"rotate: {' and '.join(what)}, {options.random}{blocks}, seed {seed}"
    out = done.model.with_entries(done.entries(f"rotate {options.random}"), said)
    return check(replace(out, transforms=(*model.transforms, *transforms)))


def _turn(size: int, options: Options, where: str, *seed: int) -> Rotation:
    """The rotation of `size` channels, whole or in blocks; heads smaller than a block turn whole."""
    if not options.block or size <= options.block:
        return rotation(size, options.random, *seed)
    if size % options.block:
        raise OptionError(f"rotate: {where}: {size} channels do not divide into blocks of {options.block}")
    part = rotation(options.block, options.random, *seed)
    return Rotation(size, part.param, part.runs)


def _record(where: str, turn: Rotation) -> Transform:
    import numpy as np

    return Transform("rotate", where, dense(turn.param.astype(np.float32)))


def _heads(d: Decoder) -> list[Site]:
    """Where values of heads pass."""
    return [s for s in sites(d) if s.name.endswith((".attn.v", ".attn.v_b"))]


def untied(model: Model) -> Model:
    """The model with a head of its own."""
    d = model.decoder
    if not d.tied:
        return model
    embed = model.entries["embed"]
    head = Entry("head", embed.data, embed.activation, embed.transform, (*embed.provenance, "untied"))
    config = {**model.config, "tie_word_embeddings": False} if model.config else {}
    return replace(model, arch=replace(d, tied=False), config=config, entries={**model.entries, "head": head})


class _Changes:
    """What is done to each matrix, collected, so that each is rounded once."""

    def __init__(self, model: Model) -> None:
        self.model = model
        self._columns: dict[str, tuple[Linear, ...]] = {}
        self._rows: dict[str, tuple[Rotation, int]] = {}
        self._norms: dict[str, Entry] = {}

    def residual(self, turn: Rotation) -> None:
        """h -> h R."""
        import numpy as np

        d = self.model.decoder
        for site in sites(d):
            if site.kind != "norm" or site.name.endswith("_a_norm"):
                continue
            weight, norm = norm_weight(self.model, site.name), self.model.entries[site.name]
            one = np.full(site.channels, 1 - d.norm_offset, np.float32)
            note = "moved into the matrices that follow"
            self._norms[site.name] = noted(norm, dense(one, "F32", norm.data.origin), note)
            for name in site.consumers:
                self._columns[name] = (times(weight), turn)
        self._columns["embed"] = (turn,)
        for name in adding(d):
            self._rows[name] = (turn, d.hidden)

    def values(self, site: Site, turn: Rotation) -> None:
        """Values of each head -> values R, and back before the sum over heads."""
        self._rows[site.name] = (turn, site.run)
        (o,) = site.consumers
        self._columns[o] = (*self._columns.get(o, ()), turn.runs)

    def entries(self, note: str) -> dict[str, Entry]:
        """Every entry that changes."""
        new = dict(self._norms)
        for name in dict.fromkeys((*self._columns, *self._rows)):
            entry = self.model.entries[name]
            columns = self._columns.get(name, ())
            if columns and entry.transform is not None:
                raise UnsupportedError(
                    f"{name}: its input is scaled channel by channel at run time, and channels turn together; fold the scale first"
                )
            rows, run = self._rows.get(name, (None, 1))
            new[name] = noted(
                entry, changed(plain(self.model, name, "turned"), Change(columns, None, rows, run)), note
            )
            bias = self.model.entries.get(name + ".bias")
            if rows is not None and bias is not None:
                held = changed(plain(self.model, bias.name, "turned"), Change(rows=rows, run=run))
                new[bias.name] = noted(bias, held, note)
        return new
