"""What compression methods are made of: one small module per idea, each with its paper, formula, shapes and defaults.

    job          what all passes of one run share: text, device, memory, where finished layers are kept
    placement    which weights get which grid
    allocator    one choice per item under a budget, exactly
    probe        what changing some weights does to a model's predictions
    sensitivity  what rounding a matrix costs: imatrix, Fisher, Hessian trace, measured
    evolve       improving an allocation on what it measures

Methods (lconvert.passes) are compositions of these; nothing here knows a file format or a target.
"""
