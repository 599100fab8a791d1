"""llama-quantize's mixture as the grids of a pass: which role gets which block type, so that a method rounds onto what the file holds.

The plan of the file is made first, of the model as it is; what it would round to a block type is rounded by the method instead, and is then
carried into the file block for block. Left to llama.cpp's own rounding: embeddings, which are looked up; lattices (IQ1, IQ2, IQ3),
whose codes no method chooses one by one; and k_b of MLA, which the file holds transposed.
"""

from __future__ import annotations

from lconvert.converters import gguf, gguf_mixture, methods
from lconvert.errors import OptionError
from lconvert.formats.gguf_blocks import SCHEMES
from lconvert.ir import Model, QTensor, Tensor
from lconvert.primitives.placement import NOTHING, TABLES, patterns
from lconvert.recipe import Recipe, step


def types(model: Model, options: gguf.Options) -> dict[str, str]:
    """Role -> block type of every dense matrix that a method can round for this file."""
    model, _ = gguf.without_extras(model)
    choices = gguf.chosen(model, options)
    out = {}
    for stored, choice in choices:
        scheme = SCHEMES.get(choice.type)
        if scheme is None or scheme.grid.lattice or stored.turned:
            continue
        for role in stored.roles:
            data = model.entries[role].data
            if isinstance(data, Tensor) and len(data.shape) == 2 and role not in TABLES:
                out[role] = choice.type
    return out


def recipe(method: str, model: Model, options: gguf.Options, text: str) -> Recipe:
    """The rounding of a file type by a method; no passes at all for rtn, which is the file type's own. text: for calibration.

    OptionError where the file type rounds nothing that the method could.
    """
    name = options.types.ftype
    if gguf_mixture.FTYPES[name].base is None:
        raise OptionError(
            f"--method {method} rounds onto the grids of a file type; add one, such as --q4_k_m, or write an .lcir folder "
            "with lconvert compress"
        )
    if method == methods.PLAIN:
        return Recipe(name, ())
    found = types(model, options)
    made = methods.applied(
        method,
        Recipe(name, (step("rtn", {"targets": NOTHING, "grids": patterns(found, model.decoder.layers)}),)),
        text,
    )
    if not found and not any(isinstance(e.data, QTensor) for e in model.entries.values()):
        raise OptionError(
            f"--method {method}: {name} has no grid that it rounds onto; leave out --method, or choose a type such as --q4_k_m"
        )
    methods.something_to_round(method, made, model)
    return made
