"""Round to nearest with scales that weigh errors by the inputs: sum h_j (w_j - q_j)^2 is least, h_j the mean square of input j.

That is what llama.cpp does with an importance matrix, here on every deployment grid, layer by layer behind the compressed layers before it. A
matrix that no token reached weighs all errors alike.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, replace

from lconvert.ir import Entry, Model, Tensor
from lconvert.passes import gptq
from lconvert.passes.rtn import Options
from lconvert.primitives.families import Single
from lconvert.primitives.grids import DeploymentGrid
from lconvert.primitives.job import Job, identity
from lconvert.primitives.placement import with_inputs
from lconvert.primitives.scales import FINE
from lconvert.primitives.sequential import Block, walk
from lconvert.primitives.statistics import UNSEEN, Moments, importance
from lconvert.spec import check


def run(model: Model, options: Options, job: Job) -> Model:
    """The model with every matching dense matrix of its layers, and the head, on its grid."""
    wanted = with_inputs("rtn", options, model)
    made = {role: _finely(g) for role, g in gptq.deployed(model, wanted, signed=options.signed).items()}

    def visit(block: Block) -> Mapping[str, Entry]:
        new: dict[str, Entry] = {}
        for stage in block.stages:
            roles = [role for role in stage if role in made]
            if not roles:
                continue
            moments = Moments()
            block.observe(dict.fromkeys(roles, moments))
            weights = importance(moments.squares).float() if moments.count else None
            for role in roles:
                entry, g = model.entries[role], made[role]
                assert isinstance(entry.data, Tensor)
                position, sides = g.nearest(block.weight(role), weights)
                note = f"rtn {g.placed} importance"
                if weights is None:
                    note = f"rtn {g.placed}, no input seen"
                    block.say(f"rtn: {role}: {UNSEEN}")
                data = g.qtensor(position, sides, entry.data)
                new[role] = replace(entry, data=data, provenance=(*entry.provenance, note))
                block.set(role, g.values(position, sides))
        return new

    out = walk(model, job, visit, what="rtn", key=identity("rtn", asdict(options)), head="head" in wanted)
    return check(out.with_entries({}, f"rtn: {len(wanted)} matrices to {gptq.named(wanted)}"))


def _finely(g: DeploymentGrid) -> DeploymentGrid:
    """The grid with more scales tried, as there is nothing else to choose."""
    return replace(g, family=replace(g.family, shares=FINE)) if isinstance(g.family, Single) else g
