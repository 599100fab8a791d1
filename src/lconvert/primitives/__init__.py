"""What compression methods are made of: one small module per idea, each with its paper, formula, shapes and defaults.

    job          what all passes of one run share: text, device, memory, where finished layers are kept
    placement    which weights get which grid
    text         calibration windows
    sequential   one layer after another, fed by the compressed ones before it (skeleton, slots, listening, activations, budget, finished)
    statistics   what is summed over a matrix's inputs
    importance   mean squares of inputs in the uncompressed model
    sites        where factors can move between what makes an activation and what reads it
    folding      factors and rotations multiplied into weights
    hadamard     rotations that spread outliers
    grids        where weights may lie in the format that will be served (levels, scales, families, sides)
    gptq         errors of a column made up for by those to come (factor, sweep)
    masks        which weights are kept, by magnitude or Wanda's score, unstructured or N of every M
    sparsegpt    masks chosen, and survivors re-fitted, in one sweep
    hqq          zero points by half-quadratic splitting, without data
    zeros        which grids hold an exact 0
    allocator    one choice per item under a budget, exactly
    probe        what changing some weights does to a model's predictions
    sensitivity  what rounding a matrix costs: imatrix, Fisher, Hessian trace, measured
    evolve       improving an allocation on what it measures

Methods (lconvert.passes) are compositions of these; nothing here knows a file format or a target.
"""
